"""What amortizing is judged against: mean-field fits, where they start, and globals held. All on copies."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.optim.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_amortize.arguments import check_given, check_model, named, observes
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.encoders import Table
from pyro_amortize.fit import SVIFit, seeded, train
from pyro_amortize.guides import AutoAmortized, guide_apart
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.posterior import normal_underneath, reach_alike
from pyro_amortize.steps import Optimizer, Options
from pyro_amortize.structure import Plate, plates_of
from pyro_amortize.subsamples import Subsample, covering
from pyro_amortize.supports import bijection, is_delta, support_of


@named
def fit_mean_field(
    model: Model,
    *args: Any,
    start: Model | None = None,
    num_steps: int = 2000,
    batch_size: int | None = None,
    lr: float = 0.01,
    optim: Optimizer | PyroOptim | None = None,
    loss: Any = None,
    num_particles: int = 1,
    compile: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    model_kwargs: Kwargs | None = None,
) -> SVIFit:
    """Fits mean-field variational inference (F-VI) to the whole model: the same guide, every encoder a table.

    Its ELBO may have more than one optimum: fit it from scratch and from an amortized guide's answer, and call the
    better one F-VI's. The model's own parameters are trained along, on a copy: they are put back in the end.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        start: A trained guide whose answer for these data, globals included, the tables start from: a generated one,
            one written by hand, or Pyro's ``AutoNormal``, of normals on the sites' supports. Where these depend on
            draws of other sites, one draw decides. Steps are noisy: where it is near the optimum already, the fit may
            end below it; raise ``num_particles`` then, or lower ``lr``. None starts from scratch.
        num_steps: As of :func:`~pyro_amortize.fit.fit_svi`, and so are all other options.
        batch_size: Rows a step.
        lr: Learning rate at the start.
        optim: Makes a torch optimizer from a list of parameters, or is one of Pyro's.
        loss: A Pyro ELBO.
        num_particles: Draws a step.
        compile: As of ``fit_svi``.
        seed: Of this fit.
        progress: Whether to show a progress bar.
        model_kwargs: The model's keyword arguments.

    Returns:
        The record of the fit, with the guide of tables.

    Raises:
        ValueError: ``start`` is no guide, or lacks a latent of the model.
        RuntimeError: ``start`` has not been trained.
        NotImplementedError: A site of ``start`` is no normal on its support.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(50)
        >>> amortized = fit_svi(model, AutoAmortizedNormal(model), x, num_steps=300, seed=0, progress=False)
        >>> warm = fit_mean_field(model, x, start=amortized.guide, num_steps=300, seed=0, progress=False)
        >>> warm.elbo > amortized.elbo - 1
        True

    References:
        C. Margossian and D. Blei, Amortized Variational Inference: When and Why?, UAI 2024,
        https://arxiv.org/abs/2307.11018
    """
    options = Options(num_steps, batch_size, lr, optim, loss, num_particles, compile, seed, progress)
    kwargs = check_model("fit_mean_field", model, args, model_kwargs)
    state = pyro.util.get_rng_state()
    with preserved(model) as held:
        pyro.util.set_rng_state(state)
        guide = mean_field_guide(model, args, kwargs, start, seed)
        fit = train(model, guide, args, kwargs, options, "fit_mean_field", held=held)
        state = pyro.util.get_rng_state()
    pyro.util.set_rng_state(state)
    return fit


def mean_field_guide(model: Model, args: Args, kwargs: Kwargs, start: Model | None, seed: int | None) -> AutoAmortized:
    """Makes a guide of tables, which start from another guide's answer if there is one.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: The model's keyword arguments.
        start: As of :func:`fit_mean_field`, and so are the errors.
        seed: Of the first run of the model.
    """
    guide = guide_apart(model, encoder=Table())
    if start is None:
        return guide
    if not callable(start):
        raise ValueError(
            f"fit_mean_field: start is a {type(start).__name__}. Expected a trained guide; that of a fit is "
            f"start=fit.guide."
        )
    if observes(start, args, kwargs):
        raise ValueError(
            "fit_mean_field: start observes data, so it is a model; expected a trained guide: start=guide, or that of "
            "a fit, start=fit.guide."
        )
    if isinstance(start, AutoAmortized) and start.plan is None:
        raise RuntimeError("fit_mean_field: start has no parameters yet. Train it: fit_svi(model, start, ...).")
    with seeded(seed):
        guide.initialize(*args, **kwargs)
        own = {name: site for name, site in site_answers(guide, args, kwargs).items() if normal_underneath(site["fn"])}
        start = _InPlace(own)(start)
        answer = answers_beside(start, own, args, kwargs)
        for name, site in own.items():
            _check_start(name, site, answer.get(name))
        plan: AmortizationPlan = guide.plan  # type: ignore[assignment]
        _start(guide, start, tuple(name for block in plan.blocks for name in block.sites), args, kwargs)
    return guide


def _check_start(name: str, own: Any, site: Any) -> None:
    if site is None:
        raise ValueError(
            f"fit_mean_field: start does not sample '{name}', a latent of the model, so the fit cannot start from it. "
            f"Add pyro.sample('{name}', ...) to that guide, or leave start= out."
        )
    if not reach_alike(own["fn"], site["fn"]):
        raise NotImplementedError(
            f"fit_mean_field: site '{name}' of start is a {type(site['fn']).__name__}; tables can start from normals "
            f"on the site's own support only: Normal on the reals, LogNormal on the positives, of generated guides and "
            f"Pyro's AutoNormal any. Leave start= out, or pass such a guide."
        )


class _InPlace(Messenger):
    """Shows a guide that draws auxiliary normals and point masses above them, as ``AutoNormal``, as normals in place.

    Args:
        sites: Site -> the site of a guide with normals in place.
    """

    def __init__(self, sites: Mapping[str, Any]) -> None:
        super().__init__()
        self.sites = sites
        self.auxiliary: dict[str, Any] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if msg["infer"].get("is_auxiliary"):
            self.auxiliary[name] = normal_underneath(msg["fn"])
        below = self.auxiliary.get(f"{name}_unconstrained")
        if below is not None and name in self.sites and is_delta(msg["fn"]):
            own = self.sites[name]["fn"]
            fn, transforms = below[0], normal_underneath(own)[1]  # type: ignore[index]
            if transforms:
                fn = dist.TransformedDistribution(fn.to_event(transforms[0].domain.event_dim), transforms)
            msg["fn"] = fn.to_event(own.event_dim - fn.event_dim)


def local_sites(plan: AmortizationPlan) -> tuple[str, ...]:
    """Returns the local latents of a plan.

    Raises:
        ValueError: There are none.
    """
    names = tuple(site for block in plan.blocks if block.amortized for site in block.sites)
    if not names:
        raise ValueError(
            "amortization_gap: no latent of the model is local to data, so there is nothing to amortize. Compare "
            "whole fits: compare_inference(model, ...)."
        )
    return names


def held_globals(
    guide: Model,
    args: Args,
    kwargs: Kwargs,
    plan: AmortizationPlan,
    given: Mapping[str, Tensor] | None,
    function: str,
) -> dict[str, Tensor]:
    """Returns values for all global latents: those given, else medians under the guide.

    Raises:
        ValueError: A name in ``given`` is no global latent, or its value has another shape than the site.
    """
    names = {site for block in plan.blocks if not block.amortized for site in block.sites}
    values: dict[str, Tensor] = {}
    if given is not None:
        sampled = {name: site["value"] for name, site in site_answers(guide, args, kwargs).items()}
        known = {name: value for name, value in sampled.items() if plan.turn_of(name)[0] in names}
        values = check_given(function, given, {**dict.fromkeys(names - {plan.turn_of(n)[0] for n in known}), **known})
    missing = names - {plan.turn_of(name)[0] for name in values}
    if missing:
        medians = _medians(guide, args, kwargs)
        lacking = sorted(missing - {plan.turn_of(name)[0] for name in medians})
        if lacking:
            raise ValueError(
                f"{function}: the guide has no median of '{lacking[0]}', a global latent of the model. Give its "
                f"value: given={{'{lacking[0]}': ...}}."
            )
        values.update({name: value for name, value in sorted(medians.items()) if plan.turn_of(name)[0] in missing})
    return {name: value.detach() for name, value in values.items()}


def drawn_globals(
    guide: Model, args: Args, kwargs: Kwargs, plan: AmortizationPlan, num_draws: int, seed: int
) -> list[dict[str, Tensor]]:
    """Returns draws of all global latents from the guide."""
    names = {site for block in plan.blocks if not block.amortized for site in block.sites}
    with preserved(guide, evaluating=True), torch.no_grad(), poutine.block():
        pyro.set_rng_seed(seed)
        traces = [poutine.trace(guide).get_trace(*args, **kwargs) for _ in range(num_draws)]
    return [
        {name: site["value"] for name, site in trace.iter_stochastic_nodes() if plan.turn_of(name)[0] in names}
        for trace in traces
    ]


def _medians(guide: Model, args: Args, kwargs: Kwargs, num_draws: int = 501) -> dict[str, Tensor]:
    with preserved(guide, evaluating=True), torch.no_grad(), poutine.block():
        if isinstance(guide, AutoGuide) and getattr(guide, "prototype_trace", True) is None:
            guide(*args, **kwargs)  # knows its latents by its first call only
        with suppress(NotImplementedError):  # those of Pyro's guides that have no median inherit one that says so
            if hasattr(guide, "median"):
                return dict(guide.median(*args, **kwargs))
        pyro.set_rng_seed(0)
        draws = [poutine.trace(guide).get_trace(*args, **kwargs) for _ in range(num_draws)]
    sites = dict(draws[0].iter_stochastic_nodes())
    stacked = {name: torch.stack([draw.nodes[name]["value"] for draw in draws]) for name in sites}
    return {name: _median(sites[name], value) for name, value in stacked.items() if value.is_floating_point()}


def _median(site: Any, draws: Tensor) -> Tensor:
    """Returns the median of each element, of simplexes and the like that in unconstrained space."""
    median = draws.median(0).values
    if bool(support_of(site["fn"]).check(median).all()):
        return median
    transform = bijection(site)
    return transform(transform.inv(draws).median(0).values)


def _start(tables: AutoAmortized, guide: Model, names: tuple[str, ...], args: Args, kwargs: Kwargs) -> None:
    """Copies a guide's answer into the tables of another, subsample by subsample if the plate subsamples itself."""
    plan: AmortizationPlan = tables.plan  # type: ignore[assignment]
    own = {}
    for name, site in site_answers(tables, args, kwargs).items():
        planned, turn = plan.turn_of(name)
        if planned in names and normal_underneath(site["fn"]) is not None:  # a forecast's is the model's own
            own[name] = site, plan.block_of(planned), planned, turn
    outer = {name: _outermost(site, block, turn, plan.same) for name, (site, block, _, turn) in own.items()}
    for plate in dict.fromkeys(outer.values()):
        for indices in [indices for indices, _ in covering(plate)] if plate else [None]:
            with Subsample(plate.name, indices) if plate and indices is not None else nullcontext():
                answer = site_answers(guide, args, kwargs)
            for name in (name for name in own if outer[name] == plate):
                found = normal_underneath(answer[name]["fn"])[0]  # type: ignore[index]
                write_rows(tables, *own[name], found.loc, found.scale, indices)


