"""log p(x_n | globals) by importance sampling, with its error and k-hat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_amortize.arviz_bridge import psis
from pyro_amortize.calls import Model
from pyro_amortize.densities import log_joint
from pyro_amortize.parameters import preserved
from pyro_amortize.posterior import normal_underneath

GOOD_ENOUGH = 0.1
"""k-hat above which q's tails are taken to be too thin for a proposal; estimates of it scatter by a tenth or two."""


@dataclass(frozen=True)
class Evidence:
    """Estimates of log evidence in nats, one a row.

    Attributes:
        value: The estimates, shape (rows,).
        influence: What each draw adds to the error: shape (draws, rows), mean zero.
        k_hat: Pareto shape of the importance weights, shape (rows,).
    """

    value: Tensor
    influence: Tensor
    k_hat: Tensor


def estimate_evidence(log_ratio: Tensor, flat: float = 1.2) -> Evidence:
    """Estimates log p(x_n) as the log mean of Pareto-smoothed importance weights.

    Args:
        log_ratio: log p(x_n, z_n) - log q(z_n) of draws from q, shape (draws, rows).
        flat: As of :func:`~pyro_amortize.arviz_bridge.psis`.
    """
    smoothed, k_hat = psis(log_ratio, flat)
    value = smoothed.logsumexp(0) - math.log(len(smoothed))
    return Evidence(value, (smoothed - value).exp() - 1, k_hat)


def standard_error(influence: Tensor) -> Tensor:
    """Returns the standard error of a mean over draws, axis 0."""
    return influence.std(0) / math.sqrt(len(influence))


def robust_evidence(
    model: Model, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any], plate: str, num_draws: int, seed: int
) -> Evidence | None:
    """Estimates log p(x_n) where q alone has too thin tails to be a good proposal.

    Half of the draws come from q and half from a multivariate Student t in unconstrained space, whose mean and
    covariance are those of the posterior as a first round of weighted draws shows them; the weights take both as one
    mixture, so they are bounded by twice those of either.

    Args:
        model: The model, its globals conditioned.
        guide: q, of normals on the sites' supports, independent of each other.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        plate: The plate whose elements are the data.
        num_draws: Number of draws in each round.
        seed: Of the draws.

    Returns:
        The estimate; None where latents are masked or the plate subsamples, for which q alone must do.

    References:
        J.-M. Cornuet et al., Adaptive Multiple Importance Sampling, Scandinavian Journal of Statistics 2012,
        https://arxiv.org/abs/0907.1254
    """
    with preserved(guide, evaluating=True), torch.no_grad(), poutine.block():
        pyro.set_rng_seed(seed)
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        sites = [_Local(name, site, plate) for name, site in trace.iter_stochastic_nodes() if _is_local(site, plate)]
        if not sites or any(site.masked for site in sites):
            return None
        loc, scale = (torch.cat([getattr(site, what) for site in sites], -1) for what in ("loc", "scale"))

        def weighted_draws(tail: Any) -> tuple[Tensor, Tensor]:
            half = num_draws // 2
            values = torch.cat([loc + scale * torch.randn(num_draws - half, *loc.shape).to(loc), tail.sample((half,))])
            latents, log_det = _to_sites(values, sites)
            log_p = log_joint(model, guide, args, kwargs, plate, latents).double() + log_det.double()
            own = dist.Normal(loc, scale).to_event(1).log_prob(values)
            return values, log_p - (torch.logaddexp(own, tail.log_prob(values)).double() - math.log(2))

        values, log_ratio = weighted_draws(dist.MultivariateStudentT(5.0, loc, torch.diag_embed(1.5 * scale)))
        _, log_ratio = weighted_draws(_fitted(values, log_ratio, scale))
    return estimate_evidence(log_ratio, flat=4.0)


class _Local:
    """A local site of q: where its rows stand, and how unconstrained values reach its support."""

    def __init__(self, name: str, site: Any, plate: str) -> None:
        fn = site["fn"]
        found = normal_underneath(fn)
        assert found is not None
        base, self.transforms = found
        self.name = name
        masked = site["mask"] is not None and site["mask"] is not True
        self.masked = masked or _has_mask(fn) or any(f.size != f.full_size for f in site["cond_indep_stack"])
        frame = next(frame for frame in site["cond_indep_stack"] if frame.name == plate)
        self.event_dim = base.loc.dim() - len(fn.batch_shape)
        self.axis = frame.dim - self.event_dim
        rows = base.loc.movedim(self.axis, 0)
        self.rest = rows.shape[1:]
        self.loc = rows.reshape(len(rows), -1)
        self.scale = base.scale.movedim(self.axis, 0).reshape(len(rows), -1)


def _is_local(site: Any, plate: str) -> bool:
    inside = any(frame.name == plate for frame in site["cond_indep_stack"])
    return inside and normal_underneath(site["fn"]) is not None


def _has_mask(fn: Any) -> bool:
    while fn is not None:
        if isinstance(fn, dist.MaskedDistribution):
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def _to_sites(values: Tensor, sites: list[_Local]) -> tuple[dict[str, Tensor], Tensor]:
    """Splits unconstrained values, shape (draws, rows, dim), into sites; returns the log Jacobian, (draws, rows)."""
    latents = {}
    log_det = values.new_zeros(values.shape[:2])
    start = 0
    for site in sites:
        width = site.loc.shape[-1]
        value = values[..., start : start + width].reshape(*values.shape[:2], *site.rest).movedim(1, site.axis)
        start += width
        for transform in site.transforms:
            image = transform(value)
            det = transform.log_abs_det_jacobian(value, image)
            axis = site.axis + (value.dim() - det.dim())
            log_det = log_det + det.movedim(axis, 1).reshape(*values.shape[:2], -1).sum(-1)
            value = image
        latents[site.name] = value
    return latents, log_det


def _fitted(values: Tensor, log_ratio: Tensor, scale: Tensor) -> Any:
    """Returns a Student t of the posterior's moments, as weighted draws show them, shrunk where these are few."""
    weights = psis(log_ratio)[0].softmax(0).to(values)
    dim = values.shape[-1]
    effective = 1 / weights.square().sum(0)
    mean = torch.einsum("sn,snd->nd", weights, values)
    centred = values - mean
    cov = torch.einsum("sn,snd,sne->nde", weights, centred, centred)
    trust = (effective / (effective + 5 * dim))[:, None, None]
    diagonal = torch.diag_embed(torch.maximum(cov.diagonal(dim1=-2, dim2=-1), scale.square()))
    cov = trust * cov + (1 - trust) * diagonal + 1e-4 * torch.diag_embed(scale.square())
    tril, failed = torch.linalg.cholesky_ex(1.1 * cov)
    tril = torch.where((failed > 0)[:, None, None], diagonal.sqrt(), tril)
    return dist.MultivariateStudentT(7.0, mean, tril)
