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
# # When can no encoder of a datum be enough?
#
# An amortized guide answers for every latent variable by one function of data, its encoder. By default the encoder
# sees what belongs to the latent's own row. If rows are independent given the global latents, their posteriors
# depend on nothing else, and a wide enough encoder loses nothing against mean-field inference
# ([Margossian and Blei, 2024](https://arxiv.org/abs/2307.11018)).
#
# In a series this fails: what we know of a target now depends on where it was seen before and after. An encoder
# cannot use what it does not see, however wide it is and however long it trains. This page shows which structures of
# a model make such a gap, how the plan tells before training, and what a window of neighbours buys. All three models
# are Gaussian, so that each gap has an exact value to set beside the fits.

# %%
import os

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import constraints

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    Constant,
    Recurrent,
    Window,
    amortization_gap,
    fit_svi,
    plan_amortization,
)

# %%
FULL = not os.environ.get("PYRO_AMORTIZE_SMOKE")
NUM_TRACKS, NUM_NEW, NUM_TIMES = (1000, 1000, 10) if FULL else (20, 20, 4)
RADII = [0, 1, 2, 3] if FULL else [0, 1]
TRACK_FIT = {"num_steps": 1500, "lr": 0.03, "batch_size": 100} if FULL else {"num_steps": 5, "batch_size": 10}
GAP_OPTIONS = {"num_training_steps": 500} if FULL else {"num_steps": 5, "num_training_steps": 5, "num_annealed": 0}
NUM_SAW, SAW_FIT = (1000, {"num_steps": 1500, "lr": 0.05}) if FULL else (20, {"num_steps": 5})
NUM_CHAIN, CHAIN_FIT = (100, {"num_steps": 800, "lr": 0.03}) if FULL else (12, {"num_steps": 5})

# %% [markdown]
# ## Many short tracks
#
# A sensor reports the position of a moving target once a second, with an error of one metre. We want position and
# velocity at every step. The velocity drifts, and moves the position:
#
# $$v_t \sim N(v_{t-1}, 0.3^2), \qquad p_t \sim N(p_{t-1} + v_t, 0.5^2), \qquad y_t \sim N(p_t, 1).$$
#
# One may write this as a loop over the steps, with sites `v_0`, `v_1`, and so on. It is fitted several times faster
# with all steps in one plate: the latents get no prior of their own, and a factor holds the motion.


# %%
def before(z):
    """Returns for each step the value of the step before, zero for the first."""
    return torch.cat([torch.zeros_like(z[..., :1]), z[..., :-1]], -1)


FREE = dist.ImproperUniform(constraints.real, (), ())
DRIFT = torch.tensor([1.0] + [0.3] * (NUM_TIMES - 1))  # the first: how fast tracks start
SWERVE = torch.tensor([5.0] + [0.5] * (NUM_TIMES - 1))  # the first: where


def track(y):
    with pyro.plate("tracks", len(y), dim=-2), pyro.plate("time", NUM_TIMES, dim=-1):
        v = pyro.sample("v", FREE)
        p = pyro.sample("p", FREE)
        motion = dist.Normal(before(v), DRIFT).log_prob(v) + dist.Normal(before(p) + v, SWERVE).log_prob(p)
        pyro.factor("motion", motion)
        pyro.sample("y", dist.Normal(p, 1.0), obs=y)


def simulate(count):
    v = (DRIFT * torch.randn(count, NUM_TIMES)).cumsum(1)
    p = (v + SWERVE * torch.randn(count, NUM_TIMES)).cumsum(1)
    return p + torch.randn(count, NUM_TIMES)


pyro.set_rng_seed(0)
y, y_new = simulate(NUM_TRACKS), simulate(NUM_NEW)
print(plan_amortization(track, y))

# %% [markdown]
# `closable: False`, and this before any training. The reason names the factor `motion`: it couples the steps of a
# track, so that what is known of one step depends on the data of all. This verdict is on the default encoder, which
# sees a step's own datum. A guide's plan judges the guide's own encoder:

# %%
encoders = {radius: Window(radius) for radius in RADII} | {"all": Recurrent(gru_dim=32)}
guides = {}
for label, encoder in encoders.items():
    guides[label] = AutoAmortizedNormal(track, encoder=encoder)
    guides[label].initialize(y)
    verdict = guides[label].plan.verdict
    print(f"{label}: {verdict.closable}, {verdict.reason.split(';')[0]}")

