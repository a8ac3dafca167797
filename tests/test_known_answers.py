"""Fits and gaps against answers known without the code.

The linear model, probabilistic PCA and Gamma-Poisson of Margossian & Blei (2024) and of textbooks: posteriors,
mean-field optima, evidences and gaps in closed form, all in float64.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_sample

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    Constant,
    Table,
    amortization_gap,
    compare_inference,
    fit_mean_field,
    fit_svi,
    run_mcmc,
)

TAU, SIGMA = 1.155, 2.43
TOTAL = SIGMA**2 + TAU**2


def linear(x):
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(theta + TAU * z, SIGMA), obs=x)


def normal_normal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def gamma_poisson(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


W = torch.as_tensor(np.random.default_rng(0).normal(size=(8, 3)))


def ppca(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, math.sqrt(0.5)).to_event(1), obs=x)


def within(frame, name, answer, errors=4.0, slack=0.0):
    """Every datum's estimate is within some of its own standard errors of the answer, and the mean within three."""
    value, se = (torch.tensor(frame[column].to_numpy()) for column in (name, f"{name}_se"))
    answer = torch.as_tensor(answer).detach().expand(value.shape)
    assert ((value - answer).abs() <= errors * se + slack).all()
    mean_se = se.square().sum().sqrt() / len(se)
    assert abs(float((value - answer).mean())) <= 3 * float(mean_se) + slack


@pytest.fixture(scope="module")
def linear_data():
    torch.manual_seed(11)
    return torch.randn(500, dtype=torch.float64) * math.sqrt(TOTAL)


@pytest.fixture(scope="module", params=[None, MLP(())], ids=["default", "linear-encoder"])
def linear_fit(request, linear_data):
    guide = AutoAmortizedNormal(linear, encoder=request.param)
    return fit_svi(linear, guide, linear_data, seed=0, progress=False)


class TestLinear:
    def test_reaches_the_mean_field_optimum(self, linear_fit):
        assert linear_fit.elbo == pytest.approx(-1216.62897, abs=0.1 + 2 * linear_fit.elbo_se)
        assert linear_fit.converged

    def test_posterior(self, linear_fit, linear_data):
        posterior = linear_fit.guide.posterior(linear_data)
        mean, x = posterior.mean["z"], linear_data - linear_data.mean()
        slope = float((mean * x).sum() / x.square().sum())
        assert slope == pytest.approx(0.159554, abs=0.01)
        assert float(posterior.stddev["z"].mean()) == pytest.approx(0.903169, abs=0.01)
        assert ((posterior.stddev["z"] - 0.903169).abs() < 0.04).all()
        assert float(posterior.mean["theta"]) == pytest.approx(float(linear_data.mean()), abs=0.02)
        assert float(posterior.stddev["theta"]) == pytest.approx(SIGMA / math.sqrt(500), abs=0.01)

    def test_gap_given_theta_vanishes_without_a_warning(self, linear_fit, linear_data):
        report = amortization_gap(linear, linear_fit.guide, linear_data, progress=False)
        assert report.warnings == ()
        within(report.per_datum, "approximation_gap", 0.0, slack=2e-3)
        assert abs(report.totals.loc["amortization_gap", "total"]) < 0.1
        theta = report.given["theta"]
        evidence = dist.Normal(theta, math.sqrt(TOTAL)).log_prob(linear_data)
        within(report.per_datum, "log_evidence", evidence, slack=1e-3)

    def test_mean_field_and_its_gap_to_the_evidence(self, linear_data):
        fit = fit_mean_field(linear, linear_data, seed=0, progress=False)
        assert fit.elbo == pytest.approx(-1216.62897, abs=0.1 + 2 * fit.elbo_se)
        assert -1216.52714 - fit.elbo == pytest.approx(0.101845, abs=0.1 + 2 * fit.elbo_se)

    def test_mean_field_from_the_amortized_answer(self, linear_fit, linear_data):
        fit = fit_mean_field(linear, linear_data, start=linear_fit.guide, num_steps=300, seed=0, progress=False)
        assert fit.elbo == pytest.approx(-1216.62897, abs=0.1 + 2 * fit.elbo_se)

    def test_const_gap(self, linear_data):
        guide = AutoAmortizedNormal(linear, encoder=Constant())
        fit_svi(linear, guide, linear_data, seed=0, progress=False)
        report = amortization_gap(linear, guide, linear_data, progress=False)
        answer = float((linear_data - linear_data.mean()).square().sum()) / 2 * (1 / SIGMA**2 - 1 / TOTAL)
        total, se = report.totals.loc["amortization_gap"]
        assert total == pytest.approx(answer, abs=4 * se + 0.02 * answer)
        assert len(report.warnings) == 1
        assert "Constant" in report.warnings[0]

    def test_mcmc_and_what_mean_field_understates(self):
        torch.manual_seed(5)
        x = torch.randn(20, dtype=torch.float64) * math.sqrt(TOTAL)
        comparison = compare_inference(
            linear,
            x,
            svi={"num_steps": 1500},
            mcmc={"num_samples": 500, "warmup_steps": 200, "num_chains": 2},
            progress=False,
        )
        fit = comparison.fits["mcmc"]
        draws = fit.samples["theta"]
        effective = float(fit.ess["theta"])
        variance = TOTAL / (20 + TOTAL / 100)
        assert float(draws.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / effective))
        assert float(draws.mean()) == pytest.approx(float(x.mean()), abs=4 * math.sqrt(variance / effective) + 0.05)
        # The factor is 0.815715 under a flat prior; this one is wide.
        answer = math.sqrt((20 / TOTAL + 0.01) / (20 / SIGMA**2 + 0.01))
        assert answer**2 == pytest.approx(0.815715, abs=1e-3)
        for method in ("amortized", "mean_field"):
            theta, z = (comparison.moments.loc[(method, site)] for site in ("theta", "z"))
            assert theta["sd_ratio"] == pytest.approx(answer, abs=4 * theta["sd_ratio_se"] + 0.02)
            narrow = (1 - answer) * 1.645  # quantiles of a normal with the right mean
            assert theta["q05_error"] == pytest.approx(narrow, abs=4 * theta["q05_error_se"] + 0.05)
            assert z["mean_error"] < 2 * z["mean_error_se"] + 0.05
        assert comparison.table.loc["mean_field", "break_even_rows"] > 0


