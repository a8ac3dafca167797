"""The parameters of q in one call: encoders and tables applied to the data of each block, once."""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_amortize.calls import is_recorded
from pyro_amortize.encoders import Heads, Rows, in_pieces
from pyro_amortize.layout import lengthened
from pyro_amortize.missing import has_nan
from pyro_amortize.plan import Block
from pyro_amortize.posterior import LIMIT
from pyro_amortize.reading import Piece, Reader, Reading, features_of, free_plate
from pyro_amortize.structure import Plate, plates_of
from pyro_amortize.uninformed import Uninformed

FIRST = 64  # elements of the first piece of an answer, on which the size of the others is measured


class Parts(Protocol):
    """What a guide is made of: modules for each block, their dtype, and the rows of tables that a minibatch holds."""

    dtype: torch.dtype
    row_ids: dict[str, Tensor]

    def coder_of(self, block: Block) -> Any: ...

    def preparation_of(self, block: Block) -> Any: ...


class BlockParameters:
    """Turns the data of one call into the parameters of q, block by block, as the model comes to their sites.

    Args:
        parts: The guide's modules.
        reader: The call's data.
        uninformed: Takes note of blocks without data.
        answering: Whether posteriors are asked for, for which data may not be missing, and are taken in pieces.
        kind: Name of the guide's class, for messages.

    Attributes:
        sizes: Block -> numbers of elements along its plates that parameters are for.
        with_data: Block -> which of its elements have data, shape of its plates; None if all have.
        beyond: Blocks with elements after the last datum.
        new_rows: Plate -> a block whose table has no rows for its elements, since another call informs this one.
    """

    def __init__(self, parts: Parts, reader: Reader, uninformed: Uninformed, answering: bool, kind: str) -> None:
        self.parts, self.reader, self.uninformed = parts, reader, uninformed
        self.answering, self.kind = answering, kind
        self.sizes: dict[str, list[int]] = {}
        self.with_data: dict[str, Tensor | None] = {}
        self.beyond: set[str] = set()
        self.new_rows: dict[str, Block] = {}
        self._found: dict[str, list[Tensor] | None] = {}

    def of(self, block: Block, msg: Any) -> list[Tensor] | None:
        """Returns the parameters of each site of a block, shape (..., elements, width); None where data are missing."""
        if block.name in self._found:
            return self._found[block.name]
        around = plates_of([msg], self.reader.plan.same)
        _, turn = self.reader.plan.turn_of(msg["name"])
        plates = {name: around[name] for name in block.plates if name not in turn}
        if self.uninformed.informed and block.plates and not block.amortized:
            self.new_rows |= dict.fromkeys(block.plates, block)
            return None
        coder = self.parts.coder_of(block)
        seen = plates.get(block.reach.plate) if block.reach else None
        if seen is not None and seen.size < seen.full_size:
            raise ValueError(
                f"{self.kind}: the encoder of '{block.sites[0]}' sees along plate '{seen.name}', of "
                f"which this call has {seen.size} of {seen.full_size} elements, so neighbours are not there. Call the "
                f"model so that the plate does not subsample, or use an encoder of single elements: MLP()."
            )
        parameters = self._encoded(block, plates) if block.levels else []
        if not block.amortized:
            parameters = coder(self._index(block, plates))
            there = [self.reader.plan.plates[name] for name in block.plates]
            self.sizes[block.name] = [
                (min(n, plates[name].size) if self._goes_on(block, plates[name]) else plates[name].size)
                if name in plates
                else n
                for n, name in zip(there, block.plates, strict=True)
            ]
        elif parameters is None:
            self.refuse_missing(block)
            self.uninformed.note(block, plates)
        if parameters is not None:
            parameters = self._extended(block, plates, parameters)
        if self.answering and parameters is not None:
            parameters = [values.detach() for values in parameters]
            if any(has_nan(values) for values in parameters):
                raise ValueError(
                    f"{self.kind}: the answer for '{block.sites[0]}' is NaN. Its data are infinite, or "
                    f"the guide's parameters are NaN: look at the losses of its training."
                )
        self._found[block.name] = parameters
        marks = self.with_data.get(block.name)
        if marks is not None and not (self.answering or torch.is_grad_enabled() or is_recorded() or bool(marks.any())):
            self.uninformed.note(block, plates)
        other_size = marks is not None and list(marks.shape) != self.sizes[block.name]  # which is refused in its turn
        if marks is not None and (other_size or (self.answering and bool(marks.all()))):
            self.with_data[block.name] = None
        return parameters

    def _goes_on(self, block: Block, plate: Plate) -> bool:
        """Whether a plate is longer than the table of its latents and the data: its last elements are forecasts."""
        known = self.reader.plan.plates[plate.name]
        if plate.name not in block.couples or plate.size <= known:
            return False
        return any(known in value.shape for value in self.reader.call.tensors.values())

    def _extended(self, block: Block, plates: dict[str, Plate], parameters: list[Tensor]) -> list[Tensor]:
        """Lets elements after the last datum have the model's own conditional, in plates where each moves others."""
        sizes = list(self.sizes[block.name])
        for axis, name in enumerate(block.plates):
            lacking = plates[name].size - sizes[axis] if name in plates and name in block.couples else 0
            if lacking <= 0:
                continue
            marks = self.with_data.get(block.name) if block.exact_prior else None
            marks = torch.ones(sizes, dtype=torch.bool) if marks is None else marks
            parts = [values.unflatten(-2, sizes) for values in parameters]
            parts = [lengthened(values, axis - len(sizes) - 1, lacking) for values in parts]
            parameters = [values.flatten(-1 - len(sizes), -2) for values in parts]
            self.with_data[block.name] = lengthened(marks, axis, lacking)
            self.beyond.add(block.name)
            sizes[axis] += lacking
        self.sizes[block.name] = sizes
        return parameters

    def _encoded(self, block: Block, plates: dict[str, Plate]) -> list[Tensor] | None:
        """Encodes the data of a block, in answers some elements of its longest plate at a time, so far as it can."""
        coder = self.parts.coder_of(block)
        chain = block.plates.index(block.chain) if block.chain else None
        name = free_plate(block, plates) if self.answering and isinstance(coder, Heads) else None
        if name is None or plates[name].size <= FIRST:
            reading = self.reader.read(block, plates)
            if reading is None:
                return None
            self.sizes[block.name], self.with_data[block.name] = reading.sizes, reading.with_data(chain)
            return self._encoded_piece(block, coder, reading)
        axis, size, start, count = block.plates.index(name), plates[name].size, 0, FIRST
        whole: list[Tensor] = []
        with_data: Tensor | None = None
        while start < size:
            reading = self.reader.read(block, plates, Piece(name, start, min(count, size - start)))
            if reading is None:
                return None
            here = reading.sizes[axis]
            sizes = [size if i == axis else n for i, n in enumerate(reading.sizes)]
            parts = [part.unflatten(-2, reading.sizes) for part in self._encoded_piece(block, coder, reading)]
            whole = whole or [part.new_empty(*part.shape[: -1 - len(sizes)], *sizes, part.shape[-1]) for part in parts]
            marks = reading.with_data(chain)
            if marks is not None:
                with_data = marks.new_ones(sizes) if with_data is None else with_data
                with_data.narrow(axis, start, here).copy_(marks)
            for values, part in zip(whole, parts, strict=True):
                values.narrow(axis - len(sizes) - 1, start, here).copy_(part)
            if start == 0:
                count = max(1, LIMIT * FIRST // reading.numbers(block, coder.widest_before))
            start += here
        self.sizes[block.name], self.with_data[block.name] = sizes, with_data
        return [values.flatten(-1 - len(sizes), -2) for values in whole]

    def _encoded_piece(self, block: Block, coder: Any, reading: Reading) -> list[Tensor]:
        if not block.amortized:
            return []
        if isinstance(coder, Rows):
            return coder(torch.arange(math.prod(reading.sizes)))
        prepare = self.parts.preparation_of(block)
        features = prepare(reading.cells, self.parts.dtype, looks=not self.answering)
        rows = features_of(block, coder, features, reading)
        if not self.answering:
            return coder(rows)
        for name, labels in prepare.untrained(reading.cells).items():
            some = ", ".join(map(str, sorted(labels)[:3])) + (", ..." if len(labels) > 3 else "")
            warnings.warn(
                f"{self.kind}: no row that the guide was trained on had the label {some} of argument "
                f"'{name}', so for such rows the answer for '{block.sites[0]}' follows from their other data alone. "
                f"Train it on rows that have it.",
                stacklevel=2,
            )
        parts = in_pieces(coder, rows, LIMIT // 8)
        if any(has_nan(part) for part in parts):  # many data are quicker to look at when they are answers
            prepare(reading.cells, self.parts.dtype)
        return parts

    def refuse_missing(self, block: Block) -> None:
        if self.answering:
            raise ValueError(
                f"{self.kind}: the data of '{block.sites[0]}' are missing in this call: it is informed "
                f"by {list(block.inputs)}. Pass them, or draw from the prior: guide.predictive(...)."
            )

    def _index(self, block: Block, plates: dict[str, Plate]) -> Tensor:
        """Returns which rows of a table the present elements are, plates outer to inner; shape (elements,)."""
        index = torch.zeros(1, dtype=torch.long)
        for name in block.plates:
            full_size = self.reader.plan.plates[name]
            ids = self.parts.row_ids.get(name)
            if ids is None and name in plates:
                present = plates[name].full_size
                if present != full_size and not self._goes_on(block, plates[name]):
                    raise ValueError(
                        f"{self.kind}: '{block.sites[0]}' has a table with a row for each of the "
                        f"{full_size} elements of plate '{name}', but this call has {present}. A table cannot answer "
                        f"for new rows; {block.remedy}."
                    )
                self._refuse_unknown_rows(block, plates[name])
                ids = self.reader.indices.get(name) if present == full_size else None
            ids = torch.arange(full_size) if ids is None else torch.as_tensor(ids)
            index = (index.to(ids.device)[:, None] * full_size + ids[None, :]).flatten()
        return index

    def _refuse_unknown_rows(self, block: Block, plate: Plate) -> None:
        """Refuses a minibatch of the rows of a table that an argument holds, where the plate drew its indices."""
        arguments = self.reader.plan.rows.get(plate.name, {}) if plate.name in self.reader.at_random else {}
        for name, axis in arguments.items():
            rows = self.reader.call.leaves.get(name)
            if isinstance(rows, Tensor) and rows.dim() > axis and rows.shape[axis] == plate.size < plate.full_size:
                raise ValueError(
                    f"{self.kind}: '{block.sites[0]}' has a table, but which rows of plate "
                    f"'{plate.name}' the minibatch '{name}' holds is not said: the plate draws indices of its own. Say "
                    f"it, pyro.plate('{plate.name}', {plate.full_size}, subsample=indices), or {block.remedy}."
                )
