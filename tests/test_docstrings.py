"""Examples in docstrings run, and every public name has one where it helps."""

import doctest
import importlib
import pkgutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_amortize

MODULES = [module.name for module in pkgutil.iter_modules(pyro_amortize.__path__, "pyro_amortize.")]
NAMES = {"torch": torch, "pyro": pyro, "dist": dist, "SVI": SVI, "Trace_ELBO": Trace_ELBO, "Adam": Adam}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    public = {name: getattr(pyro_amortize, name) for name in pyro_amortize.__all__}
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={**NAMES, **public}, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


@pytest.mark.parametrize("name", pyro_amortize.__all__)
def test_public_names_say_what_they_are(name):
    assert (getattr(pyro_amortize, name).__doc__ or "").strip()


@pytest.mark.parametrize(
    "name", ["plan_amortization", "AutoAmortized", "amortize", "fit_svi", "amortization_gap", "MLP", "to_arviz"]
)
def test_front_doors_have_an_example(name):
    assert ">>>" in getattr(pyro_amortize, name).__doc__
