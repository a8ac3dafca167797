"""Parameters, turned into distributions."""

import pytest
import torch

from pyro_amortize.families import FAMILIES, Normal


def test_known_families():
    assert FAMILIES["normal"] is Normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 1.0, 19.0, 25.0, 1e4])
def test_parameters_give_back_the_moments(scale, dtype):
    loc = torch.randn(4, 3, dtype=dtype)
    parameters = Normal().parameters(loc, torch.full_like(loc, scale))
    assert parameters.shape == (4, 6)
    q = Normal().distribution(parameters[:, :3], parameters[:, 3:])
    torch.testing.assert_close(q.loc, loc)
    torch.testing.assert_close(q.scale, torch.full_like(loc, scale), rtol=1e-4, atol=0)


@pytest.mark.parametrize("raw", [-1e4, -100.0, 0.0, 1e4])
def test_scales_stay_positive_and_finite(raw):
    value = torch.tensor([raw], requires_grad=True)
    q = Normal().distribution(torch.zeros(1), value)
    assert bool((q.scale > 0).all())
    assert bool(torch.isfinite(q.scale).all())
    q.scale.sum().backward()
    assert bool(torch.isfinite(value.grad).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_densities_are_finite_where_the_scale_underflows(dtype):
    raw = torch.full((3,), -1e4, dtype=dtype, requires_grad=True)
    loc = torch.tensor([0.0, 1.0, -32.0], dtype=dtype, requires_grad=True)
    q = Normal().distribution(loc, raw)
    density = q.log_prob(q.rsample())
    assert bool(density.isfinite().all())
    assert bool(torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0 * loc, 3.0)).isfinite().all())
    density.sum().backward()
    assert bool(raw.grad.isfinite().all())
    assert bool(loc.grad.isfinite().all())


def test_no_event_dimensions():
    q = Normal().distribution(torch.zeros(4, 3), torch.zeros(4, 3))
    assert q.batch_shape == (4, 3)
    assert q.event_shape == ()
