"""Proposals that follow the posterior of each datum: normals at its modes, as wide as its curvature there says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_amortize.local_joint import LocalJoint

MOST_DIMS = 200
"""Dimensions a datum up to which its curvature, a matrix of their square, is computed."""
FEW_DIMS = 3
"""Dimensions up to which draws as wide as the prior hit what there is."""
CLIMBERS, STRIDES, STRIDE = 16, 36, 0.3
"""Ascents of each datum's log density, steps of each, and the first step's length in standard deviations of the prior.
"""
OTHER_MODES = 2, 8
"""How many other modes are kept of each datum: at least, and at most, fewer in many dimensions."""
RESOLVED = 300
"""Steps between neighbouring numbers of the machine that a normal must be wide."""
AT_ONCE = 2**23
"""Numbers held at once."""
WIDEST = 4.0
"""Variances of the prior that a normal's variance does not exceed."""


@dataclass(frozen=True)
class Modes:
    """Normals at the modes of each datum's posterior, the first of them where q* is; Laplace's approximation of each.

    Attributes:
        loc: Shape (modes, rows, dim).
        tril: Cholesky factors of the covariances, shape (modes, rows, dim, dim).
        log_mass: Log of each normal's share of p(x_n), in nats; minus infinity for what is no other mode, shape
            (modes, rows).
        apart: Whether log p is lower by a nat or more between a mode and the first one, shape (modes, rows).
        correlation: KL divergence of the best independent normals from the first normal, (sum_i log P_ii - log det P)
            / 2 with its precision P, shape (rows,); NaN where log p is not concave at q*.
        wide: Means and standard deviations of the prior, shape (rows, dim) each; None in more than three dimensions.
    """

    loc: Tensor
    tril: Tensor
    log_mass: Tensor
    apart: Tensor
    correlation: Tensor
    wide: tuple[Tensor, Tensor] | None

    def of(self, rows: Tensor) -> Modes:
        """Returns those of some rows."""
        every = {name: getattr(self, name)[:, rows] for name in ("loc", "tril", "log_mass", "apart")}
        wide = None if self.wide is None else (self.wide[0][rows], self.wide[1][rows])
        return replace(self, **every, correlation=self.correlation[rows], wide=wide)


@dataclass(frozen=True)
class Proposal:
    """A mixture of distributions for each datum, to draw from.

    Attributes:
        components: Distributions of batch shape (rows,) and event shape (dim,), in double precision: the axes of a
            normal may differ by more than single precision can divide.
        weights: Their shares, shape (components, rows).
        elsewhere: Whether a component stands at another mode, shape (components, rows).
        dtype: Of draws.
    """

    components: list[dist.TorchDistribution]
    weights: Tensor
    elsewhere: Tensor
    dtype: torch.dtype

    def sample(self, num_draws: int) -> tuple[Tensor, Tensor]:
        """Draws from each component as many as is its share, up to rounding.

        Returns:
            Draws, shape (draws, rows, dim), and from which component each is, shape (draws, rows).
        """
        count, rows = self.weights.shape
        places = ((torch.arange(num_draws)[:, None] + torch.rand(1, rows)) / num_draws).to(self.weights)
        edges = self.weights.cumsum(0)[:-1].T.contiguous()
        chosen = torch.searchsorted(edges, places.T.contiguous(), right=True).T
        values = self.components[0].sample((num_draws,))
        for place in range(1, count):
            values = torch.where((chosen == place)[..., None], self.components[place].sample((num_draws,)), values)
        return values.to(self.dtype), chosen

    def log_densities(self, values: Tensor) -> Tensor:
        """Returns the log of each component's share of the density, shape (components, draws, rows), float64."""
        each = torch.stack([component.log_prob(values.double()) for component in self.components])
        return each + self.weights.log()[:, None]

    def beside(self, component: dist.TorchDistribution, weight: float) -> Proposal:
        """Returns a mixture with one more component, of some weight."""
        one = torch.full_like(self.weights[:1], weight)
        weights = torch.cat([self.weights * (1 - weight), one])
        elsewhere = torch.cat([self.elsewhere, torch.zeros_like(self.elsewhere[:1])])
        return Proposal([*self.components, component], weights, elsewhere, self.dtype)


