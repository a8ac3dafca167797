"""Bad input: each error names the site or argument and the fix, early, and nothing is lost."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import nn

from pyro_amortize import MLP, AutoAmortized, AutoAmortizedNormal, Table, amortization_gap, plan_amortization

X = torch.linspace(-2.0, 2.0, 12)


def normal(loc=0.0):
    return dist.Normal(torch.as_tensor(loc), 1.0)


def local(x, loc=lambda z: z):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", normal())
        pyro.sample("x", normal(loc(z)), obs=x)


def optional(n=12, x=None):
    with pyro.plate("n", n):
        z = pyro.sample("z", normal())
        pyro.sample("x", normal(z), obs=x)


def refuses(kind, message):
    """Expects an error, after which Pyro's handlers are as before."""

    class Refusal:
        def __enter__(self):
            self.store = set(pyro.get_param_store())
            self.rng = torch.get_rng_state()
            self.raises = pytest.raises(kind, match=message)
            return self.raises.__enter__()

        def __exit__(self, *error):
            caught = self.raises.__exit__(*error)
            assert not _PYRO_STACK
            assert not any(_DIM_ALLOCATOR._stack)
            assert self.store <= set(pyro.get_param_store())
            return caught

    return Refusal()


def ready(model, *args, **options):
    guide = AutoAmortizedNormal(model, **options)
    guide.initialize(*args)
    return guide


# When planning.


@pytest.mark.parametrize(
    "ask",
    [
        lambda: plan_amortization(optional),
        lambda: AutoAmortizedNormal(optional).initialize(12),
        lambda: AutoAmortizedNormal(optional)(12),
        lambda: SVI(optional, AutoAmortizedNormal(optional), Adam({}), Trace_ELBO()).step(12),
    ],
    ids=["plan", "initialize", "call", "step"],
)
def test_no_data_to_plan_from(ask):
    with refuses(ValueError, r"argument 'x' is None.*Pass the data.*x=\.\.\."):
        ask()


@pytest.mark.parametrize(
    "ask", [plan_amortization, lambda model, *a: AutoAmortizedNormal(model)(*a)], ids=["plan", "call"]
)
@pytest.mark.parametrize(
    ("args", "argument"),
    [((12, X.numpy()), "x"), ((np.int64(12), {"y": X.numpy()}), r"x\['y'\]")],
    ids=["flat", "dict"],
)
def test_numpy_arrays(ask, args, argument):
    with refuses(ValueError, rf"argument '{argument}' is a numpy array.*torch.as_tensor\({argument}\)"):
        ask(optional, *args)


def test_nan_that_no_mask_covers():
    x = X.clone()
    x[3] = torch.nan
    with refuses(ValueError, r"site 'x' hold NaN that no mask covers.*poutine.mask\(mask=.*obs=x.nan_to_num\(\)"):
        plan_amortization(local, x)


def test_nan_in_vectors():
    x = torch.randn(12, 3)
    x[3, 1] = torch.nan

    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(z[:, None].expand(12, 3), 1.0).to_event(1), obs=x)

    with refuses(ValueError, "site 'x' hold NaN"):
        plan_amortization(model, x)


def test_an_unenumerated_discrete_latent():
    def model(x):
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            z = pyro.sample("z", normal())
            pyro.sample("x", normal(z + k), obs=x)

    with refuses(ValueError, r"discrete sample site 'k'.*enumerat.*hide=\['k'\]"):
        plan_amortization(model, X)


def test_a_latent_that_is_enumerated_sequentially():
    def model(x):
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "sequential"})
            pyro.sample("x", normal(k), obs=x)

    with refuses(ValueError, r"discrete sample site 'k'.*'enumerate': 'parallel'"):
        plan_amortization(model, X)


def test_a_delta_below_an_enumerated_latent():
    def model(x):
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})
            mean = pyro.sample("mean", dist.Delta(2 * k))
            pyro.sample("x", normal(mean), obs=x)

    with refuses(NotImplementedError, r"'mean' is a Delta.*pyro.deterministic\('mean'"):
        plan_amortization(model, X)


@pytest.mark.parametrize("x", [torch.ones(12), X[:1]], ids=["equal-rows", "one-row"])
def test_rows_that_tell_nothing(x):
    with refuses(ValueError, r"cannot tell which data inform 'z' in plate 'n'.*inputs=\{'n': \['x'\]\}"):
        plan_amortization(local, x)


@pytest.mark.parametrize("x", [torch.ones(12), X[:1]], ids=["equal-rows", "one-row"])
def test_the_line_to_paste_works(x):
    guide = AutoAmortizedNormal(local, inputs={"n": ["x"]})
    guide.initialize(x)
    assert guide.median(X)["z"].shape == (12,)


def test_no_data_reach_the_latents_without_arguments():
    def model():
        with pyro.plate("n", 5):
            z = pyro.sample("z", normal())
            pyro.sample("x", normal(z), obs=torch.ones(5))

    plan = plan_amortization(model)
    assert plan.block_of("z").inputs == ("x",)


