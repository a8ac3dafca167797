"""Amortized guides for any Pyro model, and what amortizing cost, in nats."""

from pyro_amortize.compare import Comparison, compare_inference
from pyro_amortize.decorator import amortize
from pyro_amortize.elbos import CompiledTrace_ELBO, CompiledTraceMeanField_ELBO
from pyro_amortize.encoders import MLP, Constant, DeepSets, Recurrent, Table, Window
from pyro_amortize.fit import SVIFit, fit_svi
from pyro_amortize.gap import GapReport, amortization_gap
from pyro_amortize.guides import AutoAmortized, AutoAmortizedNormal
from pyro_amortize.inference_data import to_arviz
from pyro_amortize.mcmc import MCMCFit, run_mcmc
from pyro_amortize.optimum import fit_optimum
from pyro_amortize.plan import AmortizationPlan, Block, Verdict
from pyro_amortize.planner import plan_amortization
from pyro_amortize.posterior import Posterior
from pyro_amortize.reference import fit_mean_field

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "AmortizationPlan",
    "AutoAmortized",
    "AutoAmortizedNormal",
    "Block",
    "Comparison",
    "CompiledTraceMeanField_ELBO",
    "CompiledTrace_ELBO",
    "Constant",
    "DeepSets",
    "GapReport",
    "MCMCFit",
    "Posterior",
    "Recurrent",
    "SVIFit",
    "Table",
    "Verdict",
    "Window",
    "amortization_gap",
    "amortize",
    "compare_inference",
    "fit_mean_field",
    "fit_optimum",
    "fit_svi",
    "plan_amortization",
    "run_mcmc",
    "to_arviz",
]
