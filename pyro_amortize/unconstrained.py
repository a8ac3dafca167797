"""A model's latents in unconstrained space, and its log density as a function of them.

Each latent is taken to the support that it has when the model comes to it, since that may move with the latents before
it: the upper bound of a ``Uniform``, the scale of a ``Pareto``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Transform

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.draws import Runs, laid
from pyro_amortize.enumeration import enumerating, summed_out
from pyro_amortize.supports import bijection, is_delta, is_free, some_tensor

TRIES = 100
"""How many random starts are tried before a model counts as one without."""


class Unconstrained(Messenger):
    """Holds latents at values of unconstrained space.

    Args:
        values: Site -> value, of the site's shape in unconstrained space, with dimensions to its left or without.

    Attributes:
        transforms: Site -> the bijection that took it to its support in the last run.
        reached: Site -> where that was.
        log_det: Site -> log |d value / d unconstrained value|, of the unconstrained value's shape less the dimensions
            that the bijection takes together.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = dict(values)
        self.transforms: dict[str, Transform] = {}
        self.reached: dict[str, Tensor] = {}
        self.log_det: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if name not in self.values:
            return
        transform, raw = bijection(msg), self.values[name]
        raw = raw.expand(transform.inverse_shape(transform.forward_shape(raw.shape)))
        value = transform(raw)
        self.log_det[name] = transform.log_abs_det_jacobian(raw, value)
        self.transforms[name], self.reached[name] = transform, value
        msg["value"], msg["is_observed"] = value, True


class _Start(Unconstrained):
    """Starts all continuous latents: some where they are told to, the others at random, each within (-2, 2)."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__({})
        self.given = given

    def _pyro_sample(self, msg: Message) -> None:
        if is_free(msg):
            transform, shape, like = bijection(msg), msg["fn"].shape(), some_tensor(msg["fn"])
            if msg["name"] in self.given:
                value = self._given(msg, like, shape)
            else:
                value = like.new_empty(transform.inverse_shape(shape)).uniform_(-2, 2)
            self.values[msg["name"]] = value
        super()._pyro_sample(msg)

    def _given(self, msg: Message, like: Tensor, shape: torch.Size) -> Tensor:
        name = msg["name"]
        given = torch.as_tensor(self.given[name]).detach().to(like)
        if given.shape != shape:
            raise ValueError(f"run_mcmc: start['{name}'] has shape {tuple(given.shape)}. Expected {tuple(shape)}.")
        value: Tensor = bijection(msg).inv(given)
        if not is_reached(msg, given) or not bool(value.isfinite().all()):
            raise ValueError(
                f"run_mcmc: start['{name}'] lies outside of the site's support, or at its end. Start inside."
            )
        return value


def is_reached(site: Any, value: Tensor) -> bool:
    """Tells whether the bijection of a site reaches a value: whether that lies in its support, but for rounding."""
    back = bijection(site).inv(value)
    return torch.allclose(bijection(site)(back), value, rtol=1e-2, atol=1e-4)  # of another: one knows where it was


class LogDensity:
    """log p(data, latents) in nats as a function of all continuous latents, the Jacobian included, with gradients.

    Discrete latents are summed out. Densities are not validated: where an argument of one is NaN, so is the result.

    Args:
        model: The model; latents that are given conditioned.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        nesting: How many dimensions its plates take.
    """

    def __init__(self, model: Model, args: Args, kwargs: Kwargs, nesting: int) -> None:
        self.model, self.args, self.kwargs, self.nesting = model, args, kwargs, nesting
        nodes = list(self._trace(_Start({})(model)).nodes.values())
        self._batches = {site["name"]: len(site["fn"].batch_shape) for site in nodes if site["type"] == "sample"}
        self._dims = {site["name"]: site["value"].dim() for site in nodes if site["type"] == "sample"}
        self._has_discrete = any(
            site["type"] == "sample" and not site["is_observed"] and not is_delta(site["fn"]) for site in nodes
        )

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        held = Unconstrained(values)
        with pyro.validation_enabled(False):
            if self._has_discrete:
                trace = self._trace(enumerating(held(config_enumerate(self.model)), None, self.nesting))
                self._refuse_several(trace, held)
                density = summed_out(trace, {})
            else:
                trace = self._trace(held(self.model))
                density = torch.as_tensor(trace.log_prob_sum())
        for log_det in held.log_det.values():
            density = density + log_det.sum()
        return density

    def start(self, seed: int, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns values in unconstrained space where the density and its gradient are finite.

        Args:
            seed: Of those that are not given.
            given: Values of some sites, or all, in constrained space.

        Raises:
            ValueError: There is none among 100, or a value that is given does not fit.
        """
        pyro.set_rng_seed(seed)
        for _ in range(TRIES):
            held = _Start(given)
            self._trace(held(self.model))
            if not held.values or self._is_finite(held.values):
                return held.values
            if set(held.values) <= set(given):
                raise ValueError(
                    "run_mcmc: the density is not finite at start, or its gradient is not. Start elsewhere."
                )
        raise ValueError(
            f"run_mcmc: of {TRIES} random starts none has a finite density and gradient. Name one, "
            f"start={{site: value}}, or take a trained guide's, start=guide."
        )

    def constrained(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes draws, shape (draws, *shape), to the supports that the other latents of the same draw leave them."""
        away = sum(
            ((value - value[0]).reshape(len(value), -1).square().sum(1) for value in draws.values()), torch.zeros(())
        )
        far = int(away.argmax())
        first, other = (self._at(draws, place) for place in (0, far))
        images = [{n: transform(draws[n][0]) for n, transform in at.transforms.items()} for at in (first, other)]
        if all(torch.equal(image, images[1][name]) for name, image in images[0].items()):
            return {name: first.transforms[name](value) for name, value in draws.items()}

        def program(start: int, count: int | None) -> Model:
            rows = {n: laid(v, self._batches[n], start, count, self.nesting) for n, v in draws.items()}
            return Unconstrained(rows)(self.model)

        with pyro.validation_enabled(False), torch.no_grad(), poutine.block():
            found = Runs(program, self.args, self.kwargs).values(len(away), self.nesting)
        return {name: found[name] for name in draws}

    def _at(self, draws: Mapping[str, Tensor], place: int) -> Unconstrained:
        """Runs the model at one draw."""
        held = Unconstrained({name: value[place] for name, value in draws.items()})
        with pyro.validation_enabled(False), torch.no_grad():
            self._trace(held(self.model))
        return held

    def _is_finite(self, values: Mapping[str, Tensor]) -> bool:
        points = {name: value.detach().requires_grad_() for name, value in values.items()}
        density = self(points)
        if not bool(density.isfinite()):
            return False
        gradients = torch.autograd.grad(density, list(points.values()), allow_unused=True)
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)

    def _trace(self, model: Model) -> poutine.Trace:
        with poutine.block():
            return prune_subsample_sites(poutine.trace(model).get_trace(*self.args, **self.kwargs))

    def _refuse_several(self, trace: poutine.Trace, held: Unconstrained) -> None:
        """Refuses a latent that has a place for each value of one that is summed out."""
        for name in held.values:
            if trace.nodes[name]["value"].dim() > self._dims[name]:
                raise ValueError(
                    f"run_mcmc: the support of site '{name}' depends on a latent that is summed out, so that a draw of "
                    f"it has no one place. Write it on a fixed one, raw = pyro.sample('{name}_raw', "
                    f"dist.Uniform(0.0, 1.0)), and pyro.deterministic('{name}', low + (high - low) * raw)."
                )
