"""Networks that turn data (rows, features) into parameters, and the tables that stand in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pyro_amortize.parameters import preserved
from pyro_amortize.pooling import Move, pool, spread


@dataclass(frozen=True)
class MLP:
    """A multilayer perceptron: called with the number of input features, it returns the network.

    A linear head a site follows, so ``MLP(())`` is a linear encoder.

    Args:
        hidden_dims: Width of each hidden layer.
        activation: Class of the activation after each hidden layer. The default is smooth, as the map from data to a
            posterior is in most models.

    Example:
        >>> MLP((32,))(5)
        Sequential(
          (0): Linear(in_features=5, out_features=32, bias=True)
          (1): SiLU()
        )
    """

    hidden_dims: tuple[int, ...] = (64, 64)
    activation: type[nn.Module] = nn.SiLU

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", _widths(self, "hidden_dims"))

    def __call__(self, in_features: int) -> nn.Module:
        return _layers(in_features, self.hidden_dims, self.activation)


@dataclass(frozen=True)
class DeepSets:
    """A permutation-invariant encoder of sets of any size: rho(mean_i phi(x_i), mean_i x_i, log(1 + n)).

    Where a plate is pooled over (marks of a school, answers of a person), phi runs on each row, and rho on the pooled
    features and the element's own; of several plates, the innermost is pooled first, each with a phi of its own.
    Missing rows are left out. Every other encoder takes the place of rho, and leaves pooling as it is by default.

    Args:
        hidden_dims: Width of each hidden layer of rho; a linear head a site follows.
        phi_dims: Width of each layer of phi.
        activation: Class of the activation after each layer.

    Example:
        >>> DeepSets(hidden_dims=(32,), phi_dims=(16,)).phi(5)
        Sequential(
          (0): Linear(in_features=5, out_features=16, bias=True)
          (1): SiLU()
        )

    References:
        M. Zaheer et al., Deep Sets, NeurIPS 2017, https://arxiv.org/abs/1703.06114
    """

    hidden_dims: tuple[int, ...] = (64, 64)
    phi_dims: tuple[int, ...] = (64, 64)
    activation: type[nn.Module] = nn.SiLU

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", _widths(self, "hidden_dims"))
        object.__setattr__(self, "phi_dims", _widths(self, "phi_dims"))

    def __call__(self, in_features: int) -> nn.Module:
        return _layers(in_features, self.hidden_dims, self.activation)

    def phi(self, in_features: int) -> nn.Module:
        """Returns the network that runs on each row before pooling."""
        return _layers(in_features, self.phi_dims, self.activation)


@dataclass(frozen=True)
class Window:
    """An encoder for elements in order: it sees the data of ``radius`` elements to either side beside an element's own.

    At the ends of a series, where neighbours are lacking, it sees zeros in their place, and a mark for each neighbour
    that lacks; so elements there have free parameters of their own, also in a linear encoder.

    Args:
        radius: How many neighbours it sees on either side.
        hidden_dims: Width of each hidden layer of the network on top; a linear head a site follows.
        activation: Class of the activation after each layer.
        network: In the place of that network: a module from (rows, features) to (rows, any width), or a callable from
            the number of features to one.
        along: The plate or loop; by default the loop that the sites stand in, or the plate that couples them.

    Example:
        >>> Window(1, hidden_dims=(32,))(5)
        Sequential(
          (0): Linear(in_features=5, out_features=32, bias=True)
          (1): SiLU()
        )
    """

    radius: int
    hidden_dims: tuple[int, ...] = (64, 64)
    activation: type[nn.Module] = nn.SiLU
    network: Any = None
    along: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", _widths(self, "hidden_dims"))
        if not (isinstance(self.radius, int) and self.radius >= 0):
            raise ValueError(f"Window: radius={self.radius!r}. Expected the number of neighbours on either side.")

    def __call__(self, in_features: int) -> nn.Module:
        if self.network is None:
            return _layers(in_features, self.hidden_dims, self.activation)
        return _own(self.network, in_features)

    def reader(self, in_features: int) -> Neighbours:
        """Returns what brings the data of neighbours to an element."""
        return Neighbours(self.radius)


@dataclass(frozen=True)
class Recurrent:
    """An encoder for elements in order that sees the whole series: a bidirectional GRU, and a network on top.

    An element's features are its own and the states of both directions there. What is missing before the first and
    after the last datum of a series is not run through, so that padding changes nothing.

    Args:
        gru_dim: Width of the state of each direction.
        num_layers: Layers of the GRU.
        hidden_dims: Width of each hidden layer of the network on top; a linear head a site follows.
        activation: Class of the activation after each of these.
        network: In the place of the GRU: a module from (series, steps, features) to (series, steps, any width), or a
            callable from the number of features to one. Series of one length are run together.
        along: The plate or loop; by default the loop that the sites stand in, or the plate that couples them.

    Example:
        >>> Recurrent(gru_dim=16).reader(5).network
        GRU(5, 16, batch_first=True, bidirectional=True)
    """

    gru_dim: int = 64
    num_layers: int = 1
    hidden_dims: tuple[int, ...] = (64,)
    activation: type[nn.Module] = nn.SiLU
    network: Any = None
    along: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", _widths(self, "hidden_dims"))

    def __call__(self, in_features: int) -> nn.Module:
        return _layers(in_features, self.hidden_dims, self.activation)

    def reader(self, in_features: int) -> Sequences:
        """Returns what runs along series, an element's own features kept beside the states."""
        if self.network is not None:
            return Sequences(_own(self.network, in_features))
        return Sequences(nn.GRU(in_features, self.gru_dim, self.num_layers, batch_first=True, bidirectional=True))


