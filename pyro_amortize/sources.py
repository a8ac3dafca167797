"""Where data enter a model: probes that write rows of arguments over others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import Any

import torch
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_amortize.held import Change, kind_of, site_cells
from pyro_amortize.missing import has_nan, present_entries, takes_nan
from pyro_amortize.probes import Probes, some_places
from pyro_amortize.structure import Plate, Source

PAIRS = 3
"""How often a row of an argument is written over another."""
ODD = (torch.nan, -1e6, 1e6, 0.0, -1.0, -9.0, -99.0, -999.0, -9999.0, 99.0, 999.0, 9999.0)
"""Numbers that stand for what is missing, or that models leave out."""


@dataclass(frozen=True)
class _Claim:
    """That an argument's axis is a plate's."""

    plate: Plate
    axis: int
    indexed: bool
    reaches: frozenset[str]
    couples: bool
    through: str | None = None
    offsets: frozenset[int] = frozenset()


class SourceProbes:
    """Finds the facts about data.

    Args:
        probes: The look at the model that is taken, its links known.
    """

    def __init__(self, probes: Probes) -> None:
        self.probes = probes

    def sources(self) -> tuple[list[Source], tuple[str, ...]]:
        """Finds the arguments with data in them and the observed sites whose data no argument carries."""
        found: list[Source] = []
        indistinct: list[str] = []
        movers: dict[str, set[str]] = {name: set() for name in self.probes.factors}
        explained = {
            name
            for name in self.probes.factors
            if all(plate.size == 1 for plate in self.probes.frames(name))
            and self._is_argument(name)  # one row tells nothing
        }
        for name, leaf in self.probes.held.call.tensors.items():
            claims: list[_Claim] = []
            tried = distinct = False
            for plate in self.probes.plates.values():
                if self._is_index(leaf, plate):
                    continue
                best: _Claim | None = None
                for axis, length in enumerate(leaf.shape):
                    if length in (plate.size, plate.full_size) and plate.size > 1:
                        tried = True
                        claim, differs, touched = self._row_copy(name, leaf, axis, plate)
                        distinct |= differs
                        for site in touched:
                            movers[site].add(name)
                        if claim is not None and (best is None or (best.couples and not claim.couples)):
                            best = claim
                if best is None or best.couples:
                    best = self._picked_claim(name, leaf, plate) or best
                    for site in best.reaches if best and best.through else ():
                        movers[site].add(name)
                claims += [best] if best is not None else []
            found += self._from_claims(name, leaf, claims)
            if tried and not claims and not distinct:
                indistinct.append(name)
                explained |= {s for s in self.probes.factors if self._feeds_equal_rows(leaf, s)}
        for name, arguments in movers.items():
            mine = [s for s in found if s.name in arguments and name in s.reaches]
            if mine and self._varies_along(name) <= {plate for s in mine for plate in s.plates}:
                explained.add(name)
            elif mine and self._stands_alone(name, explained):  # they only carry its values, in another order or part
                found = [s for s in found if not (s in mine and s.reaches == {name})]
        found += [self._from_site(name) for name in self.probes.factors if self._stands_alone(name, explained)]
        return found, tuple(indistinct)

    def _varies_along(self, name: str) -> set[str]:
        """Plates along which the values of an observed site differ."""
        site, found = self.probes.factors[name], set()
        for plate in self.probes.frames(name) if site["is_observed"] else ():
            rows = site_cells(site["value"], len(site["fn"].event_shape), [plate])
            if bool((_flat(rows) != _flat(rows)[:1]).any()):
                found.add(plate.name)
        return found

    def _is_index(self, leaf: Tensor, plate: Plate) -> bool:
        indices = self.probes.held.indices.get(plate.name)
        if not isinstance(indices, Tensor) or leaf.is_floating_point() or leaf.dtype == torch.bool:
            return False
        explicit = plate.size < plate.full_size or not torch.equal(indices.cpu(), torch.arange(plate.size))
        return explicit and leaf.shape == indices.shape and bool((leaf == indices).all())

    def _stands_alone(self, name: str, explained: set[str]) -> bool:
        site = self.probes.factors[name]
        in_plates = any(plate.size > 1 for plate in self.probes.frames(name))
        return in_plates and site["is_observed"] and not site_is_factor(site) and name not in explained

    def _from_site(self, name: str) -> Source:
        site = self.probes.factors[name]
        kind, categories = kind_of(site["fn"])
        plates = self.probes.frames(name)
        names, dims = tuple(plate.name for plate in plates), tuple(plate.dim for plate in plates)
        value = site_cells(site["value"], len(site["fn"].event_shape), plates)
        shape = tuple(value.shape[len(plates) :])
        missing = has_nan(value)
        return Source(
            name, names, None, dims, shape, frozenset({name}), feeds=name, kind=kind, categories=categories,
            missing=missing,
        )  # fmt: skip

    def _from_claims(self, name: str, leaf: Tensor, claims: list[_Claim]) -> list[Source]:
        """Makes one source of an argument's axes; several if the plates of one axis never stand around one site."""
        plain = {claim.axis for claim in claims if not claim.couples and not claim.through}
        claims = [claim for claim in claims if not ((claim.couples or claim.through) and claim.axis in plain)]
        together = {frozenset(c.plate.name for c in claims if site in c.reaches) for c in claims for site in c.reaches}
        sources = []
        for names in sorted((t for t in together if not any(t < other for other in together)), key=sorted):
            mine = sorted((c for c in claims if c.plate.name in names), key=lambda claim: claim.plate.order)
            if len({claim.axis for claim in mine}) < len(mine):
                continue
            plates, axes = [claim.plate for claim in mine], tuple(claim.axis for claim in mine)
            through = tuple(claim.through for claim in mine)
            cells = self.probes.cells(self._picked(leaf, axes, through), axes, tuple(plates))
            feeds = next(
                (s for s in self.probes.factors if cells is not None and self._is_value(cells, s, plates)), None
            )
            kind, categories = "binary" if leaf.dtype == torch.bool else "real", 0
            if feeds is not None:
                kind, categories = kind_of(self.probes.factors[feeds]["fn"])
            sources.append(
                Source(
                    name,
                    tuple(plate.name for plate in plates),
                    axes,
                    tuple(plate.dim if feeds is None else self.probes.dim(feeds, plate) for plate in plates),
                    tuple(size for axis, size in enumerate(leaf.shape) if axis not in axes),
                    frozenset().union(*(claim.reaches for claim in mine)),
                    through,
                    frozenset(claim.plate.name for claim in mine if claim.indexed),
                    frozenset(claim.plate.name for claim in mine if claim.couples),
                    tuple(tuple(sorted(claim.offsets)) for claim in mine),
                    feeds,
                    kind,
                    categories,
                    has_nan(leaf),
                )
            )
        return sources

    def _row_copy(self, name: str, leaf: Tensor, axis: int, plate: Plate) -> tuple[_Claim | None, bool, set[str]]:
        """Writes rows of an argument over others; returns what that says, whether rows differ, what values moved."""
        members = self.probes.members(plate)
        related = members + self.probes.linked(plate)
        rows = leaf.movedim(axis, 0)
        indices = self.probes.held.indices.get(plate.name)
        picked = torch.as_tensor(indices).cpu() if indices is not None else torch.arange(plate.size)
        full = leaf.shape[axis] == plate.full_size
        subsampled = plate.size < plate.full_size
        positions = {int(j): p for p, j in enumerate(picked)} if full else {}
        reaches: set[str] = set()
        touched: set[str] = set()
        offsets: list[set[int]] = []
        total: dict[str, Tensor] = {}
        everywhere = swaps = True
        couples = False
        indexed = full and subsampled
        differs = bool((_flat(rows) != _flat(rows)[:1]).any())
        rolled = self._rolled(name, leaf, axis, plate, related) if differs else {}
        matter = torch.stack(list(rolled.values())).any(0).nonzero().flatten() if rolled else torch.arange(plate.size)
        touched |= self.probes.altered() & set(members) if differs else set()
        targets = [j for j, p in positions.items() if p in set(matter.tolist())] if indexed else matter.tolist()
        tried = failed = 0
        pairs = takewhile(lambda _: tried < PAIRS, _distinct_pairs(rows, targets, count=4 * PAIRS))
        for target, origin in chain(pairs, _passed_over(rolled, reaches, picked if indexed else None)):
            copy = leaf.clone()
            copy.movedim(axis, 0)[target] = rows[origin] if origin is not None else _another(rows[target])
            moved = self.probes.changed(leaves={name: copy})
            if moved is None:  # as where a row that a mask covers holds what no other may
                failed += 1
                continue
            tried += 1
            touched |= self.probes.altered() & set(members)
            offsets.append(set())
            for site in related:
                where = self.probes.rows(moved, site, plate) > 0
                if not bool(where.any()):
                    continue
                reaches.add(site)
                total[site] = total.get(site, 0) + moved[site]
                everywhere = everywhere and bool(where.all())
                place = positions.get(target, -1) if indexed else target
                if full and not subsampled and positions.get(target) != target and bool(where[positions[target]]):
                    indexed, place = True, positions[target]
                couples = couples or int(where.sum()) > int(bool(where[place]))
                half = plate.size // 2  # a model that rolls its rows leads from the last to the first
                offsets[-1] |= set(((where.nonzero().flatten() - place + half) % plate.size - half).tolist())
            if any(bool(m.any()) for n, m in moved.items() if n not in related):
                couples = couples or bool(reaches)
            swaps = swaps and everywhere and self._swap_is_local(name, leaf, axis, target, origin, plate, related)
        if failed and not tried:
            reaches, couples = set(members), True
        # A shared argument, or a wrong axis, moves all rows; so does a standardized one, but not by swapping two.
        if not reaches or (everywhere and not swaps and plate.size > 2) or self._is_of_one_element(total, plate, rows):
            return None, differs, touched
        steps = [found for found in offsets if found]
        if couples and steps and not set.intersection(*steps):  # rows go along with no row of the plate
            return None, differs, touched
        every = frozenset().union(*steps)
        return _Claim(plate, axis, indexed, frozenset(reaches), couples, None, every), differs, touched

    def _is_of_one_element(self, moved: dict[str, Tensor], plate: Plate, rows: Tensor) -> bool:
        """Whether all that moved stands in one element of another plate, as with the series in a list of series.

        But what enters one turn of a series alone may well be data of each series: a state that it starts from. And
        rows that have an axis of the other plate, too, may differ in one of its elements only.
        """
        for name in moved:
            for other in self.probes.frames(name):
                if (other.series and not plate.series) or {other.size, other.full_size} & set(rows.shape[1:]):
                    continue
                if other != plate and int((self.probes.rows(moved, name, other) > 0).sum()) == 1 and other.size > 1:
                    return True
        return False

    def _picked_claim(self, name: str, leaf: Tensor, plate: Plate) -> _Claim | None:
        """Tells whether another argument says where in this one the data of a plate's elements stand: ``x[index]``."""
        related = self.probes.members(plate) + self.probes.linked(plate)
        for index, places in self.probes.held.call.tensors.items():
            if places.dtype != torch.long or places.shape != (plate.size,) or index == name or plate.size < 2:
                continue
            for axis, length in enumerate(leaf.shape):
                used = places.unique()
                if int(used[0]) < 0 or int(used[-1]) >= length or (len(used) == length == plate.size and len(used) < 3):
                    continue
                rows, reaches, fits = leaf.movedim(axis, 0), set[str](), True
                for target, origin in _distinct_pairs(rows, used.tolist()):
                    if origin is None:
                        continue
                    copy = leaf.clone()
                    copy.movedim(axis, 0)[target] = rows[origin]
                    moved = self.probes.changed(leaves={name: copy})
                    own = (places == target).cpu()
                    for site in related if moved is not None else ():
                        where = self.probes.rows(moved, site, plate) > 0  # type: ignore[arg-type]
                        reaches |= {site} if bool(where.any()) else set()
                        fits = fits and not bool(where[~own].any())
                    fits = fits and moved is not None
                if fits and reaches and bool((places != torch.arange(plate.size)).any()):
                    return _Claim(plate, axis, False, frozenset(reaches), False, index)
        return None

    def _picked(self, leaf: Tensor, axes: tuple[int, ...], through: tuple[str | None, ...]) -> Tensor:
        """Puts an argument's cells in the order in which other arguments name their places."""
        for axis, index in zip(axes, through, strict=True):
            leaf = leaf if index is None else leaf.index_select(axis, self.probes.held.call.tensors[index])
        return leaf

    def _rolled(self, name: str, leaf: Tensor, axis: int, plate: Plate, sites: list[str]) -> dict[str, Tensor]:
        """Moves all rows of an argument on by one; returns which rows of the plate move each site, {} if that fails."""
        moved = self.probes.changed(leaves={name: leaf.roll(1, axis)})
        return {} if moved is None else {site: self.probes.rows(moved, site, plate) > 0 for site in sites}

    def _swap_is_local(
        self, name: str, leaf: Tensor, axis: int, j: int, k: int | None, plate: Plate, sites: list[str]
    ) -> bool:
        """Swaps two rows of an argument, which changes no sum over rows; tells whether two rows of the plate moved."""
        if k is None:
            return False
        copy = leaf.clone()
        copy.movedim(axis, 0)[[j, k]] = leaf.movedim(axis, 0)[[k, j]]
        moved = self.probes.changed(leaves={name: copy})
        if moved is None:
            return False
        distance = torch.stack([self.probes.rows(moved, site, plate) for site in sites]).sum(0)
        return 0 < int((distance > 1e-4 * distance.max()).sum()) <= 2

    def _is_argument(self, name: str) -> bool:
        return any(name in sites for sites in self.carried().values())

    def carried(self) -> dict[str, frozenset[str]]:
        """Returns the arguments that are the values of observed sites, whatever their shape, and of which."""
        values = {n: s["value"].flatten() for n, s in self.probes.factors.items() if s["is_observed"]}
        found = {
            argument: frozenset(name for name, value in values.items() if torch.equal(value, leaf.flatten()))
            for argument, leaf in self.probes.held.call.tensors.items()
        }
        return {argument: sites for argument, sites in found.items() if sites}

    def shifted(self) -> dict[str, frozenset[str]]:
        """Returns the arguments that move the values of observed sites one for one, as ``obs=data - f`` does."""
        found = {}
        for argument, leaf in self.probes.held.call.tensors.items():
            moved = leaf.is_floating_point() and leaf.numel() and self.probes.changed(leaves={argument: leaf + 1})
            members = list(self.probes.factors) if moved else []
            found[argument] = frozenset(name for name in members if self._is_shifted(name, leaf))
        return {argument: sites for argument, sites in found.items() if sites}

    def _is_shifted(self, name: str, leaf: Tensor) -> bool:
        site = self.probes.factors[name]
        if not site["is_observed"] or name not in self.probes.last or site["value"].numel() != leaf.numel():
            return False
        by = self.probes.last[name]["value"] - site["value"]
        return bool(((by - 1).abs() < 1e-3).all())

    def _feeds_equal_rows(self, leaf: Tensor, name: str) -> bool:
        value = self.probes.factors[name]["value"]
        return self.probes.factors[name]["is_observed"] and bool((value.flatten()[:1] == leaf.flatten()[:1]).all())

    def _is_value(self, cells: Tensor, name: str, plates: list[Plate]) -> bool:
        site = self.probes.factors[name]
        if not site["is_observed"] or site_is_factor(site) or not set(plates) <= set(self.probes.frames(name)):
            return False
        mine = [replace(plate, dim=self.probes.dim(name, plate)) for plate in plates]
        value = site_cells(site["value"], len(site["fn"].event_shape), mine).cpu()
        if value.numel() != cells.numel():
            return False
        return torch.equal(torch.nan_to_num(value.reshape(cells.shape)), torch.nan_to_num(cells))

    def mask(self, name: str, sources: list[Source]) -> str | None:
        """Finds where an observed site's mask stands: in an argument, in an argument's NaN, or only in the model."""
        site = self.probes.factors[name]
        if present_entries(site) is None and not takes_nan(site):
            return None
        plates = tuple(self.probes.frames(name))
        beside = (s for s in sources if s.axes is not None and s.plates == tuple(plate.name for plate in plates))
        fed = next((s.name for s in sources if s.feeds == name and s.axes is not None), None)
        return next((source.name for source in beside if self._is_mask(name, source, fed, plates)), "")

    def _is_mask(self, name: str, source: Source, fed: str | None, plates: tuple[Plate, ...]) -> bool:
        """Tells whether a site's mask is a source, as it stands and changed: its truth, or where its data are NaN.

        The site's data, ``fed``, are changed with it, to numbers that a model may take for missing: then the mask is
        more than that.
        """
        leaf = self.probes.held.call.tensors[source.name]
        truth = source.name != fed
        if not (bool(((leaf == 0) | (leaf == 1)).all()) if truth else leaf.is_floating_point()):
            return False
        if not self._shows(leaf, truth, source, self.probes.factors[name], plates):
            return False
        lowered = {source.name: torch.where(some_places(leaf, 3), torch.zeros_like(leaf), leaf)} if truth else {}
        for odd in self._with_odd_numbers(fed):
            changed = {**lowered, **odd}
            if self.probes.changed(leaves=changed) is None:
                return False
            if not self._shows(changed[source.name], truth, source, self.probes.last[name], plates):
                return False
        return True

    def _with_odd_numbers(self, name: str | None) -> Iterator[dict[str, Tensor]]:
        """Yields an argument with odd numbers in places, so often that all of these are tried; whole numbers stay."""
        data = None if name is None else self.probes.held.call.tensors[name]
        if name is None or data is None or not data.is_floating_point() or not data.numel():
            yield {}
            return
        places = some_places(data, 4)
        count = int(places.sum())
        for start in range(0, len(ODD), count):
            changed = data.clone()
            changed[places] = data.new_tensor([ODD[(start + i) % len(ODD)] for i in range(count)])
            yield {name: changed}

    def _shows(self, leaf: Tensor, truth: bool, source: Source, site: Any, plates: tuple[Plate, ...]) -> bool:
        """Tells whether an argument shows which entries of a site count."""
        there = self._picked(leaf != 0 if truth else ~leaf.isnan(), source.axes or (), source.through)
        cells, mask = self.probes.cells(there, source.axes or (), plates), present_entries(site)
        if cells is None or mask is None:
            return cells is not None and bool(cells.all())
        mask = site_cells(mask, len(site["fn"].event_shape), plates).cpu()
        return cells.numel() == mask.numel() and torch.equal(cells.reshape(mask.shape), mask)

    def is_masked_by_cell(self, source: Source) -> bool:
        """Changes an argument where the mask of the site that it enters covers it; tells whether nothing moves."""
        (name,) = source.reaches if len(source.reaches) == 1 else (None,)
        mask = None if name is None or source.axes is None else present_entries(self.probes.factors[name])
        if mask is None or source.feeds == name or any(source.through):
            return False
        leaf = self.probes.held.call.tensors[source.name]
        plates = self.probes.frames(name)  # type: ignore[arg-type]
        cells = site_cells(mask, len(self.probes.factors[name]["fn"].event_shape), plates).cpu()  # type: ignore[index]
        if source.plates != tuple(plate.name for plate in plates) or not source.shape or bool(cells.all()):
            return False
        moved = leaf.movedim(source.axes, tuple(range(len(plates))))  # type: ignore[arg-type]
        if moved.shape != cells.shape or leaf.dtype == torch.bool:
            return False
        changed = torch.where(cells.to(leaf.device), moved, moved + 1)
        changed = changed.movedim(tuple(range(len(plates))), source.axes)  # type: ignore[arg-type]
        after = self.probes.changed(leaves={source.name: changed})
        return after is not None and not any(bool(distance.any()) for distance in after.values())

    def relabelled(self, plate: Plate, sources: list[Source]) -> bool | None:
        """Swaps the numbers of two elements that rows point to, and all that is known of them; tells if sums move."""
        links = [link for link in self.probes.links if link.to == plate.name]
        if not links or plate.size < 2 or plate.size < plate.full_size:
            return None
        swap = torch.arange(plate.size)
        swap[[0, plate.size - 1]] = swap[[plate.size - 1, 0]]
        leaves: dict[str, Tensor] = {}
        latents: dict[str, Change] = {}
        for link in dict.fromkeys(links):
            leaf = leaves.get(link.argument, self.probes.held.call.tensors[link.argument])
            first = tuple(range(len(link.axes)))
            rows = leaf.movedim(link.axes, first).clone()
            columns = rows.reshape(*rows.shape[: len(link.axes)], -1)
            numbers = columns[..., link.column].long() + link.offset
            element = (numbers >= 0) & (numbers < plate.size)  # padding is none
            swapped = swap.to(leaf.device)[numbers.clamp(0, plate.size - 1)]
            columns[..., link.column] = (torch.where(element, swapped, numbers) - link.offset).to(leaf.dtype)
            leaves[link.argument] = columns.reshape(rows.shape).movedim(first, link.axes)
        for source in sources:
            if plate.name in source.plates and source.axes is not None and not any(source.through):
                axis = source.axes[source.plates.index(plate.name)]
                leaf = self.probes.held.call.tensors[source.name]
                leaves[source.name] = leaf.index_select(axis, swap.to(leaf.device))
        for name in self.probes.members(plate):
            site = self.probes.factors[name]
            if not site["is_observed"]:
                latents[name] = _swapped(swap, self.probes.dim(name, plate) - len(site["fn"].event_shape))
        if self.probes.changed(leaves=leaves, latents=latents) is None:
            return None
        for _, factor, after in self.probes.after():
            before = factor["log_prob"]
            if bool((before.sum() - after["log_prob"].sum()).abs() > 1e-4 * (1 + before.abs().sum())):
                return True
        return False

    def hidden(self, plate: Plate, sources: list[Source]) -> bool | None:
        """Makes two elements twins in all that is known of them, and sees whether their densities agree.

        Where densities depend on neighbours' data too, these are made twins as well.
        """
        sources = [source for source in sources if plate.name in source.plates]
        members = self.probes.members(plate)
        offsets = [source.offsets[source.plates.index(plate.name)] for source in sources if source.offsets]
        radius = max((abs(offset) for found in offsets for offset in found), default=0)
        coupled = any(plate.name in source.couples for source in sources)
        picked = any(plate.name in source.indexed for source in sources)
        if plate.size < 4 * radius + 2 or not sources or (coupled and not radius) or (picked and radius):
            return None
        leaves, observed = {}, {}
        latents: dict[str, Change] = {}
        target, origin = radius, 3 * radius + 1
        indices = self.probes.held.indices.get(plate.name)
        for source in sources:
            if source.axes is None:
                site = self.probes.factors[source.name]
                axis = self.probes.dim(source.name, plate) - len(site["fn"].event_shape)
                observed[source.name] = _row_over(site["value"], axis, target, origin, radius)
            else:
                if source.through[source.plates.index(plate.name)]:
                    continue  # its index is an argument of its own
                indexed = plate.name in source.indexed
                to, fro = (int(indices[target]), int(indices[origin])) if indexed else (target, origin)  # type: ignore[index]
                axis = source.axes[source.plates.index(plate.name)]
                leaves[source.name] = _row_over(self.probes.held.call.leaves[source.name], axis, to, fro, radius)
        for name in members:
            site = self.probes.factors[name]
            if not site["is_observed"]:
                axis = self.probes.dim(name, plate) - len(site["fn"].event_shape)
                latents[name] = _twin(axis, target, origin, radius)
        if self.probes.changed(leaves=leaves, latents=latents, observed=observed) is None:
            return None
        for name, _, after in (moved for moved in self.probes.after() if moved[0] in members):
            factor, mask = after["log_prob"], after["mask"]
            dim = self.probes.dim(name, plate)
            if factor.dim() >= -dim and factor.shape[dim] > 1:
                counts = torch.ones((), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
                pair = factor.movedim(dim, 0)[[target, origin]]
                both = counts.expand(factor.shape).movedim(dim, 0)[[target, origin]].all(0).to(pair.device)
                if not torch.allclose(pair[0][both], pair[1][both], rtol=1e-4, atol=1e-5, equal_nan=True):
                    return True
        return False


def _swapped(swap: Tensor, axis: int) -> Change:
    return lambda value, _: value.index_select(axis, swap.to(value.device))


def _twin(axis: int, target: int, origin: int, radius: int) -> Change:
    return lambda value, _: _row_over(value, axis, target, origin, radius)


def _row_over(value: Tensor, axis: int, target: int, origin: int, radius: int) -> Tensor:
    copy = value.clone()
    rows = copy.movedim(axis, 0) if value.dim() >= -axis else copy[None]  # one value for all rows
    if len(rows) > 1:
        rows[target - radius : target + radius + 1] = rows[origin - radius : origin + radius + 1].clone()
    return copy


def _distinct_pairs(rows: Tensor, targets: list[int], count: int = PAIRS) -> Iterator[tuple[int, int | None]]:
    """Yields up to ``count`` pairs (target, origin) of rows that differ.

    Where all rows are equal the origin is None: the target is to be changed as :func:`_another` does, if it can be.
    """
    flat = _flat(rows)
    can_change = rows.dtype == torch.bool or bool((flat[0] != flat[0, :1]).any())
    torch.manual_seed(2)
    found = 0
    for target in [targets[i] for i in torch.randperm(len(targets))[: 8 * count]]:
        others = (flat != flat[target]).any(-1).nonzero().flatten()
        if len(others) or can_change:
            yield target, int(others[torch.randint(len(others), ())]) if len(others) else None
            found += 1
        if found == count:
            return


def _passed_over(
    rolled: dict[str, Tensor], reaches: set[str], picked: Tensor | None
) -> Iterator[tuple[int, int | None]]:
    """Yields a pair (target, origin) of rows for each site that moved when rows were moved on, but is not reached yet.

    Args:
        rolled: For each site which rows moved.
        reaches: The sites that are reached, when a pair is asked for.
        picked: Where the rows stand in the argument, if elsewhere.
    """
    for site, moved in rolled.items():
        if site not in reaches and bool(moved.any()):
            places = moved.nonzero().flatten()
            place = int(places[len(places) // 2])
            target = place if picked is None else int(picked[place])
            yield target, target - 1


def _another(row: Tensor) -> Tensor:
    """A row with other values that it may have: those of a mask flipped, others in another order."""
    return ~row if row.dtype == torch.bool else row.flatten().roll(1).reshape(row.shape)


def _flat(rows: Tensor) -> Tensor:
    """Rows as vectors of numbers that can be compared, NaN too."""
    return torch.nan_to_num(rows.reshape(len(rows), -1).to(torch.float64), nan=1.2345e-67)
