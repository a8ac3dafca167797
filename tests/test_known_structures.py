"""Nested, crossed and indexed groups, missing data and encoded globals against answers known without the code."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import ClippedAdam

from pyro_amortize import (
    AutoAmortizedNormal,
    DeepSets,
    Table,
    amortization_gap,
    fit_svi,
    plan_amortization,
)

pytestmark = pytest.mark.usefixtures("float64")
GROUPS, MEMBERS = 20, 5


def normal(loc=0.0, scale=1.0):
    return dist.Normal(torch.as_tensor(loc, dtype=torch.get_default_dtype()), scale)


class Gaussian:
    """Latents u with a tree of normal priors, and y ~ N(A u, noise^2): all answers in closed form.

    Args:
        parents: The parent of each latent; None for the root, whose prior is N(0, 10^2). The others' have sd 1.
        rows: The latent of each observation.
        noise: Standard deviation of the observations.
    """

    def __init__(self, parents, rows, noise):
        prior = torch.zeros(len(parents), len(parents))
        for child, parent in enumerate(parents):
            prior[child, child] += 0.01 if parent is None else 1.0
            if parent is not None:
                prior[parent, parent] += 1.0
                prior[child, parent] -= 1.0
                prior[parent, child] -= 1.0
        self.design = torch.zeros(len(rows), len(parents))
        self.design[torch.arange(len(rows)), torch.tensor(rows)] = 1.0
        self.noise = noise
        self.covariance = torch.linalg.inv(prior)
        self.precision = prior + self.design.T @ self.design / noise**2

    def evidence(self, y):
        covariance = self.design @ self.covariance @ self.design.T + self.noise**2 * torch.eye(len(y))
        return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).item()

    def mean_field_elbo(self, y):
        gap = self.precision.diagonal().log().sum() - torch.logdet(self.precision)
        return self.evidence(y) - gap.item() / 2

    def mean(self, y):
        return torch.linalg.solve(self.precision, self.design.T @ y / self.noise**2)


def regression(y):
    theta = pyro.sample("theta", normal(0.0, 10.0))
    with pyro.plate("groups", y.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        with pyro.plate("members", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(z, 1.5), obs=y)


def nested(y):
    theta = pyro.sample("theta", normal(0.0, 10.0))
    with pyro.plate("groups", y.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        with pyro.plate("members", y.shape[1], dim=-1):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(w, 1.5), obs=y)


def indexed(y, group):
    theta = pyro.sample("theta", normal(0.0, 10.0))
    with pyro.plate("groups", GROUPS):
        b = pyro.sample("b", dist.Normal(theta, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b[..., group], 1.5), obs=y)


def data(seed=0):
    made = torch.Generator().manual_seed(seed)
    between, within = torch.randn(GROUPS, 1, generator=made), torch.randn(GROUPS, MEMBERS, generator=made)
    return 3.0 + between + 1.8 * within


class TestOptima:
    """The guide reaches the optimum of its own factorization, which has a closed form."""

    def test_hierarchical_regression(self):
        y = data()
        rows = [1 + i for i in range(GROUPS) for _ in range(MEMBERS)]
        exact = Gaussian([None] + [0] * GROUPS, rows, 1.5)
        guide = AutoAmortizedNormal(regression)
        fit = fit_svi(regression, guide, y, num_steps=2000, seed=0, progress=False)
        assert fit.elbo == pytest.approx(exact.mean_field_elbo(y.flatten()), abs=3 * fit.elbo_se + 0.1)
        found = guide.posterior(y)
        exact_mean = exact.mean(y.flatten())
        torch.testing.assert_close(found.mean["z"][:, 0], exact_mean[1:], atol=0.1, rtol=0)
        sd = exact.precision.diagonal()[1:].rsqrt()
        torch.testing.assert_close(found.stddev["z"][:, 0], sd, atol=0.03, rtol=0)

    @pytest.mark.slow
    def test_latents_at_two_levels(self):
        """The inner latents' optimum needs the data of the whole group: alone, its own row would not do."""
        y = data()
        inner = range(1 + GROUPS, 1 + GROUPS + GROUPS * MEMBERS)
        parents = [None] + [0] * GROUPS + [1 + i for i in range(GROUPS) for _ in range(MEMBERS)]
        exact = Gaussian(parents, list(inner), 1.5)
        guide = AutoAmortizedNormal(nested)
        fit = fit_svi(nested, guide, y, num_steps=1500, seed=0, progress=False)
        assert fit.elbo == pytest.approx(exact.mean_field_elbo(y.flatten()), abs=3 * fit.elbo_se + 0.5)
        blind = AutoAmortizedNormal(nested, inputs={"w": lambda y: y[..., None]})
        alone = fit_svi(nested, blind, y, num_steps=1500, seed=0, progress=False)
        assert alone.elbo < fit.elbo - 5

    def test_indexed_groups(self):
        y, group = data().flatten(), torch.arange(GROUPS).repeat_interleave(MEMBERS)
        order = torch.randperm(len(y))
        exact = Gaussian([None] + [0] * GROUPS, (1 + group).tolist(), 1.5)
        guide = AutoAmortizedNormal(indexed)
        fit = fit_svi(indexed, guide, y[order], group[order], num_steps=2000, seed=0, progress=False)
        assert fit.elbo == pytest.approx(exact.mean_field_elbo(y), abs=3 * fit.elbo_se + 0.1)
        torch.testing.assert_close(guide.posterior(y, group).mean["b"], exact.mean(y)[1:], atol=0.1, rtol=0)

    def test_the_gap_of_nested_data_is_told_by_group(self):
        y = data()[:12]
        guide = AutoAmortizedNormal(regression)
        fit_svi(regression, guide, y, num_steps=1500, seed=0, progress=False)
        report = amortization_gap(regression, guide, y, num_steps=400, progress=False)
        assert len(report.per_datum) == 12
        theta = report.given["theta"]
        scale = math.sqrt(1 + 1.5**2 / MEMBERS)
        within = (y - y.mean(1, keepdim=True)).square().sum(1) / 1.5**2
        evidence = dist.Normal(theta, scale).log_prob(y.mean(1)) - within / 2
        evidence += (
            math.log(1.5) - math.log(MEMBERS) / 2 - MEMBERS * math.log(1.5) - (MEMBERS - 1) / 2 * math.log(2 * math.pi)
        )
        found = torch.tensor(report.per_datum["log_evidence"].to_numpy())
        torch.testing.assert_close(found, evidence, atol=0.02, rtol=0)


