"""A model, a guide and data, turned into log p and log q of draws from the guide, per datum. Trains nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_amortize.bars import progress_bar
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.enumeration import CHUNK, DRAWS, Tied, enumerating, num_values, side_by_side, summed_out
from pyro_amortize.missing import refuse_nan
from pyro_amortize.parameters import preserved
from pyro_amortize.structure import plates_of
from pyro_amortize.subsamples import Subsample, covering
from pyro_amortize.supports import is_delta, is_enumerated, support_of
from pyro_amortize.unconstrained import Unconstrained

H = TypeVar("H", bound=Messenger)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Setting = tuple[Model, Model, tuple[Any, ...], dict[str, Any]]

OF_PYRO = "_unconstrained"
"""How Pyro's ``AutoNormal`` names the auxiliary site of a latent."""


@dataclass(frozen=True)
class Densities:
    """Log densities, in nats, of draws from a guide.

    Attributes:
        log_p: log p(data, latents): shape (draws, rows) if per datum of a plate, else (draws,). Discrete latents that
            the model marks for enumeration are summed out, unless the guide samples them.
        log_q: log q(latents), of the same shape.
    """

    log_p: Tensor
    log_q: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """Log p - log q: its mean over draws estimates the ELBO."""
        return self.log_p - self.log_q


def log_densities(
    model: Model,
    guide: Model,
    args: Args,
    kwargs: Kwargs,
    *,
    plate: str | None = None,
    num_draws: int = 1000,
    seed: int = 0,
    title: str | None = None,
) -> Densities:
    """Draws from a guide and returns the log densities of the draws.

    Modules run in eval mode. Draws are made in one run of the model where that gives what a run each gives, which is
    tried first. Per datum, only the plate's own sites are counted, and the plate's subsampling scale is left out; a
    plate that subsamples itself is walked through, all its elements once. Of the guide's sites those are counted that
    it draws, Pyro's auxiliary ones among them; not values that model and guide are both given.

    Args:
        model: The model, its global latents conditioned where densities are wanted per datum.
        guide: Its guide, conditioned alike.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        plate: Name of the plate whose elements are the data; None for totals.
        num_draws: Number of draws.
        seed: Of the draws; two guides of the same sites get common random numbers.
        title: What a progress bar says; None for none.

    Raises:
        ValueError: The model has no such plate, or the guide lacks a latent or the plate around one.
        NotImplementedError: The guide draws several latents together, and only some of them are asked for.
    """
    with preserved(model, guide, evaluating=True), torch.no_grad(), poutine.block():
        pyro.set_rng_seed(seed)
        evaluation = Evaluation(model, guide, args, kwargs)
        evaluation.refuse_other_densities(plate)
        if plate is None:
            return evaluation.draws(None, num_draws, seed, title)
        parts, order = [], []
        if plate not in evaluation.frames:
            raise ValueError(f"log_densities: the model has no plate '{plate}'. Known: {sorted(evaluation.frames)}.")
        evaluation.refuse_other_plates(plate)
        for indices, new in covering(evaluation.frames[plate]):
            with Subsample(plate, indices):
                part = evaluation.draws(plate, num_draws, seed, title)
            parts.append((part.log_p[:, new], part.log_q[:, new]))
            order.append(indices[new])
        log_p, log_q = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
        back = torch.argsort(torch.cat(order))
        return Densities(log_p[:, back], log_q[:, back])


def log_ratios(calls: Iterable[AbstractContextManager[Setting]]) -> Tensor:
    """Returns log p - log q, totals in nats, of one draw from the guide in each of several calls of one model.

    Args:
        calls: For each a context that yields model, guide and arguments, which differ in their rows only, with the
            handlers that rescale these to all rows on model and guide.

    Returns:
        Shape (calls,).
    """
    ratios, evaluation = [], None
    for call in calls:
        with call as (model, guide, args, kwargs):
            with preserved(model, guide, evaluating=True, random_state=False), torch.no_grad(), poutine.block():
                if evaluation is None:
                    evaluation = Evaluation(model, guide, args, kwargs)
                    evaluation.refuse_other_densities(None)
                ratios.append(evaluation.once(model, guide, args, kwargs).log_ratio)
    return torch.cat(ratios)


