"""A model run again and again with its latents, subsample indices and random state held, and one thing changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Call, Model
from pyro_amortize.loops import merged, split
from pyro_amortize.missing import refuse_nan
from pyro_amortize.places import FARTHER, PLACES, Place
from pyro_amortize.structure import Family, Plate
from pyro_amortize.supports import is_delta, support_of, undressed
from pyro_amortize.views import AS_THEY_ARE, View

Change = Callable[[Tensor, Tensor], Tensor]


class HeldRun(Messenger):
    """Runs a model with its latents, subsample indices and random state held at what the first run made them.

    A latent that is a function of others (a ``Delta``) is not held, but follows them.

    Args:
        model: The model.
        call: Its arguments.
        families: Sites to be merged, and the number of the first turn of each of their loops.
        place: Where the values at which latents are held are drawn.
        indices: Subsample indices that other runs held.
        view: How its sites are seen.

    Attributes:
        values: The values at which latents are held.
        nodes: The nodes of the last run's trace, as they are in the model.
    """

    def __init__(
        self,
        model: Model,
        call: Call,
        families: Sequence[Family] = (),
        loops: Mapping[str, int] | None = None,
        place: Place = PLACES[0],
        indices: dict[str, Any] | None = None,
        view: View = AS_THEY_ARE,
    ) -> None:
        super().__init__()
        self.model, self.view = model, view
        self.call = call
        self.families, self.loops = families, loops or {}
        self.place = place
        self.sites: dict[str, Any] = {}
        self.values: dict[str, Tensor] = {}
        self.indices: dict[str, Any] = {} if indices is None else indices
        self.drawn: set[str] = set()
        self.plate_dims: dict[str, dict[str, int]] = {}
        self.inputs: dict[str, Tensor] = {}
        self.unknowns: dict[str, Tensor] = {}
        self._latents: dict[str, Tensor] = {}
        self._observed: dict[str, Tensor] = {}
        self.nodes: dict[str, Any] = {}
        self._gradients = False

    def run(
        self,
        leaves: dict[str, Any] | None = None,
        latents: dict[str, Tensor] | None = None,
        observed: dict[str, Tensor] | None = None,
        seed: int = 0,
        under: Any = None,
        gradients: bool = False,
    ) -> dict[str, Any]:
        """Runs the model once, with some arguments, latents or observations other than held.

        Returns:
            The nodes of the trace, with ``log_prob`` (masks and scales applied) at every sample site; with
            ``gradients``, in a graph whose leaves are kept in ``inputs`` (arguments) and ``unknowns`` (latents).
        """
        self._latents, self._observed = split(latents or {}, self.sites), split(observed or {}, self.sites)
        self.inputs, self.unknowns, self._gradients = {}, {}, gradients
        values = {name: self._own(self.inputs, name, value) for name, value in self.call.tensors.items()}
        args, kwargs = self.call.replaced({**values, **(leaves or {})})
        pyro.set_rng_seed(seed)
        with torch.set_grad_enabled(gradients), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, at values far off
            warnings.filterwarnings("ignore", "Encountered ")  # of Pyro, where densities are not finite
            with poutine.block(), under or nullcontext(), self:
                trace = poutine.trace(self.model).get_trace(*args, **kwargs)
            trace = prune_subsample_sites(trace)
            for name, node in self.view.of(trace.nodes).items():
                trace.nodes[name] = node
            trace.compute_log_prob()
            for site in trace.observation_nodes:  # without validation densities take plain numbers
                trace.nodes[site]["value"] = torch.as_tensor(trace.nodes[site]["value"])
            self.nodes = dict(trace.nodes)
            self.sites = merged(trace.nodes, self.families, self.loops)
        return self.sites

    def _own(self, leaves: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
        """Copies a value, so that the model may change it; where there is to be a graph, of a leaf that is kept."""
        value = value.detach().clone()
        if not self._gradients or not value.is_floating_point():
            return value
        leaves[name] = value.requires_grad_()
        return value.clone()

    def fresh(self) -> dict[str, Tensor]:
        """Draws other values for the latents; those of a loop's sites are merged as the sites are."""
        pyro.set_rng_seed(1)
        nodes = dict(self.nodes)
        for name, value in ((name, value) for name, value in self.values.items() if name in nodes):
            nodes[name] = {**nodes[name], "value": self.place.another(nodes[name], value)}
        return {n: s["value"] for n, s in merged(nodes, self.families, self.loops).items() if s["type"] == "sample"}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self.drawn |= {name} if msg["value"] is None else set()
            msg["value"] = self.indices.get(name, msg["value"])
        elif msg["is_observed"]:
            msg["value"] = self._observed.get(name, msg["value"])
        elif not is_delta(msg["fn"]):
            if name not in self.values:
                self.values[name] = self.place.value(msg)
                events = len(msg["fn"].event_shape)
                self.plate_dims[name] = {f.name: f.dim - events for f in self.view.frames(msg) if f.vectorized}
            msg["value"] = self._own(self.unknowns, name, self._latents.get(name, self.values[name]))

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) and is_index(msg["value"]):
            self.indices.setdefault(msg["name"], msg["value"])


