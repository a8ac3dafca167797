"""Chains of NUTS: nutpie's, on a model's potential recorded as a graph, and Pyro's own."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_amortize.bars import progress_bar, watched
from pyro_amortize.capture import Graph, Uncapturable, record
from pyro_amortize.unconstrained import LogDensity

GRADIENTS_A_STEP = 12
"""How many gradients a step takes, as a guess."""
SECONDS_A_COMPILATION, COMPILING_AN_OPERATION, RUNNING_AN_OPERATION = 6.0, 0.03, 4e-6
"""Seconds, as a guess; fixed numbers, so that a seed gives the same draws on a busy machine."""

Chain = tuple[dict[str, Tensor], Tensor]
"""Draws of each site in constrained space, shape (draws, *shape), and whether each diverged, shape (draws,)."""


@dataclass(frozen=True)
class Target:
    """A posterior and how chains draw from it.

    Attributes:
        density: The log density of the latents in unconstrained space.
        start: Seed -> values in constrained space at which some latents start, or all.
        num_samples: Draws of a chain.
        warmup_steps: Steps before them that adapt the sampler.
        target_accept_prob: Share of moves that step sizes are adapted to.
        max_tree_depth: How often a trajectory doubles at most.
        progress: Whether to show a progress bar.
    """

    density: LogDensity
    start: Callable[[int], Mapping[str, Any]]
    num_samples: int
    warmup_steps: int
    target_accept_prob: float
    max_tree_depth: int
    progress: bool

    @property
    def num_steps(self) -> int:
        return self.num_samples + self.warmup_steps

    def begin(self, seed: int) -> dict[str, Tensor]:
        """Returns where a chain starts, in unconstrained space."""
        return self.density.start(seed, self.start(seed))


def pyro_chain(target: Target, seed: int) -> Chain:
    """Draws a chain by Pyro's NUTS."""
    start = target.begin(seed)
    with _without_pyros_warnings():
        kernel = NUTS(
            potential_fn=lambda values: -target.density(values),
            target_accept_prob=target.target_accept_prob,
            max_tree_depth=target.max_tree_depth,
        )
        shown = target.progress and watched()
        mcmc = MCMC(
            kernel,
            target.num_samples,
            target.warmup_steps,
            initial_params=start,
            disable_progbar=not shown,
        )
        mcmc.run()
    diverging = torch.zeros(target.num_samples, dtype=torch.bool)
    # Not mcmc.diagnostics(), which finds R-hat along with them and asserts that there are four draws.
    diverging[list(mcmc._diagnostics[0]["divergences"])] = True
    return target.density.constrained({name: value.detach() for name, value in mcmc.get_samples().items()}), diverging


def import_nutpie() -> Any:
    """Returns nutpie.

    Raises:
        ImportError: It is missing.
    """
    try:
        with warnings.catch_warnings():  # ArviZ 0.2x, which it imports, announces 1.x
            warnings.simplefilter("ignore")
            import nutpie.compiled_pyfunc
    except ImportError as error:
        text = 'run_mcmc: engine="nutpie" needs nutpie: pip install "pyro_amortize[nutpie]"'
        raise ImportError(text) from error
    return nutpie


