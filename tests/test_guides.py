"""The guides' own options and promises; what holds for all of them is among the laws."""

import copy
import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES, SIGMA, TAU, base
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal, init_to_mean, init_to_sample, init_to_value
from pyro.infer.reparam import LocScaleReparam
from pyro.optim import Adam, ClippedAdam
from pyro.poutine.runtime import _PYRO_STACK
from torch import nn

from pyro_amortize import MLP, AutoAmortized, AutoAmortizedNormal, Constant, Table, fit_svi


def guide_of(name, *, model=None, cls=AutoAmortizedNormal, **options):
    case = CASES[name]
    args, kwargs = case.example()
    model = model or case.make()
    guide = cls(model, **options)
    guide.initialize(*args, **kwargs)
    return model, guide, args, kwargs


# Construction and initialization.


def test_the_preset_is_the_guide_with_its_family():
    assert issubclass(AutoAmortizedNormal, AutoAmortized)
    _, guide, _, _ = guide_of("linear", cls=AutoAmortized)
    _, preset, _, _ = guide_of("linear")
    assert type(guide.family) is type(preset.family)


def test_parameters_exist_after_initialize():
    guide = AutoAmortizedNormal(CASES["linear"].make())
    assert list(guide.state_dict()) == ["_extra_state"]
    args, _ = CASES["linear"].example()
    guide.initialize(*args)
    assert len(list(guide.parameters())) == 7


def test_a_second_initialize_before_training_replaces_the_statistics():
    _, guide, (x,), _ = guide_of("linear")
    guide.initialize(100 + 5 * x)
    (preparation,) = guide.preparation_of(guide.plan.block_of("z"))
    torch.testing.assert_close(preparation.shift, (100 + 5 * x).mean(0, keepdim=True))
    torch.testing.assert_close(preparation.scale, (5 * x).std(0, keepdim=True, unbiased=False))


def test_initialize_after_training_keeps_what_was_learnt():
    model, guide, (x,), _ = guide_of("linear")
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    before = guide.median(x)
    guide.initialize(100 + 5 * x)
    assert torch.equal(guide.median(x)["z"], before["z"])


def test_initialize_after_load_state_dict_keeps_what_was_loaded():
    model, guide, (x,), _ = guide_of("linear")
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3)
    fresh = AutoAmortizedNormal(model)
    fresh.load_state_dict(guide.state_dict())
    fresh.initialize(100 + 5 * x)
    assert torch.equal(fresh.median(x)["z"], guide.median(x)["z"])


def test_the_loop_of_a_user_needs_no_initialize():
    case = CASES["linear"]
    (x,), _ = case.example()
    model = case.make()
    guide = AutoAmortizedNormal(model)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.02}), TraceMeanField_ELBO())
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20])


def test_q_starts_where_it_is_told():
    start = init_to_value(values={"theta": torch.tensor(2.0), "z": torch.full((12,), -1.5)})
    _, guide, (x,), _ = guide_of("linear", init_loc_fn=start, init_scale=0.3)
    posterior = guide.posterior(x)
    torch.testing.assert_close(posterior.mean["theta"], torch.tensor(2.0))
    torch.testing.assert_close(posterior.stddev["theta"], torch.tensor(0.3))
    assert abs(posterior.mean["z"].mean() + 1.5) < 0.2


@pytest.mark.parametrize("init_loc_fn", [init_to_mean, init_to_sample], ids=["mean", "sample"])
def test_pyros_initializations_serve(init_loc_fn):
    model, guide, args, kwargs = guide_of("linear", init_loc_fn=init_loc_fn)
    assert torch.isfinite(torch.tensor(Trace_ELBO().loss(model, guide, *args, **kwargs)))


def test_tables_start_at_each_elements_own_value():
    values = torch.arange(12.0)
    start = init_to_value(values={"theta": torch.tensor(0.0), "z": values})
    _, guide, (x,), _ = guide_of("linear", init_loc_fn=start, encoder=Table())
    torch.testing.assert_close(guide.median(x)["z"], values)


def test_options_are_keywords_only():
    with pytest.raises(TypeError):
        AutoAmortizedNormal(CASES["linear"].make(), "normal")


def test_create_plates_is_accepted():
    guide_of("linear", create_plates=lambda x: pyro.plate("n", len(x)))


