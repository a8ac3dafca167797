"""The handler under which a guide runs its model: each latent's prior is replaced by q, in the model's own plates.

The model is left once the last latent is drawn: its decoder does not run. That is done only for a kind of call whose
first run went to the end with every latent covered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK, Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_amortize.arguments import with_rows
from pyro_amortize.calls import Args, Call, Kwargs, is_recorded, opened, signature_of
from pyro_amortize.carried import Carried, Known
from pyro_amortize.changes import refuse_changed, refuse_lost
from pyro_amortize.groups import refuse_more_groups, refuse_other_groups, refuse_other_shape, warn_of_other_data
from pyro_amortize.held import is_index
from pyro_amortize.layout import of_turn, placed, without_axes
from pyro_amortize.masks import PriorAlone, PriorWithoutData, under_masks
from pyro_amortize.parametrization import BlockParameters
from pyro_amortize.plan import AmortizationPlan, Block
from pyro_amortize.posterior import prior_median, typical
from pyro_amortize.reading import Reader, Reading
from pyro_amortize.structure import plates_of
from pyro_amortize.supports import (
    is_delta,
    is_enumerated,
    is_improper,
    site_mask,
    unconstrained_shape,
    with_logits,
)
from pyro_amortize.uninformed import Uninformed

if TYPE_CHECKING:
    from pyro_amortize.guides import AutoAmortized


MOST_EXITS = 256


class _Done(BaseException):
    """Leaves the model after its last latent; no handler of errors in the model should catch it."""


class GuidedRun(Messenger):
    """One run of the model under the guide."""

    def __init__(
        self,
        guide: AutoAmortized,
        args: Args,
        kwargs: Kwargs,
        observations: dict[str, Tensor],
        answering: bool = False,
        plan: AmortizationPlan | None = None,
        known: Known | None = None,
        indices: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.guide = guide
        self.plan: AmortizationPlan = plan or guide.plan  # type: ignore[assignment]
        self.call = call_of(guide, args, kwargs)
        self.model, _ = opened(guide.model)
        self.args, self.kwargs = args, kwargs
        self.answering, self.known = answering, known
        self.values: dict[str, Tensor] = {}
        self.found: dict[str, Any] = {}
        self.plates: dict[str, tuple[str, ...]] = {}
        self.sites: dict[str, Any] = {}
        inputs, kind = guide.options["inputs"], type(guide).__name__
        self.reader = Reader(self.model, self.plan, self.call, (args, kwargs), observations, inputs, kind)
        self.reader.fixed |= {name: index for name, index in (indices or {}).items() if index is not None}
        self._ahead: dict[str, bool] = {}
        self._seen: set[str] = set()
        self._exit_after: frozenset[str] | None = None
        self._outside = [-1 - i for i, frame in enumerate(_DIM_ALLOCATOR._stack) if frame is not None]  # of particles
        self._informed = known is not None and known.informing is not None
        self._uninformed = Uninformed(self.plan, self.call, self._informed, kind)
        self.blocks = BlockParameters(guide, self.reader, self._uninformed, answering, kind)
        self._looks_for_masks = False
        self._partial: set[str] = set()
        self._inside = False

    def sample(self) -> dict[str, Tensor]:
        """Runs the model up to its last latent; returns the values of all latents."""
        for block in self.plan.blocks:
            names = {source.name for source in block.sources if not source.drawn} & set(self.call.leaves)
            if any(self.call.leaves[name] is None for name in names):
                self.blocks.refuse_missing(block)
        if self.reader.needs_looking_up():
            self.reader.look_up()
        self._find_given()
        self._exit_after = None if self._informed else self.guide._exits.get(self._kind_of_call())
        try:
            with with_rows(type(self.guide).__name__), self:
                self.model(*self.args, **self.kwargs)
        except _Done:
            pass
        except Exception:
            if self._inside or not self.blocks.beyond or not self._is_covered():
                raise  # else a forecast, of which the model's own run shows what comes after the latents
            self._exit_after = frozenset()
        self._uninformed.warn(self._kind_of_call, self.guide._warned)
        if self._exit_after is None:
            if self.known is None:
                refuse_other_groups(type(self.guide).__name__, self.plan.groups, self.values, self._partial)
            self._learn_sites()
        if self._exit_after is None and not self._looks_for_masks:
            self.learn_exit(set(self.values))
        return self.values

    def _learn_sites(self) -> None:
        """Notes which sites a whole run of the model lacks; a guide from a file wants those that none lacked before."""
        guide = self.guide
        if not guide._is_known:
            refuse_lost(type(guide).__name__, self.plan, self._seen | guide._lacking)
        guide._is_known = True
        guide._lacking |= {site for block in self.plan.blocks for site in block.sites} - {
            self.plan.turn_of(name)[0] for name in self._seen
        }

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
        sites = self.reader.look_up(seed=0)
        plates = plates_of(sites)
        self.reader.indices = self.reader.looked_up["indices"]
        self.reader.drawn = {site["name"]: site["value"] for site in sites}
        found = {}
        for block in self.plan.blocks:
            if block.amortized and not block.constant:
                reading = self.reader.read(block, {name: plates[name] for name in block.plates})
                assert reading is not None
                found[block.name] = reading
        return found

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
                is_flag = leaf.dim() == 0 and not leaf.is_floating_point() and not is_recorded()
                flag = leaf.item() if is_flag else None
                parts.append((name, leaf.dtype, flag, tuple(n for i, n in enumerate(leaf.shape) if i not in rows)))
            elif isinstance(leaf, (int, float, str, type(None))):
                parts.append((name, type(leaf), leaf))
            else:
                return None
        return tuple(parts)

    # The handler.

    def _pyro_param(self, msg: Message) -> None:
        msg["stop"] = True

    def _is_covered(self) -> bool:
        """Whether all latents of the plan have been drawn."""
        drawn = {self.plan.turn_of(name)[0] for name in self.values}
        return all(site in drawn for block in self.plan.blocks for site in block.sites)

    def _pyro_sample(self, msg: Message) -> None:
        self._inside = True
        self._guide_site(msg)
        self._inside = False

    def _guide_site(self, msg: Message) -> None:
        name = msg["name"]
        self._seen.add(name)
        if site_is_subsample(msg):
            self._subsample(msg)
            return
        if msg["is_observed"]:
            self._see_data(msg)
            return
        if name in self._ahead:
            self._take_drawn(msg)
            return
        self._leave_markov_scope(msg)
        site, turn = self.plan.turn_of(name)
        block = self.plan.block_of(name)
        carried = self.known.of(msg, self.reader.indices) if self.known else None
        if carried is not None and not carried.surely and block is not None and self._has_data(block, msg):
            carried = None
        if carried is not None and not carried.surely and self.known and self.known.informing:
            self.known.informing.warn()
        if carried is not None and carried.marks is None:
            msg["value"], msg["infer"] = carried.values, {**msg["infer"], "enumerate": None}
            msg["stop"] = not self._is_guided(name)
            return
        if block is None and site not in self.plan.left_to_model:
            msg["stop"] = True
            if is_enumerated(msg):  # its value says nothing but shapes
                return
            if site not in self.plan.observed and site not in self.plan.foreign:
                refuse_more_groups(type(self.guide).__name__, self.plan.groups, name)
                raise RuntimeError(
                    f"{type(self.guide).__name__}: latent site '{name}' was not there when the guide was initialized, "
                    f"so nothing guides it. Build a new guide and initialize it by a call that reaches '{name}'; a "
                    f"loop whose length may change is recognized from two turns on."
                )
            return
        if any(not frame.vectorized and frame.size < (frame.full_size or 0) for frame in msg["cond_indep_stack"]):
            self._partial.add(name)
        if block is not None and self._exit_after is None:
            refuse_changed(type(self.guide).__name__, msg, block, block.sites.index(site), turn)
        parameters = self._parameters_of(block, msg) if block else None
        if block is None or parameters is None or not self._is_within(block, turn):  # the model's own conditional
            msg["infer"] = {**msg["infer"], "enumerate": None}  # drawn, not summed out
            if is_delta(msg["fn"]):  # a density that it has is a factor of the model's, not of the guide's
                msg["fn"] = dist.Delta(msg["fn"].rsample(), event_dim=msg["fn"].event_dim)
            msg["value"] = prior_median(msg["fn"]) if self.answering else msg["value"]
            self._carry(msg, carried)
            msg["fn"] = msg["fn"] if msg["fn"].has_rsample else PriorAlone(msg["fn"])
            return
        q = self._distribution(msg, block, block.sites.index(site), parameters, turn)
        msg["fn"] = q
        if block.is_discrete:
            msg["infer"] = {**msg["infer"], **_enumeration_of(q)}
        self._carry(msg, carried)
        if self.answering:
            self.found[name] = q
            around = sorted(plates_of([msg]).values(), key=lambda plate: plate.order)
            self.plates[name] = tuple(plate.name for plate in around)
            msg["value"] = typical(q)

    def _has_data(self, block: Block, msg: Message) -> bool:
        """Whether this call has data of any element of a block."""
        if self._parameters_of(block, msg) is None:
            return False
        marks = self.blocks.with_data.get(block.name)
        return marks is None or bool(marks.any())

    def _carry(self, msg: Message, carried: Carried | None) -> None:
        """Draws a latent of which some elements have their values already."""
        if carried is None or carried.marks is None:
            return
        value, marks = carried.values, carried.marks
        batch = value.shape[: value.dim() - len(msg["fn"].event_shape)]
        msg["fn"] = msg["fn"].expand(torch.broadcast_shapes(msg["fn"].batch_shape, batch))
        msg["value"] = torch.where(marks, value, msg["fn"]())

    def _leave_markov_scope(self, msg: Message) -> None:
        """Takes names that are hidden from outside out of what ``pyro.markov`` tells outer handlers of."""
        scope = msg["infer"].get("_markov_scope")
        if scope:
            seen = {name for name in scope if self._is_guided(name)}
            msg["infer"]["_markov_scope"] = type(scope)({name: scope[name] for name in seen})

    def _pyro_post_sample(self, msg: Message) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self.reader.indices[name] = msg["value"] if is_index(msg["value"]) else None
        elif not msg["is_observed"] and self._is_guided(name):
            self.values[name] = self.reader.drawn[name] = msg["value"]
            if self.answering:
                self.sites[name] = msg
            if self._exit_after is not None and self._exit_after <= set(self.values):
                raise _Done
        elif self._is_guided(name):  # conditioned from outside
            self.values[name] = self.reader.drawn[name] = msg["value"]

    def _see_data(self, msg: Message) -> None:
        """Refuses data that the guide cannot answer for, and hides them from outside."""
        name, msg["stop"] = msg["name"], True
        self._refuse_other_turns(name)
        self._refuse_new_rows(msg)
        self._refuse_new_mask(msg)
        if self.known is None:
            shape = tuple(torch.as_tensor(msg["value"]).shape)  # a plain number, where validation is off
            refuse_other_shape(type(self.guide).__name__, self.plan.groups, name, shape)
            warn_of_other_data(type(self.guide).__name__, self.plan.groups, name, msg["value"], self.guide._sums)
        self.reader.drawn[name] = msg["value"]

    def _is_guided(self, name: str) -> bool:
        return self.plan.block_of(name) is not None or self.plan.turn_of(name)[0] in self.plan.left_to_model

    def _is_within(self, block: Block, turn: dict[str, int]) -> bool:
        """Whether a turn of a loop is one of those that have data; what comes after has the model's own conditional."""
        sizes = dict(zip(block.plates, self.blocks.sizes[block.name], strict=True))
        return all(position < sizes[loop] for loop, position in turn.items())

    def _refuse_new_rows(self, msg: Message) -> None:
        """Refuses data of elements that have no row in a table, since these are not those of the call that informs."""
        for plate in (plate for plate in plates_of([msg]) if plate in self.blocks.new_rows):
            block = self.blocks.new_rows[plate]
            raise ValueError(
                f"{type(self.guide).__name__}: '{block.sites[0]}' has a table, which cannot answer for new elements "
                f"of plate '{plate}', but this call has data of them, at site '{msg['name']}'. Leave these out, or: "
                f"{block.remedy}."
            )

    def _refuse_new_mask(self, msg: Message) -> None:
        """Refuses a mask over data that were under none, since encoders would see what it covers."""
        site, _ = self.plan.turn_of(msg["name"])
        informs = any(site in level.sites for block in self.plan.blocks for level in block.levels)
        if not informs or site in self.plan.masks or is_recorded():
            return
        mask = site_mask(msg)
        self._looks_for_masks |= mask is not None  # the next may cover something
        if mask is not None and not bool(mask.all()):
            raise ValueError(
                f"{type(self.guide).__name__}: site '{msg['name']}' is under a mask in this call, but was under none "
                f"when the guide was initialized, so that an encoder would see what the mask covers. Build a new guide "
                f"and initialize it by a call with a mask: guide.initialize(...)."
            )

    def _refuse_other_turns(self, name: str) -> None:
        """Refuses data of turns of a loop before the first that is known, or of more than a table has rows for."""
        site, turn = self.plan.turn_of(name)
        if site not in self.plan.observed and not turn and any(f.numbers(name) for f in self.plan.families):
            raise ValueError(
                f"{type(self.guide).__name__}: '{name}' is observed, but stands before the first turn of its loop that "
                f"was observed when the guide was initialized, so it would not be seen. Build a new guide and "
                f"initialize it by a call that observes '{name}'."
            )
        for loop in (loop for loop, position in turn.items() if position >= self.plan.plates[loop]):
            block = next((b for b in self.plan.blocks if loop in b.plates and not b.amortized), None)
            if block is not None:
                raise ValueError(
                    f"{type(self.guide).__name__}: '{block.sites[0]}' has a table with a row for each of the "
                    f"{self.plan.plates[loop]} turns of loop '{loop}', but this call has data of more. A table cannot "
                    f"answer for new rows; use an encoder: "
                    f"AutoAmortizedNormal(model, encoder={{'{block.sites[0]}': Recurrent()}})."
                )

    def _subsample(self, msg: Message) -> None:
        name = msg["name"]
        if self.guide.master is not None and name in getattr(self.guide.master(), "plates", {}):
            msg["value"] = self.guide.master().plates[name].indices
            msg["stop"] = True
            self.reader.indices[name] = msg["value"]
        elif msg["value"] is None and name in self.reader.fixed:
            msg["value"] = self.reader.fixed[name]
        elif msg["value"] is None and name in self.reader.looked_up.get("indices", {}):
            msg["value"] = self.reader.looked_up["indices"][name]
            self.reader.at_random.add(name)
        if msg["value"] is None:
            draw = msg["fn"].sample

            def noted(*args: Any, **kwargs: Any) -> Any:  # called unless a handler outside says which elements
                self.reader.at_random.add(name)
                return draw(*args, **kwargs)

            msg["fn"].sample = noted

    # From data to distributions.

    def _parameters_of(self, block: Block, msg: Message) -> list[Tensor] | None:
        """Returns the parameters of a block, whose encoder may see discrete latents that the model comes to later."""
        for source in block.sources:
            if source.drawn and source.name not in self.reader.drawn:
                self._draw_ahead(source.name, msg)
        return self.blocks.of(block, msg)

    def _find_given(self) -> None:
        """Finds what this call observes of the discrete sites that encoders see before the model comes to them.

        That takes a run of the model; where a call of this kind observed none of them, there is nothing to find.
        """
        names = {source.name for block in self.plan.blocks for source in block.sources if source.ahead}
        key = self._kind_of_call() if names else None
        if not names or self.guide._given.get(key) is False:
            return
        if not self.reader.looked_up:
            self.reader.look_up(seed=0)
        nodes = self.reader.looked_up["sites"]
        given = {name: nodes[name]["value"] for name in names if name in nodes and nodes[name]["is_observed"]}
        self.reader.drawn |= given
        if key is not None:
            if len(self.guide._given) >= MOST_EXITS:
                self.guide._given.clear()
            self.guide._given[key] = bool(given)

    def _draw_ahead(self, name: str, msg: Message) -> None:
        """Draws a discrete site before the model comes to it, beside another in the same plates.

        Its prior is not known yet, so that elements without data have the encoder's answer.
        """
        block = self.plan.block_of(name)
        assert block is not None
        stand_in = {**msg, "name": name, "fn": _even(block).expand(msg["fn"].batch_shape), "infer": {}, "mask": None}
        parameters = self._parameters_of(block, stand_in)
        if parameters is not None:
            self.blocks.with_data[block.name] = None
            self._ahead[name] = False
            q = self._distribution(stand_in, block, 0, parameters, {})
            pyro.sample(name, q, infer=_enumeration_of(q))

    def _take_drawn(self, msg: Message) -> None:
        """Lets a draw ahead pass to the outside; hides the model's own later site, which takes its value."""
        name = msg["name"]
        if self._ahead[name]:
            msg["stop"], msg["value"] = True, self.reader.drawn[name]
            msg["infer"] = {**msg["infer"], "enumerate": None}
        elif self.answering:
            self.found[name], self.plates[name] = msg["fn"], self.plan.block_of(name).plates  # type: ignore[union-attr]
            msg["value"] = typical(msg["fn"])
        self._ahead[name] = True

    def _distribution(
        self, msg: Message, block: Block, which: int, parameters: list[Tensor], turn: dict[str, int]
    ) -> Any:
        """Returns q for a site: the family in unconstrained space, in the site's shape, taken to its support."""
        prior, extra = msg["fn"], block.logits[which]
        whole = unconstrained_shape(msg) if extra is None else prior.shape()
        event_dim = len(whole) - len(prior.batch_shape)
        around = plates_of([msg], self.plan.same)
        plates = [around[name] for name in block.plates if name not in turn]
        axes = [plate.dim - event_dim for plate in plates]
        shape = block.shapes[which]
        outside = [dim - event_dim for dim in self._outside]
        expected = without_axes(whole, [*axes, *outside], len(shape) + len(axes) + len(outside))
        if expected != shape:
            raise ValueError(
                f"{type(self.guide).__name__}: site '{msg['name']}' has shape {expected} per element in unconstrained "
                f"space, but the guide was initialized with {shape}. Build a new guide for this model."
            )
        sizes, present = self.blocks.sizes[block.name], [plate.size for plate in plates]
        values = of_turn(parameters[which], block.plates, sizes, turn)
        marks, with_data = None, self.blocks.with_data.get(block.name)
        if with_data is not None:
            marks = of_turn(with_data.flatten()[:, None], block.plates, sizes, turn)
            marks = placed(marks, present, [plate.dim for plate in plates], ()).to(values.device)
        own = marks if block.exact_prior or block.name in self.blocks.beyond else None
        idle = block.sites[which] in self.plan.idle and block.chain is None  # of a chain marks tell what data depend on
        if idle and isinstance(msg["mask"], Tensor):
            own = msg["mask"] if own is None else own & msg["mask"]
        own = None if self.answering and own is not None and bool(own.all()) else own
        if extra is None:
            parts = values.split(block.dims[which], -1)
            q = self.guide.family.distribution(*(placed(part, present, axes, shape) for part in parts))
        else:
            logits = placed(values, present, [axis - len(extra) for axis in axes], shape + extra)
            q = with_logits(prior, logits, own)
        q = under_masks(msg, q, marks, idle)
        batch_shape = torch.broadcast_shapes(q.batch_shape, prior.batch_shape)
        q = q if q.batch_shape == batch_shape else q.expand(batch_shape)
        if extra is not None or own is None or is_improper(prior):
            return q
        return PriorWithoutData(own, prior.expand(q.batch_shape), q)


