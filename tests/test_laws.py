"""What holds for every guide of every model of the zoo."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES, TOTAL
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import Adam
from pyro.poutine.util import prune_subsample_sites
from torch import nn

from pyro_amortize import MLP, AutoAmortized, AutoAmortizedNormal, Constant, Table, plan_amortization
from pyro_amortize.posterior import normal_underneath

GUIDES = {
    "default": lambda model: AutoAmortizedNormal(model),
    "linear": lambda model: AutoAmortizedNormal(model, encoder=MLP(())),
    "table": lambda model: AutoAmortizedNormal(model, encoder=Table()),
    "constant": lambda model: AutoAmortizedNormal(model, encoder=Constant()),
}
LOSSES = {
    "Trace": lambda: Trace_ELBO(),
    "Trace-3": lambda: Trace_ELBO(num_particles=3),
    "MeanField": lambda: TraceMeanField_ELBO(),
    "Graph": lambda: TraceGraph_ELBO(),
    "Renyi": lambda: RenyiELBO(num_particles=2),
    "RWS": lambda: ReweightedWakeSleep(num_particles=2, vectorize_particles=False),
}
VECTORIZED = {
    "Trace": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "MeanField": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "Renyi": lambda: RenyiELBO(num_particles=3, vectorize_particles=True),
    "RWS": lambda: ReweightedWakeSleep(num_particles=3, vectorize_particles=True),
}


def names(**facts):
    """Names of the cases of which these facts hold."""
    return [name for name, case in CASES.items() if all(getattr(case, key) == value for key, value in facts.items())]


cases = pytest.mark.parametrize("name", names())
guides = pytest.mark.parametrize("kind", GUIDES)
encoders = pytest.mark.parametrize("kind", ["default", "linear", "constant"])
# Laws of the guide's own modules, rather than of the model, are tried with a table on one model of each structure.
TABLES = {
    "linear", "supports", "masked_prior", "nested_arguments", "closure", "module", "obs_mask", "ragged", "pyramid",
    "grouped", "lengths", "plate_of_globals",
}  # fmt: skip


def default_and_tables(**facts):
    """Every case of which these facts hold with the default guide, and some of them with a table."""
    found = [(name, "default") for name in names(**facts)] + [
        (name, "table") for name in names(**facts) if name in TABLES
    ]
    return pytest.mark.parametrize(("name", "kind"), found)


def built(name, kind="default", rows=None):
    """Returns the case, a model, an initialized guide, and the arguments it was initialized with."""
    case = CASES[name]
    model = case.make()
    args, kwargs = case.example(rows)
    if (name, kind, rows) == ("minibatch", "table", None):
        pytest.skip("a table cannot know which rows a minibatch holds")
    guide = GUIDES[kind](model)
    guide.initialize(*args, **kwargs)
    return case, model, guide, args, kwargs


def latents(trace):
    """Names of the latent sites of a trace, subsamples apart."""
    nodes = prune_subsample_sites(trace).nodes.items()
    return {name for name, site in nodes if site["type"] == "sample" and not site["is_observed"]}


def finite(loss):
    return all(map(math.isfinite, loss if isinstance(loss, tuple) else (loss,)))


def values(guide):
    return [parameter.detach().clone() for parameter in guide.parameters()]


def all_moved(before, guide):
    return all(bool((old != new).any()) for old, new in zip(before, guide.parameters(), strict=True))


def none_moved(before, guide):
    return all(torch.equal(old, new) for old, new in zip(before, guide.parameters(), strict=True))


def randomized(guide):
    """Moves the parameters off their start, where encoders hardly look at their data."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


def same(left, right, exactly=True):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], equal_nan=True, **({"rtol": 0, "atol": 0} if exactly else {}))


# Sites and gradients.


@cases
@guides
def test_sites_match_the_model_and_every_parameter_receives_a_gradient(name, kind):
    case, model, guide, args, kwargs = built(name, kind)
    guided = poutine.trace(guide).get_trace(*args, **kwargs)
    guided.compute_log_prob()
    replayed = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
    assert latents(replayed) == latents(guided) == case.latents
    for site in case.latents:
        ours, theirs = guided.nodes[site], replayed.nodes[site]
        assert ours["value"] is theirs["value"]
        assert ours["fn"].batch_shape == theirs["fn"].batch_shape
        assert ours["fn"].event_shape == theirs["fn"].event_shape
        assert [f.name for f in ours["cond_indep_stack"]] == [f.name for f in theirs["cond_indep_stack"]]
        assert bool(theirs["fn"].support.check(ours["value"]).all())
    loss = 0.0
    for _ in range(20):
        loss = loss + Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs)
    assert torch.isfinite(loss)
    loss.backward()
    parameters = dict(guide.named_parameters())
    assert parameters
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key
        assert bool(torch.isfinite(parameter.grad).all()), key
        assert bool((parameter.grad != 0).any()), key


