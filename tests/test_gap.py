import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import autoguided
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger

from pyro_amortize import AutoAmortizedNormal, Table, amortization_gap, fit_svi
from pyro_amortize.estimates import QUANTITIES


def model(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def too_narrow(x):
    """A guide by hand that is off by a known amount: given theta, its gap is that of two normals."""
    pyro.sample("theta", dist.Normal(0.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5))


DATA = torch.randn(40, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def report():
    return amortization_gap(model, too_narrow, DATA, given={"theta": torch.tensor(0.5)}, progress=False)


class TestReport:
    def test_columns(self, report):
        names = [column for quantity in QUANTITIES for column in (quantity, f"{quantity}_se")]
        assert list(report.per_datum) == [*names, "khat", "estimator", "converged"]
        assert len(report.per_datum) == 40
        assert report.per_datum.notna().all().all()

    def test_gaps_add_up(self, report):
        frame = report.per_datum
        gaps = frame["amortization_gap"] + frame["approximation_gap"]
        np.testing.assert_allclose(gaps, frame["inference_gap"], atol=1e-8)
        np.testing.assert_allclose(frame["log_evidence"] - frame["elbo"], frame["inference_gap"], atol=1e-8)

    def test_gap_of_a_guide_by_hand_is_the_kl_divergence(self, report):
        posterior = dist.Normal((DATA + 0.5) / 2, math.sqrt(0.5))
        exact = torch.distributions.kl_divergence(dist.Normal(DATA / 2, 0.5), posterior).double().numpy()
        for name in ("inference_gap", "amortization_gap"):
            error = report.per_datum[name].to_numpy() - exact
            assert (np.abs(error) < 4 * report.per_datum[f"{name}_se"] + 2e-3).all()
        assert report.per_datum["approximation_gap"].abs().max() < 5e-3

    def test_evidence(self, report):
        exact = dist.Normal(0.5, math.sqrt(2)).log_prob(DATA).double().numpy()
        error = report.per_datum["log_evidence"].to_numpy() - exact
        assert (np.abs(error) < 4 * report.per_datum["log_evidence_se"] + 2e-3).all()

    def test_summary_and_table(self, report):
        summary = report.summary()
        assert list(summary.index) == list(QUANTITIES)
        mean = report.per_datum["elbo"].mean()
        assert summary.loc["elbo", "mean"] == pytest.approx(mean)
        text = str(report)
        assert all(name in text for name in QUANTITIES)
        assert "given theta" in text

    def test_plot(self, report, tmp_path):
        report.plot().savefig(tmp_path / "gap.png")
        assert (tmp_path / "gap.png").stat().st_size > 1000

    def test_a_seed_repeats_it(self, report):
        again = amortization_gap(model, too_narrow, DATA, given={"theta": torch.tensor(0.5)}, progress=False)
        assert again.per_datum.equals(report.per_datum)


def test_default_globals_are_the_guide_s_medians():
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, DATA, num_steps=50, progress=False)
    report = amortization_gap(model, guide, DATA, num_steps=10, num_draws=50, progress=False)
    assert torch.equal(report.given["theta"], guide.median(DATA)["theta"])
    by_hand = amortization_gap(model, too_narrow, DATA, num_steps=10, num_draws=50, progress=False)
    assert abs(float(by_hand.given["theta"])) < 0.05


def test_permuting_rows_permutes_the_report():
    def gap(order):
        given = {"theta": torch.tensor(0.5)}
        return amortization_gap(model, too_narrow, DATA[order], given=given, progress=False).per_datum

    order = torch.randperm(40)
    a, b = gap(torch.arange(40)), gap(order)
    for name in ("inference_gap", "log_evidence"):
        error = a[name].to_numpy()[order] - b[name].to_numpy()
        se = np.hypot(a[f"{name}_se"].to_numpy()[order], b[f"{name}_se"].to_numpy())
        assert (np.abs(error) < 5 * se + 2e-3).all()


@pytest.mark.parametrize("way", ["mask", "subsample"])
def test_rows_that_are_masked_or_subsampled(way):
    mask = torch.arange(40) % 4 != 0

    def masked(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def subsampled(x):
        with pyro.plate("data", len(x), subsample_size=16) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    chosen = masked if way == "mask" else subsampled
    guide = AutoAmortizedNormal(chosen)
    fit_svi(chosen, guide, DATA, num_steps=800, lr=0.02, seed=0, progress=False)
    report = amortization_gap(chosen, guide, DATA, num_steps=400, progress=False)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(DATA)
    exact = (torch.where(mask, exact, 0.0) if way == "mask" else exact).double().numpy()
    error = report.per_datum["log_evidence"].to_numpy() - exact
    assert (np.abs(error) < 5 * report.per_datum["log_evidence_se"] + 0.02).all()


def test_coupled_rows_have_totals_only():
    def coupled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.cumsum(-1), 1.0), obs=x)

    guide = AutoAmortizedNormal(coupled)
    fit_svi(coupled, guide, DATA, num_steps=50, seed=0, progress=False)
    report = amortization_gap(coupled, guide, DATA, num_steps=300, progress=False)
    assert report.per_datum is None
    assert "'z' are coupled through 'x'" in report.warnings[0]
    assert report.totals.loc["amortization_gap", "total"] > 1
    assert "coupled" in str(report)
    with pytest.raises(RuntimeError, match="no numbers per datum"):
        report.plot()


