"""A model run again and again with its latents, subsample indices and random state held, and one thing changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Call, Model
from pyro_amortize.loops import merged, split
from pyro_amortize.missing import refuse_nan
from pyro_amortize.structure import Family, Plate
from pyro_amortize.supports import generic_value, support_of, undressed


class HeldRun(Messenger):
    """Runs a model with its latents, subsample indices and random state held at what the first run made them.

    Args:
        model: The model.
        call: Its arguments.
        families: Sites to be merged, and the number of the first turn of each of their loops.
    """

    def __init__(
        self, model: Model, call: Call, families: Sequence[Family] = (), loops: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.families, self.loops = families, loops or {}
        self.sites: dict[str, Any] = {}
        self.values: dict[str, Tensor] = {}
        self.indices: dict[str, Any] = {}
        self.drawn: set[str] = set()
        self.plate_dims: dict[str, dict[str, int]] = {}
        self._latents: dict[str, Tensor] = {}
        self._observed: dict[str, Tensor] = {}

    def run(
        self,
        leaves: dict[str, Any] | None = None,
        latents: dict[str, Tensor] | None = None,
        observed: dict[str, Tensor] | None = None,
        seed: int = 0,
        under: Any = None,
    ) -> dict[str, Any]:
        """Runs the model once, with some arguments, latents or observations other than held.

        Returns:
            The nodes of the trace, with ``log_prob`` (masks and scales applied) at every sample site.
        """
        self._latents, self._observed = split(latents or {}, self.sites), split(observed or {}, self.sites)
        values = {name: value.clone() for name, value in self.call.tensors.items()}
        args, kwargs = self.call.replaced({**values, **(leaves or {})})
        pyro.set_rng_seed(seed)
        with torch.no_grad(), poutine.block(), under or nullcontext(), self:
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        trace = prune_subsample_sites(trace)
        if not self.sites:
            refuse_nan(trace.nodes.values(), "plan_amortization", self.call.tensors)
        with torch.no_grad():
            trace.compute_log_prob()
            self.sites = merged(trace.nodes, self.families, self.loops)
        return self.sites

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self.drawn |= {name} if msg["value"] is None else set()
            msg["value"] = self.indices.get(name, msg["value"])
        elif msg["is_observed"]:
            msg["value"] = self._observed.get(name, msg["value"])
        else:
            if name not in self.values:
                self.values[name] = generic_value(msg)
                events = len(msg["fn"].event_shape)
                self.plate_dims[name] = {f.name: f.dim - events for f in msg["cond_indep_stack"] if f.vectorized}
            msg["value"] = self._latents.get(name, self.values[name])

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and is_index(msg["value"]):
            self.indices.setdefault(msg["name"], msg["value"])


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
