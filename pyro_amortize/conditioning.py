"""The conditioning gap: what an encoder loses because it does not see all data that its latents depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.densities import log_densities, vectorizing
from pyro_amortize.encoders import MLP, DeepSets, Recurrent, Window, encoder_for
from pyro_amortize.estimates import Part
from pyro_amortize.fit import seeded, train
from pyro_amortize.guides import AutoAmortized, guide_apart
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import FUNCTION, AmortizationPlan, Block
from pyro_amortize.steps import Options
from pyro_amortize.verdict import MOST_NEIGHBOURS


@dataclass(frozen=True)
class Conditioning:
    """What lacking data cost.

    Attributes:
        lacking: For each block that lacks some, what it lacks, and what would add it.
        part: ELBO of an encoder of the same kind that sees them, less that of one that does not: both trained alike on
            these data, globals held.
    """

    lacking: dict[str, str]
    part: Part


def conditioning_gap(
    model: Model,
    guide: Model,
    args: Args,
    kwargs: Kwargs,
    plan: AmortizationPlan,
    plate: str | None,
    options: Options,
    num_draws: int,
    num_training_steps: int,
) -> Conditioning | None:
    """Measures what a generated guide loses by inputs that leave data out, or by a window that is too narrow.

    Two new guides are trained alike on these data, one with the guide's options and one whose encoders see what is
    lacking; the guide itself is not compared, since how long it was trained would count.

    Args:
        model: The model, globals conditioned.
        guide: The guide.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        plan: The plan of the model, with all that informs its latents.
        plate: The plate whose elements are the data; None for totals.
        options: Seed and progress bars.
        num_draws: Draws behind each number.
        num_training_steps: Steps of each of the two trainings; 0 for none.

    Returns:
        None if nothing is lacking, or what is lacking has no encoder that is sure to see it, or nothing is to be
        trained.
    """
    if not num_training_steps or not isinstance(guide, AutoAmortized) or guide.plan is None:
        return None
    kinds = {block.name: _kind(guide, block) for block in guide.plan.blocks if block.amortized}
    found = {name: _lacking(guide.plan, plan, name, kind) for name, kind in kinds.items()}
    lacking = {name: what for name, what in found.items() if what is not None}
    if not lacking:
        return None
    shown = {name: _option(guide, "inputs", name) for name in kinds}
    shown = {name: option for name, option in shown.items() if option is not None}
    seen = {name: option for name, option in shown.items() if name not in lacking}
    more = kinds | {name: what.encoder for name, what in lacking.items()}
    ratios = []
    for encoder, inputs, title in ((more, seen, "encoder with all inputs"), (kinds, shown, "encoder with its inputs")):
        twin = guide_apart(model, encoder=encoder, inputs=inputs or None, prepare=guide.options["prepare"])
        trained = replace(options, num_steps=num_training_steps, lr=Options.lr)
        ratios.append(_trained_ratio(model, twin, args, kwargs, plate, trained, num_draws, title))
    part = Part.mean_of(ratios[0]) - Part.mean_of(ratios[1])
    return Conditioning({name: what.text for name, what in lacking.items()}, part)


def _trained_ratio(
    model: Model,
    guide: AutoAmortized,
    args: Args,
    kwargs: Kwargs,
    plate: str | None,
    options: Options,
    num_draws: int,
    title: str,
) -> Tensor:
    """Trains a guide on these data, and returns log p - log q of its draws, shape (draws, rows)."""
    with preserved(model) as record:
        with seeded(options.seed):
            guide.initialize(*args, **kwargs)
        nesting = vectorizing(model, guide, args, kwargs)
        options = replace(options, max_plate_nesting=nesting)
        train(model, guide, args, kwargs, options, title, held=record, train_model=False)
        found = log_densities(model, guide, args, kwargs, plate=plate, num_draws=num_draws, seed=options.seed or 0)
    return found.log_ratio.to("cpu", torch.float64).reshape(num_draws, -1)


@dataclass(frozen=True)
class _Lacking:
    """What an encoder does not see, and one of its kind that does."""

    text: str
    encoder: Any


def _lacking(plan: AmortizationPlan, whole: AmortizationPlan, name: str, kind: Any) -> _Lacking | None:
    """Compares what the encoder of a block sees with all that informs its latents."""
    block = next(block for block in plan.blocks if block.name == name)
    full = whole.block_of(block.sites[0])
    if full is None or FUNCTION in block.inputs or plan.enumerated or any(b.is_discrete for b in plan.blocks):
        return None
    missing = [name for name in full.inputs if name not in block.inputs]
    if missing:
        names = ", ".join(f"'{name}'" for name in missing)
        return _Lacking(f"it does not see {names}: leave inputs= out, or add them", kind)
    dims = kind.hidden_dims if isinstance(kind, (MLP, Window)) else MLP().hidden_dims
    sees = block.reach.radius if block.reach is not None else 0
    if sees is None:
        return None
    for source in full.sources:
        for plate in sorted(source.couples & set(block.plates)):
            offsets = source.offsets[source.plates.index(plate)]
            needs = max(map(abs, offsets), default=0)
            if sees < needs <= MOST_NEIGHBOURS:
                text = f"it does not see the neighbours' '{source.name}': encoder=Window({needs})"
                return _Lacking(text, Window(needs, dims, along=plate))
    if block.reach is not None and block.closable is False:
        count = f"{sees} neighbour{'' if sees == 1 else 's'}"
        text = f"it sees {count} on a side, where the whole series informs it: encoder=Recurrent()"
        return _Lacking(text, Recurrent(hidden_dims=dims, along=block.reach.plate))
    return None


def _kind(guide: AutoAmortized, block: Block) -> Any:
    """Returns the encoder of a block, or an MLP in the place of a network of the user's own."""
    encoder = _option(guide, "encoder", block.name)
    own = not isinstance(encoder, (MLP, DeepSets, Window, Recurrent)) or getattr(encoder, "network", None) is not None
    return MLP() if own and encoder is not None else encoder


def _option(guide: AutoAmortized, option: str, name: str) -> Any:
    """Returns what an option says of a block."""
    block = next(block for block in guide.plan.blocks if block.name == name)  # type: ignore[union-attr]
    return encoder_for(guide.options[option], name, block.sites, block.plates)
