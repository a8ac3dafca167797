"""A factor model of 1,797 handwritten digits: codes of digits never seen, and what amortizing cost. Two minutes.

Every pixel of scikit-learn's 8 x 8 digits is a count from 0 to 16. The model explains a digit by a code of ten numbers
and loadings that all digits share:

    code_n ~ Normal(0, 1)^10,    pixel_nd ~ Binomial(16, logits = intercept_d + code_n @ loadings_d)

An encoder learns the map from pixels to q(code_n) on 1,500 digits, and answers for the 297 others at once.

Run it with ``make demo`` or ``python tutorials/demo.py``; figures are written to ``figures/``.
"""

import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from pyro_amortize import (
    AutoAmortizedNormal,
    amortization_gap,
    compare_inference,
    fit_svi,
    plan_amortization,
    run_mcmc,
)

CODE, PIXELS, LEVELS = 10, 64, 16
FIGURES = Path("figures")

# One schedule for every fit, so that a difference between two fits is a difference between two guides. With 0.99 in
# place of its default 0.999, Adam forgets the large gradients of the first steps sooner.
SCHEDULE = {
    "num_steps": 2500,
    "optim": lambda parameters: torch.optim.Adam(parameters, lr=0.05, betas=(0.9, 0.99)),
    "seed": 0,
}


def model(counts):
    """A binomial factor model: nothing in it knows that its guide will be amortized."""
    intercept = pyro.sample("intercept", dist.Normal(torch.zeros(PIXELS), 3.0).to_event(1))
    loadings = pyro.sample("loadings", dist.Normal(torch.zeros(CODE, PIXELS), 1.0).to_event(2))
    with pyro.plate("digits", len(counts)):
        code = pyro.sample("code", dist.Normal(torch.zeros(CODE), 1.0).to_event(1))
        pixels = dist.Binomial(LEVELS, logits=intercept + code @ loadings)
        pyro.sample("pixels", pixels.to_event(1), obs=counts)


def load_counts(num_seen=1500):
    """Returns digits to train on and digits to keep unseen, in an order that a seed fixes."""
    counts = torch.tensor(load_digits().data, dtype=torch.float32)
    counts = counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))]
    return counts[:num_seen], counts[num_seen:]


def heading(text):
    print(f"\n{text}\n{'=' * len(text)}\n", flush=True)


def save(figure, name):
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / name, dpi=150)
    print(f"{FIGURES / name}", flush=True)


def check_by_mcmc(guide, report, unseen, num_digits=4):
    """Sets q(code) of a few digits against NUTS, loadings and intercept held at the same values for all."""
    mcmc = run_mcmc(
        model, unseen[:num_digits], given=report.given, num_samples=700, warmup_steps=200, num_chains=2, seed=0
    )
    print(mcmc)
    draws = mcmc.samples["code"].flatten(0, 1)
    mean, sd = draws.mean(0), draws.std(0)

    def against_mcmc(posterior):
        error = (posterior.mean["code"][:num_digits] - mean) / sd
        return error.square().mean(-1).sqrt(), (posterior.stddev["code"][:num_digits] / sd).mean(-1)

    # The best normals for these digits, found one by one, tell the encoder's part of an error from the family's.
    columns = [*against_mcmc(guide.posterior(unseen)), *against_mcmc(report.optimum.guide.posterior(unseen))]
    print("\n        error of the mean, in sd of MCMC     sd, as a share of that of MCMC")
    print("digit          encoder       best normal          encoder       best normal")
    for n in range(num_digits):
        error, ratio, best_error, best_ratio = (float(column[n]) for column in columns)
        print(f"{n:>5}{error:>17.2f}{best_error:>18.2f}{ratio:>17.2f}{best_ratio:>18.2f}")
    noise = float(mcmc.ess["code"].reciprocal().mean().sqrt())
    print(f"\nErrors are root mean squares over the {CODE} numbers of a code; {noise:.2f} of them is MCMC's own noise.")


def draw_reconstructions(guide, digits):
    """Draws digits, and what the model expects to see again given their codes, with its uncertainty."""
    replicated = guide.predictive(digits, num_samples=500)["pixels"]
    rows = {
        "unseen digit": (digits, "gray_r", LEVELS),
        "predictive\nmean": (replicated.mean(0), "gray_r", LEVELS),
        "predictive\nsd": (replicated.std(0), "viridis", float(replicated.std(0).max())),
    }
    figure = Figure(figsize=(1 + len(digits), 3.9), layout="constrained")
    axes = figure.subplots(len(rows), len(digits))
    for row, (label, (images, colors, top)) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            shown = axis.imshow(image.reshape(8, 8), cmap=colors, vmin=0, vmax=top)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
        figure.colorbar(shown, ax=row, label="counts", pad=0.01)
    figure.suptitle(
        "Digits never seen in training, and what the model expects to see again, given each (500 predictive draws)"
    )
    return figure


def main():
    start = time.perf_counter()
    seen, unseen = load_counts()
    pyro.set_rng_seed(0)

    heading("1. The plan: what the guide will be, before any training")
    print(plan_amortization(model, seen))

    heading(f"2. Fit the amortized guide to {len(seen)} digits")
    guide = AutoAmortizedNormal(model)
    fit = fit_svi(model, guide, seen, **SCHEDULE)
    print(fit)

    heading("3. Against mean-field: a row of parameters for each digit, the same steps")
    comparison = compare_inference(
        model, seen, methods={"amortized": fit, "mean_field": "mean_field"}, svi=SCHEDULE, num_draws=300
    )
    print(comparison)

    heading(f"4. What amortizing cost on {len(unseen)} digits that no fit has seen")
    report = amortization_gap(model, guide, unseen)
    print(report)
    print(
        "\namortization gap: what the encoder loses against the best normal for each digit, found by optimizing it.\n"
        "approximation gap: what that best normal loses against the exact posterior. Both in nats a digit."
    )

    heading("5. Against MCMC on four unseen digits, loadings and intercept held at the guide's medians")
    check_by_mcmc(guide, report, unseen)

    heading("6. Figures")
    save(draw_reconstructions(guide, unseen[:10]), "reconstructions.png")
    elbo = comparison.plot()
    elbo.suptitle(f"Training on {len(seen)} digits, the same steps and learning rates for both guides")
    save(elbo, "elbo.png")
    gaps = report.plot()
    gaps.suptitle(f"What the guide loses on each of {len(unseen)} unseen digits")
    save(gaps, "gaps.png")

    print(f"\nAll of this took {time.perf_counter() - start:.0f} seconds.")


if __name__ == "__main__":
    main()
