"""Predictions: given the data of another call, without any, and of all rows; beside what is known in closed form."""

import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import Predictive

from pyro_amortize import MLP, AutoAmortizedNormal, Table, amortize

NUM = 2000


def ready(model, *args, **options):
    """Returns a guide that has seen a call, with parameters away from their start."""
    kwargs, noise = options.pop("model_kwargs", {}), options.pop("noise", 0.3)
    guide = AutoAmortizedNormal(model, **options)
    guide.initialize(*args, **kwargs)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    return guide


def agrees(draws, mean, stddev):
    """Whether draws have these moments, within five of their own standard errors."""
    if not draws.numel():
        return True
    close = (draws.mean(0) - mean).abs() < 5 / len(draws) ** 0.5 * stddev
    wide = 5 / (2 * len(draws)) ** 0.5
    return bool(close.all()) and torch.allclose(draws.std(0), stddev.expand(draws.shape[1:]), rtol=wide, atol=0.0)


# Groups and globals, given another call.


def groups(x, county, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("counties", 6):
        a = pyro.sample("a", dist.Normal(mu, 2.0))
    with pyro.plate("voters", len(x)):
        pyro.sample("y", dist.Normal(a[..., county] + x, 1.0), obs=y)


COUNTY = torch.arange(40) % 6
X = torch.linspace(-1, 1, 40)
Y = X + 2.0 * COUNTY - 4
NEW_X, NEW_COUNTY = torch.tensor([0.0, 3.0, -2.0]), torch.tensor([0, 5, 2])


def by_name(*, x, county, y=None):
    groups(x, county, y)


def in_a_dict(batch):
    groups(batch["x"], batch["county"], batch.get("y"))


@pytest.mark.parametrize("encoder", [None, Table()], ids=["encoder", "table"])
@pytest.mark.parametrize("parallel", [True, False])
def test_groups_are_informed_by_another_call(encoder, parallel):
    guide = ready(groups, X, COUNTY, Y, encoder=encoder)
    posterior = guide.posterior(X, COUNTY, Y)
    num = NUM if parallel else 200
    draws = guide.predictive(NEW_X, NEW_COUNTY, given=(X, COUNTY, Y), num_samples=num, parallel=parallel)
    mean, stddev = posterior.mean["a"], posterior.stddev["a"]
    assert {name: value.shape for name, value in draws.items()} == {"mu": (num,), "a": (num, 6), "y": (num, 3)}
    assert bool(((draws["a"].mean(0) - mean).abs() < 5 * stddev / num**0.5).all())
    noise = draws["y"] - draws["a"][:, NEW_COUNTY] - NEW_X
    assert abs(noise.mean()) < 5 / (3 * num) ** 0.5
    assert noise.std() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("model", [by_name, in_a_dict], ids=["keywords", "dict"])
def test_however_arguments_are_passed(model):
    informing, asked = {"x": X, "county": COUNTY, "y": Y}, {"x": NEW_X, "county": NEW_COUNTY}
    if model is in_a_dict:
        guide = ready(model, informing)
        posterior = guide.posterior(informing)
        draws = guide.predictive(asked, given=(informing,), num_samples=NUM)
    else:
        guide = ready(model, model_kwargs=informing)
        posterior = guide.posterior(**informing)
        draws = guide.predictive(model_kwargs=asked, given=informing, num_samples=NUM)
    assert agrees(draws["a"], posterior.mean["a"], posterior.stddev["a"])


def test_of_a_decorated_model():
    model = amortize(groups)
    model.guide.initialize(X, COUNTY, Y)
    posterior = model.posterior(X, COUNTY, Y)
    draws = model.predictive(NEW_X, NEW_COUNTY, given=(X, COUNTY, Y), num_samples=NUM)
    assert agrees(draws["a"], posterior.mean["a"], posterior.stddev["a"])


def numbered(x, county, counties, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("counties", counties):
        a = pyro.sample("a", dist.Normal(mu, 0.5))
    with pyro.plate("voters", len(x)):
        pyro.sample("y", dist.Normal(a[..., county] + x, 1.0), obs=y)


@pytest.mark.parametrize("encoder", [None, Table()], ids=["encoder", "table"])
@pytest.mark.parametrize("counties", [4, 9])
def test_groups_that_the_informing_call_lacks_have_their_prior(encoder, counties):
    guide = ready(numbered, X, COUNTY, 6, Y, encoder=encoder)
    posterior = guide.posterior(X, COUNTY, 6, Y)
    draws = guide.predictive(NEW_X, NEW_COUNTY % counties, counties, given=(X, COUNTY, 6, Y), num_samples=NUM)
    both = min(counties, 6)
    assert agrees(draws["a"][:, :both], posterior.mean["a"][:both], posterior.stddev["a"][:both])
    new = draws["a"][:, 6:] - draws["mu"][:, None]
    assert agrees(new, torch.tensor(0.0), torch.tensor(0.5))
    if counties > 6:  # draws of their own
        assert abs(torch.corrcoef(new.T)[0, 1]) < 5 / NUM**0.5


def test_crossed_groups_and_new_pairs():
    def model(user, item, y=None):
        with pyro.plate("users", 5):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 4):
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
        with pyro.plate("ratings", len(user)):
            pyro.sample("y", dist.Normal(u[..., user] + v[..., item], 0.5), obs=y)

    user, item = torch.arange(15) % 5, torch.arange(15) % 4
    y = user - 1.5 * item + 0.1 * torch.randn(15)
    guide = ready(model, user, item, y)
    posterior = guide.posterior(user, item, y)
    draws = guide.predictive(torch.tensor([4, 0]), torch.tensor([3, 1]), given=(user, item, y), num_samples=NUM)
    for site in ("u", "v"):
        assert agrees(draws[site], posterior.mean[site], posterior.stddev[site])


def test_entries_of_a_matrix_that_were_held_out():
    case = CASES["factorization"]
    (ratings, mask), _ = case.example()
    guide = ready(case.make(), ratings, mask, noise=0.1)
    posterior = guide.posterior(ratings, mask)
    draws = guide.predictive(ratings, ~mask, given=(ratings, mask), num_samples=NUM)
    for site in ("u", "v"):
        assert agrees(draws[site], posterior.mean[site], posterior.stddev[site])


def test_two_levels_of_groups():
    case = CASES["pyramid"]
    model = case.make()
    (y, room_of, school_of, num), _ = case.example(6)

    def optional(y, room_of, school_of, num):
        return (poutine.uncondition(model) if y is None else model)(
            room_of if y is None else y, room_of, school_of, num
        )

    guide = ready(optional, y, room_of, school_of, num)
    posterior = guide.posterior(y, room_of, school_of, num)
    given, asked = (y, room_of, school_of, num), (None, room_of[:3], school_of, num)
    draws = guide.predictive(*asked, given=given, num_samples=NUM)
    assert draws["y"].shape == (NUM, 3)
    for site in ("school", "room"):
        assert agrees(draws[site], posterior.mean[site], posterior.stddev[site])


# Rows.


def rows(x, y=None):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(theta + x, 0.3))
        pyro.sample("y", dist.Normal(z, 0.1), obs=y)


