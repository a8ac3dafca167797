"""Answers as distributions, against moments known in closed form."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import Posterior
from pyro_amortize.masks import PriorWithoutData
from pyro_amortize.posterior import DRAWS, normal_underneath, prior_median
from pyro_amortize.supports import dressed

LOC, SCALE = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 1.2])
BASE = dist.Normal(LOC, SCALE)


def posterior_of(prior, base=BASE):
    return Posterior({"z": dressed({"name": "z", "fn": prior}, prior, base)}, {"z": ("n",)})


def test_normal_moments_are_exact():
    posterior = posterior_of(BASE)
    assert torch.equal(posterior.mean["z"], LOC)
    assert torch.equal(posterior.stddev["z"], SCALE)
    assert torch.equal(posterior.median["z"], LOC)


def test_lognormal_moments_are_exact():
    posterior = posterior_of(dist.Gamma(torch.ones(2), 1.0))
    exact = torch.distributions.LogNormal(LOC, SCALE)
    torch.testing.assert_close(posterior.mean["z"], exact.mean)
    torch.testing.assert_close(posterior.stddev["z"], exact.stddev)
    torch.testing.assert_close(posterior.median["z"], LOC.exp())


def test_other_moments_come_from_draws_of_a_fixed_seed():
    posterior = posterior_of(dist.Beta(torch.ones(2), 1.0))
    state = torch.get_rng_state()
    mean, stddev = posterior.mean["z"], posterior.stddev["z"]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    assert torch.equal(mean, posterior.mean["z"])
    points = torch.linspace(-8, 8, 20_001)
    density = BASE.log_prob(points[:, None]).exp() * (points[1] - points[0])
    exact = (points.sigmoid()[:, None] * density).sum(0)
    spread = ((points.sigmoid()[:, None] - exact) ** 2 * density).sum(0).sqrt()
    assert bool(((mean - exact).abs() < 4 * spread / math.sqrt(DRAWS)).all())
    torch.testing.assert_close(stddev, spread, rtol=4 / math.sqrt(2 * DRAWS), atol=0)


@pytest.mark.parametrize("limit", [2**21, DRAWS])
def test_moments_where_every_element_has_bounds_of_its_own(limit, monkeypatch):
    monkeypatch.setattr("pyro_amortize.posterior.LIMIT", limit)
    high = torch.tensor([[1.0], [5.0], [9.0]]).expand(3, 2)
    base = dist.Normal(torch.tensor([-1.0, 0.5]).expand(3, 2), 0.8)
    posterior = posterior_of(dist.Uniform(0.0, high), base)
    draws = posterior.sample((20_000,))["z"]
    error = (posterior.mean["z"] - draws.mean(0)).abs() / (draws.std(0) * (1 / DRAWS + 1 / 20_000) ** 0.5)
    assert error.max() < 4.5
    torch.testing.assert_close(posterior.stddev["z"], draws.std(0), rtol=0.06, atol=0.0)
    one = posterior_of(dist.Uniform(0.0, high[2:]), dist.Normal(base.loc[2:], base.scale[2:]))
    torch.testing.assert_close(one.mean["z"], posterior.mean["z"][2:])  # whatever stands beside it


def test_quantiles_are_exact_and_lead():
    levels = [0.025, 0.5, 0.975]
    quantiles = posterior_of(dist.Gamma(torch.ones(2), 1.0)).quantiles(levels)["z"]
    assert quantiles.shape == (3, 2)
    exact = torch.distributions.LogNormal(LOC, SCALE).icdf(torch.tensor(levels)[:, None])
    torch.testing.assert_close(quantiles, exact)


@pytest.mark.parametrize("levels", [[0.5], (0.1, 0.9), torch.tensor([0.1, 0.2, 0.3])], ids=["list", "tuple", "tensor"])
def test_quantiles_take_any_sequence(levels):
    assert posterior_of(BASE).quantiles(levels)["z"].shape == (len(levels), 2)


def test_simplex_quantiles_are_on_the_simplex():
    prior = dist.Dirichlet(torch.ones(5, 3))
    posterior = posterior_of(prior, dist.Normal(torch.randn(5, 2), 1.0))
    quantiles = posterior.quantiles([0.1, 0.9])["z"]
    assert quantiles.shape == (2, 5, 3)
    torch.testing.assert_close(quantiles.sum(-1), torch.ones(2, 5))


def test_samples_and_densities():
    posterior = posterior_of(dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    draws = posterior.sample((7, 3))
    assert draws["z"].shape == (7, 3, 2)
    assert posterior.sample()["z"].shape == (2,)
    log_q = posterior.log_prob(draws)["z"]
    exact = torch.distributions.LogNormal(LOC, SCALE).log_prob(draws["z"]).sum(-1)
    torch.testing.assert_close(log_q, exact)


def test_values_of_part_of_the_sites_are_enough():
    posterior = Posterior({"a": BASE, "b": BASE}, {"a": (), "b": ()})
    assert set(posterior.log_prob({"b": LOC})) == {"b"}


def test_unknown_sites_are_refused():
    with pytest.raises(ValueError, match=r"'y' is no site of the guide. Known: \['z'\]"):
        posterior_of(BASE).log_prob({"y": LOC})


def test_repr_shows_shapes():
    assert repr(posterior_of(BASE)) == "Posterior(z: (2,))"


def test_normal_underneath():
    fn = dressed({"name": "z", "fn": (p := dist.Beta(torch.ones(2), 1.0).to_event(1).mask(False))}, p, BASE)
    base, transforms = normal_underneath(fn)
    assert torch.equal(base.loc, LOC)
    assert len(transforms) == 1
    assert normal_underneath(dist.Gamma(1.0, 1.0)) is None


@pytest.mark.parametrize(
    ("prior", "median"),
    [
        (dist.StudentT(torch.tensor([4.0, 1.0]), torch.tensor([0.5, -2.0]), 1.0), [0.5, -2.0]),
        (dist.StudentT(torch.tensor(4.0, dtype=torch.float64), 1.0, 1.0).expand([2]).to_event(1), [1.0, 1.0]),
        (dist.VonMises(torch.tensor([0.3, 1.0]), 2.0).mask(torch.tensor([True, False])), [0.3, 1.0]),
        (dist.Stable(torch.tensor([1.5, 1.2]), torch.tensor(0.0), 1.0, 0.3), [0.3, 0.3]),
        (dist.MultivariateStudentT(torch.tensor(3.0), torch.tensor([1.0, 2.0]), torch.eye(2)), [1.0, 2.0]),
        (dist.Cauchy(torch.zeros(2), 1.0), [0.0, 0.0]),
        (dist.Beta(torch.tensor([2.0, 0.5]), torch.tensor([2.0, 0.5])), [0.5, 0.5]),
        (dist.LogNormal(torch.zeros(2), 1.0), [1.0, 1.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_medians_of_priors_are_exact_by_symmetry_or_a_quantile_function(prior, median):
    found = prior_median(prior)
    torch.testing.assert_close(found, torch.tensor(median, dtype=found.dtype), atol=1e-6, rtol=0)


def test_other_medians_of_priors_are_those_of_draws():
    """Elements of one prior apart: the first Beta is symmetric; the second's median is 0.38573 (a + b = 5)."""
    found = prior_median(dist.Beta(torch.tensor([2.0, 2.0]), torch.tensor([2.0, 3.0])))
    assert found[0] == 0.5
    assert 1e-5 < (found[1] - 0.38573).abs() < 4 * 1.25 * 0.2 / math.sqrt(DRAWS)
    assert prior_median(dist.Binomial(3, torch.tensor(0.9))) == 3


