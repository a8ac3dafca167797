"""A model and example arguments, turned into facts: what depends on what, found by running the model.

The facts come from probes that see what the densities really do. All of them hold the latents, the subsample
indices and the random state, change one thing, run the model again, and look which rows' log-factors moved:

* *row copy*: row k of an argument is written over its row j. If row j of a plate moves and no other, then the
  axis is the plate's; if nothing moves, the argument does not enter; if others move too, rows are coupled.
* *latent*: half of the elements of a latent are replaced; what moves depends on it. Rows outside its plates that each
  depend on one element (``b[group]``) are told by replacing elements by the digits of their numbers.
* *twins*: everything known of row k is written over row j. If the two rows still differ, the model knows
  something of a row that no argument carries.

Nothing is changed by looking: not the random state, the param store, module buffers, or a Pyro handler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_amortize.held import HeldRun
from pyro_amortize.loops import find_loops
from pyro_amortize.structure import Family, Link, Plate, plates_of


@dataclass
class Probes:
    """One look at a model: the base run, its noise, and what a change moved.

    Attributes:
        held: Runs the model.
        hides: Tells of a site whether the model hides it from its guide.
        loose: Names of loops that are not to be seen as such.
        base: The nodes of the base run's trace.
        families: Sites that loops number, each family one site in all that follows.
        unmerged: The sites with a density as they are in the model.
        loops: The loops, as plates.
        plates: Its plates, by name.
        factors: Its sites with a density, by name.
        noise: How far log-factors move by themselves.
        links: The links found so far.
        last: The nodes of the last run with a change.
    """

    held: HeldRun
    hides: Callable[[Any], bool]
    loose: frozenset[str] = frozenset()
    base: dict[str, Any] = field(init=False)
    plates: dict[str, Plate] = field(init=False)
    noise: float = field(init=False)
    unmerged: dict[str, Any] = field(init=False)
    families: tuple[Family, ...] = field(init=False)
    loops: dict[str, Plate] = field(init=False)

    def __post_init__(self) -> None:
        self.held.run()  # draws the latents; from here on the random state runs alike
        self.unmerged = _factors(self.held.run())
        families, loops = find_loops(self.unmerged)
        self.families = tuple(family for family in families if not self.loose & set(family.loops))
        self.loops = {name: plate for name, plate in loops.items() if name not in self.loose}
        self.held.families = self.families
        self.held.loops = {name: plate.first or 0 for name, plate in self.loops.items()}
        self.base = self.held.run()
        self.links: list[Link] = []
        self.factors = _factors(self.base)
        self.plates = {}
        for name, plate in plates_of(s for s in self.base.values() if s["type"] == "sample").items():
            drawn = plate.size < plate.full_size and name in self.held.drawn
            loop = self.loops.get(name, plate)
            self.plates[name] = replace(plate, at_random=drawn, first=loop.first, series=loop.series)
        with pyro.validation_enabled(False):
            again = self.held.run()
        self.noise = 0.0
        for name in self.factors:
            difference = (again[name]["log_prob"] - self.factors[name]["log_prob"]).abs().nan_to_num(0.0)
            self.noise = max(self.noise, 10 * float(difference.max()) if difference.numel() else 0.0)

    def changed(self, **changes: Any) -> dict[str, Tensor] | None:
        """Runs the model with changes; returns how far each entry of each site's log-factor moved, None if it fails."""
        try:
            with pyro.validation_enabled(False):
                nodes = self.held.run(**changes)
        except (ValueError, RuntimeError, IndexError):
            return None
        moved = {}
        for name, site in self.factors.items():
            before, after = site["log_prob"], nodes.get(name, {}).get("log_prob")
            if after is None or after.shape != before.shape:
                moved[name] = torch.full(before.shape, torch.inf)
            else:
                distance = torch.where(before == after, 0.0, (before - after).abs())
                distance = torch.where(before.isnan() & after.isnan(), 0.0, distance.nan_to_num(torch.inf))
                moved[name] = torch.where(distance <= self.noise, 0.0, distance).cpu()
        self.last = nodes
        return moved

    def rows(self, moved: dict[str, Tensor], name: str, plate: Plate) -> Tensor:
        """How far each element of a plate moved at a site, in it or linked to it; shape (size,)."""
        distance = moved[name]
        link = None if plate in self.frames(name) else self.link_between(name, plate)
        if link is not None:
            elements = self.elements(link).expand(distance.shape)
            return distance.new_zeros(plate.size).index_add(0, elements.flatten(), distance.flatten())
        if distance.dim() < -plate.dim:
            return distance.sum().expand(plate.size)
        return distance.movedim(plate.dim, 0).reshape(distance.shape[plate.dim], -1).sum(-1).expand(plate.size)

    def frames(self, name: str) -> list[Plate]:
        """The plates of a site, outer to inner."""
        frames = (frame for frame in self.factors[name]["cond_indep_stack"] if frame.vectorized)
        return sorted((self.plates[frame.name] for frame in frames), key=lambda plate: plate.order)

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


def _factors(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The sample sites with a density among the nodes of a trace."""
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not (site["is_observed"] and (site["mask"] is False or site["infer"].get("_deterministic")))
    }


def spread_out(numbers: Tensor, plates: Sequence[Plate]) -> Tensor:
    """Brings a tensor with an axis a plate, outer to inner, to the plates' own dims."""
    shape = [1] * max(-plate.dim for plate in plates)
    for plate in plates:
        shape[plate.dim] = plate.size
    return numbers.reshape(shape)
