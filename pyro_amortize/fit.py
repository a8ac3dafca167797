"""A model, a guide and data, turned into a trained guide: the record of a fit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from pyro_amortize.calls import Model
from pyro_amortize.densities import enumerated_sites, log_densities, log_ratios, refuse_other_plates
from pyro_amortize.excerpt import LARGE, random_rows
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.minibatch import SUBSAMPLES_ITSELF, Minibatches, exact_minibatches
from pyro_amortize.parameters import Preserved

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
NUM_DRAWS = 200
NUM_PARTS = 50


@dataclass(frozen=True)
class SVIFit:
    """A trained guide, and how its training went.

    Attributes:
        guide: The guide.
        losses: Loss at each step, shape (num_steps,): minus the ELBO in nats, if the loss is one.
        elbo: ELBO in nats on all data after training, from many draws. Where steps took minibatches of more than 10,000
            rows, each draw is on other rows, 5,000 or more than a minibatch, rescaled to all.
        elbo_se: Its standard error, which then includes that of the choice of rows.
        converged: Whether the loss had stopped falling: its slope over the second half of the steps, against the sum
            of learning rates, promises no fall by another such fit that is beyond three standard errors.
        num_steps: Number of steps.
        seconds: Wall-clock time of everything.
        num_parameters: Size of the guide; the model's own parameters do not count.
        model: What the guide was fitted to; not a copy.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    guide: Any
    losses: Tensor
    elbo: float
    elbo_se: float
    converged: bool
    num_steps: int
    seconds: float
    num_parameters: int
    model: Any = field(default=None, repr=False, compare=False)
    args: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    kwargs: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        state = "converged" if self.converged else "NOT converged: the loss was still falling; raise num_steps"
        return (
            f"SVIFit: ELBO {self.elbo:.2f} ± {self.elbo_se:.2f} nats after {self.num_steps} steps, "
            f"{self.seconds:.1f} s, {self.num_parameters} parameters, {state}"
        )


def fit_svi(
    model: Model,
    guide: Model,
    *args: Any,
    num_steps: int = 2000,
    batch_size: int | None = None,
    lr: float = 0.01,
    optim: Optimizer | None = None,
    loss: Any = None,
    num_particles: int = 1,
    seed: int | None = None,
    progress: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> SVIFit:
    """Trains a guide, and the model's own parameters with it, as ``SVI`` does.

    The learning rate decays to zero along a cosine, so that the fit settles, and it never stops early.

    Main arguments:
        model: A Pyro model.
        guide: Its guide, generated or written by hand.
        args: The model's positional arguments, all data.
        num_steps: Number of steps.
        batch_size: Rows a step; the model need not be changed for it. Used where it is exact, else a warning says why
            not, and steps take all rows. Each row is taken once an epoch; of more than 10,000 rows, each step takes a
            random subset, and nothing then runs on all of them (``x`` may be memory-mapped), unless a table has a row
            for each, the data are in a closure, or the model insists on their number.
        lr: Learning rate at the start.
        model_kwargs: The model's keyword arguments.

    Other Arguments:
        optim: Makes a torch optimizer from a list of parameters; ``Adam(lr)`` by default.
        loss: A Pyro ELBO, or a function as ``SVI`` takes. By default ``TraceEnum_ELBO`` where the model marks discrete
            latents for enumeration that the guide does not sample, or a generated guide amortizes discrete ones; else
            ``TraceMeanField_ELBO`` for generated guides, whose KL divergence is analytic where it can be, and
            ``Trace_ELBO`` for others.
        num_particles: Draws a step, of the default loss.
        seed: Of this fit; the global random state is then left alone.
        progress: Whether to show a progress bar with the loss.

    Returns:
        The record of the fit; its ``guide`` is the one passed.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: The loss or a gradient is not finite; parameters are put back to the last good step.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(200)
        >>> fit = fit_svi(model, AutoAmortizedNormal(model), x, num_steps=300, seed=0, progress=False)
        >>> fit.converged
        True
    """
    options = Options(num_steps, batch_size, lr, optim, loss, num_particles, seed, progress)
    return train(model, guide, args, model_kwargs or {}, options, "fit_svi")


@dataclass(frozen=True)
class Options:
    """The options that every fit takes; with ``max_plate_nesting``, particles are drawn in one run of the model."""

    num_steps: int = 2000
    batch_size: int | None = None
    lr: float = 0.01
    optim: Optimizer | None = None
    loss: Any = None
    num_particles: int = 1
    seed: int | None = None
    progress: bool = True
    max_plate_nesting: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_particles", "batch_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"fit: {name}={value!r}. Expected a positive whole number.")
        if not self.lr > 0:
            raise ValueError(f"fit: lr={self.lr!r}. Expected a positive number.")


