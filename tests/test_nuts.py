"""nutpie's draws against posteriors known without it, and against Pyro's draws."""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES, SIGMA, TAU, gamma_poisson, linear, normal
from pyro import poutine
from scipy import stats

from pyro_amortize import mcmc, nuts, run_mcmc
from pyro_amortize.arviz_bridge import ess
from pyro_amortize.capture import Uncapturable

pytest.importorskip("nutpie", reason="it needs ArviZ below 1")

OPTIONS = {"engine": "nutpie", "num_samples": 300, "warmup_steps": 200, "num_chains": 2, "seed": 0, "progress": False}
SHORT = {"num_samples": 30, "warmup_steps": 30}
TOTAL = SIGMA**2 + TAU**2
X = torch.tensor([-1.0, 0.5, 2.0])


@pytest.fixture(autouse=True)
def never_compiled(monkeypatch):
    monkeypatch.setattr(nuts, "SECONDS_A_COMPILATION", math.inf)


def proportions(counts):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
    pyro.sample("counts", dist.Multinomial(12, p, validate_args=False), obs=counts)


def correlations():
    pyro.sample("factor", dist.LKJCholesky(3, torch.tensor(2.0)))


def below_diagonal(factor):
    correlation = factor @ factor.mT
    return (correlation[..., [1, 2, 2], [0, 0, 1]] + 1) / 2


def scaled_and_masked(x, mask):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mask), poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_groups(x):
    with pyro.plate("n", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0])[c], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def walled():
    u = pyro.sample("u", dist.Uniform(torch.tensor(-1.0), 2.0))
    pyro.factor("wall", torch.where(u > 0.5, -math.inf, 0.0))


def not_always_definite():
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    matrix = torch.eye(2) + r / 2 * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    pyro.factor("definite", 0.0 * torch.linalg.cholesky(matrix).sum())


def normals(mean, sd):
    return stats.norm(np.asarray(mean, dtype=float), sd).cdf


def two_groups_cdf(z):
    centres = np.array([-1.0, 1.0])
    x = X.double().numpy()[:, None]
    weights = np.array([0.3, 0.7]) * stats.norm(centres, math.sqrt(2)).pdf(x)
    parts = stats.norm((x + centres) / 2, math.sqrt(0.5)).cdf(z[..., None])
    return (parts * weights / weights.sum(-1, keepdims=True)).sum(-1)


VARIANCE = 1 / (len(X) / TOTAL + 0.01)  # of theta
MEAN = VARIANCE * float(X.sum()) / TOTAL
MASK = torch.tensor([True, False, True])
PRECISION = 1 + 0.5 * MASK.numpy()
COUNTS = torch.tensor([0.0, 1.0, 3.0, 8.0])


@dataclass(frozen=True)
class Known:
    """A model and the distribution functions of its posterior's marginals, each of which may be of a function."""

    model: Any
    args: tuple[Any, ...]
    cdfs: dict[str, Any]
    of: Any = lambda value: value
    given: dict[str, Any] | None = None


KNOWN = {
    "reals": Known(normal, (X,), {"z": normals(X / 2, math.sqrt(0.5))}),
    "double": Known(normal, (X.double(),), {"z": normals(X / 2, math.sqrt(0.5))}),
    "globals": Known(
        linear,
        (X,),
        {
            "theta": normals(MEAN, math.sqrt(VARIANCE)),
            "z": normals(TAU / TOTAL * (X - MEAN), math.sqrt(SIGMA**2 / TOTAL + (TAU / TOTAL) ** 2 * VARIANCE)),
        },
    ),
    "given": Known(
        linear,
        (X,),
        {"z": normals(TAU / TOTAL * (X - 0.5), math.sqrt(SIGMA**2 / TOTAL))},
        given={"theta": torch.tensor(0.5)},
    ),
    "positive": Known(gamma_poisson, (COUNTS,), {"rate": stats.gamma(2 + COUNTS.numpy(), scale=0.5).cdf}),
    "simplex": Known(proportions, (COUNTS,), {"p": stats.beta(1 + COUNTS.numpy(), 3 + 12 - COUNTS.numpy()).cdf}),
    "correlations": Known(correlations, (), {"factor": stats.beta(2.5, 2.5).cdf}, below_diagonal),
    "mask": Known(
        scaled_and_masked,
        (X, MASK),
        {"z": normals(0.5 * (X * MASK).numpy() / PRECISION, 1 / np.sqrt(PRECISION))},
    ),
    "enumerated": Known(two_groups, (X,), {"z": two_groups_cdf}),
    "wall": Known(walled, (), {"u": stats.uniform(-1, 1.5).cdf}),
    "definite": Known(not_always_definite, (), {"r": stats.truncnorm(-2, 2).cdf}),
}


