"""Networks that turn data (rows, features) into parameters, and the tables that stand in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))

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
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        object.__setattr__(self, "phi_dims", tuple(self.phi_dims))

    def __call__(self, in_features: int) -> nn.Module:
        return _layers(in_features, self.hidden_dims, self.activation)

    def phi(self, in_features: int) -> nn.Module:
        """Returns the network that runs on each row before pooling."""
        return _layers(in_features, self.phi_dims, self.activation)


def _layers(in_features: int, dims: Sequence[int], activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for width in dims:
        layers += [nn.Linear(in_features, width), activation()]
        in_features = width
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Table:
    """No encoder: parameters of its own for every element. The guide is mean-field (F-VI) there."""


@dataclass(frozen=True)
class Constant:
    """One row of parameters for all elements, whatever their data: the baseline *const* of Margossian & Blei (2024)."""


Encoder = nn.Module | Callable[[int], nn.Module] | Table | Constant


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


class Heads(nn.Module):
    """Levels of data pooled and spread into one, a trunk from there to features, and a linear head for each site.

    Args:
        phis: The networks that run on rows before they are pooled, by the number of the level.
        trunk: Maps (rows, features) to (rows, width).
        width: Of the trunk's features.
        widths: Parameters of one element of each site.
    """

    def __init__(self, phis: nn.ModuleDict, trunk: nn.Module, width: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.phis = phis
        self.trunk = trunk
        self.heads = nn.ModuleList([nn.Linear(width, out) for out in widths])

    def forward(self, features: Tensor) -> list[Tensor]:
        """Returns for each site parameters of shape (..., rows, width), from features (..., rows, features)."""
        rows = on_rows(self.trunk, features)
        return [head(rows) for head in self.heads]


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
                rows = pool(torch.cat([rows, on_rows(phis[str(i)], rows)], -1), present[i], move)
            else:
                rows = spread(rows, move)
            found[move.into].append(rows)
    return joined(found[-1])


def joined(columns: list[Tensor]) -> Tensor:
    """Concatenates features of shapes that broadcast but for the last axis."""
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
    out = trunk(features if parameter is None else features.to(parameter.dtype))
    if not isinstance(out, Tensor) or out.dim() < 2 or len(out) != len(features):
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"the encoder {type(trunk).__name__} returned {got} for data of shape {tuple(features.shape)}. Expected "
            f"shape ({len(features)}, width), a row of features for each row of data: end it with nn.Flatten(1)."
        )
    return out.flatten(1).to(features.dtype)


def encode_option(value: Any) -> dict[str, Any]:
    """Writes an option as plain data; one of the user's own is only named."""
    if isinstance(value, dict):
        codes = {key: encode_option(item) for key, item in value.items()}
        own = [f"{{'{key}': {code['own']}}}" for key, code in codes.items() if "own" in code]
        return {"own": own[0]} if own else {"dict": codes}
    if isinstance(value, MLP) and hasattr(nn, value.activation.__name__):
        return {"MLP": [list(value.hidden_dims), value.activation.__name__]}
    if isinstance(value, DeepSets) and hasattr(nn, value.activation.__name__):
        return {"DeepSets": [list(value.hidden_dims), list(value.phi_dims), value.activation.__name__]}
    if isinstance(value, (Table, Constant)):
        return {"kind": type(value).__name__}
    if value is None or isinstance(value, (str, int, float, list, tuple)):
        return {"plain": list(value) if isinstance(value, tuple) else value}
    return {"own": getattr(value, "__name__", type(value).__name__)}


def decode_option(code: dict[str, Any]) -> Any:
    """Makes an option from what :func:`encode_option` returned."""
    if "dict" in code:
        return {key: decode_option(item) for key, item in code["dict"].items()}
    if "MLP" in code:
        hidden_dims, activation = code["MLP"]
        return MLP(tuple(hidden_dims), getattr(nn, activation))
    if "DeepSets" in code:
        hidden_dims, phi_dims, activation = code["DeepSets"]
        return DeepSets(tuple(hidden_dims), tuple(phi_dims), getattr(nn, activation))
    if "kind" in code:
        return {"Table": Table, "Constant": Constant}[code["kind"]]()
    return code["plain"]
