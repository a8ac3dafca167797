"""Which gap dominates, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from pyro_amortize.digits import with_error
from pyro_amortize.plan import AmortizationPlan

NEGLIGIBLE = 0.05
"""Nats a datum below which a gap is not worth a word."""
ERRORS = 3.0
"""Standard errors by which a gap must exceed zero."""


def advise(
    per_row: pd.DataFrame,
    blocks: pd.DataFrame,
    plan: AmortizationPlan,
    lacking: Mapping[str, str],
    correlated: float | None,
    generalization: pd.DataFrame | None,
    widths: Mapping[str, int],
) -> list[str]:
    """Says what to do about each gap that matters, the largest first; nothing where all is well.

    Args:
        per_row: A row a quantity, with columns ``total`` and ``total_se`` in nats a datum.
        blocks: The same of the amortization gap of each block.
        plan: The plan, with its verdict on the encoders that there are.
        lacking: What the encoder of a block does not see.
        correlated: Nats a datum of the approximation gap that are due to correlations within a datum.
        generalization: As of :class:`~pyro_amortize.gap.GapReport`.
        widths: How wide the encoder of a block is, where that is known.
    """
    found: list[tuple[float, str]] = []
    whole = per_row.loc["inference_gap", "total"] if "inference_gap" in per_row.index else None

    def add(gap: float, se: float, what: str, remedy: str, is_part: bool = True) -> None:
        if gap > NEGLIGIBLE and gap > ERRORS * se:  # False where one datum has no error
            share = f", {gap / whole:.0%} of the inference gap" if is_part and whole is not None and whole > 0 else ""
            found.append((gap, f"{what} {with_error(gap, se)} nats a datum{share}: {remedy}"))

    if "amortization_gap" in per_row.index:
        for name, (gap, se) in blocks.iterrows():
            add(
                gap,
                se,
                f"the encoder of '{name}' loses",
                _for_encoder(name, plan, lacking, per_row, widths.get(name, 0)),
            )
    if "approximation_gap" in per_row.index:
        gap, se = per_row.loc["approximation_gap", ["total", "total_se"]]
        add(gap, se, "independent normals lose, whatever the encoder,", _for_family(gap, correlated))
    if generalization is not None and "amortization_gap" in generalization.index:
        gap, se = generalization.loc["amortization_gap", ["difference", "difference_se"]]
        add(
            gap,
            se,
            "on unseen data the encoder loses another",
            "train on more data, also on such as guide.predictive makes",
            False,
        )
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]


def _for_encoder(
    name: str, plan: AmortizationPlan, lacking: Mapping[str, str], per_row: pd.DataFrame, width: int
) -> str:
    """Says what narrows an amortization gap: inputs that lack, the structure, or training."""
    gap, se = per_row.loc["conditioning_gap", ["total", "total_se"]] if name in lacking else (0.0, 0.0)
    if gap > ERRORS * se:
        return f"{lacking[name]}. An encoder that does, trained alike, gains {with_error(gap, se)}"
    block = next((block for block in plan.blocks if block.name == name), None)
    if block is not None and block.constant:
        return "Constant() has one answer for all data; take an encoder that sees them"
    closable = plan.verdict.closable if block is None else block.closable
    if closable is False:
        return f"no encoder of these inputs closes it all: {plan.verdict.reason}"
    lets = "the model's structure lets it vanish; " if closable else ""
    wider = max(256, 2 * width)
    return (
        f"{lets}train longer, and if that gains no more, take a wider encoder: "
        f"encoder={{'{name}': MLP(({wider}, {wider}))}}"
    )


def _for_family(gap: float, correlated: float | None) -> str:
    """Says what narrows an approximation gap, as far as it is known what makes it."""
    if correlated is None:
        return "correlations between the latents of a datum, skew or tails. A richer family would gain it"
    if correlated > gap / 2:
        return (
            f"correlations between the latents of a datum make {correlated:.3g} of that. Normals with a covariance "
            f"would gain it; so does a model whose latents are less dependent given the data (a reparametrization)"
        )
    return "skew, curvature or tails. A flow, or other coordinates (poutine.reparam), would gain it"


def generalization(seen: pd.DataFrame | None, unseen: pd.DataFrame | None) -> pd.DataFrame | None:
    """Sets mean gaps on two sets of data side by side; the difference has the error of the choice of data too."""
    if seen is None or unseen is None:
        return None
    rows = {}
    for name in ("amortization_gap", "approximation_gap", "inference_gap"):
        one, other = seen[name], unseen[name]
        if all(column.abs().lt(float("inf")).all() for column in (one, other)):
            se = (one.var() / len(one) + other.var() / len(other)) ** 0.5
            rows[name] = (one.mean(), other.mean(), other.mean() - one.mean(), se)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["seen", "unseen", "difference", "difference_se"])
