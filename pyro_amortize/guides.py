"""Guides generated from a model: a plan, inputs, encoders and families, wired into the model's own plates.

The guide runs the model itself on every call, under a handler that replaces each latent site's prior by q, after the
model's own plates, masks and scales have acted on the site. It leaves the model once the last latent is drawn.
"""

from __future__ import annotations

import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn.module import _is_module_local_param_enabled
from pyro.poutine.runtime import _DIM_ALLOCATOR, effectful
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_amortize.answering import Answer, answered
from pyro_amortize.answers import Answers, Derived, Others
from pyro_amortize.arguments import check_count, named, refuse_guide, with_rows
from pyro_amortize.building import Builder, check_encoder, check_inputs
from pyro_amortize.calls import Args, Call, Kwargs, Model, signature_of
from pyro_amortize.carried import Known
from pyro_amortize.encoders import Encoder, Heads
from pyro_amortize.enumeration import draw_enumerated
from pyro_amortize.examination import examine
from pyro_amortize.families import FAMILIES
from pyro_amortize.handler import GuidedRun, call_of
from pyro_amortize.inputs import Preparation, Prepare
from pyro_amortize.parameters import preserved, refuse_replaced
from pyro_amortize.plan import AmortizationPlan, Block
from pyro_amortize.planner import build_plan
from pyro_amortize.posterior import Posterior, check_quantiles
from pyro_amortize.prediction import Prediction, arguments_of
from pyro_amortize.registration import Registration
from pyro_amortize.storage import load_model_state, model_state, options_of, read, write
from pyro_amortize.supports import init_to_center

MARK = "not_initialized"
TOO_EARLY = (
    "the guide's parameters were listed before there were any, as by torch.optim.Adam(guide.parameters()), and that "
    "list is still in use: nothing in it trains the guide. Call guide.initialize(...) with the model's arguments, then "
    "make the optimizer."
)


