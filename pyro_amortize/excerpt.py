"""A long call, turned into the same call with some of its rows, so that looking at a model costs the same at any size.

A call is long if tensors in it are, along an axis each. Nothing here has the size of the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_amortize.calls import Args, Call, Kwargs
from pyro_amortize.structure import Plate

LARGE = 10_000
"""Rows beyond which a call is long."""
FEW = 2_000
"""Rows of a long call on which a model is looked at."""
CHUNK = 1_000_000
WIDE = 64


@dataclass(frozen=True)
class Long:
    """A long call.

    Attributes:
        call: The call.
        length: How many rows it has.
        axes: For each tensor that has so many, the axis of the rows.
    """

    call: Call
    length: int
    axes: dict[str, int]

    @classmethod
    def ways(cls, call: Call) -> Iterator[Long]:
        """Yields the ways in which a call may be long, the longest first; tensors as long along two axes are none."""
        shapes = {name: tuple(leaf.shape) for name, leaf in call.tensors.items()}
        for length in sorted({size for shape in shapes.values() for size in shape if size > LARGE}, reverse=True):
            there = {name: shape for name, shape in shapes.items() if length in shape}
            if all(shape.count(length) == 1 for shape in there.values()):
                yield cls(call, length, {name: shape.index(length) for name, shape in there.items()})

    def on(self, rows: Tensor) -> tuple[Args, Kwargs]:
        """Returns the model's arguments with these rows only."""
        leaves = {name: self.call.leaves[name] for name in self.axes}
        return self.call.replaced(
            {name: leaf.index_select(self.axes[name], rows.to(leaf.device)) for name, leaf in leaves.items()}
        )

    def some(self, count: int) -> Tensor:
        """Returns the numbers of some rows, always the same ones; the global random state is left alone."""
        return random_rows(self.length, count, torch.Generator().manual_seed(0))

    def extremes(self) -> Tensor:
        """Returns the rows with the largest and the smallest number of each column, NaN counting as both.

        A plan depends on these: a mask's gaps, the last of the groups that an index counts, NaN. They are found chunk
        by chunk. Of wide rows only the largest and smallest numbers of all columns count.
        """
        kept = torch.empty(0, dtype=torch.long)
        for name, axis in self.axes.items():
            leaf, best = self.call.leaves[name], torch.empty(0, dtype=torch.long)
            step = max(1, CHUNK * self.length // max(leaf.numel(), 1))
            for start in range(0, self.length, step):
                places = torch.cat([best, torch.arange(start, min(start + step, self.length))])
                cells = leaf.index_select(axis, places.to(leaf.device)).movedim(axis, 0).reshape(len(places), -1)
                if cells.shape[1] > WIDE:
                    cells = torch.stack([cells.amax(1), cells.amin(1)], 1)
                best = places[torch.cat([cells.max(0).indices, cells.min(0).indices]).unique().cpu()]
            kept = torch.cat([kept, best])
        return kept.unique()


@dataclass(frozen=True)
class Part:
    """Some rows of a long call, on which a model was examined in place of all.

    Attributes:
        long: The call.
        rows: Their numbers.
        plates: The plates that are as long as the rows are many, as they are on these.
    """

    long: Long
    rows: Tensor
    plates: dict[str, Plate]

    @property
    def arguments(self) -> tuple[Args, Kwargs]:
        """The model's arguments with these rows."""
        return self.long.on(self.rows)

    @property
    def sample(self) -> tuple[Args, Kwargs]:
        """The model's arguments with random rows, as many as a call may have that is not long."""
        return self.long.on(self.long.some(LARGE))


def random_rows(length: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws a uniform subset of ``count`` of ``length`` rows, sorted, without making anything much longer than it."""
    if 2 * count > length:
        return torch.randperm(length, generator=generator)[:count].sort().values
    rows = torch.empty(0, dtype=torch.long)
    while len(rows) < count:  # what was drawn before is drawn again
        rows = torch.cat([rows, torch.randint(length, (count - len(rows),), generator=generator)]).unique()
    return rows
