"""Answers, fits and reports, turned into ArviZ's own object, with plates as dimensions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from pyro_amortize import arviz_bridge
from pyro_amortize.answers import Series
from pyro_amortize.compare import Comparison
from pyro_amortize.draws import is_deterministic, plates_by_axis, run_at
from pyro_amortize.enumeration import draw_enumerated
from pyro_amortize.fit import SVIFit
from pyro_amortize.gap import GapReport
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.loops import find_loops
from pyro_amortize.mcmc import MCMCFit
from pyro_amortize.parameters import preserved
from pyro_amortize.pointwise import Pointwise, batch_of
from pyro_amortize.posterior import Posterior
from pyro_amortize.structure import Plate, plates_of
from pyro_amortize.subsamples import Subsample, covering, walked

NUM_DRAWS = 1000
LEAD = ("chain", "draw")


def to_arviz(obj: Any, num_samples: int | None = None) -> Any:
    """Turns an answer, a fit or a report into ArviZ's own object, for its summaries, plots and comparisons.

    It is an ``InferenceData`` in ArviZ 0.x and a ``DataTree`` in 1.x. Dimensions are ``chain`` and ``draw``, then the
    plates around a site by their names, outer to inner, then the axes of its event, ``z_dim_0``, ``z_dim_1``, ...; axes
    of size 1 that only fill a place between plates are left out. Sites of loops, ``z_0``, ``z_1``, ..., are one
    variable, ``z_*``, whose turns are a dimension after the plates: ``steps``, or the name of a sequential plate. A '/'
    in a name, which files do not allow, becomes '_'; a site that is called ``chain`` or ``draw``, and a plate that is
    called as these or as a site, gets a '_' at its end.

    Groups:

    * ``posterior``: draws of the latents, those that are summed out included, given the others and the data; and of
      the deterministic sites.
    * ``log_likelihood``: log p(observation | latents) in nats of every observed site, by element of its plates. Where
      a mask covers some, those that are there stand in one dimension, ``y_entry``, with their places in the plates as
      coordinates, ``y_data``: so ArviZ counts no others. All latents are at their draws, discrete ones too; where each
      datum has one of its own, k-hat of leave-one-out is high. Where several sites are observed, tell ArviZ which:
      ``az.loo(..., var_name="x")``.
    * ``observed_data``; ``constant_data``: values at which latents were held.
    * ``sample_stats``: ``diverging``, of MCMC.
    * ``gap``: the numbers per datum of a report, along the plate of the data.

    All but the first need the model and its data, which the records of fits remember; the model is taken as it is now,
    in eval mode. It is left as found, and so are the param store and the random state: draws are those of a fixed seed.
    A plate whose elements the model draws at random is walked through, all of them once.

    Args:
        obj: One of

            * a ``Posterior``: one chain. Sites that are summed out have numbered dimensions, as it does not know their
              plates; of a plate that subsamples it has one subsample.
            * an ``SVIFit``: one chain, of the guide for the data it was fitted to. What the model is conditioned on
              counts as data, the globals of ``fit_optimum`` too.
            * an ``MCMCFit``: its chains.
            * a ``GapReport``: draws of q*, and the numbers per datum; the latter alone where there is no q*.
            * a ``Comparison``: the first of its ``fits`` has the groups above, each other one ``posterior_label``,
              ``log_likelihood_label``, and so on. For ``az.compare``, take them one by one:
              ``{label: to_arviz(fit) for label, fit in result.fits.items()}``.
            * a dict from site to draws of shape (draws, *shape of the site), one chain, as ``Posterior.sample``,
              Pyro's ``Predictive`` and its ``MCMC.get_samples()`` give. Its dimensions are numbered.
        num_samples: Draws of each chain: of a guide 1,000 by default; of draws that are there already all by default,
            else so many at even distances.

    Returns:
        ArviZ's object.

    Raises:
        TypeError: ``obj`` is none of these.
        ValueError: There is nothing to draw from, or there are fewer draws than ``num_samples``.
        NotImplementedError: The model subsamples two plates.

    Example:
        >>> import arviz as az
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> fit = fit_svi(model, AutoAmortizedNormal(model), torch.randn(50), num_steps=50, seed=0, progress=False)
        >>> data = to_arviz(fit)
        >>> data.posterior["z"].dims
        ('chain', 'draw', 'data')
        >>> len(az.summary(data))
        50

    References:
        R. Kumar et al., ArviZ, a unified library for exploratory analysis of Bayesian models in Python, JOSS 2019,
        https://joss.theoj.org/papers/10.21105/joss.01143
    """
    if num_samples is not None and (type(num_samples) is not int or num_samples < 1):
        raise ValueError(f"to_arviz: num_samples={num_samples!r}. Expected a positive whole number.")
    if isinstance(obj, Posterior):
        groups = _of_posterior(obj, num_samples)
    elif isinstance(obj, SVIFit):
        groups = _of_guide(obj.guide, _call_of(obj), num_samples)
    elif isinstance(obj, MCMCFit):
        groups = _of_mcmc(obj, num_samples)
    elif isinstance(obj, GapReport):
        groups = _of_report(obj, num_samples)
    elif isinstance(obj, Comparison):
        groups = _of_comparison(obj, num_samples)
    elif isinstance(obj, Mapping):
        groups = _of_draws(obj, num_samples)
    else:
        raise TypeError(
            f"to_arviz: got a {type(obj).__name__}. Expected a Posterior, SVIFit, MCMCFit, GapReport, Comparison or a "
            f"dict of draws. A guide answers for data: to_arviz(guide.posterior(...))."
        )
    if not any(groups.values()):
        raise ValueError("to_arviz: there are no draws, as there are no latent sites.")
    return arviz_bridge.inference_data(_named(groups))


@dataclass(frozen=True)
class _Array:
    """Values, and what their axes are.

    Attributes:
        values: Shape (*lead, ...).
        plates: The plate of each axis after those; None for an axis of an event.
        lead: Names of the first axes.
        present: Which of its elements are there, shape (...); None if all are.
    """

    values: Tensor
    plates: tuple[str | None, ...]
    lead: tuple[str, ...] = ()
    present: Tensor | None = None


Groups = dict[str, dict[str, _Array]]


# Every kind of object has its groups.


def _of_posterior(posterior: Posterior, num_samples: int | None) -> Groups:
    with _undisturbed():
        draws = posterior.sample((num_samples or NUM_DRAWS,))
    arrays = {}
    for name, value in draws.items():
        batch = posterior.sites[name].batch_shape if name in posterior.sites else Size()
        arrays[name] = _array(value[None], _placed(batch, posterior.plates.get(name, ())), LEAD)
    with _undisturbed():
        derived = posterior.others.deterministic(draws)
    arrays |= {name: _array(site.draws[None], site.plates, LEAD) for name, site in derived.items()}
    return {"posterior": _as_series(arrays, posterior.others.series.items())}


def _of_draws(draws: Mapping[str, Any], num_samples: int | None) -> Groups:
    values = {name: torch.as_tensor(value)[None] for name, value in draws.items()}
    for name, value in values.items():
        if value.shape[1:2] != next(iter(values.values())).shape[1:2] or value.dim() < 2:
            raise ValueError(
                f"to_arviz: draws of '{name}' have shape {tuple(value.shape[1:])}. Expected (draws, *shape of the "
                f"site), with as many draws as of the other sites."
            )
    return {"posterior": {name: _array(value, (), LEAD) for name, value in _thinned(values, num_samples).items()}}


def _of_mcmc(fit: MCMCFit, num_samples: int | None) -> Groups:
    with _undisturbed(fit.model):
        groups = _of_model(_call_of(fit), _thinned(fit.samples, num_samples), set(fit.given))
    if fit.diverging is not None:
        thinned = _thinned({"diverging": fit.diverging}, num_samples)
        groups["sample_stats"] = {"diverging": _array(thinned["diverging"], (), LEAD)}
    return groups


def _of_guide(guide: Any, call: _Call, num_samples: int | None, given: Collection[str] = ()) -> Groups:
    num_draws = num_samples or NUM_DRAWS
    with _undisturbed(call.model, guide):
        plate = _subsampled(call)
        if plate is None and isinstance(guide, AutoAmortized):
            return _of_model(call, _as_a_chain(guide.posterior(*call.args, **call.kwargs).sample((num_draws,))), given)
        if plate is None:
            return _of_model(call, _as_a_chain(_traced(guide, call, num_draws, {})), given)
        parts: list[tuple[Groups, Tensor]] = []
        shared: dict[str, Tensor] = {}
        for indices, new in covering(plate):
            with Subsample(plate.name, indices):
                draws = _traced(guide, call, num_draws, shared)
                groups, sites = _at_draws(call, _as_a_chain(draws), given, {plate.name: indices})
            shared = {n: a.values[0] for n, a in groups["posterior"].items() if plate.name not in a.plates}
            parts.append((groups, new))
        return _with_series(_joined(parts, plate.name), sites)


def _of_report(report: GapReport, num_samples: int | None) -> Groups:
    groups: Groups = {}
    if report.optimum is not None:
        groups = _of_guide(report.optimum.guide, _call_of(report.optimum), num_samples, report.given)
    if report.per_datum is not None:
        plate = _plate_of(len(report.per_datum), groups.get("posterior", {}))
        numbers = report.per_datum.select_dtypes(["number", "bool"])
        groups["gap"] = {name: _Array(torch.tensor(numbers[name].to_numpy()), (plate,)) for name in numbers}
    if not groups:
        raise ValueError(
            "to_arviz: the GapReport has neither a fit of q* nor numbers per datum. Pass what it is of: the record of "
            "the guide's fit, or to_arviz(guide.posterior(...))."
        )
    return groups


def _of_comparison(comparison: Comparison, num_samples: int | None) -> Groups:
    records = [fit for fit in comparison.fits.values() if isinstance(fit, (SVIFit, MCMCFit))]
    groups: Groups = {}
    for label, fit in comparison.fits.items():
        if isinstance(fit, MCMCFit):
            own = _of_mcmc(fit, num_samples)
        elif records:
            call = _call_of(fit if isinstance(fit, SVIFit) else records[0])
            own = _of_guide(fit.guide if isinstance(fit, SVIFit) else fit, call, num_samples)
        else:
            raise ValueError(
                f"to_arviz: the Comparison holds guides only, which do not say what data they were judged on. Pass "
                f"their answers: to_arviz(comparison.fits['{label}'].posterior(...))."
            )
        if groups:
            own = {f"{group}_{label}": arrays for group, arrays in own.items() if group != "observed_data"}
        groups |= own
    return groups


@dataclass(frozen=True)
class _Call:
    """A model and its arguments."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _call_of(fit: SVIFit | MCMCFit) -> _Call:
    if fit.model is None:
        raise ValueError(
            f"to_arviz: the {type(fit).__name__} does not say which model and data it is of. Fit again, or pass draws: "
            f"to_arviz(guide.posterior(...)), to_arviz(guide.predictive(...))."
        )
    return _Call(fit.model, fit.args, fit.kwargs)