class AutoAmortized(AutoGuide):
    """A guide whose local latents are encoded from each datum's own data.

    For every block of the plan, q(z_n) = family(head(encoder(data of n))); sites without data of their own, globals
    above all, have a table of parameters instead. Sites, plates and shapes are the model's own; so are masks, scales
    and subsampling, since the guide runs the model up to its last latent. (A ``BatchNorm`` in that part therefore
    updates twice a step.) Parameters are made when data are first seen, by :meth:`initialize` or by the first call,
    and follow their device and dtype.

    In Pyro's param store they stand under the name of the class; a second guide's under ``AutoAmortizedNormal_1``, and
    so on, in the order in which guides are initialized. A new guide starts afresh, whatever guides there were before,
    with one exception: values that ``pyro.get_param_store().load(path)`` brought are taken, statistics of the training
    data included, by the first new guide of their name, which they must fit. :meth:`save` and :meth:`load` keep the
    plan and the options as well, and need no data.

    Main arguments:
        model: A Pyro model.
        family: "normal": independent normals in unconstrained space.
        encoder: What turns a row of data into features, from which a linear head for each site makes parameters:
            None for an ``MLP`` of two layers, 64 units wide or half as wide as the data, 400 at most; an
            ``nn.Module`` that maps (rows, features) to (rows, any width), shared, not copied; a callable from the
            number of features to such a module; ``Table()`` for a row of parameters for each element (mean-field);
            ``Constant()`` for one row for all; or a dict from site or plate name to these. Of nested plates the
            innermost names the latents inside both. An encoder given to a global site by name amortizes it over
            data sets; one given to a discrete site amortizes that, and the encoders of latents after it see its value.
            Data of plates around other sites are pooled first, see :class:`~pyro_amortize.encoders.DeepSets`. Elements
            that stand in order may see the data of others: ``Window(radius)`` and ``Recurrent()``. The sites of a
            loop, ``z_0``, ``z_1``, ..., share an encoder, under the name ``z_*``; None is ``Recurrent()`` where each
            depends on the one before.
        inputs: What the encoder sees, where the plan should not decide: a name or list of names of arguments, observed
            sites, and discrete latents that have encoders, a function of the model's arguments that returns shape
            (rows, ...), or a dict from site or plate name to these.

    Other Arguments:
        prepare: "auto" to prepare data by what they are (see :class:`~pyro_amortize.inputs.Inputs`), None to pass
            them flattened as they are, or a function of the latter.
        init_loc_fn: Where q starts: one of Pyro's initialization functions, or
            :func:`~pyro_amortize.supports.init_to_center`, the default, which draws nothing.
        init_scale: Standard deviation with which q starts, in unconstrained space.
        create_plates: Accepted for likeness with Pyro's guides and ignored: the model's own plates are used, and
            their own subsampling.

    Raises:
        ValueError: An option is not known.

    Example:
        >>> def model(x):
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(theta, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AutoAmortized(model, encoder=MLP((16,)))
        >>> svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
        >>> loss = svi.step(torch.randn(100))
        >>> guide.posterior(torch.randn(3)).mean["z"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: Model,
        *,
        family: str = "normal",
        encoder: Encoder | dict[str, Encoder] | None = None,
        inputs: Any = None,
        prepare: Prepare = "auto",
        init_loc_fn: Callable[..., Any] = init_to_center,
        init_scale: float = 0.1,
        create_plates: Any = None,
    ) -> None:
        kind = type(self).__name__
        refuse_guide(kind, model)
        if not callable(model) or isinstance(model, type):
            what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
            raise ValueError(f"{kind}: model is {what}; expected a callable Pyro model, a module being an instance.")
        if family not in FAMILIES:
            raise ValueError(f"{type(self).__name__}: family={family!r} is not known. Known: {list(FAMILIES)}.")
        if not (prepare in ("auto", None) or callable(prepare)):
            raise ValueError(f"{type(self).__name__}: prepare={prepare!r}. Expected 'auto', None or a function.")
        if not (isinstance(init_scale, (int, float)) and init_scale > 0):
            raise ValueError(f"{type(self).__name__}: init_scale={init_scale}. Expected a positive number.")
        super().__init__(model)
        del self.prototype_trace
        self._registration = Registration(type(self).__name__)
        self._lacking: set[str] = set()  # sites that not every call of the model comes by
        self._sums: dict[str, float] = {}  # of the data of groups that are gone through one by one
        self._is_known = True  # whether the model was seen to be the one that the guide is for
        self._marks: list[weakref.ref[nn.Parameter]] = []
        self.plan: AmortizationPlan | None = None
        self.options: dict[str, Any] = {
            "family": family,
            "encoder": encoder,
            "inputs": inputs,
            "prepare": prepare,
            "init_scale": float(init_scale),
        }
        check_encoder(kind, encoder)
        check_inputs(kind, inputs)
        if not callable(init_loc_fn):
            raise ValueError(f"{kind}: init_loc_fn={init_loc_fn!r}. Expected a function, as Pyro's init_to_median.")
        self.family = FAMILIES[family]()
        self.init_loc_fn = init_loc_fn
        self.coders = nn.ModuleDict()
        self.preparations = nn.ModuleDict()
        self.dtype = torch.get_default_dtype()
        self.row_ids: dict[str, Tensor] = {}
        self.signature: inspect.Signature | None = None
        self._versions: list[int] = []
        self._exits: dict[Any, frozenset[str]] = {}
        self._given: dict[Any, bool] = {}
        self._warned: set[Any] = set()

    # Pyro's protocol.

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yields the modules; before there are parameters, one with a mark, which whoever lists parameters holds."""
        yield from super().named_modules(*args, **kwargs)
        if self.plan is None:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            yield (f"{prefix}.{MARK}" if prefix else MARK), _Mark(self._marks)

    def _is_listed(self) -> bool:
        """Whether parameters were listed before there were any, by one who holds the list still, as optimizers do."""
        return any(mark() is not None for mark in self._marks)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        # Not PyroModule's: its context would announce parameters a second time, and hide the model's own store.
        result: dict[str, Tensor] = nn.Module.__call__(self, *args, **kwargs)
        return result

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples all latents given the model's arguments; returns a dict from site to value."""
        if self.signature is None:
            self.signature = signature_of(self.model)
        observations = {} if "observations" in self.signature.parameters else kwargs.pop("observations", {})
        if self.plan is None:
            if self._is_listed():
                raise RuntimeError(f"{type(self).__name__}: {TOO_EARLY}")
            self.initialize(*args, **kwargs)
        self._announce()
        return GuidedRun(self, args, kwargs, observations).sample()

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        """Plans from these data, makes the parameters, and takes the statistics for preparing inputs.

        Of more than 10,000 rows the model is run on some only, see :func:`~pyro_amortize.examination.examine`, and the
        statistics are those of 10,000 random ones, unless a table has a row for each, or ``inputs=`` holds a function.

        Before training it may be called again, with data that represent the whole better; a guide that has been
        trained or loaded keeps what it has.

        Args:
            args: The model's positional arguments, with at least two different rows of data.
            kwargs: The model's keyword arguments.

        Raises:
            ValueError, NotImplementedError: As :func:`~pyro_amortize.planner.plan_amortization` does.
            ValueError: Parameters that were loaded into the param store do not fit.
        """
        if self.plan is not None and not self.is_fresh:
            return
        with _outside_plates():
            self._initialize(args, kwargs)

    def _initialize(self, args: Args, kwargs: Kwargs) -> None:
        with with_rows(type(self).__name__):
            facts = examine(self.model, args, kwargs)
        builder = self._builder()
        plan = build_plan(facts, *builder.choices(facts), self.options["inputs"], self.options["encoder"])
        builder.refuse_misplaced(plan)
        beginning, sample = builder.excerpts(facts, plan, (args, kwargs))
        refuse_replaced(type(self).__name__, self.model, *beginning, training=False)
        run = GuidedRun(self, *sample, {}, plan=plan)
        examples = run.examples()
        cells = (values for reading in examples.values() for level in reading.cells for values, _ in level)
        data = [*Call(self.model, args, kwargs).tensors.values(), *cells]
        floating = [value.dtype for value in data if value.is_floating_point()]
        dtype = floating[0] if floating else torch.get_default_dtype()
        device = data[0].device if data else torch.empty(()).device
        plan, preparations = builder.prepared(plan, examples, device, dtype)
        coders = builder.coders(plan, preparations, examples, device, dtype)
        self._take(plan, coders, preparations, dtype)
        self.plan, trace = builder.start(plan, coders, self.model, beginning, self.init_loc_fn)
        latents = {name for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)}
        run.learn_exit({name for name in latents if plan.turn_of(name)[0] not in plan.enumerated})
        self._versions = [p._version for p in self.parameters()]
        self._register()

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns the posterior median of every latent for these data, shape of its site.

        Sites that are left to the model are at their prior's median, given those of the latents above them. Sites that
        are summed out have none. Takes any number of rows, as :meth:`posterior` does.
        """
        answer = self._answer("median", args, kwargs)
        return Answers(answer.values, self._posterior(answer, args, kwargs).median.others)

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns posterior quantiles for these data, shape (number of quantiles, *shape of the site).

        The quantiles come first, then the model's arguments: ``guide.quantiles([0.05, 0.95], x)``.

        Raises:
            ValueError: A quantile is not between 0 and 1.
        """
        check_quantiles(f"{type(self).__name__}.quantiles", quantiles)
        return self.posterior(*args, **kwargs).quantiles(quantiles)

    # Answers.

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """Returns q given these data, globals included: any number of rows, seen in training or not.

        It is for all rows of the data, also where the model draws some at random (``subsample_size=``): such a plate is
        walked through. With elements that the call fixes (``subsample=index``), or minibatches as arguments, it is for
        these, in their order.

        Runs in eval mode, without gradients, and leaves the model before its decoder. Data are prepared and encoded
        some rows at a time, so that beside data and answer, memory does not grow with their number; a reader of series
        and links between plates see all of theirs at once, though. Where a site's support depends on another latent,
        it is taken at that latent's median, and in draws and moments at its draws. So is the prior of elements without
        data at the medians of the latents above them, with whose draws :meth:`predictive` alone is joint. Draws hold
        the sites that are summed out too, given the other draws and the data.

        Raises:
            RuntimeError: The guide has no parameters yet.
            ValueError: Data are missing, do not fit, or new rows are asked of a table.
        """
        return self._posterior(self._answer("posterior", args, kwargs), args, kwargs)

    def _posterior(self, answer: Answer, args: Args, kwargs: Kwargs) -> Posterior:
        assert self.plan is not None
        discrete = joint = None
        conditional = any(source.drawn for block in self.plan.blocks for source in block.sources)
        if conditional or self.plan.moving or (answer.walked and self.plan.enumerated):
            joint = partial(self._drawn, args, kwargs, answer)
        elif self.plan.enumerated:
            discrete = partial(self._discrete, args, kwargs, answer)
        deterministic = partial(self._deterministic, args, kwargs, answer)
        others = Others(answer.series(self.plan), self.plan.without_answer, deterministic)
        given = partial(self._given_values, args, kwargs, answer) if self.plan.moving else None
        moving = [name for name in answer.found if self.plan.turn_of(name)[0] in self.plan.moving]
        return Posterior(answer.found, answer.plates, discrete, joint, others, given, moving)

    @named
    def predictive(
        self,
        *args: Any,
        given: Any = None,
        same: Collection[str] | None = None,
        num_samples: int = 1000,
        parallel: bool = True,
        model_kwargs: Kwargs | None = None,
    ) -> dict[str, Tensor]:
        """Draws latents from the guide, and replicated observations from the model, for the rows of a call.

        Latents are informed by the data of that call; those without data have the model's own conditional, as new rows
        should. To predict other rows than those that inform, pass the call that informs as ``given``. The latents that
        both calls have then come from q given that call: globals, groups that rows point to by an index and other
        plates without observed sites of their own (element by element, by their number), steps of a series, and rows
        that both calls have. Latents of new rows, new groups and later steps have the model's own conditional given
        these, or q where the call has data for them. Elements are the same only if the arguments that both calls have
        for them are equal, and rows only if all of those that inform are there. Where no argument tells, as many are
        taken to be the same unless the call has data for them; a warning asks to say it if some argument differs.

        Sites that are summed out are drawn jointly, given the other latents and the data. Plates whose elements the
        model draws at random are walked through, all of them once.

        Args:
            args: The model's positional arguments.
            given: The call that informs: its positional arguments in a tuple, or its arguments by name in a dict.
            same: The plates whose elements are those of ``given``, by their number; None to find out.
            num_samples: Number of draws.
            parallel: Whether draws are made in one run of the model, where a trial shows that it gives the same.
            model_kwargs: The model's keyword arguments.

        Returns:
            Site -> shape (num_samples, *site's shape), for latents, observed and deterministic sites. Asked by name, it
            holds the sites of a loop as one, too, ``["z_*"]``, with an axis for the turns after those of the plates.

        Raises:
            RuntimeError: The guide has no parameters yet.
            TypeError: The arguments in ``given`` do not fit the model.
            ValueError: ``given`` is no call, or new rows with data are asked of a table.
            NotImplementedError: A site cannot be drawn, or grows in a way that cannot be followed.

        Example:
            >>> def model(x, group, y=None):
            ...     with pyro.plate("groups", 3):
            ...         level = pyro.sample("level", dist.Normal(0.0, 5.0))
            ...     with pyro.plate("rows", len(x)):
            ...         pyro.sample("y", dist.Normal(level[..., group] + x, 1.0), obs=y)
            >>> x, group, y = torch.randn(30), torch.arange(30) % 3, torch.randn(30)
            >>> guide = AutoAmortized(model)
            >>> fit = fit_svi(model, guide, x, group, y, num_steps=10, progress=False)
            >>> guide.predictive(torch.zeros(2), group[:2], given=(x, group, y), num_samples=100)["y"].shape
            torch.Size([100, 2])
        """
        check_count("predictive", "num_samples", num_samples)
        self._refuse_uninitialized("predictive")
        self._warned.clear()
        call, informing = (args, model_kwargs or {}), None if given is None else arguments_of(given, self.model)
        call_of(self, *call)
        with self._predicting(num_samples, parallel) as prediction:
            return prediction.draw(call, informing, same)

    @contextmanager
    def _predicting(self, num_draws: int, parallel: bool = True) -> Iterator[Prediction]:
        """Runs a block with what draws of a call are made by, and leaves all but the random state as it was."""

        def guided(known: Known, indices: Mapping[str, Any]) -> Model:
            return lambda *args, **kwargs: GuidedRun(self, args, kwargs, {}, known=known, indices=indices).sample()

        self._register()
        with preserved(self.model, self, evaluating=True, random_state=False), torch.no_grad(), poutine.block():
            yield Prediction(self.model, self.plan, guided, num_draws, parallel)  # type: ignore[arg-type]

    def _drawn(self, args: Args, kwargs: Kwargs, answer: Answer, count: int) -> dict[str, Tensor]:
        """Draws from q jointly, the encoders of some sites being given the draws of others."""
        with self._predicting(count) as prediction:
            return prediction.latents((args, kwargs), _others(answer))

    def _deterministic(
        self, args: Args, kwargs: Kwargs, answer: Answer, draws: dict[str, Tensor]
    ) -> dict[str, Derived]:
        """Returns the deterministic sites at draws of the latents."""
        with self._predicting(len(next(iter(draws.values()), ()))) as prediction:
            return prediction.deterministic((args, kwargs), draws, _others(answer))

    def _given_values(
        self, args: Args, kwargs: Kwargs, answer: Answer, values: Mapping[str, Tensor]
    ) -> Mapping[str, Any]:
        """Returns q of each site with some latents held."""
        if answer.walked:
            raise NotImplementedError(
                f"Posterior.log_prob: the support of '{self.plan.moving[0]}' depends on another latent, and a plate of "  # type: ignore[union-attr]
                f"the model draws its elements at random. Call the model so that the plate does not subsample."
            )
        return self._answer("posterior", args, kwargs, values).found

    def _discrete(
        self, args: Args, kwargs: Kwargs, answer: Answer, draws: dict[str, Tensor], count: int
    ) -> dict[str, Tensor]:
        """Draws the sites that are summed out, given draws of the other latents."""
        found = draw_enumerated(self.model, args, kwargs, draws, answer.indices, count)
        summed = self.plan.enumerated  # type: ignore[union-attr]
        return {name: value for name, value in found.items() if self.plan.turn_of(name)[0] in summed}  # type: ignore[union-attr]

    # Saving.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the guide and what the model has learnt, as plain data.

        Raises:
            RuntimeError: The guide has no parameters yet.
        """
        self._refuse_uninitialized("save")
        assert self.plan is not None
        write(path, self, self.options, model_state(self.model, self.plan.params))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Model, map_location: Any = None, **guide_options: Any
    ) -> AutoAmortized:
        """Loads a guide for a model, and puts what the model had learnt into it. Needs no data.

        Args:
            path: Where :meth:`save` wrote.
            model: The model.
            map_location: As of ``torch.load``.
            guide_options: Modules and callables of your own with which the guide was made, passed again.

        Raises:
            ValueError: Such an option is missing. At the first call, that the model is another than the guide was
                trained for: a site is not there, has other values, or stands in other plates.
        """
        state = read(cls.__name__, path, map_location)
        guide = cls(model, **options_of(cls.__name__, state["options"], guide_options))
        guide.load_state_dict(state["guide"])
        load_model_state(model, state["model"])
        return guide

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the plan, so that a fresh guide can load a state dict."""
        if self.plan is None:
            return {}
        coders = {block.name: self.coder_of(block) for block in self.plan.blocks}
        widths = {name: coder.heads[0].in_features for name, coder in coders.items() if isinstance(coder, Heads)}
        dtype, lacking = str(self.dtype).removeprefix("torch."), sorted(self._lacking)
        state = {"plan": self.plan.to_dict(), "dtype": dtype, "widths": widths, "lacking": lacking}
        return {**state, "sums": dict(self._sums)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Makes the modules of a saved plan, unless they are there; their values follow."""
        if not state or state == self.get_extra_state():
            return
        dtype = getattr(torch, state["dtype"])
        plan = AmortizationPlan.from_dict(state["plan"])
        preparations = nn.ModuleDict()
        for block in plan.blocks:
            if block.amortized and not block.constant:
                preparations[block.key] = Preparation(block.levels, self.options["prepare"]).to(dtype)
        coders = self._builder().coders(plan, preparations, state["widths"], torch.device("cpu"), dtype)
        self._take(plan, coders, preparations, dtype)
        self._lacking, self._is_known = set(state.get("lacking", ())), False
        self._sums = dict(state.get("sums", {}))

    def __getstate__(self) -> dict[str, Any]:
        # AutoGuide's would take the model away from the guide that is being copied.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        return {**self.__dict__, "master": None, "_marks": [], "_versions": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._registration = Registration(type(self).__name__)

    def __getattr__(self, name: str) -> Any:
        if name in ("locs", "scales", "loc", "scale", "prototype_trace"):
            raise AttributeError(
                f"{type(self).__name__} has no '{name}': its parameters come from encoders, for data of any number of "
                f"rows. Ask for the posterior of given data: guide.posterior(x).mean, guide.posterior(x).stddev; "
                f"guide.plan says which sites there are."
            )
        return super().__getattr__(name)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Any:
        """Is no method of this guide: ``guide(x)`` draws once, ``guide.posterior(x).sample((10,))`` many times."""
        raise NotImplementedError(
            f"{type(self).__name__} has no sample_latent: there is no one vector of latents, since data may have any "
            f"number of rows. Draw by guide(x), or guide.posterior(x).sample((10,))."
        )

    # The parts.

    def _builder(self) -> Builder:
        return Builder(type(self).__name__, self.options, self.family)

    def _take(
        self, plan: AmortizationPlan, coders: nn.ModuleDict, preparations: nn.ModuleDict, dtype: torch.dtype
    ) -> None:
        if self._is_listed():
            warnings.warn(f"{type(self).__name__}: {TOO_EARLY}", UserWarning, stacklevel=3)
        self._marks = []
        self.plan, self.coders, self.preparations, self.dtype = plan, coders, preparations, dtype
        self._exits, self._given = {}, {}

    def coder_of(self, block: Block) -> Any:
        """Returns the module that makes a block's parameters; not by attribute, which PyroModule would announce."""
        return self._modules["coders"][block.key]

    def preparation_of(self, block: Block) -> Any:
        """Returns the module that prepares a block's inputs."""
        return self._modules["preparations"][block.key]

    def _register(self) -> str:
        """Puts the parameters into the param store, and takes what was loaded there; returns the name before theirs."""
        if _is_module_local_param_enabled():
            return self._pyro_name
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        return self._registration.update(self._pyro_name, {**trained, **dict(self.named_buffers())}, self.is_fresh)

    @property
    def is_fresh(self) -> bool:
        """Whether its parameters are those that it was made with: neither trained, nor loaded or copied."""
        return self._versions == [p._version for p in self.parameters()]

    def _announce(self) -> None:
        """Sends a param message for every parameter, so that any ELBO trains it."""
        local, prefix = _is_module_local_param_enabled(), self._register()
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            name = f"{prefix}.{name}"
            if local:
                alias = parameter.view_as(parameter)
                alias.unconstrained = weakref.ref(parameter)
                effectful(type="param")(_constantly(alias))(name, constraint=constraints.real, name=name)
            else:
                pyro.param(name, parameter)

    def _answer(self, what: str, args: Args, kwargs: Kwargs, held: Mapping[str, Tensor] | None = None) -> Answer:
        """Runs the model with every latent at its median, or where it is held."""
        self._refuse_uninitialized(what)
        self._register()

        def run(indices: Mapping[str, Any]) -> Answer:
            run = GuidedRun(self, args, kwargs, {}, answering=True, indices=indices)
            # Priors of all elements are not validated; the encoders' answers are looked at.
            with dist.validation_enabled(False), poutine.condition(data=dict(held or {})):
                run.sample()
            at_random = frozenset(run.reader.at_random)
            return Answer(run.sites, run.found, run.plates, run.values, dict(run.reader.indices), at_random)

        with preserved(self.model, self, evaluating=True), torch.no_grad(), poutine.block():
            return answered(run, self.model, args, kwargs, self.plan.lengths)  # type: ignore[union-attr]

    def _refuse_uninitialized(self, what: str) -> None:
        if self.plan is None:
            raise RuntimeError(
                f"{type(self).__name__}.{what}: the guide has no parameters yet. Train it, or call "
                f"guide.initialize(...) with the model's arguments first."
            )


class AutoAmortizedNormal(AutoAmortized):
    """:class:`AutoAmortized` with independent normals in unconstrained space; takes its other options.

    It stands where ``AutoNormal(model)`` stood.
    """

    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **{"family": "normal", **options})