# %% [markdown]
# `Window(radius)` sees the data of so many steps on either side. `Window(0)` sees a step's own datum alone, as `MLP()`
# does. `Recurrent()` runs over the whole track, in both directions; only here the plan says `True`.
#
# ### The exact answer
#
# Given a track's data, velocities and positions together are normal. A Kalman smoother finds their means in a pass
# forwards and one backwards. Tracks are short here, so one linear solve does, and gives the precision matrix $P$ too.
# Mean-field inference ends at the best independent normals: the exact means $m$, and variances $1/P_{ii}$. Others,
# with means $m'$ and variances $s_i^2$, are short of it by the amortization gap
#
# $$\tfrac12 (m' - m)^\top P\, (m' - m) + \tfrac12 \textstyle\sum_i \big(P_{ii} s_i^2 - 1 - \log P_{ii} s_i^2\big)
# \quad\text{nats.}$$


# %%
def smoother():
    """Returns the precision of (v, p), the matrix that makes their means of y, and the covariance of y."""
    one, back = torch.eye(NUM_TIMES).double(), torch.diag(torch.ones(NUM_TIMES - 1), -1).double()
    noise = torch.cat([torch.cat([one - back, 0 * one], 1), torch.cat([-one, one - back], 1)])  # of (v, p)
    prior = noise.T @ (noise / torch.cat([DRIFT, SWERVE]).double()[:, None] ** 2)
    sees = torch.cat([0 * one, one], 1)
    precision = prior + sees.T @ sees
    return precision, torch.linalg.solve(precision, sees.T), sees @ prior.inverse() @ sees.T + one


def lost(mean, sd, precision, best):
    """Returns the gap of independent normals to the best ones, in nats."""
    off, ratio = mean.double() - best, precision.diagonal() * sd.double().square()
    return ((off @ precision) * off + ratio - 1 - ratio.log()).sum(-1) / 2


precision, smooth, covariance = smoother()
best_new = y_new.double() @ smooth.T

# %% [markdown]
# What is the least gap of an encoder that sees a window? Its mean for a step may be any function of the data in the
# window. As latents and data are jointly normal, the best such function is linear, and least squares find it. We even
# let it have other weights at each step, so that *no* encoder of this window does better on average over tracks.


# %%
def windows(radius, rows, times, shared):
    """Returns the matrices, each with one weight, that make up all linear maps from data in a window to means.

    Steps with a whole window share their weights or have their own; those near an end always have their own.
    """
    found = {}
    for row in range(rows):
        kind, t = divmod(row, times)
        place = "inside" if shared and radius <= t < times - radius else t
        for seen in range(max(t - radius, 0), min(t + radius + 1, times)):
            found.setdefault((kind, place, seen - t), torch.zeros(rows, times).double())[row, seen] = 1.0
    return torch.stack(list(found.values()))


def least_lost(bases, best, precision):
    """Returns the least gap of means that are sums of weighted bases."""
    root = torch.linalg.cholesky(precision).T
    design, goal = (root @ bases).flatten(1).T, (root @ best).flatten()[:, None]
    weights = torch.linalg.lstsq(design, goal, driver="gelsd").solution
    return float((design @ weights - goal).square().sum()) / 2


def least_on_tracks(radius):
    spread = torch.linalg.cholesky(covariance)  # data are this times standard normals
    return least_lost(windows(radius, *smooth.shape, shared=False) @ spread, smooth @ spread, precision)


# %% [markdown]
# ### Fits, judged on tracks they never saw

# %%
sd_of_v = precision.inverse().diagonal()[:NUM_TIMES].sqrt()
found, velocity = {}, {}
for label, guide in guides.items():
    fit_svi(track, guide, y, seed=0, progress=False, **TRACK_FIT)
    posterior = guide.posterior(y_new)
    velocity[label] = posterior.mean["v"]
    mean, sd = (torch.cat([part["v"], part["p"]], -1) for part in (posterior.mean, posterior.stddev))
    gap = lost(mean, sd, precision, best_new)
    off = ((velocity[label] - best_new[:, :NUM_TIMES]) / sd_of_v).square().mean().sqrt()
    least = 0.0 if label == "all" else least_on_tracks(label)
    found[label] = least, float(gap.mean()), float(gap.std() / NUM_NEW**0.5), float(off)
columns = ["least gap", "gap", "gap_se", "v is off, in posterior sd"]
tracks = pd.DataFrame.from_dict(found, orient="index", columns=columns).rename_axis("steps seen on a side")
tracks.round(2)

