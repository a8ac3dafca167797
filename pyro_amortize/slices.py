"""Which cells of a source's rows enter which sites, where a model takes rows apart: ``y[:, 0]``, ``y[:, 1]``."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from pyro_amortize.held import site_cells
from pyro_amortize.probes import Probes
from pyro_amortize.structure import Entered, Source

RUNS = 512
"""How often the model is run for one source, at most."""
MANY = 16
"""From how many cells on these are told by digits."""
Entry = tuple[str, int | None]


class SliceProbes:
    """Finds which cells enter which sites.

    Args:
        probes: The look at the model that is taken.
        masked: The sites of which something may be missing.
    """

    def __init__(self, probes: Probes, masked: set[str]) -> None:
        self.probes, self.masked = probes, masked
        self.sizes: dict[str, int] = {}
        self.runs = 0

    def sliced(self, source: Source) -> Source:
        """Returns a source with what each of its cells enters, where masks cover sites that it enters."""
        alone = source.by_cell or source.reaches == {source.feeds}
        if source.axes is None or not source.shape or alone or not source.reaches & self.masked:
            return source
        count = math.prod(source.shape)
        whole: Entered = tuple((site, None) for site in sorted(source.reaches))
        found, parts, self.runs = [whole] * count, [torch.arange(count)], 0
        while parts and self.runs < RUNS:
            part = parts.pop()
            entered = self._entered(source, part)
            if entered is not None and (len(part) == 1 or len(entered) <= 1):
                apart: dict[int, set[Entry]] | None = dict.fromkeys(part.tolist(), entered)
            else:
                apart = self._by_digits(source, part, entered) if entered and len(part) >= MANY else None
            if apart is not None:
                for cell, entries in apart.items():
                    found[cell] = self._named(entries) or whole
            elif len(part) > 1:
                parts += part.chunk(2)
        if parts:
            warnings.warn(
                f"plan_amortization: argument '{source.name}' has {count} numbers a row, too many to try what each of "
                f"them enters, and masks cover some of what they may enter, {sorted(source.reaches & self.masked)}: "
                f"values under a mask may reach the encoder. Pass what each mask covers as an argument of its own.",
                UserWarning,
                stacklevel=2,
            )
        if all(entered == whole for entered in found):
            return source
        missing = source.missing or any({site for site, _ in entered} <= self.masked for entered in found)
        return replace(source, enters=tuple(found), missing=missing)

    def _by_digits(self, source: Source, cells: Tensor, entered: set[Entry]) -> dict[int, set[Entry]] | None:
        """Tells what each of many cells enters by the digits of their numbers; None if cells enter the same."""
        numbers = torch.arange(len(cells))
        places = dict.fromkeys(entered, 0)
        for digit in range((len(cells) - 1).bit_length()):
            ones = (numbers >> digit) % 2 == 1
            on, off = self._entered(source, cells[ones]), self._entered(source, cells[~ones])
            if on is None or off is None or on & off or on | off != entered:
                return None
            places = {entry: place + (int(entry in on) << digit) for entry, place in places.items()}
        found: dict[int, set[Entry]] = {cell: set() for cell in cells.tolist()}
        for entry, place in places.items():
            found[int(cells[place])].add(entry)
        return found

    def _named(self, entries: set[Entry]) -> Entered:
        """Gathers entries by site, all of an event where it moved as one."""
        found = []
        for name in sorted({site for site, _ in entries}):
            mine = [place for site, place in entries if site == name]
            event = math.prod(self.probes.factors[name]["fn"].event_shape)
            each = {i for p in mine if p is not None for i in ([p] if p >= 0 else range(~p * event, -p * event))}
            every = None in mine or len(each) == self.sizes.get(name)
            found.append((name, None if every else tuple(sorted(each))))
        return tuple(found)

    def _entered(self, source: Source, cells: Tensor) -> set[Entry] | None:
        """Changes cells in all rows; returns what moves; None if the model fails."""
        assert source.axes is not None
        self.runs += 1
        leaf = self.probes.held.call.tensors[source.name]
        copy = leaf.clone()
        rows = copy.movedim(source.axes, tuple(range(len(source.axes))))
        flat = rows.reshape(-1, math.prod(source.shape)).clone()
        flat[:, cells] = _others(flat[:, cells])
        rows.copy_(flat.reshape(rows.shape))
        moved = self.probes.changed(leaves={source.name: copy})
        if moved is None:
            return None
        return {(name, entry) for name in self.probes.factors for entry in self._entries(name, source, moved[name])}

    def _entries(self, name: str, source: Source, moved: Tensor) -> set[int | None]:
        """Returns which entries of a site moved in any row of a source: None is all of them.

        They are numbered along the site's other plates, sorted by name, and its event. Where the density of an event
        moves, but not its values, it moves as one: ``~i`` for that at place i along the plates.
        """
        site, after = self.probes.factors[name], self.probes.last.get(name)
        frames = {plate.name: plate for plate in self.probes.frames(name)}
        if not set(source.plates) <= set(frames):
            return {None} if name in source.reaches and bool(moved.any()) else set()
        others = sorted(set(frames) - set(source.plates))
        plates, count = [frames[plate] for plate in (*source.plates, *others)], len(source.plates)
        rows = _in_any(site_cells(moved > 0, 0, plates), count).flatten()
        value = site["value"]
        if not site["is_observed"] or after is None or after["value"].shape != value.shape:
            return {None} if bool(rows.any()) else set()
        differs = torch.nan_to_num(after["value"], nan=1.2e-30) != torch.nan_to_num(value, nan=1.2e-30)
        differs = _in_any(site_cells(differs, len(site["fn"].event_shape), plates), count).reshape(len(rows), -1)
        self.sizes[name] = differs.numel()
        alone = (rows & ~differs.any(-1)).nonzero().flatten().tolist()
        return {*differs.flatten().nonzero().flatten().tolist(), *(~row for row in alone)}


def _in_any(cells: Tensor, count: int) -> Tensor:
    """Brings cells together along their first axes."""
    return cells.flatten(0, count - 1).any(0) if count else cells


def _others(cells: Tensor) -> Tensor:
    """Other values that cells of rows, shape (rows, cells), may have: truths flipped, else those of the next row."""
    if cells.dtype == torch.bool:
        return ~cells
    rolled = cells.roll(1, 0)
    equal = (rolled == cells).all(0)
    truths = equal & ((cells == 0) | (cells == 1)).all(0)
    near = torch.where(truths, 1 - cells, torch.where(cells > 1, cells - 1, cells + 1))
    return torch.where(equal, near, rolled)