def train(
    model: Model,
    guide: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    title: str,
    *,
    held: Preserved | None = None,
    train_model: bool = True,
) -> SVIFit:
    """Trains a guide; :func:`fit_svi` without its defaults.

    Args:
        model: The model.
        guide: The guide.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        options: As of ``fit_svi``.
        title: What the progress bar says.
        held: If the model's parameters are to be as before in the end, the record that puts them back.
        train_model: Whether the model's own parameters are trained meanwhile; without, ``held`` is needed.
    """
    start = time.perf_counter()
    with seeded(options.seed):
        if isinstance(guide, AutoAmortized) and guide.plan is None:
            guide.initialize(*args, **kwargs)
        batches = _Batches(model, guide, args, kwargs, options)
        loss = options.loss or _default_loss(guide, options, bool(batches.enumerated), batches.nesting)
        steps = _Steps(model, guide, loss, options, held, train_model)
        losses = []
        bar = tqdm(range(options.num_steps), desc=title, disable=not options.progress)
        for step in bar:
            with batches.next() as batch:
                losses.append(steps.take(step, *batch))
            if step % max(1, options.num_steps // 100) == 0:
                bar.set_postfix_str(f"loss {losses[-1]:.4g}", refresh=False)
        ratio = batches.log_ratio(options.seed or 0)
        num_parameters = sum(p.numel() for p in batches.guide_parameters().values())
    trace = torch.tensor(losses)
    return SVIFit(
        guide=guide,
        losses=trace,
        elbo=float(ratio.mean()),
        elbo_se=float(ratio.std() / math.sqrt(len(ratio))),
        converged=_has_converged(trace.double()),
        num_steps=options.num_steps,
        seconds=time.perf_counter() - start,
        num_parameters=num_parameters,
        model=model,
        args=args,
        kwargs=kwargs,
    )


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Runs a block from a seed and puts the random state back; with None, from the present state."""
    if seed is None:
        yield
        return
    state = pyro.util.get_rng_state()
    try:
        pyro.set_rng_seed(seed)
        yield
    finally:
        pyro.util.set_rng_state(state)


def guide_parameters(guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns a guide's own unconstrained parameters, as one run of it announces them; one with two names once."""
    with poutine.block(), poutine.trace(param_only=True) as capture, torch.no_grad():
        guide(*args, **kwargs)
    announced = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
    names = {id(parameter): name for name, parameter in reversed(announced.items())}
    return {name: parameter for name, parameter in announced.items() if names[id(parameter)] == name}


class _Steps:
    """The optimizer's steps, and what is put back when one goes wrong."""

    def __init__(
        self,
        model: Model,
        guide: Model,
        loss: Any,
        options: Options,
        held: Preserved | None,
        train_model: bool,
    ) -> None:
        self.model, self.guide, self.loss, self.options, self.held = model, guide, loss, options, held
        self.train_model = train_model
        self.parameters: dict[int, Tensor] = {}
        self.last_good: dict[int, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        if held is not None:  # gradients that the user holds are put back, not added to
            store = [p for name, p in pyro.get_param_store().named_parameters()]
            for parameter in [*store, *(model.parameters() if isinstance(model, nn.Module) else ())]:
                held.keep(parameter)
                parameter.grad = None

    def take(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], handler: Any) -> float:
        """Takes one step; returns the loss."""
        try:
            with handler, _without_nan_warnings(), poutine.trace(param_only=True) as capture:
                value = self._loss_and_grads(args, kwargs)
        except ValueError as error:  # how validation reports that parameters left their range
            if step == 0:
                raise
            self._fail(step, args, kwargs, error)
        announced = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
        self._adopt(announced, args, kwargs)
        trained = self.parameters.values()
        if not math.isfinite(value) or any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in trained):
            self._fail(step, args, kwargs, None)
        if self.optimizer is None:
            raise ValueError(
                "fit: neither the guide nor the model has parameters, so there is nothing to train. Where no data "
                "depend on a latent, its posterior is its prior: guide.predictive(...) draws it."
            )
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                self.last_good[key].copy_(parameter)
        factor = _decay(step, self.options.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.optimizer.step()
        self._clear(announced.values())
        return value

    def _loss_and_grads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        if hasattr(self.loss, "loss_and_grads"):
            value = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
            return float(sum(value)) if isinstance(value, tuple) else float(value)
        value = self.loss(self.model, self.guide, *args, **kwargs)
        value.backward()
        return float(value.detach())

    def _adopt(self, announced: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes parameters not seen before into the optimizer."""
        new = {id(p): p for p in announced.values() if id(p) not in self.parameters}
        if new and self.held is not None:
            own = {id(p) for p in guide_parameters(self.guide, args, kwargs).values()}
            for key in set(new) - own:
                self.held.keep(new[key])
            new = new if self.train_model else {key: p for key, p in new.items() if key in own}
        if not new:
            return
        self.parameters.update(new)
        self.last_good.update({key: p.detach().clone() for key, p in new.items()})
        if self.optimizer is None:
            make = self.options.optim or (lambda params: torch.optim.Adam(params, lr=self.options.lr))
            self.optimizer = make(list(new.values()))
        else:
            self.optimizer.add_param_group({"params": list(new.values())})

    @staticmethod
    def _clear(parameters: Any) -> None:
        for parameter in parameters:
            parameter.grad = None

    def _fail(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception | None) -> None:
        where = _not_finite(self.model, self.guide, args, kwargs)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(self.last_good[key])
                parameter.grad = None
        raise RuntimeError(
            f"fit: the loss or a gradient is not finite at step {step}{where}. Parameters are back at the last good "
            f"step. Lower the learning rate, fit_svi(..., lr={self.options.lr / 10:g}), or look for infinite values in "
            f"the data and scales that reach zero in the model."
        ) from error


@contextmanager
def _without_nan_warnings() -> Iterator[None]:
    """Silences Pyro's warnings of NaN and infinity: the fit raises an error of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered", category=UserWarning)
        yield


def _not_finite(model: Model, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Names the first site whose log density is not finite with the present parameters."""
    try:
        with poutine.block(), torch.no_grad(), pyro.validation_enabled(False), _without_nan_warnings():
            guided = poutine.trace(guide).get_trace(*args, **kwargs)
            trace = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
    except (ValueError, RuntimeError):
        return ""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not bool(site["log_prob_sum"].isfinite()):
            return f" (site '{name}' of the model has log density {float(site['log_prob_sum'])})"
    return ""


def _default_loss(guide: Model, options: Options, enumerated: bool, nesting: int) -> Any:
    plan = guide.plan if isinstance(guide, AutoAmortized) else None
    # TraceMeanField_ELBO takes the prior of what the guide leaves out for missing, and that under a mask for there.
    analytic = plan is not None and not plan.left_to_model and not plan.unmasked
    vectorized = options.max_plate_nesting is not None
    if enumerated or (plan is not None and any(block.is_discrete for block in plan.blocks)):
        return TraceEnum_ELBO(options.num_particles, max_plate_nesting=nesting, vectorize_particles=vectorized)
    elbo = TraceMeanField_ELBO if analytic else Trace_ELBO
    if not vectorized:
        return elbo(num_particles=options.num_particles)
    return elbo(options.num_particles, max_plate_nesting=options.max_plate_nesting, vectorize_particles=True)


class _Batches:
    """The rows of each step: all of them, or the next ones of a random order, or of very many a random subset.

    Attributes:
        enumerated: The latents that are summed out.
        nesting: How many dimensions the model's plates take.
    """

    def __init__(
        self, model: Model, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.size = options.batch_size or 0
        self.way = _minibatches(model, guide, args, kwargs, options, ())
        self.length = self.way.plate.size if self.way is not None else 0
        with self._few() as call:
            enumerated, self.nesting = enumerated_sites(*call)
            if self.way is not None:
                refuse_other_plates(*call, self.way.plate.name)
        self.enumerated = tuple(enumerated)
        if self.way is not None and self.enumerated:
            self.way = _minibatches(model, guide, args, kwargs, options, self.enumerated)
        self.order = torch.empty(0, dtype=torch.long)

    @contextmanager
    def next(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        """Yields arguments, and the handler to run model and guide under."""
        if self.way is None:
            yield self.args, self.kwargs, nullcontext()
            return
        if self.length > max(LARGE, 4 * self.size):
            rows = random_rows(self.length, self.size)
        else:
            if len(self.order) < self.size:
                self.order = torch.randperm(self.length)
            rows, self.order = self.order[: self.size], self.order[self.size :]
        with self._on(rows) as batch:
            yield batch

    def log_ratio(self, seed: int) -> Tensor:
        """Returns log p - log q of many draws: on all rows, or each on other ones, rescaled to all."""
        if self.way is None or self.length <= LARGE:
            whole = self.model, self.guide, self.args, self.kwargs
            return log_densities(*whole, num_draws=NUM_DRAWS, seed=seed).log_ratio
        with seeded(seed):
            return log_ratios(self._few() for _ in range(NUM_PARTS))

    def guide_parameters(self) -> dict[str, Tensor]:
        """Returns the guide's own parameters."""
        with self._few() as (_, guide, args, kwargs):
            return guide_parameters(guide, args, kwargs)

    @contextmanager
    def _few(self) -> Iterator[tuple[Model, Model, tuple[Any, ...], dict[str, Any]]]:
        """Yields model, guide and arguments on random rows if there are very many, else on all.

        They are never as many as a step takes: a guide that keeps to the number that it saw first is to fail.
        """
        if self.way is None or self.length <= LARGE:
            yield self.model, self.guide, self.args, self.kwargs
            return
        with self._on(random_rows(self.length, max(LARGE // 2, self.size + 1))) as (args, kwargs, handler):
            yield handler(self.model), handler(self.guide), args, kwargs

    @contextmanager
    def _on(self, rows: Tensor) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        assert self.way is not None
        guide = self.guide if isinstance(self.guide, AutoAmortized) and not self.way.inject else None
        if guide is not None:
            guide.row_ids = {self.way.plate.name: rows}
        try:
            yield self.way.rows(rows)
        finally:
            if guide is not None:
                guide.row_ids = {}


def _minibatches(
    model: Model,
    guide: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    enumerated: tuple[str, ...],
) -> Minibatches | None:
    if options.batch_size is None:
        return None
    plan = guide.plan if isinstance(guide, AutoAmortized) else None
    batches = exact_minibatches(model, args, kwargs, plan.pooled if plan is not None else None, enumerated)
    if isinstance(batches, str):
        if batches != SUBSAMPLES_ITSELF:
            warnings.warn(
                f"fit: batch_size={options.batch_size} is not used, since minibatches of this model would not be "
                f"exact: {batches}. Every step takes all rows.",
                UserWarning,
                stacklevel=5,
            )
        return None
    return batches if options.batch_size < batches.plate.size else None


def _decay(step: int, num_steps: int) -> float:
    """The learning rate of a step, as a part of that at the start."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _has_converged(losses: Tensor) -> bool:
    num_steps = len(losses)
    if num_steps < 100:  # too few to tell a slope from noise
        return False
    travelled = torch.tensor([_decay(step, num_steps) for step in range(num_steps)], dtype=losses.dtype).cumsum(0)
    half = slice(num_steps // 2, None)
    x, y = travelled[half] - travelled[half].mean(), losses[half] - losses[half].mean()
    slope = (x * y).sum() / x.square().sum()
    se = ((y - slope * x).square().mean() / x.square().sum()).sqrt()
    promised, error = -float(slope * travelled[-1]), float(se * travelled[-1])
    return promised <= max(3 * error, 1e-5 * abs(float(losses[-1])))
