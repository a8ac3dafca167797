"""Values of latents at which a model is run."""

import pyro.distributions as dist
import pyro.distributions.constraints as constraints
import pytest
import torch

from pyro_amortize.places import FARTHER, PLACES, Place
from pyro_amortize.supports import bijection


def site(fn):
    return {"name": "z", "fn": fn, "is_observed": False, "type": "sample"}


PRIORS = {
    "normal": dist.Normal(50.0 * torch.ones(7), 10.0),
    "positive": dist.Gamma(2.0 * torch.ones(7), 1e4),
    "unit": dist.Beta(500.0 * torch.ones(7), 1.0),
    "interval": dist.Uniform(-1e6 * torch.ones(7), 1e6),
    "simplex": dist.Dirichlet(torch.full((7, 3), 0.5)),
    "cholesky": dist.LKJCholesky(3, 1.0).expand([7]),
    "event": dist.Normal(torch.zeros(7, 2), 1.0).to_event(1),
    "masked": dist.Normal(torch.zeros(7), 1.0).mask(torch.arange(7) < 3),
    "improper": dist.ImproperUniform(constraints.positive, (7,), ()),
}
priors = pytest.mark.parametrize("fn", PRIORS.values(), ids=PRIORS.keys())


@priors
def test_values_lie_in_the_support_and_differ(fn):
    for place in (Place(), Place(about_zero=True), Place(spread=0.1)):
        value = place.value(site(fn))
        other = place.another(site(fn), value)
        assert value.shape == other.shape == fn.shape()
        assert bool(fn.support.check(value).all())
        assert bool(fn.support.check(other).all())
        events = tuple(range(1, value.dim()))
        assert bool(((value != other).any(events) if events else value != other).all())


def test_values_lie_where_the_prior_does():
    value = Place().value(site(dist.Normal(torch.full((1000,), 50.0), 10.0)))
    assert abs(float(value.mean()) - 50) < 1
    assert abs(float(value.std()) - 10 * 0.5357) < 0.8  # the median of five draws: Arnold et al., order statistics
    far = Place(spread=10.0).value(site(dist.Normal(torch.full((1000,), 50.0), 10.0)))
    assert abs(float(far.std()) - 100 * 0.5357) < 8


def test_a_place_about_zero_is_there_for_all_priors():
    value = Place(about_zero=True).value(site(dist.Normal(torch.full((1000,), 50.0), 10.0)))
    assert float(value.abs().max()) <= 1


@pytest.mark.parametrize("place", [*PLACES, *FARTHER])
def test_another_value_lies_on_the_other_side_of_the_center(place):
    prior = site(dist.LogNormal(torch.full((50,), 3.0), 0.01))
    center = 0.0 if place.about_zero else 3.0
    value = place.value(prior)
    side = bijection(prior).inv(value) > center
    other = bijection(prior).inv(place.another(prior, value)) > center
    assert bool((side ^ other).all())
    if place.side is None or place.side:
        assert len(side.unique()) == 1


def test_draws_at_the_end_of_a_support_are_made_anew():
    value = Place().value(site(dist.Gamma(torch.full((500,), 1e-4), 1.0)))  # most draws underflow
    assert bool((value > 0).all())


@pytest.mark.parametrize(
    "fn",
    [
        dist.Bernoulli(torch.full((200,), 0.5)),
        dist.Categorical(torch.ones(200, 4)),
        dist.OneHotCategorical(torch.ones(200, 3)),
        dist.Binomial(torch.tensor([3.0, 5.0]).repeat(100), 0.5),
        dist.Poisson(torch.full((200,), 5.0)),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_another_discrete_value_differs(fn):
    value = Place().value(site(fn))
    other = Place().another(site(fn), value)
    assert other.shape == value.shape
    assert bool(fn.support.check(other).all())
    if fn.has_enumerate_support and not isinstance(fn, dist.Binomial):  # others are drawn, until one differs
        same = (other == value).all(-1) if fn.event_shape else other == value
        assert not bool(same.any())
    else:
        assert not torch.equal(other, value)