def _outermost(site: Any, block: Any, turn: dict[str, int], same: dict[str, str]) -> Plate | None:
    """Returns the outermost plate of a block around one of its sites, loops apart."""
    return next((plates_of([site], same)[plate] for plate in block.plates if plate not in turn), None)


def write_rows(
    guide: AutoAmortized,
    own: Any,
    block: Any,
    planned: str,
    turn: dict[str, int],
    loc: Tensor,
    scale: Tensor,
    indices: Tensor | None,
) -> None:
    """Writes normals of one site into its table, for some elements of the outermost plate.

    Args:
        guide: The guide that holds the table.
        own: The site, of a run of that guide.
        block: Its block in the plan.
        planned: Its name in the plan.
        turn: For each loop that numbers it which of its turns the site is of.
        loc: Means, of the shape that the normal underneath the site has.
        scale: Standard deviations, of the same shape.
        indices: The elements that the plate shows; None for all.
    """
    values = guide.coder_of(block).values[block.sites.index(planned)]
    base, around = normal_underneath(own["fn"])[0], plates_of([own], guide.plan.same)  # type: ignore[index, union-attr]
    rows = torch.zeros(1, dtype=torch.long)
    for plate in block.plates:
        size = guide.plan.plates[plate]  # type: ignore[union-attr]
        here = torch.tensor([turn[plate]]) if plate in turn else torch.arange(size)
        if indices is not None:
            here, indices = (indices, None) if plate not in turn else (here, indices)
        rows = (rows[:, None] * size + here).flatten()
    axes = [
        around[plate].dim - (base.loc.dim() - len(own["fn"].batch_shape)) for plate in block.plates if plate in around
    ]
    first = list(range(len(axes)))
    moments = [m.movedim(axes, first).reshape(len(rows), -1).to(values) for m in (loc, scale)]
    with torch.no_grad():
        values[rows] = guide.family.parameters(*moments)


def answers_beside(guide: Model, own: Mapping[str, Any], args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """Returns the sites of one run of a guide at the values of another's, so that supports are where those were."""
    values = {name: site["value"] for name, site in own.items() if not site_is_subsample(site)}
    return site_answers(poutine.condition(guide, data=values), args, kwargs)


def site_answers(guide: Model, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """Returns the sites of one run of a guide."""
    with preserved(guide, evaluating=True), torch.no_grad():
        with poutine.block(hide_fn=lambda msg: not site_is_subsample(msg)):
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