# %% [markdown]
# Gaps are nats a track. An encoder of a step's own datum loses almost 40 of them: its means of velocities are off by
# more than two posterior standard deviations (root mean square). Each neighbour on a side divides the loss by three
# or four, and the fits come close to the least gap that is possible. So what is lost is not for want of width or
# training. The encoder of the whole track was trained alike and has next to no gap.

# %%
some = best_new[:200, :NUM_TIMES]
fig, axes = plt.subplots(1, 3, figsize=(9, 3.3), sharex=True, sharey=True, layout="constrained")
for ax, (label, name) in zip(axes, {0: "own datum", 1: "Window(1)", "all": "Recurrent()"}.items(), strict=True):
    ax.plot(some.flatten(), velocity[label][:200].flatten(), ".", markersize=2)
    ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8)
    ax.set(title=name, xlabel="exact posterior mean, m/s")
axes[0].set_ylabel("mean of the guide, m/s")
fig.suptitle("Velocities of new tracks: one position hardly shows them, the whole track does")
plt.show()

# %% [markdown]
# In your own model there is no exact answer. The gap report needs none. Here it trains two more encoders alike, one
# with the guide's window and one that sees all; what the second gains is the *conditioning gap*.

# %%
report = amortization_gap(track, guides[1], y_new[:20], progress=False, **GAP_OPTIONS)
print(report)

posterior = guides[1].posterior(y_new[:20])
mean, sd = (torch.cat([part["v"], part["p"]], -1) for part in (posterior.mean, posterior.stddev))
exact_gap = float(lost(mean, sd, precision, best_new[:20]).sum())
exact_family_gap = 20 * float(precision.diagonal().log().sum() - precision.logdet()) / 2
print(f"exact totals: amortization gap {exact_gap:.2f}, approximation gap {exact_family_gap:.2f}")

# %% [markdown]
# The report has both gaps right, and its advice names the encoder that closes the first. The approximation gap is what
# independent normals cost; no encoder changes it, and mean-field inference has it too.
#
# ## A neighbour's datum
#
# Latents need not depend on each other for a row to need other rows' data. In the paper's saw series (section 4.5)
#
# $$z_n \sim N(x_{n-1}, 1), \qquad x_n \sim N\big(a(\theta + z_n), 1\big), \qquad x_0 = 0, \quad a = 0.75,$$
#
# all $z_n$ are independent given the data and $\theta$, whose prior is flat. But $x_{n-1}$ stands in the density of
# $z_n$.

# %%
A = 0.75


def saw(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1e4))
    with pyro.plate("time", len(x)):
        z = pyro.sample("z", dist.Normal(before(x), 1.0))
        pyro.sample("x", dist.Normal(A * (theta + z), 1.0), obs=x)


torch.manual_seed(2012)  # the recipe of the paper's code
x = [torch.zeros(())]
for _ in range(NUM_SAW):
    _, noise = torch.randn(()), torch.randn(())
    x.append(noise + A * (3.4159 + x[-1]))
x = torch.stack(x[1:])
print(plan_amortization(saw, x))

# %% [markdown]
# The plan found that row $n$ of `x` enters the density of the next row and no other, so it can say which window will
# do. Indeed the mean-field optimum of $z_n$ has mean $(x_{n-1} + a x_n - a^2 E\theta) / (1 + a^2)$: linear in two
# data. Of these an encoder that is linear in $x_n$ sees one, and `Constant()`, one answer for all, sees none.

# %%
joint = (1 + A**2) * torch.eye(NUM_SAW + 1).double()  # the precision of (z, theta)
joint[:, -1] = joint[-1] = A**2
joint[-1, -1] = A**2 * NUM_SAW
saw_best = torch.linalg.solve(joint, torch.cat([before(x) + A * x, A * x.sum()[None]]).double())


def least_on_saw(*inputs):
    means = torch.stack([torch.ones_like(x), *inputs], 1).double()
    return least_lost(torch.block_diag(means, torch.eye(1)).T[..., None], saw_best[:, None], joint)


