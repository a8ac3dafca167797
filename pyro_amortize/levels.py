"""How data at one level of a model's plates reach latents at another.

A *level* is the set of plates around a site: the latents of schools stand at {schools}, their students' marks at
{schools, students}. Data come to a latent from finer levels by pooling over plates, innermost first, or along a link
(an index such as ``school[student]``); from coarser levels they are spread. The ways to one level form a tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pyro_amortize.structure import Link, Site, Source, Structure

Plates = frozenset[str]


@dataclass(frozen=True)
class Level:
    """Data at one level of plates, on their way to a block's own level, which is the last of its levels.

    Attributes:
        plates: The plates, outer to inner.
        sources: The data that have these plates.
        sites: Observed sites here. A row without a value at any of them, here and below, is left out when pooling.
        into: Position of the level that these are handed to; None for the last.
        pooled: Whether rows are pooled on that way; if not, they are spread.
        link: The index that the way follows, if it follows one.
        in_order: Whether the rows that are pooled stand in an order that matters.
        width: Features that the sources give after preparation.
    """

    plates: tuple[str, ...]
    sources: tuple[Source, ...] = ()
    sites: tuple[str, ...] = ()
    into: int | None = None
    pooled: bool = False
    link: Link | None = None
    in_order: bool = False
    width: int = 0


@dataclass(eq=False)
class _Node:
    plates: Plates
    sources: list[Source] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    pooled: bool = False
    link: Link | None = None
    in_order: bool = False
    handed: list[_Node] = field(default_factory=list)


class Ways:
    """The ways between the levels of a model.

    Args:
        facts: The model's structure.
    """

    def __init__(self, facts: Structure) -> None:
        self.links = facts.links
        self.order = {name: plate.order for name, plate in facts.plates.items()}
        self.series = {name for name, plate in facts.plates.items() if plate.series}

    def covers(self, level: Iterable[str], target: Iterable[str]) -> bool:
        """Tells whether each row of a level belongs to one element of the target level."""
        return self._covers(frozenset(level), frozenset(target), frozenset())

    def _covers(self, level: Plates, target: Plates, taken: frozenset[Link]) -> bool:
        if target <= level:
            return True
        return any(self._covers(_along(level, link), target, taken | {link}) for link in self._open(level, taken))

    def _open(self, level: Plates, taken: frozenset[Link] = frozenset()) -> list[Link]:
        return [x for x in self.links if x not in taken and x.to not in level and set(x.rows) <= level]

    def step(self, level: Plates, target: Plates) -> tuple[Plates, Link | None]:
        """Returns the next level on the way to a coarser one, and the link that leads there.

        A link is taken only where no plate can be dropped; but towards a whole data set, which all levels cover, rows
        go by their groups first.
        """
        for plate in sorted(level - target, key=self.order.__getitem__, reverse=True):
            if target and self.covers(level - {plate}, target):
                return level - {plate}, None
            for link in self._open(level):
                if plate in link.rows and self.covers(_along(level, link), target):
                    return _along(level, link), link
            if self.covers(level - {plate}, target):
                return level - {plate}, None
        raise AssertionError(f"no way from {set(level)} to {set(target)}")

    def levels(
        self, target: Iterable[str], sources: list[Source], sites: list[Site], contexts: list[Plates]
    ) -> tuple[Level, ...]:
        """Lays out how data reach a level.

        Args:
            target: The plates of the block.
            sources: All data that inform the block.
            sites: All observed sites that do.
            contexts: Coarser levels whose own data the block is to see as well.
        """
        goal = frozenset(target)
        root = self._tree(goal, sources, sites)
        for context in contexts:
            tree = self._tree(context, [s for s in sources if not self.covers(context, s.level)], sites)
            self._spread(tree, root)
        nodes = list(_post_order(root))
        position = {id(child): i for i, node in enumerate(nodes) for child in node.handed}
        return tuple(
            Level(
                tuple(sorted(node.plates, key=self.order.__getitem__)),
                tuple(node.sources),
                tuple(node.sites),
                position.get(id(node)),
                node.pooled,
                node.link,
                node.in_order,
            )
            for node in nodes
        )

    def _tree(self, goal: Plates, sources: list[Source], sites: list[Site]) -> _Node:
        """Pools all that covers the goal; data of other plates join the observed sites that they stand beside."""
        nodes = {goal: _Node(goal)}

        def node(level: Plates) -> _Node:
            if level not in nodes:
                into, link = self.step(level, goal)
                nodes[level] = _Node(level, pooled=True, link=link, in_order=level - into <= self.series)
                node(into).handed.append(nodes[level])
            return nodes[level]

        for site in sites:
            if self.covers(site.plates, goal):
                node(frozenset(site.plates)).sites.append(site.name)
        for source in sources:
            if self.covers(source.level, goal):
                node(frozenset(source.level)).sources.append(source)
        for source in sources:
            level = frozenset(source.level)
            if not self.covers(level, goal):
                beside = [n for n in nodes.values() if n.sites and self.covers(n.plates, level)]
                for place in [nodes[goal]] if self.covers(goal, level) else beside:
                    self._spread(_Node(level, [source]), place)
        return nodes[goal]

    def _spread(self, node: _Node, place: _Node) -> None:
        """Hands a coarser node to a finer one, back along the links that lie between them."""
        steps = []
        level = place.plates
        while level != node.plates:
            coarser, link = self.step(level, node.plates)
            steps.append((level, link))
            level = coarser
        for finer, link in reversed(steps):
            if link is not None:
                node.link = link
                into = _Node(finer)
                into.handed.append(node)
                node = into
        place.handed.append(node)


def _along(level: Plates, link: Link) -> Plates:
    return level - set(link.rows) | {link.to}


def _post_order(node: _Node) -> Iterator[_Node]:
    for child in node.handed:
        yield from _post_order(child)
    yield node
