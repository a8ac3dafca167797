"""Answers by site: all rows of plates that subsample, series as one, deterministic sites, names without an answer."""

import pickle
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES
from pyro import poutine
from test_prediction import X, agrees, ready, subsampled, walk

from pyro_amortize import MLP, AutoAmortizedNormal, Table, to_arviz

SUM = {"enumerate": "parallel"}
Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).cumsum(-1)


# All rows.


@pytest.mark.parametrize("encoder", [None, Table()], ids=["encoder", "table"])
def test_all_rows_of_a_plate_that_subsamples(encoder):
    x = X[:10]
    guide = ready(subsampled, x, encoder=encoder)
    found, whole = guide.posterior(x), guide.posterior(x, 10)
    for name in ("theta", "z"):
        for what in ("mean", "stddev", "median"):
            assert torch.equal(getattr(found, what)[name], getattr(whole, what)[name])
        assert torch.equal(found.quantiles([0.1, 0.9])[name], whole.quantiles([0.1, 0.9])[name])
        assert torch.equal(guide.median(x)[name], guide.median(x, 10)[name])
    draws = found.sample((2000,))
    assert agrees(draws["z"], whole.mean["z"], whole.stddev["z"])
    torch.testing.assert_close(found.log_prob(draws)["z"], whole.log_prob(draws)["z"])
    torch.testing.assert_close(draws["mean"], 2 * draws["z"])
    assert to_arviz(found, 5).posterior["z"].sizes == {"chain": 1, "draw": 5, "rows": 10}


def test_of_two_plates_that_subsample():
    def model(x, size=3, width=2):
        rows = pyro.plate("rows", 7, subsample_size=size, dim=-2)
        columns = pyro.plate("columns", 5, subsample_size=width, dim=-1)
        with rows as i, columns as j:
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[i][:, j])

    x = torch.randn(7, 5)
    guide = ready(model, x)
    found, whole = guide.posterior(x), guide.posterior(x, 7, 5)
    torch.testing.assert_close(found.mean["z"], whole.mean["z"])
    draws = found.sample((3,))
    torch.testing.assert_close(found.log_prob(draws)["z"], whole.log_prob(draws)["z"])


def test_elements_with_bounds_and_data_of_their_own():
    x, high = torch.randn(9), torch.arange(1.0, 10.0)

    def model(x, mask, size=4):
        with pyro.plate("rows", 9, subsample_size=size) as i:
            z = pyro.sample("z", dist.Uniform(0.0, high[i]))
            with poutine.mask(mask=mask[i]):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    mask = torch.arange(9) % 3 > 0
    guide = ready(model, x, mask)
    found, whole = guide.posterior(x, mask), guide.posterior(x, mask, 9)
    for what in ("mean", "stddev", "median"):
        torch.testing.assert_close(getattr(found, what)["z"], getattr(whole, what)["z"])


def test_rows_of_an_explicit_subsample_are_answered_alone():
    case = CASES["explicit_subsample"]
    args, kwargs = case.example()
    guide = ready(case.make(), *args, model_kwargs=kwargs)
    assert guide.posterior(*args, index=torch.tensor([4, 2])).mean["z"].shape == (2,)


def test_labels_and_latents_of_all_rows():
    def model(x, size=4):
        with pyro.plate("rows", len(x), subsample_size=size) as i:
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2), infer=SUM)
            z = pyro.sample("z", dist.Normal(torch.tensor([-4.0, 4.0])[c], 1.0))
            pyro.sample("x", dist.Normal(z, 0.3), obs=x[i])

    x = torch.tensor([-4.0, 4.0])[torch.arange(11) % 2] + torch.randn(11)
    guide = AutoAmortizedNormal(model)
    guide.initialize(x)
    draws = guide.posterior(x).sample((50,))
    assert draws["z"].shape == draws["c"].shape == (50, 11)
    given = torch.sigmoid(8 * draws["z"])  # p(c = 1 | z): the log density ratio of N(4, 1) and N(-4, 1)
    assert abs((draws["c"] - given).mean()) < 5 * (given * (1 - given)).mean().sqrt() / 550**0.5 + 1e-3


# Deterministic sites.


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    doubled = pyro.deterministic("doubled", 2 * slope)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(doubled * x, 1.0))
        rate = pyro.deterministic("rate", torch.stack([z, z.exp()], -1), event_dim=1)
        pyro.sample("y", dist.Normal(rate[..., 0], 1.0), obs=y)
    pyro.deterministic("last", rate[..., -1, 1])


