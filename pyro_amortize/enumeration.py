"""Discrete latents that a model marks to be summed out: its density without them, and draws of them given the rest.

A model is run with each such latent at all of its values side by side, to the left of its plates, as
``TraceEnum_ELBO`` does; Pyro's own contraction then sums over them, or draws from their joint posterior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.parameters import preserved
from pyro_amortize.structure import plates_of
from pyro_amortize.supports import is_enumerated

CHUNK = 2**22
DRAWS = "_draws"


class Tied(ValueError):
    """Elements of a plate have no density each, since a latent outside the plate is summed out for them together."""


def side_by_side(model: Model, count: int | None, nesting: int) -> Model:
    """Runs a model or guide for several draws at once, in a plate outside its own; with None, as it is."""
    return model if count is None else pyro.plate(DRAWS, count, dim=-1 - nesting)(model)


def enumerating(model: Model, count: int | None, nesting: int) -> Model:
    """Runs a model with the values of its enumerated sites to the left of its plates, and of that of the draws."""
    model = side_by_side(model, count, nesting)
    return EnumMessenger(first_available_dim=-1 - nesting - (count is not None))(model)


def summed_out(trace: poutine.Trace, plates: Mapping[str, int]) -> Tensor:
    """Sums the enumerated sites of a run out of its density, masks inside the sum and their common scale outside.

    Args:
        trace: Of :func:`enumerating`, of sites that count.
        plates: Name -> size of those whose elements are kept apart.

    Returns:
        The log density in nats, of the sizes' shape.

    Raises:
        Tied: An enumerated site outside these plates ties their elements.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    costs, factors, _, dims, scale = _compute_model_factors(trace, poutine.Trace())
    sizes = {trace.plate_to_symbol[name]: size for name, size in plates.items()}
    total = torch.zeros(())
    for terms, summed, factor in ((costs, set(), 1.0), (factors, dims, scale)):
        if terms:
            ring = LogRing(dim_to_size=sizes)
            term = contract_to_tensor(terms, summed, target_ordinal=frozenset(sizes), ring=ring)
            if len(term._pyro_dims) > len(sizes):
                raise Tied(f"an enumerated site outside of {list(plates)} ties their elements")
            total = total.to(term.device) + factor * term.permute([term._pyro_dims.index(symbol) for symbol in sizes])
    return total


def num_values(trace: poutine.Trace) -> int:
    """Counts the numbers that the sites of a run hold, with all values of the enumerated ones side by side."""
    return sum(math.prod(site["fn"].shape()) for site in trace.nodes.values() if site["type"] == "sample")


def draw_enumerated(
    model: Model,
    args: Args,
    kwargs: Kwargs,
    values: Mapping[str, Tensor],
    indices: Mapping[str, Any],
    num_draws: int,
) -> dict[str, Tensor]:
    """Draws a model's enumerated sites from their joint posterior given its other latents and the data.

    Modules run in eval mode, without gradients, and are left as found. Draws are made in one run of the model where
    that gives the densities that a run each gives, which is tried first.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Latent -> shape (draws, *shape of the site). Whatever has no value is left out of the densities.
        indices: Plate -> the elements that these values belong to, where the model subsamples.
        num_draws: Number of draws.

    Returns:
        Enumerated site -> shape (draws, *shape of the site).
    """
    with preserved(model, evaluating=True, random_state=False), torch.no_grad(), poutine.block():
        return _Conditional(model, args, kwargs, values, indices).draw(num_draws)


