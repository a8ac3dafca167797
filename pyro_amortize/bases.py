"""Where a model is run with changes: values of its latents at which its densities show what they depend on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_amortize.calls import Call, Model
from pyro_amortize.held import Base, HeldRun, all_finite, factors_of, places
from pyro_amortize.loops import find_loops
from pyro_amortize.places import PLACES
from pyro_amortize.probes import Probes
from pyro_amortize.structure import Family, Plate
from pyro_amortize.supports import is_delta, undressed
from pyro_amortize.views import AS_THEY_ARE, View

Edge = tuple[str, str, str]
"""That a latent, or an argument, enters the density of a site: which of the two, its name, the site's."""
MOST = 40
"""At how many places a model is run before its densities are said to be finite nowhere."""


def look(
    model: Model,
    call: Call,
    hides: Callable[[Any], bool],
    loose: frozenset[str] = frozenset(),
    view: View = AS_THEY_ARE,
) -> Probes:
    """Looks at a model where its latents' priors live, and at other places if there is more to be seen.

    What there is to be seen is told by the graph of gradients, which does not know how far a density moves: latents
    and arguments that it leads to. A place shows it if densities are finite there, and move when a latent is replaced.

    Args:
        model: The model.
        call: Its arguments.
        hides: Tells of a site whether the model hides it from its guide.
        loose: Names of loops that are not to be seen as such.
        view: How its sites are seen.

    Raises:
        ValueError: The density of an observation, or of a latent, is finite at no place.
    """
    return _Search(model, call, loose, view).probes(hides)


class _Search:
    """Runs a model at one place after the other until all is seen.

    Attributes:
        finite: Which entries of each site's density were finite at some place.
        shown: For each base that adds something, what it shows.
        wanted: What there is to be seen. An edge from nowhere says that all of a site's density is finite.
    """

    def __init__(self, model: Model, call: Call, loose: frozenset[str], view: View) -> None:
        self.model, self.call, self.loose, self.view = model, call, loose, view
        self.unmerged: dict[str, Any] = {}
        self.families: tuple[Family, ...] = ()
        self.loops: dict[str, Plate] = {}
        self.finite: dict[str, Tensor] = {}
        self.shown: list[tuple[Base, set[Edge]]] = []
        self.wanted: set[Edge] = set()

    def probes(self, hides: Callable[[Any], bool]) -> Probes:
        """Returns the model at the fewest places that show as much as all that were tried."""
        for number, held in enumerate(places(self.model, self.call, count=MOST, view=self.view)):
            base = self._base(held)
            if number < len(PLACES) or self._missing() & _wholly_finite(base):
                self._try(base)
            is_finite = all(bool(entries.all()) for entries in self.finite.values())
            if is_finite and (number + 1 >= len(PLACES) or not self._missing()):
                break
        self._refuse()
        self._validate()
        unseen = {
            latent: frozenset(
                site for kind, name, site in self._missing() if (kind, name) == ("latent", latent) and site
            )
            for latent in self.shown[0][0].latents
        }
        return Probes(hides, self._chosen(), unseen, self.unmerged, self.families, self.loops)

    def _base(self, held: HeldRun) -> Base:
        if not self.unmerged:
            self.unmerged = factors_of(held.sites)
            families, loops = find_loops(self.unmerged)
            self.families = tuple(family for family in families if not self.loose & set(family.loops))
            self.loops = {name: plate for name, plate in loops.items() if name not in self.loose}
        held.families = self.families
        held.loops = {name: plate.first or 0 for name, plate in self.loops.items()}
        base = Base(held)
        for name, entries in _finite(base).items():
            before = self.finite.get(name, entries)
            self.finite[name] = entries | before if entries.shape == before.shape else before
        return base

    def _try(self, base: Base) -> None:
        """Keeps a base if it shows what none did before."""
        if not self.shown:
            self.wanted = _graph(base) | {("", "", name) for name in self.finite}
        elif not self._adds(base):
            return
        shown = _wholly_finite(base)
        shown |= {("latent", name, site) for name in base.latents for site in base.reached((name,))}
        for name in base.held.call.tensors:
            shown |= _moved_by(base, name)
            self.wanted |= {("argument", name, site) for site in base.altered()}
        self.shown.append((base, shown))

    def _missing(self) -> set[Edge]:
        """What no base has shown; an edge to nowhere says that no data were seen to depend on a latent."""
        shown = set[Edge]().union(*(edges for _, edges in self.shown))
        base, _ = self.shown[0]
        observed = {name for name, site in base.factors.items() if site["is_observed"]}
        informed, found = set[str](), observed
        while found:
            informed |= found
            found = {name for kind, name, site in shown if kind == "latent" and site in informed} - informed
        apart = set(base.latents) - informed if observed else set()
        return self.wanted - shown | {("latent", name, "") for name in apart}

    def _adds(self, base: Base) -> bool:
        """Whether a base shows something of what is missing, by few runs."""
        missing = self._missing()
        if missing & _wholly_finite(base):
            return True
        latents = {edge for edge in missing if edge[0] == "latent" and edge[1] in base.latents}
        apart = tuple(sorted(name for _, name, site in latents if not site))
        if apart and base.reached(apart):
            return True
        reached = base.reached(tuple(sorted({name for _, name, _ in latents}))) if latents else frozenset()
        if any(site in reached for _, _, site in latents):
            return True
        return any(
            missing & _moved_by(base, name) for name in {name for kind, name, _ in missing if kind == "argument"}
        )

    def _chosen(self) -> list[Base]:
        """The fewest bases that show as much as all."""
        left, chosen = set[Edge]().union(*(edges for _, edges in self.shown)), list[Base]()
        while left:
            base, edges = max(self.shown, key=lambda pair: len(pair[1] & left))
            chosen.append(base)
            left -= edges
        return chosen or [self.shown[0][0]]

    def _validate(self) -> None:
        """Runs the model in the user's mode of validation; raises what it raises wherever all densities are finite."""
        errors: list[Exception] = []
        for base in (base for base, _ in self.shown if all_finite(base.nodes)):
            try:
                base.held.run()
                return
            except Exception as error:
                errors.append(error)
        for held in places(self.model, self.call, view=self.view) if errors else ():
            with suppress(Exception):
                held.run()
                return
        if errors:
            raise errors[0]

    def _refuse(self) -> None:
        """Refuses a site whose density is finite nowhere."""
        base, _ = self.shown[0]
        for name, entries in self.finite.items():
            if bool(entries.all()):
                continue
            site = base.factors[name]
            where = tuple((~entries).nonzero()[0].tolist())
            event_shape = site["value"].shape[site["value"].dim() - len(site["fn"].event_shape) :]
            value = site["value"].expand(entries.shape + event_shape)[where]
            density, count = float(site["log_prob"][where]), int((~entries).sum())
            kind = type(undressed(site["fn"])).__name__
            tried = f"at every value of the latents that was tried, at {count} of {entries.numel()} values"
            if not site["is_observed"]:
                raise ValueError(
                    f"plan_amortization: the density of latent '{name}', {kind}, is {density} at every value that was "
                    f"tried ({_told(value)}, say), so it cannot be inferred. Take another prior, or reparameterize it."
                )
            if is_delta(site["fn"]):
                raise ValueError(
                    f"plan_amortization: the density of '{name}' is {density} {tried}: an observation cannot be an "
                    f"exact function of a latent. Give it a noise: pyro.sample('{name}', dist.Normal(..., 0.01), "
                    f"obs=...)."
                )
            raise ValueError(
                f"plan_amortization: '{name}' holds {_told(value)}, where {kind}'s density is not finite: it is "
                f"{density} {tried}. Mask such values, 'with poutine.mask(mask=...)', or take a distribution whose "
                f"support holds them."
            )