def places(
    model: Model,
    call: Call,
    families: Sequence[Family] = (),
    loops: Mapping[str, int] | None = None,
    seed: int = 0,
    indices: dict[str, Any] | None = None,
    count: int = len(PLACES),
    view: View = AS_THEY_ARE,
) -> Iterator[HeldRun]:
    """Runs a model at several values of its latents, at the prior's first, and yields the runs that it lives through.

    Validation is off, so that bad values give densities that are not finite. Subsample indices are those of the first.

    Raises:
        Exception: What the model raises under validation as it stands, if it raises at all values.
    """
    indices = {} if indices is None else indices
    found = 0
    for i in range(count):
        place = PLACES[i] if i < len(PLACES) else FARTHER[i % len(FARTHER)]
        held = HeldRun(model, call, families, loops, place, indices, view)
        try:
            with pyro.validation_enabled(False):
                held.run(seed=seed + i)
        except Exception as error:  # a model may do anything at a bad value
            if i + 1 >= len(PLACES) and not found:
                HeldRun(model, call, families, loops).run(seed=seed)
                raise error
            continue
        if not found:  # in the user's mode of validation
            refuse_nan(held.nodes.values(), "plan_amortization", call.tensors)
        found += 1
        yield held


def finite_place(model: Model, call: Call) -> HeldRun:
    """Runs a model where all its densities are finite, if that is found soon; else where its latents' priors live."""
    tried = []
    for held in places(model, call):
        if all_finite(held.sites):
            return held
        tried.append(held)
    return tried[0]


def all_finite(nodes: Mapping[str, Any]) -> bool:
    """Whether the densities of a run are finite."""
    return all(bool(site["log_prob"].isfinite().all()) for site in nodes.values() if "log_prob" in site)