def test_a_search_that_did_not_converge_is_flagged():
    guide = AutoAmortizedNormal(model, encoder=Table())
    fit_svi(model, guide, DATA, num_steps=2000, seed=0, progress=False)
    report = amortization_gap(model, guide, DATA, num_steps=3, lr=2.0, progress=False)
    assert any("did not converge" in text and "num_steps=6" in text for text in report.warnings)


def test_thin_tails_are_flagged_for_a_guide_that_cannot_be_split():
    def guide(x):
        pyro.sample("theta", dist.Delta(torch.tensor(0.5)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x / 2 - 0.2, x / 2 + 0.2))

    report = amortization_gap(model, guide, DATA, given={"theta": torch.tensor(0.5)}, progress=False)
    assert "no split" in report.warnings[0]
    assert "'z' of the guide is a Uniform" in report.warnings[0]
    assert report.per_datum["amortization_gap"].isna().all()
    assert report.per_datum["inference_gap"].notna().all()
    report.plot()


class TestPyrosOwnGuides:
    X = torch.randn(8, generator=torch.Generator().manual_seed(4))

    @pytest.mark.parametrize("trained", [True, False])
    @pytest.mark.parametrize("make", [AutoNormal, AutoNormalMessenger])
    def test_are_judged(self, make, trained):
        guide = make(autoguided)
        if trained:
            fit_svi(autoguided, guide, self.X, num_steps=300, lr=0.05, seed=0, progress=False)
        report = amortization_gap(autoguided, guide, self.X, num_draws=200, num_steps=100, progress=False)
        table = report.per_datum
        assert set(report.given) == {"theta", "tau"}
        assert (table["inference_gap"] > -3 * table["inference_gap_se"] - 0.1).all()
        if trained:
            assert (table["inference_gap"] < 1).all()
        assert ("amortization_gap" in report.totals.index) == (make is AutoNormalMessenger)
        assert bool(list(guide.parameters())) == trained

    @pytest.mark.parametrize("given", [None, 2])
    @pytest.mark.parametrize("make", [AutoMultivariateNormal, AutoIAFNormal, AutoDelta])
    def test_have_no_numbers_per_datum_where_they_draw_all_together_or_points(self, make, given):
        with pytest.raises(NotImplementedError, match=r"site '(rate|z)'.*AutoNormal\(model\)"):
            amortization_gap(autoguided, make(autoguided), self.X, given=given, progress=False)
