"""The zoo: models, their data, and what is known of them without running the package.

``CASES`` maps a name to a :class:`Case`. Its data are picked by row from a fixed set of ``TOTAL`` rows, so that
``case.data(torch.tensor([3, 1]))`` is the data of rows 3 and 1 and of no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

TOTAL = 40
STEPS = 4
TAU, SIGMA = 1.155, 2.43
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model and what is known of it.

    Attributes:
        make: Makes the model, modules anew.
        data: Rows -> the model's arguments.
        amortized: Site -> the inputs that inform it.
        tables: Sites whose parameters come from tables.
        left: Sites left to the model.
        rows: How many rows to plan from.
        resizable: Whether the model takes any number of rows.
        own_subsample: Whether its plate draws rows of its own.
        vectorizable: Whether the model runs with particles to the left of its plates.
        hide: Arguments -> arguments that differ only in entries under a mask.
        own: Plates that are dimensions of a latent's elements.
        series: Families of latents, one site for each of ``STEPS`` turns of a loop; the others are as listed.
        sleeps: Whether an argument is the only observed site's values, so that a sleep phase can replace them.
        posterior: Arguments -> site -> exact mean and standard deviation.
        evidence: Arguments -> log p(data), in nats.
    """

    make: Callable[[], Callable[..., Any]]
    data: Callable[[Tensor], Arguments]
    amortized: dict[str, set[str]]
    tables: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    rows: int = 12
    plates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    closable: bool | None = True
    resizable: bool = True
    own_subsample: bool = False
    vectorizable: bool = True
    own: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    sleeps: bool = False
    hide: Callable[..., tuple[Any, ...]] | None = None
    posterior: Callable[..., dict[str, tuple[Tensor, Tensor]]] | None = None
    evidence: Callable[..., Tensor] | None = None

    def example(self, rows: int | None = None) -> Arguments:
        """Returns the arguments for the first rows, by default for as many as one plans from."""
        return self.data(torch.arange(self.rows if rows is None else rows))

    @property
    def latents(self) -> set[str]:
        return {*self.amortized, *self.tables, *self.left}


CASES: dict[str, Case] = {}


def zoo(data: Callable[[Tensor], Arguments], amortized: dict[str, set[str]], **facts: Any) -> Callable[..., Any]:
    """Registers a model function, or (a class) what makes a model, under its name."""

    def register(model: Any) -> Any:
        made = facts.pop("make", model if isinstance(model, type) else lambda: model)
        CASES[model.__name__.lower()] = Case(made, data, amortized, **facts)
        return model

    return register


def base(seed: int, *shape: int) -> Tensor:
    """Returns fixed standard normals."""
    draws = torch.randn(TOTAL, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws.to(torch.get_default_dtype())


def reals(*shape: int, seed: int = 1) -> Callable[[Tensor], Arguments]:
    return lambda rows: ((base(seed, *shape)[rows],), {})


def counts(high: int, *shape: int) -> Callable[[Tensor], Arguments]:
    return lambda rows: ((base(2, *shape)[rows].mul(high / 2).round().abs().clamp(max=high),), {})


def standard(*shape: int) -> Any:
    return dist.Normal(torch.zeros(shape), 1.0)


# Answers known in closed form.


def linear_evidence(x: Tensor) -> Tensor:
    covariance = (TAU**2 + SIGMA**2) * torch.eye(len(x)) + 100.0
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)


@zoo(reals(), {"z": {"x"}}, tables=("theta",), sleeps=True, evidence=linear_evidence)
def linear(x):
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 10.0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(theta + TAU * z, SIGMA), obs=x)


