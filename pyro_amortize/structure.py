"""Facts about a model: its sites and plates, where data enter, and what depends on what."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_amortize.excerpt import Part


@dataclass(frozen=True)
class Plate:
    """A vectorized plate as the example call had it: ``size`` elements of ``full_size``, drawn at random or given.

    A loop over sites (``z_0``, ``z_1``, ...) counts as one: ``first`` is then the number of its first turn, and
    ``series`` says that its turns come in an order that matters, as those of a sequential plate do not. ``also`` names
    what else has its elements: plates, and events with a row for each.
    """

    name: str
    dim: int = field(compare=False)  # of its first site; others may have it at another
    size: int
    full_size: int
    at_random: bool = False
    first: int | None = None
    series: bool = False
    also: tuple[str, ...] = field(default=(), compare=False)

    @property
    def order(self) -> tuple[bool, int, str]:
        """Sorts plates outer to inner; a series stands inside the plate of which each element has one."""
        return self.series, self.dim, self.name


@dataclass(frozen=True)
class Family:
    """Sites ``z_0``, ``z_1``, ..., one for every turn of a loop, or of loops inside each other.

    Attributes:
        texts: What stands before, between and after the numbers in their names.
        loops: The loop that each number counts.
    """

    texts: tuple[str, ...]
    loops: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of all its sites together: ``z_*``."""
        return "*".join(self.texts)

    def numbers(self, site: str) -> tuple[int, ...] | None:
        """Returns the numbers in the name of a site of the family; None for other sites."""
        match = self._pattern.fullmatch(site)
        return tuple(int(number) for number in match.groups()) if match else None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(r"(\d+)".join(re.escape(text) for text in self.texts))


def plates_of(sites: Iterable[Any], same: Mapping[str, str] | None = None) -> dict[str, Plate]:
    """Returns the vectorized plates around sample sites; where a plate has no size of its own, its sites tell it.

    Args:
        sites: The sites.
        same: Plates that are to have the name of another.
    """
    found: dict[str, Plate] = {}
    for site in sites:
        batch = getattr(site["fn"], "batch_shape", ())  # a plate's own site has none
        for frame in site["cond_indep_stack"]:
            if frame.vectorized:
                there = batch[frame.dim] if len(batch) >= -frame.dim else 1
                size = max(int(frame.size), there if int(frame.size) < 0 else 0)
                full_size = max(int(frame.full_size or size), size)
                name = (same or {}).get(frame.name, frame.name)
                if name not in found or found[name].size < size:
                    found[name] = Plate(name, frame.dim, size, full_size)
    return found


@dataclass(frozen=True)
class Site:
    """A sample site.

    Attributes:
        plates: Names, outer to inner.
        own: Plates around it that are dimensions of an element (latents), as those of an event are.
        shape: Of one element in unconstrained space, axes of ``plates`` removed (latents); of its values (observed).
        children: Sites whose density depends on this latent, itself apart.
        couples: Plates along which one element of this latent moves the densities of others.
        foreign: Whether it is a latent that the model hides from its guide (``poutine.block``).
        fixed: Whether it has no free continuous value: a ``Delta``, or discrete.
        kind: What its values are: "real", "count", "level" (a count with an upper bound), "category" or "binary";
            ``categories`` counts them.
        mask: Whether a mask covers some of its values (observed), and where that stands: None for no mask, "" where
            only a run of the model tells, else the argument that is the mask, or whose NaN it covers.
        row_plates: Plates of each of whose rows the density depends on one entry of this latent, drawn outside them
            for all rows together.
        unmasked: Whether anything depends on a latent where a mask covers its prior; None if no mask was seen to.
        enumerated: Whether it is a discrete latent that is marked to be summed out.
        logits: Shape of the logits behind one entry of its value (discrete latents): (categories,) of a
            ``Categorical``, () of others; None if it has no logits.
        distribution: The name of its distribution, if it has logits.
        moving: Whether its support depends on another latent.
        switched: Enumerated latents that its support depends on.
        unreached: Why no normal can be taken to where it lives (continuous latents); "" if one can.
        flat: Whether no value of this latent that was tried moved any data's density, though it may inform them.
    """

    name: str
    observed: bool
    plates: tuple[str, ...]
    shape: tuple[int, ...]
    children: frozenset[str] = frozenset()
    couples: frozenset[str] = frozenset()
    foreign: bool = False
    fixed: bool = False
    discrete: bool = False
    enumerated: bool = False
    markov: bool = False
    kind: str = "real"
    categories: int = 0
    mask: str | None = None
    row_plates: tuple[str, ...] = ()
    unmasked: bool | None = None
    logits: tuple[int, ...] | None = None
    distribution: str | None = None
    moving: bool = False
    switched: frozenset[str] = frozenset()
    unreached: str = ""
    own: tuple[str, ...] = ()
    flat: bool = False


WIDEST = 16
"""Most features of a label."""


@dataclass(frozen=True)
class Labels:
    """Whole numbers that a model looks something up by: ``count`` of them, from ``first`` on."""

    first: int
    count: int

    @property
    def width(self) -> int:
        """How many features stand for a label: as many as there are labels, as one-hot, but not more than a few."""
        return min(self.count, WIDEST)


Entered = tuple[tuple[str, tuple[int, ...] | None], ...]
"""Sites that a cell enters, and which entries of each in a row (other plates by name, then events); None for all."""