@cases
def test_every_elbo_trains_the_guide(name):
    _, model, guide, args, kwargs = built(name)
    for loss, make in LOSSES.items():
        before = values(guide)
        svi = SVI(model, guide, Adam({"lr": 0.01}), make())
        assert all(finite(svi.step(*args, **kwargs)) for _ in range(2)), loss
        assert all_moved(before, guide), loss


@pytest.mark.parametrize("name", ["linear", "supports"])
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")
def test_trace_enum_elbo_trains_the_guide(name):
    _, model, guide, args, kwargs = built(name)
    before = values(guide)
    SVI(model, guide, Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1)).step(*args, **kwargs)
    assert all_moved(before, guide)


@pytest.mark.parametrize("name", names(vectorizable=True))
def test_particles_may_be_vectorized(name):
    _, model, guide, args, kwargs = built(name)
    for loss, make in VECTORIZED.items():
        assert finite(SVI(model, guide, Adam({"lr": 0.0}), make()).step(*args, **kwargs)), loss


@pytest.mark.parametrize("name", ["linear", "ppca", "supports", "plate_at_minus_two", "gamma_poisson"])
def test_vectorized_particles_estimate_the_same_elbo(name):
    _, model, guide, args, kwargs = built(name)
    together = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=2)
    one = Trace_ELBO()
    draws = torch.tensor([one.loss(model, guide, *args, **kwargs) for _ in range(200)])
    difference = together.loss(model, guide, *args, **kwargs) - draws.mean()
    assert abs(difference) < 4 * draws.std() * (1 / 200 + 1 / 400) ** 0.5


@pytest.mark.parametrize("name", names(sleeps=True))
@pytest.mark.parametrize("kind", ["default", "linear"])
def test_sleep_phase_trains_on_the_models_own_draws(name, kind):
    _, model, guide, args, kwargs = built(name, kind)
    loss = ReweightedWakeSleep(num_particles=2, insomnia=0.0, num_sleep_particles=3)
    before = values(guide)
    assert all(map(math.isfinite, SVI(model, guide, Adam({"lr": 0.01}), loss).step(*args, **kwargs)))
    assert all_moved(before, guide)


@cases
def test_torch_optimizers_train_the_guide(name):
    _, model, guide, args, kwargs = built(name)
    elbo = Trace_ELBO()(model, guide)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.01)
    before = values(guide)
    elbo(*args, **kwargs).backward()
    optimizer.step()
    assert all_moved(before, guide)


@pytest.mark.parametrize("name", ["linear", "supports", "subsample_size", "module", "closure", "plate_of_globals"])
@guides
def test_module_local_params(name, kind):
    with pyro.settings.context(module_local_params=True):
        _, model, guide, args, kwargs = built(name, kind)
        before = values(guide)
        elbo = Trace_ELBO()(model, guide)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.01)
        elbo(*args, **kwargs).backward()
        optimizer.step()
        assert not pyro.get_param_store()
        assert all_moved(before, guide)
        if name == "module":
            return  # stock Pyro's SVI cannot train an nn.Module inside a PyroModule in this setting either
        before = values(guide)
        SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(*args, **kwargs)
        assert all_moved(before, guide)


