"""Methods of inference on one model and data, side by side: ELBO, gap, time, and moments against MCMC."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any

import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoMessenger
from torch import Tensor

from pyro_amortize import digits, plots
from pyro_amortize.arguments import check_given, check_model, check_options, named, observes
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.densities import log_densities
from pyro_amortize.distance import has_seen
from pyro_amortize.elsewhere import is_of, log_density_of
from pyro_amortize.encoders import Rows, Table
from pyro_amortize.evidence import standard_error
from pyro_amortize.fit import SVIFit, train
from pyro_amortize.guides import AutoAmortized, guide_apart
from pyro_amortize.mcmc import MCMCFit, run_mcmc
from pyro_amortize.moments import against_mcmc
from pyro_amortize.parameters import Preserved, preserved
from pyro_amortize.planner import plan_amortization, plan_beside
from pyro_amortize.reference import held_globals, mean_field_guide
from pyro_amortize.steps import Options, guide_parameters

METHODS = ("amortized", "mean_field", "mcmc")
STEPS = "svi={'num_steps': ..., 'num_particles': ...}"
OF_SVI = tuple(option.name for option in fields(Options))
OF_MCMC = tuple(name for name in signature(run_mcmc).parameters if name not in ("model", "args", "model_kwargs"))
PYROS_OWN = (AutoGuide, AutoMessenger)
KNOWN = ("amortized", "mean_field", "mean_field_warm", "mcmc")
COLUMNS = (
    "elbo",
    "elbo_se",
    "gap",
    "gap_se",
    "gap_to",
    "num_parameters",
    "seconds",
    "seconds_per_new_row",
    "break_even_rows",
)


@dataclass(frozen=True)
class Comparison:
    """Methods of inference on one model and data. ``print`` shows the table with its doubts.

    Attributes:
        table: Index ``method``; ``elbo`` and ``gap`` to the best ELBO found, in nats with standard errors, ``gap_to``,
            the method whose ELBO that is, ``num_parameters``, ``seconds``, ``seconds_per_new_row`` (an encoder's
            forward pass; the others fit again), and ``break_even_rows``: from so many rows on, the cheapest amortized
            method costs less than this one; ``Constant()``, which answers no row in particular, does not count.
        moments: Index ``method``, ``site``: against MCMC, ``mean_error``, the root mean square over elements of the
            error of the posterior mean in posterior standard deviations, ``q05_error``, ``q50_error`` and
            ``q95_error``, those of quantiles, and ``sd_ratio``, the mean ratio of standard deviations. The column
            ``*_error_se`` is the root mean square of the elements' Monte Carlo standard errors, sqrt(mean_j mcse_j^2 /
            sd_j^2), which is what an exact method would show on average: an error below twice this may be none.
            ``sd_ratio_se`` is a standard error. None without MCMC that converged.
        fits: Method -> its ``SVIFit`` or ``MCMCFit``.
        warnings: Reasons to doubt the comparison.
    """

    table: pd.DataFrame
    moments: pd.DataFrame | None
    fits: dict[str, Any]
    warnings: tuple[str, ...]

    def plot(self) -> Any:
        """Draws ELBO against steps and seconds, below it errors against MCMC; returns a matplotlib Figure.

        Time begins with compiling, so that a curve begins when that is done.
        """
        fits = {label: fit for label, fit in self.fits.items() if isinstance(fit, SVIFit)}
        return plots.comparison(
            {label: fit.losses for label, fit in fits.items()},
            {label: (fit.compile_seconds, fit.seconds) for label, fit in fits.items()},
            self.moments,
        )

    def __str__(self) -> str:
        lines = ["Comparison, in nats", digits.table(self.table.drop(columns="gap_to"))]
        if len(best := self.table["gap_to"].dropna()):
            lines[0] += f"; gaps are to {best.iloc[0]}, the best ELBO found"
        if self.moments is not None:
            names = [name for name in self.moments.columns if not name.endswith("_se")]
            shown = {
                name: [
                    digits.with_error(value, se)
                    for value, se in zip(self.moments[name], self.moments[f"{name}_se"], strict=True)
                ]
                for name in names
            }
            lines += [
                "against MCMC, errors in posterior sd (± of an error: what noise alone would show):",
                pd.DataFrame(shown, index=self.moments.index).to_string(),
            ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


@named
def compare_inference(
    model: Model,
    *args: Any,
    methods: str | tuple[str, ...] | Mapping[str, Any] = METHODS,
    svi: Mapping[str, Any] | None = None,
    mcmc: Mapping[str, Any] | None = None,
    given: Mapping[str, Tensor] | None = None,
    num_draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
    model_kwargs: Kwargs | None = None,
) -> Comparison:
    """Fits the same model and data by several methods, and sets their ELBOs, times and moments side by side.

    Mean-field inference from scratch may end in a local optimum below the amortized one, and "mean_field_warm" finds a
    better one then. Gaps are to the best ELBO found, whichever method's it is, and a fit that ends below one whose
    family its own holds is warned of. There are moments against MCMC only if it converged
    (:attr:`~pyro_amortize.mcmc.MCMCFit.converged`).

    All variational fits have the same optimizer and schedule. The model's own parameters are those that the first
    fit learns on a copy (if a fit or a trained guide comes first, as they are); the others hold them. In the end they
    are put back, so what ``fits`` holds was trained for parameters that the model may no longer have.

    Main arguments:
        model: A Pyro model.
        args: Its positional arguments.
        methods: Among "amortized", "mean_field", "mean_field_warm" (started from the answer of the best amortized
            guide among the methods before it) and "mcmc"; or a dict from labels to these, to guides (a generated one
            without parameters yet is trained, others are judged as they are: train Pyro's own before, by
            :func:`~pyro_amortize.fit.fit_svi`) or to fits.
        svi: Options of :func:`~pyro_amortize.fit.fit_svi` for all variational fits.
        mcmc: Options of :func:`~pyro_amortize.mcmc.run_mcmc`.
        given: Values at which global latents are held for all methods; ``{}`` holds none. By default they are held, at
            its medians, where a generated guide among the methods was trained on other data: what it learnt of them
            there is no loss on these, and a warning says so.
        model_kwargs: The model's keyword arguments.

    Other Arguments:
        num_draws: Draws behind each ELBO, and behind the moments of guides written by hand.
        seed: Of everything.
        progress: Whether to show progress bars.

    Returns:
        The comparison.

    Raises:
        ValueError: A method is not known, or "mean_field_warm" has no amortized method before it.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> methods = ("amortized", "mean_field", "mean_field_warm")
        >>> result = compare_inference(model, torch.randn(50), methods=methods, svi={"num_steps": 300}, progress=False)
        >>> list(result.table.index)
        ['amortized', 'mean_field', 'mean_field_warm']

    References:
        C. Margossian and D. Blei, Amortized Variational Inference: When and Why?, UAI 2024,
        https://arxiv.org/abs/2307.11018
    """
    kwargs = check_model("compare_inference", model, args, model_kwargs)
    asked = by_label(methods)
    _check_methods(asked)
    for label, what in asked.items():
        if callable(what) and observes(what, args, kwargs):
            raise ValueError(
                f"compare_inference: methods['{label}'] observes data, so it is a model. Expected one of "
                f"{list(KNOWN)}, a guide or a fit."
            )
    svi = check_options("compare_inference", "svi", svi, OF_SVI)
    mcmc = check_options("compare_inference", "mcmc", mcmc, OF_MCMC)
    options = Options(**{"seed": seed, "progress": progress, **svi})
    state = pyro.util.get_rng_state()
    with preserved(model) as held:
        values, remarks = _held_globals(model, asked, args, kwargs, given)
        pyro.util.set_rng_state(state)
        shown = poutine.condition(model, data=values) if values else model
        fitting = _Fitting(shown, args, kwargs, options, held, num_draws, seed, values)
        for label, what in asked.items():
            if what != "mcmc":
                fitting.fit(label, what)
        for label in (label for label, what in asked.items() if what == "mcmc"):
            fitting.draw(label, {"seed": seed, "progress": progress, **mcmc})
        fits = {label: fitting.fits[label] for label in asked if label in fitting.fits}
        ratios, warnings = fitting.ratios, [*remarks, *fitting.warnings]
        num_rows = _num_rows(model, fits, args, kwargs)
        table = _table(fits, ratios, args, kwargs, num_rows)
        reference = next((fit for fit in fits.values() if isinstance(fit, MCMCFit) and fit.converged), None)
        moments = None
        if reference is not None:
            guides = {label: _guide_of(fits[label]) for label in ratios}
            moments, left_out = against_mcmc(
                guides, reference.samples, args, kwargs, num_draws=num_draws, seed=seed, progress=progress
            )
            unknown = [name for name in left_out if name not in values]
            warnings += [f"'{name}' has no moments: MCMC has no draws of it" for name in unknown]
    warm = any(what == "mean_field_warm" for what in asked.values())
    warnings += [*_doubts(fits), *_below(fits, ratios, warm, tolerance=max(0.1, 1e-3 * num_rows))]
    return Comparison(table, moments, fits, tuple(warnings))


def by_label(methods: Any) -> dict[str, Any]:
    """Returns methods by the names that they are to have; one of the known ones has its own.

    Raises:
        ValueError: There are none.
    """
    names = (methods,) if isinstance(methods, str) else methods
    if isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names):
        names = {name: name for name in names}
    if not (isinstance(names, Mapping) and names):
        raise ValueError(
            f"compare_inference: methods is {methods if names == {} else type(methods).__name__}. Expected names among "
            f"{list(KNOWN)}, or a dict from labels to these, to guides or to fits: methods={{'mine': guide}}."
        )
    return dict(names)


def _held_globals(
    model: Model,
    asked: Mapping[str, Any],
    args: Args,
    kwargs: Kwargs,
    given: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the values at which globals are held for all methods, and what there is to say of it."""
    if given is not None:
        plan = plan_amortization(model, *args, **kwargs) if given else None
        blocks = plan.blocks if plan is not None else ()
        known = [site for block in blocks if not block.amortized for site in block.sites]
        return check_given("compare_inference", given, dict.fromkeys(known)), []
    for label, what in asked.items():
        guide = _guide_of(what)
        if not isinstance(guide, AutoAmortized) or not _answers_new_rows(guide) or guide.is_fresh:
            continue
        if is_of(what, args, kwargs) if isinstance(what, SVIFit) else has_seen(guide, args, kwargs):
            continue
        values = held_globals(guide, args, kwargs, plan_beside(model, guide, args, kwargs), None, "compare_inference")
        if values:
            names = ", ".join(f"'{name}'" for name in values)
            return values, [
                f"{label} was trained on other data, so {names} are held at its medians for all methods, and nothing "
                f"of them is charged to these data: given={{}} lets every method learn them from these alone"
            ]
    return {}, []


