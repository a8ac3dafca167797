"""A model and example arguments, turned into facts: what depends on what, found by running the model.

Nothing is changed by looking: not the random state, the param store, module buffers, or a Pyro handler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pyro_amortize.calls import Call, Model, opened
from pyro_amortize.held import HeldRun
from pyro_amortize.latents import LatentProbes
from pyro_amortize.parameters import preserved
from pyro_amortize.probes import Probes
from pyro_amortize.sources import SourceProbes
from pyro_amortize.structure import Link, Structure


def examine(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure:
    """Finds the facts about a model that a plan needs.

    Args:
        model: A Pyro model.
        args: Its positional arguments, with real data in them.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: An argument is a numpy array.
    """
    call = Call(model, args, kwargs)
    for name, value in call.leaves.items():
        if isinstance(value, np.ndarray):
            raise ValueError(
                f"plan_amortization: argument '{name}' is a numpy array; Pyro's densities need tensors. "
                f"Pass torch.as_tensor({name})."
            )
    model, hides = opened(model)
    with preserved(model, evaluating=True):
        probes = Probes(HeldRun(model, call), hides)
        facts = _structure(probes)
        loose = frozenset(name for name in probes.loops if _is_loose(name, facts, probes))
        return _structure(Probes(HeldRun(model, call), hides, loose)) if loose else facts


def _structure(probes: Probes) -> Structure:
    latents, data = LatentProbes(probes), SourceProbes(probes)
    sites = {name: latents.site(name) for name in probes.factors}
    probes.links = _unambiguous(probes.links)
    sources, indistinct = data.sources()
    sites = {n: replace(s, mask=data.mask(n, sources)) if s.observed else s for n, s in sites.items()}
    masked = {name for name, site in sites.items() if site.mask is not None}
    sources = [replace(s, missing=s.missing or s.reaches <= masked) for s in sources]
    sources = [replace(s, by_cell=s.missing and data.is_masked_by_cell(s)) for s in sources]
    hidden = {plate.name: data.hidden(plate, sources) for plate in probes.plates.values()}
    for plate in probes.plates.values():
        if any(link.to == plate.name for link in probes.links) and not hidden[plate.name]:
            hidden[plate.name] = data.relabelled(plate, sources)
    params = tuple(name for name, node in probes.base.items() if node["type"] == "param")
    shapes = {name: tuple(leaf.shape) for name, leaf in probes.held.call.tensors.items()}
    empty = tuple(name for name, leaf in probes.held.call.leaves.items() if leaf is None)
    links = tuple(probes.links)
    families = probes.families
    return Structure(sites, probes.plates, tuple(sources), links, families, hidden, indistinct, params, shapes, empty)


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
