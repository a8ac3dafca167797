"""Where a model is run when it is looked at: its latents' priors may live anywhere."""

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.constraints as constraints
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import ClippedAdam

from pyro_amortize import MLP, AutoAmortizedNormal, DeepSets, Table, fit_svi, plan_amortization
from pyro_amortize.bases import look
from pyro_amortize.calls import Call
from pyro_amortize.examination import examine

N = 60
Y = torch.randn(N, generator=torch.Generator().manual_seed(0))
HIT = (Y > 0).float()


def plate(data):
    return pyro.plate("n", len(data))


def rectified(y):
    with plate(y):
        z = pyro.sample("z", dist.Normal(5.0, 1.0))
        pyro.sample("y", dist.Poisson(torch.relu(z - 2) + 1e-3), obs=y)


def rooted(y):
    with plate(y):
        z = pyro.sample("z", dist.Normal(20.0, 2.0))
        pyro.sample("y", dist.Normal((z - 5).sqrt(), 0.1), obs=y)


def saturated(y):
    with plate(y):
        z = pyro.sample("z", dist.Normal(50.0, 10.0))
        pyro.sample("y", dist.Bernoulli(torch.sigmoid(z - 50)), obs=y)


def rates(y):
    with plate(y):
        z = pyro.sample("z", dist.LogNormal(-9.0, 0.5))
        pyro.sample("y", dist.Poisson(torch.relu(z - 1e-5) * 1e5), obs=y)


def swallowed(y):
    """At zero, a change of z by less than 30 is lost in the digits of the density, 5e17."""
    with plate(y):
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def clamped(y):
    """Flat at the prior's draws, but not farther off."""
    with plate(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.clamp(min=30.0), 1.0), obs=y)


def raising(y):
    with plate(y):
        z = pyro.sample("z", dist.Normal(20.0, 2.0))
        if bool((z < 5).any()):
            raise RuntimeError("a solver that diverges")
        pyro.sample("y", dist.Normal(z.log(), 1.0), obs=y)


def bounded(y):
    """No value of z at which the densities of all rows are finite has been tried when the first rows are."""
    with plate(y):
        z = pyro.sample("z", dist.Exponential(0.2))
        pyro.sample("y", dist.Uniform(0.0, z), obs=y)


def in_place(y):
    with plate(y):
        z = pyro.sample("z", dist.Normal(500.0, 1.0))
        loc = torch.zeros(len(y))
        loc[:] = torch.relu(z - 499)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


LOCAL = {
    rectified: torch.poisson(torch.full((N,), 3.0)),
    rooted: 4 + 0.2 * Y,
    saturated: HIT,
    rates: torch.poisson(torch.full((N,), 10.0)),
    swallowed: 1e9 + 1e3 * Y,
    clamped: 30 + Y,
    raising: 3 + 0.1 * Y,
    bounded: 10 * torch.rand(N),
    in_place: Y,
}


@pytest.mark.parametrize(("model", "data"), LOCAL.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_local_latents_are_informed_wherever_their_priors_live(model, data):
    plan = plan_amortization(model, data)
    (block,) = plan.blocks
    assert (block.sites, block.plates, block.inputs) == (("z",), ("n",), ("y",))
    assert plan.left_to_model == plan.flat == ()
    assert plan.verdict.closable is True


def test_groups_are_found_by_their_index_though_the_likelihood_saturates():
    def model(y, group):
        with pyro.plate("groups", 5):
            b = pyro.sample("b", dist.Normal(200.0, 20.0))
        with plate(y):
            pyro.sample("y", dist.Bernoulli(torch.sigmoid(b[..., group] - 200)), obs=y)

    (block,) = plan_amortization(model, HIT, torch.arange(N) * 7 % 5).blocks
    assert (block.sites, block.plates, block.inputs) == (("b",), ("groups",), ("y",))


def test_covariates_are_seen_though_the_likelihood_saturates():
    def model(y, c):
        with plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 1000.0))
            pyro.sample("y", dist.Bernoulli(torch.sigmoid(z + c)), obs=y)

    (block,) = plan_amortization(model, HIT, Y).blocks
    assert set(block.inputs) == {"y", "c"}


