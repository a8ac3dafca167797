"""A model and example arguments, turned into facts: what depends on what, found by running the model.

The facts come from probes that see what the densities really do. All of them hold the latents, the subsample
indices and the random state, change one thing, run the model again, and look which rows' log-factors moved:

* *row copy*: row k of an argument is written over its row j. If row j of a plate moves and no other, then the
  axis is the plate's; if nothing moves, the argument does not enter; if others move too, rows are coupled.
* *latent*: half of the elements of a latent are replaced; what moves depends on it.
* *twins*: everything known of row k is written over row j. If the two rows still differ, the model knows
  something of a row that no argument carries.

Nothing is changed by looking: not the random state, the param store, module buffers, or a Pyro handler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_factor, site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Call, Model
from pyro_amortize.parameters import preserved
from pyro_amortize.structure import Plate, Site, Source, Structure
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
        if site_is_subsample(msg):
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
    with preserved(model, evaluating=True):
        return _Examination(HeldRun(model, call)).structure()


@dataclass
class _Examination:
    """One look at a model: the base run, its noise, and the probes."""

    held: HeldRun
    base: poutine.Trace = field(init=False)
    plates: dict[str, Plate] = field(init=False)
    noise: float = field(init=False)

    def __post_init__(self) -> None:
        self.held.run()  # draws the latents; from here on the random state runs alike
        self.base = self.held.run()
        self.sample_sites = {n: s for n, s in self.base.nodes.items() if s["type"] == "sample"}
        self.plates = {}
        for name, site in self.sample_sites.items():
            for frame in site["cond_indep_stack"]:
                if not frame.vectorized:
                    raise NotImplementedError(
                        f"plan_amortization: site '{name}' stands in the sequential plate '{frame.name}'. Make the "
                        f"plate vectorized: 'with pyro.plate({frame.name!r}, ...):' around '{name}'."
                    )
                size, full_size = int(frame.size), int(frame.full_size or frame.size)
                at_random = size < full_size and frame.name in self.held.drawn
                self.plates[frame.name] = Plate(frame.name, frame.dim, size, full_size, at_random)
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
        sources, hidden, indistinct = {}, {}, []
        for plate in self.plates.values():
            found, same = self._sources(plate)
            sources[plate.name] = tuple(found)
            hidden[plate.name] = self._hidden(plate, found)
            indistinct += same
        params = tuple(name for name, node in self.base.nodes.items() if node["type"] == "param")
        shapes = {name: tuple(leaf.shape) for name, leaf in self.held.call.tensors.items()}
        empty = tuple(name for name, leaf in self.held.call.leaves.items() if leaf is None)
        return Structure(sites, self.plates, sources, hidden, tuple(dict.fromkeys(indistinct)), params, shapes, empty)

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
                moved[name] = torch.where(distance <= self.noise, 0.0, distance)
        self.last = trace
        return moved

    def _rows(self, moved: Tensor, plate: Plate) -> Tensor:
        """How far each row of a plate moved, from the entries of a log-factor; shape (size,)."""
        if moved.dim() < -plate.dim:
            return moved.sum().expand(plate.size)
        return moved.movedim(plate.dim, 0).reshape(moved.shape[plate.dim], -1).sum(-1).expand(plate.size)

    def _site(self, name: str) -> Site:
        site = self.factors[name]
        frames = sorted((f for f in site["cond_indep_stack"]), key=lambda f: f.dim)
        plates = tuple(frame.name for frame in frames)
        infer = site["infer"]
        facts: dict[str, Any] = {"markov": "_markov_depth" in infer, "enumerated": infer.get("enumerate") is not None}
        if site["is_observed"]:
            kind, categories = _kind(site["fn"])
            return Site(name, True, plates, tuple(site["value"].shape), kind=kind, categories=categories, **facts)
        discrete = bool(site["fn"].support.is_discrete)
        if discrete or is_delta(site["fn"]):
            shape = tuple(site["fn"].shape())
            children = self._moved_by(name, {name: self._other(name)}) if discrete else frozenset()
            return Site(name, False, plates, shape, children, fixed=True, discrete=discrete, **facts)
        unconstrained = list(unconstrained_shape(site))
        batch = len(site["fn"].batch_shape)
        kept = [size for i, size in enumerate(unconstrained) if i - batch not in {f.dim for f in frames}]
        children, couples, points = self._latent_probe(name, [self.plates[p] for p in plates])
        return Site(name, False, plates, tuple(kept), children, couples, points, **facts)

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

    def _latent_probe(self, name: str, plates: list[Plate]) -> tuple[frozenset[str], bool, frozenset[str]]:
        """Replaces about half the elements of a latent; returns its children, whether it couples, what it points to."""
        site = self.factors[name]
        torch.manual_seed(1)
        value, fresh = site["value"], generic_value(site)
        half = torch.ones((), dtype=torch.bool)
        for plate in plates:
            order = torch.randperm(plate.size)
            rows = torch.zeros(plate.size, dtype=torch.bool)
            rows[order[: max(1, plate.size // 2)]] = True
            half = half & rows.reshape((-1,) + (1,) * (-plate.dim - 1))
        events = (1,) * len(site["fn"].event_shape)
        where = half.reshape(half.shape + events).to(value.device)
        moved = self._changed(latents={name: torch.where(where, fresh, value)})
        if moved is None:
            return frozenset(self.factors) - {name}, True, frozenset()
        children = frozenset(n for n, m in moved.items() if bool(m.any())) - {name}
        couples, points = False, set()
        own = {plate.name for plate in plates}
        for child in children | {name}:
            theirs = {f.name for f in self.factors[child]["cond_indep_stack"]}
            if own and not own & theirs and not self.factors[child]["is_observed"]:
                couples = True
            elif own and not own & theirs:
                moved_rows = [self._rows(moved[child], self.plates[p]) for p in theirs]
                part = [r for r in moved_rows if bool(r.any()) and not bool(r.all())]
                points |= {child} if part else set()
                couples = couples or not part
            for plate in plates:
                if plate.name in theirs and plate.size > 1:
                    inside = half.expand(half.shape).movedim(plate.dim, 0).reshape(plate.size, -1).any(-1)
                    couples = couples or bool(self._rows(moved[child].cpu(), plate)[~inside].any())
        return children, couples, frozenset(points)

    # Where data enter.

    def _members(self, plate: Plate) -> list[str]:
        return [name for name, site in self.factors.items() if plate.name in {f.name for f in site["cond_indep_stack"]}]

    def _sources(self, plate: Plate) -> tuple[list[Source], list[str]]:
        members = self._members(plate)
        found, indistinct = [], []
        explained = {s for s in members if plate.size == 1 and self._is_argument(s)}  # one row tells nothing
        for name, leaf in self.held.call.tensors.items():
            if self._is_index(leaf, plate):
                continue
            best: Source | None = None
            distinct = tried = False
            for axis, length in enumerate(leaf.shape):
                if length in (plate.size, plate.full_size) and plate.size > 1:
                    tried = True
                    source, differs, touched = self._row_copy(name, leaf, axis, plate, members)
                    distinct |= differs
                    explained |= touched
                    if source is not None and (best is None or (best.couples and not source.couples)):
                        best = source
            if best is not None:
                found.append(best)
            elif tried and not distinct:
                indistinct.append(name)
                explained |= {s for s in members if self._feeds_equal_rows(leaf, s)}
        found += [self._from_site(s, plate) for s in members if self._stands_alone(s, explained)]
        return found, indistinct

    def _is_index(self, leaf: Tensor, plate: Plate) -> bool:
        indices = self.held.indices.get(plate.name)
        if not isinstance(indices, Tensor) or leaf.is_floating_point() or leaf.dtype == torch.bool:
            return False
        explicit = plate.size < plate.full_size or not torch.equal(indices.cpu(), torch.arange(plate.size))
        return explicit and leaf.shape == indices.shape and bool((leaf == indices).all())

    def _stands_alone(self, name: str, explained: set[str]) -> bool:
        site = self.factors[name]
        return site["is_observed"] and not site_is_factor(site) and name not in explained

    def _from_site(self, name: str, plate: Plate) -> Source:
        site = self.factors[name]
        kind, categories = _kind(site["fn"])
        value = self._site_rows(site, plate)
        return Source(
            name, None, False, tuple(value.shape[1:]), frozenset({name}), False, name, kind, categories, _has_nan(value)
        )

    def _site_rows(self, site: Any, plate: Plate) -> Tensor:
        """An observed site's values, a row an element of the plate."""
        return site_rows(site["value"], len(site["fn"].event_shape), plate)

    def _row_copy(
        self, name: str, leaf: Tensor, axis: int, plate: Plate, members: list[str]
    ) -> tuple[Source | None, bool, set[str]]:
        """Writes rows of an argument over others; returns what that says, whether rows differ, what values moved."""
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
        matter = self._rows_that_matter(name, leaf, axis, plate, members) if differs else torch.arange(plate.size)
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
            for site in members:
                distance = self._rows(moved[site].cpu(), plate)
                where = distance > 0
                if not bool(where.any()):
                    continue
                reaches.add(site)
                everywhere = everywhere and bool(where.all())
                place = positions.get(target, -1) if indexed else target
                if full and not subsampled and positions.get(target) != target and bool(where[positions[target]]):
                    indexed, place = True, positions[target]
                couples = couples or int(where.sum()) > int(bool(where[place]))
            if any(bool(m.any()) for n, m in moved.items() if n not in members):
                couples = couples or bool(reaches)
            swaps = swaps and everywhere and self._swap_is_local(name, leaf, axis, target, origin, plate, members)
        # A shared argument, or a wrong axis, moves all rows; so does a standardized one, but not by swapping two.
        if not reaches or (everywhere and not swaps and plate.size > 2):
            return None, differs, touched
        kept = rows if not indexed else rows[picked.to(rows.device)]
        feeds = next((s for s in members if self._is_value(kept, s, plate)), None)
        kind, categories = (
            _kind(self.factors[feeds]["fn"]) if feeds else ("binary" if leaf.dtype == torch.bool else "real", 0)
        )
        source = Source(
            name,
            axis,
            indexed,
            tuple(rows.shape[1:]),
            frozenset(reaches),
            couples,
            feeds,
            kind,
            categories,
            _has_nan(leaf),
        )
        return source, differs, touched

    def _rows_that_matter(self, name: str, leaf: Tensor, axis: int, plate: Plate, members: list[str]) -> Tensor:
        """Moves all rows of an argument on by one; returns which rows of the plate moved, all if that fails."""
        moved = self._changed(leaves={name: leaf.roll(1, axis)})
        if moved is None:
            return torch.arange(plate.size)
        distance = torch.stack([self._rows(moved[site].cpu(), plate) for site in members]).sum(0)
        return distance.nonzero().flatten()

    def _swap_is_local(
        self, name: str, leaf: Tensor, axis: int, j: int, k: int | None, plate: Plate, members: list[str]
    ) -> bool:
        """Swaps two rows of an argument, which changes no sum over rows; tells whether two rows of the plate moved."""
        if k is None:
            return False
        copy = leaf.clone()
        copy.movedim(axis, 0)[[j, k]] = leaf.movedim(axis, 0)[[k, j]]
        moved = self._changed(leaves={name: copy})
        if moved is None:
            return False
        distance = torch.stack([self._rows(moved[site].cpu(), plate) for site in members]).sum(0)
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

    def _is_value(self, rows: Tensor, name: str, plate: Plate) -> bool:
        site = self.factors[name]
        if not site["is_observed"] or site_is_factor(site):
            return False
        value = self._site_rows(site, plate)
        if value.numel() != rows.numel() or len(value) != len(rows):
            return False
        return torch.equal(
            torch.nan_to_num(value.reshape(len(rows), -1)), torch.nan_to_num(rows.reshape(len(rows), -1))
        )

    def _hidden(self, plate: Plate, sources: list[Source]) -> bool | None:
        """Makes two rows twins in all that is known of them, and sees whether their densities agree."""
        members = self._members(plate)
        if plate.size < 2 or not sources or any(source.couples for source in sources):
            return None
        leaves, latents, observed = {}, {}, {}
        target, origin = 0, 1
        indices = self.held.indices.get(plate.name)
        for source in sources:
            if source.axis is None:
                site = self.factors[source.name]
                observed[source.name] = _row_over(
                    site["value"], plate.dim - len(site["fn"].event_shape), target, origin
                )
            else:
                to, fro = (int(indices[target]), int(indices[origin])) if source.indexed else (target, origin)  # type: ignore[index]
                leaves[source.name] = _row_over(self.held.call.leaves[source.name], source.axis, to, fro)
        for name in members:
            site = self.factors[name]
            if not site["is_observed"]:
                latents[name] = _row_over(site["value"], plate.dim - len(site["fn"].event_shape), target, origin)
        if self._changed(leaves=leaves, latents=latents, observed=observed) is None:
            return None
        for name in members:
            factor = self.last.nodes[name]["log_prob"]
            if factor.dim() >= -plate.dim and factor.shape[plate.dim] > 1:
                pair = factor.movedim(plate.dim, 0)[:2]
                if not torch.allclose(pair[0], pair[1], rtol=1e-4, atol=1e-5, equal_nan=True):
                    return True
        return False


def site_rows(value: Tensor, event_dim: int, plate: Plate) -> Tensor:
    """Returns an observed value with the plate's axis first, expanded where it was broadcast."""
    dim = plate.dim - event_dim
    if value.dim() < -dim:
        return value.expand((plate.size, *value.shape))
    rows = value.movedim(dim, 0)
    return rows.expand((plate.size, *rows.shape[1:]))


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
