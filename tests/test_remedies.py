"""Refusals name lines that work: each is read out of the message and run."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import MLP, AutoAmortizedNormal, Table


def pasted(message, model):
    """Runs the line of a message that makes a guide."""
    line = re.search(r"AutoAmortizedNormal\(model, .*\}\)", message).group()
    return eval(line, {"AutoAmortizedNormal": AutoAmortizedNormal, "MLP": MLP, "torch": torch, "model": model})


def refusal(call, *args):
    with pytest.raises(ValueError, match="table|inputs") as caught:
        call(*args)
    return str(caught.value)


def joint(y):
    """Data of all rows in one event that no rows take apart."""
    with pyro.plate("rows", len(y)):
        e = pyro.sample("e", dist.Normal(torch.tensor(0.0), 1.0))
    kernel = torch.eye(len(y)) + 0.5
    pyro.sample("y", dist.MultivariateNormal(e, kernel), obs=y)


def designed(y, design):
    """Groups of rows by a matrix."""
    with pyro.plate("groups", design.shape[1]):
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b @ design.T, 1.0), obs=y)


def design(rows, groups):
    return torch.nn.functional.one_hot(torch.arange(rows) % groups, groups).float()


@pytest.mark.parametrize(
    ("model", "args", "others"),
    [
        (joint, (torch.randn(9),), (torch.randn(5),)),
        (designed, (torch.randn(12), design(12, 4)), (torch.randn(12), design(12, 3))),
        (designed, (torch.randn(12), design(12, 4)), (torch.randn(6), design(6, 2))),
    ],
    ids=["one event", "design matrix", "design matrix of other rows"],
)
def test_the_way_from_a_table_to_an_encoder(model, args, others):
    site = "e" if model is joint else "b"
    guide = AutoAmortizedNormal(model)
    guide.initialize(*args)
    assert not guide.plan.block_of(site).amortized
    new_rows = refusal(guide.posterior, *others)
    assert "A table cannot answer for new rows; no rows of data were found" in new_rows
    encoded = AutoAmortizedNormal(model, encoder={site: MLP()})
    if model is joint:  # which argument has a row for each element is plain, and taken at that
        with pytest.warns(UserWarning, match="'y' is taken to inform element k of 'e'.*inputs={'e': 'y'}"):
            encoded.initialize(*args)
        assert encoded.plan.block_of(site).amortized
    for message in (new_rows,) if model is joint else (new_rows, refusal(encoded.initialize, *args)):
        other = pasted(message, model)
        other.initialize(*args)
        assert other.plan.block_of(site).amortized
        assert len(other.posterior(*others).mean[site]) == others[-1].shape[-1]


def test_a_table_that_was_asked_for():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(model, encoder=Table())
    guide.initialize(torch.randn(9))
    other = pasted(refusal(guide.posterior, torch.randn(5)), model)
    other.initialize(torch.randn(9))
    assert other.posterior(torch.randn(5)).mean["z"].shape == (5,)


def test_inputs_that_have_no_rows_for_a_latent():
    def model(x):
        rows, factors = pyro.plate("rows", len(x), dim=-2), pyro.plate("factors", 2, dim=-3)
        pixels = pyro.plate("pixels", 4, dim=-1)
        with factors, pixels:
            w = pyro.sample("w", dist.Normal(torch.tensor(0.0), 1.0))
        with factors, rows:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        with rows, pixels:
            pyro.sample("x", dist.Normal((w * z).sum(-3), 1.0), obs=x)

    x = torch.randn(9, 4)
    message = refusal(AutoAmortizedNormal(model, inputs={"w": "x"}).initialize, x)
    assert "returns shape (2, 4, ...): inputs={'w': f}" in message
    guide = AutoAmortizedNormal(model, inputs={"w": lambda x: x.T.expand(2, -1, -1)})
    guide.initialize(x)
    assert guide.plan.block_of("w").amortized


@pytest.mark.parametrize("first", [9, 4])
def test_tables_and_minibatches_of_unknown_rows(first):
    def model(x):
        with pyro.plate("rows", 9, subsample_size=len(x), dim=-2):
            with pyro.plate("factors", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3)[:, None], 1.0).to_event(1), obs=x)

    x = torch.randn(9, 1, 3)
    guide = AutoAmortizedNormal(model, encoder=Table())
    message = refusal(guide if first == 9 and guide.initialize(x) is None else guide.initialize, x[:4])
    assert "which rows of plate 'rows' the minibatch 'x' holds is not said" in message
    other = pasted(message, model)
    other.initialize(x)
    assert other.posterior(x[:4]).mean["z"].shape == (4, 2)


def test_tables_and_minibatches_that_say_their_rows():
    def model(x, rows=None):
        with pyro.plate("rows", 9, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def drawing(x, size=4):
        with pyro.plate("rows", 9, size) as rows:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    x = torch.randn(9)
    for program, args in ((model, (x[[2, 3, 5]], torch.tensor([2, 3, 5]))), (drawing, (x,))):
        guide = AutoAmortizedNormal(program, encoder=Table())
        guide.initialize(x)
        assert guide(*args)["z"].shape == args[-1].shape if program is model else (4,)