@pytest.mark.parametrize("encoder", [None, Table()], ids=["encoder", "table"])
@pytest.mark.parametrize("new", [X[:5] + 1, X + 1, torch.cat([X, X])[40:60]], ids=["fewer", "as many", "some"])
def test_new_rows_have_the_prior_given_the_globals(encoder, new):
    guide = ready(rows, X, Y, encoder=encoder)
    draws = guide.predictive(new, given=(X, Y), num_samples=NUM)
    posterior = guide.posterior(X, Y)
    assert agrees(draws["theta"], posterior.mean["theta"], posterior.stddev["theta"])
    assert agrees(draws["z"] - draws["theta"][:, None] - new, torch.tensor(0.0), torch.tensor(0.3))


def test_rows_that_both_calls_have_are_the_same():
    guide = ready(rows, X, Y)
    posterior = guide.posterior(X, Y)
    for asked in (X, torch.cat([X, NEW_X])):
        draws = guide.predictive(asked, given=(X, Y), num_samples=NUM)
        assert agrees(draws["z"][:, :40], posterior.mean["z"], posterior.stddev["z"])
        assert agrees(draws["z"][:, 40:] - draws["theta"][:, None] - asked[40:], torch.tensor(0.0), torch.tensor(0.3))


def test_new_rows_with_data_of_their_own():
    guide = ready(rows, X, Y)
    posterior = guide.posterior(X[:7] + 1, Y[:7])
    draws = guide.predictive(X[:7] + 1, Y[:7], given=(X, Y), num_samples=NUM)
    assert agrees(draws["z"], posterior.mean["z"], posterior.stddev["z"])


