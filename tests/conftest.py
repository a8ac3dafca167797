"""Every test starts from the same state, and fails if it leaves a global changed."""

import logging
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK


def global_state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro settings": pyro.settings.get(),
        "numpy errors": np.geterr(),
        "pyro logging": logging.getLogger("pyro").level,
        "root logging": logging.getLogger().level,
        "handler stack": list(_PYRO_STACK),
        "plate dims": [frame for frame in _DIM_ALLOCATOR._stack if frame is not None],
        "module hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
    }


@pytest.fixture(autouse=True)
def unchanged_globals():
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    before = global_state()
    assert before["handler stack"] == before["plate dims"] == []
    yield
    after = global_state()
    pyro.clear_param_store()
    _PYRO_STACK.clear()
    _DIM_ALLOCATOR._stack.clear()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test changed globals (before, after): {changed}"


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def terminal(monkeypatch):
    """Has what is printed taken for shown on a terminal."""
    monkeypatch.setattr("pyro_amortize.bars.watched", lambda: True)
    monkeypatch.setattr("pyro_amortize.nuts.watched", lambda: True)
