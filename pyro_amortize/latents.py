"""What depends on a latent: probes that replace it, whole, by halves, and by the digits of its elements' numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor

from pyro_amortize.held import Base, Change, kind_of
from pyro_amortize.probes import Probes, some_places, spread_out
from pyro_amortize.structure import Link, Plate, Site
from pyro_amortize.supports import (
    bijection,
    is_delta,
    is_enumerated,
    is_free,
    logits_shape,
    site_mask,
    support_of,
    unconstrained_shape,
    undressed,
    why_unreached,
)


class LatentProbes:
    """Finds the facts about sites.

    Args:
        probes: The look at the model that is taken. Links that are found are added to its own.
    """

    def __init__(self, probes: Probes) -> None:
        self.probes = probes

    def site(self, name: str) -> Site:
        site = self.probes.factors[name]
        plates = self.probes.frames(name)
        names = tuple(plate.name for plate in plates)
        infer = site["infer"]
        facts: dict[str, Any] = {"markov": "_markov_depth" in infer, "enumerated": is_enumerated(site)}
        facts["foreign"] = not site["is_observed"] and self.probes.hides(site)
        if site["is_observed"]:
            kind, categories = kind_of(site["fn"])
            return Site(name, True, names, tuple(site["value"].shape), kind=kind, categories=categories, **facts)
        discrete = bool(support_of(site["fn"]).is_discrete)
        if is_delta(site["fn"]):
            return Site(name, False, names, tuple(site["fn"].shape()), fixed=True, **facts)
        facts["unreached"] = "" if discrete else why_unreached(site.get("example", site))
        kept = self.element_shape(name, names)
        if discrete:
            kind, categories = kind_of(site["fn"])
            facts |= {"fixed": True, "discrete": True, "kind": kind, "categories": categories}
            facts["logits"] = logits_shape(site["fn"])
            facts["distribution"] = None if facts["logits"] is None else type(undressed(site["fn"])).__name__
        if discrete and not site["fn"].has_enumerate_support:
            return Site(name, False, names, kept, self.probes.reached(name), **facts)
        children, couples = self._latent_probe(name, plates)
        facts["unmasked"] = self._is_unmasked(name)
        if not discrete:
            facts["row_plates"] = self._row_plates(name, children)
        return Site(name, False, names, kept, children, couples, **facts)

    def element_shape(self, name: str, plates: tuple[str, ...]) -> tuple[int, ...]:
        """Returns the shape of an element of a latent in unconstrained space: without the axes of these plates."""
        site = self.probes.factors[name]
        one = site.get("example", site)
        plain = support_of(one["fn"]).is_discrete or why_unreached(one)
        whole = one["fn"].shape() if plain else unconstrained_shape(one)
        batch = len(one["fn"].batch_shape)
        dims = {frame.dim for frame in one["cond_indep_stack"] if frame.name in plates}
        return tuple(size for i, size in enumerate(whole) if i - batch not in dims)

    def with_supports(self, sites: dict[str, Site]) -> dict[str, Site]:
        """Says of latents with what others their supports move."""
        sites = dict(sites)
        for name in self._moved_by({name for name, site in self.probes.factors.items() if is_free(site)}):
            sites[name] = replace(sites[name], moving=True)
        for latent in (site.name for site in sites.values() if site.enumerated):
            for name in self._moved_by({latent}):
                sites[name] = replace(sites[name], moving=True, switched=sites[name].switched | {latent})
        return sites

    def _moved_by(self, names: set[str]) -> set[str]:
        """Replaces latents together; returns the continuous ones whose bijections lead elsewhere then."""
        found: set[str] = set()
        for base in self.probes.bases if names else ():
            before = base.unchanged()
            if base.changed(latents=dict.fromkeys(names, lambda _, fresh: fresh)) is None:
                continue
            for name, site in before.items():
                other = base.held.nodes.get(name)
                if site["type"] == "sample" and is_free(site) and other is not None and _moved(site, other):
                    found.add(next((f.name for f in self.probes.families if f.numbers(name) is not None), name))
        return found & set(self.probes.factors)

    def reach_in_turn(self, loop: str) -> bool:
        """Replaces latents of single turns of a loop; tells whether each reaches data of its turn, and none before."""
        plate = self.probes.plates[loop]
        for name in (family.name for family in self.probes.families if loop in family.loops):
            for turn in {0, plate.size // 2, plate.size - 1}:
                chosen = {loop: torch.arange(plate.size) == turn}
                moved = self.probes.changed(latents={name: self._mixed(name, chosen)})
                data = [n for n in self.probes.members(plate) if self.probes.factors[n]["is_observed"]]
                where = [self.probes.rows(moved, n, plate) > 0 for n in data] if moved else []
                first = [int(rows.nonzero()[0]) for rows in where if bool(rows.any())]
                if not first or min(first) != turn:
                    return False
        return True

    def _row_plates(self, name: str, children: frozenset[str]) -> tuple[str, ...]:
        """Replaces half of the entries of a global vector; tells of which plates just those rows move."""
        site, found = self.probes.factors[name], []
        if site["value"].dim() != 1 or len(site["fn"].event_shape) != 1:
            return ()
        for plate in self.probes.plates.values():
            if len(site["value"]) != plate.size or plate.size < 3:
                continue
            torch.manual_seed(6)
            half = _half(plate.size)
            moved = self.probes.changed(latents={name: _replaced(half)})
            rows = (
                [self.probes.rows(moved, n, plate) > 0 for n in children if plate in self.probes.frames(n)]
                if moved
                else []
            )
            if rows and all(bool((row == half).all()) for row in rows):
                found.append(plate.name)
        return tuple(found)

    def _is_unmasked(self, name: str) -> bool | None:
        """Replaces what a mask covers of a latent's prior; tells whether anything depends on that, None without a mask.

        A mask that covers nothing yet is made to by other arguments; if none does, it is taken to cover what data need.
        """
        if site_mask(self.probes.factors[name]) is None:
            return None
        for leaves in ({}, *self._with_gaps()):
            found = [self._depends_under_mask(name, leaves, base) for base in self.probes.bases]
            if any(depends is not None for depends in found):
                return any(found)
        return True

    def _depends_under_mask(self, name: str, leaves: dict[str, Tensor], base: Base) -> bool | None:
        """Tells whether anything depends on what a mask covers of a latent's prior; None if it covers nothing."""
        before = {} if base.changed(leaves) is None else base.last
        mask = site_mask(before[name]) if name in before else None
        if mask is None or bool(mask.all()):
            return None
        if base.changed(leaves, {name: _replaced(~mask)}) is None:
            return True
        pairs = [(before[n]["log_prob"], base.last[n]["log_prob"]) for n in base.factors if n != name]
        return not all(torch.allclose(*pair, rtol=0, atol=base.noise, equal_nan=True) for pair in pairs)

    def _with_gaps(self) -> Iterator[dict[str, Tensor]]:
        """Yields arguments that may stand for less data: flags and counts lowered, numbers that are NaN, in places."""
        for name, leaf in self.probes.held.call.tensors.items():
            places = some_places(leaf, 8)
            if leaf.is_floating_point():
                yield {name: leaf.masked_fill(places, torch.nan)}
            yield {name: torch.where(places, leaf.new_zeros(()), leaf)}

    def _latent_probe(self, name: str, plates: list[Plate]) -> tuple[frozenset[str], frozenset[str]]:
        """Replaces a latent, whole and by halves; returns its children, and along which plates it couples."""
        children = self.probes.reached(name)
        torch.manual_seed(1)
        half = {plate.name: _half(plate.size) for plate in plates}
        couples = set()
        for chosen in (half, {plate: ~rows for plate, rows in half.items()}):  # a chain couples later rows to earlier
            moved = self.probes.changed(latents={name: self._mixed(name, chosen)})
            if moved is None:
                return frozenset(self.probes.factors) - {name}, frozenset(plate.name for plate in plates)
            for plate in plates:
                inside = [n for n in children | {name} if plate in self.probes.frames(n)]
                spared = ~chosen[plate.name]
                if plate.size > 1 and any(bool(self.probes.rows(moved, n, plate)[spared].any()) for n in inside):
                    couples.add(plate.name)
        for plate in plates:
            outside = {n for n in children if plate not in self.probes.frames(n) and not self._follows(n)}
            if outside and not self._find_links(name, plate, outside):
                couples.add(plate.name)
        return children, frozenset(couples)

    def _follows(self, name: str) -> bool:
        """Whether a site is a function of latents, and known along with them."""
        site = self.probes.factors[name]
        return not site["is_observed"] and is_delta(site["fn"])

    def _mixed(self, name: str, chosen: dict[str, Tensor]) -> Change:
        """Replaces the chosen elements of some plates."""
        where = torch.ones((), dtype=torch.bool)
        for plate, rows in chosen.items():
            dim = self.probes.dim(name, self.probes.plates[plate])
            where = where & rows.reshape((-1,) + (1,) * (-dim - 1))
        return _replaced(where.reshape(where.shape + (1,) * len(self.probes.factors[name]["fn"].event_shape)))

    def _find_links(self, name: str, plate: Plate, children: frozenset[str] | set[str]) -> bool:
        """Finds which element of a plate each row of other plates' sites depends on; tells whether on one at most.

        The elements are numbered in binary. Those with a one as their k-th digit are replaced together, then those
        with a zero: a row that depends on a single element moves in one of the two runs, which is that digit of the
        element's number, and a row that depends on two elements moves in both runs for some digit.
        """
        numbers = torch.arange(plate.size)
        found = {
            child: torch.zeros(self.probes.factors[child]["log_prob"].shape, dtype=torch.long) for child in children
        }
        depends = dict.fromkeys(children, torch.tensor(False))
        for digit in range(max(1, (plate.size - 1).bit_length())):
            runs = []
            for value in (0, 1):
                chosen = {plate.name: (numbers >> digit & 1) == value}
                runs.append(self.probes.changed(latents={name: self._mixed(name, chosen)}))
            zeros, ones = runs
            if zeros is None or ones is None or any(bool(((zeros[c] > 0) & (ones[c] > 0)).any()) for c in children):
                return False
            for child in children:
                found[child] += (ones[child] > 0).long() << digit
                depends[child] = (ones[child] + zeros[child]) > 0
        for child in children:
            link = self._link(child, plate, found[child], depends[child])
            if link is None:
                self._note_same(child, plate, found[child], depends[child])
                return False
            self.probes.links.append(link)
        return True

    def _note_same(self, child: str, plate: Plate, elements: Tensor, depends: Tensor) -> None:
        """Notes a plate of a site whose elements each depend on the same one of another plate: the first such plate.

        Of two plates of latents that both inform the same rows, the later joins the former if all these latents stand
        in the same other plates; else each keeps its own.
        """
        for mine in self.probes.frames(child):
            held, theirs = (self.probes.held.indices.get(name) for name in (mine.name, plate.name))
            random = {mine.name, plate.name} & self.probes.held.drawn if mine.size < mine.full_size else set()
            if mine.size != plate.size or mine.full_size != plate.full_size or random or mine.first is not None:
                continue
            together = held is None or theirs is None or torch.equal(torch.as_tensor(held), torch.as_tensor(theirs))
            numbers = spread_out(torch.arange(mine.size), (mine,))
            if together and int(depends.sum()) > 1 and bool(((elements == numbers) | ~depends).all()):
                self._join(mine, plate)

    def _join(self, mine: Plate, plate: Plate) -> None:
        if not mine.also:
            self.probes.same.setdefault(mine.name, plate.name)
        elif self._beside(mine) == self._beside(plate):
            self.probes.same.setdefault(plate.name, mine.name)

    def _beside(self, plate: Plate) -> set[frozenset[str]]:
        """Returns the other plates that latents of a plate stand in."""
        latents = (name for name in self.probes.members(plate) if not self.probes.factors[name]["is_observed"])
        return {frozenset(other.name for other in self.probes.frames(name)) - {plate.name} for name in latents}

    def _link(self, child: str, plate: Plate, elements: Tensor, depends: Tensor) -> Link | None:
        """Finds the argument that holds each row's element, as it stands or counted from one."""
        whole = [leaf for leaf in self.probes.held.call.tensors.items() if not leaf[1].is_floating_point()]
        frames = self.probes.frames(child)
        for offset in (0, -1):
            for count in range(1, len(frames) + 1):
                for rows in combinations(frames, count):
                    for name, leaf in whole:
                        for axes in permutations(range(leaf.dim()), count):
                            cells = self.probes.cells(leaf, axes, rows)
                            for column in range(0 if cells is None else cells.shape[-1]):
                                numbers = spread_out(cells[..., column], rows)  # type: ignore[index]
                                if bool(((numbers + offset == elements) | ~depends).all()):
                                    names = tuple(row.name for row in rows)
                                    link = Link(names, plate.name, name, axes, column, offset)
                                    if self._obeys(child, link, rows, plate, elements, depends):
                                        return link
        return None

    def _obeys(
        self, child: str, link: Link, rows: tuple[Plate, ...], plate: Plate, elements: Tensor, depends: Tensor
    ) -> bool:
        """Points one row that depends on an element to another; tells whether its density moves."""
        places = depends.expand(elements.shape).nonzero()
        if plate.size < 2 or not len(places):
            return True
        leaf = self.probes.held.call.tensors[link.argument].clone()
        place = places[len(places) // 2]
        where = []
        for row in rows:
            at = int(place[row.dim])
            indices = self.probes.held.indices.get(row.name)
            axis = link.axes[link.rows.index(row.name)]
            picked = leaf.shape[axis] == row.full_size > row.size and indices is not None
            where.append(int(indices[at]) if picked else at)  # type: ignore[index]
        cells = leaf.movedim(link.axes, tuple(range(len(link.axes))))[tuple(where)]
        other = (int(elements[tuple(place)]) + 1) % plate.size - link.offset
        if cells.dim() == 0:
            leaf.movedim(link.axes, tuple(range(len(link.axes))))[tuple(where)] = other
        else:
            cells.view(-1)[link.column] = other
        moved = self.probes.changed(leaves={link.argument: leaf})
        return moved is not None and bool(moved[child][tuple(place)] > 0)


def _replaced(where: Tensor) -> Change:
    """Replaces marked entries of a latent."""
    return lambda value, fresh: torch.where(where.to(value.device), fresh, value)


def _moved(site: Any, other: Any) -> bool:
    """Tells whether bijections of two runs of a site take a value to different places."""
    if why_unreached(site):
        return False
    raw = site["value"].new_full(unconstrained_shape(site), 0.7)
    images = [bijection(each)(raw) for each in (site, other)]
    return not torch.equal(*images)


def _half(size: int) -> Tensor:
    """Marks about half the elements, at random."""
    rows = torch.zeros(size, dtype=torch.bool)
    rows[torch.randperm(size)[: max(1, size // 2)]] = True
    return rows
