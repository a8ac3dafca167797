"""ArviZ's own object: its dimensions and values, what ArviZ does with it, and that nothing of the user's is changed."""

import math
from dataclasses import replace

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    Table,
    amortization_gap,
    compare_inference,
    fit_optimum,
    fit_svi,
    run_mcmc,
    to_arviz,
)

matplotlib.use("Agg")
# With a latent for each datum, the weights of leave-one-out have heavy tails, and ArviZ says so.
pytestmark = pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution:UserWarning")
SUM = {"enumerate": "parallel"}


def model(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + w.sum(-1), 0.5), obs=x)


def mixture(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])), infer=SUM)
        z = pyro.sample("z", dist.Normal(torch.tensor([-2.0, 2.0])[c], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def fitted(model, *args, guide=None, **options):
    return fit_svi(model, guide or AutoAmortizedNormal(model), *args, num_steps=2, seed=0, progress=False, **options)


def drawn(model, *args, **options):
    counts = {"num_samples": 30, "warmup_steps": 30, "num_chains": 2, **options}
    return run_mcmc(model, *args, seed=0, progress=False, **counts)


@pytest.fixture
def x():
    return 3 + torch.randn(8)


def dims(data, group):
    return {name: variable.dims for name, variable in data[group].data_vars.items()}


def groups(data):
    """Names of groups, as both generations give them."""
    return {name.strip("/") for name in (data.groups if not callable(data.groups) else data.groups())} - {""}


def values(data, group, name):
    return torch.as_tensor(data[group][name].values)


def same(one, other):
    assert groups(one) == groups(other)
    for group in groups(one):
        assert dims(one, group) == dims(other, group)
        for name in dims(one, group):
            a, b = one[group][name], other[group][name]
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a.values, b.values)
            for coordinate in a.coords:
                np.testing.assert_array_equal(a.coords[coordinate].values, b.coords[coordinate].values)


# What is in it.


def test_a_fit_has_plates_as_dimensions(x):
    data = to_arviz(fitted(model, x))
    assert groups(data) == {"posterior", "log_likelihood", "observed_data"}
    assert dims(data, "posterior") == {
        "theta": ("chain", "draw"),
        "z": ("chain", "draw", "data"),
        "w": ("chain", "draw", "data", "w_dim_0"),
    }
    assert dims(data, "log_likelihood") == {"x": ("chain", "draw", "data")}
    assert dims(data, "observed_data") == {"x": ("data",)}
    assert data["posterior"].sizes == {"chain": 1, "draw": 1000, "data": 8, "w_dim_0": 2}
    torch.testing.assert_close(values(data, "observed_data", "x"), x)
    z, w = values(data, "posterior", "z"), values(data, "posterior", "w")
    exact = dist.Normal(z + w.sum(-1), 0.5).log_prob(x)
    torch.testing.assert_close(values(data, "log_likelihood", "x"), exact)


ZOO = """
    ppca supports improper_global masked_prior nested_arguments square minibatch vae binomial explicit_subsample
    mask_and_scale obs_mask three_levels two_plates_inside factorization pyramid padded_chain tones states_first
    plate_of_globals plate_at_minus_two forecast
"""


@pytest.mark.parametrize("name", ZOO.split())
def test_models_of_the_zoo(name, x):
    case = CASES[name]
    own, (args, kwargs) = case.make(), case.example()
    guide = AutoAmortizedNormal(own)
    guide.initialize(*args, **kwargs)
    fit = replace(fitted(model, x), guide=guide, model=own, args=args, kwargs=kwargs)
    data = to_arviz(fit, num_samples=3)
    plan = guide.plan
    deterministic = {"obs_mask": {"x"}, "forecast": {"mean"}}.get(name, set())
    assert set(data["posterior"].data_vars) == {n for b in plan.blocks for n in b.sites} | deterministic
    for n, variable in data["posterior"].data_vars.items():
        plates = ("n",) if n in deterministic else plan.block_of(n).plates
        assert variable.dims[: 2 + len(plates)] == ("chain", "draw", *plates)
        assert all(dim.startswith(f"{n}_dim_") for dim in variable.dims[2 + len(plates) :])
    if not case.left:  # those are drawn in every run
        for k in range(3):
            densities_are_those_of_a_run(data, k, own, guide, args, kwargs)


def by_site(data, group, plan, left_out=()):
    """Values of all sites, those of loops one by one."""
    found = {}
    for n, variable in data[group].data_vars.items():
        if n in left_out:
            continue
        loops = [loop for family in plan.families if family.name == n for loop in family.loops]
        if not loops:
            found[n] = torch.as_tensor(variable.values)
        for loop in loops:
            turns = torch.as_tensor(variable.values).unbind(variable.dims.index(loop))
            found |= {n.replace("*", str(plan.loops[loop] + t)): turn for t, turn in enumerate(turns)}
    return found


def densities_are_those_of_a_run(data, k, own, guide, args, kwargs):
    """Runs the model at one draw, as Pyro does."""
    owner = getattr(own, "__self__", own)
    if isinstance(owner, torch.nn.Module):
        owner.eval()
    drawn = by_site(data, "posterior", guide.plan)
    with torch.no_grad():
        shapes = {n: value.shape for n, value in guide(*args, **kwargs).items()}
        held = {n: drawn[n][0, k].reshape(shape) for n, shape in shapes.items()}
        trace = poutine.trace(poutine.condition(own, data=held)).get_trace(*args, **kwargs)
        trace.compute_log_prob()

    def exact(site):
        subsampling = math.prod(int(f.full_size) / int(f.size) for f in site["cond_indep_stack"] if f.full_size)
        return (site["log_prob"] / subsampling).expand(site["fn"].batch_shape)

    masked = {n: v for n, v in data["log_likelihood"].data_vars.items() if f"{n}_entry" in v.dims}
    for n, variable in masked.items():  # those that are there, in all turns of a loop
        family = next((family for family in guide.plan.families if family.name == n), None)
        members = [m for m in trace.nodes if m == n or (family is not None and family.numbers(m) is not None)]
        there = torch.cat([exact(trace.nodes[m])[trace.nodes[m]["log_prob"] != 0].flatten() for m in members])
        mine = torch.as_tensor(variable.values)[0, k]
        torch.testing.assert_close(mine.sort().values, there.sort().values, rtol=1e-3, atol=1e-3)
    for n, found in by_site(data, "log_likelihood", guide.plan, set(masked)).items():
        mine = found[0, k]
        torch.testing.assert_close(mine, exact(trace.nodes[n]).reshape(mine.shape), rtol=1e-3, atol=1e-3)


def test_series_outside_and_inside_of_a_plate_that_subsamples():
    def own(y):
        z, rows = torch.tensor(0.0), pyro.plate("rows", len(y), subsample_size=3)
        for t in range(y.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            with rows as i:
                w = pyro.sample(f"w_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"y_{t}", dist.Normal(w, 1.0), obs=y[i, t])

    y = torch.randn(7, 4)
    data = to_arviz(fitted(own, y, guide=AutoAmortizedNormal(own, encoder={"z_*": Table()})), num_samples=5)
    assert dims(data, "posterior") == {
        "z_*": ("chain", "draw", "steps"),
        "w_*": ("chain", "draw", "rows", "steps"),
    }
    exact = dist.Normal(values(data, "posterior", "w_*"), 1.0).log_prob(y)
    torch.testing.assert_close(values(data, "log_likelihood", "y_*"), exact)


@pytest.mark.parametrize("vectorizable", [True, False])
def test_draws_made_one_by_one_give_the_same(x, vectorizable):
    def own(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z if vectorizable else torch.stack([z[i] for i in range(len(x))])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    data = to_arviz(fitted(own, x), num_samples=20)
    exact = dist.Normal(values(data, "posterior", "z"), 1.0).log_prob(x)
    torch.testing.assert_close(values(data, "log_likelihood", "x"), exact)


def test_a_posterior(x):
    guide = fitted(model, x).guide
    data = to_arviz(guide.posterior(x[:3]), num_samples=50)
    assert groups(data) == {"posterior"}
    assert data["posterior"].sizes == {"chain": 1, "draw": 50, "data": 3, "w_dim_0": 2}
    assert dims(data, "posterior")["w"] == ("chain", "draw", "data", "w_dim_0")
    one_row = to_arviz(guide.posterior(x[:1]))["posterior"]
    assert one_row["z"].shape == (1, 1000, 1)
    assert one_row["w"].shape == (1, 1000, 1, 2)


def test_the_axes_of_a_posterior_are_those_of_the_fit():
    case = CASES["three_levels"]
    own, (args, _) = case.make(), case.example()
    fit = fitted(own, *args)
    assert dims(to_arviz(fit.guide.posterior(*args), 5), "posterior") == dims(to_arviz(fit, 5), "posterior")


def test_mcmc_has_its_chains_and_divergences(x):
    fit = drawn(model, x)
    data = to_arviz(fit)
    assert groups(data) == {"posterior", "log_likelihood", "observed_data", "sample_stats"}
    for name, draws in fit.samples.items():
        torch.testing.assert_close(values(data, "posterior", name), draws, rtol=0, atol=0)
    torch.testing.assert_close(values(data, "sample_stats", "diverging"), fit.diverging)
    assert fit.diverging.shape == (2, 30)
    assert fit.divergences == int(fit.diverging.sum())
    thinned = to_arviz(fit, num_samples=10)
    torch.testing.assert_close(values(thinned, "posterior", "z"), fit.samples["z"][:, ::3], rtol=0, atol=0)
    assert thinned["sample_stats"]["diverging"].shape == (2, 10)
    assert thinned["log_likelihood"]["x"].shape == (2, 10, 8)


def test_divergent_transitions_are_told(x):
    def funnel():
        scale = pyro.sample("scale", dist.Normal(0.0, 3.0))
        pyro.sample("v", dist.Normal(torch.zeros(9), (scale / 2).exp()).to_event(1))

    fit = drawn(funnel, num_samples=100, target_accept_prob=0.5)  # long steps, which the neck does not forgive
    assert fit.divergences
    assert int(to_arviz(fit)["sample_stats"]["diverging"].sum()) == fit.divergences


def test_what_is_given_is_constant(x):
    data = to_arviz(drawn(model, x, given={"theta": torch.tensor(2.0)}))
    assert set(data["posterior"].data_vars) == {"z", "w"}
    assert set(data["log_likelihood"].data_vars) == set(data["observed_data"].data_vars) == {"x"}
    assert float(data["constant_data"]["theta"]) == 2


def test_draws_have_numbered_dimensions(x):
    fit = fitted(model, x)
    draws = fit.guide.predictive(x, num_samples=7)
    data = to_arviz(draws)
    assert dims(data, "posterior")["z"] == ("chain", "draw", "z_dim_0")
    for name, value in draws.items():
        torch.testing.assert_close(values(data, "posterior", name)[0], value, rtol=0, atol=0)
    assert to_arviz(draws, num_samples=2)["posterior"]["w"].shape == (1, 2, 8, 2)
    pyros = Predictive(model, guide=fit.guide, num_samples=4, return_sites=["z"])(x)
    assert to_arviz(pyros)["posterior"]["z"].shape == (1, 4, 8)


def test_kinds_of_values():
    draws = {
        "flag": torch.rand(5, 2) > 0.5,
        "count": torch.arange(5),
        "double": torch.randn(5, dtype=torch.float64),
        "none": torch.zeros(5, 0),
        "learnt": torch.randn(5, requires_grad=True),
        "plain": np.arange(5.0),
    }
    data = to_arviz(draws)["posterior"]
    kinds = {name: str(variable.dtype) for name, variable in data.data_vars.items()}
    assert kinds == {
        "flag": "bool",
        "count": "int64",
        "double": "float64",
        "none": "float32",
        "learnt": "float32",
        "plain": "float64",
    }
    assert data["none"].shape == (1, 5, 0)
    data["learnt"].values[:] = 0
    assert draws["learnt"].abs().min() > 0


def test_a_report_has_its_numbers_along_the_plate(x):
    guide = fitted(model, x).guide
    report = amortization_gap(model, guide, x, num_steps=10, num_draws=100, progress=False)
    data = to_arviz(report, num_samples=20)
    assert groups(data) == {"posterior", "log_likelihood", "observed_data", "constant_data", "gap"}
    assert dims(data, "posterior")["z"] == ("chain", "draw", "data")
    assert set(data["log_likelihood"].data_vars) == set(data["observed_data"].data_vars) == {"x"}
    torch.testing.assert_close(values(data, "constant_data", "theta"), report.given["theta"])
    for column in report.per_datum.columns.drop("estimator"):
        assert data["gap"][column].dims == ("data",)
        np.testing.assert_array_equal(data["gap"][column].values, report.per_datum[column].to_numpy())
    assert dims(to_arviz(replace(report, optimum=None)), "gap")["elbo"] == ("datum",)
    with pytest.raises(ValueError, match=r"neither a fit of q\* nor numbers per datum.*to_arviz\(guide"):
        to_arviz(replace(report, optimum=None, per_datum=None))


def by_hand(x):
    pyro.sample("theta", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("w", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


def test_a_comparison_has_the_groups_of_each_fit(x):
    result = compare_inference(
        model,
        x,
        methods={"mean field": "mean_field", "hand": by_hand, "mcmc": "mcmc"},
        svi={"num_steps": 5},
        mcmc={"num_samples": 20, "warmup_steps": 20, "num_chains": 2},
        progress=False,
    )
    data = to_arviz(result, num_samples=10)
    assert groups(data) == {
        *("posterior", "log_likelihood", "observed_data"),
        *("posterior_hand", "log_likelihood_hand"),
        *("posterior_mcmc", "log_likelihood_mcmc", "sample_stats_mcmc"),
    }
    assert data["posterior_mcmc"]["z"].shape == (2, 10, 8)
    first = to_arviz(result.fits["mean field"], num_samples=10)
    torch.testing.assert_close(values(data, "posterior", "z"), values(first, "posterior", "z"))
    with pytest.raises(ValueError, match=r"guides only.*fits\['hand'\]\.posterior"):
        to_arviz(replace(result, fits={"hand": by_hand}))


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, "by hand"])
def test_guides_not_of_ours(kind, x):
    guide = by_hand if kind == "by hand" else kind(model)
    guide(x)
    data = to_arviz(fitted(model, x, guide=guide), num_samples=30)
    assert set(data["posterior"].data_vars) == {"theta", "z", "w"}
    assert dims(data, "posterior")["w"] == ("chain", "draw", "data", "w_dim_0")
    loc = values(data, "posterior", "z") + values(data, "posterior", "w").sum(-1)
    torch.testing.assert_close(values(data, "log_likelihood", "x"), dist.Normal(loc, 0.5).log_prob(x))


@pytest.mark.parametrize("kind", ["svi", "mcmc", "amortized"])
def test_discrete_latents_are_drawn(kind, x):
    x = x - 3
    if kind == "mcmc":
        fit = drawn(mixture, x, num_samples=200)
    else:
        fit = fitted(
            mixture, x, guide=AutoAmortizedNormal(mixture, encoder={"c": MLP()} if kind == "amortized" else None)
        )
    data = to_arviz(fit)
    assert dims(data, "posterior")["c"] == ("chain", "draw", "data")
    assert data["posterior"]["c"].dtype == np.int64
    z, c = values(data, "posterior", "z"), values(data, "posterior", "c")
    torch.testing.assert_close(values(data, "log_likelihood", "x"), dist.Normal(z, 0.5).log_prob(x))
    if kind != "amortized":
        weights = dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).log_prob(z[..., None]).exp() * torch.tensor([0.3, 0.7])
        share = (weights[..., 1] / weights.sum(-1)).mean((0, 1))
        torch.testing.assert_close(c.float().mean((0, 1)), share, atol=4 * 0.5 / math.sqrt(c[..., 0].numel()), rtol=0)


def test_a_posterior_draws_discrete_latents_too(x):
    data = to_arviz(fitted(mixture, x).guide.posterior(x), num_samples=10)
    assert dims(data, "posterior") == {"z": ("chain", "draw", "data"), "c": ("chain", "draw", "c_dim_0")}


@pytest.mark.parametrize("kind", ["default", "table", "hand"])
def test_a_plate_that_subsamples_is_walked_through(kind):
    x = torch.arange(11.0)

    def own(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=4) as i:
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def hand(x):
        pyro.sample("theta", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        with pyro.plate("data", len(x), subsample_size=4) as i:
            pyro.sample("z", dist.Normal(x[i], 0.01))

    guides = {"default": AutoAmortizedNormal(own), "table": AutoAmortizedNormal(own, encoder=Table()), "hand": hand}
    data = to_arviz(fitted(own, x, guide=guides[kind]), num_samples=20)
    torch.testing.assert_close(values(data, "observed_data", "x"), x)
    z = values(data, "posterior", "z")
    assert z.shape == (1, 20, 11)
    torch.testing.assert_close(values(data, "log_likelihood", "x"), dist.Normal(z, 1.0).log_prob(x))
    if kind == "hand":
        torch.testing.assert_close(z.mean((0, 1)), x, atol=0.02, rtol=0)


def test_minibatches_as_arguments_are_taken_as_they_are(x):
    def own(x):
        with pyro.plate("data", 100, len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    data = to_arviz(fitted(own, x), num_samples=5)
    torch.testing.assert_close(values(data, "observed_data", "x"), x)
    exact = dist.Normal(values(data, "posterior", "z"), 1.0).log_prob(x)
    torch.testing.assert_close(values(data, "log_likelihood", "x"), exact)


def test_two_plates_that_subsample_are_refused(x):
    def own(x):
        rows, columns = pyro.plate("rows", 8, subsample_size=4, dim=-2), pyro.plate("columns", 8, 4, dim=-1)
        with rows as i, columns as j:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i][:, None] + x[j])

    def hand(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("rows", 8, 4, dim=-2), pyro.plate("columns", 8, 4, dim=-1):
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pytest.raises(NotImplementedError, match=r"plates '(rows|columns)' and '(rows|columns)'.*batch_size"):
        to_arviz(fitted(own, x, guide=hand))


@pytest.mark.parametrize("kind", ["handler", "distribution", "nan"])
def test_masked_observations_are_not_there(kind):
    """Leave-one-out is that of the data that are there, to the digit; the others stand with their places."""

    def priors():
        return pyro.sample("mean", dist.Normal(0.0, 5.0)), pyro.sample("sd", dist.LogNormal(0.0, 1.0))

    def masked(y, mask):
        mean, sd = priors()
        with pyro.plate("rows", 50, dim=-2), pyro.plate("columns", 4, dim=-1):
            if kind == "handler":
                with poutine.mask(mask=mask):
                    pyro.sample("y", dist.Normal(mean, sd), obs=y)
            elif kind == "distribution":
                pyro.sample("y", dist.Normal(mean, sd).mask(mask), obs=y)
            else:
                pyro.sample("y", dist.NanMaskedNormal(mean, sd), obs=torch.where(mask, y, torch.nan))

    def there(y):
        mean, sd = priors()
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mean, sd), obs=y)

    y, mask = 1 + torch.randn(50, 4), torch.rand(50, 4) < 0.5

    def guide(*args):
        pyro.sample("mean", dist.Normal(1.0, 0.1))
        pyro.sample("sd", dist.LogNormal(0.0, pyro.param("spread", torch.tensor(0.05))))

    own, other = (fitted(m, *args, guide=guide) for m, args in ((masked, (y, mask)), (there, (y[mask],))))
    data = to_arviz(own, num_samples=200)
    entries = data.log_likelihood["y"]
    assert entries.dims == ("chain", "draw", "y_entry")
    assert torch.equal(torch.as_tensor(entries["y_rows"].values), mask.nonzero()[:, 0])
    assert torch.equal(torch.as_tensor(entries["y_columns"].values), mask.nonzero()[:, 1])
    assert data.observed_data["y"].shape == (50, 4)
    found, exact = az.loo(data), az.loo(to_arviz(other, num_samples=200))
    assert found.n_data_points == int(mask.sum())
    assert found.elpd_loo == pytest.approx(exact.elpd_loo, rel=1e-4)
    assert found.se == pytest.approx(exact.se, rel=1e-4)


def test_masked_observations_of_a_plate_that_is_walked_through(x):
    def own(x, mask):
        theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 8, 3) as rows, poutine.mask(mask=mask[rows]):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x[rows])

    mask = torch.arange(8) % 3 > 0
    data = to_arviz(fitted(own, x, mask), num_samples=5)
    assert data.log_likelihood["x"].dims == ("chain", "draw", "x_entry")
    assert data.log_likelihood["x"]["x_data"].values.tolist() == mask.nonzero().flatten().tolist()
    theta = values(data, "posterior", "theta")
    exact = dist.Normal(theta[..., None], 1.0).log_prob(x[mask])
    torch.testing.assert_close(values(data, "log_likelihood", "x"), exact)