# Encoders.


def test_a_module_is_shared_not_copied():
    trunk = nn.Linear(1, 5)
    _, guide, _, _ = guide_of("linear", encoder=trunk)
    assert guide.coder_of(guide.plan.block_of("z")).trunk is trunk
    assert any(parameter is trunk.weight for parameter in guide.parameters())


def test_a_callable_is_called_with_the_number_of_features():
    seen = []

    def encoder(in_features):
        seen.append(in_features)
        return nn.Linear(in_features, 5)

    guide_of("ppca", encoder=encoder)
    assert seen == [8]


def test_a_convolution_behind_unflatten():
    def model(images):
        with pyro.plate("n", len(images)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z.sum(-1)[..., None, None] * torch.ones(6, 6)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(2), obs=images)

    encoder = nn.Sequential(nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 3, 3), nn.ReLU())
    guide = AutoAmortizedNormal(model, encoder=encoder)
    images = torch.randn(7, 6, 6)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(images)
    before = encoder[1].weight.detach().clone()
    svi.step(images)
    assert bool((encoder[1].weight != before).any())
    assert guide.median(images[:1])["z"].shape == (1, 2)


def test_one_trunk_a_plate_with_a_head_a_site():
    _, guide, _, _ = guide_of("supports", encoder=MLP((8,)))
    (block,) = guide.plan.blocks
    coder = guide.coder_of(block)
    assert [head.out_features for head in coder.heads] == [2 * dim for dim in block.dims]


def test_encoders_by_site():
    _, guide, args, kwargs = guide_of(
        "several_observed", encoder={"a": MLP((4,)), "b": Constant()}, cls=AutoAmortizedNormal
    )
    assert {block.sites for block in guide.plan.blocks} == {("a",), ("b",)}
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    median = guide.median(*args, **kwargs)
    assert len(median["a"].unique()) == 12
    assert len(median["b"].unique()) == 1


def test_encoders_by_plate():
    _, guide, _, _ = guide_of("several_observed", encoder={"n": MLP((4,))})
    (block,) = guide.plan.blocks
    assert guide.coder_of(block).trunk[0].out_features == 4


def test_one_site_mean_field_the_others_amortized():
    model, guide, args, kwargs = guide_of("several_observed", encoder={"b": Table()})
    assert {block.sites[0]: block.amortized for block in guide.plan.blocks} == {"a": True, "b": False}
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(*args, **kwargs)
    assert guide.median(*args, **kwargs)["b"].shape == (12,)


def test_inputs_from_a_function():
    model, guide, args, kwargs = guide_of(
        "covariates_in_likelihood", inputs=lambda c, y, unused: torch.stack([c, y], -1)
    )
    assert guide.plan.blocks[0].features == 2
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(*args, **kwargs)
    small = [value[:3] for value in args]
    torch.testing.assert_close(
        guide.median(*small, unused=kwargs["unused"][:3])["z"], guide.median(*args, **kwargs)["z"][:3]
    )


def test_inputs_restrict_what_the_encoder_sees():
    _, guide, (c, y), kwargs = guide_of("covariates_in_likelihood", inputs=["y"])
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    straight = guide.median(c, y, **kwargs)["z"]
    assert torch.equal(straight, guide.median(c + 1, y, **kwargs)["z"])
    assert not torch.equal(straight, guide.median(c, y + 1, **kwargs)["z"])


@pytest.mark.parametrize("prepare", [None, lambda rows: rows / 10], ids=["none", "function"])
def test_prepare(prepare):
    trunk = nn.Identity()
    seen = []
    trunk.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    _, guide, (x,), _ = guide_of("ppca", encoder=trunk, prepare=prepare)
    guide.posterior(x)
    torch.testing.assert_close(seen[-1], x if prepare is None else x / 10)


def test_dropout_in_the_encoder_is_off_in_answers():
    trunk = nn.Sequential(nn.Linear(1, 32), nn.Dropout(0.5))
    _, guide, (x,), _ = guide_of("linear", encoder=trunk)
    assert torch.equal(guide.median(x)["z"], guide.median(x)["z"])
    assert trunk.training
    assert trunk[1].training
    pyro.set_rng_seed(0)
    first = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].loc
    second = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].loc
    assert not torch.equal(first, second)


