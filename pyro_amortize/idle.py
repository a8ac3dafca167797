"""Latents of chains on which no density depends, or none of some of their entries: these are left to the prior."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.draws import Held, Runs, laid
from pyro_amortize.supports import (
    can_be_drawn,
    generic_value,
    is_delta,
    is_free,
    site_mask,
    why_unreached,
    without_masks,
)


def left_latents(model: Model, args: Args, kwargs: Kwargs, sites: list[Any]) -> dict[str, Tensor]:
    """Returns latents that chains cannot draw, but on which no other density depends, and values to hold them at.

    Raises:
        ValueError: One has no bijection from the reals, or is an angle, and others depend on it.
    """
    values = {site["name"]: site["value"] for site in sites if not site["is_observed"]}
    left = {}
    for site in sites:
        name = site["name"]
        drawn = is_free(site) or not (site["is_observed"] or is_delta(site["fn"]) or site["fn"].has_enumerate_support)
        why = why_unreached(site) if drawn else ""
        if not why:
            continue
        try:
            needed = not can_be_drawn(site["fn"])
            needed = needed or _moves_others(model, args, kwargs, values, name, site["fn"].sample())
        except NotImplementedError:  # it has no density
            needed = True
        if needed:
            raise ValueError(f"run_mcmc: {why}")
        left[name] = site["value"]
    return left


class Left(Messenger):
    """Holds latents, and does not count them."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["is_observed"], msg["mask"] = self.values[msg["name"]], True, False


def beside(
    model: Model, args: Args, kwargs: Kwargs, chain: dict[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """Draws some latents from the model, given each draw of the others."""

    def program(start: int, count: int | None) -> Model:
        rows = {n: laid(v, batches.get(n, 0), start, count, nesting) for n, v in chain.items()}
        return Held(rows, {})(model)

    if not names:
        return {}
    batches, nesting = dict[str, int](), 0
    with torch.no_grad(), poutine.block():
        runs = Runs(program, args, kwargs)
        batches = {name: len(site["fn"].batch_shape) for name, site in runs.sites.items()}
        nesting = runs.nesting
        found = runs.values(len(next(iter(chain.values()))), nesting)
    return {name: found[name] for name in names}


class WithPrior(Messenger):
    """Takes the masks off some latents.

    Args:
        names: Of these.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.names:
            msg["mask"], msg["fn"] = None, without_masks(msg["fn"])


def _moves_others(
    model: Model,
    args: Args,
    kwargs: Kwargs,
    values: dict[str, Tensor],
    name: str,
    other: Tensor,
    own: bool = False,
) -> bool:
    """Gives a latent another value; tells whether the density of another site moves, or its own if that counts."""

    def densities(values: dict[str, Tensor]) -> dict[str, Tensor]:
        with poutine.block(), pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
        return {name: site["log_prob_sum"] for name, site in trace.nodes.items() if "log_prob_sum" in site}

    before, after = densities(values), densities({**values, name: other})
    return any(not torch.equal(density, after[site]) for site, density in before.items() if own or site != name)


def idle_latents(model: Model, args: Args, kwargs: Kwargs, sites: list[Any]) -> list[str]:
    """Finds the latents of whose entries a mask covers some, on which no density depends."""
    latents = {site["name"]: site for site in sites if not site["is_observed"]}
    found = ((name, site_mask(site)) for name, site in latents.items())
    masks = {name: mask for name, mask in found if mask is not None and not bool(mask.all())}
    values = {name: site["value"] for name, site in latents.items()}

    def is_idle(name: str, mask: Tensor) -> bool:
        other = torch.where(mask, values[name], generic_value(latents[name]))
        return not _moves_others(model, args, kwargs, values, name, other, own=True)

    return [name for name, mask in masks.items() if is_idle(name, mask)]
