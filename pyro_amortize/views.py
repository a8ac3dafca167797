"""A run of a model, seen with fewer plates: those whose elements are another's, and events with an entry for each.

Latents may stand in one plate and their data in another of as many elements, ``y[n]`` given ``z[n]``; or their data are
one event, ``Normal(z, 1).to_event(1)``. Seen so, rows of these data stand in the latents' own plate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample

from pyro_amortize.structure import plates_of


@dataclass(frozen=True)
class View:
    """How the sites of a run are seen.

    Attributes:
        same: Plates whose elements are those of others, and which.
        events: Observed sites outside plates whose event has an axis of rows, and which, from the right. The rows
            stand in a plate of the site's own.
    """

    same: Mapping[str, str] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)

    def of(self, nodes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the nodes of a trace as they are seen; to be called before densities are computed."""
        return {name: self._seen(node) if node["type"] == "sample" else node for name, node in nodes.items()}

    def frames(self, site: Any) -> tuple[Any, ...]:
        """Returns the frames around a site."""
        return tuple(
            frame._replace(name=self.same[frame.name]) if frame.name in self.same else frame
            for frame in site["cond_indep_stack"]
        )

    def _seen(self, site: Any) -> Any:
        axis = self.events.get(site["name"])
        if axis is not None and _is_event_of_rows(site):
            size = site["fn"].event_shape[axis]
            frame = CondIndepStackFrame(rows_of(site["name"]), axis, size, 0, size)
            site = {**site, "fn": site["fn"].base_dist, "cond_indep_stack": (*site["cond_indep_stack"], frame)}
        return {**site, "cond_indep_stack": self.frames(site)} if self.same else site

    def joining(self, same: Mapping[str, str]) -> View:
        """Returns the view in which plates are those of others, too; events whose rows are in none stay whole."""
        joined = dict(self.same)
        for mine, other in same.items():
            other = joined.get(other, other)
            if other != mine:
                joined = {each: other if to == mine else to for each, to in joined.items()} | {mine: other}
        return View(joined, {name: axis for name, axis in self.events.items() if rows_of(name) in joined})


def rows_of(site: str) -> str:
    """Returns the name of the plate in which rows of an event are seen."""
    return f"rows of {site}"


def events_of_rows(nodes: Mapping[str, Any]) -> dict[str, int]:
    """Returns observed events that may hold a row for each element of a plate of latents without data of its own."""
    sites = [node for node in nodes.values() if node["type"] == "sample" and not site_is_subsample(node)]
    of_data = plates_of(site for site in sites if site["is_observed"])
    sizes = {plate.size for name, plate in plates_of(sites).items() if name not in of_data}
    found: dict[str, int] = {}
    for site in sites:
        if site["is_observed"] and not site["infer"].get("_deterministic") and _is_event_of_rows(site):
            shape = site["fn"].event_shape
            axes = [axis for axis in range(-1, -1 - len(shape), -1) if shape[axis] in sizes]
            found |= {site["name"]: axes[0]} if axes else {}
    return found


def _is_event_of_rows(site: Any) -> bool:
    fn = site["fn"]
    around = any(frame.vectorized for frame in site["cond_indep_stack"])
    whole = getattr(fn, "reinterpreted_batch_ndims", None) == len(getattr(fn, "event_shape", ()))
    return whole and not around and not fn.batch_shape


AS_THEY_ARE = View()
"""The view of a run that changes nothing."""