def test_gradient_agrees_with_that_of_a_hand_written_guide():
    _, model, guide, (x,), _ = built("ppca", "linear")
    head = guide.coder_of(guide.plan.block_of("z")).heads[0]
    shift, scale = x.mean(0), x.std(0, unbiased=False)

    def by_hand(x):
        with pyro.plate("n", len(x)):
            out = (x - shift) / scale @ head.weight.T + head.bias
            pyro.sample("z", dist.Normal(out[:, :3], nn.functional.softplus(out[:, 3:])).to_event(1))

    gradients = []
    for candidate in (guide, by_hand):
        guide.zero_grad()
        pyro.set_rng_seed(1)
        Trace_ELBO().differentiable_loss(model, candidate, x).backward()
        gradients.append([head.weight.grad.clone(), head.bias.grad.clone()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


# Rows.


@pytest.mark.parametrize("name", names(resizable=True))
@encoders
def test_a_guide_answers_for_any_number_of_rows(name, kind):
    case, model, guide, _, _ = built(name, kind)
    for rows in (1, 3, 30):
        args, kwargs = case.example(rows)
        posterior = guide.posterior(*args, **kwargs)
        for site in case.amortized:
            assert posterior.plates[site] == case.plates.get(site, ("n",))
            if "n" in posterior.plates[site]:
                assert posterior.mean[site].shape[0] == posterior.stddev[site].shape[0] == rows
        if name == "vae" and rows == 1:
            continue  # BatchNorm itself takes no single row in training
        guided = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
        for site in case.latents:
            assert guided.nodes[site]["value"].shape == replayed.nodes[site]["fn"].shape()
        assert math.isfinite(Trace_ELBO().loss(model, guide, *args, **kwargs))


@pytest.mark.parametrize("name", names(resizable=True, own_subsample=False))
@encoders
def test_permuting_rows_permutes_the_answer(name, kind):
    case, _, guide, args, kwargs = built(name, kind)
    randomized(guide)
    order = torch.randperm(case.rows)
    permuted_args, permuted_kwargs = case.data(order)
    straight = guide.quantiles([0.1, 0.5], *args, **kwargs)
    permuted = guide.quantiles([0.1, 0.5], *permuted_args, **permuted_kwargs)
    for site in case.amortized:
        if case.plates.get(site, ("n",))[0] != "n":
            continue
        torch.testing.assert_close(straight[site][:, order], permuted[site])
        if kind != "constant":
            assert bool((straight[site] != straight[site][:, :1]).any()), "the encoder sees no data"
    for site in case.tables:
        torch.testing.assert_close(straight[site], permuted[site])


@pytest.mark.parametrize("name", names(resizable=True, own_subsample=False))
def test_a_row_is_answered_alone_as_among_others(name):
    case, _, guide, args, kwargs = built(name)
    randomized(guide)
    alone_args, alone_kwargs = case.data(torch.tensor([2]))
    among, alone = guide.median(*args, **kwargs), guide.median(*alone_args, **alone_kwargs)
    for site in case.amortized:
        if case.plates.get(site, ("n",))[0] == "n":
            torch.testing.assert_close(among[site][2:3], alone[site])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].hide])
@encoders
def test_what_a_mask_covers_cannot_influence_the_answer(name, kind):
    case, _, guide, args, _ = built(name, kind)
    randomized(guide)
    hidden = case.hide(*args)
    assert any(not torch.equal(before, after) for before, after in zip(args, hidden, strict=True))
    same(guide.quantiles([0.1, 0.5], *args), guide.quantiles([0.1, 0.5], *hidden))
    fresh = GUIDES[kind](case.make())
    fresh.initialize(*hidden)
    fresh.load_state_dict(guide.state_dict())
    same(guide.quantiles([0.1, 0.5], *args), fresh.quantiles([0.1, 0.5], *args))


@pytest.mark.parametrize("name", ["nested", "three_levels", "ragged", "masked_inside", "factorization"])
def test_permuting_the_rows_of_an_inner_plate_changes_nothing_outside_it(name):
    case, _, guide, args, kwargs = built(name)
    randomized(guide)
    size = args[0].shape[1]
    order = torch.randperm(size)
    if name == "ragged":
        args = (args[0], torch.full_like(args[1], size))

    def permuted(value):
        inner = 1 if value.dim() > 1 else 0
        return value.index_select(inner, order) if value.shape[inner] == size else value

    before, after = guide.median(*args), guide.median(*map(permuted, args))
    for site in case.amortized:
        inner = case.plates.get(site, ("n",))[-1] != "n"
        expected = before[site] if not inner else before[site].movedim(-1 if name == "three_levels" else 0, 0)[order]
        found = after[site] if not inner else after[site].movedim(-1 if name == "three_levels" else 0, 0)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", names(resizable=False))
