"""ArviZ's objects, R-hat, ESS, Monte Carlo errors and PSIS: the one file that knows its generations, 0.x and 1.x."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Variable = tuple[tuple[str, ...], np.ndarray, Mapping[str, np.ndarray]]
"""Names of a variable's dimensions, its values, and what else is known of the elements along the last of these."""
Groups = dict[str, dict[str, Variable]]
FEWEST_DRAWS = 25
FEWEST_IN_CHAIN = 4
OFTEN = 20
"""Draws of the largest weight from which it counts as reached."""


def _arviz() -> Any:
    with warnings.catch_warnings():  # 0.2x announces 1.x at import
        warnings.simplefilter("ignore")
        import arviz
    return arviz


def inference_data(groups: Groups) -> Any:
    """Returns ArviZ's own object: ``InferenceData`` in 0.x, ``DataTree`` in 1.x.

    Args:
        groups: Group -> name -> variable. Names hold no '/', and no variable has that of a dimension. Elements are
            numbered from 0.
    """
    import xarray

    datasets = {}
    for group, variables in groups.items():
        data = {name: (dims, values) for name, (dims, values, _) in variables.items()}
        sizes = {dim: n for dims, values in data.values() for dim, n in zip(dims, values.shape, strict=True)}
        places = {name: (dims[-1], known) for dims, _, all_ in variables.values() for name, known in all_.items()}
        datasets[group] = xarray.Dataset(data, {**{dim: np.arange(size) for dim, size in sizes.items()}, **places})
    arviz = _arviz()
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.InferenceData(**datasets)
    return xarray.DataTree.from_dict(datasets)


def r_hat(samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the rank-normalized split R-hat of each element; draws have shape (chains, draws, *shape).

    It is NaN for one chain, fewer than four draws, and elements that never change.
    """
    return _each(_arviz().rhat, samples, 2)


def ess(samples: Mapping[str, Tensor], method: str = "bulk") -> dict[str, Tensor]:
    """Returns an effective sample size of each element; draws have shape (chains, draws, *shape).

    Args:
        samples: Site -> draws. With fewer than four, sizes are NaN.
        method: "bulk", that of the middle, or "tail", the smaller one of the 5 % and 95 % quantiles.
    """
    return _each(_arviz().ess, samples, 1, method=method)


def mcse(samples: Mapping[str, Tensor], method: str = "mean", prob: float | None = None) -> dict[str, Tensor]:
    """Returns the Monte Carlo standard error of an estimate of each element; draws have shape (chains, draws, *shape).

    Args:
        samples: Site -> draws. With fewer than four, errors are NaN.
        method: Of what: "mean", "sd" or "quantile".
        prob: Level of the quantile.
    """
    options = {"method": method} if prob is None else {"method": method, "prob": prob}
    return _each(_arviz().mcse, samples, 1, **options)


def _each(diagnostic: Any, samples: Mapping[str, Tensor], fewest_chains: int, **options: Any) -> dict[str, Tensor]:
    chains, draws = next(iter(samples.values())).shape[:2]
    if chains < fewest_chains or draws < FEWEST_IN_CHAIN:  # 0.x logs a complaint for each element
        return {name: torch.full(value.shape[2:], torch.nan, dtype=torch.float64) for name, value in samples.items()}
    # Sites are numbered, since a name such as "net.weight" or "chain" means something to xarray.
    arrays = {f"site_{i}": value.detach().cpu().numpy() for i, value in enumerate(samples.values())}
    with np.errstate(all="ignore"), warnings.catch_warnings():  # chains that do not move have no R-hat
        warnings.simplefilter("ignore")
        found = diagnostic(arrays, **options)
    return {name: torch.as_tensor(np.asarray(found[f"site_{i}"])) for i, name in enumerate(samples)}


def psis(log_weights: Tensor, flat: float = 1.2) -> tuple[Tensor, Tensor]:
    """Smooths the tails of importance weights by a generalized Pareto distribution.

    Args:
        log_weights: Shape (draws, rows). Draws at which a density is NaN or overflows count as ones of density zero.
        flat: Where the largest weight is below so many times the mean, there is no tail to fit: weights are left as
            they are, and k-hat is 0. The default is met by a perfect guide. So it is where the largest weight was
            drawn often, as with discrete latents: weights are then bounded.

    Returns:
        Smoothed log weights, on the scale of those given, shape (draws, rows); and k-hat, shape (rows,), infinite if
        there are too few draws to fit a tail to.

    References:
        A. Vehtari et al., Pareto Smoothed Importance Sampling, JMLR 2024, https://arxiv.org/abs/1507.02646
    """
    raw = log_weights.detach().cpu().to(torch.float64).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    smoothed, k_hat = raw.clone(), torch.zeros(raw.shape[1], dtype=torch.float64)
    mean = raw.logsumexp(0) - math.log(len(raw))
    often = (raw >= raw.max(0).values - 1e-6).sum(0) >= OFTEN
    uneven = (~often & (raw.max(0).values - mean > math.log(flat))).nonzero().flatten()
    if len(raw) < FEWEST_DRAWS:
        k_hat[uneven] = torch.inf
    elif len(uneven):
        values = raw[:, uneven].T.contiguous().numpy()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            normalized, k = _psislw(values.copy())
        found = torch.as_tensor(np.asarray(normalized)).T
        some = raw[:, uneven]
        least = some.where(some.isfinite(), torch.inf).argmin(0, keepdim=True)
        body = some.kthvalue(3 * len(raw) // 4, 0, keepdim=True)  # below the tail, and not too far below to tell
        place = body.indices.where(body.values.isfinite(), least)
        smoothed[:, uneven] = found + (some.gather(0, place) - found.gather(0, place))
        k_hat[uneven] = torch.as_tensor(np.asarray(k), dtype=torch.float64).reshape(-1)
    return smoothed, k_hat


def _psislw(log_weights: np.ndarray) -> tuple[Any, Any]:
    arviz = _arviz()
    if hasattr(arviz, "psislw"):
        return arviz.psislw(log_weights)
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_weights, axis=-1)  # 1.x takes log likelihoods


def good_k(num_draws: int) -> float:
    """Returns the k-hat below which an importance sampling estimate from so many draws can be trusted."""
    return min(1 - 1 / math.log10(num_draws), 0.7)
