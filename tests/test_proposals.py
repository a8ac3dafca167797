"""Proposals that follow the posterior, by the evidence that they give where it is known."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import AutoAmortizedNormal, amortization_gap, fit_svi

GRID = torch.linspace(-7, 7, 28_001, dtype=torch.float64)[:, None]
FAST = {"num_draws": 500, "num_steps": 100, "num_particles": 8, "num_training_steps": 0, "progress": False}


def by_quadrature(log_density):
    """Log integral of a density over the line, its values on the grid of shape (grid, rows)."""
    return log_density.logsumexp(0) + math.log(float(GRID[1] - GRID[0]))


def covers(report, exact, errors=4.0):
    """Totals, and each datum within so many errors of it; the logarithm of a mean leaves 0.01 where weights vary."""
    error = report.per_datum["log_evidence"].to_numpy() - exact.double().numpy()
    assert (np.abs(error) < errors * report.per_datum["log_evidence_se"] + 0.01).all()
    total, se = report.totals.loc["log_evidence"]
    assert total == pytest.approx(float(exact.sum()), abs=errors * se + 0.01 * len(exact))


def factor_model(dim, width, noise, rows=3):
    """A linear Gaussian model with a posterior that is normal, its mean-field optimum, evidence and gap."""
    rng = torch.Generator().manual_seed(0)
    loadings, z, eps = (
        torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((dim, width), (rows, dim), (rows, width))
    )
    x = z @ loadings + noise * eps
    precision = torch.eye(dim, dtype=x.dtype) + loadings @ loadings.T / noise**2
    mean = torch.linalg.solve(precision, (x @ loadings.T / noise**2).T).T

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings, noise).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, precision.diagonal().rsqrt()).to_event(1))

    covariance = loadings.T @ loadings + noise**2 * torch.eye(width, dtype=x.dtype)
    evidence = dist.MultivariateNormal(x.new_zeros(width), covariance).log_prob(x)
    return model, guide, x, evidence, float((precision.diagonal().log().sum() - torch.logdet(precision)) / 2)


@pytest.mark.parametrize(("dim", "width", "noise"), [(8, 20, 0.5), (20, 18, 0.1), (50, 48, 0.05), (100, 110, 1.0)])
def test_posteriors_of_strong_correlations(dim, width, noise):
    model, guide, x, evidence, gap = factor_model(dim, width, noise)
    report = amortization_gap(model, guide, x, **FAST)
    covers(report, evidence)
    assert report.per_datum["log_evidence_se"].max() < 0.1
    (text,) = report.advice
    told = float(text.split("of a datum make ")[1].split()[0])
    assert told == pytest.approx(gap, rel=0.005)


def square(x):
    """Two modes a datum, of equal mass."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)


def on_one_side(x):
    """Laplace's approximation of the mode on the right, of one that lies between for the smallest data."""
    with pyro.plate("data", len(x)):
        top = (x - 0.045).clamp(min=0.05).sqrt()
        pyro.sample("z", dist.Normal(top, 0.15 / top.clamp(min=0.5)))


def test_a_second_mode_is_counted_and_told():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2 + 0.01
    evidence = by_quadrature(dist.Normal(0.0, 1.0).log_prob(GRID) + dist.Normal(GRID**2, 0.3).log_prob(x))
    report = amortization_gap(square, on_one_side, x, **{**FAST, "num_steps": 300})
    covers(report, evidence)
    apart = x.numpy() > 1  # of the others some modes run together
    gaps = report.per_datum["approximation_gap"][apart]
    assert gaps.median() == pytest.approx(math.log(2), abs=0.03)
    assert gaps.min() > math.log(2) - 0.1
    (text,) = [text for text in report.warnings if "other modes" in text]
    assert int(text.split("posterior of ")[1].split()[0]) >= apart.sum()
    assert "one mode" in text


def test_modes_of_several_latents():
    """Four modes a datum, all of which count."""

    def squares(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z**2, 0.1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.05 / x.sqrt()).to_event(1))

    x = 0.3 + torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_density = dist.Normal(0.0, 1.0).log_prob(GRID) + dist.Normal(GRID**2, 0.1).log_prob(x.flatten())
    report = amortization_gap(squares, guide, x, **FAST)
    covers(report, by_quadrature(log_density).reshape(12, 2).sum(-1))
    assert any("posterior of 12 of 12 data" in text for text in report.warnings)


def test_a_funnel_has_one_mode_and_no_more_mass_than_it_has():
    """Also where the density grows without bound in ever smaller places, which draws of the machine cannot resolve."""

    def funnel(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3, 0.9))
            rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
            pyro.sample("x", dist.Normal(z, rate), obs=x)

    x = 1.5 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    rates = torch.linspace(1e-4, 15, 30_000)[:, None]
    log_density = dist.Gamma(2.0, 2.0).log_prob(rates) + dist.Normal(0.3, (0.81 + rates**2).sqrt()).log_prob(x)
    exact = log_density.double().logsumexp(0) + math.log(float(rates[1] - rates[0]))
    guide = AutoAmortizedNormal(funnel)
    fit_svi(funnel, guide, x, num_steps=200, lr=0.02, seed=0, progress=False)
    covers(amortization_gap(funnel, guide, x, **FAST), exact)


def test_nested_latents_that_hang_together():
    def nested(x):
        with pyro.plate("data", len(x), dim=-2):
            mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
            with pyro.plate("repeats", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Normal(mean, 0.3))
                pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    rng = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(15, 1, generator=rng) + 0.4 * torch.randn(15, 8, generator=rng)
    covariance = 9 * torch.ones(8, 8) + 0.18 * torch.eye(8)
    guide = AutoAmortizedNormal(nested)
    fit_svi(nested, guide, x, num_steps=200, lr=0.02, seed=0, progress=False)
    report = amortization_gap(nested, guide, x, **FAST)
    covers(report, dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(x))
    assert not any("modes" in text for text in report.warnings)