def call_of(guide: AutoAmortized, args: Args, kwargs: Kwargs) -> Call:
    """Returns the arguments of a call by name; refuses one without data, which suffices for Pyro's own guides."""
    signature = guide.signature or signature_of(guide.model)
    try:
        return Call(guide.model, args, kwargs, signature)
    except TypeError as error:
        raise TypeError(
            f"{type(guide).__name__}: {error}. Its answers are for given data: guide(...), guide.median, "
            f"guide.quantiles and guide.posterior take the model's arguments, {signature}."
        ) from None


def _even(block: Block) -> Any:
    """Returns a discrete distribution of a block's kind, all values even, for one element."""
    base = getattr(dist, block.distribution)(logits=torch.zeros(block.shapes[0] + (block.logits[0] or ())))  # type: ignore[arg-type]
    return base.to_event(len(base.batch_shape))


def _enumeration_of(q: Any) -> dict[str, Any]:
    """Says of a discrete site that all its values be tried side by side, where ``TraceEnum_ELBO`` runs the guide."""
    enumerating = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
    return {"enumerate": "parallel" if enumerating and q.has_enumerate_support else None}


def _form_families(names: Any) -> bool:
    """Tells whether names like z_0, z_1 hint at a loop, whose length may depend on the data."""
    stems = [match.group(1) for name in names if (match := re.fullmatch(r"(.*?)\d+", name))]
    return len(stems) > len(set(stems))
