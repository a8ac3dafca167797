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
# # How do I use a network of my own as the encoder?
#
# An encoder turns the data of a row into the parameters of its posterior. By default it is a multilayer perceptron.
# You may know better: pixels have neighbours, word counts are proportions, a count of cases means nothing without the
# number to expect. Three options of the guide take what you know:
#
# - `encoder=`, the network. Any `nn.Module` will do that takes the data of a batch of rows, shape (rows, features), and
#   returns (rows, any width); more axes are flattened. A linear head for each latent site follows, so the module need
#   not know how many latents there are, nor of which size.
# - `prepare=`, what is done to the data before. By default reals are standardized, counts put on a log scale,
#   categories made one-hot.
# - `inputs=`, which data. By default all that the plan found to inform the row's latents.
#
# Each has a model with real data below: images, text, and rates with covariates. Whether a choice was good is a
# question with an answer in nats, and not always the expected one. The last parts are about several sites, dropout and
# batch norm, and saving.

# %%
import importlib
import inspect
import os
import re
import tempfile
import warnings
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import nn

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    amortization_gap,
    compare_inference,
    fit_mean_field,
    fit_svi,
    plan_amortization,
)

# %%
FULL = not os.environ.get("PYRO_AMORTIZE_SMOKE")
NUM_SEEN, NUM_JUDGED, NUM_DRAWS = (1500, 100, 200) if FULL else (40, 5, 10)
DIGIT_FIT = {"num_steps": 2000, "batch_size": 100} if FULL else {"num_steps": 5, "batch_size": 20}
DIGIT_GAP = {"num_steps": 150, "num_particles": 8} if FULL else {"num_steps": 2, "num_particles": 2}
NUM_DOCUMENTS, NUM_TRAIN, NUM_WORDS, NUM_TOPICS = (None, 1600, 500, 12) if FULL else (200, 60, 100, 3)
TEXT_FIT = {"num_steps": 800, "batch_size": 160, "lr": 0.02} if FULL else {"num_steps": 5, "batch_size": 20}
HELD_FIT = {"num_steps": 600, "batch_size": 160} if FULL else {"num_steps": 5, "batch_size": 20}
RATE_FIT = {"num_steps": 800, "lr": 0.03} if FULL else {"num_steps": 5}
RATE_GAP = {"num_training_steps": 500} if FULL else {"num_steps": 2, "num_training_steps": 5, "num_annealed": 0}

# %% [markdown]
# ## Images: a network
#
# scikit-learn's handwritten digits have 8 x 8 pixels, each a count from 0 to 16. A network, the *decoder*, maps a
# code of ten numbers to the logits of the pixels.


# %%
SIDE, CODE = 8, 10
pyro.set_rng_seed(0)
decoder = nn.Sequential(nn.Linear(CODE, 64), nn.SiLU(), nn.Linear(64, SIDE**2))


def digits_model(pixels):
    pyro.module("decoder", decoder)
    with pyro.plate("digits", len(pixels)):
        code = pyro.sample("code", dist.Normal(torch.zeros(CODE), 1.0).to_event(1))
        pyro.sample("pixels", dist.Binomial(16, logits=decoder(code)).to_event(1), obs=pixels)


digits = torch.tensor(load_digits().data, dtype=torch.float32)
digits = digits[torch.randperm(len(digits))]
seen, unseen = digits[:NUM_SEEN], digits[-NUM_JUDGED:]

# %% [markdown]
# Rows come flattened, so a convolutional network begins with `nn.Unflatten`. Write it as a function of the number of
# features, and the guide calls it with what the data have. Each guide then has a network of its own. (A *module*
# that you pass is used as it is, not copied: two guides given the same one would share its weights.)


# %%
def make_cnn(in_features):
    side = int(in_features**0.5)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * (side // 2) ** 2, 128),
        nn.SiLU(),
    )


# %% [markdown]
# Is it better than the default? To tell, both must encode for the *same* model. So the decoder is trained first, with
# a default guide, and then held: `compare_inference` trains new guides by the same schedule, and leaves the decoder
# as the first fit has left it. The default is small here (two layers of 64), so a wider perceptron stands beside it,
# its last layer as wide as that of the convolutional network: else we could not tell what is due to convolution and
# what to size.