def test_rows_from_outside_the_arguments_get_answers_of_their_own(name):
    _, _, guide, args, kwargs = built(name)
    median = randomized(guide).median(*args, **kwargs)["z"]
    assert median.shape == (TOTAL,)
    assert len(median.unique()) == TOTAL


@pytest.mark.parametrize("name", names(own_subsample=True))
@guides
def test_a_subsampled_step_is_unbiased(name, kind):
    case = CASES[name]
    model = case.make()
    (x,), _ = case.example()
    guide = randomized(built(name, kind)[2])
    num_draws = 400

    def losses(size):
        twin = GUIDES[kind](model)
        twin.initialize(x, size=size)
        twin.load_state_dict(guide.state_dict())
        return torch.tensor([Trace_ELBO().loss(model, twin, x, size=size) for _ in range(num_draws)])

    part, full = losses(5), losses(None)
    error = ((part.var() + full.var()) / num_draws).sqrt()
    assert error < 0.1 * full.mean().abs()
    assert abs(part.mean() - full.mean()) < 4 * error


@pytest.mark.parametrize("name", names(own_subsample=True))
def test_a_subsampled_row_is_encoded_from_its_own_data(name):
    _, _, guide, args, kwargs = built(name)
    randomized(guide)
    answers = guide.median(*args, size=None)["z"]
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    picked = trace.nodes["n"]["value"]
    assert len(picked) == 5
    torch.testing.assert_close(trace.nodes["z"]["fn"].mean, answers[picked])


@pytest.mark.parametrize("name", names(own_subsample=True))
def test_a_table_keeps_a_row_for_each_element_of_the_full_plate(name):
    case, model, guide, args, kwargs = built(name, "table")
    table = guide.coder_of(guide.plan.block_of("z")).values[0]
    assert len(table) == case.rows
    Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs).backward()
    assert int((table.grad != 0).any(-1).sum()) == 5


def test_minibatches_of_a_loader_and_a_smaller_last_batch():
    case, model, guide, _, _ = built("minibatch")
    (x,), _ = case.example(TOTAL)
    svi = SVI(model, randomized(guide), Adam({"lr": 0.0}), Trace_ELBO())
    whole = guide.median(x)["z"]
    for batch in torch.utils.data.DataLoader(torch.arange(TOTAL), batch_size=12):
        assert math.isfinite(svi.step(x[batch]))
        torch.testing.assert_close(guide.median(x[batch])["z"], whole[batch])


# Predictive.


@cases
def test_predictive(name):
    case, model, guide, args, kwargs = built(name)
    guided = poutine.trace(guide).get_trace(*args, **kwargs)
    whole = poutine.trace(guide).get_trace(*args, **kwargs, **({"size": None} if case.own_subsample else {}))
    improper = name == "improper_global"  # from which Pyro would have to draw
    for parallel in (False, True) if case.vectorizable and not improper else (False,):
        results = [guide.predictive(*args, num_samples=4, parallel=parallel, model_kwargs=kwargs)]
        if not improper:
            results.append(Predictive(model, guide=guide, num_samples=4, parallel=parallel)(*args, **kwargs))
        for site in case.latents:
            assert results[0][site].shape == (4, *whole.nodes[site]["value"].shape)
            for draws, trace in zip(results, (whole, guided), strict=False):
                assert draws[site].numel() == 4 * trace.nodes[site]["value"].numel()
                assert len(draws[site].unique(dim=0)) == (1 if site == "delta" else 4)


@pytest.mark.parametrize("name", names(own_subsample=False))
def test_predictive_replicates_observations(name):
    _, model, guide, args, kwargs = built(name)
    replicas = guide.predictive(*args, num_samples=20, model_kwargs=kwargs)
    guided = poutine.trace(guide).get_trace(*args, **kwargs)
    trace = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
    for site in ("x", "y", "flag"):
        if site in trace.nodes and name != "obs_mask":
            assert replicas[site].shape == (20, *trace.nodes[site]["value"].shape)
            assert len(replicas[site].unique(dim=0)) > 1
    if name == "forecast":
        torch.testing.assert_close(replicas["mean"], replicas["z"])


# Copies.


