# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How do I move the Pyro code I have to an amortized guide?
#
# You have a Pyro model with a latent variable for each row of data, and a guide for it: `AutoNormal`, or one that you
# wrote by hand. This page moves both, on one data set, and keeps account of the ELBO, which should stay what it was.
# Then come minibatches, optimizers, speed, a process that serves answers, and what does not carry over. A table near
# the end sets what you had beside what you write now.

# %%
import inspect
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    CompiledTrace_ELBO,
    CompiledTraceMeanField_ELBO,
    amortize,
    compare_inference,
    fit_svi,
)

# %% [markdown]
# All sizes stand here. A small run, to see that the page works, takes seconds; the numbers below are of the full run.

# %%
FULL = not os.environ.get("PYRO_AMORTIZE_SMOKE")
NUM_ALL, NUM_SEEN = (569, 450) if FULL else (80, 60)
NUM_STEPS = 1500 if FULL else 20
COMPILE = FULL  # it takes seconds
NUM_DRAWS = 1000 if FULL else 10
SEEDS = (0, 1, 2) if FULL else (0,)
GAP_OPTIONS = {} if FULL else {"num_draws": 20, "num_steps": 5, "num_annealed": 0}

# %% [markdown]
# ## What you have: a model, `AutoNormal`, a loop
#
# The data are 569 biopsies of breast tumours: eight measurements of the cell nuclei of each (the Wisconsin diagnostic
# data that scikit-learn ships). The model puts one number $z_n$ behind all measurements of a biopsy:
#
# $$z_n \sim N(0, 1), \qquad x_{nd} \sim N(w_d\, z_n, s_d^2),$$
#
# with loadings $w_d$ and noise $s_d$ that all biopsies share. We have 450 biopsies; 119 arrive later. Neither model nor
# guide is told the diagnosis.

# %%
data = load_breast_cancer(as_frame=True).frame.sample(NUM_ALL, random_state=0)
measured = data.filter(like="mean ").drop(columns=["mean perimeter", "mean area"])  # which repeat the radius
cells = torch.tensor(measured.to_numpy(), dtype=torch.float32).sqrt()  # roots are less skewed
cells = (cells - cells[:NUM_SEEN].mean(0)) / cells[:NUM_SEEN].std(0)
x, x_new = cells[:NUM_SEEN], cells[NUM_SEEN:]


def model(x, size=None):
    loadings = pyro.sample("loadings", dist.Normal(torch.full((8,), 0.5), 0.5).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(torch.full((8,), -0.5), 1.0).to_event(1))
    with pyro.plate("biopsies", size or len(x), subsample_size=len(x)):  # size: of all data, if x is a minibatch
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z[..., None] * loadings, noise).to_event(1), obs=x)


def train(guide, elbo, seed=0):
    """The loop you have; returns the guide."""
    pyro.set_rng_seed(seed)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / NUM_STEPS)}), elbo)
    for _ in range(NUM_STEPS):
        svi.step(x)
    return guide


autonormal = train(AutoNormal(model), Trace_ELBO())

# %% [markdown]
# `AutoNormal` has a location and a scale for each of the 450 biopsies, and none for a new one:


# %%
def refused(ask):
    """Shows the error that a call ends with."""
    try:
        ask()
    except (AttributeError, TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    else:
        raise AssertionError("this should have been refused")


refused(lambda: Predictive(model, guide=autonormal, num_samples=100)(x_new))

# %% [markdown]
# ## From `AutoNormal`: one line
#
# The model and the loop stay. The guide answers for the new biopsies at once.

# %%
start = time.perf_counter()
amortized = train(AutoAmortizedNormal(model), Trace_ELBO())  # was: AutoNormal(model)
plain_seconds = time.perf_counter() - start
amortized.posterior(x_new).mean["z"][:5]

# %% [markdown]
# What did that cost? `compare_inference` judges guides as they are, Pyro's own among them, by the same draws.


# %%
def elbos(guides):
    """Returns the ELBO of each guide on all data, in nats, the gap to the best, and the number of parameters."""
    table = compare_inference(model, x, methods=guides, num_draws=NUM_DRAWS, progress=False).table
    return table[["elbo", "elbo_se", "gap", "gap_se", "num_parameters"]].round(2)


guides = {"AutoNormal": autonormal, "AutoAmortizedNormal": amortized}
print(elbos(guides).to_string())

# %% [markdown]
# Less than a nat of 4,000. The encoder has more parameters than `AutoNormal` here, but their number stays when biopsies
# are added, and a new biopsy needs no fit.
#
# One more line may change, with any guide: the ELBO. The compiled one records loss and gradients in an early step,
# which takes seconds, and then runs neither model nor guide. A seed gives the same draws, and so the same fit, to
# rounding. Most fits below use it.

# %%
FastELBO = CompiledTrace_ELBO if COMPILE else Trace_ELBO

start = time.perf_counter()
guides["CompiledTrace_ELBO"] = train(AutoAmortizedNormal(model), FastELBO())  # was: Trace_ELBO()
compiled_seconds = time.perf_counter() - start
print(f"{plain_seconds:.1f} s without, {compiled_seconds:.1f} s with it, compiling included")

# %% [markdown]
# ## From a guide written by hand: its network
#
# This is how such a guide is written in Pyro: a network that gives location and scale, parameters for the globals, and
# the model's plates once more.


# %%
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.to_loc, self.to_log_scale = nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, x):
        features = self.trunk(x)
        return self.to_loc(features).squeeze(-1), self.to_log_scale(features).squeeze(-1).exp()


def written_by_hand():
    encoder = Encoder()

    def guide(x, size=None):
        pyro.module("encoder", encoder)
        for name, family, start in (("loadings", dist.Normal, 0.5), ("noise", dist.LogNormal, -0.5)):
            loc = pyro.param(f"{name}_loc", torch.full((8,), start))
            scale = pyro.param(f"{name}_scale", torch.full((8,), 0.1), constraint=constraints.positive)
            pyro.sample(name, family(loc, scale).to_event(1))
        with pyro.plate("biopsies", size or len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)))

    return guide


# %% [markdown]
# The generated guide takes the network *without* its last two layers: it makes a layer for the parameters of each site
# by itself, and all the rest from the model. Both guides are trained from several seeds, since two fits of the same
# guide differ, too.

# %%
pairs = []
for seed in SEEDS:
    pyro.clear_param_store()  # a guide written by hand would go on from the parameters of the one before
    pyro.set_rng_seed(seed)
    by_hand = train(written_by_hand(), FastELBO(), seed)
    generated = train(AutoAmortizedNormal(model, encoder=Encoder().trunk), FastELBO(), seed)
    pairs.append(elbos({"AutoNormal": autonormal, "by hand": by_hand, "generated": generated}))
    print(f"seed {seed}\n{pairs[-1].to_string()}\n")

# %% [markdown]
# The two guides have the same number of parameters, and reach the same ELBO within what seeds and draws leave open.
#
# ## `@amortize`: a model that carries its guide
#
# `amortize(model)` is the Pyro model still, with a guide of its own. Above a `def` it stands as a decorator:
# `@amortize` or `@amortize(encoder=...)`. Its `fit` is `fit_svi`, a loop with a decaying learning rate and a record.

# %%
carrying = amortize(model, encoder=MLP((32,)))
fit = carrying.fit(x, num_steps=NUM_STEPS, seed=0, progress=False)
guides["amortize(model).fit"] = fit.guide
print(fit, carrying.posterior(x_new), carrying.gap(x_new, progress=False, **GAP_OPTIONS), sep="\n\n")