def off(fit, known):
    """Shares of draws below exact quantiles, minus what they should be, in standard errors."""
    found = []
    for name, cdf in known.cdfs.items():
        values = known.of(fit.samples[name].double())
        positions = torch.as_tensor(cdf(values.numpy()))
        for level in (0.05, 0.25, 0.5, 0.75, 0.95):
            below = (positions < level).double()
            se = (level * (1 - level) / ess({name: below})[name]).sqrt()
            found.append(((below.mean((0, 1)) - level) / se).flatten())
    return torch.cat(found)


class TestDistribution:
    @pytest.mark.parametrize("name", KNOWN)
    def test_is_the_posterior(self, name):
        known = KNOWN[name]
        fit = run_mcmc(known.model, *known.args, given=known.given, **OPTIONS)
        assert fit.engine == "nutpie"
        assert set(fit.samples) == set(known.cdfs)
        found = off(fit, known)
        assert (found.abs() < 4.5).all(), found

    @pytest.mark.parametrize("factor", [0.8, 1.25])
    def test_another_width_would_be_seen(self, factor):
        known = KNOWN["reals"]
        fit = run_mcmc(known.model, *known.args, **OPTIONS | {"num_samples": 600})
        mean = fit.samples["z"].mean((0, 1))
        fit.samples["z"].sub_(mean).mul_(factor).add_(mean)
        assert (off(fit, known).abs() > 4.5).any()

    @pytest.mark.slow
    def test_is_pyros(self):
        case = CASES["constrained_globals"]
        args, _ = case.example(1)
        ours = run_mcmc(case.make(), *args, **OPTIONS)
        fewer = {"engine": "pyro", "num_chains": 1, "num_samples": 150, "warmup_steps": 100}
        pyros = run_mcmc(case.make(), *args, **OPTIONS | fewer)
        for name, value in pyros.samples.items():
            other = ours.samples[name]
            for power in (1, 2):
                means, ses = [], []
                for draws in (value.double() ** power, other.double() ** power):
                    means.append(draws.mean((0, 1)))
                    ses.append(draws.flatten(0, 1).std(0) / ess({name: draws})[name].sqrt())
                error = (means[0] - means[1]).abs() - 4.5 * (ses[0].square() + ses[1].square()).sqrt()
                assert not (error > 1e-5).any(), (name, error)

    def test_compiled(self, monkeypatch):
        monkeypatch.setattr(nuts, "_is_worth_compiling", lambda *_: True)
        known = KNOWN["globals"]
        compiled = []
        original = nuts.Graph.compiled
        monkeypatch.setattr(nuts.Graph, "compiled", lambda *args: compiled.append(1) or original(*args))
        fit = run_mcmc(known.model, *known.args, **OPTIONS)
        assert compiled == [1]
        assert (off(fit, known).abs() < 4.5).all()

    def test_without_a_compiler(self, monkeypatch):
        def compiled(*_):
            raise Uncapturable("there is no compiler")

        monkeypatch.setattr(nuts, "_is_worth_compiling", lambda *_: True)
        monkeypatch.setattr(nuts.Graph, "compiled", compiled)
        assert run_mcmc(normal, X, **OPTIONS | SHORT).engine == "nutpie"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("constrained_globals", marks=pytest.mark.slow),
        "covariates_in_prior",
        pytest.param("factorization", marks=pytest.mark.slow),
        pytest.param("grouped", marks=pytest.mark.slow),
        "keyword_only",
        "lognormal",
        pytest.param("module", marks=pytest.mark.slow),
        "nan_under_a_mask",
        "nested_arguments",
        "several_observed",
        pytest.param("supports", marks=pytest.mark.slow),
        "tones",
        "vae",
    ],
)
def test_draws_have_the_shapes_of_pyros(name):
    case = CASES[name]
    args, kwargs = case.example(4)
    fits = [
        run_mcmc(case.make(), *args, model_kwargs=kwargs, **OPTIONS | SHORT | {"num_samples": 2, "engine": engine})
        for engine in ("nutpie", "pyro")
    ]
    assert [fit.engine for fit in fits] == ["nutpie", "pyro"]
    ours, pyros = ({site: (v.shape, v.dtype) for site, v in fit.samples.items()} for fit in fits)
    assert ours == pyros