def _check_methods(asked: Mapping[str, Any]) -> None:
    for label, what in asked.items():
        if isinstance(what, str) and what not in KNOWN:
            raise ValueError(f"compare_inference: method '{what}' is not known. Known: {list(KNOWN)}.")
        if not isinstance(what, (str, SVIFit, MCMCFit)) and not callable(what):
            raise ValueError(
                f"compare_inference: methods['{label}'] is a {type(what).__name__}. Expected one of {list(KNOWN)}, a "
                f"guide or a fit."
            )
    may_be_amortized = False
    for label, what in asked.items():
        if what == "mean_field_warm" and not may_be_amortized:
            raise _nothing_to_start_from(label)
        may_be_amortized |= what == "amortized" or not isinstance(what, (str, MCMCFit))


def _nothing_to_start_from(label: str) -> ValueError:
    return ValueError(
        f"compare_inference: method '{label}' starts from an amortized guide's answer, and no method before it is one. "
        f"Put it after: methods=('amortized', 'mean_field', 'mean_field_warm')."
    )


@dataclass
class _Fitting:
    """Fits method after method. The first fit trains the model's parameters, others hold them."""

    model: Model
    args: Args
    kwargs: Kwargs
    options: Options
    held: Preserved
    num_draws: int
    seed: int
    given: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.fits: dict[str, Any] = {}
        self.ratios: dict[str, Tensor] = {}
        self.warnings: list[str] = []
        self.log_prior = log_density_of(self.model, self.args, self.kwargs, self.given)

    def fit(self, label: str, what: Any) -> None:
        """Fits a guide that is not fitted yet, and draws what its ELBO is the mean of."""
        fit = what
        if isinstance(what, str) or (isinstance(what, AutoAmortized) and what.plan is None):
            try:
                guide = self._guide(label, what)
            except (ValueError, NotImplementedError) as reason:
                if what != "mean_field_warm":
                    raise
                self.warnings.append(f"{label} is left out: {reason}")
                return
            first = not self.fits
            fit = train(
                self.model, guide, self.args, self.kwargs, self.options, label, held=self.held, train_model=first
            )
        self.fits[label] = fit
        if isinstance(fit, PYROS_OWN) and not any(True for _ in fit.parameters()):
            self.warnings.append(
                f"{label} was never called, so it is judged by the parameters that it starts from: train it before, "
                f"methods={{'{label}': fit_svi(model, guide, ...)}}"
            )
        if not isinstance(fit, MCMCFit):
            guide = _guide_of(fit)
            densities = log_densities(
                self.model,
                poutine.condition(guide, data=self.given) if self.given else guide,
                self.args,
                self.kwargs,
                num_draws=self.num_draws,
                seed=self.seed,
                title=f"ELBO of {label}" if self.options.progress else None,
            )
            self.ratios[label] = densities.log_ratio - self.log_prior

    def _guide(self, label: str, what: Any) -> AutoAmortized:
        if what == "amortized":
            return guide_apart(self.model)
        if what == "mean_field":
            return guide_apart(self.model, encoder=Table())
        if what == "mean_field_warm":
            amortized = [name for name in self.ratios if _answers_new_rows(self.fits[name])]
            if not amortized:
                raise _nothing_to_start_from(label)
            best = max(amortized, key=lambda name: float(self.ratios[name].mean()))
            start = _guide_of(self.fits[best])
            return mean_field_guide(self.model, self.args, self.kwargs, start, self.options.seed)
        return what

    def draw(self, label: str, options: Mapping[str, Any]) -> None:
        """Runs MCMC, or says why it cannot run."""
        try:
            self.fits[label] = run_mcmc(self.model, *self.args, model_kwargs=self.kwargs, **options)
        except (ValueError, NotImplementedError) as reason:
            self.warnings.append(f"{label} is left out: {reason}")


