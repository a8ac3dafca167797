"""A call's arguments, read as the data of blocks: their cells by level, what is there, and the ways of levels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_amortize.calls import Args, Call, Kwargs, Model, is_recorded
from pyro_amortize.capture import Uncapturable
from pyro_amortize.encoders import Heads, gathered
from pyro_amortize.held import places, site_cells
from pyro_amortize.inputs import Cells, Present, pick_cells
from pyro_amortize.levels import Level
from pyro_amortize.missing import present_entries
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import FUNCTION, AmortizationPlan, Block
from pyro_amortize.pooling import Marks, Move, handed_on
from pyro_amortize.structure import Link, Plate, Source, plates_of
from pyro_amortize.views import View


@dataclass(frozen=True)
class Reading:
    """The data of one block in one call; every plate has an axis.

    Attributes:
        cells: For each level and source its values, shape (..., *plates, *shape of a cell), and which are there.
        marks: Which rows of each level have data, there or below.
        moves: The way of each level but the last.
        sizes: Of the block's own plates, whose axes come first.
        count: Number of plates' axes.
    """

    cells: list[list[Cells]]
    marks: list[Marks]
    moves: list[Move]
    sizes: list[int]
    count: int

    @property
    def present(self) -> list[Tensor | None]:
        """Which rows of each level count when pooling; None if all do."""
        return [marks if isinstance(marks, Tensor) else None for marks in self.marks]

    def with_data(self, chain: int | None = None) -> Tensor | None:
        """Returns which elements of the block have data, shape of its plates; None if all must have.

        Args:
            chain: Position of a plate along which all count that stand before an element with data.
        """
        marks = self.marks[-1]
        if not isinstance(marks, Tensor):
            return None
        marks = marks.reshape(marks.shape[: len(self.sizes)]).expand(self.sizes)
        return marks if chain is None else marks.flip(chain).cummax(chain).values.flip(chain)

    def numbers(self, block: Block, widest: int) -> int:
        """Returns how many numbers an encoder holds for these data at once, its widest layer being so wide."""
        total = 1
        for level, cells in zip(block.levels, self.cells, strict=True):
            sources = zip(level.sources, cells, strict=True)
            rows = [values.numel() // max(1, math.prod(source.cell)) for source, (values, _) in sources]
            total += max(rows, default=0) * max(level.width, widest)
        return total

    def laid(self, features: Tensor) -> Tensor:
        """Gives features, shape (..., *plates, features), the full lengths of the block's own plates."""
        lead = features.dim() - 1 - self.count
        rest = features.shape[lead + len(self.sizes) :]
        return features.expand(*features.shape[:lead], *self.sizes, *rest)

    def elements(self, features: Tensor) -> Tensor:
        """Brings features, shape (..., *plates, features), to shape (..., elements of the block, features)."""
        lead = features.shape[: features.dim() - 1 - self.count]
        features = features.reshape(*lead, *features.shape[len(lead) :][: len(self.sizes)], features.shape[-1])
        return features.expand(*lead, *self.sizes, -1).reshape(*lead, -1, features.shape[-1])


def features_of(block: Block, coder: Heads, features: list[Tensor | None], reading: Reading) -> Tensor:
    """Brings prepared data of all levels of a block to its elements: shape (..., elements, features)."""
    rows = gathered(coder.phis, features, reading.present, reading.moves)
    if block.reach is not None:
        axis = block.plates.index(block.reach.plate) - reading.count - 1
        rows = coder.reader(reading.laid(rows), axis, reading.present[-1])  # type: ignore[misc]
    return reading.elements(rows)


def free_plate(block: Block, plates: dict[str, Plate]) -> str | None:
    """Returns the longest plate around a block whose elements may be read apart: nothing is pooled or seen along it."""
    ways = [(level.plates, block.levels[level.into].plates) for level in block.levels if level.into is not None]
    free = [
        name
        for name in block.plates
        if name in plates
        and name not in (*block.couples, block.reach.plate if block.reach else None)
        and not any(name in plates_ and name not in into for plates_, into in ways)
    ]
    linked = any(level.link for level in block.levels)
    return max(free, key=lambda name: plates[name].size) if free and not linked else None


@dataclass(frozen=True)
class Piece:
    """The elements of a plate from ``start`` on, ``size`` of those that are present."""

    plate: str
    start: int
    size: int


