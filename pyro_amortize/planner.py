"""A model's structure, turned into a plan: blocks of latents, and the data that inform each."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from pyro_amortize.arguments import check_arguments, with_rows
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.encoders import MLP, Constant, DeepSets, Recurrent, Window, encoder_for
from pyro_amortize.examination import examine
from pyro_amortize.groups import groups_apart
from pyro_amortize.levels import Level, Ways
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import FUNCTION, AmortizationPlan, Block, Reach, Verdict
from pyro_amortize.remedies import fitting_argument, fitting_axes, instead_of_table
from pyro_amortize.sight import Sight
from pyro_amortize.structure import Site, Source, Structure
from pyro_amortize.verdict import Judge, one_answer, related_to

OWN_DATA = MLP()
"""An encoder that sees nothing beside an element's own data."""


def plan_amortization(model: Model, /, *args: Any, **kwargs: Any) -> AmortizationPlan:
    """Plans how to amortize a model: which latents are local, which global, and which data inform each.

    The model is run a few times on the given data, small changes made to them; nothing is changed: not the random
    state, the param store, or any module. Of more than 10,000 rows it is run on some, each column's extremes and NaN
    among them, where the model takes any number of rows. The plan is that of ``AutoAmortizedNormal(model)``; with other
    options (``encoder=``, ``inputs=``) a guide's own plan, ``guide.plan``, is on what its encoders see.

    Args:
        model: A Pyro model.
        args: Its positional arguments, with at least two different rows of data.
        kwargs: Its keyword arguments.

    Returns:
        The plan. ``print`` it.

    Raises:
        ValueError: There are no data, no rows that differ, NaN without a mask, a discrete latent that is not marked to
            be enumerated in parallel, or a numpy array.
        TypeError: The arguments do not fit the model.

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
    check_arguments("plan_amortization", model, args, kwargs, "Pass them as to the model itself")
    with with_rows("plan_amortization"):
        return build_plan(examine(model, args, kwargs), encoder=None)


def plan_beside(model: Model, guide: Model, args: Args, kwargs: Kwargs) -> AmortizationPlan:
    """Plans as :func:`plan_amortization` does, for a model whose discrete latents some guide may sample itself.

    Sites of the guide that are none of the model's, as the auxiliary ones of Pyro's own guides, are ignored.
    """
    with preserved(guide, evaluating=True), torch.no_grad(), poutine.block():
        guided = poutine.trace(guide).get_trace(*args, **kwargs)
    facts = examine(model, args, kwargs)
    drawn = [name for name, site in guided.iter_stochastic_nodes() if not site_is_subsample(site)]
    names = {facts.site_of(name).name for name in drawn if facts.has(name)}
    sampled = frozenset(s.name for s in facts.latents if s.discrete and s.plates and s.name in names)
    try:
        return build_plan(facts, apart=sampled, encoder=dict.fromkeys([*sampled, *facts.plates], OWN_DATA))
    except ValueError:  # one row, or equal ones, do not show what informs a latent; the guide knows
        own = getattr(guide, "plan", None)
        if own is None:
            raise
        return replace(own, plates={name: plate.full_size for name, plate in facts.plates.items()})


def build_plan(
    facts: Structure,
    tables: frozenset[str] = frozenset(),
    apart: frozenset[str] = frozenset(),
    inputs: Any = None,
    encoder: Any = OWN_DATA,
) -> AmortizationPlan:
    """Makes a plan from facts.

    Args:
        facts: What :func:`~pyro_amortize.examination.examine` found.
        tables: Sites and plates whose parameters come from tables though they have data.
        apart: Sites with an encoder of their own; global ones among them are amortized.
        inputs: Names that replace the found inputs, for all blocks, or a dict from site or plate.
        encoder: The guide's option. By default encoders see an element's own data.
    """
    return _Planner(facts, tables, apart, inputs, encoder).plan()


class _Planner:
    """Makes one plan."""

    def __init__(
        self, facts: Structure, tables: frozenset[str], apart: frozenset[str], inputs: Any, encoder: Any
    ) -> None:
        self.tables, self.apart, self.inputs, self.encoder = tables, apart, inputs, encoder
        self.ways = Ways(facts)
        self.named = apart | self._named_tables()
        self.facts = facts = replace(
            facts, sites={site.name: self._as_named(site, facts) for site in facts.sites.values()}
        )
        self.left = tuple(site.name for site in facts.latents if self._is_left_to_model(site))
        informed = [site for site in facts.latents if site.name not in self.left]
        asked = [site for site in informed if site.discrete and site.name in self.named]
        self.enumerated = [site for site in informed if site.enumerated and site not in asked]
        self.latents = [replace(s, enumerated=False) for s in informed if s not in self.enumerated]
        self.discrete = [replace(site, enumerated=False) for site in asked]
        self._refuse_discrete()
        self._refuse_unreached()
        self._warn_of_imputed()
        self.masks = {
            site.name: next((s for s in facts.sources if s.name == site.mask and s.plates == site.plates), None)
            for site in facts.sites.values()
            if site.mask is not None
        }
        unseen = {link.argument for link in facts.links if not facts.tells_apart(link)}
        unseen |= {s.name for s in facts.sources if not s.labels and any(s.name in o.through for o in facts.sources)}
        unseen |= {
            s.name for s in self.masks.values() if s and not s.feeds and s.reaches <= set(self.masks) | set(self.left)
        }
        self.sources = [source for source in facts.sources if source.name not in unseen]
        # A global with an encoder of its own is local to the data set.
        self.locals = {
            site.name: site
            for site in self.latents
            if self._is_encoded_global(site) or self._is_start(site) or self._is_local(site)
        }
        self.locals |= self._taken_at_their_word()
        self.others = [s for s in facts.sites.values() if s.foreign and not s.fixed and self._is_local(s)]
        self.sight = Sight(facts, self.ways, self._is_by_table)
        self.judge = Judge(facts, self.ways, self.sources, self._is_by_table, self._is_by_function)

    def plan(self) -> AmortizationPlan:
        """Returns the plan."""
        grouped: dict[str, list[Site]] = {}
        for site in self.latents:
            together = site.name in self.locals and not self._has_table(site) and site.name not in self.apart
            grouped.setdefault("/".join(site.plates) if together and site.plates else site.name, []).append(site)
        blocks, verdicts = [], []
        for name, sites in grouped.items():
            site, verdict, reach, constant = sites[0], None, None, False
            if site.name not in self.locals or self._has_table(site):
                self._refuse_unknown_rows(site)
                levels = self._presence(sites) if site.name in self.locals else ()
            else:
                levels, missing = self._levels(name, sites)
                reach = self._reach(name, sites)
                verdict = self.judge.judge(sites, self._together(sites), levels, missing, reach)
                constant = isinstance(self._encoder_of(name, sites), Constant)
                if constant and site.plates:
                    verdict = one_answer(sites, verdict)
                verdicts.append(verdict)
            blocks.append(self._block(name, sites, levels, verdict, reach, constant))
        order = {site.name: i for i, site in enumerate(self.latents)}
        blocks.sort(key=lambda block: order[block.sites[0]])
        return AmortizationPlan(
            tuple(blocks),
            self.judge.overall(verdicts, self.latents, [s for s in self.latents if self._has_table(s)]),
            self.left,
            {name: plate.full_size for name, plate in self.facts.plates.items()},
            self.facts.params,
            tuple(site.name for site in self.facts.sites.values() if site.observed),
            self.masks,
            tuple(site.name for site in self.latents if site.unmasked),
            tuple(site.name for site in self.latents if site.unmasked is False),
            tuple(site.name for site in self.facts.sites.values() if site.foreign),
            tuple(site.name for site in self.enumerated),
            self.facts.families,
            {name: plate.first for name, plate in self.facts.plates.items() if plate.first is not None},
            {name: self._rows_of(name) for name in self.facts.plates},
            tuple(site.name for site in self.latents if site.flat),
            tuple(site.name for site in self.latents if site.moving),
            dict(self.facts.same),
            dict(self.facts.events),
            groups_apart(self.facts, [site for site in self.latents if site.name not in self.locals]),
        )

    def _rows_of(self, plate: str) -> dict[str, int]:
        """Returns the arguments that have an axis for a plate, and which."""
        found = [source for source in self.facts.sources if source.axes is not None and plate in source.plates]
        return {source.name: source.axes[source.plates.index(plate)] for source in found}  # type: ignore[index]

    # Which latents are local.

    def _named_tables(self) -> set[str]:
        """Sites that are given a table by name."""
        return set(self.encoder) & self.tables if isinstance(self.encoder, dict) else set()

    def _as_named(self, site: Site, facts: Structure) -> Site:
        """Lets data inform a latent that the user names, though none were seen to: those beside it."""
        if site.name not in self.named or site.observed or site.fixed or facts.informed_by(site.name):
            return site
        beside = {
            other.name
            for other in facts.sites.values()
            if other.observed and self.ways.covers(other.plates, site.plates)
        }
        return replace(site, children=site.children | beside, flat=bool(beside))

    def _is_left_to_model(self, site: Site) -> bool:
        if site.name in self.named and not site.fixed:
            return False
        any_data = any(other.observed for other in self.facts.sites.values())
        return (site.fixed and not site.discrete) or (any_data and not self.facts.informed_by(site.name))

    def _has_table(self, site: Site) -> bool:
        return site.foreign or bool({site.name, *site.plates[-1:], "/".join(site.plates)} & self.tables)

    def _warn_of_imputed(self) -> None:
        """Warns of what ``obs_mask`` makes for missing data below a latent that is summed out: q is not its prior."""
        for site in self.latents:
            above = [other.name for other in self.enumerated if site.name in other.children]
            has_data = any(self.facts.sites[name].observed for name in self.facts.reaches(site.name))
            if above and site.unmasked is not None and not has_data:
                warnings.warn(
                    f"plan_amortization: '{site.name}' depends on '{above[0]}', which is summed out, so q cannot be "
                    f"its prior: what is missing loosens the ELBO, and biases globals. Mask the data instead of "
                    f"obs_mask=: 'with poutine.mask(mask=...): pyro.sample(..., obs=...)'; or amortize "
                    f"'{above[0]}': encoder={{'{above[0]}': MLP()}}.",
                    stacklevel=2,
                )

    def _taken_at_their_word(self) -> dict[str, Site]:
        """Finds data for latents that are to have encoders by name, though their rows do not tell whom they inform."""
        found: dict[str, Site] = {}
        named = self.encoder if isinstance(self.encoder, dict) and isinstance(self.inputs, dict | None) else {}
        for site in self.latents:
            wanted = site.name in named and site.plates and not self._has_table(site) and site.name not in self.locals
            argument = fitting_argument(site, self.facts) if wanted else None
            if argument is not None:
                self.inputs = {**(self.inputs or {}), site.name: argument}
                found[site.name] = site
                warnings.warn(
                    f"plan_amortization: row k of '{argument}' is taken to inform element k of '{site.name}', as there "
                    f"are as many. Say so, inputs={{'{site.name}': '{argument}'}}, or what else does.",
                    stacklevel=2,
                )
        return found

    def _is_local(self, site: Site) -> bool:
        """Whether rows of data, all of them in the call, belong to single elements of the site."""
        if not site.plates:
            return False
        if isinstance(self.inputs, dict) and {site.name, *site.plates[-1:]} & set(self.inputs):
            return True
        informed = {site.name} | self.facts.informing(site.name)
        rows = [other for name in informed if (other := self.facts.sites[name]).observed]
        data: list[Site | Source] = [*rows, *(source for source in self.sources if source.reaches & informed)]
        return any(self.ways.covers(row.plates, site.plates) for row in data) and not self._is_partial(site, rows)

    def _is_start(self, site: Site) -> bool:
        """Whether a site outside all plates stands before the first turn of a single series, as its initial state."""
        numbered = any(family.numbers(site.name) is not None for family in self.facts.families)
        return numbered and not site.plates and not self._has_table(site)

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
        """Returns the local latents whose posteriors depend on each other given the globals, those given among them.

        Latents that are summed out tie others together as any unknown does; global ones do, too.
        """
        found = {site.name: site for site in sites}
        front = list(found.values())
        while front:
            site = front.pop()
            for other in [*self.locals.values(), *self.others, *self.enumerated]:
                near = site.name in other.children or other.name in site.children or site.children & other.children
                if near and other.name not in found:
                    found[other.name] = other
                    front.append(other)
        return found

    # What informs them.

    def _levels(self, name: str, sites: list[Site]) -> tuple[tuple[Level, ...], set[str]]:
        """Returns the data of a block and their ways, and the names of what informs it beside these."""
        target, together = sites[0].plates, self._together(sites)
        related = related_to(together, self.facts)
        rows = [site for n in related if (site := self.facts.sites[n]).observed]
        found = [source for source in self.sources if source.reaches & related]
        found += [source for source in self.sight.indices(target, together, rows) if source not in found]
        contexts = {frozenset(site.plates) for site in together.values() if site.plates or not site.enumerated}
        contexts -= {frozenset(target)}
        coarser = [level for level in contexts if self.ways.covers(target, level)] if target else []
        chosen, missing, drawn = self._chosen(name, sites), set[str](), self._drawn(sites, together)
        if callable(chosen):
            drawn = []
            dims = tuple(self.facts.plates[plate].dim for plate in target)
            found = [Source(FUNCTION, target, tuple(range(len(target))), dims, (), frozenset(related))]
            coarser = []
        elif chosen is not None:
            names = [chosen] if isinstance(chosen, str) else list(chosen)
            drawn = [source for source in drawn if source.name in names]
            names = [n for n in names if not any(source.name == n for source in drawn)]
            picked = [self._named_source(target, n, frozenset(related)) for n in names]
            missing = {s.name for s in found} - {s.name for s in picked}
            found = picked
        if not isinstance(self._encoder_of(name, sites), DeepSets):
            found = [self.sight.whole(source, target, together) for source in found]
        found += drawn
        levels = self.ways.levels(target, found, rows, sorted(coarser, key=sorted))
        if not any(level.sources for level in levels):
            self._refuse_dataless(sites[0], chosen)
        return levels, missing

    def _is_by_table(self, site: Site) -> bool:
        return (site.name not in self.locals or self._has_table(site)) and not site.enumerated

    def _drawn(self, sites: list[Site], together: dict[str, Site]) -> list[Source]:
        """Returns the discrete latents that the guide draws before a block's own, so that q is conditional on them.

        Continuous latents come after discrete ones, in the model's order or ahead of it; of discrete ones each after
        those before it. Not the turns of loops, of which most are drawn too late.
        """
        order, first, found = list(self.facts.sites), sites[0], list[Source]()
        for other in self.discrete:
            before = order.index(other.name) < order.index(first.name)
            ahead = not first.discrete and other.plates == first.plates
            loops = [plate for plate in other.plates if self.facts.plates[plate].first is not None]
            dims = tuple(self.facts.plates[plate].dim for plate in other.plates)
            beside = -min(dims, default=0) - len(dims)  # axes of its batch that no plate of its own takes
            plain = math.prod(other.shape[:beside]) == 1 and not loops and not other.own
            if other.name in together and set(other.plates) <= set(first.plates) and (before or ahead) and plain:
                reaches = frozenset(site.name for site in sites)
                source = Source(other.name, other.plates, None, dims, other.shape[beside:], reaches, feeds=other.name)
                source = replace(source, kind=other.kind, categories=other.categories)
                found.append(replace(source, drawn=True, ahead=not before))
        return found

    def _presence(self, sites: list[Site]) -> tuple[Level, ...]:
        """Returns what tells which elements of a table have data, where some may have none."""
        related = related_to(self._together(sites), self.facts)
        rows = [site for n in related if (site := self.facts.sites[n]).observed]
        levels = self.ways.levels(sites[0].plates, [], rows, [])
        can_lack = any(level.link for level in levels) or any(name in self.masks for x in levels for name in x.sites)
        return levels if can_lack else ()

    def _is_by_function(self, site: Site) -> bool:
        return callable(self._chosen(site.name, [site]))

    def _chosen(self, name: str, sites: list[Site]) -> Any:
        if not isinstance(self.inputs, dict):
            return self.inputs
        keys = [key for key in (name, *(site.name for site in sites), *sites[0].plates[-1:]) if key in self.inputs]
        return self.inputs[keys[0]] if keys else None

    def _named_source(self, target: tuple[str, ...], name: str, related: frozenset[str]) -> Source:
        for source in self.facts.sources:
            if name in (source.name, source.feeds):
                return source
        shape, axes = self.facts.shapes.get(name, ()), fitting_axes(name, target, self.facts)
        plates = [self.facts.plates[plate] for plate in target]
        if axes is None:
            known = [source.name for source in self.sources] or list(self.facts.shapes)
            sizes = " and ".join(f"{plate.size} rows for plate '{plate.name}'" for plate in plates)
            raise ValueError(
                f"plan_amortization: inputs names '{name}', which is no observed site and no argument with {sizes}. "
                f"Known: {known}."
            )
        indexed = {p.name for p, axis in zip(plates, axes, strict=True) if shape[axis] == p.full_size > p.size}
        rest = tuple(size for i, size in enumerate(shape) if i not in axes)
        dims = tuple(plate.dim for plate in plates)
        return Source(name, target, axes, dims, rest, related, indexed=frozenset(indexed))

    def _reach(self, name: str, sites: list[Site]) -> Reach | None:
        """Returns how far the encoder of a block sees beside an element's own data."""
        plates = sites[0].plates
        encoder = self._encoder_of(name, sites)
        couplings = self.judge.couplings(self._together(sites))
        loops = [plate for plate in plates if self.facts.plates[plate].series]
        if encoder is None:
            return Reach(loops[-1], None) if set(loops) & couplings else None
        if not isinstance(encoder, (Window, Recurrent)):
            return None
        along = encoder.along or next(iter([*loops[::-1], *sorted(couplings & set(plates))]), None)
        if along is None and isinstance(self.encoder, dict) and plates:
            along = plates[-1]
        if along is not None and along not in plates:
            raise ValueError(
                f"plan_amortization: {type(encoder).__name__}(along={along!r}) is to encode '{sites[0].name}', which "
                f"stands in the plates {list(plates)}."
            )
        return None if along is None else Reach(along, encoder.radius if isinstance(encoder, Window) else None)

    def _encoder_of(self, name: str, sites: list[Site]) -> Any:
        """Returns the encoder that was asked for; None for the default."""
        return encoder_for(self.encoder, name, [site.name for site in sites], sites[0].plates)

    def _block(
        self,
        name: str,
        sites: list[Site],
        levels: tuple[Level, ...],
        verdict: Verdict | None,
        reach: Reach | None,
        constant: bool,
    ) -> Block:
        names = tuple(site.name for site in sites)
        shapes = tuple(site.shape for site in sites)
        dims = tuple(math.prod(shape) for shape in shapes)
        levels = tuple(replace(level, width=sum(source.width for source in level.sources)) for level in levels)
        inputs = dict.fromkeys(source.name for level in levels for source in level.sources)
        coupled = {plate for site in self._together(sites).values() for plate in site.couples}
        chains = [plate for plate in sites[0].plates if self.facts.plates[plate].series]
        return Block(
            name=name,
            sites=names,
            plates=sites[0].plates,
            dim=sum(dims),
            inputs=tuple(inputs),
            features=sum(source.width for source in {s for level in levels for s in level.sources}),
            amortized=verdict is not None,
            closable=verdict.closable if verdict else None,
            dims=dims,
            shapes=shapes,
            levels=levels,
            rows=math.prod(self.facts.plates[plate].full_size for plate in sites[0].plates),
            exact_prior=coupled <= set(chains) and not any(s.children.intersection(names) for s in self.enumerated),
            chain=next((plate for plate in chains if plate in coupled), None),
            couples=tuple(plate for plate in sites[0].plates if plate in coupled),
            reach=reach,
            logits=tuple(site.logits for site in sites),
            distribution=sites[0].distribution,
            constant=constant,
            remedy=instead_of_table(sites[0], self.facts, sites[0].name in self.locals) if sites[0].plates else "",
        )

    # What cannot be.

    def _refuse_discrete(self) -> None:
        facts = self.facts
        if not any(site.observed for site in facts.sites.values()) and facts.empty:
            raise ValueError(
                f"plan_amortization: no site of the model is observed, and argument '{facts.empty[0]}' is None. "
                f"Pass the data that the posterior is conditioned on: {facts.empty[0]}=..."
            )
        for site in facts.sites.values():
            asked = any(site.name == other.name for other in self.discrete)
            if asked and site.logits is None:
                raise ValueError(
                    f"plan_amortization: discrete latents that are amortized are Categorical, OneHotCategorical or "
                    f"Bernoulli; '{site.name}' is none of these. Sum it out, or hide it from the guide: "
                    f"AutoAmortizedNormal(poutine.block(model, hide=['{site.name}']))."
                )
            if not site.observed and site.discrete and site in self.latents and not asked:
                raise ValueError(
                    f"Continuous inference cannot handle discrete sample site '{site.name}'. Consider enumerating that "
                    f"variable as documented in https://pyro.ai/examples/enumeration.html (in a model, in parallel: "
                    f"infer={{'enumerate': 'parallel'}}); or amortize it, encoder={{'{site.name}': MLP()}}; or hide it "
                    f"from the guide: AutoAmortizedNormal(poutine.block(model, hide=['{site.name}']))."
                )
            above = [other for other in facts.latents if other.enumerated and site.name in other.children]
            if above and site.fixed and not (site.discrete or site.foreign):
                raise NotImplementedError(
                    f"plan_amortization: site '{site.name}' is a Delta whose value depends on '{above[0].name}', which "
                    f"is summed out, so a guide cannot sample it. Write pyro.deterministic('{site.name}', ...) instead."
                )

    def _refuse_unreached(self) -> None:
        for site in self.latents:
            if site.unreached:
                raise ValueError(f"plan_amortization: {site.unreached}")
            summed = next((other.name for other in self.enumerated if other.name in site.switched), None)
            if summed is not None:
                raise ValueError(
                    f"plan_amortization: the support of site '{site.name}' depends on '{summed}', which is summed out, "
                    f"so that q of it has no one place. Amortize '{summed}', encoder={{'{summed}': MLP()}}; or write "
                    f"'{site.name}' on a fixed support, raw = pyro.sample('{site.name}_raw', dist.Uniform(0.0, 1.0)) "
                    f"and pyro.deterministic('{site.name}', low + (high - low) * raw)."
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
                    f"pyro.plate('{plate.name}', {plate.full_size}, subsample=indices), or "
                    f"{instead_of_table(site, self.facts, site.name in self.locals)}."
                )

    def _refuse_dataless(self, site: Site, chosen: Any) -> None:
        facts = self.facts
        if chosen is not None:
            sizes = ", ".join(str(facts.plates[plate].size) for plate in site.plates)
            raise ValueError(
                f"plan_amortization: inputs={{'{site.name}': {chosen!r}}}, but that has no row for each element of "
                f"'{site.name}' (plate '{'/'.join(site.plates)}'). Give a function f of the model's arguments that "
                f"returns shape ({sizes}, ...): inputs={{'{site.name}': f}}."
            )
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
        fitting = [name for name, shape in facts.shapes.items() if size in shape]
        what = [*same, *fitting, *facts.shapes, "x"][0]
        where = f" in plate '{plate.name}'" if plate else ""
        key = plate.name if plate else site.name
        raise ValueError(
            f"plan_amortization: cannot tell which data inform '{site.name}'{where}: {why}. Plan from at "
            f"least two rows that differ, or say it: AutoAmortizedNormal(model, inputs={{'{key}': ['{what}']}})."
        )
