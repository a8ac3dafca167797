"""Small models whose gaps are known in closed form: are these found?

* Gamma(2, 1)-Poisson: a LogNormal q loses 0.041341, 0.027678, 0.016645, 0.006943 nats at counts of 0, 1, 3, 10, and a
  Gamma q, written by hand, none.
* Probabilistic PCA with noise variance 0.5: independent normals lose 0.290920 nats a datum, whatever the datum, and a
  linear encoder nothing more; a normal with full covariance, written by hand, loses none.
* The linear model: an encoder that sees theta's draw beside x_n, written by hand, loses nothing, and the sd of q(theta)
  is the posterior's, which independent normals understate.
* z ~ N(0, 1), x ~ N(z, 1): a const guide loses a quarter of the variance of x, in nats a datum.

Run it with ``make paper PAPER=closed_forms``, a minute, or with ``PAPER_OPTIONS=--quick``, within a minute.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from benchmarks.paper.experiment import report
from benchmarks.results import parser_of, table, use_threads
from pyro_amortize import MLP, AutoAmortizedNormal, Constant, amortization_gap, fit_svi

SIZES = {
    "repeats": (50, 5, "data of each count; ten times as many data of the other models"),
    "steps": (2000, 300, "steps of a fit"),
    "draws": (4000, 500, "draws behind each gap"),
}
"""Of each option its default, its value with --quick, and its meaning."""
COUNTS = 0, 1, 3, 10
LOG_NORMAL_GAPS = 0.041341, 0.027678, 0.016645, 0.006943
NOISE = 0.5
TAU, SIGMA, WIDE = 1.155, 2.43, 10.0
W = torch.as_tensor(np.random.default_rng(0).normal(size=(8, 3)))


def gamma_poisson(x):
    """A rate for each count."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def gamma_guide(x):
    """Its exact posterior."""
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(2 + x, 2.0))


def ppca(x):
    """Three factors behind eight numbers."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, math.sqrt(NOISE)).to_event(1), obs=x)


def ppca_guide(x):
    """Its exact posterior."""
    precision = torch.eye(3, dtype=W.dtype) + W.T @ W / NOISE
    with pyro.plate("data", len(x)):
        mean = x @ W @ precision.inverse() / NOISE
        pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))


def linear(x):
    """A mean that all numbers share."""
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), WIDE))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(theta + TAU * z, SIGMA), obs=x)


def linear_guide(x):
    """An encoder of x_n and theta, linear in both."""
    loc, slope, slope_of_theta, offset = (
        pyro.param(name, x.new_zeros(())) for name in ("loc", "slope", "slope_of_theta", "offset")
    )
    scale_of_theta, scale = (
        pyro.param(name, x.new_tensor(0.3), constraint=constraints.positive) for name in ("scale_of_theta", "scale")
    )
    theta = pyro.sample("theta", dist.Normal(loc, scale_of_theta))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x + slope_of_theta * theta + offset, scale))


def normal_normal(x):
    """A mean for each number."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def main():
    """Measures, prints, and writes."""
    options = parser_of(__doc__, SIZES).parse_args()
    use_threads(options.threads)
    pyro.set_rng_seed(options.seed)
    counts = torch.tensor(COUNTS, dtype=torch.float64).repeat(options.repeats)
    rows = 10 * options.repeats
    factors = torch.randn(rows, 3, dtype=W.dtype) @ W.T + math.sqrt(NOISE) * torch.randn(rows, 8, dtype=W.dtype)
    numbers = math.sqrt(2) * torch.randn(rows, dtype=torch.float64)
    lines = table(
        ("Model, guide, and nats a datum", "known", "found ± se", "within 3 se and 0.002"),
        [
            *poisson_rows(counts, options),
            *factor_rows(factors, options),
            *linear_rows(options),
            *const_rows(numbers, options),
        ],
    )
    what = f"{options.repeats} data of each count, {rows} of the other models, {options.draws:,} draws."
    report("Gaps in closed form", what, lines, options)


def reported(model, guide, x, options, trained=True):
    """Trains a guide and returns its gap report."""
    if trained:
        fit_svi(model, guide, x, num_steps=options.steps, seed=options.seed, progress=False)
    return amortization_gap(model, guide, x, num_draws=options.draws, seed=options.seed, progress=False).per_datum


def row(what, known, gaps, name):
    """Returns a row of the table: the mean of a gap over data."""
    found, se = float(gaps[name].mean()), math.sqrt(float((gaps[f"{name}_se"] ** 2).sum())) / len(gaps)
    agrees = "yes" if abs(found - known) <= 3 * se + 0.002 else "**no**"
    return what, f"{known:.6f}", f"{round(found, 6) + 0.0:.6f} ± {se:.6f}", agrees


def poisson_rows(x, options):
    """Returns the rows of the Gamma-Poisson model."""
    gaps = reported(gamma_poisson, AutoAmortizedNormal(gamma_poisson), x, options)
    found = [
        row(
            f"Gamma-Poisson, LogNormal, x = {count}: approximation gap",
            known,
            gaps[x.numpy() == count],
            "approximation_gap",
        )
        for count, known in zip(COUNTS, LOG_NORMAL_GAPS, strict=True)
    ]
    exact = reported(gamma_poisson, gamma_guide, x, options, trained=False)
    return [*found, row("Gamma-Poisson, Gamma by hand: inference gap", 0.0, exact, "inference_gap")]


def factor_rows(x, options):
    """Returns the rows of probabilistic PCA."""
    gaps = reported(ppca, AutoAmortizedNormal(ppca, encoder=MLP(())), x, options)
    exact = reported(ppca, ppca_guide, x, options, trained=False)
    return [
        row("PCA, independent normals: approximation gap", 0.290920, gaps, "approximation_gap"),
        row("PCA, linear encoder: amortization gap", 0.0, gaps, "amortization_gap"),
        row("PCA, full covariance by hand: inference gap", 0.0, exact, "inference_gap"),
    ]


def linear_rows(options):
    """Returns the rows of the linear model, 500 data as known answers of it have them."""
    torch.manual_seed(11)
    total = SIGMA**2 + TAU**2
    x = torch.randn(500, dtype=torch.float64) * math.sqrt(total)
    ones = torch.ones_like(x)
    evidence = dist.LowRankMultivariateNormal(0 * ones, WIDE * ones[:, None], total * ones).log_prob(x).item()
    pyro.clear_param_store()
    fit = fit_svi(linear, linear_guide, x, num_steps=options.steps, seed=options.seed, progress=False)
    gap, se = (evidence - fit.elbo) / len(x), fit.elbo_se / len(x)
    known, found = (len(x) / total + 1 / WIDE**2) ** -0.5, pyro.param("scale_of_theta").item()
    return [
        (
            "linear, z given theta by hand: inference gap",
            "0.000000",
            f"{gap:.6f} ± {se:.6f}",
            "yes" if abs(gap) <= 3 * se + 0.002 else "**no**",
        ),
        (
            "linear, z given theta by hand: sd of q(theta)",
            f"{known:.6f}",
            f"{found:.6f}",
            "yes" if abs(found - known) <= 0.002 else "**no**",
        ),
    ]


def const_rows(x, options):
    """Returns the row of the normal-normal model."""
    gaps = reported(normal_normal, AutoAmortizedNormal(normal_normal, encoder=Constant()), x, options)
    known = float(x.var(unbiased=False)) / 4
    return [row("normal-normal, const: amortization gap, var(x) / 4", known, gaps, "amortization_gap")]


if __name__ == "__main__":
    main()