class TestNewData:
    def test_new_groups_of_other_sizes(self):
        y = data()
        guide = AutoAmortizedNormal(regression)
        fit_svi(regression, guide, y, num_steps=2000, seed=0, progress=False)
        theta = guide.posterior(y).mean["theta"]
        new = 3.0 + torch.randn(7, 1) + 1.5 * torch.randn(7, 5)
        precision = 1 + 5 / 1.5**2
        expected = (theta + new.sum(1) / 1.5**2) / precision
        torch.testing.assert_close(guide.posterior(new).mean["z"][:, 0], expected, atol=0.15, rtol=0)
        assert guide.posterior(new[:2, :3]).mean["z"].shape == (2, 1)

    def test_an_encoded_global_answers_for_new_data_sets(self):
        def model(y):
            theta = pyro.sample("theta", normal(0.0, 3.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(theta, 2.0), obs=y)

        def draw(count):
            return 3.0 * torch.randn(()) + 2.0 * torch.randn(count)

        guide = AutoAmortizedNormal(model, encoder={"theta": DeepSets()})
        guide.initialize(torch.cat([draw(20) for _ in range(50)]))
        steps = 2500
        svi = SVI(model, guide, ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / steps)}), TraceMeanField_ELBO())
        for _ in range(steps):
            svi.step(draw(int(torch.randint(5, 60, ()))))
        errors, ratios = [], []
        for count in (6, 20, 50) * 10:
            y = draw(count)
            precision = 1 / 9 + count / 4
            found = guide.posterior(y)
            errors.append((found.mean["theta"] - y.sum() / 4 / precision) * math.sqrt(precision))
            ratios.append(found.stddev["theta"] * math.sqrt(precision))
        assert torch.stack(errors).square().mean().sqrt() < 0.4
        assert 0.7 < torch.stack(ratios).mean() < 1.4
        assert guide.plan.verdict.closable is True