@zoo(
    reals(),
    {"z": {"x"}},
    sleeps=True,
    posterior=lambda x: {"z": (x / 2, torch.full_like(x, math.sqrt(0.5)))},
    evidence=lambda x: dist.Normal(torch.zeros_like(x), math.sqrt(2.0)).log_prob(x).sum(),
)
def normal(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@zoo(
    reals(),
    {"z": {"x"}},
    sleeps=True,
    posterior=lambda x: {"z": ((x / 2 + 0.25).exp(), (x / 2 + 0.25).exp() * math.sqrt(math.expm1(0.5)))},
    evidence=lambda x: dist.Normal(torch.zeros_like(x), math.sqrt(2.0)).log_prob(x).sum(),
)
def lognormal(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


WEIGHTS = np.random.default_rng(0).normal(size=(8, 3))


def ppca_weights() -> Tensor:
    return torch.tensor(WEIGHTS, dtype=torch.get_default_dtype())


def ppca_posterior(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    w = ppca_weights()
    covariance = torch.linalg.inv(torch.eye(3) + w.T @ w / 0.5)
    return {"z": (x @ w @ covariance / 0.5, covariance.diagonal().sqrt().expand(len(x), 3))}


def ppca_evidence(x: Tensor) -> Tensor:
    w = ppca_weights()
    return dist.MultivariateNormal(torch.zeros(8), w @ w.T + 0.5 * torch.eye(8)).log_prob(x).sum()


@zoo(reals(8), {"z": {"x"}}, sleeps=True, posterior=ppca_posterior, evidence=ppca_evidence)
def ppca(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", standard(3).to_event(1))
        pyro.sample("x", dist.Normal(z @ ppca_weights().T, math.sqrt(0.5)).to_event(1), obs=x)


@zoo(
    counts(10),
    {"rate": {"x"}},
    sleeps=True,
    posterior=lambda x: {"rate": ((2 + x) / 2, (2 + x).sqrt() / 2)},
    evidence=lambda x: dist.GammaPoisson(torch.tensor(2.0), torch.tensor(1.0)).log_prob(x).sum(),
)
def gamma_poisson(x):
    with pyro.plate("n", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


# Supports and event shapes.


@zoo(reals(), {s: {"x"} for s in ("positive", "unit", "pair", "simplex", "cholesky", "interval", "vector")})
def supports(x):
    with pyro.plate("n", len(x)):
        positive = pyro.sample("positive", dist.HalfNormal(torch.tensor(1.0)))
        unit = pyro.sample("unit", dist.Beta(torch.tensor(2.0), 2.0))
        pair = pyro.sample("pair", dist.Beta(torch.tensor(2.0), 2.0).expand([2]).to_event(1))
        simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(4)))
        cholesky = pyro.sample("cholesky", dist.LKJCholesky(3, torch.tensor(1.0)))
        interval = pyro.sample("interval", dist.Uniform(torch.tensor(-1.0), 3.0))
        vector = pyro.sample("vector", dist.LogNormal(torch.zeros(2, 3), 1.0).to_event(2))
        total = positive + unit + pair.sum(-1) + simplex[..., 0] + cholesky[..., 1, 0] + interval
        pyro.sample("x", dist.Normal(total + vector.sum((-2, -1)), 1.0), obs=x)


@zoo(reals(), {"high": {"x"}, "z": {"x"}}, tables=("low",))
def moving_support(x):
    low = pyro.sample("low", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", len(x)):
        high = pyro.sample("high", dist.Gamma(torch.tensor(3.0), 1.0))
        z = pyro.sample("z", dist.Uniform(low, low + high))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@zoo(reals(), {"rate": {"x"}})
def shifted_prior(x):
    with pyro.plate("n", len(x)):
        shift = AffineTransform(torch.tensor(2.0), -1.0)
        rate = pyro.sample("rate", dist.TransformedDistribution(dist.Gamma(torch.tensor(2.0), 1.0), shift))
        pyro.sample("x", dist.Normal(rate, 1.0), obs=x)


@zoo(reals(), {"z": {"x"}}, tables=("weights", "scale", "corr"))
def constrained_globals(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 1.0))
    corr = pyro.sample("corr", dist.LKJCholesky(2, torch.tensor(1.0)))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(weights[..., 0], scale))
        pyro.sample("x", dist.Normal(z + corr[..., 1, 0], 1.0), obs=x)


@zoo(reals(), {"z": {"x"}})
def mixture_prior(x):
    with pyro.plate("n", len(x)):
        components = dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@zoo(reals(), {"z": {"x"}}, tables=("theta", "scale"))
def improper_global(x):
    theta = pyro.sample("theta", dist.ImproperUniform(constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


@zoo(
    lambda rows: ((base(1)[rows], (base(3, 3) > 0)[rows]), {}),
    {"z": {"x", "mask"}, "w": {"x", "mask"}},
)
def masked_prior(x, mask):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        w = pyro.sample("w", standard(3).expand([len(x), 3]).mask(mask).to_event(1))
        pyro.sample("x", dist.Normal(z + (w * mask).sum(-1), 1.0), obs=x)


# How data come in.


@zoo(lambda rows: ((base(4, 2)[rows], base(1)[rows]), {}), {"z": {"c", "y"}}, tables=("w",))
def covariates_in_prior(c, y):
    w = pyro.sample("w", standard(2).to_event(1))
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal((c * w).sum(-1), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@zoo(lambda rows: ((base(4)[rows], base(1)[rows]), {"unused": base(5)[rows]}), {"z": {"c", "y"}})
def covariates_in_likelihood(c, y, unused):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(z * c, 1.0), obs=y)


LEVELS = torch.tensor([-2.0, 0.0, 1.0, 3.0, 5.0])


@zoo(lambda rows: ((base(1)[rows], rows % 5), {}), {"z": {"y", "site"}})
def labels(y, site):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(LEVELS.to(y)[site], 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@zoo(
    lambda rows: (({"x": base(1)[rows], "parts": [base(4, 2)[rows], 0.5]},), {}),
    {"z": {"batch['x']", "batch['parts'][0]"}},
)
def nested_arguments(batch):
    offset, scale = batch["parts"]
    with pyro.plate("n", len(batch["x"])):
        z = pyro.sample("z", dist.Normal(offset.sum(-1), 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=batch["x"])


@zoo(lambda rows: ((), {"x": base(1)[rows], "scale": 0.5}), {"z": {"x"}})
def keyword_only(*, scale=1.0, x=None):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


@zoo(lambda rows: ((base(1, 6)[rows], base(4)[:6]), {}), {"z": {"x"}}, tables=("theta",), rows=6)
def square(x, shared):
    theta = pyro.sample("theta", standard(6).to_event(1))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z[..., None] * shared + theta, 1.0).to_event(1), obs=x)


@zoo(lambda rows: ((base(1, 6)[rows].T,), {}), {"z": {"columns"}}, rows=6)
def transposed(columns):
    with pyro.plate("n", columns.shape[1]):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z[..., None] * torch.ones(6), 1.0).to_event(1), obs=columns.T)


@zoo(lambda rows: ((len(rows),), {}), {"z": {"x"}}, rows=TOTAL, resizable=False, make=lambda: conditioned())
def conditioned():
    return pyro.condition(prior_of_n, data={"x": base(1)})


def prior_of_n(n):
    with pyro.plate("n", n):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


@zoo(lambda rows: ((), {}), {"z": {"x"}}, tables=("theta",), rows=TOTAL, resizable=False, make=lambda: closure())
def closure():
    x = base(1)

    def model():
        theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("n", TOTAL):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


# Subsamples.


@zoo(reals(), {"z": {"x"}}, tables=("theta",), own_subsample=True)
def subsample_size(x, size=5):
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", len(x), subsample_size=size and min(size, len(x))) as i:
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


@zoo(reals(), {"z": {"x"}}, own_subsample=True)
def pyro_subsample(x, size=5):
    with pyro.plate("n", len(x), size and min(size, len(x))):
        batch = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=batch)


@zoo(lambda rows: ((base(1),), {"index": rows}), {"z": {"x"}}, rows=9)
def explicit_subsample(x, index):
    with pyro.plate("n", len(x), subsample=index) as i:
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


@zoo(reals(), {"z": {"x"}})
def minibatch(x):
    with pyro.plate("n", TOTAL, len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# Masks and scales.


@zoo(lambda rows: ((base(1)[rows], (base(3) > -0.5)[rows]), {}), {"z": {"x"}})
def mask_and_scale(x, mask):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        with poutine.mask(mask=mask), poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@zoo(
    lambda rows: ((base(1)[rows], (base(3) > -0.5)[rows]), {}),
    {"z": {"x"}},
    left=("x_unobserved",),
)
def obs_mask(x, observed):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=observed)


# Modules.


@zoo(reals(4), {"z": {"x"}}, sleeps=True)
class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 4)
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", standard(2).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 4))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", standard(2).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), scale).to_event(1), obs=x)


