"""Series against closed forms: optima of linear-Gaussian models, windows' gaps, lengths, padding, missing data."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    Constant,
    Recurrent,
    Table,
    Window,
    amortization_gap,
    fit_mean_field,
    fit_svi,
    plan_amortization,
)
from pyro_amortize.examination import examine
from pyro_amortize.planner import build_plan

pytestmark = pytest.mark.usefixtures("float64")


def tridiagonal(diagonal, beside):
    return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)


def trained(model, encoder, *args, start=None, **options):
    """Returns a guide trained on data, started from others if these are all equal."""
    pyro.set_rng_seed(0)
    guide = AutoAmortizedNormal(model, encoder=encoder)
    guide.initialize(*(args if start is None else start))
    fit_svi(model, guide, *args, **{"num_steps": 1500, "lr": 0.05, "seed": 0, "progress": False, **options})
    return guide


def stacked(values, count, stem="z", first=0):
    return torch.stack([values[f"{stem}_{t}"] for t in range(first, first + count)], -1)


# The saw series: z_n ~ N(x_{n-1}, 1), x_n ~ N(a (theta + z_n), 1).

A = 0.75


def saw_data(count):
    torch.manual_seed(2012)
    x = [torch.zeros((), dtype=torch.float32)]
    for _ in range(count):
        torch.randn((), dtype=torch.float32)
        x.append(torch.randn((), dtype=torch.float32) + A * (3.4159 + x[-1]))
    return torch.stack(x[1:]).double()


def saw(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1e4))
    with pyro.plate("time", len(x)):
        z = pyro.sample("z", dist.Normal(torch.cat([x.new_zeros(1), x[:-1]]), 1.0))
        pyro.sample("x", dist.Normal(A * (theta + z), 1.0), obs=x)


def saw_in_a_loop(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1e4))
    before = torch.zeros(())
    for n in range(len(x)):
        z = pyro.sample(f"z_{n}", dist.Normal(before, 1.0))
        before = pyro.sample(f"x_{n}", dist.Normal(A * (theta + z), 1.0), obs=x[n])


def saw_elbo(x, posterior):
    """The ELBO but for theta's prior and constants, in closed form."""
    (m, s), (mt, st) = ((posterior.mean[name], posterior.stddev[name]) for name in ("z", "theta"))
    before = torch.cat([x.new_zeros(1), x[:-1]])
    misfit = (m - before).square() + s.square() + (x - A * (mt + m)).square() + A**2 * (st.square() + s.square())
    return float(-0.5 * misfit.sum() + s.log().sum() + st.log())


@pytest.mark.slow
def test_saw_series():
    """Known: F-VI 553.0139, linear in x_n 892.634, linear in (x_{n-1}, x_n) 553.0139, const 2933.567."""
    x = saw_data(1000)
    torch.testing.assert_close(x[:3], torch.tensor([3.17612195, 5.44603682, 7.10823059]))
    encoders = {"own": MLP(()), "window": Window(1, ()), "table": Table(), "const": Constant()}
    elbo = {label: saw_elbo(x, trained(saw, e, x).posterior(x)) for label, e in encoders.items()}
    best = elbo["window"]
    assert elbo["table"] - best == pytest.approx(0.0, abs=1.0)
    assert best - elbo["own"] == pytest.approx(892.634 - 553.0139, abs=0.3)
    assert best - elbo["const"] == pytest.approx(2933.567 - 553.0139, abs=0.5)


@pytest.mark.parametrize("model", [saw, saw_in_a_loop])
def test_a_window_of_one_closes_the_gap_of_the_saw_series(model):
    x = saw_data(30)
    verdict = build_plan(examine(model, (x,), {})).verdict
    assert verdict.closable is False
    assert "'x' enters the densities of other rows" in verdict.reason
    assert "encoder=Window(1)" in verdict.reason
    for encoder, closable in ((MLP(), False), (Window(0), False), (Window(1), True), (Window(3), True)):
        guide = AutoAmortizedNormal(model, encoder=encoder)
        guide.initialize(x)
        assert guide.plan.verdict.closable is closable
    along = Recurrent(along="time") if model is saw else None  # in a loop this is the default
    guide = AutoAmortizedNormal(model, encoder=along)
    guide.initialize(x)
    assert guide.plan.verdict.closable is True


