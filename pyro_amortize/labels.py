"""Whole numbers by which a model looks things up: labels, told from numbers that enter its arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pyro
import torch
from torch import Tensor

from pyro_amortize.probes import Probes
from pyro_amortize.structure import Labels, Source

MOST_COLUMNS = 32
"""Columns of an argument beyond which they are tried together."""
MOST_VALUES = 12
"""Numbers at which an argument is tried for a threshold."""
MOST_LABELS = 100_000
"""Labels beyond which there is no row of parameters for each."""

_Columns = tuple[int, ...]
_Range = tuple[int, int]
_Factors = dict[str, Tensor]


class LabelProbes:
    """Finds which columns of arguments are labels.

    Tensors that index have to be of whole numbers: a model that runs on whole numbers and not on the same numbers as
    floats looks something up by them. Where it does run, the numbers are moved by fractions: arithmetic gives other
    densities for other fractions, comparing (``group == 2``) the same for all, and cutting fractions off
    (``group.long()``) the density of the whole number, as a threshold does, too. Of these two and of several columns in
    one argument, those are labels that cannot be larger than what is looked up is long. How long that is says also how
    many labels there are.

    Args:
        probes: The look at the model that is taken.
    """

    def __init__(self, probes: Probes) -> None:
        self.probes = probes

    def labels(self, source: Source) -> tuple[Labels | None, ...]:
        """Returns for each column of a source's cells its labels, None for a column of numbers; () if all are."""
        leaf = None if source.axes is None else self.probes.held.call.tensors.get(source.name)
        if leaf is None or source.feeds or leaf.dtype == torch.bool or leaf.is_complex() or not leaf.numel():
            return ()
        places = _columns(leaf, source.axes or ())
        groups = list(_whole_columns(leaf, places))
        if not groups:
            return ()
        found: dict[int, Labels] = {}
        for group, (first, last) in self._looked_up(source.name, leaf, places, groups).items():
            if last - first >= MOST_LABELS:
                warnings.warn(
                    f"plan_amortization: argument '{source.name}' is used to look something up, by labels from "
                    f"{first} to {last}, too many for parameters for each, so encoders see it as a number. Count its "
                    f"labels from 0: {source.name} = {source.name}.unique(return_inverse=True)[1].",
                    stacklevel=2,
                )
                continue
            found |= dict.fromkeys(group, Labels(first, last - first + 1))
        return tuple(found.get(column) for column in range(int(places.max()) + 1)) if found else ()

    def tells_more(self, source: Source, sources: list[Source]) -> bool:
        """Tells of an argument that says where in others the data of a row stand whether it tells anything beside."""
        tensors = self.probes.held.call.tensors
        tables = [(s, through) for s in sources for through in s.through if through == source.name]
        leaves = {}
        for table, through in tables:
            axis = table.axes[table.through.index(through)]  # type: ignore[index]
            leaf = tensors[table.name]
            leaves[table.name] = leaf.select(axis, 0).unsqueeze(axis).expand(leaf.shape).clone()
        if not leaves:
            return True
        index = tensors[source.name]
        before, after = self._run(leaves), self._run({**leaves, source.name: index.flatten().roll(1).view_as(index)})
        return before is None or after is None or not self._same(before, after)

    def _looked_up(self, name: str, leaf: Tensor, places: Tensor, groups: list[_Columns]) -> dict[_Columns, _Range]:
        """Returns the smallest and the largest label of those groups of columns that are labels."""

        def limit(columns: _Columns) -> int | None:
            return self._limit(name, leaf, places, columns)

        plain = leaf if leaf.is_floating_point() else leaf.to(self._dtype())
        base = self._run({name: plain})
        ranges = {group: _range(leaf, places, group) for group in groups}
        indexes = base is None and not isinstance(self.failure, (TypeError, AssertionError))  # as range(n.max()) raises
        steps: dict[_Columns, bool | None] = dict.fromkeys(groups)
        if base is not None:
            steps = {group: self._steps(name, plain, base, places, group) for group in groups}
        limits = {group: None if steps[group] is False else limit(group) for group in groups}
        chosen = [
            group
            for group in groups
            if steps[group]
            or (limits[group] is not None and (indexes or not self._is_threshold(name, leaf, places, group)))
        ]
        chosen = groups if indexes and not chosen else chosen
        free = [ranges[group] for group in chosen if limits[group] is None]
        found = {}
        for group in chosen:
            top = limits[group]
            if top is None:
                found[group] = min(low for low, _ in free), max(high for _, high in free)
            else:
                found[group] = min(0, ranges[group][0]), top
        return found

    def _steps(self, name: str, plain: Tensor, base: list[_Factors], places: Tensor, group: _Columns) -> bool | None:
        """Moves a group of columns by fractions; tells whether it is compared with whole numbers, None if it may be."""

        def moved(fraction: float) -> list[_Factors] | None:
            return self._run({name: torch.where(_are(places, group), plain + fraction, plain)})

        up, further = moved(0.25), moved(0.375)
        if up is None or further is None:
            return None
        if not self._same(up, further):
            return False
        if self._same(up, base):
            return None
        down = moved(-0.25)
        return down is not None and self._same(up, down)

    def _is_threshold(self, name: str, leaf: Tensor, places: Tensor, group: _Columns) -> bool:
        """Tells of columns whether densities change but once when all numbers but the largest grow, as by a length."""
        here, (_, top) = _are(places, group), _range(leaf, places, group)
        values = leaf[here.expand(leaf.shape) & (leaf < top)].unique()[:MOST_VALUES]
        runs = [self._run({name: torch.where(here & (leaf < top), value, leaf)}) for value in values]
        found = [run for run in runs if run is not None]
        if len(found) < 3:
            return False
        for i, base in enumerate(self.probes.bases):
            for site in found[0][i]:
                factors = [run[i][site] for run in found if site in run[i]]
                if all(factor.shape == factors[0].shape for factor in factors):
                    moves = torch.stack(factors).nan_to_num().diff(dim=0).abs() > base.noise
                    if bool((moves.sum(0) > 1).any()):
                        return False
        return True

    def _limit(self, name: str, leaf: Tensor, places: Tensor, group: _Columns) -> int | None:
        """Returns the largest number that the model takes in some columns; None if there is no end in sight.

        Not on an accelerator, which an index that is out of range would leave unusable.
        """
        factors = self.probes.factors.values()
        if leaf.device.type != "cpu" or any(site["log_prob"].device.type != "cpu" for site in factors):
            return None
        _, top = _range(leaf, places, group)
        here = _are(places, group) & (leaf == top)
        largest = 2**24 if leaf.is_floating_point() else torch.iinfo(leaf.dtype).max

        def runs(value: int) -> bool:
            if value > largest:
                return False
            return self._run({name: torch.where(here, torch.tensor(value, dtype=leaf.dtype), leaf)}) is not None

        low, step = top, 1
        while runs(low + step):
            low, step = low + step, 2 * step
            if low > max(4 * top, 64):
                return None
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if runs(middle) else (low, middle)
        return low

    def _run(self, leaves: dict[str, Tensor]) -> list[_Factors] | None:
        """Returns the log-factors at all bases with other arguments; None if the model fails, ``failure`` says how."""
        found = []
        for base in self.probes.bases:
            try:
                with pyro.validation_enabled(False):
                    nodes = base.held.run(leaves)
            except Exception as error:
                self.failure = error
                return None
            found.append({name: nodes[name]["log_prob"] for name in base.factors if name in nodes})
        return found

    def _same(self, before: list[_Factors], after: list[_Factors]) -> bool:
        return all(
            one.keys() == other.keys()
            and all(
                one[name].shape == other[name].shape
                and torch.allclose(one[name], other[name], rtol=0.0, atol=base.noise, equal_nan=True)
                for name in one
            )
            for one, other, base in zip(before, after, self.probes.bases, strict=True)
        )

    def _dtype(self) -> torch.dtype:
        dtypes = [value.dtype for value in self.probes.held.call.tensors.values() if value.is_floating_point()]
        return dtypes[0] if dtypes else torch.get_default_dtype()


