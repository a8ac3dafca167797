"""What amortizing cost a guide, in nats per datum, and whether the encoder or the family lost it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from pyro_amortize import digits, doubts, plots
from pyro_amortize.advice import advise, generalization
from pyro_amortize.arguments import check_count, check_model, check_pair, named
from pyro_amortize.arviz_bridge import good_k
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.conditioning import Conditioning, conditioning_gap
from pyro_amortize.densities import enumerated_sites, log_densities, scale_of
from pyro_amortize.distance import FAR, distances
from pyro_amortize.doubts import SLACK
from pyro_amortize.encoders import widest
from pyro_amortize.estimates import Part, averaged, frame, gaps, totals
from pyro_amortize.evidence import Evidence, Posterior, annealed_evidence, estimate_evidence, improved_evidence
from pyro_amortize.fit import SVIFit, seeded
from pyro_amortize.local_joint import LocalJoint
from pyro_amortize.optimum import TOLERANCE, Optimum, as_guide, data_plate, local_joint, record, search
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.planner import plan_beside
from pyro_amortize.proposals import Modes, find_modes
from pyro_amortize.reference import drawn_globals, held_globals, local_sites, site_answers
from pyro_amortize.sensitivity import biased, scaled_globals, sensitivity
from pyro_amortize.steps import Options

BLOCK_DRAWS = 50
OF_EVIDENCE = ("log_evidence", "approximation_gap", "inference_gap")


@dataclass(frozen=True)
class GapReport:
    """What amortizing cost for given data. ``print`` shows it with its doubts and with advice.

    inference gap = log p(x_n) - ELBO_n = approximation gap (log p(x_n) - ELBO_n of the best q of the family) +
    amortization gap (ELBO_n of the best q - ELBO_n of the encoder's q), all in nats and given the globals.

    Standard errors are those of the draws, and of how far the search for q* stopped from the optimum, as its last
    gradients show it.

    Attributes:
        per_datum: A row a datum: ``elbo``, ``elbo_optimum``, ``log_evidence``, ``amortization_gap``,
            ``approximation_gap``, ``inference_gap``, each with its standard error in a column ``*_se``; where an
            encoder lacks part of the data that its latents depend on, ``conditioning_gap``, what an encoder of the
            same kind gains by seeing them; ``khat`` of the importance weights behind the evidence, and its
            ``estimator``: "PSIS", "mixture", "AIS", or "PSIS+AIS" where it was corrected by what annealing added to a
            sample of other data; ``converged``, False where the encoder beats q* by more than two standard errors or
            q* is short of its optimum. Where the globals are several draws, numbers are means over these, and columns
            ``*_spread`` standard deviations. None where rows do not factorize given the globals.
        totals: The same quantities over these data together, columns ``total`` and ``total_se``, and ``total_spread``.
        blocks: For each block what its encoder alone costs: ``amortization_gap`` and its standard error, in total.
        advice: What to do about the gaps that matter, with the numbers that say so; empty where all is well.
        warnings: Reasons to doubt the report.
        given: Values at which the globals were held, stacked if several.
        optimum: The fit of q*, for the first of them; None where the guide's family is not known.
        num_draws: Draws behind each number.
        sensitivity: How the inference gap changes with each global, in nats per posterior standard deviation of the
            guide: ``slope`` and its standard error, of the element where it is largest. None where that is not known,
            or the globals were given.
        unseen: The report on the unseen data, if there are some.
        generalization: Then a row a gap: its mean per datum on the data and on the unseen, columns ``seen`` and
            ``unseen``, and the ``difference`` with its standard error, that of the choice of data included.
    """

    per_datum: pd.DataFrame | None
    totals: pd.DataFrame
    blocks: pd.DataFrame
    advice: tuple[str, ...]
    warnings: tuple[str, ...]
    given: dict[str, Tensor]
    optimum: SVIFit | None
    num_draws: int
    sensitivity: pd.DataFrame | None = None
    unseen: GapReport | None = None
    generalization: pd.DataFrame | None = None

    def summary(self) -> pd.DataFrame:
        """Returns a row a quantity: mean over data with its standard error, largest datum, and total."""
        table = self.totals.copy()
        if self.per_datum is not None:
            count = len(self.per_datum)
            table.insert(0, "mean", table["total"] / count)
            table.insert(1, "mean_se", table["total_se"] / count)
            table.insert(2, "max", [self.per_datum[name].max() for name in table.index])
        return table

    def plot(self) -> Any:
        """Draws the gaps over data, the data with the largest gaps, and k-hat; returns a matplotlib Figure.

        Raises:
            RuntimeError: There are no numbers per datum.
        """
        if self.per_datum is None:
            raise RuntimeError(f"GapReport.plot: there are no numbers per datum: {self.warnings[0]}.")
        return plots.gaps(
            self.per_datum, good_k(self.num_draws), None if self.unseen is None else self.unseen.per_datum
        )

    def __str__(self) -> str:
        rows = "" if self.per_datum is None else f" of {len(self.per_datum)} data"
        held = ", ".join(self.given)
        head = f"GapReport{rows}, in nats, {self.num_draws} draws" + (f", given {held}" if held else "")
        lines = [head, digits.table(self.summary())]
        if self.per_datum is not None:
            own, k = self.per_datum["khat"], self.per_datum["khat_evidence"]
            by = self.per_datum["estimator"].value_counts()
            estimators = ", ".join(f"{name} for {count}" for name, count in by.items())
            lines.append(
                f"k-hat of the guide: median {own.median():.2f}, max {own.max():.2f}; of the evidence: median "
                f"{k.median():.2f}, max {k.max():.2f}; evidence by {estimators}"
            )
        if len(self.blocks) > 1:
            lines += ["encoder by encoder:", digits.table(self.blocks)]
        if self.sensitivity is not None and len(self.sensitivity):
            lines += ["the gap's change per posterior sd of a global:", digits.table(self.sensitivity)]
        if self.generalization is not None:
            lines += ["seen and unseen data:", digits.table(self.generalization)]
        lines += [f"advice: {text}" for text in self.advice]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


@named
def amortization_gap(
    model: Model,
    guide: Model,
    *args: Any,
    given: Mapping[str, Tensor] | int | None = None,
    unseen: Any = None,
    num_draws: int = 1000,
    num_annealed: int = 20,
    num_steps: int = 300,
    lr: float = 0.1,
    num_particles: int | None = None,
    num_training_steps: int = 1000,
    seed: int = 0,
    progress: bool = True,
    model_kwargs: Kwargs | None = None,
) -> GapReport:
    """Measures per datum what a guide loses, and whether to the encoder or to the family.

    For every datum the guide's ELBO is set against that of q*, the best member of its family (a table, see
    :func:`~pyro_amortize.optimum.fit_optimum`), and against log p(x_n | globals): by importance sampling from q*,
    Pareto smoothed; where k-hat is high, or q* misses a mode, from a mixture with normals of the posterior's own
    curvature at its modes, which ascents from draws of the prior look for; and where that is too little, by annealed
    importance sampling.
    The same random numbers serve the guide and q*, so differences have small errors. Model and guide are left as found.

    Main arguments:
        model: A Pyro model.
        guide: Its trained guide, generated or written by hand. Of the latter the split needs normal sites on the
            reals or log-normal ones on the positives; ELBO, evidence, k-hat and inference gap are there always.
        args: The model's positional arguments: the data to judge on, seen in training or not.
        given: Values at which the globals are held, by default their medians under the guide; or a number of draws
            from the guide's posterior of them, over which all is then averaged.
        unseen: Data that the guide was not trained on, to judge beside the first: the model's positional arguments (a
            tuple, or the only one), or a dict of those keyword arguments that differ.
        model_kwargs: The model's keyword arguments.

    Other Arguments:
        num_draws: Draws behind each number.
        num_annealed: Of how many data at most the evidence is annealed: a random sample, if k-hat is too high on more;
            the others are then corrected by the mean of what annealing adds.
        num_steps: Steps of the search for q* at most.
        lr: Its learning rate at the start, in standard deviations of q.
        num_particles: Its draws a step, by default 6 to 64.
        num_training_steps: Steps of each of the two encoders that are trained where the guide's own lacks data; 0
            leaves the conditioning gap out.
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
        https://arxiv.org/abs/1801.03558; C. Margossian and D. Blei, UAI 2024, https://arxiv.org/abs/2307.11018;
        M. Zhang, P. Hayes, D. Barber, Generalization Gap in Amortized Inference, NeurIPS 2022,
        https://arxiv.org/abs/2205.11640; J. Bayer et al., Mind the Gap when Conditioning Amortised Inference in
        Sequential Latent-Variable Models, ICLR 2021, https://arxiv.org/abs/2101.07046
    """
    _check(num_draws, num_annealed, num_training_steps, given)
    guide, kwargs = check_pair("amortization_gap", model, guide, args, model_kwargs, trained=True)
    options = Options(num_steps=num_steps, lr=lr, seed=seed, progress=progress)
    sizes = _Sizes(num_draws, num_annealed, num_particles, num_training_steps)
    measure = _Measure(model, guide, args, kwargs, options, sizes)
    values = measure.globals(given)
    lacking = measure.lacking(values[0])
    if unseen is None:
        return measure.report(values, lacking)
    if isinstance(unseen, list):
        raise ValueError(
            "amortization_gap: unseen is a list. Expected the model's only positional argument, a tuple of all, "
            "unseen=(x_new, y_new), or a dict of keyword arguments."
        )
    if isinstance(unseen, Mapping):
        new_args, new_kwargs = args, {**kwargs, **unseen}
    else:
        new_args, new_kwargs = unseen if isinstance(unseen, tuple) else (unseen,), kwargs
    check_model("amortization_gap: unseen", model, new_args, new_kwargs)
    other = _Measure(model, guide, new_args, new_kwargs, options, sizes)
    return measure.report(values, lacking, other.report(values))


def _check(num_draws: int, num_annealed: int, num_training_steps: int, given: Any) -> None:
    check_count("amortization_gap", "num_draws", num_draws, 2)
    check_count("amortization_gap", "num_annealed", num_annealed, 0)
    check_count("amortization_gap", "num_training_steps", num_training_steps, 0)
    if not isinstance(given, (Mapping, type(None))) and not (type(given) is int and given >= 1):
        raise ValueError(f"amortization_gap: given={given}. Expected a positive number of draws, or a dict of values.")


@dataclass(frozen=True)
class _Sizes:
    num_draws: int
    num_annealed: int
    num_particles: int | None
    num_training_steps: int


@dataclass(frozen=True)
class _Found:
    """All that is found out with the globals held at one place.

    Attributes:
        parts: Each quantity per datum.
        evidence: Behind the log evidence.
        k_hat: Of the weights of the guide's own draws, shape (rows,).
        modes: Of each datum's posterior, where they are known.
        posterior: What weighted draws show of it.
        optimum: The fit of q*, if there is one.
        blocks: For each block what its encoder alone costs.
        sensitivity: How the gap changes with the globals.
        lead: By how much the encoder is better than one answer for all data, and q* than that.
    """

    parts: dict[str, Part]
    evidence: Evidence
    k_hat: Tensor
    modes: Modes | None
    posterior: Posterior | None
    optimum: SVIFit | None
    blocks: dict[str, Part]
    lead: tuple[Part, Part] | None
    sensitivity: pd.DataFrame | None
    doubts: tuple[str, ...]

    @property
    def correlated(self) -> float | None:
        """What of the approximation gap is due to correlations that q* has not, nats a datum, where that is known."""
        known = None if self.modes is None else self.modes.correlation[~self.modes.correlation.isnan()]
        return None if known is None or not len(known) else float(known.mean())


class _Measure:
    """One model, guide and data to judge on."""

    def __init__(
        self,
        model: Model,
        guide: Model,
        args: Args,
        kwargs: Kwargs,
        options: Options,
        sizes: _Sizes,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.options, self.sizes, self.num_draws = options, sizes, sizes.num_draws
        self.seed = options.seed or 0
        self.plan, own = plan_beside(model, guide, args, kwargs), getattr(guide, "plan", None)
        if own is not None and not any(block.amortized for block in self.plan.blocks):
            self.plan = own  # which has encoders for latents of the data set as a whole
        self.sites = local_sites(self.plan)
        self.fitted = False
        summed_out = enumerated_sites(model, guide, args, kwargs)[0]
        self.plate, self.remarks = data_plate(self.plan, summed_out.values())

    def at(self, held: dict[str, Tensor]) -> _Found:
        """Measures everything with the globals held."""
        start, remarks = time.perf_counter(), []
        model, guide = (poutine.condition(program, data=held) for program in (self.model, self.guide))
        joint, optimum, fit, best = None, None, None, None
        with preserved(model, guide, evaluating=True), poutine.block(), seeded(self.options.seed):
            encoded = self._log_ratio(model, guide, "encoder")
            try:
                joint = local_joint(model, guide, self.args, self.kwargs, self._own_plan(), self.plate)
                optimum = search(joint, self.options, self.sizes.num_particles)
                table = as_guide(joint, optimum)
                best = self._log_ratio(model, table, "q*")
                fit = record(joint, table, optimum, best.sum(-1), start)
            except NotImplementedError as reason:
                joint = optimum = None
                remarks.append(f"no split into approximation and amortization: {reason}")
            evidence = estimate_evidence(encoded if best is None else best)
            k_hat, modes, posterior = estimate_evidence(encoded).k_hat, None, None
            if joint is not None and optimum is not None and self.plate is not None:
                modes = find_modes(joint, optimum.loc, optimum.scale)
                with torch.no_grad():
                    if modes is not None:
                        evidence, posterior = improved_evidence(evidence, joint, optimum, modes, self.num_draws)
                    evidence = annealed_evidence(
                        evidence, joint, optimum, modes, self.sizes.num_annealed, self.options.progress
                    )
            parts = gaps(encoded, best, None if optimum is None else optimum.shortfall.cpu().double(), evidence)
            if any(abs(scale - 1) > 1e-6 for scale in self._scales(guide)):
                remarks.append("no evidence: poutine.scale stands around local latents, and a scaled ELBO bounds none")
                parts = {name: part for name, part in parts.items() if name not in OF_EVIDENCE}
            blocks, lead, slopes = {}, None, None
            if joint is not None and optimum is not None:
                blocks, lead = _block_by_block(joint, optimum, parts["amortization_gap"]), _lead(joint, optimum)
            if joint is not None and posterior is not None and self.fitted:
                scaled = scaled_globals(self.guide, self.args, self.kwargs, self.plan, held, self.seed)
                slopes = sensitivity(joint, self.model, held, scaled, posterior.draws) if scaled else None
        return _Found(parts, evidence, k_hat, modes, posterior, fit, blocks, lead, slopes, tuple(remarks))

    def _own_plan(self) -> AmortizationPlan:
        """Returns the guide's plan, whose blocks are its encoders; the model's, where the guide has others."""
        own = getattr(self.guide, "plan", None)
        sites = {site for block in own.blocks if block.amortized for site in block.sites} if own is not None else set()
        return own if own is not None and sites == set(self.sites) else self.plan

    def _scales(self, guide: Model) -> set[float]:
        """Returns by how much the densities of local latents are scaled, subsampling apart."""
        found: set[float] = set()
        for name, site in site_answers(guide, self.args, self.kwargs).items():
            if self.plan.turn_of(name)[0] in self.sites:
                found |= set(torch.as_tensor(scale_of(site, self.plate or "")).flatten().tolist())
        return found

    def _log_ratio(self, model: Model, guide: Model, title: str) -> Tensor:
        """Returns log p - log q of draws, shape (draws, rows); of all data together, (draws, 1)."""
        found = log_densities(
            model,
            guide,
            self.args,
            self.kwargs,
            plate=self.plate,
            num_draws=self.num_draws,
            seed=self.seed,
            title=title if self.options.progress else None,
        )
        return found.log_ratio.to("cpu", torch.float64).reshape(self.num_draws, -1)

    def globals(self, given: Mapping[str, Tensor] | int | None) -> list[dict[str, Tensor]]:
        """Returns the values of the globals at which all is measured."""
        self.fitted = not isinstance(given, Mapping)
        if isinstance(given, int):
            draws = drawn_globals(self.guide, self.args, self.kwargs, self.plan, given, self.seed)
            return draws if draws[0] else draws[:1]
        return [held_globals(self.guide, self.args, self.kwargs, self.plan, given, "amortization_gap")]

    def lacking(self, held: dict[str, Tensor]) -> Conditioning | None:
        """Measures what the guide's encoders lose since they do not see all."""
        model = poutine.condition(self.model, data=held)
        steps = self.sizes.num_training_steps
        return conditioning_gap(
            model, self.guide, self.args, self.kwargs, self.plan, self.plate, self.options, self.num_draws, steps
        )

    def report(
        self, values: list[dict[str, Tensor]], lacking: Conditioning | None = None, unseen: GapReport | None = None
    ) -> GapReport:
        """Measures at all values of the globals, and puts together what is found."""
        found = [self.at(held) for held in values]
        names = [name for name in found[0].parts if self.plate is not None or name not in OF_EVIDENCE]
        parts = {name: averaged([each.parts[name] for each in found]) for name in names}
        blocks = {name: averaged([each.blocks[name] for each in found]) for name in found[0].blocks}
        if lacking is not None:
            parts["conditioning_gap"] = lacking.part
        per_datum = None if self.plate is None else _per_datum(parts, found)
        rows = self._num_elements() if per_datum is None else len(per_datum)
        far = distances(self.guide, self.args, self.kwargs, self.plate, rows) > FAR
        warnings = [
            *self.remarks,
            *doubts.of_guide(self.guide, far),
            *found[0].doubts,
            *doubts.of_optimum(parts, self.options.num_steps),
            *(doubts.of_evidence([e.evidence for e in found], found[0].posterior) if "log_evidence" in parts else ()),
            *doubts.of_collapse(self.sites[0], found[0].lead),
            *(biased(found[0].sensitivity) if found[0].sensitivity is not None else ()),
        ]
        between = None if unseen is None else generalization(per_datum, unseen.per_datum)
        judged = getattr(self.guide, "plan", None) or self.plan
        near = {name: part.of(~far) for name, part in parts.items()} if bool(far.any()) else parts
        own = {name: part.of(~far) for name, part in blocks.items()} if bool(far.any()) else blocks
        count = max(1, rows - int(far.sum()))
        advice = advise(
            totals(near) / count,
            totals(own) / count,
            judged,
            {} if lacking is None else lacking.lacking,
            found[0].correlated,
            between,
            _widths(self.guide),
        )
        return GapReport(
            per_datum=per_datum,
            totals=_with_spread(totals(parts), found),
            blocks=totals(blocks),
            advice=tuple(advice),
            warnings=tuple(warnings),
            given=values[0] if len(values) == 1 else _stacked(values),
            optimum=found[0].optimum,
            num_draws=self.num_draws,
            sensitivity=found[0].sensitivity,
            unseen=unseen,
            generalization=between,
        )

    def _num_elements(self) -> int:
        """How many data totals are of: the elements of the outermost plate of the first block."""
        block = next(block for block in self.plan.blocks if block.amortized)
        return max(1, self.plan.plates.get(block.plates[0], 1)) if block.plates else 1


