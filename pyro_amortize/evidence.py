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
from pyro_amortize.proposals import Modes, Proposal, pieces, proposal

GOOD_ENOUGH = 0.1
"""k-hat above which q's tails are taken to be too thin for a proposal; estimates of it scatter by a tenth or two."""
GOOD = 0.3
"""The same of the mixture in many dimensions, where draws that miss mass do not show it."""
WIDEST_SPREAD = 2.0
"""Nats by which log weights of 64 annealed chains may spread."""
SMALLEST_STRATUM = 20
"""Draws of a component whose mean is known well enough."""
LONGER = 4
"""How many times more draws the second round has."""
SAMPLE = 64
"""Draws that are kept of the posterior of each datum."""
SURE, SLACK = 3.0, 0.02
"""Standard errors, and nats beside them, by which an estimate must exceed another to count as different."""
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

    @property
    def se(self) -> Tensor:
        """Standard errors, shape (rows,)."""
        errors = torch.stack([*map(standard_error, self.influences.values()), self.apart])
        return errors.square().sum(0).sqrt()

    def exceeds(self, other: Evidence) -> Tensor:
        """Tells where this estimate is larger by more than errors explain, shape (rows,)."""
        return self.value - other.value > SURE * torch.hypot(self.se, other.se) + SLACK

    def of(self, rows: Tensor) -> Evidence:
        """Returns the estimates of some rows."""
        every = {what: getattr(self, what)[rows] for what in ("value", "k_hat", "limit", "apart")}
        influences = {stream: influence[:, rows] for stream, influence in self.influences.items()}
        return replace(self, influences=influences, by=[self.by[row] for row in rows.tolist()], **every)

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


@dataclass(frozen=True)
class Posterior:
    """What weighted draws show of the posterior of each datum.

    Attributes:
        draws: Draws of it, shape (draws, rows, dim).
        elsewhere: Share of its mass at other modes than that of q*, shape (rows,).
    """

    draws: Tensor
    elsewhere: Tensor


def improved_evidence(
    found: Evidence, joint: LocalJoint, optimum: Optimum, modes: Modes, num_draws: int
) -> tuple[Evidence, Posterior]:
    """Estimates again where q* has too thin tails to be a good proposal, or misses mass.

    Draws of every datum come from a mixture of q*, of normals and Student t at the modes, with the covariance of the
    curvature there, and in few dimensions of one as wide as the prior. In up to 20 dimensions a second round adds a
    Student t of the posterior's moments as the first shows them, where weights are still uneven. Since the log of a
    mean weight is low rather than high, the larger of two estimates counts where they differ by more than their errors.

    Args:
        found: The evidence by draws from q*.
        joint: The latents of each datum.
        optimum: q*.
        modes: The modes.
        num_draws: Draws of each round.
    """
    parts = [
        _by_mixture(joint, optimum, modes.of(rows), rows, num_draws)
        for rows in pieces(joint.num_rows, LONGER * num_draws * joint.loc.shape[1], joint.loc)
    ]
    mixture = _joined([evidence for evidence, _ in parts])
    posterior = Posterior(
        torch.cat([part.draws for _, part in parts], 1), torch.cat([part.elsewhere for _, part in parts])
    )
    better = ((found.k_hat > GOOD_ENOUGH) & mixture.value.isfinite()) | mixture.exceeds(found)
    return found.with_rows(torch.arange(len(better)), mixture, better), posterior


