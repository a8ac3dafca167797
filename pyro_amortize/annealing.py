"""Annealed importance sampling: weights whose mean is an evidence, from moves that follow a density's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_amortize.bars import progress_bar

ROUNDS = 4
"""Short pilots, each of which fits the start of the next; one of the same cost leaves twice the spread in 50-d."""
SCOUTS = 64
"""Chains of a short pilot."""
TUNERS = 16
"""Chains of the pilot that tunes the step sizes of the run that counts."""
ACCEPTED = 0.75
"""Share of moves that step sizes are tuned to."""
GAIN = 0.5
"""What a share of acceptance that is off by one changes in log step size."""
JITTER = 0.2
"""Step sizes vary by so much, lest a trajectory end where it began."""
STEEPNESS = 4.0
"""Of the sigmoid along which temperatures go: more of them near both ends."""

LogDensity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Annealed:
    """Weighted draws, one a chain and row.

    Attributes:
        log_weights: Log weights in nats, shape (chains, rows), float64; minus infinity where a chain began outside the
            support. If they spread by more than 1, the standard error of 64 is too small, and more temperatures help.
        accept: Share of moves accepted, shape (rows,); below a half the step sizes did not fit, and 0 if every chain
            began outside the support.
        values: Draws that under these weights are draws of the posterior, shape (chains, rows, dim).
    """

    log_weights: Tensor
    accept: Tensor
    values: Tensor


def annealed_log_weights(
    log_p: LogDensity,
    loc: Tensor,
    scale: Tensor,
    *,
    scale_tril: Tensor | None = None,
    num_chains: int = 64,
    num_temperatures: int = 100,
    num_leapfrog: int = 2,
    progress: bool = False,
) -> Annealed:
    r"""Draws importance weights of an unnormalized density, by way of tempered densities in between.

    A chain starts at a draw :math:`z_1` of a normal :math:`r` and moves, by Hamiltonian Monte Carlo, through
    :math:`r^{1-b_t} p^{b_t}` for :math:`0 = b_0 < b_1 < \dots < b_T = 1`; its log weight is
    :math:`\sum_t (b_t - b_{t-1}) (\log p(z_t) - \log r(z_t))`. Whatever the moves' quality, the mean of the weights is
    :math:`p(x_n) = \int p(x_n, u) du`, so the log of a mean over chains is in expectation a lower bound of
    log p(x_n), tight as the weights become equal. Weights know nothing of mass that no chain reached, such as a mode
    far from the others or the ends of a thin curved ridge: the bound is then loose without their showing it.

    Pilot runs come first. A few short ones start at q = Normal(loc, scale) and each hands the next a normal of the
    mean and the (shrunk) covariance where its chains ended; the last is r, and its covariance the moves' metric. One
    more tunes a step size for each row and temperature. All of it is then frozen and none of the pilots' draws are
    used: tuning within the run that counts would let weights depend on what the chains saw, and bias their mean.

    Rows are independent: each has its own normal, step sizes, moves and rejections. Where log p or its gradient is not
    finite, a move is rejected. log_p is called, with its gradient, some 3 x num_temperatures x num_leapfrog times, each
    for all rows and a run's chains at once: a third of the calls is for num_chains, a third for 64 and a third for 16.
    Normals take memory of (rows, dim, dim).

    Draws come from torch's global generator.

    Args:
        log_p: Maps values, shape (chains, rows, dim), to log p(x_n, u) in nats, shape (chains, rows). Differentiable;
            an entry depends on its own values only.
        loc: Mean of q, a first approximation of the posterior, shape (rows, dim).
        scale: Standard deviations of q, shape (rows, dim). Of little matter: four times too narrow works as well.
        scale_tril: Cholesky factor of q's covariance in the place of scale, shape (rows, dim, dim), where more of the
            posterior is known.
        num_chains: Number of weights a row.
        num_temperatures: T. The default suits correlated posteriors of 50 dimensions: log weights there spread by 0.6.
        num_leapfrog: Leapfrog steps a move. In the fitted metric two go far enough; four turn back, and cost twice.
        progress: Whether to show a progress bar.

    Returns:
        The weights, and where chains ended.

    Raises:
        ValueError: If log_p returns another shape than (chains, rows).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> def log_p(u):  # unnormalized: the integral is sqrt(2 pi) a dimension
        ...     return -0.5 * (u - 3).square().sum(-1)
        >>> found = annealed_log_weights(log_p, torch.zeros(5, 2), torch.ones(5, 2))
        >>> log_evidence = found.log_weights.logsumexp(0) - math.log(64)
        >>> bool((log_evidence - math.log(2 * math.pi)).abs().max() < 0.2)
        True

    References:
        R. M. Neal, Annealed Importance Sampling, Statistics and Computing 2001, https://arxiv.org/abs/physics/9803008
        Y. Wu et al., On the Quantitative Analysis of Decoder-Based Generative Models, ICLR 2017,
        https://arxiv.org/abs/1611.04273
        Y. Chen et al., Shrinkage Algorithms for MMSE Covariance Estimation, IEEE Transactions on Signal Processing
        2010, https://arxiv.org/abs/0907.4698
    """
    start = _Start(log_p, loc, torch.diag_embed(scale) if scale_tril is None else scale_tril)
    long, short = _sigmoid(num_temperatures), _sigmoid(math.ceil(num_temperatures / ROUNDS))
    total = ROUNDS * (len(short) - 1) + 2 * (len(long) - 1)
    with torch.no_grad(), progress_bar(total=total, desc="Annealing", shown=progress) as bar:
        for _ in range(ROUNDS):
            found = _anneal(start, SCOUTS, short, _first_steps(short, loc), num_leapfrog, GAIN, bar)
            start = _fitted(start, found.at.z, found.log_weights.isfinite())
        pilot = _anneal(start, TUNERS, long, _first_steps(long, loc), num_leapfrog, GAIN, bar)
        run = _anneal(start, num_chains, long, pilot.log_steps, num_leapfrog, 0.0, bar)
    return Annealed(run.log_weights, run.accept, start.values(run.at.z))


def _sigmoid(num_temperatures: int) -> list[float]:
    """Returns b_0 = 0, ..., b_T = 1."""
    at = torch.sigmoid(STEEPNESS * torch.linspace(-1, 1, num_temperatures + 1, dtype=torch.float64))
    return ((at - at[0]) / (at[-1] - at[0])).tolist()


@dataclass(frozen=True)
class _Point:
    """Where chains are, in coordinates z in which the start is Normal(0, 1).

    Densities are those of z, shape (chains, rows), float64; gradients are with respect to z.
    """

    z: Tensor
    log_p: Tensor
    grad: Tensor
    finite: Tensor

    @property
    def log_start(self) -> Tensor:
        return -0.5 * _square(self.z) - 0.5 * self.z.shape[-1] * math.log(2 * math.pi)

    def slope(self, beta: float) -> Tensor:
        """Returns the gradient of the tempered density."""
        return beta * self.grad - (1 - beta) * self.z

    def or_else(self, other: _Point, chosen: Tensor) -> _Point:
        """Returns this point for the chains chosen, the other one for the rest."""
        wide = chosen[..., None]
        return _Point(
            torch.where(wide, self.z, other.z),
            torch.where(chosen, self.log_p, other.log_p),
            torch.where(wide, self.grad, other.grad),
            torch.where(chosen, self.finite, other.finite),
        )


@dataclass(frozen=True)
class _Start:
    """The normal from which chains start: values are loc + tril z, shapes (rows, dim) and (rows, dim, dim)."""

    log_p: LogDensity
    loc: Tensor
    tril: Tensor

    def values(self, z: Tensor) -> Tensor:
        return self.loc + torch.einsum("nde,cne->cnd", self.tril, z)

    def point(self, z: Tensor) -> _Point:
        values = self.values(z).requires_grad_()
        with torch.enable_grad():
            log_p = self.log_p(values)
            if log_p.shape != z.shape[:-1]:
                raise ValueError(
                    f"annealed_log_weights: Expected log_p to return (chains, rows) = {tuple(z.shape[:-1])} for values"
                    f" of shape {tuple(z.shape)}; got {tuple(log_p.shape)}. Sum over the last dimension only."
                )
            (grad,) = torch.autograd.grad(log_p.sum(), values)
        finite = log_p.isfinite() & grad.isfinite().all(-1)
        grad = torch.einsum("nde,cnd->cne", self.tril, grad.where(finite[..., None], torch.zeros_like(grad)))
        log_det = self.tril.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
        log_p = log_p.detach().double()
        return _Point(z, torch.where(log_p.isfinite(), log_p + log_det, -torch.inf), grad, finite)


def _fitted(start: _Start, z: Tensor, alive: Tensor) -> _Start:
    """Returns a normal of the chains' mean and covariance, the latter shrunk towards that of the start."""
    dim = z.shape[-1]
    weights, z = alive.double(), z.double()
    count = weights.sum(0)
    weights = weights / count.clamp(min=1)
    mean = torch.einsum("cn,cnd->nd", weights, z)
    centred = z - mean
    cov = torch.einsum("cn,cnd,cne->nde", weights, centred, centred)
    eye = torch.eye(dim).to(cov)
    # The "oracle approximating" amount of shrinkage towards a multiple of the identity, (23) in Chen et al.
    trace, square = cov.diagonal(dim1=-2, dim2=-1).sum(-1), cov.square().sum((-1, -2))
    spread = (count + 1 - 2 / dim) * (square - trace.square() / dim)
    shrink = (((1 - 2 / dim) * square + trace.square()) / spread.clamp(min=1e-30)).clamp(0, 1)[:, None, None]
    cov = (1 - shrink) * cov + shrink * trace[:, None, None] / dim * eye
    # The start counts as one chain more, so that few chains, or none, leave a covariance.
    count = count[:, None, None]
    tril, failed = torch.linalg.cholesky_ex((count * cov + eye) / (count + 1))
    tril = torch.where((failed > 0)[:, None, None], eye, tril)
    was = start.tril.double()
    loc = start.loc + torch.einsum("nde,ne->nd", was, mean)
    return _Start(start.log_p, loc.to(start.loc), (was @ tril).to(start.loc))


