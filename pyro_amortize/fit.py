"""A model, a guide and data, turned into a trained guide: the record of a fit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim.optim import PyroOptim
from torch import Tensor
from tqdm import tqdm

from pyro_amortize.arguments import check_pair, named
from pyro_amortize.bars import progress_bar
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.convergence import ENOUGH_STEPS, Drift, Remaining, by_losses
from pyro_amortize.densities import enumerated_sites, log_densities, log_ratios, refuse_other_plates, refuse_other_rows
from pyro_amortize.digits import with_error
from pyro_amortize.excerpt import LARGE, random_rows
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.minibatch import SUBSAMPLES_ITSELF, Minibatches, exact_minibatches
from pyro_amortize.parameters import Preserved, refuse_replaced
from pyro_amortize.steps import Optimizer, Options, Steps, decay, guide_parameters

NUM_DRAWS = 200
NUM_PARTS = 50
NUM_LOOKS = 50
ELBOS = Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO


@dataclass(frozen=True)
class SVIFit:
    """A trained guide, and how its training went.

    Attributes:
        guide: The guide.
        losses: Loss at each step, shape (num_steps,): minus the ELBO in nats, if the loss is one.
        elbo: ELBO in nats on all data after training, from many draws. Where steps took minibatches of more than 10,000
            rows, each draw is on other rows, 5,000 or more than a minibatch, rescaled to all.
        elbo_se: Its standard error, which then includes that of the choice of rows.
        converged: Whether ``remaining`` is within three standard errors of it, within that of the ELBO, or at most 0.1
            nats; False after fewer than 400 steps, which show too little.
        num_steps: Number of steps.
        seconds: Wall-clock time of everything.
        compile_seconds: Wall-clock time of it that recording, compiling and checking graphs took.
        fallback: Why steps ran under Pyro where a graph was tried; None if none was, or it ran.
        remaining: Nats by which as many steps again promise to raise the ELBO, as its rise since the middle of this fit
            shows, see :class:`~pyro_amortize.convergence.Drift`; of another loss than an ELBO, by how much that falls.
            NaN after fewer than 100 steps.
        remaining_se: Its standard error.
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
    compile_seconds: float = 0.0
    fallback: str | None = None
    remaining: float = math.nan
    remaining_se: float = math.nan
    model: Any = field(default=None, repr=False, compare=False)
    args: Args = field(default=(), repr=False, compare=False)
    kwargs: Kwargs = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        compiling = f" ({self.compile_seconds:.1f} s of it compiling)" if self.compile_seconds else ""
        eager = "" if self.fallback is None else f". Steps ran under Pyro and not on a graph: {self.fallback}"
        return (
            f"SVIFit: ELBO {with_error(self.elbo, self.elbo_se)} nats after {self.num_steps} steps, "
            f"{self.seconds:.1f} s{compiling}, {self.num_parameters} parameters, {self.state}{eager}"
        )

    @property
    def state(self) -> str:
        """Whether it converged, in words, with what is left in nats."""
        if math.isnan(self.remaining):
            return "converged" if self.converged else "too few steps to tell whether it converged"
        left = f"about {float(f'{self.remaining:.2g}'):g} nats left"  # an extrapolation, however exact the draws
        if self.converged:
            return f"converged ({left})"
        few = Remaining(self.remaining, self.remaining_se).is_negligible(self.elbo_se)
        verdict = "too few steps to tell whether it converged" if few else "NOT converged"
        return f"{verdict}: {left}, raise num_steps={2 * self.num_steps}"


@named
def fit_svi(
    model: Model,
    guide: Model,
    *args: Any,
    num_steps: int = 2000,
    batch_size: int | None = None,
    lr: float = 0.01,
    optim: Optimizer | PyroOptim | None = None,
    loss: Any = None,
    num_particles: int = 1,
    compile: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    model_kwargs: Kwargs | None = None,
) -> SVIFit:
    """Trains a guide, and the model's own parameters with it, as ``SVI`` does.

    The learning rate decays to zero along a cosine, so that the fit settles, and it never stops early.

    Main arguments:
        model: A Pyro model.
        guide: Its guide, generated or written by hand; a fit stands for its guide.
        args: The model's positional arguments, all data.
        num_steps: Number of steps.
        batch_size: Rows a step; the model need not be changed for it. Used where it is exact, else a warning says why
            not, and steps take all rows. Each row is taken once an epoch; of more than 10,000 rows, each step takes a
            random subset, and nothing then runs on all of them (``x`` may be memory-mapped), unless a table has a row
            for each, the data are in a closure, or the model insists on their number.
        lr: Learning rate at the start.
        model_kwargs: The model's keyword arguments.

    Other Arguments:
        optim: Makes a torch optimizer from a list of parameters, or is one of Pyro's; ``Adam(lr)`` by default.
        loss: A Pyro ELBO, or a function as ``SVI`` takes. By default ``TraceEnum_ELBO`` where the model marks discrete
            latents for enumeration that the guide does not sample, or a generated guide amortizes discrete ones; else
            ``TraceMeanField_ELBO`` for generated guides, whose KL divergence is analytic where it can be, and
            ``Trace_ELBO`` for others.
        num_particles: Draws a step, of the default loss.
        compile: Whether steps run on a compiled graph instead of under Pyro, see
            :class:`~pyro_amortize.elbos.CompiledTrace_ELBO`; of ``Trace_ELBO`` and ``TraceMeanField_ELBO`` only.
            "auto" records a graph from 300 steps on, and compiles it where by its size that saves more time than it
            takes; where there can be no graph, the record says why in ``fallback``. True insists, and warns there.
            Losses are the same to rounding either way.
        seed: Of this fit; the global random state is then left alone.
        progress: Whether to show a progress bar with the loss.

    Returns:
        The record of the fit; its ``guide`` is the one passed.

    Raises:
        ValueError: An argument is out of range, or model and guide are swapped.
        TypeError: An option is not known, or the arguments do not fit the model.
        RuntimeError: The loss or a gradient is not finite; parameters are put back to the last good step.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(200)
        >>> fit = fit_svi(model, AutoAmortizedNormal(model), x, num_steps=500, seed=0, progress=False)
        >>> fit.converged
        True
    """
    options = Options(num_steps, batch_size, lr, optim, loss, num_particles, compile, seed, progress)
    guide, kwargs = check_pair("fit_svi", model, guide, args, model_kwargs)
    return train(model, guide, args, kwargs, options, "fit_svi")