class NutpieChains:
    """Draws chains by nutpie's NUTS, in the dtype of the model.

    Args:
        target: The posterior.
        seed: Of the start that the graph is recorded at.
        num_chains: How many chains there will be, which tells whether to compile the graph.

    Raises:
        Uncapturable: No graph stands for the potential; or there is no latent.
    """

    def __init__(self, target: Target, seed: int, num_chains: int) -> None:
        self._target = target
        self._nutpie = import_nutpie()
        start = target.begin(seed)
        self._shapes = {name: (value.shape, value.dtype) for name, value in start.items()}
        point = _flat(start)
        if not self._density(point)[1].all():
            raise Uncapturable("its density does not change with one of the latents, where nutpie cannot start")
        graph = record(lambda: self._density(point), [point])
        if any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in graph.module.graph.nodes):
            raise Uncapturable("it draws random numbers")
        self._check(graph, point)
        self._graph = graph
        if not point.is_cuda and _is_worth_compiling(graph, num_chains * target.num_steps):
            self._graph = self._compiled(graph, point)

    def __call__(self, seed: int) -> Chain:
        """Draws a chain."""
        start = _flat(self._target.begin(seed))
        errors: list[Exception] = []
        thread = _KeptThread(self._target.num_steps)

        def density(vector: np.ndarray) -> tuple[float, np.ndarray]:
            thread.keep()
            try:
                if not errors:
                    value, gradient = self._graph([torch.from_numpy(vector).to(start.device)])
                    return value.item(), gradient.cpu().numpy()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                pass
            except Exception as error:  # nutpie would panic
                errors.append(error)
            return math.nan, np.zeros_like(vector)  # a divergence

        with progress_bar(total=self._target.num_steps, desc="nutpie", shown=self._target.progress) as bar:

            def drawn(vector: np.ndarray) -> dict[str, np.ndarray]:
                bar.update()
                thread.drawn()
                return {"point": vector}

            compiled = self._nutpie.compiled_pyfunc.from_pyfunc(
                len(start),
                lambda: density,
                lambda *_: drawn,
                [np.dtype(np.float64)],
                [(len(start),)],
                ["point"],
                make_initial_point_fn=lambda _: start.cpu().numpy(),
            )
            try:
                trace = self._nutpie.sample(
                    compiled,
                    draws=self._target.num_samples,
                    tune=self._target.warmup_steps,
                    target_accept=self._target.target_accept_prob,
                    maxdepth=self._target.max_tree_depth,
                    chains=1,
                    cores=1,  # chains in threads would wait for one another, as each step runs Python
                    seed=seed,
                    progress_bar=False,
                    blocking=False,  # so that an interrupt is one
                ).wait()
            finally:
                if errors:
                    raise errors[0]
        points = torch.tensor(trace.posterior["point"].values[0]).to(start)
        samples = self._target.density.constrained(self._parts(points))
        return samples, torch.tensor(trace.sample_stats["diverging"].values[0])

    def _parts(self, points: Tensor) -> dict[str, Tensor]:
        """Returns sites' values, shape (..., *shape), of points, shape (..., number of all elements)."""
        parts = points.split([shape.numel() for shape, _ in self._shapes.values()], -1)
        return {
            name: part.reshape(points.shape[:-1] + shape).to(dtype)
            for part, (name, (shape, dtype)) in zip(parts, self._shapes.items(), strict=True)
        }

    def _density(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log density of a point, and its gradient, by the model."""
        point = point.detach().requires_grad_()
        density = self._target.density(self._parts(point))
        return density.detach(), torch.autograd.grad(density, point)[0]

    def _check(self, graph: Graph, point: Tensor) -> None:
        """Compares a graph with the model, where it was recorded and elsewhere."""
        with pyro.validation_enabled(False):
            for scale in (1.0, 0.5):
                for expected, found in zip(self._density(scale * point), graph([scale * point]), strict=True):
                    slack = 1e-3 * (1 + float(expected.abs().max()))
                    if not torch.allclose(expected, found, rtol=0.0, atol=slack, equal_nan=True):
                        raise Uncapturable("its graph gives other numbers: it reads something that changes")

    def _compiled(self, graph: Graph, point: Tensor) -> Graph:
        """Returns a graph compiled; the graph itself where that is not possible."""
        try:
            compiled = graph.compiled([point])
            self._check(compiled, point)
        except Uncapturable:
            return graph
        return compiled


class _KeptThread:
    """Keeps Python's state of a thread that is not Python's own, from the first gradient to the last draw.

    Else Python makes one and throws it away at each call, which takes longer than a small model's gradient.

    Args:
        num_draws: After how many draws it is let go.
    """

    def __init__(self, num_draws: int) -> None:
        self._left = num_draws
        self._state: int | None = None

    def keep(self) -> None:
        if self._state is None:
            self._state = ctypes.pythonapi.PyGILState_Ensure()

    def drawn(self) -> None:
        self._left -= 1
        if self._left == 0 and self._state is not None:
            ctypes.pythonapi.PyGILState_Release(self._state)


def _flat(values: dict[str, Tensor]) -> Tensor:
    """Returns values as one vector of float64, as nutpie has it; the graph takes them back to the model's dtypes."""
    return torch.cat([value.detach().flatten().double() for value in values.values()])


def _is_worth_compiling(graph: Graph, num_steps: int) -> bool:
    saved = RUNNING_AN_OPERATION * graph.num_operations * GRADIENTS_A_STEP * num_steps
    return saved > SECONDS_A_COMPILATION + COMPILING_AN_OPERATION * graph.num_operations


@contextmanager
def _without_pyros_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="pyro")
        yield