# %%
first = fit_svi(digits_model, AutoAmortizedNormal(digits_model), seen, progress=False, seed=0, **DIGIT_FIT)
encoders = {"MLP, default": None, "MLP, wide": MLP((256, 128)), "CNN": make_cnn}
guides = {label: AutoAmortizedNormal(digits_model, encoder=encoder) for label, encoder in encoders.items()}
comparison = compare_inference(
    digits_model,
    seen,
    methods={"first": first, **guides},
    svi={"seed": 0, **DIGIT_FIT},
    num_draws=NUM_DRAWS,
    progress=False,
)
comparison.table.loc[list(guides), ["elbo", "elbo_se", "gap", "gap_se", "num_parameters"]].round(1)

# %% [markdown]
# These are nats for all 1,500 digits in training. But an encoder is made for rows it has not seen. `amortization_gap`
# sets each guide against the best normal for each single digit, on digits from training and on others.

# %%
reports = {
    label: amortization_gap(
        digits_model,
        guide,
        seen[:NUM_JUDGED],
        unseen=unseen,
        num_draws=NUM_DRAWS,
        num_annealed=0,
        progress=False,
        **DIGIT_GAP,
    )
    for label, guide in guides.items()
}
gaps = pd.DataFrame({label: report.generalization.loc["amortization_gap"] for label, report in reports.items()}).T
gaps.round(2)

# %%
lost = pd.DataFrame({label: report.unseen.per_datum["amortization_gap"] for label, report in reports.items()})
gained = {label: lost[label] - lost["CNN"] for label in ("MLP, default", "MLP, wide")}
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.9), sharex=True, sharey=True, layout="constrained")
for ax, (label, gain) in zip(axes, gained.items(), strict=True):
    ax.loglog(lost[label], lost["CNN"], ".", markersize=4)
    ax.axline((1, 1), (10, 10), color="0.6", linewidth=0.8)
    ax.set(xlabel=f"gap of the {label}, nats", title=f"CNN gains {gain.mean():.1f} ± {gain.sem():.1f} nats a digit")
axes[0].set_ylabel("gap of the CNN, nats")
fig.suptitle("Unseen digits: the CNN loses less than the default, but not less than a wide MLP")
plt.show()

# %% [markdown]
# Each dot is a digit; below the line the CNN loses less. Three things can be read from the table and the figure:
#
# - Every encoder loses several times more on digits it has never seen than on those in training. With 1,500 digits
#   that is the larger loss, and no ELBO in training shows it.
# - The convolutional network is better than the default, by about a nat a digit, on unseen digits too.
# - So is the wide perceptron. In training it is the best of all, by hundreds of nats. On unseen digits the two are
#   equal within the error of 100 digits, and so are their differences between seen and unseen.
#
# So what helped was size. That pixels have neighbours is worth little where there are 8 x 8 of them, and a step took
# about twice the time. Larger images are another matter. The point is the test: the same model, rows never seen, and a
# plain network of like size beside your own.
#
# ## Text: a preparation
#
# What are the functions of Python's scientific packages about? Their docstrings are on your machine. (So the numbers
# of this section depend on the versions you have.) What reads alike everywhere is taken out first: code, formulas,
# links, references, and words that stand in more than a fifth of all docstrings, such as *returns*. The 500 most
# frequent words of the rest are counted.


# %%
PACKAGES = {
    "NumPy": "numpy numpy.linalg numpy.random",
    "SciPy": "scipy.stats scipy.signal scipy.linalg scipy.optimize scipy.sparse scipy.special scipy.ndimage",
    "Matplotlib": "matplotlib.pyplot matplotlib.axes matplotlib.figure",
    "scikit-learn": "sklearn.linear_model sklearn.cluster sklearn.ensemble sklearn.metrics sklearn.preprocessing",
    "PyTorch": "torch torch.nn torch.nn.functional torch.optim torch.distributions",
}


def plain(text):
    section = r"^(\*\*Array API|(References|See Also)\n---).*?(?=^[^\n]+\n---|\Z)"
    text = re.sub(section, "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?m)^( *)\.\. math::.*(\n(\1 +.*| *))*", "", text)
    text = re.sub(r"(?m)^ *(>>>|\.\.).*$", "", text)
    return re.sub(r":math:`[^`]*`|:[\w:]+:(?=`)|https?://\S+", "", text)


