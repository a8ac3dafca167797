"""q*: for each datum the best member of a guide's family, given the globals."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_amortize.arguments import check_pair, named
from pyro_amortize.bars import progress_bar
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.densities import enumerated_sites, log_densities
from pyro_amortize.encoders import Table
from pyro_amortize.enumeration import CHUNK
from pyro_amortize.fit import NUM_DRAWS, SVIFit, seeded
from pyro_amortize.guides import AutoAmortized, guide_apart
from pyro_amortize.local_joint import LocalJoint
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.planner import plan_beside
from pyro_amortize.posterior import reach_alike
from pyro_amortize.reference import answers_beside, held_globals, local_sites, site_answers, write_rows
from pyro_amortize.steps import Options, guide_parameters
from pyro_amortize.subsamples import Subsample, covering

TOLERANCE = 0.01
"""Nats a datum: what is gained between two looks below which the search of a datum stops."""
LOOKS = 10
FIXED_DRAWS = 16


@dataclass(frozen=True)
class Optimum:
    """Normals in unconstrained space, one a datum.

    Attributes:
        loc: Means, shape (rows, dim).
        scale: Standard deviations, of the same shape.
        shortfall: Nats by which the ELBO of each datum is below its optimum, as its last gradients show: half their
            square in units of q's own curvature, less what their noise adds. Shape (rows,).
        losses: Minus the ELBO of all data together, as each step saw it.
    """

    loc: Tensor
    scale: Tensor
    shortfall: Tensor
    losses: Tensor


@named
def fit_optimum(
    model: Model,
    guide: Model,
    *args: Any,
    given: Mapping[str, Tensor] | None = None,
    num_steps: int = 300,
    lr: float = 0.1,
    num_particles: int | None = None,
    seed: int | None = 0,
    progress: bool = True,
    model_kwargs: Kwargs | None = None,
) -> SVIFit:
    """Finds q*: for each datum the best member of the guide's family, with the global latents held.

    A table takes the encoder's place. All data are searched side by side, from the encoder's answer and afresh from
    the prior's moments. Each stops when it gains no more, on random numbers that stay the same, and goes on from the
    better of its two ends, at a learning rate that decays to zero. Gradients leave out the score of q, which is zero
    on average. The model's parameters are held.

    Args:
        model: A Pyro model.
        guide: Its guide; if written by hand, its local sites must be normal or log-normal.
        args: The model's positional arguments.
        given: Values of the global latents; by default their medians under the guide.
        num_steps: Steps of each search at most; half as many follow at the decaying rate.
        lr: Learning rate at the start, in standard deviations of q.
        num_particles: Draws a step at the decaying rate, in pairs of opposite sign; before that one pair. None takes 6
            to 64, as many as run side by side in little memory.
        seed: Of this fit.
        progress: Whether to show a progress bar.
        model_kwargs: The model's keyword arguments.

    Returns:
        The record of the fit. Its guide is for the model with globals held.

    Raises:
        ValueError: No latent of the model is local.
        NotImplementedError: A local site of the guide is neither normal nor log-normal.

    References:
        G. Roeder et al., Sticking the Landing, NeurIPS 2017, https://arxiv.org/abs/1703.09194
    """
    start = time.perf_counter()
    guide, kwargs = check_pair("fit_optimum", model, guide, args, model_kwargs)
    plan = plan_beside(model, guide, args, kwargs)
    local_sites(plan)
    held = held_globals(guide, args, kwargs, plan, given, "fit_optimum")
    plate, _ = data_plate(plan, enumerated_sites(model, guide, args, kwargs)[0].values())
    conditioned, fixed = (poutine.condition(program, data=held) for program in (model, guide))
    options = Options(num_steps=num_steps, lr=lr, seed=seed, progress=progress)
    with preserved(model, guide, evaluating=True), poutine.block(), seeded(seed):
        joint = local_joint(conditioned, fixed, args, kwargs, plan, plate)
        optimum = search(joint, options, num_particles)
        table = as_guide(joint, optimum)
        ratio = log_densities(conditioned, table, args, kwargs, num_draws=NUM_DRAWS, seed=seed or 0).log_ratio
        return record(joint, table, optimum, ratio, start)


def data_plate(plan: AmortizationPlan, around: Collection[tuple[str, ...]]) -> tuple[str | None, list[str]]:
    """Returns the plate whose elements are the data, None if they cannot be told apart, and what there is to say.

    Args:
        plan: The plan.
        around: The plates of each latent that is summed out.
    """
    amortized = [block for block in plan.blocks if block.amortized and block.plates]
    outer = min((block.plates for block in amortized), key=len, default=())
    if not outer:
        return None, [
            "no numbers per datum: latents of the data set as a whole are amortized, so one data set is one datum. To "
            "judge an encoder of data sets by many of them, put a plate around the model: "
            "with pyro.plate('sets', len(x), dim=-2): ..."
        ]
    plate = next((name for name in outer if all(name in plates for plates in around)), outer[0])
    link = next((level.link for block in amortized for level in block.levels if level.link), None)
    if plate in plan.loops:
        return None, [f"no numbers per datum: data are turns of loop '{plate}', not elements of a vectorized plate"]
    if link is not None:
        return None, [f"no numbers per datum: which rows belong to an element of '{link.to}' is said by an index"]
    if plan.same:
        other, mine = next(iter(plan.same.items()))
        return None, [f"no numbers per datum: data of plate '{mine}' stand in '{other}', not in the plate itself"]
    if not plan.verdict.factorizes:
        return None, [f"no numbers per datum: {plan.verdict.reason}"]
    others = sorted({"/".join(block.plates) for block in amortized if plate not in block.plates})
    return plate, [f"only the data of plate '{plate}' are judged; those of {others} are not"] if others else []


def local_joint(
    model: Model,
    guide: Model,
    args: Args,
    kwargs: Kwargs,
    plan: AmortizationPlan,
    plate: str | None,
) -> LocalJoint:
    """Returns the local latents of each datum as normals in unconstrained space.

    Raises:
        NotImplementedError: They are none.
    """
    discrete = [block.sites[0] for block in plan.blocks if block.is_discrete]
    try:
        if discrete:
            raise NotImplementedError(f"site '{discrete[0]}' of the guide is discrete")
        return LocalJoint(model, guide, args, kwargs, plan, plate)
    except NotImplementedError as reason:
        raise NotImplementedError(
            f"fit_optimum: {reason}; the optimum can be searched among normals on the site's own support only: Normal "
            f"on the reals, LogNormal on the positives. ELBO, evidence and k-hat need no optimum: "
            f"amortization_gap(model, guide, ...)."
        ) from None


def search(joint: LocalJoint, options: Options, num_particles: int | None = None) -> Optimum:
    """Searches the best normals of all data, some thousands of them at a time."""
    num_particles = num_particles or min(64, max(6, CHUNK // joint.evaluation.size))
    options = replace(options, num_particles=num_particles)
    at_once = max(1, 2**25 // (FIXED_DRAWS * joint.loc.shape[1]))
    parts = torch.arange(joint.num_rows, device=joint.loc.device).split(at_once)
    starts = [(joint.loc, joint.scale), joint.prior_moments()]
    total = len(parts) * (len(starts) * options.num_steps + _half(options.num_steps))
    with progress_bar(total=total, desc="optimum", shown=options.progress) as bar:
        found = [
            _search(joint, rows, [(loc[rows], scale[rows]) for loc, scale in starts], options, bar) for rows in parts
        ]
    loc, scale, shortfall = (
        torch.cat([getattr(part, what) for part in found]) for what in ("loc", "scale", "shortfall")
    )
    return Optimum(loc, scale, shortfall, torch.stack([part.losses for part in found]).sum(0))


def _few(options: Options) -> int:
    return min(2, options.num_particles)


def _half(num_steps: int) -> int:
    return max(1, num_steps // 2)


def _search(
    joint: LocalJoint, rows: Tensor, starts: list[tuple[Tensor, Tensor]], options: Options, bar: Any
) -> Optimum:
    """Explores from all starts, and settles from the better end of each datum."""
    noise = _opposite_pairs(FIXED_DRAWS, joint.loc[rows])
    ends = []
    for loc, scale in starts:
        ends.append(_explore(_Walk(joint, rows, loc, scale, options), noise, options.num_steps, bar))
    best = torch.stack([elbo.nan_to_num(-math.inf, neginf=-math.inf) for _, _, elbo in ends]).argmax(0)
    loc, scale = (
        torch.stack([end[i] for end in ends])[best, torch.arange(len(best), device=best.device)] for i in (0, 1)
    )
    return _settle(_Walk(joint, rows, loc, scale, options), _half(options.num_steps), bar)


class _Walk:
    """Normals on their way: Adam on means and log standard deviations, in units of the standard deviations at first."""

    def __init__(self, joint: LocalJoint, rows: Tensor, loc: Tensor, scale: Tensor, options: Options) -> None:
        self.joint, self.rows, self.loc, self.scale, self.options = joint, rows, loc, scale, options
        self.shift, self.stretch = (torch.zeros_like(loc, requires_grad=True) for _ in range(2))
        self.adam = torch.optim.Adam([self.shift, self.stretch], lr=options.lr)

    def step(self, places: Tensor, num_draws: int) -> Tensor:
        """Takes a step for some of the data; returns their ELBO, shape (rows,), as its draws show it."""
        noise = _opposite_pairs(num_draws, self.loc[places])
        elbo = self.log_ratio(*self.at(self.shift[places], self.stretch[places], places), noise, places).mean(0)
        way = [self.shift, self.stretch]
        for parameter, gradient in zip(way, torch.autograd.grad(-elbo.sum(), way), strict=True):  # of nothing else
            parameter.grad = gradient.where(gradient.isfinite(), 0.0)  # where log p overflows, the row waits
        self.adam.step()
        return elbo.detach()

    def at(self, shift: Tensor, stretch: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Returns means and standard deviations where the walk has come so far."""
        return self.loc[places] + self.scale[places] * shift, self.scale[places] * stretch.exp()

    def log_ratio(self, loc: Tensor, scale: Tensor, noise: Tensor, places: Tensor) -> Tensor:
        """Returns log p - log q of draws, shape (draws, rows), without the score of q in its gradient."""
        rows, values = self.rows[places], loc + scale * noise
        return self.joint.log_p(values, rows) - self.joint.log_q(values, loc.detach(), scale.detach(), rows)

    def natural_gradient(self) -> Tensor:
        """Returns the gradient of the last step in units of q's own curvature, shape (rows, 2 dim)."""
        return torch.cat([self.shift.grad * self.stretch.exp(), self.stretch.grad / 2**0.5], -1).detach()  # type: ignore[operator,list-item]


