"""Distributions, their supports, and the bijections from R^n that reach them."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.constraints as constraints
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import ComposeTransform, ExpTransform, IndependentTransform, SigmoidTransform


def support_of(fn: Any) -> Any:
    """Returns the support of a distribution: the reals where it declares none, as a likelihood need not."""
    try:
        return fn.support
    except NotImplementedError:
        return constraints.real


def bijection(site: Any, fn: Any = None) -> Transform:
    """Returns the bijection from R^n onto a site's support, event dimensions of ``to_event`` unwrapped.

    It is the identity on the reals and ``exp`` on the positives, for which KL divergences exist, and caches its last
    value, so that a sample's density does not lose digits. Where transforms of a prior start from less than all that
    they could take (``AffineTransform`` of a ``Beta``), it goes to the support of what they start from, and on by them:
    what such a distribution says of its support is true of its last transform alone.

    Args:
        site: A sample site, or a message on its way to be one.
        fn: A distribution in its place.

    Raises:
        ValueError: There is none (a discrete or spherical site), in Pyro's own words, or the distribution does not say
            where it lives.
    """
    fn = undressed(site["fn"] if fn is None else fn)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        return _of_all_components(site, fn)
    base, steps = _chain(fn)
    if not steps or _is_told_by_the_last(site, base, steps):
        return _onto(site, fn)
    return ComposeTransform([_caching(step) for step in [*_steps(bijection(site, base)), *steps]])


def _of_all_components(site: Any, fn: Any) -> Transform:
    transform = bijection(site, fn.component_distribution)
    if any(bound.numel() > 1 for bound in tensors_of(transform)):
        raise ValueError(
            f"site '{site['name']}' is a mixture whose components have bounds of their own, and no bijection from R^n "
            f"reaches them all. Give them one support, or make the mixture by an enumerated Categorical."
        )
    return transform


def _chain(fn: Any) -> tuple[Any, list[Transform]]:
    """Returns what a prior's own transforms start from, and these; none where the prior tells its support itself."""
    steps: list[Transform] = []
    of_transforms = torch.distributions.TransformedDistribution.support
    while isinstance(fn, torch.distributions.TransformedDistribution) and type(fn).support is of_transforms:
        steps = [step for transform in fn.transforms for step in _steps(transform)] + steps
        fn = undressed(fn.base_dist)
    return fn, steps


def _is_told_by_the_last(site: Any, base: Any, steps: list[Transform]) -> bool:
    """Tells whether each step of a chain gets all that it could take, so that its end is where the last one ends."""
    reached = [support_of(base), *(step.codomain for step in steps)]
    told = all(_fills(here, step.domain) for here, step in zip(reached, steps, strict=False))
    for step in steps:
        if type(step).log_abs_det_jacobian is Transform.log_abs_det_jacobian or not (step.bijective or told):
            raise ValueError(
                f"site '{site['name']}' is transformed by {type(step).__name__}, which is no bijection, so that it has "
                f"no density to be inferred by. Take a distribution that has one (dist.HalfNormal, "
                f"dist.FoldedDistribution), or sample what stands before that transform and write "
                f"pyro.deterministic('{site['name']}', ...)."
            )
    return told


