"""Guides in Pyro's param store: names that the next process finds again, and nobody's values but one's own."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn

from pyro_amortize import MLP, AutoAmortized, AutoAmortizedNormal, amortization_gap, compare_inference, fit_mean_field

X = 3 + torch.linspace(-2, 2, 20)


def model(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def trained(num_steps=3, x=X, **options):
    guide = AutoAmortizedNormal(model, **options)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(num_steps):
        svi.step(x)
    return guide


def values(guide):
    return {name: value.clone() for name, value in guide.state_dict().items() if isinstance(value, torch.Tensor)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def saved(tmp_path):
    """A trained guide, and a store as the next process finds it."""
    guide = trained()
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    return guide


@pytest.mark.parametrize("initialize", [True, False])
def test_a_loaded_store_brings_a_trained_guide_back(saved, initialize):
    """Other data than it was trained on, so that their statistics would not do."""
    guide, other = AutoAmortizedNormal(model), 10 * X[:7] - 50
    guide.initialize(other) if initialize else guide(other)
    assert same(values(guide), values(saved))
    for name, mean in saved.posterior(other).mean.items():
        assert torch.equal(guide.posterior(other).mean[name], mean)


def test_what_was_loaded_can_be_trained_on(saved):
    guide = AutoAmortizedNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(X)
    before = values(guide)
    svi.step(X)
    assert not any(torch.equal(before[name], p) for name, p in guide.named_parameters())
    assert set(pyro.get_param_store()) == {f"AutoAmortizedNormal.{name}" for name in before}


def test_names_are_the_class_s_and_the_next_guide_s_are_numbered():
    guides = [trained(1) for _ in range(3)]
    names = ["AutoAmortizedNormal", "AutoAmortizedNormal_1", "AutoAmortizedNormal_2"]
    assert set(pyro.get_param_store()) == {
        f"{name}.{key}" for name, guide in zip(names, guides, strict=True) for key in values(guide)
    }


def test_guides_that_take_turns_keep_their_own():
    first, second = trained(1), trained(1)
    before = values(first)
    for guide in (second, first, second):
        pyro.clear_param_store()
        SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(X)
        if guide is second:
            assert same(values(first), before)
        before = values(first)


def test_a_new_guide_starts_afresh_where_another_was_trained():
    pyro.set_rng_seed(1)
    first = AutoAmortizedNormal(model)
    first.initialize(X)
    start = values(first)
    SVI(model, first, Adam({"lr": 0.1}), Trace_ELBO()).step(X)
    del first
    pyro.set_rng_seed(1)
    second = AutoAmortizedNormal(model)
    second.initialize(X)
    assert same(values(second), start)


@pytest.mark.parametrize(
    ("option", "key", "there", "here"),
    [
        ({"encoder": MLP((8, 8))}, r"coders.\[data\].trunk.0.weight", r"\(64, 1\)", r"\(8, 1\)"),
        ({"encoder": MLP((64,))}, r"coders.\[data\].trunk.2.weight", r"\(64, 64\)", "None"),
    ],
)
def test_loaded_values_of_other_shapes_are_refused(saved, option, key, there, here):
    guide = AutoAmortizedNormal(model, **option)
    with pytest.raises(ValueError, match=f"'{key}' has shape {there} there and {here} here.*clear_param_store"):
        guide.initialize(X)
    pyro.clear_param_store()
    guide.initialize(X)


def test_of_several_loaded_guides_the_first_is_taken_and_that_is_said(tmp_path):
    first, second = trained(2), trained(4)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    guide = AutoAmortizedNormal(model)
    with pytest.warns(UserWarning, match=r"parameters of 2 guides.*takes 'AutoAmortizedNormal'.*guide.save\(path\)"):
        guide.initialize(X)
    assert same(values(guide), values(first))
    other = AutoAmortizedNormal(model)
    other.initialize(X)
    assert same(values(other), values(second))


def test_a_loaded_guide_of_another_class_is_not_taken_and_that_is_said(saved):
    guide = AutoAmortized(model)
    with pytest.warns(UserWarning, match=r"a guide 'AutoAmortizedNormal', which this guide, 'AutoAmortized', does not"):
        guide.initialize(X)
    assert not same(values(guide), values(saved))


def test_a_guide_whose_name_was_another_s_is_found_again(tmp_path):
    trained(1)
    second = trained(3)
    for name in [name for name in pyro.get_param_store() if name.startswith("AutoAmortizedNormal.")]:
        del pyro.get_param_store()[name]
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    guide = AutoAmortizedNormal(model)
    guide.initialize(X)
    assert same(values(guide), values(second))


def test_a_fresh_guide_of_another_name_takes_what_is_loaded(tmp_path):
    guide = trained()
    pyro.get_param_store().save(tmp_path / "store.pt")
    other = AutoAmortizedNormal(model)  # as where a cell of a notebook is run again
    other.initialize(X)
    pyro.get_param_store().load(tmp_path / "store.pt")
    other(X)
    assert same(values(other), values(guide))


def test_a_live_guide_says_which_of_several_it_takes(tmp_path):
    first, second = trained(2), trained(4)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.get_param_store().load(tmp_path / "store.pt")
    with pytest.warns(UserWarning, match=r"parameters of 2 guides.*takes 'AutoAmortizedNormal_1'"):
        second(X)
    first(X)


def test_a_live_guide_goes_back_to_what_is_loaded(tmp_path):
    guide = trained()
    before, mean = values(guide), guide.posterior(X).mean["z"]
    pyro.get_param_store().save(tmp_path / "store.pt")
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(X)
    pyro.get_param_store().load(tmp_path / "store.pt")
    assert torch.equal(guide.posterior(X).mean["z"], mean)
    assert same(values(guide), before)


def test_values_set_by_hand_are_taken():
    guide = trained()
    name = "AutoAmortizedNormal.coders.[theta].values.0"
    pyro.get_param_store()[name] = torch.tensor([[7.0, 0.0]])
    assert guide.posterior(X).mean["theta"] == 7.0
    pyro.get_param_store()[name] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) there and \(1, 2\) here"):
        guide(X)


def test_a_guide_from_a_file_is_not_overwritten(saved, tmp_path):
    saved.save(tmp_path / "guide.pt")
    with torch.no_grad():
        for value in pyro.get_param_store()._params.values():
            value.add_(1.0)
    loaded = AutoAmortizedNormal.load(tmp_path / "guide.pt", model)
    loaded(X)
    assert same(values(loaded), values(saved))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
def test_copies_have_names_of_their_own(make):
    guide = trained()
    twin = make(guide)
    svi = SVI(model, twin, Adam({"lr": 0.1}), Trace_ELBO())
    before = values(guide)
    svi.step(X)
    assert same(values(guide), before)
    assert not torch.equal(values(twin)["coders.[theta].values.0"], before["coders.[theta].values.0"])


def test_references_start_afresh_whatever_was_loaded(tmp_path):
    def at_work(guide):
        fit_mean_field(model, X, num_steps=1, progress=False)
        compare_inference(model, X, methods=("amortized", "mean_field"), svi={"num_steps": 1, "progress": False})
        amortization_gap(model, guide, X, num_steps=1, num_draws=10, num_annealed=0, progress=False)

    guide, other = AutoAmortized(model), AutoAmortizedNormal(model, encoder=MLP((3,)))
    guide(X)
    other.initialize(X)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    before = dict(pyro.get_param_store()._params)
    at_work(other)
    assert all(pyro.get_param_store()._params[name] is value for name, value in before.items())


def test_all_that_stands_there_takes_hooks_as_parameters_do():
    guide, norms = trained(1, encoder=nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 4))), {}
    for name, value in pyro.get_param_store().named_parameters():
        value.register_hook(lambda gradient, name=name: norms.update({name: gradient.norm()}))
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(X)
    assert set(norms) == {f"AutoAmortizedNormal.{name}" for name, _ in guide.named_parameters()}


def test_buffers_there_are_those_of_the_guide():
    net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 4))
    guide = trained(1, encoder=net)
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(X)
    there = pyro.get_param_store()["AutoAmortizedNormal.coders.[data].trunk.0.running_mean"]
    assert torch.equal(there.detach(), net[0].running_mean)


def test_parameters_that_are_not_contiguous_are_trained():
    net = nn.Linear(1, 4)
    net.weight = nn.Parameter(torch.randn(4, 2).t()[:1].t())
    assert not net.weight.is_contiguous()
    before = net.weight.detach().clone()
    trained(1, encoder=net)
    assert not torch.equal(net.weight, before)


def test_inside_a_module_the_name_is_its_path():
    class Pair(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = AutoAmortizedNormal(CASES["linear"].make())

        def forward(self, *args):
            return self.inner(*args)

    (x,), _ = CASES["linear"].example()
    pairs = [Pair(), Pair()]
    for pair in pairs:
        pair(x)
    names = [f"{name}.{key}" for name in ("inner", "inner_1") for key in values(pairs[0].inner)]
    assert set(names) == set(pyro.get_param_store())