def _stacked(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([held[name] for held in values]) for name in values[0]}


def _widths(guide: Any) -> dict[str, int]:
    """Returns how wide the encoder of each block is, of a generated guide."""
    plan: AmortizationPlan | None = getattr(guide, "plan", None)
    blocks = [block for block in plan.blocks if block.amortized] if plan else []
    return {block.name: widest(getattr(guide.coder_of(block), "trunk", None)) for block in blocks}


def _with_spread(table: pd.DataFrame, found: list[_Found]) -> pd.DataFrame:
    """Adds the standard deviation of the totals over several values of the globals."""
    if len(found) > 1:
        each = pd.DataFrame([{name: part.total[0] for name, part in one.parts.items()} for one in found])
        table["total_spread"] = each.std()
    return table


def _per_datum(parts: dict[str, Part], found: list[_Found]) -> pd.DataFrame:
    """Returns the table of all data."""
    table = frame(parts)
    evidence = [each.evidence for each in found]
    table["khat"] = torch.stack([each.k_hat for each in found]).max(0).values.numpy()
    table["khat_evidence"] = torch.stack([each.k_hat for each in evidence]).max(0).values.numpy()
    table["estimator"] = evidence[0].by
    if "amortization_gap" in parts:
        gap = parts["amortization_gap"]
        table["converged"] = ((gap.value >= -2 * gap.se - SLACK) & (gap.shortfall < 10 * TOLERANCE)).numpy()
    for name in found[0].parts if len(found) > 1 else ():
        table[f"{name}_spread"] = torch.stack([each.parts[name].value for each in found]).std(0).numpy()
    return table