@default_and_tables(own_subsample=False, resizable=True)
def test_save_and_load(name, kind, tmp_path):
    case, model, guide, args, kwargs = built(name, kind, TOTAL if name == "minibatch" else None)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(2):
        svi.step(*args, **kwargs)
    guide.save(tmp_path / "guide.pt")
    before = guide.posterior(*args, **kwargs)
    scale = pyro.param("scale").item() if name == "vae" else None
    pyro.clear_param_store()
    loaded = AutoAmortizedNormal.load(tmp_path / "guide.pt", case.make())
    after = loaded.posterior(*args, **kwargs)
    same(before.median, after.median)
    same(before.stddev, after.stddev)
    assert str(loaded.plan) == str(guide.plan)
    learnt, kept = (getattr(m, "__self__", m) for m in (model, loaded.model))
    if isinstance(learnt, nn.Module):
        same(learnt.state_dict(), kept.state_dict())
    if name == "vae":
        assert pyro.param("scale").item() == scale != 1.0
    assert math.isfinite(svi.step(*args, **kwargs))
    assert math.isfinite(SVI(loaded.model, loaded, Adam({"lr": 0.05}), Trace_ELBO()).step(*args, **kwargs))


def by_pickle(guide):
    return pickle.loads(pickle.dumps(guide))


@pytest.mark.parametrize("name", ["linear", "supports", "module", "vae", "subsample_size", "obs_mask"])
@pytest.mark.parametrize("kind", ["default", "table"])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_copies_answer_the_same_and_share_nothing(name, kind, copied):
    if name == "vae" and copied is by_pickle:
        pytest.skip("Pyro hangs weak references on what pyro.module registers, so the model itself does not pickle")
    case, model, guide, args, kwargs = built(name, kind)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(*args, **kwargs)
    twin = copied(guide)
    if not case.own_subsample:
        same(guide.median(*args, **kwargs), twin.median(*args, **kwargs))
    ours, theirs = values(guide), values(twin)
    twin_svi = SVI(twin.model, twin, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(6):
        twin_svi.step(*args, **kwargs)
    assert all_moved(theirs, twin)
    assert none_moved(ours, guide)
    for _ in range(6):
        svi.step(*args, **kwargs)
    assert all_moved(ours, guide)


def test_a_guide_without_parameters_can_be_copied_and_pickled():
    case = CASES["linear"]
    args, kwargs = case.example()
    for copied in (copy.deepcopy, by_pickle):
        twin = copied(AutoAmortizedNormal(case.make()))
        assert math.isfinite(Trace_ELBO().loss(twin.model, twin, *args, **kwargs))


@default_and_tables()
def test_a_fresh_guide_loads_a_state_dict(name, kind):
    case, model, guide, args, kwargs = built(name, kind)
    randomized(guide)
    fresh = GUIDES[kind](model)
    fresh.load_state_dict(guide.state_dict())
    assert str(fresh.plan) == str(guide.plan)
    same(dict(guide.named_parameters()), dict(fresh.named_parameters()))
    if not case.own_subsample:
        same(guide.median(*args, **kwargs), fresh.median(*args, **kwargs))
    assert math.isfinite(SVI(model, fresh, Adam({"lr": 0.05}), Trace_ELBO()).step(*args, **kwargs))


@pytest.mark.parametrize("name", ["linear", "supports", "module", "vae"])
def test_two_guides_of_one_model_share_nothing(name):
    _, model, first, args, kwargs = built(name)
    second = AutoAmortizedNormal(model)
    second.initialize(*args, **kwargs)
    ours, theirs = values(first), values(second)
    SVI(model, second, Adam({"lr": 0.05}), Trace_ELBO()).step(*args, **kwargs)
    assert none_moved(ours, first)
    assert all_moved(theirs, second)
    SVI(model, first, Adam({"lr": 0.05}), Trace_ELBO()).step(*args, **kwargs)
    assert all_moved(ours, first)


# Determinism and precision.


@default_and_tables()
def test_same_seed_same_losses(name, kind):
    def losses():
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        case = CASES[name]
        model = case.make()
        args, kwargs = case.example(TOTAL if name == "minibatch" else None)
        svi = SVI(model, GUIDES[kind](model), Adam({"lr": 0.01}), Trace_ELBO())
        return [svi.step(*args, **kwargs) for _ in range(3)]

    assert losses() == losses()


@default_and_tables()
@pytest.mark.usefixtures("float64")
def test_float64(name, kind):
    _, model, guide, args, kwargs = built(name, kind)
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float64}
    assert math.isfinite(SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(*args, **kwargs))
    assert {value.dtype for value in guide.median(*args, **kwargs).values()} == {torch.float64}
    assert {value.dtype for value in guide.posterior(*args, **kwargs).stddev.values()} == {torch.float64}


