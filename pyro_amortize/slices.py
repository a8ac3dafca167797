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


class SliceProbes:
    """Finds which cells enter which sites.

    Args:
        probes: The look at the model that is taken.
        masked: The sites of which something may be missing.
    """

    def __init__(self, probes: Probes, masked: set[str]) -> None:
        self.probes, self.masked = probes, masked

    def sliced(self, source: Source) -> Source:
        """Returns a source with what each of its cells enters, where masks cover sites that it enters."""
        alone = source.by_cell or source.reaches == {source.feeds}
        if source.axes is None or any(source.through) or not source.shape or alone or not source.reaches & self.masked:
            return source
        count = math.prod(source.shape)
        found: list[Entered] = [tuple((site, None) for site in sorted(source.reaches))] * count
        whole, parts, runs = found[0], [torch.arange(count)], 0
        while parts and runs < RUNS:
            part = parts.pop()
            runs += 1
            entered = self._entered(source, part)
            if entered is not None and (len(part) == 1 or sum(bits for _, _, bits in entered) <= 1):
                for cell in part.tolist():
                    found[cell] = tuple((site, entries) for site, entries, _ in entered) or whole
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

    def _entered(self, source: Source, cells: Tensor) -> list[tuple[str, tuple[int, ...] | None, int]] | None:
        """Changes cells in all rows; returns what moves, as :meth:`_entries` does; None if the model fails."""
        assert source.axes is not None
        leaf = self.probes.held.call.tensors[source.name]
        copy = leaf.clone()
        rows = copy.movedim(source.axes, tuple(range(len(source.axes))))
        flat = rows.reshape(-1, math.prod(source.shape)).clone()
        flat[:, cells] = _others(flat[:, cells])
        rows.copy_(flat.reshape(rows.shape))
        moved = self.probes.changed(leaves={source.name: copy})
        if moved is None:
            return None
        found = [(name, *self._entries(name, source, moved[name])) for name in sorted(self.probes.factors)]
        return [(name, entries, bits) for name, entries, bits in found if bits]

    def _entries(self, name: str, source: Source, moved: Tensor) -> tuple[tuple[int, ...] | None, int]:
        """Returns which entries of a site moved in any row of a source, None for all, and how many moved apart.

        They are numbered along the site's other plates, sorted by name, and its event. An event moves as one where its
        density does, but not its values.
        """
        site, after = self.probes.factors[name], self.probes.last.get(name)
        frames = {plate.name: plate for plate in self.probes.frames(name)}
        if not set(source.plates) <= set(frames):
            return None, int(name in source.reaches and bool(moved.any()))
        others = sorted(set(frames) - set(source.plates))
        plates, count = [frames[plate] for plate in (*source.plates, *others)], len(source.plates)
        event_dim = len(site["fn"].event_shape)
        rows = site_cells(moved > 0, 0, plates).flatten(0, count - 1).any(0).flatten()
        value = site["value"]
        if not site["is_observed"] or after is None or after["value"].shape != value.shape:
            return None, int(rows.any())
        differs = torch.nan_to_num(after["value"], nan=1.2e-30) != torch.nan_to_num(value, nan=1.2e-30)
        differs = site_cells(differs, event_dim, plates).flatten(0, count - 1).any(0).reshape(len(rows), -1)
        alone = rows & ~differs.any(-1)
        entries = (differs | alone[:, None]).flatten()
        which = None if bool(entries.all()) else tuple(entries.nonzero().flatten().tolist())
        return which, int(differs.sum()) + int(alone.sum())


def _others(cells: Tensor) -> Tensor:
    """Other values that cells of rows, shape (rows, cells), may have: truths flipped, else those of the next row."""
    if cells.dtype == torch.bool:
        return ~cells
    rolled = cells.roll(1, 0)
    equal = (rolled == cells).all(0)
    truths = equal & ((cells == 0) | (cells == 1)).all(0)
    near = torch.where(truths, 1 - cells, torch.where(cells > 1, cells - 1, cells + 1))
    return torch.where(equal, near, rolled)