Series = Window | Recurrent


def _activation(kind: Any) -> nn.Module:
    """Makes an activation."""
    try:
        made = kind()
    except TypeError:
        made = None
    if not isinstance(made, nn.Module):
        raise ValueError(f"activation={kind!r}. Expected a class of modules, as torch.nn.SiLU.")
    return made


def _own(network: Any, in_features: int) -> nn.Module:
    """Returns a network of the user's own, made for a number of features if it is to be made."""
    made = network if isinstance(network, nn.Module) else network(in_features)
    if not isinstance(made, nn.Module):
        raise ValueError(f"network: called with the number of features, it returned a {type(made).__name__}.")
    return made


def _widths(encoder: object, name: str) -> tuple[int, ...]:
    """Returns the widths of an encoder's layers; refuses what are none."""
    dims, kind = getattr(encoder, name), type(encoder).__name__
    if isinstance(dims, Sequence) and all(isinstance(dim, int) and dim > 0 for dim in dims):
        return tuple(dims)
    raise ValueError(
        f"{kind}: {name}={dims!r}. Expected a tuple, the width of each layer: {kind}({name}=(32,)), or () for none."
    )


def _layers(in_features: int, dims: Sequence[int], activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for width in dims:
        layers += [nn.Linear(in_features, width), _activation(activation)]
        in_features = width
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Table:
    """No encoder: parameters of its own for every element. The guide is mean-field (F-VI) there."""


@dataclass(frozen=True)
class Constant:
    """One row of parameters for all elements, whatever their data: the baseline *const* of Margossian & Blei (2024)."""


Encoder = nn.Module | Callable[[int], nn.Module] | Table | Constant


def encoder_for(option: Any, name: str, sites: Sequence[str], plates: Sequence[str]) -> Any:
    """Returns the encoder that an option gives to a block; None for the default.

    Args:
        option: The guide's option, one encoder or a dict from site or plate name.
        name: Of the block.
        sites: Of the block.
        plates: Around them; of several, the innermost names the block.
    """
    if not isinstance(option, dict):
        return option
    keys = [key for key in (name, *sites) if key in option] + [key for key in option if is_of(key, plates)]
    return option[keys[0]] if keys else None


def is_of(key: str, plates: Sequence[str]) -> bool:
    """Tells whether an option for a plate or level is for sites in these plates."""
    return bool(plates) and key in (plates[-1], "/".join(plates))


class Rows(nn.Module):
    """A table: ``rows`` rows of parameters for each site.

    Args:
        rows: Number of rows; one serves every element.
        widths: Parameters of one element of each site.
    """

    def __init__(self, rows: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.values = nn.ParameterList([torch.zeros(rows, width) for width in widths])

    def forward(self, index: Tensor) -> list[Tensor]:
        """Returns for each site the parameters of the elements asked for, shape (*index.shape, width)."""
        shared = len(self.values[0]) == 1
        return [v[0].expand(index.shape + v.shape[1:]) if shared else v[index] for v in self.values]


class Neighbours(nn.Module):
    """Brings the data of neighbours along a plate to each element.

    Args:
        radius: How many on either side.
    """

    def __init__(self, radius: int) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, features: Tensor, axis: int, present: Tensor | None) -> Tensor:
        """Returns own features, those of each neighbour, zero where it lacks, and a mark for each that lacks.

        Args:
            features: Shape (..., *plates, features).
            axis: The axis of the plate, from the right.
            present: Which elements have data, shape (*plates); None if all have. Elements before the first or after
                the last of these are no neighbours.
        """
        rows = features.movedim(axis, -2)
        steps = torch.arange(rows.shape[-2], device=rows.device)
        first, last = _ends(rows, axis, present)
        columns, marks = [rows], []
        for offset in (o for o in range(-self.radius, self.radius + 1) if o != 0):
            there = steps + offset
            inside = ((there >= first) & (there <= last))[..., None].expand(*rows.shape[:-1], 1)
            neighbour = rows.index_select(-2, there.clamp(0, len(steps) - 1))
            columns.append(torch.where(inside, neighbour, 0.0))
            marks.append((~inside).to(rows.dtype))
        return torch.cat(columns + marks, -1).movedim(-2, axis)


class Sequences(nn.Module):
    """Runs a network along a plate.

    Args:
        network: A recurrent module of torch, or one from (series, steps, features) to (series, steps, width).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor, axis: int, present: Tensor | None) -> Tensor:
        """Returns own features and what the network makes of the series; arguments as of :class:`Neighbours`."""
        rows = features.movedim(axis, -2)
        series = rows.reshape(-1, *rows.shape[-2:])
        if present is None:
            states = self._run(series)
        else:
            first, last = (end.expand(*rows.shape[:-2], 1).reshape(-1, 1) for end in _ends(rows, axis, present))
            steps, lengths = torch.arange(rows.shape[-2], device=rows.device), (last - first + 1).clamp(min=1)
            shifted = _taken(series, (steps + first).clamp(max=len(steps) - 1))
            states = _taken(self._on_lengths(shifted, lengths[:, 0]), (steps - first).clamp(min=0).minimum(lengths - 1))
        return torch.cat([rows, states.reshape(*rows.shape[:-1], -1)], -1).movedim(-2, axis)

    def _run(self, series: Tensor) -> Tensor:
        parameter = next(self.network.parameters(), series)
        given = series.to(parameter.dtype)
        states = self.network(given if isinstance(self.network, nn.RNNBase) else given.clone())
        states = states[0] if isinstance(states, tuple) else states
        if not isinstance(states, Tensor) or states.shape[:-1] != series.shape[:-1]:
            got = f"shape {tuple(states.shape)}" if isinstance(states, Tensor) else f"a {type(states).__name__}"
            raise ValueError(
                f"the network {type(self.network).__name__} of Recurrent returned {got} for series of shape "
                f"{tuple(series.shape)}. Expected (series, steps, width), features for each step."
            )
        return states.to(series.dtype)

    def _on_lengths(self, series: Tensor, lengths: Tensor) -> Tensor:
        """Runs the network on the first steps of each series; what stands after these is left open."""
        if isinstance(self.network, nn.RNNBase):
            packed = nn.utils.rnn.pack_padded_sequence(series, lengths.cpu(), batch_first=True, enforce_sorted=False)
            states, _ = nn.utils.rnn.pad_packed_sequence(
                self.network(packed)[0], batch_first=True, total_length=series.shape[1]
            )
            return states
        whole: Tensor | None = None
        for length in lengths.unique().tolist():
            mine = (lengths == length).nonzero().flatten()
            states = self._run(series[mine, :length])
            whole = states.new_zeros(*series.shape[:2], states.shape[-1]) if whole is None else whole
            whole = whole.index_copy(0, mine, nn.functional.pad(states, (0, 0, 0, series.shape[1] - length)))
        assert whole is not None
        return whole


def width_of(reader: nn.Module, in_features: int) -> int:
    """Returns how many features a reader makes of so many."""
    parameter = next(reader.parameters(), torch.empty(()))
    with preserved(reader, evaluating=True), torch.no_grad():
        return int(reader(parameter.new_zeros(1, 2, in_features), -2, None).shape[-1])


def _ends(rows: Tensor, axis: int, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the places of the first and the last element with data of each series, shape (..., 1)."""
    size = rows.shape[-2]
    if present is None:
        return torch.zeros(1, dtype=torch.long, device=rows.device), torch.full((1,), size - 1, device=rows.device)
    here = present.to(rows.device).movedim(axis + 1, -1)
    here = here.expand(*here.shape[:-1], size)
    steps = torch.arange(size, device=rows.device)
    first = torch.where(here, steps, size - 1).amin(-1, keepdim=True)
    return first, torch.where(here, steps, 0).amax(-1, keepdim=True)


def _taken(series: Tensor, steps: Tensor) -> Tensor:
    """Takes steps, shape (series, steps), out of series of shape (series, steps, features)."""
    return series.gather(1, steps[..., None].expand(-1, -1, series.shape[-1]))


class Heads(nn.Module):
    """Levels of data pooled and spread into one, a trunk from there to features, and a linear head for each site.

    Args:
        phis: The networks that run on rows before they are pooled, by the number of the level.
        reader: What brings the data of other elements of a plate to an element, if something does.
        trunk: Maps (rows, features) to (rows, width).
        width: Of the trunk's features.
        widths: Parameters of one element of each site.
    """

    def __init__(
        self, phis: nn.ModuleDict, reader: nn.Module | None, trunk: nn.Module, width: int, widths: Sequence[int]
    ) -> None:
        super().__init__()
        self.phis = phis
        self.reader = reader
        self.trunk = trunk
        self.heads = nn.ModuleList([nn.Linear(width, out) for out in widths])

    def forward(self, features: Tensor) -> list[Tensor]:
        """Returns for each site parameters of shape (..., rows, width), from features (..., rows, features)."""
        rows = on_rows(self.trunk, features)
        return [head(rows) for head in self.heads]

    @property
    def widest_before(self) -> int:
        """Width of the widest layer that data pass on their way to an element."""
        return max(widest(self.phis), widest(self.reader))


def in_pieces(coder: Heads, features: Tensor, limit: int) -> list[Tensor]:
    """Returns what a coder makes of features, shape (..., rows, features), so many activations of a layer at a time."""
    rows = features.flatten(0, -2)
    count = max(1, limit // max(widest(coder.trunk), widest(coder.heads)))
    if len(rows) <= count:
        return coder(features)
    parts = zip(*(coder(part) for part in rows.split(count)), strict=True)
    return [torch.cat(part).unflatten(0, features.shape[:-1]) for part in parts]


def gathered(
    phis: nn.ModuleDict,
    features: Sequence[Tensor | None],
    present: Sequence[Tensor | None],
    moves: Sequence[Move],
) -> Tensor:
    """Brings the features of all levels to the last.

    Args:
        phis: The networks that run on rows before they are pooled, by the number of the level.
        features: Of each level, shape (..., *plates, features); None if it has none of its own.
        present: Which rows of each level have data, shape (*plates); None if all have.
        moves: The way of each level but the last.

    Returns:
        Shape (..., *plates, features).
    """
    found = [[value] if value is not None else [] for value in features]
    for i, move in enumerate(moves):
        if found[i]:
            rows = joined(found[i])
            if move.pooled:
                phi = phis[str(i)]
                if isinstance(phi, Sequences):
                    rows = phi(rows, move.axes[0] - move.count - 1, present[i])
                else:
                    rows = torch.cat([rows, on_rows(phi, rows)], -1)
                rows = pool(rows, present[i], move)
            else:
                rows = spread(rows, move)
            found[move.into].append(rows)
    return joined(found[-1])


def joined(columns: list[Tensor]) -> Tensor:
    """Concatenates features of shapes that broadcast but for the last axis."""
    if len(columns) == 1:
        return columns[0]
    batch = torch.broadcast_shapes(*(column.shape[:-1] for column in columns))
    return torch.cat([column.expand(batch + column.shape[-1:]) for column in columns], -1)


def on_rows(network: nn.Module, features: Tensor) -> Tensor:
    """Runs a network that takes (rows, features) on data of shape (..., features)."""
    rows = trunk_features(network, features.reshape(-1, features.shape[-1]))
    return rows.reshape(features.shape[:-1] + rows.shape[-1:])


def trunk_features(trunk: nn.Module, features: Tensor) -> Tensor:
    """Runs a trunk on data of shape (rows, features); checks and flattens what it returns to (rows, width).

    Raises:
        ValueError: The output has not one row for each row of data.
    """
    parameter = next(trunk.parameters(), None)
    given = features if parameter is None else features.to(parameter.dtype)
    out = trunk(given if _keeps(trunk) else given.clone())
    if not isinstance(out, Tensor) or out.dim() < 2 or len(out) != len(features):
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        fix = "end it with nn.Flatten(1)"
        if isinstance(out, (tuple, list)):
            fix = "stop before its last layers, since the guide makes the location and scale of each site from features"
        raise ValueError(
            f"the encoder {type(trunk).__name__} returned {got} for data of shape {tuple(features.shape)}. Expected "
            f"shape ({len(features)}, width), a row of features for each row of data: {fix}."
        )
    return out.flatten(1).to(features.dtype)


def widest(network: nn.Module | None) -> int:
    """Returns how wide the widest layer of a network is."""
    parameters = () if network is None else network.parameters()
    return max((parameter.shape[0] for parameter in parameters if parameter.dim()), default=1)


def _keeps(network: nn.Module) -> bool:
    """Tells whether a network is sure to leave its input as it is; others get a copy, for it may be the data."""
    return type(network) is nn.Sequential and all(isinstance(layer, nn.Linear) for layer in islice(network, 1))
