"""Draws from the posterior by NUTS, and whether they are good enough to judge others by."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_amortize import arviz_bridge
from pyro_amortize.arguments import check_count, check_given, check_model, named
from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.capture import Uncapturable
from pyro_amortize.guides import AutoAmortized
from pyro_amortize.idle import Left, WithPrior, beside, idle_latents, left_latents
from pyro_amortize.missing import refuse_nan
from pyro_amortize.nuts import Chain, NutpieChains, Target, import_nutpie, pyro_chain
from pyro_amortize.parameters import preserved
from pyro_amortize.structure import plates_of
from pyro_amortize.supports import (
    is_free,
)
from pyro_amortize.unconstrained import LogDensity, is_reached

R_HAT = 1.01
ESS_A_CHAIN = 100
ENGINES = ("auto", "nutpie", "pyro")


@dataclass(frozen=True)
class MCMCFit:
    """Draws by MCMC, and whether to trust them.

    Attributes:
        samples: Site -> shape (chains, draws, *shape of the site), in constrained space.
        divergences: Divergent transitions after warm-up, all chains together.
        seconds: Wall-clock time of everything, compiling among it; diagnostics are made when first asked for.
        engine: What drew, "nutpie" or "pyro".
        fallback: Why it was not nutpie, where that is installed.
        diverging: Whether each transition diverged, shape (chains, draws).
        outside: Sites of which a draw was found outside of the support that it has given the rest of the draw.
        model: What was drawn from, latents that were given conditioned; not a copy.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        given: Values at which latents were held.
    """

    samples: dict[str, Tensor]
    divergences: int
    seconds: float
    engine: str | None = None
    fallback: str | None = None
    diverging: Tensor | None = field(default=None, repr=False, compare=False)
    outside: tuple[str, ...] = ()
    model: Any = field(default=None, repr=False, compare=False)
    args: Args = field(default=(), repr=False, compare=False)
    kwargs: Kwargs = field(default_factory=dict, repr=False, compare=False)
    given: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def r_hat(self) -> dict[str, Tensor]:
        """Site -> rank-normalized split R-hat of each element; NaN where an element never changes."""
        return arviz_bridge.r_hat(self.samples)

    @cached_property
    def ess(self) -> dict[str, Tensor]:
        """Site -> bulk effective sample size of each element."""
        return arviz_bridge.ess(self.samples)

    @cached_property
    def ess_tail(self) -> dict[str, Tensor]:
        """Site -> effective sample size of each element's tails, the smaller one of the 5 % and 95 % quantiles."""
        return arviz_bridge.ess(self.samples, "tail")

    @property
    def converged(self) -> bool:
        """Whether chains agree and are long enough to be a reference.

        At every element bulk and tail effective sample size are at least 100 a chain, and R-hat is at most 1.01 where
        a site has one element. Of many elements the largest R-hat is above 1.01 by chance: between stationary chains
        R-hat - 1 grows with the variance of the means of half chains, which is in proportion to a chi-squared variable
        with one degree of freedom less than there are half chains. The limit of a site of K elements is therefore
        1 + 0.01 q(0.05 / K) / q(0.05), q the upper quantile of that chi-squared: for four chains 1.016 where K is 20,
        1.026 where it is 10,000. An R-hat that cannot be told (one chain, chains that do not move) is none; elements
        that have one value in all chains are left out, as the upper triangle of a Cholesky factor. Divergences are
        warned of apart.

        References:
            A. Vehtari et al., Rank-Normalization, Folding, and Localization: An Improved R-hat, Bayesian Analysis
            2021, https://arxiv.org/abs/1903.08008
        """
        return not self._short

    @property
    def _short(self) -> list[str]:
        """What keeps the chains from being a reference."""
        found = []
        chains, draws = next(iter(self.samples.values())).shape[:2]
        if chains == 1:
            return ["there is one chain, which no other can confirm, so R-hat is nan: raise num_chains"]
        if draws < 4:
            return [f"{draws} draws a chain are too few to tell R-hat from: raise num_samples"]
        found += [f"draws of '{name}' lie outside of its support, so that they are none" for name in self.outside]
        varying = {name: _varies(value) for name, value in self.samples.items()}
        if not any(bool(varies.any()) for varies in varying.values()):
            return ["no chain moved: look for infinite densities in the model"]
        for name, varies in varying.items():
            if not bool(varies.any()):
                continue
            worst = float(self.r_hat[name][varies].nan_to_num(torch.inf).max())
            limit = _r_hat_limit(int(varies.sum()), chains)
            if not worst <= limit:
                found.append(f"R-hat of '{name}' reaches {worst:.3f}, above {limit:.3f}: chains disagree; draw more")
            sizes = torch.minimum(self.ess[name], self.ess_tail[name])[varies].nan_to_num(0.0)
            needed = ESS_A_CHAIN * chains
            if not float(sizes.min()) >= needed:
                found.append(
                    f"effective sample size of '{name}' falls to {float(sizes.min()):.0f}, below {needed} "
                    f"({ESS_A_CHAIN} a chain): draw more"
                )
        return found

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the draws."""
        found = self._short
        if self.divergences:
            found = [*found, f"{self.divergences} divergent transitions: parts of the posterior were not reached"]
        return tuple(found)

    def __str__(self) -> str:
        header = f"{'site':<16}{'elements':>9}{'max R-hat':>11}{'min ESS':>10}{'min tail ESS':>14}"
        lines = []
        for name, values in self.r_hat.items():
            r_hat, bulk, tail = (
                (math.nan if kept.numel() == 0 else float(getattr(kept, what)()))
                for kept, what in (
                    (values[~values.isnan()], "max"),
                    (self.ess[name].flatten(), "min"),
                    (self.ess_tail[name].flatten(), "min"),
                )
            )
            lines.append(f"{name:<16}{values.numel():>9}{r_hat:>11.3f}{bulk:>10.0f}{tail:>14.0f}")
        chains, draws = next(iter(self.samples.values())).shape[:2]
        state = "converged" if self.converged else "NOT converged: do not use it as a reference"
        by = f" by {self.engine}" if self.engine else ""
        size = f"{chains} chain{'s' if chains > 1 else ''} of {draws} draws{by}"
        first = f"MCMCFit: {size}, {self.divergences} divergences, {self.seconds:.1f} s"
        still = [f"'{name}'" for name, values in self.r_hat.items() if bool(values.isnan().all())]
        notes = [f"max R-hat is nan where draws are constant: {', '.join(still)}"] if still and chains > 1 else []
        notes += [f"not by nutpie, since {self.fallback}"] if self.fallback else []
        return "\n".join([f"{first}, {state}", header, *lines, *notes, *(f"warning: {text}" for text in self.warnings)])


def _varies(draws: Tensor) -> Tensor:
    """Tells which elements have more than one value among all draws of all chains."""
    different: Tensor = (draws != draws[:1, :1]).flatten(0, 1).any(0)
    return different


def _r_hat_limit(num_elements: int, num_chains: int) -> float:
    """Returns up to what R-hat the worst of so many elements may be by chance where one may be up to 1.01."""
    spread = 2 / (9 * (2 * num_chains - 1))

    def quantile(tail: float) -> float:  # of a chi-squared, over its degrees of freedom, by Wilson and Hilferty
        normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        return (1 - spread - float(normal.icdf(torch.tensor(tail, dtype=torch.float64))) * math.sqrt(spread)) ** 3

    return 1 + (R_HAT - 1) * quantile(0.05 / num_elements) / quantile(0.05)


@named
def run_mcmc(
    model: Model,
    *args: Any,
    given: Mapping[str, Tensor] | None = None,
    num_samples: int = 1000,
    warmup_steps: int = 1000,
    num_chains: int = 4,
    start: Model | Mapping[str, Tensor] | None = None,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    engine: str = "auto",
    seed: int | None = None,
    progress: bool = True,
    model_kwargs: Kwargs | None = None,
) -> MCMCFit:
    """Draws from the posterior by NUTS, chain after chain. The model's own parameters are held.

    nutpie draws from the potential recorded as one graph of tensor operations, compiled where many draws are wanted,
    so that the model is not run at each step. Positions are float64, densities are in the dtype of the model. Discrete
    latents that the model marks for enumeration are summed out. Entries of a latent under a mask on which nothing else
    depends (``obs_mask`` makes such for data that are there) have their prior, as in a guide; chains would drift off in
    them. Ask the result's ``converged`` before using it as a reference.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        given: Values at which latents are held, each of the shape of its site.
        num_samples: Draws of each chain.
        warmup_steps: Steps of each chain that adapt the sampler, and are thrown away.
        num_chains: Number of chains.
        start: Where chains start: a trained guide, of which each chain takes a draw, or values of some sites. Latents
            that it does not name start at random, as all do by default, at (-2, 2) in unconstrained space.
        target_accept_prob: Share of moves that step sizes are adapted to; nearer to 1 where transitions diverge.
        max_tree_depth: How often a trajectory doubles at most: 2^10 gradients a draw.
        engine: "nutpie", tens of times faster, which needs ``pip install "pyro_amortize[nutpie]"`` and a model without
            branches on values (for others Pyro's draws, with a warning); "pyro", Pyro's NUTS; "auto", nutpie's
            where it is installed and can, without a warning (``engine`` and ``fallback`` of the result tell).
        seed: Of the first chain; the others follow. None draws it from the present random state.
        progress: Whether to show a progress bar.
        model_kwargs: The model's keyword arguments.

    Returns:
        Draws, and their diagnostics when asked for.

    Raises:
        ValueError: A plate of the model subsamples, an option is out of range, ``given`` or ``start`` names no latent,
            or a latent has no bijection from the reals or is an angle.
        RuntimeError: ``start`` is a guide without parameters.
        ImportError: ``engine="nutpie"``, and it is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"run_mcmc: engine={engine!r} is not known. Known: {', '.join(map(repr, ENGINES))}.")
    for option, value in (
        ("num_samples", num_samples),
        ("warmup_steps", warmup_steps),
        ("num_chains", num_chains),
        ("max_tree_depth", max_tree_depth),
    ):
        check_count("run_mcmc", option, value)
    if seed is not None:
        check_count("run_mcmc", "seed", seed, 0)
    if not 0 < target_accept_prob < 1:
        raise ValueError(f"run_mcmc: target_accept_prob={target_accept_prob}. Expected a number between 0 and 1.")
    began = time.perf_counter()
    kwargs = check_model("run_mcmc", model, args, model_kwargs)
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    state = pyro.util.get_rng_state()
    with preserved(model, evaluating=True):
        pyro.util.set_rng_state(state)
        values = _held(model, args, kwargs, given)
        conditioned = poutine.condition(model, data=values)
        sites = _all_rows(conditioned, args, kwargs)
        left = left_latents(conditioned, args, kwargs, sites)
        proper = Left(left)(WithPrior(idle_latents(conditioned, args, kwargs, sites))(conditioned))
        nesting = max((-plate.dim for plate in plates_of(sites).values()), default=0)
        target = Target(
            LogDensity(proper, args, kwargs, nesting),
            _starts(
                start, args, kwargs, [site["name"] for site in sites if is_free(site) and site["name"] not in left]
            ),
            num_samples,
            warmup_steps,
            target_accept_prob,
            max_tree_depth,
            progress,
        )
        drawing, engine, fallback = _drawing(engine, target, seed, num_chains)
        chains, diverged = zip(*(drawing(seed + chain) for chain in range(num_chains)), strict=True)
        outside = _outside(proper, args, kwargs, chains)
        chains = tuple({**chain, **beside(conditioned, args, kwargs, chain, left)} for chain in chains)
    diverging = torch.stack(diverged)
    samples = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    return MCMCFit(
        samples=samples,
        divergences=int(diverging.sum()),
        seconds=time.perf_counter() - began,
        engine=engine,
        fallback=fallback,
        diverging=diverging,
        outside=outside,
        model=conditioned,
        args=args,
        kwargs=kwargs,
        given=values,
    )


