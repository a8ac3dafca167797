"""Numbers per datum with their errors: differences of them, means over draws of the globals, and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from pyro_amortize.evidence import Evidence, standard_error

QUANTITIES = ("elbo", "elbo_optimum", "log_evidence", "amortization_gap", "approximation_gap", "inference_gap")


@dataclass(frozen=True)
class Part:
    """A quantity of each datum, in nats, with its error.

    Attributes:
        value: Shape (rows,).
        influences: For each independent stream of draws, what every draw adds to the error, shape (draws, rows).
        shortfall: How far the search for q* may have stopped short, shape (rows,).
        apart: Standard error of each row alone beside these, shape (rows,).
    """

    value: Tensor
    influences: dict[str, Tensor]
    shortfall: Tensor
    apart: Tensor

    @classmethod
    def mean_of(cls, draws: Tensor, shortfall: Tensor | None = None) -> Part:
        """Returns the mean of draws, shape (draws, rows), that are common to all quantities."""
        value = draws.mean(0)
        zero = torch.zeros_like(value)
        return cls(value, {"common": draws - value}, zero if shortfall is None else shortfall, zero)

    def __sub__(self, other: Part) -> Part:
        influences = dict(self.influences)
        for stream, influence in other.influences.items():
            influences[stream] = influences[stream] - influence if stream in influences else -influence
        shortfall = torch.maximum(self.shortfall, other.shortfall)
        return Part(self.value - other.value, influences, shortfall, torch.hypot(self.apart, other.apart))

    def of(self, rows: Tensor) -> Part:
        """Returns the quantity of some rows."""
        influences = {stream: influence[:, rows] for stream, influence in self.influences.items()}
        return Part(self.value[rows], influences, self.shortfall[rows], self.apart[rows])

    @property
    def se(self) -> Tensor:
        """Standard errors, shape (rows,)."""
        return _in_quadrature([*map(standard_error, self.influences.values()), self.shortfall, self.apart])

    @property
    def total(self) -> tuple[float, float]:
        """The sum over rows, and its standard error."""
        errors = [standard_error(influence.sum(-1)) for influence in self.influences.values()]
        return float(self.value.sum()), float(_in_quadrature([*errors, self.shortfall.sum(), self.apart.norm()]))


def _in_quadrature(errors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(errors)).square().sum(0).sqrt()


def gaps(encoded: Tensor, best: Tensor | None, shortfall: Tensor | None, evidence: Evidence) -> dict[str, Part]:
    """Returns every quantity.

    Args:
        encoded: log p - log q of draws from the guide, shape (draws, rows).
        best: The same of q*, by the same random numbers; None without q*.
        shortfall: Of the search for q*, shape (rows,).
        evidence: Of each datum.
    """
    parts = {"elbo": Part.mean_of(encoded)}
    parts["log_evidence"] = Part(evidence.value, evidence.influences, torch.zeros_like(evidence.value), evidence.apart)
    if best is not None:
        parts["elbo_optimum"] = Part.mean_of(best, shortfall)
        parts["amortization_gap"] = parts["elbo_optimum"] - parts["elbo"]
        parts["approximation_gap"] = parts["log_evidence"] - parts["elbo_optimum"]
    parts["inference_gap"] = parts["log_evidence"] - parts["elbo"]
    return {name: parts[name] for name in QUANTITIES if name in parts}


def averaged(each: Sequence[Part]) -> Part:
    """Returns the mean of a quantity over several values of the globals, which used the same numbers of draws."""
    if len(each) == 1:
        return each[0]
    value, shortfall, apart = (
        torch.stack([getattr(part, what) for part in each]).mean(0) for what in ("value", "shortfall", "apart")
    )
    streams = dict.fromkeys(stream for part in each for stream in part.influences)
    influences = {}
    for stream in streams:
        found = [part.influences[stream] for part in each if stream in part.influences]
        influences[stream] = torch.stack(found).sum(0) / len(each)
    return Part(value, influences, shortfall, apart)


def frame(parts: dict[str, Part]) -> pd.DataFrame:
    """Returns a row a datum: each quantity beside its standard error, NaN where there is none."""
    columns = {}
    for name in dict.fromkeys((*QUANTITIES, *parts)):
        part = parts.get(name)
        columns[name] = part.value.numpy() if part else math.nan
        columns[f"{name}_se"] = part.se.numpy() if part else math.nan
    return pd.DataFrame(columns, index=pd.RangeIndex(len(parts["elbo"].value), name="datum"))


def totals(parts: dict[str, Part]) -> pd.DataFrame:
    """Returns a row a quantity: its sum over data, and the standard error of that."""
    rows = {name: part.total for name, part in parts.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["total", "total_se"])
