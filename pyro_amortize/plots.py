"""Frames and arrays, turned into matplotlib Figures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd

GAPS = {"amortization_gap": "amortization gap", "approximation_gap": "approximation gap"}


def _subplots(rows: int, columns: int, heights: list[float] | None = None, **kwargs: Any) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from error
    figure: Any = Figure(layout="constrained", **kwargs)
    figure._repr_png_ = partial(_png, figure)  # notebooks know figures only once pyplot has made one
    return figure, figure.subplots(rows, columns, height_ratios=heights)


def _png(figure: Any) -> bytes:
    """Returns the picture that a notebook shows."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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
    per_datum, unseen = (f if f is None else f.replace([np.inf, -np.inf], np.nan) for f in (per_datum, unseen))
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
        right.scatter(
            rows["khat_evidence"], rows["inference_gap"], s=12, marker=marker, alpha=0.7, label=f"evidence by {by}"
        )
    right.axvline(k_threshold, linestyle="--", color="0.5", linewidth=1)
    right.set(xlabel="k-hat of the evidence (right of the line draws do not suffice)", ylabel="inference gap, nats")
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


def comparison(
    losses: Mapping[str, Any], seconds: Mapping[str, tuple[float, float]], moments: pd.DataFrame | None
) -> Any:
    """Draws ELBOs against steps and against time; below, if there are any, errors against MCMC.

    Args:
        losses: Label -> loss at each step.
        seconds: Label -> time before the first step, and that after the last.
        moments: As ``Comparison.moments``, or None.

    Returns:
        A Figure.
    """
    labels = list(dict.fromkeys([*losses, *([] if moments is None else moments.index.get_level_values("method"))]))
    colors = {label: f"C{i % 10}" for i, label in enumerate(labels)}
    if moments is None or moments.empty:
        figure, axes = _subplots(1, 2, figsize=(9, 3.6))
        upper = axes
    else:
        num_sites = moments.index.get_level_values("site").nunique()
        height = 1.2 + 0.16 * num_sites * (len(ERRORS) + len(labels) / 2)
        figure, axes = _subplots(2, 2, heights=[3.2, height], figsize=(9, 3.6 + height))
        upper = axes[0]
        _errors(axes[1], moments, colors)
    _elbo_curves(upper, losses, seconds, colors)
    handles = [_line(color) for color in colors.values()]
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(len(labels), 5)), frameon=False)
    return figure


ERRORS = {"mean_error": "mean", "q05_error": "5 %", "q50_error": "50 %", "q95_error": "95 %"}


def _line(color: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, marker="o", markersize=4)


def _elbo_curves(
    axes: Any, losses: Mapping[str, Any], seconds: Mapping[str, tuple[float, float]], colors: Mapping[str, str]
) -> None:
    lows, highs = [], []
    for label, values in losses.items():
        elbo = -np.asarray(values, dtype=float)
        window = max(1, len(elbo) // 40)
        smooth = np.convolve(elbo, np.ones(window) / window, mode="valid")
        steps = np.arange(len(smooth)) + window
        axes[0].plot(steps, smooth, color=colors[label], linewidth=1.2)
        first, last = seconds[label]
        axes[1].plot(first + steps / len(elbo) * (last - first), smooth, color=colors[label], linewidth=1.2)
        lows.append(np.quantile(smooth, 0.1))
        highs.append(smooth.max())
    if lows:
        margin = 0.1 * (max(highs) - min(lows)) + 1e-9
        for axis in axes:
            axis.set_ylim(min(lows) - margin, max(highs) + margin)
            axis.set_xlim(left=0)
    axes[0].set(xlabel="step", ylabel="ELBO, nats (moving average)")
    axes[1].set(xlabel="time, s")


def _errors(axes: Any, moments: pd.DataFrame, colors: Mapping[str, str]) -> None:
    """Draws a row a site and statistic, a point a method, and bars of two standard errors."""
    sites = list(dict.fromkeys(moments.index.get_level_values("site")))
    methods = list(dict.fromkeys(moments.index.get_level_values("method")))
    rows = [(site, column) for site in sites for column in ERRORS]
    for shift, method in zip(np.linspace(-0.3, 0.3, len(methods)), methods, strict=True):
        style = {"fmt": "o", "color": colors[method], "markersize": 4, "linewidth": 1}
        frame = moments.loc[method]
        shown = [
            (y, frame.loc[site, [column, f"{column}_se"]])
            for y, (site, column) in enumerate(rows)
            if site in frame.index
        ]
        for y, (value, se) in shown:
            axes[0].errorbar(value, y + shift, xerr=2 * se, **style)
        for y, site in enumerate(sites):
            if site in frame.index:
                value, se = frame.loc[site, ["sd_ratio", "sd_ratio_se"]]
                axes[1].errorbar(value, y + shift, xerr=2 * se, **style)
    axes[0].set_xlim(left=0)
    axes[1].axvline(1, color="0.5", linewidth=1, linestyle="--")
    axes[0].set_yticks(range(len(rows)), [f"{site}, {ERRORS[column]}" for site, column in rows])
    axes[1].set_yticks(range(len(sites)), sites)
    axes[0].set(xlabel="RMS error against MCMC, posterior sd (bars: 2 se)")
    axes[1].set(xlabel="sd / sd of MCMC (bars: 2 se)")
    for axis in axes:
        axis.invert_yaxis()
