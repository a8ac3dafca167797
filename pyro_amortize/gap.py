"""What amortizing cost a guide, in nats per datum, and whether the encoder or the family lost it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from pyro_amortize import plots
from pyro_amortize.arviz_bridge import good_k
from pyro_amortize.calls import Model
from pyro_amortize.densities import enumerated_sites, log_densities, vectorizing
from pyro_amortize.encoders import Constant
from pyro_amortize.evidence import GOOD_ENOUGH, Evidence, estimate_evidence, robust_evidence, standard_error
from pyro_amortize.fit import Options, SVIFit, seeded, train
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.planner import plan_beside
from pyro_amortize.reference import fit_optimum, held_globals, local_sites

QUANTITIES = ("elbo", "elbo_optimum", "log_evidence", "amortization_gap", "approximation_gap", "inference_gap")


@dataclass(frozen=True)
class GapReport:
    """What amortizing cost for given data. ``print`` shows it with its doubts.

    inference gap = log p(x_n) - ELBO_n = approximation gap (log p(x_n) - ELBO_n of the best q of the family) +
    amortization gap (ELBO_n of the best q - ELBO_n of the encoder's q), all in nats and given the globals.

    Standard errors are those of the draws; how far the search for q* stopped from the optimum is not in them.

    Attributes:
        per_datum: A row a datum: ``elbo``, ``elbo_optimum``, ``log_evidence``, ``amortization_gap``,
            ``approximation_gap``, ``inference_gap``, each with its standard error in a column ``*_se``, and ``khat``
            of the importance weights behind the evidence. None where rows do not factorize given the globals.
        totals: The same quantities over these data together, columns ``total`` and ``total_se``.
        warnings: Reasons to doubt the report, and advice.
        given: Values at which the globals were held.
        optimum: The fit of q*; None where the guide's family is not known.
        num_draws: Draws behind each number.
    """

    per_datum: pd.DataFrame | None
    totals: pd.DataFrame
    warnings: tuple[str, ...]
    given: dict[str, Tensor]
    optimum: SVIFit | None
    num_draws: int

    def summary(self) -> pd.DataFrame:
        """Returns a row a quantity: mean over data with its Monte Carlo standard error, largest datum, and total."""
        table = self.totals.copy()
        if self.per_datum is not None:
            count = len(self.per_datum)
            table.insert(0, "mean", table["total"] / count)
            table.insert(1, "mean_se", table["total_se"] / count)
            table.insert(2, "max", [self.per_datum[name].max() for name in table.index])
        return table

    def plot(self) -> Any:
        """Draws the gaps over data, and k-hat; returns a matplotlib Figure.

        Raises:
            RuntimeError: There are no numbers per datum.
        """
        if self.per_datum is None:
            raise RuntimeError(f"GapReport.plot: there are no numbers per datum: {self.warnings[0]}.")
        return plots.gap_histogram(self.per_datum, good_k(self.num_draws))

    def __str__(self) -> str:
        rows = "" if self.per_datum is None else f" of {len(self.per_datum)} data"
        head = f"GapReport{rows}, in nats, {self.num_draws} draws" + (
            f", given {', '.join(self.given)}" if self.given else ""
        )
        lines = [head, self.summary().to_string(float_format=_number, na_rep="-")]
        if self.per_datum is not None:
            k = self.per_datum["khat"]
            lines.append(f"k-hat: median {k.median():.2f}, max {k.max():.2f} (good below {good_k(self.num_draws):.2f})")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 100 else f"{value:.4g}"


def amortization_gap(
    model: Model,
    guide: Model,
    *args: Any,
    given: Mapping[str, Tensor] | None = None,
    num_draws: int = 2000,
    num_steps: int = 1000,
    lr: float = 0.02,
    num_particles: int = 16,
    seed: int = 0,
    progress: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> GapReport:
    """Measures per datum what a guide loses, and whether to the encoder or to the family.

    For every datum the guide's ELBO is set against that of q*, the best member of its family (a table started from
    the encoder's answer, trained with the globals held), and against log p(x_n | globals), by importance sampling
    from q*. The same random numbers serve all, so differences have small errors. Model and guide are left as found.

    Main arguments:
        model: A Pyro model.
        guide: Its trained guide, generated or written by hand. Of the latter the split needs normal sites on the
            reals or log-normal ones on the positives; ELBO, evidence, k-hat and inference gap are there always.
        args: The model's positional arguments: the data to judge on, seen in training or not.
        given: Values at which the globals are held; by default their medians under the guide.
        model_kwargs: The model's keyword arguments.

    Other Arguments:
        num_draws: Draws behind each number.
        num_steps: Steps of the search for q*.
        lr: Its learning rate at the start.
        num_particles: Its draws a step.
        seed: Of everything.
        progress: Whether to show progress bars.

    Returns:
        The report.

    Raises:
        ValueError: No latent of the model is local, or ``given`` names something else than globals.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide, x = AutoAmortizedNormal(model), torch.randn(50)
        >>> fit = fit_svi(model, guide, x, num_steps=500, seed=0, progress=False)
        >>> report = amortization_gap(model, guide, x, progress=False)
        >>> bool(report.per_datum["inference_gap"].mean() < 0.1)
        True

    References:
        C. Cremer, X. Li, D. Duvenaud, Inference Suboptimality in Variational Autoencoders, ICML 2018,
        https://arxiv.org/abs/1801.03558; C. Margossian and D. Blei, UAI 2024, https://arxiv.org/abs/2307.11018
    """
    kwargs = model_kwargs or {}
    plan = plan_beside(model, guide, args, kwargs)
    sites = local_sites(plan)
    per, warnings = _datum(plan, enumerated_sites(model, guide, args, kwargs)[0].values())
    held = held_globals(model, guide, args, kwargs, plan, given)
    options = Options(num_steps=num_steps, lr=lr, num_particles=num_particles, seed=seed, progress=progress)
    optimum: SVIFit | None = None
    try:
        optimum = fit_optimum(
            model,
            guide,
            *args,
            given=held,
            num_steps=num_steps,
            lr=lr,
            num_particles=num_particles,
            seed=seed,
            progress=progress,
            model_kwargs=kwargs,
        )
    except NotImplementedError as reason:
        warnings.append(f"no split into approximation and amortization: {reason}")
    conditioned = poutine.condition(model, data=held)

    def log_ratio(other: Model) -> Tensor:
        fixed = poutine.condition(other, data=held)
        ratio = log_densities(conditioned, fixed, args, kwargs, plate=per, num_draws=num_draws, seed=seed).log_ratio
        return ratio.to("cpu", torch.float64).reshape(num_draws, -1)

    encoded = log_ratio(guide)
    best = log_ratio(optimum.guide) if optimum is not None else None
    evidence, robust = estimate_evidence(encoded if best is None else best), None
    if optimum is not None and per is not None and bool((evidence.k_hat > GOOD_ENOUGH).any()):
        robust = robust_evidence(conditioned, optimum.guide, args, kwargs, per, num_draws, seed)
    parts = _parts(encoded, best, evidence, robust)
    k_hat = (
        evidence.k_hat if robust is None else torch.where(evidence.k_hat > GOOD_ENOUGH, robust.k_hat, evidence.k_hat)
    )
    warnings += _doubts(parts, k_hat if per is not None else k_hat[:0], optimum, num_draws)
    warnings += _constant_doubt(conditioned, args, kwargs, options, encoded, best, log_ratio, sites)
    per_datum = _frame(parts, k_hat) if per is not None else None
    if per is None:
        parts = {name: parts[name] for name in ("elbo", "elbo_optimum", "amortization_gap") if name in parts}
    return GapReport(per_datum, _totals(parts), tuple(warnings), held, optimum, num_draws)


def _datum(plan: AmortizationPlan, around: Collection[tuple[str, ...]]) -> tuple[str | None, list[str]]:
    """Returns the plate whose elements are the data, None if they cannot be told apart, and what there is to say.

    Args:
        plan: The plan.
        around: The plates of each latent that is summed out.
    """
    amortized = [block for block in plan.blocks if block.amortized and block.plates]
    outer = min((block.plates for block in amortized), key=len)
    plate = next((name for name in outer if all(name in plates for plates in around)), outer[0])
    link = next((level.link for block in amortized for level in block.levels if level.link), None)
    if plate in plan.loops:
        return None, [f"no numbers per datum: data are turns of loop '{plate}', not elements of a vectorized plate"]
    if link is not None:
        return None, [f"no numbers per datum: which rows belong to an element of '{link.to}' is said by an index"]
    if not plan.verdict.factorizes:
        return None, [f"no numbers per datum: {plan.verdict.reason}"]
    others = sorted({"/".join(block.plates) for block in amortized if plate not in block.plates})
    return plate, [f"only the data of plate '{plate}' are judged; those of {others} are not"] if others else []


@dataclass(frozen=True)
class _Part:
    """A quantity with its error.

    Attributes:
        value: Shape (rows,).
        influences: For each independent stream of draws, what every draw adds to the error, shape (draws, rows).
    """

    value: Tensor
    influences: dict[str, Tensor]

    def __sub__(self, other: _Part) -> _Part:
        influences = dict(self.influences)
        for stream, influence in other.influences.items():
            influences[stream] = influences[stream] - influence if stream in influences else -influence
        return _Part(self.value - other.value, influences)

    @property
    def se(self) -> Tensor:
        """Standard errors, shape (rows,)."""
        return _in_quadrature([standard_error(influence) for influence in self.influences.values()])

    @property
    def total(self) -> tuple[float, float]:
        """The sum over rows, and its standard error."""
        errors = [standard_error(influence.sum(-1)) for influence in self.influences.values()]
        return float(self.value.sum()), float(_in_quadrature(errors))


def _in_quadrature(errors: list[Tensor]) -> Tensor:
    return torch.stack(errors).square().sum(0).sqrt()


def _parts(encoded: Tensor, best: Tensor | None, evidence: Evidence, robust: Evidence | None) -> dict[str, _Part]:
    """Returns every quantity with its error. Where q* is too thin a proposal, the robust evidence stands in."""
    parts = {"elbo": _Part(encoded.mean(0), {"common": encoded - encoded.mean(0)})}
    if robust is None:
        parts["log_evidence"] = _Part(evidence.value, {"common": evidence.influence})
    else:
        thin = evidence.k_hat > GOOD_ENOUGH
        influences = {
            "common": torch.where(thin, 0.0, evidence.influence),
            "robust": torch.where(thin, robust.influence, 0.0),
        }
        parts["log_evidence"] = _Part(torch.where(thin, robust.value, evidence.value), influences)
    if best is not None:
        parts["elbo_optimum"] = _Part(best.mean(0), {"common": best - best.mean(0)})
        parts["amortization_gap"] = parts["elbo_optimum"] - parts["elbo"]
        parts["approximation_gap"] = parts["log_evidence"] - parts["elbo_optimum"]
    parts["inference_gap"] = parts["log_evidence"] - parts["elbo"]
    return parts


def _frame(parts: dict[str, _Part], k_hat: Tensor) -> pd.DataFrame:
    columns = {}
    for name in QUANTITIES:
        part = parts.get(name)
        columns[name] = part.value.numpy() if part else math.nan
        columns[f"{name}_se"] = part.se.numpy() if part else math.nan
    columns["khat"] = k_hat.numpy()
    return pd.DataFrame(columns).rename_axis("datum")


def _totals(parts: dict[str, _Part]) -> pd.DataFrame:
    rows = {name: parts[name].total for name in QUANTITIES if name in parts}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["total", "total_se"])


def _doubts(parts: dict[str, _Part], k_hat: Tensor, optimum: SVIFit | None, num_draws: int) -> list[str]:
    found = []
    if optimum is not None:
        gap = parts["amortization_gap"]
        total, total_se = gap.total
        below = int((gap.value < -4 * gap.se - 1e-3).sum())
        if below or total < -2 * total_se - 1e-3 * len(gap.value):
            found.append(
                f"the optimum did not converge: the encoder beats it on {below} data, amortization gap {total:.3g} ± "
                f"{total_se:.2g} in total; raise num_steps={2 * optimum.num_steps}"
            )
    limit = good_k(num_draws)
    high = int((k_hat > limit).sum())
    if high:
        found.append(
            f"k-hat is above {limit:.2f} on {high} of {len(k_hat)} data: their evidence, approximation and inference "
            f"gaps are in doubt, likely too small"
        )
    return found


def _constant_doubt(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    encoded: Tensor,
    best: Tensor | None,
    log_ratio: Any,
    sites: tuple[str, ...],
) -> list[str]:
    """Warns if the encoder says no more than one row of parameters for all data does."""
    if best is None:
        return []
    with preserved(model) as record:
        constant = AutoAmortized(model, encoder=Constant())
        with seeded(options.seed):
            constant.initialize(*args, **kwargs)
        options = replace(options, max_plate_nesting=vectorizing(model, constant, args, kwargs))
        fit = train(model, constant, args, kwargs, options, "baseline: Constant", held=record, train_model=False)
    baseline = log_ratio(fit.guide).sum(-1)
    lead = encoded.sum(-1) - baseline
    possible = float((best.sum(-1) - baseline).mean())
    se = float(standard_error(lead))
    if float(lead.mean()) <= 2 * se and possible > 5:
        return [
            f"the encoder is no better than Constant(), one answer for all data: {float(lead.mean()):.3g} ± {se:.2g} "
            f"nats, where q* is better by {possible:.3g}; '{sites[0]}' collapsed. Train longer, or use a wider encoder"
        ]
    return []
