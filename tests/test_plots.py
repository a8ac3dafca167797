"""Figures show themselves."""

import pickle

import pandas as pd
import pytest

from pyro_amortize import plots

PNG = b"\x89PNG"


@pytest.fixture
def figure():
    gap = [0.1, 0.2, 0.4]
    columns = {"amortization_gap": gap, "approximation_gap": gap, "inference_gap": gap, "inference_gap_se": gap}
    return plots.gaps(pd.DataFrame({**columns, "khat": gap, "khat_evidence": gap, "estimator": "PSIS"}), 0.7)


def test_a_notebook_shows_a_figure_before_pyplot_has_made_one(figure):
    formatters = pytest.importorskip("IPython.core.formatters")
    assert formatters.PNGFormatter()(figure).startswith(PNG)  # as of a kernel in which no backend was set up


def test_figures_are_pickled(figure):
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(PNG)
