"""How an encoder sees data of other plates than its latents': pooled, side by side, or told of which they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from pyro_amortize.levels import Ways
from pyro_amortize.structure import Site, Source, Structure
from pyro_amortize.verdict import related_to


class Sight:
    """Tells which elements of data encoders have to tell apart, since the model does.

    Args:
        facts: The model's structure.
        ways: The ways between its levels.
        is_by_table: Tells of a latent whether a table holds its parameters.
    """

    def __init__(self, facts: Structure, ways: Ways, is_by_table: Callable[[Site], bool]) -> None:
        self.facts, self.ways, self.is_by_table = facts, ways, is_by_table

    def whole(self, source: Source, target: tuple[str, ...], together: dict[str, Site]) -> Source:
        """Makes plates of data features of a row of the target's, where pooling over them would lose which is which."""
        if not target or not set(target) <= set(source.plates):
            return source
        sizes = tuple(
            (name, self.facts.plates[name].size)
            for name, index in zip(source.plates, source.through or (None,) * len(source.plates), strict=True)
            if name not in target and index is None and self._is_told_apart(name, target, together)
        )
        return replace(source, whole=sizes, labels=source.labels * math.prod(size for _, size in sizes))

    def _is_told_apart(self, name: str, target: tuple[str, ...], together: dict[str, Site]) -> bool:
        """Whether elements of a plate of data are not alike: the model knows them, or has a table for them."""
        plate = self.facts.plates[name]
        if plate.first is not None or plate.size < plate.full_size:
            return False
        if self.facts.hidden[name] or any(name in site.own for site in together.values()):
            return True
        return self._holds_table(name, target, related_to(together, self.facts))

    def _holds_table(self, plate: str, target: tuple[str, ...], related: set[str]) -> bool:
        """Whether a latent that informing data depend on has a table with a row for each element of a plate."""
        return any(
            plate in site.plates and not set(target) & set(site.plates) and site.children & related
            for site in self.facts.latents
            if self.is_by_table(site)
        )

    def indices(self, target: tuple[str, ...], together: dict[str, Site], rows: list[Site]) -> list[Source]:
        """Returns the indices that tell to which row of a table each row of data belongs."""
        related, found = related_to(together, self.facts), list[Source]()
        for link in self.facts.links:
            there = any(set(link.rows) <= set(row.plates) and self.ways.covers(row.plates, target) for row in rows)
            if target and there and self._holds_table(link.to, target, related):
                found += [s for s in self.facts.sources if s.name == link.argument and s.labels and s not in found]
        return found
