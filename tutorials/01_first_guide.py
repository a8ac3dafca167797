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
# # How do I get posteriors for rows my model has never seen?
#
# You have a Pyro model with a latent variable for each row of data, and a loop that trains a guide. New rows arrive.
# A mean-field guide such as `AutoNormal` has parameters for the rows it was trained on and nothing to say about
# others; fitting again, or running MCMC again, takes time for every batch of new rows. An *amortized* guide learns
# the map from a row's data to its posterior, and answers for new rows at once.
#
# This page makes such a guide from a model, trains it in a plain `SVI` loop, asks it about rows it never saw, and
# checks the answers against the exact posterior. It ends with what amortizing cost.

# %%
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

from pyro_amortize import AutoAmortizedNormal, amortization_gap, plan_amortization

# %% [markdown]
# All sizes stand here. A small run, to see that the page works, takes seconds; the numbers below are of the full run.

# %%
FULL = not os.environ.get("PYRO_AMORTIZE_SMOKE")
NUM_TRIALS, NUM_NEW = (1000, 200) if FULL else (60, 10)
NUM_STEPS = 3000 if FULL else 100
GAP_OPTIONS = {"num_draws": 2000, "num_steps": 500} if FULL else {"num_draws": 100, "num_steps": 20}

# %% [markdown]
# ## The model
#
# Many small trials measure the effect of the same treatment. Trial $n$ reports an effect $y_n$ and its standard error
# $s_n$, large in small trials. The true effects $z_n$ scatter about a common mean $\theta$:
#
# $$\theta \sim N(0, 10^2), \qquad z_n \sim N(\theta, \tau^2), \qquad y_n \sim N(z_n, s_n^2).$$
#
# We want $p(z_n \mid \text{data})$ of each trial: how much of what it reports is noise?


# %%
TAU = 1.0


def model(effect, error):
    theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
    with pyro.plate("trials", len(effect)):
        z = pyro.sample("z", dist.Normal(theta, TAU))
        pyro.sample("y", dist.Normal(z, error), obs=effect)


pyro.set_rng_seed(1)
error = 0.3 + 1.7 * torch.rand(NUM_TRIALS + NUM_NEW)
effect = 2.0 + TAU * torch.randn(len(error)) + error * torch.randn(len(error))
effect, effect_new = effect[:NUM_TRIALS], effect[NUM_TRIALS:]
error, error_new = error[:NUM_TRIALS], error[NUM_TRIALS:]

# %% [markdown]
# ## The plan
#
# Before any training, `plan_amortization` says what a guide for this model and these arguments will be.

# %%
print(plan_amortization(model, effect, error))

# %% [markdown]
# Read it row by row. `theta` stands in no plate: it is *global*, and has a table with one row of parameters, as in
# any mean-field guide. `z` has one value for each element of the plate `trials`: it is *local*, and its parameters
# come from an encoder that sees both `effect` and `error`. The model was not told so: the plan found that row $n$ of
# either argument enters the density of $y_n$ and of no other trial.
#
# `closable: True` is about the structure of the model. Given $\theta$ the trials are independent, and the encoder
# sees all of a trial's data; so a wide enough encoder can reach whatever a table with a row for each trial reaches.
#
# ## The guide, in the loop you already have
#
# The one line that changes is the guide. The learning rate decays, so that the fit settles.

# %%
guide = AutoAmortizedNormal(model)  # was: AutoNormal(model)
optim = ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / NUM_STEPS)})
svi = SVI(model, guide, optim, Trace_ELBO())
losses = [svi.step(effect, error) for _ in range(NUM_STEPS)]

# %%
fig, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
ax.plot(losses, linewidth=0.5)
ax.set(xlabel="step", ylabel="loss, nats", title="The loss has settled")
ax.set_ylim(min(losses) - 50, sorted(losses)[int(0.9 * len(losses))] + 150)
plt.show()

# %% [markdown]
# ## Rows never seen
#
# The guide is called with the new rows as the model would be, however many there are. Nothing is fitted.

# %%
posterior = guide.posterior(effect_new, error_new)
posterior

# %% [markdown]
# ## Checked against the exact posterior
#
# Everything is Gaussian, so the answer is known. With $z_n$ integrated out, $y_n \sim N(\theta, \tau^2 + s_n^2)$,
# which gives $\theta$ its posterior from the trials in training, $N(m, v)$. For a new trial, given $\theta$, the
# posterior of $z$ has mean $w y + (1 - w)\,\theta$ with $w = \tau^2 / (\tau^2 + s^2)$, and variance $w s^2$; letting
# $\theta$ vary adds $(1 - w)^2\,v$. (The new trial's own say on $\theta$, one trial in a thousand, is left out, as it
# is by the guide.)

# %%
weight = 1 / (TAU**2 + error**2)
theta_var = 1 / (weight.sum() + 1 / 10.0**2)
theta_mean = theta_var * (weight * effect).sum()

w = TAU**2 / (TAU**2 + error_new**2)
exact_mean = w * effect_new + (1 - w) * theta_mean
exact_sd = (w * error_new**2 + (1 - w) ** 2 * theta_var).sqrt()