def _block_by_block(joint: LocalJoint, optimum: Optimum, whole: Part) -> dict[str, Part]:
    """Measures what each block's encoder costs alone, all others being at their optimum."""
    places = joint.blocks.unique().tolist()
    if len(places) == 1:
        return {joint.plan.blocks[places[0]].name: whole}
    best = Part.mean_of(_log_ratio(joint, optimum.loc, optimum.scale))
    costs = {}
    for place in places:
        here = joint.blocks == place
        loc, scale = torch.where(here, joint.loc, optimum.loc), torch.where(here, joint.scale, optimum.scale)
        costs[joint.plan.blocks[place].name] = best - Part.mean_of(_log_ratio(joint, loc, scale))
    return costs


def _lead(joint: LocalJoint, optimum: Optimum) -> tuple[Part, Part] | None:
    """Measures by how much the encoder is better than one answer for all data, and q* than that."""
    if joint.num_rows == 1:
        return None
    scale = optimum.scale.square().reciprocal().mean(0).rsqrt().expand_as(optimum.scale)
    constant = Part.mean_of(_log_ratio(joint, optimum.loc.mean(0).expand_as(scale), scale))
    encoded, best = (Part.mean_of(_log_ratio(joint, q.loc, q.scale)) for q in (joint, optimum))
    return encoded - constant, best - constant


def _log_ratio(joint: LocalJoint, loc: Tensor, scale: Tensor) -> Tensor:
    """Returns log p - log q of draws that are the same in every call, shape (draws, rows)."""
    at_once = max(1, min(BLOCK_DRAWS, 2**24 // loc.numel()))
    pieces = []
    with seeded(0), torch.no_grad():
        for start in range(0, BLOCK_DRAWS, at_once):
            noise = torch.randn(min(at_once, BLOCK_DRAWS - start), *loc.shape).to(loc)
            values = loc + scale * noise
            pieces.append((joint.log_p(values) - joint.log_q(values, loc, scale)).cpu().double())
    return torch.cat(pieces)
