"""What is to be amortized: which latents are encoded, from what data, and whether that can be lossless."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from pyro_amortize.groups import Groups
from pyro_amortize.levels import Level
from pyro_amortize.structure import Family, Labels, Link, Source

FUNCTION = "inputs(...)"
"""Name of the source that a function of the user's own is."""


@dataclass(frozen=True)
class Verdict:
    """Whether amortizing can be lossless, judged from the model's structure alone.

    Attributes:
        closable: True if a function of one row's data can reach the mean-field optimum of every row, False if it
            cannot in general, None if it could not be told.
        reason: Why, naming sites and arguments.
        factorizes: Whether rows are independent of each other given the global latents.
    """

    closable: bool | None
    reason: str
    factorizes: bool = True


@dataclass(frozen=True)
class Reach:
    """How far an encoder sees along a plate whose elements stand in order: ``radius`` to either side, None for all."""

    plate: str
    radius: int | None


@dataclass(frozen=True)
class Block:
    """Latent sites that share an encoder, or one site that has a table.

    Attributes:
        name: The plate, if all its sites share the encoder; else the site.
        sites: Names, in the model's order.
        plates: Names of the plates around the sites, outer to inner.
        dim: Unconstrained size of one element, all sites together.
        inputs: What the encoder sees: arguments, or observed sites whose data no argument carries.
        features: Width of these after preparation.
        amortized: Whether parameters come from an encoder, ``Constant()`` among them; if not, from a table.
        closable: Whether amortizing this block can be lossless.
        dims: Unconstrained size of one element of each site.
        shapes: Its shape.
        levels: The data of the inputs by the plates that they have, and their ways to the block's own level, the last.
        rows: Elements of the plates together, as the table has them.
        exact_prior: Whether elements without data have the prior as their posterior, given the latents above them.
        couples: Plates along which one element moves the densities of others.
        chain: The loop along which that is so only after the last datum, since each element depends on the one before.
        reach: How far the encoder sees beside an element's own data.
        logits: For each discrete site the shape of the logits behind one entry of its value; None for others.
        distribution: The name of the distribution of a discrete site.
        remedy: What to write so that elements of a table have an encoder.
        constant: Whether that is ``Constant()``, one row of parameters for all elements, whatever their data.
        spaces: For each site of which kind its values are: "real", "greaterthan", "simplex", ...
        around: For each site the names of all plates around it.
    """

    name: str
    sites: tuple[str, ...]
    plates: tuple[str, ...]
    dim: int
    inputs: tuple[str, ...]
    features: int
    amortized: bool
    closable: bool | None
    dims: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    levels: tuple[Level, ...]
    rows: int
    exact_prior: bool = True
    chain: str | None = None
    couples: tuple[str, ...] = ()
    reach: Reach | None = None
    logits: tuple[tuple[int, ...] | None, ...] = ()
    distribution: str | None = None
    constant: bool = False
    remedy: str = ""
    spaces: tuple[str, ...] = ()
    around: tuple[tuple[str, ...], ...] = ()

    @property
    def key(self) -> str:
        """The name under which its modules are registered; one that no attribute of a module has."""
        return f"[{self.name.replace('.', '/')}]"

    @property
    def is_discrete(self) -> bool:
        """Whether it holds a discrete site; these stand alone."""
        return self.distribution is not None

    def widths(self, per_dim: int) -> list[int]:
        """Returns how many parameters an element of each site has, where a family has so many a dimension."""
        pairs = zip(self.dims, self.logits, strict=True)
        return [per_dim * dim if extra is None else dim * math.prod(extra) for dim, extra in pairs]

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The data of all levels, each once."""
        return tuple(dict.fromkeys(source for level in self.levels for source in level.sources))


@dataclass(frozen=True)
class AmortizationPlan:
    """What a guide for a model is made of. Pure data; ``print`` shows it as a table.

    Attributes:
        blocks: The blocks of the guide.
        verdict: Whether amortizing can be lossless, with the reason.
        left_to_model: Latents drawn from the model's own conditionals: no data depend on them, so the prior is exact.
        plates: Full size of every plate in the call that was planned from.
        params: Names of the model's own parameters in the param store.
        observed: Names of the observed sites.
        masks: For each observed site under a mask the argument that is the mask, or whose NaN it covers; None where
            only a run of the model tells.
        foreign: Latents that the model hides from the guide, for another to sample.
        families: Sites that are numbered by loops, ``z_0``, ``z_1``, ...; all else here names a family, ``z_*``.
        loops: The number of the first turn of each loop.
        moving: Latents whose support depends on another latent, so that q of them goes with that.
        rows: For each plate the arguments that have an axis for it.
        same: Plates whose elements are those of others, and which.
        events: Observed events that have rows in a plate, and their axis, from the right.
        groups: Latents with tables that groups have each, and the shapes of their groups' own observed values.
        unmasked: Latents whose prior is masked where data depend on them all the same, so that q is not.
        idle: Latents on which nothing depends where their prior is masked, so that q is masked there, too.
        enumerated: Discrete latents that the model marks to be summed out, as ``TraceEnum_ELBO`` does.
        flat: Latents that are not left to the model because they may inform data, though no value that was tried moved
            the data's densities.
    """

    blocks: tuple[Block, ...]
    verdict: Verdict
    left_to_model: tuple[str, ...]
    plates: dict[str, int]
    params: tuple[str, ...]
    observed: tuple[str, ...]
    masks: dict[str, Source | None]
    unmasked: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    enumerated: tuple[str, ...] = ()
    families: tuple[Family, ...] = ()
    loops: dict[str, int] = field(default_factory=dict)
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    flat: tuple[str, ...] = ()
    moving: tuple[str, ...] = ()
    same: dict[str, str] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    groups: Groups = field(default_factory=dict)

    def turn_of(self, site: str) -> tuple[str, dict[str, int]]:
        """Returns a site's name in the plan, and for each loop that numbers it which of its turns the site is of."""
        for family in self.families:
            numbers = family.numbers(site)
            if numbers is not None:
                turn = {loop: n - self.loops[loop] for loop, n in zip(family.loops, numbers, strict=True)}
                if all(position >= 0 for position in turn.values()):
                    return family.name, turn
        return site, {}

    def lengths(self, plate: str, arguments: Mapping[str, Any]) -> set[int]:
        """Returns how long the tensors among a call's arguments are along a plate."""
        axes = self.rows.get(plate, {}).items()
        found = ((arguments[name], axis) for name, axis in axes if name in arguments)
        return {value.shape[axis] for value, axis in found if value.dim() > axis}

    def without_answer(self, name: str) -> str | None:
        """Says why q has no answer for a site; None for sites of blocks, and for unknown ones."""
        site, _ = self.turn_of(name)
        if site in self.left_to_model:
            return (
                f"is left to the model: no data inform it, so its posterior is its prior given the other latents. Draw "
                f"it: guide.predictive(...)[{name!r}]"
            )
        if site != name and self.block_of(name) is not None:
            return (
                f"is a step of '{site}' after the last one with data: it is no latent of q. Draw it: "
                f"guide.predictive(...)[{name!r}]"
            )
        if site in self.enumerated:
            return f"is summed out of q: it has draws only, posterior.sample((1000,))[{name!r}]"
        if site in self.foreign:
            return "is hidden from this guide"
        return f"is observed: its replicates are guide.predictive(...)[{name!r}]" if site in self.observed else None

    @property
    def pooled(self) -> dict[str, str]:
        """Plates of which an encoder needs all rows, as it pools them or sees beside an element, and a site of its."""
        found: dict[str, str] = {}
        for block in (block for block in self.blocks if block.amortized):
            for level in block.levels:
                if level.pooled and level.into is not None:
                    gone = set(level.plates) - set(block.levels[level.into].plates)
                    found |= dict.fromkeys(gone, block.sites[0])
            found |= {block.reach.plate: block.sites[0]} if block.reach else {}
        return found

    def block_of(self, site: str) -> Block | None:
        """Returns the block that holds a site; a site of a family, ``z_3``, is held under the family's name."""
        name, _ = self.turn_of(site)
        return next((block for block in self.blocks if name in block.sites), None)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data from which :meth:`from_dict` makes the plan again."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, code: Mapping[str, Any]) -> AmortizationPlan:
        """Makes a plan from what :meth:`to_dict` returned."""
        blocks = []
        for block in code["blocks"]:
            levels = [
                Level(
                    **{
                        **_tuples(level),
                        "sources": tuple(_source(source) for source in level["sources"]),
                        "link": level["link"] and Link(**_tuples(level["link"])),
                    }
                )
                for level in block["levels"]
            ]
            shapes = tuple(tuple(shape) for shape in block["shapes"])
            parts = {"shapes": shapes, "levels": tuple(levels), "reach": block["reach"] and Reach(**block["reach"])}
            parts["around"] = tuple(tuple(names) for names in block["around"])
            parts["logits"] = tuple(shape if shape is None else tuple(shape) for shape in block["logits"])
            blocks.append(Block(**{**_tuples(block), **parts}))
        masks = {site: source and _source(source) for site, source in code["masks"].items()}
        families = tuple(Family(**_tuples(family)) for family in code["families"])
        verdict = Verdict(**code["verdict"])
        groups = {name: {site: tuple(shape) for site, shape in own.items()} for name, own in code["groups"].items()}
        rest = {"groups": groups, "blocks": tuple(blocks), "verdict": verdict, "masks": masks, "families": families}
        return cls(**{**_tuples(code), **rest})

    def __str__(self) -> str:
        header = ("block", "sites", "plates", "dim", "parameters from", "features", "closable")
        rows = [
            (
                block.name,
                ", ".join(block.sites),
                ", ".join(block.plates) or "-",
                str(block.dim),
                _origin(block),
                str(block.features) if block.amortized and not block.constant else "-",
                {True: "yes", False: "no", None: "unknown"}[block.closable] if block.amortized else "-",
            )
            for block in self.blocks
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]
        ]
        if self.left_to_model:
            lines.append(f"left to the model: {', '.join(self.left_to_model)}")
        if self.flat:
            lines.append(f"not seen to move the data's densities: {', '.join(self.flat)}")
        if self.enumerated:
            lines.append(f"summed out: {', '.join(self.enumerated)}")
        lines.append(f"closable: {self.verdict.closable} ({self.verdict.reason})")
        return "\n".join(line.rstrip() for line in lines)


