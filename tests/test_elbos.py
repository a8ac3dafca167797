"""ELBOs on graphs: the same as Pyro's, draw by draw."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES, TOTAL
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from torch import nn

from pyro_amortize import AutoAmortizedNormal, CompiledTrace_ELBO, CompiledTraceMeanField_ELBO, Table, elbos

PAIRS = {
    "Trace": (Trace_ELBO, CompiledTrace_ELBO),
    "MeanField": (TraceMeanField_ELBO, CompiledTraceMeanField_ELBO),
}
LEFT_TO_PYRO = {
    "closure": "no argument",
    "conditioned": "no argument",
    "ragged": "no argument",
    "partly_masked": "no argument",
    "lengths": "no argument",
    "pyramid": "Python number",  # how many rooms there are stands in an index alone
    "padded_chain": "Python number",  # torch packs sequences on the host
}
SOON = elbos._soon
X = torch.randn(12, generator=torch.Generator().manual_seed(0))
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


@pytest.fixture(autouse=True)
def not_compiling(monkeypatch):
    """Keeps graphs as they are: a compiler takes seconds for each."""
    monkeypatch.setattr(elbos, "_soon", lambda *_: False)


@pytest.fixture
def compiling(not_compiling, monkeypatch):
    monkeypatch.setattr(elbos, "_soon", SOON)


def loss_and_gradients(elbo, model, guide, args, kwargs, seed):
    """Returns a loss and the gradients by name, from a seed."""
    pyro.set_rng_seed(seed)
    with poutine.trace(param_only=True) as seen:
        loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
    parameters = {name: site["value"].unconstrained() for name, site in seen.trace.nodes.items()}
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return loss, found


def same(expected, found):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4)


def agree(plain, compiled, model, guide, calls):
    """Runs both ELBOs on calls, from the same seeds."""
    for seed, (args, kwargs) in enumerate(calls):
        expected = loss_and_gradients(plain, model, guide, args, kwargs, seed)
        same(expected, loss_and_gradients(compiled, model, guide, args, kwargs, seed))


def runs(elbo):
    """How often each graph of an ELBO ran."""
    return [kept.runs for loss in elbo._captured.values() for kind in loss._kinds.values() for kept in kind]


def doubts(elbo):
    return [loss.doubt for loss in elbo._captured.values()]


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(PAIRS["Trace"], marks=pytest.mark.slow, id="Trace"),
        pytest.param(PAIRS["MeanField"], id="MeanField"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_pyro_s_draw_by_draw(name, pair):
    case = CASES[name]
    model = case.make()
    here, fresh = (case.data((torch.arange(case.rows) + first) % TOTAL) for first in (0, case.rows))
    guide = AutoAmortizedNormal(model)
    guide.initialize(*here[0], **here[1])
    plain, compiled = (cls() for cls in pair)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    try:
        for args, kwargs in (here, fresh):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss_and_gradients(plain, model, guide, args, kwargs, 0)
    except (ValueError, AssertionError):
        pytest.skip("Pyro's own ELBO does not take this model")
    if name in LEFT_TO_PYRO:
        with pytest.warns(UserWarning, match=LEFT_TO_PYRO[name]):
            agree(plain, compiled, model, guide, [here, here])
    agree(plain, compiled, model, guide, [here, here, fresh, here, fresh])
    if name not in LEFT_TO_PYRO:
        assert doubts(compiled) == [None]
        assert sum(runs(compiled)) >= 3


def linear(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_hand(x):
    loc = pyro.param("loc", torch.zeros(()))
    scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
    pyro.sample("theta", dist.Normal(loc, scale))
    slope = pyro.param("slope", torch.tensor(0.1), constraint=dist.constraints.interval(-1.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.7))


def trained(elbo, model, guide, num_steps=12, seed=3, x=X):
    """Takes steps of SVI from a seed; returns losses and the guide's answer in the store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = SVI(model, guide, Adam({"lr": 0.05}), elbo)
    losses = [svi.step(x) for _ in range(num_steps)]
    return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


