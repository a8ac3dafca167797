"""Whether amortizing can be lossless, judged from a model's structure alone, before training.

In a simple hierarchical model, p(theta) prod_n p(z_n | theta) p(x_n | z_n, theta), a function of x_n alone can reach
the mean-field optimum of every datum (Margossian & Blei, UAI 2024, theorem 3.4). With nested groups a datum is all
that stands inside an element of the outermost plate of local latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from pyro_amortize.levels import Level, Ways
from pyro_amortize.plan import Reach, Verdict
from pyro_amortize.structure import Site, Source, Structure

MOST_NEIGHBOURS = 8
"""Most neighbours on a side that advice names; beyond, rows are taken to be coupled all together."""


class Judge:
    """Judges the blocks of a plan.

    Args:
        facts: The model's structure.
        ways: The ways between its levels.
        sources: Its data.
        has_table: Tells of a latent whether a table holds its parameters.
        by_function: Tells of a latent whether a function of the user's own says what its encoder sees.
    """

    def __init__(
        self,
        facts: Structure,
        ways: Ways,
        sources: list[Source],
        has_table: Callable[[Site], bool],
        by_function: Callable[[Site], bool],
    ) -> None:
        self.facts, self.ways, self.sources = facts, ways, sources
        self.has_table, self.by_function = has_table, by_function

    def judge(
        self,
        sites: list[Site],
        together: dict[str, Site],
        levels: tuple[Level, ...],
        missing: set[str],
        reach: Reach | None = None,
    ) -> Verdict:
        """Returns the verdict on a block.

        Args:
            sites: Its latents.
            together: All local latents whose posteriors depend on each other, these among them.
            levels: The data that its encoder sees.
            missing: The names of other data that were found to inform it.
            reach: How far it sees beside an element's own data.
        """
        verdict = self._judged(sites, together, levels, missing, reach)
        outer = self._datum(together)[:1]
        return replace(verdict, factorizes=verdict.factorizes and not self.couplings(together) & set(outer))

    def overall(self, verdicts: list[Verdict], latents: list[Site], tables: list[Site]) -> Verdict:
        """Returns the verdict on a whole plan, from those on its encoded blocks.

        Args:
            verdicts: Those on the blocks that are amortized.
            latents: All latents that have a block.
            tables: Those among them that are given a table.
        """
        for closable in (False, None, True):
            chosen = [verdict for verdict in verdicts if verdict.closable is closable]
            if chosen:
                return Verdict(closable, chosen[0].reason, all(verdict.factorizes for verdict in verdicts))
        for site in latents:
            if site.row_plates:
                return Verdict(
                    False,
                    f"'{site.name}' is drawn for all rows of '{site.row_plates[0]}' together, as in a process, so a "
                    f"row's posterior needs all data: it has a table. If rows are independent, draw it in the plate",
                    factorizes=False,
                )
        if not any(site.observed for site in self.facts.sites.values()):
            return Verdict(
                None,
                "no site of the model is observed, so there are no data to learn from, and every block is a table; "
                "pass the data to their site, pyro.sample('x', ..., obs=x)",
            )
        return Verdict(True, f"nothing is amortized: {self._why_tables(latents, tables)}")

    def _why_tables(self, latents: list[Site], tables: list[Site]) -> str:
        """Says why no block of a plan has an encoder."""
        local = [site for site in latents if site.plates and site not in tables]
        if not latents:
            return "no data depend on any latent that is to be guided"
        if local:
            return (
                f"no rows of data belong to single elements of '{local[0].name}' (plate '{local[0].plates[-1]}') with "
                f"all their data in this call, so it has a table"
            )
        if tables:
            return "every block is a table, as encoder= says"
        return (
            f"all latents stand outside the plates of the data, and have a table of one row; to answer for other data "
            f"sets too, give one an encoder, encoder={{'{latents[0].name}': DeepSets()}}"
        )

    def couplings(self, together: dict[str, Site]) -> set[str]:
        """Returns the plates along which posteriors of elements need each other's data."""
        related = related_to(together, self.facts)
        found = {plate for source in self.sources if source.reaches & related for plate in source.couples}
        return found.union(*(site.couples for site in together.values()))

    @staticmethod
    def _datum(together: dict[str, Site]) -> tuple[str, ...]:
        """The plates whose elements are the data: the outermost of the latents'."""
        return min((site.plates for site in together.values() if site.plates), key=len, default=())

    def _judged(
        self,
        sites: list[Site],
        together: dict[str, Site],
        levels: tuple[Level, ...],
        missing: set[str],
        reach: Reach | None,
    ) -> Verdict:
        related = related_to(together, self.facts)
        informing = [source for source in self.sources if source.reaches & related]
        plates = {plate for site in together.values() for plate in site.plates}
        plates |= {plate for level in levels if level.sources for plate in level.plates}
        coupled = self._summed_over_rows(together) or self._coupled(sites[0], together, informing, reach)
        coupled = coupled or self._crossed(together, levels)
        if coupled:
            return coupled
        shown = {source.name for level in levels for source in level.sources}
        if missing:
            return Verdict(False, f"inputs leaves out '{min(missing)}', which informs '{sites[0].name}'")
        if self.by_function(sites[0]):
            return Verdict(
                None, f"whether inputs= hands over all data of a row of '{sites[0].name}' is the function's own matter"
            )
        flat = next((site for site in sites if site.flat), None)
        if flat is not None:
            return Verdict(
                None,
                f"no value of '{flat.name}' that was tried moves the density of '{min(flat.children)}', so it could "
                f"not be told what informs '{flat.name}': a mask covers all of it, the likelihood is flat at values "
                f"of the prior, or floating point lacks the digits",
            )
        unclear = self._unclear(sites, levels, plates, shown, reach)
        if unclear:
            return unclear
        if not sites[0].plates:
            return Verdict(True, f"the encoder of '{sites[0].name}' sees all data")
        if reach and reach.plate in self.couplings(together):
            sees = "the whole series" if reach.radius is None else f"all within {reach.radius} of an element"
            return Verdict(True, f"the encoder of '{sites[0].name}' sees {sees}, on which alone its posterior depends")
        outer = "/".join(self._datum(together))
        return Verdict(
            True, f"rows of '{outer}' are independent given the globals, and the encoder sees all of a row's data"
        )

    def _sees(self, plate: str, site: Site, reach: Reach | None, radius: int | None = None) -> bool:
        """Whether the encoder of a latent sees along a plate as far as it has to, ``radius``; None for all of it."""
        if plate not in site.plates:
            return self.facts.plates[plate].series  # pooled, and in order
        if reach is None or reach.plate != plate:
            return False
        return reach.radius is None or (radius is not None and radius <= reach.radius)

    def _summed_over_rows(self, together: dict[str, Site]) -> Verdict | None:
        """Finds a latent that is summed out for several rows at once."""
        local = [site for site in together.values() if site.plates and not site.enumerated]
        for site in together.values():
            for other in local if site.enumerated else ():
                if not set(other.plates) & set(site.plates):
                    return Verdict(
                        False,
                        f"'{site.name}' is summed out, and stands outside plate '{other.plates[0]}' of '{other.name}', "
                        f"so a row's posterior needs all rows' data",
                        factorizes=False,
                    )
        return None

    def _coupled(
        self, site: Site, together: dict[str, Site], informing: list[Source], reach: Reach | None
    ) -> Verdict | None:
        """Finds elements of one plate whose posteriors need each other's data."""
        for other in together.values():
            for plate in sorted(other.couples) if other.plates else ():
                if self._sees(plate, site, reach):
                    continue
                in_order = self.facts.plates[plate].series or (reach is not None and reach.plate == plate)
                via = f" through '{min(other.children)}'" if other.children and not in_order else ""
                fix = (
                    "a window narrows that gap, the more the wider it is (encoder=Window(radius)), and "
                    "encoder=Recurrent() sees the whole series"
                    if in_order
                    else f"a function that adds some of them narrows the gap, "
                    f"inputs={{'{other.name}': lambda ...: ...}}; where rows stand in order, so does "
                    f"encoder=Window(radius), and encoder=Recurrent() sees them all"
                )
                return Verdict(
                    False,
                    f"elements of '{other.name}' are coupled{via or f' along {plate!r}'}, so a row's posterior needs "
                    f"other rows' data; {fix}",
                )
        for source in informing:
            for plate in sorted(source.couples):
                offsets = source.offsets[source.plates.index(plate)]
                radius = max(map(abs, offsets), default=None)
                if self._sees(plate, site, reach, radius):
                    continue
                reason = (
                    f"a row of '{source.name}' enters the densities of other rows of plate '{plate}', so a row's "
                    f"posterior needs its neighbours' data"
                )
                if self.by_function(site):
                    return Verdict(None, f"{reason}; whether inputs= holds them could not be told")
                fix = f"add them, inputs={{'{site.name}': lambda ...: torch.stack([x.roll(1, 0), x], -1)}}, say"
                if radius is not None and 0 < radius <= MOST_NEIGHBOURS:
                    fix += f", or take encoder=Window({radius}), which sees them"
                return Verdict(False, f"{reason}; {fix}")
        return None

    def _unclear(
        self, sites: list[Site], levels: tuple[Level, ...], plates: set[str], shown: set[str], reach: Reach | None
    ) -> Verdict | None:
        """Finds what the model knows of a row beside its data, and what could not be tried."""
        facts = self.facts
        plates = {plate for plate in plates if not self._sees(plate, sites[0], reach)}  # where it can count rows
        told = {link.to for link in facts.links if link.argument in shown and facts.tells_apart(link)}
        for plate in sorted(plates):
            if facts.hidden[plate] and plate not in told:
                pooled = plate not in sites[0].plates and any(x.pooled and plate in x.plates for x in levels)
                whole = (
                    f"pooling loses that; pass an element's rows whole, inputs={{'{sites[0].name}': lambda ...: ...}}"
                )
                return Verdict(
                    False,
                    f"rows of '{plate}' with equal data have different densities: the model knows something of a row "
                    f"that no tensor among the arguments carries (a closure, a data frame, the index, a parameter a "
                    f"row); "
                    f"{whole if pooled else 'pass it as an argument'}",
                )
        sizes = {facts.plates[plate].size for plate in plates}
        untold = [name for name in facts.indistinct if sizes & set(facts.shapes[name]) and name not in shown]
        if untold:
            return Verdict(
                None,
                f"all rows of '{untold[0]}' are equal, so it could not be told whether it informs '{sites[0].name}'; "
                f"if it does, name it in inputs=",
            )
        tried = {plate for source in facts.sources for plate in source.plates} | {link.to for link in facts.links}
        for plate in sorted(plates & tried):
            if facts.hidden[plate] is None and facts.plates[plate].size > 1:
                return Verdict(
                    None, f"it could not be tried whether rows of '{plate}' with equal data have equal densities"
                )
        return None

    def _crossed(self, together: dict[str, Site], levels: tuple[Level, ...]) -> Verdict | None:
        """Finds two latents of which neither's elements hold the other's, yet whose posteriors meet.

        Args:
            together: The local latents whose posteriors depend on each other.
            levels: The data that the encoder of these sees.
        """
        local = [site for site in together.values() if site.plates]
        tables = [site for site in self.facts.latents if site.plates and self.has_table(site)]
        for one in (site for site in local if not self.has_table(site)):
            for other in dict.fromkeys([*local, *tables]):
                apart = not self.ways.covers(one.plates, other.plates) and not self.ways.covers(
                    other.plates, one.plates
                )
                meet = sorted(
                    (one.children & other.children) | ({one.name, other.name} & (one.children | other.children))
                )
                if apart and meet:
                    mine, theirs = "/".join(one.plates), "/".join(other.plates)
                    if self.has_table(other) and (self.by_function(one) or not self._is_pooled(one, other, levels)):
                        continue
                    if self.has_table(other):
                        return Verdict(
                            False,
                            f"pooling over the rows of '{mine}' loses which element of '{other.name}' (plate "
                            f"'{theirs}') each belongs to; pass them whole, inputs={{'{one.name}': lambda ...: ...}}",
                        )
                    small, large = sorted((one, other), key=self._num_elements)
                    return Verdict(
                        False,
                        f"'{one.name}' (plate '{mine}') and '{other.name}' (plate '{theirs}') meet crosswise at "
                        f"'{meet[0]}', so the posterior of an element of '{mine}' needs the data of all of '{theirs}'; "
                        f"a table for the smaller side, encoder={{'{small.plates[-1]}': Table()}}, leaves "
                        f"'{large.name}' to amortize",
                        factorizes=False,
                    )
        return None

    def _num_elements(self, site: Site) -> int:
        return math.prod(self.facts.plates[plate].full_size for plate in site.plates)

    def _is_pooled(self, one: Site, other: Site, levels: tuple[Level, ...]) -> bool:
        """Whether the encoder of a latent pools over rows of other elements of another, and is not told of which."""
        pooled = {plate for level in levels if level.sources for plate in level.plates}
        seen = {source.name for level in levels for source in level.sources}
        told = {link.to for link in self.facts.links if link.argument in seen}
        return any(self.ways.covers(pooled, {plate}) for plate in set(other.plates) - set(one.plates) - told)


def one_answer(sites: list[Site], judged: Verdict) -> Verdict:
    """Returns the verdict on a block with one row of parameters for all elements, from that on an encoder in its place.

    Args:
        sites: Its latents, which stand in plates.
        judged: What an encoder could reach.
    """
    plates = "/".join(sites[0].plates)
    reason = f"encoder=Constant() gives '{sites[0].name}' one answer for all rows of '{plates}', whatever their data"
    return replace(judged, closable=False, reason=reason)


def related_to(latents: dict[str, Site], facts: Structure) -> set[str]:
    """The latents and the sites whose densities depend on them, also through discrete latents that none of them is."""
    found, front = set(latents), set().union(*(site.children for site in latents.values()))
    while front:
        name = front.pop()
        site = facts.sites[name]
        if name not in found and site.fixed and (site.foreign or site.enumerated):
            front |= site.children - found
        found.add(name)
    return found
