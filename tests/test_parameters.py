"""A model's own parameters, left as found."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import AUTOGUIDES, VAE, autoguided
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import nn

from pyro_amortize import (
    AutoAmortizedNormal,
    amortization_gap,
    compare_inference,
    fit_mean_field,
    fit_optimum,
    fit_svi,
    plan_amortization,
    run_mcmc,
    to_arviz,
)
from pyro_amortize.parameters import preserved

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


def random_states():
    states = pyro.util.get_rng_state()
    return states["torch"].tolist(), states["random"], str(states["numpy"])


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# preserved


def test_random_states_come_back():
    before = random_states()
    with preserved():
        torch.randn(3)
        pyro.set_rng_seed(99)
        assert random_states() != before
    assert random_states() == before


def test_the_store_is_seen_as_it_is_and_comes_back():
    fitted = pyro.param("w", torch.tensor(5.13))
    with preserved():
        assert pyro.param("w", torch.tensor(0.0)).item() == pytest.approx(5.13)
        pyro.param("new", torch.tensor(1.0))
        del pyro.get_param_store()["w"]
    assert list(pyro.get_param_store()) == ["w"]
    assert pyro.param("w") is fitted


def test_constraints_of_the_store_come_back():
    pyro.param("s", torch.tensor(2.0), constraint=constraints.positive)
    with preserved():
        pyro.clear_param_store()
        pyro.param("s", torch.tensor(-3.0))
    assert pyro.param("s").item() == pytest.approx(2.0)


def test_buffers_modes_and_lazy_parameters_come_back():
    vae = VAE()
    before = snapshot(vae)
    with preserved(vae):
        vae.decoder(torch.randn(8, 2))
        vae.eval()
    assert equal(before, snapshot(vae))
    assert all(module.training for module in vae.modules())


def test_modules_that_are_only_met_inside_come_back_too():
    hidden = nn.BatchNorm1d(4)
    before = snapshot(hidden)
    with preserved():
        hidden(X)
    assert equal(before, snapshot(hidden))


def test_eval_mode_inside_and_training_after():
    vae = VAE()
    vae.decoder[3].eval()
    with preserved(vae, evaluating=True):
        assert not vae.decoder[1].training
    assert vae.decoder[1].training
    assert not vae.decoder[3].training


def test_modules_met_inside_run_in_eval_mode():
    dropout = nn.Dropout(0.5)
    with preserved(evaluating=True):
        assert torch.equal(dropout(torch.ones(100)), torch.ones(100))
    assert dropout.training


def test_lazily_made_pyro_parameters_are_taken_back():
    class Lazy(PyroModule):
        @PyroParam(constraint=constraints.positive)
        def w(self):
            return torch.rand(3)

        def forward(self):
            return self.w

    lazy = Lazy()
    with preserved(lazy):
        lazy()
        assert list(lazy.state_dict()) == ["w_unconstrained"]
    assert list(lazy.state_dict()) == []
    assert lazy().shape == (3,)


def test_whatever_a_first_call_makes_is_taken_back():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.built = None, False

        def forward(self):
            if not self.built:
                self.weight, self.layer, self.built = nn.Parameter(torch.rand(3)), nn.Linear(1, 1), True
            return self.weight

    lazy = Lazy()
    with preserved(lazy):
        lazy()
    assert list(lazy.state_dict()) == []
    assert lazy.weight is None
    assert lazy().shape == (3,)


@pytest.mark.parametrize("watched", [True, False])
def test_torch_s_lazy_modules_keep_what_they_make(watched):
    lazy = nn.LazyLinear(2)
    with preserved(*[lazy] * watched):
        value = lazy(X)
    assert torch.equal(lazy(X), value)


@pytest.mark.parametrize("make", AUTOGUIDES)
def test_pyro_s_guides_are_new_again(make):
    guide = make(autoguided)
    for _ in range(2):
        with preserved(guide):
            guide(X[:, 0])
        assert list(guide.state_dict()) == []
    guide(X[:, 0])
    state = snapshot(guide)
    with preserved(guide):
        guide(X[:, 0])
    assert equal(state, snapshot(guide))


def test_announced_tensors_are_put_back_with_their_gradients():
    weight = nn.Parameter(torch.ones(3))
    gradient = weight.grad = torch.full((3,), 2.0)
    frozen = torch.zeros(2)
    with preserved() as record:
        record.keep(weight)
        record.keep(frozen)
        with torch.no_grad():
            weight.add_(1)
        weight.grad = None
        frozen.requires_grad_()
    assert weight.tolist() == [1, 1, 1]
    assert weight.grad is gradient
    assert not frozen.requires_grad


def test_everything_comes_back_after_an_error():
    vae = VAE()
    before, rng = snapshot(vae), random_states()

    def fails():
        with preserved(vae, evaluating=True):
            vae.decoder.train()(torch.randn(8, 2))
            pyro.param("new", torch.tensor(1.0))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert equal(before, snapshot(vae))
    assert vae.training
    assert "new" not in pyro.get_param_store()
    assert random_states() == rng


def test_blocks_nest():
    pyro.param("w", torch.tensor(1.0))
    with preserved():
        pyro.param("outer", torch.tensor(1.0))
        with preserved():
            pyro.param("inner", torch.tensor(1.0))
        assert set(pyro.get_param_store()) == {"w", "outer"}
    assert set(pyro.get_param_store()) == {"w"}


@pytest.mark.parametrize("evaluating", [True, False])
def test_a_block_inside_leaves_modules_to_the_one_around_as_they_were(evaluating):
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = snapshot(net)
    with preserved(evaluating=evaluating):
        with preserved(net, evaluating=True):
            net(X)
        with preserved() as record:
            weight = nn.Parameter(torch.ones(3))
            record.keep(weight)
            weight.data.add_(1)
            net(X)
    assert all(module.training for module in net.modules())
    assert equal(before, snapshot(net))
    assert weight.tolist() == [1, 1, 1]


def test_what_is_below_a_module_evaluates_with_it():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Dropout(0.5)

        def forward(self, x):
            return nn.functional.dropout(x, 0.5, self.inner.training)

    half = Half()
    with preserved(evaluating=True):
        assert torch.equal(half(torch.ones(100)), torch.ones(100))
    assert half.inner.training


# Modes, in all that is public


class Runs(PyroModule):
    """A model whose data come by closure, so that encoders and graphs look them up; it counts its runs, and stops."""

    total, stop = 0, None

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1), nn.Dropout(0.5)]
        self.net = nn.Sequential(*layers)
        self.net[4].eval()

    def forward(self):
        Runs.total += 1
        if Runs.total == Runs.stop:
            raise KeyboardInterrupt
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            loc = self.net(z.reshape(-1, 1)).reshape(z.shape)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=X[:, 0])


QUIET = {"progress": False}
CHAINS = {"num_samples": 3, "warmup_steps": 3, "num_chains": 1, **QUIET}
CALLS = {
    "plan_amortization": lambda m, g: plan_amortization(m),
    "initialize": lambda m, g: AutoAmortizedNormal(m).initialize(),
    "guide": lambda m, g: g(),
    "median": lambda m, g: g.median(),
    "quantiles": lambda m, g: g.quantiles([0.5]),
    "posterior": lambda m, g: g.posterior().sample((2,)),
    "predictive": lambda m, g: g.predictive(num_samples=3),
    "fit_svi": lambda m, g: fit_svi(m, g, num_steps=3, **QUIET),
    "fit_svi-graph": lambda m, g: fit_svi(m, g, num_steps=5, compile=True, **QUIET),
    "fit_mean_field": lambda m, g: fit_mean_field(m, start=g, num_steps=3, **QUIET),
    "fit_optimum": lambda m, g: fit_optimum(m, g, num_steps=3, **QUIET),
    "amortization_gap": lambda m, g: amortization_gap(m, g, num_steps=3, num_draws=20, num_annealed=1, **QUIET),
    "run_mcmc": lambda m, g: run_mcmc(m, engine="pyro", **CHAINS),
    "compare_inference": lambda m, g: compare_inference(
        m, methods={"trained": g, "tables": "mean_field"}, svi={"num_steps": 3, **QUIET}, num_draws=20
    ),
    "to_arviz": lambda m, g: to_arviz(fit_svi(m, g, num_steps=1, **QUIET), num_samples=3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("as_function", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("call", CALLS)
def test_modes_are_as_found_and_so_they_are_when_interrupted(call, as_function):
    net = Runs()
    model = (lambda: net()) if as_function else net
    guide = AutoAmortizedNormal(model, encoder=nn.Sequential(nn.LazyLinear(4), nn.Dropout(0.5)))
    guide.initialize()
    modes = [module.training for whole in (net, guide) for module in whole.modules()]
    Runs.total, Runs.stop = 0, None
    CALLS[call](model, guide)
    assert [module.training for whole in (net, guide) for module in whole.modules()] == modes
    Runs.total, Runs.stop = 0, (Runs.total + 1) // 2
    with pytest.raises(KeyboardInterrupt):
        CALLS[call](model, guide)
    assert [module.training for whole in (net, guide) for module in whole.modules()] == modes


@pytest.mark.filterwarnings("ignore:compiled ELBO")
def test_dropout_is_on_in_every_step_of_a_fit():
    net, seen = Runs(), []
    net.net[2].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    Runs.stop = None
    fit_svi(net, AutoAmortizedNormal(net), num_steps=20, compile=True, progress=False)
    assert sum(seen) >= 20


# Modules whose name in the store is another's


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 4)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.net(z[..., None]), 1.0).to_event(1), obs=x)


def registered(update):
    net = nn.Linear(1, 4)

    def model(x):
        pyro.module("net", net, update_module_params=update)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z[..., None]), 1.0).to_event(1), obs=x)

    model.net = net
    return model


def stepped(make, make_guide=AutoAmortizedNormal):
    model = make()
    fit_svi(model, make_guide(model), X, num_steps=2, progress=False)
    return model


@pytest.mark.parametrize("make", [Decoder, lambda: registered(False)], ids=["pyro-module", "function"])
@pytest.mark.parametrize("make_guide", [AutoAmortizedNormal, AutoNormal])
def test_a_module_that_another_s_name_hides_is_refused(make, make_guide):
    stepped(make)
    with pytest.raises(ValueError, match=r"'net' is not the one.*pyro.clear_param_store\(\)"):
        stepped(make, make_guide)
    with pytest.raises(ValueError, match=r"'net' is not the one"):
        AutoAmortizedNormal(make()).initialize(X)
    pyro.clear_param_store()
    stepped(make, make_guide)


def test_a_module_that_takes_the_other_s_parameters_is_trained():
    first = stepped(lambda: registered(True))
    second = registered(True)
    with torch.no_grad():
        second.net.weight.fill_(5.0)
    fit_svi(second, AutoAmortizedNormal(second), X, num_steps=2, progress=False)
    assert second.net.weight is first.net.weight


def test_a_module_with_the_values_in_the_store_answers_but_is_not_trained(tmp_path):
    """As where both were loaded from files."""
    model = stepped(Decoder)
    pyro.get_param_store().save(tmp_path / "store.pt")
    state = snapshot(model)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    other = Decoder()
    other.load_state_dict(state)
    guide = AutoAmortizedNormal(other)
    guide.initialize(X)
    with pytest.raises(ValueError, match="'net' is not the one"):
        fit_svi(other, guide, X, num_steps=2, progress=False)
    pyro.module("net", other.net, update_module_params=True)
    fit_svi(other, guide, X, num_steps=2, progress=False)
    assert not equal(snapshot(other), state)


def test_the_same_module_is_trained_on():
    model = stepped(Decoder)
    before = model.net.weight.clone()
    fit_svi(model, AutoAmortizedNormal(model), X, num_steps=2, progress=False)
    assert not torch.equal(model.net.weight, before)