def _finite(base: Base) -> dict[str, Tensor]:
    """Which entries of the densities of a base are finite; ``pyro.factor`` apart, which may forbid values."""
    return {name: site["log_prob"].isfinite() for name, site in base.factors.items() if not site_is_factor(site)}


def _wholly_finite(base: Base) -> set[Edge]:
    return {("", "", name) for name, entries in _finite(base).items() if bool(entries.all())}


def _moved_by(base: Base, argument: str) -> set[Edge]:
    """Moves all numbers of an argument on by one; returns where that moves a density."""
    leaf = base.held.call.tensors[argument]
    base.last = {}
    if _is_constant(leaf):
        return set()
    moved = base.changed(leaves={argument: leaf.flatten().roll(1).reshape(leaf.shape)}) or {}
    return {("argument", argument, name) for name, distance in moved.items() if bool(distance.any())}


def _graph(base: Base) -> set[Edge]:
    """Which latents and arguments the gradient of each site's density leads to; of loops, the families."""
    held = base.held
    try:
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, where numbers are taken out of tensors that have gradients
            factors = factors_of(held.run(gradients=True))
    except Exception:  # a model need not be differentiable: anything may enter what is observed after it
        order, observed = list(base.factors), [name for name, site in base.factors.items() if site["is_observed"]]
        return {("latent", n, site) for n in base.latents for site in observed if order.index(n) < order.index(site)}
    inputs = {id(leaf): ("argument", name) for name, leaf in held.inputs.items()}
    for name, leaf in held.unknowns.items():
        family = next((family.name for family in held.families if family.numbers(name) is not None), name)
        inputs[id(leaf)] = "latent", name if name in base.latents else family
    ends = {name: _leaves(site["log_prob"].grad_fn) for name, site in factors.items()}
    edges = {(*inputs[leaf], name) for name, leaves in ends.items() for leaf in leaves & set(inputs)}
    constant = {name for name, leaf in held.inputs.items() if _is_constant(leaf)}
    return {edge for edge in edges if edge[1] not in ({edge[2]} if edge[0] == "latent" else constant)}


def _is_constant(value: Tensor) -> bool:
    return bool((value.flatten() == value.flatten()[:1]).all())


def _leaves(function: Any) -> set[int]:
    """The leaves of a graph of gradients."""
    seen, front, found = set[Any](), [function], set[int]()
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {id(node.variable)} if hasattr(node, "variable") else set()
        front += [before for before, _ in node.next_functions]
    return found


def _told(value: Tensor) -> str:
    return f"{float(value):.6g}" if value.numel() == 1 else str([round(x, 4) for x in value.flatten()[:3].tolist()])