def factors_of(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The sample sites with a density among the nodes of a trace."""
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not (site["is_observed"] and (site["mask"] is False or site["infer"].get("_deterministic")))
    }


class Base:
    """A place where a model is run with changes: values of its latents, and others to replace them by.

    Args:
        held: Runs the model; has drawn the values.

    Attributes:
        nodes: The nodes of its trace.
        factors: Its sites with a density, by name.
        fresh: The other values of its latents.
        noise: How far log-factors move by themselves.
        last: The nodes of the last run with a change.
    """

    def __init__(self, held: HeldRun) -> None:
        self.held = held
        with pyro.validation_enabled(False):
            self.nodes = held.run()
            self.fresh = held.fresh()
            again = held.run()
        self.factors = factors_of(self.nodes)
        self.noise = 0.0
        for name, site in self.factors.items():
            difference = (again[name]["log_prob"] - site["log_prob"]).abs().nan_to_num(0.0)
            self.noise = max(self.noise, 10 * float(difference.max()) if difference.numel() else 0.0)
        self.last: dict[str, Any] = {}
        self._reached: dict[tuple[str, ...], frozenset[str]] = {}

    def unchanged(self) -> dict[str, Any]:
        """Runs the model without a change; returns the nodes of its trace, as they are in the model."""
        with pyro.validation_enabled(False):
            self.held.run()
        return self.held.nodes

    @property
    def latents(self) -> dict[str, Any]:
        """The sites that are held, by name."""
        return {n: s for n, s in self.factors.items() if not s["is_observed"] and not is_delta(s["fn"])}

    def changed(
        self,
        leaves: dict[str, Any] | None = None,
        latents: Mapping[str, Change] | None = None,
        observed: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor] | None:
        """Runs the model with changes; returns how far each entry of each site's log-factor moved, None if it fails."""
        held = {name: site for name, site in self.latents.items() if name in (latents or {})}
        values = {name: (latents or {})[name](site["value"], self.fresh[name]) for name, site in held.items()}
        self.last = {}
        try:
            with pyro.validation_enabled(False):
                nodes = self.held.run(leaves, values, observed)
        except (ValueError, RuntimeError, IndexError):
            return None
        moved = {}
        for name, site in self.factors.items():
            before, after = site["log_prob"], nodes.get(name, {}).get("log_prob")
            if after is None or after.shape != before.shape:
                moved[name] = torch.full(before.shape, torch.inf)
            else:
                distance = torch.where(before == after, 0.0, (before - after).abs())
                distance = torch.where(before.isnan() & after.isnan(), 0.0, distance.nan_to_num(torch.inf))
                moved[name] = torch.where(distance <= self.noise, 0.0, distance).cpu()
        self.last = nodes
        return moved

    def altered(self) -> set[str]:
        """Returns the observed sites whose values the last change altered."""
        found = set()
        for name, site in self.factors.items():
            if site["is_observed"] and name in self.last:
                before, after = site["value"], self.last[name]["value"]
                same = before.shape == after.shape and torch.equal(torch.nan_to_num(before), torch.nan_to_num(after))
                found |= set() if same else {name}
        return found

    def reached(self, names: tuple[str, ...]) -> frozenset[str]:
        """Replaces latents together; returns the sites whose densities move, or whose values do if these follow."""
        if names not in self._reached:
            moved = self.changed(latents=dict.fromkeys(names, lambda _, fresh: fresh))
            found = set(self.factors) if moved is None else {n for n, distance in moved.items() if bool(distance.any())}
            for name, site in self.factors.items() if moved is not None else ():
                follows = not site["is_observed"] and is_delta(site["fn"])
                if follows and not torch.equal(site["value"], self.last[name]["value"]):
                    found.add(name)
            self._reached[names] = frozenset(found - set(names))
        return self._reached[names]


def site_cells(value: Tensor, event_dim: int, plates: Sequence[Plate]) -> Tensor:
    """Returns an observed value with its plates' axes first, expanded where it was broadcast."""
    dims = [plate.dim - event_dim for plate in plates]
    value = value.reshape((1,) * (max((-dim for dim in dims), default=0) - value.dim()) + value.shape)
    cells = value.movedim(dims, list(range(len(dims)))) if dims else value
    return cells.expand((*(plate.size for plate in plates), *cells.shape[len(dims) :]))


def is_index(value: Any) -> bool:
    """Tells whether the value of a plate's own site says which elements are present."""
    return not isinstance(value, Tensor) or (value.dim() == 1 and not value.is_floating_point())


def kind_of(fn: Any) -> tuple[str, int]:
    """Says what the values of an observed site are, and how many categories they have."""
    fn = undressed(fn)
    if isinstance(fn, torch.distributions.Categorical):
        return "category", fn.logits.shape[-1]
    support = support_of(fn)
    if type(support).__name__ in ("_Boolean", "_OneHot"):
        return "binary", 0
    if not support.is_discrete:
        return "real", 0
    return ("level" if hasattr(support, "upper_bound") else "count"), 0
