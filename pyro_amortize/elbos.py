"""Pyro's Trace and mean-field ELBOs as graphs: recorded in an early step, checked against Pyro's own, and compiled."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.runtime import _PYRO_STACK, apply_stack
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_amortize.calls import Args, Kwargs, Model, leaves_of, rebuilt
from pyro_amortize.capture import Graph, Uncapturable, record
from pyro_amortize.parameters import preserved

CHECKED = (1, 2, 10, 100)
"""At which runs of a graph it is checked against the model as it is, same draws."""
MOST_KINDS = 16
"""How many kinds of calls have graphs; a counter among the arguments makes every call a kind of its own."""
RARE = 20
"""From which run on the graph of another kind of call than the first is compiled."""
NUM_VALUES = 3
"""How many values an argument that is a float may take before it becomes an input of the graph."""

Worthwhile = Callable[[Graph, int, bool], bool]


class CapturedLoss:
    """An ELBO of one model and guide, a graph for each kind of call.

    A kind of call is the structure of the arguments, the shapes and dtypes of tensors among them, and the values of
    all else. The first call of a kind is left to Pyro, which makes its parameters; the second is recorded. The same
    holds when modules change their mode or parameters become others.

    Args:
        elbo: The ELBO.
        model: The model.
        guide: The guide.
        worthwhile: Tells whether to compile a graph, from it, its runs so far, and whether it is the first.
        warns: Whether to warn where something is left to Pyro, or not compiled.

    Attributes:
        seconds: Wall-clock time of recording, compiling and checking.
        doubt: Why calls are left to Pyro, if they are.
    """

    def __init__(self, elbo: Any, model: Model, guide: Model, worthwhile: Worthwhile, warns: bool = True) -> None:
        self.elbo, self.model, self.guide, self.worthwhile, self.warns = elbo, model, guide, worthwhile, warns
        self.seconds = 0.0
        self.doubt: str | None = None
        self._kinds: dict[Any, list[_Recorded]] = {}
        self._left: set[Any] = set()
        self._is_crowded = False
        self._floats: dict[Any, set[Any]] = {}

    def evaluate(self, args: Args, kwargs: Kwargs) -> Evaluated | None:
        """Runs the graph of a call; None where Pyro is to run it instead."""
        if self.doubt is not None or not all(_only_sees_params(handler) for handler in _PYRO_STACK):
            return None
        try:
            call = _Arguments(args, kwargs, self._floats)
            if call.kind not in self._kinds and len(self._kinds) >= MOST_KINDS:
                self._refuse_more_kinds()
                return None
            variants = self._kinds.setdefault(call.kind, [])
            recorded = next((found for found in variants if found.holds()), None)
            if recorded is None:
                self._left ^= {call.kind}
                if call.kind in self._left:
                    return None
                recorded = self._record(call)
                self._kinds[call.kind] = [*variants[-3:], recorded]
            recorded.runs += 1
            first = call.kind == next(iter(self._kinds))
            compiling = recorded.compiled is None and self.worthwhile(recorded.graph, recorded.runs, first)
            if compiling:
                self._compile(recorded, call)
            if compiling or recorded.runs in CHECKED:
                return self._checked(recorded, call)
            return recorded.run(call)
        except Uncapturable as reason:
            self.doubt = str(reason)
            self._warn(f"its loss is left to Pyro, since {reason}.")
            return None

    def _refuse_more_kinds(self) -> None:
        if not self._is_crowded:
            self._is_crowded = True
            self._warn(
                "shapes or Python values among the arguments change from call to call. Calls of the first "
                f"{MOST_KINDS} kinds run on graphs, all others are left to Pyro."
            )

    def _record(self, call: _Arguments) -> _Recorded:
        """Records loss and gradients for a kind of call."""
        modules: dict[int, nn.Module] = {}
        hook = register_module_forward_pre_hook(lambda module, _: modules.update({id(module): module}))
        try:
            with self._timed(), preserved(), torch.no_grad(), poutine.block(), poutine.trace(param_only=True) as seen:
                self.elbo.losses(self.model, self.guide, *call.aliased)
        finally:
            hook.remove()
        for part in (self.model, self.guide):
            modules |= {id(m): m for m in (part.modules() if isinstance(part, nn.Module) else ())}
        announced = {name: site["value"].unconstrained() for name, site in seen.trace.nodes.items()}
        parameters = list({id(p): p for p in announced.values() if p.requires_grad}.values())
        used: list[bool] = []

        def run() -> list[Tensor]:
            loss, gradients = self._plain(parameters, *call.aliased)
            used[:] = [gradient is not None for gradient in gradients]
            return [loss, *(gradient for gradient in gradients if gradient is not None)]

        with self._timed():
            graph = record(run, [*parameters, *call.aliases])
        return _Recorded(graph, announced, parameters, used, [(m, m.training) for m in modules.values()])

    def _plain(self, parameters: list[Tensor], args: Args, kwargs: Kwargs) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Returns the loss and its gradients, under Pyro's handlers."""
        with poutine.block():
            loss, surrogate = self.elbo.losses(self.model, self.guide, args, kwargs)
        if not (isinstance(surrogate, Tensor) and surrogate.requires_grad):
            raise Uncapturable("it trains no parameter")
        return loss.detach(), torch.autograd.grad(surrogate, parameters, allow_unused=True)

    def _compile(self, recorded: _Recorded, call: _Arguments) -> None:
        try:
            with self._timed():
                recorded.compiled = recorded.graph.compiled([*recorded.parameters, *call.tensors])
        except Uncapturable as reason:
            recorded.compiled = recorded.graph
            self._warn(f"the graph of its loss runs without being compiled, since {reason}.")

    def _checked(self, recorded: _Recorded, call: _Arguments) -> Evaluated:
        """Runs a graph beside the model as it is, same draws."""
        state = pyro.util.get_rng_state()
        with self._timed(), pyro.validation_enabled(False):
            with preserved():
                loss, gradients = self._plain(recorded.parameters, call.args, call.kwargs)
            found = recorded.run(call)
            if _agree([loss, *(g for g in gradients if g is not None)], [found.loss, *found.gradients]):
                return found
            pyro.util.set_rng_state(state)
            if recorded.compiled is not None and recorded.compiled is not recorded.graph:
                recorded.compiled = recorded.graph
                self._warn("the graph of its loss runs without being compiled, since compiled code has other results.")
                return self._checked(recorded, call)
        raise Uncapturable(
            f"its graph gives {float(found.loss):.6g} where the model gives {float(loss):.6g} with the same draws: it "
            f"reads something that changes and is no argument, such as a Python number; pass that as an argument"
        )

    def _warn(self, text: str) -> None:
        if self.warns:
            warnings.warn(f"compiled ELBO: {text}", UserWarning, stacklevel=4)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class Evaluated:
    """A loss, shape (), and its gradients by unconstrained parameters; those without a gradient are left out."""

    loss: Tensor
    parameters: list[Tensor]
    gradients: Sequence[Tensor]
    recorded: _Recorded

    def announce(self) -> None:
        """Sends the param messages of the program that the graph stands for."""
        store = pyro.get_param_store()
        for name, parameter in self.recorded.announced.items():
            value: Any = parameter
            if name in store and store._constraints[name] is not constraints.real:
                value = store[name]
            elif not hasattr(parameter, "unconstrained"):
                value = parameter.detach()
                value.unconstrained = weakref.ref(parameter)
            apply_stack(_param_message(name, value))


