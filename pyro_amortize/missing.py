"""NaN among observed values: taken for what is missing, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_amortize.supports import site_mask, without_masks


def has_nan(value: Tensor) -> bool:
    """Tells whether a tensor holds NaN."""
    if not value.is_floating_point() or not bool(value.sum().isnan()):  # a quick look; infinities may cancel to NaN too
        return False
    return bool(value.isnan().any())


def takes_nan(site: Any) -> bool:
    """Tells whether an observed site's density is finite where its values are NaN: its NaN, or any, if it holds none.

    ``NanMaskedNormal`` and ``NanMaskedMultivariateNormal`` take NaN for what is missing.
    """
    value, fn = torch.as_tensor(site["value"]), site["fn"]
    if not value.is_floating_point() or not value.numel():
        return False
    value = value if has_nan(value) else torch.full_like(value, torch.nan)
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            density = without_masks(fn).log_prob(value, *site["args"], **site["kwargs"])
    except (ValueError, RuntimeError, IndexError, NotImplementedError):
        return False
    holes = value.isnan().reshape(*value.shape[: value.dim() - len(fn.event_shape)], -1).any(-1)
    return bool((density.isfinite() | ~holes).all())


def present_entries(site: Any) -> Tensor | None:
    """Returns which entries of a site count, shape of its value; None if all do.

    Those do not that a mask covers, nor NaN that the density takes for missing.
    """
    mask = site_mask(site)
    if (
        "entries" in site
        or not site["is_observed"]
        or not has_nan(torch.as_tensor(site["value"]))
        or not takes_nan(site)
    ):
        return mask
    return ~site["value"].isnan() if mask is None else mask & ~site["value"].isnan()


def refuse_nan(nodes: Iterable[Any], who: str, data: Mapping[str, Tensor] | None = None) -> None:
    """Refuses NaN among observed values, unless the density takes them for what is missing.

    A mask over them does not help: where values are validated they are refused all the same; else there is a warning,
    since gradients may be NaN.

    Args:
        nodes: Of a trace.
        who: The function that is called, for the message.
        data: Arguments by name, for the line to paste.

    Raises:
        ValueError: There are some, and no mask covers them, or distributions validate what they are given.
    """
    for site in nodes:
        if site["type"] != "sample" or not site["is_observed"] or site["infer"].get("_deterministic"):
            continue
        value = torch.as_tensor(site["value"])
        if not has_nan(value) or _is_left_out(site) or takes_nan(site):
            continue
        holes, name = value.isnan(), site["name"]
        same = (n for n, x in (data or {}).items() if x.shape == holes.shape and torch.equal(x.isnan(), holes))
        argument = next(same, "y")
        line = f"obs={argument}.nan_to_num()"
        mask = site_mask(site)
        if mask is None or bool((holes & mask).any()):
            raise ValueError(
                f"{who}: the values observed at site '{name}' hold NaN that no mask covers, so its density is NaN. "
                f"Mask them: 'with poutine.mask(mask=~{argument}.isnan()): pyro.sample({name!r}, ..., {line})'."
            )
        text = (
            f"{who}: the values observed at site '{name}' hold NaN under a mask. Pyro refuses them there, too; without "
            f"its validation gradients may be NaN. Fill them: {line}. What a mask covers counts nowhere all the same."
        )
        if dist.is_validation_enabled():
            raise ValueError(text)
        warnings.warn(text, UserWarning, stacklevel=2)


def _is_left_out(site: Any) -> bool:
    """Whether a mask that is False, not a tensor, leaves out a site's density altogether."""
    fn, masks = site["fn"], [site["mask"]]
    while hasattr(fn, "base_dist"):
        masks.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    return any(mask is False for mask in masks)