class Reader:
    """Reads the data of blocks out of one call.

    Args:
        model: The model, for data that reach it through no argument.
        plan: The plan.
        call: The call.
        arguments: Its positional and keyword arguments, as they were passed.
        observations: New values of observed sites, in the place of those in the call.
        inputs: The guide's option: functions say what an encoder sees.
        kind: Name of the guide's class, for messages.
    """

    def __init__(
        self,
        model: Model,
        plan: AmortizationPlan,
        call: Call,
        arguments: tuple[Args, Kwargs],
        observations: dict[str, Tensor],
        inputs: Any,
        kind: str,
    ) -> None:
        self.model, self.plan, self.call, self.arguments = model, plan, call, arguments
        self.observations, self.inputs, self.kind = observations, inputs, kind
        self.indices: dict[str, Any] = {}
        self.fixed: dict[str, Any] = {}
        self.at_random: set[str] = set()
        self.drawn: dict[str, Tensor] = {}
        self.looked_up: dict[str, Any] = {}
        self.made: dict[str, Tensor] = {}

    def needs_looking_up(self) -> bool:
        """Whether some data or masks pass through no argument, so that only a run of the model shows them."""
        sources = [source for block in self.plan.blocks for source in block.sources]
        sites = {site for block in self.plan.blocks for level in block.levels for site in level.sites}
        unseen = any(s.axes is None and not s.drawn and s.feeds not in self.observations for s in sources)
        return unseen or any(site in self.plan.masks and self.plan.masks[site] is None for site in sites)

    def look_up(self, seed: int | None = None) -> list[Any]:
        """Runs the model once, to see the data that come to its sites without passing through an argument.

        Returns:
            The sample sites.
        """
        if is_recorded():
            raise Uncapturable(
                "data or masks reach the guide through no argument of the model, or are made or sliced of one in it, "
                "where only a run of the model shows them: pass each as an argument of its own"
            )
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        with preserved(self.model, evaluating=True):
            families, loops, view = self.plan.families, self.plan.loops, View(self.plan.same, self.plan.events)
            held = next(places(self.model, self.call, families, loops, seed, dict(self.fixed), view=view))
        nodes = held.sites
        self.looked_up = {"sites": nodes, "indices": held.indices}
        return [site for site in nodes.values() if site["type"] == "sample"]

    def read(self, block: Block, around: dict[str, Plate], piece: Piece | None = None) -> Reading | None:
        """Returns the data of a block for the present elements of its plates; None where some are missing.

        Args:
            block: The block.
            around: The plates around it.
            piece: Some elements of one of these, where not all are to be read.
        """
        plates = {name: Present(plate.size, plate.full_size, self.indices.get(name)) for name, plate in around.items()}
        fed = any(source.feeds in self.observations for source in block.sources)
        if self.observations and block.amortized and not fed:
            raise NotImplementedError(
                f"{self.kind}: the sleep phase passes new values of {list(self.observations)}, but "
                f"they cannot be put in the place of the inputs {list(block.inputs)} of '{block.sites[0]}'. Pass the "
                f"observed values themselves as arguments of the model; for the sites of a loop there is no sleep "
                f"phase: ReweightedWakeSleep(insomnia=1.0)."
            )
        inside = [name for source in block.sources for name, _ in source.whole]
        axes = list(dict.fromkeys([*block.plates, *(name for x in block.levels for name in x.plates), *inside]))
        sizes = {name: present.size for name, present in plates.items()}
        if piece is not None:
            sizes[piece.plate] = piece.size
        levels: list[list[Cells]] = []
        for level in block.levels:
            levels.append([])
            for source in level.sources:
                values = self._drawn_cells(source, around) if source.drawn else self._cells(block, source, plates)
                if values is None:
                    return None
                cell_dim = values.dim() - len(source.plates) if source.name == FUNCTION else len(source.shape)
                lead = values.dim() - len(source.plates) - cell_dim
                values = _narrowed(values, source.plates, lead, piece)
                sizes |= dict(zip(source.plates, values.shape[lead:], strict=False))
                cells = _laid(values, source.plates, axes, cell_dim)
                present = self._source_marks(source, plates, axes, piece)
                present = None if present is None else present.expand(cells.shape)
                self._refuse_other_sizes(source, sizes)
                present = None if present is None else _made_whole(present, source, axes)
                levels[-1].append((_made_whole(cells, source, axes), present))
        marks = [self._level_marks(level, plates, axes, piece) for level in block.levels]
        for level, here in zip(block.levels, marks, strict=True):  # a loop has as many turns as its data
            for name, length in zip(axes, here.shape if isinstance(here, Tensor) else (), strict=False):
                if name in level.plates:
                    sizes[name] = max(length, sizes.get(name, 1))
        links = [None if level.link is None else self._index(level.link, plates) for level in block.levels]
        for level, index in zip(block.levels, links, strict=True):  # of groups in groups some may have no rows
            if level.link is not None and index is not None:
                for name, length in zip(level.link.rows, index.shape, strict=True):
                    sizes.setdefault(name, length)
        moves: list[Move] = []
        for i, level in enumerate(block.levels[:-1]):
            into = block.levels[level.into].plates  # type: ignore[index]
            moves.append(self._move(level, into, links[i], marks[i], plates, axes, sizes))
            marks[moves[i].into] = handed_on(marks[i], marks[moves[i].into], moves[i])
        return Reading(levels, marks, moves, [sizes[name] for name in block.plates], len(axes))

    def _cells(self, block: Block, source: Source, plates: dict[str, Present]) -> Tensor | None:
        """Returns a source's data, shape (..., *plates, *shape of a cell), or None if the argument is missing."""
        if source.feeds in self.observations:
            value, count = self.observations[source.feeds], len(source.shape)
            dims = [dim - count for dim in source.dims]
            return value.movedim(dims, list(range(-len(dims) - count, -count)))
        if source.name == FUNCTION:
            if block.name not in self.made:
                self.made[block.name] = self._function_rows(block, plates)
            return self.made[block.name]
        if source.axes is None:
            node = self.looked_up["sites"].get(source.name)
            if node is None or not node["is_observed"]:
                return None
            return self._picked(source, node["value"], len(node["fn"].event_shape), plates)
        argument = self._argument(source)
        return None if argument is None else pick_cells(source, argument, plates, block.couples)

    def _drawn_cells(self, source: Source, around: dict[str, Plate]) -> Tensor | None:
        """Returns the values of a latent drawn before, as cells; values side by side keep their place to the left."""
        value = self.drawn.get(source.name)
        if value is None:
            return None
        events, depth = len(source.shape), max((-plate.dim for plate in around.values()), default=0)
        value = value.reshape((1,) * (depth + events - value.dim()) + value.shape)
        sizes = list(value.shape)
        axes = [around[name].dim - events for name in source.plates]
        for axis, name in zip(axes, source.plates, strict=True):
            sizes[axis] = around[name].size
        lead = value.dim() - depth - events
        value = value.expand(sizes).movedim(axes, list(range(lead, lead + len(axes))))
        rest = range(lead + len(axes), lead + depth)  # other plates of the block, along which it does not vary
        return value.squeeze(tuple(rest)) if rest else value

    def _argument(self, source: Source) -> Any:
        """Returns the argument that a source is, its cells picked where another argument says their places."""
        value = self.call.value(source.name)
        for axis, through in zip(source.axes or (), source.through, strict=False):
            if value is not None and through is not None:
                value = value.index_select(axis, self.call.leaves[through].to(value.device))
        return value

    def _picked(self, source: Source, value: Tensor, event_dim: int, plates: dict[str, Present]) -> Tensor:
        """Returns an observed site's values for the plates' present elements, as they were looked up."""
        around = plates_of([self.looked_up["sites"][source.feeds]])
        cells = site_cells(value, event_dim, [around[name] for name in source.plates])
        for axis, name in enumerate(source.plates):
            there = self.looked_up["indices"].get(name)
            here = plates[name].indices if name in plates else there
            if there is None or here is None or torch.equal(torch.as_tensor(there), torch.as_tensor(here)):
                continue
            places = {int(j): i for i, j in enumerate(there)}
            if not all(int(j) in places for j in here):
                raise NotImplementedError(
                    f"{self.kind}: the subsample of plate '{name}' is fixed from outside, but the "
                    f"data of '{source.name}' come from a closure, and were looked up for another subsample. Pass the "
                    f"data as an argument."
                )
            cells = cells.index_select(axis, torch.tensor([places[int(j)] for j in here], device=cells.device))
        return cells

    def _site_marks(self, site: str, plates: dict[str, Present], piece: Piece | None) -> tuple[Tensor, Source] | None:
        """Returns which entries of an observed site count, and where its plates stand; None if all do."""
        if site not in self.plan.masks:
            return None
        source = self.plan.masks[site]
        if source is None:
            node = self.looked_up["sites"].get(site)
            mask = None if node is None else present_entries(node)
            if mask is None:
                return None
            frames = sorted(node["cond_indep_stack"], key=lambda frame: frame.dim)
            source = Source(site, tuple(f.name for f in frames), None, (), (), frozenset(), feeds=site)
            cells = self._picked(source, mask, len(node["fn"].event_shape), plates)
        else:
            value = self._argument(source)
            if value is None:
                return None
            cells = pick_cells(source, value, plates)
        cells = _narrowed(cells, source.plates, 0, piece)
        if cells.dtype != torch.bool:
            cells = ~cells.isnan() if source.feeds == site else cells != 0
        return cells, replace(source, shape=tuple(cells.shape[len(source.plates) :]))

    def _source_marks(
        self, source: Source, plates: dict[str, Present], axes: list[str], piece: Piece | None
    ) -> Tensor | None:
        """Returns which cells of a source count at some site that it enters, shape (*axes, *cell); None if all do."""
        if source.enters and source.missing:
            return self._marks_by_cell(source, plates, axes, piece)
        found = None
        for site in source.reaches if source.missing and source.name != FUNCTION else ():
            marks = self._site_marks(site, plates, piece)
            if marks is None:
                return None
            cells, where = marks
            cells = _laid(cells, where.plates, axes, len(where.shape))
            if where.shape != source.shape or not (source.by_cell or site == source.feeds):
                cells = cells.flatten(len(axes)).any(-1) if where.shape else cells
                cells = cells.reshape(cells.shape + (1,) * len(source.shape))
            for axis, name in enumerate(axes):
                cells = cells if name in source.plates else cells.any(axis, keepdim=True)
            found = cells if found is None else found | cells
        return found

    def _marks_by_cell(
        self, source: Source, plates: dict[str, Present], axes: list[str], piece: Piece | None
    ) -> Tensor | None:
        """Returns the same where each cell of a source enters other sites, or other entries of these."""
        found, always = None, torch.zeros(len(source.enters), dtype=torch.bool)
        for site in sorted({site for entered in source.enters for site, _ in entered}):
            entries = [dict(entered).get(site, ()) for entered in source.enters]
            marks = self._site_marks(site, plates, piece)
            if marks is None:
                always |= torch.tensor([mine != () for mine in entries])
                continue
            rows = _entries_of(marks, source, axes)
            takes = torch.zeros(len(entries), rows.shape[-1])
            for cell, mine in enumerate(entries):
                takes[cell, slice(None) if mine is None else list(mine)] = 1.0
            here = rows.to(takes.dtype) @ takes.to(rows.device).T > 0
            found = here if found is None else found | here
        return None if found is None else (found | always.to(found.device)).unflatten(-1, source.shape)

    def _level_marks(self, level: Level, plates: dict[str, Present], axes: list[str], piece: Piece | None) -> Marks:
        """Returns which rows of a level have values of their own."""
        found: Marks = False
        for site in level.sites:
            marks = self._site_marks(site, plates, piece)
            if marks is None:
                return True
            cells, where = marks
            rows = _laid(cells, where.plates, axes, len(where.shape))
            rows = rows.flatten(len(axes)).any(-1) if where.shape else rows
            found = rows if found is False else found | rows
        return found

    def _index(self, link: Link, plates: dict[str, Present]) -> Tensor:
        """Returns the element that each row belongs to, an axis for each of the rows' plates."""
        value = self.call.leaves[link.argument]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{self.kind}: argument '{link.argument}' is a {type(value).__name__}, but says to which element of "
                f"plate '{link.to}' each row belongs. Pass an integer tensor."
            )
        cell = tuple(size for axis, size in enumerate(value.shape) if axis not in link.axes)
        cells = pick_cells(Source(link.argument, link.rows, link.axes, (), cell, frozenset()), value, plates)
        return cells.reshape(*cells.shape[: len(link.rows)], -1)[..., link.column].long() + link.offset

    def _move(
        self,
        level: Level,
        into: tuple[str, ...],
        index: Tensor | None,
        marks: Marks,
        plates: dict[str, Present],
        axes: list[str],
        sizes: dict[str, int],
    ) -> Move:
        """Returns the way of a level's rows in this call; rows without data, there or below, belong to no element."""
        assert level.into is not None
        link = level.link
        if link is None or index is None:
            over = tuple(axes.index(name) for name in level.plates if name not in into)
            return Move(len(axes), over, None, None, 0, level.pooled, level.into)
        rows = tuple(axes.index(name) for name in link.rows)
        size = sizes[link.to] if link.to in sizes else int(index.max()) + 1 if index.numel() else 0
        if level.pooled and isinstance(marks, Tensor):
            others = [axis for axis in range(len(axes)) if axis not in rows]
            here = marks.permute(*rows, *others).reshape(*(marks.shape[axis] for axis in rows), -1).any(-1)
            index = torch.where(here.to(index.device), index, -1)
        for name, length in zip(link.rows, index.shape, strict=True):
            if sizes.get(name, length) != length:
                raise ValueError(
                    f"{self.kind}: argument '{link.argument}' has {length} rows, but the data of plate '{name}' have "
                    f"{sizes[name]}. Pass data arguments of equal length."
                )
        to = plates.get(link.to)
        if not is_recorded():
            limit = to.full_size if to else size
            self._refuse_outside(link, index if not isinstance(marks, Tensor) else index[index >= 0], limit)
        if to is not None and to.indices is not None and to.size < to.full_size:
            position = index.new_full((to.full_size,), -1)
            position[torch.as_tensor(to.indices)] = torch.arange(to.size)
            index = torch.where(index < 0, -1, position[index])
        return Move(len(axes), rows, axes.index(link.to), index, size, level.pooled, level.into)

    def _refuse_outside(self, link: Link, index: Tensor, limit: int) -> None:
        if index.numel() and not bool(((index >= 0) & (index < limit)).all()):
            raise ValueError(
                f"{self.kind}: argument '{link.argument}' points to element "
                f"{int(index.max() if index.min() >= 0 else index.min())} of plate '{link.to}', which has {limit} "
                f"elements in this call. Make the plate as large as its index says."
            )

    def _refuse_other_sizes(self, source: Source, sizes: dict[str, int]) -> None:
        """Refuses other numbers of elements where these are features."""
        for name, size in source.whole:
            if sizes[name] != size:
                raise ValueError(
                    f"{self.kind}: '{source.name}' has {sizes[name]} elements of plate '{name}', but the guide was "
                    f"initialized with {size}, and tells them apart. Build a new guide for data of this width, or one "
                    f"that pools over them: {self.kind}(model, encoder=DeepSets())."
                )

    def _function_rows(self, block: Block, plates: dict[str, Present]) -> Tensor:
        inputs = self.inputs
        if isinstance(inputs, dict):
            inputs = next(inputs[key] for key in (block.name, *block.sites, *block.plates[-1:]) if key in inputs)
        rows = inputs(*self.arguments[0], **self.arguments[1])
        sizes = [plates[name].size if name in plates else name for name in block.plates]  # a loop may have any length
        fits = isinstance(rows, Tensor) and rows.dim() >= len(sizes)
        for name, size, n in zip(block.plates, sizes, rows.shape, strict=False) if fits else ():
            forecast = name in block.couples and isinstance(size, int) and n < size
            fits &= forecast or not isinstance(size, int) or size == n
        if not fits:
            got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            raise ValueError(
                f"{self.kind}: the function in inputs= returned {got} for '{block.sites[0]}'. Expected a tensor of "
                f"shape ({', '.join(map(str, sizes))}, ...): a row for each element of '{'/'.join(block.plates)}'."
            )
        return rows