def test_parameters_follow_the_dtype_of_the_data():
    def model(x):
        theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(model)
    guide.initialize(torch.randn(8, dtype=torch.float64))
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float64}
    assert guide.median(torch.randn(3, dtype=torch.float64))["z"].dtype == torch.float64


# Looking changes nothing.


def everything(model):
    store = pyro.get_param_store()
    owner = getattr(model, "__self__", model)
    state = {k: v.clone() for k, v in owner.state_dict().items()} if isinstance(owner, nn.Module) else {}
    modes = [module.training for module in owner.modules()] if isinstance(owner, nn.Module) else []
    params = {key: (id(value), value.detach().clone()) for key, value in store._params.items()}
    return state, modes, params, pyro.util.get_rng_state()


def assert_unchanged(before, after):
    same(before[0], after[0])
    assert before[1] == after[1]
    assert before[2].keys() == after[2].keys()
    for key, (identity, value) in before[2].items():
        assert after[2][key][0] == identity
        assert torch.equal(value, after[2][key][1])
    for library, state in before[3].items():
        assert str(state) == str(after[3][library])
    assert torch.equal(before[3]["torch"], after[3]["torch"])


@cases
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_planning_changes_nothing(name, trained):
    case = CASES[name]
    model = case.make()
    args, kwargs = case.example()
    tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
    copies = [value.clone() for value in tensors]
    if trained:
        SVI(model, AutoAmortizedNormal(model), Adam({"lr": 0.05}), Trace_ELBO()).step(*args, **kwargs)
    before = everything(model)
    plan_amortization(model, *args, **kwargs)
    assert_unchanged(before, everything(model))
    same(dict(enumerate(copies)), dict(enumerate(tensors)))


@pytest.mark.parametrize("name", names(own_subsample=False))
def test_answering_changes_nothing(name):
    _, model, guide, args, kwargs = built(name)
    SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO()).step(*args, **kwargs)
    before, own = everything(model), values(guide)
    first, second = guide.posterior(*args, **kwargs), guide.posterior(*args, **kwargs)
    same(first.mean, second.mean)
    same(first.stddev, second.stddev)
    same(first.median, {site: value for site, value in guide.median(*args, **kwargs).items() if site in first.median})
    assert_unchanged(before, everything(model))
    assert none_moved(own, guide)
    assert guide.training


@pytest.mark.parametrize("name", names(own_subsample=False))
def test_median_quantiles_and_posterior_agree(name):
    case, _, guide, args, kwargs = built(name)
    randomized(guide)
    posterior = guide.posterior(*args, **kwargs)
    median, quantiles = guide.median(*args, **kwargs), guide.quantiles([0.1, 0.5, 0.9], *args, **kwargs)
    assert set(quantiles) == set(posterior.mean) == {*case.amortized, *case.tables}
    assert set(median) == {*quantiles, *case.left}
    draws = posterior.sample((2000,))
    for site, middle in posterior.median.items():
        torch.testing.assert_close(median[site], middle)
        torch.testing.assert_close(quantiles[site][1], middle)
        assert quantiles[site].shape == (3, *posterior.sites[site].shape())
        assert draws[site].shape == (2000, *middle.shape)
        assert posterior.log_prob({site: draws[site][:50]})[site].shape == (50, *posterior.sites[site].batch_shape)
        error = 5 * draws[site].std(0) * (1 / 2000 + 1 / 4096) ** 0.5 + 1e-5
        assert bool(((draws[site].mean(0) - posterior.mean[site]).abs() < error).all())
        if posterior.sites[site].event_dim == 0 and site not in guide.plan.moving:  # whose quantiles are conditional
            below = (draws[site] < quantiles[site][0]).float().mean(0)
            assert bool(((below - 0.1).abs() < 5 * (0.09 / 2000) ** 0.5).all())


# Densities.