# A hidden Markov model: z_1 ~ N(0, 1), z_n ~ N(z_{n-1}, 1), x_n ~ N(z_n, 1).


def hmm_precision(count):
    diagonal = torch.full((count,), 3.0)
    diagonal[-1] = 2.0
    return tridiagonal(diagonal, -torch.ones(count - 1))


def hmm(x):
    z = x.new_zeros(())
    for n in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{n}", dist.Normal(z, 1.0))
        pyro.sample(f"x_{n}", dist.Normal(z, 1.0), obs=x[n])


def hmm_as_factors(x):
    with pyro.plate("time", len(x)):
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        before = torch.cat([torch.zeros_like(z[..., :1]), z[..., :-1]], -1)
        pyro.factor("chain", dist.Normal(before, 1.0).log_prob(z))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("radius", "gap"),
    [
        (0, 0.186033),
        (1, 0.023756),
        pytest.param(2, 0.0034027, marks=pytest.mark.slow),
        pytest.param(3, 0.00049491, marks=pytest.mark.slow),
    ],
)
def test_window_gaps_of_the_hidden_markov_model(radius, gap):
    """Known: the best means that see a window, edge data free, miss these gaps at x = 1, N = 100."""
    count = 100
    precision, x = hmm_precision(count), torch.ones(count)
    mean = torch.linalg.solve(precision, x)
    torch.testing.assert_close(mean[:5], 1 - 0.381966 ** torch.arange(1.0, 6.0), atol=1e-6, rtol=0)
    loss = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    start = (torch.randn(count, generator=torch.Generator().manual_seed(0)),)
    encoder = Window(radius, (), along="time")
    guide = trained(hmm_as_factors, encoder, x, start=start, num_steps=2000, loss=loss)
    assert guide.plan.verdict.closable is False
    posterior = guide.posterior(x)
    off = posterior.mean["z"] - mean
    assert float(off @ precision @ off) / 2 == pytest.approx(gap, abs=1.5e-3)
    if radius:  # then the last datum, whose variance is another, has parameters of its own
        torch.testing.assert_close(posterior.stddev["z"], precision.diagonal().rsqrt(), atol=0, rtol=0.02)


def test_verdicts_on_the_hidden_markov_model():
    x = torch.randn(8)
    plan = build_plan(examine(hmm, (x,), {}))
    (block,) = plan.blocks
    assert (block.sites, block.plates, block.inputs, block.dim) == (("z_*",), ("steps",), ("x",), 1)
    assert plan.verdict.closable is False
    assert not plan.verdict.factorizes
    assert "'z_*' are coupled along 'steps'" in plan.verdict.reason
    for encoder, closable in ((MLP(), False), (Window(2), False), (Recurrent(), True), (None, True), (Table(), True)):
        guide = AutoAmortizedNormal(hmm, encoder=encoder)
        guide.initialize(x)
        assert guide.plan.verdict.closable is closable
        if isinstance(encoder, Window):
            assert "encoder(x, ±2 along steps)" in str(guide.plan)
    in_a_plate = plan_amortization(hmm_as_factors, x).verdict
    assert in_a_plate.closable is False
    assert "coupled through 'chain'" in in_a_plate.reason
    assert "where rows stand in order, so does encoder=Window(radius), and encoder=Recurrent()" in in_a_plate.reason


# Linear-Gaussian state spaces, many series: z_t ~ N(0.9 z_{t-1}, 0.5), x_t ~ N(z_t, 1) where it is there.