def nonlinear(x):
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(theta + z * (1 + z.sin()), z.cos().exp()), obs=x)


class TestNonlinear:
    """Margossian & Blei (2024), 4.3: the ELBO of mean-field inference has optima in each datum's latent."""

    def test_a_warm_start_reaches_what_a_random_one_does_not(self):
        torch.manual_seed(1789)
        theta, z, noise = torch.randn(1), 5 * torch.randn(300), torch.randn(300)
        x = (theta + z * (1 + z.sin()) + z.cos().exp() * noise).double()
        options = {"num_steps": 600, "lr": 0.01, "seed": 0, "progress": False}
        amortized = AutoAmortizedNormal(nonlinear, encoder=MLP((16,)))
        fit_svi(nonlinear, amortized, x, **options)
        random = AutoAmortizedNormal(nonlinear, encoder=Table(), init_loc_fn=init_to_sample)
        fits = {
            "amortized": amortized,
            "random": fit_svi(nonlinear, random, x, **options),
            "warm": fit_mean_field(nonlinear, x, start=amortized, **options),
        }
        table = compare_inference(nonlinear, x, methods=fits, progress=False).table
        for name in ("amortized", "random"):
            assert table.loc[name, "gap"] > 5 + 4 * table.loc[name, "gap_se"]
        assert table.loc["warm", "gap"] == 0


class TestPPCA:
    def test_diagonal_gap_and_evidence(self):
        torch.manual_seed(0)
        z = torch.randn(100, 3, dtype=torch.float64)
        data = z @ W.T + math.sqrt(0.5) * torch.randn(100, 8, dtype=torch.float64)
        guide = AutoAmortizedNormal(ppca, encoder=MLP(()))
        fit_svi(ppca, guide, data, seed=0, progress=False)
        report = amortization_gap(ppca, guide, data, progress=False)
        assert report.warnings == ()
        within(report.per_datum, "approximation_gap", 0.290920, slack=5e-3)
        marginal = dist.MultivariateNormal(W.new_zeros(8), W @ W.T + 0.5 * torch.eye(8, dtype=W.dtype))
        within(report.per_datum, "log_evidence", marginal.log_prob(data))
        assert abs(report.summary().loc["amortization_gap", "mean"]) < 0.01