# %% [markdown]
# The report is on the new biopsies. *Amortization gap*: what the encoder loses against the best normal for each.
# *Approximation gap*: what that one loses against the exact posterior, which is normal here, given loadings and noise.
#
# ## Minibatches
#
# A `DataLoader` that feeds your loop goes on feeding it. The model must know how many rows there are in all, as ever in
# Pyro: that is `size`. And the guide standardizes what its encoder sees by the first data that it is shown;
# `guide.initialize(x)` shows it more than the first batch. (By default `ClippedAdam` clips gradients at 10. Those of
# minibatches, rescaled to all rows, would often be clipped, and the fit be biased, whatever the guide.)

# %%
pyro.set_rng_seed(0)
loader = DataLoader(TensorDataset(x), batch_size=50, shuffle=True)
guide = AutoAmortizedNormal(model, encoder=MLP((32,)))
guide.initialize(x)
optim = ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (0.5 / NUM_STEPS), "clip_norm": 1e6})
svi = SVI(model, guide, optim, FastELBO())
for _ in range(2 * NUM_STEPS // len(loader)):
    for (batch,) in loader:
        svi.step(batch, size=len(x))
guides["DataLoader"] = guide

# %% [markdown]
# `fit_svi(batch_size=)` needs neither loader nor `size`. It takes rows of all data and rescales their terms, once it
# has checked that this is exact for the model at hand; where it is not, it says why and takes all rows.

# %%
fit = fit_svi(model, AutoAmortizedNormal(model), x, batch_size=50, num_steps=NUM_STEPS, seed=0, progress=False)
guides["fit_svi(batch_size=50)"] = fit.guide
print(fit)

# %% [markdown]
# ## Torch optimizers
#
# `Trace_ELBO()(model, guide)` is a module whose parameters any torch optimizer takes. Those of a guide exist once it
# has seen data: `guide.initialize(x)` comes first.

# %%
pyro.set_rng_seed(0)
guide = AutoAmortizedNormal(model, encoder=MLP((32,)))
guide.initialize(x)
elbo = Trace_ELBO()(model, guide)
adam = torch.optim.Adam(elbo.parameters(), lr=0.02)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, NUM_STEPS)
for _ in range(NUM_STEPS):
    adam.zero_grad()
    elbo(x).backward()
    adam.step()
    schedule.step()
guides["torch optimizer"] = guide

# %% [markdown]
# ## The account
#
# All guides of this page, judged by the same draws on all 450 biopsies.

# %%
table = elbos({**guides, "by hand": by_hand, "generated": generated})
print(table.to_string())

# %%
fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.errorbar(table["gap"], table.index, xerr=2 * table["gap_se"], fmt="o", markersize=4)
ax.axvline(0.01 * len(x), color="0.6", linestyle=":")
ax.text(0.01 * len(x), 0, "0.01 nats a biopsy ", ha="right", va="center", fontsize=8, color="0.4")
ax.set(xlabel=f"nats behind the best ELBO, {table['elbo'].max():.0f}, ±2 standard errors")
ax.set_title("Moving over cost next to nothing, whichever way")
ax.invert_yaxis()
plt.show()

# %% [markdown]
# The errors are those of draws, and small. What differs is how far each training has settled: the family of
# `AutoNormal` holds all others here, so that at its optimum it would be first.
#
# ## Answers from another process
#
# `save` writes the guide, its plan and whatever the model has learnt as plain data, which torch reads with
# `weights_only=True`. `load` wants that file and the model's code, and no data. Your model stands in a module that
# training and serving both import; here its source is copied from the cell above into a program, and another Python
# process runs that.

# %%
program = f"""
import pyro
import pyro.distributions as dist
import torch
from pyro_amortize import AutoAmortizedNormal

{inspect.getsource(model)}
guide = AutoAmortizedNormal.load("guide.pt", model)
posterior = guide.posterior(torch.load("new.pt"))
torch.save({{"mean": posterior.mean["z"], "stddev": posterior.stddev["z"]}}, "answers.pt")
"""