def pieces(num_rows: int, numbers: int, like: Tensor) -> Iterator[Tensor]:
    """Yields rows, so many at once that they take little memory at so many numbers each."""
    return iter(torch.arange(num_rows, device=like.device).split(max(1, AT_ONCE // max(1, numbers))))


def find_modes(joint: LocalJoint, loc: Tensor, scale: Tensor) -> Modes | None:
    """Finds normals at the modes of each datum's posterior, from q* and by ascents from draws of the prior.

    Where the posterior is normal, the first normal is the posterior.

    Args:
        joint: The latents of each datum.
        loc: Means of q*, shape (rows, dim).
        scale: Its standard deviations.

    Returns:
        The modes; None in more than 200 dimensions a datum.
    """
    dim = loc.shape[1]
    if dim > MOST_DIMS:
        return None
    draws = joint.prior_draws().to(loc)
    draws = draws.where(draws.isfinite(), loc + 10 * scale * torch.randn_like(draws))
    parts = [
        _modes(joint, loc[rows], scale[rows], draws[:, rows], rows)
        for rows in pieces(joint.num_rows, 2 * dim * dim * num_others(dim), loc)
    ]
    every = {
        name: torch.cat([getattr(part, name) for part in parts], 1) for name in ("loc", "tril", "log_mass", "apart")
    }
    wide = None if dim > FEW_DIMS else (draws.mean(0), draws.std(0))
    return replace(parts[0], **every, correlation=torch.cat([part.correlation for part in parts]), wide=wide)


def num_others(dim: int) -> int:
    """Returns how many other modes are kept in so many dimensions."""
    return min(OTHER_MODES[1], max(OTHER_MODES[0], 160 // dim))


def _modes(joint: LocalJoint, loc: Tensor, scale: Tensor, prior: Tensor, rows: Tensor) -> Modes:
    unit = prior.std(0)
    own = _Peak.at(joint, loc[None], scale[None], unit, rows)
    starts = _starts(joint, prior, unit, rows)
    ends = _climbed(joint, starts, unit, rows)
    others = _Peak.at(joint, _distinct(joint, ends, own.loc, scale, rows), scale[None], unit, rows)
    others = _Peak.at(joint, others.loc, others.narrow, unit, rows)
    both = [torch.cat([getattr(own, name), getattr(others, name)]) for name in ("loc", "tril", "log_p")]
    apart = _has_valley(joint, own, others, rows)
    dim, log_det = loc.shape[1], both[1].diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_mass = both[2] + 0.5 * dim * math.log(2 * math.pi) + log_det
    same = ((others.loc - own.loc).abs() < 1e-2 * scale).all(-1)
    finest = RESOLVED * torch.finfo(loc.dtype).eps * (others.loc.abs() + unit)  # draws of a narrower one are rounded
    narrow = (others.tril.diagonal(dim1=-2, dim2=-1) < finest).any(-1)
    log_mass[1:] = log_mass[1:].masked_fill(same | narrow | ~log_mass[1:].isfinite(), -math.inf)
    apart = torch.cat([torch.zeros_like(apart[:1]), apart & (log_mass[1:] > -math.inf)])
    return Modes(both[0], both[1], log_mass, apart, own.correlation[0], None)


@dataclass(frozen=True)
class _Peak:
    """Normals of a density's curvature, one Newton step from where it was looked at.

    Attributes:
        loc: Shape (peaks, rows, dim).
        tril: Shape (peaks, rows, dim, dim).
        log_p: Log density at loc, shape (peaks, rows).
        narrow: Standard deviations given the other coordinates, shape (peaks, rows, dim).
        correlation: As of :class:`Modes`, shape (peaks, rows).
    """

    loc: Tensor
    tril: Tensor
    log_p: Tensor
    narrow: Tensor
    correlation: Tensor

    @classmethod
    def at(cls, joint: LocalJoint, loc: Tensor, step: Tensor, unit: Tensor, rows: Tensor) -> _Peak:
        """Looks at the curvature by differences of gradients a step to either side along each coordinate.

        Eigenvalues of the precision count by their size, which makes normals of saddle points too, and none is so small
        that the normal is wider than the prior.
        """
        gradient, precision = _curvature(joint, loc, step.expand_as(loc), rows)
        step = step.expand_as(loc).double()
        white = (precision.double() * step[..., None] * step[..., None, :]).nan_to_num(0.0, 0.0, 0.0)
        values, vectors = torch.linalg.eigh(white)
        spread = WIDEST * (unit.double() / step).square().clamp(min=100.0)
        floor = torch.einsum("krij,kri->krj", vectors.square(), spread).reciprocal()
        sizes = torch.maximum(values.abs(), floor)
        factor = step[..., None] * vectors * sizes.rsqrt()[..., None, :]
        tril, failed = torch.linalg.cholesky_ex(factor @ factor.mT)
        tril = torch.where((failed > 0)[..., None, None], torch.diag_embed(step), tril)
        moved = loc + torch.einsum("krij,krlj,krl->kri", factor, factor, gradient.double()).to(loc)
        with torch.no_grad():
            before, after = joint.log_p(loc, rows), joint.log_p(moved, rows)
        better = after > before
        diagonal = torch.einsum("krij,krj->kri", vectors.square(), sizes)
        correlation = (diagonal.log().sum(-1) - sizes.log().sum(-1)) / 2
        return cls(
            loc=torch.where(better[..., None], moved, loc),
            tril=tril.to(loc),
            log_p=torch.where(better, after, before).double(),
            narrow=(step * diagonal.rsqrt()).to(loc),
            correlation=correlation.where(values[..., 0] > floor[..., 0], math.nan),
        )


def _gradient(joint: LocalJoint, values: Tensor, rows: Tensor) -> Tensor:
    """Returns the gradient of log p, 0 where it is not finite, of the shape of the values."""
    values = values.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(joint.log_p(values, rows).sum(), values)
    return gradient.nan_to_num(0.0, 0.0, 0.0)


def _curvature(joint: LocalJoint, loc: Tensor, step: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns gradient and minus the Hessian of log p, shapes (peaks, rows, dim) and (peaks, rows, dim, dim)."""
    count, num_rows, dim = loc.shape
    aside = torch.diag_embed(step).movedim(-1, 1)  # (peaks, coordinate, rows, dim)
    values = torch.stack([loc[:, None] + aside, loc[:, None] - aside])
    found = _gradient(joint, values.reshape(-1, num_rows, dim), rows).reshape(2, count, dim, num_rows, dim)
    half = (found[1] - found[0]).movedim(1, 2) / (2 * step[..., None])
    return found.mean((0, 2)), (half + half.mT) / 2


def _starts(joint: LocalJoint, prior: Tensor, unit: Tensor, rows: Tensor) -> Tensor:
    """Returns points to climb from: of draws of the prior those that are far from each other, and those most likely."""
    with torch.no_grad():
        heights = joint.log_p(prior, rows).nan_to_num(-math.inf, -math.inf, -math.inf)
    best = heights.topk(CLIMBERS // 2, 0).indices
    far = [best[0]]
    nearest = torch.full_like(heights, math.inf)
    while len(far) <= CLIMBERS - len(best):
        last = prior.gather(0, far[-1][None, :, None].expand(1, -1, prior.shape[-1]))
        nearest = torch.minimum(nearest, ((prior - last) / unit).square().sum(-1))
        far.append(nearest.argmax(0))
    chosen = torch.cat([torch.stack(far[1:]), best])
    return prior.gather(0, chosen[..., None].expand(-1, -1, prior.shape[-1]))


def _climbed(joint: LocalJoint, starts: Tensor, unit: Tensor, rows: Tensor) -> Tensor:
    """Climbs by steps that shrink to zero; returns where ascents end, shape (climbers, rows, dim)."""
    way = torch.zeros_like(starts, requires_grad=True)
    adam = torch.optim.Adam([way], lr=STRIDE, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STRIDES)
    for _ in range(STRIDES):
        way.grad = -unit * _gradient(joint, starts + unit * way.detach(), rows)
        adam.step()
        schedule.step()
    return starts + unit * way.detach()


def _distinct(joint: LocalJoint, ends: Tensor, own: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """Returns the best ends of ascents that are apart from q* and from each other, shape (modes, rows, dim)."""
    with torch.no_grad():
        heights = joint.log_p(ends, rows).nan_to_num(-math.inf, -math.inf, -math.inf)
    chosen = own
    for _ in range(num_others(ends.shape[-1])):
        near = ((ends[:, None] - chosen).abs() < scale).all(-1).any(1)
        best = heights.masked_fill(near, -math.inf).max(0)
        new = ends.gather(0, best.indices[None, :, None].expand(1, -1, ends.shape[-1]))
        new = torch.where((best.values > -math.inf)[None, :, None], new, own)
        chosen = torch.cat([chosen, new])
    return chosen[1:]


def _has_valley(joint: LocalJoint, own: _Peak, others: _Peak, rows: Tensor) -> Tensor:
    """Tells whether log p falls by a nat between two peaks, shape (peaks, rows)."""
    lower = torch.minimum(own.log_p, others.log_p)
    valley = torch.zeros_like(lower, dtype=torch.bool)
    with torch.no_grad():
        for share in (0.25, 0.5, 0.75):
            between = joint.log_p(own.loc + share * (others.loc - own.loc), rows).double()
            valley |= between.nan_to_num(-math.inf) < lower - 1
    return valley


def proposal(modes: Modes, loc: Tensor, scale: Tensor) -> Proposal:
    """Makes a mixture of q*, a normal and a Student t at each mode, and in few dimensions one as wide as the prior.

    Args:
        modes: The modes.
        loc: Means of q*, shape (rows, dim).
        scale: Its standard deviations.
    """
    dtype, loc, scale = loc.dtype, loc.double(), scale.double()
    degrees, dim = loc.new_tensor(max(5.0, float(loc.shape[1]))), loc.shape[1]
    shares = 0.5 * modes.log_mass.softmax(0) + 0.5 * (modes.log_mass - modes.log_mass.amax(0) > -8).double()
    shares = shares / shares.sum(0)
    components: list[dist.TorchDistribution] = [dist.Normal(loc, scale).to_event(1)]
    weights, elsewhere = [torch.full_like(shares[0], 0.2)], [torch.zeros_like(modes.apart[0])]
    for place in range(len(modes.loc)):
        at, tril = modes.loc[place].double(), modes.tril[place].double()
        components += [
            dist.MultivariateNormal(at, scale_tril=tril),
            dist.MultivariateStudentT(degrees, at, (1 + 0.5 / dim) * tril),
        ]
        weights += [0.35 * shares[place]] * 2
        elsewhere += [modes.apart[place]] * 2
    if modes.wide is not None:
        mean, deviation = (moment.double() for moment in modes.wide)
        components.append(dist.MultivariateStudentT(loc.new_tensor(5.0), mean, torch.diag_embed(1.5 * deviation)))
        weights.append(torch.full_like(shares[0], 0.3 / dim))
        elsewhere.append(torch.zeros_like(modes.apart[0]))
    stacked = torch.stack(weights)
    return Proposal(components, stacked / stacked.sum(0), torch.stack(elsewhere), dtype)
