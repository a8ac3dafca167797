"""Facts about a model, turned into an :class:`AmortizationPlan`: which latents are encoded, and from what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyro_amortize.calls import Model
from pyro_amortize.probes import examine
from pyro_amortize.structure import Site, Source, Structure

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
        sources: Where the inputs stand.
        rows: Elements of the plates together, as the table has them.
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
    sources: tuple[Source, ...]
    rows: int


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
    """

    blocks: tuple[Block, ...]
    verdict: Verdict
    left_to_model: tuple[str, ...]
    plates: dict[str, int]
    params: tuple[str, ...]
    observed: tuple[str, ...]

    def block_of(self, site: str) -> Block | None:
        """Returns the block that holds a site."""
        return next((block for block in self.blocks if site in block.sites), None)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data from which :meth:`from_dict` makes the plan again."""
        code = asdict(self)
        for block in code["blocks"]:
            block["sources"] = [{**source, "reaches": sorted(source["reaches"])} for source in block["sources"]]
        return code

    @classmethod
    def from_dict(cls, code: Mapping[str, Any]) -> AmortizationPlan:
        """Makes a plan from what :meth:`to_dict` returned."""
        blocks = []
        for block in code["blocks"]:
            sources = tuple(
                Source(**{**s, "reaches": frozenset(s["reaches"]), "shape": tuple(s["shape"])})
                for s in block["sources"]
            )
            names = {key: tuple(block[key]) for key in ("sites", "plates", "inputs", "dims")}
            shapes = tuple(tuple(shape) for shape in block["shapes"])
            blocks.append(Block(**{**block, **names, "shapes": shapes, "sources": sources}))
        rest = {key: tuple(code[key]) for key in ("left_to_model", "params", "observed")}
        return cls(tuple(blocks), Verdict(**code["verdict"]), plates=dict(code["plates"]), **rest)

    def __str__(self) -> str:
        header = ("block", "sites", "plates", "dim", "parameters from", "features", "closable")
        rows = [
            (
                block.name,
                ", ".join(block.sites),
                ", ".join(block.plates) or "-",
                str(block.dim),
                ("encoder(" + ", ".join(block.inputs) + ")") if block.amortized else f"table of {block.rows}",
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
        NotImplementedError: The model has nested plates around local latents, indexed groups, ``pyro.markov``,
            enumerated latents or sequential plates.

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
        apart: Sites with an encoder of their own.
        inputs: Names that replace the found inputs, for all blocks, or a dict from site or plate.
    """
    left = tuple(site.name for site in facts.latents if _is_left_to_model(facts, site))
    latents = [site for site in facts.latents if site.name not in left]
    _refuse_unsupported(facts, latents)
    blocks: list[Block] = []
    verdicts = []
    grouped: dict[str, list[Site]] = {}
    for site in latents:
        plate = _data_plate(facts, site, latents, inputs)
        if plate is not None and {site.name, plate} & tables:
            _refuse_unknown_rows(facts, site, plate)
        if plate is None or {site.name, plate} & tables:
            blocks.append(_block(facts, site.name, [site], (), None))
        else:
            grouped.setdefault(site.name if site.name in apart else plate, []).append(site)
    for name, sites in grouped.items():
        (plate,) = sites[0].plates
        together = [site for site in latents if plate in site.plates]
        sources, complete = _inputs(facts, name, plate, together, inputs)
        verdict = _verdict(facts, plate, together, sources, complete)
        verdicts.append(verdict)
        blocks.append(_block(facts, name, sites, sources, verdict.closable))
    order = {site.name: i for i, site in enumerate(latents)}
    blocks.sort(key=lambda block: order[block.sites[0]])
    observed = tuple(site.name for site in facts.sites.values() if site.observed)
    plates = {name: plate.full_size for name, plate in facts.plates.items()}
    return AmortizationPlan(tuple(blocks), _overall(verdicts), left, plates, facts.params, observed)


def _is_left_to_model(facts: Structure, site: Site) -> bool:
    has_data = any(facts.sites[name].observed for name in facts.reaches(site.name))
    any_data = any(other.observed for other in facts.sites.values())
    return (site.fixed and not site.discrete) or (any_data and not has_data)


