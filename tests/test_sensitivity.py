"""How a gap changes with the globals, where it is known in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import amortization_gap

X = 1.5 * torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SD, WIDTH = 0.5, 0.1
FAST = {"num_draws": 500, "num_steps": 60, "num_particles": 8, "num_training_steps": 0, "progress": False}


def added(x):
    """Two latents a datum that only their sum is seen of."""
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0).expand(torch.Size()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), sd), obs=x)


def posterior(log_sd):
    """Means, shape (rows, 2), and precision of the latents of each datum."""
    precision = torch.eye(2, dtype=X.dtype) + (-2 * log_sd).exp() * torch.ones(2, 2, dtype=X.dtype)
    return (X / (2 + (2 * log_sd).exp()))[:, None].expand(-1, 2), precision


def guide(correlated):
    mean, precision = posterior(torch.tensor(math.log(SD), dtype=X.dtype))

    def guide(x):
        pyro.sample("sd", dist.LogNormal(x.new_tensor(math.log(SD)), WIDTH))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, precision.diagonal().rsqrt()).to_event(1))

    return guide


def test_the_slope_is_that_of_the_divergence():
    """Of independent normals, the optimum at one place, from the posterior at others."""
    log_sd = torch.tensor(math.log(SD), dtype=X.dtype, requires_grad=True)
    mean, precision = (value.detach() for value in posterior(log_sd))
    own = dist.MultivariateNormal(mean, torch.diag(1 / precision.diagonal()))
    there, there_precision = posterior(log_sd)
    gap = torch.distributions.kl_divergence(own, dist.MultivariateNormal(there, precision_matrix=there_precision))
    (exact,) = torch.autograd.grad(gap.sum(), log_sd)
    report = amortization_gap(added, guide(False), X, **FAST)
    slope, se = report.sensitivity.loc["sd"]
    assert slope == pytest.approx(WIDTH * float(exact), abs=4 * se)
    assert abs(slope) > 10 * se
    (text,) = [text for text in report.warnings if "globals fitted under a gap" in text]
    assert f"'sd' {slope:.2f}"[:7] in text
    assert "sd" in str(report).split("posterior sd of a global")[1]
    given = amortization_gap(added, guide(False), X, given={"sd": torch.tensor(SD, dtype=X.dtype)}, **FAST)
    assert given.sensitivity is None


def test_globals_are_not_biased_where_there_is_no_gap():
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
        sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, sd), obs=x)

    def exact(x):
        theta, sd = torch.tensor([0.2, SD], dtype=x.dtype)
        pyro.sample("theta", dist.Normal(theta, 0.1))
        pyro.sample("sd", dist.LogNormal(sd.log(), 0.05))
        with pyro.plate("data", len(x)):
            precision = 1 + sd**-2
            pyro.sample("z", dist.Normal((theta + x / sd**2) / precision, precision.rsqrt()))

    report = amortization_gap(model, exact, X, **FAST)
    assert (report.sensitivity["slope"].abs() < 4 * report.sensitivity["slope_se"]).all()
    assert report.sensitivity["slope_se"].max() < 0.5
    assert report.warnings == ()


def test_globals_of_pyros_own_guide_are_scaled_by_its_draws():
    """Those have normals on an auxiliary site, and a point mass at the latent itself."""
    from pyro.infer.autoguide import AutoNormalMessenger

    torch.manual_seed(0)
    mine = AutoNormalMessenger(added)
    mine(X)
    report = amortization_gap(added, mine, X, **FAST)
    assert list(report.sensitivity.index) == ["sd"]
