"""Frames and arrays, turned into matplotlib Figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

GAPS = {"amortization_gap": "amortization gap", "approximation_gap": "approximation gap"}


def _subplots(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from error
    figure = Figure(layout="constrained", **kwargs)
    return figure, figure.subplots(*args)


def gap_histogram(per_datum: pd.DataFrame, k_threshold: float) -> Any:
    """Draws histograms of the gaps over data, and k-hat against the inference gap.

    Args:
        per_datum: As ``GapReport.per_datum``.
        k_threshold: k-hat above which evidence is in doubt.

    Returns:
        A Figure.
    """
    figure, (left, right) = _subplots(1, 2, figsize=(9, 3.4))
    shown = {label: per_datum[name].dropna() for name, label in GAPS.items() if per_datum[name].notna().any()}
    shown = shown or {"inference gap": per_datum["inference_gap"].dropna()}
    edges = np.histogram_bin_edges(np.concatenate([values.to_numpy() for values in shown.values()]), bins=30)
    for label, values in shown.items():
        left.hist(values, bins=edges, alpha=0.6, label=f"{label}, mean {values.mean():.3g}")
    left.set(xlabel="nats per datum", ylabel="data")
    left.legend(frameon=False)
    right.scatter(per_datum["khat"], per_datum["inference_gap"], s=8)
    right.axvline(k_threshold, linestyle="--", color="0.5", linewidth=1)
    right.set(xlabel="k-hat (evidence in doubt right of the line)", ylabel="inference gap, nats")
    return figure


def elbo_curves(losses: Mapping[str, Any], seconds: Mapping[str, float]) -> Any:
    """Draws ELBOs against steps and against time.

    Args:
        losses: Label -> loss at each step.
        seconds: Label -> time of all steps.

    Returns:
        A Figure.
    """
    figure, axes = _subplots(1, 2, figsize=(9, 3.4))
    lows, highs = [], []
    for label, values in losses.items():
        elbo = -np.asarray(values, dtype=float)
        window = max(1, len(elbo) // 100)
        smooth = np.convolve(elbo, np.ones(window) / window, mode="valid")
        steps = np.arange(len(smooth)) + window
        axes[0].plot(steps, smooth, label=label)
        axes[1].plot(steps / len(elbo) * seconds[label], smooth, label=label)
        lows.append(np.quantile(smooth, 0.1))
        highs.append(smooth.max())
    if lows:
        margin = 0.1 * (max(highs) - min(lows)) + 1e-9
        for axis in axes:
            axis.set_ylim(min(lows) - margin, max(highs) + margin)
    axes[0].set(xlabel="step", ylabel="ELBO, nats (moving average)")
    axes[1].set(xlabel="seconds")
    axes[0].legend(frameon=False)
    return figure