with tempfile.TemporaryDirectory() as folder:
    amortized.save(Path(folder, "guide.pt"))
    torch.save(x_new, Path(folder, "new.pt"))
    Path(folder, "serve.py").write_text(program)
    subprocess.run([sys.executable, "serve.py"], cwd=folder, check=True)
    answers = torch.load(Path(folder, "answers.pt"))

here = amortized.posterior(x_new)
difference = max((answers["mean"] - here.mean["z"]).abs().max(), (answers["stddev"] - here.stddev["z"]).abs().max())
print(f"{len(answers['mean'])} answers, which differ from those of this process by {difference:.1g} at most")

# %% [markdown]
# Are they right, too? Given loadings and noise, which we put at the guide's medians, the posterior of $z_n$ is normal
# with precision $p = 1 + \sum_d w_d^2 / s_d^2$ and mean $\sum_d w_d\, x_{nd} / (s_d^2\, p)$.

# %%
w, s = here.median["loadings"], here.median["noise"]
precision = 1 + (w / s).square().sum()
exact_mean, exact_sd = (x_new * w / s**2).sum(-1) / precision, precision.rsqrt()
mean_error, sd_ratio = (answers["mean"] - exact_mean) / exact_sd, answers["stddev"] / exact_sd
rms = mean_error.square().mean().sqrt()
print(f"mean of z is off: {rms:.3f} exact sd (rms), {mean_error.abs().max():.3f} at worst")
print(f"sd of z / exact:  {sd_ratio.min():.3f} to {sd_ratio.max():.3f}")

# %%
malignant = torch.tensor(data["target"].to_numpy()[NUM_SEEN:] == 0)
shown = exact_mean[:60].argsort()
at = torch.arange(len(shown))
fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
ax.bar(at, 4 * exact_sd, bottom=exact_mean[shown] - 2 * exact_sd, color="0.85", label="exact posterior, ±2 sd")
for label, color, which in (("malignant", "C3", malignant[shown]), ("benign", "C0", ~malignant[shown])):
    mean, sd = answers["mean"][shown][which], answers["stddev"][shown][which]
    ax.errorbar(at[which], mean, 2 * sd, fmt="o", color=color, markersize=3, linewidth=1, label=f"{label}, ±2 sd")
ax.set(xticks=[], xlabel="new biopsies, by exact posterior mean", ylabel="$z$")
ax.set_title("Without training data, the other process gives the exact posteriors, very nearly")
ax.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The diagnosis only colours this figure. That malignant biopsies have high $z$ is what the data say.
#
# ## What does not carry over
#
# *Answers are for data.* `AutoNormal` has one answer, for the rows that it was trained on. Here you say for which rows.

# %%
refused(lambda: amortized.median())
refused(lambda: amortized.locs.z)
amortized.quantiles([0.05, 0.95], x_new)["z"].shape  # the quantiles come first, as in Pyro

# %% [markdown]
# *Networks return features.* One that returns location and scale, as ours above and encoders of VAEs do, is refused:
# pass the part before its last layers. A network is given rows of numbers, shape (rows, features), so that one for
# images begins with `nn.Unflatten`; and these are prepared: reals standardized, counts as log(1 + x), categories
# one-hot. A network that was trained on the raw numbers wants `prepare=None`.

# %%
refused(lambda: AutoAmortizedNormal(model, encoder=Encoder()).initialize(x))
AutoAmortizedNormal(model, encoder=Encoder().trunk, prepare=None).initialize(x)

