"""A guide's distributions under masks: where they count, and where elements have no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_amortize.supports import dressed, some_tensor, support_of, without_masks


def under_masks(msg: Any, q: Any, marks: Tensor | None, idle: bool) -> Any:
    """Takes q to the prior's support, under the masks of the prior but where data depend on it all the same.

    Args:
        msg: The site; its mask is replaced by that of q.
        q: The family's distribution, in unconstrained space.
        marks: Which elements have data; None if all do.
        idle: Whether nothing depends on what a mask covers.
    """
    prior, mask = msg["fn"], msg["mask"]
    unmasked = (mask is None or mask is True) and without_masks(prior) is prior
    if idle or unmasked:
        return dressed(msg, prior, q)
    mask = torch.as_tensor(True if mask is None else mask, device=q.mean.device)
    msg["mask"] = None if marks is None or msg["mask"] is None else marks | mask
    return Counted(dressed(msg, _lifted(prior, marks), q), mask)


def _lifted(fn: Any, marks: Tensor | None) -> Any:
    """Takes the masks of a distribution off the elements that are marked; None marks all."""
    if isinstance(fn, torch.distributions.Independent):
        count = fn.reinterpreted_batch_ndims
        inner = None if marks is None else marks.reshape(marks.shape + (1,) * count)
        return _lifted(fn.base_dist, inner).to_event(count)
    if not isinstance(fn, dist.MaskedDistribution):
        return fn
    fn, mask = _lifted(fn.base_dist, marks), fn._mask
    return fn if marks is None else fn.mask(marks | torch.as_tensor(mask, device=marks.device))


class Counted(dist.MaskedDistribution):
    """A guide's distribution that counts also where a mask covers the prior, and there diverges from nothing.

    Args:
        base_dist: The distribution.
        prior_mask: Where the prior counts.
    """

    def __init__(self, base_dist: Any, prior_mask: Tensor) -> None:
        super().__init__(base_dist, True)
        self.prior_mask = prior_mask

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Counted:
        return Counted(self.base_dist.expand(torch.Size(batch_shape)), self.prior_mask)


@register_kl(Counted, torch.distributions.Distribution)  # type: ignore[untyped-decorator]
@register_kl(Counted, dist.MaskedDistribution)  # type: ignore[untyped-decorator]
def _kl_counted(q: Counted, prior: Any) -> Tensor:
    if without_masks(prior) is not prior or without_masks(q.base_dist) is not q.base_dist:
        raise NotImplementedError
    return torch.where(q.prior_mask, kl_divergence(q.base_dist, prior), -q.base_dist.entropy())


class PriorWithoutData(dist.MaskedMixture):
    """A guide's distribution at elements that have data, and at others the prior, from which it does not diverge.

    Draws of the prior have no gradients: nothing but their density depends on them, which the model's own cancels. So
    q keeps its gradients where the prior has none to give, and NaN under a mask sends none back.
    """

    @property
    def has_rsample(self) -> bool:
        return bool(self.component1.has_rsample)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        own = self.component1.rsample(torch.Size(sample_shape))
        mask = self.mask.reshape(self.mask.shape + (1,) * self.event_dim)
        return torch.where(mask, own, self.component0.sample(torch.Size(sample_shape)))


@register_kl(PriorWithoutData, torch.distributions.Distribution)  # type: ignore[untyped-decorator]
def _kl_prior_without_data(q: PriorWithoutData, prior: Any) -> Tensor:
    return torch.where(q.mask, kl_divergence(q.component1, prior), 0.0)


class PriorAlone(dist.TorchDistribution):
    """A prior that has no ``rsample``, at a site that a guide leaves to the model, from which it does not diverge.

    Its draws need no gradients, for the reason that those of :class:`PriorWithoutData` need none.
    """

    has_rsample = True
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, prior: Any) -> None:
        self.base_dist = prior
        super().__init__(prior.batch_shape, prior.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return support_of(self.base_dist)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PriorAlone:
        return PriorAlone(self.base_dist.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(value)


@register_kl(PriorAlone, torch.distributions.Distribution)  # type: ignore[untyped-decorator]
def _kl_prior_alone(q: PriorAlone, prior: Any) -> Tensor:
    return some_tensor(q.base_dist).new_zeros(q.batch_shape)