class _Mark(nn.Module):
    """Stands among the modules of a guide that has no parameters yet; makes one for each who lists them.

    Args:
        given: Where these are noted.
    """

    def __init__(self, given: list[weakref.ref[nn.Parameter]]) -> None:
        super().__init__()
        self.given = given

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        parameter = nn.Parameter(torch.zeros(()))
        self.given.append(weakref.ref(parameter))
        return {"mark": parameter}

    @_parameters.setter
    def _parameters(self, _: Any) -> None:
        pass


@contextmanager
def _outside_plates() -> Iterator[None]:
    """Runs a block as if no plate were around, as a vectorized ELBO puts one around the first call."""
    stack = _DIM_ALLOCATOR._stack
    around = stack[:]
    stack.clear()
    try:
        yield
    finally:
        stack[:] = around


def guide_apart(model: Model, **options: Any) -> AutoAmortized:
    """Makes a guide that is no user's own: it takes nothing of what was loaded into the param store."""
    guide = AutoAmortized(model, **options)
    guide._registration.takes_loaded = False
    return guide


def _others(answer: Answer) -> dict[str, Any]:
    """Returns the elements of plates that an answer is for, of those that it did not walk through."""
    return {n: index for n, index in answer.indices.items() if index is not None and n not in answer.walked}


def _constantly(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