class TestGammaPoisson:
    def test_log_normal_gap(self):
        x = torch.tensor([0.0, 1.0, 3.0, 10.0] * 8, dtype=torch.float64)
        guide = AutoAmortizedNormal(gamma_poisson)
        fit_svi(gamma_poisson, guide, x, seed=0, progress=False)
        report = amortization_gap(gamma_poisson, guide, x, progress=False)
        assert report.warnings == ()
        answer = torch.tensor([0.041341, 0.027678, 0.016645, 0.006943] * 8, dtype=torch.float64)
        within(report.per_datum, "approximation_gap", answer, slack=2e-3)
        log_mean = torch.log((2 + x) / 2) - 1 / (2 * (2 + x))
        optimum = report.optimum.guide.posterior(x)
        torch.testing.assert_close(optimum.median["rate"].log(), log_mean, atol=0.03, rtol=0)

    def test_an_exact_guide_written_by_hand_is_good(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("rate", dist.Gamma(2 + x, 2.0))

        x = torch.tensor([0.0, 1.0, 3.0, 10.0], dtype=torch.float64)
        report = amortization_gap(gamma_poisson, guide, x, progress=False)
        assert (report.per_datum["khat"] < 0.7).all()
        assert report.per_datum["inference_gap"].abs().max() < 1e-6
        assert report.per_datum["amortization_gap"].isna().all()
        assert "rate" in report.warnings[0]


class TestNormalNormal:
    def test_const_costs_a_quarter_of_the_variance(self):
        torch.manual_seed(1)
        x = math.sqrt(2) * torch.randn(300, dtype=torch.float64)
        guide = AutoAmortizedNormal(normal_normal, encoder=Constant())
        fit_svi(normal_normal, guide, x, seed=0, progress=False)
        report = amortization_gap(normal_normal, guide, x, progress=False)
        total, se = report.totals.loc["amortization_gap"]
        assert total == pytest.approx(300 * float(x.var(unbiased=False)) / 4, abs=4 * se + 0.5)
        assert [warning for warning in report.warnings if "Constant" not in warning] == []

    @pytest.mark.parametrize("narrow", [0.6, 0.8, 0.9])
    def test_k_hat_of_a_guide_that_is_too_narrow(self, narrow):
        def guide(x):
            with pyro.plate("data", len(x)):
                q = dist.MultivariateNormal(x[:, None] / 2, 0.5 * narrow**2 * torch.eye(1, dtype=x.dtype))
                pyro.sample("z", Squeezed(q))

        x = torch.zeros(20, dtype=torch.float64) + torch.linspace(-1, 1, 20, dtype=torch.float64)
        report = amortization_gap(normal_normal, guide, x, num_draws=20_000, progress=False)
        assert float(report.per_datum["khat"].mean()) == pytest.approx(1 - narrow**2, abs=0.15)
        exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x)
        within(report.per_datum, "log_evidence", exact, errors=5.0, slack=2e-3)
        assert (report.per_datum["inference_gap"] > 0).all()


class Squeezed(dist.TorchDistribution):
    """A one-dimensional normal that no one recognizes as such."""

    has_rsample = True
    arg_constraints = {}  # noqa: RUF012
    support = dist.constraints.real

    def __init__(self, base):
        self.base = base
        super().__init__(base.batch_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Squeezed(self.base.expand(batch_shape))

    def rsample(self, sample_shape=()):
        return self.base.rsample(sample_shape)[..., 0]

    def log_prob(self, value):
        return self.base.log_prob(value[..., None])


def test_nuts_draws_from_the_exact_posterior_with_globals_held():
    torch.manual_seed(2)
    x = torch.randn(3, dtype=torch.float64)
    fit = run_mcmc(
        linear,
        x,
        given={"theta": x.new_tensor(0.5)},
        num_samples=500,
        warmup_steps=200,
        num_chains=2,
        seed=0,
        progress=False,
    )
    assert set(fit.samples) == {"z"}
    assert fit.samples["z"].shape == (2, 500, 3)
    se = 0.903169 / fit.ess["z"].sqrt()
    mean, sd = TAU * (x - 0.5) / TOTAL, math.sqrt(SIGMA**2 / TOTAL)
    assert ((fit.samples["z"].mean((0, 1)) - mean).abs() < 4 * se).all()
    assert float(fit.samples["z"].flatten(0, 1).std(0).mean()) == pytest.approx(sd, rel=0.1)
    assert fit.divergences == 0
