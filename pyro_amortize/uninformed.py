"""Latents that training informed, and that a call does not: which of them call for a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from pyro_amortize.calls import Call
from pyro_amortize.carried import line_for
from pyro_amortize.plan import AmortizationPlan, Block
from pyro_amortize.structure import Plate


class Uninformed:
    """The blocks that have no data in one call, so that their draws are from the model's own conditional.

    That is as it should be for new rows, which are seen to be new where there are more or fewer of them than the guide
    was planned with. It is hardly meant for globals, for groups that rows point to by an index, for rows that may be
    those of training, and where the call has some of the data that inform a latent, but not all. Where another call
    informs, only the last is amiss.

    Args:
        plan: The plan.
        call: The call.
        informed: Whether another call informs this one.
        kind: Name of the guide's class.
    """

    def __init__(self, plan: AmortizationPlan, call: Call, informed: bool, kind: str) -> None:
        self.plan, self.call, self.informed, self.kind = plan, call, informed, kind
        self.blocks: dict[str, Block] = {}

    def note(self, block: Block, plates: dict[str, Plate]) -> None:
        """Notes a block without its data, with the plates around it, if that calls for a word."""
        linked = any(level.link and level.link.to in plates for level in block.levels)
        as_planned = all(plate.full_size == self.plan.plates[name] for name, plate in plates.items())
        if self._is_partly_there(block) or (not self.informed and (linked or as_planned)):
            self.blocks[block.name] = block

    def _is_partly_there(self, block: Block) -> bool:
        """Whether this call holds some of the observations that inform a block, but not all."""
        feeding = {s.name for s in block.sources if s.feeds is not None and s.axes is not None}
        return len({self.call.leaves.get(name) is None for name in feeding}) > 1

    def warn(self, kind_of_call: Callable[[], Any], told: set[Any]) -> None:
        """Warns of the blocks, once for each kind of call, which ``told`` remembers."""
        if not self.blocks or (key := (kind_of_call(), self.informed, *self.blocks)) in told:
            return
        told.add(key)
        blocks = self.blocks.values()
        sites = ", ".join(f"'{site}'" for block in blocks for site in block.sites)
        sources = [source for block in blocks for source in block.sources if not source.drawn]
        missing = dict.fromkeys(f"'{s.name}'" for s in sources if self.call.leaves.get(s.name) is None)
        if any(map(self._is_partly_there, blocks)):
            what, advice = "not all data that inform {} are in this call", "Pass them."
        else:
            what = "no data of this call inform {}, though they did in training"
            advice = f"For the posterior, and to predict other rows than those that inform: {line_for(self.call)}."
        why = f"Without {', '.join(missing)}" if missing else "As all are masked"
        warnings.warn(
            f"{self.kind}: {what.format(sites)}. {why}, draws are from the prior, given the latents above. {advice}",
            stacklevel=3,
        )