@pytest.mark.parametrize("name", ["normal", "lognormal"])
@pytest.mark.parametrize("loss", ["Trace", "Graph"])
@pytest.mark.usefixtures("float64")
def test_the_exact_posterior_attains_the_evidence_at_every_draw(name, loss):
    """A linear encoder can hold these posteriors, and log p(x, z) - log q(z) is then log p(x) for every z."""
    case = CASES[name]
    model = case.make()
    (x,), _ = case.example()
    guide = AutoAmortizedNormal(model, encoder=MLP(()), prepare=None)
    guide.initialize(x)
    head = guide.coder_of(guide.plan.block_of("z")).heads[0]
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.5], [0.0]]))
        head.bias.copy_(torch.tensor([0.0, math.log(math.expm1(math.sqrt(0.5)))]))
    draws = torch.tensor([-LOSSES[loss]().loss(model, guide, x) for _ in range(5)])
    torch.testing.assert_close(draws, case.evidence(x).expand(5))
    mean, stddev = case.posterior(x)["z"]
    torch.testing.assert_close(guide.posterior(x).mean["z"], mean)
    torch.testing.assert_close(guide.posterior(x).stddev["z"], stddev)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].evidence is not None])
@guides
@pytest.mark.usefixtures("float64")
def test_importance_weights_average_to_the_evidence(name, kind):
    """E_q[p(x, z) / q(z)] = p(x) for every q that is wide enough, and for no q whose density is wrong."""
    case = CASES[name]
    model = case.make()
    (x,), _ = case.example(2)
    guide = AutoAmortizedNormal(model, encoder=GUIDES[kind](model).options["encoder"], init_scale=1.2)
    guide.initialize(x)
    if name == "linear":
        with torch.no_grad():
            guide.coder_of(guide.plan.block_of("theta")).values[0][:, 1] = 11.0
    num_draws = 40_000
    particles = pyro.plate("particles", num_draws, dim=-2)
    guided = poutine.trace(particles(guide)).get_trace(x)
    replayed = poutine.trace(poutine.replay(particles(model), trace=guided)).get_trace(x)
    guided.compute_log_prob()
    replayed.compute_log_prob()
    log_p = sum(replayed.nodes[site]["log_prob"].sum(-1) for site in {"x", *case.latents})
    log_q = sum(guided.nodes[site]["log_prob"].sum(-1) for site in case.latents)
    weights = (log_p - log_q - case.evidence(x)).exp()
    error = weights.std() / math.sqrt(num_draws)
    assert error < 0.1
    assert abs(weights.mean() - 1) < 4 * error


def test_masked_prior_stays_masked():
    _, _, guide, (x, mask), _ = built("masked_prior")
    guided = poutine.trace(guide).get_trace(x, mask)
    guided.compute_log_prob()
    w = guided.nodes["w"]
    normal, _ = normal_underneath(w["fn"])
    by_hand = (dist.Normal(normal.loc, normal.scale).log_prob(w["value"]) * mask).sum(-1)
    torch.testing.assert_close(w["log_prob"], by_hand)


def test_scales_act_on_the_guide_as_on_the_model():
    case, model, _, args, kwargs = built("linear")
    scaled = poutine.scale(model, scale=0.25)
    guide = AutoAmortizedNormal(scaled)
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    assert {trace.nodes[site]["scale"] for site in case.latents} == {0.25}


def test_analytic_kl_is_used_on_the_reals():
    _, model, guide, (x,), _ = built("normal")
    values = [-TraceMeanField_ELBO().loss(model, guide, x) for _ in range(400)]
    rough = [-Trace_ELBO().loss(model, guide, x) for _ in range(400)]
    smooth, rough = torch.tensor(values), torch.tensor(rough)
    assert smooth.std() < 0.7 * rough.std()
    assert abs(smooth.mean() - rough.mean()) < 4 * (smooth.var() / 400 + rough.var() / 400).sqrt()


# Without data, and the early exit.


def optional(n, x=None):
    theta = pyro.sample("theta", dist.Normal(torch.tensor(3.0), 0.1))
    with pyro.plate("n", n):
        z = pyro.sample("z", dist.Normal(theta, 0.5))
        return pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def test_without_data_a_block_is_drawn_from_the_models_conditional():
    guide = AutoAmortizedNormal(optional)
    guide.initialize(12, torch.randn(12))
    with torch.no_grad():
        guide.coder_of(guide.plan.block_of("theta")).values[0].copy_(torch.tensor([[-2.0, -5.0]]))
    trace = poutine.trace(guide).get_trace(5)
    assert trace.nodes["z"]["fn"].loc.unique().tolist() == [trace.nodes["theta"]["value"].item()]
    assert trace.nodes["z"]["fn"].scale.unique().tolist() == [0.5]
    draws = guide.predictive(5, num_samples=300)
    assert draws["x"].shape == (300, 5)
    assert abs(draws["z"].mean() + 2) < 5 * 0.5 / 1500**0.5
    together = Predictive(optional, guide=guide, num_samples=300, parallel=True)(5)
    assert abs(together["z"].mean() + 2) < 5 * 0.5 / 1500**0.5


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []  # in place: whatever a module has is put back where the guide only looks

    @property
    def calls(self):
        return len(self.seen)

    def forward(self, z):
        self.seen.append(z.shape)
        return z


