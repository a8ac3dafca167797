"""Draws from a guide, and from its model given these: for the rows of a call, given its data or those of another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_factor, site_is_subsample

from pyro_amortize.answering import series_of
from pyro_amortize.answers import Answers, Derived, UnknownSite
from pyro_amortize.arguments import unknown
from pyro_amortize.calls import Args, Call, Kwargs, Model, signature_of
from pyro_amortize.carried import Informing, Known
from pyro_amortize.draws import Held, Runs, Values, is_deterministic, plates_by_axis, run_at
from pyro_amortize.enumeration import draw_enumerated
from pyro_amortize.plan import AmortizationPlan
from pyro_amortize.structure import Plate, plates_of
from pyro_amortize.subsamples import axis_of, covering, generic_sites, walked
from pyro_amortize.supports import can_be_drawn, undressed

Arguments = tuple[Args, Kwargs]
Indices = Mapping[str, Any]
Guided = Callable[[Known, Indices], Model]
"""Makes a guide's program, of which some latents have their values, and some plates their elements, already."""


@dataclass(frozen=True)
class Drawn:
    """Draws, and the run of the model that shows where they stand.

    Attributes:
        values: Site -> shape (draws, *site's shape).
        sites: Its sites, all drawn; factors apart.
        observed: Those of them that the call observes.
        indices: The elements of plates.
    """

    values: Values
    sites: Mapping[str, Any]
    observed: frozenset[str]
    indices: Indices


