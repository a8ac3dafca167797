"""A call's arguments, turned into the data of a block: shape (rows, features), prepared for a network."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from pyro_amortize.calls import is_recorded
from pyro_amortize.encoders import joined
from pyro_amortize.levels import Level
from pyro_amortize.missing import has_nan
from pyro_amortize.structure import Labels, Source

Prepare = str | None | Callable[[Tensor], Tensor]
Cells = tuple[Tensor, Tensor | None]
USUAL = 3.0
"""Standard deviations from the mean that are no surprise."""


class Inputs(nn.Module):
    """The data at one level of a block, prepared by what they are.

    Categories become one-hot columns, labels that the model looks things up by learnt features (see :class:`Lookup`),
    and unbounded counts log(1 + x). Then everything but these indicators and features is centred, and scaled: reals by
    the standard deviation of each column, counts by one standard deviation for all columns of an argument, since a
    pixel or word that is rarely on has next to none of its own. What is missing, NaN or under a mask, is filled by the
    mean and marked in a column of its own. The statistics are buffers.

    Args:
        sources: The data.
        prepare: "auto" for the above, None for plain flattened data, or a function from the latter, shape
            (rows, width), to features of shape (rows, any width).
    """

    shift: Tensor
    scale: Tensor
    reach: Tensor

    def __init__(self, sources: tuple[Source, ...], prepare: Prepare = "auto") -> None:
        super().__init__()
        self.sources = sources
        self.prepare = prepare
        auto = prepare == "auto"
        columns = sum(source.width for source in sources) if auto else 0
        self.register_buffer("shift", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))
        self.register_buffer("reach", torch.zeros(columns))
        lookups = {str(i): Lookup(source) for i, source in enumerate(sources) if auto and source.labels}
        self.lookups = nn.ModuleDict(lookups)
        self._stands = auto and bool(self._indicators().all())  # nothing to be centred or filled

    def forward(self, rows: list[Cells], dtype: torch.dtype, looks: bool = True) -> Tensor:
        """Prepares data.

        Args:
            rows: For each source a tensor of shape (..., *shape of one cell), and which of it is there.
            dtype: Of the features.
            looks: Whether to look for NaN that no column marks; if not, features may hold them.

        Returns:
            Features of shape (..., features). They may be the data themselves: not to be changed in place.
        """
        if self.prepare == "auto":
            features = self._columns(rows, dtype, looks)
            features = features if self._stands else (features - self.shift) / self.scale
            if not any(source.missing for source in self.sources):
                return features
            return torch.nan_to_num(features, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        plain = []
        for (value, present), source in zip(rows, self.sources, strict=True):
            flat = _flat(value, source)
            lacking = _lacking(flat, present, source, looks)
            plain.append((flat if lacking is None else torch.where(lacking, 0, flat)).to(dtype))
        features = joined(plain)
        if self.prepare is None:
            return features
        prepared: Tensor = self.prepare(features.reshape(-1, features.shape[-1]).clone())  # type: ignore[operator]
        return prepared.reshape(*features.shape[:-1], -1)

    @torch.no_grad()
    def measure(self, rows: list[Cells], dtype: torch.dtype) -> None:
        """Takes the statistics of the preparation from example data."""
        if self.prepare != "auto":
            return
        columns = self._columns(rows, dtype).reshape(-1, len(self.shift))
        present = ~columns.isnan()
        count = present.sum(0).clamp(min=1)
        mean = columns.nan_to_num(0.0).sum(0) / count
        spread = (torch.where(present, columns - mean, 0.0).square().sum(0) / count).sqrt()
        shared, free = (marks.to(mean.device) for marks in (self._shared(), self._indicators()))
        for group in range(1, len(self.sources) + 1):
            if bool((shared == group).any()):
                spread[shared == group] = spread[shared == group].square().mean().sqrt()
        flat = spread <= 1e-6 * (1 + mean.abs())
        self.shift = torch.where(free, 0.0, mean)
        self.scale = torch.where(free | flat, 1.0, spread)
        self.reach = ((columns - self.shift) / self.scale).nan_to_num(0.0).abs().amax(0)

    def distance(self, rows: list[Cells], dtype: torch.dtype) -> Tensor | None:
        """Returns how far data are from those that the statistics were taken from, shape (...) as their cells.

        It is the largest absolute column, in standard deviations from its mean, against the largest such among those
        data, or three if that is more: up to 1 within these. None where data are not prepared by their statistics.
        """
        if self.prepare != "auto" or self._stands or not len(self.shift):
            return None
        columns = ((self._columns(rows, dtype, looks=False) - self.shift) / self.scale).nan_to_num(0.0).abs()
        return (columns / self.reach.clamp(min=USUAL)).amax(-1)

    def _columns(self, rows: list[Cells], dtype: torch.dtype, looks: bool = True) -> Tensor:
        """The columns before they are scaled, NaN where something is missing and no indicator."""
        columns = []
        for i, ((value, present), source) in enumerate(zip(rows, self.sources, strict=True)):
            flat = _flat(value, source)
            lacking = _lacking(flat, present, source, looks or source.kind == "category")
            if source.kind == "category":
                known = (flat if lacking is None else torch.where(lacking, -1, flat)).long()
                here = known[..., None] == torch.arange(source.categories, device=flat.device)
                columns.append(here.flatten(-2).to(dtype))
            elif source.labels:
                columns.append(self.lookups[str(i)](flat, lacking, dtype))
            else:
                flat = flat.to(dtype)
                if source.kind == "count":
                    flat = flat.clamp(min=0).log1p()
                filler = 0.0 if source.kind == "binary" else torch.nan
                columns.append(flat if lacking is None else torch.where(lacking, filler, flat))
            if lacking is not None:
                columns.append(lacking.to(dtype))
        return joined(columns)

    def untrained(self, rows: list[Cells]) -> dict[str, set[int]]:
        """Returns the labels among data that no data had in training, by the name of their source."""
        found: dict[str, set[int]] = {}
        for i, lookup in self.lookups.items():
            (value, present), source = rows[int(i)], self.sources[int(i)]
            flat = _flat(value, source)
            labels = lookup.untrained(flat, _lacking(flat, present, source, False))  # type: ignore[operator]
            found |= {source.name: labels} if labels else {}
        return found

    def _shared(self) -> Tensor:
        """Numbers the columns of each argument of counts from 1; 0 for columns with a scale of their own."""
        marks: list[int] = []
        for i, source in enumerate(self.sources):
            own = _numel(source.cell) if source.kind in ("count", "level") else 0
            marks += [i + 1] * own + [0] * (source.width - own)
        return torch.tensor(marks, dtype=torch.long)

    def _indicators(self) -> Tensor:
        marks: list[bool] = []
        for source in self.sources:
            own = source.width - (_numel(source.cell) if source.missing else 0)
            if source.labels:
                for labels in source.labels:
                    marks += [True] * labels.width if labels else [False]
            else:
                marks += [source.kind in ("category", "binary")] * own
            marks += [True] * (source.width - own)
        return torch.tensor(marks, dtype=torch.bool)


class Lookup(nn.Module):
    """Learnt features for the labels in a source: a row of parameters for each label, zero before it is trained.

    The rows have as many numbers as there are labels, up to :data:`~pyro_amortize.structure.WIDEST`, so that few labels
    are told apart as freely as by one-hot columns. What was in no row that a guide was trained on keeps the row of
    zeros, which is that of no label.

    Args:
        source: The source; its columns that are no labels pass as they are.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.name = source.name
        self.runs = [(labels, len(list(run))) for labels, run in groupby(source.labels)]  # columns of a kind, in order
        self.kinds = [labels for labels in dict.fromkeys(source.labels) if labels]
        self.values = nn.ParameterList([torch.zeros(labels.count, labels.width) for labels in self.kinds])

    def forward(self, flat: Tensor, lacking: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Returns features, shape (..., width), for columns, shape (..., columns), of which some may be missing."""
        found = []
        for labels, here, there in self._parts(flat, lacking):
            if labels is None:
                found.append(here.to(dtype) if there is None else torch.where(there, here.to(dtype), torch.nan))
                continue
            known = (here >= labels.first) & (here < labels.first + labels.count)
            outside = ~known if there is None else ~known & there
            if not is_recorded() and bool(outside.any()):
                raise ValueError(
                    f"AutoAmortized: argument '{self.name}' holds the label {int(here[outside][0])}, but the guide was "
                    f"initialized for {labels.first} to {labels.first + labels.count - 1}: so far goes what the model "
                    f"looks up by it, or, where that has no end, the data of that call. Initialize a new guide with "
                    f"data that hold it."
                )
            known = known if there is None else known & there
            rows = nn.functional.embedding(torch.where(known, here - labels.first, 0).long(), self._rows(labels))
            found.append(torch.where(known[..., None], rows, 0.0).flatten(-2).to(dtype))
        return torch.cat(found, -1)

    def untrained(self, flat: Tensor, lacking: Tensor | None) -> set[int]:
        """Returns the labels among data whose rows are as at the start, though others' are not."""
        found: set[int] = set()
        for labels, here, there in self._parts(flat, lacking):
            if labels is not None and bool((fresh := ~self._rows(labels).any(-1)).logical_not().any()):
                present = here if there is None else here[there]
                number = (present - labels.first).long().clamp(0, labels.count - 1)
                found |= {int(label) for label in present[fresh[number]].unique()}
        return found

    def _rows(self, labels: Labels) -> Tensor:
        return self.values[self.kinds.index(labels)]

    def _parts(self, flat: Tensor, lacking: Tensor | None) -> Iterator[tuple[Labels | None, Tensor, Tensor | None]]:
        """Yields labels, the columns that hold these, and which of them are not missing; None if all are there."""
        sizes = [size for _, size in self.runs]
        there = [None] * len(sizes) if lacking is None else (~lacking).split(sizes, -1)
        for (labels, _), here, present in zip(self.runs, flat.split(sizes, -1), there, strict=True):
            yield labels, here, present


class Preparation(nn.ModuleList):
    """The data of a block, prepared level by level.

    Args:
        levels: The levels; those without data have no features.
        prepare: As of :class:`Inputs`.
    """

    def __init__(self, levels: Sequence[Level], prepare: Prepare) -> None:
        super().__init__(Inputs(level.sources, prepare) for level in levels)

    def forward(self, cells: list[list[Cells]], dtype: torch.dtype, looks: bool = True) -> list[Tensor | None]:
        """Returns features of shape (..., *plates, features) for each level, None for one without data."""
        return [part(rows, dtype, looks) if rows else None for part, rows in zip(self, cells, strict=True)]

    def measure(self, cells: list[list[Cells]], dtype: torch.dtype) -> None:
        """Takes the statistics of the preparation from example data."""
        for part, rows in zip(self, cells, strict=True):
            if rows:
                part.measure(rows, dtype)  # type: ignore[operator]

    def untrained(self, cells: list[list[Cells]]) -> dict[str, set[int]]:
        """Returns the labels among data that no data had in training, by the name of their source."""
        found: dict[str, set[int]] = {}
        for part, rows in zip(self, cells, strict=True):
            found |= part.untrained(rows) if rows else {}  # type: ignore[operator]
        return found


@dataclass(frozen=True)
class Present:
    """The elements of a plate in the present call: ``size`` of ``full_size``; ``indices`` say which, if not all."""

    size: int
    full_size: int
    indices: Any = None


def pick_cells(source: Source, value: Any, plates: Mapping[str, Present], longer: Container[str] = ()) -> Tensor:
    """Returns the cells of an argument that belong to the present elements of plates.

    Along a plate, an argument as long as the subsample is used as it stands; one of the full size is indexed. It is
    taken whole along plates of which nothing is said, over which it is to be pooled.

    Args:
        source: Where the argument's cells are.
        value: The argument.
        plates: The present elements.
        longer: Plates that may have more elements than data.

    Returns:
        Shape (*plates, *shape of one cell).

    Raises:
        ValueError: The argument is no tensor, or its shape does not fit.
    """
    around = "/".join(source.plates)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"AutoAmortized: argument '{source.name}' is a {type(value).__name__}, but plate '{around}' takes a row of "
            f"it for every element. Pass a tensor{_as_tensor(source.name, value)}."
        )
    assert source.axes is not None
    if value.dim() < len(source.axes) + len(source.shape):
        raise ValueError(
            f"AutoAmortized: argument '{source.name}' has shape {tuple(value.shape)}, so it lacks an axis: there has "
            f"to be one for the elements of plate '{around}', of shape {source.shape} each. One alone is "
            f"{source.name}.unsqueeze({source.axes[0]})."
        )
    cell = tuple(size for axis, size in enumerate(value.shape) if axis not in source.axes)
    if value.dim() <= max(source.axes, default=-1) or cell != source.shape:
        got, expected = _numel(cell), _numel(source.shape)
        wide = got != expected and len(cell) == len(source.shape)
        what = f"{got} features" if wide else f"rows of shape {cell}"
        want = f"{expected}" if wide else f"shape {source.shape}"
        raise ValueError(
            f"AutoAmortized: argument '{source.name}' has {what} per element of plate '{around}', but the guide was "
            f"initialized with {want}. Build a new guide for data of this width: guide = AutoAmortizedNormal(model)."
        )
    cells = value.movedim(source.axes, tuple(range(len(source.axes))))
    for axis, name in enumerate(source.plates):
        if name not in plates:
            continue
        now = plates[name]
        length = cells.shape[axis]
        if length == now.full_size and (now.size < length or name in source.indexed) and now.indices is not None:
            cells = cells.index_select(axis, torch.as_tensor(now.indices, device=cells.device))
        elif length != now.size and not (name in longer and length < now.size):
            raise ValueError(
                f"AutoAmortized: argument '{source.name}' has {length} rows along axis {source.axes[axis]}, but plate "
                f"'{name}' has {now.size} elements in this call. Pass data arguments of equal length: "
                f"{source.name}[:{now.size}]."
            )
    return cells


def _as_tensor(name: str, value: Any) -> str:
    """Writes how a value becomes a tensor, if it can."""
    try:
        torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return ""
    return f": torch.as_tensor({name})"


def _lacking(flat: Tensor, present: Tensor | None, source: Source, looks: bool) -> Tensor | None:
    """Returns which numbers of flattened cells are missing, NaN or under a mask; None where none can be."""
    if source.missing:
        return flat.isnan() if present is None else flat.isnan() | ~_flat(present, source)
    if looks and not is_recorded() and has_nan(flat):
        raise ValueError(
            f"AutoAmortized: '{source.name}' holds NaN, but the data that the guide was initialized with held "
            f"none, so the guide has no column to mark them. Initialize a new guide with data that hold NaN "
            f"under a mask, or fill them: {source.name}.nan_to_num()."
        )
    return None


def _flat(value: Tensor, source: Source) -> Tensor:
    batch = value.dim() - len(source.cell)
    return value.reshape((*value.shape[:batch], _numel(source.cell)))


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
