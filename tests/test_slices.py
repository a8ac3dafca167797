"""Masks over columns and other slices of an argument: what stands under them moves no answer."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_amortize import MLP, AutoAmortizedNormal, fit_svi, plan_amortization
from pyro_amortize.plan import AmortizationPlan

NAN = torch.nan
ROWS = 24


def in_a_loop(y, seen):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for j in range(3):
            with poutine.mask(mask=seen[:, j]):
                pyro.sample(f"y{j}", dist.Normal(z, 1.0), obs=y[:, j])


def by_name(y, seen):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=seen[:, 0]):
            pyro.sample("a", dist.Normal(z, 1.0), obs=y[:, 0])
        with poutine.mask(mask=seen[:, 1]):
            pyro.sample("b", dist.Poisson(z.exp()), obs=y[:, 1].abs().round())
        with poutine.mask(mask=seen[:, 2]):
            pyro.sample("c", dist.Bernoulli(logits=z), obs=(y[:, 2] > 0).float())


def by_obs_mask(y, seen):
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(b, 1.0))
        for j in range(3):
            pyro.sample(f"y{j}", dist.Normal(z, 1.0), obs=y[:, j], obs_mask=seen[:, j])


def in_dicts(data):
    in_a_loop(data["y"], data["seen"])


def holes(y, seen):
    in_a_loop(y.nan_to_num(), seen)


def beside_one_without(y, seen):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(z, 1.0), obs=y[:, 0])
        with poutine.mask(mask=seen[:, 1]):
            pyro.sample("b", dist.Normal(z, 1.0), obs=y[:, 1])
        with poutine.mask(mask=seen[:, 2]):
            pyro.sample("c", dist.Normal(z, 1.0), obs=y[:, 2])


def event_beside_a_number(y, seen):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).mask(seen[:, :2]).to_event(1), obs=y[:, :2])
        with poutine.mask(mask=seen[:, 2]):
            pyro.sample("c", dist.Normal(z, 1.0), obs=y[:, 2])


def plate_beside_a_number(y, seen):
    with pyro.plate("n", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 2, dim=-1), poutine.mask(mask=seen[:, 1:]):
            pyro.sample("a", dist.Normal(z, 1.0), obs=y[:, 1:])
        with poutine.mask(mask=seen[:, :1]):
            pyro.sample("c", dist.Normal(z, 1.0), obs=y[:, :1])


def by_turned_rows(y, seen):
    in_a_loop(y.T, seen.T)


def in_minibatches(y, seen):
    with pyro.plate("n", len(y), subsample=torch.arange(0, len(y), 3)) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for j in range(3):
            with poutine.mask(mask=seen[i, j]):
                pyro.sample(f"y{j}", dist.Normal(z, 1.0), obs=y[i, j])


def at_places(y, seen, place):
    with pyro.plate("n", len(place)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for j in range(3):
            with poutine.mask(mask=seen[place, j]):
                pyro.sample(f"y{j}", dist.Normal(z, 1.0), obs=y[place, j])


def series(y, seen):
    y, seen = y.reshape(-1, 3, 3), seen.reshape(-1, 3, 3)
    with pyro.plate("series", len(y)):
        z = y.new_zeros(len(y))
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            for name, j in (("a", 0), ("b", 1), ("c", 2)):
                with poutine.mask(mask=seen[:, t, j]):
                    pyro.sample(f"{name}_{t}", dist.Normal(z, 1.0), obs=y[:, t, j])


def data(first_column=False):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(ROWS, 1, generator=generator) + torch.randn(ROWS, 3, generator=generator)
    seen = torch.rand(ROWS, 3, generator=generator) < 0.6
    seen[0] = False
    seen[1] = torch.tensor([True, False, True])
    if first_column:
        seen[:, 0] = True
    return y, seen


def filled(model, y, seen, fill):
    y = torch.where(seen, y, torch.tensor(fill))
    if model is in_dicts:
        return ({"y": y, "seen": seen},)
    if model is at_places:
        return y, seen, torch.arange(len(y)).roll(5)[:20]
    if model is series:
        return y.reshape(-1, 3, 3), seen.reshape(-1, 3, 3)
    return (y.T.clone(), seen.T.clone()) if model is by_turned_rows else (y, seen)


@pytest.mark.parametrize(
    "model",
    [
        in_a_loop, by_name, by_obs_mask, in_dicts, holes, beside_one_without, event_beside_a_number,
        plate_beside_a_number, by_turned_rows, in_minibatches, at_places, series,
    ],
    ids=lambda model: model.__name__,
)  # fmt: skip
@pytest.mark.parametrize("planned", ["as asked", "a column all seen", "a column never seen"])
def test_what_stands_under_masks_of_slices_moves_no_answer(model, planned):
    """Answers are equal bit for bit; a number that is seen moves them."""
    y, seen = data(model is beside_one_without)
    first = seen.clone()
    if planned != "as asked":
        first[:, 2] = planned == "a column all seen"
    guide = AutoAmortizedNormal(model)
    guide.initialize(*filled(model, y, first, 0.0))
    key = "z_*" if model is series else "z"
    means = []
    for fill in (0.0, 4.0, -999.0, NAN) if model is holes else (0.0, 4.0, -999.0):
        means.append(guide.posterior(*filled(model, y, seen, fill)).mean[key])
    assert all(torch.equal(mean, means[0]) for mean in means[1:])
    assert not torch.equal(guide.posterior(*filled(model, y + 1.0, seen, 0.0)).mean[key], means[0])


def test_means_under_masks_of_columns():
    """Exactly sum / (1 + n) of the n numbers that are seen, up to what a small network misses after 300 steps."""
    y, seen = data()
    guide = AutoAmortizedNormal(in_a_loop, encoder=MLP((32,)))
    fit_svi(in_a_loop, guide, *filled(in_a_loop, y, seen, 0.0), num_steps=300, lr=0.02, seed=0, progress=False)
    answer = guide.posterior(*filled(in_a_loop, y, seen, -999.0))
    n = seen.sum(-1)
    error = answer.mean["z"] - torch.where(seen, y, 0.0).sum(-1) / (1 + n)
    assert error.abs().max() < 0.2
    assert torch.equal(answer.stddev["z"] == 1.0, n == 0)  # rows without data have the prior


def test_masks_made_of_columns():
    def model(y):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for j in range(3):
                with poutine.mask(mask=~y[:, j].isnan() & (y[:, j] > -900.0)):
                    pyro.sample(f"y{j}", dist.Normal(z, 1.0), obs=y[:, j].nan_to_num())

    y, seen = data()
    guide = AutoAmortizedNormal(model)
    guide.initialize(torch.where(seen, y, NAN))
    means = [guide.posterior(torch.where(seen, y, torch.tensor(fill))).mean["z"] for fill in (NAN, -999.0, -9999.0)]
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


def test_a_plan_keeps_what_cells_enter():
    plan = plan_amortization(event_beside_a_number, *data())
    y = next(source for source in plan.blocks[0].sources if source.name == "y")
    assert y.enters == ((("a", (0,)),), (("a", (1,)),), (("c", None),))
    assert AmortizationPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("chosen", [slice(60), slice(0, 120, 2)], ids=["halves", "every other"])
def test_wide_rows_are_taken_apart(chosen):
    """Each number enters its own entry of an event; as many runs as its number has digits tell which."""
    mine = torch.zeros(120, dtype=torch.bool)
    mine[chosen] = True

    def model(y, seen):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))[..., None].expand(len(y), 60)
            for name, some, there in (("a", mine, seen[:, 0]), ("b", ~mine, seen[:, 1])):
                with poutine.mask(mask=there):
                    pyro.sample(name, dist.Normal(z, 1.0).to_event(1), obs=y[:, some].sinh())

    y, seen = torch.randn(6, 120), data()[1][:6]
    (source,) = (s for s in plan_amortization(model, y, seen).blocks[0].sources if s.name == "y")
    order = torch.cat([mine.nonzero(), (~mine).nonzero()]).flatten().tolist()
    assert [source.enters[i] for i in order] == [((name, (i,)),) for name in "ab" for i in range(60)]


def test_rows_too_wide_to_be_tried_are_told():
    def model(y, seen):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))[..., None]
            for name, some in (("a", slice(300)), ("b", slice(300, 600))):
                with poutine.mask(mask=seen):
                    mean = z.expand(*z.shape[:-1], 300)
                    pyro.sample(name, dist.Normal(mean, 1.0).to_event(1), obs=y[:, some].cumsum(-1))

    with pytest.warns(UserWarning, match="'y' has 600 numbers a row.*Pass what each mask covers as an argument"):
        plan_amortization(model, torch.randn(4, 600), torch.tensor([True, False, True, True]))
