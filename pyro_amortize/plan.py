"""Facts about a model, turned into an :class:`AmortizationPlan`: which latents are encoded, and from what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pyro_amortize.calls import Model
from pyro_amortize.levels import Level, Ways
from pyro_amortize.probes import examine
from pyro_amortize.structure import Link, Site, Source, Structure

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
class Block:
    """Latent sites that share an encoder, or one site that has a table.

    Attributes:
        name: The plate, if all its sites share the encoder; else the site.
        sites: Names, in the model's order.
        plates: Names of the plates around the sites, outer to inner.
        dim: Unconstrained size of one element, all sites together.
        inputs: What the encoder sees: arguments, or observed sites whose data no argument carries.
        features: Width of these after preparation.
        amortized: Whether parameters come from an encoder; if not, from a table.
        closable: Whether amortizing this block can be lossless.
        dims: Unconstrained size of one element of each site.
        shapes: Its shape.
        levels: The data of the inputs by the plates that they have, and their ways to the block's own level, the last.
        rows: Elements of the plates together, as the table has them.
        exact_prior: Whether elements without data have the prior as their posterior, given the latents above them.
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

    @property
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
        unmasked: Latents whose prior is masked where data depend on them all the same, so that q is not.
    """

    blocks: tuple[Block, ...]
    verdict: Verdict
    left_to_model: tuple[str, ...]
    plates: dict[str, int]
    params: tuple[str, ...]
    observed: tuple[str, ...]
    masks: dict[str, Source | None]
    unmasked: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    @property
    def pooled(self) -> dict[str, str]:
        """Plates over whose rows an encoder pools, and a site that it does so for."""
        found: dict[str, str] = {}
        for block in (block for block in self.blocks if block.amortized):
            for level in block.levels:
                if level.pooled and level.into is not None:
                    gone = set(level.plates) - set(block.levels[level.into].plates)
                    found |= dict.fromkeys(gone, block.sites[0])
        return found

    def block_of(self, site: str) -> Block | None:
        """Returns the block that holds a site."""
        return next((block for block in self.blocks if site in block.sites), None)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data from which :meth:`from_dict` makes the plan again."""
        return _plain(asdict(self))  # type: ignore[no-any-return]

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
            blocks.append(Block(**{**_tuples(block), "shapes": shapes, "levels": tuple(levels)}))
        masks = {site: source and _source(source) for site, source in code["masks"].items()}
        rest = {"blocks": tuple(blocks), "verdict": Verdict(**code["verdict"]), "masks": masks}
        return cls(**{**_tuples(code), **rest})

    def __str__(self) -> str:
        header = ("block", "sites", "plates", "dim", "parameters from", "features", "closable")
        rows = [
            (
                block.name,
                ", ".join(block.sites),
                ", ".join(block.plates) or "-",
                str(block.dim),
                f"encoder({_described(block)})" if block.amortized else f"table of {block.rows}",
                str(block.features) if block.amortized else "-",
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
        lines.append(f"closable: {self.verdict.closable} ({self.verdict.reason})")
        return "\n".join(line.rstrip() for line in lines)


def _described(block: Block) -> str:
    """Lists a block's inputs, each with the plates that it is pooled over."""
    parts = []
    for name in block.inputs:
        source = next(source for source in block.sources if source.name == name)
        over = [plate for plate in source.plates if plate not in block.plates]
        pooled = any(level.pooled and source in level.sources for level in block.levels)
        parts.append(f"{name} over {'/'.join(over)}" if over and pooled else name)
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
    return Source(**{**_tuples(code), **sets})


def plan_amortization(model: Model, /, *args: Any, **kwargs: Any) -> AmortizationPlan:
    """Plans how to amortize a model: which latents are local, which global, and which data inform each.

    The model is run a few times on the given data, small changes made to them; nothing is changed: not the random
    state, the param store, or any module.

    Args:
        model: A Pyro model.
        args: Its positional arguments, with at least two different rows of data.
        kwargs: Its keyword arguments.

    Returns:
        The plan. ``print`` it.

    Raises:
        ValueError: There are no data, no rows that differ, NaN without a mask, a discrete latent, or a numpy array.
        NotImplementedError: The model has ``pyro.markov``, enumerated latents or sequential plates.

    Example:
        >>> def model(x):
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(theta, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> print(plan_amortization(model, torch.randn(100)))
        block  sites  plates  dim  parameters from  features  closable
        theta  theta  -       1    table of 1       -         -
        data   z      data    1    encoder(x)       1         yes
        closable: True (rows of 'data' are independent given the globals, and the encoder sees all of a row's data)

    References:
        C. Margossian and D. Blei, Amortized Variational Inference: When and Why?, UAI 2024,
        https://arxiv.org/abs/2307.11018
    """
    return build_plan(examine(model, args, kwargs))


def build_plan(
    facts: Structure, tables: frozenset[str] = frozenset(), apart: frozenset[str] = frozenset(), inputs: Any = None
) -> AmortizationPlan:
    """Makes a plan from facts.

    Args:
        facts: What :func:`~pyro_amortize.probes.examine` found.
        tables: Sites and plates whose parameters come from tables though they have data.
        apart: Sites with an encoder of their own; global ones among them are amortized.
        inputs: Names that replace the found inputs, for all blocks, or a dict from site or plate.
    """
    return _Planner(facts, tables, apart, inputs).plan()


class _Planner:
    """Makes one plan."""

    def __init__(self, facts: Structure, tables: frozenset[str], apart: frozenset[str], inputs: Any) -> None:
        self.facts, self.tables, self.apart, self.inputs = facts, tables, apart, inputs
        self.ways = Ways(facts)
        self.left = tuple(site.name for site in facts.latents if self._is_left_to_model(site))
        self.latents = [site for site in facts.latents if site.name not in self.left]
        self._refuse_discrete()
        self.masks = {
            site.name: next((s for s in facts.sources if s.name == site.mask and s.plates == site.plates), None)
            for site in facts.sites.values()
            if site.mask is not None
        }
        unseen = {link.argument for link in facts.links} | {name for s in facts.sources for name in s.through if name}
        unseen |= {
            s.name for s in self.masks.values() if s and not s.feeds and s.reaches <= set(self.masks) | set(self.left)
        }
        self.sources = [source for source in facts.sources if source.name not in unseen]
        # A global with an encoder of its own is local to the data set.
        self.locals = {
            site.name: site for site in self.latents if self._is_encoded_global(site) or self._is_local(site)
        }
        self.others = [s for s in facts.sites.values() if s.foreign and not s.fixed and self._is_local(s)]
        self._refuse_series()

    def plan(self) -> AmortizationPlan:
        """Returns the plan."""
        grouped: dict[str, list[Site]] = {}
        for site in self.latents:
            together = site.name in self.locals and not self._has_table(site) and site.name not in self.apart
            grouped.setdefault("/".join(site.plates) if together else site.name, []).append(site)
        blocks, verdicts = [], []
        for name, sites in grouped.items():
            site, verdict = sites[0], None
            if site.name not in self.locals:
                levels: tuple[Level, ...] = ()
            elif self._has_table(site):
                self._refuse_unknown_rows(site)
                levels = self._presence(sites)
            else:
                levels, complete = self._levels(name, sites)
                verdict = self._verdict(sites, levels, complete)
                verdicts.append(verdict)
            blocks.append(self._block(name, sites, levels, verdict))
        order = {site.name: i for i, site in enumerate(self.latents)}
        blocks.sort(key=lambda block: order[block.sites[0]])
        return AmortizationPlan(
            tuple(blocks),
            self._overall(verdicts),
            self.left,
            {name: plate.full_size for name, plate in self.facts.plates.items()},
            self.facts.params,
            tuple(site.name for site in self.facts.sites.values() if site.observed),
            self.masks,
            tuple(site.name for site in self.latents if site.unmasked),
            tuple(site.name for site in self.facts.sites.values() if site.foreign),
        )

    # Which latents are local.

    def _is_left_to_model(self, site: Site) -> bool:
        has_data = any(self.facts.sites[name].observed for name in self.facts.reaches(site.name))
        any_data = any(other.observed for other in self.facts.sites.values())
        return (site.fixed and not site.discrete) or (any_data and not has_data)

    def _has_table(self, site: Site) -> bool:
        return site.foreign or bool({site.name, *site.plates[-1:], "/".join(site.plates)} & self.tables)

    def _is_local(self, site: Site) -> bool:
        """Whether rows of data, all of them in the call, belong to single elements of the site."""
        if not site.plates:
            return False
        if isinstance(self.inputs, dict) and {site.name, *site.plates[-1:]} & set(self.inputs):
            return True
        informed = {site.name} | self.facts.reaches(site.name)
        rows = [other for name in informed if (other := self.facts.sites[name]).observed]
        data: list[Site | Source] = [*rows, *(source for source in self.sources if source.reaches & informed)]
        return any(self.ways.covers(row.plates, site.plates) for row in data) and not self._is_partial(site, rows)

    def _is_encoded_global(self, site: Site) -> bool:
        if site.plates or site.name not in self.apart or site.name in self.tables:
            return False
        rows = [other for name in self.facts.reaches(site.name) if (other := self.facts.sites[name]).observed]
        if self._is_partial(site, rows):
            raise ValueError(
                f"plan_amortization: '{site.name}' is to be encoded from the whole data set, but this call holds a "
                f"minibatch of it. Pass all data, or leave '{site.name}' its table."
            )
        return True

    def _is_partial(self, site: Site, rows: list[Site]) -> bool:
        """Whether rows that are to be pooled come as minibatches, so that no call holds all of an element's data."""
        small = {name for name, plate in self.facts.plates.items() if plate.size < plate.full_size}
        pooled = {plate for row in rows if self.ways.covers(row.plates, site.plates) for plate in row.plates}
        for plate in (pooled - set(site.plates)) & small:
            holders = [s for s in self.facts.sources if plate in s.plates]
            masked = any(self.masks.get(row.name, row) is None for row in rows if plate in row.plates)
            if masked or not holders or any(plate not in s.indexed for s in holders):
                return True
        return False

    def _together(self, sites: list[Site]) -> dict[str, Site]:
        """Returns the local latents whose posteriors depend on each other given the globals, those given among them."""
        found = {site.name: site for site in sites}
        front = list(found.values())
        while front:
            site = front.pop()
            for other in [*self.locals.values(), *self.others]:
                near = site.name in other.children or other.name in site.children or site.children & other.children
                if near and other.name not in found:
                    found[other.name] = other
                    front.append(other)
        return found

    # What informs them.

    def _levels(self, name: str, sites: list[Site]) -> tuple[tuple[Level, ...], bool]:
        """Returns the data of a block and their ways, and whether they are all that inform it."""
        target, together = sites[0].plates, self._together(sites)
        related = _related(together)
        rows = [site for n in related if (site := self.facts.sites[n]).observed]
        found = [source for source in self.sources if source.reaches & related]
        contexts = {frozenset(site.plates) for site in together.values()} - {frozenset(target)}
        coarser = [level for level in contexts if self.ways.covers(target, level)] if target else []
        chosen, complete = self._chosen(name, sites), True
        if callable(chosen):
            dims = tuple(self.facts.plates[plate].dim for plate in target)
            found = [Source(FUNCTION, target, tuple(range(len(target))), dims, (), frozenset(related))]
            coarser = []
        elif chosen is not None:
            names = [chosen] if isinstance(chosen, str) else list(chosen)
            picked = [self._named_source(target, n, frozenset(related)) for n in names]
            complete = {s.name for s in found} <= {s.name for s in picked}
            found = picked
        levels = self.ways.levels(target, found, rows, sorted(coarser, key=sorted))
        if not any(level.sources for level in levels):
            self._refuse_dataless(sites[0])
        return levels, complete

    def _presence(self, sites: list[Site]) -> tuple[Level, ...]:
        """Returns what tells which elements of a table have data, where some may have none."""
        related = _related(self._together(sites))
        rows = [site for n in related if (site := self.facts.sites[n]).observed]
        levels = self.ways.levels(sites[0].plates, [], rows, [])
        can_lack = any(level.link for level in levels) or any(name in self.masks for x in levels for name in x.sites)
        return levels if can_lack else ()

    def _chosen(self, name: str, sites: list[Site]) -> Any:
        if not isinstance(self.inputs, dict):
            return self.inputs
        keys = [key for key in (name, *(site.name for site in sites), *sites[0].plates[-1:]) if key in self.inputs]
        return self.inputs[keys[0]] if keys else None

    def _named_source(self, target: tuple[str, ...], name: str, related: frozenset[str]) -> Source:
        for source in self.facts.sources:
            if name in (source.name, source.feeds):
                return source
        shape, axes = self.facts.shapes.get(name, ()), list[int]()
        plates = [self.facts.plates[plate] for plate in target]
        for plate in plates:
            lengths = (plate.size, plate.full_size)
            axes += [next((i for i, n in enumerate(shape) if n in lengths and i not in axes), -1)]
        if not shape or -1 in axes:
            known = [source.name for source in self.sources] or list(self.facts.shapes)
            sizes = " and ".join(f"{plate.size} rows for plate '{plate.name}'" for plate in plates)
            raise ValueError(
                f"plan_amortization: inputs names '{name}', which is no observed site and no argument with {sizes}. "
                f"Known: {known}."
            )
        indexed = {p.name for p, axis in zip(plates, axes, strict=True) if shape[axis] == p.full_size > p.size}
        rest = tuple(size for i, size in enumerate(shape) if i not in axes)
        dims = tuple(plate.dim for plate in plates)
        return Source(name, target, tuple(axes), dims, rest, related, indexed=frozenset(indexed))

    def _block(self, name: str, sites: list[Site], levels: tuple[Level, ...], verdict: Verdict | None) -> Block:
        shapes = tuple(site.shape for site in sites)
        dims = tuple(_numel(shape) for shape in shapes)
        levels = tuple(replace(level, width=sum(width(source) for source in level.sources)) for level in levels)
        inputs = dict.fromkeys(source.name for level in levels for source in level.sources)
        return Block(
            name=name,
            sites=tuple(site.name for site in sites),
            plates=sites[0].plates,
            dim=sum(dims),
            inputs=tuple(inputs),
            features=sum(width(source) for source in {s for level in levels for s in level.sources}),
            amortized=verdict is not None,
            closable=verdict.closable if verdict else None,
            dims=dims,
            shapes=shapes,
            levels=levels,
            rows=_numel(tuple(self.facts.plates[plate].full_size for plate in sites[0].plates)),
            exact_prior=not any(site.couples for site in self._together(sites).values()),
        )

    # Whether amortizing them can be lossless.

    def _verdict(self, sites: list[Site], levels: tuple[Level, ...], complete: bool) -> Verdict:
        together = self._together(sites)
        related = _related(together)
        informing = [source for source in self.sources if source.reaches & related]
        plates = {plate for site in together.values() for plate in site.plates}
        plates |= {plate for level in levels for plate in level.plates}
        by_function = callable(self._chosen(sites[0].name, sites))
        coupled = self._coupled(together, informing, by_function) or self._crossed(together)
        if coupled:
            return coupled
        shown = {source.name for level in levels for source in level.sources}
        if not complete:
            missing = sorted({source.name for source in informing} - shown)
            return Verdict(False, f"inputs leaves out '{missing[0]}', which informs '{sites[0].name}'")
        unclear = self._unclear(sites, levels, plates, shown)
        if unclear:
            return unclear
        if not sites[0].plates:
            return Verdict(True, f"the encoder of '{sites[0].name}' sees all data")
        outer = min((site.plates for site in together.values() if site.plates), key=len)
        return Verdict(
            True,
            f"rows of '{'/'.join(outer)}' are independent given the globals, and the encoder sees all of a row's data",
        )

    def _coupled(self, together: dict[str, Site], informing: list[Source], by_function: bool) -> Verdict | None:
        """Finds elements of one plate whose posteriors need each other's data."""
        for site in together.values():
            if site.couples and site.plates:
                via = sorted(site.children) or [site.name]
                return Verdict(
                    False,
                    f"elements of '{site.name}' are coupled through '{via[0]}', so a row's posterior needs "
                    f"other rows' data; a function that adds some of them narrows the gap, "
                    f"inputs={{'{site.name}': lambda ...: ...}}",
                    factorizes=False,
                )
        for source in informing:
            for plate in sorted(source.couples):
                reason = (
                    f"a row of '{source.name}' enters the densities of other rows of plate '{plate}', so a row's "
                    f"posterior needs its neighbours' data"
                )
                if by_function:
                    return Verdict(None, f"{reason}; whether inputs= holds them could not be told", factorizes=False)
                name = next(iter(together))
                fix = f"add them, inputs={{'{name}': lambda ...: torch.stack([x.roll(1, 0), x], -1)}}, say"
                return Verdict(False, f"{reason}; {fix}", factorizes=False)
        return None

    def _unclear(
        self, sites: list[Site], levels: tuple[Level, ...], plates: set[str], shown: set[str]
    ) -> Verdict | None:
        """Finds what the model knows of a row beside its data, and what could not be tried."""
        facts = self.facts
        for plate in sorted(plates):
            if facts.hidden[plate]:
                pooled = plate not in sites[0].plates and any(x.pooled and plate in x.plates for x in levels)
                whole = (
                    f"pooling loses that; pass an element's rows whole, inputs={{'{sites[0].name}': lambda ...: ...}}"
                )
                return Verdict(
                    False,
                    f"rows of '{plate}' with equal data have different densities: the model knows something of a row "
                    f"that no argument carries (a closure, the index, a parameter a row); "
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
        for plate in sorted(plates & {plate for source in facts.sources for plate in source.plates}):
            if facts.hidden[plate] is None and facts.plates[plate].size > 1:
                return Verdict(
                    None, f"it could not be tried whether rows of '{plate}' with equal data have equal densities"
                )
        return None

    def _crossed(self, together: dict[str, Site]) -> Verdict | None:
        """Finds two latents of which neither's elements hold the other's, yet whose posteriors meet."""
        local = [site for site in together.values() if site.plates]
        for one in (site for site in local if not self._has_table(site)):
            for other in local:
                apart = not self.ways.covers(one.plates, other.plates) and not self.ways.covers(
                    other.plates, one.plates
                )
                meet = sorted(
                    (one.children & other.children) | ({one.name, other.name} & (one.children | other.children))
                )
                if apart and meet:
                    mine, theirs = "/".join(one.plates), "/".join(other.plates)
                    if self._has_table(other) and callable(self._chosen(one.name, [one])):
                        continue
                    if self._has_table(other):
                        return Verdict(
                            False,
                            f"pooling over the rows of '{mine}' loses which element of '{other.name}' (plate "
                            f"'{theirs}') each belongs to; pass them whole, inputs={{'{one.name}': lambda ...: ...}}",
                        )
                    return Verdict(
                        False,
                        f"'{one.name}' (plate '{mine}') and '{other.name}' (plate '{theirs}') meet crosswise at "
                        f"'{meet[0]}', so the posterior of an element of '{mine}' needs the data of all of '{theirs}'; "
                        f"a table for one side, encoder={{'{other.name}': Table()}}, leaves the other to amortize",
                        factorizes=False,
                    )
        return None

    def _overall(self, verdicts: list[Verdict]) -> Verdict:
        for closable in (False, None, True):
            chosen = [verdict for verdict in verdicts if verdict.closable is closable]
            if chosen:
                return Verdict(closable, chosen[0].reason, all(verdict.factorizes for verdict in verdicts))
        for site in self.latents:
            if site.row_plates:
                return Verdict(
                    False,
                    f"'{site.name}' is drawn for all rows of '{site.row_plates[0]}' together, as in a process, so a "
                    f"row's posterior needs all data: it has a table. If rows are independent, draw it in the plate",
                    factorizes=False,
                )
        return Verdict(True, "nothing is amortized: every block is a table")

    # What cannot be.

    def _refuse_series(self) -> None:
        for site in self.locals.values():
            if site.markov:
                raise NotImplementedError(
                    f"plan_amortization: site '{site.name}' stands inside pyro.markov; series are not supported yet. "
                    f"Hide it from the guide: AutoAmortized(poutine.block(model, hide=['{site.name}']))."
                )

    def _refuse_discrete(self) -> None:
        facts = self.facts
        if not any(site.observed for site in facts.sites.values()) and facts.empty:
            raise ValueError(
                f"plan_amortization: no site of the model is observed, and argument '{facts.empty[0]}' is None. "
                f"Pass the data that the posterior is conditioned on: {facts.empty[0]}=..."
            )
        for site in facts.sites.values():
            if not site.observed and site.enumerated and site in self.latents:
                raise NotImplementedError(
                    f"plan_amortization: site '{site.name}' is enumerated; enumerated latents are not supported yet. "
                    f"Hide it from the guide: AutoAmortized(poutine.block(model, hide=['{site.name}']))."
                )
            if not site.observed and site.discrete and site in self.latents:
                raise ValueError(
                    f"Continuous inference cannot handle discrete sample site '{site.name}'. Consider enumerating that "
                    f"variable as documented in https://pyro.ai/examples/enumeration.html , or hide it from the guide: "
                    f"AutoAmortized(poutine.block(model, hide=['{site.name}']))."
                )

    def _refuse_unknown_rows(self, site: Site) -> None:
        """Refuses a table where the data are a minibatch, and the plate draws indices that mean nothing."""
        for plate in (self.facts.plates[name] for name in site.plates):
            given = [
                s.name for s in self.facts.sources if s.axes is not None and plate.name in set(s.plates) - s.indexed
            ]
            if plate.at_random and given:
                raise ValueError(
                    f"plan_amortization: '{site.name}' has a table, but which rows of plate '{plate.name}' the "
                    f"minibatch '{given[0]}' holds is not said: the plate draws indices of its own. Say it, "
                    f"pyro.plate('{plate.name}', {plate.full_size}, subsample=indices), or use an encoder."
                )

    def _refuse_dataless(self, site: Site) -> None:
        facts = self.facts
        plate = facts.plates[site.plates[-1]] if site.plates else None
        size = plate.size if plate else 0
        same = [argument for argument in facts.indistinct if size in facts.shapes[argument]]
        why = (
            f"all rows of argument '{same[0]}' are equal"
            if same
            else "it has a single row"
            if size == 1
            else "no argument was found whose rows enter the densities one by one"
        )
        what = same[0] if same else next(iter(facts.shapes), "x")
        where = f" in plate '{plate.name}'" if plate else ""
        key = plate.name if plate else site.name
        raise ValueError(
            f"plan_amortization: cannot tell which data inform '{site.name}'{where}: {why}. Plan from at "
            f"least two rows that differ, or say it: AutoAmortized(model, inputs={{'{key}': ['{what}']}})."
        )


def _related(latents: dict[str, Site]) -> set[str]:
    """The latents and the sites whose densities depend on them."""
    return set(latents).union(*(site.children for site in latents.values()))


def width(source: Source) -> int:
    """Returns how many features a source gives after preparation."""
    size = _numel(source.shape)
    return size * (source.categories if source.kind == "category" else 1) + (size if source.missing else 0)


def _numel(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