def annealed_evidence(
    found: Evidence, joint: LocalJoint, optimum: Optimum, modes: Modes | None, num_annealed: int, progress: bool
) -> Evidence:
    """Anneals the data whose importance weights are still too uneven.

    In more than 20 dimensions these are all that k-hat does not call good by far: there the smoothed weights were seen
    to be low by half a nat at a k-hat of 0.6. If they are too many, a random sample is annealed, and the others are
    corrected by the mean of what that adds.

    Args:
        found: The evidence so far.
        joint: The latents of each datum.
        optimum: q*.
        modes: The modes, from the first of which chains start; None to start from q*.
        num_annealed: How many data are annealed at most.
        progress: Whether to show progress bars.
    """
    few = joint.loc.shape[1] <= MOST_DIMS
    thin = (found.is_doubtful if few else found.k_hat > (GOOD_ENOUGH if modes is None else GOOD)).nonzero().flatten()
    order = thin[torch.randperm(len(thin))]
    chosen, others = order[:num_annealed], order[num_annealed:]
    if not len(chosen):
        return found
    annealed = _by_annealing(joint, optimum, modes, chosen, progress)
    reached = annealed.value.isfinite()
    better = reached & ~found.of(chosen).exceeds(annealed)
    if len(others) and int(reached.sum()) >= SMALLEST_SAMPLE:
        found = found.corrected(others, torch.where(better, annealed.value - found.value[chosen], 0.0)[reached])
    return found.with_rows(chosen, annealed, better)


def _by_annealing(joint: LocalJoint, optimum: Optimum, modes: Modes | None, rows: Tensor, progress: bool) -> Evidence:
    """Anneals from a normal near the posterior, chains of all data side by side.

    Where log weights spread by much, that of 64 chains does not show how far their mean is off: the error is then that
    of a log-normal mean, and from a spread of 2 on the estimate is not to be trusted, whatever k-hat says.
    """
    at, tril = (optimum.loc[rows], None) if modes is None else (modes.loc[0, rows], modes.tril[0, rows])
    found = annealed_log_weights(
        lambda values: joint.log_p(values, rows), at, optimum.scale[rows], scale_tril=tril, progress=progress
    )
    log_weights = found.log_weights.cpu()
    evidence = estimate_evidence(log_weights, flat=4.0, by="AIS", stream="AIS")
    spread = log_weights.where(log_weights.isfinite(), evidence.value).std(0)
    of_log_normal = (spread.clamp(max=5.0).square().expm1() / len(log_weights)).sqrt()
    seen = standard_error(evidence.influences["AIS"])
    return replace(
        evidence,
        apart=(of_log_normal.square() - seen.square()).clamp(min=0).sqrt(),
        limit=evidence.limit.where(spread < WIDEST_SPREAD, -math.inf),
    )


@dataclass(frozen=True)
class _Round:
    """Weighted draws from a mixture, and what they show.

    Attributes:
        values: Shape (draws, rows, dim).
        log_ratio: log p - log q of the whole mixture, shape (draws, rows).
        elsewhere: The share of other modes in the mixture's density at each draw, of the same shape.
        evidence: The estimate.
    """

    values: Tensor
    log_ratio: Tensor
    elsewhere: Tensor
    evidence: Evidence

    @classmethod
    def of(cls, joint: LocalJoint, mixture: Proposal, rows: Tensor, num_draws: int, stream: str) -> _Round:
        values, chosen = mixture.sample(num_draws)
        each = mixture.log_densities(values)
        log_q = each.logsumexp(0)
        log_ratio = joint.log_p(values, rows).double() - log_q
        evidence = estimate_evidence(log_ratio, flat=4.0, by="mixture", stream=stream)
        within = _within(evidence.influences[stream], chosen, len(mixture.components))
        here = each.masked_fill(~mixture.elsewhere[:, None], -math.inf).logsumexp(0) - log_q
        return cls(values, log_ratio, here.exp(), replace(evidence, influences={stream: within}))

    @property
    def posterior(self) -> Posterior:
        """Draws by their weights, with replacement."""
        weights = self.log_ratio.nan_to_num(-math.inf, math.inf, -math.inf).softmax(0).nan_to_num(1.0)
        drawn = weights.T.contiguous().multinomial(SAMPLE, replacement=True).T
        draws = self.values.gather(0, drawn[..., None].expand(-1, -1, self.values.shape[-1]))
        return Posterior(draws, (weights * self.elsewhere).sum(0))


