"""Networks, tables, and options as plain data."""

import pytest
import torch
from torch import nn

from pyro_amortize import MLP, Constant, Table
from pyro_amortize.encoders import Heads, Rows, trunk_features


@pytest.mark.parametrize(("dims", "widths"), [((), []), ((7,), [7]), ([5, 6], [5, 6])], ids=str)
def test_mlp_has_the_layers_asked_for(dims, widths):
    network = MLP(dims)(3)
    assert [layer.out_features for layer in network if isinstance(layer, nn.Linear)] == widths
    assert network(torch.zeros(4, 3)).shape == (4, widths[-1] if widths else 3)


def test_mlp_takes_an_activation():
    assert isinstance(MLP((4,), nn.Tanh)(2)[1], nn.Tanh)


def test_encoder_descriptions_compare_by_value():
    assert MLP([3]) == MLP((3,)) != MLP((4,))
    assert Table() == Table()
    assert Constant() == Constant()


def test_table_looks_rows_up():
    table = Rows(4, [2, 1])
    with torch.no_grad():
        table.values[0].copy_(torch.arange(8.0).reshape(4, 2))
    first, second = table(torch.tensor([2, 0, 2]))
    assert first.tolist() == [[4, 5], [0, 1], [4, 5]]
    assert second.shape == (3, 1)


def test_a_table_of_one_row_serves_every_element():
    (only,) = Rows(1, [2])(torch.tensor([5, 7, 0]))
    assert only.shape == (3, 2)


def test_heads_keep_batch_axes():
    heads = Heads(nn.ModuleDict(), None, nn.Linear(3, 5), 5, [2, 4])
    data = torch.randn(6, 7, 3)
    first, second = heads(data)
    assert first.shape == (6, 7, 2)
    assert second.shape == (6, 7, 4)
    torch.testing.assert_close(first[2], heads(data[2])[0])


def test_trunk_output_is_flattened():
    image = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3))
    assert trunk_features(image, torch.randn(5, 16)).shape == (5, 8)


@pytest.mark.parametrize(
    ("trunk", "got"),
    [
        (nn.Flatten(0), r"shape \(15,\)"),
        (nn.Unflatten(0, (1, 5)), r"shape \(1, 5, 3\)"),
    ],
    ids=["flat", "extra-axis"],
)
def test_trunks_without_the_batch_axis_are_refused(trunk, got):
    with pytest.raises(ValueError, match=rf"{got} for data of shape \(5, 3\).*nn.Flatten\(1\)"):
        trunk_features(trunk, torch.randn(5, 3))


def test_trunks_that_return_location_and_scale_are_refused():
    with pytest.raises(ValueError, match=r"LSTM returned a tuple for data of shape \(5, 3\).*before its last layers"):
        trunk_features(nn.LSTM(3, 2), torch.randn(5, 3))
