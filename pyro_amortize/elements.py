"""What one element of a latent is: the plates along which data tell its elements apart, and its own dimensions.

A latent may be written with its dimensions as a plate, ``with plate("rows"), plate("factors"): z``, where its data have
the first plate and not the second. Such a plate is the latent's own: its elements belong to one row together, as those
of an event do.
"""

from __future__ import annotations

import math

from pyro_amortize.levels import Ways
from pyro_amortize.structure import Site, Structure


class Elements:
    """Finds the plates that are latents' own.

    Args:
        facts: The model's structure, every plate a level of its own.
    """

    def __init__(self, facts: Structure) -> None:
        self.facts, self.ways = facts, Ways(facts)

    def own(self) -> dict[str, tuple[str, ...]]:
        """Returns the plates of each latent that are its own, where it has any.

        Of two latents that meet crosswise, as scores of rows and loadings of columns do, one is told apart by its rows;
        the other is shared by these, and its plates stay as they are.
        """
        kept = {site.name: self._kept(site) for site in self.facts.latents if not site.enumerated}
        found = {name: plates for name, plates in kept.items() if plates != self._plates(name)}
        shared = {name for name in found if any(self._is_shared(name, other, kept) for other in kept)}
        return {
            name: tuple(plate for plate in self.facts.sites[name].plates if plate not in plates)
            for name, plates in found.items()
            if name not in shared
        }

    def _plates(self, name: str) -> frozenset[str]:
        return frozenset(self.facts.sites[name].plates)

    def _kept(self, site: Site) -> frozenset[str]:
        """Returns the plates along which data tell elements of a latent apart, all its plates where none do."""
        whole = frozenset(site.plates)
        data = [other for name in self.facts.informing(site.name) if (other := self.facts.sites[name]).observed]
        levels = {level for other in data if (level := self._level(frozenset(other.plates), whole))}
        kept = frozenset().union(*levels)
        own = [self.facts.plates[plate] for plate in whole - kept]
        if kept not in levels or any(plate.first is not None or plate.size < plate.full_size for plate in own):
            return whole
        return kept

    def _level(self, rows: frozenset[str], whole: frozenset[str]) -> frozenset[str]:
        """Returns the plates of a latent of which each of some rows belongs to one element."""
        if self.ways.covers(rows, whole):
            return whole
        if rows & whole:
            return rows & whole
        linked = frozenset(plate for plate in whole if self.ways.covers(rows, {plate}))
        return linked if self.ways.covers(rows, linked) else frozenset()

    def _is_shared(self, name: str, other: str, kept: dict[str, frozenset[str]]) -> bool:
        """Whether a latent meets another crosswise, and it is the other that rows tell apart."""
        one, two = self.facts.sites[name], self.facts.sites[other]
        crosswise = not self.ways.covers(kept[name], kept[other]) and not self.ways.covers(kept[other], kept[name])
        if not (crosswise and one.children & two.children and self._is_told_apart(two, kept[other])):
            return False
        return self._rank(other, kept[other]) > self._rank(name, kept[name])

    def _is_told_apart(self, site: Site, kept: frozenset[str]) -> bool:
        return any(
            self.ways.covers(self.facts.sites[name].plates, kept)
            for name in self.facts.informing(site.name)
            if self.facts.sites[name].observed
        )

    def _rank(self, name: str, plates: frozenset[str]) -> tuple[bool, int, int]:
        """Orders latents by how much their plates are rows: subsampled, first in the data, long."""
        subsampled = any(self.facts.plates[plate].size < self.facts.plates[plate].full_size for plate in plates)
        axes = [
            axis
            for source in self.facts.sources
            for plate, axis in zip(source.plates, source.axes or (), strict=False)
            if plate in plates and source.reaches & self.facts.informing(name)
        ]
        return subsampled, -min(axes, default=0), math.prod(self.facts.plates[plate].full_size for plate in plates)
