"""Latents whose dimensions are a plate of their own: what they are told apart by, and the same model as an event."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

from pyro_amortize import (
    AutoAmortizedNormal,
    Table,
    amortization_gap,
    fit_mean_field,
    fit_svi,
    plan_amortization,
    to_arviz,
)

pytestmark = pytest.mark.usefixtures("float64")
ROWS, FACTORS, PIXELS = 24, 2, 6


@pytest.fixture
def weights():
    return torch.randn(FACTORS, PIXELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def x(weights):
    draws = torch.Generator().manual_seed(2)
    noise = torch.randn(ROWS, PIXELS, generator=draws, dtype=torch.float64)
    return torch.randn(ROWS, FACTORS, generator=draws, dtype=torch.float64) @ weights + 0.3 * noise


def own_plate(weights, inner=True, pixels="plate", prior=None):
    """A factor model whose factors are a plate, inside or outside that of the rows; observed in plate or event."""
    prior = dist.Normal(torch.zeros(()), 1.0) if prior is None else prior

    def model(x):
        with pyro.plate("rows", len(x), dim=-2 if inner else -1):
            with pyro.plate("factors", FACTORS, dim=-1 if inner else -2):
                z = pyro.sample("z", prior)
            mean = (z if inner else z.mT) @ weights
            if pixels == "plate":
                with pyro.plate("pixels", PIXELS, dim=-1 if inner else -2):
                    pyro.sample("x", dist.Normal(mean if inner else mean.mT, 0.3), obs=x if inner else x.mT)
            else:
                lay = (lambda value: value[..., None, :]) if inner else (lambda value: value)
                pyro.sample("x", dist.Normal(lay(mean), 0.3).to_event(1), obs=lay(x))

    return model


def as_event(weights, prior=None):
    prior = dist.Normal(torch.zeros(()), 1.0) if prior is None else prior

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", prior.expand([FACTORS]).to_event(1))
            pyro.sample("x", dist.Normal(z @ weights, 0.3).to_event(1), obs=x)

    return model


def fitted(model, *args, **options):
    pyro.set_rng_seed(0)
    guide = AutoAmortizedNormal(model, **options)
    return fit_svi(model, guide, *args, num_steps=40, batch_size=8, seed=0, progress=False)


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("pixels", ["plate", "event"])
def test_a_plate_of_dimensions_is_an_event(weights, x, inner, pixels):
    plan = plan_amortization(own_plate(weights, inner, pixels), x)
    (block,) = plan.blocks
    assert (block.plates, block.dim, block.inputs, block.features) == (("rows",), FACTORS, ("x",), PIXELS)
    assert plan.verdict.closable is True
    assert "encoder(x)" in str(plan)


@pytest.mark.parametrize("kind", [dist.Normal, dist.LogNormal])
def test_every_answer_is_that_of_the_event(weights, x, kind):
    prior = kind(torch.zeros(()), 1.0)
    plates, event = own_plate(weights, prior=prior), as_event(weights, prior)
    one, two = fitted(plates, x), fitted(event, x)
    assert one.elbo == pytest.approx(two.elbo, rel=1e-6)
    mine, other = one.guide.posterior(x[:5]), two.guide.posterior(x[:5])
    torch.testing.assert_close(mine.mean, other.mean)
    torch.testing.assert_close(one.guide.median(x), two.guide.median(x))
    torch.testing.assert_close(one.guide.quantiles([0.1, 0.9], x), two.guide.quantiles([0.1, 0.9], x))
    value = {"z": other.mean["z"]}
    torch.testing.assert_close(mine.log_prob(value)["z"].sum(-1), other.log_prob(value)["z"])
    reports = [
        amortization_gap(model, fit.guide, x, num_steps=20, seed=0, progress=False).per_datum
        for model, fit in ((plates, one), (event, two))
    ]
    assert reports[0]["elbo"].to_numpy() == pytest.approx(reports[1]["elbo"].to_numpy(), rel=1e-5)
    assert to_arviz(one.guide.posterior(x))["posterior"]["z"].dims == ("chain", "draw", "rows", "factors")


def test_tables_files_and_draws(weights, x, tmp_path):
    model = own_plate(weights, inner=False)
    table = fit_mean_field(model, x, num_steps=5, progress=False)
    assert table.guide.plan.blocks[0].rows == ROWS
    guide = AutoAmortizedNormal(model)
    guide.initialize(x)
    guide.save(tmp_path / "guide.pt")
    again = AutoAmortizedNormal.load(tmp_path / "guide.pt", model)
    torch.testing.assert_close(again.median(x[:3]), guide.median(x[:3]))
    assert guide.predictive(x[:4], num_samples=3)["z"].shape == (3, FACTORS, 4)
    with pytest.raises(ValueError, match=r"'z' has a table with a row for each of the 24 elements of plate 'rows'"):
        table.guide.posterior(x[:3])


def test_two_plates_of_dimensions(x):
    def model(x):
        with pyro.plate("rows", len(x), dim=-3):
            with pyro.plate("factors", 2, dim=-1), pyro.plate("times", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.reshape(-1, 1, 1, 6), 0.3).to_event(1), obs=x[:, None, None])

    guide = AutoAmortizedNormal(model)
    guide.initialize(x)
    assert (guide.plan.blocks[0].plates, guide.plan.blocks[0].dim) == (("rows",), 6)
    assert guide.posterior(x[:1]).mean["z"].shape == (1, 3, 2)


def test_minibatches_as_arguments_give_the_exact_means(weights):
    # The posterior of z has precision W W' + 0.09 I over 0.09: means of z are a linear function of x.
    draws = torch.Generator().manual_seed(3)
    z = torch.randn(200, FACTORS, generator=draws, dtype=torch.float64)
    x = z @ weights + 0.3 * torch.randn(200, PIXELS, generator=draws, dtype=torch.float64)
    exact = torch.linalg.solve(weights @ weights.T + 0.09 * torch.eye(FACTORS), weights @ x.T).T

    def model(x):
        with pyro.plate("rows", 200, subsample_size=len(x), dim=-2):
            with pyro.plate("factors", FACTORS, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("pixels", PIXELS, dim=-1):
                pyro.sample("x", dist.Normal(z @ weights, 0.3), obs=x)

    pyro.set_rng_seed(0)
    guide = AutoAmortizedNormal(model)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.02, "lrd": 0.995}), Trace_ELBO())
    for _ in range(100):
        for rows in torch.randperm(200).split(50):
            svi.step(x[rows])
    means = guide.posterior(x).mean["z"]
    # 0.1 is a third of the posterior's standard deviation: a table trained at random rows is off by that of the prior.
    assert (means - exact).square().mean().sqrt() < 0.1


def test_coefficients_of_indexed_groups():
    group, c = torch.arange(40) % 5, torch.randn(40, FACTORS)
    y = c.sum(-1) + torch.randn(40)

    def groups_last(y, c, group):
        with pyro.plate("coefficients", FACTORS, dim=-2):
            mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("groups", 5, dim=-1):
                b = pyro.sample("b", dist.Normal(mu, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((b[..., group] * c.T).sum(-2), 1.0), obs=y)

    def groups_first(y, c, group):
        with pyro.plate("groups", 5, dim=-2), pyro.plate("coefficients", FACTORS, dim=-1):
            b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((b[..., group, :] * c).sum(-1), 1.0), obs=y)

    for model, shape in ((groups_last, (FACTORS, 5)), (groups_first, (5, FACTORS))):
        guide = AutoAmortizedNormal(model)
        guide.initialize(y, c, group)
        block = guide.plan.block_of("b")
        assert (block.plates, block.dim, set(block.inputs)) == (("groups",), FACTORS, {"y", "c"})
        assert guide.plan.verdict.closable is True
        assert guide.posterior(y[:10], c[:10], group[:10]).mean["b"].shape == shape


def test_a_prior_of_each_entry_enters_with_its_row(x, weights):
    def model(x, prior):
        with pyro.plate("rows", len(x), dim=-2):
            with pyro.plate("factors", FACTORS, dim=-1):
                z = pyro.sample("z", dist.Normal(prior, 1.0))
            with pyro.plate("pixels", PIXELS, dim=-1):
                pyro.sample("x", dist.Normal(z @ weights, 0.3), obs=x)

    plan = plan_amortization(model, x, torch.randn(ROWS, FACTORS))
    assert plan.blocks[0].inputs == ("x", "prior")
    assert plan.blocks[0].features == PIXELS + FACTORS
    assert plan.verdict.closable is True


def test_masked_pixels_are_not_seen(x, weights):
    def model(x, seen):
        with pyro.plate("rows", len(x), dim=-2):
            with pyro.plate("factors", FACTORS, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("pixels", PIXELS, dim=-1), poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z @ weights, 0.3), obs=x)

    seen = torch.rand(ROWS, PIXELS) > 0.3
    seen[3] = False
    guide = AutoAmortizedNormal(model)
    guide.initialize(x, seen)
    assert guide.plan.blocks[0].features == 2 * PIXELS
    answer = guide.posterior(x, seen)
    torch.testing.assert_close(answer.mean, guide.posterior(torch.where(seen, x, 9.0), seen).mean)
    torch.testing.assert_close(answer.stddev["z"][3], torch.ones(FACTORS))


def test_loadings_are_shared_and_scores_are_told_apart(x):
    def factor_analysis(x):
        rows, pixels = pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", PIXELS, dim=-1)
        factors = pyro.plate("factors", FACTORS, dim=-3)
        with factors, pixels:
            w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with factors, rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with rows, pixels:
            pyro.sample("x", dist.Normal((w * z).sum(-3), 0.3), obs=x)

    plan = plan_amortization(factor_analysis, x)
    z, w = plan.block_of("z"), plan.block_of("w")
    assert (z.plates, z.features, w.amortized, w.rows) == (("rows",), PIXELS, False, FACTORS * PIXELS)
    assert plan.verdict.closable is True


@pytest.mark.parametrize("event", [True, False])
def test_intercepts_of_the_data_s_columns_do_not_take_the_rows_latents_away(x, event):
    """Latents of rows and of columns meet crosswise; which of them are written as plates makes no difference."""

    def model(x):
        rows, pixels = pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", PIXELS, dim=-1)
        with pyro.plate("loadings", FACTORS, dim=-2), pixels:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pixels:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        if event:
            with rows:
                z = pyro.sample("z", dist.Normal(torch.zeros(FACTORS), 1.0).to_event(1))[..., 0, :]
        else:
            with rows, pyro.plate("factors", FACTORS, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with rows, pixels:
            pyro.sample("x", dist.Normal(z @ w + b, 0.3), obs=x)

    plan = plan_amortization(model, x)
    assert plan.block_of("z").amortized
    assert plan.block_of("z").dim == FACTORS
    assert plan.verdict.closable is False
    assert "encoder={'pixels': Table()}" in plan.verdict.reason
    guide = AutoAmortizedNormal(model, encoder={"pixels": Table()})
    guide.initialize(x)
    assert guide.plan.verdict.closable
    assert guide.posterior(x[:5]).mean["z"].shape[0] == 5


def test_components_that_no_rows_tell_apart_stay_a_table():
    def mixture(x):
        with pyro.plate("components", 3, dim=-1), pyro.plate("columns", 2, dim=-2):
            loc = pyro.sample("loc", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            weights = dist.Categorical(torch.ones(3))
            pyro.sample("x", dist.MixtureSameFamily(weights, dist.Normal(loc.mT, 1.0).to_event(1)), obs=x)

    (block,) = plan_amortization(mixture, torch.randn(ROWS, 2)).blocks
    assert (block.plates, block.amortized, block.rows) == (("columns", "components"), False, 6)