@dataclass(frozen=True)
class Source:
    """Data with a cell for every element of some plates: an argument, or the values of an observed site.

    Attributes:
        name: The argument as one writes it (``batch['y']``), or the site.
        plates: The plates, outer to inner.
        axes: The axis of each plate in the argument; None for a site, whose plates stand at their own dims.
        dims: The plates' own dims.
        shape: Of one cell.
        reaches: Sites whose density it enters.
        through: For each plate the argument that holds the place of an element's cell (``x[index]``), if one does.
        indexed: Plates whose subsample the model picks out of it, rather than using it as it stands.
        couples: Plates along which one cell of it moves the densities of other elements.
        offsets: For each plate how far from a cell's own element those are that it moves.
        feeds: The observed site whose values it is.
        missing: Whether some of it may be missing: it holds NaN, or a mask covers it.
        by_cell: Whether the mask covers it cell by cell, as it covers the site's values; if not, row by row.
        enters: What each number of a cell enters, where they enter not all the same; empty if they do.
        drawn: Whether it is a discrete latent, whose value the guide draws before, or a call holds.
        ahead: Whether the model comes to that only later.
        whole: Plates that are features of a cell, first of all its axes, and their sizes: told apart, not pooled over.
        labels: For each column of a cell the labels that it holds, None for numbers; empty if there are none.
    """

    name: str
    plates: tuple[str, ...]
    axes: tuple[int, ...] | None
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    reaches: frozenset[str]
    through: tuple[str | None, ...] = ()
    indexed: frozenset[str] = frozenset()
    couples: frozenset[str] = frozenset()
    offsets: tuple[tuple[int, ...], ...] = ()
    feeds: str | None = None
    kind: str = "real"
    categories: int = 0
    missing: bool = False
    by_cell: bool = False
    drawn: bool = False
    ahead: bool = False
    whole: tuple[tuple[str, int], ...] = ()
    labels: tuple[Labels | None, ...] = ()
    enters: tuple[Entered, ...] = ()

    @property
    def level(self) -> tuple[str, ...]:
        """The plates of whose elements cells are told apart."""
        gone = dict(self.whole)
        return tuple(plate for plate in self.plates if plate not in gone)

    @property
    def cell(self) -> tuple[int, ...]:
        """The shape of one cell, what stands whole in it included."""
        return (*(size for _, size in self.whole), *self.shape)

    @property
    def width(self) -> int:
        """How many features a cell gives after preparation."""
        size = math.prod(self.cell)
        own = size * (self.categories if self.kind == "category" else 1)
        own = sum(labels.width if labels else 1 for labels in self.labels) if self.labels else own
        return own + (size if self.missing else 0)


@dataclass(frozen=True)
class Link:
    """Rows that belong to one element each of another plate, as ``b[group]`` says.

    Attributes:
        rows: The plates of the rows, outer to inner.
        to: The plate whose elements they belong to.
        argument: What holds the number of each row's element, less ``offset``.
        axes: The axis of each of the rows' plates in the argument.
        column: Which number of a row it is, where the argument holds several.
    """

    rows: tuple[str, ...]
    to: str
    argument: str
    axes: tuple[int, ...]
    column: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Structure:
    """Facts about a model.

    Attributes:
        families: Sites that are numbered by loops; ``sites`` holds each family as one site.
        hidden: Whether elements of a plate with equal data still differ; None where this could not be tried.
        indistinct: Arguments whose rows are all equal, so that nothing can be told of them.
        params: Names of the model's own parameters in the param store.
        shapes: Of the arguments that are tensors.
        empty: Arguments that are None.
        parameters: The names of all arguments.
        same: Plates whose elements are those of others, and which; these are not in ``plates``.
        events: Observed events that have rows in a plate, and their axis, from the right.
        carried: Arguments that are the values of observed sites, or differ from them by what the model subtracts, and
            which.
        part: The rows that were examined, if not all; the sizes of plates and ``shapes`` are those of all.
    """

    sites: dict[str, Site]
    plates: dict[str, Plate]
    sources: tuple[Source, ...]
    links: tuple[Link, ...]
    families: tuple[Family, ...]
    hidden: dict[str, bool | None]
    indistinct: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    empty: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)
    carried: dict[str, frozenset[str]] = field(default_factory=dict)
    part: Part | None = field(default=None, compare=False)

    def site_of(self, name: str) -> Site:
        """Returns a site by its name in the model, or the family that it is of."""
        family = next((family for family in self.families if family.numbers(name) is not None), None)
        return self.sites[name] if name in self.sites or family is None else self.sites[family.name]

    def has(self, name: str) -> bool:
        """Whether the model has a site of this name, or a family of loops that it is of."""
        return name in self.sites or any(family.numbers(name) is not None for family in self.families)

    def tells_apart(self, link: Link) -> bool:
        """Whether a link's argument holds labels by which the model knows more of an element than its latents say."""
        return bool(self.hidden[link.to]) and any(s.labels for s in self.sources if s.name == link.argument)

    @property
    def latents(self) -> list[Site]:
        """The latent sites that are to be guided, in the model's order."""
        return [site for site in self.sites.values() if not site.observed and not site.foreign]

    def informed_by(self, name: str) -> bool:
        """Whether a latent informs an observed site."""
        return any(self.sites[other].observed for other in self.informing(name))

    def informing(self, name: str) -> set[str]:
        """Sites that depend on a latent, or that tell of it through latents that are summed out."""
        found = self.reaches(name)
        enumerated = [site for site in self.latents if site.enumerated and site.name != name]
        while enumerated:
            tied = [site for site in enumerated if site.name in found or site.children & (found | {name})]
            if not tied:
                break
            found = found.union(*(self.reaches(site.name) for site in tied))
            enumerated = [site for site in enumerated if site not in tied]
        return found - {name}

    def reaches(self, name: str) -> set[str]:
        """Sites that depend on a latent, directly or through other latents."""
        found: set[str] = set()
        front = {name}
        while front:
            front = set().union(*(self.sites[n].children for n in front)) - found
            found |= front
        return found
