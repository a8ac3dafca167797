"""Whole numbers that are looked up enter encoders as labels; numbers stay numbers."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import nn

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    Constant,
    Table,
    amortization_gap,
    fit_svi,
    plan_amortization,
)
from pyro_amortize.structure import Labels

COUNT = 6
TABLE = torch.randn(COUNT, generator=torch.Generator().manual_seed(0))
EMBEDDING = nn.Embedding.from_pretrained(TABLE[:, None])
LABEL = torch.tensor([*range(COUNT), 1, 3, 5, 0, 2, 2])
AGE = torch.tensor([18, 25, 31, 40, 44, 52, 58, 63, 70, 77, 79, 36])
Y = torch.randn(len(LABEL), generator=torch.Generator().manual_seed(1))


def local(y, loc, scale=1.0):
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, scale), obs=y)


def of_vector(y, g):
    b = pyro.sample("b", dist.Normal(torch.zeros(COUNT), 1.0).to_event(1))
    local(y, b[..., g])


def trials(y, n):
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Binomial(total_count=n, logits=z), obs=y.abs().round())


def labels(model, *args, **kwargs):
    return {s.name: s.labels for s in plan_amortization(model, *args, **kwargs).blocks[-1].sources}


LOOKED_UP = {
    "index": lambda y, g: local(y, TABLE[g]),
    "embedding": lambda y, g: local(y, EMBEDDING(g)[:, 0]),
    "one_hot": lambda y, g: local(y, nn.functional.one_hot(g, COUNT).float() @ TABLE),
    "one_hot of all": lambda y, g: local(y, nn.functional.one_hot(g).float() @ TABLE),
    "gather": lambda y, g: local(y, TABLE.gather(0, g)),
    "numpy": lambda y, g: local(y, torch.as_tensor(TABLE.numpy()[g.numpy()])),
    "dict": lambda y, g: local(y, torch.stack([dict(enumerate(TABLE))[int(k)] for k in g])),
    "list": lambda y, g: local(y, torch.stack([list(TABLE)[k] for k in g])),
    "comparison": lambda y, g: local(y, torch.where(g == 2, 3.0, 0.0)),
    "comparisons": lambda y, g: local(y, sum(TABLE[k] * (g == k) for k in range(COUNT))),
    "bool": lambda y, g: local(y, torch.where(g.bool(), 3.0, 0.0)),
    "scale": lambda y, g: local(y, 0.0, 1.0 + (g == 2)),
    "bincount": lambda y, g: local(y, torch.bincount(g)[g].float()),
    "number too": lambda y, g: local(y, TABLE[g] + 0.1 * g),
    "global vector": of_vector,
}


@pytest.mark.parametrize("model", LOOKED_UP.values(), ids=LOOKED_UP)
def test_what_is_looked_up_is_a_label(model):
    assert labels(model, Y, LABEL)["g"] == (Labels(0, COUNT),)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64], ids=str)
def test_labels_of_every_dtype(dtype):
    assert labels(lambda y, g: local(y, TABLE[g.long()]), Y, LABEL.to(dtype))["g"] == (Labels(0, COUNT),)


def series(y, n, before):
    with pyro.plate("series", len(n), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen = before(n)
        with pyro.plate("steps", len(seen), dim=-2), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[: len(seen)])


LENGTHS = {
    "all steps": lambda n: torch.arange(5)[:, None] < n,
    "steps up to the longest": lambda n: torch.arange(n.max())[:, None] < n,
    "step by step": lambda n: torch.stack([t < n for t in range(n.max())]),
}


@pytest.mark.parametrize("before", LENGTHS.values(), ids=LENGTHS)
def test_lengths_are_numbers(before):
    y, n = torch.randn(5, 8), torch.tensor([5, 2, 3, 4, 5, 1, 3, 2])
    assert labels(series, y, n, before)["n"] == ()


NUMBERS = {
    "age": lambda y, n: local(y, 0.05 * (n - 40)),
    "log": lambda y, n: local(y, n.float().log()),
    "square": lambda y, n: local(y, 1e-3 * n**2),
    "standardized": lambda y, n: local(y, (n - n.float().mean()) / 10),
    "threshold": lambda y, n: local(y, torch.where(n > 42, 3.0, 0.0)),
    "threshold at a number": lambda y, n: local(y, torch.where(n >= 40, 3.0, 0.0)),
    "threshold after a number": lambda y, n: local(y, torch.where(n > 40, 3.0, 0.0)),
    "decades": lambda y, n: local(y, (n // 10).float()),
    "trials": trials,
}


@pytest.mark.parametrize("model", NUMBERS.values(), ids=NUMBERS)
def test_numbers_stay_numbers(model):
    assert labels(model, Y, AGE)["n"] == ()


def test_the_table_says_how_many_labels_there_are():
    """A first minibatch need not hold them all."""
    assert labels(lambda y, g: local(y, TABLE[g]), Y, LABEL % 2)["g"] == (Labels(0, COUNT),)
    assert labels(lambda y, g: local(y, TABLE[g - 1]), Y, LABEL + 1)["g"] == (Labels(0, COUNT + 1),)
    assert labels(lambda y, g: local(y, TABLE[g]), Y, LABEL - 1)["g"] == (Labels(-1, COUNT + 1),)


def test_where_nothing_says_it_the_data_do():
    codes = 1000 + 10 * (LABEL % 3)
    assert labels(lambda y, g: local(y, torch.where(g == 1010, 3.0, 0.0)), Y, codes)["g"] == (Labels(1000, 21),)


def test_columns_of_one_argument_are_told_apart():
    x = torch.stack([AGE, LABEL, LABEL % 2], -1)

    def model(y, x):
        local(y, TABLE[x[:, 1].long()] + 0.05 * (x[:, 0] - 40) + x[:, 2])

    for rows in (x, x.float()):
        plan = plan_amortization(model, Y, rows)
        assert plan.blocks[0].sources[1].labels == (None, Labels(0, COUNT), None)
        assert plan.blocks[0].features == 1 + 1 + COUNT + 1


def test_missing_labels_in_a_column_of_floats():
    def model(y, g):
        local(y, torch.where(g.isnan(), 0.0, TABLE[g.nan_to_num().long()]))

    g = torch.where(torch.arange(len(LABEL)) == 3, torch.nan, LABEL)
    assert labels(model, Y, g)["g"] == (Labels(0, COUNT),)
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, Y, g, num_steps=3, progress=False)
    assert guide.plan.blocks[0].features == 1 + COUNT + 1
    assert guide.posterior(Y, g).mean["z"].isfinite().all()


def test_too_many_labels_stay_a_number_and_that_is_said():
    with pytest.warns(UserWarning, match="'g' is used to look something up, by labels from 7 to 2000007, too many"):
        found = labels(lambda y, g: local(y, torch.where(g == 7, 3.0, 0.0)), Y, 7 + 1_000_000 * (LABEL % 3))
    assert found["g"] == ()


def test_named_inputs_are_labels_too():
    def model(y, batch):
        local(y, TABLE[batch["group"]])

    batch = {"group": LABEL}
    for inputs in (None, {"z": ["y", "batch['group']"]}):
        guide = AutoAmortizedNormal(model, inputs=inputs)
        guide.initialize(Y, batch)
        assert guide.plan.blocks[0].features == 1 + COUNT


def test_an_index_into_an_argument_is_no_label_unless_it_tells_more():
    def model(y, g, table):
        local(y, table[g])

    def more(y, g, table):
        local(y, table[g] + TABLE[g])

    assert set(labels(model, Y, LABEL, 1 + TABLE)) == {"y", "table"}
    assert labels(more, Y, LABEL, 1 + TABLE) == {"y": (), "g": (Labels(0, COUNT),), "table": ()}


def test_an_index_of_groups_is_a_label_where_the_model_knows_more_of_a_group():
    def model(y, g, known):
        with pyro.plate("groups", COUNT):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("d", len(y)):
            pyro.sample("y", dist.Normal(a[..., g] + known * TABLE[g], 1.0), obs=y)

    plain, knowing = (plan_amortization(model, Y, LABEL, known) for known in (0.0, 1.0))
    assert (plain.blocks[0].inputs, plain.verdict.closable) == (("y",), True)
    assert (set(knowing.blocks[0].inputs), knowing.verdict.closable) == ({"y", "g"}, True)


@pytest.mark.parametrize("rows", [len(LABEL), 7], ids=["all", "minibatch"])
def test_an_index_into_a_table_is_a_label(rows):
    """Given the groups' latents, those of a row depend on which group it is of; groups of minibatches have a table."""

    def model(y, g):
        with pyro.plate("groups", COUNT):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("d", len(LABEL), subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a[..., g] + z, 1.0), obs=y)

    guide = AutoAmortizedNormal(model, encoder={"a": Table()} if rows == len(LABEL) else None)
    guide.initialize(Y[:rows], LABEL[:rows])
    groups, rows_ = guide.plan.blocks
    assert not groups.amortized
    assert rows_.inputs == ("y", "g")
    assert guide.plan.verdict.closable is True
    guide = AutoAmortizedNormal(model, encoder={"a": Table()}, inputs={"z": "y"})
    guide.initialize(Y[:rows], LABEL[:rows])
    assert "inputs leaves out 'g', which informs 'z'" in guide.plan.verdict.reason


