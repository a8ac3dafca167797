"""A model and example arguments, turned into facts: what depends on what, found by running the model.

Of a long call the model is run on some rows only, where these stand for all. Nothing is changed by looking: not the
random state, the param store, module buffers, or a Pyro handler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pyro_amortize.bases import look
from pyro_amortize.calls import Args, Call, Kwargs, Model, opened
from pyro_amortize.elements import Elements
from pyro_amortize.excerpt import FEW, Long, Part
from pyro_amortize.held import places
from pyro_amortize.labels import LabelProbes
from pyro_amortize.latents import LatentProbes
from pyro_amortize.parameters import preserved
from pyro_amortize.probes import Probes
from pyro_amortize.slices import SliceProbes
from pyro_amortize.sources import SourceProbes
from pyro_amortize.structure import Link, Structure, plates_of
from pyro_amortize.views import View, events_of_rows


def examine(model: Model, args: Args, kwargs: Kwargs) -> Structure:
    """Finds the facts about a model that a plan needs.

    A long call is examined on :data:`~pyro_amortize.excerpt.FEW` random rows and the rows of each column's extremes,
    NaN among them. That these stand for all rows is checked by running the model on two such parts of different
    lengths: its sites, and their shapes but for plates, have to be the same, and plates to be as long as the parts or
    of one size. Otherwise, or if the model does not run on a part, it is examined on all rows, at a cost in time and
    memory that grows with them. A model that does something else at a certain number of rows is not seen through.

    Args:
        model: A Pyro model.
        args: Its positional arguments, with real data in them.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: An argument is a numpy array, or one of pandas that the model takes for a tensor.
    """
    call = Call(model, args, kwargs)
    for name, value in call.leaves.items():
        if isinstance(value, np.ndarray):
            raise ValueError(
                f"plan_amortization: argument '{name}' is a numpy array; Pyro's densities need tensors. "
                f"Pass torch.as_tensor({name})."
            )
    parts = (_examined_in_part(model, long) for long in Long.ways(call))
    try:
        return next((facts for facts in parts if facts is not None), None) or _examined(model, call)
    except (AttributeError, TypeError, ValueError) as error:
        frames = [name for name, value in call.leaves.items() if type(value).__module__.startswith("pandas")]
        if not frames:
            raise
        raise ValueError(
            f"plan_amortization: the model fails on argument '{frames[0]}', of pandas; Pyro's densities need tensors. "
            f"Pass torch.tensor({frames[0]}.to_numpy())."
        ) from error


def _examined(model: Model, call: Call) -> Structure:
    model, hides = opened(model)
    with preserved(model, evaluating=True):
        view, joined = None, View(events=events_of_rows(next(places(model, call)).sites))
        while view != joined:
            view = joined
            probes = look(model, call, hides, view=view)
            facts = _structure(probes)
            joined = view.joining(probes.same)
        loose = frozenset(name for name in probes.loops if _is_loose(name, facts, probes))
        return _structure(look(model, call, hides, loose, view)) if loose else facts


def _examined_in_part(model: Model, long: Long) -> Structure | None:
    """Examines a model on some rows of a long call; returns None where these may not stand for all."""
    try:  # a model may fail in any way on fewer rows than it is meant for
        some, extremes = long.some(FEW), long.extremes()
        rows, fewer = (torch.cat([part, extremes]).unique() for part in (some, some[::4]))
        call = Call(model, *long.on(rows))
        sites, others = _sites(model, call), _sites(model, Call(model, *long.on(fewer)))
        sizes = _stretched(sites, others, {(len(rows), len(fewer)): long.length})
        if not sizes:
            return None
        facts = _examined(model, call)
    except Exception:
        return None
    if any(set(site.own) & set(sizes) for site in facts.sites.values()):  # an element that grows with the rows
        return None
    sizes = {name: size for name, size in sizes.items() if name in facts.plates}
    part = Part(long, rows, {name: facts.plates[name] for name in sizes})
    whole = {}
    for name, (size, full) in sizes.items():
        drawn = facts.plates[name].at_random and size < full
        whole[name] = replace(facts.plates[name], size=size, full_size=full, at_random=drawn)
    shapes = {name: tuple(leaf.shape) for name, leaf in long.call.tensors.items()}
    return replace(facts, plates={**facts.plates, **whole}, shapes=shapes, part=part)


def _sites(model: Model, call: Call) -> dict[str, Any]:
    model, _ = opened(model)
    with preserved(model, evaluating=True):
        nodes = next(places(model, call)).sites
    return {name: site for name, site in nodes.items() if site["type"] == "sample"}


def _stretched(
    sites: dict[str, Any], others: dict[str, Any], lengths: dict[tuple[int, int], int]
) -> dict[str, tuple[int, int]] | None:
    """Compares a run on some rows with one on fewer.

    Returns:
        Size and full size that each plate has on all rows if it grows with them; None if anything else differs.
    """
    if {name: _own_shape(site) for name, site in sites.items()} != {n: _own_shape(s) for n, s in others.items()}:
        return None
    plates, shorter, found = plates_of(sites.values()), plates_of(others.values()), {}
    for name, plate in plates.items():
        pairs = (plate.size, shorter[name].size), (plate.full_size, shorter[name].full_size)
        if any(now != then and (now, then) not in lengths for now, then in pairs):
            return None
        if any(now != then for now, then in pairs):
            size, full_size = (lengths.get(pair, pair[0]) for pair in pairs)
            found[name] = size, full_size
    return found


def _own_shape(site: Any) -> tuple[int, ...]:
    """The shape of a site without the plates around it."""
    batch, event = getattr(site["fn"], "batch_shape", ()), getattr(site["fn"], "event_shape", ())
    dims = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    return (*(size for i, size in enumerate(batch) if i - len(batch) not in dims), *event)


def _structure(probes: Probes) -> Structure:
    latents, data, labels = LatentProbes(probes), SourceProbes(probes), LabelProbes(probes)
    sites = {name: latents.site(name) for name in probes.factors}
    sites = latents.with_supports(sites)
    probes.links = _unambiguous(probes.links)
    sources, indistinct = data.sources()
    sites = {n: replace(s, mask=data.mask(n, sources)) if s.observed else s for n, s in sites.items()}
    masked = {name for name, site in sites.items() if site.mask is not None}
    sources = [replace(s, missing=s.missing or s.reaches <= masked) for s in sources]
    sources = [replace(s, by_cell=s.missing and data.is_masked_by_cell(s)) for s in sources]
    slices = SliceProbes(probes, masked)
    sources = [slices.sliced(s) for s in sources]
    sources = [replace(s, labels=labels.labels(s) if labels.tells_more(s, sources) else ()) for s in sources]
    hidden = {plate.name: data.hidden(plate, sources) for plate in probes.plates.values()}
    for plate in probes.plates.values():
        if any(link.to == plate.name for link in probes.links) and not hidden[plate.name]:
            hidden[plate.name] = data.relabelled(plate, sources)
    params = tuple(name for name, node in probes.base.items() if node["type"] == "param")
    shapes = {name: tuple(leaf.shape) for name, leaf in probes.held.call.tensors.items()}
    empty = tuple(name for name, leaf in probes.held.call.leaves.items() if leaf is None)
    links = tuple(probes.links)
    families = probes.families
    facts = Structure(sites, probes.plates, tuple(sources), links, families, hidden, indistinct, params, shapes, empty)
    placed = [set(source.plates) for source in sources]
    lacking = any(site.plates and not any(set(site.plates) <= plates for plates in placed) for site in facts.latents)
    carried = data.carried() | (data.shifted() if lacking else {})
    facts = replace(facts, parameters=tuple(probes.held.call.parameters), carried=carried)
    facts = replace(facts, same=probes.held.view.same, events=probes.held.view.events)
    return _with_unseen(_with_elements(facts, latents), probes.unseen)


def _with_elements(facts: Structure, latents: LatentProbes) -> Structure:
    """Makes plates that are latents' own dimensions of their elements."""
    own = Elements(facts).own()
    sites = dict(facts.sites)
    for name, gone in own.items():
        plates = tuple(plate for plate in sites[name].plates if plate not in gone)
        shape = latents.element_shape(name, plates)
        sites[name] = replace(
            sites[name], plates=plates, own=gone, shape=shape, couples=sites[name].couples - set(gone)
        )
    return replace(facts, sites=sites)