@zoo(reals(4), {"z": {"x"}}, vectorizable=False, make=lambda: VAE().model)
def vae():
    """Stands for ``VAE.model``."""


# Likelihoods.


@zoo(lambda rows: ((base(1)[rows], (base(4) > 0).to(base(4))[rows]), {}), {"a": {"x", "flag"}, "b": {"x", "flag"}})
def several_observed(x, flag):
    with pyro.plate("n", len(x)):
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))
        b = pyro.sample("b", dist.Gamma(torch.tensor(2.0), 2.0))
        pyro.sample("x", dist.Normal(a, b), obs=x)
        pyro.sample("flag", dist.Bernoulli(logits=a), obs=flag)


@zoo(counts(16, 5), {"z": {"x"}}, tables=("loadings",), sleeps=True)
def binomial(x):
    loadings = pyro.sample("loadings", standard(2, 5).to_event(2))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", standard(2).to_event(1))
        pyro.sample("x", dist.Binomial(16, logits=(z[..., None] * loadings).sum(-2)).to_event(1), obs=x)


@zoo(lambda rows: ((base(2)[rows].abs().mul(2).long().clamp(max=3),), {}), {"z": {"x"}}, sleeps=True)
def categorical(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", standard(4).to_event(1))
        pyro.sample("x", dist.Categorical(logits=z), obs=x)


# Nested and crossed plates. The elements of plate "n" are rows of data all the same.


def members(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for rows that are groups of 1 to 4 members the data of all members, and each one's group."""
    sizes = rows % 4 + 1
    group = torch.arange(len(rows)).repeat_interleave(sizes)
    own = torch.cat([torch.arange(size) for size in sizes.tolist()])
    return base(7, 4)[rows[group], own], group


@zoo(reals(5), {"z": {"y"}}, tables=("theta",), sleeps=True)
def nested(y):
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 10.0))
    with pyro.plate("n", y.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        with pyro.plate("inner", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@zoo(
    lambda rows: ((base(1, 4, 2)[rows], base(4, 4)[rows], base(5)[rows], base(6)[:4]), {}),
    {"z": {"y", "x", "g", "t"}, "w": {"y", "x", "g", "t"}},
    tables=("theta",),
    plates={"w": ("n", "inner")},
)
def three_levels(y, x, g, t):
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", y.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(theta + g[:, None], 1.0))
        with pyro.plate("inner", y.shape[1], dim=-1):
            w = pyro.sample("w", dist.Normal(z + x, 1.0))
            pyro.sample("y", dist.Normal(w[..., None] * t[:, None] * torch.ones(2), 1.0).to_event(1), obs=y)


@zoo(lambda rows: ((base(1, 3)[rows], base(4, 2, 2)[rows]), {}), {"z": {"visits", "labs"}})
def two_plates_inside(visits, labs):
    with pyro.plate("n", len(visits), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("visit", visits.shape[1], dim=-1):
            pyro.sample("visits", dist.Normal(z, 1.0), obs=visits)
        with pyro.plate("lab", labs.shape[1], dim=-1):
            pyro.sample("labs", dist.Normal(z[..., None].exp() * torch.ones(2), 1.0).to_event(1), obs=labs)


@zoo(
    lambda rows: ((base(1, 5)[rows], (base(3)[rows] * 2 + 2).round().clamp(0, 5).long()), {}),
    {"z": {"y", "lengths"}},
    tables=("theta",),
    hide=lambda y, lengths: (torch.where(torch.arange(5) < lengths[:, None], y, 100.0), lengths),
)
def ragged(y, lengths):
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        here = torch.arange(5) < lengths[:, None]
        with pyro.plate("inner", 5, dim=-1), poutine.mask(mask=here):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@zoo(
    lambda rows: ((torch.where((base(3, 3) > 1)[rows] | (rows % 5 == 2)[:, None], torch.nan, base(1, 3)[rows]),), {}),
    {"z": {"y"}},
)
def nan_under_a_mask(y):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", standard(2).to_event(1))
        loc = z.sum(-1, keepdim=True) * torch.ones(3)
        pyro.sample("y", dist.Normal(loc, 1.0).mask(~y.isnan()).to_event(1), obs=y.nan_to_num())


@zoo(
    lambda rows: ((base(1, 4)[rows], (base(3, 4) > -0.5)[rows]), {}),
    {"rate": {"y"}},
    hide=lambda y, mask: (torch.where(mask, y, -9.0), mask),
)
def masked_inside(y, mask):
    with pyro.plate("n", len(y), dim=-2):
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("inner", y.shape[1], dim=-1), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(rate.log(), 1.0), obs=y)


VISITS = torch.tensor([-1.0, 0.0, 1.0, 2.0])


@zoo(
    lambda rows: ((base(1, 4)[rows], VISITS.repeat(len(rows), 1), (base(3)[rows] > 0)[:, None] | (VISITS != 0)), {}),
    {"level": {"y", "t"}, "rate": {"y", "t"}},
    left=("y_unobserved",),
    hide=lambda y, t, seen: (torch.where(seen, y, -9.0), t, seen),
)
def visits(y, t, seen):
    """The times of the visits are the same in all rows, and one visit is all that some rows lack."""
    with pyro.plate("n", len(y), dim=-2):
        level = pyro.sample("level", dist.Normal(torch.tensor(0.0), 1.0))
        rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("inner", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(level + rate * t, 1.0), obs=y, obs_mask=seen)


@zoo(
    lambda rows: ((base(1, 2)[rows], base(4)[rows], (base(3) > -0.5)[rows]), {}),
    {"z": {"y", "flag", "mask"}},
    hide=lambda y, flag, mask: (torch.where(mask[:, None], y, 7.0), flag, mask),
)
def partly_masked(y, flag, mask):
    """Where y is missing, the flag still informs z; the mask is data of its own, as z's prior depends on it."""
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(mask.to(y.dtype), 1.0))
        pyro.sample("flag", dist.Normal(z, 1.0), obs=flag)
        with poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(z[..., None] * torch.ones(2), 1.0).to_event(1), obs=y)