def _refuse_unsupported(facts: Structure, latents: list[Site]) -> None:
    if not any(site.observed for site in facts.sites.values()) and facts.empty:
        raise ValueError(
            f"plan_amortization: no site of the model is observed, and argument '{facts.empty[0]}' is None. "
            f"Pass the data that the posterior is conditioned on: {facts.empty[0]}=..."
        )
    local_plates = {plate for site in latents for plate in site.plates if _holds_data(facts, plate, latents)}
    for site in facts.sites.values():
        if site.markov:
            raise NotImplementedError(
                f"plan_amortization: site '{site.name}' stands inside pyro.markov; series are not supported yet. "
                f"Hide it from the guide: AutoAmortized(poutine.block(model, hide=['{site.name}']))."
            )
        if not site.observed and site.enumerated and site in latents:
            raise NotImplementedError(
                f"plan_amortization: site '{site.name}' is enumerated; enumerated latents are not supported yet. "
                f"Hide it from the guide: AutoAmortized(poutine.block(model, hide=['{site.name}']))."
            )
        if not site.observed and site.discrete and site in latents:
            raise ValueError(
                f"Continuous inference cannot handle discrete sample site '{site.name}'. Consider enumerating that "
                f"variable as documented in https://pyro.ai/examples/enumeration.html , or hide it from the guide: "
                f"AutoAmortized(poutine.block(model, hide=['{site.name}']))."
            )
        if len(site.plates) > 1 and local_plates & set(site.plates):
            raise NotImplementedError(
                f"plan_amortization: site '{site.name}' stands in the nested or crossed plates {list(site.plates)} "
                f"around local latents, which is not supported yet. If the inner plate has a fixed size, make it an "
                f"event dimension: pyro.sample({site.name!r}, fn.to_event(1))."
            )
        if site.points and site in latents:
            raise NotImplementedError(
                f"plan_amortization: each row of site '{sorted(site.points)[0]}' picks an element of '{site.name}' "
                f"(plate '{site.plates[0]}'), an indexed group, which is not supported yet. Guide '{site.name}' by "
                f"AutoNormal(poutine.block(model, expose=['{site.name}'])) in an AutoGuideList."
            )


def _refuse_unknown_rows(facts: Structure, site: Site, plate: str) -> None:
    """Refuses a table where the data are a minibatch, and the plate draws indices that mean nothing."""
    given = [source.name for source in facts.sources[plate] if source.axis is not None and not source.indexed]
    if facts.plates[plate].at_random and given:
        raise ValueError(
            f"plan_amortization: '{site.name}' has a table, but which rows of plate '{plate}' the minibatch "
            f"'{given[0]}' holds is not said: the plate draws indices of its own. Say it, "
            f"pyro.plate('{plate}', {facts.plates[plate].full_size}, subsample=indices), or use an encoder."
        )


def _holds_data(facts: Structure, plate: str, latents: list[Site]) -> bool:
    """Whether a plate holds a latent and data of its own."""
    related = _related(facts, plate, [site for site in latents if plate in site.plates])
    observed = any(facts.sites[name].observed for name in related)
    return observed or any(related & source.reaches for source in facts.sources[plate])


def _related(facts: Structure, plate: str, sites: list[Site]) -> set[str]:
    """The latents given and the sites of the plate that depend on one of them."""
    names = {site.name for site in sites}
    for site in sites:
        names |= {child for child in site.children if plate in facts.sites[child].plates}
    return names


def _data_plate(facts: Structure, site: Site, latents: list[Site], inputs: Any) -> str | None:
    """Returns the plate whose rows of data inform a site; None for globals and plates without data."""
    for plate in site.plates:
        if _holds_data(facts, plate, latents) or (isinstance(inputs, dict) and {plate, site.name} & set(inputs)):
            return plate
    return None


def _inputs(facts: Structure, name: str, plate: str, sites: list[Site], inputs: Any) -> tuple[tuple[Source, ...], bool]:
    """Returns the sources of a block, and whether they are all that inform it."""
    related = _related(facts, plate, sites)
    found = tuple(source for source in facts.sources[plate] if source.reaches & related)
    chosen = inputs
    if isinstance(inputs, dict):
        keys = [key for key in (name, *(site.name for site in sites), plate) if key in inputs]
        chosen = inputs[keys[0]] if keys else None
    if callable(chosen):
        return (Source(FUNCTION, 0, False, (), frozenset(related)),), True
    if chosen is not None:
        names = [chosen] if isinstance(chosen, str) else list(chosen)
        picked = tuple(_named_source(facts, plate, n, related) for n in names)
        return picked, {s.name for s in found} <= {s.name for s in picked}
    if found:
        return found, True
    same = [argument for argument in facts.indistinct if facts.plates[plate].size in facts.shapes[argument]]
    why = (
        f"all rows of argument '{same[0]}' are equal"
        if same
        else "it has a single row"
        if facts.plates[plate].size == 1
        else "no argument was found whose rows enter the densities one by one"
    )
    what = same[0] if same else next(iter(facts.shapes), "x")
    raise ValueError(
        f"plan_amortization: cannot tell which data inform '{sites[0].name}' in plate '{plate}': {why}. Plan from at "
        f"least two rows that differ, or say it: AutoAmortized(model, inputs={{'{plate}': ['{what}']}})."
    )