def test_new_rows_with_data_are_refused_where_rows_have_a_table():
    guide = ready(rows, X, Y, encoder=Table())
    with pytest.raises(ValueError, match="'z' has a table, which cannot answer for.*of plate 'rows'.*'y'"):
        guide.predictive(X[:7] + 1, Y[:7], given=(X, Y), num_samples=2)


def test_other_students_of_the_same_schools():
    def model(schools, students, y=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("schools", schools, dim=-2):
            level = pyro.sample("level", dist.Normal(mean, 1.0))
            with pyro.plate("students", students, dim=-1):
                skill = pyro.sample("skill", dist.Normal(level, 0.5))
                pyro.sample("y", dist.Normal(skill, 0.5), obs=y)

    y = 5 + torch.randn(8, 1) + torch.randn(8, 6)
    guide = ready(model, 8, 6, y)
    posterior = guide.posterior(8, 6, y)
    draws = guide.predictive(8, 10, given=(8, 6, y), num_samples=NUM)
    assert agrees(draws["level"], posterior.mean["level"], posterior.stddev["level"])
    assert agrees(draws["skill"] - draws["level"], torch.tensor(0.0), torch.tensor(0.5))
    others = guide.predictive(3, 6, given=(8, 6, y), num_samples=NUM)
    assert agrees(others["level"] - others["mean"][:, None, None], torch.tensor(0.0), torch.tensor(1.0))


def masked(y, mask, x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("schools", y.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(mu, 1.0))
        with pyro.plate("students", y.shape[1], dim=-1), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(level + x, 1.0), obs=y)


MASKED = (5 + X.reshape(8, 5), torch.arange(5) < 1 + torch.arange(8)[:, None], torch.randn(8, 5))
NONE = torch.zeros(8, 3, dtype=torch.bool)


def test_new_students_under_a_mask():
    guide = ready(masked, *MASKED, noise=0.1)
    posterior = guide.posterior(*MASKED)
    new = torch.zeros(8, 3), NONE, torch.ones(8, 3)
    with pytest.warns(UserWarning, match=r"elements of plate 'schools' .* argument '.' differs.*same=\['schools'\]"):
        guide.predictive(*new, given=MASKED, num_samples=2)
    others = guide.predictive(*new, given=MASKED, same=[], num_samples=NUM)
    assert agrees(others["level"] - others["mu"][:, None, None], torch.tensor(0.0), torch.tensor(1.0))
    draws = guide.predictive(*new, given=MASKED, same=["schools"], num_samples=NUM)
    assert agrees(draws["level"], posterior.mean["level"], posterior.stddev["level"])
    assert agrees(draws["y"] - draws["level"] - 1, torch.tensor(0.0), torch.tensor(1.0))
    others = torch.ones(8, 3), ~NONE, torch.ones(8, 3)  # with data of their own
    draws, posterior = guide.predictive(*others, given=MASKED, num_samples=NUM), guide.posterior(*others)
    assert agrees(draws["level"], posterior.mean["level"], posterior.stddev["level"])


def test_plates_that_are_said_to_be_the_same_and_are_not_known():
    guide = ready(masked, *MASKED)
    with pytest.raises(ValueError, match=r"same=\['school'\] names 'school'.*Known: \['schools', 'students'\]"):
        guide.predictive(*MASKED, given=MASKED, same=["school"], num_samples=2)


def test_groups_of_which_all_data_are_masked_are_warned_of():
    guide = ready(masked, *MASKED, noise=0.1)
    with pytest.warns(UserWarning, match="no data of this call inform 'level', .*As all are masked"):
        guide.predictive(torch.zeros(8, 3), NONE, torch.ones(8, 3), num_samples=2)


def test_other_children_at_the_same_times():
    case = CASES["visits"]
    (y, times, seen), _ = case.example()
    guide = ready(case.make(), y, times, seen, noise=0.1)
    others = y.flip(0) + 1, times, seen.flip(0)
    posterior = guide.posterior(*others)
    draws = guide.predictive(*others, given=(y, times, seen), num_samples=NUM)
    assert agrees(draws["level"], posterior.mean["level"], posterior.stddev["level"])
    more = torch.zeros(20, 4), times[:1].expand(20, 4), torch.zeros(20, 4, dtype=torch.bool)
    draws = guide.predictive(*more, given=(y, times, seen), num_samples=NUM)
    assert agrees(draws["level"], torch.tensor(0.0), torch.tensor(1.0))


def test_rows_of_minibatches():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 1000, len(x)):
            z = pyro.sample("z", dist.Normal(slope * x, 0.5))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    guide = ready(model, X, Y)
    posterior = guide.posterior(X, Y)
    draws = guide.predictive(X[:7] + 1, given=(X, Y), num_samples=NUM)
    assert draws["y"].shape == (NUM, 7)
    assert agrees(draws["z"] - draws["slope"][:, None] * (X[:7] + 1), torch.tensor(0.0), torch.tensor(0.5))
    draws = guide.predictive(X, given=(X, Y), num_samples=NUM)  # the same rows
    assert agrees(draws["z"], posterior.mean["z"], posterior.stddev["z"])


