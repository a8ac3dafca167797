"""What there is to doubt in a report on gaps, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_amortize.digits import with_error, written
from pyro_amortize.estimates import Part
from pyro_amortize.evidence import CORRECTED, Evidence, Posterior
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.optimum import TOLERANCE

SLACK = 1e-3
"""Nats a datum by which the encoder may beat q* without a word."""
SOME_ROWS = 8
"""How many rows a warning names."""
OF_NOTE = 0.05
"""Share of a posterior's mass at other modes from which it is told."""


def rows_of(which: Tensor) -> str:
    """Names the rows that a mask marks, and how many there are."""
    rows = which.nonzero().flatten().tolist()
    more = ", ..." if len(rows) > SOME_ROWS else ""
    return f"{len(rows)} of {len(which)} data (rows {', '.join(map(str, rows[:SOME_ROWS]))}{more})"


def of_guide(guide: Any, far: Tensor) -> list[str]:
    """Says if a guide was not trained, or not on such data.

    Args:
        guide: The guide.
        far: Which data are far from those that it was initialized with, shape (rows,).
    """
    found = []
    if isinstance(guide, AutoAmortized) and guide.is_fresh and any(True for _ in guide.parameters()):
        found.append(
            "the guide was not trained: all of this is about the parameters that it starts from. Train it: "
            "fit_svi(model, guide, ...)"
        )
    if bool(far.any()):
        found.append(
            f"{rows_of(far)} are far from the data that the guide was initialized with: its encoder continues beyond "
            f"what it has learnt, and its answers there mean nothing. Train on such data too; for these alone, "
            f"fit_optimum(model, guide, ...). Advice is on the other data"
        )
    return found


def of_optimum(parts: dict[str, Part], num_steps: int) -> list[str]:
    """Says what there is to doubt of densities: an ELBO that is not finite, a q* that is no optimum."""
    found = []
    lost = ~parts["elbo"].value.isfinite()
    if bool(lost.any()):
        found.append(
            f"the guide's ELBO is not finite on {rows_of(lost)}: some of its draws have density 0 in the model or "
            f"overflow it, so totals are NaN or infinite"
        )
    if "amortization_gap" not in parts:
        return found
    gap = parts["amortization_gap"]
    total, total_se = gap.total
    below = int((gap.value < -2 * gap.se - SLACK).sum())
    by_chance = 0.0228 * len(gap.value)
    if total < -2 * total_se - SLACK * len(gap.value) or below > by_chance + 3 * by_chance**0.5:
        found.append(
            f"the optimum did not converge: the encoder beats it on {below} data by more than two standard errors, "
            f"amortization gap {with_error(total, total_se)} in total; raise num_steps={2 * num_steps}"
        )
    short = float(gap.shortfall.mean())
    if short > TOLERANCE:
        found.append(
            f"the optimum is short by about {short:.2g} nats a datum, as its last gradients show: the amortization "
            f"gap is larger by that, the approximation gap smaller; raise num_steps={2 * num_steps}"
        )
    return found


def of_evidence(evidence: Sequence[Evidence], posterior: Posterior | None) -> list[str]:
    """Says what there is to doubt of the evidence: weights with too heavy tails, what was corrected, other modes.

    Args:
        evidence: At each value of the globals.
        posterior: At the first of them.
    """
    found = []
    doubtful = torch.stack([each.is_doubtful for each in evidence]).any(0)
    if bool(doubtful.any()):
        found.append(
            f"k-hat is too high on {rows_of(doubtful)}: their evidence, approximation and inference gaps are in doubt, "
            f"likely too small; raise num_annealed={len(doubtful)} or num_draws"
        )
    first = evidence[0]
    if first.correction is not None:
        found.append(
            f"the evidence of {first.by.count(CORRECTED)} data is by importance sampling, raised by "
            f"{with_error(*first.correction)} nats, which is what annealing a sample of {first.by.count('AIS')} added; "
            f"for the data one by one raise num_annealed={len(first.by)}"
        )
    elsewhere = torch.zeros(0) if posterior is None else posterior.elsewhere
    if bool((elsewhere > OF_NOTE).any()):
        most = float(elsewhere.max())
        found.append(
            f"the posterior of {rows_of(elsewhere > OF_NOTE)} has other modes than the one of q*, with up to "
            f"{most:.0%} of its mass: the evidence counts them, so they are in the approximation gap, and one normal "
            f"cannot hold them: answers of the guide are of one mode, or lie between them"
        )
    return found


def of_collapse(site: str, lead: tuple[Part, Part] | None) -> list[str]:
    """Says if the encoder is no better than one row of parameters for all data.

    Args:
        site: A latent of it.
        lead: By how much the encoder is better than one answer for all data, and q* than that.
    """
    if lead is None:
        return []
    (gain, se), (possible, _) = (part.total for part in lead)
    if not math.isfinite(gain) or gain > max(2 * se, 0.02 * possible) or possible < 5:
        return []
    return [
        f"the encoder is no better than Constant(), one answer for all data: {with_error(gain, se)} nats, where q* is "
        f"better by {written(possible)}; '{site}' collapsed. Train longer, or use a wider encoder"
    ]