def refuse_other_plates(model: Model, guide: Model, args: Args, kwargs: Kwargs, plate: str) -> None:
    """Refuses a guide that names a plate of the model otherwise.

    Raises:
        ValueError: It does, for some latent in the plate.
    """
    with preserved(model, guide, evaluating=True), torch.no_grad(), poutine.block():
        Evaluation(model, guide, args, kwargs).refuse_other_plates(plate)


def refuse_other_rows(guide: Model, whole: Arguments, some: Setting, plate: str, count: int) -> None:
    """Refuses a guide that, once it has seen all rows, does not run on some.

    Args:
        guide: The guide.
        whole: Positional and keyword arguments for all rows.
        some: Model, guide, and arguments for some rows.
        plate: The plate of the rows.
        count: How many these are.

    Raises:
        ValueError: It has another number of elements of the plate.
        RuntimeError, IndexError: It fails.
    """
    model, guide_of_some, args, kwargs = some
    with preserved(model, guide, evaluating=True), torch.no_grad(), poutine.block():
        poutine.trace(guide).get_trace(*whole[0], **whole[1])
        trace = poutine.trace(guide_of_some).get_trace(*args, **kwargs)
    for name, site in trace.iter_stochastic_nodes():
        sizes = {frame.name: int(frame.size) for frame in site["cond_indep_stack"]}
        if sizes.get(plate, count) not in (count, -1):
            raise ValueError(
                f"log_densities: site '{name}' of the guide has {sizes[plate]} elements of plate '{plate}' where the "
                f"call has {count}. Write a guide for any number of rows, or take AutoAmortizedNormal(model)."
            )


def enumerated_sites(model: Model, guide: Model, args: Args, kwargs: Kwargs) -> tuple[dict[str, tuple[str, ...]], int]:
    """Finds the latents that are summed out: marked for it, and not sampled by the guide.

    Returns:
        The plates of each, and how many dimensions the model's plates take.
    """
    with preserved(model, guide, evaluating=True), torch.no_grad(), poutine.block():
        evaluation = Evaluation(model, guide, args, kwargs)
    return evaluation.enumerated, evaluation.nesting


def vectorizing(model: Model, guide: Model, args: Args, kwargs: Kwargs) -> int | None:
    """Returns the depth of the model's plates if draws made in one run are what a run each gives, else None."""
    with preserved(model, guide, evaluating=True), torch.no_grad(), poutine.block():
        pyro.set_rng_seed(0)
        evaluation = Evaluation(model, guide, args, kwargs)
        return evaluation.nesting if evaluation.can_vectorize(None) else None