# Series.


def walk(series, steps, y=None):
    drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
    with pyro.plate("series", series):
        z = torch.zeros(series)
        for t in pyro.markov(range(steps)):
            z = pyro.sample(f"z_{t}", dist.Normal(z + drift, 0.7))
            pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=None if y is None else y[:, t])


def test_later_steps_of_a_loop():
    y = torch.randn(5, 4).cumsum(-1)
    guide = ready(walk, 5, 4, y)
    posterior = guide.posterior(5, 4, y)
    draws = guide.predictive(5, 7, given=(5, 4, y), num_samples=NUM)
    assert draws["y_6"].shape == (NUM, 5)
    for site in ("z_0", "z_3"):
        assert agrees(draws[site], posterior.mean[site], posterior.stddev[site])
    for t in (4, 5, 6):
        step = draws[f"z_{t}"] - draws[f"z_{t - 1}"] - draws["drift"][:, None]
        assert agrees(step, torch.tensor(0.0), torch.tensor(0.7))


def test_later_steps_of_a_plate():
    def model(steps, x=None):
        with pyro.plate("time", steps):
            e = pyro.sample("e", dist.Normal(0.0, 0.5))
            pyro.sample("x", dist.Normal(e.cumsum(-1), 0.1), obs=x)

    x = torch.randn(10).cumsum(-1)
    guide = ready(model, 10, x)
    posterior = guide.posterior(10, x)
    draws = guide.predictive(13, given=(10, x), num_samples=NUM)
    assert agrees(draws["e"][:, :10], posterior.mean["e"], posterior.stddev["e"])
    assert agrees(draws["e"][:, 10:], torch.tensor(0.0), torch.tensor(0.5))
    assert agrees(draws["x"] - draws["e"].cumsum(-1), torch.tensor(0.0), torch.tensor(0.1))


