"""What more steps of a fit would gain, in nats, from how the ELBO rose on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOWS = (0.2, 0.35), (0.4, 0.6)
"""The steps, as shares of all, over which parameters are averaged."""
FEWEST_STEPS = 100
ENOUGH_STEPS = 400
"""Fewer show directions in which the ELBO rises slowly too little to say that nothing is left."""
TOLERANCE = 0.1
"""Nats that are not worth a word."""
ERRORS = 3.0


@dataclass(frozen=True)
class Remaining:
    """What as many steps again promise to gain.

    Attributes:
        gain: In nats; NaN where it is not known.
        se: Its standard error.
    """

    gain: float
    se: float

    def is_negligible(self, elbo_se: float) -> bool:
        """Whether it is within the errors of it and of the ELBO, or next to nothing."""
        return self.gain <= max(ERRORS * self.se, elbo_se, TOLERANCE)


UNKNOWN = Remaining(math.nan, math.nan)


class Drift:
    """Where a fit's parameters came from: their averages early on and in the middle.

    Steps of stochastic gradients shake parameters about, the less the smaller the steps are, so that losses fall by
    that alone at the end. Averages have no shaking left, and their ELBOs by the same draws, on the same rows, differ
    with little noise. Against the sum of learning rates the ELBO then rises as an exponential, or, where that is no
    slower than before, along a line, which is continued for as many steps again.

    Args:
        rates: Learning rate of each step; the unit does not matter.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        self.windows = [(round(low * len(rates)), round(high * len(rates))) for low, high in WINDOWS]
        places = [*((low + high) // 2 for low, high in self.windows), len(rates)]
        passed = [sum(rates[:place]) / sum(rates) for place in places]
        self.ways = passed[1] - passed[0], passed[2] - passed[1]
        self.sums: list[list[Tensor]] = [[], []]
        self.enough = len(rates) >= FEWEST_STEPS

    def see(self, step: int, parameters: Collection[Tensor]) -> None:
        """Takes note of parameters after a step."""
        for place, (low, high) in enumerate(self.windows):
            if low <= step < high and self.enough:
                if not self.sums[place]:
                    self.sums[place] = [torch.zeros_like(p) for p in parameters]
                if len(self.sums[place]) == len(parameters):
                    torch._foreach_add_(self.sums[place], [p.detach() for p in parameters])

    def remaining(self, parameters: Collection[Tensor], log_ratio: Callable[[], Tensor]) -> Remaining:
        """Compares the ELBO with that of the averages; parameters are left as they are.

        Args:
            parameters: Those of the fit, at its end.
            log_ratio: Returns log p - log q of draws, shape (draws,), the same draws in every call.
        """
        if not self.enough or any(len(total) != len(parameters) for total in self.sums):
            return UNKNOWN
        ends = [parameter.detach().clone() for parameter in parameters]
        found = []
        try:
            for total, (low, high) in zip(self.sums, self.windows, strict=True):
                _put(parameters, [value / (high - low) for value in total])
                found.append(log_ratio().double())
        finally:
            _put(parameters, ends)
        last = log_ratio().double() - found[1]
        gain, se = float(last.mean()), float(last.std()) / math.sqrt(len(last))
        promised = continued(float((found[1] - found[0]).mean()), gain, *self.ways)
        return Remaining(promised, promised * se / gain if gain > 0 else se)


def _put(parameters: Collection[Tensor], values: Collection[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def continued(before: float, last: float, way_before: float, way_last: float) -> float:
    """Continues what was gained on the last two parts of a way of length 1 for as long a way again.

    Args:
        before: Nats gained on the part before the last.
        last: Nats gained on the last part.
        way_before: Length of the part before the last.
        way_last: Length of the last part.

    Example:
        >>> round(continued(1.0, 1.0, 0.2, 0.2), 2), round(continued(1.0, 0.1, 0.2, 0.2), 3)
        (5.0, 0.014)
    """
    if not math.isfinite(before) or not math.isfinite(last):
        return math.nan
    if last <= 0:
        return 0.0
    rate, earlier = last / way_last, before / way_before
    decay = math.log(max(earlier / rate, 1.0)) / ((way_before + way_last) / 2)
    return rate if decay < 1e-6 else rate * math.exp(-decay * way_last / 2) * -math.expm1(-decay) / decay


def by_losses(losses: Tensor, rates: Sequence[float]) -> Remaining:
    """Continues the slope of losses over the second half of the steps, where the loss is another than the ELBO.

    Args:
        losses: Loss at each step, shape (steps,).
        rates: Learning rate of each step.
    """
    if len(losses) < FEWEST_STEPS:
        return UNKNOWN
    travelled = torch.as_tensor(rates, dtype=losses.dtype).cumsum(0)
    half = slice(len(losses) // 2, None)
    x, y = travelled[half] - travelled[half].mean(), losses[half] - losses[half].mean()
    slope = (x * y).sum() / x.square().sum()
    se = ((y - slope * x).square().mean() / x.square().sum()).sqrt()
    return Remaining(max(0.0, -float(slope * travelled[-1])), float(se * travelled[-1]))
