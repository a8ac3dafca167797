"""Methods of inference on one model and data, side by side: ELBO, gap, time, and moments against MCMC."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_amortize import plots
from pyro_amortize.calls import Model
from pyro_amortize.densities import log_densities
from pyro_amortize.encoders import Table
from pyro_amortize.evidence import standard_error
from pyro_amortize.fit import Options, SVIFit, guide_parameters, train
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.parameters import Preserved, preserved
from pyro_amortize.planner import plan_amortization, plan_beside
from pyro_amortize.reference import MCMCFit, run_mcmc

METHODS = ("amortized", "mean_field", "mcmc")
COLUMNS = (
    "elbo",
    "elbo_se",
    "gap",
    "gap_se",
    "num_parameters",
    "seconds",
    "seconds_per_new_row",
    "break_even_rows",
)


@dataclass(frozen=True)
class Comparison:
    """Methods of inference on one model and data. ``print`` shows the table with its doubts.

    Attributes:
        table: Index ``method``; ``elbo`` and ``gap`` to the best ELBO found, in nats with standard errors,
            ``num_parameters``, ``seconds``, ``seconds_per_new_row`` (an encoder's forward pass; the others fit again),
            and ``break_even_rows``: from so many rows on, the cheapest amortized method costs less than this one.
        moments: Index ``method``, ``site``: against MCMC, ``mean_error``, the root mean square error of the posterior
            mean in posterior standard deviations, and ``sd_ratio``, the mean ratio of standard deviations. None
            without MCMC.
        fits: Method -> its ``SVIFit`` or ``MCMCFit``.
        warnings: Reasons to doubt the comparison.
    """

    table: pd.DataFrame
    moments: pd.DataFrame | None
    fits: dict[str, Any]
    warnings: tuple[str, ...]

    def plot(self) -> Any:
        """Draws ELBO against steps and against seconds; returns a matplotlib Figure."""
        fits = {label: fit for label, fit in self.fits.items() if isinstance(fit, SVIFit)}
        return plots.elbo_curves(
            {label: fit.losses for label, fit in fits.items()}, {label: fit.seconds for label, fit in fits.items()}
        )

    def __str__(self) -> str:
        def number(value: float) -> str:
            return f"{value:.6g}" if abs(value) >= 1000 else f"{value:.3g}"

        lines = ["Comparison, in nats", self.table.to_string(float_format=number, na_rep="-")]
        if self.moments is not None:
            lines += ["against MCMC:", self.moments.to_string(float_format=number, na_rep="-")]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def compare_inference(
    model: Model,
    *args: Any,
    methods: tuple[str, ...] | Mapping[str, Any] = METHODS,
    svi: Mapping[str, Any] | None = None,
    mcmc: Mapping[str, Any] | None = None,
    num_draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> Comparison:
    """Fits the same model and data by several methods, and sets their ELBOs, times and moments side by side.

    All variational fits have the same optimizer and schedule. The model's own parameters are those that the first
    fit learns on a copy (if a fit or a trained guide comes first, as they are); the others hold them. In the end they
    are put back, so what ``fits`` holds was trained for parameters that the model may no longer have.

    Main arguments:
        model: A Pyro model.
        args: Its positional arguments.
        methods: Among "amortized", "mean_field" and "mcmc"; or a dict from labels to these, to guides (a
            generated one without parameters yet is trained, others are judged as they are) or to fits.
        svi: Options of :func:`~pyro_amortize.fit.fit_svi` for all variational fits.
        mcmc: Options of :func:`~pyro_amortize.reference.run_mcmc`.
        model_kwargs: The model's keyword arguments.

    Other Arguments:
        num_draws: Draws behind each ELBO.
        seed: Of everything.
        progress: Whether to show progress bars.

    Returns:
        The comparison.

    Raises:
        ValueError: A method is not known.
    """
    kwargs = model_kwargs or {}
    asked = dict(methods) if isinstance(methods, Mapping) else {name: name for name in methods}
    _check_methods(asked)
    options = Options(**{"seed": seed, "progress": progress, **(svi or {})})
    state = pyro.util.get_rng_state()
    with preserved(model) as held:
        pyro.util.set_rng_state(state)
        fits = _fits(model, args, kwargs, asked, options, held)
        warnings = []
        for label in (label for label, what in asked.items() if what == "mcmc"):
            try:
                chosen = {"seed": seed, "progress": progress, **(mcmc or {})}
                fits[label] = run_mcmc(model, *args, model_kwargs=kwargs, **chosen)
            except (ValueError, NotImplementedError) as reason:
                warnings.append(f"{label} is left out: {reason}")
        fits = {label: fits[label] for label in asked if label in fits}
        ratios = {
            label: log_densities(model, _guide_of(fit), args, kwargs, num_draws=num_draws, seed=seed).log_ratio
            for label, fit in fits.items()
            if not isinstance(fit, MCMCFit)
        }
        num_rows = _num_rows(model, fits, args, kwargs)
        table = _table(fits, ratios, args, kwargs, num_rows)
        moments = _moments(fits, args, kwargs)
    mean_field = [label for label, fit in fits.items() if isinstance(fit, SVIFit) and not _answers_new_rows(fit)]
    warnings += _doubts(table, fits, mean_field, tolerance=max(0.1, 1e-3 * num_rows))
    return Comparison(table, moments, fits, tuple(warnings))


def _check_methods(asked: Mapping[str, Any]) -> None:
    for label, what in asked.items():
        if isinstance(what, str) and what not in METHODS:
            raise ValueError(f"compare_inference: method '{what}' is not known. Known: {list(METHODS)}.")
        if not isinstance(what, (str, SVIFit, MCMCFit)) and not callable(what):
            raise ValueError(
                f"compare_inference: methods['{label}'] is a {type(what).__name__}. Expected one of {list(METHODS)}, a "
                f"guide or a fit."
            )


def _fits(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    asked: Mapping[str, Any],
    options: Options,
    held: Preserved,
) -> dict[str, Any]:
    """Fits whatever is not fitted yet, MCMC apart. The first fit trains the model's parameters, others hold them."""
    fits: dict[str, Any] = {}
    for label, what in asked.items():
        if what == "mcmc":
            continue
        encoders = {"amortized": None, "mean_field": Table()}
        guide = AutoAmortized(model, encoder=encoders[what]) if isinstance(what, str) else what
        if isinstance(guide, AutoAmortized) and guide.plan is None:
            first = not fits
            fits[label] = train(model, guide, args, kwargs, options, label, held=held, train_model=first)
        else:
            fits[label] = guide
    return fits


def _guide_of(fit: Any) -> Any:
    return fit.guide if isinstance(fit, SVIFit) else fit


def _num_rows(model: Model, fits: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Returns the size of the plate that is amortized; of the largest, if none is."""
    guides = [_guide_of(fit) for fit in fits.values() if not isinstance(fit, MCMCFit)]
    guides.sort(key=_answers_new_rows, reverse=True)
    plan = plan_beside(model, guides[0], args, kwargs) if guides else plan_amortization(model, *args, **kwargs)
    local = [plan.plates[block.plates[0]] for block in plan.blocks if block.amortized and block.plates]
    return max(local or plan.plates.values(), default=1)


def _table(
    fits: Mapping[str, Any],
    ratios: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_rows: int,
) -> pd.DataFrame:
    means = {label: float(ratio.mean()) for label, ratio in ratios.items()}
    best = max(means, key=means.__getitem__) if means else None
    rows = {}
    for label, fit in fits.items():
        row = dict.fromkeys(COLUMNS, math.nan)
        if label in ratios:
            row["elbo"], row["elbo_se"] = means[label], float(standard_error(ratios[label]))
            behind = ratios[best] - ratios[label]  # type: ignore[index]
            row["gap"], row["gap_se"] = float(behind.mean()), float(standard_error(behind))
            parameters = guide_parameters(_guide_of(fit), args, kwargs)
            row["num_parameters"] = sum(parameter.numel() for parameter in parameters.values())
        row["seconds"] = getattr(fit, "seconds", math.nan)
        answers = _answers_new_rows(fit)
        row["seconds_per_new_row"] = (_seconds(_guide_of(fit), args, kwargs) if answers else row["seconds"]) / num_rows
        rows[label] = row
    _break_even(rows, [label for label, fit in fits.items() if _answers_new_rows(fit)])
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)).rename_axis("method")
    return table.astype({"num_parameters": "Int64", "break_even_rows": "Int64"})


def _answers_new_rows(fit: Any) -> bool:
    """Whether a fit's guide answers for rows it never saw; a guide written by hand is taken to."""
    guide = _guide_of(fit)
    if isinstance(guide, AutoAmortized):
        return guide.plan is not None and any(block.amortized for block in guide.plan.blocks)
    return not isinstance(fit, MCMCFit)


def _seconds(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Returns how long the guide's answer for the data takes, median of five."""
    answer = guide.posterior if isinstance(guide, AutoAmortized) else guide
    times = []
    with preserved(guide, evaluating=True), torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            answer(*args, **kwargs)
            times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]


def _break_even(rows: dict[str, dict[str, float]], amortized: list[str]) -> None:
    """Fills in from how many rows on the fastest amortized fit costs less than fitting again by another method."""
    trained = [label for label in amortized if not math.isnan(rows[label]["seconds"])]
    if not trained:
        return
    fastest = rows[min(trained, key=lambda label: rows[label]["seconds"])]
    for label, row in rows.items():
        saved = row["seconds_per_new_row"] - fastest["seconds_per_new_row"]
        if label not in amortized and saved > 0:
            row["break_even_rows"] = math.ceil(fastest["seconds"] / saved)


def _moments(fits: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> pd.DataFrame | None:
    draws = next((fit.samples for fit in fits.values() if isinstance(fit, MCMCFit)), None)
    if draws is None:
        return None
    rows = []
    for label, fit in fits.items():
        if isinstance(fit, MCMCFit):
            continue
        for name, (mean, sd) in _site_moments(_guide_of(fit), args, kwargs).items():
            if name in draws:
                true, spread = draws[name].mean((0, 1)), draws[name].flatten(0, 1).std(0)
                error = ((mean.reshape(true.shape) - true) / spread).square().mean().sqrt()
                rows.append((label, name, float(error), float((sd.reshape(true.shape) / spread).mean())))
    table = pd.DataFrame(rows, columns=["method", "site", "mean_error", "sd_ratio"])
    return table.set_index(["method", "site"])


def _site_moments(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    if isinstance(guide, AutoAmortized):
        posterior = guide.posterior(*args, **kwargs)
        mean, sd = posterior.mean, posterior.stddev
        return {name: (mean[name], sd[name]) for name in mean}
    with preserved(guide, evaluating=True), torch.no_grad(), poutine.block():
        traces = [poutine.trace(guide).get_trace(*args, **kwargs) for _ in range(500)]
    names = [name for name, site in traces[0].iter_stochastic_nodes() if site["value"].is_floating_point()]
    draws = {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names}
    return {name: (value.mean(0), value.std(0)) for name, value in draws.items()}


def _doubts(table: pd.DataFrame, fits: Mapping[str, Any], mean_field: list[str], tolerance: float) -> list[str]:
    found = []
    for label, fit in fits.items():
        if isinstance(fit, SVIFit) and not fit.converged:
            found.append(f"{label} was still improving at its last step: raise svi={{'num_steps': ...}}")
        if isinstance(fit, MCMCFit):
            found += [f"{label}: {text}" for text in fit.warnings]
    for label in mean_field:
        gap, se = table.loc[label, "gap"], table.loc[label, "gap_se"]
        if gap > max(2 * se, tolerance):
            best = table["elbo"].astype(float).idxmax()
            found.append(
                f"{label} ended {gap:.3g} ± {se:.2g} nats below {best}, though its family holds that one's: it did not "
                f"reach its optimum, and gaps are measured from {best}; raise svi={{'num_steps': ...}}"
            )
    return found