# What it learns, against what is known.


@pytest.mark.parametrize("name", ["normal", "lognormal"])
def test_a_linear_encoder_learns_an_exact_posterior(name):
    case = CASES[name]
    x = base(1) * 2**0.5
    model = case.make()
    guide = AutoAmortizedNormal(model, encoder=MLP(()))
    optimizer = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.99})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(500):
        svi.step(x)
        optimizer.step()
    new = torch.tensor([-2.0, 0.0, 2.5])
    mean, stddev = case.posterior(new)["z"]
    posterior = guide.posterior(new)
    torch.testing.assert_close(posterior.mean["z"], mean, rtol=0.02, atol=0.02)
    torch.testing.assert_close(posterior.stddev["z"], stddev, rtol=0.05, atol=0.02)


def test_the_linear_model_reaches_its_mean_field_optimum():
    """Slope tau / (sigma^2 + tau^2) and sd(z) = sigma / sqrt(sigma^2 + tau^2): wider than nothing, no narrower."""
    case = CASES["linear"]
    x = base(1) * (TAU**2 + SIGMA**2) ** 0.5
    model = case.make()
    guide = AutoAmortizedNormal(model, encoder=MLP(()))
    optimizer = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.995})
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
    for _ in range(1200):
        svi.step(x)
        optimizer.step()
    low, high = torch.tensor([-1.0]), torch.tensor([1.0])
    slope = (guide.median(high)["z"] - guide.median(low)["z"]) / 2
    assert slope.item() == pytest.approx(0.159554, abs=0.01)
    assert guide.posterior(low).stddev["z"].item() == pytest.approx(0.903169, rel=0.03)
    assert guide.posterior(low).stddev["theta"].item() == pytest.approx(SIGMA / len(x) ** 0.5, rel=0.05)


# Inside other programs.


def test_inside_an_autoguidelist():
    case = CASES["linear"]
    (x,), _ = case.example()
    model = case.make()
    guide = AutoGuideList(model)
    local = AutoAmortizedNormal(poutine.block(model, hide=["theta"]))
    guide.append(AutoDelta(poutine.block(model, expose=["theta"])))
    guide.append(local)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(3)]
    assert torch.isfinite(torch.tensor(losses)).all()
    before = [parameter.detach().clone() for parameter in local.parameters()]
    svi.step(x)
    assert all(bool((old != new).any()) for old, new in zip(before, local.parameters(), strict=True))


def test_inside_an_autoguidelist_with_a_subsampling_plate():
    case = CASES["subsample_size"]
    (x,), _ = case.example()
    model = case.make()
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["theta"])))
    guide.append(AutoAmortizedNormal(poutine.block(model, hide=["theta"])))
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    assert torch.isfinite(torch.tensor([svi.step(x) for _ in range(3)])).all()


def test_conditioned_globals_are_held():
    _, guide, (x,), _ = guide_of("linear")
    held = pyro.condition(guide, data={"theta": torch.tensor(7.0)})
    assert held(x)["theta"] == 7.0


def test_substituted_subsamples_are_followed():
    _, guide, (x,), _ = guide_of("subsample_size")
    index = torch.tensor([3, 1, 4, 0, 7])
    trace = poutine.trace(poutine.condition(guide, data={"n": index})).get_trace(x)
    assert torch.equal(trace.nodes["n"]["value"], index)
    torch.testing.assert_close(trace.nodes["z"]["fn"].mean, guide.median(x, size=None)["z"][index])


def test_scalable_by_handlers_around_it():
    _, guide, (x,), _ = guide_of("linear")
    trace = poutine.trace(poutine.scale(guide, scale=0.5)).get_trace(x)
    assert trace.nodes["z"]["scale"] == 0.5


def test_samples_are_reparameterized():
    _, guide, (x,), _ = guide_of("supports")
    values = guide(x)
    assert all(value.requires_grad for value in values.values())


def test_return_values_and_observed_sites_of_the_model_stay_out():
    _, guide, (x,), _ = guide_of("linear")
    nodes = poutine.trace(guide).get_trace(x).nodes
    assert "x" not in nodes
    assert {name for name, node in nodes.items() if node["type"] == "param"} == {
        f"AutoAmortizedNormal.{name}" for name, _ in guide.named_parameters()
    }


