"""NaN among observed values, with and without masks, against exact posteriors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    Table,
    amortization_gap,
    fit_svi,
    plan_amortization,
    run_mcmc,
    to_arviz,
)
from pyro_amortize.missing import takes_nan

NAN = torch.nan


def observed(fn, value):
    return {"fn": fn, "value": value, "args": (), "kwargs": {}}


@pytest.mark.parametrize(
    ("fn", "value", "expected"),
    [
        (dist.NanMaskedNormal(torch.zeros(3), 1.0), torch.tensor([1.0, NAN, 0.0]), True),
        (dist.NanMaskedNormal(torch.zeros(3), 1.0).to_event(1), torch.ones(3), True),
        (dist.NanMaskedMultivariateNormal(torch.zeros(3), torch.eye(3)), torch.tensor([1.0, NAN, 0.0]), True),
        (dist.Normal(torch.zeros(3), 1.0), torch.tensor([1.0, NAN, 0.0]), False),
        (
            dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])),
            torch.tensor([1.0, NAN, 0.0]),
            False,
        ),
        (dist.Uniform(torch.zeros(3), 2.0), torch.ones(3), False),
        (dist.Categorical(torch.ones(3)), torch.tensor(1), False),
        (dist.Categorical(torch.ones(3)), torch.tensor(1.0), False),
    ],
    ids=["normal", "event", "multivariate", "plain", "masked", "bounded", "category", "float category"],
)
def test_what_takes_nan(fn, value, expected):
    assert takes_nan(observed(fn, value)) is expected


def by_cell(y):
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.NanMaskedNormal(z[..., None].expand(*z.shape, 3), 0.5).to_event(1), obs=y)


def by_event(y):
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z[..., None].expand(*z.shape, 3)
        pyro.sample("y", dist.NanMaskedMultivariateNormal(loc, 0.25 * torch.eye(3)), obs=y)


def by_plate(y):
    with pyro.plate("d", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("k", y.shape[1], dim=-1):
            pyro.sample("y", dist.NanMaskedNormal(z, 0.5), obs=y)


def data_with_holes():
    y = torch.randn(60, 1) + 0.5 * torch.randn(60, 3)
    y[torch.rand(60, 3) < 0.4] = NAN
    y[4] = NAN
    return y


@pytest.mark.parametrize("model", [by_cell, by_event, by_plate], ids=lambda model: model.__name__)
@pytest.mark.parametrize("first", ["with holes", "without"])
def test_likelihoods_that_take_nan(model, first):
    """Whichever data the guide was made from, rows without entries have the prior, and no encoder sees NaN."""
    y = data_with_holes()
    guide = AutoAmortizedNormal(model)
    guide.initialize(y if first == "with holes" else y.nan_to_num())
    assert guide.plan.verdict.closable
    assert math.isfinite(SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(y))
    answer, empty = guide.posterior(y), y.isnan().all(-1)
    mean, stddev = answer.mean["z"].flatten(), answer.stddev["z"].flatten()
    assert mean.isfinite().all()
    assert torch.equal(stddev == 1.0, empty)
    assert torch.equal(mean == 0.0, empty)


def test_a_fit_to_data_with_holes():
    """Exactly N(4 sum / (1 + 4 n), 1 / (1 + 4 n)) of n entries, up to what a small network misses after 300 steps."""
    y = data_with_holes()
    guide = AutoAmortizedNormal(by_cell, encoder=MLP((32,)))
    fit_svi(by_cell, guide, y, num_steps=300, lr=0.02, seed=0, progress=False)
    answer, n = guide.posterior(y), (~y.isnan()).sum(-1)
    stddev = (1 + 4 * n) ** -0.5
    error = (answer.mean["z"] - 4 * y.nansum(-1) * stddev**2) / stddev
    assert error.square().mean().sqrt() < 0.25
    torch.testing.assert_close(answer.stddev["z"], stddev, rtol=0.25, atol=0)


def test_references_of_data_with_holes():
    y = data_with_holes()[:8]
    guide = AutoAmortizedNormal(by_event, encoder=Table())
    fit = fit_svi(by_event, guide, y, num_steps=5, progress=False, compile=False)
    frame = amortization_gap(by_event, guide, y, num_steps=100, num_draws=400, progress=False).per_datum
    exact = torch.zeros(8)
    for i, there in enumerate(~y.isnan()):
        if bool(there.any()):
            covariance = 0.25 * torch.eye(int(there.sum())) + 1.0
            exact[i] = dist.MultivariateNormal(torch.zeros(len(covariance)), covariance).log_prob(y[i, there])
    error = (frame["log_evidence"] - exact.numpy()).abs()
    assert (error <= 4 * frame["log_evidence_se"] + 0.01).all()
    assert to_arviz(fit, num_samples=5).log_likelihood["y"].notnull().any()
    mcmc = run_mcmc(by_event, y, num_samples=5, warmup_steps=5, num_chains=1, progress=False, engine="pyro")
    assert mcmc.samples["z"].isfinite().all()


def under_poutine(x, mask):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def under_obs_mask(x, mask):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask)


def under_a_mask_of_the_distribution(x, mask):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=x)


def under_a_mask_of_cells(x, mask):
    pair, masks = torch.stack([x, x.nan_to_num()], -1), torch.stack([mask, torch.ones_like(mask)], -1)
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).mask(masks).to_event(1), obs=pair)


MASKED = [under_poutine, under_obs_mask, under_a_mask_of_the_distribution]
LINE = r"hold NaN under a mask.*Fill them: obs=\w+.nan_to_num\(\)"


def masked_data():
    x, mask = torch.randn(8), torch.arange(8) < 5
    return x, torch.where(mask, x, NAN), mask


@pytest.mark.parametrize("model", [*MASKED, under_a_mask_of_cells], ids=lambda model: model.__name__)
def test_nan_under_a_mask_is_refused_with_the_line_that_mends_it(model):
    x, holes, mask = masked_data()
    guide = AutoAmortizedNormal(model)
    guide.initialize(x, mask)
    options = {"num_samples": 5, "warmup_steps": 5, "num_chains": 1, "progress": False}
    for ask in (
        lambda: plan_amortization(model, holes, mask),
        lambda: AutoAmortizedNormal(model)(holes, mask),
        lambda: fit_svi(model, guide, holes, mask, num_steps=2, progress=False),
        lambda: amortization_gap(model, guide, holes, mask, progress=False),
        lambda: run_mcmc(model, holes, mask, **options),
    ):
        with pytest.raises(ValueError, match=LINE):
            ask()


@pytest.mark.parametrize("model", MASKED, ids=lambda model: model.__name__)
def test_nan_under_a_mask_changes_no_verdict(model):
    """Without Pyro's validation."""
    x, holes, mask = masked_data()
    with pyro.validation_enabled(False):
        with pytest.warns(UserWarning, match=LINE):
            plan, filled = (plan_amortization(model, data, mask) for data in (holes, x))
        assert plan.verdict == filled.verdict
        assert plan.block_of("z").inputs == filled.block_of("z").inputs == ("x",)