PRIORS = {
    "normal": lambda: normal(1.0, 0.7),
    "log-normal": lambda: dist.LogNormal(torch.tensor(0.2), 0.5),
    "gamma": lambda: dist.Gamma(torch.tensor(3.0), 2.0),
    "beta": lambda: dist.Beta(torch.tensor(2.0), 5.0),
    "vector": lambda: normal(torch.tensor([1.0, -1.0]), 0.5).to_event(1),
    "simplex": lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
@pytest.mark.parametrize("kind", ["encoder", "table"])
class TestMissing:
    """Rows 0 and 3 hold no data; they have the prior, before and after training."""

    HERE = torch.tensor([False, True, True, False, True, True])

    def built(self, prior, kind):
        fn = prior()

        def model(y, here):
            with pyro.plate("rows", len(y), dim=-2):
                z = pyro.sample("z", fn)
                loc = z[..., 0] if fn.event_shape else z
                with pyro.plate("members", y.shape[1], dim=-1), poutine.mask(mask=here):
                    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

        y = torch.randn(6, 3)
        here = self.HERE[:, None] & (torch.rand(6, 3) > 0.3) | (self.HERE[:, None] & (torch.arange(3) == 0))
        guide = AutoAmortizedNormal(model, encoder=Table() if kind == "table" else None)
        fit_svi(model, guide, y, here, num_steps=30, lr=0.05, seed=0, progress=False)
        return fn, model, guide, y, here

    def test_rows_without_data_have_the_prior(self, prior, kind):
        fn, _, guide, y, here = self.built(prior, kind)
        found = guide.posterior(y, here)
        draws = guide.predictive(y, here, num_samples=2000, parallel=True)["z"]
        for row in (0, 3):
            torch.testing.assert_close(found.mean["z"][row, 0], fn.mean, atol=0.03, rtol=0)
            torch.testing.assert_close(found.stddev["z"][row, 0], fn.stddev, atol=0.03, rtol=0)
            error = 5 * fn.stddev / math.sqrt(2000)
            assert bool(((draws[:, row, 0].mean(0) - fn.mean).abs() < error).all())
        assert bool((found.mean["z"][1, 0] - fn.mean).abs().max() > 1e-3)

    def test_masked_values_move_nothing(self, prior, kind):
        _, model, guide, y, here = self.built(prior, kind)
        other = torch.where(here, y, 50.0)
        for q in ([0.5], [0.1, 0.9]):
            torch.testing.assert_close(guide.quantiles(q, y, here), guide.quantiles(q, other, here), rtol=0, atol=0)
        losses = []
        for values in (y, other):
            pyro.set_rng_seed(3)
            losses.append(TraceMeanField_ELBO().loss(model, guide, values, here))
        assert losses[0] == losses[1]

    def test_no_data_at_all(self, prior, kind):
        fn, _, guide, y, here = self.built(prior, kind)
        nothing = guide.posterior(y, torch.zeros_like(here))
        torch.testing.assert_close(nothing.mean["z"][:, 0], fn.mean.expand(6, *fn.event_shape), atol=0.03, rtol=0)


@pytest.mark.parametrize("inside", [False, True], ids=["mask handler", "mask of the distribution"])
def test_masked_latents_do_not_run_away(inside):
    """Padded rows: latent and data are masked alike."""

    def model(y, here):
        with pyro.plate("rows", len(y)):
            if inside:
                z = pyro.sample("z", normal().expand([len(y)]).mask(here))
                pyro.sample("y", dist.Normal(z, 1.0).mask(here), obs=y)
            else:
                with poutine.mask(mask=here):
                    z = pyro.sample("z", normal())
                    pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y, here = torch.randn(10), torch.arange(10) < 6
    for encoder in (None, Table()):
        guide = AutoAmortizedNormal(model, encoder=encoder)
        fit_svi(model, guide, y, here, num_steps=1000, lr=0.05, seed=0, progress=False)
        posterior = guide.posterior(y, here)
        assert posterior.stddev["z"].max() < 1.5
        torch.testing.assert_close(posterior.mean["z"][:6], y[:6] / 2, atol=0.15, rtol=0)


def test_a_prior_under_a_mask_is_flat_where_data_inform():
    """A mask on the prior alone: q keeps its entropy, so that it is the posterior under a flat prior."""

    def model(x):
        with poutine.mask(mask=False):
            theta = pyro.sample("theta", normal())
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    x = 2 + torch.randn(25)
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, x, num_steps=2000, lr=0.02, seed=0, progress=False)
    found = guide.posterior(x)
    assert found.mean["theta"].item() == pytest.approx(x.mean().item(), abs=0.05)
    assert found.stddev["theta"].item() == pytest.approx(0.2, abs=0.03)


