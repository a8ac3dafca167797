import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import AUTOGUIDES, autoguided
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.optim import Adam

from pyro_amortize import AutoAmortizedNormal
from pyro_amortize.densities import Evaluation, log_densities, vectorizing
from pyro_amortize.parameters import preserved


def log_joint(model, guide, args, kwargs, plate, values):
    with preserved(model, guide, evaluating=True), torch.no_grad(), poutine.block():
        return Evaluation(model, guide, args, kwargs).at(values, plate)


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
        found = log_joint(chosen, guide, (X,), {}, "data", {"z": z})
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


@pytest.fixture(scope="module")
def autoguides():
    """Pyro's own guides, each trained by a few steps."""
    x = torch.randn(6, generator=torch.Generator().manual_seed(5))
    found = {}
    for make in AUTOGUIDES:
        pyro.set_rng_seed(0)
        guide = make(autoguided)
        svi = SVI(autoguided, guide, Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(50):
            svi.step(x)
        found[make] = guide
    return x, found


@pytest.mark.parametrize("make", AUTOGUIDES)
def test_pyro_s_guides_have_the_elbo_that_pyro_finds(autoguides, make):
    x, guides = autoguides
    found = log_densities(autoguided, guides[make], (x,), {}, num_draws=225).log_ratio
    with torch.no_grad():
        pyro_s = -torch.tensor([Trace_ELBO().loss(autoguided, guides[make], x) for _ in range(225)])
    se = torch.hypot(found.std(), pyro_s.std()) / 15
    assert float((found.mean() - pyro_s.mean()).abs()) <= 4 * float(se) + 1e-4


@pytest.mark.parametrize("make", [AutoNormal, AutoNormalMessenger])
def test_pyro_s_guides_by_datum_and_with_globals_held(autoguides, make):
    x, guides = autoguides
    guide, held = guides[make], {"theta": torch.tensor(0.7), "tau": torch.tensor(1.3)}
    loc, scale = (
        {name: getattr(getattr(guide, w), name).detach() for name in ("z", "rate")} for w in ("locs", "scales")
    )

    def by_hand(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc["z"], scale["z"]))
            pyro.sample("rate", dist.LogNormal(loc["rate"], scale["rate"]))

    model, fixed = (poutine.condition(program, data=held) for program in (autoguided, guide))
    totals = log_densities(model, fixed, (x,), {}, num_draws=400)
    rows = log_densities(model, fixed, (x,), {}, plate="data", num_draws=400)
    torch.testing.assert_close(rows.log_q.sum(-1), totals.log_q)
    prior = dist.Normal(0.0, 2.0).log_prob(held["theta"]) + dist.LogNormal(0.0, 0.5).log_prob(held["tau"])
    torch.testing.assert_close(rows.log_p.sum(-1) + prior, totals.log_p)
    pyro_s = -torch.tensor([Trace_ELBO().loss(model, by_hand, x) for _ in range(400)])
    se = torch.hypot(totals.log_ratio.std(), pyro_s.std()) / 20
    assert float((totals.log_ratio.mean() - pyro_s.mean()).abs()) <= 4 * float(se)


def test_what_model_and_guide_are_given_has_no_density_q():
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((theta + x) / 2, 0.5**0.5))

    x, theta = torch.randn(8), torch.tensor(3.0)
    model, guide = (poutine.condition(program, data={"theta": theta}) for program in (model, guide))
    exact = dist.Normal(theta, 2**0.5).log_prob(x).sum() + dist.Normal(0.0, 2.0).log_prob(theta)
    found = log_densities(model, guide, (x,), {}, num_draws=20).log_ratio
    torch.testing.assert_close(found, exact.expand(20), rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal, AutoStructured])
def test_a_joint_draw_has_no_density_by_datum_or_with_globals_held(autoguides, make):
    x, guides = autoguides
    with pytest.raises(NotImplementedError, match=r"'rate' from '.*by the elements of plate 'data'.*AutoNormal\(model"):
        log_densities(autoguided, guides[make], (x,), {}, plate="data")
    model, guide = (poutine.condition(p, data={"theta": torch.tensor(0.0)}) for p in (autoguided, guides[make]))
    with pytest.raises(NotImplementedError, match=r"'theta' from '.*with others held.*compare_inference\(model"):
        log_densities(model, guide, (x,), {})


def test_a_point_mass_has_no_density_by_datum(autoguides):
    x, guides = autoguides
    with pytest.raises(NotImplementedError, match=r"'z' of the guide is a point mass.*AutoNormal\(model"):
        log_densities(autoguided, guides[AutoDelta], (x,), {}, plate="data")