def _guide_of(fit: Any) -> Any:
    return fit.guide if isinstance(fit, SVIFit) else fit


def _num_rows(model: Model, fits: Mapping[str, Any], args: Args, kwargs: Kwargs) -> int:
    """Returns the size of the plate that is amortized; of the largest, if none is."""
    guides = [_guide_of(fit) for fit in fits.values() if not isinstance(fit, MCMCFit)]
    guides.sort(key=_answers_new_rows, reverse=True)
    plan = plan_beside(model, guides[0], args, kwargs) if guides else plan_amortization(model, *args, **kwargs)
    local = [plan.plates[block.plates[0]] for block in plan.blocks if block.amortized and block.plates]
    return max(local or plan.plates.values(), default=1)


def _table(
    fits: Mapping[str, Any],
    ratios: Mapping[str, Tensor],
    args: Args,
    kwargs: Kwargs,
    num_rows: int,
) -> pd.DataFrame:
    means = {label: float(ratio.mean()) for label, ratio in ratios.items()}
    best = max(means, key=means.__getitem__) if means else None
    rows = {}
    for label, fit in fits.items():
        row: dict[str, Any] = {**dict.fromkeys(COLUMNS, math.nan), "gap_to": None}
        if label in ratios:
            row["elbo"], row["elbo_se"] = means[label], float(standard_error(ratios[label]))
            behind = ratios[best] - ratios[label]  # type: ignore[index]
            row["gap"], row["gap_se"] = float(behind.mean()), float(standard_error(behind))
            row["gap_to"] = best
            with preserved(_guide_of(fit)):
                parameters = guide_parameters(_guide_of(fit), args, kwargs)
            row["num_parameters"] = sum(parameter.numel() for parameter in parameters.values())
        row["seconds"] = getattr(fit, "seconds", math.nan)
        answers = _answers_new_rows(fit)
        row["seconds_per_new_row"] = (_seconds(_guide_of(fit), args, kwargs) if answers else row["seconds"]) / num_rows
        rows[label] = row
    _break_even(rows, fits)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)).rename_axis("method")
    return table.astype({"num_parameters": "Int64", "break_even_rows": "Int64"})