class TestEngine:
    def test_seeds_starts_and_chains(self):
        first, same, other = (run_mcmc(normal, X, **OPTIONS | SHORT | {"seed": seed}) for seed in (3, 3, 4))
        assert torch.equal(first.samples["z"], same.samples["z"])
        assert not torch.equal(first.samples["z"][0], first.samples["z"][1])
        # The seed is that of the first chain; the others follow.
        assert torch.equal(first.samples["z"][1], other.samples["z"][0])

    def test_warmup_is_thrown_away(self):
        fit = run_mcmc(normal, 100 + X, **OPTIONS | {"warmup_steps": 200, "num_samples": 20})
        assert fit.samples["z"].shape == (2, 20, 3)
        assert (fit.samples["z"] > 40).all()

    def test_random_states_stay(self):
        before = torch.get_rng_state()
        run_mcmc(normal, X, **OPTIONS | SHORT)
        assert torch.equal(before, torch.get_rng_state())

    def test_threads_of_chains_leave_nothing_behind(self):
        run_mcmc(linear, X, **OPTIONS | SHORT)  # tqdm, and what else starts a thread once
        before = num_thread_states()
        run_mcmc(linear, X, **OPTIONS | SHORT)
        assert num_thread_states() == before

    def test_parameters_of_the_model_are_held(self):
        def model(x):
            weight = pyro.param("weight", torch.tensor(3.0))
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(weight + z, 1.0), obs=x)

        model(X)
        pyro.get_param_store()["weight"] = torch.tensor(5.0)
        fit = run_mcmc(model, X, **OPTIONS)
        known = Known(model, (X,), {"z": normals((X - 5) / 2, math.sqrt(0.5))})
        assert (off(fit, known).abs() < 4.5).all()
        assert pyro.param("weight").item() == 5.0

    def test_divergences_are_counted_by_draw(self):
        fit = run_mcmc(walled, **OPTIONS)
        assert fit.diverging.shape == (2, 300)
        assert fit.divergences == int(fit.diverging.sum()) > 0

    def test_an_error_of_the_graph_is_raised(self, monkeypatch):
        monkeypatch.setattr(nuts.NutpieChains, "_check", lambda *_: None)

        def failing(*_):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(nuts.Graph, "__call__", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_mcmc(normal, X, **OPTIONS | SHORT)

    @pytest.mark.parametrize("progress", [False, True])
    def test_progress(self, capfd, terminal, progress):
        run_mcmc(normal, X, **OPTIONS | SHORT | {"progress": progress})
        printed = capfd.readouterr()
        assert printed.out == ""
        assert ("nutpie: 100%" in printed.err) is progress


def num_thread_states():
    """How many threads Python keeps a state of; those of samplers are not Python's own."""
    api = ctypes.PyDLL(None)
    api.PyInterpreterState_Get.restype = ctypes.c_void_p
    for function in (api.PyInterpreterState_ThreadHead, api.PyThreadState_Next):
        function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    state, count = api.PyInterpreterState_ThreadHead(api.PyInterpreterState_Get()), 0
    while state:
        state, count = api.PyThreadState_Next(state), count + 1
    return count


def branching(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z if z > 0 else 0.5 * z, 1.0), obs=x)


def noisy(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z + torch.randn(()), 1.0), obs=x)


def flat(x):
    z = pyro.sample("z", dist.Normal(x, 1.0))
    pyro.factor("its inverse", (z - x) ** 2 / 2)


class TestFallback:
    @pytest.mark.parametrize(
        ("model", "reason"),
        [(branching, "a branch of a tensor's value"), (noisy, "random numbers"), (flat, "nutpie cannot start")],
    )
    def test_pyro_draws_and_the_record_says_why(self, model, reason, monkeypatch):
        drawn = {"z": torch.randn(30)}, torch.zeros(30, dtype=torch.bool)
        monkeypatch.setattr(mcmc, "pyro_chain", lambda *_: drawn)
        fit = run_mcmc(model, X[0], **OPTIONS | SHORT | {"engine": "auto"})
        assert fit.engine == "pyro"
        assert torch.equal(fit.samples["z"][1], drawn[0]["z"])
        assert reason in fit.fallback
        assert f"not by nutpie, since {fit.fallback}" in str(fit)
        with pytest.warns(UserWarning, match=f"Pyro's NUTS draws, not nutpie's, since.*{reason}"):
            run_mcmc(model, X[0], **OPTIONS | SHORT)
