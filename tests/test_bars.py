"""Progress bars: for whoever watches, and no line for a log."""

import sys
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import AutoAmortizedNormal, amortization_gap, compare_inference, fit_svi, run_mcmc
from pyro_amortize.bars import progress_bar, watched

X = torch.linspace(-2, 2, 20)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_log_gets_no_line(capfd):
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, X, num_steps=2)
    amortization_gap(model, guide, X, num_steps=1, num_draws=10)
    compare_inference(model, X, methods=("amortized",), svi={"num_steps": 1}, num_draws=10)
    for engine in ("pyro", "auto"):
        run_mcmc(model, X, num_samples=2, warmup_steps=2, num_chains=1, engine=engine)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("where", ["terminal", "notebook", "log"])
def test_bars_are_where_somebody_watches(where, shown, monkeypatch):
    shell = SimpleNamespace(kernel=None) if where == "notebook" else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: where == "terminal", raising=False)
    assert watched() is (where != "log")
    assert progress_bar(range(3), shown=shown).disable is not (shown and where != "log")