class _Recorded:
    """A graph of a loss and its gradients, and what it holds for."""

    def __init__(
        self,
        graph: Graph,
        announced: dict[str, Tensor],
        parameters: list[Tensor],
        used: list[bool],
        modes: list[tuple[nn.Module, bool]],
    ) -> None:
        self.graph = graph
        self.compiled: Graph | None = None
        self.runs = 0
        self.announced, self.parameters, self.modes = announced, parameters, modes
        self.trained = [parameter for parameter, is_used in zip(parameters, used, strict=True) if is_used]
        store = pyro.get_param_store()._params
        self._stored = {name: store[name] for name in announced if name in store}
        self._meta = [_meta(parameter) for parameter in parameters]
        own = [parameter for module, _ in modes for parameter in module.parameters(recurse=False)]
        self._frozen = [parameter for parameter in own if not parameter.requires_grad]

    def holds(self) -> bool:
        """Tells whether parameters are those that were recorded, and modules in the same modes."""
        store = pyro.get_param_store()._params
        return (
            all(module.training is mode for module, mode in self.modes)
            and all(store.get(name) is parameter for name, parameter in self._stored.items())
            and not any(parameter.requires_grad for parameter in self._frozen)
            and all(_meta(p) == meta for p, meta in zip(self.parameters, self._meta, strict=True))
        )

    def run(self, call: _Arguments) -> Evaluated:
        graph = self.graph if self.compiled is None else self.compiled
        loss, *gradients = graph([*self.parameters, *call.tensors])
        return Evaluated(loss, self.trained, gradients, self)