least = {"Constant()": least_on_saw(), "MLP(())": least_on_saw(x), "Window(1, ())": least_on_saw(x, before(x))}
found = {}
for label, encoder in zip(least, (Constant(), MLP(()), Window(1, ())), strict=True):
    pyro.set_rng_seed(0)
    guide = AutoAmortizedNormal(saw, encoder=encoder)
    guide.initialize(x)
    closable = guide.plan.verdict.closable  # known before the fit
    fit_svi(saw, guide, x, seed=0, progress=False, **SAW_FIT)
    posterior = guide.posterior(x)
    mean, sd = (torch.cat([part["z"], part["theta"][None]]) for part in (posterior.mean, posterior.stddev))
    found[label] = closable, least[label], float(lost(mean, sd, joint, saw_best))
saws = pd.DataFrame.from_dict(found, orient="index", columns=["closable", "least gap", "gap"])
saws.round(2)

# %% [markdown]
# Gaps are nats for all 1,000 data, and encoders are linear (`()`: no hidden layers). One neighbour on a side closes
# the gap altogether, as the plan said of `Window(1)`, since no datum further away enters the density of $z_n$.
#
# ## Latents that depend on each other
#
# The tracks are of another kind. The simplest of it is a hidden Markov model,
#
# $$z_1 \sim N(0, 1), \qquad z_n \sim N(z_{n-1}, 1), \qquad x_n \sim N(z_n, 1).$$


# %%
def hmm(x):
    z = x.new_zeros(())
    for n in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{n}", dist.Normal(z, 1.0))
        pyro.sample(f"x_{n}", dist.Normal(z, 1.0), obs=x[n])


print(plan_amortization(hmm, torch.randn(8)))

# %% [markdown]
# That no window is enough here is proposition 3.8 of the paper. Its example (figure 8) does not show it as printed.
# The precision matrix there, 3 on the diagonal and -2 beside it, is none, since it has negative eigenvalues. And with
# the flat prior of the first state that is stated, and $x_n = 1$ throughout, the true means are all exactly 1: one
# constant is enough. With $z_1 \sim N(0, 1)$, as above, the example works: the means are $1 - \rho^n$,
# $\rho = (3 - \sqrt 5)/2 \approx 0.382$, since the pull of the prior at the start fades.

# %%
ones, beside = torch.ones(NUM_CHAIN).double(), torch.diag(torch.ones(NUM_CHAIN - 1), 1).double()
printed = 3 * torch.eye(NUM_CHAIN) - 2 * (beside + beside.T)
flat = 3 * torch.eye(NUM_CHAIN) - beside - beside.T
flat[0, 0] = flat[-1, -1] = 2
proper = flat.clone()
proper[0, 0] = 3
flat_best, chain_best = torch.linalg.solve(flat, ones), torch.linalg.solve(proper, ones)
rho = (3 - 5**0.5) / 2
print(f"matrix of figure 8: {int((torch.linalg.eigvalsh(printed) < 0).sum())} of {NUM_CHAIN} eigenvalues negative")
print(f"flat prior: means from {flat_best.min():.6f} to {flat_best.max():.6f}")
print(f"N(0, 1) prior: means {', '.join(f'{m:.6f}' for m in chain_best[:4])}, ...")
print(f"1 - rho^n:           {', '.join(f'{1 - rho**n:.6f}' for n in range(1, 5))}, ...")

# %% [markdown]
# Why this makes a gap: all data are 1, so a window that touches no end looks the same wherever it stands. Any encoder,
# linear or not, gives one answer for all these steps (`shared=True`), but their true means differ. For the fits the
# chain is a factor again. Guides are initialized on random data, since a plan needs data that differ.


# %%
def chain(x):
    with pyro.plate("time", len(x)):
        z = pyro.sample("z", FREE)
        pyro.factor("walk", dist.Normal(before(z), 1.0).log_prob(z))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def least_on_chain(radius):
    bases = windows(radius, NUM_CHAIN, NUM_CHAIN, shared=True) @ ones[:, None]
    return least_lost(bases, chain_best[:, None], proper)


loss = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)  # little noise, for small gaps
found = {}
for radius in range(4):
    pyro.set_rng_seed(0)
    guide = AutoAmortizedNormal(chain, encoder=Window(radius, ()))
    guide.initialize(torch.randn(NUM_CHAIN))
    fit_svi(chain, guide, ones.float(), seed=0, loss=loss, progress=False, **CHAIN_FIT)
    gap = lost(guide.posterior(ones.float()).mean["z"], proper.diagonal().rsqrt(), proper, chain_best)
    found[radius] = guide.plan.verdict.closable, least_on_chain(radius), float(gap)
chains = pd.DataFrame.from_dict(found, orient="index", columns=["closable", "least gap", "gap of the means"])
chains.rename_axis("steps seen on a side")