def test_the_models_own_parameters_are_not_announced_by_the_guide():
    model, guide, (x,), _ = guide_of("vae")
    nodes = poutine.trace(guide).get_trace(x).nodes
    assert not any(name.startswith(("decoder", "scale")) for name in nodes)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x)
    scale = pyro.param("scale").item()
    svi.step(x)
    assert pyro.param("scale").item() != scale


@pytest.mark.parametrize("name", ["items", "values", "type", "children", "half", "my.plate", "a/b", "z[0]"])
def test_sites_and_plates_may_have_any_name(name, tmp_path):
    def by_site(x):
        theta = pyro.sample(name, dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def by_plate(x):
        with pyro.plate(name, len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = base(1)[:9]
    for program in (by_site, by_plate):
        guide = AutoAmortizedNormal(program, encoder=Constant())
        SVI(program, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(x)
        guide.save(tmp_path / "guide.pt")
        loaded = AutoAmortizedNormal.load(tmp_path / "guide.pt", program)
        (site,) = guide.median(x)
        assert torch.equal(loaded.median(x)[site], guide.median(x)[site])


class TestOptimizersMadeTooEarly:
    """Their list of parameters holds none of the guide's, so that they would train the model alone."""

    def test_the_first_call_is_refused_while_one_is_there(self):
        model, (x,) = CASES["module"].make(), CASES["module"].example()[0]
        guide = AutoAmortizedNormal(model)
        elbo = Trace_ELBO()(model, guide)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.1)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"guide.initialize\(...\)"):
                elbo(x)
        del optimizer
        assert elbo(x).isfinite()

    @pytest.mark.parametrize("how", ["initialize", "load_state_dict", "fit_svi"])
    def test_whatever_makes_the_parameters_says_so(self, how):
        model, (x,) = CASES["module"].make(), CASES["module"].example()[0]
        other = AutoAmortizedNormal(model)
        other.initialize(x)
        guide = AutoAmortizedNormal(model)
        optimizer = torch.optim.Adam(guide.parameters())
        ways = {
            "initialize": lambda: guide.initialize(x),
            "load_state_dict": lambda: guide.load_state_dict(other.state_dict()),
            "fit_svi": lambda: fit_svi(model, guide, x, num_steps=1, progress=False),
        }
        with pytest.warns(UserWarning, match=r"make the optimizer"):
            ways[how]()
        assert optimizer.param_groups

    def test_nothing_is_said_of_one_that_is_made_in_time(self):
        model, (x,) = CASES["module"].make(), CASES["module"].example()[0]
        guide = AutoAmortizedNormal(model)
        elbo = Trace_ELBO()(model, guide)
        assert sum(p.numel() for p in guide.parameters()) <= 1
        assert list(copy.deepcopy(guide).state_dict()) == list(guide.state_dict())
        elbo(x)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.1)
        before = [p.detach().clone() for p in guide.parameters()]
        elbo(x).backward()
        optimizer.step()
        assert all(bool((old != new).any()) for old, new in zip(before, guide.parameters(), strict=True))


def test_training_survives_a_cleared_param_store():
    model, guide, (x,), _ = guide_of("linear")
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    pyro.clear_param_store()
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    assert all(bool((old != new).any()) for old, new in zip(before, guide.parameters(), strict=True))


def test_reparameterized_models():
    args, _ = CASES["covariates_in_prior"].example()
    model = poutine.reparam(CASES["covariates_in_prior"].make(), {"z": LocScaleReparam(0.0)})
    guide = AutoAmortizedNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    assert torch.isfinite(torch.tensor([svi.step(*args) for _ in range(3)])).all()
    assert {site for block in guide.plan.blocks for site in block.sites} == {"w", "z_decentered"}


def test_a_user_of_numbered_plates_and_bare_excepts_leaves_the_stack_clean():
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            try:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            except:  # noqa: E722
                raise RuntimeError("the model caught the exit") from None

    x = torch.randn(9)
    guide = AutoAmortizedNormal(model)
    for _ in range(3):
        guide(x)
        guide.posterior(x)
        assert not _PYRO_STACK