@pytest.mark.parametrize("seed", range(4))
def test_covariates_are_seen_at_each_site_that_they_enter(seed):
    """Few rows show that the covariate enters 'x', and all that it enters 'y'."""

    def model(y, c):
        with plate(c):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(torch.sigmoid(30 * torch.tanh(9 * (z + c - 2)))), obs=y["x"])
            pyro.sample("y", dist.Normal(z + c, 1.0), obs=y["y"])

    torch.manual_seed(seed)
    found = {source.name: source.reaches for source in examine(model, ({"x": HIT, "y": Y}, torch.randn(N)), {}).sources}
    assert found == {"y['x']": {"x"}, "y['y']": {"y"}, "c": {"x", "y"}}


def test_data_are_seen_as_an_argument_though_their_values_are_alike_where_the_prior_lives():
    """Of a fair coin both sides are as likely; and what cuts data to zero and one has no gradient."""

    def model(y):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(torch.sigmoid(torch.relu(u + z - 5))), obs=(y > 0).float())

    assert [(s.name, s.axes) for s in examine(model, (Y,), {}).sources] == [("y", (0,))]


def test_a_vague_scale_hides_no_location():
    """Draws of the scale's prior are so large that the density has no digits left for the location, or the data."""

    def model(y):
        precision = pyro.sample("precision", dist.Gamma(0.001, 0.001))
        with plate(y):
            z = pyro.sample("z", dist.Normal(0.0, precision.rsqrt()))
            pyro.sample("y", dist.Normal(z, precision.rsqrt()), obs=y)

    plan = plan_amortization(model, Y)
    assert [block.inputs for block in plan.blocks] == [(), ("y",)]
    assert plan.left_to_model == ()


def test_series_far_from_zero():
    def model(y):
        with pyro.plate("n", len(y)):
            z = 300.0
            for t in range(4):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 10.0))
                pyro.sample(f"y_{t}", dist.Bernoulli(torch.sigmoid((z - 300) / 3)), obs=y[:, t])

    (block,) = plan_amortization(model, (torch.randn(10, 4) > 0).float()).blocks
    assert (block.sites, block.plates, block.inputs) == (("z_*",), ("n", "steps"), ("y",))


def trials(level, hit):
    centre = pyro.sample("centre", dist.Normal(0.0, 10.0))
    spread = pyro.sample("spread", dist.Normal(0.0, 10.0))
    with pyro.plate("trials", len(level)):
        p = dist.Normal(0.0, 1.0).cdf((level - centre) / spread.exp())
        pyro.sample("hit", dist.Bernoulli(p), obs=hit)


def test_globals_of_a_likelihood_that_saturates_are_trained():
    torch.manual_seed(0)
    level = torch.tensor([-60.0, -40, -20, 20, 40, 60]).repeat(60)
    hit = torch.bernoulli(dist.Normal(0.0, 1.0).cdf((level - 12) / 18))
    start = init_to_value(values={"centre": torch.tensor(11.5), "spread": torch.tensor(3.0)})
    guide = AutoAmortizedNormal(trials, init_loc_fn=start, init_scale=1.0)
    fit = fit_svi(trials, guide, level, hit, num_steps=250, lr=0.1, progress=False, seed=0)
    # By quadrature: 12.37 +- 2.25, 2.902 +- 0.102, log evidence -72.24. A normal q loses a few hundredths.
    assert guide.plan.left_to_model == ()
    assert abs(float(guide.median(level, hit)["centre"]) - 12.37) < 0.7
    assert abs(float(guide.median(level, hit)["spread"]) - 2.902) < 0.04
    assert -72.24 - 0.2 < fit.elbo < -72.24 + 3 * fit.elbo_se


def test_what_informs_a_rectified_latent_trains_it():
    torch.manual_seed(0)
    y = torch.poisson(torch.relu(3 + torch.randn(100)))
    fit = fit_svi(rectified, AutoAmortizedNormal(rectified), y, num_steps=600, progress=False, seed=0)
    assert fit.elbo > -208  # AutoNormal reaches -204.2; the prior as q has -227


def test_a_model_that_lives_far_from_zero_is_trained_in_minibatches_and_predicts():
    y = LOCAL[rooted]
    fit = fit_svi(rooted, AutoAmortizedNormal(rooted), y, num_steps=3, batch_size=10, progress=False, seed=0)
    assert fit.guide.predictive(y, num_samples=2)["y"].shape == (2, N)


# How many places it takes.


def looked(model, *args):
    return look(model, Call(model, args, {}), lambda _: False)


def test_an_ordinary_model_is_run_at_one_place_a_dozen_times():
    runs = []

    def model(y):
        runs.append(None)
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with plate(y):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    assert len(looked(model, Y).bases) == 1
    assert len(runs) <= 12