# Verdicts.

X = torch.linspace(-2.0, 2.0, 12) ** 3


def rows(loc, after=lambda z: None):
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(loc(z, x), 1.0), obs=x)
        after(z)

    return model


def process(z):
    gap = torch.arange(12.0)[:, None] - torch.arange(12.0)
    kernel = (-gap.square()).exp() + 0.1 * torch.eye(12)
    pyro.factor("process", dist.MultivariateNormal(torch.zeros(12), kernel).log_prob(z))


def total(z):
    pyro.sample("total", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.0))


def mixture(x):
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", normal())
    with pyro.plate("n", len(x)):
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 1.0))
        weights = dist.Categorical(torch.ones(3))
        pyro.sample("x", dist.MixtureSameFamily(weights, dist.Normal(loc, scale[..., None])), obs=x)


def effects(y, user, item):
    with pyro.plate("users", 4):
        u = pyro.sample("u", normal())
    with pyro.plate("items", 3):
        v = pyro.sample("v", normal())
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(u[user] + v[item], 1.0), obs=y)


def gaussian_process(x):
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(12), torch.eye(12) + 0.5))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(f, 1.0), obs=x)


def positions(y):
    with pyro.plate("n", len(y), dim=-2):
        z = pyro.sample("z", normal())
        with pyro.plate("items", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(z * torch.arange(float(y.shape[1])), 1.0), obs=y)