# %% [markdown]
# *One family.* A generated guide has the family of `AutoNormal`: independent normals before the transform to each
# site's support. `AutoMultivariateNormal`, flows, and guides in which one latent depends on another's draw have no
# counterpart here. Keep them; `fit_svi`, `compare_inference` and `amortization_gap` take any guide.
#
# ## What you had, and what you write now
#
# | You had | You write |
# |---|---|
# | `AutoNormal(model)` | `AutoAmortizedNormal(model)` |
# | `SVI(model, guide, optim, Trace_ELBO())` | the same; faster with `CompiledTrace_ELBO()` |
# | with `TraceMeanField_ELBO()` | the same; faster with `CompiledTraceMeanField_ELBO()` |
# | a guide by hand, around a network | `AutoAmortizedNormal(model, encoder=network)`, its last layers left out |
# | a loop over a `DataLoader` | the same, after `guide.initialize(x)`; or `fit_svi(..., batch_size=50)` |
# | a torch optimizer of `Trace_ELBO()(model, guide)` | the same, after `guide.initialize(x)` |
# | a torch optimizer of your own | or `fit_svi(..., optim=lambda parameters: torch.optim.AdamW(parameters, lr=0.01))` |
# | `guide.median()` | `guide.median(x_new)` |
# | `guide.quantiles([0.05, 0.95])` | `guide.quantiles([0.05, 0.95], x_new)` |
# | `guide.locs.z`, `guide.scales.z` | `guide.posterior(x_new).mean["z"]`, `.stddev["z"]`, in the site's own support |
# | `Predictive(model, guide=guide, num_samples=100)(x)` | the same, for any rows |
# | a `Predictive` of new observations | `guide.predictive(x_new, num_samples=100)` |
# | `pyro.get_param_store().save(path)` and `load` | `guide.save(path)`, `AutoAmortizedNormal.load(path, model)` |
# | the same, around a network of yours | `AutoAmortizedNormal.load(path, model, encoder=Encoder().trunk)` |
#
# Those lines that have not been run above, run:

# %%
with tempfile.TemporaryDirectory() as folder:
    generated.save(Path(folder, "guide.pt"))
    loaded = AutoAmortizedNormal.load(Path(folder, "guide.pt"), model, encoder=Encoder().trunk)
same = torch.equal(loaded.median(x_new)["z"], generated.median(x_new)["z"])
latents = Predictive(model, guide=amortized, num_samples=100)(x_new)["z"]
replicated = amortized.predictive(x_new, num_samples=100)["x"]
SVI(model, loaded, ClippedAdam({"lr": 1e-3}), CompiledTraceMeanField_ELBO()).step(x)
fit_svi(model, loaded, x, num_steps=5, optim=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), progress=False)
fit_svi(model, by_hand, x, num_steps=5, lr=1e-3, progress=False)
same, latents.shape, replicated.shape

# %% [markdown]
# ## Where to go next
#
# - Amortized guides from the start:
#   [How do I get posteriors for rows my model has never seen?](01_first_guide.ipynb)
# - How to read a gap report, and what to do next: [What did amortizing cost me?](05_what_did_it_cost.ipynb)
# - Encoders for [groups](06_groups_and_missing_data.ipynb), [series](04_when_it_is_not.ipynb) and
#   [images](07_your_own_encoder.ipynb); for all others the README, "Which guide for which model".
# - Amortized, mean-field and MCMC side by side: `compare_inference(model, x)`.
#
# The last cell holds this page to its claims.

# %%
if FULL:
    hand, own = (torch.tensor([pair["elbo"][label] for pair in pairs]) for label in ("by hand", "generated"))
    draws_se = max(pair["gap_se"].max() for pair in pairs)
    se = ((hand.var() + own.var()) / len(pairs) + draws_se**2).sqrt()
    assert (hand.mean() - own.mean()).abs() < 4 * se, "the generated guide reaches the ELBO of the one by hand"
    assert (table["gap"] < 0.01 * len(x)).all(), "next to nothing was lost, whichever way"
    assert abs(table["elbo"]["CompiledTrace_ELBO"] - table["elbo"]["AutoAmortizedNormal"]) < 4 * table["elbo_se"].max()
    assert difference < 1e-4, "the other process gives the same answers"
    assert rms < 0.15
    assert ((sd_ratio - 1).abs() < 0.2).all()
    assert same