def test_places_that_show_nothing_more_are_not_kept():
    assert len(looked(saturated, HIT).bases) == 1
    assert len(looked(swallowed, 1e9 + 1e3 * Y).bases) == 1


# What is not seen is not left alone, and what is idle is.


def hopeless(y):
    with plate(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(torch.sigmoid(z - 1e6)), obs=y)


def test_a_latent_that_no_value_shows_to_be_informed_gets_its_encoder_and_a_word():
    plan = plan_amortization(hopeless, HIT)
    (block,) = plan.blocks
    assert (block.sites, block.inputs, plan.flat) == (("z",), ("y",), ("z",))
    assert "not seen to move the data's densities: z" in str(plan)
    assert plan.verdict.closable is None
    assert "no value of 'z' that was tried moves the density of 'y'" in plan.verdict.reason
    assert type(plan).from_dict(plan.to_dict()) == plan


def test_a_global_that_no_value_shows_to_be_informed_gets_a_table_and_a_word():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        with plate(y):
            pyro.sample("y", dist.Bernoulli(torch.sigmoid(mu - 1e9)), obs=y)

    plan = plan_amortization(model, HIT)
    assert (plan.block_of("mu").rows, plan.flat) == (1, ("mu",))


def packed(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    both = torch.stack([a, b])
    with plate(y):
        pyro.sample("y", dist.Normal(both[0], 1.0), obs=y)
        pyro.sample("x", dist.Normal(both[1], 1.0), obs=y)


def test_a_latent_of_code_without_gradients_is_not_left_alone_unless_it_comes_after_the_data():
    def model(y):
        with plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(torch.as_tensor(np.maximum(z.numpy(), 1e9)), 1.0), obs=y)
        pyro.sample("next", dist.Normal(0.0, 1.0))

    plan = plan_amortization(model, Y)
    assert (plan.flat, plan.left_to_model) == (("z",), ("next",))


def test_latents_in_one_tensor_inform_only_what_they_move():
    probes = looked(packed, Y)
    assert (probes.reached("a"), probes.reached("b")) == ({"y"}, {"x"})
    assert plan_amortization(packed, Y).flat == ()


def test_idle_latents_are_left_to_the_model():
    def model(y):
        pyro.sample("unused", dist.Normal(50.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(50.0, 1.0))
        with plate(y):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        with pyro.plate("new", 3):
            pyro.sample("y_new", dist.Normal(theta, 1.0))

    assert plan_amortization(model, Y).left_to_model == ("unused", "y_new")


def test_a_fit_without_parameters_names_what_is_left_to_the_model():
    def model(y):
        with plate(y):
            pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"nothing to train. The plan leaves \['w'\].*encoder=\{'w': MLP\(\)\}"):
        fit_svi(model, AutoAmortizedNormal(model), Y, num_steps=2, progress=False)


@pytest.mark.parametrize(
    ("options", "inputs"),
    [({"encoder": {"w": MLP()}}, ("y",)), ({"inputs": {"w": "y"}}, ("y",)), ({"encoder": {"w": Table()}}, ())],
    ids=["encoder", "inputs", "table"],
)
def test_options_overrule_that_a_latent_is_left_to_the_model(options, inputs):
    def model(y):
        with plate(y):
            pyro.sample("w", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    assert plan_amortization(model, Y).left_to_model == ("w",)
    guide = AutoAmortizedNormal(model, **options)
    guide.initialize(Y)
    assert guide.plan.left_to_model == ()
    assert guide.plan.block_of("w").inputs == inputs
    assert guide.median(Y)["w"].shape == (N,)


def test_a_global_is_encoded_on_demand_though_no_data_were_seen_to_depend_on_it():
    def model(y):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with plate(y):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    guide = AutoAmortizedNormal(model, encoder={"w": DeepSets()})
    guide.initialize(Y)
    assert guide.plan.block_of("w").inputs == ("y",)


# Densities that are finite nowhere.


def function_of_its_latent(y):
    with plate(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Delta(2 * z), obs=y)


def ends_of_a_support(y):
    with plate(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Gamma(z.exp(), 1.0), obs=y)


def negative_counts(y):
    with plate(y):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Poisson(z), obs=y)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (function_of_its_latent, Y, r"density of 'y' is -inf at every value.*exact function of a latent.*a noise"),
        (ends_of_a_support, Y.clamp(min=0), r"'y' holds 0, where Gamma's density is not finite.*Mask"),
        (negative_counts, -torch.ones(N), r"'y' holds -1, where Poisson's density is not finite.*60 of 60 values"),
    ],
    ids=["function", "end", "negative"],
)
def test_observations_whose_density_is_finite_nowhere(model, data, message):
    with pytest.raises(ValueError, match=rf"plan_amortization: .*{message}"):
        plan_amortization(model, data)