def test_a_model_that_raises_inside():
    class Broken(Exception):
        pass

    def model(x):
        with pyro.plate("n", len(x)):
            pyro.sample("z", normal())
            raise Broken("inside")

    with refuses(Broken, "inside"):
        plan_amortization(model, X)
    guide = AutoAmortizedNormal(model)
    with refuses(Broken, "inside"):
        guide(X)


def test_a_model_that_raises_later_loses_nothing():
    broken = []

    def model(x):
        with pyro.plate("n", len(x)):
            if broken:
                raise KeyError("inside")
            z = pyro.sample("z", normal())
            pyro.sample("x", normal(z), obs=x)

    guide = ready(model, X)
    guide(X)
    before = guide.median(X)
    broken.append(True)
    for ask in (guide, guide.posterior, guide.predictive, lambda x: Predictive(model, guide=guide, num_samples=2)(x)):
        with refuses(KeyError, "inside"):
            ask(X)
    assert guide.training
    broken.clear()
    assert torch.equal(guide.median(X)["z"], before["z"])


# When building.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "flow"}, r"family='flow' is not known. Known: \['normal'\]"),
        ({"prepare": "standard"}, r"prepare='standard'. Expected 'auto', None or a function"),
        ({"init_scale": 0.0}, "init_scale=0.0. Expected a positive number"),
        ({"init_scale": -1.0}, "init_scale=-1.0. Expected a positive number"),
        ({"encoder": "mlp"}, r"encoder='mlp'. Expected.*MLP\(\(64, 64\)\)"),
        ({"encoder": Table}, r"Expected.*Table\(\)"),
        ({"encoder": {"z": 3}}, r"encoder=3. Expected"),
    ],
    ids=["family", "prepare", "zero-scale", "negative-scale", "encoder", "class", "dict"],
)
def test_options(options, message):
    with refuses(ValueError, message):
        AutoAmortized(local, **options)


def test_a_model_that_is_no_model():
    with refuses(ValueError, "model is a Tensor; expected a callable"):
        AutoAmortizedNormal(X)


@pytest.mark.parametrize("option", ["encoder", "inputs"])
def test_names_that_are_no_site(option):
    with refuses(ValueError, rf"{option}=\{{'y': ...\}} names no site or plate.*Known: \['n', 'x', 'z'\]"):
        ready(local, X, **{option: {"y": Table() if option == "encoder" else "x"}})


def test_an_encoder_for_elements_without_data():
    args, _ = CASES["plate_of_globals"].example()
    with refuses(ValueError, r"encoder=\{'w': ...\}.*no rows of data were found.*'w'.*left out, it has a table"):
        ready(CASES["plate_of_globals"].make(), *args, encoder={"w": MLP()})


def test_an_encoder_factory_that_makes_no_module():
    with refuses(ValueError, r"encoder of \['z'\].*returned a int. Expected an nn.Module"):
        ready(local, X, encoder=lambda in_features: in_features)


@pytest.mark.parametrize("trunk", [nn.Flatten(0), nn.Unflatten(0, (1, -1))], ids=["flat", "axis"])
def test_an_encoder_without_the_batch_axis(trunk):
    guide = AutoAmortizedNormal(local, encoder=trunk)
    with refuses(ValueError, r"for 'z', the encoder \w+ returned shape.*nn.Flatten\(1\)"):
        guide.initialize(X)
    assert guide.plan is None


# When answering.


@pytest.mark.parametrize("ask", ["posterior", "median", "initialize"])
def test_no_data_to_answer_from(ask):
    guide = ready(optional, 12, X)
    if ask == "initialize":
        with refuses(ValueError, r"argument 'x' is None.*x="):
            guide.initialize(12)
        assert guide.median(12, X)["z"].shape == (12,)
    else:
        with refuses(ValueError, r"data of 'z' are missing.*informed by \['x'\].*guide.predictive\(...\)"):
            getattr(guide, ask)(12)


def test_no_data_for_quantiles():
    guide = ready(optional, 12, X)
    with refuses(ValueError, r"data of 'z' are missing.*guide.predictive"):
        guide.quantiles([0.5], 12)


@pytest.mark.parametrize("ask", ["posterior", "median", "predictive", "save"])
def test_asked_before_there_are_parameters(ask):
    guide = AutoAmortizedNormal(local)
    with refuses(RuntimeError, rf"AutoAmortizedNormal.{ask}.*guide.initialize\("):
        getattr(guide, ask)(X)


@pytest.mark.parametrize("ask", ["posterior", "median", "predictive", "__call__"])
def test_asked_without_data(ask):
    guide = ready(local, X)
    with refuses(TypeError, r"AutoAmortizedNormal: missing a required argument: 'x'. .*arguments, \(x, loc="):
        getattr(guide, ask)()