INDICES = (torch.arange(12) % 4, torch.arange(12) // 4)
VERDICTS = {
    "simple": (rows(lambda z, x: z), (X,), True, "independent given the globals"),
    "sum in the likelihood": (rows(lambda z, x: z.cumsum(0)), (X,), False, "'z' are coupled through 'x'"),
    "process": (rows(lambda z, x: z, process), (X,), False, "'z' are coupled through 'process'"),
    "sum observed": (rows(lambda z, x: z, total), (X,), False, "'z' are coupled through 'total'"),
    "neighbour": (rows(lambda z, x: z + x.roll(1)), (X,), False, "neighbours' data; add them, inputs={'z'"),
    "process as one latent": (gaussian_process, (X,), False, "'f' is drawn for all rows of 'n' together"),
    "shared components": (mixture, (X,), True, "independent given the globals"),
    "nested": (nested, (data(),), True, "rows of 'groups' are independent"),
    "indexed": (indexed, (data().flatten(), torch.arange(GROUPS).repeat_interleave(MEMBERS)), True, "'groups'"),
    "crossed": (effects, (X, *INDICES), False, "'u' (plate 'users') and 'v' (plate 'items') meet crosswise at 'y'"),
    "positions": (positions, (torch.randn(6, 4),), True, "the encoder sees all of a row's data"),
    "equal rows": (rows(lambda z, x: z + x.sum()), (torch.ones(12),), None, None),
}


def test_positions_are_told_apart_unless_pooling_is_asked_for():
    y = torch.randn(6, 4)
    whole, pooled = AutoAmortizedNormal(positions), AutoAmortizedNormal(positions, encoder=DeepSets())
    for guide in (whole, pooled):
        guide.initialize(y)
    assert [guide.plan.blocks[0].features for guide in (whole, pooled)] == [4, 1]
    assert "encoder(y over items)" in str(pooled.plan)
    assert pooled.plan.verdict.closable is False
    assert "pass an element's rows whole, inputs={'z'" in pooled.plan.verdict.reason
    pooled.posterior(y[:, :3])
    with pytest.raises(ValueError, match=r"'y' has 3 elements of plate 'items'.*initialized with 4.*DeepSets\(\)"):
        whole.posterior(y[:, :3])


def two_parameter_logistic(y):
    persons, items = pyro.plate("persons", len(y), dim=-2), pyro.plate("items", y.shape[1], dim=-1)
    with items:
        slope = pyro.sample("slope", dist.LogNormal(torch.tensor(0.0), 0.5))
        level = pyro.sample("level", normal())
    with persons:
        skill = pyro.sample("skill", normal())
    with persons, items:
        pyro.sample("y", dist.Bernoulli(logits=slope * (skill - level)), obs=y)


@pytest.mark.parametrize("persons", [5, 40])
def test_the_way_out_of_crossed_plates_is_one_line(persons):
    y = (torch.rand(persons, 12) > 0.5).double()
    verdict = plan_amortization(two_parameter_logistic, y).verdict
    small, other, width = ("persons", "slope", 5) if persons < 12 else ("items", "skill", 12)
    assert verdict.closable is False
    assert f"encoder={{'{small}': Table()}}, leaves '{other}' to amortize" in verdict.reason
    guide = AutoAmortizedNormal(two_parameter_logistic, encoder={small: Table()})
    guide.initialize(y)
    assert guide.plan.block_of(other).features == width
    assert guide.plan.verdict.closable is True


def test_the_way_out_of_crossed_indices_is_one_line():
    args = (X, *INDICES)
    assert "encoder={'items': Table()}, leaves 'u' to amortize" in plan_amortization(effects, *args).verdict.reason
    guide = AutoAmortizedNormal(effects, encoder={"items": Table()})
    fit_svi(effects, guide, *args, num_steps=3, progress=False)  # features of labels start at zero
    assert (guide.plan.block_of("u").inputs, guide.plan.block_of("u").features) == (("y", "item"), 1 + 3)
    assert guide.plan.verdict.closable is True
    for parameter in guide.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    order = torch.randperm(12)
    there, here = guide.posterior(*(arg[order] for arg in args)).mean["u"], guide.posterior(*args).mean["u"]
    torch.testing.assert_close(there, here)
    other = guide.posterior(X, INDICES[0], 2 - INDICES[1]).mean["u"]
    assert not torch.allclose(other, here)


@pytest.mark.parametrize(("model", "args", "closable", "named"), VERDICTS.values(), ids=VERDICTS.keys())
def test_verdict(model, args, closable, named):
    if named is None:
        with pytest.raises(ValueError, match="all rows of argument 'x' are equal"):
            plan_amortization(model, *args)
        return
    verdict = plan_amortization(model, *args).verdict
    assert verdict.closable is closable
    assert named in verdict.reason


def test_rows_passed_whole_close_the_gap_of_pooling():
    guide = AutoAmortizedNormal(positions, inputs={"z": lambda y: y})
    guide.initialize(torch.randn(6, 4))
    assert guide.plan.block_of("z").features == 4


def test_neighbours_in_a_function_leave_the_verdict_open():
    model = rows(lambda z, x: z + x.roll(1))
    guide = AutoAmortizedNormal(model, inputs=lambda x: torch.stack([x.roll(1, 0), x], -1))
    guide.initialize(X)
    assert guide.plan.verdict.closable is None


# Beside other guides.


def subsampled(y, size=4):
    theta = pyro.sample("theta", normal(0.0, 3.0))
    with pyro.plate("groups", len(y), subsample_size=size, dim=-2) as i:
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        v = pyro.sample("v", dist.Normal(theta, 1.0))
        with pyro.plate("members", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(z + v, 1.0), obs=y[i])


def listed(y):
    def groups(y):
        return pyro.plate("groups", len(y), subsample_size=4, dim=-2)

    whole = AutoGuideList(subsampled, create_plates=groups)
    whole.append(AutoNormal(poutine.block(subsampled, expose=["theta", "v"])))
    whole.append(AutoAmortizedNormal(poutine.block(subsampled, expose=["z"])))
    whole(y)
    return whole


def test_a_block_hides_latents_and_not_their_data():
    y = data()
    part = listed(y)[1]
    block = part.plan.block_of("z")
    assert block.inputs == ("y",)
    assert [block.sites for block in part.plan.blocks] == [("z",)]
    assert part.plan.foreign == ("theta", "v")


def test_guides_in_a_list_see_the_same_subsample():
    y = torch.arange(10.0)[:, None] * 100 + torch.randn(10, 3)
    whole = listed(y)
    trace = poutine.trace(whole).get_trace(y)
    assert len(trace.nodes["groups"]["value"]) == 4
    picked = trace.nodes["groups"]["value"]
    alone = AutoAmortizedNormal(poutine.block(subsampled, expose=["z"]))
    alone.initialize(y)
    alone.load_state_dict(whole[1].state_dict())
    answers = alone.median(y, size=None)["z"]
    torch.testing.assert_close(trace.nodes["z"]["fn"].mean, answers[picked])


@pytest.mark.parametrize("order", [0, 1])
def test_a_list_trains_both_of_its_guides(order):
    y = data()
    parts = [
        lambda: AutoNormal(poutine.block(nested, expose=["theta"])),
        lambda: AutoAmortizedNormal(poutine.block(nested, hide=["theta"])),
    ]
    whole = AutoGuideList(nested)
    for make in parts if order == 0 else parts[::-1]:
        whole.append(make())
    whole(y)
    before = [parameter.detach().clone() for parameter in whole.parameters()]
    SVI(nested, whole, ClippedAdam({"lr": 0.01}), Trace_ELBO()).step(y)
    assert all(bool((old != new).any()) for old, new in zip(before, whole.parameters(), strict=True))
    assert set(whole.median(y)) == {"theta", "z", "w"}


# Data in other orders, indices with padding, arguments that only look alike.


def inner(values):
    def model(y):
        rows = values(y)
        with pyro.plate("groups", len(rows), dim=-2):
            z = pyro.sample("z", normal())
            with pyro.plate("members", rows.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(z, 1.0), obs=rows)

    return model


KEPT = torch.tensor([5, 0, 3, 1])
PARTS = {
    "cut": lambda y: y[1:],
    "picked in a closure": lambda y: y[KEPT],
    "joined": lambda y: torch.cat([y, y[:2] + 1.0]),
    "turned round": lambda y: y.flip(0),
    "masked": lambda y: y[torch.arange(len(y)) != 2],
}


@pytest.mark.parametrize("values", PARTS.values(), ids=PARTS.keys())
def test_rows_that_are_a_function_of_an_argument_are_seen_one_by_one(values):
    model, y = inner(values), torch.arange(6.0)[:, None] + torch.randn(6, 3) / 10
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, y, num_steps=400, lr=0.02, seed=0, progress=False)
    expected = values(y).sum(1) / 4
    torch.testing.assert_close(guide.posterior(y).mean["z"][:, 0], expected, atol=0.35, rtol=0)