def _answers_new_rows(fit: Any) -> bool:
    """Whether a fit's guide answers for rows it never saw; a guide written by hand is taken to, none of Pyro's own."""
    guide = _guide_of(fit)
    if isinstance(guide, AutoAmortized):
        return guide.plan is not None and any(block.amortized for block in guide.plan.blocks)
    return not isinstance(fit, MCMCFit) and not isinstance(guide, PYROS_OWN)


def _seconds(guide: Any, args: Args, kwargs: Kwargs) -> float:
    """Returns how long the guide's answer for the data takes, median of five."""
    answer = guide.posterior if isinstance(guide, AutoAmortized) else guide
    times = []
    with preserved(guide, evaluating=True), torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            answer(*args, **kwargs)
            times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]


def _break_even(rows: dict[str, dict[str, Any]], fits: Mapping[str, Any]) -> None:
    """Fills in from how many rows on the fastest amortized fit costs less than fitting again by another method."""
    amortized = [label for label, fit in fits.items() if _answers_new_rows(fit)]
    trained = [n for n in amortized if _breadth(fits[n]) != 0 and not math.isnan(rows[n]["seconds"])]
    if not trained:
        return
    fastest = rows[min(trained, key=lambda label: rows[label]["seconds"])]
    for label, row in rows.items():
        saved = row["seconds_per_new_row"] - fastest["seconds_per_new_row"]
        if label not in amortized and saved > 0:
            row["break_even_rows"] = math.ceil(fastest["seconds"] / saved)


