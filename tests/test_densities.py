import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_amortize import AutoAmortizedNormal
from pyro_amortize.densities import Evaluation, log_densities, vectorizing
from pyro_amortize.parameters import preserved


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.6))


def cannot_vectorize(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = torch.stack([z[i] for i in range(len(x))])
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def centres_over_draws(x):
    """Runs with draws side by side, but gives something else then."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + z.sum(), 1.0), obs=x)


X = torch.randn(6, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("chosen", "answer"),
    [(model, True), (cannot_vectorize, False), (centres_over_draws, False)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_vectorizing_is_tried_before_it_is_trusted(chosen, answer):
    assert vectorizing(chosen, guide, (X,), {}) == (1 if answer else None)


@pytest.mark.parametrize("chosen", [model, cannot_vectorize], ids=lambda value: value.__name__)
def test_elbo_per_datum(chosen):
    ratio = log_densities(chosen, guide, (X,), {}, plate="data", num_draws=3000).log_ratio
    posterior = dist.Normal(X / 2, math.sqrt(0.5))
    kl = torch.distributions.kl_divergence(dist.Normal(X / 2, 0.6), posterior)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X) - kl
    assert ratio.shape == (3000, 6)
    assert ((ratio.mean(0) - exact).abs() < 4 * ratio.std(0) / math.sqrt(3000)).all()


def test_totals_are_sums_over_data():
    per_datum = log_densities(model, guide, (X,), {}, plate="data", num_draws=50)
    totals = log_densities(model, guide, (X,), {}, num_draws=50)
    torch.testing.assert_close(per_datum.log_p.sum(-1), totals.log_p)
    torch.testing.assert_close(per_datum.log_q.sum(-1), totals.log_q)


def test_a_plate_that_subsamples_is_walked_through_without_its_scale():
    def subsampled(x):
        with pyro.plate("data", len(x), subsample_size=4) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    generated = AutoAmortizedNormal(subsampled)
    generated.initialize(X)
    full = AutoAmortizedNormal(model)
    full.load_state_dict(generated.state_dict())
    a = log_densities(subsampled, generated, (X,), {}, plate="data", num_draws=4000).log_ratio
    b = log_densities(model, full, (X,), {}, plate="data", num_draws=4000).log_ratio
    assert a.shape == (4000, 6)
    se = (a.var(0) + b.var(0)).sqrt() / math.sqrt(4000)
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * se).all()


def test_log_joint_at_given_latents():
    z = torch.randn(5, 6)
    for chosen in (model, cannot_vectorize):
        with preserved(chosen, guide), poutine.block():
            found = Evaluation(chosen, guide, (X,), {}).at({"z": z}, "data")
        torch.testing.assert_close(found, dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X))


def test_unknown_plate():
    with pytest.raises(ValueError, match="no plate 'rows'.*data"):
        log_densities(model, guide, (X,), {}, plate="rows")


def test_a_guide_that_lacks_a_latent_has_no_elbo():
    with pytest.raises(ValueError, match=r"does not sample 'z'.*pyro.sample\('z'"):
        log_densities(model, lambda x: None, (X,), {})


def test_a_guide_that_names_the_plate_otherwise_is_refused():
    def other(x):
        with pyro.plate("batch", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.6))

    with pytest.raises(ValueError, match=r"'z' stands in plate 'data'.*\['batch'\] of the guide"):
        log_densities(model, other, (X,), {}, plate="data")
    assert log_densities(model, other, (X,), {}, num_draws=10).log_ratio.isfinite().all()


def test_a_guide_that_mixes_draws_is_run_draw_by_draw():
    def mixing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("u", dist.Normal(3 * z.mean(), 0.5))

    def two(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + u, 0.5), obs=x)

    assert vectorizing(two, mixing, (X,), {}) is None
