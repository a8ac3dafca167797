"""A model, its data and draws of its latents, turned into the log likelihood of every observation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import prune_subsample_sites, site_is_factor
from torch import Tensor

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.enumeration import CHUNK, side_by_side
from pyro_amortize.missing import present_entries, refuse_nan
from pyro_amortize.structure import plates_of
from pyro_amortize.supports import is_enumerated


class _Held(Messenger):
    """Gives latents their values, and leaves them latent: what is observed is data."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


class Pointwise:
    """One model and call, run at draws of its latents: in one run, where that gives what a run each gives.

    The caller sees to it that modules are in eval mode, that nothing needs gradients, and that the random state is put
    back: latents without a value are drawn from the model.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Site -> shape (draws, *shape of the site), at least one.

    Attributes:
        latents: Latent -> its site in a run at the first draw.
        observed: Observed site -> the same; factors and deterministic sites are no observations.
    """

    def __init__(self, model: Model, args: Args, kwargs: Kwargs, values: Mapping[str, Tensor]) -> None:
        self.model, self.args, self.kwargs, self.values = model, args, kwargs, values
        sites = self._sites({name: value[0] for name, value in values.items()}, None)
        refuse_nan(sites.values(), "to_arviz")
        self.latents = {name: site for name, site in sites.items() if not site["is_observed"]}
        self.observed = {name: site for name, site in sites.items() if _is_data(site)}
        self.nesting = max((-plate.dim for plate in plates_of(sites.values()).values()), default=0)
        self.size = sum(site["value"].numel() for site in sites.values() if isinstance(site["value"], Tensor))

    @staticmethod
    def value_of(site: Any) -> Tensor:
        """Returns the value of an observed site, in the shape of its log density and event."""
        value = torch.as_tensor(site["value"])
        return value.expand(batch_of(site) + site["fn"].event_shape)

    @staticmethod
    def present(site: Any) -> Tensor | None:
        """Returns which observations of a site are there, in the shape of its log density; None if all are."""
        entries = present_entries(site)
        if entries is None:
            return None
        batch = batch_of(site)
        return entries.expand(batch + site["fn"].event_shape).reshape(*batch, -1).any(-1)

    @property
    def summed_out(self) -> set[str]:
        """Latents without a value that the model marks for enumeration."""
        return {name for name, site in self.latents.items() if name not in self.values and is_enumerated(site)}

    def log_likelihood(self) -> dict[str, Tensor]:
        """Returns log p(observation | latents) in nats: site -> shape (draws, *batch shape of the site).

        What a mask covers counts 0; the scale of subsampling is left out.
        """
        num_draws = len(next(iter(self.values.values())))
        chunk = max(1, CHUNK // max(1, self.size)) if num_draws > 1 and self._can_vectorize() else None
        parts = []
        for start in range(0, num_draws, chunk or 1):
            part = {name: value[start : start + (chunk or 1)] for name, value in self.values.items()}
            parts.append(self._at(part, together=chunk is not None))
        return {name: torch.cat([part[name] for part in parts]) for name in self.observed}

    def _at(self, values: dict[str, Tensor], together: bool) -> dict[str, Tensor]:
        """Returns the log likelihoods at some draws, together; or at one."""
        count = len(next(iter(values.values()))) if together else None
        held = {name: value[0] for name, value in values.items()}
        if count is not None:
            lacking = {n: self.nesting - len(self.latents[n]["fn"].batch_shape) for n in values if n in self.latents}
            held = {n: values[n].reshape(count, *(1,) * lacking[n], *values[n].shape[1:]) for n in lacking}
        sites = self._sites(held, count)
        return {name: self._density(sites[name], batch_of(site), count) for name, site in self.observed.items()}

    def _density(self, site: Any, batch: torch.Size, count: int | None) -> Tensor:
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        scale = site["scale"]
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.full_size is not None:
                scale = scale * int(frame.size) / int(frame.full_size)
        log_prob = torch.as_tensor(scale_and_mask(log_prob, scale, site["mask"]))
        lead = () if count is None else (count, *(1,) * (self.nesting - len(batch)))
        return log_prob.expand(lead + batch).reshape(count or 1, *batch)

    def _sites(self, values: Mapping[str, Tensor], count: int | None) -> dict[str, Any]:
        model = side_by_side(_Held(values)(self.model), count, self.nesting if count is not None else 0)
        trace = prune_subsample_sites(poutine.trace(model).get_trace(*self.args, **self.kwargs))
        return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}

    def _can_vectorize(self) -> bool:
        """Tries whether the first and the last draw in one run have the densities that they have in a run each."""
        ends = {name: value[[0, -1]] for name, value in self.values.items()}
        try:
            together = self._at(ends, together=True)
            alone = [self._at({name: value[[k]] for name, value in ends.items()}, together=False) for k in range(2)]
            return all(torch.allclose(together[n], torch.cat([a[n] for a in alone]), rtol=1e-4) for n in together)
        except (ValueError, RuntimeError, IndexError, KeyError):
            return False


def _is_data(site: Any) -> bool:
    return bool(site["is_observed"] and not site["infer"].get("_deterministic") and not site_is_factor(site))


def batch_of(site: Any) -> torch.Size:
    """Returns the shape of a site's log density; observed values may be wider than their distribution."""
    shape = torch.as_tensor(site["value"]).shape
    return torch.broadcast_shapes(site["fn"].batch_shape, shape[: len(shape) - len(site["fn"].event_shape)])