def _steps(transform: Transform) -> list[Transform]:
    """Returns the steps of a transform, without the event dimensions that ``to_event`` would add."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, ComposeTransform):
        return [part for step in transform.parts for part in _steps(step)]
    return [transform]


def _fills(reached: Any, domain: Any) -> bool:
    """Tells whether what is reached fills a domain, but for a boundary."""
    reached, domain = (_without_events(constraint) for constraint in (reached, domain))
    if reached is domain or (reached is constraints.nonnegative and domain is constraints.positive):
        return True
    return type(reached) is type(domain) and vars(reached) == {} == vars(domain)


def _without_events(constraint: Any) -> Any:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _caching(transform: Transform) -> Transform:
    try:
        return transform.with_cache(1)
    except NotImplementedError:  # one of the user's own
        return transform


def _onto(site: Any, fn: Any) -> Transform:
    """Returns the bijection onto what a distribution says is its support."""
    try:
        support = _without_events(fn.support)
    except NotImplementedError:
        raise ValueError(
            f"site '{site['name']}' is a {type(fn).__name__}, which does not say where it lives, so that nothing can "
            f"be inferred of it. Write it in the class: support = dist.constraints.positive (real, unit_interval, ...)."
        ) from None
    if support is constraints.positive or support is constraints.nonnegative:
        return ExpTransform(cache_size=1)
    if type(support) is type(constraints.unit_interval) and _may_be_open(fn, support):
        return ToInterval(torch.as_tensor(support.lower_bound), torch.as_tensor(support.upper_bound), cache_size=1)
    try:
        with helpful_support_errors(site):
            transform = biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"site '{site['name']}' has the support {support}, which no bijection from R^n reaches. Reparameterize it "
            f"(a covariance, say, by LKJCholesky and scales), or hide it from the guide: "
            f"AutoAmortizedNormal(poutine.block(model, hide=['{site['name']}']))."
        ) from None
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform.with_cache(1)


def _may_be_open(fn: Any, support: Any) -> bool:
    """Tells whether an interval may have no end for some elements, as that of a ``GeneralizedPareto``."""
    high = support.upper_bound
    return not isinstance(fn, torch.distributions.Uniform) if isinstance(high, Tensor) else math.isinf(high)


class ToInterval(Transform):
    """From the reals to intervals, by the sigmoid where these end, and by ``exp`` where they do not.

    Args:
        low: Where they begin.
        high: Where they end; infinite where they do not.
    """

    domain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, low: Tensor, high: Tensor, cache_size: int = 0) -> None:
        super().__init__(cache_size)
        self.low, self.high = low, high
        self.codomain = constraints.interval(low, high)
        self._ends = high.isfinite()
        self._width = torch.where(self._ends, high - low, 1.0)

    def with_cache(self, cache_size: int = 1) -> ToInterval:
        return self if cache_size == self._cache_size else ToInterval(self.low, self.high, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        return self.low + self._width * torch.where(self._ends, SigmoidTransform()(x), x.where(~self._ends, 0.0).exp())

    def _inverse(self, y: Tensor) -> Tensor:
        share = (y - self.low) / self._width
        inside = SigmoidTransform().inv(share.where(self._ends, 0.5))
        return torch.where(self._ends, inside, share.where(~self._ends, 1.0).log())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        inside = self._width.log() - torch.nn.functional.softplus(x) - torch.nn.functional.softplus(-x)
        return torch.where(self._ends, inside, x)


def why_unreached(site: Any) -> str:
    """Says why no normal can be taken to where a continuous latent lives; "" if one can."""
    try:
        bijection(site)
    except ValueError as error:
        return str(error)
    return _why_angle(site) if _is_angle(site) else ""


def _why_angle(site: Any) -> str:
    name, kind = site["name"], type(undressed(site["fn"])).__name__
    return (
        f"site '{name}' is an angle ({kind}): its density on the line comes again after each turn, so that a normal "
        f"there would grow over all turns. Cut the circle where the posterior has no mass, pyro.sample('{name}', "
        f"dist.Uniform(-math.pi, math.pi)), and weigh it, pyro.factor('{name}_prior', math.log(2 * math.pi) + "
        f"dist.{kind}(...).log_prob({name})); or write a direction, dist.ProjectedNormal(torch.zeros(2)), and "
        f"poutine.reparam(model, config={{'{name}': ProjectedNormalReparam()}})."
    )


def _is_angle(site: Any) -> bool:
    """Tells whether the density of a site that is said to live on the reals comes again after each turn."""
    fn, transform = site["fn"], bijection(site)
    if is_improper(fn) or not isinstance(transform, ComposeTransform) or transform.parts:
        return False
    if isinstance(_chain(undressed(fn))[0], torch.distributions.VonMises):  # might be as good as uniform
        return True
    value = some_tensor(fn).new_full(fn.shape(), 0.4)
    with torch.no_grad(), pyro.validation_enabled(False):
        here, *there = (fn.log_prob(value + turns * 2 * math.pi) for turns in (0.0, 0.5, 1.0, 2.0))
    half, one, two = (float((density - here).abs().sum()) for density in there)
    return 0 < half < math.inf and max(one, two) < 1e-4 * half


def tensors_of(transform: Transform) -> list[Tensor]:
    """Returns the tensors that a transform goes by, such as bounds; none if it is the same whatever these are."""
    found: list[Tensor] = []
    for name, value in vars(transform).items():
        for part in value if isinstance(value, (list, tuple)) and name != "_cached_x_y" else [value]:
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, Transform) and name != "_inv":  # which points back
                found += tensors_of(part)
    return found


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
    if support_of(q).is_discrete:
        return q.to_event(prior.event_dim - q.event_dim)
    transform = bijection(site, prior)
    if isinstance(transform, ComposeTransform) and not transform.parts:
        return q.to_event(prior.event_dim)
    if transform.domain.event_dim == 0:
        return dist.TransformedDistribution(q, [transform]).to_event(prior.event_dim)
    q = dist.TransformedDistribution(q.to_event(transform.domain.event_dim), [transform])
    return q.to_event(prior.event_dim - transform.codomain.event_dim)


def without_masks(fn: Any) -> Any:
    """Takes the masks off a distribution; returns it as it is if it has none."""
    if isinstance(fn, dist.MaskedDistribution):
        return without_masks(fn.base_dist)
    if isinstance(fn, torch.distributions.Independent):
        base = without_masks(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


def site_mask(site: Any) -> Tensor | None:
    """Returns which entries of a site no mask covers, shape of its value; None if none is covered."""
    if "entries" in site:  # merged from the sites of a loop
        return site["entries"]
    value, fn = torch.as_tensor(site["value"]), site["fn"]
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
    """Takes masks, the event dimensions of ``to_event`` and Pyro's own expansion off a distribution."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution, ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def generic_value(msg: Message) -> Tensor:
    """Draws a value without special features, near the middle of a site's support; improper priors too."""
    fn = msg["fn"]
    if support_of(fn).is_discrete or is_delta(fn):
        return fn.sample()
    try:
        transform = bijection(msg)
    except ValueError:  # to be refused, unless no data depend on it
        with suppress(NotImplementedError, ValueError):
            value: Tensor = fn.sample()
            fn.log_prob(value)
            if bool(support_of(fn).check(value).all()):
                return value
        raise
    like = some_tensor(fn)
    return transform(like.new_empty(transform.inverse_shape(fn.shape())).uniform_(-1, 1))