def test_the_decoder_is_not_run_once_the_latents_are_drawn():
    decoder = Counted()

    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(decoder(z), 1.0), obs=x)

    x = torch.randn(12)
    guide = AutoAmortizedNormal(model)
    guide(x)
    guide.posterior(x)
    before = decoder.calls
    assert before > 0
    guide(x)
    guide(x[:5])
    guide.posterior(x)
    guide.posterior(x[:1])
    assert decoder.calls == before


@pytest.mark.parametrize("flag", ["bool", "none", "length"])
@pytest.mark.parametrize("order", ["more", "less"])
def test_a_kind_of_call_with_more_latents_has_them_all(flag, order):
    small, big = {"bool": (False, True), "none": (None, torch.ones(4)), "length": ([], [torch.ones(4)])}[flag]

    def model(x, extra):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            late = z
            if extra is not None and extra is not False and not (isinstance(extra, list) and not extra):
                late = pyro.sample("late", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(late, 1.0), obs=x)

    x = torch.randn(12)
    guide = AutoAmortizedNormal(model)
    guide.initialize(x, big)
    kinds = [(big, {"z", "late"}), (small, {"z"})]
    for extra, expected in (kinds if order == "more" else kinds[::-1]) * 3:
        assert set(guide(x, extra)) == expected
        assert set(guide.median(x, extra)) == expected
        trace = poutine.trace(guide).get_trace(x, extra)
        assert latents(trace) == expected


def test_a_latent_unknown_to_the_plan_is_refused():
    def model(x, extra=False):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            late = pyro.sample("late", dist.Normal(z, 1.0)) if extra else z
            pyro.sample("x", dist.Normal(late, 1.0), obs=x)

    x = torch.randn(12)
    guide = AutoAmortizedNormal(model)
    guide(x)
    guide(x)
    with pytest.raises(RuntimeError, match=r"'late'.*Build a new guide"):
        guide(x, extra=True)


@pytest.mark.parametrize("how", ["tensor", "attribute"])
def test_a_latent_that_no_kind_of_call_announces_is_not_cut_off(how):
    """The exit would skip it in silence, and the ELBO would be wrong."""

    class Program:
        extra = False

        def model(self, x, flag=None):
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
                more = self.extra or (flag is not None and bool(flag))
                late = pyro.sample("late", dist.Normal(z, 1.0)) if more else z
                pyro.sample("x", dist.Normal(late, 1.0), obs=x)

    program = Program()
    x = torch.randn(12)
    flags = [(torch.tensor(False),), (torch.tensor(True),)] if how == "tensor" else [(), ()]
    guide = AutoAmortizedNormal(program.model)
    for _ in range(2):
        guide(x, *flags[0])
    program.extra = how == "attribute"
    with pytest.raises(RuntimeError, match=r"'late'.*Build a new guide"):
        guide(x, *flags[1])


def test_numbered_latents_are_never_cut_short():
    def model(x, depth):
        with pyro.plate("n", len(x)):
            z = 0.0
            for i in range(int(depth)):
                z = pyro.sample(f"z_{i}", dist.Normal(torch.as_tensor(z), 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(12)
    guide = AutoAmortizedNormal(model)
    guide.initialize(x, torch.tensor(3))
    for depth in (2, 3, 1, 3):
        assert len(guide(x, torch.tensor(depth))) == depth


def test_inner_errors_of_the_model_do_not_swallow_the_exit():
    def model(x):
        with pyro.plate("n", len(x)):
            try:
                z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            except Exception:
                z = torch.zeros(len(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(12)
    guide = AutoAmortized(model)
    assert [set(guide(x)) for _ in range(4)] == [{"z"}] * 4
