"""Fits that were to other data, and globals that are held at what was learnt from these."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pyro import poutine
from torch import Tensor

from pyro_amortize.calls import Args, Kwargs, Model
from pyro_amortize.fit import SVIFit
from pyro_amortize.parameters import preserved


def is_of(fit: SVIFit, args: Args, kwargs: Kwargs) -> bool:
    """Whether a fit was to the data of a call; taken to be where it does not say."""
    if not fit.args and not fit.kwargs:
        return True
    ours, theirs = ([*a, *(k[name] for name in sorted(k))] for a, k in ((args, kwargs), (fit.args, fit.kwargs)))
    return len(ours) == len(theirs) and all(
        torch.equal(one, other)
        if isinstance(one, Tensor) and isinstance(other, Tensor)
        else one is other or one == other
        for one, other in zip(ours, theirs, strict=True)
    )


def log_density_of(model: Model, args: Args, kwargs: Kwargs, given: Iterable[str]) -> Tensor:
    """Returns the log density of latents that a model is conditioned on, which is no part of the data's."""
    names, total = set(given), torch.zeros(())
    if not names:
        return total
    with preserved(model, evaluating=True), torch.no_grad(), poutine.block():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        trace.compute_log_prob(lambda name, site: name in names)
    return sum((trace.nodes[name]["log_prob_sum"] for name in names if name in trace.nodes), total)