def test_a_mask_by_cell_hides_the_covariates_of_the_cell():
    def model(y, x, mask):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", normal())
            pyro.sample("y", dist.Normal(z[:, None] * x, 1.0).mask(mask).to_event(1), obs=y)

    y, x, mask = torch.randn(8, 4), torch.randn(8, 4), torch.rand(8, 4) > 0.4
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, y, x, mask, num_steps=50, seed=0, progress=False)
    hidden = torch.where(mask, y, 9.0), torch.where(mask, x, -33.0)
    assert torch.equal(guide.posterior(y, x, mask).mean["z"], guide.posterior(*hidden, mask).mean["z"])


def words(y, word):
    here = word >= 0
    with pyro.plate("words", 7):
        a = pyro.sample("a", normal())
    with pyro.plate("documents", len(y), dim=-2), pyro.plate("places", y.shape[1], dim=-1), poutine.mask(mask=here):
        pyro.sample("y", dist.Normal(a[..., word.clamp(min=0)], 1.0), obs=y)


@pytest.mark.slow
def test_padded_places_point_to_no_word():
    y, word = torch.randn(6, 3), torch.randint(-1, 7, (6, 3))
    guide = AutoAmortizedNormal(words)
    fit_svi(words, guide, y, word, num_steps=1500, seed=0, progress=False)
    assert guide.plan.verdict.closable is True
    found = guide.posterior(torch.where(word >= 0, y, 9.0), word).mean["a"]
    counts = torch.stack([(word == k).sum() for k in range(7)])
    sums = torch.stack([y[word == k].sum() for k in range(7)])
    torch.testing.assert_close(found, sums / (1 + counts), atol=0.15, rtol=0)