def test_a_site_without_observations_has_no_likelihood(x):
    def own(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    data = to_arviz(fitted(own, x, torch.zeros(8, dtype=torch.bool)), num_samples=5)
    assert dims(data, "log_likelihood") == {"x": ("chain", "draw", "data")}


# Names.


def test_names_that_mean_something_elsewhere(x, tmp_path):
    def own(x):
        draw = pyro.sample("draw", dist.Normal(0.0, 1.0))
        with pyro.plate("chain", len(x)):
            one = pyro.sample("z/1", dist.Normal(0.0, 1.0))
            two = pyro.sample("z_1", dist.Normal(0.0, 1.0))
            three = pyro.sample("net.weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(draw + one + two + three.sum(-1), 1.0), obs=x)

    data = to_arviz(fitted(own, x), num_samples=10)
    assert dims(data, "posterior") == {
        "draw_": ("chain", "draw"),
        "z_1": ("chain", "draw", "chain_"),
        "z_1_": ("chain", "draw", "chain_"),
        "net.weight": ("chain", "draw", "chain_", "net.weight_dim_0"),
    }
    same(read_back(data, tmp_path), data)


def test_a_plate_that_is_called_as_a_site(x, tmp_path):
    def own(x):
        with pyro.plate("data", dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("data", dist.Normal(z, 1.0), obs=x)

    data = to_arviz(drawn(own, x))
    assert dims(data, "posterior") == {"z": ("chain", "draw", "data_")}
    assert dims(data, "observed_data") == {"data": ("data_",)}
    same(read_back(data, tmp_path), data)


def test_two_plates_of_one_size():
    def own(x):
        with pyro.plate("rows", 3, dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 3, dim=-1):
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
        with pyro.plate("rows_", 3, dim=-2), pyro.plate("columns_", 3, dim=-1):
            pyro.sample("x", dist.Normal(u + v, 1.0), obs=x)

    data = to_arviz(drawn(own, torch.randn(3, 3)))
    assert dims(data, "posterior") == {"u": ("chain", "draw", "rows"), "v": ("chain", "draw", "columns")}
    assert dims(data, "log_likelihood") == {"x": ("chain", "draw", "rows_", "columns_")}


# What ArviZ does with it.


def read_back(data, tmp_path):
    pytest.importorskip("h5netcdf")
    path = str(tmp_path / "data.nc")
    data.to_netcdf(path)
    return az.from_netcdf(path)


@pytest.fixture(scope="module")
def both():
    x = 3 + torch.randn(8, generator=torch.Generator().manual_seed(0))
    return {"svi": to_arviz(fitted(model, x)), "mcmc": to_arviz(drawn(model, x))}


@pytest.mark.parametrize("kind", ["svi", "mcmc"])
def test_summaries(kind, both):
    table = az.summary(both[kind], round_to=6)
    assert list(table.index[:3]) == ["theta", "z[0]", "z[1]"]
    assert len(table) == 1 + 8 + 16
    mean = values(both[kind], "posterior", "theta").mean()
    assert float(table["mean"].iloc[0]) == pytest.approx(float(mean), abs=1e-3)


def test_leave_one_out_and_its_comparison(both):
    for data in both.values():
        elpd = az.loo(data, pointwise=True)
        found = elpd.elpd_loo if hasattr(elpd, "elpd_loo") else elpd.elpd
        lppd = values(data, "log_likelihood", "x").flatten(0, 1).double()
        lppd = float((lppd.logsumexp(0) - math.log(len(lppd))).sum())
        assert -math.inf < found < lppd
    assert set(az.compare(both).index) == {"svi", "mcmc"}


# ArviZ 0.2x, of matplotlib 3.11.
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning")
@pytest.mark.parametrize("plot", ["plot_trace", "plot_forest", "plot_rank", "plot_autocorr"])
def test_plots(plot, both):
    getattr(az, plot)(both["mcmc"], var_names=["theta", "z"])
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("kind", ["svi", "mcmc"])
def test_files(kind, both, tmp_path):
    again = read_back(both[kind], tmp_path)
    same(again, both[kind])
    assert len(az.summary(again)) == 25


# What it leaves alone.


def test_nothing_of_the_users_changes(x):
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(), torch.nn.Linear(4, 3))

    def own(x):
        net_ = pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(0.8), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net_(z), scale).to_event(1), obs=x)

    fit = fitted(own, torch.randn(12, 3))

    def state():
        tensors = {**pyro.get_param_store(), **net.state_dict(), **fit.guide.state_dict()}
        tensors = {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        random = pyro.util.get_rng_state()
        return {**tensors, "torch": random["torch"], "numpy": torch.as_tensor(random["numpy"][1])}

    assert net.training
    before = state()
    first = to_arviz(fit, num_samples=20)
    after = state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert net.training
    torch.randn(3)
    same(to_arviz(fit, num_samples=20), first)


# What it refuses.


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, True])
def test_numbers_of_draws(num_samples):
    with pytest.raises(ValueError, match=r"num_samples=.* Expected a positive whole number"):
        to_arviz({"z": torch.zeros(3)}, num_samples=num_samples)


def test_errors_say_what_to_do(x):
    fit = fitted(model, x)
    with pytest.raises(TypeError, match=r"got a AutoAmortizedNormal.*to_arviz\(guide\.posterior"):
        to_arviz(fit.guide)
    with pytest.raises(ValueError, match=r"SVIFit does not say which model.*to_arviz\(guide\.posterior"):
        to_arviz(replace(fit, model=None))
    with pytest.raises(ValueError, match=r"num_samples=4, but there are 3 draws of 'z'"):
        to_arviz({"z": torch.zeros(3)}, num_samples=4)
    with pytest.raises(ValueError, match=r"draws of 'w' have shape \(2,\).*as many draws"):
        to_arviz({"z": torch.zeros(3), "w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"draws of 'z' have shape \(\)"):
        to_arviz({"z": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="no draws"):
        to_arviz({})


def test_records_remember_what_they_are_of(x):
    fit = fitted(model, x)
    assert fit.model is model
    assert fit.args[0] is x
    assert "model" not in repr(fit)
    optimum = fit_optimum(model, fit.guide, x, num_steps=2, progress=False)
    assert set(to_arviz(optimum, num_samples=5)["observed_data"].data_vars) == {"theta", "x"}
