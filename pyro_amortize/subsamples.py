"""Plates whose elements a model draws at random: which of them, and how to walk through all of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Args, Call, Kwargs, Model
from pyro_amortize.parameters import preserved
from pyro_amortize.places import Place
from pyro_amortize.structure import Plate, plates_of

Lengths = Callable[[str, Mapping[str, Any]], set[int]]


class Subsample(Messenger):
    """Fixes which elements of a plate a model sees, where the plate subsamples by itself."""

    def __init__(self, plate: str, indices: Tensor) -> None:
        super().__init__()
        self.plate = plate
        self.indices = indices

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) and msg["name"] == self.plate:
            msg["value"] = self.indices


def covering(plate: Plate) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields subsamples of a plate's own size that cover it, each with the mask of elements not seen before."""
    for start in range(0, plate.full_size, plate.size):
        indices = torch.arange(plate.full_size)[min(start, plate.full_size - plate.size) :][: plate.size]
        yield indices, indices >= start


def walked(model: Model, args: Args, kwargs: Kwargs, lengths: Lengths = lambda plate, arguments: set()) -> list[Plate]:
    """Returns the plates of which a model picks elements at random, out of data that hold all of them.

    A plate that takes its arguments as they are, minibatches, is none: these are as long as the subsample, or it shows
    the same observations whichever elements it is told to have. The model is left as found, and so is the random state.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        lengths: Says how long the arguments are along a plate, where that is known.
    """
    arguments = Call(model, args, kwargs).tensors
    with preserved(model, evaluating=True), torch.no_grad(), poutine.block():
        drawn = _Generic()
        sites = drawn.sites(model, args, kwargs)
        plates = [plate for plate in plates_of(sites).values() if plate.size < plate.full_size]
        picked = []
        for plate in (plate for plate in plates if plate.name in drawn.at_random):
            known = lengths(plate.name, arguments)
            if known & {plate.size, plate.full_size}:
                picked += [] if plate.size in known else [plate]
                continue
            seen = []
            for indices in (torch.arange(plate.size), torch.arange(plate.full_size)[-plate.size :]):
                with Subsample(plate.name, indices):
                    inside = [s for s in _Generic().sites(model, args, kwargs) if plate.name in plates_of([s])]
                seen.append([torch.as_tensor(s["value"]).nan_to_num() for s in inside if s["is_observed"]])
            if not seen[0] or not all(map(torch.equal, *seen)):
                picked.append(plate)
    return picked


def generic_sites(model: Model, args: Args, kwargs: Kwargs) -> list[Any]:
    """Returns the sample sites of a model, its latents at generic values; it is left as found."""
    with preserved(model, evaluating=True), torch.no_grad(), poutine.block():
        return _Generic().sites(model, args, kwargs)


def axis_of(site: Any, plate: Plate) -> int | None:
    """Returns the axis of a plate in the values of a site, counted from the right; None if it has none.

    Deterministic sites do not say which of their axes are plates: theirs is the first one as long as the plate.
    """
    if plate.name not in plates_of([site]):
        return None
    if not site["infer"].get("_deterministic"):
        return plate.dim - len(site["fn"].event_shape)
    shape = site["value"].shape
    return next((axis - len(shape) for axis, size in enumerate(shape) if size == plate.size), None)


class _Generic(Messenger):
    """Runs a model with its latents where their priors live, and notes the plates that draw their elements."""

    def __init__(self) -> None:
        super().__init__()
        self.at_random: set[str] = set()

    def sites(self, model: Model, args: Args, kwargs: Kwargs) -> list[Any]:
        with self:
            nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
        return [site for site in nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            self.at_random |= {msg["name"]} if msg["value"] is None else set()
        elif not msg["is_observed"] and msg["value"] is None:
            msg["value"] = Place().value(msg)
