"""A model and example arguments, turned into facts: what depends on what, found by running the model.

The facts come from probes that see what the densities really do. All of them hold the latents, the subsample
indices and the random state, change one thing, run the model again, and look which rows' log-factors moved:

* *row copy*: row k of an argument is written over its row j. If row j of a plate moves and no other, then the
  axis is the plate's; if nothing moves, the argument does not enter; if others move too, rows are coupled.
* *latent*: half of the elements of a latent are replaced; what moves depends on it. Rows outside its plates that each
  depend on one element (``b[group]``) are told by replacing elements by the digits of their numbers.
* *twins*: everything known of row k is written over row j. If the two rows still differ, the model knows
  something of a row that no argument carries.

Nothing is changed by looking: not the random state, the param store, module buffers, or a Pyro handler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_factor, site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Call, Model, opened
from pyro_amortize.parameters import preserved
from pyro_amortize.structure import Link, Plate, Site, Source, Structure, plates_of
from pyro_amortize.supports import generic_value, is_delta, unconstrained_shape


class HeldRun(Messenger):
    """Runs a model with its latents, subsample indices and random state held at what the first run made them."""

    def __init__(self, model: Model, call: Call) -> None:
        super().__init__()
        self.model = model
        self.call = call
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
    ) -> poutine.Trace:
        """Runs the model once, with some arguments, latents or observations other than held.

        Returns:
            The trace, with ``log_prob`` (masks and scales applied) at every sample site.
        """
        self._latents, self._observed = latents or {}, observed or {}
        values = {name: value.clone() for name, value in self.call.tensors.items()}
        args, kwargs = self.call.replaced({**values, **(leaves or {})})
        pyro.set_rng_seed(seed)
        with torch.no_grad(), poutine.block(), under or nullcontext(), self:
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        trace = prune_subsample_sites(trace)
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site["is_observed"]:
                _refuse_nan(name, site)
        with torch.no_grad():
            trace.compute_log_prob()
        return trace

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


def examine(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure:
    """Finds the facts about a model that a plan needs.

    Args:
        model: A Pyro model.
        args: Its positional arguments, with real data in them.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: An argument is a numpy array.
        NotImplementedError: A site stands in a sequential plate.
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
        return _Examination(HeldRun(model, call), hides).structure()


