"""What one call of a model says of the latents of another: which elements of plates the two have in common."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_amortize.calls import Call
from pyro_amortize.draws import Values, laid
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.structure import Plate, plates_of


class Carried(NamedTuple):
    """Values of a latent from another call.

    Attributes:
        values: Side by side or alone, in the shape of the site.
        marks: Which elements have one; None for all.
        surely: Whether something tells that the elements are the same; if not, they are as many.
    """

    values: Tensor
    marks: Tensor | None
    surely: bool


@dataclass(frozen=True)
class Informing:
    """Draws of the latents of a call that informs, and what tells whether another call has the same elements.

    Elements of a plate are known by their number where rows point to them by an index, where they stand in order, and
    where no observed site is in the plate: they are then those of groups or steps. Others are rows of data, which are
    the same if the other call has all of them, and the arguments that both calls hold for them are equal; where none
    tells, they are taken to be the same if they are as many and without data of their own. Whichever they are, no
    argument that both calls hold for them may differ; one of several plates tells against the innermost for sure.

    Attributes:
        plan: The plan.
        calls: The call that informs, and the one that is asked for.
        values: Latent -> draws, shape (draws, *shape of the site).
        sites: Latent -> its site in that call.
        plates: The plates of that call of which it has all elements, or takes its arguments as they are.
        taken: The latter: minibatches.
        observed: The plates that hold observed sites.
        same: The plates whose elements are said to be the same, by their number; None to find out.
    """

    plan: AmortizationPlan
    calls: tuple[Call, Call]
    values: Values
    sites: Mapping[str, Any]
    plates: Mapping[str, Plate]
    taken: frozenset[str]
    observed: frozenset[str]
    same: Collection[str] | None = None
    _shared: dict[str, bool | None] = field(default_factory=dict, compare=False)
    _doubts: dict[str, str] = field(default_factory=dict, compare=False)

    def shares(self, plate: Plate) -> bool | None:
        """Whether the elements of a plate are those of the call that informs, so far as that has them.

        None where nothing tells, and they are as many.
        """
        if plate.name not in self._shared:
            self._shared[plate.name] = self._compare(plate) if plate.name in self.plates else False
        return self._shared[plate.name]

    def _sizes(self, plate: Plate) -> tuple[int, int]:
        """Returns how many elements a plate has in the other call and in that which informs."""
        known = self.plates[plate.name]
        return (plate.size, known.size) if plate.name in self.taken else (plate.full_size, known.full_size)

    def _compare(self, plate: Plate) -> bool | None:
        if self.same is not None:
            return plate.name in self.same
        here, there = self._sizes(plate)
        told = {name: self._agree(name, plate.name) for name in self._arguments(plate.name)}
        if any(agree is False and self._is_innermost(plate.name, name) for name, agree in told.items()):
            return False
        if self._is_numbered(plate.name):
            return True
        if True in told.values() and False not in told.values():
            return here >= there
        if here != there or plate.name in self.taken:
            return False
        differ = [name for name, agree in told.items() if agree is False]
        self._doubts.update({plate.name: differ[0]} if differ else {})
        return None

    def warn(self) -> None:
        """Warns, once, of elements that are taken to be the same as they are as many, though their data differ."""
        while self._doubts:
            plate, argument = self._doubts.popitem()
            warnings.warn(
                f"predictive: whether the elements of plate '{plate}' are those of 'given' is not known: argument "
                f"'{argument}' differs, but may for the same elements. They are taken to be, as they are as many. Say "
                f"it: guide.predictive(..., given=..., same=['{plate}']); or, if all are new, same=[].",
                UserWarning,
                stacklevel=2,
            )

    def _agree(self, argument: str, plate: str) -> bool | None:
        """Whether an argument is equal in both calls, where both have elements and none is missing.

        None where that is not known, or tells nothing, as all elements have the same.
        """
        one, other = (self._there(argument, call) for call in self.calls)
        if one is None or other is None:
            return None
        if one.dim() != other.dim():
            return False
        sizes = tuple(slice(min(pair)) for pair in zip(one.shape, other.shape, strict=True))
        one, other = one[sizes], other[sizes]
        plain = [call.tensors[argument][sizes].double().nan_to_num() for call in self.calls]
        if torch.equal(*plain):  # of the same data, masks may cover other entries
            one = other = plain[0]
        here = ~(one.isnan() | other.isnan())
        if not torch.equal(one[here], other[here]):
            return False
        rows = one.movedim(self.plan.rows.get(plate, {}).get(argument, 0), 0).nan_to_num()
        return True if bool(here.any()) and bool((rows != rows[:1]).any()) else None

    def _there(self, argument: str, call: Call) -> Tensor | None:
        """Returns an argument of a call, NaN where a mask covers it; None if there is none, or it is a mask itself."""
        value = call.tensors.get(argument)
        sources = [source for block in self.plan.blocks for source in block.sources if source.name == argument]
        masks = {source.name for source in self.plan.masks.values() if source is not None}
        if value is None or (argument in masks and not sources):
            return None
        value = value.double()
        for site in {source.feeds for source in sources if source.feeds in self.plan.masks}:
            source = self.plan.masks[site]
            mask = None if source is None else call.tensors.get(source.name)
            if mask is None or mask.shape != value.shape:
                return None
            value = value if mask.is_floating_point() else torch.where(mask.bool(), value, torch.nan)
        return value

    def _is_innermost(self, plate: str, argument: str) -> bool:
        """Whether no other plate along an argument stands inside a plate."""
        others = [p for p, rows in self.plan.rows.items() if argument in rows and p in self.plates and p != plate]
        return all(self.plates[other].dim < self.plates[plate].dim for other in others)

    def _arguments(self, plate: str) -> set[str]:
        """Returns the arguments that have an axis for a plate."""
        links = [level.link for block in self.plan.blocks for level in block.levels if level.link is not None]
        return {*self.plan.rows.get(plate, ()), *(link.argument for link in links if plate in link.rows)}

    def _is_numbered(self, plate: str) -> bool:
        blocks = self.plan.blocks
        linked = any(level.link and level.link.to == plate for block in blocks for level in block.levels)
        ordered = any(plate in block.couples for block in blocks)
        return linked or ordered or plate not in self.observed

    def carried(self, msg: Any, indices: Mapping[str, Any], draws: _Some) -> Carried | None:
        """Returns the values of a latent at its site in the other call; None if it has none."""
        name, event_dim = msg["name"], len(msg["fn"].event_shape)
        if name not in self.values:
            return None
        mine, theirs = plates_of([msg]), plates_of([self.sites[name]])
        if {n: plate.dim for n, plate in mine.items()} != {n: plate.dim for n, plate in theirs.items()}:
            return None
        shared = [self.shares(plate) for plate in mine.values()]
        if False in shared:
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
            ids = None if plate.name in self.taken else indices.get(plate.name)
            ids = torch.arange(plate.size) if ids is None else torch.as_tensor(ids)
            _, there = self._sizes(plate)
            value = value.index_select(plate.dim - event_dim, ids.clamp(max=there - 1).to(value.device))
            if ids.numel() and int(ids.max()) >= there:
                here = (ids < there).reshape(-1, *(1,) * (-plate.dim - 1)).to(value.device)
                marks = here if marks is None else marks & here
        marks = None if marks is None else marks.reshape(marks.shape + (1,) * event_dim)
        return Carried(value, marks, None not in shared)


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

    def of(self, msg: Any, indices: Mapping[str, Any]) -> Carried | None:
        """Returns the values of a latent; None if it has none."""
        if msg["name"] in self.fixed:
            value = self.fixed[msg["name"]]
            return Carried(self.draws.of(value, value.dim() - 1 - len(msg["fn"].event_shape)), None, True)
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
