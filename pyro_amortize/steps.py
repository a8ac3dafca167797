"""The steps of a fit: a loss and its gradients, on a graph where one can be had, and an optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceTailAdaptive_ELBO
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import PyroOptim
from torch import Tensor, nn

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.capture import Graph
from pyro_amortize.elbos import CapturedLoss, compiled_twin
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.minibatch import Rescaled
from pyro_amortize.parameters import Preserved

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
OPTIM = (
    "Expected a function from a list of parameters to a torch optimizer, optim=lambda parameters: "
    "torch.optim.AdamW(parameters, lr=0.01), or an optimizer of Pyro, optim=pyro.optim.Adam({'lr': 0.01})."
)
SNAPSHOT = 10
"""After how many steps parameters are kept anew, to be put back when the loss is not finite any more."""
FEWEST_STEPS = 300
"""From how many steps on recording a graph pays."""
COMPILING = 8.0, 0.04
"""Seconds that compiling takes: of any graph, and of each operation in it."""
SAVED = 5e-6, 3e-10
"""Seconds that a compiled graph saves a step: of each operation, and of each number that it computes."""


@dataclass(frozen=True)
class Options:
    """The options that every fit takes; with ``max_plate_nesting``, particles are drawn in one run of the model."""

    num_steps: int = 2000
    batch_size: int | None = None
    lr: float = 0.01
    optim: Optimizer | PyroOptim | None = None
    loss: Any = None
    num_particles: int = 1
    compile: bool | str = "auto"
    seed: int | None = None
    progress: bool = True
    max_plate_nesting: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_particles", "batch_size"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and (name, value) != ("batch_size", None):
                raise ValueError(f"fit: {name}={value!r}. Expected a positive whole number.")
        if isinstance(self.optim, PyroLRScheduler):
            raise ValueError(
                f"fit: optim={type(self.optim).__name__} changes the learning rate, which already decays to zero over "
                f"num_steps. {OPTIM}"
            )
        if isinstance(self.optim, torch.optim.Optimizer) or not (self.optim is None or callable(self.optim)):
            raise ValueError(f"fit: optim is of type {type(self.optim).__name__}. {OPTIM}")
        is_loss = callable(self.loss) or hasattr(self.loss, "loss_and_grads")
        if isinstance(self.loss, type) or not (self.loss is None or is_loss):
            raise ValueError(f"fit: loss={self.loss!r}. Expected a Pyro ELBO, as Trace_ELBO(), or a function.")
        if isinstance(self.loss, TraceTailAdaptive_ELBO):
            raise ValueError(
                "fit: loss=TraceTailAdaptive_ELBO() has gradients but no value (Pyro says inf), so that no fit can "
                "be watched or judged by it. Pass loss=RenyiELBO(alpha=0.5, num_particles=4), or train by SVI."
            )
        if not isinstance(self.seed, (int, type(None))):
            raise ValueError(f"fit: seed={self.seed!r}. Expected a whole number, or None.")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"fit: compile={self.compile!r}. Expected True, False or 'auto'.")
        if not (isinstance(self.lr, (int, float)) and 0 < self.lr < math.inf):
            raise ValueError(f"fit: lr={self.lr!r}. Expected a positive number.")


def guide_parameters(guide: Model, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
    """Returns a guide's own unconstrained parameters, as one run of it announces them; one with two names once."""
    with poutine.block(), poutine.trace(param_only=True) as capture, torch.no_grad():
        guide(*args, **kwargs)
    announced = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
    names = {id(parameter): name for name, parameter in reversed(announced.items())}
    return {name: parameter for name, parameter in announced.items() if names[id(parameter)] == name}