# %% [markdown]
# The least gap is never zero. Each neighbour multiplies it by about $\rho^2 \approx 1/7$: what the next wider window
# leaves out has faded by another $\rho$, and the gap is quadratic in it. (The fits end up to 3e-4 nats above, which is
# the noise of the optimizer.)
#
# ## What a window buys

# %%
wide = range(7) if FULL else RADII
fig, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
curves = {"tracks": [least_on_tracks(r) for r in wide], "hidden Markov model": [least_on_chain(r) for r in wide]}
fits = {"tracks": tracks["gap"][RADII], "hidden Markov model": chains["gap of the means"]}
for color, label in (("C0", "tracks"), ("C2", "hidden Markov model")):
    ax.semilogy(wide, curves[label], color=color, label=f"{label}: the least possible")
    ax.semilogy(fits[label].index, fits[label], "o", color=color, label=f"{label}: fits")
ax.semilogy([0, 1], [least["MLP(())"], 1e-9], "--", color="C1", label="saw series: the least possible, 0 from 1 on")
ax.semilogy(0, saws["gap"]["MLP(())"], "o", color="C1", label="saw series: fit")
ax.set(xlabel="steps seen on a side", ylabel="amortization gap, nats", ylim=(1e-6, 3e3))
ax.set_title("Coupled latents: each neighbour divides the gap. A neighbour's datum: one closes it")
ax.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# | Posterior of a latent needs | Plan says | Window buys |
# |---|---|---|
# | its own row's data, given the globals | `True` | nothing: there is no gap |
# | neighbours' data, which stand in its density (saw series) | `False`, names a radius | all, at that radius |
# | all data, as latents are coupled (tracks) | `False` | a constant factor each; only the whole series all |
#
# That factor depends on the model: the more slowly the past fades, the closer it is to one. A small window may well
# do. What it costs in your model, the gap report tells.
#
# ## Where to go next
#
# - Your own series: print the plan first. Latents that a loop numbers, `z_0`, `z_1`, ..., get `Recurrent()` by default,
#   and series may be of different lengths, padded under a mask; see "Series" in the README.
# - Rows that need other rows without any order, as in crossed groups: the plan names the sites, "Limits" the way out.
# - Where a datum is enough: [When does amortizing cost nothing?](03_when_is_it_lossless.ipynb)
#
# The last cell holds this page to its claims.

# %%
if FULL:
    for radius in RADII:
        least_gap, gap, gap_se = tracks.loc[radius].iloc[:3]
        assert least_gap - 4 * gap_se < gap < 1.25 * least_gap + 4 * gap_se, "none does better, and fits come close"
        assert not guides[radius].plan.verdict.closable
    assert guides["all"].plan.verdict.closable
    assert tracks["gap"]["all"] < 0.01 * tracks["gap"][0], "the whole track reaches the mean-field optimum"
    assert tracks.iloc[0, -1] > 2, "velocities from one position are off by more than two sd"
    assert all(2.9 < a / b < 4.5 for a, b in zip(curves["tracks"], curves["tracks"][1:], strict=False))
    for name, exact in {"amortization_gap": exact_gap, "approximation_gap": exact_family_gap}.items():
        total, total_se = report.totals.loc[name]
        assert abs(total - exact) < 4 * total_se, "the report agrees, within its own error"
    assert report.totals.loc["conditioning_gap", "total"] > 0.5 * exact_gap
    assert "encoder=Recurrent()" in report.advice[0]

    for label, exact in {"Constant()": 2380.55, "MLP(())": 339.62, "Window(1, ())": 0.0}.items():
        assert abs(saws["least gap"][label] - exact) < 0.01
        assert abs(saws["gap"][label] - exact) < 0.3
        assert saws["closable"][label] == (exact == 0)

    assert int((torch.linalg.eigvalsh(printed) < 0).sum()) == 23
    assert (flat_best - 1).abs().max() < 1e-12, "with a flat prior there is nothing to miss"
    assert (chain_best[:50] - 1 + rho ** torch.arange(1, 51)).abs().max() < 1e-6
    for radius, exact in enumerate((0.186033, 0.023756, 0.0034027, 0.00049491)):
        assert abs(chains["least gap"][radius] - exact) < 1e-6
        assert exact - 1e-6 < chains["gap of the means"][radius] < exact + 1e-3
        assert not chains["closable"][radius]
