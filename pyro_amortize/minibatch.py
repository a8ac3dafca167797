"""A model and data, turned into exact minibatches: some rows of the data, their terms rescaled to all.

Three ways exist, and are tried in turn: give the plate the indices of its subsample (models that write ``x[i]``),
slice the arguments along the plate's axis, or both. A way counts as exact if, with the latents held, the mean of the
rescaled log joints over a partition of the rows equals the full log joint, site by site. Of a long call both are taken
of the part on which the model was examined, so that the check costs the same at any number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Args, Call, Kwargs, Model
from pyro_amortize.examination import examine
from pyro_amortize.excerpt import Part
from pyro_amortize.held import HeldRun, finite_place
from pyro_amortize.parameters import preserved
from pyro_amortize.structure import Plate, Source
from pyro_amortize.views import rows_of

SUBSAMPLES_ITSELF = "the model subsamples by itself"


class Rescaled(Messenger):
    """Runs model and guide on some rows of a plate.

    Args:
        plate: The plate as the full data have it.
        rows: Which elements.
        inject: Whether the plate is told its subsample; if not, its sites' terms are rescaled here.
    """

    def __init__(self, plate: Plate, rows: Tensor, inject: bool) -> None:
        super().__init__()
        self.plate, self.rows, self.inject = plate, rows, inject
        self.names = {plate.name, *plate.also}

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            if self.inject and msg["name"] in self.names:
                msg["value"] = self.rows
        elif not self.inject and self.names & {rows_of(msg["name"]), *(f.name for f in msg["cond_indep_stack"])}:
            msg["scale"] = msg["scale"] * (self.plate.full_size / len(self.rows))


@dataclass(frozen=True)
class Minibatches:
    """An exact way to run a model on some rows.

    Attributes:
        plate: The plate whose elements are picked.
        inject: Whether the plate is told its subsample.
        slices: The arguments that are sliced.
    """

    call: Call
    plate: Plate
    inject: bool
    slices: tuple[Source, ...]

    def rows(self, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Rescaled]:
        """Returns the model's arguments for some rows, and the handler to run model and guide under."""
        leaves = {}
        for source in self.slices:
            leaf = self.call.leaves[source.name]
            leaves[source.name] = leaf.index_select(_axis(source, self.plate), rows.to(leaf.device))
        args, kwargs = self.call.replaced(leaves)
        return args, kwargs, Rescaled(self.plate, rows, self.inject)


def exact_minibatches(
    model: Model,
    args: Args,
    kwargs: Kwargs,
    pooled: Mapping[str, str] | None = None,
    enumerated: tuple[str, ...] = (),
) -> Minibatches | str:
    """Finds an exact way to minibatch a model: by the outermost plate around all its data.

    Args:
        model: The model.
        args: Its positional arguments, all data in them.
        kwargs: Its keyword arguments.
        pooled: Plates whose rows the guide pools, all of which it has to see, and the latent that it does so for.
        enumerated: Latents that are summed out.

    Returns:
        The way, or the reason why there is none.
    """
    facts = examine(model, args, kwargs)
    observed = [site for site in facts.sites.values() if site.observed]
    plates = {plate for site in observed for plate in site.plates}
    if any(facts.plates[name].size < facts.plates[name].full_size for name in plates):
        return SUBSAMPLES_ITSELF
    around = [name for name in plates if all(name in site.plates for site in observed)]
    around.sort(key=lambda name: facts.plates[name].dim)
    if not around:
        outside = [site.name for site in observed if not site.plates]
        where = f"'{outside[0]}' in none" if outside else f"in {sorted(plates)}"
        return f"no one plate holds all observed sites, which stand in several ({where})"
    free = [name for name in around if name not in (pooled or {})]
    if not free:
        return f"the guide pools all rows of plate '{around[0]}' for '{(pooled or {})[around[0]]}'"
    plate = facts.plates[free[0]]
    if plate.size < 4:
        return f"plate '{plate.name}' has only {plate.size} elements"
    outside = [name for name in enumerated if plate.name not in facts.site_of(name).plates]
    tied = [n for n in outside if any(plate.name in facts.sites[c].plates for c in facts.site_of(n).children)]
    if tied:
        return f"'{tied[0]}' is summed out for all rows of plate '{plate.name}' together"
    slices = tuple(source for source in facts.sources if _may_slice(source, plate))
    tensors = [name for name, shape in facts.shapes.items() if plate.size in shape]
    found = _exact_way(model, Minibatches(Call(model, args, kwargs), plate, True, slices), facts.part)
    if isinstance(found, str) and tensors and not slices:
        return f"rows of '{tensors[0]}' do not enter the densities of plate '{plate.name}' one by one"
    return found