@dataclass
class _Examination:
    """One look at a model: the base run, its noise, and the probes."""

    held: HeldRun
    hides: Callable[[Any], bool]
    base: poutine.Trace = field(init=False)
    plates: dict[str, Plate] = field(init=False)
    noise: float = field(init=False)

    def __post_init__(self) -> None:
        self.held.run()  # draws the latents; from here on the random state runs alike
        self.base = self.held.run()
        self.sample_sites = {n: s for n, s in self.base.nodes.items() if s["type"] == "sample"}
        self.plates = {}
        self.links: list[Link] = []
        for name, site in self.sample_sites.items():
            for frame in site["cond_indep_stack"]:
                if not frame.vectorized:
                    raise NotImplementedError(
                        f"plan_amortization: site '{name}' stands in the sequential plate '{frame.name}'. Make the "
                        f"plate vectorized: 'with pyro.plate({frame.name!r}, ...):' around '{name}'."
                    )
        for name, plate in plates_of(self.sample_sites.values()).items():
            drawn = plate.size < plate.full_size and name in self.held.drawn
            self.plates[name] = replace(plate, at_random=drawn)
        self.factors = {
            name: site
            for name, site in self.sample_sites.items()
            if not (site["is_observed"] and (site["mask"] is False or site["infer"].get("_deterministic")))
        }
        with pyro.validation_enabled(False):
            again = self.held.run()
        self.noise = 0.0
        for name in self.factors:
            difference = (again.nodes[name]["log_prob"] - self.factors[name]["log_prob"]).abs().nan_to_num(0.0)
            self.noise = max(self.noise, 10 * float(difference.max()) if difference.numel() else 0.0)

    def structure(self) -> Structure:
        sites = {name: self._site(name) for name in self.factors}
        sources, indistinct = self._sources()
        sites = {n: replace(s, mask=self._mask(n, sources)) if s.observed else s for n, s in sites.items()}
        masked = {name for name, site in sites.items() if site.mask is not None}
        sources = [replace(s, missing=s.missing or s.reaches <= masked) for s in sources]
        hidden = {plate.name: self._hidden(plate, sources) for plate in self.plates.values()}
        params = tuple(name for name, node in self.base.nodes.items() if node["type"] == "param")
        shapes = {name: tuple(leaf.shape) for name, leaf in self.held.call.tensors.items()}
        empty = tuple(name for name, leaf in self.held.call.leaves.items() if leaf is None)
        links = tuple(dict.fromkeys(self.links))
        return Structure(sites, self.plates, tuple(sources), links, hidden, indistinct, params, shapes, empty)

    # What one change moved.

    def _changed(self, **changes: Any) -> dict[str, Tensor] | None:
        """Runs the model with changes; returns how far each entry of each site's log-factor moved, None if it fails."""
        try:
            with pyro.validation_enabled(False):
                trace = self.held.run(**changes)
        except (ValueError, RuntimeError, IndexError):
            return None
        moved = {}
        for name, site in self.factors.items():
            before, after = site["log_prob"], trace.nodes.get(name, {}).get("log_prob")
            if after is None or after.shape != before.shape:
                moved[name] = torch.full(before.shape, torch.inf)
            else:
                distance = torch.where(before == after, 0.0, (before - after).abs())
                distance = torch.where(before.isnan() & after.isnan(), 0.0, distance.nan_to_num(torch.inf))
                moved[name] = torch.where(distance <= self.noise, 0.0, distance).cpu()
        self.last = trace
        return moved

    def _rows(self, moved: dict[str, Tensor], name: str, plate: Plate) -> Tensor:
        """How far each element of a plate moved at a site, in it or linked to it; shape (size,)."""
        distance = moved[name]
        link = None if plate in self._frames(name) else self._link_between(name, plate)
        if link is not None:
            elements = self._elements(link).expand(distance.shape)
            return distance.new_zeros(plate.size).index_add(0, elements.flatten(), distance.flatten())
        if distance.dim() < -plate.dim:
            return distance.sum().expand(plate.size)
        return distance.movedim(plate.dim, 0).reshape(distance.shape[plate.dim], -1).sum(-1).expand(plate.size)

    def _frames(self, name: str) -> list[Plate]:
        """The plates of a site, outer to inner."""
        frames = sorted(self.factors[name]["cond_indep_stack"], key=lambda frame: frame.dim)
        return [self.plates[frame.name] for frame in frames]

    # Latents: what depends on them.

    def _site(self, name: str) -> Site:
        site = self.factors[name]
        plates = self._frames(name)
        names = tuple(plate.name for plate in plates)
        infer = site["infer"]
        facts: dict[str, Any] = {"markov": "_markov_depth" in infer, "enumerated": infer.get("enumerate") is not None}
        facts["foreign"] = not site["is_observed"] and self.hides(site)
        if site["is_observed"]:
            kind, categories = _kind(site["fn"])
            return Site(name, True, names, tuple(site["value"].shape), kind=kind, categories=categories, **facts)
        discrete = bool(site["fn"].support.is_discrete)
        if discrete or is_delta(site["fn"]):
            shape = tuple(site["fn"].shape())
            children = self._moved_by(name, {name: self._other(name)}) if discrete else frozenset()
            return Site(name, False, names, shape, children, fixed=True, discrete=discrete, **facts)
        unconstrained = list(unconstrained_shape(site))
        batch = len(site["fn"].batch_shape)
        kept = [size for i, size in enumerate(unconstrained) if i - batch not in {plate.dim for plate in plates}]
        children, couples = self._latent_probe(name, plates)
        facts |= {"row_plates": self._row_plates(name, children), "unmasked": self._is_unmasked(name)}
        return Site(name, False, names, tuple(kept), children, couples, **facts)

    def _row_plates(self, name: str, children: frozenset[str]) -> tuple[str, ...]:
        """Replaces half of the entries of a global vector; tells of which plates just those rows move."""
        site, found = self.factors[name], []
        if site["value"].dim() != 1 or len(site["fn"].event_shape) != 1:
            return ()
        for plate in self.plates.values():
            if len(site["value"]) != plate.size or plate.size < 3:
                continue
            torch.manual_seed(6)
            half = _half(plate.size)
            moved = self._changed(
                latents={name: torch.where(half.to(site["value"].device), generic_value(site), site["value"])}
            )
            rows = [self._rows(moved, n, plate) > 0 for n in children if plate in self._frames(n)] if moved else []
            if rows and all(bool((row == half).all()) for row in rows):
                found.append(plate.name)
        return tuple(found)

    def _is_unmasked(self, name: str) -> bool:
        """Replaces what a mask covers of a latent's prior; tells whether anything depends on that."""
        site = self.factors[name]
        mask = site_mask(site)
        if mask is None or bool(mask.all()):
            return False
        torch.manual_seed(5)
        return bool(self._moved_by(name, {name: torch.where(mask, site["value"], generic_value(site))}))

    def _other(self, name: str) -> Tensor:
        """Draws a discrete value that differs from the held one, if one turns up."""
        site = self.factors[name]
        draws = (site["fn"].sample() for _ in range(20))
        return next((draw for draw in draws if not torch.equal(draw, site["value"])), site["value"])

    def _moved_by(self, name: str, latents: dict[str, Tensor]) -> frozenset[str]:
        moved = self._changed(latents=latents)
        if moved is None:
            return frozenset(self.factors) - {name}
        return frozenset(n for n, m in moved.items() if bool(m.any())) - {name}

    def _latent_probe(self, name: str, plates: list[Plate]) -> tuple[frozenset[str], frozenset[str]]:
        """Replaces a latent, whole and by half; returns its children, and along which plates it couples."""
        torch.manual_seed(1)
        fresh = generic_value(self.factors[name])
        children = self._moved_by(name, {name: fresh})
        chosen = {plate.name: _half(plate.size) for plate in plates}
        moved = self._changed(latents={name: self._mixed(name, fresh, chosen)})
        if moved is None:
            return frozenset(self.factors) - {name}, frozenset(plate.name for plate in plates)
        couples = set()
        for plate in plates:
            inside = [n for n in children | {name} if plate in self._frames(n)]
            spared = ~chosen[plate.name]
            if plate.size > 1 and any(bool(self._rows(moved, n, plate)[spared].any()) for n in inside):
                couples.add(plate.name)
            outside = children - set(inside)
            if outside and not self._find_links(name, fresh, plate, outside):
                couples.add(plate.name)
        return children, frozenset(couples)

    def _mixed(self, name: str, fresh: Tensor, chosen: dict[str, Tensor]) -> Tensor:
        """Puts fresh values at the chosen elements of some plates."""
        site = self.factors[name]
        where = torch.ones((), dtype=torch.bool)
        for plate, rows in chosen.items():
            where = where & rows.reshape((-1,) + (1,) * (-self.plates[plate].dim - 1))
        where = where.reshape(where.shape + (1,) * len(site["fn"].event_shape))
        return torch.where(where.to(fresh.device), fresh, site["value"])

    def _find_links(self, name: str, fresh: Tensor, plate: Plate, children: frozenset[str] | set[str]) -> bool:
        """Finds which element of a plate each row of other plates' sites depends on; tells whether on one at most.

        The elements are numbered in binary. Those with a one as their k-th digit are replaced together, then those
        with a zero: a row that depends on a single element moves in one of the two runs, which is that digit of the
        element's number, and a row that depends on two elements moves in both runs for some digit.
        """
        numbers = torch.arange(plate.size)
        found = {child: torch.zeros(self.factors[child]["log_prob"].shape, dtype=torch.long) for child in children}
        depends = dict.fromkeys(children, torch.tensor(False))
        for digit in range(max(1, (plate.size - 1).bit_length())):
            runs = []
            for value in (0, 1):
                chosen = {plate.name: (numbers >> digit & 1) == value}
                runs.append(self._changed(latents={name: self._mixed(name, fresh, chosen)}))
            zeros, ones = runs
            if zeros is None or ones is None or any(bool(((zeros[c] > 0) & (ones[c] > 0)).any()) for c in children):
                return False
            for child in children:
                found[child] += (ones[child] > 0).long() << digit
                depends[child] = (ones[child] + zeros[child]) > 0
        for child in children:
            link = self._link(child, plate, found[child], depends[child])
            if link is None:
                return False
            self.links.append(link)
        return True

    def _link(self, child: str, plate: Plate, elements: Tensor, depends: Tensor) -> Link | None:
        """Finds the argument that holds each row's element, as it stands or counted from one."""
        whole = [leaf for leaf in self.held.call.tensors.items() if not leaf[1].is_floating_point()]
        frames = self._frames(child)
        for offset in (0, -1):
            for count in range(1, len(frames) + 1):
                for rows in combinations(frames, count):
                    for name, leaf in whole:
                        for axes in permutations(range(leaf.dim()), count):
                            cells = self._cells(leaf, axes, rows)
                            for column in range(0 if cells is None else cells.shape[-1]):
                                numbers = _spread(cells[..., column], rows)  # type: ignore[index]
                                if bool(((numbers + offset == elements) | ~depends).all()):
                                    names = tuple(row.name for row in rows)
                                    return Link(names, plate.name, name, axes, column, offset)
        return None

    def _cells(self, leaf: Tensor, axes: tuple[int, ...], plates: tuple[Plate, ...]) -> Tensor | None:
        """An argument's cells for the present elements of plates, shape (*sizes, rest); None if lengths do not fit."""
        for axis, plate in zip(axes, plates, strict=True):
            indices = self.held.indices.get(plate.name)
            if leaf.shape[axis] == plate.full_size > plate.size and indices is not None:
                leaf = leaf.index_select(axis, torch.as_tensor(indices, device=leaf.device))
            if leaf.shape[axis] != plate.size:
                return None
        return leaf.movedim(axes, tuple(range(len(axes)))).reshape(*(plate.size for plate in plates), -1).cpu()

    # Where data enter.

    def _members(self, plate: Plate) -> list[str]:
        return [name for name in self.factors if plate in self._frames(name)]

    def _linked(self, plate: Plate) -> list[str]:
        return [n for n in self.factors if plate not in self._frames(n) and self._link_between(n, plate) is not None]

    def _link_between(self, name: str, plate: Plate) -> Link | None:
        around = {frame.name for frame in self._frames(name)}
        return next((link for link in self.links if link.to == plate.name and set(link.rows) <= around), None)

    def _elements(self, link: Link) -> Tensor:
        """The element of each row, at the dims of the rows' plates."""
        rows = tuple(self.plates[name] for name in link.rows)
        cells = self._cells(self.held.call.tensors[link.argument], link.axes, rows)
        assert cells is not None
        return _spread(cells[..., link.column], rows) + link.offset

    def _sources(self) -> tuple[list[Source], tuple[str, ...]]:
        """Finds the arguments with data in them and the observed sites whose data no argument carries."""
        found: list[Source] = []
        indistinct: list[str] = []
        explained = {
            name
            for name in self.factors
            if all(plate.size == 1 for plate in self._frames(name)) and self._is_argument(name)  # one row tells nothing
        }
        for name, leaf in self.held.call.tensors.items():
            claims: list[_Claim] = []
            tried = distinct = False
            for plate in self.plates.values():
                if self._is_index(leaf, plate):
                    continue
                best: _Claim | None = None
                for axis, length in enumerate(leaf.shape):
                    if length in (plate.size, plate.full_size) and plate.size > 1:
                        tried = True
                        claim, differs, touched = self._row_copy(name, leaf, axis, plate)
                        distinct |= differs
                        explained |= touched
                        if claim is not None and (best is None or (best.couples and not claim.couples)):
                            best = claim
                if best is None or best.couples:
                    best = self._picked_claim(name, leaf, plate) or best
                    explained |= best.reaches if best and best.through else set()
                claims += [best] if best is not None else []
            found += self._from_claims(name, leaf, claims)
            if tried and not claims and not distinct:
                indistinct.append(name)
                explained |= {s for s in self.factors if self._feeds_equal_rows(leaf, s)}
        found += [self._from_site(name) for name in self.factors if self._stands_alone(name, explained)]
        return found, tuple(indistinct)

    def _is_index(self, leaf: Tensor, plate: Plate) -> bool:
        indices = self.held.indices.get(plate.name)
        if not isinstance(indices, Tensor) or leaf.is_floating_point() or leaf.dtype == torch.bool:
            return False
        explicit = plate.size < plate.full_size or not torch.equal(indices.cpu(), torch.arange(plate.size))
        return explicit and leaf.shape == indices.shape and bool((leaf == indices).all())

    def _stands_alone(self, name: str, explained: set[str]) -> bool:
        site = self.factors[name]
        in_plates = any(plate.size > 1 for plate in self._frames(name))
        return in_plates and site["is_observed"] and not site_is_factor(site) and name not in explained

    def _from_site(self, name: str) -> Source:
        site = self.factors[name]
        kind, categories = _kind(site["fn"])
        plates = self._frames(name)
        names, dims = tuple(plate.name for plate in plates), tuple(plate.dim for plate in plates)
        value = site_cells(site["value"], len(site["fn"].event_shape), plates)
        shape = tuple(value.shape[len(plates) :])
        missing = _has_nan(value)
        return Source(
            name, names, None, dims, shape, frozenset({name}), feeds=name, kind=kind, categories=categories,
            missing=missing,
        )  # fmt: skip

    def _from_claims(self, name: str, leaf: Tensor, claims: list[_Claim]) -> list[Source]:
        """Makes one source of an argument's axes; several if the plates of one axis never stand around one site."""
        plain = {claim.axis for claim in claims if not claim.couples and not claim.through}
        claims = [claim for claim in claims if not ((claim.couples or claim.through) and claim.axis in plain)]
        together = {frozenset(c.plate.name for c in claims if site in c.reaches) for c in claims for site in c.reaches}
        sources = []
        for names in sorted((t for t in together if not any(t < other for other in together)), key=sorted):
            mine = sorted((c for c in claims if c.plate.name in names), key=lambda claim: claim.plate.dim)
            if len({claim.axis for claim in mine}) < len(mine):
                continue
            plates, axes = [claim.plate for claim in mine], tuple(claim.axis for claim in mine)
            for claim in mine:
                leaf = leaf if claim.through is None else self._picked(leaf, claim.axis, claim.through)
            cells = self._cells(leaf, axes, tuple(plates))
            feeds = next((s for s in self.factors if cells is not None and self._is_value(cells, s, plates)), None)
            kind, categories = "binary" if leaf.dtype == torch.bool else "real", 0
            if feeds is not None:
                kind, categories = _kind(self.factors[feeds]["fn"])
            sources.append(
                Source(
                    name,
                    tuple(plate.name for plate in plates),
                    axes,
                    tuple(plate.dim for plate in plates),
                    tuple(size for axis, size in enumerate(leaf.shape) if axis not in axes),
                    frozenset().union(*(claim.reaches for claim in mine)),
                    tuple(claim.through for claim in mine),
                    frozenset(claim.plate.name for claim in mine if claim.indexed),
                    frozenset(claim.plate.name for claim in mine if claim.couples),
                    feeds,
                    kind,
                    categories,
                    _has_nan(leaf),
                )
            )
        return sources

    def _row_copy(self, name: str, leaf: Tensor, axis: int, plate: Plate) -> tuple[_Claim | None, bool, set[str]]:
        """Writes rows of an argument over others; returns what that says, whether rows differ, what values moved."""
        members = self._members(plate)
        related = members + self._linked(plate)
        rows = leaf.movedim(axis, 0)
        indices = self.held.indices.get(plate.name)
        picked = torch.as_tensor(indices).cpu() if indices is not None else torch.arange(plate.size)
        full = leaf.shape[axis] == plate.full_size
        subsampled = plate.size < plate.full_size
        positions = {int(j): p for p, j in enumerate(picked)} if full else {}
        reaches: set[str] = set()
        touched: set[str] = set()
        everywhere = swaps = True
        couples = False
        indexed = full and subsampled
        differs = bool((_flat(rows) != _flat(rows)[:1]).any())
        matter = self._rows_that_matter(name, leaf, axis, plate, related) if differs else torch.arange(plate.size)
        touched |= self._values_moved(members) if differs else set()
        targets = [j for j, p in positions.items() if p in set(matter.tolist())] if indexed else matter.tolist()
        for target, origin in _distinct_pairs(rows, targets):
            copy = leaf.clone()
            copy.movedim(axis, 0)[target] = rows[origin] if origin is not None else ~rows[target]
            moved = self._changed(leaves={name: copy})
            if moved is None:
                reaches |= set(members)
                couples = True
                continue
            touched |= self._values_moved(members)
            for site in related:
                where = self._rows(moved, site, plate) > 0
                if not bool(where.any()):
                    continue
                reaches.add(site)
                everywhere = everywhere and bool(where.all())
                place = positions.get(target, -1) if indexed else target
                if full and not subsampled and positions.get(target) != target and bool(where[positions[target]]):
                    indexed, place = True, positions[target]
                couples = couples or int(where.sum()) > int(bool(where[place]))
            if any(bool(m.any()) for n, m in moved.items() if n not in related):
                couples = couples or bool(reaches)
            swaps = swaps and everywhere and self._swap_is_local(name, leaf, axis, target, origin, plate, related)
        # A shared argument, or a wrong axis, moves all rows; so does a standardized one, but not by swapping two.
        if not reaches or (everywhere and not swaps and plate.size > 2):
            return None, differs, touched
        return _Claim(plate, axis, indexed, frozenset(reaches), couples), differs, touched

    def _picked_claim(self, name: str, leaf: Tensor, plate: Plate) -> _Claim | None:
        """Tells whether another argument says where in this one the data of a plate's elements stand: ``x[index]``."""
        related = self._members(plate) + self._linked(plate)
        for index, places in self.held.call.tensors.items():
            if places.dtype != torch.long or places.shape != (plate.size,) or index == name or plate.size < 2:
                continue
            for axis, length in enumerate(leaf.shape):
                used = places.unique()
                if int(used[0]) < 0 or int(used[-1]) >= length or (len(used) == length == plate.size and len(used) < 3):
                    continue
                rows, reaches, fits = leaf.movedim(axis, 0), set[str](), True
                for target, origin in _distinct_pairs(rows, used.tolist()):
                    if origin is None:
                        continue
                    copy = leaf.clone()
                    copy.movedim(axis, 0)[target] = rows[origin]
                    moved = self._changed(leaves={name: copy})
                    own = (places == target).cpu()
                    for site in related if moved is not None else ():
                        where = self._rows(moved, site, plate) > 0  # type: ignore[arg-type]
                        reaches |= {site} if bool(where.any()) else set()
                        fits = fits and not bool(where[~own].any())
                    fits = fits and moved is not None
                if fits and reaches and bool((places != torch.arange(plate.size)).any()):
                    return _Claim(plate, axis, False, frozenset(reaches), False, index)
        return None

    def _picked(self, leaf: Tensor, axis: int, through: str) -> Tensor:
        return leaf.index_select(axis, self.held.call.tensors[through].to(leaf.device))

    def _rows_that_matter(self, name: str, leaf: Tensor, axis: int, plate: Plate, sites: list[str]) -> Tensor:
        """Moves all rows of an argument on by one; returns which rows of the plate moved, all if that fails."""
        moved = self._changed(leaves={name: leaf.roll(1, axis)})
        if moved is None:
            return torch.arange(plate.size)
        distance = torch.stack([self._rows(moved, site, plate) for site in sites]).sum(0)
        return distance.nonzero().flatten()

    def _swap_is_local(
        self, name: str, leaf: Tensor, axis: int, j: int, k: int | None, plate: Plate, sites: list[str]
    ) -> bool:
        """Swaps two rows of an argument, which changes no sum over rows; tells whether two rows of the plate moved."""
        if k is None:
            return False
        copy = leaf.clone()
        copy.movedim(axis, 0)[[j, k]] = leaf.movedim(axis, 0)[[k, j]]
        moved = self._changed(leaves={name: copy})
        if moved is None:
            return False
        distance = torch.stack([self._rows(moved, site, plate) for site in sites]).sum(0)
        return 0 < int((distance > 1e-4 * distance.max()).sum()) <= 2

    def _is_argument(self, name: str) -> bool:
        value = self.factors[name]["value"].flatten()
        return any(torch.equal(value, leaf.flatten()) for leaf in self.held.call.tensors.values())

    def _feeds_equal_rows(self, leaf: Tensor, name: str) -> bool:
        value = self.factors[name]["value"]
        return self.factors[name]["is_observed"] and bool((value.flatten()[:1] == leaf.flatten()[:1]).all())

    def _values_moved(self, members: list[str]) -> set[str]:
        """Observed sites whose values the last change altered."""
        moved = set()
        for name in members:
            site = self.factors[name]
            if site["is_observed"]:
                before, after = site["value"], self.last.nodes[name]["value"]
                same = before.shape == after.shape and torch.equal(torch.nan_to_num(before), torch.nan_to_num(after))
                moved |= set() if same else {name}
        return moved

    def _is_value(self, cells: Tensor, name: str, plates: list[Plate]) -> bool:
        site = self.factors[name]
        if not site["is_observed"] or site_is_factor(site) or not set(plates) <= set(self._frames(name)):
            return False
        value = site_cells(site["value"], len(site["fn"].event_shape), plates).cpu()
        if value.numel() != cells.numel():
            return False
        return torch.equal(torch.nan_to_num(value.reshape(cells.shape)), torch.nan_to_num(cells))

    def _mask(self, name: str, sources: list[Source]) -> str | None:
        """Finds where an observed site's mask stands: in an argument, in an argument's NaN, or only in the model."""
        site = self.factors[name]
        mask = site_mask(site)
        if mask is None:
            return None
        plates = self._frames(name)
        mask = site_cells(mask, len(site["fn"].event_shape), plates).cpu()
        for source in sources:
            if source.axes is None or source.plates != tuple(plate.name for plate in plates):
                continue
            leaf = self.held.call.tensors[source.name]
            if leaf.dtype != torch.bool and not (source.feeds == name and _has_nan(leaf)):
                continue
            for axis, through in zip(source.axes, source.through, strict=True):
                leaf = leaf if through is None else self._picked(leaf, axis, through)
            cells = self._cells(leaf if leaf.dtype == torch.bool else ~leaf.isnan(), source.axes, tuple(plates))
            if cells is not None and cells.numel() == mask.numel() and torch.equal(cells.reshape(mask.shape), mask):
                return source.name
        return ""

    def _hidden(self, plate: Plate, sources: list[Source]) -> bool | None:
        """Makes two elements twins in all that is known of them, and sees whether their densities agree."""
        sources = [source for source in sources if plate.name in source.plates]
        members = self._members(plate)
        if plate.size < 2 or not sources or any(plate.name in source.couples for source in sources):
            return None
        leaves, latents, observed = {}, {}, {}
        target, origin = 0, 1
        indices = self.held.indices.get(plate.name)
        for source in sources:
            if source.axes is None:
                site = self.factors[source.name]
                axis = plate.dim - len(site["fn"].event_shape)
                observed[source.name] = _row_over(site["value"], axis, target, origin)
            else:
                if source.through[source.plates.index(plate.name)]:
                    continue  # its index is an argument of its own
                indexed = plate.name in source.indexed
                to, fro = (int(indices[target]), int(indices[origin])) if indexed else (target, origin)  # type: ignore[index]
                axis = source.axes[source.plates.index(plate.name)]
                leaves[source.name] = _row_over(self.held.call.leaves[source.name], axis, to, fro)
        for name in members:
            site = self.factors[name]
            if not site["is_observed"]:
                latents[name] = _row_over(site["value"], plate.dim - len(site["fn"].event_shape), target, origin)
        if self._changed(leaves=leaves, latents=latents, observed=observed) is None:
            return None
        for name in members:
            factor, mask = self.last.nodes[name]["log_prob"], self.last.nodes[name]["mask"]
            if factor.dim() >= -plate.dim and factor.shape[plate.dim] > 1:
                counts = torch.ones((), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
                pair = factor.movedim(plate.dim, 0)[:2]
                both = counts.expand(factor.shape).movedim(plate.dim, 0)[:2].all(0).to(pair.device)
                if not torch.allclose(pair[0][both], pair[1][both], rtol=1e-4, atol=1e-5, equal_nan=True):
                    return True
        return False


@dataclass(frozen=True)
class _Claim:
    """That an argument's axis is a plate's."""

    plate: Plate
    axis: int
    indexed: bool
    reaches: frozenset[str]
    couples: bool
    through: str | None = None


def site_cells(value: Tensor, event_dim: int, plates: Sequence[Plate]) -> Tensor:
    """Returns an observed value with its plates' axes first, expanded where it was broadcast."""
    dims = [plate.dim - event_dim for plate in plates]
    value = value.reshape((1,) * (max((-dim for dim in dims), default=0) - value.dim()) + value.shape)
    cells = value.movedim(dims, list(range(len(dims)))) if dims else value
    return cells.expand((*(plate.size for plate in plates), *cells.shape[len(dims) :]))


def site_mask(site: Any) -> Tensor | None:
    """Returns which entries of an observed site count, shape of its value; None if all do."""
    value, fn = site["value"], site["fn"]
    masks = [] if site["mask"] is None else [(site["mask"], len(fn.event_shape))]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, len(fn.event_shape)))
        fn = fn.base_dist
    found = None
    for mask, event_dim in masks:
        mask = torch.as_tensor(mask, device=value.device)
        mask = mask.reshape(mask.shape + (1,) * event_dim)
        found = mask if found is None else found & mask
    return None if found is None else found.expand(torch.broadcast_shapes(found.shape, value.shape))


