"""Loops over sites, ``z_0``, ``z_1``, ..., seen as plates: the sites of a loop, merged into one with an axis for it.

So what is said of a plate can be said of a loop: which argument has an axis for it, what depends on what along it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_amortize.missing import present_entries
from pyro_amortize.structure import Family, Plate
from pyro_amortize.supports import support_of, without_masks

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class _Candidate:
    """Numbered sites of one kind.

    Attributes:
        texts: As of :class:`~pyro_amortize.structure.Family`.
        plates: The sequential plate that each number counts; None for another loop.
        places: Numbers -> place in the run.
        observed: Whether the sites are.
    """

    texts: tuple[str, ...]
    plates: tuple[str | None, ...]
    places: dict[Numbers, int]
    observed: bool

    def alternates(self, other: _Candidate) -> bool:
        """Whether sites of both were run turn by turn."""
        if self.plates != other.plates:
            return False
        turns = sorted(set(self.places) & set(other.places), key=self.places.__getitem__)
        first = [min(self.places[turn], other.places[turn]) for turn in turns]
        last = [max(self.places[turn], other.places[turn]) for turn in turns]
        return len(turns) > 1 and all(end < start for end, start in zip(last, first[1:], strict=False))


def find_loops(sites: Mapping[str, Any]) -> tuple[tuple[Family, ...], dict[str, Plate]]:
    """Finds the loops in whose turns a latent and an observed site alternate.

    The turns of a loop are those of its observed sites; latents before them (an initial state) and after them (a
    forecast) are sites of their own. Latents that a loop draws before a plate of as many data are found, too: the loop
    then has the place of that plate.

    Args:
        sites: The sample sites of a run in their order, deterministic ones and subsamples apart.

    Returns:
        The families of sites, and the loops, outer to inner, as plates to the left of the model's own.
    """
    clusters: list[list[_Candidate]] = []
    for candidate in _candidates(sites):
        near = [cluster for cluster in clusters if any(candidate.alternates(other) for other in cluster)]
        clusters = [c for c in clusters if c not in near] + [[candidate, *(x for c in near for x in c)]]
    families: list[Family] = []
    spans: dict[str, tuple[int, int]] = {}
    loops: dict[str, Plate] = {}
    for cluster in clusters:
        turns = [numbers for candidate in cluster if candidate.observed for numbers in candidate.places]
        plate = None if turns else _plate_of_data(cluster, sites)
        if plate is not None:
            loops[plate.name] = plate
            families += [Family(candidate.texts, (plate.name,)) for candidate in cluster]
        if not turns or all(candidate.observed for candidate in cluster):
            continue
        names = []
        for i, sequential in enumerate(cluster[0].plates):
            name = sequential or f"steps{'' if 'steps' not in spans else '_' + str(len(spans) + 1)}"
            span = min(turn[i] for turn in turns), max(turn[i] for turn in turns) + 1
            first, stop = spans.get(name, span)
            spans[name] = min(first, span[0]), max(stop, span[1])
            names.append(name)
        families += [Family(candidate.texts, tuple(names)) for candidate in cluster]
    nesting = max((-f.dim for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized), default=0)
    for i, (name, (first, stop)) in enumerate(spans.items()):
        series = all(name != frame.name for site in sites.values() for frame in site["cond_indep_stack"])
        size = stop - first
        loops[name] = Plate(name, i - len(spans) - nesting, size, size, first=first, series=series)
    return tuple(families), loops


def _plate_of_data(cluster: list[_Candidate], sites: Mapping[str, Any]) -> Plate | None:
    """Finds the plate of the data of latents that are drawn in a loop of their own before: one element a turn."""
    named = list(sites.values())
    places = [place for candidate in cluster for place in candidate.places.values()]
    numbers = sorted({turn for candidate in cluster for turn in candidate.places})
    if cluster[0].plates != (None,) or len(numbers) < 3 or numbers[-1][0] - numbers[0][0] + 1 != len(numbers):
        return None
    inside = {frame.name for place in places for frame in named[place]["cond_indep_stack"]}
    for site in named[max(places) + 1 :]:
        for frame in site["cond_indep_stack"] if site["is_observed"] else ():
            if frame.vectorized and frame.size == len(numbers) and frame.name not in inside:
                return Plate(frame.name, frame.dim, len(numbers), len(numbers), first=numbers[0][0], series=True)
    return None


def _candidates(sites: Mapping[str, Any]) -> list[_Candidate]:
    groups: dict[Any, dict[str, int]] = {}
    for place, (name, site) in enumerate(sites.items()):
        texts = tuple(re.split(r"\d+", name))
        # Around data, a plate may be made anew in each turn, with the turn in its name.
        named = [re.sub(r"\d+", "", f.name) if site["is_observed"] else f.name for f in site["cond_indep_stack"]]
        sized = ((f.dim, f.size if f.vectorized else None) for f in site["cond_indep_stack"])
        frames = tuple(zip(named, sized, strict=True))
        fn = site["fn"]
        kind = (frames, fn.batch_shape, fn.event_shape, site["is_observed"], str(support_of(fn)))
        groups.setdefault((texts, kind), {})[name] = place
    found = []
    for (texts, _), places in groups.items():
        found += _split(texts, places, sites)
    return [candidate for candidate in found if len(candidate.places) > 1]


def _split(texts: tuple[str, ...], places: dict[str, int], sites: Mapping[str, Any]) -> list[_Candidate]:
    """Tells which numbers in the names of like sites count loops: one for each sequential plate, and one more."""
    numbers = {name: tuple(map(int, re.findall(r"\d+", name))) for name in places}
    columns = list(zip(*numbers.values(), strict=True))
    example = sites[next(iter(places))]
    counted: dict[int, str | None] = {}
    for k, frame in enumerate(example["cond_indep_stack"]):
        if frame.vectorized:
            continue
        turns = [sites[name]["cond_indep_stack"][k].counter for name in places]
        fits = [len({n - turn for n, turn in zip(column, turns, strict=True)}) == 1 for column in columns]
        column = next((i for i, fit in enumerate(fits) if fit and i not in counted), None)
        if column is None:
            return []
        counted[column] = frame.name
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1 and i not in counted]
    if varying:
        counted[varying[-1]] = None
    if not counted:
        return []
    slots = sorted(counted)
    found: dict[tuple[str, ...], dict[Numbers, int]] = {}
    for name, place in places.items():
        parts = [texts[0]]
        for i, number in enumerate(re.findall(r"\d+", name)):
            parts[-1:] = [parts[-1], texts[i + 1]] if i in slots else [parts[-1] + number + texts[i + 1]]
        found.setdefault(tuple(parts), {})[tuple(numbers[name][i] for i in slots)] = place
    plates = tuple(counted[i] for i in slots)
    return [_Candidate(parts, plates, mine, example["is_observed"]) for parts, mine in found.items()]


def merged(sites: Mapping[str, Any], families: Iterable[Family], loops: Mapping[str, int]) -> dict[str, Any]:
    """Merges the sites of each family into one, whose plates are the model's and the loops.

    Args:
        sites: The nodes of a trace, with or without ``log_prob``.
        families: The families.
        loops: The number of the first turn of each loop, outer to inner. One with the name of a plate takes its place.

    Returns:
        The nodes. A merged one holds under "members" the place and the shape of each site's value in its own.
    """
    frames = [f for site in sites.values() if site["type"] == "sample" for f in site["cond_indep_stack"]]
    frames = [frame for frame in frames if frame.vectorized]
    nesting = max((-frame.dim for frame in frames), default=0)
    found = {family: _members(family, sites, loops) for family in families}
    stops = _stops(found, sites, loops) | {f.name: loops[f.name] + int(f.size) for f in frames if f.name in loops}
    dims = {f.name: f.dim for f in frames if f.name in loops}
    apart = [loop for loop in loops if loop not in dims]
    dims |= {loop: i - len(apart) - nesting for i, loop in enumerate(apart)}
    turns: dict[str, Family] = {}
    for family, members in found.items():
        ends = [stops[loop] for loop in family.loops]
        inside = {k: name for k, name in members.items() if all(n < end for n, end in zip(k, ends, strict=True))}
        found[family] = inside
        turns |= dict.fromkeys(inside.values(), family)
    grid = _Grid({loop: (dims[loop], loops[loop], stops[loop] - loops[loop]) for loop in loops}, nesting + len(apart))
    nodes = {}
    for name, site in sites.items():
        if name not in turns:
            nodes[name] = site
        elif turns[name].name not in nodes:
            nodes[turns[name].name] = grid.merge(turns[name], found[turns[name]], sites)
    return nodes


def _members(family: Family, sites: Mapping[str, Any], loops: Mapping[str, int]) -> dict[Numbers, str]:
    members = {}
    for name, site in sites.items():
        numbers = family.numbers(name) if site["type"] == "sample" else None
        if numbers is not None and all(n >= loops[loop] for n, loop in zip(numbers, family.loops, strict=True)):
            members[numbers] = name
    return members


def _stops(
    found: Mapping[Family, dict[Numbers, str]], sites: Mapping[str, Any], loops: Mapping[str, int]
) -> dict[str, int]:
    """Returns the number after the last turn of each loop: that of its observed sites, if any are observed."""
    stops: dict[str, int] = {}
    for loop in loops:
        turns = {True: [0], False: [0]}
        for family, members in found.items():
            for numbers, name in members.items() if loop in family.loops else ():
                turns[sites[name]["is_observed"]].append(numbers[family.loops.index(loop)] + 1)
        stops[loop] = max(turns[True]) or max(turns[False])
    return stops


@dataclass(frozen=True)
class _Grid:
    """Where the turns of loops stand in a merged site.

    Attributes:
        loops: Name -> dim, number of the first turn, number of turns.
        depth: How many dimensions plates and loops take.
    """

    loops: dict[str, tuple[int, int, int]]
    depth: int

    def merge(self, family: Family, members: dict[Numbers, str], sites: Mapping[str, Any]) -> dict[str, Any]:
        places = [self.loops[loop] for loop in family.loops]
        sizes = [size for _, _, size in places]
        turns = {
            tuple(n - first for n, (_, first, _) in zip(numbers, places, strict=True)): name
            for numbers, name in members.items()
        }
        mine = {name: sites[name] for name in turns.values()}
        example = min(mine.values(), key=lambda site: bool(site["is_observed"]))
        fn = without_masks(example["fn"])
        batch = (1,) * (self.depth - len(fn.batch_shape)) + tuple(fn.batch_shape)
        event_dim = len(fn.event_shape)

        def stacked(values: Mapping[str, Tensor], event_dim: int) -> Tensor:
            whole = {
                n: v.expand(torch.broadcast_shapes(v.shape, batch + v.shape[v.dim() - event_dim :]))
                for n, v in values.items()
            }
            absent = torch.zeros_like(next(iter(whole.values())))
            value = torch.stack([whole[turns[t]] if t in turns else absent for t in product(*map(range, sizes))])
            value = value.reshape(*sizes, *absent.shape)
            for dim, _, _ in places:  # each loop's axis takes the place of one of length one
                value = value.transpose(0, dim - event_dim).squeeze(0)
            return value

        dims = [dim for dim, _, _ in places]
        shape = [dict(zip(dims, sizes, strict=True)).get(i - self.depth, size) for i, size in enumerate(batch)]
        index = {}
        for turn, name in turns.items():
            where = dict(zip(dims, turn, strict=True))
            index[name] = tuple(where.get(i - self.depth, slice(None)) for i in range(self.depth))
        site = {
            **example,
            "name": family.name,
            "fn": fn.expand(torch.Size(shape)),
            "value": stacked({name: s["value"] for name, s in mine.items()}, event_dim),
            "mask": None,
            "example": example,
            "members": {name: (index[name], s["value"].shape) for name, s in mine.items()},
        }
        masks = {name: present_entries(s) for name, s in mine.items()}
        if len(turns) < math.prod(sizes) or any(mask is not None for mask in masks.values()):
            entries = {n: torch.ones_like(s["value"], dtype=torch.bool) for n, s in mine.items()}
            entries |= {n: mask.expand(entries[n].shape) for n, mask in masks.items() if mask is not None}
            site["entries"] = stacked(entries, event_dim)
            site["mask"] = site["entries"].flatten(-event_dim).all(-1) if event_dim else site["entries"]
        if "log_prob" in example:
            site["log_prob"] = stacked({name: s["log_prob"] for name, s in mine.items()}, 0)
            site["log_prob_sum"] = site["log_prob"].sum()
        frames = [frame for frame in example["cond_indep_stack"] if frame.vectorized]
        frames += [
            CondIndepStackFrame(loop, dim, n, 0, n) for loop, (dim, _, n) in self.loops.items() if loop in family.loops
        ]
        site["cond_indep_stack"] = tuple(frames)
        return site


def split(values: Mapping[str, Tensor], sites: Mapping[str, Any]) -> dict[str, Tensor]:
    """Takes values of merged sites apart into those of the sites that they were made of."""
    found = {}
    for name, value in values.items():
        if "members" not in sites.get(name, {}):
            found[name] = value
            continue
        for member, (index, shape) in sites[name]["members"].items():
            found[member] = value[index].reshape(shape)
    return found
