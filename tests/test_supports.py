"""Bijections, and q taken to the support of a prior."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch.distributions import kl_divergence
from torch.distributions.transforms import AffineTransform, ExpTransform

from pyro_amortize import AutoAmortizedNormal, CompiledTrace_ELBO, Table
from pyro_amortize.masks import PriorAlone
from pyro_amortize.supports import (
    bijection,
    dressed,
    generic_value,
    init_to_center,
    is_delta,
    unconstrained_shape,
)

PRIORS = {
    "real": (dist.Normal(torch.zeros(3), 1.0), (3,)),
    "vector": (dist.Normal(torch.zeros(3, 2), 1.0).to_event(1), (3, 2)),
    "mvn": (dist.MultivariateNormal(torch.zeros(3, 2), torch.eye(2)), (3, 2)),
    "positive": (dist.Gamma(torch.ones(3), 1.0), (3,)),
    "half-normal": (dist.HalfNormal(torch.ones(3)), (3,)),
    "positive-vector": (dist.LogNormal(torch.zeros(3, 2), 1.0).to_event(1), (3, 2)),
    "unit": (dist.Beta(torch.ones(3), 1.0), (3,)),
    "interval": (dist.Uniform(torch.full((3,), -1.0), 2.0), (3,)),
    "greater-than": (dist.Pareto(torch.ones(3), 2.0), (3,)),
    "simplex": (dist.Dirichlet(torch.ones(3, 4)), (3, 3)),
    "simplex-rows": (dist.Dirichlet(torch.ones(3, 2, 4)).to_event(1), (3, 2, 3)),
    "cholesky": (dist.LKJCholesky(3, torch.ones(())).expand([3]), (3, 3)),
    "mixture": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 2)), dist.Gamma(torch.ones(3, 2), 1.0)),
        (3,),
    ),
    "transformed": (dist.TransformedDistribution(dist.Beta(torch.ones(3), 1.0), AffineTransform(2.0, -1.0)), (3,)),
    "transformed-vector": (
        dist.TransformedDistribution(
            dist.Gamma(torch.ones(3, 2), 1.0).to_event(1), [ExpTransform(), AffineTransform(1.0, 2.0)]
        ),
        (3, 2),
    ),
    "some-open": (dist.GeneralizedPareto(torch.zeros(3), 1.0, torch.tensor([-0.5, 0.0, 0.5])), (3,)),
    "improper": (dist.ImproperUniform(constraints.positive, (3,), ()), (3,)),
    "masked": (dist.Gamma(torch.ones(3, 2), 1.0).mask(torch.tensor([True, False])).to_event(1), (3, 2)),
}
priors = pytest.mark.parametrize(("prior", "shape"), PRIORS.values(), ids=PRIORS.keys())


def site(fn):
    return {"name": "z", "fn": fn, "value": None, "type": "sample"}


@priors
def test_unconstrained_shape(prior, shape):
    assert unconstrained_shape(site(prior)) == shape


@priors
def test_q_has_the_priors_support_and_shapes(prior, shape):
    base = dist.Normal(torch.randn(shape), torch.rand(shape) + 0.1)
    q = dressed(site(prior), prior, base)
    assert q.batch_shape == prior.batch_shape
    assert q.event_shape == prior.event_shape
    value = q.rsample()
    assert bool(prior.support.check(value).all())
    assert q.log_prob(value).shape == prior.batch_shape


@priors
def test_density_of_q_is_that_of_the_normal_less_the_jacobian(prior, shape):
    base = dist.Normal(torch.randn(shape, dtype=torch.float64), 0.7)
    q = dressed(site(prior), prior, base)
    value = q.sample()
    transform = bijection(site(prior))
    raw = transform.inv(value)
    log_normal = base.log_prob(raw)
    jacobian = transform.log_abs_det_jacobian(raw, value)
    weights = torch.tensor([1.0, 0.0]) if isinstance(getattr(prior, "base_dist", None), dist.MaskedDistribution) else 1
    expected = (log_normal * weights).reshape(3, -1).sum(-1) - (jacobian * weights).reshape(3, -1).sum(-1)
    torch.testing.assert_close(q.log_prob(value), expected)


def test_reals_stay_plain_normals_and_positives_exponentiate():
    normal = dist.Normal(torch.zeros(3), 1.0)
    assert dressed(site(normal), normal, normal) is normal
    gamma = dist.Gamma(torch.ones(3), 1.0)
    (transform,) = dressed(site(gamma), gamma, normal).transforms
    assert isinstance(transform, ExpTransform)


@pytest.mark.parametrize("prior", ["real", "positive"])
def test_kl_has_a_closed_form(prior):
    fn = dist.Normal(torch.zeros(3), 1.0) if prior == "real" else dist.LogNormal(torch.zeros(3), 1.0)
    q = dressed(site(fn), fn, dist.Normal(torch.ones(3), 1.0))
    torch.testing.assert_close(torch.distributions.kl_divergence(q, fn), torch.full((3,), 0.5))


def test_extreme_values_keep_their_density():
    prior = dist.Uniform(torch.zeros(1), 1.0)
    q = dressed(site(prior), prior, dist.Normal(torch.full((1,), 30.0), 0.1))
    assert bool(torch.isfinite(q.log_prob(q.rsample())).all())


@priors
@pytest.mark.parametrize("value", [generic_value, lambda s: init_to_center(s)], ids=["generic", "center"])
def test_values_to_start_from_lie_in_the_support(prior, shape, value):
    start = value(site(prior))
    assert start.shape == prior.shape()
    assert bool(prior.support.check(start).all())


def test_generic_values_differ_between_elements():
    assert len(generic_value(site(dist.Gamma(torch.ones(50), 1.0))).unique()) == 50


def test_generic_values_keep_the_dtype():
    assert generic_value(site(dist.Gamma(torch.ones(3, dtype=torch.float64), 1.0))).dtype == torch.float64


def test_discrete_sites_are_refused_in_pyros_words():
    with pytest.raises(ValueError, match=r"cannot handle discrete sample site 'z'.*enumerat"):
        bijection(site(dist.Poisson(1.0)))


def test_is_delta():
    delta = dist.Delta(torch.zeros(3))
    assert is_delta(delta)
    assert is_delta(delta.to_event(1).mask(False))
    assert not is_delta(dist.Normal(0.0, 1.0))


class TestPriorAlone:
    PRIOR = dist.VonMises(torch.zeros(3), 2.0)

    def test_it_is_the_prior_and_says_that_it_has_gradients(self):
        q = PriorAlone(self.PRIOR)
        value = q.rsample((5,))
        assert q.has_rsample
        torch.testing.assert_close(q.log_prob(value), self.PRIOR.log_prob(value))
        assert q.expand([2, 3]).rsample().shape == (2, 3)
        assert torch.equal(kl_divergence(q, self.PRIOR), torch.zeros(3))


def left_to_the_model(y, angle=True):
    pyro.sample("k", dist.LKJCholesky(3, 1.0))
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("c", dist.Poisson(z.exp()))
        if angle:
            pyro.sample("a", dist.VonMises(z, 2.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize(
    "loss",
    [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO, CompiledTrace_ELBO],
    ids=lambda loss: loss.__name__,
)
def test_priors_without_gradients_are_left_to_the_model(loss):
    args = torch.tensor([1.0, -2.0]), loss is not CompiledTrace_ELBO  # angles are drawn by rejection, in no graph
    y = args[0]
    guide = AutoAmortizedNormal(left_to_the_model, encoder=Table())
    guide.initialize(*args)
    assert set(guide.plan.left_to_model) >= {"k", "c"}
    with torch.no_grad():  # the exact posterior, of which each draw gives the evidence
        exact = guide.family.parameters(y[:, None] / 2, torch.full((2, 1), math.sqrt(0.5)))
        guide.coder_of(guide.plan.blocks[0]).values[0].copy_(exact)
    evidence = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(y).sum())
    svi = SVI(left_to_the_model, guide, Adam({"lr": 0.0}), loss())
    if loss is TraceMeanField_ELBO:  # a divergence in closed form, and a draw of the rest, of variance near one
        assert sum(svi.step(*args) for _ in range(60)) / 60 == pytest.approx(-evidence, abs=0.6)
    else:
        assert svi.step(*args) == pytest.approx(-evidence, abs=1e-4)
