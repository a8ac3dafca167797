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
# # How do I amortize groups, when rows are missing and groups are new?
#
# Repeated measures come in groups: a few visits of each child, some of them missed. A hierarchical model has latents
# for each child. An amortized guide answers for a child from however many visits there are, and so also for a child
# that was not in the study, after its first visit.
#
# Groups are often few. This page takes a classic study of 27 children, shows what so few do to an encoder, mends it
# with children simulated from the model, and checks the answers against posteriors that are known.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.reparam import LocScaleReparam

from pyro_amortize import AutoAmortizedNormal, amortization_gap, fit_svi, plan_amortization, run_mcmc

# %%
FULL = not os.environ.get("PYRO_AMORTIZE_SMOKE")
NUM_STEPS = 2000 if FULL else 20
NUM_STUDIES, BATCH_SIZE = (200, 200) if FULL else (2, 20)
GAP_OPTIONS = {"num_draws": 2000} if FULL else {"num_draws": 50, "num_steps": 10, "num_annealed": 0}
MCMC_OPTIONS = {} if FULL else {"num_samples": 3, "warmup_steps": 3, "num_chains": 1}
NUM_DRAWS = 2000 if FULL else 20

# %% [markdown]
# ## The data
#
# Potthoff and Roy (Biometrika 1964) report the distance from the pituitary to the pterygomaxillary fissure, in mm, of
# 11 girls and 16 boys at ages 8, 10, 12 and 14. Little and Rubin (*Statistical Analysis with Missing Data*, 1987)
# deleted nine measurements at age 10 of children who were small at 8: an example of data *missing at random*, as
# whether a value is missing depends on values that are there. What was deleted is known, so imputations can be checked.

# %%
TABLE = """
    21.0 20.0 21.5 23.0   21.0 21.5 24.0 25.5   20.5 24.0 24.5 26.0   23.5 24.5 25.0 26.5   21.5 23.0 22.5 23.5
    20.0 21.0 21.0 22.5   21.5 22.5 23.0 25.0   23.0 23.0 23.5 24.0   20.0 21.0 22.0 21.5   16.5 19.0 19.0 19.5
    24.5 25.0 28.0 28.0   26.0 25.0 29.0 31.0   21.5 22.5 23.0 26.5   23.0 22.5 24.0 27.5   25.5 27.5 26.5 27.0
    20.0 23.5 22.5 26.0   24.5 25.5 27.0 28.5   22.0 22.0 24.5 26.5   24.0 21.5 24.5 25.5   23.0 20.5 31.0 26.0
    27.5 28.0 31.0 31.5   23.0 23.0 23.5 25.0   21.5 23.5 24.0 28.0   17.0 24.5 26.0 29.5   22.5 25.5 25.5 26.0
    23.0 24.5 26.0 30.0   22.0 21.5 23.5 25.0
"""
AGES = [8, 10, 12, 14]
truth = torch.tensor([float(value) for value in TABLE.split()]).reshape(27, 4)
boy = (torch.arange(27) >= 11).float()[:, None]
age = torch.tensor(AGES).repeat(27, 1) - 11.0  # years from 11
deleted = torch.tensor([3, 6, 9, 10, 13, 16, 23, 24, 27]) - 1
seen = torch.ones(27, 4, dtype=torch.bool)
seen[deleted, 1] = False
children = truth.where(seen, 0.0), age, seen, boy

is_new = torch.arange(27) % 4 == 0  # kept from training: girls 1, 5, 9 and boys 13, 17, 21, 25
study, newcomers = ([values[who] for values in children] for who in (~is_new, is_new))

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for ax, sex in zip(axes, (0, 1), strict=True):
    for i in (boy[:, 0] == sex).nonzero()[:, 0].tolist():
        look = {"color": "C1" if is_new[i] else "0.6", "markersize": 5, "linewidth": 1}
        ax.plot(np.compress(seen[i], AGES), truth[i, seen[i]], ".-", **look)
        ax.plot(np.compress(~seen[i], AGES), truth[i, ~seen[i]], "x", **look)
    ax.set(xlabel="age", title=("girls", "boys")[sex], xticks=AGES)