@zoo(reals(4), {"z": {"x"}}, plates={"z": ("n", "factors")}, own=("factors",))
def own_dimensions(x):
    loadings = torch.tensor([[1.0, 0.5, 0.0, -1.0], [0.0, 1.0, -0.5, 0.5]]).to(x)
    with pyro.plate("n", len(x), dim=-2):
        with pyro.plate("factors", 2, dim=-1):
            z = pyro.sample("z", standard())
        with pyro.plate("pixels", 4, dim=-1):
            pyro.sample("x", dist.Normal(z @ loadings, 1.0), obs=x)


@zoo(
    lambda rows: ((base(1, 4)[rows], (base(3, 4) > -0.5)[rows]), {}),
    {"u": {"ratings"}, "v": {"ratings"}},
    plates={"v": ("items",)},
    closable=False,
    hide=lambda ratings, mask: (torch.where(mask, ratings, 5.0), mask),
)
def factorization(ratings, mask):
    users = pyro.plate("n", ratings.shape[0], dim=-2)
    items = pyro.plate("items", ratings.shape[1], dim=-1)
    with users:
        u = pyro.sample("u", standard(2).to_event(1))
    with items:
        v = pyro.sample("v", standard(2).to_event(1))
    with users, items, poutine.mask(mask=mask):
        pyro.sample("ratings", dist.Normal((u * v).sum(-1), 1.0), obs=ratings)