def test_zeros_under_a_mask_are_no_matter():
    def model(y):
        with plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=y > 0):
                pyro.sample("y", dist.Gamma(z.exp(), 1.0), obs=y)

    assert plan_amortization(model, (Y > 0) * Y).block_of("z").inputs == ("y",)


def test_values_outside_of_a_support_are_refused_in_pyros_words():
    with pytest.raises(ValueError, match=r"site 'y'[\s\S]*support"):
        plan_amortization(negative_counts, torch.full((N,), 0.5))


def test_no_warning_comes_of_values_far_off():
    def model(y):
        with plate(y):
            w = pyro.sample("w", dist.Normal(5.0, 3.0))
            loc = torch.as_tensor(np.exp(w.detach().numpy()))
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        pyro.sample("unused", dist.Normal(0.0, 1.0))

    plan = plan_amortization(model, Y)  # all places are tried, in search of what 'unused' may move
    assert plan.left_to_model == ("unused",)


def test_parameters_that_validation_refuses_at_some_values_only():
    def model(y):
        with plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 0.5))
            pyro.sample("y", dist.Bernoulli(0.5 + z), obs=y)

    assert plan_amortization(model, HIT).block_of("z").inputs == ("y",)


def test_a_model_that_raises_everywhere():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        raise RuntimeError(f"no solution at {float(z):.1f}")

    with pytest.raises(RuntimeError, match="no solution"):
        plan_amortization(model, Y)


# Functions of latents.


def through(kind):
    def model(y):
        with plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            d = pyro.sample("d", dist.Delta(2 * z)) if kind == "delta" else pyro.deterministic("d", 2 * z)
            pyro.sample("y", dist.Normal(d, 0.5), obs=y)

    return model


def test_a_delta_between_a_latent_and_its_data_is_seen_through():
    losses = []
    for kind in ("delta", "deterministic"):
        pyro.set_rng_seed(0)
        guide = AutoAmortizedNormal(through(kind))
        svi = SVI(through(kind), guide, ClippedAdam({"lr": 0.01}), Trace_ELBO())
        losses.append([svi.step(Y) for _ in range(3)])
        (block,) = guide.plan.blocks
        assert (block.sites, block.inputs, guide.plan.verdict.closable) == (("z",), ("y",), True)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_density_of_a_delta_is_a_factor_of_the_model():
    def model(y, kind):
        with plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if kind == "delta":
                z = pyro.sample("w", dist.Delta(z, log_density=-z.square()))
            else:
                pyro.factor("w", -z.square())
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    losses = []
    for kind in ("delta", "factor"):
        pyro.set_rng_seed(0)
        svi = SVI(model, AutoAmortizedNormal(model), ClippedAdam({"lr": 0.01}), Trace_ELBO())
        losses.append([svi.step(Y, kind) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_mean_over_a_plate_as_a_delta_couples_if_data_depend_on_it():
    def model(y, used):
        rows = plate(y)
        with rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = pyro.sample("mean", dist.Delta(z.mean()))
        with rows:
            pyro.sample("y", dist.Normal(z + used * mean, 0.5), obs=y)

    assert plan_amortization(model, Y, 1.0).verdict.closable is False
    assert plan_amortization(model, Y, 0.0).verdict.closable is True


# Nothing to amortize, and why.


def test_a_model_of_which_no_site_is_observed():
    def model(y):
        with plate(y):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    verdict = plan_amortization(model, Y).verdict
    assert verdict.closable is None
    assert "no site of the model is observed" in verdict.reason


def test_why_nothing_is_amortized():
    def model(y):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with plate(y):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    def coupled(y):
        with pyro.plate("k", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with plate(y):
            pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)

    def idle(y):
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        with plate(y):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    reasons = [plan_amortization(m, Y).verdict.reason for m in (model, coupled, idle)]
    assert "outside the plates of the data" in reasons[0]
    assert "encoder={'theta': DeepSets()}" in reasons[0]
    assert "no rows of data belong to single elements of 'w' (plate 'k')" in reasons[1]
    assert "no data depend on any latent" in reasons[2]
    guide = AutoAmortizedNormal(rectified, encoder=Table())
    guide.initialize(LOCAL[rectified])
    assert "every block is a table, as encoder= says" in guide.plan.verdict.reason
