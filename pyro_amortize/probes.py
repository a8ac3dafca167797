"""A model and example arguments, turned into facts: what depends on what, found by running the model.

The facts come from probes that see what the densities really do. All of them hold the latents, the subsample
indices and the random state, change one thing, run the model again, and look which rows' log-factors moved:

* *row copy*: row k of an argument is written over its row j. If row j of a plate moves and no other, then the
  axis is the plate's; if nothing moves, the argument does not enter; if others move too, rows are coupled.
* *latent*: half of the elements of a latent are replaced; what moves depends on it. Rows outside its plates that each
  depend on one element (``b[group]``) are told by replacing elements by the digits of their numbers.
* *twins*: everything known of row k is written over row j. If the two rows still differ, the model knows
  something of a row that no argument carries.

Latents are held where their priors live. Where that does not show all that the model's graph of gradients says is to
be seen (a density that is not finite, a likelihood that is flat there), the same is tried at other values as well.

Nothing is changed by looking: not the random state, the param store, module buffers, or a Pyro handler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_amortize.held import Base, Change
from pyro_amortize.structure import Family, Link, Plate, plates_of


@dataclass
class Probes:
    """One look at a model: where it was run, and what a change moved there.

    Attributes:
        hides: Tells of a site whether the model hides it from its guide.
        bases: Where changes are tried.
        unseen: For each latent the sites whose densities it enters, though none of its values that were tried moved
            them.
        unmerged: The sites with a density as they are in the model.
        families: Sites that loops number, each family one site in all that follows.
        loops: The loops, as plates.
        held: Runs the model at the first base.
        base: The nodes of its trace.
        factors: Its sites with a density, by name.
        noise: How far its log-factors move by themselves.
        plates: Its plates, by name.
        links: The links found so far.
        same: Plates found to have the elements of another, and which.
    """

    hides: Callable[[Any], bool]
    bases: list[Base]
    unseen: Mapping[str, frozenset[str]]
    unmerged: Mapping[str, Any]
    families: tuple[Family, ...]
    loops: Mapping[str, Plate]

    def __post_init__(self) -> None:
        first = self.bases[0]
        self.held, self.factors, self.noise = first.held, first.factors, first.noise
        self.base = first.nodes
        self.links: list[Link] = []
        self.same: dict[str, str] = {}
        self.plates: dict[str, Plate] = {}
        for name, plate in plates_of(s for s in self.base.values() if s["type"] == "sample").items():
            drawn = plate.size < plate.full_size and name in self.held.drawn
            loop = self.loops.get(name, plate)
            also = tuple(other for other, mine in self.held.view.same.items() if mine == name)
            self.plates[name] = replace(plate, at_random=drawn, first=loop.first, series=loop.series, also=also)

    def changed(
        self,
        leaves: dict[str, Any] | None = None,
        latents: Mapping[str, Change] | None = None,
        observed: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor] | None:
        """Runs the model with changes, at all bases.

        Args:
            leaves: Other arguments.
            latents: What makes other values of latents, of those held and fresh ones.
            observed: Other observed values.

        Returns:
            How far each entry of each site's log-factor moved, where it moved farthest; None if the model fails.
        """
        found = [base.changed(leaves, latents, observed) for base in self.bases]
        moves = [moved for moved in found if moved is not None]
        if not moves:
            return None
        moved = {}
        for name, site in self.factors.items():
            shape = site["log_prob"].shape
            far = [move[name] for move in moves if name in move and move[name].shape == shape]
            moved[name] = torch.stack(far).amax(0) if far else torch.full(shape, torch.inf)
        return moved

    def reached(self, name: str) -> frozenset[str]:
        """Replaces a latent; returns the sites whose densities move, or whose values do if these follow it."""
        return frozenset().union(*(base.reached((name,)) for base in self.bases if name in base.factors))

    @property
    def last(self) -> dict[str, Any]:
        """The nodes of the last run with a change: of observed values and masks, which are alike at all bases."""
        return next((base.last for base in self.bases if base.last), {})

    def altered(self) -> set[str]:
        """Returns the observed sites whose values the last change altered."""
        return next((base.altered() for base in self.bases if base.last), set())

    def after(self) -> Iterator[tuple[str, Any, Any]]:
        """Yields each site as it was and as the last change left it, at all bases where the model ran."""
        for base in self.bases:
            for name, site in base.factors.items() if base.last else ():
                if name in base.last:
                    yield name, site, base.last[name]

    def rows(self, moved: dict[str, Tensor], name: str, plate: Plate) -> Tensor:
        """How far each element of a plate moved at a site, in it or linked to it; shape (size,)."""
        distance = moved[name]
        link = None if plate in self.frames(name) else self.link_between(name, plate)
        if link is not None:
            elements = self.elements(link).expand(distance.shape)
            return distance.new_zeros(plate.size).index_add(0, elements.flatten(), distance.flatten())
        dim = self.dim(name, plate)
        if distance.dim() < -dim:
            return distance.sum().expand(plate.size)
        return distance.movedim(dim, 0).reshape(distance.shape[dim], -1).sum(-1).expand(plate.size)

    def frames(self, name: str) -> list[Plate]:
        """The plates of a site, outer to inner, at its own dims."""
        frames = (frame for frame in self.factors[name]["cond_indep_stack"] if frame.vectorized)
        mine = (replace(self.plates[frame.name], dim=frame.dim) for frame in frames)
        return sorted(mine, key=lambda plate: plate.order)

    def dim(self, name: str, plate: Plate) -> int:
        """The dim of a plate at a site."""
        return next((mine.dim for mine in self.frames(name) if mine == plate), plate.dim)

    def members(self, plate: Plate) -> list[str]:
        return [name for name in self.factors if plate in self.frames(name)]

    def linked(self, plate: Plate) -> list[str]:
        return [n for n in self.factors if plate not in self.frames(n) and self.link_between(n, plate) is not None]

    def link_between(self, name: str, plate: Plate) -> Link | None:
        around = {frame.name for frame in self.frames(name)}
        return next((link for link in self.links if link.to == plate.name and set(link.rows) <= around), None)

    def elements(self, link: Link) -> Tensor:
        """The element of each row, at the dims of the rows' plates."""
        rows = tuple(self.plates[name] for name in link.rows)
        cells = self.cells(self.held.call.tensors[link.argument], link.axes, rows)
        assert cells is not None
        numbers = spread_out(cells[..., link.column].long(), rows) + link.offset
        return numbers.clamp(0, self.plates[link.to].size - 1)  # what pads the index belongs to rows under a mask

    def cells(self, leaf: Tensor, axes: tuple[int, ...], plates: tuple[Plate, ...]) -> Tensor | None:
        """An argument's cells for the present elements of plates, shape (*sizes, rest); None if lengths do not fit."""
        for axis, plate in zip(axes, plates, strict=True):
            indices = self.held.indices.get(plate.name)
            if leaf.shape[axis] == plate.full_size > plate.size and indices is not None:
                leaf = leaf.index_select(axis, torch.as_tensor(indices, device=leaf.device))
            if leaf.shape[axis] != plate.size:
                return None
        return leaf.movedim(axes, tuple(range(len(axes)))).reshape(*(plate.size for plate in plates), -1).cpu()


def some_places(leaf: Tensor, seed: int) -> Tensor:
    """Marks half of a tensor's entries, one at least, always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(leaf.numel(), generator=generator).reshape(leaf.shape)
    return (order < (leaf.numel() + 1) // 2).to(leaf.device)


def spread_out(numbers: Tensor, plates: Sequence[Plate]) -> Tensor:
    """Brings a tensor with an axis a plate, outer to inner, to the plates' own dims."""
    shape = [1] * max(-plate.dim for plate in plates)
    for plate in plates:
        shape[plate.dim] = plate.size
    return numbers.reshape(shape)
