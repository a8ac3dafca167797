"""Guides that meet another model than they were made for."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import AutoAmortizedNormal

X = torch.linspace(-2, 2, 20)


def model_of(prior=dist.Normal(0.0, 1.0), plate="data", more=(), guided=True):  # noqa: B008
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate(plate, len(x)):
            z = pyro.sample("z", prior) if guided else torch.zeros(len(x))
            for name in more:
                pyro.sample(name, dist.Normal(0.0, 1.0))
            z = z.sum(-1) if z.dim() > 1 else z
            pyro.sample("x", dist.Normal(theta + z, 1.0), obs=x)

    return model


def nested(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3, dim=-2), pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta + z.sum(0), 1.0).to_event(1), obs=x)


CALLS = {
    "guide": lambda guide: guide(X),
    "median": lambda guide: guide.median(X),
    "posterior": lambda guide: guide.posterior(X[:3]),
    "predictive": lambda guide: guide.predictive(X, num_samples=2),
}


@pytest.fixture
def path(tmp_path):
    guide = AutoAmortizedNormal(model_of())
    guide.initialize(X)
    guide.save(tmp_path / "guide.pt")
    return tmp_path / "guide.pt"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("model", "error", "match"),
    {
        "support": (
            model_of(dist.Gamma(2.0, 1.0)),
            ValueError,
            "'z' has values of kind 'greaterthan', a Gamma.*'real'",
        ),
        "lost": (model_of(guided=False), ValueError, "'z' is not in this run"),
        "plate": (model_of(plate="rows"), ValueError, r"'z' stands in plates \['rows'\].*\['data'\]"),
        "nested": (nested, ValueError, r"'z' stands in plates \['data', 'groups'\].*\['data'\]"),
        "event": (model_of(dist.Normal(torch.zeros(3), 1.0).to_event(1)), ValueError, r"'z' has shape \(3,\)"),
        "more": (model_of(more=["w"]), RuntimeError, "'w' was not there"),
    }.values(),
    ids=["support", "lost", "plate", "nested", "event", "more"],
)
def test_another_model_is_refused_at_the_first_call(path, model, error, match, call):
    guide = AutoAmortizedNormal.load(path, model)
    with pytest.raises(error, match=match):
        CALLS[call](guide)


def test_a_state_dict_meets_another_model_no_better(path):
    guide = AutoAmortizedNormal(model_of())
    guide.initialize(X)
    other = AutoAmortizedNormal(model_of(guided=False))
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="'z' is not in this run"):
        other.posterior(X)


@pytest.mark.parametrize("prior", [dist.Normal(1.0, 3.0), dist.StudentT(3.0), dist.Laplace(0.0, 1.0)])
def test_another_prior_on_the_same_space_is_as_good(path, prior):
    guide = AutoAmortizedNormal.load(path, model_of(prior))
    assert guide.posterior(X[:3]).mean["z"].shape == (3,)


def test_a_site_that_some_calls_lack_may_be_lacking_after_loading(tmp_path):
    def model(x, with_w):
        w = pyro.sample("w", dist.Normal(0.0, 1.0)) if with_w else 0.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w + z, 1.0), obs=x)

    def saved(*calls):
        guide = AutoAmortizedNormal(model)
        guide.initialize(X, True)
        for flag in calls:
            guide(X, flag)
        guide.save(tmp_path / "guide.pt")
        return AutoAmortizedNormal.load(tmp_path / "guide.pt", model)

    assert set(saved(True, False)(X, False)) == {"z"}
    with pytest.raises(ValueError, match="'w' is not in this run"):
        saved(True)(X, False)