class TestInSVI:
    @pairs
    def test_trains_a_guide_written_by_hand_as_pyro_does(self, pair):
        plain, compiled = (trained(cls(), linear, by_hand) for cls in pair)
        torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-4)
        assert compiled[1].keys() == plain[1].keys() == {"loc", "scale", "slope"}
        for name, value in plain[1].items():
            torch.testing.assert_close(compiled[1][name], value)
            assert abs(float(value) - {"loc": 0.0, "scale": 1.0, "slope": 0.1}[name]) > 0.05

    def test_trains_by_compiled_code_as_pyro_does(self, compiling):
        plain = trained(TraceMeanField_ELBO(), linear, by_hand)
        compiled = trained(elbo := CompiledTraceMeanField_ELBO(), linear, by_hand)
        torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-4)
        (kept,) = (kept for loss in elbo._captured.values() for kind in loss._kinds.values() for kept in kind)
        assert kept.compiled is not None
        assert kept.compiled is not kept.graph

    def test_without_a_compiler_the_graph_runs_and_says_so_once(self, compiling, monkeypatch):
        from torch._inductor import config

        monkeypatch.setenv("CXX", "no-such-compiler")
        shifted = X.repeat(7)[: int(torch.randint(30, 80, ()))]  # nothing that a cache holds
        no_compiler = config.patch({"cpp.cxx": ("no-such-compiler",)})
        with no_compiler, pytest.warns(UserWarning, match="without being compiled") as caught:
            compiled = trained(CompiledTrace_ELBO(num_particles=2), linear, by_hand, x=shifted)
        assert len(caught) == 1
        plain = trained(Trace_ELBO(num_particles=2), linear, by_hand, x=shifted)
        torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-4)

    def test_local_parameters(self):
        def take(elbo):
            pyro.set_rng_seed(0)
            guide = AutoAmortizedNormal(linear)
            guide.initialize(X)
            svi = SVI(linear, guide, Adam({"lr": 0.05}), elbo)
            return [svi.step(X) for _ in range(6)], [p.detach().clone() for p in guide.parameters()]

        with pyro.settings.context(module_local_params=True):
            plain, compiled = take(Trace_ELBO()), take(CompiledTrace_ELBO())
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-4)

    def test_evaluate_loss(self):
        svi = SVI(linear, by_hand, Adam({"lr": 0.05}), CompiledTrace_ELBO())
        for _ in range(3):
            svi.step(X)
        pyro.set_rng_seed(0)
        value = svi.evaluate_loss(X)
        pyro.set_rng_seed(0)
        assert value == pytest.approx(Trace_ELBO().loss(linear, by_hand, X))