class Evaluation:
    """One model, guide and call: their densities at draws of the guide, or at given latents.

    Used inside :func:`~pyro_amortize.parameters.preserved` with its messages blocked, as all functions here do.
    """

    def __init__(self, model: Model, guide: Model, args: Args, kwargs: Kwargs) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args, **kwargs)
        refuse_nan(replayed.nodes.values(), "log_densities")
        self.shapes = {name: site["value"].shape for name, site in trace.nodes.items() if site["type"] == "sample"}
        self.batches = {
            name: site["fn"].batch_shape
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        }
        self.guided = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        self.held = {name for name in self.guided if _is_held(trace, name) and _is_held(replayed, name)}
        self.auxiliary = {name: self._latent_of(name) for name in self.guided if _is_auxiliary(self.guided[name])}
        self.held |= {name for name, latent in self.auxiliary.items() if latent in self.held}
        latents = [site for _, site in replayed.iter_stochastic_nodes() if not site_is_subsample(site)]
        self.latents = [site for site in latents if site["name"] in self.guided]
        self.enumerated = {
            site["name"]: tuple(frame.name for frame in site["cond_indep_stack"])
            for site in latents
            if site["name"] not in self.guided
        }
        for site in latents:
            if site["name"] in self.enumerated and not is_enumerated(site):
                raise ValueError(
                    f"log_densities: the guide does not sample '{site['name']}', a latent of the model, so it has no "
                    f"ELBO. Add pyro.sample('{site['name']}', ...) to the guide."
                )
        sites = [site for site in replayed.nodes.values() if site["type"] == "sample"]
        self.frames = plates_of(sites)
        self.nesting = max((-frame.dim for frame in self.frames.values()), default=0)
        self.size = sum(site["value"].numel() for site in sites if isinstance(site["value"], Tensor))
        if self.enumerated:
            replayed = poutine.trace(poutine.replay(self._model(None), trace=trace)).get_trace(*args, **kwargs)
            self.size = max(self.size, num_values(prune_subsample_sites(replayed)))
        self.vectorized: bool | None = None

    def _latent_of(self, auxiliary: str) -> str | None:
        """Returns the latent that an auxiliary site is of, as Pyro's ``AutoNormal`` names them; None for several."""
        latent = auxiliary.removesuffix(OF_PYRO)
        return latent if latent != auxiliary and latent in self.guided else None

    def refuse_other_plates(self, plate: str) -> None:
        """Refuses a guide that names the plate around a latent otherwise than the model does."""
        for site in self.latents:
            theirs, ours = ([f.name for f in s["cond_indep_stack"]] for s in (site, self.guided[site["name"]]))
            if plate in theirs and plate not in ours:
                raise ValueError(
                    f"log_densities: site '{site['name']}' stands in plate '{plate}' of the model, but in the plates "
                    f"{ours} of the guide, so its density cannot be told by datum. Write "
                    f"'with pyro.plate({plate!r}, ...):' around it in the guide."
                )

    def refuse_other_densities(self, plate: str | None) -> None:
        """Refuses guides that have no density of the latents asked for: of one draw of several, or point masses."""
        points = {name for name, site in self.guided.items() if is_delta(site["fn"])}
        partly = points & self.held if plate is None else {n for n in points if _counts(self.guided[n], plate)}
        joint = [name for name, latent in self.auxiliary.items() if latent is None]
        joint = [name for name in joint if plate is None or not _counts(self.guided[name], plate)]
        if joint and partly:
            what = f"by the elements of plate '{plate}'" if plate is not None else "with others held"
            raise NotImplementedError(
                f"log_densities: the guide makes site '{min(partly)}' from '{joint[0]}', a draw of several latents "
                f"together, so its density cannot be told {what}. Take a guide with a density for each site, "
                f"pyro.infer.autoguide.AutoNormal(model), or compare whole fits: compare_inference(model, ..., "
                f"methods={{'mine': guide, 'amortized': 'amortized'}})."
            )
        for site in self.latents if partly and not self.auxiliary else ():
            if site["name"] in partly and not is_delta(site["fn"]) and not support_of(site["fn"]).is_discrete:
                raise NotImplementedError(
                    f"log_densities: site '{site['name']}' of the guide is a point mass, which has no density to set "
                    f"against the model's. Take a guide with a width, pyro.infer.autoguide.AutoNormal(model)."
                )

    def draws(self, plate: str | None, num_draws: int, seed: int, title: str | None) -> Densities:
        self._try_vectorizing(plate)
        chunk = max(1, min(num_draws, CHUNK // max(self.size, 1))) if self.vectorized else 1
        pyro.set_rng_seed(seed)
        counts = [min(chunk, num_draws - start) for start in range(0, num_draws, chunk)]
        bar = progress_bar(counts, desc=title, unit_scale=chunk, unit="draws", shown=title is not None)
        with pyro.validation_enabled(False):  # the runs before have shown that the model is sound
            pieces = [self._run(plate, count if self.vectorized else None) for count in bar]
        log_p, log_q = (torch.cat(columns) for columns in zip(*pieces, strict=True))
        return Densities(log_p, log_q)

    def _model(self, count: int | None, held: Messenger | None = None) -> Model:
        """The model for several draws at once, with latents held where a handler does so."""
        model = self.model if held is None else held(self.model)
        run = enumerating if self.enumerated else side_by_side
        return run(model, count, self.nesting)

    def _traces(self, count: int | None) -> tuple[poutine.Trace, poutine.Trace]:
        guide, model = side_by_side(self.guide, count, self.nesting), self._model(count)
        guide_trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*self.args, **self.kwargs)
        return prune_subsample_sites(model_trace), self._own(guide_trace)

    def _own(self, guide_trace: poutine.Trace) -> poutine.Trace:
        """Returns what of a run of the guide has a density q: not values that model and guide are both given."""
        own = prune_subsample_sites(guide_trace)
        for name in self.held & set(own.nodes):
            own.remove_node(name)
        return own

    def _run(self, plate: str | None, count: int | None) -> tuple[Tensor, Tensor]:
        model_trace, guide_trace = self._traces(count)
        return self._log_p(model_trace, plate, count), self._sum(guide_trace, plate, count)

    def once(self, model: Model, guide: Model, args: Args, kwargs: Kwargs) -> Densities:
        """Returns the totals of one draw in another call, of as many rows."""
        other = copy.copy(self)
        other.model, other.guide, other.args, other.kwargs = model, guide, args, kwargs
        with pyro.validation_enabled(False):  # the run before has shown that the model is sound
            return Densities(*other._run(None, None))

    def on(self, args: Args, kwargs: Kwargs, plate: str, size: int) -> Evaluation:
        """Returns this evaluation for a call with so many elements of a plate."""
        self._try_vectorizing(plate)
        other = copy.copy(self)
        other.args, other.kwargs = args, kwargs
        other.frames = {**self.frames, plate: replace(self.frames[plate], size=size)}
        other.size = max(1, self.size * size // max(self.frames[plate].size, 1))
        return other

    def at(self, values: dict[str, Tensor], plate: str | None) -> Tensor:
        """Returns log p(data, latents) at given latents, with gradients.

        Args:
            values: Site -> shape (draws, *shape of the site). Latents without a value are drawn from the model and not
                counted, unless they are summed out.
            plate: Whose elements are the data; None for totals.

        Returns:
            Shape (draws, rows), or (draws,).
        """
        return torch.cat([log_p for log_p, _ in self._walk(values, plate, ConditionMessenger)])

    def at_unconstrained(self, values: dict[str, Tensor], plate: str | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns what :meth:`at` does at given values of unconstrained space, each taken to the support it has there.

        Args:
            values: Site -> shape (draws, *shape of the site in unconstrained space).
            plate: As of :meth:`at`.

        Returns:
            log p without the Jacobian, and that: site -> log |d value / d unconstrained value|, shape (draws, *shape of
            the site in unconstrained space less the dimensions that its bijection takes together).

        Raises:
            NotImplementedError: A support depends on a latent that is summed out.
        """
        log_p, log_det = [], dict[str, list[Tensor]]()
        for part, held in self._walk(values, plate, Unconstrained):
            log_p.append(part)
            for name, det in held.log_det.items():
                lead = len(part) if self.vectorized else 1
                lacking = self.nesting - len(self.batches[name]) if self.vectorized else -1
                shape = (lead, *det.shape[1 + lacking :])
                if math.prod(shape) != det.numel():
                    raise NotImplementedError(
                        f"the support of site '{name}' depends on a latent that is summed out, so that it has no one "
                        f"place in unconstrained space"
                    )
                log_det.setdefault(name, []).append(det.reshape(shape))
        return torch.cat(log_p), {name: torch.cat(parts) for name, parts in log_det.items()}

    def _walk(self, values: dict[str, Tensor], plate: str | None, holding: type[H]) -> Iterator[tuple[Tensor, H]]:
        """Runs the model at given latents, some draws at a time; yields log p and what held the latents."""
        self._try_vectorizing(plate)
        num_draws = len(next(iter(values.values())))
        chunk = max(1, min(num_draws, CHUNK // max(self.size, 1))) if self.vectorized else 1
        for start in range(0, num_draws, chunk):
            part = {name: value[start : start + chunk] for name, value in values.items()}
            count = len(next(iter(part.values())))
            if self.vectorized:
                lacking = {name: self.nesting - len(self.batches[name]) for name in part}
                part = {n: v.reshape((count,) + (1,) * lacking[n] + v.shape[1:]) for n, v in part.items()}
            else:
                part = {name: value[0] for name, value in part.items()}
            held = holding(part)
            model = self._model(count if self.vectorized else None, held)
            with pyro.validation_enabled(False):
                trace = prune_subsample_sites(poutine.trace(model).get_trace(*self.args, **self.kwargs))
                for name, _ in list(trace.iter_stochastic_nodes()):
                    if name not in self.enumerated:
                        trace.remove_node(name)
                yield self._log_p(trace, plate, count if self.vectorized else None), held

    def _log_p(self, trace: poutine.Trace, plate: str | None, count: int | None) -> Tensor:
        """Sums the log densities of the model's sites as :meth:`_sum` does, enumerated ones summed out."""
        if not self.enumerated:
            return self._sum(trace, plate, count)
        counted = poutine.Trace()
        for name, site in trace.nodes.items():
            if _counts(site, plate):
                counted.add_node(name, **{**site, "scale": scale_of(site, plate)})
        sizes = {} if count is None else {DRAWS: count}
        if plate is not None:
            sizes[plate] = self.frames[plate].size
        try:
            total = summed_out(counted, sizes)
        except Tied:
            outside = [name for name in self.enumerated if name not in counted.nodes]
            raise ValueError(
                f"log_densities: site '{outside[0]}' is summed out, and stands outside plate '{plate}', whose elements "
                f"therefore have no density each. Ask for totals, or sample '{outside[0]}' in the guide."
            ) from None
        return total if count is not None else total[None]

    def _sum(self, trace: poutine.Trace, plate: str | None, count: int | None) -> Tensor:
        """Sums the log densities of a trace's sites to shape (draws,) or (draws, rows)."""
        total = torch.zeros(())
        rows = self.frames[plate].size if plate is not None else None
        for site in trace.nodes.values():
            if not _counts(site, plate):
                continue
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            log_prob = torch.as_tensor(scale_and_mask(log_prob, scale_of(site, plate), site["mask"]))
            total = total.to(log_prob.device) + self._reduce(log_prob, site, plate, count)
        shape = (count or 1,) if rows is None else (count or 1, rows)
        return total.expand(shape)

    def _reduce(self, log_prob: Tensor, site: Any, plate: str | None, count: int | None) -> Tensor:
        batch = torch.broadcast_shapes(log_prob.shape, site["fn"].batch_shape)
        dims = max(len(batch), self.nesting + (count is not None))
        log_prob = log_prob.expand(batch).reshape((1,) * (dims - len(batch)) + batch)
        lead = log_prob.movedim(-1 - self.nesting, 0) if count is not None else log_prob[None]
        if plate is None:
            return lead.reshape(len(lead), -1).sum(-1)
        dim = next(f.dim for f in site["cond_indep_stack"] if f.name == plate)
        rows = lead.movedim(dim, 1)
        return rows.reshape(rows.shape[0], rows.shape[1], -1).sum(-1)

    def _try_vectorizing(self, plate: str | None) -> None:
        if self.vectorized is None:
            with torch.no_grad():
                self.vectorized = self.can_vectorize(plate)

    def can_vectorize(self, plate: str | None) -> bool:
        """Tries whether two draws in one run have the densities that they have in a run each."""
        try:
            model_trace, guide_trace = self._traces(2)
            together, log_q = self._log_p(model_trace, plate, 2), self._sum(guide_trace, plate, 2)
            for k in range(2):
                values = {}
                for name, site in guide_trace.nodes.items():
                    if site["type"] == "sample" and not site["is_observed"]:
                        full = (2, *site["value"].shape[1:])
                        values[name] = site["value"].expand(full)[k].reshape(self.shapes[name])
                alone = poutine.trace(self._model(None, ConditionMessenger(values))).get_trace(
                    *self.args, **self.kwargs
                )
                guided = poutine.trace(poutine.condition(self.guide, data=values)).get_trace(*self.args, **self.kwargs)
                one = self._log_p(prune_subsample_sites(alone), plate, None)[0]
                one_q = self._sum(self._own(guided), plate, None)[0]
                for many, single in ((together[k], one), (log_q[k], one_q)):
                    if not torch.allclose(many, single, rtol=1e-3, atol=1e-3 * math.sqrt(self.size)):
                        return False
        except (ValueError, RuntimeError, IndexError, KeyError):
            return False
        return True


def _is_held(trace: poutine.Trace, name: str) -> bool:
    site = trace.nodes.get(name)
    return bool(site and site["type"] == "sample" and site["is_observed"])


def _is_auxiliary(site: Any) -> bool:
    """Whether a site of one of Pyro's own guides is none of the model's, whose sites are point masses at it then."""
    return bool(site["infer"].get("is_auxiliary"))


def _counts(site: Any, plate: str | None) -> bool:
    """Whether a site's density counts: in a plate, if one is asked for."""
    if site["type"] != "sample" or site["infer"].get("_deterministic") or site["infer"].get("_do_not_trace"):
        return False
    return plate is None or any(frame.vectorized and frame.name == plate for frame in site["cond_indep_stack"])


def scale_of(site: Any, plate: str | None) -> Any:
    """The scale of a site's density; per datum, without that of subsampling."""
    scale = site["scale"]
    for frame in site["cond_indep_stack"] if plate is not None else ():
        if frame.vectorized and frame.name != DRAWS:
            scale = scale * int(frame.size) / int(frame.full_size or frame.size)
    return scale