class Replicate(Messenger):
    """Draws observed sites anew, and notes which; keeps deterministic sites and factors."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: set[str] = set()

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic") and not site_is_factor(msg):
            self.observed.add(msg["name"])
            msg["is_observed"], msg["value"] = False, None
        if msg["value"] is None and not site_is_subsample(msg) and not can_be_drawn(msg["fn"]):
            kind = type(undressed(msg["fn"])).__name__
            raise NotImplementedError(
                f"predictive: site '{msg['name']}' cannot be drawn: its {kind} has a density only. Give it a "
                f"method sample(sample_shape), or draw the latents alone: guide.posterior(...).sample((1000,))."
            )


class Prediction:
    """Draws of all sites of a model, for any call.

    The caller sees to it that modules are in eval mode and that nothing needs gradients. Plates whose elements the
    model draws at random are walked through, all of them once.

    Args:
        model: The model.
        plan: Its plan.
        guided: Makes the guide's program.
        num_draws: Number of draws.
        together: Whether draws may be made in one run of the model, where that gives what a run each gives.
    """

    def __init__(self, model: Model, plan: AmortizationPlan, guided: Guided, num_draws: int, together: bool) -> None:
        self.model, self.plan, self.guided = model, plan, guided
        self.num_draws, self.together = num_draws, together

    def draw(self, call: Arguments, informing: Arguments | None = None, same: Collection[str] | None = None) -> Values:
        """Draws latents from the guide, and observations from the model.

        Args:
            call: Positional and keyword arguments.
            informing: Those of a call whose data inform the latents that both have.
            same: Plates whose elements both calls have; None to find out.

        Returns:
            Site -> shape (draws, *site's shape), for latents, observed and deterministic sites; by name also the sites
            of a loop as one.
        """
        known = Known({}, None if informing is None else self._informed(informing, call, same))
        plates = walked(self.model, *call, self.plan.lengths)
        drawn = self._walk(plates, call, known, {}, self._replicated)
        series = series_of(self.plan, drawn.values, drawn.sites)

        def stacked(name: str) -> torch.Tensor:
            if name not in series:
                known = ", ".join(f"'{each}'" for each in [*drawn.values, *series])
                raise UnknownSite(f"predictive: '{name}' is no site of this call. Known: {known}.")
            return series[name].stacked(drawn.values)

        return Answers(drawn.values, stacked)

    def latents(self, call: Arguments, indices: Indices) -> Values:
        """Draws the latents alone, but those that are left to the model."""
        drawn = self._walk(walked(self.model, *call, self.plan.lengths), call, Known({}, None), indices, self._latents)
        return self._guided(drawn.values)

    def deterministic(self, call: Arguments, draws: Values, indices: Indices) -> dict[str, Derived]:
        """Returns the deterministic sites at draws of the latents; other latents are drawn."""
        sites = {site["name"]: site for site in generic_sites(self.model, *call)}

        def draw(call: Arguments, _: Known, indices: Indices) -> Drawn:
            held = dict(draws)
            for name in draws:
                for plate in plates_of([sites[name]]).values():
                    here, axis = indices.get(plate.name), axis_of(sites[name], plate)
                    if here is not None and axis is not None and held[name].shape[axis] == plate.full_size:
                        held[name] = held[name].index_select(axis, here.to(held[name].device))
            return self._at(call, Drawn(held, sites, frozenset(), indices), lambda model: model, is_deterministic)

        drawn = self._walk(walked(self.model, *call, self.plan.lengths), call, Known({}, None), indices, draw)
        return {name: Derived(value, plates_by_axis(drawn.sites[name])) for name, value in drawn.values.items()}

    def _guided(self, values: Values) -> Values:
        return {n: value for n, value in values.items() if self.plan.turn_of(n)[0] not in self.plan.left_to_model}

    def _informed(self, informing: Arguments, call: Arguments, same: Collection[str] | None) -> Informing:
        plates = walked(self.model, *informing, self.plan.lengths)
        drawn = self._walk(plates, informing, Known({}, None), {}, self._latents)
        frames = plates_of(drawn.sites.values())
        unknown = [name for name in same or () if name not in frames]
        if unknown:
            raise ValueError(
                f"predictive: same={list(same or ())} names '{unknown[0]}', which is no plate of latents in the call "
                f"that informs. Known: {sorted(frames)}."
            )
        calls = Call(self.model, *informing), Call(self.model, *call)
        some = {name for name, plate in frames.items() if plate.size < plate.full_size} - {p.name for p in plates}
        taken = {name for name in some if frames[name].size in self.plan.lengths(name, calls[0].tensors)}
        return Informing(
            self.plan,
            calls,
            self._guided(drawn.values),
            drawn.sites,
            {name: plate for name, plate in frames.items() if name not in some - taken},
            frozenset(taken),
            frozenset(plates_of(drawn.sites[name] for name in drawn.observed)),
            same,
        )

    def _walk(
        self,
        plates: list[Plate],
        call: Arguments,
        known: Known,
        indices: Indices,
        draw: Callable[[Arguments, Known, Indices], Drawn],
    ) -> Drawn:
        """Draws some elements of plates at a time; what is outside of them is drawn once."""
        if not plates:
            return draw(call, known, indices)
        (plate, *rest), parts = plates, []
        for here, new in covering(plate):
            drawn = self._walk(rest, call, known, {**indices, plate.name: here}, draw)
            axes = {name: axis_of(drawn.sites[name], plate) for name in drawn.values}
            outside = {name for name, axis in axes.items() if axis is None}
            self._refuse_enumerated(outside, plate)
            known = Known({**known.fixed, **{name: drawn.values[name] for name in outside}}, known.informing)
            parts.append((drawn, new))
        values = dict(parts[0][0].values)
        for name, axis in axes.items():
            if axis is not None:
                pieces = [part.values[name].movedim(axis, 0)[new].movedim(0, axis) for part, new in parts]
                values[name] = torch.cat(pieces, axis)
        return replace(parts[0][0], values=values)

    def _refuse_enumerated(self, outside: set[str], plate: Plate) -> None:
        for name in (name for name in outside if self.plan.turn_of(name)[0] in self.plan.enumerated):
            raise NotImplementedError(
                f"predictive: site '{name}' is summed out, and all elements of plate '{plate.name}' inform it, but the "
                f"model sees {plate.size} of {plate.full_size} of these at a time. Call the model so that the plate "
                f"does not subsample."
            )

    # One call.

    def _latents(self, call: Arguments, known: Known, indices: Indices) -> Drawn:
        """Draws from the guide, then what is summed out, given these and the data."""
        nesting = 0

        def program(start: int, count: int | None) -> Model:
            return self.guided(known.at(start, count, nesting), indices)

        guide = Runs(program, *call)
        indices = {**guide.indices, **indices}
        replicate = Replicate()
        held = Held({name: site["value"] for name, site in guide.sites.items()}, indices)
        model = Runs(lambda *_: replicate(held(self.model)), *call)
        nesting = model.nesting
        values = guide.values(self.num_draws, nesting, self.together)
        drawn = Drawn(values, model.sites, frozenset(replicate.observed), indices)
        if not self.plan.enumerated:
            return drawn
        return replace(drawn, values={**values, **self._discrete(call, known, drawn)})

    def _discrete(self, call: Arguments, known: Known, drawn: Drawn) -> Values:
        """Draws the sites that are summed out, or takes the draws of the call that informs."""
        names = [name for name in drawn.sites if self.plan.turn_of(name)[0] in self.plan.enumerated]
        carried = {}
        for name in names:
            site = drawn.sites[name]
            there = known.at(0, self.num_draws, len(site["fn"].batch_shape)).of(site, drawn.indices)
            if there is not None:
                carried[name] = there
        whole = {name: there.values for name, there in carried.items() if there.marks is None}
        values = {**drawn.values, **whole}
        found = draw_enumerated(self.model, *call, values, drawn.indices, self.num_draws)
        found = {**whole, **{name: value for name, value in found.items() if name in names}}
        for name, there in carried.items():
            found[name] = there.values if there.marks is None else torch.where(there.marks, there.values, found[name])
        return found

    def _replicated(self, call: Arguments, known: Known, indices: Indices) -> Drawn:
        """Draws latents, and what is observed given these."""
        return self._at(call, self._latents(call, known, indices), Replicate(), lambda _: True)

    def _at(
        self, call: Arguments, drawn: Drawn, handler: Callable[[Model], Model], wanted: Callable[[Any], bool]
    ) -> Drawn:
        """Runs the model at draws of its latents, for the values of some of its sites."""
        values, sites = run_at(
            self.model,
            *call,
            drawn.values,
            drawn.indices,
            self.num_draws,
            handler=handler,
            together=self.together,
            wanted=wanted,
        )
        return replace(drawn, values=values, sites=sites)


def arguments_of(given: Any, model: Model) -> Arguments:
    """Returns the arguments of a call that informs: positional ones in a tuple, or a dict of keyword arguments.

    Raises:
        ValueError: It is neither.
        TypeError: They do not fit the model.
    """
    signature = signature_of(model)
    if isinstance(given, Mapping):
        args, kwargs = (), dict(given)
    elif isinstance(given, (tuple, list)):
        args, kwargs = tuple(given), {}
    else:
        raise _no_call(given)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    for name in kwargs if inspect.Parameter.VAR_KEYWORD not in kinds else ():
        if name not in signature.parameters:
            raise TypeError(
                f"predictive: given={{'{name}': ...}}: {unknown('argument', name, signature.parameters)} Those are "
                f"the model's arguments, in the call that informs."
            )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"predictive: given= does not hold the arguments of a call of the model: {error}. It takes {signature}. "
            f"Pass those of the call that informs, all of them."
        ) from None
    return args, kwargs


def _no_call(given: Any) -> ValueError:
    return ValueError(
        f"predictive: given= is a {type(given).__name__}. Expected the arguments of the call that informs, positional "
        f"ones in a tuple, given=(x, y), or all by name, given={{'x': x, 'y': y}}."
    )