def state_space(x, mask=None):
    with pyro.plate("series", len(x)):
        z = x.new_zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, math.sqrt(0.5)))
            with poutine.mask(mask=True if mask is None else mask[:, t]):
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def draw_series(count, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    z, x = torch.zeros(count), []
    for _ in range(steps):
        z = 0.9 * z + math.sqrt(0.5) * torch.randn(count, generator=generator)
        x.append(z + torch.randn(count, generator=generator))
    return torch.stack(x, 1)


def smoother(x, mask=None):
    """Posterior precision, shape (series, steps, steps), and mean of every series: what Kalman's smoother returns."""
    steps = x.shape[1]
    here = torch.ones_like(x) if mask is None else mask.to(x)
    diagonal = torch.full((steps,), 2.0 * (1 + 0.81))
    diagonal[-1] = 2.0
    precision = tridiagonal(diagonal, torch.full((steps - 1,), -1.8)) + torch.diag_embed(here)
    return precision, torch.linalg.solve(precision, here * torch.where(here > 0, x, 0.0))


def misses(guide, *args):
    """Mean gap a series of the guide's means, in nats, and its standard deviations as ratios to F-VI's."""
    precision, mean = smoother(*args)
    posterior = guide.posterior(*args)
    off = stacked(posterior.mean, mean.shape[1]) - mean
    ratio = stacked(posterior.stddev, mean.shape[1]) * precision.diagonal(dim1=1, dim2=2).sqrt()
    return float((off[:, None] @ precision @ off[..., None]).mean()) / 2, ratio


@pytest.mark.slow
def test_trained_on_20_steps_right_on_7_and_on_50():
    guide = trained(state_space, None, draw_series(240, 20, 0), num_steps=400, lr=0.015, batch_size=80)
    for steps in (20, 7, 50):
        gap, ratio = misses(guide, draw_series(200, steps, 1))
        assert gap < 0.003 * steps
        assert float((ratio - 1).abs().mean()) < 0.03
        assert float((ratio - 1).abs().max()) < 0.25


@pytest.mark.slow
def test_missing_data_inside_a_series():
    """The smoother fills the holes from both sides; after the last datum the prior takes over."""
    x = draw_series(300, 10, 0)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    x = torch.where(mask, x, 99.0)
    guide = trained(state_space, None, x, mask, num_steps=500, lr=0.015, batch_size=100)
    fresh = draw_series(200, 10, 3)
    mask = torch.rand(fresh.shape, generator=torch.Generator().manual_seed(4)) < 0.7
    mask[:, -1] = True
    gap, ratio = misses(guide, fresh, mask)
    assert gap < 0.1
    assert float((ratio - 1).abs().mean()) < 0.05
    mask[:, 7:] = False
    sites = poutine.trace(guide).get_trace(fresh, mask).nodes
    after = dist.Normal(0.9 * sites["z_7"]["value"], math.sqrt(0.5))
    torch.testing.assert_close(
        sites["z_8"]["fn"].log_prob(sites["z_8"]["value"]), after.log_prob(sites["z_8"]["value"])
    )


@pytest.mark.slow
def test_the_gap_of_a_linear_window_is_that_of_the_best_one():
    x = draw_series(300, 6, 0)
    precision, mean = smoother(x)
    columns = [x[..., None]]
    for offset in (-1, 1):
        there = torch.arange(6) + offset
        inside = (there >= 0) & (there < 6)
        columns += [torch.where(inside, x[:, there.clamp(0, 5)], 0.0)[..., None]]
        columns += [(~inside).to(x).expand(x.shape)[..., None]]
    design = torch.cat([*columns, torch.ones(300, 6, 1)], -1)
    weighted = precision @ design
    coefficients = torch.linalg.solve(
        torch.einsum("ntj,ntk->jk", design, weighted), torch.einsum("ntj,nt->j", weighted, mean)
    )
    off = design @ coefficients - mean
    best = float((off[:, None] @ precision @ off[..., None]).mean()) / 2
    gap, _ = misses(trained(state_space, Window(1, ()), x, num_steps=900), x)
    assert best > 0.05
    assert gap == pytest.approx(best, abs=0.01)
    assert build_plan(examine(state_space, (x,), {})).verdict.closable is False


@pytest.mark.slow
def test_gap_report_and_mean_field_of_series():
    x = draw_series(20, 5, 0)
    precision, mean = smoother(x)
    fit = fit_mean_field(state_space, x, num_steps=1500, lr=0.01, seed=0, progress=False)
    posterior = fit.guide.posterior(x)
    torch.testing.assert_close(stacked(posterior.mean, 5), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(
        stacked(posterior.stddev, 5), precision.diagonal(dim1=1, dim2=2).rsqrt(), atol=0, rtol=0.1
    )
    guide = trained(state_space, None, x, num_steps=200, lr=0.01)
    report = amortization_gap(state_space, guide, x, num_steps=250, num_draws=1000, progress=False)
    approximation = (precision.diagonal(dim1=1, dim2=2).log().sum(-1) - precision.logdet()) / 2
    found = report.per_datum
    assert len(found) == 20
    error = torch.tensor(
        ((found["approximation_gap"] - approximation.numpy()) / found["approximation_gap_se"]).to_numpy()
    )
    assert float(error.abs().max()) < 4.5
    assert float(found["amortization_gap"].min()) > -0.02


def test_forecasts_are_the_models_own():
    def model(x, horizon=0):
        with pyro.plate("series", len(x)):
            z = x.new_zeros(len(x))
            for t in range(x.shape[1] + horizon):
                z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, math.sqrt(0.5)))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t] if t < x.shape[1] else None)

    x = draw_series(50, 5, 0)
    for planned in (0, 2):
        guide = AutoAmortizedNormal(model)
        guide.initialize(x, planned)
        assert set(guide.median(x[:2, :3], 4)) == {f"z_{t}" for t in range(7)}
        assert set(guide.posterior(x, 3).mean) == {f"z_{t}" for t in range(5)}
        draws = guide.predictive(x, 2, num_samples=100)
        step = draws["z_6"] - 0.9 * draws["z_5"]
        assert abs(float(step.mean())) < 4 * math.sqrt(0.5 / 5000)
        assert float(step.std()) == pytest.approx(math.sqrt(0.5), rel=0.05)
        assert draws["x_6"].shape == (100, 50)


