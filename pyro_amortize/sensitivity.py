"""How the inference gap changes with the globals, which are biased by it where they were fitted under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.digits import with_error
from pyro_amortize.local_joint import LocalJoint
from pyro_amortize.posterior import normal_underneath
from pyro_amortize.reference import drawn_globals, site_answers

PARTS = 8
"""Batches of draws, which show the noise of gradients."""
NUM_DRAWS = 30
"""Draws of the globals of a guide whose standard deviations are not known otherwise."""
OF_NOTE = 0.5
"""Posterior standard deviations of bias from which it is told."""
ERRORS = 4.0


@dataclass(frozen=True)
class Scaled:
    """A global latent in units of its posterior standard deviation.

    Attributes:
        at: Maps shifts in these units, zero at the value held, to values of the site.
        zero: No shift, of the shape of the standard deviations.
    """

    at: Callable[[Tensor], Tensor]
    zero: Tensor


def scaled_globals(
    guide: Model, args: Args, kwargs: Kwargs, plan: Any, held: Mapping[str, Tensor], seed: int
) -> dict[str, Scaled]:
    """Returns the continuous globals that a guide holds a density of, at values given.

    Args:
        guide: The guide, nothing held.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        plan: The plan of the model.
        held: The values.
        seed: Of draws, where the guide's globals are no normals in place.
    """
    sites = {name: site for name, site in site_answers(guide, args, kwargs).items() if name in held}
    found, others = {}, []
    for name, site in sites.items():
        base = normal_underneath(site["fn"])
        if base is not None:
            transform = torch.distributions.ComposeTransform(base[1])
            found[name] = _scaled(held[name], transform, base[0].scale.detach())
        elif held[name].is_floating_point():
            others.append(name)
    draws = drawn_globals(guide, args, kwargs, plan, NUM_DRAWS, seed) if others else []
    for name in others:
        transform = biject_to(sites[name]["fn"].support)
        spread = transform.inv(torch.stack([draw[name] for draw in draws])).std(0)
        if bool((spread > 0).all()):
            found[name] = _scaled(held[name], transform, spread)
    return found


def _scaled(value: Tensor, transform: Any, scale: Tensor) -> Scaled:
    centre = transform.inv(value).detach()
    return Scaled(lambda shift: transform(centre + scale * shift), torch.zeros_like(centre))


def sensitivity(
    joint: LocalJoint, model: Model, held: Mapping[str, Tensor], scaled: Mapping[str, Scaled], posterior: Tensor
) -> pd.DataFrame:
    r"""Returns by how many nats the inference gap of all data changes per posterior standard deviation of each global.

    The gap is the divergence of q from the local posterior, and its gradient the difference of that of log p in mean:

    .. math:: \partial_\theta \sum_n (\log p(x_n | \theta) - ELBO_n)
        = \sum_n (E_{p(z_n | x_n, \theta)} - E_q) \, \partial_\theta \log p(x_n, z_n | \theta).

    Where a fit has made the ELBO's gradient zero, this is the gradient of the log evidence: in units of the guide's
    standard deviation it says by how many of them, to first order, the posterior's mode is elsewhere.

    Args:
        joint: The local latents of each datum, and the guide's q of them.
        model: The model, nothing held.
        held: The values of all globals.
        scaled: Those to be moved.
        posterior: Draws of the local posterior, shape (draws, rows, dim).

    Returns:
        Index ``site``; ``slope``, that of the element where it is largest, and its standard error ``slope_se``.
    """
    noise = torch.randn_like(posterior[: len(posterior) // 2])
    own = joint.loc + joint.scale * torch.cat([noise, -noise])
    own = own[torch.arange(len(own)).reshape(2, -1).T.flatten()]  # opposite signs side by side
    parts = [
        _slopes(joint, model, held, scaled, p, q) for p, q in zip(posterior.chunk(PARTS), own.chunk(PARTS), strict=True)
    ]
    rows = {}
    for name in scaled:
        each = torch.stack([part[name].flatten() for part in parts]).double()
        slopes = each.mean(0)
        se = float(each.var(0).mean().sqrt()) / PARTS**0.5
        rows[name] = (float(slopes[slopes.abs().argmax()]), se)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["slope", "slope_se"])
    return table.rename_axis("site")


def _slopes(
    joint: LocalJoint,
    model: Model,
    held: Mapping[str, Tensor],
    scaled: Mapping[str, Scaled],
    posterior: Tensor,
    own: Tensor,
) -> dict[str, Tensor]:
    """Returns the gradients by draws of the posterior and of q."""
    shifts = {name: one.zero.clone().requires_grad_() for name, one in scaled.items()}
    with torch.enable_grad():
        values = {**held, **{name: one.at(shifts[name]) for name, one in scaled.items()}}
        moved = joint.under(poutine.condition(model, data=values))
        log_p = moved.log_p(torch.cat([posterior, own])).sum(-1)
        difference = log_p[: len(posterior)].mean() - log_p[len(posterior) :].mean()
        found = torch.autograd.grad(difference, list(shifts.values()), allow_unused=True)
    return {
        name: torch.zeros_like(shift) if gradient is None else gradient.nan_to_num()
        for (name, shift), gradient in zip(shifts.items(), found, strict=True)
    }


def biased(table: pd.DataFrame) -> list[str]:
    """Says which globals are biased by a gap, and by how much."""
    far = table[table["slope"].abs() > (ERRORS * table["slope_se"]).clip(lower=OF_NOTE)]
    if far.empty:
        return []
    by = ", ".join(f"'{name}' {with_error(row['slope'], row['slope_se'])}" for name, row in far.iterrows())
    return [
        f"globals fitted under a gap are biased by it: the gap changes with them, in nats per posterior standard "
        f"deviation of the guide: {by}. To first order, their posterior is off by as many standard deviations, and by "
        f"many more where the slope does not fall on the way. A family that closes the gap of the local latents "
        f"repairs it; run_mcmc shows it"
    ]
