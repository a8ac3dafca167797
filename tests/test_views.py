"""Latents in one plate, and their data in another of as many elements or in one event."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

from pyro_amortize import AutoAmortizedNormal, amortization_gap, fit_mean_field, fit_svi, plan_amortization

pytestmark = pytest.mark.usefixtures("float64")
ROWS = 12


def standard():
    return dist.Normal(torch.zeros(()), 1.0)


def beside(y, x):
    with pyro.plate("subjects", len(y)):
        z = pyro.sample("z", standard())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def both(y, x):
    with pyro.plate("subjects", len(y)):
        z = pyro.sample("z", standard())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def across_dims(y, x):
    with pyro.plate("subjects", len(y)):
        z = pyro.sample("z", standard())
    with pyro.plate("data", len(y), dim=-2), pyro.plate("twice", 2, dim=-1):
        pyro.sample("y", dist.Normal(z[..., None], 0.5), obs=torch.stack([y, x], -1))


def through_latents(y, x):
    with pyro.plate("subjects", len(y)):
        z = pyro.sample("z", standard())
    with pyro.plate("data", len(y)):
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(w, 0.5), obs=y)


def with_own_dimensions(y, x):
    with pyro.plate("subjects", len(y), dim=-2), pyro.plate("factors", 2, dim=-1):
        z = pyro.sample("z", standard())
    with pyro.plate("data", len(y), dim=-1):
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=y)


def one_event(y, x):
    with pyro.plate("rows", len(y)):
        e = pyro.sample("e", standard())
    pyro.sample("y", dist.Normal(e, 0.5).to_event(1), obs=y)


def event_of_vectors(y, x):
    with pyro.plate("rows", len(y)):
        e = pyro.sample("e", standard())
    pyro.sample("y", dist.Normal(e[..., None].expand(-1, 2), 0.5).to_event(2), obs=torch.stack([y, x], -1))


@pytest.fixture
def args():
    return torch.randn(ROWS), torch.randn(ROWS)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (beside, ("y",)),
        (both, ("x", "y")),
        (across_dims, ("y",)),  # the site: an argument is one of the two alone
        (through_latents, ("y",)),
        (with_own_dimensions, ("y",)),
        (one_event, ("y",)),
        (event_of_vectors, ("x", "y")),
    ],
)
def test_rows_are_found_where_they_stand(model, inputs, args):
    guide = AutoAmortizedNormal(model)
    guide.initialize(*args)
    (block,) = guide.plan.blocks
    assert tuple(sorted(block.inputs)) == inputs
    assert len(block.plates) == 1
    assert guide.plan.verdict.closable is True
    for rows in (1, 5, 30):
        other = torch.randn(rows), torch.randn(rows)
        answer = guide.posterior(*other).mean
        assert {len(value) for value in answer.values()} == {rows}
        order = torch.randperm(rows)
        mixed = guide.posterior(*(arg[order] for arg in other)).mean
        for site, value in mixed.items():
            torch.testing.assert_close(value, answer[site][order])


def test_a_plate_of_the_same_length_by_chance_is_another(args):
    def model(y, x):
        with pyro.plate("components", ROWS):
            loc = pyro.sample("loc", standard())
        with pyro.plate("data", len(y)):
            weights = dist.Categorical(torch.ones(ROWS))
            pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(loc, 1.0)), obs=y)

    def mirrored(y, x):
        with pyro.plate("subjects", len(y)):
            z = pyro.sample("z", standard())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z.flip(-1), 0.5), obs=y)

    def summed(y, x):
        with pyro.plate("rows", len(y)):
            e = pyro.sample("e", standard())
        pyro.sample("y", dist.Normal(e.cumsum(-1), 0.5).to_event(1), obs=y)

    for other in (model, mirrored, summed):
        (block,) = plan_amortization(other, *args).blocks
        assert not block.amortized


@pytest.mark.parametrize("model", [both, one_event])
def test_minibatches_are_exact(model, args):
    # z has precision 1 + 4 (and 1 where x is seen), so means are linear in the data and an MLP gets near them.
    pyro.set_rng_seed(0)
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, *args, num_steps=150, batch_size=6, lr=0.03, seed=0, progress=False)
    y, x = args
    exact = 4 * y / 5 if model is one_event else (4 * y + x) / 6
    (means,) = guide.posterior(*args).mean.values()
    # Half of the posterior's standard deviation, 0.41 or 0.45; were only one of the plates rescaled, it would be off.
    assert (means - exact).square().mean().sqrt() < 0.2


def test_masks_tables_and_closures(args, tmp_path):
    y, _ = args
    seen = torch.arange(ROWS) % 3 > 0

    def masked(y, seen):
        with pyro.plate("subjects", len(y)):
            z = pyro.sample("z", standard())
        with pyro.plate("data", len(y)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    guide = AutoAmortizedNormal(masked)
    guide.initialize(y, seen)
    torch.testing.assert_close(guide.posterior(y, seen).stddev["z"][~seen], torch.ones(4))
    guide.save(tmp_path / "guide.pt")
    again = AutoAmortizedNormal.load(tmp_path / "guide.pt", masked)
    torch.testing.assert_close(again.median(y, seen), guide.median(y, seen))

    def closure():
        return one_event(y, y)

    guide = AutoAmortizedNormal(closure)
    guide.initialize()
    assert guide.plan.blocks[0].inputs == ("y",)
    table = fit_mean_field(closure, num_steps=3, progress=False)
    assert table.guide.plan.blocks[0].rows == ROWS


def test_reports_say_why_they_hold_totals_only(args):
    guide = AutoAmortizedNormal(beside)
    svi = SVI(beside, guide, ClippedAdam({"lr": 0.02}), Trace_ELBO())
    svi.step(*args)
    report = amortization_gap(beside, guide, *args, num_steps=5, progress=False)
    assert report.per_datum is None
    assert any("data of plate 'subjects' stand in 'data'" in warning for warning in report.warnings)


def test_two_plates_of_latents_whose_elements_are_the_same_rows_share_an_encoder():
    def model(y):
        with pyro.plate("A", len(y)):
            a = pyro.sample("a", standard())
        with pyro.plate("B", len(y)):
            b = pyro.sample("b", standard())
        with pyro.plate("C", len(y)):
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    (block,) = plan_amortization(model, torch.randn(ROWS)).blocks
    assert (block.sites, block.plates, block.inputs, block.closable) == (("a", "b"), ("A",), ("y",), True)


def test_a_chain_of_plates_is_one():
    def model(y):
        with pyro.plate("A", len(y)):
            a = pyro.sample("a", standard())
        with pyro.plate("B", len(y)):
            b = pyro.sample("b", dist.Normal(a, 1.0))
        with pyro.plate("C", len(y)):
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    plan = plan_amortization(model, torch.randn(ROWS))
    assert [block.inputs for block in plan.blocks] == [("y",)]
    assert plan.same == {"B": "A", "C": "A"}


def test_plates_of_latents_in_other_plates_keep_their_names():
    def model(y):
        with pyro.plate("factors", 2, dim=-2), pyro.plate("loadings", 5, dim=-1):
            w = pyro.sample("w", standard())
        with pyro.plate("items", 5):
            b = pyro.sample("b", standard())
        rows = pyro.plate("rows", len(y), dim=-2)
        with rows, pyro.plate("dims", 2, dim=-1):
            z = pyro.sample("z", standard())
        with rows, pyro.plate("columns", 5, dim=-1):
            pyro.sample("y", dist.Normal(z @ w + b, 1.0), obs=y)

    plan = plan_amortization(model, torch.randn(ROWS, 5))
    assert plan.block_of("b").plates == ("items",)
    assert plan.block_of("w").plates == ("factors", "loadings")
    assert plan.block_of("z").plates == ("rows",)