def test_an_argument_that_only_equals_the_index_is_none():
    def model(y, other, group, mask):
        with pyro.plate("groups", 4):
            b = pyro.sample("b", normal())
        with pyro.plate("n", len(y)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(b[group], 1.0), obs=y)

    group, mask = torch.arange(12) % 4, torch.arange(12) != 3
    other = torch.where(mask, group, 1)
    levels = plan_amortization(model, torch.randn(12), other, group, mask).block_of("b").levels
    assert [level.link.argument for level in levels if level.link] == ["group"]


@pytest.mark.slow
def test_data_of_another_plate_beside_indexed_rows():
    def model(y, group, t):
        with pyro.plate("groups", 5, dim=-2):
            b = pyro.sample("b", normal())
        with pyro.plate("rows", len(y), dim=-2), pyro.plate("places", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(b[group] + t, 1.0), obs=y)

    y, group, t = torch.randn(10, 4), torch.arange(10) % 5, 3 * torch.randn(4)
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, y + t, group, t, num_steps=1500, seed=0, progress=False)
    expected = torch.stack([y[group == k].sum() for k in range(5)]) / 9
    torch.testing.assert_close(guide.posterior(y + t, group, t).mean["b"][:, 0], expected, atol=0.15, rtol=0)


def test_rows_that_belong_to_two_elements_are_not_pooled_by_one_of_them():
    def model(first, second, index):
        with pyro.plate("groups", 4):
            b = pyro.sample("b", normal())
        with pyro.plate("n", len(index)):
            pyro.sample("first", dist.Normal(b[index[:, 0]], 1.0), obs=first)
            pyro.sample("second", dist.Normal(b[index[:, 1]], 1.0), obs=second)

    index = torch.stack([torch.arange(12) % 4, torch.arange(12) // 3], 1)
    block = plan_amortization(model, torch.randn(12), torch.randn(12), index).block_of("b")
    assert not block.amortized
    assert block.rows == 4


def test_what_a_model_knows_of_an_indexed_group_comes_by_its_label():
    secret = 3 * torch.randn(4)

    def model(y, group):
        with pyro.plate("groups", 4):
            b = pyro.sample("b", dist.Normal(secret, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(b[group], 1.0), obs=y)

    y, group = torch.randn(12), torch.arange(12) % 4
    plan = plan_amortization(model, y, group)
    assert set(plan.blocks[0].inputs) == {"y", "group"}
    assert plan.verdict.closable is True
    guide = AutoAmortizedNormal(model, inputs={"b": "y"})
    guide.initialize(y, group)
    assert guide.plan.verdict.closable is False
    assert "inputs leaves out 'group'" in guide.plan.verdict.reason


def test_bad_rows_are_refused_with_their_name():
    y, group = torch.randn(12), torch.arange(12) % GROUPS
    guide = AutoAmortizedNormal(indexed)
    guide.initialize(y, group)
    with pytest.raises(ValueError, match="'group' has 5 rows, but the data of plate 'data' have 12"):
        guide.posterior(y, group[:5])
    with pytest.raises(ValueError, match="'group' is a NoneType.*Pass an integer tensor"):
        guide.posterior(y, None)
    with pytest.raises(ValueError, match="points to element 99 of plate 'groups', which has 20"):
        guide.posterior(y, group + 88 * (torch.arange(12) == 11))
    with pytest.raises(ValueError, match=r"returned shape \(5,\) for 'z'.*shape \(20, ...\)"):
        AutoAmortizedNormal(regression, inputs=lambda y: y[0]).initialize(data())
    with pytest.raises(ValueError, match=r"encoder of \['b'\] does not take.*66 features"):
        AutoAmortizedNormal(indexed, encoder=torch.nn.Linear(4, 3)).initialize(y, group)
