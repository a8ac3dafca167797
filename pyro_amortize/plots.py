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


def gaps(per_datum: pd.DataFrame, k_threshold: float, unseen: pd.DataFrame | None = None, num_worst: int = 12) -> Any:
    """Draws histograms of the gaps, the data with the largest inference gaps, and k-hat.

    Args:
        per_datum: As ``GapReport.per_datum``.
        k_threshold: k-hat above which evidence is in doubt.
        unseen: The same of unseen data, drawn as outlines.
        num_worst: How many of the worst data are named.

    Returns:
        A Figure.
    """
    figure, (left, middle, right) = _subplots(1, 3, figsize=(12, 3.6))
    shown = {name: label for name, label in GAPS.items() if per_datum[name].notna().any()}
    shown = shown or {"inference_gap": "inference gap"}
    frames = [per_datum] if unseen is None else [per_datum, unseen]
    edges = np.histogram_bin_edges(np.concatenate([frame[name].dropna() for frame in frames for name in shown]), 30)
    for color, (name, label) in enumerate(shown.items()):
        values = per_datum[name].dropna()
        left.hist(values, edges, alpha=0.6, color=f"C{color}", label=f"{label}, mean {values.mean():.3g}")
        if unseen is not None:
            values = unseen[name].dropna()
            label = f"the same, unseen data, mean {values.mean():.3g}"
            left.hist(values, edges, histtype="step", linewidth=1.5, color=f"C{color}", label=label)
    left.set(xlabel="nats per datum", ylabel="number of data")
    left.legend(frameon=False, fontsize="small")
    _worst(middle, per_datum.nlargest(num_worst, "inference_gap"), shown)
    for marker, (by, rows) in zip("os^", per_datum.groupby("estimator"), strict=False):
        right.scatter(rows["khat"], rows["inference_gap"], s=12, marker=marker, alpha=0.7, label=f"evidence by {by}")
    right.axvline(k_threshold, linestyle="--", color="0.5", linewidth=1)
    right.set(xlabel="k-hat (right of the line draws do not suffice)", ylabel="inference gap, nats")
    right.legend(frameon=False, fontsize="small")
    return figure


def _worst(axis: Any, rows: pd.DataFrame, shown: Mapping[str, str]) -> None:
    """Draws the gaps of some data as bars that add up, the error of the sum at their ends."""
    places, start = np.arange(len(rows)), np.zeros(len(rows))
    for color, (name, label) in enumerate(shown.items()):
        axis.barh(places, rows[name], left=start, alpha=0.6, color=f"C{color}", label=label)
        start = start + rows[name].to_numpy()
    axis.errorbar(start, places, xerr=2 * rows["inference_gap_se"], fmt="none", color="0.2", linewidth=1)
    axis.set_yticks(places, [str(label) for label in rows.index])
    axis.invert_yaxis()
    axis.set(xlabel="nats (bars: two standard errors)", ylabel="datum, worst first")


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
