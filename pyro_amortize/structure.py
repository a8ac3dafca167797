"""Facts about a model: its sites and plates, where data enter, and what depends on what."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plate:
    """A vectorized plate as the example call had it: ``size`` elements of ``full_size``, drawn at random or given."""

    name: str
    dim: int
    size: int
    full_size: int
    at_random: bool = False


@dataclass(frozen=True)
class Site:
    """A sample site.

    Attributes:
        plates: Names, outer to inner.
        shape: Of one element in unconstrained space, plate axes removed (latents); of its values (observed).
        children: Sites whose density depends on this latent, itself apart.
        couples: Whether one element of this latent moves the densities of other elements of its plates.
        points: Sites of other plates of which each row depends on some elements of this latent only.
        fixed: Whether it has no free continuous value: a ``Delta``, or discrete.
        kind: What its values are: "real", "count", "level" (a count with an upper bound), "category" or "binary";
            ``categories`` counts them.
    """

    name: str
    observed: bool
    plates: tuple[str, ...]
    shape: tuple[int, ...]
    children: frozenset[str] = frozenset()
    couples: bool = False
    points: frozenset[str] = frozenset()
    fixed: bool = False
    discrete: bool = False
    enumerated: bool = False
    markov: bool = False
    kind: str = "real"
    categories: int = 0


@dataclass(frozen=True)
class Source:
    """Data with a row for every element of a plate: an argument, or the values of an observed site.

    Attributes:
        name: The argument as one writes it (``batch['y']``), or the site.
        axis: The plate's axis in the argument; None for a site, whose rows stand at the plate's own dim.
        indexed: Whether the model picks the plate's subsample out of it, rather than using it as it stands.
        shape: Of one row.
        reaches: Sites whose density it enters.
        couples: Whether one row of it moves the densities of other rows.
        feeds: The observed site whose values it is.
        missing: Whether it holds NaN.
    """

    name: str
    axis: int | None
    indexed: bool
    shape: tuple[int, ...]
    reaches: frozenset[str]
    couples: bool = False
    feeds: str | None = None
    kind: str = "real"
    categories: int = 0
    missing: bool = False


@dataclass(frozen=True)
class Structure:
    """Facts about a model. ``sources`` and ``hidden`` are given a plate each.

    Attributes:
        hidden: Whether rows with equal data still differ; None where this could not be tried.
        indistinct: Arguments whose rows are all equal, so that nothing can be told of them.
        params: Names of the model's own parameters in the param store.
        shapes: Of the arguments that are tensors.
        empty: Arguments that are None.
    """

    sites: dict[str, Site]
    plates: dict[str, Plate]
    sources: dict[str, tuple[Source, ...]]
    hidden: dict[str, bool | None]
    indistinct: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    empty: tuple[str, ...] = ()

    @property
    def latents(self) -> list[Site]:
        """The latent sites, in the model's order."""
        return [site for site in self.sites.values() if not site.observed]

    def reaches(self, name: str) -> set[str]:
        """Sites that depend on a latent, directly or through other latents."""
        found: set[str] = set()
        front = {name}
        while front:
            front = set().union(*(self.sites[n].children for n in front)) - found
            found |= front
        return found