def docstrings():
    """Returns a table of public functions and classes: their package, and what they say of themselves."""
    found = {}
    for package, names in PACKAGES.items():
        for module in map(importlib.import_module, names.split()):
            for name in sorted(set(dir(module)) & set(getattr(module, "__all__", dir(module)))):
                member = getattr(module, name)
                own = (getattr(member, "__module__", None) or "").split(".")[0] == module.__name__.split(".")[0]
                if callable(member) and own:
                    found[plain(inspect.getdoc(member) or "")] = package
    return pd.DataFrame({"package": found.values(), "text": found.keys()})


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of members that are deprecated
    documents = docstrings().sample(frac=1, random_state=0)[:NUM_DOCUMENTS]
own_names = {"numpy", "scipy", "matplotlib", "pyplot", "sklearn", "scikit", "learn", "torch", "pytorch", "plt"}
vectorizer = CountVectorizer(
    token_pattern="[a-z]{3,}", stop_words=list(ENGLISH_STOP_WORDS | own_names), max_df=0.2, max_features=NUM_WORDS
)
counts = torch.tensor(vectorizer.fit_transform(documents["text"]).toarray()).float()
words = vectorizer.get_feature_names_out()
enough = (counts.sum(1) >= 10).numpy()
counts, packages = counts[enough], documents["package"].to_numpy()[enough]
counts, counts_new = counts[:NUM_TRAIN], counts[NUM_TRAIN:]
packages, packages_new = packages[:NUM_TRAIN], packages[NUM_TRAIN:]
pd.Series(packages).value_counts()

# %% [markdown]
# A topic is a distribution over words, and a document a mixture of topics. The proportions of a document are the
# softmax of a normal vector, as in Pyro's ProdLDA example; the topics are global latents. The posterior of the
# proportions depends on which words a document has more than others, and less on how many words it has. So let the
# encoder see frequencies, and the length beside them: a function from the plain data, (rows, features), to what the
# network is to get, with values of order one.


# %%
def documents_given(topics, counts):
    with pyro.plate("documents", len(counts)):
        mixture = pyro.sample("mixture", dist.Normal(torch.zeros(NUM_TOPICS), 1.0).to_event(1))
        rate = counts.sum(-1, keepdim=True) * (mixture.softmax(-1) @ topics)
        pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)


def topic_model(counts):
    base = pyro.sample("base", dist.Normal(torch.zeros(len(words)), 3.0).to_event(1))
    topics = pyro.sample("topics", dist.Normal(torch.zeros(NUM_TOPICS, len(words)), 1.0).to_event(2))
    documents_given((base + topics).softmax(-1), counts)


def frequencies(counts):
    length = counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([20 * counts / length, length.log() - 5], -1)


pyro.set_rng_seed(0)
topic_guide = AutoAmortizedNormal(topic_model, prepare=frequencies)
print(fit_svi(topic_model, topic_guide, counts, seed=0, progress=False, **TEXT_FIT))
found = topic_guide.median(counts)
topics = (found["base"] + found["topics"]).softmax(-1)
for k, topic in enumerate(topics):
    print(f"{k}: {' '.join(words[topic.argsort(descending=True)[:8].numpy()])}")

# %% [markdown]
# Each line is a topic, by its most frequent words. You will recognise subjects: plots, hypothesis tests, distributions,
# random numbers, matrices, machine learning. Which line is which changes with seed and versions.
#
# Did the preparation help? Two such fits cannot tell: they end in different optima, which are thousands of nats apart
# from seed to seed. So the topics are held, as the decoder was, and a guide is trained for them with each preparation.

# %%
held_model = partial(documents_given, topics)  # the topics that were found
topic_rows = {}
for label, prepare in {"default": "auto", "frequencies": frequencies}.items():
    pyro.set_rng_seed(0)
    topic_guide = AutoAmortizedNormal(held_model, prepare=prepare)
    fit = fit_svi(held_model, topic_guide, counts, seed=0, progress=False, **HELD_FIT)
    topic_rows[label] = fit.elbo, fit.elbo_se
topic_table = pd.DataFrame(topic_rows, index=["elbo", "elbo_se"]).T
topic_table.round(1)