# Lengths, padding, own networks.


def padded(x, mask):
    with pyro.plate("series", len(x)):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        z = x.new_zeros(len(x))
        for t in range(x.shape[1]):
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z + b, 1.0), obs=x[:, t])


ENCODERS = {
    "default": lambda: None,
    "window": lambda: Window(2, (8,)),
    "recurrent": lambda: Recurrent(gru_dim=5, num_layers=2, hidden_dims=()),
    "network": lambda: Recurrent(network=lambda width: nn.Sequential(nn.Linear(width, 6), Smooth())),
}


class Smooth(nn.Module):
    """A network of one's own along time, whose answers depend on all steps that it is shown."""

    def forward(self, rows):
        return torch.cat([rows.tanh(), rows.mean(1, keepdim=True).expand(rows.shape)], -1)


@pytest.mark.parametrize("kind", ENCODERS)
def test_padding_never_changes_an_answer(kind):
    pyro.set_rng_seed(0)
    x, mask = torch.randn(6, 5), torch.arange(5) < torch.tensor([[5], [4], [3], [2], [5], [1]])
    guide = AutoAmortizedNormal(padded, encoder=ENCODERS[kind]())
    guide.initialize(x, mask)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    whole = guide.posterior(x, mask)
    after = guide.posterior(nn.functional.pad(x, (0, 3), value=99.0), nn.functional.pad(mask, (0, 3)))
    before = guide.posterior(nn.functional.pad(x, (2, 1), value=99.0), nn.functional.pad(mask, (2, 1)))
    for n, length in enumerate(mask.sum(1).tolist()):
        alone = guide.posterior(x[n : n + 1, :length], mask[n : n + 1, :length])
        for answer in ("mean", "stddev"):
            expected, padding, shifted, single = (getattr(p, answer) for p in (whole, after, before, alone))
            for other in (padding, shifted, single):
                torch.testing.assert_close(other["b"][n if len(other["b"]) > 1 else 0], expected["b"][n])
            for t in range(length):
                torch.testing.assert_close(padding[f"z_{t}"][n], expected[f"z_{t}"][n])
                torch.testing.assert_close(shifted[f"z_{t + 2}"][n], expected[f"z_{t}"][n])
                torch.testing.assert_close(single[f"z_{t}"][0], expected[f"z_{t}"][n])
    assert len({float(whole.mean[f"z_{t}"][0]) for t in range(5)}) == 5


