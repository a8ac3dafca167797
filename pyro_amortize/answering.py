"""One answer of a guide, for all elements of plates of which a run of the model shows some at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_amortize.answers import Joined, Series
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.structure import Plate, plates_of
from pyro_amortize.subsamples import Lengths, axis_of, covering, walked


@dataclass(frozen=True)
class Answer:
    """What a run of the model shows with its latents at their medians.

    Attributes:
        sites: Latent -> its site, with q or the model's own conditional as its distribution, and the median as value.
        found: Latent -> q, of those that the guide samples.
        plates: Of these, the names of their plates, outer to inner.
        values: Latent -> median.
        indices: The elements of plates.
        at_random: Plates of which the model picked elements at random.
        walked: Those that were walked through.
    """

    sites: Mapping[str, Any]
    found: dict[str, Any]
    plates: dict[str, tuple[str, ...]]
    values: dict[str, Tensor]
    indices: Mapping[str, Any]
    at_random: frozenset[str]
    walked: tuple[str, ...] = ()

    def series(self, plan: AmortizationPlan) -> dict[str, Series]:
        """Returns the sites of each loop."""
        return series_of(plan, self.found, self.sites)


def series_of(plan: AmortizationPlan, names: Iterable[str], sites: Mapping[str, Any]) -> dict[str, Series]:
    """Returns those of the named sites of a run that loops number, loop by loop."""
    found, names = {}, list(names)
    for family in plan.families:
        turns = {family.numbers(name): name for name in names if plan.turn_of(name)[0] == family.name}
        members = tuple(name for _, name in sorted(turns.items()))
        sizes = tuple(len(set(numbers)) for numbers in zip(*turns, strict=True))
        if members and len(members) == torch.Size(sizes).numel():
            site = sites[members[0]]
            dims = {plate.dim for plate in plates_of([site]).values()}
            batch = site["fn"].batch_shape
            fillers = tuple(d for d in range(-len(batch), 0) if d not in dims and batch[d] == 1)
            found[family.name] = Series(members, sizes, family.loops, fillers, len(site["fn"].event_shape))
    return found


def answered(
    run: Callable[[Mapping[str, Any]], Answer],
    model: Model,
    args: Args,
    kwargs: Kwargs,
    lengths: Lengths,
) -> Answer:
    """Returns the answer for all elements that the data hold.

    Args:
        run: Runs the model with given elements of plates.
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        lengths: Says how long the arguments are along a plate.
    """
    first = run({})
    around = plates_of(first.sites.values()).values()
    some = {plate.name for plate in around if plate.size < plate.full_size and plate.name in first.at_random}
    plates = [plate for plate in walked(model, args, kwargs, lengths) if plate.name in some] if some else []
    return _joined(plates, run, {}) if plates else first


def _joined(plates: list[Plate], run: Callable[[Mapping[str, Any]], Answer], indices: Mapping[str, Any]) -> Answer:
    if not plates:
        return run(indices)
    plate, *rest = plates
    parts = [(_joined(rest, run, {**indices, plate.name: here}), here, new) for here, new in covering(plate)]
    first = parts[0][0]
    found, values = dict(first.found), dict(first.values)
    for name, site in first.sites.items():
        axis = axis_of(site, plate)
        if axis is None:
            continue
        pieces = [part.values[name].index_select(axis, new.nonzero().flatten()) for part, _, new in parts]
        values[name] = torch.cat(pieces, axis)
        if name in found:
            found[name] = Joined(
                [(part.found[name], here, new) for part, here, new in parts], plate.dim, plate.full_size
            )
    return replace(first, found=found, values=values, walked=(plate.name, *first.walked))
