"""A call's arguments and a block, turned into the block's data: (rows, features), prepared for a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_amortize.plan import Block, width
from pyro_amortize.structure import Source

Prepare = str | None | Callable[[Tensor], Tensor]


class Inputs(nn.Module):
    """The data of one block, prepared by what they are.

    Categories become one-hot columns, and unbounded counts log(1 + x). Then everything but indicators is centred, and
    scaled: reals by the standard deviation of each column, counts by one standard deviation for all columns of an
    argument, since a pixel or word that is rarely on has next to none of its own. NaN is filled by the mean and marked
    in a column of its own. The statistics are buffers.

    Args:
        block: The block.
        prepare: "auto" for the above, None for plain flattened data, or a function from the latter, shape
            (rows, width), to features of shape (rows, any width).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, block: Block, prepare: Prepare = "auto") -> None:
        super().__init__()
        self.block = block
        self.prepare = prepare
        auto = prepare == "auto"
        columns = sum(width(source) for source in block.sources) if auto else 0
        self.register_buffer("shift", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))

    def forward(self, rows: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Prepares data.

        Args:
            rows: For each source a tensor of shape (..., rows, *shape of one row).
            dtype: Of the features.

        Returns:
            Features of shape (..., rows, features).
        """
        if self.prepare != "auto":
            plain = [_flat(value, source).to(dtype) for value, source in zip(rows, self.block.sources, strict=True)]
            features = _joined(plain)
            return features if self.prepare is None else self.prepare(features)  # type: ignore[operator]
        features = self._columns(rows, dtype)
        return torch.nan_to_num((features - self.shift) / self.scale, nan=0.0, posinf=torch.inf, neginf=-torch.inf)

    def measure(self, rows: list[Tensor], dtype: torch.dtype) -> None:
        """Takes the statistics of the preparation from example data."""
        if self.prepare != "auto":
            return
        columns = self._columns(rows, dtype).reshape(-1, len(self.shift))
        present = ~columns.isnan()
        count = present.sum(0).clamp(min=1)
        mean = columns.nan_to_num(0.0).sum(0) / count
        spread = (torch.where(present, columns - mean, 0.0).square().sum(0) / count).sqrt()
        shared, free = (marks.to(mean.device) for marks in (self._shared(), self._indicators()))
        for group in range(1, len(self.block.sources) + 1):
            if bool((shared == group).any()):
                spread[shared == group] = spread[shared == group].square().mean().sqrt()
        flat = spread <= 1e-6 * (1 + mean.abs())
        self.shift = torch.where(free, 0.0, mean)
        self.scale = torch.where(free | flat, 1.0, spread)

    def _columns(self, rows: list[Tensor], dtype: torch.dtype) -> Tensor:
        columns = []
        for value, source in zip(rows, self.block.sources, strict=True):
            flat = _flat(value, source)
            if source.kind == "category":
                flat = nn.functional.one_hot(flat.long(), source.categories).flatten(-2)
            elif source.kind == "count":
                flat = flat.to(dtype).clamp(min=0).log1p()
            flat = flat.to(dtype)
            columns.append(flat)
            if source.missing:
                columns.append(flat.isnan().to(dtype))
            elif bool(flat.isnan().any()):
                raise ValueError(
                    f"AutoAmortized: '{source.name}' holds NaN, but the data that the guide was initialized with held "
                    f"none, so block '{self.block.name}' has no column to mark them. Initialize a new guide with data "
                    f"that hold NaN under a mask, or fill them: {source.name}.nan_to_num()."
                )
        return _joined(columns)

    def _shared(self) -> Tensor:
        """Numbers the columns of each argument of counts from 1; 0 for columns with a scale of their own."""
        marks: list[int] = []
        for i, source in enumerate(self.block.sources):
            own = _numel(source) if source.kind in ("count", "level") else 0
            marks += [i + 1] * own + [0] * (width(source) - own)
        return torch.tensor(marks, dtype=torch.long)

    def _indicators(self) -> Tensor:
        marks: list[bool] = []
        for source in self.block.sources:
            own = width(source) - (_numel(source) if source.missing else 0)
            marks += [source.kind in ("category", "binary")] * own
            marks += [True] * (width(source) - own)
        return torch.tensor(marks, dtype=torch.bool)


def pick_rows(source: Source, value: Any, plate: str, size: int, full_size: int, indices: Any) -> Tensor | None:
    """Returns the rows of an argument that belong to a plate's present elements.

    An argument as long as the subsample is used as it stands; one of the full size is indexed.

    Args:
        source: Where the argument's rows are.
        value: The argument.
        plate: Name of the plate, for messages.
        size: Elements in the present subsample.
        full_size: Elements of the plate.
        indices: The subsample, or None.

    Returns:
        Shape (size, *shape of one row), or None if the argument is None.

    Raises:
        ValueError: The argument is no tensor, or its shape does not fit.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise ValueError(
            f"AutoAmortized: argument '{source.name}' is a {type(value).__name__}, but plate '{plate}' takes a row of "
            f"it for every element. Pass a tensor: torch.as_tensor({source.name})."
        )
    axis = source.axis or 0
    row = tuple(value.shape[:axis] + value.shape[axis + 1 :])
    if value.dim() <= axis or row != source.shape:
        got, expected = _numel_of(row), _numel(source)
        what = f"{got} features" if got != expected else f"rows of shape {row}"
        want = f"{expected}" if got != expected else f"shape {source.shape}"
        raise ValueError(
            f"AutoAmortized: argument '{source.name}' has {what} per element of plate '{plate}', but the guide was "
            f"initialized with {want}. Build a new guide for data of this width: guide = AutoAmortizedNormal(model)."
        )
    rows = value.movedim(axis, 0)
    if len(rows) == full_size and (size < full_size or source.indexed) and indices is not None:
        return rows[torch.as_tensor(indices, device=rows.device)]
    if len(rows) != size:
        raise ValueError(
            f"AutoAmortized: argument '{source.name}' has {len(rows)} rows along axis {axis}, but plate '{plate}' has "
            f"{size} elements in this call. Pass data arguments of equal length: {source.name}[:{size}]."
        )
    return rows


def _flat(value: Tensor, source: Source) -> Tensor:
    batch = value.dim() - len(source.shape)
    return value.reshape((*value.shape[:batch], _numel(source)))


def _joined(columns: list[Tensor]) -> Tensor:
    batch = torch.broadcast_shapes(*(column.shape[:-1] for column in columns))
    return torch.cat([column.expand(batch + column.shape[-1:]) for column in columns], -1)


def _numel(source: Source) -> int:
    return _numel_of(source.shape)


def _numel_of(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