def train(
    model: Model,
    guide: Model,
    args: Args,
    kwargs: Kwargs,
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
        steps = Steps(model, guide, loss, options, held, train_model)
        rates = [decay(step, options.num_steps) for step in range(options.num_steps)]
        drift = Drift(rates)
        losses = _losses(steps, batches, drift, progress_bar(range(len(rates)), desc=title, shown=options.progress))
        ratio = batches.log_ratio(options.seed or 0)
        if isinstance(loss, ELBOS):
            left = drift.remaining(steps.parameters.values(), lambda: batches.log_ratio(options.seed or 0, NUM_LOOKS))
        else:
            left = by_losses(torch.tensor(losses, dtype=torch.float64), rates)
        num_parameters = sum(p.numel() for p in batches.guide_parameters().values())
    elbo_se = float(ratio.std() / math.sqrt(len(ratio)))
    return SVIFit(
        guide=guide,
        losses=torch.tensor(losses),
        elbo=float(ratio.mean()),
        elbo_se=elbo_se,
        converged=options.num_steps >= ENOUGH_STEPS and left.is_negligible(elbo_se),
        num_steps=options.num_steps,
        seconds=time.perf_counter() - start,
        num_parameters=num_parameters,
        compile_seconds=steps.compile_seconds,
        fallback=steps.fallback,
        remaining=left.gain,
        remaining_se=left.se,
        model=model,
        args=args,
        kwargs=kwargs,
    )


def _losses(steps: Steps, batches: _Batches, drift: Drift, bar: tqdm) -> list[float]:
    """Takes the steps that a progress bar counts; returns their losses."""
    losses: list[float] = []
    for step in bar:
        with batches.next() as batch:
            losses.append(steps.take(step, *batch))
        drift.see(step, steps.parameters.values())
        if step % max(1, bar.total // 100) == 0:
            bar.set_postfix_str(f"loss {losses[-1]:.4g}", refresh=False)
    return losses


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


def _default_loss(guide: Model, options: Options, enumerated: bool, nesting: int) -> Any:
    plan = guide.plan if isinstance(guide, AutoAmortized) else None
    # TraceMeanField_ELBO takes the prior of what the guide leaves out for missing.
    analytic = plan is not None and not plan.left_to_model
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

    def __init__(self, model: Model, guide: Model, args: Args, kwargs: Kwargs, options: Options) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.size = options.batch_size or 0
        self.way = _minibatches(model, guide, args, kwargs, options, ())
        self.length = self.way.plate.size if self.way is not None else 0
        with self._few() as call:
            refuse_replaced("fit", call[0], call[2], call[3])
            enumerated, self.nesting = enumerated_sites(*call)
            if self.way is not None:
                refuse_other_plates(*call, self.way.plate.name)
        self.enumerated = tuple(enumerated)
        self._keep_to_all_rows()
        if self.way is not None and self.enumerated:
            self.way = _minibatches(model, guide, args, kwargs, options, self.enumerated)
        self.order = torch.empty(0, dtype=torch.long)

    def _keep_to_all_rows(self) -> None:
        """Gives up minibatches for a guide that keeps parameters for each row, as Pyro's own do."""
        if self.way is None or isinstance(self.guide, AutoAmortized):
            return
        plate = self.way.plate.name
        try:
            with self._few() as whole, self._on(torch.arange(self.size)) as (args, kwargs, handler):
                some = handler(self.model), handler(self.guide), args, kwargs
                refuse_other_rows(self.guide, whole[2:], some, plate, self.size)
        except (RuntimeError, ValueError, IndexError):
            name = getattr(self.guide, "__name__", type(self.guide).__name__)
            warnings.warn(
                f"fit: batch_size={self.size} is not used, since the guide, {name}, keeps to the number of elements of "
                f"plate '{plate}' that it sees first. Every step takes all rows. A guide for any number of rows is "
                f"AutoAmortizedNormal(model).",
                UserWarning,
                stacklevel=5,
            )
            self.way = None

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

    def log_ratio(self, seed: int, num_draws: int = NUM_DRAWS) -> Tensor:
        """Returns log p - log q of many draws: on all rows, or each on other ones, rescaled to all."""
        if self.way is None or self.length <= LARGE:
            whole = self.model, self.guide, self.args, self.kwargs
            return log_densities(*whole, num_draws=num_draws, seed=seed).log_ratio
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
    args: Args,
    kwargs: Kwargs,
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
