"""The local latents of each datum as a vector in unconstrained space, and log p(data, latents) as a function of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import ComposeTransform

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.capture import Recorded
from pyro_amortize.densities import Evaluation, scale_of
from pyro_amortize.enumeration import side_by_side
from pyro_amortize.minibatch import Minibatches, exact_minibatches
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.posterior import normal_underneath
from pyro_amortize.subsamples import Subsample, covering
from pyro_amortize.supports import bijection, tensors_of

PRIOR_DRAWS = 64


class LocalJoint:
    """log p(x_n, u_n | globals) of every datum n at once, where u_n holds its latents in unconstrained space.

    q is normal there: ``loc`` and ``scale`` are the guide's answer. It runs the model alone, for all data or some of
    them, with gradients. To be used inside :func:`~pyro_amortize.parameters.preserved` with its messages blocked.

    Args:
        model: The model, its global latents conditioned.
        guide: Its guide, conditioned alike.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        plan: The plan of the two.
        plate: The plate whose elements are the data; None if they cannot be told apart, and count as one datum.

    Attributes:
        loc: Means of q, shape (rows, dim).
        scale: Standard deviations of q, of the same shape.
        blocks: The block of each coordinate, shape (dim,): its place in the plan.

    Raises:
        NotImplementedError: q is no normal in unconstrained space for each datum.
    """

    def __init__(
        self,
        model: Model,
        guide: Model,
        args: Args,
        kwargs: Kwargs,
        plan: AmortizationPlan,
        plate: str | None,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.plan, self.plate = plan, plate
        self.evaluation = Evaluation(model, guide, args, kwargs)
        self.frame = self.evaluation.frames[plate] if plate is not None else None
        partial = [frame.name for frame in self.evaluation.frames.values() if frame.size < frame.full_size]
        self.subsamples = plate in partial
        if set(partial) - {plate}:
            raise NotImplementedError(f"plate '{partial[0]}' subsamples itself, and its elements are not judged apart")
        self._recorded: Callable[[Tensor, Tensor], Tensor] = Recorded(self._of_rows)
        self.sites = self._sites()
        self.loc, self.scale, weight = (
            torch.cat([getattr(site, what).reshape(self.num_rows, -1) for site in self.sites], -1)
            for what in ("loc", "scale", "weight")
        )
        self._masked = weight == 0 if bool((weight == 0).any()) else None
        self._weight = torch.where(weight == 0, 1.0, weight)
        places = [torch.full((site.width,), self._place(site.name)) for site in self.sites]
        self.blocks = torch.cat(places)

    @property
    def num_rows(self) -> int:
        """Number of data."""
        return 1 if self.frame is None else self.frame.full_size

    def log_p(self, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns log p(x_n, u_n | globals) in nats, the Jacobian of constrained space included.

        Coordinates under a mask, which the model does not count, have the guide's normals for a density.

        Args:
            values: Shape (draws, rows, dim).
            rows: Which data these are; None for all.

        Returns:
            Shape (draws, rows).
        """
        rows = torch.arange(self.num_rows) if rows is None else rows
        rows = rows.to(values.device)
        log_p = self._in_subsamples(values, rows) if self.subsamples else self._recorded(values, rows)
        if self._masked is not None:
            free = _normal(self.loc[rows], self.scale[rows]).log_prob(values)
            log_p = log_p + torch.where(self._masked[rows], free, 0.0).sum(-1)
        return log_p

    def under(self, model: Model) -> LocalJoint:
        """Returns this of another model, the same but for what it is conditioned on, with gradients by that too."""
        other = copy.copy(self)
        other.model, other.evaluation = model, copy.copy(self.evaluation)
        other.evaluation.model = model
        other._recorded = other._of_rows
        return other

    def log_q(self, values: Tensor, loc: Tensor, scale: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns the log density in nats of normals at values, shape (draws, rows, dim), summed to (draws, rows)."""
        weight = self._weight if rows is None else self._weight[rows]
        return (_normal(loc, scale).log_prob(values) * weight).sum(-1)

    def _of_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """Runs the model on some rows of the data; on all of them, if there is no other way."""
        if len(rows) == self.num_rows:
            return self._log_p(values[:, rows.argsort()], None)[:, rows]
        if self._way is None:
            everything = self.loc.expand(len(values), -1, -1)
            return self._log_p(everything.index_copy(1, rows, values), None)[:, rows]
        args, kwargs, _ = self._way.rows(rows)
        with Subsample(self._way.plate.name, rows) if self._way.inject else nullcontext():
            return self._log_p(values, rows, args, kwargs)

    def prior_draws(self) -> Tensor:
        """Returns 64 draws of the latents from the model, shape (draws, rows, dim); NaN where there are none."""
        model = side_by_side(self.model, PRIOR_DRAWS, self.evaluation.nesting)
        nodes: dict[str, Any] = {}
        try:
            if not self.subsamples and self.evaluation.can_vectorize(self.plate):
                with torch.no_grad():
                    nodes = poutine.trace(model).get_trace(*self.args, **self.kwargs).nodes
        except (NotImplementedError, ValueError, RuntimeError):  # a flat prior has no draws
            pass
        parts = []
        for site in self.sites:
            if site.name in nodes:
                draws = site.unconstrained(nodes[site.name])
            else:
                draws = site.loc.new_full((PRIOR_DRAWS, *site.loc.shape), torch.nan)
            parts.append(draws.reshape(PRIOR_DRAWS, self.num_rows, -1))
        return torch.cat(parts, -1)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        """Returns means and standard deviations of the latents under the model, of 64 draws; 0 and 1 if improper."""
        draws = self.prior_draws()
        known = draws.isfinite().all(0)
        loc, scale = draws.mean(0), draws.std(0).clamp(min=1e-3)
        return loc.where(known, torch.zeros_like(loc)), scale.where(known, torch.ones_like(scale))

    def by_site(self, loc: Tensor, scale: Tensor) -> Iterator[tuple[Coordinates, Tensor, Tensor]]:
        """Yields each site with its means and standard deviations, all data's, in the normal's own shape."""
        start = 0
        for site in self.sites:
            here = slice(start, start + site.width)
            yield site, site.shaped(loc[None, :, here])[0], site.shaped(scale[None, :, here])[0]
            start += site.width

    def _place(self, name: str) -> int:
        planned = self.plan.turn_of(name)[0]
        return next(i for i, block in enumerate(self.plan.blocks) if planned in block.sites)

    def _sites(self) -> list[Coordinates]:
        """Reads the guide's answer for all data."""
        if not self.subsamples:
            return self._sites_in_sight()
        parts = []
        for indices, new in covering(self.frame):  # type: ignore[arg-type]
            with Subsample(self.plate, indices):  # type: ignore[arg-type]
                parts.append([site.of(new) for site in self._sites_in_sight()])
        return [_joined(pieces) for pieces in zip(*parts, strict=True)]

    def _sites_in_sight(self) -> list[Coordinates]:
        """Reads the guide's answer for the data that one run of it sees."""
        names = {site for block in self.plan.blocks if block.amortized for site in block.sites}
        first, again = (self._answer(seed) for seed in (0, 1))
        local = [name for name in first if self.plan.turn_of(name)[0] in names and self._is_inside(first[name])]
        found = [Coordinates(first[name], self.plate) for name in local]
        for site, other in zip(found, (Coordinates(again[name], self.plate) for name in local), strict=True):
            if not (torch.allclose(site.loc, other.loc) and torch.allclose(site.scale, other.scale)):
                raise NotImplementedError(
                    f"site '{site.name}' of the guide depends on its draw of another latent, so it has no table"
                )
        return found

    def _answer(self, seed: int) -> dict[str, Any]:
        with preserved(self.guide, evaluating=True), torch.no_grad():
            pyro.set_rng_seed(seed)
            trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
        return {name: site for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)}

    def _is_inside(self, site: Any) -> bool:
        return self.plate is None or any(frame.name == self.plate for frame in site["cond_indep_stack"])

    @cached_property
    def _way(self) -> Minibatches | None:
        """How the model is run on some rows; None if only on all."""
        found = exact_minibatches(self.model, self.args, self.kwargs, None, tuple(self.evaluation.enumerated))
        return found if isinstance(found, Minibatches) and found.plate.name == self.plate else None

    def _in_subsamples(self, values: Tensor, rows: Tensor) -> Tensor:
        """Runs the model on subsamples of its own size, the last one filled up with other rows."""
        size, pieces = self.frame.size, []  # type: ignore[union-attr]
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            others = (
                torch.ones(self.num_rows, dtype=torch.bool, device=rows.device)
                .index_fill(0, part, False)
                .nonzero()
                .flatten()
            )
            indices = torch.cat([part, others[: size - len(part)]])
            filled = self.loc[indices].expand(len(values), -1, -1)
            filled = torch.cat([values[:, start : start + size], filled[:, len(part) :]], 1)
            with Subsample(self.plate, indices):  # type: ignore[arg-type]
                pieces.append(self._log_p(filled, indices)[:, : len(part)])
        return torch.cat(pieces, 1)

    def _log_p(
        self,
        values: Tensor,
        rows: Tensor | None,
        args: Args | None = None,
        kwargs: Kwargs | None = None,
    ) -> Tensor:
        """Runs the model on the data as the arguments have them."""
        evaluation = self.evaluation
        if args is not None and kwargs is not None and rows is not None:
            evaluation = evaluation.on(args, kwargs, self.plate, len(rows))  # type: ignore[arg-type]
        raw, start = {}, 0
        for site in self.sites:
            raw[site.name] = site.shaped(values[..., start : start + site.width])
            start += site.width
        if all(site.is_fixed for site in self.sites):
            images = {site.name: site.constrained(raw[site.name]) for site in self.sites}
            log_p = evaluation.at({name: value for name, (value, _) in images.items()}, self.plate)
            log_dets = {name: log_det for name, (_, log_det) in images.items()}
        else:  # each support as the model has it there
            log_p, log_dets = evaluation.at_unconstrained(raw, self.plate)
        log_p = log_p[:, None] if self.plate is None else log_p
        return log_p + sum(site.weighed(log_dets[site.name], rows) for site in self.sites)


