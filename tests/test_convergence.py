"""What a fit says is left, against what is left."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_amortize import AutoAmortized, AutoAmortizedNormal, Table, convergence, fit_svi


def model(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def optimum(x):
    """The mean-field optimum of the ELBO."""
    count = len(x)
    covariance = 100.0 * torch.ones(count, count) + 1.25 * torch.eye(count)
    evidence = dist.MultivariateNormal(torch.zeros(count), covariance.double()).log_prob(x.double())
    precision = torch.diag(torch.cat([torch.tensor([0.01 + count]), torch.full((count,), 5.0)]).double())
    precision[0, 1:] = precision[1:, 0] = -1.0
    return float(evidence - (precision.diagonal().log().sum() - torch.logdet(precision)) / 2)


X = 3 + 1.2 * torch.randn(200, generator=torch.Generator().manual_seed(0))


class TestRemaining:
    @pytest.mark.parametrize("batch_size", [None, 50])
    @pytest.mark.parametrize("encoder", [None, Table()])
    @pytest.mark.parametrize("num_steps", [200, 500])
    def test_a_fit_that_stopped_early_says_by_how_much(self, encoder, num_steps, batch_size):
        guide = AutoAmortized(model, encoder=encoder)
        fit = fit_svi(model, guide, X, num_steps=num_steps, batch_size=batch_size, seed=0, progress=False)
        left = optimum(X) - fit.elbo
        assert left > 10
        assert not fit.converged
        assert 0.3 * left < fit.remaining < 3 * left  # as many steps again do not gain all, and it is an extrapolation
        assert "nats left, raise num_steps" in str(fit)

    @pytest.mark.parametrize("encoder", [None, Table()])
    def test_a_fit_at_its_optimum_says_so(self, encoder):
        """Also where single steps shake it about."""
        fit = fit_svi(model, AutoAmortized(model, encoder=encoder), X, num_steps=1500, lr=0.03, seed=0, progress=False)
        assert optimum(X) - fit.elbo < 3 * fit.elbo_se + 0.1
        assert fit.converged
        assert fit.remaining < 0.1 + 3 * fit.remaining_se
        assert "converged (about" in str(fit)

    def test_few_steps_along_a_ridge_do_not_read_as_converged(self):
        """The level and its groups trade off: the ELBO rises so slowly that two hundred steps show nothing."""

        def ridge(x, group):
            level = pyro.sample("level", dist.Normal(0.0, 5.0))
            with pyro.plate("groups", 4):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(level, 1.0))
                pyro.sample("x", dist.Normal(z + b[..., group], 0.5), obs=x)

        pyro.set_rng_seed(0)
        group, x = torch.arange(200) % 4, 3 + torch.randn(200)
        for seed in range(5):
            guide = AutoAmortizedNormal(ridge)
            fit = fit_svi(ridge, guide, x, group, num_steps=200, lr=0.02, seed=seed, progress=False)
            assert float(guide.median(x, group)["level"]) < 2.0  # 2.95 is the exact mean
            assert not fit.converged
            assert "raise num_steps=400" in str(fit)

    def test_parameters_stay_where_the_fit_left_them(self):
        guide = AutoAmortizedNormal(model)
        fit = fit_svi(model, guide, X, num_steps=150, seed=0, progress=False)
        assert fit.elbo == pytest.approx(-Trace_ELBO(num_particles=500).loss(model, guide, X), abs=10)
        again = [torch.zeros(()), *guide.parameters()]
        assert all(bool(value.isfinite().all()) for value in again)

    def test_another_loss_than_an_elbo_goes_by_the_loss(self):
        def loss(model, guide, *args, **kwargs):
            return Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs)

        fit = fit_svi(model, AutoAmortizedNormal(model), X, num_steps=200, loss=loss, seed=0, progress=False)
        assert not fit.converged
        assert fit.remaining > 3 * fit.remaining_se


@pytest.mark.parametrize("decay", [0.5, 3.0, 12.0])
def test_an_exponential_is_continued(decay):
    """The excess of exp(-decay t): middles of its parts stand for their rates, to a tenth where they bend little."""
    excess = [math.exp(-decay * t) for t in (0.5, 0.8, 1.0, 2.0)]
    promised = convergence.continued(excess[0] - excess[1], excess[1] - excess[2], 0.3, 0.2)
    assert promised == pytest.approx(excess[2] - excess[3], rel=0.15 if decay < 10 else 0.5)


def test_a_rise_that_does_not_slow_down_goes_on():
    assert convergence.continued(1.0, 1.0, 0.3, 0.2) == pytest.approx(5.0)
    assert convergence.continued(1.0, -0.1, 0.3, 0.2) == 0.0
    assert math.isnan(convergence.continued(math.inf, 1.0, 0.3, 0.2))