# %% [markdown]
# Given the topics, the two preparations differ by less than a tenth of a nat a document. The default puts counts on a
# log scale and divides all by one number, and from that a network of this width (half the number of words) finds
# frequencies by itself. So ours was sensible, and not needed. Where a network is small, or rows are few, that may
# differ; the test is the same.
#
# For docstrings never seen, the guide tells the proportions at once. If they mean something, they tell the package,
# which neither model nor guide was told. A logistic regression on the proportions shows whether they do.

# %%
shares, shares_new = (topic_guide.posterior(c).mean["mixture"].softmax(-1) for c in (counts, counts_new))
classifier = LogisticRegression(max_iter=1000, C=10).fit(shares.numpy(), packages)
told = classifier.score(shares_new.numpy(), packages_new)
most = (packages_new == pd.Series(packages).mode()[0]).mean()
print(f"package of an unseen docstring, told from its topics: {told:.0%} right; always the most frequent: {most:.0%}")

# %%
by_package = pd.DataFrame(shares_new.numpy()).groupby(packages_new).mean()
fig, ax = plt.subplots(figsize=(7.6, 3), layout="constrained")
image = ax.imshow(by_package, cmap="viridis", vmin=0, aspect="auto")
top = [words[topic.argsort(descending=True)[:2].numpy()] for topic in topics]
ax.set_xticks(range(NUM_TOPICS), [", ".join(pair) for pair in top], rotation=30, ha="right")
ax.set_yticks(range(len(by_package)), by_package.index)
ax.set_title("Docstrings never seen: packages differ in their topics", fontsize=10)
fig.colorbar(image, label="mean proportion")
plt.show()

# %% [markdown]
# ## Covariates: which data
#
# Cases of lip cancer in the 56 districts of Scotland, 1975 to 1980, the cases to expect from each district's size and
# ages, and the per cent of its people who work outdoors, in agriculture, fishing or forestry (Clayton and Kaldor,
# *Biometrics*, 1987; Breslow and Clayton, *JASA*, 1993). The latent is a district's log relative risk. One covariate
# enters its prior, the other the likelihood.

# %%
# fmt: off
cases = torch.tensor([
    9, 39, 11, 9, 15, 8, 26, 7, 6, 20, 13, 5, 3, 8, 17, 9, 2, 7, 9, 7, 16, 31, 11, 7, 19, 15, 7, 10, 16, 11, 5, 3, 7,
    8, 11, 9, 11, 8, 6, 4, 10, 8, 2, 6, 19, 3, 2, 3, 28, 6, 1, 1, 1, 1, 0, 0,
]).float()
expected = torch.tensor([
    1.4, 8.7, 3.0, 2.5, 4.3, 2.4, 8.1, 2.3, 2.0, 6.6, 4.4, 1.8, 1.1, 3.3, 7.8, 4.6, 1.1, 4.2, 5.5, 4.4, 10.5, 22.7,
    8.8, 5.6, 15.5, 12.5, 6.0, 9.0, 14.4, 10.2, 4.8, 2.9, 7.0, 8.5, 12.3, 10.1, 12.7, 9.4, 7.2, 5.3, 18.8, 15.8, 4.3,
    14.6, 50.7, 8.2, 5.6, 9.3, 88.7, 19.6, 3.4, 3.6, 5.7, 7.0, 4.2, 1.8,
])
outdoor = torch.tensor([
    16, 16, 10, 24, 10, 24, 10, 7, 7, 16, 7, 16, 10, 24, 7, 16, 10, 7, 7, 10, 7, 16, 10, 7, 1, 1, 7, 7, 10, 10, 7,
    24, 10, 7, 7, 0, 10, 1, 16, 0, 1, 16, 16, 0, 1, 7, 1, 1, 0, 1, 1, 0, 1, 1, 16, 10,
]).float()
# fmt: on


def risk_model(cases, expected, outdoor):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("districts", len(cases)):
        risk = pyro.sample("risk", dist.Normal(intercept + slope * outdoor / 10, spread))
        pyro.sample("cases", dist.Poisson(expected * risk.exp()), obs=cases)


rates = (cases, expected, outdoor)
print(plan_amortization(risk_model, *rates))

