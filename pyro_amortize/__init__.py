"""Amortized guides for any Pyro model, and what amortizing cost, in nats."""

from pyro_amortize.encoders import MLP, Constant, Table
from pyro_amortize.guides import AutoAmortized, AutoAmortizedNormal
from pyro_amortize.plan import AmortizationPlan, Block, plan_amortization
from pyro_amortize.posterior import Posterior

__all__ = [
    "MLP",
    "AmortizationPlan",
    "AutoAmortized",
    "AutoAmortizedNormal",
    "Block",
    "Constant",
    "Posterior",
    "Table",
    "plan_amortization",
]

__version__ = "0.1.0"