def _columns(leaf: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Numbers the columns of an argument's cells; a tensor that broadcasts against the argument."""
    sizes = [1 if axis in axes else size for axis, size in enumerate(leaf.shape)]
    return torch.arange(torch.Size(sizes).numel(), device=leaf.device).reshape(sizes)


def _are(places: Tensor, group: _Columns) -> Tensor:
    return torch.isin(places, torch.tensor(group, device=places.device))


def _whole_columns(leaf: Tensor, places: Tensor) -> Iterator[_Columns]:
    """Yields the columns that hold whole numbers only, all together if they are many."""
    columns = tuple(range(places.numel()))
    if not leaf.is_floating_point():
        yield from [(column,) for column in columns] if len(columns) <= MOST_COLUMNS else [columns]
    elif len(columns) <= MOST_COLUMNS:
        whole = leaf.isnan() | ((leaf == leaf.round()) & (leaf.abs() < 2**24))
        for column in columns:
            here = _are(places, (column,)).expand(leaf.shape)
            if (
                bool(whole[here].all()) and len(leaf[here].nan_to_num().unique()) > 2
            ):  # two numbers do as well as labels
                yield (column,)


def _range(leaf: Tensor, places: Tensor, group: _Columns) -> _Range:
    values = leaf[_are(places, group).expand(leaf.shape)]
    values = values[~values.isnan()]
    return int(values.min()), int(values.max())
