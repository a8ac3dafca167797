"""log p(x_n | globals) by importance sampling, with its error and k-hat."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_amortize.annealing import annealed_log_weights
from pyro_amortize.arviz_bridge import good_k, psis
from pyro_amortize.local_joint import LocalJoint
from pyro_amortize.optimum import Optimum

GOOD_ENOUGH = 0.1
"""k-hat above which q's tails are taken to be too thin for a proposal; estimates of it scatter by a tenth or two."""
SOME_DATA, SOME_DRAWS = 200, 1000
SMALLEST_SAMPLE = 10
"""Annealed data from which a correction of others is taken."""
CORRECTED = "PSIS+AIS"
MOST_DIMS = 20
"""Dimensions a datum up to which a covariance is learnt from weighted draws."""


@dataclass(frozen=True)
class Evidence:
    """Estimates of log evidence in nats, one a row.

    Attributes:
        value: The estimates, shape (rows,), less the bias of the logarithm of a mean, to first order.
        influences: For each independent stream of draws, what every draw adds to the error: shape (draws, rows), mean
            zero.
        k_hat: Pareto shape of the importance weights, shape (rows,).
        limit: k-hat up to which the estimate of a row is to be trusted, shape (rows,).
        by: How each was estimated: "PSIS", "mixture", "AIS", or "PSIS+AIS" for what was corrected by the mean of what
            annealing adds to others.
        apart: Standard error of each row alone that no stream shows, shape (rows,).
        correction: What was added to those rows, and its standard error; None if nothing was.
    """

    value: Tensor
    influences: dict[str, Tensor]
    k_hat: Tensor
    limit: Tensor
    by: list[str]
    apart: Tensor
    correction: tuple[float, float] | None = None

    @property
    def is_doubtful(self) -> Tensor:
        """Whether k-hat is too high, and nothing was done about it, shape (rows,)."""
        return (self.k_hat > self.limit) & ~torch.tensor([by == CORRECTED for by in self.by])

    def with_rows(self, rows: Tensor, other: Evidence, where: Tensor) -> Evidence:
        """Puts another estimate of some rows in the place of these, where a mask of them says so."""
        rows, new = rows[where], where.nonzero().flatten()
        mine = torch.ones(len(self.value)).index_fill(0, rows, 0.0)
        influences = {stream: influence * mine for stream, influence in self.influences.items()}
        for stream, influence in other.influences.items():
            influences[stream] = (
                torch.zeros(len(influence), len(mine)).to(influence).index_copy(1, rows, influence[:, new])
            )
        by = list(self.by)
        for row, place in zip(rows.tolist(), new.tolist(), strict=True):
            by[row] = other.by[place]
        put = {
            what: getattr(self, what).index_copy(0, rows, getattr(other, what)[new])
            for what in ("value", "k_hat", "limit", "apart")
        }
        return replace(self, influences=influences, by=by, **put)

    def corrected(self, rows: Tensor, added: Tensor) -> Evidence:
        """Adds to some rows the mean of what a better estimate added to a random sample of their kind, shape (sample,).

        The error of that mean is common to these rows; by how much rows differ is added to the error of each.
        """
        mean, spread = added.mean(), added.std()
        value = self.value.index_add(0, rows, mean.expand(len(rows)))
        influence = (
            torch.zeros(len(added), len(value))
            .to(value)
            .index_add(1, rows, (added - mean)[:, None].expand(-1, len(rows)))
        )
        by = list(self.by)
        for row in rows.tolist():
            by[row] = CORRECTED
        apart = self.apart.index_copy(0, rows, spread.expand(len(rows)))
        influences = {**self.influences, "correction": influence}
        error = float(standard_error(added))
        return replace(self, value=value, influences=influences, by=by, apart=apart, correction=(float(mean), error))


def estimate_evidence(log_ratio: Tensor, flat: float = 1.2, by: str = "PSIS", stream: str = "common") -> Evidence:
    """Estimates log p(x_n) as the log mean of Pareto-smoothed importance weights.

    Args:
        log_ratio: log p(x_n, z_n) - log q(z_n) of draws from q, shape (draws, rows).
        flat: As of :func:`~pyro_amortize.arviz_bridge.psis`.
        by: The name of the estimator.
        stream: The name of the draws.
    """
    smoothed, k_hat = psis(log_ratio, flat)
    value = smoothed.logsumexp(0) - math.log(len(smoothed))
    influence = (smoothed - value).exp() - 1
    limit = torch.full_like(k_hat, good_k(len(smoothed)))
    value = value + standard_error(influence).square() / 2
    return Evidence(value, {stream: influence}, k_hat, limit, [by] * len(k_hat), torch.zeros_like(value))


def standard_error(influence: Tensor) -> Tensor:
    """Returns the standard error of a mean over draws, axis 0."""
    return influence.std(0) / math.sqrt(len(influence))


