"""How far data are from those that a guide's encoders know."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_amortize.excerpt import LARGE
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.handler import GuidedRun
from pyro_amortize.parameters import preserved

FAR = 1.5
"""Times the reach of the data that a guide was initialized with, from which data are far from them."""


def has_seen(guide: AutoAmortized, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether data are those that a guide was initialized with, by their number and statistics.

    Of very many rows statistics are those of some, so that only their number tells; and that alone where data are not
    prepared by statistics.
    """
    assert guide.plan is not None
    with preserved(guide.model, guide, evaluating=True), torch.no_grad(), poutine.block():
        examples = GuidedRun(guide, args, kwargs, {}, plan=guide.plan).examples()
    for block in guide.plan.blocks:
        if block.name not in examples:
            continue
        reading, known = examples[block.name], guide.preparation_of(block)
        if reading.sizes != [guide.plan.plates[plate] for plate in block.plates]:
            return False
        again = copy.deepcopy(known)
        if max(reading.sizes, default=0) > LARGE:
            continue
        again.measure(reading.cells, guide.dtype)
        if not all(torch.allclose(one.shift, other.shift, rtol=1e-3) for one, other in zip(known, again, strict=True)):
            return False
    return True


def distances(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], plate: str | None, count: int) -> Tensor:
    """Returns for each datum how far its inputs are from those that a generated guide was initialized with.

    Args:
        guide: The guide; others than generated ones know no distance.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        plate: The plate whose elements are the data.
        count: How many data there are.

    Returns:
        Shape (count,): as of :meth:`~pyro_amortize.inputs.Inputs.distance`, of the farthest of a datum's cells; 0 where
        that is not known.
    """
    found = torch.zeros(count)
    if not isinstance(guide, AutoAmortized) or guide.plan is None or plate is None:
        return found
    with preserved(guide.model, guide, evaluating=True), torch.no_grad(), poutine.block():
        examples = GuidedRun(guide, args, kwargs, {}, plan=guide.plan).examples()
    for block in guide.plan.blocks:
        if block.name not in examples:
            continue
        for inputs, level, cells in zip(
            guide.preparation_of(block), block.levels, examples[block.name].cells, strict=True
        ):
            far = inputs.distance(cells, guide.dtype) if cells else None
            if far is None or plate not in level.plates:
                continue
            rows = far.movedim(level.plates.index(plate) - len(level.plates), 0)
            rows = rows.reshape(len(rows), -1).amax(1)
            if len(rows) == count:
                found = torch.maximum(found, rows.cpu().to(found))
    return found