def _doubts(fits: Mapping[str, Any]) -> list[str]:
    found = []
    for label, fit in fits.items():
        if isinstance(fit, SVIFit) and not fit.converged:
            found.append(f"{label}: {fit.state}, svi={{'num_steps': {2 * fit.num_steps}}}")
        if isinstance(fit, MCMCFit):
            if not fit.converged:
                found.append(
                    f"{label} did not converge, so there are no moments against it: raise mcmc={{'num_samples': ..., "
                    f"'warmup_steps': ..., 'num_chains': ...}}"
                )
            found += [f"{label}: {text}" for text in fit.warnings]
    return found


def _breadth(fit: Any) -> int | None:
    """Returns 0 for a generated guide with one row for all, 1 with an encoder, 2 with tables: each holds those before.

    None for other guides.
    """
    guide = _guide_of(fit)
    if not isinstance(guide, AutoAmortized) or guide.plan is None:
        return None
    amortized = [guide.coder_of(block) for block in guide.plan.blocks if block.amortized]
    if not amortized:
        return 2
    return 0 if all(isinstance(coder, Rows) for coder in amortized) else 1


def _below(fits: Mapping[str, Any], ratios: Mapping[str, Tensor], warm: bool, tolerance: float) -> list[str]:
    """Warns of fits that ended below one that their own family holds, or, if written by hand, may hold."""
    found = []
    breadths = {label: _breadth(fits[label]) for label in ratios}
    for label, breadth in breadths.items():
        if breadth is None:
            continue
        held = [name for name, other in breadths.items() if breadth == 2 or (other is not None and other < breadth)]
        best = max(held, key=lambda name: float(ratios[name].mean()), default=label)
        behind = ratios[best] - ratios[label]
        gap, se = float(behind.mean()), float(standard_error(behind))
        if gap <= max(2 * se, tolerance):
            continue
        why, fix = "though its family holds that one's", f"raise {STEPS}"
        if breadths[best] is None:
            why = "which its family holds if that one's sites are independent normals"
        elif breadths[best] == breadth:
            why, fix = "of the same family", f"take that one for the family's optimum, or raise {STEPS}"
        if breadth == 2 and breadths[best] != 2 and not warm:
            fix = f"add the method 'mean_field_warm', which starts from the best amortized answer, or {fix}"
        found.append(
            f"{label} ended {digits.with_error(gap, se)} nats below {best}, {why}: it did not reach its best optimum; "
            f"{fix}"
        )
    return found