class TestModels:
    """What static models may hold."""

    class Learnt(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
            self.width = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.net(z[:, None]), self.width).to_event(1), obs=x)

    @pairs
    def test_modules_with_buffers_and_dropout(self, pair):
        x = X.reshape(6, 2)

        def take(elbo):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            model = self.Learnt()
            guide = AutoAmortizedNormal(model)
            svi = SVI(model, guide, Adam({"lr": 0.01}), elbo)
            return [svi.step(x) for _ in range(8)], model.state_dict()

        plain, compiled = (take(cls()) for cls in pair)
        torch.testing.assert_close(compiled[0], plain[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled[1], plain[1], rtol=1e-4, atol=1e-4)

    class Bayesian(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Linear](1, 2)
            self.net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2))

        def forward(self, x):
            data = pyro.plate("data", len(x))
            with data:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.net(z[:, None])
            with data:
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    @pairs
    def test_priors_that_were_expanded_before(self, pair):
        model, x = self.Bayesian(), X.reshape(6, 2)
        guide = AutoAmortizedNormal(model)
        guide.initialize(x)
        plain, compiled = (cls() for cls in pair)
        agree(plain, compiled, model, guide, [((x,), {})] * 3)
        assert doubts(compiled) == [None]
        assert runs(compiled) == [2]

    def test_training_and_evaluating_are_graphs_of_their_own(self):
        x, model = X.reshape(6, 2), self.Learnt()
        guide = AutoAmortizedNormal(model)
        guide.initialize(x)
        plain, compiled = Trace_ELBO(), CompiledTrace_ELBO()
        for training in (True, True, True, False, False, False, True):
            model.train(training)
            with torch.no_grad():
                kept = {name: value.clone() for name, value in model.named_buffers()}
            expected = loss_and_gradients(plain, model, guide, (x,), {}, 5)
            for name, value in model.named_buffers():
                value.copy_(kept[name])
            same(expected, loss_and_gradients(compiled, model, guide, (x,), {}, 5))
        assert doubts(compiled) == [None]
        assert len(runs(compiled)) == 2

    @pairs
    @pytest.mark.parametrize("vectorized", [False, True], ids=["looped", "vectorized"])
    def test_particles(self, pair, vectorized):
        options = {"num_particles": 3, "vectorize_particles": vectorized, "max_plate_nesting": 1}
        plain, compiled = (cls(**options) for cls in pair)
        loss_and_gradients(plain, linear, by_hand, (X,), {}, 0)
        agree(plain, compiled, linear, by_hand, [((X,), {}), ((X,), {}), ((X + 1,), {})])
        assert runs(compiled) == [2]

    def test_discrete_latents_that_the_guide_draws(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.4))
                pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

        def guide(x):
            slope = pyro.param("slope", torch.tensor(0.5))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=slope * x))

        compiled = CompiledTrace_ELBO()
        loss_and_gradients(Trace_ELBO(), model, guide, (X,), {}, 0)
        agree(Trace_ELBO(), compiled, model, guide, [((X,), {}), ((X,), {}), ((X.flip(0),), {})])
        assert doubts(compiled) == [None]

    def test_a_tensor_that_is_argument_and_closure(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(X.mean(), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model)
        guide.initialize(X)
        compiled = CompiledTrace_ELBO()
        agree(Trace_ELBO(), compiled, model, guide, [((X,), {}), ((X,), {}), ((X + 5,), {})])
        assert doubts(compiled) == [None]

    def test_frozen_parameters_stay_and_may_change(self):
        model = self.Learnt().eval()
        x = X.reshape(6, 2)
        guide = AutoAmortizedNormal(model)
        guide.initialize(x)
        model.net[0].weight.requires_grad_(False)
        plain, compiled = Trace_ELBO(), CompiledTrace_ELBO()
        agree(plain, compiled, model, guide, [((x,), {})] * 3)
        model.net[0].weight.mul_(2.0)
        agree(plain, compiled, model, guide, [((x,), {})])
        model.net[0].weight.requires_grad_(True)
        agree(plain, compiled, model, guide, [((x,), {})] * 2)


class TestKindsOfCalls:
    @staticmethod
    def tempered(x, beta=1.0, shifted=False):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(1.0 if shifted else 0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @pytest.fixture
    def guide(self):
        guide = AutoAmortizedNormal(self.tempered)
        guide.initialize(X)
        return guide

    def test_another_number_of_rows_or_keyword_is_another_graph(self, guide):
        compiled = CompiledTrace_ELBO()
        calls = [((X,), {}), ((X,), {}), ((X[:5],), {}), ((X,), {"shifted": True}), ((X[:5],), {}), ((X,), {})]
        agree(Trace_ELBO(), compiled, self.tempered, guide, [*calls, *calls])
        assert sorted(runs(compiled)) == [1, 3, 5]
        assert doubts(compiled) == [None]

    def test_a_float_that_changes_becomes_an_input(self, guide):
        compiled = CompiledTrace_ELBO()
        calls = [((X,), {"beta": step / 20}) for step in range(1, 20)]
        agree(Trace_ELBO(), compiled, self.tempered, guide, calls)
        assert runs(compiled) == [19 - elbos.NUM_VALUES - 1]

    def test_a_counter_is_left_to_pyro(self, guide):
        def counted(x, step):
            self.tempered(x)

        compiled, guide = CompiledTrace_ELBO(), AutoAmortizedNormal(counted)
        guide.initialize(X, 0)
        with pytest.warns(UserWarning, match="change from call to call") as caught:
            agree(Trace_ELBO(), compiled, counted, guide, [((X, step), {}) for step in range(20)])
        assert len(caught) == 1
        assert runs(compiled) == []
        agree(Trace_ELBO(), compiled, counted, guide, [((X, 3), {})] * 2)
        assert runs(compiled) == [2]

    def test_other_dtypes_and_layouts(self, guide):
        compiled = CompiledTrace_ELBO()
        twice = torch.stack([X, X + 1], 1)
        calls = [((X,), {}), ((X,), {}), ((twice[:, 0],), {}), ((twice[:, 1],), {}), ((twice[:, 0],), {})]
        agree(Trace_ELBO(), compiled, self.tempered, guide, calls)
        assert doubts(compiled) == [None]

    def test_a_cleared_store_is_noticed(self):
        elbo = CompiledTrace_ELBO()
        first = trained(elbo, linear, by_hand)
        torch.testing.assert_close(trained(elbo, linear, by_hand), first, rtol=1e-5, atol=1e-4)

    def test_handlers_around_svi_are_heeded(self, guide):
        plain, compiled = Trace_ELBO(), CompiledTrace_ELBO()
        agree(plain, compiled, self.tempered, guide, [((X,), {})] * 3)
        with poutine.scale(scale=0.5):
            agree(plain, compiled, self.tempered, guide, [((X,), {})] * 2)

    def test_two_guides_with_one_elbo(self):
        elbo, tables = CompiledTrace_ELBO(), AutoAmortizedNormal(linear, encoder=Table())
        for guide in (by_hand, tables, by_hand, tables):
            losses = trained(elbo, linear, guide, 3)[0]
            if guide is by_hand:
                assert losses == pytest.approx(trained(Trace_ELBO(), linear, guide, 3)[0], rel=1e-5)
        assert len(elbo._captured) == 2


class TestDoubts:
    def test_a_number_that_changes_behind_the_graph_is_noticed(self):
        state = {"beta": 1.0}

        def model(x):
            with pyro.plate("data", len(x)), poutine.scale(scale=state["beta"]):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model)
        guide.initialize(X)
        plain, compiled = Trace_ELBO(), CompiledTrace_ELBO()
        agree(plain, compiled, model, guide, [((X,), {})] * 2)
        state["beta"] = 0.5
        with pytest.warns(UserWarning, match="reads something that changes"):
            agree(plain, compiled, model, guide, [((X,), {})])
        state["beta"] = 0.25
        agree(plain, compiled, model, guide, [((X,), {})] * 3)

    def test_a_branch_on_values_is_left_to_pyro(self):
        def model(x):
            scale = 2.0 if float(x.mean()) > 0 else 1.0
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, scale))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model)
        guide.initialize(X)
        compiled = CompiledTrace_ELBO()
        with pytest.warns(UserWarning, match=r"Python number or a branch.*line \d+ of .*test_elbos.py") as caught:
            agree(Trace_ELBO(), compiled, model, guide, [((X,), {}), ((X,), {}), ((-X,), {}), ((X,), {})])
        assert len(caught) == 1

    def test_numpy_arguments_are_left_to_pyro(self):
        def model(x, weights):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, float(weights[0])), obs=x)

        def guide(x, weights):
            loc = pyro.param("loc", torch.zeros(()))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0))

        weights = torch.ones(2).numpy()
        with pytest.warns(UserWarning, match="argument is a ndarray; pass a tensor"):
            agree(Trace_ELBO(), CompiledTrace_ELBO(), model, guide, [((X, weights), {})] * 3)

    def test_the_user_s_mistakes_are_pyro_s_errors(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, -1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(ValueError, match="scale"):
            CompiledTrace_ELBO().loss_and_grads(model, by_hand, X)
