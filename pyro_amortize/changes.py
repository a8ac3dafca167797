"""Whether the model that a guide meets is still the one that it was made for: a saved guide may meet another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.distributions.constraints import independent

from pyro_amortize.plan import AmortizationPlan, Block
from pyro_amortize.structure import plates_of
from pyro_amortize.supports import support_of, undressed

SPACES = {"greaterthaneq": "greaterthan", "halfopeninterval": "interval", "interval": "interval"}
"""Constraints that differ in whether they hold their bounds, which is all the same to a density."""


def described(plan: AmortizationPlan, nodes: Mapping[str, Any]) -> AmortizationPlan:
    """Returns a plan that also says where its sites live, and in which plates, as a run of the model shows it."""
    blocks = []
    for block in plan.blocks:
        sites = [nodes[name] for name in block.sites]
        around = tuple(tuple(sorted(plates_of([site]))) for site in sites)
        blocks.append(replace(block, spaces=tuple(_space(site["fn"]) for site in sites), around=around))
    return replace(plan, blocks=tuple(blocks))


def refuse_changed(kind: str, site: Any, block: Block, which: int, turn: Mapping[str, int]) -> None:
    """Refuses a site that stands in other plates than when the guide was made, or lives elsewhere.

    Args:
        kind: Name of the guide's class.
        site: The site, before q takes the prior's place.
        block: Its block.
        which: Its position there.
        turn: For each loop that numbers it which of its turns it is of.
    """
    if not block.spaces:  # of a plan that was saved without
        return
    space, around = _space(site["fn"]), sorted({*plates_of([site]), *turn})
    if space != block.spaces[which]:
        what = f"has values of kind '{space}', a {type(undressed(site['fn'])).__name__}"
        raise ValueError(_changed(kind, site["name"], what, f"'{block.spaces[which]}'"))
    if around != list(block.around[which]):
        raise ValueError(_changed(kind, site["name"], f"stands in plates {around}", f"{list(block.around[which])}"))


def refuse_lost(kind: str, plan: AmortizationPlan, seen: set[str]) -> None:
    """Refuses a run of a model that has not come by all sites of the guide."""
    planned = {site for block in plan.blocks for site in block.sites}
    lost = sorted(planned - {plan.turn_of(name)[0] for name in seen})
    if lost:
        raise ValueError(_changed(kind, lost[0], "is not in this run of the model", "a latent"))


def _changed(kind: str, name: str, now: str, then: str) -> str:
    return (
        f"{kind}: site '{name}' {now}; when the guide was made it was {then}. With these arguments the model is not "
        f"the one that the guide was trained for: load it with that one, {kind}.load(path, model), or train another."
    )


def _space(fn: Any) -> str:
    support = support_of(undressed(fn))
    while isinstance(support, independent):
        support = support.base_constraint
    name = type(support).__name__.strip("_").lower()
    return SPACES.get(name, name)
