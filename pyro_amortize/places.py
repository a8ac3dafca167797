"""Where values of latents are drawn to run a model at: where their priors live, nearer to the middle, or far off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_amortize.supports import bijection, generic_value, is_delta, prior_center, support_of


@dataclass(frozen=True)
class Place:
    """Draws values of latent sites, given those above them.

    In unconstrained space a value is the median of five draws of the prior, or as much nearer to or farther from the
    prior's center; where the prior cannot be drawn from, it is about zero.

    Args:
        spread: How many times as far from the center as the median of five draws.
        about_zero: Whether it is about zero for all priors.
        side: On which side of the center all elements lie, 1 or -1; 0 for each on its own, None for all of a site on
            one that is drawn.
    """

    spread: float = 1.0
    about_zero: bool = False
    side: int | None = 0

    def value(self, msg: Any) -> Tensor:
        """Draws a value.

        Args:
            msg: A sample site, or a message on its way to be one.
        """
        if not _is_continuous(msg):
            return msg["fn"].sample()
        try:
            transform = bijection(msg)
        except ValueError:
            return generic_value(msg)
        center, away = self._away(msg, transform)
        if self.side != 0:
            away = away.abs() * (self.side or 2 * torch.randint(2, ()) - 1)
        return transform(center + away)

    def another(self, msg: Any, value: Tensor) -> Tensor:
        """Draws a second value, on the other side of the center; of a discrete site another one, if there is one."""
        if not _is_continuous(msg):
            return _another_discrete(msg["fn"], value)
        try:
            transform = bijection(msg)
        except ValueError:
            return generic_value(msg)
        center, away = self._away(msg, transform)
        side = transform.inv(value) - center
        return transform(center + torch.where(side > 0, -away.abs(), away.abs()))

    def _away(self, msg: Any, transform: Transform) -> tuple[Tensor, Tensor]:
        """Returns the center, and how far from it a value lies, in unconstrained space."""
        try:
            draws = transform.inv(msg["fn"].sample((5,)))
        except (NotImplementedError, TypeError, ValueError):
            draws = None
        center = transform.inv(prior_center(msg))
        generic = torch.empty_like(center).uniform_(-1, 1)
        if draws is None or self.about_zero:
            return torch.zeros_like(center), self.spread * generic
        away = draws.median(0).values - center
        return center, self.spread * torch.where(away.isfinite(), away, generic)


PLACES = (
    Place(),
    Place(about_zero=True),
    Place(spread=0.1),
    Place(spread=10.0, side=1),
    Place(spread=10.0, side=-1),
    Place(spread=1000.0),
)
"""Where a model is run: where its priors live, then elsewhere."""
FARTHER = tuple(Place(spread, side=None) for spread in (3.0, 10.0, 100.0, 1000.0))
"""Where it is run if densities are finite nowhere there."""


def _is_continuous(msg: Any) -> bool:
    return not (support_of(msg["fn"]).is_discrete or is_delta(msg["fn"]))


def _another_discrete(fn: Any, value: Tensor) -> Tensor:
    try:
        support = fn.enumerate_support()
    except NotImplementedError:
        draws = (fn.sample() for _ in range(20))
        return next((draw for draw in draws if not torch.equal(draw, value)), value)
    same = support == value
    for _ in fn.event_shape:
        same = same.all(-1)
    place = same.long().argmax(0)
    following = (place + torch.randint(1, max(2, len(support)), place.shape, device=place.device)) % len(support)
    following = following.reshape((1, *following.shape) + (1,) * len(fn.event_shape))
    return support.gather(0, following.expand(1, *value.shape))[0]