@pytest.mark.parametrize("through", ["posterior", "call", "step"])
def test_data_of_another_width(through):
    case = CASES["ppca"]
    (x,), _ = case.example()

    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(z[:, None] * torch.ones(x.shape[-1]), 1.0).to_event(1), obs=x)

    guide = ready(model, x)
    message = r"argument 'x' has 6 features per element of plate 'n'.*with 8. Build a new guide"
    with refuses(ValueError, message):
        ask = {
            "posterior": guide.posterior,
            "call": guide,
            "step": SVI(model, guide, Adam({}), Trace_ELBO()).step,
        }[through]
        ask(x[:, :6])
    assert guide.median(x[:3])["z"].shape == (3,)


def test_new_rows_of_a_table():
    guide = ready(local, X, encoder=Table())
    message = r"a row for each of the 12 elements of plate 'n', but this call has 3.*encoder=\{'z': MLP\(\)\}"
    with refuses(ValueError, message):
        guide.posterior(X[:3])
    with refuses(ValueError, message):
        guide(X[:3])
    assert guide.median(X)["z"].shape == (12,)


def test_data_arguments_of_different_length():
    def model(c, x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", normal(z * c[: len(x)]), obs=x)

    guide = ready(model, X + 3, X)
    with refuses(ValueError, r"argument 'c' has 12 rows along axis 0, but plate 'n' has 5 elements.*c\[:5\]"):
        guide.posterior(X + 3, X[:5])


def test_new_data_hold_nan():
    guide = ready(local, X)
    x = X.clone()
    x[2] = torch.nan
    with refuses(ValueError, r"'x' holds NaN.*x.nan_to_num\(\)"):
        guide.posterior(x)


def test_a_numpy_array_later_on():
    guide = ready(lambda x: local(torch.as_tensor(x)), X)
    with refuses(ValueError, r"argument 'x' is a ndarray.*torch.as_tensor\(x\)"):
        guide.posterior(X.numpy())


def test_a_latent_that_grew():
    def model(x, width):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(width), 1.0).to_event(1))
            pyro.sample("x", normal(z.sum(-1)), obs=x)

    guide = ready(model, X, 2)
    with refuses(ValueError, r"'z' has shape \(3,\) per element.*with \(2,\). Build a new guide"):
        guide.posterior(X, 3)


@pytest.mark.parametrize("name", ["locs", "scales"])
def test_names_of_autonormal(name):
    with refuses(AttributeError, rf"no '{name}'.*guide.posterior\(x\).mean"):
        getattr(AutoAmortizedNormal(local), name)


def test_other_missing_attributes_are_ordinary():
    guide = AutoAmortizedNormal(local)
    assert not hasattr(guide, "nothing")
    with refuses(AttributeError, "'nothing'"):
        _ = guide.nothing


def test_sleep_phase_without_a_place_for_its_values():
    args, _ = CASES["linear"].example()
    guide = ready(lambda x: local(x.exp()), X)
    with refuses(NotImplementedError, r"sleep phase.*\['x'\].*as arguments of the model"):
        guide(X, observations={"x": X})


def test_subsamples_from_outside_with_data_from_a_closure():
    def model():
        with pyro.plate("n", 12, 5) as i:
            z = pyro.sample("z", normal())
            pyro.sample("x", normal(z), obs=X[i])

    guide = ready(model)
    with refuses(NotImplementedError, r"subsample of plate 'n'.*'x' come from a closure.*Pass the data as an argument"):
        for _ in range(20):
            poutine.condition(guide, data={"n": torch.randperm(12)[:5]})()


def test_a_table_for_minibatches_of_unknown_rows():
    def model(x):
        with pyro.plate("n", 40, len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", normal(z), obs=x)

    with refuses(ValueError, r"'z' has a table.*minibatch 'x'.*subsample=indices"):
        AutoAmortizedNormal(model, encoder=Table()).initialize(X)


def test_arguments_that_do_not_fit_are_told_with_the_signature():
    with pytest.raises(TypeError, match=r"plan_amortization: the arguments .*'Y'.*takes \(n=12, x=None\)"):
        plan_amortization(optional, 12, Y=X)


@pytest.mark.parametrize(("data", "remedy"), [([1.0, 2.0, 3.0], r"torch.as_tensor\(x\)"), ("x", r"Pass a tensor\.$")])
def test_data_that_are_no_tensor(data, remedy):
    with pytest.raises(ValueError, match=rf"argument 'x' is a {type(data).__name__}.*{remedy}"):
        ready(local, X).posterior(data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"X": X}, r"predictive: given=\{'X': ...\}: argument 'X' is not known.*Known: loc, x"),
        ((), r"predictive: given= .* missing a required argument: 'x'. It takes \(x, loc="),
    ],
)
def test_arguments_of_the_call_that_informs(given, message):
    with pytest.raises(TypeError, match=message):
        ready(local, X).predictive(X, given=given)


def test_a_gap_needs_a_trained_guide():
    with pytest.raises(RuntimeError, match="amortization_gap: the guide has no parameters yet. Train it"):
        amortization_gap(local, AutoAmortizedNormal(local), X, progress=False)