# Indexed groups.


@zoo(
    lambda rows: ((*members(rows), base(5)[rows]), {}),
    {"a": {"y", "g"}, "b": {"y", "g"}},
    tables=("theta",),
)
def grouped(y, group, g):
    theta = pyro.sample("theta", standard(2).to_event(1))
    with pyro.plate("n", len(g)):
        a = pyro.sample("a", dist.Normal(theta[..., 0] + g, 1.0))
        b = pyro.sample("b", dist.Normal(theta[..., 1], 1.0))
    with pyro.plate("members", len(y)):
        pyro.sample("y", dist.Normal(a[..., group] + b[..., group], 1.0), obs=y)


@zoo(
    lambda rows: ((*members(rows), base(5)[rows]), {}),
    {"b": {"y", "g"}, "w": {"y", "g"}},
    plates={"w": ("members",)},
)
def grouped_with_latents_below(y, group, g):
    with pyro.plate("n", len(g)):
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("members", len(y)):
        w = pyro.sample("w", dist.Normal(b[..., group], 1.0))
        pyro.sample("y", dist.Normal(w + g[group], 1.0), obs=y)


def pyramid_data(rows: Tensor) -> Arguments:
    y, group = members(rows)
    return (torch.stack([y, y + 1], 1).flatten(), torch.arange(2 * len(y)) // 2, group, len(rows)), {}


@zoo(pyramid_data, {"school": {"y"}, "room": {"y"}}, tables=("mean",), plates={"room": ("rooms",)})
def pyramid(y, room_of, school_of, num_schools):
    mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", num_schools):
        school = pyro.sample("school", dist.Normal(mean, 1.0))
    with pyro.plate("rooms", len(school_of)):
        room = pyro.sample("room", dist.Normal(school[..., school_of], 1.0))
    with pyro.plate("marks", len(y)):
        pyro.sample("y", dist.Normal(room[..., room_of], 1.0), obs=y)


@zoo(
    lambda rows: ((*members(rows), torch.arange(len(members(rows)[0])) % 3, len(rows)), {}),
    {"user": {"y"}, "item": {"y"}},
    plates={"item": ("items",)},
    closable=False,
)
def crossed(y, users, items, num_users):
    with pyro.plate("n", num_users):
        user = pyro.sample("user", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("items", 3):
        item = pyro.sample("item", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("ratings", len(y)):
        pyro.sample("y", dist.Normal(user[..., users] + item[..., items], 1.0), obs=y)


# Series.


def steps(stem: str, *inputs: str, first: int = 0) -> dict[str, set[str]]:
    """Says what informs the latents of a loop: what informs them all."""
    return {f"{stem}_{t}": set(inputs) for t in range(first, first + STEPS)}


@zoo(reals(STEPS), steps("z", "x"), tables=("theta",), series=("z_*",), closable=False)
def chain(x):
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", len(x)):
        z = theta
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def padded_data(rows: Tensor) -> Arguments:
    length = torch.arange(TOTAL)[rows] % STEPS + 1
    return (base(1, STEPS)[rows], torch.arange(STEPS) < length[:, None]), {}


@zoo(
    padded_data,
    {"b": {"x", "mask"}, **steps("z", "x", "mask", first=1)},
    series=("z_*",),
    closable=False,
    vectorizable=False,
    hide=lambda x, mask: (torch.where(mask, x, 99.0), mask),
)
def padded_chain(x, mask):
    with pyro.plate("n", len(x)):
        z = torch.zeros(len(x), 2)
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))
        for t in pyro.markov(range(1, x.shape[1] + 1)):
            here = mask[:, t - 1]
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0).mask(here[:, None]).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z.sum(-1) + b, 1.0).mask(here), obs=x[:, t - 1])