def test_deterministic_sites_of_the_draws():
    guide = ready(regression, X, 2 * X)
    posterior = guide.posterior(X, 2 * X)
    draws = posterior.sample((3, 4))
    torch.testing.assert_close(draws["doubled"], 2 * draws["slope"])
    torch.testing.assert_close(draws["rate"], torch.stack([draws["z"], draws["z"].exp()], -1))
    torch.testing.assert_close(draws["last"], draws["z"][..., -1].exp())
    assert set(draws) == {"slope", "z"}  # no run of the model, unless asked for
    assert "rate" in draws
    assert "rates" not in draws


def test_moments_of_deterministic_sites_come_from_draws_of_a_fixed_seed():
    guide = ready(regression, X, 2 * X)
    posterior, state = guide.posterior(X, 2 * X), torch.get_rng_state()
    mean, stddev = posterior.mean["doubled"], posterior.stddev["doubled"]
    assert torch.equal(state, torch.get_rng_state())
    assert abs(mean - 2 * posterior.mean["slope"]) < 5 * stddev / 1000**0.5
    assert stddev / posterior.stddev["slope"] == pytest.approx(2.0, rel=5 / 2000**0.5)
    assert posterior.quantiles([0.1, 0.5])["rate"].shape == (2, 40, 2)
    torch.testing.assert_close(posterior.quantiles([0.5])["last"][0], posterior.median["last"], rtol=0.02, atol=0.0)
    assert torch.equal(mean, guide.posterior(X, 2 * X).mean["doubled"])


def test_deterministic_sites_in_arviz():
    data = to_arviz(ready(regression, X, 2 * X).posterior(X, 2 * X), 6).posterior
    assert {name: data[name].dims[2:] for name in data} == {
        "slope": (),
        "z": ("rows",),
        "doubled": (),
        "rate": ("rows", "rate_dim_0"),
        "last": (),
    }
    torch.testing.assert_close(torch.as_tensor(data["doubled"].values), 2 * torch.as_tensor(data["slope"].values))


# Series.


def test_a_series_is_one_variable():
    guide = ready(walk, 5, 4, Y)
    posterior = guide.posterior(5, 4, Y)
    answers = [posterior.mean, posterior.quantiles([0.1, 0.9]), posterior.sample((3, 2))]
    for lead, answer in zip([(), (2,), (3, 2)], answers, strict=True):
        assert answer["z_*"].shape == (*lead, 5, 4)
        for t in range(4):
            assert torch.equal(answer["z_*"][..., t], answer[f"z_{t}"])
    assert set(posterior.mean) == {"drift", "z_0", "z_1", "z_2", "z_3"}
    assert guide.median(5, 4, Y)["z_*"].shape == (5, 4)


def test_a_series_beside_other_plates_and_of_events():
    for name, shape in {"tones": (12, 4), "padded_chain": (12, 4, 2)}.items():
        case = CASES[name]
        args, kwargs = case.example()
        posterior = ready(case.make(), *args, model_kwargs=kwargs).posterior(*args, **kwargs)
        assert posterior.mean["z_*"].shape == shape


def test_a_series_is_one_variable_in_arviz():
    data = to_arviz(ready(walk, 5, 4, Y).posterior(5, 4, Y), 6).posterior
    assert {name: data[name].dims[2:] for name in data} == {"drift": (), "z_*": ("series", "steps")}


# Names without an answer.


def various(x, y=None):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("unused", dist.Normal(theta, 1.0))
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2), infer=SUM)
        k = pyro.sample("k", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(theta + c + k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("unused", "'unused' is left to the model: no data inform it, .*guide.predictive(...)['unused']"),
        ("c", "'c' is summed out of q: it has draws only, posterior.sample((1000,))['c']"),
        ("x", "'x' is observed: its replicates are guide.predictive(...)['x']"),
        ("k", "'k' is discrete: it has posterior.probs['k']"),
        ("zz", "'zz' is no site of model or guide. Known: ['theta', 'z']"),
    ],
)
@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_names_without_an_answer(site, said, error):
    guide = ready(various, X, encoder={"k": MLP((4,))})
    posterior = guide.posterior(X)
    with pytest.raises(error, match=re.escape(said).replace(re.escape(".*"), ".*")):
        posterior.mean[site]
    if site != "k":
        with pytest.raises(ValueError, match=f"Posterior.log_prob: '{site}' is"):
            posterior.log_prob({site: torch.zeros(())})
    assert posterior.mean.get(site) is None


def test_answers_are_dicts_that_can_be_written():
    posterior = ready(walk, 5, 4, Y).posterior(5, 4, Y)
    assert type(pickle.loads(pickle.dumps(posterior.mean))) is dict
    again = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(again.mean["z_*"], posterior.mean["z_*"])
    with pytest.raises(KeyError, match="Known: .*'z_\\*'"):
        again.mean["rate"]
