"""Posterior moments and quantiles of guides, set against those of MCMC, with the noise of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import ExpTransform

from pyro_amortize import arviz_bridge
from pyro_amortize.answers import Joined
from pyro_amortize.bars import progress_bar
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.fit import seeded
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.parameters import preserved
from pyro_amortize.posterior import DRAWS, is_discrete, normal_underneath
from pyro_amortize.supports import support_of

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
LOCATIONS = ("mean", *QUANTILES)


def against_mcmc(
    guides: Mapping[str, Model],
    draws: Mapping[str, Tensor],
    args: Args,
    kwargs: Kwargs,
    *,
    num_draws: int,
    seed: int,
    progress: bool,
) -> tuple[pd.DataFrame, list[str]]:
    """Compares posterior means, standard deviations and quantiles of guides with those of converged chains.

    Of generated guides they are taken in closed form for normals and log-normals, else from draws, and from draws of
    guides written by hand.

    Args:
        guides: Label -> guide.
        draws: Site -> shape (chains, draws, *shape of the site), by MCMC.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        num_draws: Draws from guides written by hand.
        seed: Of the draws from guides.
        progress: Whether to show progress bars.

    Returns:
        A frame with index ``method``, ``site`` and the columns that :func:`_compared` describes; and the latents of
        the guides of which MCMC has no draws.
    """
    bar = progress_bar(draws.items(), desc="moments of MCMC", shown=progress)
    truth = {name: _of_draws(value) for name, value in bar}
    rows, left_out = {}, {}
    for label, guide in guides.items():
        if isinstance(guide, AutoAmortized):
            found, others = _of_generated(guide, args, kwargs, seed)
        else:
            found, others = _of_written(guide, args, kwargs, num_draws, seed, f"draws of {label}", progress)
        rows.update({(label, name): _compared(found[name], truth[name]) for name in found if name in truth})
        left_out.update(dict.fromkeys([*others, *(name for name in found if name not in truth)]))
    columns = [f"{what}_{kind}" for what in LOCATIONS for kind in ("error", "error_se")]
    index = pd.MultiIndex.from_tuples(list(rows), names=["method", "site"])
    columns[2:2] = ["sd_ratio", "sd_ratio_se"]
    return pd.DataFrame(list(rows.values()), index=index, columns=columns), list(left_out)


@dataclass(frozen=True)
class _Summary:
    """Moments and quantiles of a site's elements, shape (elements,), and their standard errors.

    Draws, shape (chains, draws, elements), are kept where the numbers come from them.
    """

    values: dict[str, Tensor]
    errors: dict[str, Tensor]
    draws: Tensor | None


def _of_draws(draws: Tensor) -> _Summary:
    draws = draws.detach().cpu().double().reshape(*draws.shape[:2], -1)
    both = draws.flatten(0, 1)
    values = {"mean": both.mean(0), "sd": both.std(0)}
    errors = {"mean": arviz_bridge.mcse({"": draws})[""]}
    for name, level in QUANTILES.items():
        values[name] = torch.as_tensor(np.quantile(both.numpy(), level, axis=0))
        errors[name] = arviz_bridge.mcse({"": draws}, "quantile", level)[""]
    return _Summary(values, errors, draws)


def _of_generated(guide: AutoAmortized, args: Args, kwargs: Kwargs, seed: int) -> tuple[dict[str, _Summary], list[str]]:
    """Returns the summaries of a generated guide's sites, and its discrete latents."""
    posterior = guide.posterior(*args, **kwargs)
    with seeded(seed), torch.no_grad():
        joint = posterior.sample((DRAWS,)) if guide.plan.moving else {}  # type: ignore[union-attr]
    found, others = {}, list(guide.plan.enumerated)  # type: ignore[union-attr]
    for name, fn in posterior.sites.items():
        if is_discrete(fn):
            others.append(name)
        elif _has_closed_form(fn):
            moments = {"mean": posterior.mean[name], "sd": posterior.stddev[name]}
            quantiles = posterior.quantiles(list(QUANTILES.values()))[name]
            moments.update(zip(QUANTILES, quantiles, strict=True))
            values = {what: value.detach().cpu().double().flatten() for what, value in moments.items()}
            found[name] = _Summary(values, {what: torch.zeros_like(values[what]) for what in LOCATIONS}, None)
        else:
            with seeded(seed), torch.no_grad():
                found[name] = _of_draws((joint[name] if name in joint else fn.sample((DRAWS,)))[None])
    return found, others


def _has_closed_form(fn: Any) -> bool:
    """Whether moments and quantiles of a generated guide's site are known: on the reals and the positives."""
    if isinstance(fn, (dist.MaskedMixture, Joined)):
        return False
    transforms = normal_underneath(fn)[1]  # type: ignore[index]
    return all(isinstance(transform, ExpTransform) for transform in transforms) and len(transforms) <= 1


def _of_written(
    guide: Model, args: Args, kwargs: Kwargs, num_draws: int, seed: int, title: str, progress: bool
) -> tuple[dict[str, _Summary], list[str]]:
    """Returns the summaries of the sites of a guide written by hand, and its discrete latents."""
    values: dict[str, list[Tensor]] = {}
    others: dict[str, None] = {}
    with seeded(seed), preserved(guide, evaluating=True), torch.no_grad(), poutine.block():
        for _ in progress_bar(range(num_draws), desc=title, shown=progress):
            for name, site in poutine.trace(guide).get_trace(*args, **kwargs).iter_stochastic_nodes():
                if site_is_subsample(site) or site["infer"].get("is_auxiliary"):
                    continue
                if site["value"].is_floating_point() and not support_of(site["fn"]).is_discrete:
                    values.setdefault(name, []).append(site["value"])
                else:
                    others[name] = None
    return {name: _of_draws(torch.stack(value)[None]) for name, value in values.items()}, list(others)


def _compared(guide: _Summary, truth: _Summary) -> list[float]:
    """Compares a guide's numbers for a site with MCMC's, over the elements that vary, in posterior sd.

    ``*_error`` is the root mean square over elements of e_j = (guide's - MCMC's) / sd_j. ``*_error_se`` is the root
    mean square of the standard errors of the e_j, those of MCMC and of draws from the guide together: what an exact
    method would show on average, so an error below twice this is no evidence of any. ``sd_ratio`` is the mean over
    elements of sd_guide / sd_MCMC; its standard error is that of a mean along the chains (delta method), so it knows
    how elements move together.
    """
    spread = truth.values["sd"]
    varies = spread > 0
    row = []
    for what in LOCATIONS:
        error = ((guide.values[what] - truth.values[what]) / spread)[varies]
        noise = (torch.hypot(guide.errors[what], truth.errors[what]) / spread)[varies]
        row += [float(error.square().mean().sqrt()), float(noise.square().mean().sqrt())]
    ratio = (guide.values["sd"] / spread)[varies]
    noise = torch.hypot(*(_ratio_error(summary, ratio, varies) for summary in (guide, truth)))
    row[2:2] = [float(ratio.mean()), float(noise)]
    return row


def _ratio_error(summary: _Summary, ratio: Tensor, varies: Tensor) -> Tensor:
    """Returns what the draws of one side add to the standard error of the mean ratio of standard deviations."""
    if summary.draws is None:
        return ratio.new_zeros(())
    standardized = (summary.draws - summary.values["mean"]) / summary.values["sd"]
    influence = (ratio * (standardized[..., varies].square() - 1) / 2).mean(-1)
    return arviz_bridge.mcse({"": influence})[""]