# What the encoder makes of them.


def many():
    """The levels of 200 sites are known, of which a row says which is its own; the evidence of the rows is -737.9."""
    generator = torch.Generator().manual_seed(0)
    level, site = 2 * torch.randn(200, generator=generator), torch.randint(200, (500,), generator=generator)
    y = level[site] + 0.1 * torch.randn(500, generator=generator) + torch.randn(500, generator=generator)

    def model(site, y):
        with pyro.plate("d", len(y)):
            z = pyro.sample("z", dist.Normal(level[site], 0.1))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return model, site, y, float(dist.Normal(level[site], 1.01**0.5).log_prob(y).sum())


def test_many_labels_cost_next_to_nothing():
    """A number in their place costs 12,000 nats, whatever the encoder's width."""
    model, site, y, evidence = many()
    fit = fit_svi(model, AutoAmortizedNormal(model), site, y, num_steps=1500, seed=0, progress=False)
    assert fit.fallback is None  # a graph of its steps was recorded
    assert evidence - 2.0 < fit.elbo < evidence + 3 * fit.elbo_se
    report = amortization_gap(model, fit.guide, site[:50], y[:50], progress=False)
    assert not [text for text in report.advice if "encoder" in text]


def test_a_global_vector_by_batches():
    """Given b, the posterior of a row is known; a number in the place of its batch costs 0.7 nats a row."""
    pyro.set_rng_seed(0)
    count, noise = 40, 0.3
    effect, batch = 3 * torch.randn(count), torch.randint(count, (600,))
    y = torch.randn(600) + effect[batch] + noise * torch.randn(600)

    def model(y, batch):
        b = pyro.sample("b", dist.Normal(torch.zeros(count), 5.0).to_event(1))
        with pyro.plate("d", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + b[batch], noise), obs=y)

    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, y, batch, num_steps=1200, lr=0.03, seed=0, progress=False)
    found = guide.posterior(y, batch)
    q = dist.Normal(found.mean["z"], found.stddev["z"])
    exact = dist.Normal((y - found.mean["b"][batch]) / (1 + noise**2), noise / (1 + noise**2) ** 0.5)
    assert torch.distributions.kl_divergence(q, exact).mean() < 0.02