def test_elements_without_data_have_the_quantiles_of_their_prior():
    """Of many: more numbers than torch's own quantiles take."""
    marks, prior = torch.tensor([True, False]).repeat(2100), dist.StudentT(4.0, torch.ones(4200), 2.0)
    fn = PriorWithoutData(marks, prior, dist.Normal(torch.zeros(4200), 1.0))
    low, middle, high = Posterior({"z": fn}, {"z": ("n",)}).quantiles([0.1, 0.5, 0.9])["z"]
    assert middle.tolist() == [0.0, 1.0] * 2100
    exact = 1 + 2 * 1.53321  # Student's t of 4 degrees of freedom
    assert (high[1::2].mean() - exact).abs() < 0.01
    assert (low[1::2].mean() - (2 - exact)).abs() < 0.01


def test_draws_of_a_prior_without_gradients_leave_the_guides_own():
    scale = torch.tensor([0.5, 0.5], requires_grad=True)
    fn = PriorWithoutData(torch.tensor([True, False]), dist.VonMises(torch.zeros(2), 1.0), dist.Normal(0.0, scale))
    assert fn.has_rsample
    (gradient,) = torch.autograd.grad(fn.rsample().sum(), scale)
    assert gradient[0] != 0
    assert gradient[1] == 0


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.std, r"posterior.stddev\['z'\]"),
        (lambda p: p.quantile(0.5), r"posterior.quantiles\(q\)\['z'\]"),
        (lambda p: p["z"], r"posterior.mean\['z'\]"),
        (lambda p: p.mean(), r"posterior.mean\['z'\]"),
        (lambda p: p.z, r"posterior.mean\['z'\]"),
    ],
    ids=["std", "quantile", "item", "call", "attribute"],
)
def test_names_of_other_libraries_are_answered_by_ours(ask, message):
    posterior = Posterior({"z": dist.Normal(torch.zeros(3), 1.0)}, {"z": ("n",)})
    with pytest.raises((AttributeError, TypeError), match=message):
        ask(posterior)
