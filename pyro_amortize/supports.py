"""Distributions, their supports, and the bijections from R^n that reach them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import pyro.distributions.constraints as constraints
import torch
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.infer.autoguide.utils import helpful_support_errors
from torch import Tensor
from torch.distributions import Transform, biject_to, kl_divergence, register_kl
from torch.distributions.transforms import ComposeTransform, ExpTransform, IndependentTransform


def bijection(site: Any, fn: Any = None) -> Transform:
    """Returns the bijection from R^n onto a site's support, event dimensions of ``to_event`` unwrapped.

    It is the identity on the reals and ``exp`` on the positives, for which KL divergences exist, and caches its last
    value, so that a sample's density does not lose digits.

    Args:
        site: A sample site, or a message on its way to be one.
        fn: A distribution in its place.

    Raises:
        ValueError: There is none (a discrete or spherical site), in Pyro's own words.
    """
    support = (site["fn"] if fn is None else fn).support
    while isinstance(support, constraints.independent) or type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    if support is constraints.positive or support is constraints.nonnegative:
        return ExpTransform(cache_size=1)
    try:
        with helpful_support_errors(site):
            transform = biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"site '{site['name']}' has the support {support}, which no bijection from R^n reaches. Reparameterize it "
            f"(a covariance, say, by LKJCholesky and scales), or hide it from the guide: "
            f"AutoAmortized(poutine.block(model, hide=['{site['name']}']))."
        ) from None
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform.with_cache(1)


def unconstrained_shape(site: dict[str, Any]) -> torch.Size:
    """Returns the shape of a site's value in unconstrained space, batch dimensions included."""
    shape: torch.Size = bijection(site).inverse_shape(site["fn"].shape())
    return shape


def dressed(site: Any, prior: Any, q: Any) -> Any:
    """Takes q to the support of a prior, and puts on the masks and event dimensions that the prior has."""
    if isinstance(prior, dist.MaskedDistribution):
        return dressed(site, prior.base_dist, q).mask(prior._mask)
    if isinstance(prior, torch.distributions.Independent):
        return dressed(site, prior.base_dist, q).to_event(prior.reinterpreted_batch_ndims)
    if q.support.is_discrete:
        return q.to_event(prior.event_dim - q.event_dim)
    transform = bijection(site, prior)
    if isinstance(transform, ComposeTransform) and not transform.parts:
        return q.to_event(prior.event_dim)
    if transform.domain.event_dim == 0:
        return dist.TransformedDistribution(q, [transform]).to_event(prior.event_dim)
    q = dist.TransformedDistribution(q.to_event(transform.domain.event_dim), [transform])
    return q.to_event(prior.event_dim - transform.codomain.event_dim)


class PriorWithoutData(dist.MaskedMixture):
    """A guide's distribution at elements that have data, and at others the prior, from which it does not diverge.

    Draws of the prior need no gradients: nothing but their density depends on them, which the model's own cancels. So
    the guide's draws keep theirs where the prior has none to give.
    """

    @property
    def has_rsample(self) -> bool:
        return bool(self.component1.has_rsample)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        prior = self.component0.rsample if self.component0.has_rsample else self.component0.sample
        own = self.component1.rsample(shape)
        mask = self.mask.reshape(self.mask.shape + (1,) * self.event_dim)
        return torch.where(mask, own, prior(shape))


@register_kl(PriorWithoutData, torch.distributions.Distribution)  # type: ignore[untyped-decorator]
def _kl_prior_without_data(q: PriorWithoutData, prior: Any) -> Tensor:
    return torch.where(q.mask, kl_divergence(q.component1, prior), 0.0)


def without_masks(fn: Any) -> Any:
    """Takes the masks off a distribution."""
    if isinstance(fn, dist.MaskedDistribution):
        return without_masks(fn.base_dist)
    if isinstance(fn, torch.distributions.Independent):
        return without_masks(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def site_mask(site: Any) -> Tensor | None:
    """Returns which entries of a site count, shape of its value; None if all do."""
    if "entries" in site:  # merged from the sites of a loop
        return site["entries"]  # type: ignore[no-any-return]
    value, fn = site["value"], site["fn"]
    masks = [] if site["mask"] is None else [(site["mask"], len(fn.event_shape))]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, len(fn.event_shape)))
        fn = fn.base_dist
    found = None
    for mask, event_dim in masks:
        mask = torch.as_tensor(mask, device=value.device)
        mask = mask.reshape(mask.shape + (1,) * event_dim)
        found = mask if found is None else found & mask
    return None if found is None else found.expand(torch.broadcast_shapes(found.shape, value.shape))


