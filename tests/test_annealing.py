"""Annealed importance sampling of densities whose integrals are known without it."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_amortize.annealing import annealed_log_weights
from pyro_amortize.evidence import standard_error

LOG_2PI = math.log(2 * math.pi)


def estimate(found):
    """Log evidence of each row, and its standard error."""
    value = found.log_weights.logsumexp(0) - math.log(len(found.log_weights))
    return value, standard_error((found.log_weights - value).exp() - 1)


def pooled(found):
    """Log evidence from the weights of all rows, where these are alike, and its standard error."""
    rows, _ = estimate(found)
    value = rows.logsumexp(0) - math.log(len(rows))
    return value, standard_error((rows - value).exp() - 1)


def correlated(rows, dim, dtype, condition=100.0):
    """A Gaussian density a row, unnormalized: itself, its mean, mean-field optimal scales, covariance, log integral."""
    basis, _ = torch.linalg.qr(torch.randn(rows, dim, dim, dtype=torch.float64))
    precisions = torch.logspace(0, math.log10(condition), dim, dtype=torch.float64)
    precision = torch.einsum("nij,j,nkj->nik", basis, precisions, basis)
    mean = torch.randn(rows, dim, dtype=torch.float64)

    def log_p(values):
        away = values - mean.to(dtype)
        return 3.0 - 0.5 * torch.einsum("cnd,nde,cne->cn", away, precision.to(dtype), away)

    scale = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    log_integral = 3.0 + 0.5 * dim * LOG_2PI - 0.5 * float(precisions.log().sum())
    return log_p, mean.to(dtype), scale.to(dtype), torch.linalg.inv(precision), log_integral


def isotropic(values):
    return -0.5 * values.square().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 10, 50])
def test_gaussian_from_a_start_that_is_off_and_too_narrow(dim, dtype):
    log_p, mean, scale, _, truth = correlated(8, dim, dtype)
    found = annealed_log_weights(log_p, mean + 3 * scale, scale / 2)
    value, error = estimate(found)
    assert ((value - truth).abs() < 4 * error).all()
    assert float(error.max()) < 0.3
    assert float(found.log_weights.std(0).mean()) < 1.0
    assert ((found.accept > 0.6) & (found.accept < 0.9)).all()
    assert found.log_weights.dtype == torch.float64
    assert found.values.dtype == dtype
    assert found.values.shape == (64, 8, dim)


def test_weighted_values_are_draws_of_the_posterior():
    log_p, mean, scale, covariance, _ = correlated(4, 3, torch.float64, condition=10.0)
    found = annealed_log_weights(log_p, mean + scale, scale / 2, num_chains=2000, num_temperatures=40)
    weights = found.log_weights.softmax(0)
    away = found.values - mean
    effective = 1 / weights.square().sum(0)
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    of_mean = torch.einsum("cn,cnd->nd", weights, away) / deviation
    assert (of_mean.abs() < 4 / effective.sqrt()[:, None]).all()
    of_variance = torch.einsum("cn,cnd->nd", weights, away.square()) / deviation.square() - 1
    assert (of_variance.abs() < 4 * (2 / effective).sqrt()[:, None]).all()


def bimodal(values):
    return torch.logaddexp(-2 * (values - 1.5).square().sum(-1), math.log(0.5) - 2 * (values + 1.5).square().sum(-1))


def banana(values):
    return -0.5 * values[..., 0].square() - 0.5 * ((values[..., 1] - 0.5 * values[..., 0].square()) / 0.7).square()


@pytest.mark.parametrize("log_p", [bimodal, banana])
def test_curved_and_separate_masses(log_p):
    grid = torch.arange(-8, 14, 0.02, dtype=torch.float64)
    truth = log_p(torch.cartesian_prod(grid, grid)).logsumexp(0) + 2 * math.log(0.02)
    found = annealed_log_weights(log_p, torch.zeros(40, 2), torch.full((40, 2), 1.5))
    value, error = pooled(found)
    assert abs(value - truth) < 4 * error
    assert error < 0.03


@pytest.mark.parametrize("dim", [1, 10])
def test_heavy_tails(dim):
    def log_p(values):
        return dist.StudentT(3.0).log_prob(values).sum(-1)

    found = annealed_log_weights(log_p, torch.ones(20, dim), torch.full((20, dim), 0.5))
    value, error = pooled(found)
    assert abs(value) < 4 * error
    assert error < 0.05
    assert float(estimate(found)[1].median()) < 0.06


def test_bounded_support():
    def log_p(values):
        return torch.where((values > 0).all(-1), -values.sum(-1), -torch.inf)

    found = annealed_log_weights(log_p, torch.ones(20, 2), torch.ones(20, 2), num_temperatures=60)
    value, error = pooled(found)
    assert abs(value) < 4 * error
    assert error < 0.1
    inside = found.log_weights.isfinite()
    assert 0.5 < float(inside.double().mean()) < 0.95
    assert torch.equal((found.values > 0).all(-1), inside)


def test_mean_weight_is_unbiased_and_its_log_a_lower_bound_however_few_the_moves():
    def log_p(values):  # correlation 0.95
        x, y = values.unbind(-1)
        return -0.5 * (x.square() + y.square() - 1.9 * x * y) / (1 - 0.95**2)

    truth = LOG_2PI + 0.5 * math.log(1 - 0.95**2)
    repeats = []
    for seed in range(5):
        torch.manual_seed(seed)
        start = torch.ones(1000, 2), torch.full((1000, 2), 0.6)
        found = annealed_log_weights(log_p, *start, num_chains=4, num_temperatures=8)
        repeats.append(estimate(found)[0] - truth)
    logs = torch.cat(repeats)
    ratio = logs.exp()
    assert abs(ratio.mean() - 1) < 4 * standard_error(ratio)
    assert standard_error(ratio) < 0.03
    assert logs.mean() < -10 * standard_error(logs)


def test_intervals_cover_the_truth_at_the_stated_rate():
    log_p, mean, scale, _, truth = correlated(400, 5, torch.float32)
    value, error = estimate(annealed_log_weights(log_p, mean + scale, scale / 2, num_temperatures=40))
    covered = ((value - truth).abs() < 1.96 * error).double().mean()
    assert 0.88 < float(covered) < 0.99


def test_what_happens_in_a_row_stays_there():
    def broken(values):
        factor = torch.tensor([torch.nan, 1.0, 1e4, 1.0])
        return isotropic(values) * factor

    torch.manual_seed(0)
    first = annealed_log_weights(broken, torch.zeros(4, 3), torch.ones(4, 3), num_temperatures=20)
    torch.manual_seed(0)
    plain = annealed_log_weights(isotropic, torch.zeros(4, 3), torch.ones(4, 3), num_temperatures=20)
    assert torch.equal(first.log_weights[:, [1, 3]], plain.log_weights[:, [1, 3]])
    assert (first.log_weights[:, 0] == -torch.inf).all()
    assert float(first.accept[0]) == 0.0
    assert first.values.isfinite().all()


def test_chains_of_the_run_that_counts_know_nothing_of_each_other():
    def weights(factor):
        def log_p(values):  # the first chain of that run is another one; pilots are as they were
            factors = torch.ones(len(values), 1)
            factors[0] = factor if len(values) == 24 else 1.0
            return factors * isotropic(values)

        torch.manual_seed(0)
        start = torch.zeros(2, 3), torch.ones(2, 3)
        return annealed_log_weights(log_p, *start, num_chains=24, num_temperatures=20).log_weights

    assert torch.equal(weights(1e4)[1:], weights(1.0)[1:])
    assert not torch.equal(weights(1e4)[0], weights(1.0)[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_trajectory_into_what_is_not_finite_is_rejected(bad):
    def log_p(values):
        return torch.where(values[..., 0].abs() > 1, bad, isotropic(values))

    found = annealed_log_weights(log_p, torch.zeros(20, 2), torch.full((20, 2), 0.5), num_temperatures=40)
    value, error = pooled(found)
    assert abs(value - LOG_2PI - math.log(math.erf(1 / math.sqrt(2)))) < 4 * error
    assert error < 0.03


def test_a_gradient_that_is_not_finite_stays_with_its_chain():
    def log_p(values):  # beyond 1 the value is right, and its gradient not a number
        beyond = (values[..., 0] - 1).relu()
        return isotropic(values) + 0 * torch.where(beyond > 0, beyond - beyond, 1.0).sqrt()

    values = torch.tensor([[0.0, 0.0], [2.0, 0.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(log_p(values).sum(), values)
    assert grad.isfinite().all(-1).tolist() == [True, False]
    found = annealed_log_weights(log_p, torch.zeros(20, 2), torch.ones(20, 2), num_temperatures=40)
    value, error = pooled(found)
    assert abs(value - LOG_2PI) < 4 * error
    assert error < 0.03


def test_calls_of_log_p_are_one_a_leapfrog_step_and_leave_nothing_behind():
    weight = torch.ones((), requires_grad=True)
    calls = []

    def log_p(values):
        calls.append(len(values))
        return weight * isotropic(values)

    found = annealed_log_weights(
        log_p, torch.zeros(2, 3), torch.ones(2, 3), num_chains=24, num_temperatures=40, num_leapfrog=3
    )
    start, moves = 1, 38 + 1  # after each temperature but the last
    assert calls.count(16) == calls.count(24) == start + 3 * moves
    assert calls.count(64) == 4 * (start + 3 * 9)
    assert weight.grad is None
    assert not found.log_weights.requires_grad
    assert not found.values.requires_grad


def test_same_seed_same_weights():
    def weights():
        torch.manual_seed(5)
        return annealed_log_weights(isotropic, torch.zeros(2, 3), torch.ones(2, 3), num_temperatures=8).log_weights

    assert torch.equal(weights(), weights())


def test_one_temperature_is_plain_importance_sampling():
    found = annealed_log_weights(isotropic, torch.zeros(3, 1), torch.ones(3, 1), num_chains=500, num_temperatures=1)
    value, error = estimate(found)
    assert ((value - 0.5 * LOG_2PI).abs() < 4 * error + 1e-6).all()
    assert torch.equal(found.accept, torch.zeros(3, dtype=torch.float64))


def test_error_names_the_shape_of_log_p():
    with pytest.raises(ValueError, match=r"Expected log_p to return \(chains, rows\) = \(64, 2\).*got \(64, 2, 3\)"):
        annealed_log_weights(torch.square, torch.zeros(2, 3), torch.ones(2, 3))


def test_progress_is_shown_on_demand_only(capsys, terminal):
    for progress in (False, True):
        annealed_log_weights(
            isotropic, torch.zeros(1, 1), torch.ones(1, 1), num_temperatures=4, num_chains=2, progress=progress
        )
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("Annealing: 100%" in captured.err) == progress
