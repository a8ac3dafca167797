"""Programs, models and guides, run for many draws: in one run where that gives what a run each gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import prune_subsample_sites, site_is_factor, site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.enumeration import CHUNK, side_by_side
from pyro_amortize.structure import plates_of
from pyro_amortize.subsamples import axis_of

Values = dict[str, Tensor]
Program = Callable[[int, int | None], Model]
"""Makes the program of so many draws from one on, side by side; with None, of that one draw alone."""


class Runs:
    """A program and its arguments, run once, and then for as many draws as wanted.

    The caller sees to it that modules are in eval mode and that nothing needs gradients.

    Attributes:
        sites: The sample sites of the run of the first draw, factors apart.
        indices: The elements of its plates.
    """

    def __init__(self, program: Program, args: Args, kwargs: Kwargs) -> None:
        self.program, self.args, self.kwargs = program, args, kwargs
        trace = poutine.trace(program(0, None)).get_trace(*args, **kwargs)
        self.indices = {name: site["value"] for name, site in trace.nodes.items() if site_is_subsample(site)}
        self.sites = _sites(trace)

    @property
    def nesting(self) -> int:
        """How many dimensions the plates take."""
        return max((-plate.dim for plate in plates_of(self.sites.values()).values()), default=0)

    def values(
        self,
        num_draws: int,
        nesting: int,
        together: bool = True,
        wanted: Callable[[Any], bool] = lambda _: True,
    ) -> Values:
        """Draws anew.

        Args:
            num_draws: Number of draws.
            nesting: How many dimensions to leave for plates.
            together: Whether draws may be made in one run, where that gives what a run each gives: at some of them,
                the first, the last, and the outermost ones of a few sites, the densities of all sites and the values of
                deterministic ones are to be those of a run each.
            wanted: Says of a site whether its values are to be kept.

        Returns:
            Site -> shape (num_draws, *site's shape).
        """
        names = [name for name, site in self.sites.items() if wanted(site)]
        if not names:
            return {}
        size = sum(site["value"].numel() for site in self.sites.values())
        chunk = min(num_draws, max(1, CHUNK // max(1, size)))
        first = self._together(chunk, nesting) if together and chunk > 1 else None
        parts = [] if first is None else [first]
        chunk = 1 if first is None else chunk
        for start in range(chunk * len(parts), num_draws, chunk):
            count = None if first is None else min(chunk, num_draws - start)
            parts.append(self._as_rows(self._run(start, count, nesting), count, nesting))
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _run(self, start: int, count: int | None, nesting: int) -> dict[str, Any]:
        program = side_by_side(self.program(start, count), count, nesting)
        return _sites(poutine.trace(program).get_trace(*self.args, **self.kwargs))

    def _as_rows(self, sites: Mapping[str, Any], count: int | None, nesting: int) -> Values:
        return {name: self._rows(name, site["value"], count, nesting) for name, site in sites.items()}

    def _together(self, count: int, nesting: int) -> Values | None:
        """Makes some draws in one run; None if these are not what a run each gives."""
        try:
            sites = self._run(0, count, nesting)
            rows = self._as_rows(sites, count, nesting)
            if set(sites) != set(self.sites):
                return None
            densities = {n: self._density(n, s, count, nesting) for n, s in sites.items() if not is_deterministic(s)}
            for k in _outermost({name: rows[name] for name in densities}):
                one = poutine.condition(self.program(k, None), data={name: rows[name][k] for name in densities})
                alone = _sites(poutine.trace(one).get_trace(*self.args, **self.kwargs))
                for name, site in alone.items():
                    pair = (densities[name][k], site["fn"].log_prob(site["value"])) if name in densities else None
                    if not _close(*(pair or (rows[name][k], site["value"]))):
                        return None
        except (ValueError, RuntimeError, IndexError, KeyError, AssertionError):
            return None
        return rows

    def _density(self, name: str, site: Any, count: int, nesting: int) -> Tensor:
        batch = self.sites[name]["fn"].batch_shape
        density: Tensor = site["fn"].log_prob(site["value"])
        return density.expand(count, *(1,) * (nesting - len(batch)), *batch).reshape(count, *batch)

    def _rows(self, name: str, value: Tensor, count: int | None, nesting: int) -> Tensor:
        """Brings the values of some draws to shape (draws, *site's shape)."""
        if count is None:
            return value[None]
        site = self.sites[name]
        shape = site["value"].shape
        if not is_deterministic(site):
            lacking = nesting - len(shape) + len(site["fn"].event_shape)
            return value.expand(count, *(1,) * lacking, *shape).reshape(count, *shape)
        if value.shape == shape:  # the same for all draws
            return value.expand(count, *shape)
        return value.reshape(count, *shape)


class Held(Messenger):
    """Gives latents their values, and plates their elements; latents stay latent."""

    def __init__(self, values: Mapping[str, Tensor], indices: Mapping[str, Any]) -> None:
        super().__init__()
        self.values, self.indices = values, indices

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            msg["value"] = self.indices.get(msg["name"], msg["value"])
        elif msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


def laid(value: Tensor, batch_dim: int, start: int, count: int | None, nesting: int) -> Tensor:
    """Takes some draws of a site, shape (draws, *site's shape), to stand to the left of plates; or one alone."""
    if count is None:
        return value[start]
    return value[start : start + count].reshape(count, *(1,) * (nesting - batch_dim), *value.shape[1:])


def run_at(
    model: Model,
    args: Args,
    kwargs: Kwargs,
    values: Values,
    indices: Mapping[str, Any],
    num_draws: int,
    *,
    handler: Callable[[Model], Model] = lambda model: model,
    together: bool = True,
    wanted: Callable[[Any], bool] = lambda _: True,
) -> tuple[Values, dict[str, Any]]:
    """Runs a model at draws of its latents.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Latent -> shape (num_draws, *site's shape). Others are drawn.
        indices: The elements of plates.
        num_draws: Number of draws.
        handler: Put around the model in each run.
        together: As of :meth:`Runs.values`.
        wanted: Likewise.

    Returns:
        The values of the sites that are wanted, and all sites in a run at the first draw.
    """
    first = Held({name: value[0] for name, value in values.items()}, indices)
    sites = Runs(lambda *_: handler(first(model)), args, kwargs)
    nesting = sites.nesting
    batches = {name: len(sites.sites[name]["fn"].batch_shape) for name in values if name in sites.sites}

    def program(start: int, count: int | None) -> Model:
        held = {name: laid(values[name], batch, start, count, nesting) for name, batch in batches.items()}
        return handler(Held(held, indices)(model))

    sites.program = program
    return sites.values(num_draws, nesting, together, wanted), sites.sites


def plates_by_axis(site: Any) -> tuple[str | None, ...]:
    """Returns the plate of each axis of a site's value."""
    names = {axis_of(site, plate): plate.name for plate in plates_of([site]).values()}
    return tuple(names.get(axis) for axis in range(-site["value"].dim(), 0))


def is_deterministic(site: Any) -> bool:
    """Whether a site is one of ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic"))


def _outermost(values: Values, sites: int = 4) -> set[int]:
    """Picks draws that differ: the first, the last, and those with the smallest and largest means of a few sites."""
    picked = {0, len(next(iter(values.values()))) - 1} if values else set()
    for value in list(values.values())[:sites]:
        means = value.reshape(len(value), -1).double().mean(1)
        picked |= {int(means.argmin()), int(means.argmax())}
    return picked


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True))


def _sites(trace: poutine.Trace) -> dict[str, Any]:
    sites = {name: site for name, site in prune_subsample_sites(trace).nodes.items() if site["type"] == "sample"}
    return {name: site for name, site in sites.items() if not site_is_factor(site)}
