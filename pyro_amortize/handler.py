"""The handler under which a guide runs its model: each latent's prior is replaced by q, in the model's own plates.

The model is left once the last latent is drawn: its decoder does not run. That is done only for a kind of call whose
first run went to the end with every latent covered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Call, opened
from pyro_amortize.encoders import Rows, gathered
from pyro_amortize.inputs import Cells, Present, pick_cells
from pyro_amortize.levels import Level
from pyro_amortize.parameters import preserved
from pyro_amortize.plan import FUNCTION, AmortizationPlan, Block
from pyro_amortize.pooling import Marks, Move, presence
from pyro_amortize.posterior import Posterior, prior_median
from pyro_amortize.probes import HeldRun, is_index, site_cells, site_mask
from pyro_amortize.structure import Plate, Source, plates_of
from pyro_amortize.supports import dressed, is_improper, unconstrained_shape, without_masks

if TYPE_CHECKING:
    from pyro_amortize.guides import AutoAmortized


MOST_EXITS = 256


class _Done(BaseException):
    """Leaves the model after its last latent; no handler of errors in the model should catch it."""


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

    @property
    def with_data(self) -> Tensor | None:
        """Which elements of the block have data, shape of its plates; None if all have."""
        marks = self.marks[-1]
        if not isinstance(marks, Tensor) or bool(marks.all()):
            return None
        return marks.reshape(marks.shape[: len(self.sizes)]).expand(self.sizes)

    def elements(self, features: Tensor) -> Tensor:
        """Brings features, shape (..., *plates, features), to shape (..., elements of the block, features)."""
        lead = features.shape[: features.dim() - 1 - self.count]
        features = features.reshape(*lead, *features.shape[len(lead) :][: len(self.sizes)], features.shape[-1])
        return features.expand(*lead, *self.sizes, -1).reshape(*lead, -1, features.shape[-1])


class GuidedRun(Messenger):
    """One run of the model under the guide."""

    def __init__(
        self,
        guide: AutoAmortized,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observations: dict[str, Tensor],
        answering: bool = False,
        plan: AmortizationPlan | None = None,
    ) -> None:
        super().__init__()
        self.guide = guide
        self.plan: AmortizationPlan = plan or guide.plan  # type: ignore[assignment]
        self.call = Call(guide.model, args, kwargs, guide.signature)
        self.model, _ = opened(guide.model)
        self.args, self.kwargs = args, kwargs
        self.observations = observations
        self.answering = answering
        self.values: dict[str, Tensor] = {}
        self.found: dict[str, Any] = {}
        self.plates: dict[str, tuple[str, ...]] = {}
        self._indices: dict[str, Any] = {}
        self._looked_up: dict[str, Any] = {}
        self._parameters: dict[str, list[Tensor] | None] = {}
        self._with_data: dict[str, Tensor | None] = {}
        self._exit_after: frozenset[str] | None = None

    def sample(self) -> dict[str, Tensor]:
        """Runs the model up to its last latent; returns the values of all latents."""
        for block in self.plan.blocks:
            if any(
                source.name in self.call.leaves and self.call.leaves[source.name] is None for source in block.sources
            ):
                self._refuse_missing(block)
        if self._needs_looking_up():
            self._look_up()
        self._exit_after = self.guide._exits.get(self._kind_of_call())
        try:
            with self:
                self.model(*self.args, **self.kwargs)
        except _Done:
            pass
        if self._exit_after is None:
            self.learn_exit(set(self.values))
        return self.values

    def learn_exit(self, latents: set[str]) -> None:
        """Notes that a whole run of this kind of call samples these latents, so that the next may leave after them."""
        key = self._kind_of_call()
        planned = {site for block in self.plan.blocks for site in block.sites}
        if key is not None and planned <= latents and not _form_families(latents):
            if len(self.guide._exits) >= MOST_EXITS:  # a counter among the scalars makes every call a new kind
                self.guide._exits.clear()
            self.guide._exits[key] = frozenset(latents)

    def examples(self) -> dict[str, Reading]:
        """Returns the data of every amortized block, as the call holds them."""
        held = HeldRun(self.model, self.call)
        with preserved(self.model, evaluating=True):
            trace = held.run()
        plates = plates_of(site for site in trace.nodes.values() if site["type"] == "sample")
        self._looked_up = {"sites": trace.nodes, "indices": held.indices}
        self._indices = held.indices
        found = {}
        for block in self.plan.blocks:
            if block.amortized:
                reading = self._read(block, {name: plates[name] for name in block.plates})
                assert reading is not None
                found[block.name] = reading
        return found

    def _needs_looking_up(self) -> bool:
        """Whether some data or masks pass through no argument, so that only a run of the model shows them."""
        sources = [source for block in self.plan.blocks for source in block.sources]
        sites = {site for block in self.plan.blocks for level in block.levels for site in level.sites}
        unseen = any(source.axes is None and source.feeds not in self.observations for source in sources)
        return unseen or any(site in self.plan.masks and self.plan.masks[site] is None for site in sites)

    def _look_up(self) -> None:
        """Runs the model once more, to see the data that come to its sites without passing through an argument."""
        seed = int(torch.randint(2**31, ()))
        held = HeldRun(self.model, self.call)
        with preserved(self.model, evaluating=True):
            trace = held.run(seed=seed)
        self._looked_up = {"sites": trace.nodes, "indices": held.indices}

    def _kind_of_call(self) -> Any:
        """What decides which sites a call samples: structure, scalars, mode, and shapes but for the rows.

        Scalars are those among the arguments, flags in tensors included, and the attributes of the model or of the
        object whose method it is. None if an argument is an object of unknown meaning.
        """
        axes: dict[str, tuple[int, ...]] = {}
        for block in self.plan.blocks:
            for level in block.levels:
                axes |= {source.name: source.axes or () for source in level.sources}
                axes |= {level.link.argument: level.link.axes} if level.link else {}
        model = poutine.unwrap(self.guide.model)
        owner = getattr(getattr(model, "__self__", model), "__dict__", {})
        parts: list[Any] = [self.guide.training]
        parts += [(key, value) for key, value in owner.items() if isinstance(value, (bool, int, str))]
        for name, leaf in self.call.leaves.items():
            if isinstance(leaf, Tensor):
                rows = axes.get(name, ())
                flag = leaf.item() if leaf.dim() == 0 and not leaf.is_floating_point() else None
                parts.append((name, leaf.dtype, flag, tuple(n for i, n in enumerate(leaf.shape) if i not in rows)))
            elif isinstance(leaf, (int, float, str, type(None))):
                parts.append((name, type(leaf), leaf))
            else:
                return None
        return tuple(parts)

    # The handler.

    def _pyro_param(self, msg: Any) -> None:
        msg["stop"] = True

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self._subsample(msg)
            return
        if msg["is_observed"]:
            msg["stop"] = True
            return
        block = self.plan.block_of(name)
        if block is None:
            if name in self.plan.left_to_model:
                if self.answering:
                    msg["value"] = prior_median(msg["fn"])
                return
            msg["stop"] = True
            if name not in self.plan.observed and name not in self.plan.foreign:
                raise RuntimeError(
                    f"{type(self.guide).__name__}: latent site '{name}' was not there when the guide was initialized, "
                    f"so nothing guides it. Build a new guide and initialize it by a call that reaches '{name}'."
                )
            return
        parameters = self._block_parameters(block, msg)
        if parameters is None:
            return
        q = self._distribution(msg, block, block.sites.index(name), parameters)
        msg["fn"] = q
        if self.answering:
            self.found[name] = q
            self.plates[name] = block.plates
            msg["value"] = Posterior({name: q}, {}).median[name]

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self._indices[name] = msg["value"] if is_index(msg["value"]) else None
        elif not msg["is_observed"] and (self.plan.block_of(name) or name in self.plan.left_to_model):
            self.values[name] = msg["value"]
            if self._exit_after is not None and self._exit_after <= set(self.values):
                raise _Done
        elif self.plan.block_of(name):  # conditioned from outside
            self.values[name] = msg["value"]

    def _subsample(self, msg: Any) -> None:
        name = msg["name"]
        if self.guide.master is not None and name in getattr(self.guide.master(), "plates", {}):
            msg["value"] = self.guide.master().plates[name].indices
            msg["stop"] = True
            self._indices[name] = msg["value"]
        elif msg["value"] is None and name in self._looked_up.get("indices", {}):
            msg["value"] = self._looked_up["indices"][name]

    # From data to distributions.

    def _block_parameters(self, block: Block, msg: Any) -> list[Tensor] | None:
        """Returns the parameters of each site of a block, shape (..., elements, width); None where data are missing."""
        if block.name in self._parameters:
            return self._parameters[block.name]
        around = plates_of([msg])
        plates = {name: around[name] for name in block.plates}
        coder = self.guide.coder_of(block)
        reading = self._read(block, plates) if block.levels else None
        parameters: list[Tensor] | None
        if not block.amortized:
            parameters = coder(self._index(block, plates))
        elif reading is None:
            self._refuse_missing(block)
            parameters = None
        elif isinstance(coder, Rows):
            parameters = coder(torch.arange(math.prod(plate.size for plate in plates.values())))
        else:
            features = self.guide.preparation_of(block)(reading.cells, self.guide.dtype)
            parameters = coder(reading.elements(gathered(coder.phis, features, reading.present, reading.moves)))
        if self.answering and parameters is not None:
            parameters = [values.detach() for values in parameters]
        self._parameters[block.name] = parameters
        self._with_data[block.name] = reading.with_data if reading is not None else None
        return parameters

    def _refuse_missing(self, block: Block) -> None:
        if self.answering:
            raise ValueError(
                f"{type(self.guide).__name__}: the data of '{block.sites[0]}' are missing in this call: it is informed "
                f"by {list(block.inputs)}. Pass them, or draw from the prior: guide.predictive(...)."
            )

    def _index(self, block: Block, plates: dict[str, Plate]) -> Tensor:
        """Returns which rows of a table the present elements are, plates outer to inner; shape (elements,)."""
        index = torch.zeros(1, dtype=torch.long)
        for name in block.plates:
            full_size = self.plan.plates[name]
            ids = self.guide.row_ids.get(name)
            if ids is None:
                present = plates[name].full_size
                if present != full_size:
                    raise ValueError(
                        f"{type(self.guide).__name__}: '{block.sites[0]}' has a table with a row for each of the "
                        f"{full_size} elements of plate '{name}', but this call has {present}. "
                        f"A table cannot answer for new rows; use an encoder: "
                        f"AutoAmortizedNormal(model, encoder={{'{block.sites[0]}': MLP()}})."
                    )
                ids = self._indices.get(name)
            ids = torch.arange(full_size) if ids is None else torch.as_tensor(ids)
            index = (index.to(ids.device)[:, None] * full_size + ids[None, :]).flatten()
        return index

    def _read(self, block: Block, around: dict[str, Plate]) -> Reading | None:
        """Returns the data of a block for the present elements of its plates; None where some are missing."""
        plates = {name: Present(plate.size, plate.full_size, self._indices.get(name)) for name, plate in around.items()}
        fed = any(source.feeds in self.observations for source in block.sources)
        if self.observations and block.amortized and not fed:
            raise NotImplementedError(
                f"{type(self.guide).__name__}: the sleep phase passes new values of {list(self.observations)}, but "
                f"they cannot be put in the place of the inputs {list(block.inputs)} of '{block.sites[0]}'. Pass the "
                f"observed values themselves as arguments of the model."
            )
        axes = list(dict.fromkeys([*block.plates, *(name for level in block.levels for name in level.plates)]))
        sizes = {name: present.size for name, present in plates.items()}
        levels: list[list[Cells]] = []
        for level in block.levels:
            levels.append([])
            for source in level.sources:
                values = self._cells(block, source, plates)
                if values is None:
                    return None
                cell_dim = values.dim() - len(source.plates) if source.name == FUNCTION else len(source.shape)
                lead = values.dim() - len(source.plates) - cell_dim
                sizes |= dict(zip(source.plates, values.shape[lead:], strict=False))
                cells = _laid(values, source.plates, axes, cell_dim)
                present = self._source_marks(source, plates, axes)
                levels[-1].append((cells, None if present is None else present.expand(cells.shape)))
        marks = [self._level_marks(level, plates, axes) for level in block.levels]
        moves = [self._move(level, block, plates, axes, sizes) for level in block.levels[:-1]]
        return Reading(levels, presence(marks, moves), moves, [sizes[name] for name in block.plates], len(axes))

    def _cells(self, block: Block, source: Source, plates: dict[str, Present]) -> Tensor | None:
        """Returns a source's data, shape (..., *plates, *shape of a cell), or None if the argument is missing."""
        if source.feeds in self.observations:
            value, count = self.observations[source.feeds], len(source.shape)
            dims = [dim - count for dim in source.dims]
            return value.movedim(dims, list(range(-len(dims) - count, -count)))
        if source.name == FUNCTION:
            return self._function_rows(block)
        if source.axes is None:
            node = self._looked_up["sites"].get(source.name)
            if node is None or not node["is_observed"]:
                return None
            return self._picked(source, node["value"], len(node["fn"].event_shape), plates)
        argument = self._argument(source)
        return None if argument is None else pick_cells(source, argument, plates)

    def _argument(self, source: Source) -> Any:
        """Returns the argument that a source is, its cells picked where another argument says their places."""
        value = self.call.leaves.get(source.name)
        for axis, through in zip(source.axes or (), source.through, strict=False):
            if value is not None and through is not None:
                value = value.index_select(axis, self.call.leaves[through].to(value.device))
        return value

    def _picked(self, source: Source, value: Tensor, event_dim: int, plates: dict[str, Present]) -> Tensor:
        """Returns an observed site's values for the plates' present elements, as they were looked up."""
        around = plates_of([self._looked_up["sites"][source.feeds]])
        cells = site_cells(value, event_dim, [around[name] for name in source.plates])
        for axis, name in enumerate(source.plates):
            there = self._looked_up["indices"].get(name)
            here = plates[name].indices if name in plates else there
            if there is None or here is None or torch.equal(torch.as_tensor(there), torch.as_tensor(here)):
                continue
            places = {int(j): i for i, j in enumerate(there)}
            if not all(int(j) in places for j in here):
                raise NotImplementedError(
                    f"{type(self.guide).__name__}: the subsample of plate '{name}' is fixed from outside, but the "
                    f"data of '{source.name}' come from a closure, and were looked up for another subsample. Pass the "
                    f"data as an argument."
                )
            cells = cells.index_select(axis, torch.tensor([places[int(j)] for j in here], device=cells.device))
        return cells

    def _site_marks(self, site: str, plates: dict[str, Present]) -> tuple[Tensor, Source] | None:
        """Returns which entries of an observed site count, and where its plates stand; None if all do."""
        if site not in self.plan.masks:
            return None
        source = self.plan.masks[site]
        if source is None:
            node = self._looked_up["sites"].get(site)
            mask = None if node is None else site_mask(node)
            if mask is None:
                return None
            frames = sorted(node["cond_indep_stack"], key=lambda frame: frame.dim)
            source = Source(site, tuple(f.name for f in frames), None, (), (), frozenset(), feeds=site)
            cells = self._picked(source, mask, len(node["fn"].event_shape), plates)
        else:
            value = self._argument(source)
            if value is None:
                return None
            cells = pick_cells(source, value if value.dtype == torch.bool else ~value.isnan(), plates)
        return cells, replace(source, shape=tuple(cells.shape[len(source.plates) :]))

    def _source_marks(self, source: Source, plates: dict[str, Present], axes: list[str]) -> Tensor | None:
        """Returns which cells of a source count at some site that it enters, shape (*axes, *cell); None if all do."""
        found = None
        for site in source.reaches if source.missing and source.name != FUNCTION else ():
            marks = self._site_marks(site, plates)
            if marks is None:
                return None
            cells, where = marks
            cells = _laid(cells, where.plates, axes, len(where.shape))
            if where.shape != source.shape or site != source.feeds:
                cells = cells.flatten(len(axes)).any(-1) if where.shape else cells
                cells = cells.reshape(cells.shape + (1,) * len(source.shape))
            for axis, name in enumerate(axes):
                cells = cells if name in source.plates else cells.any(axis, keepdim=True)
            found = cells if found is None else found | cells
        return found

    def _level_marks(self, level: Level, plates: dict[str, Present], axes: list[str]) -> Marks:
        """Returns which rows of a level have values of their own."""
        found: Marks = False
        for site in level.sites:
            marks = self._site_marks(site, plates)
            if marks is None:
                return True
            cells, where = marks
            rows = _laid(cells, where.plates, axes, len(where.shape))
            rows = rows.flatten(len(axes)).any(-1) if where.shape else rows
            found = rows if found is False else found | rows
        return found

    def _move(
        self, level: Level, block: Block, plates: dict[str, Present], axes: list[str], sizes: dict[str, int]
    ) -> Move:
        """Returns the way of a level's rows in this call."""
        assert level.into is not None
        into = block.levels[level.into].plates
        link = level.link
        if link is None:
            over = tuple(axes.index(name) for name in level.plates if name not in into)
            return Move(len(axes), over, None, None, 0, level.pooled, level.into)
        value = self.call.leaves[link.argument]
        cell = tuple(size for axis, size in enumerate(value.shape) if axis not in link.axes)
        source = Source(link.argument, link.rows, link.axes, (), cell, frozenset())
        cells = pick_cells(source, value, plates)
        index = cells.reshape(*cells.shape[: len(link.rows)], -1)[..., link.column].long() + link.offset
        to = plates.get(link.to)
        size = sizes.get(link.to, int(index.max()) + 1 if index.numel() else 0)
        limit = to.full_size if to else size
        if index.numel() and not bool(((index >= 0) & (index < limit)).all()):
            raise ValueError(
                f"{type(self.guide).__name__}: argument '{link.argument}' points to element "
                f"{int(index.max() if index.min() >= 0 else index.min())} of plate '{link.to}', which has {limit} "
                f"elements in this call. Make the plate as large as its index says."
            )
        if to is not None and to.indices is not None and to.size < to.full_size:
            position = index.new_full((to.full_size,), -1)
            position[torch.as_tensor(to.indices)] = torch.arange(to.size)
            index = position[index]
        rows = tuple(axes.index(name) for name in link.rows)
        return Move(len(axes), rows, axes.index(link.to), index, size, level.pooled, level.into)

    def _function_rows(self, block: Block) -> Tensor:
        inputs = self.guide.options["inputs"]
        if isinstance(inputs, dict):
            inputs = next(inputs[key] for key in (block.name, *block.sites, *block.plates[-1:]) if key in inputs)
        rows: Tensor = inputs(*self.args, **self.kwargs)  # type: ignore[operator]
        return rows

    def _distribution(self, msg: Any, block: Block, which: int, parameters: list[Tensor]) -> Any:
        """Returns q for a site: the family in unconstrained space, in the site's shape, taken to its support."""
        prior = msg["fn"]
        event_dim = len(unconstrained_shape(msg)) - len(prior.batch_shape)
        around = plates_of([msg])
        plates = [around[name] for name in block.plates]
        axes = [plate.dim - event_dim for plate in plates]
        shape = block.shapes[which]
        expected = _without_axes(unconstrained_shape(msg), axes, len(shape) + len(axes))
        if expected != shape:
            raise ValueError(
                f"{type(self.guide).__name__}: site '{msg['name']}' has shape {expected} per element in unconstrained "
                f"space, but the guide was initialized with {shape}. Build a new guide for this model."
            )
        values = parameters[which]
        dim = block.dims[which]
        placed = [
            _placed(values[..., i * dim : (i + 1) * dim], [plate.size for plate in plates], axes, shape)
            for i in range(self.guide.family.per_dim)
        ]
        q = self.guide.family.distribution(*placed)
        with_data = self._with_data[block.name]
        marks = None
        if with_data is not None:
            marks = _placed(with_data.flatten()[:, None], list(with_data.shape), [plate.dim for plate in plates], ())
            marks = marks.to(parameters[0].device)
        if msg["name"] in self.plan.unmasked:
            msg["mask"] = marks
            q = dressed(msg, without_masks(prior), q)
        else:
            q = dressed(msg, prior, q)
        q = q.expand(torch.broadcast_shapes(q.batch_shape, prior.batch_shape))
        if marks is None or not block.exact_prior or is_improper(prior):
            return q
        return dist.MaskedMixture(marks, prior.expand(q.batch_shape), q)