def _entries_of(marks: tuple[Tensor, Source], source: Source, axes: list[str]) -> Tensor:
    """Lays which entries of a site count by the rows of a source, shape (*axes, entries)."""
    cells, where = marks
    mine = tuple(name for name in where.plates if name in source.plates)
    order = [where.plates.index(name) for name in (*mine, *sorted(set(where.plates) - set(mine)))]
    entries = cells.permute(*order, *range(len(order), cells.dim()))[..., None].flatten(len(mine))
    return _laid(entries, mine, axes, 1)


def _made_whole(cells: Tensor, source: Source, axes: list[str]) -> Tensor:
    """Moves plates that are features of a cell, shape (..., *axes, *shape), into it; length one stays behind."""
    place = -1 - len(source.shape)
    for done, (name, _) in enumerate(source.whole):
        cells = cells.unsqueeze(place).transpose(axes.index(name) - len(axes) - done + place, place)
    return cells


def _narrowed(cells: Tensor, plates: tuple[str, ...], lead: int, piece: Piece | None) -> Tensor:
    """Takes a piece out of cells, shape (..., *plates, *cell)."""
    if piece is None or piece.plate not in plates:
        return cells
    return cells.narrow(lead + plates.index(piece.plate), piece.start, piece.size)


def _laid(cells: Tensor, plates: tuple[str, ...], axes: list[str], cell_dim: int) -> Tensor:
    """Gives cells, shape (..., *plates, *cell), an axis for every plate, of length one where they lack it."""
    lead = cells.dim() - len(plates) - cell_dim
    order = sorted(range(len(plates)), key=lambda i: axes.index(plates[i]))
    cells = cells.permute(*range(lead), *(lead + i for i in order), *range(lead + len(plates), cells.dim()))
    for position, name in enumerate(axes):
        if name not in plates:
            cells = cells.unsqueeze(lead + position)
    return cells
