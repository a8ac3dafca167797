"""The modules of a guide, made from its plan and its options, and the values that they start with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.changes import described
from pyro_amortize.encoders import (
    MLP,
    Constant,
    DeepSets,
    Encoder,
    Heads,
    Recurrent,
    Rows,
    Table,
    Window,
    encoder_for,
    is_of,
    on_rows,
    width_of,
)
from pyro_amortize.families import Normal
from pyro_amortize.inputs import Preparation
from pyro_amortize.loops import merged
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import FUNCTION, AmortizationPlan, Block
from pyro_amortize.reading import Reading, features_of
from pyro_amortize.structure import Plate, Structure, plates_of
from pyro_amortize.supports import bijection, init_to_center, is_delta, prior_logits, support_of

Arguments = tuple[Args, Kwargs]
CLASSES: dict[Any, str] = {
    MLP: "MLP((64, 64))",
    DeepSets: "DeepSets()",
    Window: "Window(radius=1)",
    Recurrent: "Recurrent()",
    Table: "Table()",
    Constant: "Constant()",
}
"""The encoders of this package, of which users make instances."""


class Builder:
    """Makes the parts of a guide.

    Args:
        kind: Name of the guide's class, for messages.
        options: The guide's options by name.
        family: The family of q.
    """

    def __init__(self, kind: str, options: Mapping[str, Any], family: Normal) -> None:
        self.kind, self.options, self.family = kind, options, family

    def choices(self, facts: Structure) -> tuple[frozenset[str], frozenset[str]]:
        """Returns which sites and plates have tables, and which sites an encoder of their own.

        Raises:
            ValueError: An option names a site or plate that the model does not have.
        """
        levels = {"/".join(site.plates) for site in facts.latents if site.plates}
        known = set(facts.sites) | set(facts.plates) | levels
        encoder, inputs = self.options["encoder"], self.options["inputs"]
        for option, value in (("encoder", encoder), ("inputs", inputs)):
            for key in value if isinstance(value, dict) else ():
                if key not in known:
                    of = next((f"; '{key}' is one of '{f.name}'" for f in facts.families if f.numbers(key)), "")
                    raise ValueError(
                        f"{self.kind}: {option}={{'{key}': ...}} names no site or plate of the plan{of}. "
                        f"Known: {sorted(known)}."
                    )
        if isinstance(encoder, dict):
            tables = {key for key, value in encoder.items() if isinstance(value, Table)}
            apart = set(encoder) - tables
        else:
            tables, apart = known if isinstance(encoder, Table) else set(), set()
        if isinstance(inputs, dict):
            apart |= set(inputs)
        return frozenset(tables), frozenset(apart)

    def refuse_misplaced(self, plan: AmortizationPlan) -> None:
        """Refuses encoders of what the plan does not amortize."""
        encoder = self.options["encoder"]
        for key, value in encoder.items() if isinstance(encoder, dict) else ():
            block = plan.block_of(key) or next((b for b in plan.blocks if is_of(key, b.plates) and b.amortized), None)
            if not isinstance(value, Table) and (block is None or not block.amortized):
                mine = block or next((b for b in plan.blocks if is_of(key, b.plates)), None)
                why = f"no data depend on '{key}', so that its posterior is its prior. Leave it out"
                if mine is not None and mine.remedy:
                    why = f"{mine.remedy}; left out, it has a table"
                if key in plan.observed:
                    why = f"'{key}' is observed in this call. Initialize the guide by a call in which it is a latent"
                raise ValueError(f"{self.kind}: encoder={{'{key}': ...}}, but {why}.")

    def excerpts(self, facts: Structure, plan: AmortizationPlan, arguments: Arguments) -> tuple[Arguments, Arguments]:
        """Returns the call that parameters start from, and that statistics are taken from: of a long one, parts."""
        inputs = self.options["inputs"]
        functions = any(callable(value) for value in (inputs.values() if isinstance(inputs, dict) else [inputs]))
        by_row = {plate for block in plan.blocks if not block.amortized for plate in block.plates}
        if facts.part is None or functions or by_row & set(facts.part.plates):
            return arguments, arguments
        return facts.part.arguments, facts.part.sample

    def prepared(
        self, plan: AmortizationPlan, examples: Mapping[str, Reading], device: torch.device, dtype: torch.dtype
    ) -> tuple[AmortizationPlan, nn.ModuleDict]:
        """Returns the plan with the shapes that data have, and preparations measured on them."""
        blocks, preparations = [], nn.ModuleDict()
        for block in plan.blocks:
            if block.name in examples:
                block, preparations[block.key] = self._prepared(block, examples[block.name], device, dtype)
            blocks.append(block)
        return replace(plan, blocks=tuple(blocks)), preparations

    def _prepared(
        self, block: Block, reading: Reading, device: torch.device, dtype: torch.dtype
    ) -> tuple[Block, Preparation]:
        levels = []
        for level, cells in zip(block.levels, reading.cells, strict=True):
            if any(source.name == FUNCTION for source in level.sources):
                shape = tuple(cells[0][0].shape[reading.count :])
                level = replace(level, sources=(replace(level.sources[0], shape=shape),))
            levels.append(level)
        preparation = Preparation(levels, self.options["prepare"]).to(device, dtype)
        preparation.measure(reading.cells, dtype)
        widths = [0 if rows is None else rows.shape[-1] for rows in preparation(reading.cells, dtype)]
        levels = [replace(level, width=width) for level, width in zip(levels, widths, strict=True)]
        return replace(block, levels=tuple(levels), features=sum(widths)), preparation

    def coders(
        self,
        plan: AmortizationPlan,
        preparations: nn.ModuleDict,
        widths: Mapping[str, int] | Mapping[str, Reading],
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.ModuleDict:
        """Makes a coder for each block; ``widths`` are those of the trunks' output, or data to find them by."""
        coders = nn.ModuleDict()
        for block in plan.blocks:
            sizes = block.widths(self.family.per_dim)
            encoder = self._encoder_of(block)
            if not block.amortized:
                coders[block.key] = Rows(block.rows, sizes).to(device, dtype)
            elif isinstance(encoder, Constant):
                coders[block.key] = Rows(1, sizes).to(device, dtype)
            else:
                phis, in_features = _phis(block, encoder)
                phis.to(device, dtype)
                reader = None
                if block.reach is not None:
                    reader = encoder.reader(in_features).to(device, dtype)  # type: ignore[union-attr, operator]
                    in_features = width_of(reader, in_features)
                trunk = encoder if isinstance(encoder, nn.Module) else _made(encoder, block, in_features)
                if trunk is not encoder:
                    trunk = trunk.to(device, dtype)
                width = widths[block.name]
                if isinstance(width, Reading):
                    coder = Heads(phis, reader, trunk, 0, ())
                    width = self._trunk_width(block, coder, preparations[block.key], width, dtype)
                coder = Heads(phis, reader, trunk, width, sizes)
                coder.heads.to(device, dtype)
                coders[block.key] = coder
        return coders

    def _encoder_of(self, block: Block) -> Encoder:
        encoder = encoder_for(self.options["encoder"], block.name, block.sites, block.plates)
        if encoder is None:
            return Recurrent() if block.reach else MLP((min(max(64, block.features // 2), 400),) * 2)
        return encoder

    def _trunk_width(
        self, block: Block, coder: Heads, preparation: nn.Module, reading: Reading, dtype: torch.dtype
    ) -> int:
        """Runs a trunk on example data; returns how many features it makes."""
        with preserved(coder, evaluating=True), torch.no_grad():
            rows = features_of(block, coder, preparation(reading.cells, dtype), reading)
            try:
                return on_rows(coder.trunk, rows).shape[-1]
            except ValueError as error:
                sites = ", ".join(f"'{site}'" for site in block.sites)
                raise ValueError(f"{self.kind}: for {sites}, {error}") from None
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"{self.kind}: the encoder of {list(block.sites)} does not take its data, of which every "
                    f"row has {rows.shape[-1]} features (pooled ones included): {error}. Expected a module of one "
                    f"input, shape (rows, features). Pass a function of their number: encoder=lambda in_features: ..."
                ) from None

    def start(
        self,
        plan: AmortizationPlan,
        coders: nn.ModuleDict,
        model: Model,
        arguments: Arguments,
        init_loc_fn: Callable[..., Any],
    ) -> tuple[AmortizationPlan, poutine.Trace]:
        """Makes q start at ``init_loc_fn`` with ``init_scale``; returns the plan, which says more now, and that run."""
        args, kwargs = arguments
        rng = pyro.util.get_rng_state()
        with preserved(model, evaluating=True):
            pyro.util.set_rng_state(rng)
            with torch.no_grad(), poutine.block(), InitMessenger(_with_fallback(init_loc_fn)):
                trace = poutine.trace(model).get_trace(*args, **kwargs)
            rng = pyro.util.get_rng_state()
        pyro.util.set_rng_state(rng)
        nodes = merged(trace.nodes, plan.families, plan.loops)
        for block in plan.blocks:
            coder: Any = coders[block.key]
            for i, name in enumerate(block.sites):
                target = coder.values[i] if isinstance(coder, Rows) else coder.heads[i].bias
                start = self._start_of(nodes[name], block, plates_of([nodes[name]], plan.same), target.dtype)
                if isinstance(coder, Rows):
                    target.data.copy_(start if len(start) == len(target) else start.mean(0, keepdim=True))
                else:
                    coder.heads[i].weight.data.mul_(0.1)
                    target.data.copy_(start.mean(0))
        return described(plan, nodes), trace

    def _start_of(self, site: Any, block: Block, around: dict[str, Plate], dtype: torch.dtype) -> Tensor:
        """Returns the parameters with which q of a site starts, shape (elements, width); if discrete, the prior's."""
        value = prior_logits(site["fn"]) if block.is_discrete else bijection(site).inv(site["value"])
        batch = len(site["fn"].batch_shape)
        axes = [batch + around[plate].dim for plate in block.plates]
        value = value.detach().to(dtype).movedim(axes, list(range(len(axes)))).nan_to_num(0.0, 0.0, 0.0)
        rows = value.reshape(math.prod(value.shape[: len(axes)]), -1)
        if block.is_discrete:
            return rows.clamp(min=-10.0, max=10.0)
        return self.family.parameters(rows, torch.full_like(rows, self.options["init_scale"]))


def _with_fallback(init_loc_fn: Callable[..., Any]) -> Callable[[Any], Tensor]:
    """Starts sites in the middle of their support where ``init_loc_fn`` needs draws that an improper prior lacks."""

    def init(site: Any) -> Tensor:
        if support_of(site["fn"]).is_discrete or is_delta(site["fn"]):
            return site["fn"].sample()
        try:
            return init_loc_fn(site)
        except NotImplementedError:
            return init_to_center(site)

    return init


def _phis(block: Block, encoder: Any) -> tuple[nn.ModuleDict, int]:
    """Makes the networks that run on rows before they are pooled; returns also how many features the trunk gets."""
    sets = encoder if isinstance(encoder, DeepSets) else DeepSets()
    series = encoder if isinstance(encoder, Recurrent) else Recurrent()
    phis, widths = nn.ModuleDict(), [level.width for level in block.levels]
    for i, level in enumerate(block.levels[:-1]):
        assert level.into is not None
        handed = widths[i]
        if level.pooled and handed and level.in_order:
            phis[str(i)] = series.reader(handed)
            handed = width_of(phis[str(i)], handed) + 1
        elif level.pooled and handed:
            phis[str(i)] = sets.phi(handed)
            handed += (sets.phi_dims[-1] if sets.phi_dims else handed) + 1
        widths[level.into] += handed
    return phis, widths[-1]


def _made(encoder: Any, block: Block, in_features: int) -> nn.Module:
    module = encoder(in_features)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"AutoAmortized: the encoder of {list(block.sites)}, called with the number of features, returned a "
            f"{type(module).__name__}. Expected an nn.Module, as MLP((64, 64)) gives; one may also be passed itself."
        )
    return module


def check_inputs(guide: str, inputs: Any) -> None:
    """Refuses an ``inputs=`` that is none."""
    for value in inputs.values() if isinstance(inputs, dict) else [inputs]:
        names = [value] if isinstance(value, str) else value
        is_names = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if not (value is None or is_names or callable(value)):
            raise ValueError(
                f"{guide}: inputs={inputs!r}. Expected a name or a list of names of arguments and observed sites, a "
                f"function of the model's arguments, or a dict from site or plate name to these."
            )


def check_encoder(guide: str, encoder: Any) -> None:
    """Refuses an ``encoder=`` that is none."""
    for value in encoder.values() if isinstance(encoder, dict) else [encoder]:
        if inspect.isclass(value) and value in CLASSES:
            raise ValueError(
                f"{guide}: encoder={value.__name__} is a class. Expected an instance: encoder={CLASSES[value]}."
            )
        if not (value is None or isinstance(value, (Table, Constant)) or callable(value)):
            raise ValueError(
                f"{guide}: encoder={value!r}. Expected None, an nn.Module, a callable from the number of features to "
                f"an nn.Module such as MLP((64, 64)), Table(), Constant(), or a dict from site or plate name to these."
            )