def _held(model: Model, args: Args, kwargs: Kwargs, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Returns the values at which latents are held."""
    if given is None:
        return {}
    state = pyro.util.get_rng_state()
    latents = [site for site in _all_rows(model, args, kwargs) if not site["is_observed"]]
    pyro.util.set_rng_state(state)
    return check_given("run_mcmc", given, {site["name"]: site["value"] for site in latents})


def _drawing(engine: str, target: Target, seed: int, num_chains: int) -> tuple[Callable[[int], Chain], str, str | None]:
    """Returns what draws a chain from a seed, the engine that it is, and why it is not nutpie's if that could be."""
    by_pyro = partial(pyro_chain, target)
    if engine == "pyro":
        return by_pyro, "pyro", None
    try:
        import_nutpie()
    except ImportError:
        if engine == "nutpie":
            raise
        return by_pyro, "pyro", None
    try:
        return NutpieChains(target, seed, num_chains), "nutpie", None
    except Uncapturable as reason:
        if engine == "nutpie":
            warnings.warn(f"run_mcmc: Pyro's NUTS draws, not nutpie's, since {reason}.", UserWarning, stacklevel=3)
        return by_pyro, "pyro", str(reason)


def _starts(
    start: Model | Mapping[str, Tensor] | None, args: Args, kwargs: Kwargs, latents: list[str]
) -> Callable[[int], Mapping[str, Any]]:
    """Returns what says from a seed at which values of latents a chain starts."""
    if not latents:
        raise ValueError("run_mcmc: the model has no continuous latent, or all are given, so there is nothing to draw.")
    if start is None:
        return lambda seed: {}
    if isinstance(start, Mapping):
        unknown = sorted(set(start) - set(latents))
        if unknown:
            raise ValueError(f"run_mcmc: start names '{unknown[0]}', which is no latent to draw. Known: {latents}.")
        return lambda seed: start
    if not callable(start):
        raise ValueError(
            f"run_mcmc: start is a {type(start).__name__}. Expected a trained guide, that of a fit is "
            f"start=fit.guide, or a dict from site to value."
        )

    if isinstance(start, AutoAmortized) and start.plan is None:
        raise RuntimeError("run_mcmc: start has no parameters yet. Train it: fit_svi(model, start, ...).")

    def drawn(seed: int) -> dict[str, Tensor]:
        with preserved(start, evaluating=True), torch.no_grad(), poutine.block():
            pyro.set_rng_seed(seed)
            trace = poutine.trace(start).get_trace(*args, **kwargs)
        found = {name: site["value"] for name, site in trace.iter_stochastic_nodes() if name in latents}
        if not found:
            raise ValueError(f"run_mcmc: start samples none of the latents to draw. Known: {latents}.")
        return found

    return drawn


def _outside(model: Model, args: Args, kwargs: Kwargs, chains: tuple[dict[str, Tensor], ...]) -> tuple[str, ...]:
    """Runs the model at the last draw of each chain; names the sites that lie outside of their supports there."""
    found: dict[str, None] = {}
    for chain in chains:
        values = {name: draws[-1] for name, draws in chain.items()}
        with poutine.block(), torch.no_grad():
            nodes = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs).nodes
        for name, value in values.items():
            if not is_reached(nodes[name], value):
                found[name] = None
    return tuple(found)


def _all_rows(model: Model, args: Args, kwargs: Kwargs) -> list[Any]:
    """Returns the sample sites of a model; refuses plates that subsample."""
    with poutine.block():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    refuse_nan(trace.nodes.values(), "run_mcmc")
    for name, site in trace.nodes.items():
        for frame in site["cond_indep_stack"] if site["type"] == "sample" else ():
            if frame.full_size is not None and int(frame.size) < int(frame.full_size):
                raise ValueError(
                    f"run_mcmc: site '{name}' stands in plate '{frame.name}', which shows {int(frame.size)} of its "
                    f"{int(frame.full_size)} elements; NUTS needs all. Call the model so that the plate does not "
                    f"subsample: pyro.plate({frame.name!r}, {int(frame.full_size)})."
                )
    return [site for site in prune_subsample_sites(trace).nodes.values() if site["type"] == "sample"]