def _named_source(facts: Structure, plate: str, name: str, related: set[str]) -> Source:
    for source in facts.sources[plate]:
        if name in (source.name, source.feeds):
            return source
    size, full_size = facts.plates[plate].size, facts.plates[plate].full_size
    shape = facts.shapes.get(name, ())
    axis = next((i for i, length in enumerate(shape) if length in (size, full_size)), None)
    if axis is None:
        known = [source.name for source in facts.sources[plate]] or list(facts.shapes)
        raise ValueError(
            f"plan_amortization: inputs names '{name}', which is no observed site and no argument with {size} rows for "
            f"plate '{plate}'. Known: {known}."
        )
    indexed = shape[axis] == full_size and size < full_size
    return Source(name, axis, indexed, shape[:axis] + shape[axis + 1 :], frozenset(related))


def _verdict(facts: Structure, plate: str, sites: list[Site], sources: tuple[Source, ...], complete: bool) -> Verdict:
    related = _related(facts, plate, sites)
    for site in sites:
        if site.couples:
            via = sorted(site.children) or [site.name]
            return Verdict(
                False,
                f"elements of '{site.name}' are coupled through '{via[0]}', so a row's posterior needs "
                f"other rows' data",
                factorizes=False,
            )
    for source in facts.sources[plate]:
        if source.couples and source.reaches & related:
            return Verdict(
                False,
                f"a row of '{source.name}' enters the densities of other rows of plate '{plate}', so a row's posterior "
                f"needs its neighbours' data",
                factorizes=False,
            )
    if not complete:
        missing = sorted(
            s.name for s in facts.sources[plate] if s.reaches & related and s.name not in {t.name for t in sources}
        )
        return Verdict(False, f"inputs leaves out '{missing[0]}', which informs '{sites[0].name}'")
    if facts.hidden[plate]:
        return Verdict(
            False,
            f"rows of '{plate}' with equal data have different densities: the model knows something of a row that no "
            f"argument carries (a closure, the index, a parameter a row); pass it as an argument",
        )
    size = facts.plates[plate].size
    untold = [n for n in facts.indistinct if size in facts.shapes[n] and n not in {s.name for s in sources}]
    if untold:
        return Verdict(
            None,
            f"all rows of '{untold[0]}' are equal, so it could not be told whether it informs '{sites[0].name}'; if it "
            f"does, name it in inputs=",
        )
    if facts.hidden[plate] is None:
        return Verdict(None, f"it could not be tried whether rows of '{plate}' with equal data have equal densities")
    return Verdict(
        True,
        f"rows of '{plate}' are independent given the globals, and the encoder sees all of a row's data",
    )


def _overall(verdicts: list[Verdict]) -> Verdict:
    if not verdicts:
        return Verdict(True, "nothing is amortized: every block is a table")
    for closable in (False, None, True):
        chosen = [verdict for verdict in verdicts if verdict.closable is closable]
        if chosen:
            return Verdict(closable, chosen[0].reason, all(verdict.factorizes for verdict in verdicts))
    raise AssertionError


def _block(facts: Structure, name: str, sites: list[Site], sources: tuple[Source, ...], closable: bool | None) -> Block:
    shapes = tuple(site.shape for site in sites)
    dims = tuple(_numel(shape) for shape in shapes)
    rows = _numel(tuple(facts.plates[plate].full_size for plate in sites[0].plates))
    return Block(
        name=name,
        sites=tuple(site.name for site in sites),
        plates=sites[0].plates,
        dim=sum(dims),
        inputs=tuple(source.name for source in sources),
        features=sum(width(source) for source in sources),
        amortized=bool(sources),
        closable=closable,
        dims=dims,
        shapes=shapes,
        sources=sources,
        rows=rows,
    )


def width(source: Source) -> int:
    """Returns how many features a source gives after preparation."""
    size = _numel(source.shape)
    return size * (source.categories if source.kind == "category" else 1) + (size if source.missing else 0)


def _numel(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