# %% [markdown]
# Nobody told the plan which arguments are covariates. It found that row $n$ of all three informs the risk of
# district $n$, so the encoder sees all three. What if it does not? `inputs=` leaves some out. Mean-field inference,
# with parameters for each district and no encoder, is the best that any encoder can do.

# %%
choices = {"all": None, "without outdoor": ["cases", "expected"], "without expected": ["cases", "outdoor"]}
risk_guides, risk_elbos = {}, {}
for label, inputs in choices.items():
    risk_guides[label] = AutoAmortizedNormal(risk_model, inputs=inputs)
    fit = fit_svi(risk_model, risk_guides[label], *rates, seed=0, progress=False, **RATE_FIT)
    risk_elbos[label] = fit.elbo, fit.elbo_se
fit = fit_mean_field(risk_model, *rates, seed=0, progress=False, **RATE_FIT)
risk_elbos["mean-field"] = fit.elbo, fit.elbo_se
risk_elbos = pd.DataFrame(risk_elbos, index=["elbo", "elbo_se"]).T
risk_elbos.round(2)

# %% [markdown]
# The guide that sees all three ends where mean-field inference does: the encoder costs nothing. Without `outdoor` it
# loses about two nats in all. Cases and what to expect say most about a district; but where few are expected, the
# prior decides, and its mean depends on `outdoor`. Without `expected` it loses tens of nats: nine cases are many where
# one is expected, and few where forty are. (How many nats depends on the seed, as such a fit is a struggle.)
#
# Had you forgotten a covariate, by `inputs=` or in a guide of your own, the gap report would name it:

# %%
risk_report = amortization_gap(risk_model, risk_guides["without expected"], *rates, progress=False, **RATE_GAP)
print(risk_report)

# %% [markdown]
# The report trains two more encoders alike, one with these inputs and one with all; what the second gains is the
# *conditioning gap*. Given the globals, the exact posterior of each district is one integral on a grid, so we can also
# see what goes wrong.


# %%
def exact(guide):
    """Returns mean and sd of each district's posterior by quadrature, the globals at their medians under a guide."""
    grid = torch.linspace(-5, 5, 2001)[:, None]
    at = guide.median(*rates)
    log_p = dist.Normal(at["intercept"] + at["slope"] * outdoor / 10, at["spread"]).log_prob(grid)
    p = (log_p + dist.Poisson(expected * grid.exp()).log_prob(cases)).softmax(0)
    mean = (p * grid).sum(0)
    return mean, (p * (grid - mean) ** 2).sum(0).sqrt()


off = {}
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), sharex=True, sharey=True, layout="constrained")
for ax, (label, guide) in zip(axes, risk_guides.items(), strict=True):
    (mean, sd), answer = exact(guide), guide.posterior(*rates)
    off[label] = float(((answer.mean["risk"] - mean) / sd).square().mean().sqrt())
    ax.errorbar(mean, answer.mean["risk"], answer.stddev["risk"], fmt=".", linewidth=0.6)
    ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
    ax.set_title(f"{label}: off by {off[label]:.1g} sd", fontsize=10)
axes[0].set_ylabel("guide's mean of log risk, ±1 sd")
axes[1].set_xlabel("exact posterior mean of log risk")
fig.suptitle("An encoder that does not see a covariate is wrong about districts where it matters")
plt.show()

# %% [markdown]
# On the left the guide is right about every district. In the middle its means are off by a fifth of a posterior
# standard deviation or so, root mean square. On the right they are off by a whole one: the encoder guesses from the
# cases how many were to be expected, and is wrong about large districts with few cases and small ones with many.
#
# ## Several sites
#
# Latents that stand in the same plates share one network, with a head for each. A dict gives them networks of their
# own; the same module twice in it is shared. (A dict may also name some sites only; others keep the default.)


# %%
def spread_model(y):
    with pyro.plate("rows", len(y)):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(level[..., None], log_scale.exp()[..., None]).to_event(1), obs=y)


y = torch.randn(50, 6)
network = nn.Sequential(nn.Linear(6, 32), nn.SiLU())
for encoder in (MLP((32,)), {"level": MLP((32,)), "log_scale": MLP((8,))}, {"level": network, "log_scale": network}):
    guide = AutoAmortizedNormal(spread_model, encoder=encoder)
    guide.initialize(y)
    blocks = [" and ".join(block.sites) for block in guide.plan.blocks]
    print(f"{blocks}: {sum(p.numel() for p in guide.parameters())} parameters")