def _by_mixture(
    joint: LocalJoint, optimum: Optimum, modes: Modes, rows: Tensor, num_draws: int
) -> tuple[Evidence, Posterior]:
    """Weighs draws against the whole mixture that they come from; a second, longer round where weights are uneven.

    References:
        J.-M. Cornuet et al., Adaptive Multiple Importance Sampling, Scandinavian Journal of Statistics 2012,
        https://arxiv.org/abs/0907.1254
    """
    loc, scale = optimum.loc[rows], optimum.scale[rows]
    first = _Round.of(joint, proposal(modes, loc, scale), rows, num_draws, "mixture")
    found, posterior = first.evidence, first.posterior
    uneven = (found.k_hat > GOOD_ENOUGH).nonzero().flatten()
    if not len(uneven) or loc.shape[1] > MOST_DIMS:
        return found, posterior
    fitted = _fitted(first.values[:, uneven], first.log_ratio[:, uneven], scale[uneven])
    wider = proposal(modes.of(uneven), loc[uneven], scale[uneven]).beside(fitted, 0.5)
    second = _Round.of(joint, wider, rows[uneven], LONGER * num_draws, "second mixture")
    better = second.evidence.value.isfinite()
    chosen, again = uneven[better], second.posterior
    return found.with_rows(uneven, second.evidence, better), Posterior(
        posterior.draws.index_copy(1, chosen, again.draws[:, better]),
        posterior.elsewhere.index_copy(0, chosen, again.elsewhere[better]),
    )


def _within(influence: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Takes means over each component's draws out of influences, since how many draws it has is no chance.

    Few draws do not show their mean.
    """
    for place in range(count):
        here = (chosen == place).to(influence)
        number = here.sum(0)
        mean = (influence * here).sum(0) / number.clamp(min=1)
        freedom = (number / (number - 1).clamp(min=1)).sqrt()
        centred = torch.where(number < SMALLEST_STRATUM, influence, (influence - mean) * freedom)
        influence = torch.where(here > 0, centred, influence)
    return influence


def _joined(parts: list[Evidence]) -> Evidence:
    """Puts estimates of some rows after those of others, draws of which are independent."""
    if len(parts) == 1:
        return parts[0]
    sizes = {stream: len(part.influences[stream]) for part in parts for stream in part.influences}
    return Evidence(
        value=torch.cat([part.value for part in parts]),
        influences={
            stream: torch.cat([p.influences.get(stream, p.value.new_zeros(size, len(p.value))) for p in parts], 1)
            for stream, size in sizes.items()
        },
        k_hat=torch.cat([part.k_hat for part in parts]),
        limit=torch.cat([part.limit for part in parts]),
        by=[by for part in parts for by in part.by],
        apart=torch.cat([part.apart for part in parts]),
    )


def _weighted_moments(values: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns means, (rows, dim), covariances, (rows, dim, dim), and numbers of effective draws of weighted draws."""
    weights = psis(log_ratio)[0].softmax(0).to(values)
    mean = torch.einsum("sn,snd->nd", weights, values)
    centred = values - mean
    return mean, torch.einsum("sn,snd,sne->nde", weights, centred, centred), 1 / weights.square().sum(0)


def _fitted(values: Tensor, log_ratio: Tensor, scale: Tensor) -> Any:
    """Returns a Student t of the posterior's moments, as weighted draws show them, shrunk where these are few."""
    values, scale, dim = values.double(), scale.double(), values.shape[-1]
    mean, cov, effective = _weighted_moments(values, log_ratio)
    trust = (effective / (effective + 5 * dim))[:, None, None]
    diagonal = torch.diag_embed(torch.maximum(cov.diagonal(dim1=-2, dim2=-1), scale.square()))
    cov = trust * cov + (1 - trust) * diagonal + 1e-4 * torch.diag_embed(scale.square())
    tril, failed = torch.linalg.cholesky_ex(1.1 * cov)
    tril = torch.where((failed > 0)[:, None, None], diagonal.sqrt(), tril)
    return dist.MultivariateStudentT(7.0, mean, tril)
