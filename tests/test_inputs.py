"""A block's data, prepared."""

import pytest
import torch

from pyro_amortize.inputs import Inputs, Present, pick_cells
from pyro_amortize.structure import Source

DTYPE = torch.float64


def source(name="x", shape=(), **facts):
    rest = {"plates": ("n",), "axes": (0,), "dims": (-1,), "reaches": frozenset(["x"])}
    return Source(**{"name": name, "shape": shape, **rest, **facts})


def prepared(sources, data, prepare="auto", new=None, present=None):
    inputs = Inputs(tuple(sources), prepare)
    inputs.measure([(value, present) for value in data], DTYPE)
    return inputs([(value, present) for value in (data if new is None else new)], DTYPE)


def pick(source, value, size, full_size, indices=None):
    return pick_cells(source, value, {"n": Present(size, full_size, indices)})


def test_reals_are_standardized():
    x = 5 + 3 * torch.randn(50, 2, dtype=DTYPE)
    features = prepared([source(shape=(2,))], [x])
    torch.testing.assert_close(features, (x - x.mean(0)) / x.std(0, unbiased=False))


def test_new_rows_are_prepared_with_the_old_statistics():
    x = 5 + 3 * torch.randn(50, dtype=DTYPE)
    features = prepared([source()], [x], new=[x[:1]])
    torch.testing.assert_close(features[:, 0], (x[:1] - x.mean()) / x.std(unbiased=False))


def test_counts_are_taken_to_log1p():
    x = torch.randint(0, 20, (50,))
    features = prepared([source(kind="count")], [x])
    log = x.to(DTYPE).log1p()
    torch.testing.assert_close(features[:, 0], (log - log.mean()) / log.std(unbiased=False))


@pytest.mark.parametrize("kind", ["count", "level"])
def test_counts_of_one_argument_share_a_scale(kind):
    """A pixel that is on once in fifty rows is not dozens of standard deviations away in new rows."""
    x = torch.randint(0, 17, (50, 2))
    rare = torch.zeros(50, 1, dtype=torch.long)
    rare[7] = 1
    new = torch.full((1, 3), 16)
    features = prepared([source(shape=(3,), kind=kind)], [torch.cat([x, rare], 1)], new=[new])
    assert features.abs().max() < 5
    other = torch.randn(50, dtype=DTYPE)
    beside = prepared([source(shape=(3,), kind=kind), source("y")], [torch.cat([x, rare], 1), other])
    torch.testing.assert_close(beside[:, 3].std(unbiased=False), torch.ones((), dtype=DTYPE))


def test_levels_are_not_bent():
    x = torch.randint(0, 17, (50,))
    features = prepared([source(kind="level")], [x])
    plain = x.to(DTYPE)
    torch.testing.assert_close(features[:, 0], (plain - plain.mean()) / plain.std(unbiased=False))


def test_categories_become_one_hot():
    x = torch.tensor([[0, 2], [1, 1], [2, 2]])
    s = source(shape=(2,), kind="category", categories=3)
    features = prepared([s], [x])
    assert features.tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1]]
    assert s.width == 6


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_binary_data_stay_zero_and_one(dtype):
    x = torch.tensor([1, 0, 0, 1]).to(dtype)
    assert prepared([source(kind="binary")], [x])[:, 0].tolist() == [1, 0, 0, 1]


def test_nan_is_filled_by_the_mean_and_marked():
    x = torch.tensor([1.0, torch.nan, 3.0], dtype=DTYPE)
    s = source(missing=True)
    features = prepared([s], [x])
    assert s.width == features.shape[1] == 2
    assert features.tolist() == [[-1, 0], [0, 1], [1, 0]]


def test_a_feature_that_is_all_nan_is_zero():
    features = prepared([source(missing=True)], [torch.full((4,), torch.nan)])
    assert features.tolist() == [[0, 1]] * 4


def test_new_nan_is_refused_where_no_column_can_mark_it():
    with pytest.raises(ValueError, match=r"'x' holds NaN.*.*x.nan_to_num\(\)"):
        prepared([source()], [torch.ones(3)], new=[torch.tensor([torch.nan])])


@pytest.mark.parametrize("value", [0.0, 3.0, 1e6])
def test_a_feature_without_spread_is_only_shifted(value):
    x = torch.full((64, 1), value, dtype=DTYPE)
    assert prepared([source(shape=(1,))], [x], new=[x[:1] + 2]).tolist() == [[2.0]]


def test_nearly_constant_features_do_not_explode():
    """The 13 pixels of the digits that are zero in the first 64 rows reach 16 later on."""
    x = torch.zeros(64, 1)
    assert prepared([source(shape=(1,), kind="count")], [x], new=[torch.full((1, 1), 16.0)]).item() < 3


