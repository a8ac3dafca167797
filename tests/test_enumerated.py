"""Discrete latents that are summed out, against sums over all their values by hand."""

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import nn

from pyro_amortize import (
    AutoAmortizedNormal,
    Table,
    amortization_gap,
    compare_inference,
    fit_mean_field,
    fit_svi,
    plan_amortization,
    run_mcmc,
)
from pyro_amortize.densities import Evaluation, enumerated_sites, log_densities, vectorizing
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.posterior import normal_underneath

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Guessed max_plate_nesting"),
]
SUM = {"enumerate": "parallel"}
WEIGHTS, CENTRES, NOISE = (0.3, 0.7), (-2.0, 1.5), 0.8
START, MOVE, LEVELS = (0.6, 0.4), ((0.8, 0.2), (0.3, 0.7)), (-1.0, 2.0)


def drawn(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_joint(model, guide, args, kwargs, plate, values):
    with preserved(model, guide, evaluating=True), torch.no_grad(), poutine.block():
        return Evaluation(model, guide, args, kwargs).at(values, plate)


def normal(value, loc, scale=1.0):
    """The log density of a normal, written out."""
    return -0.5 * ((value - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# Models, and their densities by hand.


def mixture(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
        z = pyro.sample("z", dist.Normal(tensor(CENTRES)[c], 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def mixture_parts(z):
    """log p(c) p(z | c), the values of c last."""
    return torch.stack([math.log(w) + normal(z, centre) for w, centre in zip(WEIGHTS, CENTRES, strict=True)], -1)


def mixture_joint(x, z):
    return mixture_parts(z).logsumexp(-1) + normal(x, z, NOISE)


def mixture_evidence(x):
    scale = math.sqrt(1 + NOISE**2)
    parts = [math.log(w) + normal(x, centre, scale) for w, centre in zip(WEIGHTS, CENTRES, strict=True)]
    return torch.stack(parts).logsumexp(0)


@config_enumerate
def hmm(x):
    with pyro.plate("series", len(x)):
        z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
        c = None
        for t in pyro.markov(range(x.shape[1])):
            probs = tensor(START) if c is None else tensor(MOVE)[c]
            c = pyro.sample(f"c_{t}", dist.Categorical(probs))
            pyro.sample(f"x_{t}", dist.Normal(z + tensor(LEVELS)[c], 1.0), obs=x[:, t])


@config_enumerate
def padded(x, length):
    with pyro.plate("series", len(x)):
        z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
        c = None
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < length):
                probs = tensor(START) if c is None else tensor(MOVE)[c]
                c = pyro.sample(f"c_{t}", dist.Categorical(probs))
                pyro.sample(f"x_{t}", dist.Normal(z + tensor(LEVELS)[c], 1.0), obs=x[:, t])


def forward(x, z):
    """log p(x | z) of one series by the forward algorithm."""
    log_alpha = tensor(START).log()
    for t, value in enumerate(x):
        log_alpha = log_alpha if t == 0 else (log_alpha[:, None] + tensor(MOVE).log()).logsumexp(0)
        log_alpha = log_alpha + normal(value, z + tensor(LEVELS))
    return log_alpha.logsumexp(0)


def hmm_joint(x, z, length=None):
    """log p(x, z), one a series."""
    length = [x.shape[1]] * len(x) if length is None else length
    return torch.stack([normal(z[i], 0.0) + forward(x[i, : length[i]], z[i]) for i in range(len(x))])


def nested(y):
    with pyro.plate("groups", y.shape[0], dim=-2):
        c = pyro.sample("c", dist.Bernoulli(tensor(0.4)), infer=SUM)
        with pyro.plate("members", y.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(2 * c, 1.0))
            pyro.sample("y", dist.Normal(z, NOISE), obs=y)


def nested_joint(y, z):
    parts = [math.log(p) + normal(z, 2.0 * k).sum(-1) for k, p in enumerate((0.6, 0.4))]
    return torch.stack(parts).logsumexp(0) + normal(y, z, NOISE).sum(-1)


def two_sites(x, y):
    """Two enumerated sites, one below the other, and data of either beside the local latent."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
        b = pyro.sample("b", dist.Categorical(tensor(MOVE)[a]), infer=SUM)
        z = pyro.sample("z", dist.Normal(tensor(CENTRES)[b], 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)
        pyro.sample("y", dist.Normal(tensor(LEVELS)[a], 1.0), obs=y)


def two_sites_joint(x, y, z):
    parts = [
        math.log(WEIGHTS[a]) + math.log(MOVE[a][b]) + normal(z, CENTRES[b]) + normal(y, LEVELS[a])
        for a, b in itertools.product(range(2), repeat=2)
    ]
    return torch.stack(parts).logsumexp(0) + normal(x, z, NOISE)


def masked(x, mask):
    with pyro.plate("data", len(x)), poutine.mask(mask=mask):
        mixture_rows(x)


def mixture_rows(x):
    c = pyro.sample("c", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
    z = pyro.sample("z", dist.Normal(tensor(CENTRES)[c], 1.0))
    pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def subsampled(x):
    with pyro.plate("data", len(x), subsample_size=4) as i:
        mixture_rows(x[i])


def outside(x):
    c = pyro.sample("c", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(tensor(CENTRES)[c], 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


X, Y, SERIES = drawn(8), drawn(8, seed=1), drawn(6, 4, seed=2)
LENGTH = torch.tensor([4, 1, 3, 2, 4, 3])
MASK = torch.arange(8) % 3 != 0
JOINTS = {
    "mixture": (mixture, (X,), "data", lambda z: mixture_joint(X, z)),
    "two sites": (two_sites, (X, Y), "data", lambda z: two_sites_joint(X, Y, z)),
    "hmm": (hmm, (SERIES,), "series", lambda z: hmm_joint(SERIES, z)),
    "padded": (padded, (SERIES, LENGTH), "series", lambda z: hmm_joint(SERIES, z, LENGTH)),
    "nested": (nested, (SERIES,), "groups", lambda z: nested_joint(SERIES, z)),
    "masked": (masked, (X, MASK), "data", lambda z: torch.where(MASK, mixture_joint(X, z), 0.0)),
    "one row": (mixture, (X[:1],), "data", lambda z: mixture_joint(X[:1], z)),
}
joints = pytest.mark.parametrize("name", JOINTS)


def initialized(model, *args, example=None, **options):
    guide = AutoAmortizedNormal(model, **options)
    guide.initialize(*(args if example is None else example))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


def guide_of(name):
    model, args, plate, joint = JOINTS[name]
    example = (X,) if name == "one row" else args
    return model, initialized(model, *args, example=example), args, plate, joint


# The plan.


class TestPlan:
    def test_enumerated_sites_are_no_blocks(self):
        plan = plan_amortization(two_sites, X, Y)
        assert plan.enumerated == ("a", "b")
        assert [block.sites for block in plan.blocks] == [("z",)]
        assert "summed out: a, b" in str(plan)
        assert AmortizationPlan.from_dict(plan.to_dict()) == plan

    def test_data_that_inform_through_an_enumerated_site(self):
        (block,) = plan_amortization(two_sites, X, Y).blocks
        assert set(block.inputs) == {"x", "y"}
        assert block.closable

    def test_a_latent_with_no_data_but_those_of_its_parent(self):
        def model(x, y):
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
                pyro.sample("z", dist.Normal(tensor(CENTRES)[c], 1.0))
                pyro.sample("x", dist.Normal(tensor(LEVELS)[c], 1.0), obs=x)

        plan = plan_amortization(model, X, Y)
        assert plan.left_to_model == ()
        assert plan.block_of("z").inputs == ("x",)

    def test_what_no_data_inform_is_left_to_the_model(self):
        def model(x):
            mixture(x)
            with pyro.plate("new", 3):
                d = pyro.sample("d", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
                pyro.sample("w", dist.Normal(tensor(CENTRES)[d], 1.0))

        plan = plan_amortization(model, X)
        assert plan.left_to_model == ("d", "w")
        assert plan.enumerated == ("c",)
        guide = initialized(model, X)
        assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, X))
        total = log_densities(model, guide, (X,), {}, num_draws=20).log_ratio
        rows = log_densities(model, guide, (X,), {}, num_draws=20, plate="data").log_ratio
        torch.testing.assert_close(total, rows.sum(-1))  # d and w cost nothing

    def test_chains_leave_series_apart(self):
        plan = plan_amortization(hmm, SERIES)
        assert plan.enumerated == ("c_*",)
        assert plan.verdict.closable is plan.verdict.factorizes is True
        assert plan.blocks[0].inputs == ("x",)

    def test_groups_are_told_whole(self):
        plan = plan_amortization(nested, SERIES)
        assert plan.verdict.closable is plan.verdict.factorizes is True
        assert any(level.pooled for level in plan.blocks[0].levels)

    def test_outside_the_plate(self):
        verdict = plan_amortization(outside, X).verdict
        assert verdict.closable is verdict.factorizes is False
        assert "'c' is summed out, and stands outside plate 'data' of 'z'" in verdict.reason


# ELBOs and densities.


@joints
def test_density_by_datum(name):
    model, guide, args, plate, joint = guide_of(name)
    assert vectorizing(model, guide, args, {}) is not None
    z = drawn(3, *guide.posterior(*args).mean["z"].shape, seed=5)
    found = log_joint(model, guide, args, {}, plate, {"z": z})
    torch.testing.assert_close(found, torch.stack([joint(values) for values in z]))


@joints
def test_density_of_draws(name):
    model, guide, args, plate, joint = guide_of(name)
    rows = log_densities(model, guide, args, {}, num_draws=10, plate=plate)
    total = log_densities(model, guide, args, {}, num_draws=10)
    torch.testing.assert_close(rows.log_p.sum(-1), total.log_p)
    torch.testing.assert_close(rows.log_q.sum(-1), total.log_q)


def mixture_guide(posterior):
    def guide(x, *_):
        with poutine.block(hide=["c"]), pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(tensor(WEIGHTS)))  # takes the same random numbers
            pyro.sample("z", dist.Normal(posterior.mean["z"], posterior.stddev["z"]))

    return guide


def series_guide(posterior):
    def guide(x, *_):
        with pyro.plate("series", len(x)):
            pyro.sample("z", dist.Normal(posterior.mean["z"], posterior.stddev["z"]))

    return guide


def nested_guide(posterior):
    def guide(y):
        with poutine.block(hide=["c"]), pyro.plate("groups", y.shape[0], dim=-2):
            pyro.sample("c", dist.Bernoulli(tensor(0.4)))
            with pyro.plate("members", y.shape[1], dim=-1):
                pyro.sample("z", dist.Normal(posterior.mean["z"], posterior.stddev["z"]))

    return guide


BY_HAND = {"mixture": mixture_guide, "hmm": series_guide, "nested": nested_guide}
LOSSES = {
    "guessed": {},
    "nesting": {"max_plate_nesting": 2},
    "particles": {"num_particles": 3, "max_plate_nesting": 2},
    "vectorized": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
    "vectorized, guessed": {"num_particles": 3, "vectorize_particles": True},
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("loss", LOSSES)
def test_elbo_is_that_of_a_guide_by_hand(name, loss):
    model, guide, args, _, _ = guide_of(name)
    losses = []
    for candidate in (guide, BY_HAND[name](guide.posterior(*args))):
        pyro.set_rng_seed(3)
        losses.append(TraceEnum_ELBO(**LOSSES[loss]).loss(model, candidate, *args))
    assert losses[0] == pytest.approx(losses[1], abs=1e-8)


@joints
def test_elbo_is_pyros(name):
    model, guide, args, _, _ = guide_of(name)
    ours = log_densities(model, guide, args, {}, num_draws=2000).log_ratio
    elbo = TraceEnum_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=2)
    assert abs(ours.mean() + elbo.loss(model, guide, *args)) < 4 * ours.std() * math.sqrt(2 / 2000)


@joints
@pytest.mark.parametrize("loss", LOSSES)
def test_elbo_trains_every_parameter(name, loss):
    model, guide, args, _, _ = guide_of(name)
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    svi = SVI(model, guide, Adam({"lr": 0.01}), TraceEnum_ELBO(**LOSSES[loss]))
    assert all(math.isfinite(svi.step(*args)) for _ in range(3))
    if name != "one row":
        assert all(bool((old != new).any()) for old, new in zip(before, guide.parameters(), strict=True))


def test_elbo_of_a_guide_against_quadrature():
    loc, scale = X / 2 - 0.3, 0.6

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    grid = torch.linspace(-6, 6, 2001)
    z = loc + scale * grid[:, None]
    weights = normal(grid, 0.0).exp() * (grid[1] - grid[0])
    exact = (weights[:, None] * (mixture_joint(X, z) - normal(z, loc, scale))).sum(0)
    ratio = log_densities(mixture, guide, (X,), {}, num_draws=4000, plate="data").log_ratio
    assert ((ratio.mean(0) - exact).abs() < 4 * ratio.std(0) / math.sqrt(4000)).all()
    elbo = -TraceEnum_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1).loss(mixture, guide, X)
    assert abs(elbo - exact.sum()) < 4 * ratio.sum(-1).std() / math.sqrt(4000)


def test_early_exit_does_not_wait():
    lines = []

    def model(x):
        c = None
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
            lines.append("after z")
            c = pyro.sample("c", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
            pyro.sample("x", dist.Normal(z + tensor(CENTRES)[c], 1.0), obs=x)

    guide = initialized(model, X)
    guide.median(X)  # in eval mode: a kind of call that runs to the end once
    lines.clear()
    guide.median(X)
    guide(X)
    assert lines == []


def test_series_of_another_length():
    def summary(x):
        return torch.stack([x.mean(1), x.std(1)], 1)

    guide = initialized(hmm, SERIES, inputs={"z": summary})
    longer = drawn(3, 7, seed=8)
    z = drawn(2, 3, seed=9)
    found = log_joint(hmm, guide, (longer,), {}, "series", {"z": z})
    torch.testing.assert_close(found, torch.stack([hmm_joint(longer, values) for values in z]))
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(hmm, guide, longer))
    draws = guide.posterior(longer).sample((5,))
    assert set(draws) == {"z", *(f"c_{t}" for t in range(7))}
    assert all(value.shape == (5, 3) for value in draws.values())


# Fits and reports.


def test_evidence_and_gaps_of_the_mixture():
    guide = AutoAmortizedNormal(mixture)
    fit = fit_svi(mixture, guide, X, num_steps=400, seed=0, progress=False)
    exact = mixture_evidence(X)
    assert fit.elbo < exact.sum() + 3 * fit.elbo_se
    report = amortization_gap(mixture, guide, X, num_steps=300, progress=False)
    error = tensor(report.per_datum["log_evidence"].to_numpy()) - exact
    assert (error.abs() < 4 * tensor(report.per_datum["log_evidence_se"].to_numpy()) + 2e-3).all()
    assert (report.per_datum["inference_gap"] > -4 * report.per_datum["inference_gap_se"] - 2e-3).all()


@pytest.mark.slow
def test_evidence_of_series():
    guide = AutoAmortizedNormal(padded)
    fit_svi(padded, guide, SERIES, LENGTH, num_steps=200, seed=0, progress=False)
    report = amortization_gap(padded, guide, SERIES, LENGTH, num_steps=150, progress=False)
    grid = torch.linspace(-8, 8, 1601)
    joint = torch.stack([hmm_joint(SERIES, z.expand(6), LENGTH) for z in grid])
    exact = joint.logsumexp(0) + (grid[1] - grid[0]).log()
    error = tensor(report.per_datum["log_evidence"].to_numpy()) - exact
    assert (error.abs() < 4 * tensor(report.per_datum["log_evidence_se"].to_numpy()) + 2e-3).all()


def test_mean_field_fits_take_the_same_loss():
    fit = fit_mean_field(mixture, X, num_steps=400, lr=0.05, num_particles=2, seed=0, progress=False)
    assert mixture_evidence(X).sum() - 1 < fit.elbo < mixture_evidence(X).sum() + 3 * fit.elbo_se


def test_a_guide_by_hand_is_trained_by_the_same_loss():
    def guide(x):
        loc = pyro.param("loc", torch.zeros(8))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.6))

    assert enumerated_sites(mixture, guide, (X,), {})[0] == {"c": ("data",)}
    fit = fit_svi(mixture, guide, X, num_steps=300, lr=0.05, num_particles=4, seed=0, progress=False)
    assert mixture_evidence(X).sum() - 1 < fit.elbo < mixture_evidence(X).sum() + 3 * fit.elbo_se


def test_a_guide_by_hand_may_sample_what_is_marked():
    def guide(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(tensor((0.5, 0.5))))
            pyro.sample("z", dist.Normal(tensor(CENTRES)[c], 1.0))

    assert enumerated_sites(mixture, guide, (X,), {})[0] == {}
    found = log_densities(mixture, guide, (X,), {}, num_draws=3000, plate="data").log_ratio
    by_hand = torch.stack([math.log(2 * w) * torch.ones(8) for w in WEIGHTS])  # what c adds
    each = torch.stack([-0.5 * (((X - centre) / NOISE) ** 2 + 1 / NOISE**2) for centre in CENTRES])
    exact = (by_hand + each - math.log(NOISE) - 0.5 * math.log(2 * math.pi)).mean(0)
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / math.sqrt(3000)).all()


class TestOutside:
    """One discrete latent for all rows."""

    def test_density(self):
        guide = initialized(outside, X)
        z = drawn(8, seed=4)
        fixed = poutine.condition(guide, data={"z": z})
        total = log_densities(poutine.condition(outside, data={"z": z}), fixed, (X,), {}, num_draws=2).log_p
        parts = [math.log(w) + normal(z, centre).sum() for w, centre in zip(WEIGHTS, CENTRES, strict=True)]
        exact = torch.stack(parts).logsumexp(0) + normal(X, z, NOISE).sum()
        torch.testing.assert_close(total, exact.expand(2))

    def test_no_density_by_datum(self):
        guide = initialized(outside, X)
        with pytest.raises(ValueError, match="'c' is summed out, and stands outside plate 'data'"):
            log_densities(outside, guide, (X,), {}, plate="data")

    def test_the_report_has_totals_only(self):
        guide = initialized(outside, X)
        report = amortization_gap(outside, guide, X, num_steps=50, num_draws=50, progress=False)
        assert report.per_datum is None
        assert "'c' is summed out" in report.warnings[0]
        assert report.totals.loc["amortization_gap", "total"] > 0

    def test_minibatches_would_be_biased(self):
        with pytest.warns(UserWarning, match="'c' is summed out for all rows of plate 'data' together"):
            fit_svi(outside, AutoAmortizedNormal(outside), X, num_steps=2, batch_size=4, progress=False)


def test_rows_of_the_plate_that_all_discrete_latents_share():
    """The outermost plate of z is not that of c."""

    def model(x):
        with pyro.plate("series", x.shape[1], dim=-1):
            c = pyro.sample("c", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
            with pyro.plate("times", x.shape[0], dim=-2):
                z = pyro.sample("z", dist.Normal(tensor(CENTRES)[c], 1.0))
                pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    guide = initialized(model, SERIES)
    report = amortization_gap(model, guide, SERIES, num_steps=20, num_draws=100, progress=False)
    assert len(report.per_datum) == 4


# Subsampling.


def test_a_plate_that_subsamples_itself():
    guide = initialized(subsampled, X)
    whole = AutoAmortizedNormal(mixture)
    whole.load_state_dict(guide.state_dict())
    rows = log_densities(subsampled, guide, (X,), {}, plate="data", num_draws=3000).log_ratio
    full = log_densities(mixture, whole, (X,), {}, plate="data", num_draws=3000).log_ratio
    se = (rows.var(0) + full.var(0)).sqrt() / math.sqrt(3000)
    assert ((rows.mean(0) - full.mean(0)).abs() < 4 * se).all()
    losses = torch.tensor([TraceEnum_ELBO(max_plate_nesting=1).loss(subsampled, guide, X) for _ in range(500)])
    assert abs(-losses.mean() - full.sum(-1).mean()) < 4 * losses.std() / math.sqrt(500)
    posterior = guide.posterior(X)
    draws = posterior.sample((6000,))
    error = draws["c"] - mixture_parts(draws["z"]).softmax(-1)[..., 1]
    assert (error.mean(0).abs() < 4 * error.std(0) / math.sqrt(6000)).all()


def test_minibatches():
    x = drawn(40, seed=7)
    fit = fit_svi(mixture, AutoAmortizedNormal(mixture), x, batch_size=10, num_steps=600, seed=0, progress=False)
    exact = mixture_evidence(x).sum()
    assert exact - 4 < fit.elbo < exact + 3 * fit.elbo_se


# Draws of what was summed out.


def within(error, num_draws):
    return bool((error.mean(0).abs() < 4.5 * error.std(0) / math.sqrt(num_draws) + 1e-9).all())


def as_likely(chosen, prob):
    """Whether a choice was made as often as its probabilities say, draws first; no rarer than normals can tell."""
    se = (prob * (1 - prob)).mean(0).sqrt() / math.sqrt(len(prob))
    return bool(((chosen.double() - prob).mean(0).abs() < 4.5 * se + 5 / len(prob)).all())


class TestDraws:
    def test_posterior_of_the_mixture(self):
        posterior = initialized(mixture, X).posterior(X)
        draws = posterior.sample((2, 3000))
        assert draws["c"].shape == (2, 3000, 8)
        assert set(posterior.mean) == set(posterior.stddev) == {"z"}
        c, z = draws["c"].flatten(0, 1), draws["z"].flatten(0, 1)
        error = c - mixture_parts(z).softmax(-1)[..., 1]
        assert within(error, 6000)
        assert within(error * z, 6000)  # jointly: the error is uncorrelated with what it was given

    def test_one_draw_has_the_shape_of_the_sites(self):
        draws = initialized(mixture, X).posterior(X).sample()
        assert draws["c"].shape == draws["z"].shape == (8,)

    def test_predictive(self):
        guide = initialized(mixture, X)
        draws = guide.predictive(X, num_samples=500)
        assert all(draws[name].shape == (500, 8) for name in ("c", "z", "x"))
        error = draws["c"] - mixture_parts(draws["z"]).softmax(-1)[..., 1]
        assert within(error, 500)
        assert within(error * draws["z"], 500)
        assert within(draws["x"] - draws["z"], 500)
        assert set(guide.predictive(X, num_samples=3, parallel=True)) == {"c", "z", "x"}

    def test_chains_are_drawn_jointly(self):
        guide = initialized(hmm, SERIES)
        draws = guide.posterior(SERIES).sample((4000,))
        paths = list(itertools.product(range(2), repeat=4))
        chosen = torch.stack([draws[f"c_{t}"] for t in range(4)], -1)
        scores = []
        for path in paths:
            score = math.log(START[path[0]])
            score += sum(math.log(MOVE[a][b]) for a, b in itertools.pairwise(path))
            for t, state in enumerate(path):
                score = score + normal(SERIES[:, t], draws["z"] + LEVELS[state])
            scores.append(score)
        probs = torch.stack(scores).softmax(0)
        for path, prob in zip(paths, probs, strict=True):
            assert as_likely((chosen == torch.tensor(path)).all(-1), prob)

    def test_groups(self):
        draws = initialized(nested, SERIES).posterior(SERIES).sample((4000,))
        assert draws["c"].shape == (4000, 6, 1)
        parts = [math.log(p) + normal(draws["z"], 2.0 * k).sum(-1) for k, p in enumerate((0.6, 0.4))]
        assert as_likely(draws["c"][..., 0], torch.stack(parts).softmax(0)[1])

    def test_vectors_of_zeros_and_a_one(self):
        def model(x):
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.OneHotCategorical(tensor(WEIGHTS)), infer=SUM)
                z = pyro.sample("z", dist.Normal(c @ tensor(CENTRES), 1.0))
                pyro.sample("x", dist.Normal(z, NOISE), obs=x)

        guide = initialized(model, X)
        found = log_joint(model, guide, (X,), {}, "data", {"z": Y[None]})
        torch.testing.assert_close(found, mixture_joint(X, Y)[None])
        draws = guide.posterior(X).sample((3000,))
        assert draws["c"].shape == (3000, 8, 2)
        assert within(draws["c"] - mixture_parts(draws["z"]).softmax(-1), 3000)
        assert guide.predictive(X, num_samples=2)["c"].shape == (2, 8, 2)

    def test_a_model_that_runs_draw_by_draw_only(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
                c = pyro.sample("c", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
                loc = torch.stack([z[i] for i in range(len(x))])
                pyro.sample("x", dist.Normal(loc + tensor(CENTRES)[c], NOISE), obs=x)

        guide = initialized(model, X)
        assert vectorizing(model, guide, (X,), {}) is None
        draws = guide.posterior(X).sample((400,))
        parts = [math.log(w) + normal(X, draws["z"] + mu, NOISE) for w, mu in zip(WEIGHTS, CENTRES, strict=True)]
        assert as_likely(draws["c"], torch.stack(parts).softmax(0)[1])

    def test_seeds(self):
        posterior = initialized(mixture, X).posterior(X)
        draws = []
        for seed in (1, 1, 2):
            pyro.set_rng_seed(seed)
            draws.append((posterior.sample((50,))["c"], torch.rand(())))
        assert torch.equal(draws[0][0], draws[1][0])
        assert draws[0][1] == draws[1][1]
        assert not torch.equal(draws[0][0], draws[2][0])
        assert not torch.equal(posterior.sample((50,))["c"], posterior.sample((50,))["c"])

    def test_nothing_is_changed(self):
        net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))

        def model(x):
            pyro.module("net", net)
            scale = pyro.param("scale", tensor(1.0))
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
                z = pyro.sample("z", dist.Normal(tensor(CENTRES)[c], scale))
                loc = net(z.reshape(-1, 1)).reshape(z.shape)
                pyro.sample("x", dist.Normal(loc, NOISE), obs=x)

        guide = AutoAmortizedNormal(model)
        SVI(model, guide, Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1)).step(X)
        posterior = guide.posterior(X)
        state = copy.deepcopy(net.state_dict())
        names = set(pyro.get_param_store())
        draws = posterior.sample((20,))
        again = copy.deepcopy(posterior).sample((3,))
        assert draws["c"].shape == (20, 8)
        assert again["c"].shape == (3, 8)
        assert not draws["z"].requires_grad
        assert net.training
        assert set(pyro.get_param_store()) == names
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


# Mixtures with nothing but globals to guide.


@config_enumerate
def gmm(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(tensor(0.0), 3.0))
    scale = pyro.sample("scale", dist.LogNormal(tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[c], scale), obs=x)


class TestGlobals:
    def test_elbo_is_that_of_autonormal(self):
        guide = initialized(gmm, X)
        assert plan_amortization(gmm, X).enumerated == ("c",)
        auto = AutoNormal(poutine.block(gmm, hide=["c"]))
        auto(X)
        posterior = guide.posterior(X)
        for name, fn in posterior.sites.items():
            base, _ = normal_underneath(fn)
            getattr(auto.locs, name).data.copy_(base.loc)
            setattr(auto.scales, name, base.scale.detach())
        losses = []
        for candidate in (guide, auto):
            pyro.set_rng_seed(0)
            losses.append(TraceEnum_ELBO(max_plate_nesting=1).loss(gmm, candidate, X))
        assert losses[0] == pytest.approx(losses[1], abs=1e-8)

    def test_draws(self):
        draws = initialized(gmm, X).posterior(X).sample((500,))
        assert draws["c"].shape == (500, 8)
        parts = draws["weights"][:, None].log() + (
            -0.5 * ((X[:, None] - draws["locs"][:, None]) / draws["scale"][:, None, None]) ** 2
        )
        error = torch.nn.functional.one_hot(draws["c"], 3) - parts.softmax(-1)
        assert within(error, 500)

    @pytest.mark.slow
    def test_comparison_with_mcmc(self):
        def known(x):
            centre = pyro.sample("centre", dist.Normal(tensor(0.0), 2.0))
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Categorical(tensor(WEIGHTS)), infer=SUM)
                z = pyro.sample("z", dist.Normal(tensor(CENTRES)[c] + centre, 1.0))
                pyro.sample("x", dist.Normal(z, NOISE), obs=x)

        result = compare_inference(
            known,
            X,
            svi={"num_steps": 300, "lr": 0.03},
            mcmc={"num_samples": 120, "warmup_steps": 80, "num_chains": 2},
            progress=False,
        )
        draws = result.fits["mcmc"].samples
        assert set(draws) == {"centre", "z"}
        assert draws["z"].shape[2:] == (8,)
        grid = torch.linspace(-8, 8, 2001)
        log_post = normal(grid, 0.0, 2.0) + mixture_evidence(X - grid[:, None]).sum(-1)
        mean = (log_post.softmax(0) * grid).sum()
        error = draws["centre"].mean() - mean
        assert abs(error) < 4 * draws["centre"].std() / float(result.fits["mcmc"].ess["centre"]) ** 0.5
        elbo = result.table["elbo"].drop("mcmc").astype(float)
        assert (elbo < log_post.logsumexp(0).item() + math.log(float(grid[1] - grid[0])) + 0.5).all()


def test_mcmc_sums_chains_out():
    fit = run_mcmc(hmm, SERIES[:2, :3], num_samples=10, warmup_steps=10, num_chains=2, seed=0, progress=False)
    assert set(fit.samples) == {"z"}


# Guides are kept and hide what others sample.


def test_save_and_load(tmp_path):
    guide = initialized(mixture, X)
    guide.save(tmp_path / "guide.pt")
    loaded = AutoAmortizedNormal.load(tmp_path / "guide.pt", mixture)
    assert loaded.plan.enumerated == ("c",)
    assert torch.equal(loaded.median(X)["z"], guide.median(X)["z"])
    assert loaded.posterior(X).sample((4,))["c"].shape == (4, 8)


def test_hidden_by_hand_as_before():
    guide = AutoAmortizedNormal(poutine.block(mixture, hide=["c"]))
    fit = fit_svi(mixture, guide, X, num_steps=20, progress=False)
    assert guide.plan.enumerated == ()
    assert guide.plan.foreign == ("c",)
    assert math.isfinite(fit.elbo)
    assert set(guide.posterior(X).sample()) == {"z"}


def test_tables_are_mean_field():
    guide = initialized(mixture, X, encoder=Table())
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, guide, X))
    assert math.isfinite(Trace_ELBO().loss(poutine.condition(mixture, data={"c": torch.zeros(8).long()}), guide, X))