axes[0].set_ylabel("distance, mm")
fig.suptitle("20 children to train on (grey), 7 kept as new (orange); crosses are deleted")
plt.show()

# %% [markdown]
# ## The model, for padded arrays
#
# Child $i$ has a line: a level $a_i$ at age 11 and a rate $b_i$ of growth a year, which scatter about the means of its
# sex with standard deviations $s_a$ and $s_b$. At age $t$,
#
# $$y_{it} \sim N(a_i + b_i\,(t - 11),\ \sigma^2), \qquad
#   a_i \sim N(\mu_a + \delta_a\,\mathrm{boy}_i,\ s_a^2), \qquad b_i \sim N(\mu_b + \delta_b\,\mathrm{boy}_i,\ s_b^2).$$
#
# Children and visits are nested plates. `obs_mask` is Pyro's own option for missing data: where it is False, the
# measurement is a latent, and the number in its place (here 0) is never read.


# %%
def population():
    mean = pyro.sample("mean", dist.Normal(torch.tensor([24.0, 0.5]), torch.tensor([5.0, 1.0])).to_event(1))
    more = pyro.sample("more", dist.Normal(torch.zeros(2), torch.tensor([5.0, 1.0])).to_event(1))  # of boys
    spread = pyro.sample("spread", dist.LogNormal(torch.tensor([2.0, 0.3]).log(), 0.5).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    return mean, more, spread, noise


def growth(distance, age, seen, boy):
    mean, more, spread, noise = population()
    with pyro.plate("children", len(distance), dim=-2):
        level = pyro.sample("level", dist.Normal(mean[..., 0] + more[..., 0] * boy, spread[..., 0]))
        rate = pyro.sample("rate", dist.Normal(mean[..., 1] + more[..., 1] * boy, spread[..., 1]))
        with pyro.plate("visits", distance.shape[1], dim=-1):
            pyro.sample("distance", dist.Normal(level + rate * age, noise), obs=distance, obs_mask=seen)


print(plan_amortization(growth, *study))

# %% [markdown]
# `level` and `rate` share an encoder that answers for one child. Distance and age are *pooled* over its visits: one
# network runs on each visit, its results are averaged over the visits that are there, and a second network sees the
# averages, the number of visits, and `boy`. Visits may be any in number and in any order. `features` counts the columns
# of data that enter: distance with a mark where it is missing, age, `boy`. `seen` is none of them; it says which visits
# are averaged.
#
# `closable: True`: given the globals, children are independent, and the encoder sees all data of a child. So a wide
# enough encoder *can* reach the best normals for every child; that training on 20 children gets there, it does not say.
# The missing measurements are left to the model: given a child's line, their distribution is known.
#
# ## The model, for a long table
#
# The same data may come as a table with a row for each measurement, and the number of its child in a column. Groups are
# then `level[child]`; nothing is padded or masked.


# %%
def growth_long(distance, age, child, boy):
    mean, more, spread, noise = population()
    with pyro.plate("children", len(boy)):
        level = pyro.sample("level", dist.Normal(mean[..., 0] + more[..., 0] * boy, spread[..., 0]))
        rate = pyro.sample("rate", dist.Normal(mean[..., 1] + more[..., 1] * boy, spread[..., 1]))
    with pyro.plate("rows", len(distance)):
        pyro.sample("distance", dist.Normal(level[..., child] + rate[..., child] * age, noise), obs=distance)


def to_long(distance, age, seen, boy):
    return distance[seen], age[seen], seen.nonzero()[:, 0], boy[:, 0]


print(plan_amortization(growth_long, *to_long(*study)))

# %% [markdown]
# The plan has found that `child` says which rows belong to which child, and pools those. An index is no feature: the
# number of a child means nothing, and new children are numbered from 0 again. It is the same model, so both forms
# should come to the same ELBO, and they do.

# %%
guide, guide_long = AutoAmortizedNormal(growth), AutoAmortizedNormal(growth_long)
options = {"num_steps": NUM_STEPS, "lr": 0.02, "seed": 0, "progress": False}
fit = fit_svi(growth, guide, *study, **options)
fit_long = fit_svi(growth_long, guide_long, *to_long(*study), **options)
print(f"ELBO, padded arrays: {fit.elbo:.2f} ± {fit.elbo_se:.2f} nats")
print(f"ELBO, long table:    {fit_long.elbo:.2f} ± {fit_long.elbo_se:.2f} nats")

# %% [markdown]
# ## What an encoder learns from 20 children
#
# A new child comes for its first visit, at age 8. The guide answers at once, but how well? `amortization_gap` sets its
# answers beside the best normals for each child, those of the study and new ones. (With an index it reports totals
# only, so this is for padded arrays.)


# %%
def up_to(last, distance, age, seen, boy):
    return distance, age, seen & (age + 11 <= last), boy


report = amortization_gap(growth, guide, *study, unseen=up_to(8, *newcomers), progress=False, **GAP_OPTIONS)
print(report.generalization.round(3))
print(*report.advice, sep="\n")

# %% [markdown]
# To see where this comes from, look at any number of visits. The answer is known here: given the globals $\theta$, the
# posterior of a child's `level` and `rate` is normal, with precision
# $P = \mathrm{diag}(s_a^{-2}, s_b^{-2}) + X^\top X / \sigma^2$, where $X$ has a row $(1, t - 11)$ for each visit. The
# best independent normals have its mean, and variances $1 / P_{kk}$. Normals whose means are off by $d$, and whose
# standard deviations are $q_k$, lose $\frac12 d^\top P d + \frac12 \sum_k (P_{kk} q_k^2 - 1 - \log P_{kk} q_k^2)$ nats.


# %%
def exact(theta, distance, age, seen, boy):
    """Mean and precision of (level, rate) of each child; theta may be draws."""
    prior = theta["mean"][..., None, :] + theta["more"][..., None, :] * boy
    weight, noise_weight = theta["spread"][..., None, :] ** -2, theta["noise"][..., None, None] ** -2
    x = torch.stack([torch.ones_like(age), age], -1) * seen[..., None]
    precision = torch.diag_embed(weight) + noise_weight[..., None] * (x.mT @ x)
    total = weight * prior + noise_weight * (x.mT @ distance[..., None])[..., 0]
    return torch.linalg.solve(precision, total[..., None])[..., 0], precision


def answer(data):
    """Mean and standard deviations of (level, rate) of each child under the guide."""
    posterior = guide.posterior(*data)
    return [torch.cat([values["level"], values["rate"]], -1) for values in (posterior.mean, posterior.stddev)]


def lost(data):
    """The amortization gap of each child, in nats."""
    (best, precision), (mean, sd) = exact(theta, *data), answer(data)
    off, ratio = best - mean, precision.diagonal(dim1=-2, dim2=-1) * sd**2
    return ((off[:, None] @ precision @ off[..., None])[:, 0, 0] + (ratio - 1 - ratio.log()).sum(-1)) / 2


def lost_by_visits():
    who = {"of the study": study, "new": newcomers}
    means = {name: [lost(up_to(last, *data)).mean().item() for last in AGES] for name, data in who.items()}
    return pd.DataFrame(means, index=pd.Index(AGES, name="visits up to age"))


theta = {name: guide.median(*study)[name] for name in ("mean", "more", "spread", "noise")}
before = lost_by_visits()
print(before.round(3))

# %% [markdown]
# The first row for new children is the number of the report. There are two lessons. The encoder is good at what it was
# trained on, children of the study with all their visits, and worse for new ones: 20 children do not show it what lines
# there are. And it is bad after one or two visits, *also for children of the study*, since none of them had so few. An
# encoder knows the kinds of question that it was asked in training. Pooling makes any number of visits possible, not
# familiar.
#
# ## Children from the model
#
# What lacks is no data about growth. The map from visits to a posterior follows from the model and the globals, and the
# model can make any number of examples of it. Children without visits have the prior given the globals, so
# `guide.predictive`, asked for such, draws new children, and new globals for each study of 20. They get visits at
# random, and the encoder trains on them, in minibatches.
#
# Encoder alone: simulated children are no evidence about growth, so the tables of the globals are frozen meanwhile, as
# one freezes parameters of any torch module.

# %%
pyro.set_rng_seed(0)
blank, sexes = torch.zeros(20, 4), torch.arange(20.0)[:, None] % 2
draws = guide.predictive(blank, age[:20], blank.bool(), sexes, num_samples=NUM_STUDIES)["distance"].flatten(0, 1)
visited = torch.rand(len(draws), 4) < torch.rand(len(draws), 1)
visited[torch.arange(len(draws)), torch.randint(4, (len(draws),))] = True  # one at least
simulated = draws, age[:1].repeat(len(draws), 1), visited, sexes.repeat(NUM_STUDIES, 1)

for name, parameter in guide.named_parameters():
    parameter.requires_grad_("children" in name)
fit_svi(growth, guide, *simulated, **options | {"batch_size": BATCH_SIZE, "lr": 0.01})
for parameter in guide.parameters():
    parameter.requires_grad_(True)

after = lost_by_visits()
print(after.round(3))

# %%
fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
for table, style, label in ((before, "o--", "trained on the study"), (after, "o-", "and on simulated children")):
    for who, color in (("of the study", "0.5"), ("new", "C1")):
        ax.plot(AGES, table[who], style, color=color, label=f"{label}; children {who}", markersize=4)
ax.set(yscale="log", xticks=AGES, xlabel="visits up to age", ylabel="amortization gap, nats a child")
fig.suptitle("Simulated children teach the encoder few visits, and new children")
ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# All gaps are now a few hundredths of a nat at most, for new children as for others. This assumes nothing beyond the
# model. If the model is wrong, so is its posterior, and the encoder still finds that posterior, except for children
# unlike any that the model makes.
#
# ## After one visit, two, three
#
# The full posterior of a new child integrates over the globals. NUTS draws them given the study, from the long table,
# which has no missing measurements to draw. (Few visits a child say little about `spread`, which makes a funnel of it
# and `rate`; Pyro's `LocScaleReparam` takes that away.) For each draw the child's posterior is known, and these are
# averaged. The new child's own say on the globals is left out, as it is by the guide.

# %%
decentred = poutine.reparam(growth_long, {"rate": LocScaleReparam(0.0)})
mcmc = run_mcmc(decentred, *to_long(*study), seed=0, progress=False, **MCMC_OPTIONS)
print(mcmc)
theta_draws = {name: mcmc.samples[name].flatten(0, 1) for name in theta}


# %%
def full(data):
    """Mean and covariance of (level, rate) of each child, the globals integrated out."""
    means, precisions = exact(theta_draws, *data)
    off = means - means.mean(0)
    return means.mean(0), precisions.inverse().mean(0) + (off[..., None] * off[..., None, :]).mean(0)


def line(mean, covariance):
    """Mean and standard deviation of a child's line at each age."""
    x = torch.stack([torch.ones(4), age[0]], -1)
    return x @ mean, (x @ covariance * x).sum(-1).sqrt()


fig, axes = plt.subplots(3, 3, figsize=(9, 6.5), sharex=True, sharey="row", layout="constrained")
for row, i in zip(axes, (0, 16, 20), strict=True):
    row[0].set_ylabel(f"{'boy' if boy[i] else 'girl'} {i + 1}: distance, mm")
    for ax, last in zip(row, AGES[:3], strict=True):
        child = up_to(last, *(values[i : i + 1] for values in children))
        mean, sd = answer(child)
        middle, half = line(mean[0], torch.diag(sd[0] ** 2))
        ax.fill_between(AGES, middle - 2 * half, middle + 2 * half, alpha=0.3, label="guide, ±2 sd")
        middle, half = line(*(moment[0] for moment in full(child)))
        for side, label in ((2, "full posterior, ±2 sd"), (-2, None)):
            ax.plot(AGES, middle + side * half, "k--", linewidth=0.8, label=label)
        for when, fill, label in ((child[2][0], "full", "seen"), (~child[2][0], "none", "still to come")):
            ax.plot(np.compress(when, AGES), truth[i, when], "ko", markersize=4, fillstyle=fill, label=label)
        ax.set(xticks=AGES)
for ax, title in zip(axes[0], ("after one visit", "after two", "after three"), strict=True):
    ax.set_title(title, fontsize=10)
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
fig.suptitle("Lines of three new children: the guide's answers narrow with each visit, as the full posteriors do")
plt.show()

# %% [markdown]
# The bands are for a child's line; measurements scatter about it by $\sigma$ as well. In numbers, the standard
# deviations of level and rate, averaged over the new children. `best normals` are those of the family, given $\theta$.

# %%
rows = {}
for visits, last in enumerate([6, *AGES]):
    data = up_to(last, truth[is_new], age[is_new], torch.ones_like(seen[is_new]), boy[is_new])
    best = exact(theta, *data)[1].diagonal(dim1=-2, dim2=-1).rsqrt()
    whole = full(data)[1].diagonal(dim1=-2, dim2=-1).sqrt()
    sds = {"guide": answer(data)[1], "best normals": best, "full posterior": whole}
    rows[visits] = pd.DataFrame({kind: sd.mean(0) for kind, sd in sds.items()}, index=["level", "rate"]).stack()
widths = pd.DataFrame(rows).T.rename_axis("visits")
print(widths.round(2))

# %% [markdown]
# The guide widens as its family's best normals do; without visits it has the prior. What lacks to the full posterior is
# not the encoder's fault. `full posterior` integrates over the globals; and independent normals are narrower than a
# correlated posterior: after one visit at age 8, a high level and a slow rate explain a large measurement alike.
#
# ## The missing measurements
#
# Pyro's `Predictive` runs the model on the guide's draws. What was observed stays, what is missing is drawn, and the
# site `distance` holds completed tables, of the study and the new children alike.

# %%
pyro.set_rng_seed(0)
completed = Predictive(growth, guide=guide, num_samples=NUM_DRAWS, parallel=True)(*children)["distance"]
imputed = completed[:, deleted, 1]
mean, covariance = full([values[deleted] for values in children])
x = torch.tensor([1.0, 10.0 - 11.0])
exact_mean = mean @ x
exact_sd = (covariance @ x @ x + theta_draws["noise"].square().mean()).sqrt()
print(f"mean at age 10: of those seen {truth[seen[:, 1], 1].mean():.2f}, of all {truth[:, 1].mean():.2f}", end=", ")
print(f"completed {completed[:, :, 1].mean():.2f} ± {completed[:, :, 1].mean(1).std():.2f} mm")

fig, ax = plt.subplots(figsize=(8, 3), layout="constrained")
at = np.arange(len(deleted))
ax.bar(at, 4 * exact_sd, bottom=exact_mean - 2 * exact_sd, width=0.8, color="0.85", label="full posterior, ±2 sd")
ax.errorbar(at, imputed.mean(0), 2 * imputed.std(0), fmt="o", markersize=3, linewidth=1, label="imputed, ±2 sd")
ax.plot(at, truth[deleted, 1], "x", color="C3", label="deleted")
ax.set(xticks=at, xticklabels=(deleted + 1).tolist(), xlabel="child", ylabel="distance at age 10, mm")
ax.set_title("What is imputed, beside the full posterior and what was deleted")
ax.set_ylim(12, 28)
ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower right")
plt.show()

# %% [markdown]
# ## What an encoder does not mend
#
# Globals have tables, as in any mean-field guide, and independent normals are too sure of them.

# %%
posterior = guide.posterior(*study)
kinds = {
    "guide": posterior.mean,
    "MCMC": {name: values.mean(0) for name, values in theta_draws.items()},
    "guide sd": posterior.stddev,
    "MCMC sd": {name: values.std(0) for name, values in theta_draws.items()},
}
columns = {kind: torch.cat([values[name].flatten() for name in theta]) for kind, values in kinds.items()}
names = ["mean level", "mean rate", "level, boys more", "rate, boys more", "level, spread", "rate, spread", "noise"]
population_table = pd.DataFrame(columns, index=names)
print(population_table.round(2))

# %% [markdown]
# Means agree to about half a standard deviation. That of the mean rate is less than half of what it should be: it is
# correlated with the rates of all 20 children, which independent normals cannot say. If the question is about the
# population (do boys grow faster?), use MCMC, which is quick for a study of this size. If it is about children, the
# table of standard deviations above shows what the guide's answers lack.
#
# ## Where to go next
#
# - Your own groups: print the plan first. Where it says `closable: False` it names what couples them.
# - More levels, as visits of children in schools, work the same way. `encoder=DeepSets(...)` changes the networks.
# - Few groups, or questions unlike those of the training data: look at `report.generalization`, and simulate; see
#   [What did amortizing cost me?](05_what_did_it_cost.ipynb)
# - Series, where the next value depends on the last: `Recurrent()` and `Window(radius)`; see
#   [When can no encoder of a datum be enough?](04_when_it_is_not.ipynb)
#
# The last cell holds this page to its claims.

# %%
if FULL:
    assert abs(fit.elbo - fit_long.elbo) < 4 * np.hypot(fit.elbo_se, fit_long.elbo_se), "the two forms are one model"
    first = report.unseen.per_datum
    error = np.sqrt((first["amortization_gap_se"] ** 2).sum()) / len(first)
    assert abs(first["amortization_gap"].mean() - before.loc[8, "new"]) < 4 * error, (
        "the report agrees with the formula"
    )
    assert before.loc[14, "new"] > 2 * before.loc[14, "of the study"], "20 children do not show all lines"
    assert (before.loc[8] > 20 * after.loc[8]).all(), "few visits are learnt from simulated children"
    assert (after < 0.05).all(axis=None)
    assert all(torch.equal(theta[name], guide.median(*study)[name]) for name in theta), "which say nothing of globals"
    assert mcmc.converged
    assert mcmc.divergences < 10
    assert (widths["level"].diff().iloc[1:] < 0).all(axis=None), "the more visits, the narrower"
    for name in ("level", "rate"):
        assert ((widths[name]["guide"] / widths[name]["best normals"] - 1).abs() < 0.1).all()
        assert widths[name]["guide"].iloc[-1] < 0.8 * widths[name]["guide"].iloc[0]
        assert (widths[name]["best normals"] < 1.02 * widths[name]["full posterior"]).all()
    assert ((imputed.mean(0) - exact_mean) / exact_sd).square().mean().sqrt() < 0.2
    assert ((imputed.std(0) / exact_sd - 1).abs() < 0.2).all()
    assert ((truth[deleted, 1] - exact_mean).abs() < 2 * exact_sd).sum() >= 7
    assert ((population_table["guide"] - population_table["MCMC"]).abs() < 0.8 * population_table["MCMC sd"]).all()
    assert population_table.loc["mean rate", "guide sd"] < 0.7 * population_table.loc["mean rate", "MCMC sd"]
