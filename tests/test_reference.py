import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_amortize import (
    AutoAmortizedNormal,
    amortization_gap,
    compare_inference,
    fit_mean_field,
    fit_optimum,
    fit_svi,
    run_mcmc,
)


class Decoder(PyroModule):
    """A model with every kind of state of its own: parameters, constrained ones, buffers, a module in a function."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.scale = PyroParam(torch.tensor(0.8), constraint=dist.constraints.positive)

    def forward(self, x):
        shift = pyro.param("shift", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z) + shift, self.scale).to_event(1), obs=x)


NET = nn.Linear(2, 3)


def function(x):
    net = pyro.module("net", NET)
    scale = pyro.param("scale", torch.tensor(0.8), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)


def snapshot(model):
    """Everything that belongs to the user, by value and by identity."""
    store = pyro.get_param_store()
    module = model if isinstance(model, nn.Module) else NET
    return {
        "store": {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in store.named_parameters()},
        "constraints": dict(store._constraints),
        "module": {name: (id(t), t.detach().clone()) for name, t in module.state_dict(keep_vars=True).items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "modes": [part.training for part in module.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_same(before, after, path=""):
    assert type(before) is type(after), path
    if isinstance(before, dict):
        assert list(before) == list(after), path
        for key in before:
            assert_same(before[key], after[key], f"{path}.{key}")
    elif isinstance(before, (tuple, list)):
        for a, b in zip(before, after, strict=True):
            assert_same(a, b, path)
    elif isinstance(before, torch.Tensor):
        assert torch.equal(before, after), path
    else:
        assert before == after, path


@pytest.fixture(params=["module", "function"])
def fitted(request):
    model = Decoder() if request.param == "module" else function
    x = torch.randn(24, 3)
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, x, num_steps=20, progress=False)
    parameters = (model if request.param == "module" else NET).parameters()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return model, guide, x


@pytest.mark.parametrize(
    "judge",
    [
        lambda model, guide, x: fit_mean_field(model, x, num_steps=5, seed=0, progress=False),
        lambda model, guide, x: fit_optimum(model, guide, x, num_steps=5, progress=False),
        lambda model, guide, x: run_mcmc(
            model, x[:4], num_samples=4, warmup_steps=2, num_chains=2, seed=0, progress=False
        ),
        lambda model, guide, x: amortization_gap(model, guide, x, num_steps=5, num_draws=40, progress=False),
        lambda model, guide, x: compare_inference(
            model,
            x,
            methods=("amortized", "mean_field"),
            svi={"num_steps": 5},
            num_draws=20,
            progress=False,
        ),
    ],
    ids=["fit_mean_field", "fit_optimum", "run_mcmc", "amortization_gap", "compare_inference"],
)
def test_everything_of_the_user_is_left_bit_for_bit(fitted, judge):
    model, guide, x = fitted
    before = snapshot(model)
    answer = guide.posterior(x).mean["z"]
    judge(model, guide, x)
    assert_same(before, snapshot(model))
    assert torch.equal(answer, guide.posterior(x).mean["z"])


def test_a_reference_sees_the_fitted_parameters():
    def model(x):
        weight = pyro.param("weight", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight + z, 1.0), obs=x)

    x = 5 + torch.randn(40)
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, x, num_steps=800, lr=0.05, seed=0, progress=False)
    weight = pyro.param("weight").item()
    assert weight > 4
    optimum = fit_optimum(model, guide, x, progress=False).guide.posterior(x).mean["z"]
    torch.testing.assert_close(optimum, (x - weight) / 2, atol=0.05, rtol=0)
    draws = run_mcmc(model, x[:3], num_samples=200, warmup_steps=100, num_chains=2, seed=0, progress=False)
    se = math.sqrt(0.5) / draws.ess["z"].sqrt()
    assert ((draws.samples["z"].mean((0, 1)) - (x[:3] - weight) / 2).abs() < 5 * se).all()


def test_mean_field_trains_a_copy_of_the_model():
    def model(x):
        weight = pyro.param("weight", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight + z, 1.0), obs=x)

    x = 5 + torch.randn(40)
    fit = fit_mean_field(model, x, num_steps=800, lr=0.05, seed=0, progress=False)
    exact = dist.Normal(x.mean(), math.sqrt(2)).log_prob(x).sum()
    assert fit.elbo == pytest.approx(float(exact), abs=1.0 + 3 * fit.elbo_se)
    assert "weight" not in pyro.get_param_store()


class TestMeanFieldFromAGuide:
    @staticmethod
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 5.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        shift = pyro.sample("shift", dist.Uniform(-1.0, 2.0))
        factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
        ordered = dist.transforms.OrderedTransform()
        cuts = pyro.sample("cuts", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), ordered))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0).expand([2]).to_event(1))
            rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
            loc = z * rate[..., None] + weights[0] + shift + cuts
            pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=factor), obs=x)

    @pytest.mark.parametrize("make", [AutoAmortizedNormal, AutoNormal], ids=["generated", "AutoNormal"])
    def test_starts_from_its_answer_globals_included(self, make):
        x = torch.randn(10, 2)
        guide = make(self.model)
        trained = fit_svi(self.model, guide, x, num_steps=30, lr=0.05, seed=0, progress=False)
        fit = fit_mean_field(self.model, x, start=guide, num_steps=1, lr=1e-9, seed=0, progress=False)
        assert fit.elbo == pytest.approx(trained.elbo, abs=1e-3)
        answer = fit.guide.posterior(x)
        for name, median in guide.median(x).items():
            torch.testing.assert_close(answer.median[name], median)

    def test_starts_from_a_guide_written_by_hand(self):
        def model(x):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, rate))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            pyro.sample("rate", dist.LogNormal(0.4, 0.3))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.7))

        x = torch.randn(10)
        fit = fit_mean_field(model, x, start=guide, num_steps=1, lr=1e-9, seed=0, progress=False)
        posterior = fit.guide.posterior(x)
        torch.testing.assert_close(posterior.mean["z"], x / 2)
        torch.testing.assert_close(posterior.stddev["z"], torch.full((10,), 0.7))
        assert float(posterior.median["rate"]) == pytest.approx(math.exp(0.4), abs=1e-5)

    def test_starts_from_subsamples_of_a_plate(self):
        def model(x):
            with pyro.plate("data", len(x), subsample_size=4) as i:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

        x = torch.randn(10)
        guide = AutoAmortizedNormal(model)
        fit_svi(model, guide, x, num_steps=20, lr=0.05, seed=0, progress=False)
        fit = fit_mean_field(model, x, start=guide, num_steps=1, lr=1e-9, seed=0, progress=False)
        table = fit.guide.coder_of(fit.guide.plan.block_of("z")).values[0]
        assert len(table) == 10
        assert (table[:, 0].sort().values != 0).all()

    @pytest.mark.parametrize(
        ("make", "error", "text"),
        [
            (AutoAmortizedNormal, RuntimeError, r"no parameters yet.*fit_svi"),
            (AutoDelta, NotImplementedError, r"'theta'.*Delta.*normals.*AutoNormal"),
            (lambda model: lambda x: None, ValueError, r"does not sample 'theta'.*start= out"),
            (lambda model: 3, ValueError, r"start is a int.*start=fit.guide"),
        ],
        ids=["untrained", "points", "lacking", "number"],
    )
    def test_guides_that_cannot_be_read(self, make, error, text):
        with pytest.raises(error, match=text):
            fit_mean_field(self.model, torch.randn(10, 2), start=make(self.model), num_steps=1, progress=False)


class TestOptimum:
    @staticmethod
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0).expand([2]).to_event(1))
            rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
            pyro.sample("x", dist.Normal(z * rate[..., None], 1.0).to_event(1), obs=x)

    def test_beats_the_encoder_with_globals_given(self):
        x = torch.randn(20, 2)
        guide = AutoAmortizedNormal(self.model)
        guide.initialize(x)
        given = {"theta": torch.tensor(0.3)}
        fit = fit_optimum(self.model, guide, x, given=given, progress=False)
        report = amortization_gap(self.model, guide, x, given=given, progress=False)
        assert report.totals.loc["amortization_gap", "total"] > 5
        assert (report.per_datum["amortization_gap"] > -4 * report.per_datum["amortization_gap_se"]).all()
        assert float(report.given["theta"]) == pytest.approx(0.3)
        assert set(fit.guide.posterior(x).mean) == {"z", "rate"}

    def test_starts_from_the_encoder_s_answer(self):
        x = torch.randn(20, 2)
        guide = AutoAmortizedNormal(self.model)
        fit_svi(self.model, guide, x, num_steps=1000, lr=0.02, progress=False)  # it is then better than the prior
        fit = fit_optimum(self.model, guide, x, num_steps=1, lr=1e-9, progress=False)
        start, answer = fit.guide.posterior(x), guide.posterior(x)
        for name in ("z", "rate"):  # for a row or two the prior is the better start
            for one, other in ((start.median, answer.median), (start.stddev, answer.stddev)):
                assert torch.isclose(one[name], other[name], rtol=1e-4).double().mean() > 0.8

    def test_given_names_no_global(self):
        x = torch.randn(20, 2)
        guide = AutoAmortizedNormal(self.model)
        guide.initialize(x)
        with pytest.raises(ValueError, match="'rate'.*not known.*theta"):
            fit_optimum(self.model, guide, x, given={"rate": torch.ones(20)}, progress=False)

    def test_nothing_local(self):
        def model(x):
            theta = pyro.sample("theta", dist.Normal(0.0, 5.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

        x = torch.randn(20)
        guide = AutoAmortizedNormal(model)
        guide.initialize(x)
        with pytest.raises(ValueError, match=r"nothing to amortize.*compare_inference"):
            amortization_gap(model, guide, x, progress=False)


def test_mean_field_answers_with_what_it_has_trained():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(20)
    posterior = fit_mean_field(model, x, num_steps=300, lr=0.05, seed=0, progress=False).guide.posterior(x)
    # The exact posterior is N(x / 2, 1 / 2). Single steps jitter by a fraction of its standard deviation, 0.71.
    torch.testing.assert_close(posterior.mean["z"], x / 2, atol=0.2, rtol=0)
    torch.testing.assert_close(posterior.stddev["z"], torch.full((20,), math.sqrt(0.5)), atol=0, rtol=0.2)