@zoo(
    lambda rows: ((base(1, STEPS)[rows], torch.arange(TOTAL)[rows] % STEPS + 1), {}),
    {**steps("level", "y", "length"), **steps("rate", "y", "length")},
    series=("level_*", "rate_*"),
    closable=False,
    hide=lambda y, length: (torch.where(torch.arange(STEPS) < length[:, None], y, 99.0), length),
)
def lengths(y, length):
    with pyro.plate("n", len(y)):
        level = torch.zeros(len(y))
        for t in range(y.shape[1]):
            with poutine.mask(mask=t < length):
                rate = pyro.sample(f"rate_{t}", dist.LogNormal(torch.tensor(0.0), 0.5))
                level = pyro.sample(f"level_{t}", dist.Normal(level, rate))
                pyro.sample(f"y_{t}", dist.Normal(level, 1.0), obs=y[:, t])


@zoo(
    reals(STEPS, 2),
    {"start": {"x"}, **steps("z", "x")},
    plates={"start": ("n",)},
    series=("z_*",),
    closable=False,
)
def tones(x):
    inner = pyro.plate("tones", x.shape[2], dim=-1)
    with pyro.plate("n", len(x), dim=-2):
        z = pyro.sample("start", dist.Normal(torch.tensor(0.0), 1.0))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            with inner:
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


