"""Families: parameters, turned into a distribution over unconstrained space."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class Normal:
    """Independent normals, prod_i Normal(loc_i, scale_i), with scale = softplus(raw).

    Its parameters for d dimensions are d locations, then d raw scales.
    """

    per_dim = 2

    def distribution(self, loc: Tensor, raw: Tensor) -> Any:
        """Returns the distribution, from parameters of any one shape; it has no event dimensions."""
        least = torch.finfo(raw.dtype).eps ** 2  # whose square is no zero, so that densities are finite
        return dist.Normal(loc, torch.nn.functional.softplus(raw.contiguous()) + least)

    def parameters(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Returns the parameters, shape (..., 2 d), of the distribution with these moments, shape (..., d)."""
        large = scale > 20
        raw = torch.where(large, scale, torch.where(large, 1.0, scale).expm1().log())
        return torch.cat([loc, raw.expand(loc.shape)], -1)


FAMILIES = {"normal": Normal}
