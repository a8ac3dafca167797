"""Rows of data at one level of plates, pooled into elements of another or spread over them.

Every plate of a block has an axis of its own, of length one where a tensor does not have the plate: shape
(..., *plates, features). So levels are joined by broadcasting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Move:
    """The way of rows to another level. Plates are given by the positions of their axes, of which there are ``count``.

    Attributes:
        count: Number of plates' axes.
        axes: The plates that are pooled over; those of the rows, where an index says to which element each belongs.
        to: The plate that the index points into.
        index: The elements, an axis for each of ``axes``; -1 for rows that belong to none.
        size: Number of elements of ``to``.
        pooled: Whether rows are pooled into elements; if not, elements are spread over rows.
        into: Position of the level that the rows are handed to.
    """

    count: int
    axes: tuple[int, ...]
    to: int | None
    index: Tensor | None
    size: int
    pooled: bool
    into: int


def pool(rows: Tensor, present: Tensor | None, move: Move) -> Tensor:
    """Takes means over rows, missing ones left out.

    Args:
        rows: Shape (..., *plates, features).
        present: Which rows are not missing, shape (*plates); None if all are there.
        move: What to pool over.

    Returns:
        Means and log(1 + number of rows): shape (..., *plates, features + 1), its axes of length one where pooled over.
    """
    marks = rows.new_ones((1,) * move.count) if present is None else present.to(rows.dtype)
    sizes = torch.broadcast_shapes(rows.shape[:-1], marks.shape)
    marks = marks.expand(sizes)[..., None]
    rows = rows.expand(*sizes, rows.shape[-1])
    total = _sum(torch.cat([rows if present is None else torch.where(marks > 0, rows, 0.0), marks], -1), move)
    count = total[..., -1:]
    return torch.cat([total[..., :-1] / count.clamp(min=1.0), count.log1p()], -1)


def spread(elements: Tensor, move: Move) -> Tensor:
    """Gives each row what its element has; without an index that is left to broadcasting."""
    if move.index is None:
        return elements
    assert move.to is not None
    kept = [p for p in range(move.count) if p not in (*move.axes, move.to)]
    lead = elements.dim() - move.count - 1
    flat = _ordered(elements, [*move.axes, *kept, move.to])
    for _ in move.axes:
        flat = flat.select(lead, 0)
    index = move.index.clamp(0, flat.shape[-2] - 1)  # rows that belong to no element count nowhere
    rows = flat.index_select(-2, index.flatten().to(flat.device))
    return _placed(rows.reshape(*rows.shape[:-2], *move.index.shape, rows.shape[-1]), [*kept, *move.axes], move.count)


Marks = Tensor | bool
"""Which rows have data, shape (*plates); True if all have, False if nothing is observed there."""


def handed_on(below: Marks, above: Marks, move: Move) -> Marks:
    """Tells which rows of a level have data of their own, or in the rows that a move pools into them.

    Args:
        below: Which of the rows that are pooled have data.
        above: Which rows of the level have, so far.
        move: The way from those to these.
    """
    if not move.pooled or below is False or above is True:
        return above
    if move.index is None and below is True:
        return True
    rows = torch.ones(_index_shape(move), dtype=torch.bool) if below is True else below
    some = _sum(rows[..., None].to(torch.get_default_dtype()), move)[..., 0] > 0
    return some if above is False else above | some


def _index_shape(move: Move) -> list[int]:
    assert move.index is not None
    sizes = dict(zip(move.axes, move.index.shape, strict=True))
    return [sizes.get(position, 1) for position in range(move.count)]


def _sum(rows: Tensor, move: Move) -> Tensor:
    if move.index is None:
        return rows.sum([axis - move.count - 1 for axis in move.axes], keepdim=True)
    assert move.to is not None
    kept = [p for p in range(move.count) if p not in (*move.axes, move.to)]
    lead = rows.dim() - move.count - 1
    sizes = dict(zip(move.axes, move.index.shape, strict=True))
    rows = rows.expand(*(sizes.get(i - lead, n) for i, n in enumerate(rows.shape)))
    flat = _ordered(rows, [move.to, *kept, *move.axes]).select(lead, 0)
    flat = flat.reshape(*flat.shape[: lead + len(kept)], -1, flat.shape[-1])
    index = torch.where(move.index < 0, move.size, move.index).flatten().to(flat.device)
    total = flat.new_zeros(*flat.shape[:-2], move.size + 1, flat.shape[-1]).index_add(-2, index, flat)
    return _placed(total[..., :-1, :], [*kept, move.to], move.count)


def _ordered(rows: Tensor, order: list[int]) -> Tensor:
    """Puts the plates' axes in another order."""
    lead = rows.dim() - len(order) - 1
    return rows.permute(*range(lead), *(lead + position for position in order), -1)


def _placed(rows: Tensor, have: list[int], count: int) -> Tensor:
    """Puts each plate's axis in its position, and axes of length one where there is none."""
    rows = _ordered(rows, sorted(range(len(have)), key=have.__getitem__))
    lead = rows.dim() - len(have) - 1
    for position in range(count):
        if position not in have:
            rows = rows.unsqueeze(lead + position)
    return rows