def improved_evidence(
    found: Evidence, joint: LocalJoint, optimum: Optimum, num_draws: int, num_annealed: int, progress: bool
) -> Evidence:
    """Estimates again where q* has too thin tails to be a good proposal.

    In up to 20 dimensions a datum, draws come from a mixture with a Student t of the posterior's moments. Data whose
    k-hat is still too high are annealed, and so are, in more dimensions, all that k-hat does not call perfect: there
    the smoothed weights were seen to be low by half a nat at a k-hat of 0.6. If these are too many, a random sample is
    annealed, and the others are corrected by the mean of what that adds.

    Args:
        found: The evidence by draws from q*.
        joint: The latents of each datum.
        optimum: q*.
        num_draws: Draws of each round from a mixture.
        num_annealed: How many data are annealed at most.
        progress: Whether to show progress bars.
    """
    thin = (found.k_hat > GOOD_ENOUGH).nonzero().flatten()
    if len(thin) and joint.loc.shape[1] <= MOST_DIMS:
        mixture = _by_mixture(joint, optimum, thin, num_draws)
        found = found.with_rows(thin, mixture, mixture.k_hat < found.k_hat[thin])
        thin = found.is_doubtful.nonzero().flatten()
    order = thin[torch.randperm(len(thin))]
    chosen, others = order[:num_annealed], order[num_annealed:]
    if not len(chosen):
        return found
    annealed = _by_annealing(joint, optimum, chosen, progress)
    reached = annealed.value.isfinite()
    if len(others) and int(reached.sum()) >= SMALLEST_SAMPLE:
        found = found.corrected(others, (annealed.value - found.value[chosen])[reached])
    return found.with_rows(chosen, annealed, reached)


def _by_annealing(joint: LocalJoint, optimum: Optimum, rows: Tensor, progress: bool) -> Evidence:
    """Anneals from q* to the posterior, chains of all data side by side."""
    found = annealed_log_weights(
        lambda values: joint.log_p(values, rows), optimum.loc[rows], optimum.scale[rows], progress=progress
    )
    return estimate_evidence(found.log_weights.cpu(), flat=4.0, by="AIS", stream="AIS")


def _by_mixture(joint: LocalJoint, optimum: Optimum, rows: Tensor, num_draws: int) -> Evidence:
    """Takes half of the draws from q* and half from a Student t, with weights against both as one mixture.

    Its mean and covariance are those of the posterior as a first round of weighted draws shows them. The weights are
    bounded by twice those of either.

    References:
        J.-M. Cornuet et al., Adaptive Multiple Importance Sampling, Scandinavian Journal of Statistics 2012,
        https://arxiv.org/abs/0907.1254
    """
    loc, scale = optimum.loc[rows], optimum.scale[rows]
    own = dist.Normal(loc, scale).to_event(1)
    half = num_draws // 2

    def weighted_draws(tail: Any) -> tuple[Tensor, Tensor]:
        values = torch.cat([own.sample((num_draws - half,)), tail.sample((half,))])
        log_q = torch.logaddexp(own.log_prob(values), tail.log_prob(values)).double() - math.log(2)
        return values, joint.log_p(values, rows).double() - log_q

    values, log_ratio = weighted_draws(dist.MultivariateStudentT(5.0, loc, torch.diag_embed(1.5 * scale)))
    _, log_ratio = weighted_draws(_fitted(values, log_ratio, scale))
    return estimate_evidence(log_ratio, flat=4.0, by="mixture", stream="mixture")


def correlation_cost(joint: LocalJoint, optimum: Optimum) -> float | None:
    """Estimates what of the approximation gap is due to correlations within a datum, in nats a datum.

    It is (sum_i log C_ii - log det C) / 2, the divergence of a normal of the posterior's covariance C from independent
    ones, where weighted draws from q* show C; None where they do not.
    """
    dim = joint.loc.shape[1]
    rows = torch.arange(joint.num_rows)[:: -(-joint.num_rows // SOME_DATA)]
    if dim == 1 or dim > MOST_DIMS:
        return 0.0 if dim == 1 else None
    with torch.no_grad():
        values = optimum.loc[rows] + optimum.scale[rows] * torch.randn(SOME_DRAWS, len(rows), dim).to(joint.loc)
        log_ratio = joint.log_p(values, rows) - joint.log_q(values, optimum.loc[rows], optimum.scale[rows], rows)
    _, cov, effective = _weighted_moments(values, log_ratio)
    told = effective > 20 * dim
    if not bool(told.any()):
        return None
    cov = cov[told].double()
    return float((cov.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(cov)).mean() / 2)


def _weighted_moments(values: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns means, (rows, dim), covariances, (rows, dim, dim), and numbers of effective draws of weighted draws."""
    weights = psis(log_ratio)[0].softmax(0).to(values)
    mean = torch.einsum("sn,snd->nd", weights, values)
    centred = values - mean
    return mean, torch.einsum("sn,snd,sne->nde", weights, centred, centred), 1 / weights.square().sum(0)


def _fitted(values: Tensor, log_ratio: Tensor, scale: Tensor) -> Any:
    """Returns a Student t of the posterior's moments, as weighted draws show them, shrunk where these are few."""
    dim = values.shape[-1]
    mean, cov, effective = _weighted_moments(values, log_ratio)
    trust = (effective / (effective + 5 * dim))[:, None, None]
    diagonal = torch.diag_embed(torch.maximum(cov.diagonal(dim1=-2, dim2=-1), scale.square()))
    cov = trust * cov + (1 - trust) * diagonal + 1e-4 * torch.diag_embed(scale.square())
    tril, failed = torch.linalg.cholesky_ex(1.1 * cov)
    tril = torch.where((failed > 0)[:, None, None], diagonal.sqrt(), tril)
    return dist.MultivariateStudentT(7.0, mean, tril)
