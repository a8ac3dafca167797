"""Calls that are not what they should be, and what users are told."""

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, EnergyDistance, Trace_ELBO, TraceTailAdaptive_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    Constant,
    DeepSets,
    MCMCFit,
    Recurrent,
    Table,
    Window,
    amortization_gap,
    amortize,
    compare_inference,
    fit_mean_field,
    fit_optimum,
    fit_svi,
    plan_amortization,
    run_mcmc,
)

X = torch.linspace(-2, 2, 20)
FIT = {"num_steps": 1, "progress": False}
GAP = {"num_steps": 1, "num_draws": 10, "num_annealed": 0, "num_training_steps": 0, "progress": False}
MCMC = {"num_samples": 2, "warmup_steps": 2, "num_chains": 1, "engine": "pyro", "progress": False}


def model(x, w=None):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def written(x, w=None):
    pyro.sample("theta", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


class TwoInputs(nn.Module):
    def forward(self, left, right):
        return left + right


@pytest.fixture
def guide():
    guide = AutoAmortizedNormal(model)
    guide.initialize(X)
    return guide


def refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


# The pair

PAIRS = {
    "fit_svi": lambda *args: fit_svi(*args, **FIT),
    "fit_optimum": lambda *args: fit_optimum(*args, **FIT),
    "amortization_gap": lambda *args: amortization_gap(*args, **GAP),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_model_and_guide(name, guide):
    call = PAIRS[name]
    refused(ValueError, f"{name}: the first argument is a guide, AutoAmortizedNormal", lambda: call(guide, model, X))
    refused(ValueError, f"{name}: the first argument is a guide", lambda: call(AutoNormal(model), model, X))
    refused(ValueError, "first argument observes no data, but the second does", lambda: call(written, model, X))
    refused(ValueError, rf"is of type Tensor.*{name}\(model, guide, ...\)", lambda: call(model, X))
    refused(ValueError, "the model again", lambda: call(model, model, X))
    refused(ValueError, "is of type MCMCFit", lambda: call(model, MCMCFit({}, 0, 0.0), X))


def test_nothing_is_trained_by_a_swapped_pair(guide):
    refused(ValueError, "first argument", lambda: fit_svi(written, model, X, **FIT))
    assert "loc" not in pyro.get_param_store()


def test_a_fit_stands_for_its_guide(guide):
    fit = fit_svi(model, guide, X, **FIT)
    assert amortization_gap(model, fit, X, **GAP).per_datum.equals(amortization_gap(model, guide, X, **GAP).per_datum)


@pytest.mark.parametrize(
    ("name", "call"),
    {
        "plan_amortization": plan_amortization,
        "run_mcmc": lambda guide, x: run_mcmc(guide, x, **MCMC),
        "fit_mean_field": lambda guide, x: fit_mean_field(guide, x, **FIT),
        "compare_inference": compare_inference,
        "AutoAmortizedNormal": lambda guide, x: AutoAmortizedNormal(guide),
    }.items(),
)
def test_a_guide_is_no_model(name, call, guide):
    refused(ValueError, f"{name}: the first argument is a guide, AutoAmortizedNormal", lambda: call(guide, X))


def test_a_model_is_no_start(guide):
    refused(ValueError, "start observes data", lambda: fit_mean_field(model, X, start=model, **FIT))


@pytest.mark.parametrize(("program", "what"), [(X, "a Tensor"), (nn.Linear, "the class Linear")])
def test_a_guide_needs_a_program(program, what):
    refused(ValueError, f"model is {what}", lambda: AutoAmortizedNormal(program))


# Arguments of the model

EVERY = {
    "fit_svi": lambda guide, *args, **options: fit_svi(model, guide, *args, **options),
    "fit_mean_field": lambda guide, *args, **options: fit_mean_field(model, *args, **options),
    "fit_optimum": lambda guide, *args, **options: fit_optimum(model, guide, *args, **options),
    "amortization_gap": lambda guide, *args, **options: amortization_gap(model, guide, *args, **options),
    "run_mcmc": lambda guide, *args, **options: run_mcmc(model, *args, **options),
    "compare_inference": lambda guide, *args, **options: compare_inference(model, *args, **options),
}


@pytest.mark.parametrize("name", EVERY)
def test_keyword_arguments_of_the_model_have_their_place(name, guide):
    call = EVERY[name]
    refused(TypeError, rf"{name}: option 'x' is not known.*model_kwargs=\{{'x': ...\}}", lambda: call(guide, x=X))
    refused(TypeError, "do you mean 'progress'", lambda: call(guide, X, progres=False))
    refused(TypeError, r"missing a required argument: 'x'. It takes \(x, w=None\)", lambda: call(guide))
    refused(TypeError, "unexpected keyword argument 'v'", lambda: call(guide, X, model_kwargs={"v": 1}))
    refused(ValueError, "model_kwargs is a Tensor", lambda: call(guide, model_kwargs=X))


@pytest.mark.parametrize("name", EVERY)
def test_data_without_rows_are_named(name, guide):
    refused(ValueError, "the data have no rows", lambda: EVERY[name](guide, torch.zeros(0)))


def test_data_without_rows_are_named_by_the_guide(guide):
    refused(ValueError, "the data have no rows", lambda: guide.posterior(torch.zeros(0)))
    refused(ValueError, "the data have no rows", lambda: guide(torch.zeros(0)))
    refused(ValueError, "the data have no rows", lambda: AutoAmortizedNormal(model).initialize(torch.zeros(0)))
    refused(ValueError, "the data have no rows", lambda: plan_amortization(model, torch.zeros(0)))


def test_data_of_pandas():
    refused(ValueError, r"torch.tensor\(x.to_numpy\(\)\)", lambda: AutoAmortizedNormal(model).initialize(pd.Series(X)))

    def of_a_frame(frame):
        x = torch.tensor(frame["x"].to_numpy())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    frame = pd.DataFrame({"x": X.numpy()})
    guide = AutoAmortizedNormal(of_a_frame)
    fit_svi(of_a_frame, guide, frame, **FIT)
    assert guide.posterior(frame[:5]).mean["z"].shape == (5,)


# given


@pytest.mark.parametrize(
    "call",
    [
        lambda guide, given: amortization_gap(model, guide, X, given=given, **GAP),
        lambda guide, given: fit_optimum(model, guide, X, given=given, **FIT),
        lambda guide, given: run_mcmc(model, X, given=given, **MCMC),
    ],
    ids=["amortization_gap", "fit_optimum", "run_mcmc"],
)
def test_given_names_latents_and_has_their_shapes(call, guide):
    refused(ValueError, "'Theta'.*not known .do you mean 'theta'.*Known: theta", lambda: call(guide, {"Theta": 0.0}))
    refused(ValueError, "'x'.*not known", lambda: call(guide, {"x": X}))
    refused(ValueError, r"shape \(20,\), but site 'theta' has shape \(\)", lambda: call(guide, {"theta": X}))
    refused(ValueError, "given=0.5. Expected", lambda: call(guide, 0.5))
    call(guide, {"theta": 1})


def test_mcmc_holds_what_is_given():
    fit = run_mcmc(model, X, given={"theta": 1}, **MCMC)
    assert fit.given == {"theta": torch.tensor(1.0)}
    assert set(fit.samples) == {"z"}


def test_unseen_data_are_arguments(guide):
    refused(ValueError, "unseen is a list", lambda: amortization_gap(model, guide, X, unseen=[X, X], **GAP))
    refused(TypeError, "keyword argument 'v'", lambda: amortization_gap(model, guide, X, unseen={"v": X}, **GAP))


# Options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": "0.1"}, "lr='0.1'. Expected a positive number"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"num_steps": None}, "num_steps=None"),
        ({"num_steps": 2.0}, "num_steps=2.0"),
        ({"seed": "a"}, "seed='a'"),
        ({"loss": Trace_ELBO}, r"as Trace_ELBO\(\)"),
        ({"loss": "elbo"}, "loss='elbo'"),
        ({"loss": TraceTailAdaptive_ELBO()}, r"gradients but no value.*RenyiELBO"),
        ({"optim": "adam"}, r"optim is of type str.*pyro.optim.Adam\(\{'lr': 0.01\}\)"),
        ({"optim": torch.optim.Adam([torch.zeros(1, requires_grad=True)])}, "optim is of type Adam.*a function"),
        ({"optim": lambda parameters: None}, "optim returned None"),
        (
            {
                "optim": pyro.optim.ExponentialLR(
                    {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
                )
            },
            "already decays",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_of_fits(options, match, guide):
    refused(ValueError, match, lambda: fit_svi(model, guide, X, **{**FIT, **options}))


def test_options_that_are_passed_on(guide):
    methods = ("amortized",)
    for svi, match in ((3, r"svi=3. Expected a dict"), ({"steps": 3}, "'steps' is not known .do you mean 'num_steps'")):
        refused(ValueError, match, lambda svi=svi: compare_inference(model, X, methods=methods, svi=svi))
    for mcmc in ({"warmup": 3}, {"model_kwargs": {}}):
        refused(ValueError, "mcmc=.*is not known", lambda mcmc=mcmc: compare_inference(model, X, mcmc=mcmc))


@pytest.mark.parametrize("compare", [amortize(model).compare, lambda *a, **k: compare_inference(model, *a, **k)])
def test_one_method_needs_no_tuple(compare):
    result = compare(X, methods="amortized", svi=FIT, num_draws=10, progress=False)
    assert list(result.table.index) == ["amortized"]


@pytest.mark.parametrize(
    ("make", "written_out"),
    [
        (lambda: MLP(32), r"MLP\(hidden_dims=\(32,\)\)"),
        (lambda: MLP((2.5,)), r"hidden_dims=\(2.5,\)"),
        (lambda: MLP((2,), "relu")(3), "activation='relu'. Expected a class of modules"),
        (lambda: MLP((2,), torch.relu)(3), "activation=.*relu.*Expected a class of modules"),
        (lambda: AutoAmortizedNormal(model, init_scale="1"), "init_scale=1"),
        (lambda: AutoAmortizedNormal(model, init_loc_fn="median"), "init_loc_fn='median'.*init_to_median"),
        (lambda: DeepSets((8,), 4), r"DeepSets\(phi_dims=\(32,\)\)"),
        (lambda: Window(1, 32), r"Window\(hidden_dims"),
        (lambda: Recurrent(hidden_dims=32), r"Recurrent\(hidden_dims"),
        *[
            (lambda kind=kind: AutoAmortizedNormal(model, encoder=kind), rf"encoder={kind.__name__} is a class.*\(")
            for kind in (MLP, DeepSets, Window, Recurrent, Table, Constant)
        ],
        (lambda: AutoAmortizedNormal(model, encoder={"z": MLP}), r"encoder=MLP\(\(64, 64\)\)"),
        (lambda: AutoAmortizedNormal(model, encoder={"y": MLP()}).initialize(X), "'y'.*Known.*'z'"),
        (lambda: AutoAmortizedNormal(model, inputs={"y": "x"}).initialize(X), "'y'.*Known.*'z'"),
        (lambda: AutoAmortizedNormal(model, inputs="y").initialize(X), r"names 'y'.*Known: \['x'\]"),
        (lambda: AutoAmortizedNormal(model, inputs=3), "inputs=3. Expected a name"),
        (lambda: AutoAmortizedNormal(model, encoder=TwoInputs()).initialize(X), "a module of one input"),
    ],
)
def test_encoders_and_inputs(make, written_out):
    refused(ValueError, written_out, make)


@pytest.mark.parametrize("methods", [(), {"mine": model}, {"mine": 3}, X], ids=["none", "model", "number", "tensor"])
def test_methods_are_known(methods):
    refused(ValueError, "compare_inference: method.*'mean_field'", lambda: compare_inference(model, X, methods=methods))


@pytest.mark.parametrize("option", ["num_draws", "num_annealed", "num_training_steps", "num_steps"])
def test_counts_are_whole(option, guide):
    refused(ValueError, f"{option}=2.5", lambda: amortization_gap(model, guide, X, **{**GAP, option: 2.5}))


def test_counts_of_chains_are_whole():
    for option in ("num_samples", "seed"):
        refused(ValueError, f"{option}='a'", lambda option=option: run_mcmc(model, X, **{**MCMC, option: "a"}))


# Answers


def test_predictions_are_of_the_model_s_arguments(guide):
    refused(TypeError, r"predictive: option 'x' is not known.*model_kwargs=\{'x': ...\}", lambda: guide.predictive(x=X))
    refused(ValueError, "num_samples=0. Expected a whole number, 1 or more", lambda: guide.predictive(X, num_samples=0))
    refused(ValueError, "the data have no rows", lambda: guide.predictive(torch.zeros(0)))


def test_quantiles_come_first(guide):
    refused(ValueError, "The first argument is a list of them", lambda: guide.quantiles(X, [0.1, 0.9]))
    refused(ValueError, "not all between 0 and 1", lambda: guide.posterior(X).quantiles([10, 90]))
    assert guide.quantiles([0.1, 0.9], X)["z"].shape == (2, 20)


def test_draws_by_their_number(guide):
    assert guide.posterior(X).sample(10)["z"].shape == guide.posterior(X).sample((10,))["z"].shape == (10, 20)
    for shape in (-1, 2.5, "a", (2, -1)):
        refused(ValueError, "sample_shape=.*Expected a shape", lambda shape=shape: guide.posterior(X).sample(shape))


def test_densities_are_of_a_dict(guide):
    refused(ValueError, r"log_prob\(\{'theta': value\}\)", lambda: guide.posterior(X).log_prob(X))


def test_what_pyros_guides_have_and_this_one_has_not(guide):
    refused(NotImplementedError, r"guide.posterior\(x\).sample", lambda: guide.sample_latent(X))
    refused(AttributeError, "guide.plan", lambda: guide.prototype_trace)


# Optimizers and losses of Pyro


@pytest.mark.parametrize(
    ("optim", "torchs"),
    [
        (lambda: pyro.optim.Adam({"lr": 0.1}), lambda p: torch.optim.Adam(p, lr=0.1)),
        (lambda: pyro.optim.Adam(lambda name: {"lr": 0.1}), lambda p: torch.optim.Adam(p, lr=0.1)),
        (lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.5}), lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.5)),
    ],
)
def test_optimizers_of_pyro_step_as_torchs(optim, torchs):
    fits = [fit_svi(model, AutoAmortizedNormal(model), X, optim=o, num_steps=5, seed=0) for o in (optim(), torchs)]
    torch.testing.assert_close(fits[0].losses, fits[1].losses)


def test_a_decay_of_the_optimizers_own_acts_too():
    """SGD of lr / 2 each step, beside the decay of the fit: steps are half as long again each time."""
    seen = []

    class Halving(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            super().step(closure)
            self.param_groups[0]["lr"] /= 2

    fit_svi(model, AutoAmortizedNormal(model), X, optim=lambda p: Halving(p, lr=1e-3), num_steps=4, progress=False)
    factors = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 4)).item()) * 0.5**step for step in range(4)]
    assert seen == pytest.approx([1e-3 * factor for factor in factors])


def test_clipping_of_pyros_optimizers():
    guide = AutoAmortizedNormal(model)
    guide.initialize(X)
    before = guide.coder_of(guide.plan.block_of("theta")).values[0].detach().clone()
    fit_svi(model, guide, X, optim=pyro.optim.SGD({"lr": 1.0}, {"clip_norm": 1e-3}), **FIT)
    moved = (guide.coder_of(guide.plan.block_of("theta")).values[0] - before).norm().item()
    assert moved == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("max_plate_nesting", [1, 2])
def test_the_energy_distance_of_pyro(max_plate_nesting):
    """Its particles stand in the place of the model's own plate where the nesting is 1."""
    guide = AutoAmortizedNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), EnergyDistance(max_plate_nesting=max_plate_nesting))
    assert all(torch.isfinite(torch.tensor(svi.step(X))) for _ in range(2))
    assert guide.posterior(X[:3]).mean["z"].shape == (3,)
    assert guide.plan.plates == {"data": 20}