class _Given(Messenger):
    """Holds latents and subsamples; leaves what else is drawn out of the densities, and enumerates by numbers."""

    def __init__(self, values: Mapping[str, Tensor], indices: dict[str, Any]) -> None:
        super().__init__()
        self.values, self.indices = values, indices

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            msg["value"] = self.indices.get(name, msg["value"])
        elif name in self.values:
            msg["value"], msg["is_observed"] = self.values[name], True
        elif is_enumerated(msg) and isinstance(msg["fn"], dist.OneHotCategorical):
            msg["fn"] = dist.Categorical(logits=msg["fn"].logits)
            msg["infer"] = {**msg["infer"], "_one_hot": True}
        elif not msg["is_observed"] and not is_enumerated(msg):
            msg["mask"] = False

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            self.indices[msg["name"]] = msg["value"]
        elif msg["infer"].get("_one_hot"):
            msg["value"] = _one_hot(msg["fn"], msg["value"])


class _Conditional:
    """The enumerated sites of one model and call, given draws of the latents."""

    def __init__(
        self,
        model: Model,
        args: Args,
        kwargs: Kwargs,
        values: Mapping[str, Tensor],
        indices: Mapping[str, Any],
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.values, self.indices = values, {name: index for name, index in indices.items() if index is not None}
        sites = self._trace(self._given(0, None)).nodes
        sites = {name: site for name, site in sites.items() if site["type"] == "sample"}
        self.batches = {name: site["fn"].batch_shape for name, site in sites.items()}
        self.enumerated = {name: site["fn"] for name, site in sites.items() if is_enumerated(site)}
        self.nesting = max((-plate.dim for plate in plates_of(sites.values()).values()), default=0)

    def draw(self, num_draws: int) -> dict[str, Tensor]:
        chunk = None
        if num_draws > 1 and self._can_vectorize():
            alone = self._trace(enumerating(self._given(0, None), None, self.nesting))
            chunk = max(1, CHUNK // max(1, num_values(alone)))
        parts = []
        for start in range(0, num_draws, chunk or 1):
            parts.append(self._drawn(start, chunk and min(chunk, num_draws - start)))
        return {name: torch.cat([part[name] for part in parts]) for name in self.enumerated}

    def _drawn(self, start: int, count: int | None) -> dict[str, Tensor]:
        model = side_by_side(self._given(start, count), count, self.nesting)
        first = -1 - self.nesting - (count is not None)
        trace = self._trace(infer_discrete(model, first, temperature=1, strict_enumeration_warning=False))
        found = {}
        for name, fn in self.enumerated.items():
            lead = () if count is None else (count, *(1,) * (self.nesting - len(fn.batch_shape)))
            value = trace.nodes[name]["value"].expand(lead + fn.shape()).reshape((count or 1, *fn.shape()))
            one_hot = trace.nodes[name]["infer"].get("_one_hot")
            found[name] = _one_hot(trace.nodes[name]["fn"], value) if one_hot else value
        return found

    def _given(self, start: int, count: int | None) -> Model:
        """The model at one draw of the latents, or at several."""
        if count is None:
            return _Given({name: value[start] for name, value in self.values.items()}, self.indices)(self.model)
        held = {}
        for name, value in self.values.items():
            lacking = self.nesting - len(self.batches[name])
            part = value[start : start + count]
            held[name] = part.reshape((count, *(1,) * lacking, *part.shape[1:]))
        return _Given(held, self.indices)(self.model)

    def _trace(self, model: Model) -> poutine.Trace:
        return prune_subsample_sites(poutine.trace(model).get_trace(*self.args, **self.kwargs))

    def _density(self, start: int, count: int | None) -> Tensor:
        trace = self._trace(enumerating(self._given(start, count), count, self.nesting))
        return summed_out(trace, {} if count is None else {DRAWS: count})

    def _can_vectorize(self) -> bool:
        """Tries whether two draws in one run have the densities that they have in a run each."""
        try:
            together = self._density(0, 2)
            alone = torch.stack([self._density(k, None) for k in range(2)])
        except (ValueError, RuntimeError, IndexError, KeyError):
            return False
        return bool(torch.allclose(together, alone, rtol=1e-4))


def _one_hot(fn: Any, value: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(value, fn.logits.shape[-1]).to(fn.logits.dtype)
