"""Groups that a model goes through one by one, each with latents, tables and data of its own, ``b_0``, ``b_1``, ..."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from typing import Any

import torch

from pyro_amortize.calls import is_recorded
from pyro_amortize.structure import Site, Structure

Groups = dict[str, dict[str, tuple[int, ...]]]
"""Latent of a group -> its group's own observed sites -> the shape of their values."""


def groups_apart(facts: Structure, latents: Collection[Site]) -> Groups:
    """Finds latents outside plates that differ by a number or a last word in their names, as those of their data do.

    Where other latents stand in a group's own plates, these may have any number of rows: no shapes are told then.

    Args:
        facts: The model's structure.
        latents: Latents that have tables.
    """
    families: dict[Any, list[Site]] = {}
    for site in latents:
        if not site.plates and _key_of(site.name):
            families.setdefault((stem_of(site.name), site.shape), []).append(site)
    found: Groups = {}
    for sites in families.values():
        data = {site.name: _data_of(site, facts) for site in sites}
        others = {n: set().union(*(data[m] for m in data if m != n)) for n in data}
        if len(sites) > 1 and all(data[n] and not data[n] & others[n] for n in data):
            for name, mine in data.items():
                plates = {plate for site in mine for plate in facts.sites[site].plates}
                inner = any(plates & set(site.plates) for site in facts.latents)
                found[name] = {} if inner else {site: facts.sites[site].shape for site in mine}
    return found


def stem_of(name: str) -> str:
    """Returns a name without what tells its group."""
    before, _, after = name.rpartition(_key_of(name) or name)
    return f"{before}*{after}"


def refuse_other_shape(kind: str, groups: Groups, name: str, shape: tuple[int, ...]) -> None:
    """Refuses other data of a group than those that its table was made for, as far as their shape tells.

    Raises:
        ValueError: The shape is another.
    """
    for latent, sites in groups.items():
        if sites.get(name, shape) != shape:
            raise ValueError(_told(kind, groups, f"at '{name}' it has shape {shape}, not {sites[name]}", latent))


def refuse_other_groups(kind: str, groups: Groups, drawn: Collection[str], partial: Collection[str]) -> None:
    """Refuses fewer groups than there are tables.

    Args:
        kind: Name of the guide's class.
        groups: The groups.
        drawn: Latents that the call has.
        partial: Those of them in a sequential plate that subsamples, and so leaves others of their kind out.

    Raises:
        ValueError: Some of the groups are not there.
    """
    stems = set(map(stem_of, partial))
    lacking = [name for name in groups if name not in drawn and stem_of(name) not in stems]
    if lacking:
        raise ValueError(_told(kind, groups, f"it has no '{lacking[0]}'", lacking[0]))


def refuse_more_groups(kind: str, groups: Groups, name: str) -> None:
    """Refuses a latent of one more group.

    Raises:
        ValueError: It is one.
    """
    latent = next((latent for latent in groups if stem_of(latent) == stem_of(name)), None)
    if latent is not None:
        raise ValueError(_told(kind, groups, f"it has '{name}', too", latent))


def warn_of_other_data(kind: str, groups: Groups, name: str, value: Any, sums: dict[str, float]) -> None:
    """Warns where groups are asked for, with other data than those on which their tables were trained first.

    Args:
        kind: Name of the guide's class.
        groups: The groups.
        name: An observed site.
        value: Its value in this call.
        sums: Sums of the values of such sites at their first step of training, which are noted here.
    """
    latent = next((latent for latent, sites in groups.items() if name in sites), None)
    training = torch.is_grad_enabled()
    if latent is None or is_recorded() or (name not in sums) != training:
        return
    total = float(torch.as_tensor(value).double().nansum())
    if sums.setdefault(name, total) != total:
        told = _told(kind, groups, f"the values at '{stem_of(name)}' are not those of its training", latent)
        warnings.warn(told, UserWarning, stacklevel=2)


def _told(kind: str, groups: Groups, what: str, latent: str) -> str:
    mine = [name for name in groups if stem_of(name) == stem_of(latent)]
    names = ", ".join(repr(name) for name in mine[:3]) + (", ..." if len(mine) > 3 else "")
    b = stem_of(latent).replace("*", "").strip("_") or "b"
    return (
        f"{kind}: {names} have a table of one row each, made for the {len(mine)} groups of data that the guide was "
        f"initialized with, but this call holds other groups: {what}. A table cannot answer for these. To have an "
        f"encoder that pools the rows of each group, write all groups in one plate, and their rows in another: with "
        f"pyro.plate('groups', num_groups): {b} = pyro.sample('{b}', ...); with pyro.plate('rows', len(y)): "
        f"pyro.sample('y', ..., obs=y), where y holds the rows of all groups, and {b}[..., group] stands for {b}; "
        f"'group' is an argument, the number of each row's group."
    )


def _key_of(name: str) -> str:
    numbers = re.findall(r"\d+", name)
    return numbers[-1] if numbers else name.rpartition("_")[2] if "_" in name else ""


def _data_of(site: Site, facts: Structure) -> set[str]:
    """The observed sites that a latent informs, if all have in their names what tells its group."""
    data = {name for name in facts.informing(site.name) if facts.sites[name].observed}
    key = _key_of(site.name)
    return data if all(key in re.findall(r"\d+|[^\W\d_]+", name) for name in data) else set()