class Replicate(Messenger):
    """Draws observed sites anew; keeps deterministic sites and factors."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic") and not site_is_factor(msg):
            msg["is_observed"], msg["value"] = False, None


def _laid(cells: Tensor, plates: tuple[str, ...], axes: list[str], cell_dim: int) -> Tensor:
    """Gives cells, shape (..., *plates, *cell), an axis for every plate, of length one where they lack it."""
    lead = cells.dim() - len(plates) - cell_dim
    order = sorted(range(len(plates)), key=lambda i: axes.index(plates[i]))
    cells = cells.permute(*range(lead), *(lead + i for i in order), *range(lead + len(plates), cells.dim()))
    for position, name in enumerate(axes):
        if name not in plates:
            cells = cells.unsqueeze(lead + position)
    return cells


def _placed(values: Tensor, sizes: list[int], axes: list[int], shape: tuple[int, ...]) -> Tensor:
    """Brings parameters of shape (..., elements, dim) to a site's shape, each plate at its axis from the right."""
    lead = values.shape[:-2]
    values = values.reshape((*lead, *sizes, *shape)) if sizes else values.reshape((*lead, *shape))
    missing = max((-axis for axis in axes), default=0) - (len(shape) + len(sizes))
    if missing > 0:
        values = values.reshape((*lead, *sizes, *(1,) * missing, *shape))
    first = len(lead)
    return values.movedim(list(range(first, first + len(sizes))), axes) if sizes else values


def _without_axes(shape: Sequence[int], axes: list[int], count: int) -> tuple[int, ...]:
    kept = list(shape)[max(len(shape) - count, 0) :]
    drop = {axis + len(kept) for axis in axes}
    return tuple(size for i, size in enumerate(kept) if i not in drop)


def _form_families(names: Any) -> bool:
    """Tells whether names like z_0, z_1 hint at a loop, whose length may depend on the data."""
    stems = [match.group(1) for name in names if (match := re.fullmatch(r"(.*?)\d+", name))]
    return len(stems) > len(set(stems))


def part_key(name: str) -> str:
    """Returns the name under which a block's modules are registered; one that no attribute of a module has."""
    return f"[{name.replace('.', '/')}]"
