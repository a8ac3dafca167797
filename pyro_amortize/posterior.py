"""The guide's answer for given data, as a distribution over all latent sites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    Transform,
)

from pyro_amortize.answers import NUM_DRAWS, Answers, Derived, Joined, Others, UnknownSite
from pyro_amortize.supports import support_of, undressed

DRAWS = 4096
NAMES_ELSEWHERE = {
    "std": "stddev",
    "scale": "stddev",
    "variance": "stddev",
    "var": "stddev",
    "loc": "mean",
    "mode": "median",
    "quantile": "quantiles(q)",
    "icdf": "quantiles(q)",
    "rsample": "sample(n)",
}
LIMIT = 2**21  # numbers that are held at once beside data and answers


class Posterior:
    """q(latents | data): a distribution a site, all independent given the data.

    But for this: a site whose support depends on another latent is drawn, and has its moments and density, within the
    support that the other's values leave it; its median and quantiles are at the other's median.

    Values are in constrained space and have the shapes of the model's sites, plates included. Sites that the guide
    leaves to the model (imputed observations, forecasts) are not here; ``guide.predictive`` draws them. Discrete
    latents that the model marks for enumeration are summed out of q: they have draws, but no moments. Discrete latents
    that are amortized have ``probs``; sites whose encoder sees one of them are given its mode, in all but ``sample``.

    All answers are dicts of the latents. Asked by name, they hold more: the sites of a loop, ``z_0``, ``z_1``, ..., as
    one, ``mean["z_*"]``, with an axis for the turns after those of the plates; and deterministic sites,
    ``mean["rate"]``, for which the model is run, as it is by then: in ``sample`` at the same draws, in moments,
    medians and quantiles at 1,000 draws of a fixed seed. Other names raise an error that says why they have no answer.

    Args:
        sites: Distribution of every latent site that the guide samples.
        plates: Names of the plates around it, outer to inner.
        discrete: Draws the enumerated sites, given draws of the others (site -> shape (draws, *site's shape)) and
            their number. None without such sites.
        joint: Draws so many times from all sites of the guide. None if these are independent.
        others: What there is to say of other names.
        given: Returns the distributions of all sites given values of some. None if these are independent.
        moving: Sites whose support depends on another latent.
    """

    def __init__(
        self,
        sites: Mapping[str, TorchDistributionMixin],
        plates: Mapping[str, tuple[str, ...]],
        discrete: Callable[[dict[str, Tensor], int], dict[str, Tensor]] | None = None,
        joint: Callable[[int], dict[str, Tensor]] | None = None,
        others: Others | None = None,
        given: Callable[[Mapping[str, Tensor]], Mapping[str, Any]] | None = None,
        moving: Collection[str] = (),
    ) -> None:
        self.sites = dict(sites)
        self.plates = dict(plates)
        self.discrete = discrete
        self.joint = joint
        self.others = others or Others()
        self._deterministic: dict[str, Derived] | None = None
        self.given, self.moving = given, tuple(moving)

    @property
    def _continuous(self) -> dict[str, Any]:
        return {name: fn for name, fn in self.sites.items() if not is_discrete(fn)}

    @property
    def mean(self) -> Answers:
        """Posterior means: closed form on the reals and the positives, else from 4,096 draws of a fixed seed.

        Of the sites that the guide samples; those that are summed out have draws only.
        """
        found = {name: self._moments(name, fn)[0] for name, fn in self._continuous.items()}
        return self._answers("mean", found, self._fixed_draws, lambda draws: draws.mean(0))

    @property
    def stddev(self) -> Answers:
        """Posterior standard deviations, found as the means are."""
        found = {name: self._moments(name, fn)[1] for name, fn in self._continuous.items()}
        return self._answers("stddev", found, self._fixed_draws, lambda draws: draws.std(0))

    @property
    def median(self) -> Answers:
        """Medians in unconstrained space, mapped to the support; of discrete sites the mode."""
        found = {name: typical(fn) for name, fn in self.sites.items()}
        return self._answers("median", found, self._fixed_draws, lambda draws: draws.median(0).values)

    @property
    def probs(self) -> Answers:
        """Probabilities of the discrete sites that are amortized, as the ``probs`` of their distributions."""
        found = {name: _probs(fn) for name, fn in self.sites.items() if is_discrete(fn)}
        return self._answers("probs", found, dict, lambda draws: draws)

    def quantiles(self, quantiles: Sequence[float] | Tensor) -> Answers:
        """Returns quantiles of each dimension in unconstrained space, mapped to the support.

        Args:
            quantiles: Numbers between 0 and 1.

        Returns:
            Site -> tensor of shape (number of quantiles, *site's shape).
        """
        check_quantiles("Posterior.quantiles", quantiles)
        found = {name: _quantiles(fn, quantiles) for name, fn in self._continuous.items()}
        levels = torch.as_tensor(quantiles)
        return self._answers("quantiles", found, self._fixed_draws, lambda d: torch.quantile(d, levels.to(d), 0))

    def sample(self, sample_shape: int | Sequence[int] = ()) -> Answers:
        """Draws jointly from all sites.

        Enumerated sites are drawn from the model, given the draws of the others and the data: q(z) p(c | z, data).
        They take runs of the model, as it is by then, in eval mode; so do deterministic sites, once they are asked for.

        Args:
            sample_shape: Leading shape of the draws, or their number.

        Returns:
            Site -> tensor of shape (*sample_shape, *site's shape).
        """
        lead = (sample_shape,) if isinstance(sample_shape, int) else sample_shape
        if not (isinstance(lead, Sequence) and all(isinstance(size, int) and size >= 0 for size in lead)):
            raise ValueError(f"Posterior.sample: sample_shape={sample_shape!r}. Expected a shape, (10,), or a number.")
        lead = Size(lead)
        draws = self._draw(lead.numel())

        def shaped(value: Tensor) -> Tensor:
            return value.reshape(lead + value.shape[1:])

        @cache
        def deterministic() -> dict[str, Derived]:
            return self.others.deterministic(draws) if lead.numel() else {}

        return self._answers("sample", {name: shaped(v) for name, v in draws.items()}, deterministic, shaped)

    def _draw(self, count: int) -> dict[str, Tensor]:
        if self.joint is None or not count:
            draws = {name: fn.sample(Size([count])) for name, fn in self.sites.items()}
        else:
            draws = self.joint(count)
        return draws | self.discrete(draws, count) if self.discrete is not None and count else draws

    def _answers(
        self,
        what: str,
        values: Mapping[str, Tensor],
        deterministic: Callable[[], Mapping[str, Derived]],
        answer: Callable[[Tensor], Tensor],
    ) -> Answers:
        """Makes an answer that has one of the draws of deterministic sites, too, and of series."""

        def others(name: str) -> Tensor:
            series = {n: one for n, one in self.others.series.items() if set(one.members) <= set(values)}
            if name in series:
                return series[name].stacked(values)
            reason = self._reason(name, what)
            found = {} if reason else deterministic()
            if name in found:
                return answer(found[name].draws)
            known = [*values, *series, *found]
            raise UnknownSite(f"Posterior.{what}: '{name}' {reason or 'is no site of model or guide'}. Known: {known}.")

        return Answers(values, others)

    def _reason(self, name: str, what: str) -> str | None:
        """Says why a name has no answer; None for one that may be a deterministic site."""
        series = self.others.series.get(name)
        example = series.members[0] if series else name
        if example not in self.sites:
            return self.others.reason(name)
        if what == "probs":
            return "is continuous: it has a mean"
        return f"is discrete: it has posterior.probs[{example!r}], and draws"

    def _moments(self, name: str, fn: Any) -> tuple[Tensor, Tensor]:
        if name not in self.moving:
            return _moments(fn)
        return self._joint_draws[name].mean(0), self._joint_draws[name].std(0)

    @cached_property
    def _joint_draws(self) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self._draw(DRAWS)

    def _fixed_draws(self) -> dict[str, Derived]:
        """Returns draws of deterministic sites, of a fixed seed."""
        if self._deterministic is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self._deterministic = self.others.deterministic(self._draw(NUM_DRAWS))
        return self._deterministic

    def log_prob(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns log q in nats of values in constrained space.

        Where the support of a site depends on another latent, that is at its value here, or at its median if it has
        none here; with sample dimensions, value by value.

        Args:
            values: Site -> tensor of the site's shape, or with sample dimensions to its left.

        Returns:
            Site -> tensor of the site's batch shape, sample dimensions to its left.

        Raises:
            ValueError: A name is no site of the guide (enumerated sites are none).
        """
        if not isinstance(values, Mapping):
            site = next(iter(self.sites), "z")
            raise ValueError(
                f"Posterior.log_prob: values is a {type(values).__name__}. Expected a dict from site to its value: "
                f"log_prob({{'{site}': value}})."
            )
        unknown = sorted(set(values) - set(self.sites))
        if unknown:
            reason = self.others.reason(unknown[0]) or "is no site of the guide"
            raise ValueError(f"Posterior.log_prob: '{unknown[0]}' {reason}. Known: {list(self.sites)}.")
        if self.given is None:
            return {name: self.sites[name].log_prob(value) for name, value in values.items()}
        shapes = {name: self.sites[name].shape() for name in values}
        lead = torch.broadcast_shapes(*(v.shape[: v.dim() - len(shapes[n])] for n, v in values.items()))
        rows = {n: v.expand(lead + shapes[n]).reshape(-1, *shapes[n]) for n, v in values.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in values}
        for place in range(lead.numel()):
            row = {name: value[place] for name, value in rows.items()}
            sites = self.given(row)
            for name, value in row.items():
                found[name].append(sites[name].log_prob(value))
        return {name: torch.stack(parts).reshape(lead + parts[0].shape) for name, parts in found.items()}

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property that failed
            return object.__getattribute__(self, name)
        site = next(iter(self.__dict__.get("sites", ())), "z")
        if name in self.__dict__.get("sites", ()):
            meant = f"mean[{name!r}]"
        elif name in NAMES_ELSEWHERE:
            meant = f"{NAMES_ELSEWHERE[name]}[{site!r}]"
        else:
            raise AttributeError(f"Posterior has no '{name}'. For each site: posterior.mean[{site!r}].")
        raise AttributeError(f"Posterior has no '{name}'. Write posterior.{meant}.")

    def __getitem__(self, name: Any) -> NoReturn:
        site = name if name in self.sites else next(iter(self.sites), "z")
        raise TypeError(
            f"Posterior: a site has several answers: posterior.mean[{site!r}], posterior.stddev[{site!r}], "
            f"posterior.quantiles([0.05, 0.95])[{site!r}], posterior.sample(100)[{site!r}]."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "others": Others(self.others.series)}  # without the model and its data

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(fn.shape())}" for name, fn in self.sites.items())
        return f"Posterior({shapes})"


def check_quantiles(function: str, quantiles: Any) -> None:
    """Refuses what is no list of numbers between 0 and 1."""
    levels = torch.as_tensor(quantiles)
    if levels.dim() > 1 or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(
            f"{function}: quantiles of shape {tuple(levels.shape)}, not all between 0 and 1. The first argument is a "
            f"list of them: {function}([0.05, 0.95], ...)."
        )


def is_discrete(fn: Any) -> bool:
    """Whether a distribution of the guide's is discrete."""
    return bool(support_of(fn).is_discrete)


def typical(fn: Any) -> Tensor:
    """Returns the median of each element of a distribution of the guide's; of a discrete one the mode."""
    if isinstance(fn, Joined):
        return fn.each(typical)
    if not is_discrete(fn):
        if isinstance(fn, dist.MaskedMixture):
            return _quantiles(fn, [0.5])[0]
        normal, transforms = normal_underneath(fn)  # type: ignore[misc]
        return _mapped(normal.loc, transforms)
    base = undressed(fn)
    if isinstance(base, torch.distributions.Bernoulli):
        value = (base.logits > 0).to(base.logits.dtype)
    elif isinstance(base, torch.distributions.OneHotCategorical):
        value = torch.nn.functional.one_hot(base.logits.argmax(-1), base.logits.shape[-1]).to(base.logits.dtype)
    else:
        value = base.logits.argmax(-1)
    return value.expand(fn.shape())


def normal_underneath(fn: Any) -> tuple[Any, list[Any]] | None:
    """Takes off masks, event dimensions and transforms; returns the normal and the transforms, or None."""
    transforms: list[Any] = []
    if isinstance(fn, dist.MaskedMixture):
        fn = fn.component1
    while not isinstance(fn, torch.distributions.Normal):
        if isinstance(fn, torch.distributions.TransformedDistribution):
            transforms = [part for t in fn.transforms for part in _parts(t)] + transforms
        fn = getattr(fn, "base_dist", None)
        if fn is None:
            return None
    return fn, transforms


def _parts(transform: Transform) -> list[Transform]:
    """Returns the steps of a transform that change values: torch's own to the positives shifts by nought in the end."""
    base = transform
    while isinstance(base, IndependentTransform):
        base = base.base_transform
    if isinstance(base, ComposeTransform):
        parts = [part for step in base.parts for part in _parts(step)]
        return parts if base is transform or not parts else [transform]
    if isinstance(base, AffineTransform) and bool((torch.as_tensor(base.loc) == 0).all()):
        return [] if bool((torch.as_tensor(base.scale) == 1).all()) else [transform]
    return [transform]


def _probs(fn: Any) -> Tensor:
    if isinstance(fn, Joined):
        example = _probs(fn.parts[0][0])
        return fn.each(_probs, example.dim() - len(fn.batch_shape))
    probs: Tensor = undressed(fn).probs
    return probs


def reach_alike(fn: Any, other: Any) -> bool:
    """Tells whether normals underneath two distributions are taken to the same support in the same way."""
    found = [normal_underneath(each) for each in (fn, other)]
    if found[0] is None or found[1] is None:
        return False
    loc = found[0][0].loc
    one, two = (_mapped(torch.stack([loc, loc + 1]), pair[1]) for pair in found if pair is not None)
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-5)


def _moments(fn: Any) -> tuple[Tensor, Tensor]:
    if isinstance(fn, Joined):
        return fn.each(lambda part: _moments(part)[0]), fn.each(lambda part: _moments(part)[1])
    if isinstance(fn, dist.MaskedMixture):
        pairs = zip(_prior_moments(fn.component0), _moments(fn.component1), strict=True)
        mean, stddev = (torch.where(_on_values(fn), own, prior) for prior, own in pairs)
        return mean, stddev
    base, transforms = normal_underneath(fn)  # type: ignore[misc]
    if not transforms:
        return base.loc, base.scale
    if len(transforms) == 1 and isinstance(transforms[0], ExpTransform):
        mean = (base.loc + base.scale.square() / 2).exp()
        return mean, mean * base.scale.square().expm1().sqrt()
    return _moments_of_draws(fn, base, transforms)


def _moments_of_draws(fn: Any, base: Any, transforms: Sequence[Transform]) -> tuple[Tensor, Tensor]:
    """Takes draws, some at a time, that share their noise between elements, so that an element's answer is its own."""
    batch = len(fn.batch_shape)
    generator = torch.Generator().manual_seed(0)
    shape = (DRAWS, *(1,) * batch, *base.loc.shape[batch:])
    noise = torch.randn(shape, dtype=base.loc.dtype, generator=generator).to(base.loc.device)
    median = _mapped(base.loc, transforms)
    total, squares = torch.zeros_like(median), torch.zeros_like(median)
    for part in noise.split(max(1, LIMIT // max(1, base.loc.numel()))):
        off = _mapped(base.loc + base.scale * part, transforms) - median
        total, squares = total + off.sum(0), squares + off.square().sum(0)
    mean = total / DRAWS
    return median + mean, ((squares / DRAWS - mean.square()).clamp(min=0) * DRAWS / (DRAWS - 1)).sqrt()


def _on_values(fn: Any) -> Tensor:
    """Which entries of the values of a mixture by elements are the guide's own."""
    mask: Tensor = fn.mask.reshape(fn.mask.shape + (1,) * len(fn.event_shape))
    return mask.expand(fn.shape())


def _prior_moments(fn: Any) -> tuple[Tensor, Tensor]:
    try:
        if isinstance(undressed(fn), torch.distributions.VonMises):  # torch's variance is that of directions
            raise NotImplementedError
        return fn.mean, fn.stddev
    except NotImplementedError:
        draws = _draws(fn, DRAWS)
        return draws.mean(0), draws.std(0)


def prior_median(fn: Any) -> Tensor:
    """Returns the median of each element of a distribution.

    It is exact where there is a quantile function, and where the density is symmetric about the location or the mean;
    else that of 4,096 draws of a fixed seed.
    """
    return _prior_quantiles(fn, torch.tensor([0.5]))[0]


def _prior_quantiles(fn: Any, levels: Tensor) -> Tensor:
    """Returns quantiles of each element, shape (levels, *shape of a value), found as :func:`prior_median` says."""
    try:
        value: Tensor = undressed(fn).icdf(levels.reshape((-1,) + (1,) * len(fn.shape())))
        return value.expand((-1, *fn.shape()))
    except NotImplementedError:
        pass
    levels = levels.reshape((-1,) + (1,) * len(fn.shape()))
    centre = _centre(fn)
    if bool((levels == 0.5).all()) and not bool(centre.isnan().any()):
        return centre.expand(levels.shape[:1] + centre.shape)
    ordered = _draws(fn, DRAWS).movedim(0, -1).contiguous().sort(-1).values.movedim(-1, 0)  # quicker than along rows
    places = levels.flatten().to(ordered.device, torch.float64) * (DRAWS - 1)
    low, high = ordered[places.floor().long()], ordered[places.ceil().long()]
    if is_discrete(fn):
        return low
    share = (places % 1).to(ordered.dtype).reshape(levels.shape)
    found = torch.where(low == high, low, low + share * (high - low))  # infinite draws have no difference
    return torch.where((levels.to(found) == 0.5) & ~centre.isnan(), centre, found)


def _centre(fn: Any) -> Tensor:
    """Returns for each element what its density is symmetric about, NaN where that is not known.

    It is symmetric if most draws and their images in the centre have the same density, up to rounding.
    """
    plain = copy.copy(undressed(fn))
    plain._validate_args = False
    draws = _draws(plain, 64)
    found = torch.full_like(draws[0], torch.nan) if draws.is_floating_point() else torch.full(plain.shape(), torch.nan)
    for guess in () if is_discrete(fn) else (lambda: plain.loc, lambda: plain.mean):
        try:
            images = 2 * guess() - draws
            inside = plain.support.check(images).reshape(len(draws), *plain.batch_shape, -1).all(-1)
            images = torch.where(inside.reshape(inside.shape + (1,) * plain.event_dim), images, draws)
            here, there = plain.log_prob(draws), plain.log_prob(images)
        except (NotImplementedError, AttributeError, ValueError, RuntimeError):
            continue
        same = (inside & ((here - there).abs() < 1e-3 * (1 + here.abs()))).double().mean(0) > 0.8
        same = same.reshape(same.shape + (1,) * plain.event_dim)
        found = torch.where(same & found.isnan(), guess(), found)
    return found.expand(fn.shape())


def _draws(fn: Any, count: int) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws: Tensor = fn.sample((count,))
    return draws


def _quantiles(fn: Any, quantiles: Sequence[float] | Tensor) -> Tensor:
    if isinstance(fn, Joined):
        return fn.each(lambda part: _quantiles(part, quantiles))
    if isinstance(fn, dist.MaskedMixture):
        own = _quantiles(fn.component1, quantiles)
        return torch.where(_on_values(fn), own, _prior_quantiles(fn.component0, torch.as_tensor(quantiles).to(own)))
    base, transforms = normal_underneath(fn)  # type: ignore[misc]
    levels = torch.as_tensor(quantiles, dtype=base.loc.dtype, device=base.loc.device)
    levels = levels.reshape((-1,) + (1,) * base.loc.dim())
    values = _mapped(base.icdf(levels), transforms)
    if ComposeTransform(list(transforms)).domain.event_dim:
        return values
    low, high = (_mapped(base.icdf(torch.full_like(levels[:1], level)), transforms) for level in (0.25, 0.75))
    return torch.where(low <= high, values, _mapped(base.icdf(1 - levels), transforms))  # where bijections decrease


def _mapped(value: Tensor, transforms: Sequence[Transform]) -> Tensor:
    for transform in transforms:
        value = transform(value)
    return value