def is_index(value: Any) -> bool:
    """Tells whether the value of a plate's own site says which elements are present."""
    return not isinstance(value, Tensor) or (value.dim() == 1 and not value.is_floating_point())


def _half(size: int) -> Tensor:
    """Marks about half the elements, at random."""
    rows = torch.zeros(size, dtype=torch.bool)
    rows[torch.randperm(size)[: max(1, size // 2)]] = True
    return rows


def _spread(numbers: Tensor, plates: Sequence[Plate]) -> Tensor:
    """Brings a tensor with an axis a plate, outer to inner, to the plates' own dims."""
    shape = [1] * max(-plate.dim for plate in plates)
    for plate in plates:
        shape[plate.dim] = plate.size
    return numbers.reshape(shape)


def _row_over(value: Tensor, axis: int, target: int, origin: int) -> Tensor:
    copy = value.clone()
    rows = copy.movedim(axis, 0)
    if len(rows) > 1:
        rows[target] = rows[origin].clone()
    return copy


def _distinct_pairs(rows: Tensor, targets: list[int], count: int = 3) -> Iterator[tuple[int, int | None]]:
    """Yields up to ``count`` pairs (target, origin) of rows that differ.

    Where all rows of a mask are equal the origin is None: the target is to be flipped.
    """
    flat = _flat(rows)
    torch.manual_seed(2)
    found = 0
    for target in [targets[i] for i in torch.randperm(len(targets))[: 8 * count]]:
        others = (flat != flat[target]).any(-1).nonzero().flatten()
        if len(others) or rows.dtype == torch.bool:
            yield target, int(others[torch.randint(len(others), ())]) if len(others) else None
            found += 1
        if found == count:
            return


def _flat(rows: Tensor) -> Tensor:
    """Rows as vectors of numbers that can be compared, NaN too."""
    return torch.nan_to_num(rows.reshape(len(rows), -1).to(torch.float64), nan=1.2345e-67)


def _has_nan(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.isnan().any())


def _refuse_nan(name: str, site: Any) -> None:
    value, event_dim = site["value"], len(site["fn"].event_shape)
    if not _has_nan(value) or site["mask"] is False or site["infer"].get("_deterministic"):
        return
    holes = value.isnan().flatten(value.dim() - event_dim).any(-1) if event_dim else value.isnan()
    mask = torch.ones((), dtype=torch.bool) if site["mask"] is None else torch.as_tensor(site["mask"])
    if bool((holes & mask).any()):
        raise ValueError(
            f"plan_amortization: the values observed at site '{name}' hold NaN that no mask covers, so its density "
            f"is NaN. Mask them: 'with poutine.mask(mask=~y.isnan()): pyro.sample({name!r}, ..., obs=y.nan_to_num())'."
        )


def _kind(fn: Any) -> tuple[str, int]:
    """Says what the values of an observed site are, and how many categories they have."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.Categorical):
        return "category", fn.logits.shape[-1]
    support = fn.support
    if type(support).__name__ in ("_Boolean", "_OneHot"):
        return "binary", 0
    if not support.is_discrete:
        return "real", 0
    return ("level" if hasattr(support, "upper_bound") else "count"), 0