class Walk(ForecastingModel):
    def model(self, zero_data, covariates):
        step = pyro.sample("step", dist.LogNormal(-2.0, 0.1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(zero_data, step[..., None]).to_event(1))
        self.predict(dist.Normal(torch.zeros(1), 0.3).to_event(1), drift.cumsum(-2))


ENCODED = {"encoder": {"drift": MLP((4,))}, "inputs": {"drift": "data"}}


@pytest.mark.parametrize(
    "options",
    [{}, ENCODED, {**ENCODED, "inputs": {"drift": lambda data, covariates: data}}],
    ids=["table", "argument", "function"],
)
def test_forecasts_of_pyros_forecaster(options):
    data, covariates, model = torch.randn(12, 1).cumsum(0), torch.zeros(15, 0), Walk()
    guide = AutoAmortizedNormal(model, **options)
    forecaster = Forecaster(model, data, covariates[:12], guide=guide, num_steps=1, log_every=0)
    draws = forecaster(data, covariates, num_samples=NUM)
    assert draws.shape == (NUM, 3, 1)
    known, whole = (guide.posterior(data, covariates[:n]) for n in (12, 15))
    assert torch.equal(whole.mean["drift"][:12], known.mean["drift"])
    step = known.median["step"]  # of the steps ahead, the model's own conditional
    torch.testing.assert_close(whole.mean["drift"][12:], torch.zeros(3, 1))
    torch.testing.assert_close(whole.stddev["drift"][12:], step.expand(3, 1))
    end = known.mean["drift"].sum()
    assert abs(draws[:, 2].mean() - end) < 5 * draws[:, 2].std() / NUM**0.5
    if not options:  # other rows are no forecasts
        with pytest.raises(ValueError, match="'drift' has a table with a row for each of the 12 elements"):
            guide.posterior(torch.randn(15, 1), covariates)


def test_an_encoder_by_name_takes_the_only_data_that_have_a_row_for_each_element():
    guide = AutoAmortizedNormal(Walk(), encoder={"drift": MLP((4,))})
    with pytest.warns(UserWarning, match=r"row k of 'data' is taken to inform element k of 'drift'.*inputs={'drift': "):
        guide.initialize(torch.randn(12, 1).cumsum(0), torch.zeros(12, 0))
    assert guide.plan.block_of("drift").inputs == ("data",)


def test_an_event_cannot_grow():
    def model(steps, x=None):
        z = pyro.sample("z", dist.Normal(torch.zeros(steps), 1.0).to_event(1))
        with pyro.plate("rows", 6):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(6, 4)
    guide = ready(model, 4, x)
    with pytest.raises(NotImplementedError, match=r"event of site 'z' .*4,.*5,.*Write what grows as a"):
        guide.predictive(5, given=(4, x), num_samples=2)


# Discrete sites in the middle.


def test_labels_of_groups_are_carried():
    locs = torch.tensor([-5.0, 5.0])

    def model(x, group, y=None):
        with pyro.plate("groups", 4):
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
            a = pyro.sample("a", dist.Normal(locs[c], 1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(a[..., group] + x, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    group = torch.arange(24) % 4
    x, y = torch.randn(24), torch.tensor([-5.0, 5.0, 5.0, -5.0])[group] + torch.randn(24)
    guide = ready(model, x, group, y)
    with torch.no_grad():
        guide.coder_of(guide.plan.block_of("a")).heads[0].weight.zero_()
        guide.coder_of(guide.plan.block_of("a")).heads[0].bias.copy_(torch.tensor([4.0, -3.0]))
    draws = guide.predictive(NEW_X, torch.tensor([0, 1, 3]), given=(x, group, y), num_samples=200)
    assert draws["c"].shape == (200, 4)
    assert bool((draws["c"] == 1).all())  # as a is near 4 in all groups
    assert agrees(draws["z"] - draws["a"][:, [0, 1, 3]] - NEW_X, torch.tensor(0.0), torch.tensor(1.0))


# Calls without data.


@pytest.mark.parametrize("parallel", [True, False])
def test_groups_without_data_are_warned_of_once(parallel):
    guide = ready(groups, X, COUNTY, Y)
    told = r"no data of this call inform 'a', .*'y'.*guide.predictive\(x_new, county_new, given=\(x, county, y\)\)"
    with pytest.warns(UserWarning, match=told) as record:
        Predictive(groups, guide=guide, num_samples=20, parallel=parallel)(NEW_X, NEW_COUNTY)
    assert len(record) == 1
    for _ in range(2):
        with pytest.warns(UserWarning, match=told) as record:
            guide.predictive(NEW_X, NEW_COUNTY, num_samples=20, parallel=parallel)
        assert len(record) == 1


def test_the_line_for_a_model_of_keywords():
    guide = ready(by_name, model_kwargs={"x": X, "county": COUNTY, "y": Y})
    line = "guide.predictive(model_kwargs={'x': x_new, 'county': county_new}, given={'x': x, 'county': county, 'y': y})"
    with pytest.warns(UserWarning, match=re.escape(line)):
        guide(x=NEW_X, county=NEW_COUNTY)


def test_an_amortized_global_without_data_is_warned_of():
    guide = ready(rows, X, Y, encoder={"theta": MLP((4,))})
    with pytest.warns(UserWarning, match="no data of this call inform 'theta'"):
        guide(X[:5])


def test_rows_that_may_be_those_of_training_are_warned_of():
    guide = ready(rows, X, Y)
    with pytest.warns(UserWarning, match="no data of this call inform 'z'"):
        guide(X)
    guide(X[:5])  # others, since there are fewer: nothing to be said


def test_data_of_which_some_are_missing_are_warned_of():
    def model(n, x=None, y=None):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = ready(model, 40, X, Y)
    for ask in (guide, lambda *args: guide.predictive(*args, given=(40, X, Y), num_samples=2)):
        with pytest.warns(UserWarning, match="not all data that inform 'z' are in this call. Without 'y'"):
            ask(5, X[:5])


def test_nothing_is_said_where_nothing_is_amiss():
    guide = ready(groups, X, COUNTY, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(X, COUNTY, Y)
        guide.predictive(X[:3], COUNTY[:3], Y[:3], num_samples=2)
        guide.predictive(NEW_X, NEW_COUNTY, given=(X, COUNTY, Y), num_samples=2)


# How draws are made.


def test_draws_in_one_run_have_the_distribution_of_a_run_each():
    torch.manual_seed(0)
    guide = ready(rows, X, Y)
    many = guide.predictive(X, Y, num_samples=NUM)
    alone = guide.predictive(X, Y, num_samples=400, parallel=False)
    for site, value in many.items():
        spread = alone[site].std(0)
        assert bool(((value.mean(0) - alone[site].mean(0)).abs() < 5 * spread / 20).all())
        if value.dim() > 1:  # rows are tied by theta, and by nothing else
            tied = [torch.corrcoef(draws[site].T)[:3, :3] for draws in (many, alone)]
            torch.testing.assert_close(*tied, atol=5 / 20, rtol=0.0)


def test_draws_take_few_runs_of_the_model():
    runs = []

    def counted(x, y=None):
        runs.append(len(x))
        rows(x, y)

    guide = ready(counted, X, Y)
    runs.clear()
    guide.predictive(X, Y, num_samples=1000)
    assert len(runs) < 40


def test_models_that_take_no_draws_beside_plates_are_run_one_by_one():
    weights = torch.tensor([1.0, -2.0, 0.5])

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = 1.0 if float(w.sum()) > 0 else 0.1  # of one draw
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(w @ weights, scale), obs=x)

    guide = ready(model, X)
    draws = guide.predictive(X, num_samples=400)
    noise = (draws["x"] - (draws["w"] @ weights)[:, None]).std(1)
    wide = draws["w"].sum(-1) > 0
    assert noise[wide].min() > 0.5
    assert noise[~wide].max() < 0.2


def test_draws_do_not_share_their_noise():
    def silent(x):
        """Its axes are found by position: with draws beside, another one is summed."""
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(1), 0.1), obs=x)

    guide = ready(silent, X)
    draws = guide.predictive(X, num_samples=300)
    assert agrees(draws["x"] - draws["z"].sum(-1), torch.tensor(0.0), torch.tensor(0.1))


@pytest.mark.parametrize("given", [X, 3, "x"])
def test_given_is_a_call(given):
    guide = ready(rows, X, Y)
    with pytest.raises(ValueError, match=r"predictive: given= is a .*given=\(x, y\), or all by name"):
        guide.predictive(X, given=given)


def test_given_lacks_an_argument():
    guide = ready(groups, X, COUNTY, Y)
    with pytest.raises(TypeError, match="missing a required argument: 'county'"):
        guide.predictive(NEW_X, NEW_COUNTY, given=(X,))


# Rows that the model draws at random.


def subsampled(x, size=4):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        mean = pyro.deterministic("mean", 2 * z)
        pyro.sample("x", dist.Normal(mean, 0.1), obs=x[i])


@pytest.mark.parametrize("parallel", [True, False])
def test_all_rows_of_a_plate_that_subsamples(parallel):
    guide = ready(subsampled, X[:10])
    posterior = guide.posterior(X[:10], None)
    num = NUM if parallel else 100
    draws = guide.predictive(X[:10], num_samples=num, parallel=parallel)
    shapes = {name: value.shape[1:] for name, value in draws.items()}
    assert shapes == {"theta": (), "z": (10,), "mean": (10,), "x": (10,)}
    mean, stddev = posterior.mean["z"], posterior.stddev["z"]
    assert bool(((draws["z"].mean(0) - mean).abs() < 5 * stddev / num**0.5).all())
    torch.testing.assert_close(draws["mean"], 2 * draws["z"])


def test_minibatches_are_taken_as_they_are():
    def model(x):
        with pyro.plate("rows", 40, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    guide = ready(model, X)
    posterior = guide.posterior(X[7:12])
    draws = guide.predictive(X[7:12], num_samples=NUM)
    assert agrees(draws["z"], posterior.mean["z"], posterior.stddev["z"])


def test_in_float64(float64):
    x, county, y = X.double(), COUNTY, Y.double()
    guide = ready(groups, x, county, y)
    draws = guide.predictive(NEW_X.double(), NEW_COUNTY, given=(x, county, y), num_samples=3)
    assert {value.dtype for value in draws.values()} == {torch.float64}


def test_sites_of_a_loop_are_also_one():
    def model(y, length=None):
        z = torch.zeros(())
        for t in pyro.markov(range(len(y) if length is None else length)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[t] if t < len(y) else None)

    y = torch.randn(5)
    guide = ready(model, y)
    draws = guide.predictive(y, 8, given=(y, 5), num_samples=3)
    assert len(draws) == 16
    assert "z_*" not in list(draws)
    torch.testing.assert_close(draws["z_*"], torch.stack([draws[f"z_{t}"] for t in range(8)], -1))
    assert draws["y_*"].shape == (3, 8)
    with pytest.raises(KeyError, match="predictive: 'x' is no site of this call"):
        draws["x"]
    with pytest.raises(KeyError, match=r"'z_7' is a step of 'z_\*' after .*guide.predictive\(...\)\['z_7'\]"):
        guide.posterior(y, 8).mean["z_7"]