def _exact_way(model: Model, both: Minibatches, part: Part | None) -> Minibatches | str:
    """Tries the ways, given the one that injects and slices; returns the first that is exact, or why the last is not.

    Args:
        model: The model.
        both: The way on all rows.
        part: The rows on which it is tried, if not all.
    """
    ways = [replace(both, slices=()), both, replace(both, inject=False)] if both.slices else [both]
    call = both.call if part is None else Call(model, *part.arguments)
    plate = both.plate if part is None else part.plates.get(both.plate.name, both.plate)
    reason: str | None = None
    with preserved(model, evaluating=True):
        held = finite_place(model, call)
        full = _sums(held.run())
        for way in ways:
            reason = _bias(replace(way, call=call, plate=plate), held, full)
            if reason is None:
                return way
    return str(reason)


def _may_slice(source: Source, plate: Plate) -> bool:
    if source.axes is None or plate.name not in source.plates:
        return False
    return source.through[source.plates.index(plate.name)] is None


def _axis(source: Source, plate: Plate) -> int:
    assert source.axes is not None
    return source.axes[source.plates.index(plate.name)]


def _sums(nodes: Mapping[str, Any]) -> dict[str, Tensor]:
    sites = {name: site for name, site in nodes.items() if site["type"] == "sample"}
    return {name: torch.stack([s["log_prob_sum"], s["log_prob"].abs().sum()]) for name, s in sites.items()}


def _bias(way: Minibatches, held: HeldRun, full: dict[str, Tensor]) -> str | None:
    """Says at which site the parts of a partition do not add up to the whole, if at one."""
    torch.manual_seed(3)
    plate = way.plate
    order = torch.randperm(plate.size)
    cuts = [0, plate.size // 3, plate.size // 2, plate.size]
    total: dict[str, Tensor] = {}
    for start, stop in pairwise(cuts):
        rows = order[start:stop]
        args, kwargs, handler = way.rows(rows)
        part = HeldRun(held.model, Call(held.model, args, kwargs))
        part.values = {name: _picked(value, name, held, plate, rows) for name, value in held.values.items()}
        try:
            with pyro.validation_enabled(False):
                nodes = part.run(under=handler)
        except (ValueError, RuntimeError, IndexError) as error:
            return f"it does not run on some rows of plate '{plate.name}' ({str(error).splitlines()[0]})"
        for name, sums in _sums(nodes).items():
            total[name] = total.get(name, torch.zeros_like(sums)) + sums * len(rows) / plate.size
    for name, (log_joint, size) in full.items():
        if name not in total or not bool((total[name][0] - log_joint).abs() <= 2e-5 * (1 + size)):
            return (
                f"the mean of its rescaled log joints over a partition of the rows of plate '{plate.name}' is not the "
                f"full log joint: they differ at site '{name}', whose terms depend on the number of rows or each other"
            )
    return None


def _picked(value: Tensor, name: str, held: HeldRun, plate: Plate, rows: Tensor) -> Tensor:
    dim = held.plate_dims.get(name, {}).get(plate.name)
    return value if dim is None or value.shape[dim] == 1 else value.index_select(dim, rows.to(value.device))