def some_tensor(fn: Any) -> Tensor:
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


def is_free(site: Any) -> bool:
    """Tells whether a site is a continuous latent, which has a value in unconstrained space."""
    free = not (site["is_observed"] or site_is_subsample(site))
    return free and not (is_delta(site["fn"]) or support_of(site["fn"]).is_discrete)


def can_be_drawn(fn: Any) -> bool:
    """Tells whether a distribution says how it is drawn from; one with a density only, as a likelihood may be, not."""
    kind, of_torch = type(undressed(fn)), torch.distributions.Distribution
    return kind.sample is not of_torch.sample or kind.rsample is not of_torch.rsample


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
        value = prior_center(site)
    except ValueError:  # a site without a bijection, which a reparameterizer is about to replace, or none guides
        value = site["fn"].sample()
    value._pyro_custom_init = False  # type: ignore[attr-defined]  # reparameterizers may overwrite it without a warning
    return value


def prior_center(site: Any) -> Tensor:
    """Returns a prior's median where that has a closed form, else its mean, else the image of zero.

    Raises:
        ValueError: No bijection reaches the site's support.
    """
    fn = undressed(site["fn"])
    half = some_tensor(fn).new_tensor(0.5)
    for guess in (lambda: fn.icdf(half), lambda: fn.mean):
        try:
            value = guess().detach().expand(site["fn"].shape())
            if bool(bijection(site).inv(value).isfinite().all()):
                return value
        except (NotImplementedError, ValueError, RuntimeError):
            pass
    transform = bijection(site)
    return transform(some_tensor(fn).new_zeros(transform.inverse_shape(site["fn"].shape())))
