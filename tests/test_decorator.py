import copy
import inspect
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn

from pyro_amortize import MLP, AutoAmortized, amortize

DATA = torch.randn(30, generator=torch.Generator().manual_seed(3))


@amortize
def bare(x, scale=1.0):
    """Says what it is."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@amortize(encoder=MLP((8,)))
def configured(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(1, 3)
        self.register_buffer("offset", torch.zeros(3))
        self.label = "mine"

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + self.offset, 1.0).to_event(1), obs=x)


class TestFunction:
    def test_is_the_model_still(self):
        assert isinstance(bare, PyroModule)
        assert str(inspect.signature(bare)) == "(x, scale=1.0)"
        assert bare.__doc__ == "Says what it is."
        assert bare.__name__ == "bare"
        assert list(bare.state_dict()) == []
        assert torch.equal(bare(DATA), DATA)

    def test_guide_is_made_once_with_the_options(self):
        assert isinstance(configured.guide, AutoAmortized)
        assert configured.guide is configured.guide
        assert configured.guide.options["encoder"] == MLP((8,))
        assert list(configured.children()) == []

    def test_in_the_user_s_own_loop(self):
        svi = SVI(bare, bare.guide, Adam({"lr": 0.01}), Trace_ELBO())
        assert svi.step(DATA) != svi.step(DATA)
        draws = Predictive(bare, guide=bare.guide, num_samples=3)(DATA[:4])
        assert draws["z"].shape == (3, 4)

    def test_methods(self):
        fit = configured.fit(DATA, num_steps=20, progress=False)
        assert fit.guide is configured.guide
        assert configured.posterior(DATA[:2]).mean["z"].shape == (2,)
        assert configured.predictive(DATA[:2], num_samples=3)["x"].shape == (3, 2)
        assert len(configured.gap(DATA, num_steps=5, num_draws=20, progress=False).per_datum) == 30
        comparison = configured.compare(
            DATA, methods=("amortized", "mean_field"), svi={"num_steps": 5}, num_draws=20, progress=False
        )
        sizes = comparison.table["num_parameters"]
        assert sizes["amortized"] == sum(p.numel() for p in configured.guide.parameters())

    def test_is_saved_with_the_modules_that_it_registers(self, tmp_path):
        decoder = nn.Linear(1, 3)

        @amortize(encoder=MLP((4,)))
        def model(x):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        model.fit(torch.randn(20, 3), num_steps=5, progress=False)
        model.guide.save(tmp_path / "guide.pt")
        learnt = decoder.weight.detach().clone()
        with torch.no_grad():
            decoder.weight.zero_()
        AutoAmortized.load(tmp_path / "guide.pt", model)
        assert torch.equal(decoder.weight, learnt)

    def test_pickles_by_its_name(self):
        assert pickle.loads(pickle.dumps(bare)) is bare
        assert copy.deepcopy(bare) is bare


class TestModule:
    def test_is_the_model_still(self):
        inner = Model()
        model = amortize(inner)
        assert list(model.state_dict()) == list(inner.state_dict())
        assert [id(p) for p in model.parameters()] == [id(p) for p in inner.parameters()]
        assert model.label == "mine"
        assert model.decoder is inner.decoder
        assert str(inspect.signature(model)) == "(x)"
        model.eval()
        assert not inner.training
        model.load_state_dict(Model().state_dict())

    def test_trains_guide_and_model(self):
        model = amortize(Model(), encoder=MLP((4,)))
        before = model.decoder.weight.detach().clone()
        model.fit(torch.randn(20, 3), num_steps=5, progress=False)
        assert not torch.equal(before, model.decoder.weight)

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_copies_keep_the_answer(self, again):
        model, x = amortize(Model()), torch.randn(20, 3)
        model.fit(x, num_steps=5, progress=False)
        other = again(model)
        assert torch.equal(other.posterior(x).mean["z"], model.posterior(x).mean["z"])
        assert other.guide is not model.guide
        pyro.clear_param_store()  # which holds the first one's modules by the same names
        before = other.decoder.weight.clone()
        other.fit(x, num_steps=5, progress=False)
        assert not torch.equal(other.posterior(x).mean["z"], model.posterior(x).mean["z"])
        assert not torch.equal(other.decoder.weight, before)


def test_a_class_is_refused():
    with pytest.raises(TypeError, match=r"amortize\(Model\(\.\.\.\)\)"):
        amortize(Model)


def test_no_model():
    with pytest.raises(TypeError, match="expected a Pyro model, got a int"):
        amortize(3)


def test_setting_an_attribute_sets_the_model_s():
    inner = Model()
    model = amortize(inner)
    model.label = "other"
    model.decoder = nn.Linear(1, 3)
    assert inner.label == "other"
    assert inner.decoder is model.decoder
    model.eval()
    assert not model.training


def test_options_are_checked_at_once():
    with pytest.raises(TypeError, match=r"amortize: option 'encoders' is not known \(do you mean 'encoder'\?\)"):
        amortize(encoders=MLP())


@pytest.mark.parametrize("what", ["posterior", "predictive", "gap"])
def test_asked_before_the_fit(what):
    model = amortize(lambda x: pyro.sample("x", dist.Normal(0.0, 1.0), obs=x))
    with pytest.raises(RuntimeError, match=rf"{what}: .*model.fit\("):
        getattr(model, what)(torch.zeros(3))
