"""Answers, read and encoded piece by piece."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    Constant,
    Recurrent,
    Table,
    Window,
    fit_svi,
    parametrization,
    posterior,
)

GUIDES = {"default": None, "linear": MLP(()), "constant": Constant(), "table": Table()}


def answers(guide, args, kwargs):
    """Everything that a guide says of some data, by name."""
    pyro.set_rng_seed(1)  # of plates that subsample
    q = guide.posterior(*args, **kwargs)
    found = {"mean": q.mean, "stddev": q.stddev, "quantiles": q.quantiles([0.1, 0.9]), "probs": q.probs}
    pyro.set_rng_seed(1)
    return {**found, "median": guide.median(*args, **kwargs)}


def in_pieces(monkeypatch, first=3, limit=200):
    """Makes pieces small."""
    monkeypatch.setattr(parametrization, "FIRST", first)
    monkeypatch.setattr(parametrization, "LIMIT", limit)
    monkeypatch.setattr(posterior, "LIMIT", limit)


def rows_seen(network):
    """Returns a list of how many rows a network is given from now on."""
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def normal_mean(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape), 1.0).mask(~x.isnan()).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).mask(~x.isnan()).to_event(1), obs=x.nan_to_num())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", GUIDES)
def test_answers_in_pieces_are_those_of_one_piece(name, kind, monkeypatch):
    if (name, kind) == ("minibatch", "table"):
        pytest.skip("a table cannot know which rows a minibatch holds")
    case = CASES[name]
    args, kwargs = case.example(None)
    guide = AutoAmortizedNormal(case.make(), encoder=GUIDES[kind])
    guide.initialize(*args, **kwargs)
    for parameter in guide.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    whole = answers(guide, args, kwargs)
    in_pieces(monkeypatch)
    for what, found in answers(guide, args, kwargs).items():
        torch.testing.assert_close(found, whole[what], equal_nan=True, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("rows", [1, 10, 300, 3000])
def test_the_encoder_sees_a_bounded_number_of_rows(rows, monkeypatch):
    in_pieces(monkeypatch, first=64, limit=2000)
    x = torch.randn(3000, 5)
    guide = AutoAmortizedNormal(normal_mean, encoder=MLP((20,)))
    guide.initialize(x[:50])
    seen = rows_seen(guide.coder_of(guide.plan.blocks[0]).trunk)
    assert guide.median(x[:rows])["z"].shape == (rows, 5)
    assert sum(seen) == rows
    assert max(seen) <= 100


def test_preparation_sees_a_bounded_number_of_rows(monkeypatch):
    in_pieces(monkeypatch, first=64, limit=2000)
    x = torch.randn(3000, 5)
    x[:, 2][::3] = torch.nan
    guide = AutoAmortizedNormal(normal_mean, encoder=MLP((20,)))
    guide.initialize(x[:50])
    seen = []
    guide.preparation_of(guide.plan.blocks[0]).register_forward_pre_hook(
        lambda _, inputs: seen.extend(len(part) for part in inputs[0][0][0] if part is not None)
    )
    guide.posterior(x)
    assert len(seen) > 15
    assert max(seen) <= 200


@pytest.mark.parametrize("encoder", [Window(1, (20,)), Recurrent(8, hidden_dims=(20,))], ids=["Window", "Recurrent"])
def test_what_follows_a_reader_of_series_runs_in_pieces(encoder, monkeypatch):
    def model(y):
        with pyro.plate("steps", len(y)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("y", dist.Normal(z.cumsum(-1), 1.0), obs=y)

    y = torch.randn(500)
    guide = AutoAmortizedNormal(model, encoder=encoder)
    guide.initialize(y[:50])
    whole = guide.median(y)
    in_pieces(monkeypatch, limit=2400)
    seen = rows_seen(guide.coder_of(guide.plan.blocks[0]).trunk)
    torch.testing.assert_close(guide.median(y), whole)
    assert sum(seen) == 500
    assert max(seen) <= 120


def test_memory_mapped_data_are_only_read(tmp_path):
    written = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (2000, 5))
    written[:] = np.random.default_rng(0).normal(size=written.shape)
    written.flush()
    x = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    guide = AutoAmortizedNormal(normal_mean)
    guide.initialize(x[:50])
    torch.testing.assert_close(guide.median(x)["z"][700:900], guide.median(x[700:900].clone())["z"])


def test_a_network_that_works_in_place_leaves_the_data_alone():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z[:, None].expand(x.shape)).to_event(1), obs=x)

    x = (torch.rand(30, 4) < 0.5).float()
    before = x.clone()
    guide = AutoAmortizedNormal(model, encoder=nn.Sequential(nn.Threshold(0.5, 7.0, inplace=True), nn.Linear(4, 3)))
    guide.initialize(x)
    guide.posterior(x)
    assert torch.equal(x, before)


def test_answers_that_are_nan_are_refused():
    x = torch.randn(30, 5)
    guide = AutoAmortizedNormal(normal_mean)
    guide.initialize(x)
    x[3, 2] = torch.inf
    with pytest.raises(ValueError, match="the answer for 'z' is NaN. Its data are infinite"):
        guide.posterior(x)


def test_densities_of_answers_are_validated_as_ever():
    x = torch.randn(30, 5)
    guide = AutoAmortizedNormal(normal_mean)
    guide.initialize(x)
    with pytest.raises(ValueError, match="within the support"):
        guide.posterior(x).log_prob({"z": torch.full((30, 5), torch.nan)})


@pytest.mark.parametrize("missing", [0, 10], ids=["none missing", "some missing"])
def test_a_prior_without_gradients_leaves_those_of_q_under_a_mask(missing):
    """Gradients vary as they do without the mask, 0.007; by score functions they would by 0.45."""

    def model(y, seen):
        with pyro.plate("n", len(y)):
            factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=y)

    y, seen = torch.randn(30, 2), torch.arange(30) >= missing
    guide = AutoAmortizedNormal(model)
    guide.initialize(y, seen)
    gradients = []
    for seed in range(30):
        guide.zero_grad()
        pyro.set_rng_seed(seed)
        Trace_ELBO().differentiable_loss(model, guide, y, seen).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
    assert torch.stack(gradients).std(0).mean() < 0.014
    assert len(fit_svi(model, guide, y, seen, num_steps=5, progress=False).losses) == 5


# Masks of priors, whichever call the guide was made from.


def by_handler(y, mask):
    with pyro.plate("n", len(y)):
        with poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def by_distribution(y, mask):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y), 1), 1.0).mask(mask[:, None]).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[:, None])


def by_a_float(y, mask):
    return by_handler(y, mask.to(y.dtype) > 0.5)


def by_groups(y, mask):
    with pyro.plate("groups", len(mask)):
        with poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(z[..., GROUP], 1.0), obs=y)


def if_there_is_one(y, mask=None):
    with pyro.plate("n", len(y)):
        with poutine.mask(mask=True if mask is None else mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def of_data_too(y, mask):
    with pyro.plate("n", len(y)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def of_other_data(y, mask):
    with pyro.plate("n", len(y)):
        with poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=torch.arange(len(y)) > 0):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def by_a_product(y, mask):
    with pyro.plate("n", len(y)):
        with poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * mask, 1.0), obs=y)


GROUP = torch.arange(8)
HALF, WHOLE = (torch.tensor([mean, math.log(math.expm1(sd))]) for mean, sd in ((0.5, math.sqrt(0.5)), (1.0, 1.0)))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO], ids=lambda elbo: elbo.__name__)
@pytest.mark.parametrize("first", ["all", "some"])
@pytest.mark.parametrize(
    ("model", "prior", "data"),
    [
        (by_handler, 5, 8),
        (by_distribution, 5, 8),
        (by_a_float, 5, 8),
        (if_there_is_one, 5, 8),
        (of_data_too, 5, 5),
        (of_other_data, 5, -8),
        (by_a_product, 5, 5),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_masks_of_priors_mean_the_same_whatever_the_first_call_was(model, prior, data, first, elbo):
    """At the exact posterior, N(y / 2, 1 / 2) under the prior and N(y, 1) where it is flat, the ELBO is the evidence.

    Each draw's is, so there is no error. Elements without data have the prior, and add nothing.
    """
    y, mask = torch.randn(8), torch.arange(8) < prior
    whole = None if model is if_there_is_one else torch.ones(8, dtype=torch.bool)
    guide = AutoAmortizedNormal(model, encoder=Table())
    guide.initialize(y, mask if first == "some" else whole)
    there = torch.arange(8) < data if data > 0 else torch.arange(8) > 0
    rows = torch.stack([HALF if m else WHOLE for m in mask]) * torch.stack([y, torch.ones(8)], -1)
    with torch.no_grad():
        guide.coder_of(guide.plan.block_of("z")).values[0].copy_(rows)
    answer = guide.posterior(y, mask).stddev["z"].flatten()
    exact = torch.where(there, torch.where(mask, math.sqrt(0.5), 1.0), 1.0)
    torch.testing.assert_close(answer, exact)
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(y)[there & mask].sum()
    if model is by_a_product:  # the data are there, but tell nothing of z
        evidence = evidence + dist.Normal(0.0, 1.0).log_prob(y)[~mask].sum()
    if elbo is Trace_ELBO:
        assert elbo().loss(model, guide, y, mask) == pytest.approx(-float(evidence), abs=1e-4)
    else:  # divergences in closed form, so that the likelihood's draws have an error
        draws = torch.tensor([elbo().loss(model, guide, y, mask) for _ in range(100)])
        assert float(draws.mean() + evidence) == pytest.approx(0.0, abs=4 * float(draws.std()) / 10 + 1e-5)


def test_masks_of_groups_may_change():
    y, mask = torch.randn(8), torch.arange(8) < 5
    for first in (mask, torch.ones(8, dtype=torch.bool)):
        guide = AutoAmortizedNormal(by_groups)
        guide.initialize(y, first)
        assert guide.plan.unmasked == ("z",)
        nodes = poutine.trace(guide).get_trace(y, mask).nodes
        assert nodes["z"]["mask"] is None  # all groups have data, whatever counts of their prior


def test_a_chain_is_known_by_its_data_under_a_gap():
    """Padded at first, with a gap in a later call: the turn of the gap has data behind it, those of the end none."""

    def model(y, mask):
        z = torch.zeros(len(y))
        with pyro.plate("series", len(y)):
            for t in pyro.markov(range(y.shape[1])):
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[:, t])

    y, mask = torch.randn(6, 4), torch.arange(4) < torch.tensor([[4], [4], [3], [3], [4], [4]])
    guide = AutoAmortizedNormal(model)
    guide.initialize(y, mask)
    mask[4, 1] = False
    nodes = poutine.trace(guide).get_trace(y, mask).nodes
    assert nodes["z_1"]["mask"].tolist() == [True] * 6
    assert nodes["z_3"]["mask"].tolist() == [True, True, False, False, True, True]


def test_a_mask_over_data_that_were_under_none_is_refused():
    def model(y, mask=None):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Normal(z, 1.0)
            pyro.sample("y", fn if mask is None else fn.mask(mask), obs=y)

    y, mask = torch.randn(8), torch.arange(8) < 5
    guide = AutoAmortizedNormal(model)
    guide.initialize(y)
    guide.posterior(y, torch.ones(8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"site 'y' is under a mask in this call, but was under none.*initialize"):
        guide.posterior(y, mask)


def test_coefficients_that_are_switched_off_have_their_prior():
    """Flags of three global coefficients, all on at first: so few that a change to some has to be sure."""

    def model(x, y, on):
        with pyro.plate("k", 3), poutine.mask(mask=on):
            b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal((x * on) @ b, 1.0), obs=y)

    x, y = torch.randn(20, 3), torch.randn(20)
    guide = AutoAmortizedNormal(model)
    guide.initialize(x, y, torch.ones(3, dtype=torch.bool))
    assert guide.plan.idle == ("b",)
    answer = guide.posterior(x, y, torch.tensor([True, True, False])).stddev["b"]
    assert (answer == 2.0).tolist() == [False, False, True]