def _with_unseen(facts: Structure, unseen: Mapping[str, frozenset[str]]) -> Structure:
    """Lets latents that were not seen to inform data inform those whose densities they enter all the same."""
    idle = {
        site.name: site for site in facts.sites.values() if unseen.get(site.name) and not facts.informed_by(site.name)
    }
    doubtful = {n: replace(site, children=site.children | unseen[n], flat=True) for n, site in idle.items()}
    found = replace(facts, sites=facts.sites | doubtful)
    return replace(found, sites={n: s if found.informed_by(n) else facts.sites[n] for n, s in found.sites.items()})


def _is_loose(loop: str, facts: Structure, probes: Probes) -> bool:
    """Whether a loop only looks like one: sites with numbers in their names, but nothing that runs through them.

    Indicators or items of each row are such. Rows themselves, drawn in a loop, have an axis of an argument. Latents
    drawn in a loop of their own have to reach the data of their turn first.
    """
    if any(frame.name == loop for site in probes.unmerged.values() for frame in site["cond_indep_stack"]):
        return facts.plates[loop].series and not LatentProbes(probes).reach_in_turn(loop)
    inside = [site for site in facts.sites.values() if loop in site.plates]
    sources = [source for source in facts.sources if loop in source.plates]
    runs = any(site.markov or loop in site.couples for site in inside)
    runs = runs or any(loop in source.couples for source in sources)
    are_rows = all(len(site.plates) == 1 for site in inside) and any(source.axes is not None for source in sources)
    return facts.plates[loop].series and not runs and not are_rows


def _unambiguous(links: list[Link]) -> list[Link]:
    """Leaves out links by which rows belong to two elements of one plate: by which to pool them is open."""
    distinct = list(dict.fromkeys(links))
    ways = [(link.rows, link.to) for link in distinct]
    return [link for link, way in zip(distinct, ways, strict=True) if ways.count(way) == 1]