def test_nan_under_a_mask_reaches_no_encoder_and_no_gradient():
    """Without Pyro's validation, a fit is that of filled data: the ELBO at its exact value, the evidence."""
    x, holes, mask = masked_data()
    guide = AutoAmortizedNormal(under_poutine)
    guide.initialize(x, mask)
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match=LINE):
        fit = fit_svi(under_poutine, guide, holes, mask, num_steps=300, lr=0.03, seed=0, progress=False, compile=False)
    assert fit.elbo == pytest.approx(float(dist.Normal(0.0, math.sqrt(2)).log_prob(x[:5]).sum()), abs=0.1)
    assert guide.posterior(holes, mask).stddev["z"][5:].tolist() == [1.0] * 3


def test_a_mask_that_is_false_needs_no_values():
    def model(x, y):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0).mask(False), obs=y)

    plan = plan_amortization(model, torch.randn(8), torch.full((8,), NAN))
    assert plan.block_of("z").inputs == ("x",)


@pytest.mark.parametrize("first", ["labels", "padded labels"])
def test_labels_that_are_none_under_a_mask(first):
    """-1 where a label is missing: no other row may hold it."""

    def model(y, mask):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 2.0).to_event(1))
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Categorical(logits=z), obs=torch.where(mask, y, 0))

    y, mask = torch.randint(3, (20,)), torch.rand(20) < 0.4
    padded = torch.where(mask, y, -1)
    guide = AutoAmortizedNormal(model)
    guide.initialize(y if first == "labels" else padded, mask)
    assert guide.plan.verdict.closable
    assert guide.plan.block_of("z").inputs == ("y",)
    answer = guide.posterior(padded, mask)
    assert torch.equal((answer.stddev["z"] == 2.0).all(-1), ~mask)
    assert torch.equal(answer.mean["z"], guide.posterior(y, mask).mean["z"])


def test_what_is_imputed_below_an_enumerated_latent_is_told():
    """q of it is no prior then, and globals are biased; a mask, or an encoder for the latent, leaves rows alone."""

    def model(y, mask, imputed=True):
        with pyro.plate("n", len(y)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            with poutine.mask(mask=True if imputed else mask):
                pyro.sample("y", dist.Normal(z + c, 1.0), obs=y, obs_mask=mask if imputed else None)

    y, mask = torch.randn(8), torch.arange(8) < 5
    with pytest.warns(UserWarning, match="'y_unobserved' depends on 'c', which is summed out.*poutine.mask.*encoder="):
        plan_amortization(model, y, mask)
    for args, encoder in (((y, mask, False), None), ((y, mask), {"c": MLP()})):
        guide = AutoAmortizedNormal(model, encoder=encoder)
        guide.initialize(*args)
        assert (guide.posterior(*args).stddev["z"] == 2.0).tolist() == (~mask).tolist()


@pytest.mark.parametrize(
    "there", [lambda y: y > -90, lambda y: (y != -99) & ~y.isnan(), lambda y: ~y.isnan()], ids=["above", "two", "nan"]
)
@pytest.mark.parametrize("first", ["all", "some"])
def test_a_mask_of_numbers_that_stand_for_missing(there, first):
    """The plan does not take it for one of NaN alone, whatever the first call held."""

    def model(y):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            mask = there(y)
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(z, 1.0), obs=torch.where(mask, y, 0.0))

    whole, odd = torch.randn(7), torch.tensor([-99.0, 0.5, NAN, 1.0, -0.3, NAN, -99.0])
    guide = AutoAmortizedNormal(model)
    guide.initialize(whole if first == "all" else odd)
    answer = guide.posterior(odd)
    assert torch.equal(answer.stddev["z"] == 2.0, ~there(odd))
    assert answer.mean["z"].isfinite().all()