class _Arguments:
    """The arguments of a call: tensors, which are inputs of a graph, and all else, which is fixed in it.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        floats: What values floats had in calls that were alike otherwise; those of many values become tensors.
    """

    def __init__(self, args: Args, kwargs: Kwargs, floats: dict[Any, set[Any]]) -> None:
        self.args, self.kwargs = args, kwargs
        kinds: list[Any] = []
        numbers: list[float] = []
        self._leaves = dict(leaves_of("", [args, kwargs]))
        for leaf in self._leaves.values():
            if isinstance(leaf, Tensor):
                if leaf.requires_grad:
                    raise Uncapturable("an argument requires gradients")
                kinds.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
            elif type(leaf) is float:
                kinds.append(float)
                numbers.append(leaf)
            elif leaf.__hash__ is None:
                raise Uncapturable(f"an argument is a {type(leaf).__name__}; pass a tensor")
            else:
                kinds.append((type(leaf), leaf))
        self.kind: Any = (tuple(self._leaves), tuple(kinds), torch.get_default_dtype())
        if numbers:
            values = floats.setdefault(self.kind, set())
            if len(values) <= NUM_VALUES:
                values.add(tuple(numbers))
            if len(values) <= NUM_VALUES:
                self.kind = (self.kind, tuple(numbers))
            else:
                floats_ = {name: torch.tensor(leaf) for name, leaf in self._leaves.items() if type(leaf) is float}
                self._leaves |= floats_
        self.tensors = [leaf for leaf in self._leaves.values() if isinstance(leaf, Tensor)]

    @cached_property
    def aliases(self) -> list[Tensor]:
        """The tensors as objects of their own: a closure may hold the very tensor that is passed."""
        return [tensor.detach() for tensor in self.tensors]

    @property
    def aliased(self) -> tuple[Args, Kwargs]:
        """The arguments, aliases in the place of tensors."""
        names = [name for name, leaf in self._leaves.items() if isinstance(leaf, Tensor)]
        args, kwargs = rebuilt("", [self.args, self.kwargs], dict(zip(names, self.aliases, strict=True)))
        return args, kwargs