def test_nothing_is_logged_above_info(caplog):
    with caplog.at_level(logging.WARNING):
        model, guide, args, _ = guide_of("supports")
        SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(*args)
    assert not caplog.records


# Save and load.


def test_save_needs_options_of_ones_own_again(tmp_path):
    case = CASES["linear"]
    trunk = nn.Linear(1, 3)
    model, guide, (x,), _ = guide_of("linear", encoder=trunk, prepare=torch.relu)
    guide.save(tmp_path / "guide.pt")
    with pytest.raises(ValueError, match=r"encoder=Linear, of your own.*load\(path, model, encoder=...\)"):
        AutoAmortizedNormal.load(tmp_path / "guide.pt", case.make(), prepare=torch.relu)
    with pytest.raises(ValueError, match=r"prepare=relu, of your own"):
        AutoAmortizedNormal.load(tmp_path / "guide.pt", case.make(), encoder=nn.Linear(1, 3))
    loaded = AutoAmortizedNormal.load(
        tmp_path / "guide.pt", case.make(), encoder=nn.Linear(1, 3), prepare=torch.relu, map_location="cpu"
    )
    assert torch.equal(loaded.median(x)["z"], guide.median(x)["z"])


def test_loading_reads_plain_data_only(tmp_path):
    _, guide, _, _ = guide_of("supports")
    guide.save(tmp_path / "guide.pt")
    assert set(torch.load(tmp_path / "guide.pt", weights_only=True)) == {"guide", "options", "model"}


def test_a_loaded_guide_trains_on(tmp_path):
    model, guide, (x,), _ = guide_of("linear")
    guide.save(tmp_path / "guide.pt")
    loaded = AutoAmortizedNormal.load(tmp_path / "guide.pt", model)
    before = [parameter.detach().clone() for parameter in loaded.parameters()]
    SVI(model, loaded, Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    assert all(bool((old != new).any()) for old, new in zip(before, loaded.parameters(), strict=True))


def test_loading_a_state_dict_keeps_the_parameters_that_an_optimizer_holds():
    model, guide, (x,), _ = guide_of("linear")
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    elbo = Trace_ELBO()
    elbo.differentiable_loss(model, guide, x).backward()
    optimizer.step()
    guide.load_state_dict(guide.state_dict())
    before = guide.median(x)["z"]
    optimizer.zero_grad()
    elbo.differentiable_loss(model, guide, x).backward()
    optimizer.step()
    assert not torch.equal(guide.median(x)["z"], before)


# Observations that are plain numbers.


def reading(guess):
    weight = pyro.sample("weight", dist.Normal(guess, 1.0))
    return pyro.sample("reading", dist.Normal(weight, 0.75))


@pytest.mark.parametrize("number", [9.5, 9], ids=["float", "int"])
def test_without_validation_observations_may_be_numbers(number):
    """With the exact posterior as q every draw's loss is the evidence, that of a normal of variance 1 + 0.75^2."""
    model = pyro.condition(reading, data={"reading": number})
    exact = init_to_value(values={"weight": torch.tensor(0.36 * (8.5 + number / 0.75**2))})
    with pyro.validation_enabled(False):
        guide = AutoAmortizedNormal(model, init_loc_fn=exact, init_scale=0.6)
        loss = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(8.5)
    evidence = dist.Normal(8.5, 1.25).log_prob(torch.tensor(float(number)))
    assert loss == pytest.approx(-float(evidence), abs=1e-4)


def test_with_validation_observations_that_are_numbers_are_refused_as_by_pyro():
    model = pyro.condition(reading, data={"reading": 9.5})
    for guide in (AutoNormal(model), AutoAmortizedNormal(model)):
        with pytest.raises(ValueError, match="at site 'reading':\nThe value argument to log_prob must be a Tensor"):
            SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(8.5)


@pytest.mark.parametrize("value", [0.7, torch.tensor(0.7)], ids=["number", "tensor"])
def test_one_observed_value_for_all_rows(value):
    def model(x):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("c", dist.Normal(z, 1.0), obs=value)

    guide = AutoAmortizedNormal(model)
    with pyro.validation_enabled(isinstance(value, torch.Tensor)):
        guide.initialize(torch.randn(5))
        assert guide.posterior(torch.randn(3)).mean["z"].shape == (3,)