@dataclass(frozen=True)
class _Run:
    log_weights: Tensor
    accept: Tensor
    at: _Point
    log_steps: Tensor


def _first_steps(betas: list[float], loc: Tensor) -> Tensor:
    """Returns log step sizes to tune, shape (temperatures, rows)."""
    rows, dim = loc.shape
    return loc.new_full((len(betas), rows), -0.25 * math.log(dim), dtype=torch.float64)


def _anneal(
    start: _Start, num_chains: int, betas: list[float], log_steps: Tensor, num_leapfrog: int, gain: float, bar: tqdm
) -> _Run:
    """Moves chains from the start to the density; with a gain above 0, log step sizes follow the moves accepted."""
    at = start.point(torch.randn(num_chains, *start.loc.shape, dtype=start.loc.dtype, device=start.loc.device))
    log_steps = log_steps.clone()
    log_weights = torch.zeros_like(at.log_p)
    accept = torch.zeros_like(log_steps[0])
    alive = at.log_p.isfinite().sum(0).clamp(min=1)
    for t in range(1, len(betas)):
        log_weights = log_weights + (betas[t] - betas[t - 1]) * (at.log_p - at.log_start)
        bar.update()
        if t == len(betas) - 1:
            break  # a move at the last temperature would change no weight
        jitter = 1 + JITTER * (2 * torch.rand_like(at.log_p) - 1)
        at, probability = _move(start, at, betas[t], (log_steps[t].exp() * jitter).to(at.z), num_leapfrog)
        share = probability.sum(0) / alive
        accept = accept + share / max(len(betas) - 2, 1)
        log_steps[t:] += gain * (share - ACCEPTED)
    return _Run(log_weights, accept, at, log_steps)


def _move(start: _Start, old: _Point, beta: float, step: Tensor, num_leapfrog: int) -> tuple[_Point, Tensor]:
    """Takes one step of Hamiltonian Monte Carlo; returns also the probability of acceptance, (chains, rows)."""
    wide = step[..., None]
    first = torch.randn_like(old.z)
    new, momentum, sound = old, first, old.finite
    for _ in range(num_leapfrog):
        momentum = momentum + wide / 2 * new.slope(beta)
        z = new.z + wide * momentum
        sound = sound & z.isfinite().all(-1)
        new = start.point(torch.where(sound[..., None], z, old.z))  # a trajectory that failed waits where it began
        sound = sound & new.finite
        momentum = momentum + wide / 2 * new.slope(beta)
    gain = _log_tempered(new, beta) - _square(momentum) / 2 - _log_tempered(old, beta) + _square(first) / 2
    probability = torch.where(sound, gain.clamp(max=0).exp(), 0.0)
    return new.or_else(old, torch.rand_like(probability) < probability), probability


def _log_tempered(point: _Point, beta: float) -> Tensor:
    return beta * point.log_p + (1 - beta) * point.log_start


def _square(z: Tensor) -> Tensor:
    return z.double().square().sum(-1)