# %% [markdown]
# ## Dropout and batch norm
#
# Both behave differently in training and after it. Steps of `SVI` and of `fit_svi` call the guide, and run your module
# in the mode it is in: training, unless you said otherwise. Answers (`posterior`, `median`, `quantiles`), ELBOs after a
# fit and gap reports run it in eval mode, and put the mode back.

# %%
network = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.SiLU(), nn.Dropout(0.2))
guide = AutoAmortizedNormal(spread_model, encoder=network)
fit_svi(spread_model, guide, y, num_steps=20, batch_size=10, progress=False)
answers = [guide.posterior(y).mean["level"] for _ in range(2)]
calls = [poutine.trace(guide).get_trace(y).nodes["level"]["fn"].loc for _ in range(2)]
print("after the fit, in training mode:", network.training)
print("posterior(y) the same twice:", torch.equal(*answers))
print("guide(y) the same twice:", torch.equal(*calls))

# %% [markdown]
# So nothing is to be done for answers. Call `guide.eval()` where you hand the trained guide to something that calls
# it, such as Pyro's `Predictive` or an ELBO of your own.
#
# ## Saving
#
# A file holds the guide's numbers, your network's among them, the preparation's, and what the model learnt (here the
# decoder). It holds no code: that you pass again, and the error says what.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "guide.pt")
    guides["CNN"].save(path)
    try:
        AutoAmortizedNormal.load(path, digits_model)
    except ValueError as error:
        print(error)
    again = AutoAmortizedNormal.load(path, digits_model, encoder=make_cnn)
same = torch.equal(again.posterior(unseen).mean["code"], guides["CNN"].posterior(unseen).mean["code"])
print("the same answers:", same)

# %% [markdown]
# ## Where to go next
#
# - Series: `Window(radius, network=...)` and `Recurrent(network=...)` take networks of yours along an order; see
#   [When can no encoder of a datum be enough?](04_when_it_is_not.ipynb)
# - Sets, such as the pupils of a school: `DeepSets`; any other encoder gets the pooled features.
# - How to read a gap report, and what to do next: [What did amortizing cost me?](05_what_did_it_cost.ipynb)
#
# The last cell holds this page to its claims.

# %%
if FULL:
    table = comparison.table
    assert table["gap"]["MLP, wide"] == 0, "the wide one is best in training"
    assert table["gap"]["MLP, default"] > table["gap"]["CNN"] > 4 * table["gap_se"]["CNN"]
    assert (gaps["difference"] > 4 * gaps["difference_se"]).all(), "each loses more on digits it never saw"
    assert gained["MLP, default"].mean() > 2 * gained["MLP, default"].sem(), "the CNN loses less than the default"
    assert gained["MLP, wide"].mean() < 3 * gained["MLP, wide"].sem(), "but not less than a wide perceptron"

    preparing = topic_table["elbo"]["frequencies"] - topic_table["elbo"]["default"]
    assert abs(preparing) < 0.2 * len(counts), "given the topics, both preparations do alike"
    assert told - most > 4 * (told * (1 - told) / len(packages_new)) ** 0.5, "topics tell the package"

    risk_lost = risk_elbos["elbo"]["mean-field"] - risk_elbos["elbo"]
    risk_lost_se = (risk_elbos["elbo_se"]["mean-field"] ** 2 + risk_elbos["elbo_se"] ** 2) ** 0.5
    assert abs(risk_lost["all"]) < 4 * risk_lost_se["all"], "who sees all covariates loses nothing"
    assert risk_lost["without outdoor"] > 4 * risk_lost_se["without outdoor"]
    assert risk_lost["without expected"] > 10, "without the cases to expect, tens of nats are lost"
    conditioning, conditioning_se = risk_report.totals.loc["conditioning_gap"]
    assert conditioning > 4 * conditioning_se
    assert "expected" in risk_report.advice[0]
    assert off["all"] < 0.2 < off["without expected"]
    assert off["all"] < off["without outdoor"] < off["without expected"]

    assert network.training
    assert torch.equal(*answers)
    assert not torch.equal(*calls)
    assert same