def is_enumerated(site: Any) -> bool:
    """Tells whether a discrete latent is marked to be summed out, as ``TraceEnum_ELBO`` does in a model."""
    marked = not site["is_observed"] and site["infer"].get("enumerate") == "parallel"
    return bool(marked and getattr(site["fn"], "has_enumerate_support", False))


def logits_shape(fn: Any) -> tuple[int, ...] | None:
    """Returns the shape of the logits behind one entry of a discrete value, None if there are none.

    It is (categories,) of a ``Categorical``, and () of a ``Bernoulli`` and of a one-hot value.
    """
    base = undressed(fn)
    if isinstance(base, (torch.distributions.Bernoulli, torch.distributions.OneHotCategorical)):
        return ()
    return tuple(base.logits.shape[-1:]) if isinstance(base, torch.distributions.Categorical) else None


def prior_logits(fn: Any) -> Tensor:
    """Returns the logits of a discrete distribution, of the shape of its values, then that of :func:`logits_shape`."""
    logits: Tensor = undressed(fn).logits
    return logits.expand(fn.shape() + (logits_shape(fn) or ()))


def with_logits(prior: Any, logits: Tensor, present: Tensor | None) -> Any:
    """Returns the distribution of a discrete prior's kind that has these logits, for elements that are present.

    Others keep the prior's. There are no event dimensions but those of one-hot values.
    """
    if present is not None:
        lacking = prior.event_dim + len(logits_shape(prior) or ())
        logits = torch.where(present.reshape(present.shape + (1,) * lacking), logits, prior_logits(prior))
    return type(undressed(prior))(logits=logits)


def undressed(fn: Any) -> Any:
    """Takes masks and the event dimensions of ``to_event`` off a distribution."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


def generic_value(msg: Any) -> Tensor:
    """Draws a value without special features, near the middle of a site's support; improper priors too."""
    fn = msg["fn"]
    if fn.support.is_discrete or is_delta(fn):
        return fn.sample()
    transform = bijection(msg)
    like = _some_tensor(fn)
    return transform(like.new_empty(transform.inverse_shape(fn.shape())).uniform_(-1, 1))


def _some_tensor(fn: Any) -> Tensor:
    """A floating tensor of the distribution's dtype and device."""
    fn = undressed(fn)
    for value in [*vars(fn).values(), *vars(getattr(fn, "base_dist", fn)).values()]:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return torch.empty(())


def is_delta(fn: Any) -> bool:
    """Tells whether a distribution is a point mass, however wrapped."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def is_improper(fn: Any) -> bool:
    """Tells whether a distribution cannot be drawn from, however wrapped."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform)


def init_to_center(site: Any) -> Tensor:
    """Starts a site at its prior's median where that has a closed form, else at its mean, else at the image of zero.

    One of the functions that ``init_loc_fn`` takes. It draws nothing, so wide priors start where narrow ones do.
    """
    try:
        value = _center(site)
    except ValueError:  # a site without a bijection, which a reparameterizer is about to replace
        value = init_to_feasible(site)
    value._pyro_custom_init = False  # type: ignore[attr-defined]  # reparameterizers may overwrite it without a warning
    return value


def _center(site: Any) -> Tensor:
    fn = undressed(site["fn"])
    half = _some_tensor(fn).new_tensor(0.5)
    for guess in (lambda: fn.icdf(half), lambda: fn.mean):
        try:
            value = guess().detach().expand(site["fn"].shape())
            if bool(bijection(site).inv(value).isfinite().all()):
                return value
        except (NotImplementedError, ValueError, RuntimeError):
            pass
    transform = bijection(site)
    return transform(_some_tensor(fn).new_zeros(transform.inverse_shape(site["fn"].shape())))