def _explore(walk: _Walk, noise: Tensor, num_steps: int, bar: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Walks at a constant rate, and stops for each datum when the mean of the last steps gains no more.

    Returns:
        The best means and standard deviations, shape (rows, dim), and their ELBO by fixed draws, shape (rows,).
    """
    active, every = torch.arange(len(walk.rows), device=walk.loc.device), max(10, num_steps // LOOKS)
    loc, scale = walk.loc.clone(), walk.scale.clone()
    with torch.no_grad():
        best = walk.log_ratio(loc, scale, noise, active)
    passed = [torch.zeros_like(loc), torch.zeros_like(loc)]
    for step in range(1, num_steps + 1):
        walk.step(active, _few(walk.options))
        bar.update()
        for mean, value in zip(passed, (walk.shift, walk.stretch), strict=True):
            mean += value.detach() / every
        if step % every == 0:
            with torch.no_grad():
                here = walk.at(passed[0][active], passed[1][active], active)
                ratio = walk.log_ratio(*here, noise[:, active], active)
            gain, error = (ratio - best[:, active]).mean(0), (ratio - best[:, active]).std(0) / FIXED_DRAWS**0.5
            escaped = ratio.mean(0).isfinite() & ~best[:, active].mean(0).isfinite()
            gain, error = gain.where(~escaped, math.inf), error.where(~escaped, 0.0)
            better = active[gain > 0]
            loc[better], scale[better] = (value[gain > 0] for value in here)
            best[:, better] = ratio[:, gain > 0]
            active = active[~(gain <= (2 * error).clamp(min=TOLERANCE))]
            passed = [torch.zeros_like(loc), torch.zeros_like(loc)]
            if not len(active):
                bar.update(num_steps - step)
                break
    return loc, scale, best.mean(0)


def _settle(walk: _Walk, num_steps: int, bar: Any) -> Optimum:
    """Walks at a rate that decays to zero; returns the mean of the last third of the way.

    How far the optimum still is, the gradients of these steps tell.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(walk.adam, num_steps)
    everything = torch.arange(len(walk.rows), device=walk.loc.device)
    count = max(1, num_steps // 3)
    losses, shift, stretch = [], torch.zeros_like(walk.loc), torch.zeros_like(walk.loc)
    mean = square = torch.zeros(())
    for step in range(num_steps):
        losses.append(-walk.step(everything, walk.options.num_particles).sum())
        schedule.step()
        bar.update()
        if step >= num_steps - count:
            shift += walk.shift.detach() / count
            stretch += walk.stretch.detach() / count
            gradient = walk.natural_gradient()
            mean, square = mean + gradient / count, square + gradient.square() / count
    noise = (square - mean.square()) / max(1, count - 1)
    shortfall = (mean.square() - noise).sum(-1).clamp(min=0) / 2
    return Optimum(*walk.at(shift, stretch, everything), shortfall, torch.stack(losses))


def _opposite_pairs(count: int, like: Tensor) -> Tensor:
    """Draws standard normals in pairs of opposite sign, shape (count, *like.shape)."""
    half = torch.randn((count + 1) // 2, *like.shape, dtype=like.dtype, device=like.device)
    return torch.cat([half, -half])[:count]


def as_guide(joint: LocalJoint, optimum: Optimum) -> AutoAmortized:
    """Writes an optimum into tables: a guide for the model with globals held."""
    guide = guide_apart(joint.model, encoder=Table())
    guide.initialize(*joint.args, **joint.kwargs)
    plan: AmortizationPlan = guide.plan  # type: ignore[assignment]
    parts = [indices for indices, _ in covering(joint.frame)] if joint.subsamples else [None]  # type: ignore[arg-type]
    for indices in parts:
        with Subsample(joint.plate, indices) if indices is not None else nullcontext():  # type: ignore[arg-type]
            own = site_answers(guide, joint.args, joint.kwargs)
            theirs = answers_beside(joint.guide, own, joint.args, joint.kwargs)
        for site, loc, scale in joint.by_site(optimum.loc, optimum.scale):
            if not reach_alike(own[site.name]["fn"], theirs[site.name]["fn"]):
                raise NotImplementedError(
                    f"fit_optimum: site '{site.name}' of the guide has another support than the model's; write it on "
                    f"the model's own: Normal on the reals, LogNormal on the positives."
                )
            if indices is not None:
                loc, scale = (moment.index_select(site.axis, indices) for moment in (loc, scale))  # type: ignore[arg-type]
            name, turn = plan.turn_of(site.name)
            write_rows(guide, own[site.name], plan.block_of(name), name, turn, loc, scale, indices)
    return guide


def record(joint: LocalJoint, guide: AutoAmortized, optimum: Optimum, ratio: Tensor, start: float) -> SVIFit:
    """Makes the record of a search that began at a time, from log p - log q of draws from its guide."""
    args, kwargs = joint.args, joint.kwargs
    return SVIFit(
        guide=guide,
        losses=optimum.losses,
        elbo=float(ratio.mean()),
        elbo_se=float(ratio.std() / math.sqrt(len(ratio))),
        converged=bool(optimum.shortfall.mean() < TOLERANCE),
        remaining=float(optimum.shortfall.sum()),
        num_steps=len(optimum.losses),
        seconds=time.perf_counter() - start,
        num_parameters=sum(p.numel() for p in guide_parameters(guide, args, kwargs).values()),
        model=joint.model,
        args=args,
        kwargs=kwargs,
    )