class Steps:
    """The optimizer's steps, and what is put back when one goes wrong.

    Args:
        model: The model.
        guide: The guide.
        loss: A Pyro ELBO, or a function as ``SVI`` takes.
        options: The options of the fit.
        held: The record that puts the model's parameters back in the end, if they are to be.
        train_model: Whether the model's own parameters are trained.
    """

    def __init__(
        self, model: Model, guide: Model, loss: Any, options: Options, held: Preserved | None, train_model: bool
    ) -> None:
        self.model, self.guide, self.loss, self.options, self.held = model, guide, loss, options, held
        self.train_model = train_model
        self.parameters: dict[int, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.captured: CapturedLoss | None = None
        self._kept: tuple[int, list[Tensor]] = 0, []
        self._present: Any = None
        if held is not None:  # gradients that the user holds are put back, not added to
            store = [p for name, p in pyro.get_param_store().named_parameters()]
            own = {id(parameter) for parameter in guide.parameters()} if isinstance(guide, nn.Module) else set()
            for parameter in [*store, *(model.parameters() if isinstance(model, nn.Module) else ())]:
                if id(parameter) not in own:  # what is trained stays as it was trained
                    held.keep(parameter)
                    parameter.grad = None

    @property
    def compile_seconds(self) -> float:
        """Wall-clock time of recording, compiling and checking graphs."""
        return self.captured.seconds if self.captured is not None else 0.0

    @property
    def fallback(self) -> str | None:
        """Why there is no graph where there should be one."""
        return self.captured.doubt if self.captured is not None else None

    def take(self, step: int, args: Args, kwargs: Kwargs, handler: Any) -> float:
        """Takes one step; returns the loss.

        Args:
            step: Its number.
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            handler: What model and guide run under: a :class:`~pyro_amortize.minibatch.Rescaled`, or nothing.
        """
        value = self._on_graph(step, args, kwargs, handler)
        if value is None:
            value = self._under_pyro(step, args, kwargs, handler)
        if self.optimizer is None:
            left = getattr(getattr(self.guide, "plan", None), "left_to_model", ())
            why = (
                f" The plan leaves {list(left)} to the model, since no data were seen to depend on them: their "
                f"posterior is their prior, guide.predictive(...) draws it. If data do inform '{left[0]}', say so: "
                f"encoder={{'{left[0]}': MLP()}}."
                if left
                else ""
            )
            raise ValueError(f"fit: neither the guide nor the model has parameters, so there is nothing to train.{why}")
        if not math.isfinite(value):
            self._fail(step, args, kwargs, None)
        if step % SNAPSHOT == 0 or len(self._kept[1]) != len(self.parameters):
            self._kept = step, [parameter.detach().clone() for parameter in self.parameters.values()]
        _set_rates(self.optimizer, decay(step, self.options.num_steps))
        self.optimizer.step()
        if step == 0:  # a fused optimizer leaves the counters of changes as they were, by which a guide is trained
            with torch.no_grad():
                torch._foreach_add_(list(self.parameters.values()), 0.0)
        for parameter in self.parameters.values():
            parameter.grad = None
        if step == self.options.num_steps - 1 and not all(bool(p.isfinite().all()) for p in self.parameters.values()):
            self._fail(step, args, kwargs, None)
        return value

    def _on_graph(self, step: int, args: Args, kwargs: Kwargs, handler: Any) -> float | None:
        """Evaluates the loss and its gradients on a graph; None where there is none."""
        if step == 0:
            self._make_captured(handler)
        if self.captured is None:
            return None
        rows = (handler.rows,) if isinstance(handler, Rescaled) else ()
        found = self.captured.evaluate((*rows, *args), kwargs)
        if found is None:
            return None
        if found.recorded is not self._present:
            self._adopt(found.recorded.announced, args, kwargs)
            self._present = found.recorded
        for parameter, gradient in zip(found.parameters, found.gradients, strict=True):
            if id(parameter) in self.parameters:
                parameter.grad = gradient
        return float(found.loss)

    def _make_captured(self, handler: Any) -> None:
        """Makes what records the loss, if it can be and is worth it."""
        if self.options.compile is False or (self.options.compile == "auto" and self.options.num_steps < FEWEST_STEPS):
            return
        elbo = compiled_twin(self.loss)
        if elbo is None:
            if self.options.compile is True:
                warnings.warn(
                    f"fit: {type(self.loss).__name__} has no compiled form, so that every step runs under Pyro. "
                    f"Trace_ELBO and TraceMeanField_ELBO have.",
                    UserWarning,
                    stacklevel=6,
                )
            return
        model, guide = self.model, self.guide
        if isinstance(handler, Rescaled):
            model, guide = OnRows(model, handler), OnRows(guide, handler)
        self.captured = CapturedLoss(elbo, model, guide, self._is_worthwhile, self.options.compile is True)

    def _is_worthwhile(self, graph: Graph, runs: int, first: bool) -> bool:
        """Tells whether compiling saves more time than it takes: by size alone, so that a seed gives the same fit."""
        if self.options.compile is True:
            return first
        per_graph, per_operation = COMPILING
        by_operation, by_number = SAVED
        saved = graph.num_operations * by_operation + graph.num_values * by_number
        left = self.options.num_steps if first and runs == 1 else 0
        return saved * left > per_graph + per_operation * graph.num_operations

    def _under_pyro(self, step: int, args: Args, kwargs: Kwargs, handler: Any) -> float:
        """Evaluates the loss and its gradients as ``SVI`` does."""
        try:
            with handler, _without_nan_warnings(), poutine.trace(param_only=True) as seen:
                value = self._loss_and_grads(args, kwargs)
        except ValueError as error:  # how validation reports that parameters left their range
            if step == 0:
                raise
            self._fail(step, args, kwargs, error)
        self._adopt({name: site["value"].unconstrained() for name, site in seen.trace.nodes.items()}, args, kwargs)
        return value

    def _loss_and_grads(self, args: Args, kwargs: Kwargs) -> float:
        if hasattr(self.loss, "loss_and_grads"):
            value = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
            return float(sum(value)) if isinstance(value, tuple) else float(value)
        value = self.loss(self.model, self.guide, *args, **kwargs)
        value.backward()
        return float(value.detach())

    def _adopt(self, announced: dict[str, Tensor], args: Args, kwargs: Kwargs) -> None:
        """Takes parameters not seen before into the optimizer; those that are not to be trained lose their gradient."""
        others = {id(p): p for p in announced.values() if id(p) not in self.parameters}
        if not others:
            return
        own = {id(p) for p in guide_parameters(self.guide, args, kwargs).values()} if self.held is not None else set()
        for key, parameter in others.items():
            if self.held is not None and key not in own:
                self.held.keep(parameter)
                parameter.grad = parameter.grad if self.train_model else None
        new = {key: p for key, p in others.items() if self.train_model or key in own}
        self.parameters.update(new)
        if self.optimizer is None and new:
            self.optimizer = _optimizer(self.options.optim or self._adam, list(new.values()))
        elif new and self.optimizer is not None:
            for group in _groups(self.options.optim, list(new.values())):
                self.optimizer.add_param_group(group)

    def _adam(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        return torch.optim.Adam(parameters, lr=self.options.lr, fused=fused)

    def _fail(self, step: int, args: Args, kwargs: Kwargs, error: Exception | None) -> None:
        where = _not_finite(self.model, self.guide, args, kwargs)
        good, values = self._kept
        with torch.no_grad():
            for parameter, value in zip(self.parameters.values(), values, strict=False):
                parameter.copy_(value)
                parameter.grad = None
        raise RuntimeError(
            f"fit: the loss or a gradient is not finite at step {step}{where}. Parameters are back at those of step "
            f"{good}. Lower the learning rate, fit_svi(..., lr={self.options.lr / 10:g}), or look for infinite values "
            f"in the data and scales that reach zero in the model."
        ) from error


def _optimizer(optim: Optimizer | PyroOptim, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Makes the optimizer, of Pyro's kind as one of torch for all parameters."""
    if isinstance(optim, PyroOptim):
        made: Any = optim.pt_optim_constructor(_groups(optim, parameters))
        if optim.pt_clip_args:
            made.register_step_pre_hook(lambda optimizer, *_: _clip(optim, optimizer))
    else:
        made = optim(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(f"fit: optim returned {made!r}, no torch optimizer. {OPTIM}")
    return made


def _groups(optim: Any, parameters: list[Tensor]) -> list[dict[str, Any]]:
    """Returns parameters as a torch optimizer takes them, with options of their own where one of Pyro's gives such."""
    if not isinstance(optim, PyroOptim):
        return [{"params": parameters}]
    return [{"params": [p], **optim._get_optim_args(p)} for p in parameters]


def _clip(optim: Any, optimizer: torch.optim.Optimizer) -> None:
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        optim._clip_grad(parameter, **optim._get_grad_clip_args(parameter))


def _set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets learning rates to a part of those at the start, less what the optimizer itself made of them meanwhile."""
    for group in optimizer.param_groups:
        initial, last = group.setdefault("initial_lr", group["lr"]), group.get("last_lr")
        group["initial_lr"] = initial * group["lr"] / last if last else initial
        group["lr"] = group["last_lr"] = group["initial_lr"] * factor


class OnRows:
    """A model or guide as a function of the rows of a minibatch, then of its own arguments.

    Args:
        program: The model or guide.
        example: The handler that it runs under on some rows.
    """

    def __init__(self, program: Model, example: Rescaled) -> None:
        self.program, self.plate, self.inject = program, example.plate, example.inject

    def __call__(self, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the program on the rows."""
        guide = self.program if isinstance(self.program, AutoAmortized) and not self.inject else None
        before = guide.row_ids if guide is not None else {}
        try:
            if guide is not None:
                guide.row_ids = {self.plate.name: rows}
            with Rescaled(self.plate, rows, self.inject):
                return self.program(*args, **kwargs)
        finally:
            if guide is not None:
                guide.row_ids = before


def decay(step: int, num_steps: int) -> float:
    """The learning rate of a step, as a part of that at the start."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))


@contextmanager
def _without_nan_warnings() -> Iterator[None]:
    """Silences Pyro's warnings of NaN and infinity: the fit raises an error of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered", category=UserWarning)
        yield


def _not_finite(model: Model, guide: Model, args: Args, kwargs: Kwargs) -> str:
    """Names the first site whose log density is not finite with the present parameters."""
    try:
        with poutine.block(), torch.no_grad(), pyro.validation_enabled(False), _without_nan_warnings():
            guided = poutine.trace(guide).get_trace(*args, **kwargs)
            trace = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
            guided.compute_log_prob()
            trace.compute_log_prob()
    except (ValueError, RuntimeError):
        return ""
    for program, sites in (("guide", guided.nodes), ("model", trace.nodes)):
        for name, site in sites.items():
            if site["type"] == "sample" and not bool(site["log_prob_sum"].isfinite()):
                return f" (site '{name}' of the {program} has log density {float(site['log_prob_sum'])})"
    return ""
