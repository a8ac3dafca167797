"""Answers by site: with words for the sites that have none, series as one variable, and plates in parts joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import pyro.distributions as dist
import torch
from torch import Size, Tensor

NUM_DRAWS = 1000


class UnknownSite(KeyError, ValueError):
    """An answer is asked for by a name that has none."""

    def __str__(self) -> str:
        return str(self.args[0])


class Answers(dict[str, Tensor]):
    """Site -> tensor, of the latents of a guide; others are found when they are asked for, or refused by name.

    Args:
        values: Latent -> tensor.
        others: Returns the answer for another name.
    """

    def __init__(self, values: Mapping[str, Tensor], others: Callable[[str], Tensor]) -> None:
        super().__init__(values)
        self.others = others

    def __missing__(self, name: str) -> Tensor:
        return self.others(name)

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses to be called, as the methods of Pyro's distributions are."""
        name = next(iter(self), "z")
        raise TypeError(f"Posterior: an answer is a dict of the sites, not a function: posterior.mean[{name!r}].")

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and self.get(name) is not None)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the answer for a name, or the default."""
        try:
            return self[name]
        except UnknownSite:
            return default

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


@dataclass(frozen=True)
class Series:
    """The sites of a loop, in order.

    Attributes:
        members: Names, the last loop's turns running fastest.
        sizes: Number of turns of each loop.
        loops: Their names.
        fillers: Axes of a member's batch shape, from its right, that only fill a place between plates.
        event_dim: Dimensions of an event.
    """

    members: tuple[str, ...]
    sizes: tuple[int, ...]
    loops: tuple[str, ...]
    fillers: tuple[int, ...]
    event_dim: int

    def stacked(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns values of all members, shape (..., *plates, *turns, *event)."""
        parts = [values[name].squeeze([axis - self.event_dim for axis in self.fillers]) for name in self.members]
        whole = torch.stack(parts, -1 - self.event_dim)
        return whole.unflatten(-1 - self.event_dim, self.sizes)


@dataclass(frozen=True)
class Derived:
    """Draws of a deterministic site.

    Attributes:
        draws: Shape (draws, *site's shape).
        plates: The plate of each of the site's axes, None for those of an event.
    """

    draws: Tensor
    plates: tuple[str | None, ...]


def _no_reason(name: str) -> str | None:
    return None


def _nothing(draws: dict[str, Tensor]) -> dict[str, Derived]:
    return {}


@dataclass(frozen=True)
class Others:
    """What there is to say of names that are no sites of a guide.

    Attributes:
        series: Family of numbered sites -> its members.
        reason: Says why a name has no answer; None for one that may be a deterministic site.
        deterministic: Runs the model at draws of the latents, site -> shape (draws, *site's shape); returns its
            deterministic sites.
    """

    series: Mapping[str, Series] = field(default_factory=dict)
    reason: Callable[[str], str | None] = _no_reason
    deterministic: Callable[[dict[str, Tensor]], dict[str, Derived]] = _nothing


class Joined(dist.TorchDistribution):
    """The distribution of all elements of a plate, of which each part has some.

    Args:
        parts: Distributions of some elements, which these are, and which of them are in no part before.
        dim: The plate's dimension.
        size: Its number of elements.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, parts: Sequence[tuple[Any, Tensor, Tensor]], dim: int, size: int) -> None:
        self.parts, self.dim = parts, dim
        first = parts[0][0]
        batch = list(first.batch_shape)
        batch[dim] = size
        super().__init__(Size(batch), first.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.parts[0][0].support

    def each(self, answer: Callable[[Any], Tensor], event_dim: int | None = None) -> Tensor:
        """Joins what each part answers, shape (..., *batch shape, *event)."""
        axis = self.dim - (self.event_dim if event_dim is None else event_dim)
        return torch.cat([_chosen(answer(fn), axis, new.nonzero().flatten()) for fn, _, new in self.parts], axis)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.each(lambda fn: fn.sample(Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        axis = self.dim - self.event_dim
        value = value.expand(torch.broadcast_shapes(value.shape, self.shape()))
        found = [
            _chosen(fn.log_prob(_chosen(value, axis, indices)), self.dim, new.nonzero().flatten())
            for fn, indices, new in self.parts
        ]
        return torch.cat(found, self.dim)


def _chosen(values: Tensor, axis: int, which: Tensor) -> Tensor:
    return values.index_select(axis, which.to(values.device))