@pytest.mark.parametrize("kind", ["default", "window", "recurrent"])
def test_series_guides_are_saved_and_loaded(kind, tmp_path):
    x, mask = torch.randn(6, 5), torch.ones(6, 5, dtype=torch.bool)
    guide = AutoAmortizedNormal(padded, encoder=ENCODERS[kind]())
    SVI(padded, guide, Adam({"lr": 0.05}), Trace_ELBO()).step(x, mask)
    guide.save(tmp_path / "guide.pt")
    loaded = AutoAmortizedNormal.load(tmp_path / "guide.pt", padded)
    again = guide.median(x[:2, :3], mask[:2, :3])
    for name, value in loaded.median(x[:2, :3], mask[:2, :3]).items():
        torch.testing.assert_close(value, again[name])
    assert loaded.plan == guide.plan


def test_every_latent_of_a_longer_or_shorter_series_is_there():
    guide = AutoAmortizedNormal(state_space)
    svi = SVI(state_space, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for steps in (4, 9, 2, 1, 9, 4):
        assert math.isfinite(svi.step(torch.randn(3, steps)))
        assert set(guide(torch.randn(3, steps))) == {f"z_{t}" for t in range(steps)}
        assert set(guide.median(torch.randn(3, steps))) == {f"z_{t}" for t in range(steps)}


# Loops of other kinds.


def test_rows_of_a_sequential_plate():
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
        for i in pyro.plate("rows", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(theta, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=x[i])

    x = 3 + torch.randn(12)
    plan = plan_amortization(model, x)
    assert plan.verdict.closable is True
    assert plan.block_of("z_7").plates == ("rows",)
    guide = trained(model, MLP(()), x, num_steps=600)
    posterior = guide.posterior(x)
    theta = posterior.mean["theta"]
    torch.testing.assert_close(stacked(posterior.mean, 12), (theta + 4 * x) / 5, atol=0.05, rtol=0)
    assert len(guide.posterior(torch.randn(30)).mean) == 31


def test_series_in_a_list():
    def model(series):
        for i in pyro.plate("series", len(series)):
            z = torch.zeros(())
            for t in pyro.markov(range(len(series[i]))):
                z = pyro.sample(f"z_{i}_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{i}_{t}", dist.Normal(z, 1.0), obs=series[i][t])

    series = [torch.randn(n) for n in (4, 3, 5, 2)]
    guide = AutoAmortizedNormal(model)
    guide.initialize(series)
    (block,) = guide.plan.blocks
    assert (block.sites, block.plates) == (("z_*_*",), ("series", "steps"))
    together = guide.posterior(series).mean
    assert set(together) == {f"z_{i}_{t}" for i, x in enumerate(series) for t in range(len(x))}
    alone = guide.posterior(series[2:]).mean
    for t in range(5):
        torch.testing.assert_close(alone[f"z_0_{t}"], together[f"z_2_{t}"])
    assert float(together["z_0_1"]) != float(together["z_1_1"])


def test_steps_in_a_list():
    def model(x):
        with pyro.plate("series", len(x[0])):
            z = torch.zeros(len(x[0]))
            for t, row in enumerate(x):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=row)

    x = list(torch.randn(4, 6))
    with_lists = AutoAmortizedNormal(model, encoder=Recurrent(gru_dim=4))
    with_lists.initialize(x)
    assert with_lists.plan.block_of("z_2").plates == ("series", "steps")
    whole = with_lists.median(x)
    for name, value in with_lists.median([row[2:4] for row in x]).items():
        torch.testing.assert_close(value, whole[name][2:4])
    assert len(with_lists.median(x[:2])) == 2


def test_plates_of_data_may_be_made_anew_in_each_step():
    def model(x, anew):
        with pyro.plate("series", len(x), dim=-2):
            z, tones = torch.zeros(len(x), 1), pyro.plate("tones", x.shape[2], dim=-1)
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                with pyro.plate(f"tones_{t}", x.shape[2], dim=-1) if anew else tones:
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    x, medians = torch.randn(6, 5, 3), []
    for anew in (False, True):
        pyro.set_rng_seed(0)
        guide = AutoAmortizedNormal(model, encoder=Recurrent(gru_dim=4))
        guide.initialize(x, anew)
        assert guide.plan.block_of("z_2").plates == ("series", "steps")
        medians.append(guide.median(torch.cat([x, x[:, :2]], 1), anew))
    assert len(medians[1]) == 7
    for name, value in medians[0].items():
        torch.testing.assert_close(medians[1][name], value)


def test_numbered_sites_that_nothing_runs_through_are_no_series():
    def model(views):
        with pyro.plate("n", len(views[0])):
            for k, view in enumerate(views):
                z = pyro.sample(f"z_{k}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{k}", dist.Normal((k + 1) * z, 1.0), obs=view)

    plan = plan_amortization(model, [torch.randn(8), torch.randn(8)])
    assert [block.sites for block in plan.blocks] == [("z_0", "z_1")]
    assert plan.families == ()


def test_two_loops_keep_apart():
    def model(x, y):
        with pyro.plate("n", len(x)):
            z = w = x.new_zeros(len(x))
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
            for t in pyro.markov(range(y.shape[1])):
                w = pyro.sample(f"w_{t}", dist.Normal(w, 1.0))
                pyro.sample(f"y_{t}", dist.Normal(w, 1.0), obs=y[:, t])

    guide = AutoAmortizedNormal(model)
    guide.initialize(torch.randn(5, 3), torch.randn(5, 4))
    assert guide.plan.block_of("z_0").inputs == ("x",)
    assert guide.plan.block_of("w_0").inputs == ("y",)
    assert len(guide.median(torch.randn(2, 4), torch.randn(2, 2))) == 6


def test_latents_in_a_loop_before_the_plate_of_their_data():
    def model(x):
        z, states = torch.zeros(()), []
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            states.append(z)
        with pyro.plate("time", len(x)):
            pyro.sample("x", dist.Normal(torch.stack(states, -1), 1.0), obs=x)

    x = torch.randn(6)
    plan = plan_amortization(model, x)
    assert plan.block_of("z_1").plates == ("time",)
    guide = trained(model, Window(5, (), along="time"), x, num_steps=1500, lr=0.03)
    mean = torch.linalg.solve(hmm_precision(6), x)
    torch.testing.assert_close(stacked(guide.posterior(x).mean, 6), mean, atol=0.05, rtol=0)
    assert len(guide.posterior(torch.randn(9)).mean) == 9

    def components(x):
        centres = [pyro.sample(f"mu_{k}", dist.Normal(0.0, 5.0)) for k in range(6)]
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(sum(centres), 1.0), obs=x)

    assert not any(block.amortized for block in plan_amortization(components, x).blocks)