mean, sd = posterior.mean["z"], posterior.stddev["z"]
mean_error = (mean - exact_mean) / exact_sd
print(f"theta, exact:     {theta_mean:.3f} ± {theta_var.sqrt():.3f}")
print(f"theta, guide:     {posterior.mean['theta']:.3f} ± {posterior.stddev['theta']:.3f}")
print(
    f"mean of z is off: {mean_error.square().mean().sqrt():.3f} exact sd (rms), {mean_error.abs().max():.3f} at worst"
)
print(f"sd of z / exact:  {(sd / exact_sd).min():.3f} to {(sd / exact_sd).max():.3f}")

# %%
shown = exact_mean[:40].argsort()
at = torch.arange(len(shown))
fig, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
low = (exact_mean - 2 * exact_sd)[shown]
ax.bar(at, 4 * exact_sd[shown], bottom=low, width=0.8, color="0.85", label="exact posterior, ±2 sd")
ax.errorbar(at, mean[shown], 2 * sd[shown], fmt="o", markersize=3, linewidth=1, label="amortized guide, ±2 sd")
ax.plot(at, effect_new[shown], "x", color="C3", markersize=4, label="reported effect $y$")
ax.axhline(theta_mean, color="0.5", linewidth=0.8, linestyle=":", label=r"exact mean of $\theta$")
ax.set(xticks=[], xlabel="new trials, by exact posterior mean", ylabel="true effect $z$")
ax.set_title("For trials it never saw, the guide gives the exact posterior, very nearly")
ax.legend(ncols=2, frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The bars are wide where the standard error is large, and there the posterior is drawn towards $\theta$: the encoder
# has learnt how far to trust a trial from its standard error.
#
# One answer is too sure of itself: $\theta$ has the right mean, but its standard deviation is too small. The family
# is *independent* normals, and cannot say that all $z_n$ are higher if $\theta$ is. `AutoNormal` errs in the same
# way; an encoder neither causes nor cures it. Here it hardly matters to $z$, since $(1 - w)^2\,v$ is small.
#
# ## What it cost
#
# In your own models there is no exact posterior to look at. `amortization_gap` needs none: it sets the guide's ELBO,
# for each row, against the best member of the guide's family (found by optimizing it for that row) and against the
# evidence $\log p(y_n \mid \theta)$, found by importance sampling.

# %%
report = amortization_gap(model, guide, effect_new, error_new, progress=False, **GAP_OPTIONS)
print(report)

# %% [markdown]
# Rows of the table are nats. *Amortization gap*: what the encoder loses against the best normal for each trial; a
# wider encoder or longer training would lower it. *Approximation gap*: what that best normal itself loses. The exact
# posterior given $\theta$ is normal, so this should be zero; what is left is how far the search for the best normal
# stopped short of it. *Inference gap*: both together, the Kullback-Leibler divergence from the guide to the exact
# posterior. Each number has its Monte Carlo standard error, and doubts would follow the table as warnings.
#
# Since the posterior is known here, so is that divergence, and the report can be checked too.

# %%
theta = report.given["theta"]  # where the report held the global latent
q = dist.Normal(mean, sd)
p = dist.Normal(w * effect_new + (1 - w) * theta, (w * error_new**2).sqrt())
exact_gap = float(torch.distributions.kl_divergence(q, p).sum())
total, total_se = report.totals.loc["inference_gap"]
print(f"inference gap of all new trials: report {total:.3f} ± {total_se:.3f}, exact {exact_gap:.3f} nats")

# %% [markdown]
# ## Where to go next
#
# - Your own model: print its plan first. If it says `closable: False`, or raises, it names the site and what to do.
# - Pyro code that you have: [How do I move the Pyro code I have to an amortized guide?](02_moving_over.ipynb)
# - A wider encoder, a network of your own, other inputs:
#   [How do I use a network of my own as the encoder?](07_your_own_encoder.ipynb)
# - No loop of your own: `fit_svi(model, guide, ...)`, with minibatches, a progress bar and a record of the fit.
# - Other methods side by side, with times: `compare_inference(model, ...)`.
# - Real data, against mean-field and MCMC: `demo.py`, next to this page.
#
# The last cell holds this page to its claims.

# %%
if FULL:
    late, last = torch.tensor(losses[-600:-300]), torch.tensor(losses[-300:])
    assert late.mean() - last.mean() < 4 * ((late.var() + last.var()) / 300).sqrt(), "the loss has settled"
    assert (posterior.mean["theta"] - theta_mean).abs() < 0.5 * theta_var.sqrt()
    assert posterior.stddev["theta"] < 0.8 * theta_var.sqrt(), "independent normals understate the sd of theta"
    assert mean_error.square().mean().sqrt() < 0.1
    assert ((sd / exact_sd - 1).abs() < 0.15).all()
    assert abs(total - exact_gap) < 4 * total_se, "the report agrees with the exact divergence, within its own error"
    assert report.totals.loc["approximation_gap", "total"] < 1e-3 * NUM_NEW, "the best normal loses next to nothing"
    assert report.warnings == ()