@zoo(reals(STEPS), steps("z", "x"), series=("z_*",), plates={"z_*": ("n", "time")}, closable=False)
def states_first(x):
    with pyro.plate("n", len(x), dim=-2):
        states = [x.new_zeros(len(x), 1)]
        for t in range(x.shape[1]):
            states.append(pyro.sample(f"z_{t}", dist.Normal(states[-1], 1.0)))
        with pyro.plate("time", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(torch.cat(states[1:], -1), 1.0), obs=x)


@zoo(reals(STEPS), {"e": {"x"}}, plates={"e": ("n", "time")}, closable=False)
def random_walk(x):
    with pyro.plate("n", len(x), dim=-2), pyro.plate("time", x.shape[1], dim=-1):
        e = pyro.sample("e", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(e.cumsum(-1), 1.0), obs=x)


# Plates and globals.


@zoo(reals(), {"z": {"x"}}, tables=("w",), plates={"w": ("k",)})
def plate_of_globals(x):
    with pyro.plate("k", 3):
        w = pyro.sample("w", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z + w.sum(-1, keepdim=True), 1.0), obs=x)


@zoo(lambda rows: ((base(4)[rows], base(1)[rows]), {}), {}, tables=("slope", "noise"))
def no_local_latent(c, y):
    slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0), 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(slope * c, noise), obs=y)


@zoo(reals(3), {"z": {"x"}})
def plate_at_minus_two(x):
    with pyro.plate("n", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z[..., None] * torch.ones(3), 1.0).to_event(1), obs=x[:, None])


@zoo(reals(), {"z": {"x"}}, tables=("theta",), left=("delta", "z_new"))
def forecast(x):
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
    delta = pyro.sample("delta", dist.Delta(torch.tensor(1.0)))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        mean = pyro.deterministic("mean", z * delta)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    with pyro.plate("new", 4):
        pyro.sample("z_new", dist.Normal(theta, 1.0))
    pyro.factor("prefers_small", -theta.square())


AUTOGUIDES = [
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoDelta,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoStructured,
    AutoNormalMessenger,
    AutoHierarchicalNormalMessenger,
    AutoRegressiveMessenger,
]
"""Pyro's own."""


def autoguided(x):
    """Global and local latents on the reals and on the positives, for Pyro's own guides."""
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, tau))
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(z, rate), obs=x)