def _origin(block: Block) -> str:
    """Says what a block's parameters come from."""
    if not block.amortized:
        return f"table of {block.rows}"
    return "one row for all" if block.constant else f"encoder({_described(block)})"


def _described(block: Block) -> str:
    """Lists a block's inputs, each with the plates that it is pooled over, and how far beside an element they reach."""
    parts = []
    for name in block.inputs:
        source = next(source for source in block.sources if source.name == name)
        over = [plate for plate in source.level if plate not in block.plates]
        pooled = any(level.pooled and source in level.sources for level in block.levels)
        parts.append(f"{name} over {'/'.join(over)}" if over and pooled else name)
    if block.reach is not None:
        radius = "all" if block.reach.radius is None else f"±{block.reach.radius}"
        parts.append(f"{radius} along {block.reach.plate}")
    return ", ".join(parts)


def _plain(value: Any) -> Any:
    """Writes sets and tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (frozenset, tuple, list)):
        return [_plain(item) for item in (sorted(value) if isinstance(value, frozenset) else value)]
    return value


def _tuples(code: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in code.items()}


def _source(code: Mapping[str, Any]) -> Source:
    sets = {key: frozenset(code[key]) for key in ("reaches", "indexed", "couples")}
    pairs = {key: tuple(map(tuple, code[key])) for key in ("offsets", "whole")}
    labels = tuple(found and Labels(**found) for found in code.get("labels", ()))
    enters = tuple(
        tuple((site, entries if entries is None else tuple(entries)) for site, entries in cell)
        for cell in code.get("enters", ())
    )
    return Source(**{**_tuples(code), **sets, **pairs, "labels": labels, "enters": enters})