def test_one_row_gives_no_nan():
    assert prepared([source(shape=(2,))], [torch.randn(1, 2)]).tolist() == [[0, 0]]


def test_sources_are_joined_and_flattened_in_order():
    features = prepared(
        [source("a", (2, 2)), source("b")], [torch.arange(8.0).reshape(2, 2, 2), torch.tensor([8.0, 9.0])], None
    )
    assert features.tolist() == [[0, 1, 2, 3, 8], [4, 5, 6, 7, 9]]


def test_batch_axes_broadcast():
    x, c = torch.randn(6, 4, 3), torch.randn(4)
    assert prepared([source("x", (3,)), source("c")], [x, c], None).shape == (6, 4, 4)


def test_a_function_prepares_plain_features():
    x = torch.arange(4.0, dtype=DTYPE)
    features = prepared([source()], [x], lambda rows: torch.cat([rows, rows**2], -1))
    assert features.tolist() == [[0, 0], [1, 1], [2, 4], [3, 9]]


def test_infinities_are_not_hidden():
    x = torch.randn(5, dtype=DTYPE)
    assert prepared([source()], [x], new=[torch.tensor([torch.inf, -torch.inf])])[:, 0].tolist() == [
        torch.inf,
        -torch.inf,
    ]


# Rows of an argument for the present elements of a plate.


def test_rows_as_they_stand():
    x = torch.randn(5, 2)
    assert torch.equal(pick(source(shape=(2,)), x, 5, 5, None), x)


def test_rows_of_another_axis_come_first():
    x = torch.randn(2, 5)
    assert torch.equal(pick(source(axes=(1,), shape=(2,)), x, 5, 5, None), x.T)


def test_an_argument_of_the_full_size_is_indexed():
    x = torch.randn(5)
    index = torch.tensor([3, 1])
    assert torch.equal(pick(source(), x, 2, 5, index), x[index])


def test_an_argument_of_the_subsamples_size_is_used_as_it_stands():
    x = torch.randn(2)
    assert torch.equal(pick(source(), x, 2, 5, torch.tensor([3, 1])), x)


def test_an_index_of_all_rows_may_permute_them():
    x = torch.randn(3)
    index = torch.tensor([2, 0, 1])
    assert torch.equal(pick(source(indexed=frozenset(["n"])), x, 3, 3, index), x[index])


def test_an_argument_is_taken_whole_along_plates_that_are_pooled():
    y = torch.randn(4, 5)
    nested = source("y", plates=("groups", "n"), axes=(0, 1), dims=(-2, -1))
    cells = pick_cells(nested, y, {"groups": Present(2, 4, torch.tensor([3, 1]))})
    assert torch.equal(cells, y[[3, 1]])


def test_what_a_mask_covers_does_not_show():
    present = torch.tensor([True, False, True])
    s = source(missing=True)
    first, second = (prepared([s], [torch.tensor([1.0, hidden, 3.0])], present=present) for hidden in (5.0, torch.nan))
    assert first.tolist() == second.tolist() == [[-1, 0], [0, 1], [1, 0]]


def test_masked_categories_are_all_zero():
    s = source(kind="category", categories=2, missing=True)
    features = prepared([s], [torch.tensor([1, 7, 0])], present=torch.tensor([True, False, True]))
    assert features.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3, 6), r"'x' has 6 features per element of plate 'n'.*with 4.*AutoAmortizedNormal\(model\)"),
        (torch.ones(4), r"'x' has shape \(4,\), so it lacks an axis.*plate 'n'.*One alone is x.unsqueeze\(0\)"),
        (torch.ones(2, 3, 4), r"'x' has rows of shape \(3, 4\).*shape \(4,\).*Build a new guide"),
        (torch.ones(3, 2, 2), r"'x' has rows of shape \(2, 2\).*shape \(4,\).*Build a new guide"),
        (torch.ones(2, 4), r"'x' has 2 rows along axis 0, but plate 'n' has 3 elements.*x\[:3\]"),
        ([1, 2], r"'x' is a list.*torch.as_tensor\(x\)"),
    ],
    ids=["width", "one row", "more axes", "shape", "length", "type"],
)
def test_arguments_that_do_not_fit_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        pick(source(shape=(4,)), value, 3, 3)


def test_statistics_are_taken_without_gradients_which_features_carry_on():
    x = torch.randn(6, requires_grad=True)
    inputs = Inputs((source(),))
    inputs.measure([(x, None)], DTYPE)
    assert not any(buffer.requires_grad for buffer in inputs.buffers())
    inputs([(x, None)], DTYPE)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 0, 0, 0, 0, 0]) / inputs.scale.float())