class _CompiledELBO(ELBO):
    """What compiled ELBOs share; comes before a class of Pyro's."""

    def loss_and_grads(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> float:
        """Returns an estimate of minus the ELBO in nats, and adds its gradients to those of the parameters."""
        losses = self.__dict__.setdefault("_captured", {})
        key = id(model), id(guide)
        if key not in losses:  # holds model and guide, so that their ids stay theirs
            losses[key] = CapturedLoss(self, model, guide, _soon)
        found = losses[key].evaluate(args, kwargs)
        if found is None:
            return super().loss_and_grads(model, guide, *args, **kwargs)
        found.announce()
        add_gradients(found)
        return float(found.loss)

    def _particle(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> tuple[Any, Any]:
        """Returns the loss of one draw, and its surrogate."""
        raise NotImplementedError

    def losses(self, model: Model, guide: Model, args: Args, kwargs: Kwargs) -> tuple[Any, Any]:
        """Returns the loss, and the surrogate that has its gradients, as tensors."""
        loss: Any = 0.0
        surrogate: Any = 0.0
        for traces in self._get_traces(model, guide, args, kwargs):
            one, its_surrogate = self._particle(*traces)
            loss, surrogate = loss + one / self.num_particles, surrogate + its_surrogate / self.num_particles
        return loss, surrogate


class CompiledTrace_ELBO(_CompiledELBO, Trace_ELBO):
    """Pyro's ``Trace_ELBO``, compiled: the same loss and gradients, of models and guides without control flow.

    In ``SVI`` it stands where ``Trace_ELBO`` stood, for guides generated or written by hand. The first step runs under
    Pyro as ever. The second is recorded, as operations on tensors with those of the gradients, and compiled, which
    takes from seconds to a minute; from then on neither model nor guide is run. Draws come from torch's generators in
    the same order as Pyro's, so that a seed gives the same steps, to rounding, as without compiling. Parameters, data
    and buffers are read where they live. Everything else is fixed as it was when recorded: branches taken, Python
    numbers, attributes. Another shape, dtype or device of data, another value of an argument that is no tensor and
    another mode of a module make a graph of their own (an argument that is a float becomes an input once it has had
    several values). Now and then early on, a step is checked against the model as it is.

    Falls back, with a warning that says why: to the graph without a compiler where there is none, and to Pyro where no
    graph can stand for the model, above all where a tensor's value decides on a branch or a shape. Under handlers
    that are active outside ``SVI``, steps are left to Pyro. Takes the options of ``Trace_ELBO``.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> svi = SVI(model, AutoAmortizedNormal(model), Adam({"lr": 1e-2}), CompiledTrace_ELBO())
        >>> losses = [svi.step(torch.randn(100)) for _ in range(3)]
    """

    def _particle(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> tuple[Any, Any]:
        elbo: Any = 0.0
        surrogate: Any = 0.0
        log_r = None
        for site in model_trace.nodes.values():
            if site["type"] == "sample":
                elbo, surrogate = elbo + site["log_prob_sum"], surrogate + site["log_prob_sum"]
        for site in guide_trace.nodes.values():
            if site["type"] != "sample":
                continue
            parts = site["score_parts"]
            elbo = elbo - site["log_prob_sum"]
            if not is_identically_zero(parts.entropy_term):
                surrogate = surrogate - parts.entropy_term.sum()
            if not is_identically_zero(parts.score_function):
                log_r = log_r or _compute_log_r(model_trace, guide_trace)
                surrogate = surrogate + (log_r.sum_to(site["cond_indep_stack"]) * parts.score_function).sum()
        return -elbo, -surrogate


class CompiledTraceMeanField_ELBO(_CompiledELBO, TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO``, compiled: analytic KL divergences where there are any.

    See :class:`CompiledTrace_ELBO` for what compiling means.
    """

    def _particle(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> tuple[Any, Any]:
        elbo: Any = 0.0
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                elbo = elbo + site["log_prob_sum"]
                continue
            guided = guide_trace.nodes[name]
            try:
                elbo = elbo - _divergence(guided, site)
            except NotImplementedError:
                elbo = elbo + site["log_prob_sum"] - guided["score_parts"].entropy_term.sum()
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                elbo = elbo - site["score_parts"].entropy_term.sum()
        return -elbo, -elbo


def _divergence(guided: Any, site: Any) -> Any:
    """Returns KL(q, p) of a site, scaled and masked, summed."""
    divergence = scale_and_mask(kl_divergence(guided["fn"], site["fn"]), guided["scale"], guided["mask"])
    if isinstance(divergence, Tensor):
        return divergence.sum()
    return divergence * torch.Size(guided["fn"].batch_shape).numel()


def compiled_twin(elbo: Any) -> Any:
    """Returns the compiled ELBO of the same options as one of Pyro's; None if there is none."""
    twins = {Trace_ELBO: CompiledTrace_ELBO, TraceMeanField_ELBO: CompiledTraceMeanField_ELBO}
    if isinstance(elbo, _CompiledELBO) or type(elbo) not in twins:
        return elbo if isinstance(elbo, _CompiledELBO) else None
    twin = twins[type(elbo)]()
    twin.__dict__.update(elbo.__dict__)
    return twin


def add_gradients(found: Evaluated) -> None:
    """Adds gradients to those that parameters have."""
    having = [(p.grad, g) for p, g in zip(found.parameters, found.gradients, strict=True) if p.grad is not None]
    if having:
        torch._foreach_add_([held for held, _ in having], [gradient for _, gradient in having])
    for parameter, gradient in zip(found.parameters, found.gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient


def _soon(_: Graph, runs: int, first: bool) -> bool:
    return runs >= (1 if first else RARE)


def _only_sees_params(handler: Any) -> bool:
    """Tells whether a handler does nothing to a program but note its parameters, as that of ``SVI.step``."""
    return isinstance(handler, TraceMessenger) and bool(handler.param_only)


def _param_message(name: str, value: Tensor) -> dict[str, Any]:
    return {
        "type": "param",
        "name": name,
        "fn": None,
        "is_observed": False,
        "args": (),
        "kwargs": {},
        "value": value,
        "scale": 1.0,
        "mask": None,
        "cond_indep_stack": (),
        "done": True,
        "stop": False,
        "continuation": None,
        "infer": {},
    }


def _meta(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.requires_grad, tensor.shape, tensor.dtype, tensor.device


def _agree(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Tells whether a loss and its gradients, first and others, are the same to rounding."""
    if len(expected) != len(found) or any(e.shape != f.shape for e, f in zip(expected, found, strict=True)):
        return False
    if not torch.allclose(expected[0], found[0], rtol=1e-4, atol=1e-4, equal_nan=True):
        return False
    size = sum(float(e.square().sum()) for e in expected[1:]) ** 0.5
    off = sum(float((e - f).square().sum()) for e, f in zip(expected[1:], found[1:], strict=True)) ** 0.5
    return not off > 1e-3 * (1 + size)