def trained(model=lambda y, g: local(y, TABLE[g]), rows=slice(None), steps=5):
    guide = AutoAmortizedNormal(model, encoder=MLP((8,)))
    svi = SVI(model, guide, ClippedAdam({"lr": 0.01}), Trace_ELBO())
    guide.initialize(Y, LABEL)
    for _ in range(steps):
        svi.step(Y[rows], LABEL[rows])
    return guide


def test_a_label_that_was_not_trained_has_the_place_of_none_and_that_is_said():
    guide = trained(rows=slice(0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.posterior(Y[:3], LABEL[:3])
    with pytest.warns(UserWarning, match=r"no row .* trained on had the label 3, 4, 5 of argument 'g'.*answer for 'z'"):
        answer = guide.posterior(torch.zeros(4), torch.tensor([0, 3, 4, 5])).mean["z"]
    assert answer[1] == answer[2] == answer[3] != answer[0]


def test_an_untrained_guide_says_nothing_of_labels():
    guide = trained(steps=0)
    guide.posterior(Y, LABEL)


@pytest.mark.parametrize("ask", ["step", "posterior"])
def test_labels_beyond_what_is_known_are_refused(ask):
    def model(y, g):
        local(y, torch.where(g == 2, 3.0, 0.0))

    guide = trained(model)
    with pytest.raises(ValueError, match=r"'g' holds the label 9, but .* initialized for 0 to 5.*Initialize a new"):
        (guide if ask == "step" else guide.posterior)(Y[:2], torch.tensor([2, 9]))


def test_labels_beyond_the_table_are_refused_though_the_guide_leaves_the_model_before():
    def model(y, g):
        with pyro.plate("d", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + TABLE[g], 1.0), obs=y)

    with pytest.raises(ValueError, match="'g' holds the label 6, .* for 0 to 5"):
        trained(model).posterior(Y[:2], torch.tensor([2, COUNT]))


def test_other_rows_pieces_and_files(tmp_path):
    guide = trained()
    model = guide.model
    many = guide.posterior(Y.repeat(900), LABEL.repeat(900)).mean["z"]
    torch.testing.assert_close(many, guide.posterior(Y, LABEL).mean["z"].repeat(900))
    guide.save(tmp_path / "guide.pt")
    loaded = AutoAmortizedNormal.load(tmp_path / "guide.pt", model)
    assert loaded.plan == guide.plan
    torch.testing.assert_close(loaded.posterior(Y, LABEL).mean["z"], guide.posterior(Y, LABEL).mean["z"])
    guide.posterior(Y[:1], LABEL[:1])


def test_a_long_call_is_planned_from_some_of_its_rows():
    model, site, y, _ = many()
    guide = AutoAmortizedNormal(model)
    guide.initialize(site.repeat(30), y.repeat(30))
    assert guide.plan.blocks[0].sources[0].labels == (Labels(0, 200),)
    fit = fit_svi(model, guide, site.repeat(30), y.repeat(30), num_steps=3, batch_size=64, progress=False)
    assert fit.losses.shape == (3,)


@pytest.mark.parametrize("encoder", [Table(), Constant()], ids=["table", "constant"])
def test_only_encoders_have_parameters_for_labels(encoder):
    guide = AutoAmortizedNormal(LOOKED_UP["index"], encoder=encoder)
    guide.initialize(Y, LABEL)
    assert not [name for name, _ in guide.named_parameters() if "preparations" in name]


def test_labels_under_a_mask_count_for_nothing():
    def model(y, g, mask):
        with pyro.plate("d", len(y)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + TABLE[g], 1.0), obs=y)

    mask = torch.ones(len(Y), dtype=torch.bool)
    mask[-1] = False
    other = LABEL.clone()
    other[-1] = 0
    guide = AutoAmortizedNormal(model)
    guide.initialize(Y, LABEL, mask)
    assert torch.equal(guide.median(Y, LABEL, mask)["z"], guide.median(Y, other, mask)["z"])


def test_float64():
    y, table = Y.double(), TABLE.double()

    def model(y, g):
        local(y, table[g])

    guide = AutoAmortizedNormal(model)
    guide.initialize(y, LABEL)
    assert guide.posterior(y, LABEL).mean["z"].dtype == torch.float64