# Draws, and the model at them.


@contextmanager
def _undisturbed(*models: Any) -> Iterator[None]:
    """Runs a block from a fixed seed, in eval mode, without gradients, and puts everything back."""
    with preserved(*models, evaluating=True), torch.no_grad(), poutine.block():
        pyro.set_rng_seed(0)
        yield


def _as_a_chain(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[None] for name, value in draws.items()}


def _thinned(draws: dict[str, Tensor], num_samples: int | None) -> dict[str, Tensor]:
    """Takes so many of each chain's draws, at even distances."""
    if num_samples is None:
        return draws
    found = {}
    for name, value in draws.items():
        there = value.shape[1]
        if num_samples > there:
            raise ValueError(f"to_arviz: num_samples={num_samples}, but there are {there} draws of '{name}' a chain.")
        found[name] = value[:, torch.arange(num_samples) * there // num_samples]
    return found


def _traced(guide: Any, call: _Call, num_draws: int, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws from any guide, run by run, draws that are shared apart; returns site -> shape (draws, *site's shape)."""
    draws = []
    for k in range(num_draws):
        held = poutine.condition(guide, data={name: value[k] for name, value in shared.items()})
        nodes = poutine.trace(held).get_trace(*call.args, **call.kwargs).nodes
        sites = {name: site for name, site in nodes.items() if site["type"] == "sample" and not site_is_subsample(site)}
        draws.append({n: site["value"] for n, site in sites.items() if n in shared or not site["is_observed"]})
    return {name: torch.stack([values[name] for values in draws]) for name in draws[0]}


def _subsampled(call: _Call) -> Plate | None:
    """Returns the plate of which the model picks elements at random."""
    picked = walked(call.model, call.args, call.kwargs)
    if len(picked) > 1:
        raise NotImplementedError(
            f"to_arviz: the model subsamples plates '{picked[0].name}' and '{picked[1].name}'; only one can be walked "
            f"through. Leave subsampling to fit_svi(..., batch_size=...), or pass to_arviz(guide.posterior(...))."
        )
    return picked[0] if picked else None


def _of_model(call: _Call, draws: dict[str, Tensor], given: Collection[str]) -> Groups:
    """Returns the groups of a model at draws of shape (chains, draws, *shape of the site)."""
    return _with_series(*_at_draws(call, draws, given, {}))


def _at_draws(
    call: _Call, draws: dict[str, Tensor], given: Collection[str], indices: Mapping[str, Tensor]
) -> tuple[Groups, dict[str, Any]]:
    """Returns these groups with the sites of loops one by one, and the sample sites of a run."""
    if not draws:
        raise ValueError("to_arviz: there are no draws, as the guide samples no site.")
    shape = next(iter(draws.values())).shape[:2]
    values = {name: value.detach().flatten(0, 1) for name, value in draws.items()}
    run = Pointwise(call.model, call.args, call.kwargs, values)
    if run.summed_out:
        found = draw_enumerated(call.model, call.args, call.kwargs, values, indices, shape.numel())
        values |= {name: found[name] for name in run.summed_out}
        run = Pointwise(call.model, call.args, call.kwargs, values)

    def sampled(found: Mapping[str, Tensor], sites: Mapping[str, Any]) -> dict[str, _Array]:
        names = [name for name in sites if name in found]
        return {n: _array(found[n].unflatten(0, shape), _around(sites[n]), LEAD) for n in names}

    data = {name: _array(run.value_of(site), _around(site)) for name, site in run.observed.items()}
    observed = {name: site for name, site in run.observed.items() if name not in given}
    held = {name: value for name, value in values.items() if name in run.latents}
    found, sites = run_at(call.model, call.args, call.kwargs, held, indices, shape.numel(), wanted=is_deterministic)
    derived = {n: _array(v.unflatten(0, shape), plates_by_axis(sites[n]), LEAD) for n, v in found.items()}
    likelihood = sampled(run.log_likelihood(), observed)
    for name, array in likelihood.items():
        present = run.present(observed[name])
        if present is not None:
            likelihood[name] = replace(array, present=present.reshape(array.values.shape[len(LEAD) :]))
    groups = {
        "posterior": {**sampled(values, run.latents), **derived},
        "log_likelihood": likelihood,
        "observed_data": {name: array for name, array in data.items() if name not in given},
        "constant_data": {name: array for name, array in data.items() if name in given},
    }
    return groups, {name: site for name, site in sites.items() if not is_deterministic(site)}


def _with_series(groups: Groups, sites: Mapping[str, Any]) -> Groups:
    """Puts the sites of loops together; leaves out groups without variables."""
    return {group: _as_series(arrays, _series_of(sites, arrays)) for group, arrays in groups.items() if arrays}


def _series_of(sites: Mapping[str, Any], names: Collection[str]) -> Iterator[tuple[str, Series]]:
    """Yields the sites of each loop of a run, of those that are named."""
    families, loops = find_loops(sites)
    for family in families:
        turns = {numbers: name for name in names if (numbers := family.numbers(name)) is not None}
        firsts = [loops[loop].first or 0 for loop in family.loops]
        inside = {k: turns[k] for k in sorted(turns) if all(n >= first for n, first in zip(k, firsts, strict=True))}
        sizes = tuple(len(set(numbers)) for numbers in zip(*inside, strict=True))
        if inside and len(inside) == math.prod(sizes):
            yield family.name, Series(tuple(inside.values()), sizes, family.loops, (), 0)


# Axes.


def _as_series(arrays: dict[str, _Array], series: Iterable[tuple[str, Series]]) -> dict[str, _Array]:
    """Puts the sites of each loop into one variable, its turns after the plates."""
    found = dict(arrays)
    for name, one in series:
        parts = [arrays[member] for member in one.members if member in arrays]
        if len(parts) < len(one.members) or len({(part.plates, part.values.shape) for part in parts}) > 1:
            continue
        lead, plates = parts[0].lead, parts[0].plates
        place = max((i + 1 for i, plate in enumerate(plates) if plate is not None), default=0)
        axis = len(lead) + place
        values = torch.stack([part.values for part in parts], axis).unflatten(axis, one.sizes)
        present = torch.stack([_present(part) for part in parts], place).unflatten(place, one.sizes)
        whole = _Array(values, (*plates[:place], *one.loops, *plates[place:]), lead, present)
        found = {
            key: array
            for member, part in found.items()
            if member == one.members[0] or member not in one.members
            for key, array in [(name, whole) if member == one.members[0] else (member, part)]
        }
    return found


def _around(site: Any) -> list[str | None]:
    """Returns the plate of each axis of a site's log density."""
    plates = {plate.dim: plate.name for plate in plates_of([site]).values()}
    return [plates.get(dim) for dim in range(-len(batch_of(site)), 0)]


def _placed(batch: Size, plates: tuple[str, ...]) -> list[str | None]:
    """Returns the plate of each axis of a batch shape, given those around it, outer to inner; None for a filled place.

    The outermost axis has a plate always, so what is filled is looked for from the right.
    """
    names, filled = list(plates), len(batch) - len(plates)
    placed: list[str | None] = []
    for size in reversed(batch):
        is_filled = filled > 0 and size == 1
        filled -= is_filled
        placed.append(None if is_filled or not names else names.pop())
    return placed[::-1]


def _array(values: Tensor, plates: Sequence[str | None], lead: tuple[str, ...] = ()) -> _Array:
    """Leaves out the axes that only fill a place between plates."""
    sizes = values.shape[len(lead) :]
    kept = [i for i, size in enumerate(sizes) if i >= len(plates) or plates[i] is not None or size != 1]
    values = values.reshape(values.shape[: len(lead)] + Size(sizes[i] for i in kept))
    return _Array(values, tuple(plates[i] if i < len(plates) else None for i in kept), lead)


def _present(array: _Array) -> Tensor:
    """Returns which elements of an array are there."""
    whole = torch.ones(array.values.shape[len(array.lead) :], dtype=torch.bool)
    return whole if array.present is None else array.present


def _joined(parts: list[tuple[Groups, Tensor]], plate: str) -> Groups:
    """Puts the elements of a plate together, of which each part has some that are new."""
    joined: Groups = {}
    for group, arrays in parts[0][0].items():
        joined[group] = {}
        for name, array in arrays.items():
            if plate in array.plates:
                axis = len(array.lead) + array.plates.index(plate)
                pieces = [g[group][name].values.movedim(axis, 0)[new].movedim(0, axis) for g, new in parts]
                array = replace(array, values=torch.cat(pieces, axis))
                place = axis - len(array.lead)
                there = [_present(g[group][name]).movedim(place, 0)[new].movedim(0, place) for g, new in parts]
                array = replace(array, present=torch.cat(there, place))
            joined[group][name] = array
    return joined


def _plate_of(rows: int, arrays: Mapping[str, _Array]) -> str:
    """Returns the plate whose elements are the data: the outermost of so many around the latents."""
    for array in sorted(arrays.values(), key=lambda array: len(array.plates)):
        for plate, size in zip(array.plates, array.values.shape[len(array.lead) :], strict=True):
            if plate is not None and size == rows:
                return plate
    return "datum"


# Names.


def _named(groups: Groups) -> arviz_bridge.Groups:
    """Gives variables and dimensions names that differ, and that files allow.

    An array of which some elements are not there has one dimension of those that are, and along it their places.
    """
    taken = set(LEAD)
    names = {name: _free(name, taken) for name in dict.fromkeys(name for arrays in groups.values() for name in arrays)}
    dims: dict[Any, str] = {}

    def dim(wanted: str, *which: Any) -> str:
        key = (wanted, *which)
        if key not in dims:
            dims[key] = _free(wanted, taken)
        return dims[key]

    found: arviz_bridge.Groups = {}
    for group, arrays in groups.items():
        variables = found[group.replace("/", "_")] = {}
        for name, array in arrays.items():
            numbers = count()
            wanted = [f"{names[name]}_dim_{next(numbers)}" if plate is None else plate for plate in array.plates]
            values, coordinates = array.values, {}
            if array.present is None or bool(array.present.all()):
                sizes = values.shape[len(array.lead) :]
                own = [dim(w, p is None, size) for w, p, size in zip(wanted, array.plates, sizes, strict=True)]
            elif bool(array.present.any()):
                places = array.present.nonzero()
                own = [dim(f"{names[name]}_entry", len(places))]
                coordinates = {
                    dim(f"{names[name]}_{w}", "place"): column.cpu().numpy()
                    for w, column in zip(wanted, places.unbind(-1), strict=True)
                }
                values = values[..., array.present]
            else:
                continue
            variables[names[name]] = (*array.lead, *own), values.detach().cpu().numpy().copy(), coordinates
    return {group: variables for group, variables in found.items() if variables}


def _free(name: str, taken: set[str]) -> str:
    name = name.replace("/", "_")
    while name in taken:
        name += "_"
    taken.add(name)
    return name