# Bad input.


def test_errors_of_series():
    x = torch.randn(6, 4)
    with pytest.raises(ValueError, match="radius=-1"):
        Window(-1)
    with pytest.raises(ValueError, match=r"along='tim'.*'z_\*'.*\['series', 'steps'\]"):
        AutoAmortizedNormal(state_space, encoder=Window(1, along="tim")).initialize(x)
    with pytest.raises(ValueError, match=r"network Flatten of Recurrent returned shape \(.*Expected \(series, steps"):
        AutoAmortizedNormal(state_space, encoder=Recurrent(network=nn.Flatten())).initialize(x)
    guide = AutoAmortizedNormal(state_space, encoder=Table())
    guide.initialize(x)
    with pytest.raises(ValueError, match=r"'z_\*' has a table.*4 turns of loop 'steps'.*Recurrent\(\)"):
        guide(torch.randn(6, 5))
    with pytest.raises(ValueError, match=r"names no site or plate.*'z_\*'"):
        AutoAmortizedNormal(state_space, encoder={"zz": MLP()}).initialize(x)


def test_encoders_by_name():
    x = torch.randn(6, 4)
    for key in ("z_*", "steps", "series/steps"):
        guide = AutoAmortizedNormal(state_space, encoder={key: Window(1)})
        guide.initialize(x)
        assert guide.plan.block_of("z_1").reach.radius == 1


