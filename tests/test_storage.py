"""Options and what a model has learnt, as plain data."""

import pyro
import pytest
import torch
from models import VAE, Module
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_amortize import MLP, AutoAmortizedNormal, Constant, Table
from pyro_amortize.storage import decode_option, encode_option, load_model_state, model_state

X = torch.linspace(-1, 1, 32).reshape(8, 4)


def trained_vae():
    vae = VAE()
    guide = AutoAmortizedNormal(vae.model)
    svi = SVI(vae.model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(2):
        svi.step(X)
    return vae, guide


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# Options


@pytest.mark.parametrize(
    "option",
    [
        None,
        "auto",
        0.1,
        MLP((3, 4)),
        MLP((), nn.Tanh),
        Table(),
        Constant(),
        {"z": Table(), "n": MLP((2,))},
        ["x", "y"],
    ],
    ids=str,
)
def test_options_survive_being_written_as_plain_data(option, tmp_path):
    torch.save(encode_option(option), tmp_path / "option.pt")
    assert decode_option(torch.load(tmp_path / "option.pt", weights_only=True)) == option


@pytest.mark.parametrize(
    ("option", "named"),
    [(nn.Linear(2, 2), "Linear"), (torch.relu, "relu"), ({"z": nn.Linear(2, 2)}, r"{'z': Linear}")],
    ids=["module", "function", "dict"],
)
def test_options_of_the_users_own_are_named(option, named):
    assert encode_option(option) == {"own": named}


def test_an_activation_of_the_users_own_makes_the_encoder_ones_own():
    class Cube(nn.Module):
        def forward(self, x):
            return x**3

    assert "own" in encode_option(MLP((3,), Cube))


# model_state


def test_a_modules_whole_state():
    model = Module()
    state = model_state(model, [])
    assert equal(dict(state["own"]), snapshot(model))


def test_registered_modules_and_constrained_params(tmp_path):
    vae, guide = trained_vae()
    state = model_state(vae.model, guide.plan.params)
    torch.save(state, tmp_path / "state.pt")
    scale = pyro.param("scale").detach().clone()
    before = snapshot(vae)
    assert scale != 1.0
    pyro.clear_param_store()
    fresh = VAE()
    load_model_state(fresh.model, torch.load(tmp_path / "state.pt", weights_only=True))
    assert equal(before, snapshot(fresh))
    torch.testing.assert_close(pyro.param("scale"), scale)
    assert str(pyro.get_param_store()._constraints["scale"]) == str(constraints.positive)


def test_loading_writes_into_the_live_tensors_of_the_store():
    vae, guide = trained_vae()
    state = model_state(vae.model, guide.plan.params)
    live = pyro.get_param_store()._params["scale"]
    with torch.no_grad():
        live.add_(1.0)
    load_model_state(vae.model, state)
    assert pyro.get_param_store()._params["scale"] is live
    torch.testing.assert_close(live.detach(), state["params"]["scale"]["value"])


@pytest.mark.parametrize(
    "constraint",
    [
        constraints.positive,
        constraints.unit_interval,
        constraints.interval(-1.0, 3.0),
        constraints.greater_than(2.0),
        constraints.independent(constraints.positive, 1),
        constraints.simplex,
        constraints.lower_cholesky,
    ],
    ids=str,
)
def test_constraints_as_plain_data(constraint, tmp_path):
    value = torch.distributions.transform_to(constraint)(torch.randn(3, 3))

    def model():
        pyro.param("p", value, constraint=constraint)

    model()
    before = pyro.param("p").detach().clone()
    torch.save(model_state(model, ["p"]), tmp_path / "state.pt")
    pyro.clear_param_store()
    load_model_state(model, torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(pyro.param("p").detach(), before)
    assert bool(constraint.check(pyro.param("p")).all())


def test_a_module_in_a_closure_is_found():
    net = nn.Linear(2, 3)

    def model():
        pyro.module("decoder", net)

    model()
    names = list(pyro.get_param_store())
    state = model_state(model, names)
    before = snapshot(net)
    with torch.no_grad():
        net.weight.add_(1.0)
    load_model_state(model, state)
    assert equal(before, snapshot(net))


def test_a_module_below_handlers_is_found():
    vae = VAE()
    model = poutine.scale(vae.model, scale=0.5)
    poutine.trace(model).get_trace(X)
    state = model_state(model, list(pyro.get_param_store()))
    assert equal(dict(state["modules"]["decoder"]), snapshot(vae.decoder))


def test_modules_of_equal_shape_are_told_apart_by_name():
    class Twins:
        def __init__(self):
            self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

        def model(self):
            pyro.module("left", self.left)
            pyro.module("right", self.right)

    twins = Twins()
    twins.model()
    state = model_state(twins.model, list(pyro.get_param_store()))
    assert equal(dict(state["modules"]["left"]), snapshot(twins.left))
    assert equal(dict(state["modules"]["right"]), snapshot(twins.right))


def test_a_module_that_cannot_be_told_apart_is_refused():
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    first, second = nets

    def model():
        pyro.module("decoder", first)
        return second

    model()
    with pytest.raises(NotImplementedError, match=r"pyro.module\('decoder', ...\).*self.decoder"):
        model_state(model, list(pyro.get_param_store()))


# Files


def test_what_is_no_file_of_a_guide(tmp_path):
    vae, guide = trained_vae()
    pyro.get_param_store().save(tmp_path / "store.pt")
    torch.save(guide.state_dict(), tmp_path / "state.pt")
    for name in ("store.pt", "state.pt"):
        with pytest.raises(ValueError, match=rf"{name}' is no file that guide.save\(path\) wrote"):
            AutoAmortizedNormal.load(tmp_path / name, vae.model)
    with pytest.raises(ValueError, match="the path comes first"):
        AutoAmortizedNormal.load(vae.model, tmp_path / "store.pt")