class Coordinates:
    """A site of q: where its rows stand, and how unconstrained values reach its support.

    Attributes:
        loc: Means, shape (rows, rest): rows first, or one row of all.
        axis: The axis of the rows in the site's own shape, from the right.
        is_fixed: Whether the support is the same for all elements, and whatever the other latents are.
    """

    def __init__(self, site: Any, plate: str | None) -> None:
        self.name, fn = site["name"], site["fn"]
        found = normal_underneath(fn)
        if found is None:
            raise NotImplementedError(f"site '{self.name}' of the guide is a {type(fn).__name__}, no normal underneath")
        base, transforms = found
        self.transform = ComposeTransform(transforms)
        self.axis: int | None = None
        if plate is not None:
            frame = next(frame for frame in site["cond_indep_stack"] if frame.name == plate)
            self.axis = frame.dim - (base.loc.dim() - len(fn.batch_shape))
        self.shape = base.loc.shape
        self.loc, self.scale = (self._rows_first(moment.detach()) for moment in (base.loc, base.scale))
        self.weight = self._rows_first(_weight(site, plate, base.loc.dim()).to(base.loc).expand(self.shape))
        self.width = self.loc[0].numel()
        self.is_fixed = not tensors_of(self.transform)

    def of(self, rows: Tensor) -> Coordinates:
        """Keeps some rows."""
        self.loc, self.scale, self.weight = self.loc[rows], self.scale[rows], self.weight[rows]
        return self

    def shaped(self, values: Tensor) -> Tensor:
        """Brings values, shape (draws, rows, width), to the site's own shape, draws to its left."""
        if self.axis is None:
            return values.reshape(len(values), *self.shape)
        return values.reshape(*values.shape[:2], *self.loc.shape[1:]).movedim(1, self.axis)

    def constrained(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Maps values, shape (draws, *the normal's own), to the support; returns the log Jacobian too."""
        image = self.transform(values)
        return image, torch.as_tensor(self.transform.log_abs_det_jacobian(values, image))

    def weighed(self, log_det: Tensor, rows: Tensor | None) -> Tensor:
        """Sums a log Jacobian, shape (draws, *the normal's own less what is taken together), to (draws, rows)."""
        weight = self.weight if rows is None else self.weight[rows]
        gone = 1 + len(self.shape) - log_det.dim()
        log_det = log_det[:, None] if self.axis is None else log_det.movedim(self.axis + gone, 1)
        weight = weight.reshape(*weight.shape[: weight.dim() - gone], -1)[..., 0] if gone else weight
        return (log_det * weight).reshape(*log_det.shape[:2], -1).sum(-1)

    def unconstrained(self, site: Any) -> Tensor:
        """Maps draws of the site, as a run of the model for several has them, to shape (draws, rows, rest)."""
        values = bijection(site).inv(site["value"]).to(self.loc)
        values = values.reshape(len(values), *self.shape)
        return torch.stack([self._rows_first(value) for value in values])

    def _rows_first(self, value: Tensor) -> Tensor:
        return value[None] if self.axis is None else value.movedim(self.axis, 0)


def _normal(loc: Tensor, scale: Tensor) -> Any:
    return torch.distributions.Normal(loc, scale, validate_args=False)


def _joined(pieces: tuple[Coordinates, ...]) -> Coordinates:
    first = pieces[0]
    for what in ("loc", "scale", "weight"):
        setattr(first, what, torch.cat([getattr(piece, what) for piece in pieces]))
    return first


def _weight(site: Any, plate: str | None, dims: int) -> Tensor:
    """What the density of each entry of a site of q counts, in the dimensions of the normal underneath."""
    fn = site["fn"]
    weight = torch.as_tensor(scale_of(site, plate), dtype=torch.float64).expand(fn.batch_shape)
    if site["mask"] is not None:
        weight = weight * site["mask"]
    weight = weight.reshape(weight.shape + (1,) * (dims - weight.dim()))
    while fn is not None:
        if type(fn).__name__ == "MaskedDistribution":
            mask = torch.as_tensor(fn._mask).expand(fn.batch_shape)
            weight = weight * mask.reshape(mask.shape + (1,) * (dims - mask.dim()))
        if type(fn).__name__ == "MaskedMixture":  # the guide's own entries, and the prior's, which count nothing
            weight = weight * fn.mask.reshape(fn.mask.shape + (1,) * (dims - fn.mask.dim()))
            fn = fn.component1
        else:
            fn = getattr(fn, "base_dist", None)
    return weight
