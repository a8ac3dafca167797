"""Answers, read and encoded piece by piece."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_amortize import MLP, AutoAmortizedNormal, Constant, Recurrent, Table, Window, fit_svi, handler, posterior

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
    monkeypatch.setattr(handler, "FIRST", first)
    monkeypatch.setattr(handler, "LIMIT", limit)
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