# What stands at the start.


def test_an_observed_first_state_and_one_that_is_an_argument_are_inputs():
    def observed(x, start):
        with pyro.plate("series", len(x)):
            z = x.new_zeros(len(x))
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0), obs=start if t == 0 else None)
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def argument(x, start):
        with pyro.plate("series", len(x)):
            z = start
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    x, start = torch.randn(6, 4), torch.randn(6)
    for model, latents in ((observed, range(1, 4)), (argument, range(4))):
        guide = AutoAmortizedNormal(model)
        guide.initialize(x, start)
        (block,) = guide.plan.blocks
        assert set(block.inputs) == {"x", "start"}
        assert guide.plan.verdict.closable is True
        here, moved = guide.posterior(x, start).mean, guide.posterior(x, start + 5).mean
        assert set(here) == {f"z_{t}" for t in latents}
        assert bool((here["z_2"] != moved["z_2"]).all())


def test_the_first_state_of_a_single_series_is_encoded_from_it():
    def model(x):
        z = pyro.sample("z_0", dist.Normal(0.0, 1.0))
        for t in range(1, len(x) + 1):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t - 1])

    guide = AutoAmortizedNormal(model)
    guide.initialize(torch.randn(6))
    assert guide.plan.block_of("z_0").inputs == ("x",)
    assert guide.median(torch.randn(3))["z_0"] != guide.median(torch.randn(3))["z_0"]
    assert math.isfinite(fit_svi(model, guide, torch.randn(6), num_steps=5, progress=False).elbo)


def test_data_of_turns_before_those_that_are_known_are_refused():
    def model(x):
        z = torch.zeros(())
        for t, value in enumerate(x):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            if value is not None:
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=value)

    one = torch.tensor(1.0)
    guide = AutoAmortizedNormal(model)
    guide.initialize([None, one, 2 * one, None, -one])
    assert len(guide.median([None, one, None, None, one, 2 * one])) == 6
    with pytest.raises(ValueError, match="'x_0' is observed, but stands before the first turn"):
        guide.median([one, one, one])
    with pytest.raises(ValueError, match=r"'z_2' is one of 'z_\*'"):
        AutoAmortizedNormal(model, encoder={"z_2": MLP()}).initialize([one, 2 * one, -one])


def test_indicators_and_items_with_numbers_are_no_series():
    def indicators(y):
        with pyro.plate("n", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            for j in range(y.shape[1]):
                e = pyro.sample(f"e_{j}", dist.Normal((j + 1) * theta, 1.0))
                pyro.sample(f"y_{j}", dist.Normal(e, 1.0 + j), obs=y[:, j])

    def items(y):
        persons = pyro.plate("n", len(y))
        with persons:
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        for j in range(y.shape[1]):
            difficulty = pyro.sample(f"difficulty_{j}", dist.Normal(0.0, 1.0))
            with persons:
                pyro.sample(f"y_{j}", dist.Normal(theta - difficulty, 1.0), obs=y[:, j])

    plan = plan_amortization(indicators, torch.randn(8, 3))
    assert [block.sites for block in plan.blocks] == [("theta", "e_0", "e_1", "e_2")]
    assert plan.verdict.closable is True
    plan = plan_amortization(items, torch.randn(8, 3))
    assert [block.amortized for block in plan.blocks] == [True, False, False, False]


def test_a_plate_that_subsamples_has_no_neighbours():
    def model(x, size=None):
        with pyro.plate("time", len(x), subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    guide = AutoAmortizedNormal(model, encoder={"z": Window(1)})
    guide.initialize(torch.randn(8))
    with pytest.raises(ValueError, match="'z' sees along plate 'time', of which this call has 3 of 8 elements"):
        guide(torch.randn(8), size=3)


def test_making_a_guide_leaves_a_network_of_ones_own_as_it_was():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, rows):
            return self.norm(rows.transpose(1, 2)).transpose(1, 2)

    network = Normed()
    AutoAmortizedNormal(state_space, encoder=Recurrent(network=network)).initialize(torch.randn(6, 4))
    assert int(network.norm.num_batches_tracked) == 0
    assert network.training
