"""What one call of a model says of the latents of another: which elements of plates the two have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_amortize.calls import Call
from pyro_amortize.draws import Values, laid
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.structure import Plate, plates_of


@dataclass(frozen=True)
class Informing:
    """Draws of the latents of a call that informs, and what tells whether another call has the same elements.

    Elements of a plate are known by their number where rows point to them by an index, where they stand in order, and
    where no observed site is in the plate: they are then those of groups or steps. Others are rows of data, which are
    the same only if the other call has all of them. Whichever they are, the arguments that both calls hold for them
    must agree.

    Attributes:
        plan: The plan.
        calls: The call that informs, and the one that is asked for.
        values: Latent -> draws, shape (draws, *shape of the site).
        sites: Latent -> its site in that call.
        plates: The plates of that call.
        observed: Those of them that hold observed sites.
    """

    plan: AmortizationPlan
    calls: tuple[Call, Call]
    values: Values
    sites: Mapping[str, Any]
    plates: Mapping[str, Plate]
    observed: frozenset[str]
    _shared: dict[str, bool] = field(default_factory=dict, compare=False)

    def shares(self, plate: Plate) -> bool:
        """Whether the elements of a plate are those of the call that informs, so far as that has them."""
        if plate.name not in self._shared:
            self._shared[plate.name] = self._compare(plate)
        return self._shared[plate.name]

    def _compare(self, plate: Plate) -> bool:
        there = self.plates[plate.name].full_size
        ours, theirs = (call.tensors for call in self.calls)
        both = [(ours[name], theirs[name]) for name in self._arguments(plate.name) if name in ours and name in theirs]
        if not all(_agree(*pair) for pair in both):
            return False
        if self._is_numbered(plate.name):
            return True
        return plate.full_size >= there if both else plate.full_size == there

    def _arguments(self, plate: str) -> set[str]:
        """Returns the arguments that have an axis for a plate."""
        links = [level.link for block in self.plan.blocks for level in block.levels if level.link is not None]
        return {*self.plan.rows.get(plate, ()), *(link.argument for link in links if plate in link.rows)}

    def _is_numbered(self, plate: str) -> bool:
        blocks = self.plan.blocks
        linked = any(level.link and level.link.to == plate for block in blocks for level in block.levels)
        ordered = any(plate in block.couples for block in blocks)
        return linked or ordered or plate not in self.observed

    def carried(self, msg: Any, indices: Mapping[str, Any], draws: _Some) -> tuple[Tensor, Tensor | None] | None:
        """Returns the values of a latent at its site in the other call, and which of its elements have one."""
        name, event_dim = msg["name"], len(msg["fn"].event_shape)
        if name not in self.values:
            return None
        mine, theirs = plates_of([msg]), plates_of([self.sites[name]])
        if {n: plate.dim for n, plate in mine.items()} != {n: plate.dim for n, plate in theirs.items()}:
            return None
        if not all(self.shares(plate) for plate in mine.values()):
            return None
        event = self.sites[name]["fn"].event_shape
        if event != msg["fn"].event_shape:
            raise NotImplementedError(
                f"predictive: an event of site '{name}' has shape {tuple(event)} in the call that informs, and "
                f"{tuple(msg['fn'].event_shape)} in this one, so that it cannot be carried over. Write what grows as a "
                f"plate or a loop."
            )
        value, marks = draws.of(self.values[name], self.values[name].dim() - 1 - event_dim), None
        for plate in mine.values():
            ids = indices.get(plate.name)
            ids = torch.arange(plate.size) if ids is None else torch.as_tensor(ids)
            there = self.plates[plate.name].full_size
            value = value.index_select(plate.dim - event_dim, ids.clamp(max=there - 1).to(value.device))
            if ids.numel() and int(ids.max()) >= there:
                here = (ids < there).reshape(-1, *(1,) * (-plate.dim - 1)).to(value.device)
                marks = here if marks is None else marks & here
        return value, None if marks is None else marks.reshape(marks.shape + (1,) * event_dim)


@dataclass(frozen=True)
class _Some:
    """Some draws, side by side to the left of so many dimensions for plates, or one alone."""

    start: int
    count: int | None
    nesting: int

    def of(self, value: Tensor, batch_dim: int) -> Tensor:
        return laid(value, batch_dim, self.start, self.count, self.nesting)


class Known:
    """Values that latents are to have in a run of a guide.

    Args:
        fixed: Latent -> draws of it, shape (draws, *shape of its site in this call).
        informing: A call that informs this one.
    """

    def __init__(self, fixed: Values, informing: Informing | None) -> None:
        self.fixed, self.informing = fixed, informing
        self.draws = _Some(0, None, 0)

    def at(self, start: int, count: int | None, nesting: int) -> Known:
        """Returns the same for some of the draws."""
        part = Known(self.fixed, self.informing)
        part.draws = _Some(start, count, nesting)
        return part

    def of(self, msg: Any, indices: Mapping[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        """Returns the values of a latent, and which of its elements have one (None for all); None if there are none."""
        if msg["name"] in self.fixed:
            value = self.fixed[msg["name"]]
            return self.draws.of(value, value.dim() - 1 - len(msg["fn"].event_shape)), None
        return self.informing.carried(msg, indices, self.draws) if self.informing else None


def line_for(call: Call) -> str:
    """Returns the line to write where a call lacks the data that are to inform it: those of another call."""
    arguments = call.parameters
    if all(positional for _, positional in arguments.values()):
        asked = [f"{name}_new" if value is not None else "None" for name, (value, _) in arguments.items()]
        while asked and asked[-1] == "None":
            asked.pop()
        return f"guide.predictive({', '.join([*asked, ''])}given=({', '.join(arguments)}))"
    asked = [f"'{name}': {name}_new" for name, (value, _) in arguments.items() if value is not None]
    given = [f"'{name}': {name}" for name in arguments]
    return f"guide.predictive(model_kwargs={{{', '.join(asked)}}}, given={{{', '.join(given)}}})"


def _agree(one: Tensor, two: Tensor) -> bool:
    """Whether the arguments of two calls are equal where both have elements, along all axes."""
    if one.dim() != two.dim():
        return False
    sizes = [min(pair) for pair in zip(one.shape, two.shape, strict=True)]
    first, second = (value[tuple(slice(size) for size in sizes)] for value in (one, two))
    return bool(torch.equal(first.nan_to_num(), second.nan_to_num().to(first.dtype)))
