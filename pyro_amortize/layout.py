"""Parameters of a block's elements, brought to the shapes of its sites."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def of_turn(values: Tensor, plates: tuple[str, ...], sizes: list[int], turn: dict[str, int]) -> Tensor:
    """Picks the elements of one turn of loops out of values of shape (..., elements, width)."""
    if not turn:
        return values
    lead = values.dim() - 2
    whole = values.reshape(*values.shape[:lead], *sizes, values.shape[-1])
    for position, plate in reversed(list(enumerate(plates))):
        if plate in turn:
            whole = whole.select(lead + position, turn[plate])
    return whole.reshape(*values.shape[:lead], -1, values.shape[-1])


def placed(values: Tensor, sizes: list[int], axes: list[int], shape: tuple[int, ...]) -> Tensor:
    """Brings parameters of shape (..., elements, dim) to a site's shape, each plate at its axis from the right."""
    lead = values.shape[:-2]
    values = values.reshape((*lead, *sizes, *shape)) if sizes else values.reshape((*lead, *shape))
    missing = max((-axis for axis in axes), default=0) - (len(shape) + len(sizes))
    if missing > 0:
        values = values.reshape((*lead, *sizes, *(1,) * missing, *shape))
    first = len(lead)
    return values.movedim(list(range(first, first + len(sizes))), axes) if sizes else values


def without_axes(shape: Sequence[int], axes: list[int], count: int) -> tuple[int, ...]:
    """Takes axes, numbered from the right, off the last entries of a shape, so many of these."""
    kept = list(shape)[max(len(shape) - count, 0) :]
    drop = {axis + len(kept) for axis in axes}
    return tuple(size for i, size in enumerate(kept) if i not in drop)


def lengthened(values: Tensor, axis: int, by: int) -> Tensor:
    """Adds zeros at the end of an axis."""
    shape = list(values.shape)
    shape[axis] = by
    return torch.cat([values, values.new_zeros(shape)], axis)
