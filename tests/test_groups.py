"""Groups gone through one by one: their tables answer for no other groups."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import AutoAmortizedNormal, fit_svi

SIZES = (3, 5, 2, 6)


def groups(*sizes):
    return [torch.randn(size) for size in sizes]


def standard():
    return dist.Normal(torch.tensor(0.0), 1.0)


def in_a_loop(data):
    mean = pyro.sample("mean", standard())
    for j, y in enumerate(data):
        b = pyro.sample(f"b_{j}", dist.Normal(mean, 2.0))
        with pyro.plate(f"rows_{j}", len(y)):
            pyro.sample(f"y_{j}", dist.Normal(b, 1.0), obs=y)


def as_events(data):
    for j, y in enumerate(data):
        b = pyro.sample(f"b{j}", standard())
        pyro.sample(f"y{j}", dist.Normal(b, 1.0).expand([len(y)]).to_event(1), obs=y)


def in_a_sequential_plate(data):
    for j in pyro.plate("groups", len(data)):
        b = pyro.sample(f"b_{j}", standard())
        with pyro.plate(f"rows_{j}", len(data[j])):
            pyro.sample(f"y_{j}", dist.Normal(b, 1.0), obs=data[j])


def latents_first(data):
    b = [pyro.sample(f"b_{j}", standard()) for j in range(len(data))]
    for j, y in enumerate(data):
        with pyro.plate(f"rows_{j}", len(y)):
            pyro.sample(f"y_{j}", dist.Normal(b[j], 1.0), obs=y)


def by_word(data):
    for word, y in zip(("a", "b", "c", "d", "e"), data, strict=False):
        b = pyro.sample(f"b_{word}", standard())
        with pyro.plate(f"rows_{word}", len(y)):
            pyro.sample(f"y_{word}", dist.Normal(b, 1.0), obs=y)


@pytest.mark.parametrize("model", [in_a_loop, as_events, in_a_sequential_plate, latents_first, by_word])
@pytest.mark.parametrize(
    ("sizes", "what"),
    [((8, 8), r"shape \(8,\), not \(3,\)"), (SIZES[:2], "it has no 'b_?[2c]'"), ((*SIZES, 4), "it has 'b_?[4e]', too")],
    ids=["others", "fewer", "more"],
)
def test_other_groups_are_refused(model, sizes, what):
    guide, data = AutoAmortizedNormal(model), groups(*SIZES)
    guide.initialize(data)
    others = [y if len(y) == size else torch.randn(size) for y, size in zip([*data, data[0]], sizes, strict=False)]
    for call in (guide, guide.posterior, guide.median):
        with pytest.raises(ValueError, match=rf"4 groups.*{what}.*b\[..., group\] stands for b"):
            call(others)
    guide.posterior(data)


@pytest.mark.parametrize("model", [in_a_loop, as_events, in_a_sequential_plate, latents_first, by_word])
def test_other_data_of_as_many_groups_and_rows_are_told(model, tmp_path):
    guide, data = AutoAmortizedNormal(model), groups(*SIZES)
    fit_svi(model, guide, data, num_steps=3, progress=False)
    guide.save(tmp_path / "guide.pt")
    for answering in (guide, AutoAmortizedNormal.load(tmp_path / "guide.pt", model)):
        answering.posterior(data)
        with pytest.warns(UserWarning, match=r"values at 'y_?\*' are not those of its training.*write all groups"):
            answering.posterior([20 + y for y in data])


def test_what_the_message_says_to_write_answers_for_other_groups():
    def model(y, group, num_groups):
        mean = pyro.sample("mean", standard())
        with pyro.plate("groups", num_groups):
            b = pyro.sample("b", dist.Normal(mean, 2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b[..., group], 1.0), obs=y)

    guide = AutoAmortizedNormal(model)
    guide.initialize(torch.randn(16), torch.arange(4).repeat_interleave(torch.tensor(SIZES)), 4)
    assert guide.posterior(torch.randn(16), torch.arange(2).repeat_interleave(8), 2).mean["b"].shape == (2,)


def test_globals_with_data_of_their_own_are_no_groups():
    def two_data_sets(x, y):
        slope, level = pyro.sample("slope", standard()), pyro.sample("level", standard())
        with pyro.plate("first", len(x)):
            pyro.sample("x", dist.Normal(slope, 1.0), obs=x)
        with pyro.plate("second", len(y)):
            pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    def coefficients(x, y):
        b_0, b_1 = pyro.sample("b_0", standard()), pyro.sample("b_1", standard())
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b_0 + b_1 * x, 1.0), obs=y)

    for model in (two_data_sets, coefficients):
        guide = AutoAmortizedNormal(model)
        guide.initialize(*groups(6, 6))
        assert not guide.plan.groups
        guide.posterior(*groups(4, 4))


def test_latents_of_rows_in_groups_take_other_rows(tmp_path):
    def model(data):
        for j, y in enumerate(data):
            b = pyro.sample(f"b_{j}", standard())
            with pyro.plate(f"rows_{j}", len(y)):
                w = pyro.sample(f"w_{j}", dist.Normal(b, 1.0))
                pyro.sample(f"y_{j}", dist.Normal(w, 1.0), obs=y)

    guide = AutoAmortizedNormal(model)
    guide.initialize(groups(*SIZES))
    guide.save(tmp_path / "guide.pt")
    guide = AutoAmortizedNormal.load(tmp_path / "guide.pt", model)
    assert guide.posterior(groups(4, 1, 7, 2)).mean["w_2"].shape == (7,)
    with pytest.raises(ValueError, match="it has no 'b_3'"):
        guide.posterior(groups(4, 1, 7))


def test_a_sequential_plate_that_subsamples_leaves_groups_out():
    def model(data, size=4):
        for j in pyro.plate("groups", 4, subsample_size=size):
            b = pyro.sample(f"b_{j}", standard())
            with pyro.plate(f"rows_{j}", len(data[j])):
                pyro.sample(f"y_{j}", dist.Normal(b, 1.0), obs=data[j])

    data = groups(*SIZES)
    guide = AutoAmortizedNormal(model)
    guide.initialize(data)
    assert len(guide(data, 2)) == 2
    fit_svi(model, guide, data, 2, num_steps=3, progress=False)
