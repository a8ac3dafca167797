import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import autoguided
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch.distributions import constraints
from torch.distributions.transforms import SoftplusTransform

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    Constant,
    DeepSets,
    Table,
    Window,
    amortization_gap,
    conditioning,
    fit_svi,
    plan_amortization,
)
from pyro_amortize.estimates import QUANTITIES
from pyro_amortize.steps import Options


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
        assert list(report.per_datum) == [*names, "khat", "khat_evidence", "estimator", "converged"]
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
    fit_svi(chosen, guide, DATA, num_steps=300, lr=0.02, seed=0, progress=False)
    report = amortization_gap(chosen, guide, DATA, progress=False)
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
    fit_svi(model, guide, DATA, num_steps=700, lr=0.02, seed=0, progress=False)
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


LOADINGS = torch.as_tensor(np.random.default_rng(0).normal(size=(8, 3)))
PRECISION = LOADINGS.T @ LOADINGS / 0.5 + torch.eye(3, dtype=LOADINGS.dtype)


def ppca(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS.T, math.sqrt(0.5)).to_event(1), obs=x)


def ppca_case(rows, seed=0):
    """Data, a guide by hand that is off by known amounts, and all quantities of its report in closed form."""
    rng = torch.Generator().manual_seed(seed)
    z, noise, off = (torch.randn(rows, width, generator=rng, dtype=torch.float64) for width in (3, 8, 3))
    x = z @ LOADINGS.T + math.sqrt(0.5) * noise
    mean, off = torch.linalg.solve(PRECISION, (x @ LOADINGS / 0.5).T).T, 0.3 * off

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean + off, 0.8 * PRECISION.diagonal() ** -0.5).to_event(1))

    marginal = dist.MultivariateNormal(x.new_zeros(8), LOADINGS @ LOADINGS.T + 0.5 * torch.eye(8, dtype=x.dtype))
    approximation = (PRECISION.diagonal().log().sum() - torch.logdet(PRECISION)) / 2
    amortization = ((off @ PRECISION) * off).sum(-1) / 2 + 1.5 * (0.8**2 - 1 - 2 * math.log(0.8))
    evidence = marginal.log_prob(x)
    exact = {
        "elbo": evidence - approximation - amortization,
        "elbo_optimum": evidence - approximation,
        "log_evidence": evidence,
        "amortization_gap": amortization,
        "approximation_gap": approximation.expand(rows),
        "inference_gap": approximation + amortization,
    }
    return x, guide, exact


@pytest.fixture(scope="module")
def reports():
    x, guide, exact = ppca_case(60)
    return exact, [amortization_gap(ppca, guide, x, num_draws=500, seed=seed, progress=False) for seed in range(6)]


class TestErrors:
    """95 % intervals of numbers that are known exactly, over data and seeds."""

    @pytest.mark.parametrize("name", QUANTITIES)
    def test_intervals_cover(self, reports, name):
        exact, found = reports
        errors = np.stack([report.per_datum[name] - exact[name].numpy() for report in found])
        scaled = errors / np.stack([report.per_datum[f"{name}_se"] for report in found])
        # The guide's offsets are the same for all seeds, and draws of one seed are common to no two data.
        assert 0.91 < (np.abs(scaled) < 1.96).mean() < 0.985
        assert abs(scaled.mean()) < 0.2

    @pytest.mark.parametrize("name", QUANTITIES)
    def test_totals_cover(self, reports, name):
        exact, found = reports
        scaled = [
            (report.totals.loc[name, "total"] - float(exact[name].sum())) / report.totals.loc[name, "total_se"]
            for report in found
        ]
        assert np.abs(scaled).max() < 3
        assert np.square(scaled).mean() < 2.5

    def test_advice_names_correlations_and_the_encoder(self, reports):
        for report in reports[1]:
            encoder, family = report.advice
            assert "the encoder of 'data' loses" in encoder
            assert "the model's structure lets it vanish" in encoder
            assert "independent normals lose" in family
            assert "correlations between the latents of a datum make 0.29" in family

    def test_nothing_is_hidden(self, reports):
        for report in reports[1]:
            assert report.warnings == ()
            assert report.per_datum["converged"].all()


def test_subsampling_changes_nothing():
    x, _, _ = ppca_case(30)

    def subsampling(x):
        with pyro.plate("data", len(x), subsample_size=8) as i:
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADINGS.T, math.sqrt(0.5)).to_event(1), obs=x[i])

    whole = AutoAmortizedNormal(ppca, encoder=MLP(()))
    fit_svi(ppca, whole, x, num_steps=100, seed=0, progress=False)
    part = AutoAmortizedNormal(subsampling, encoder=MLP(()))
    part.initialize(x)
    part.load_state_dict(whole.state_dict())
    a, b = (
        amortization_gap(m, g, x, num_draws=500, progress=False).per_datum
        for m, g in ((ppca, whole), (subsampling, part))
    )
    for name in QUANTITIES:
        error = (a[name] - b[name]) / np.hypot(a[f"{name}_se"], b[f"{name}_se"])
        assert error.abs().max() < 4.5


def test_globals_at_several_draws_have_a_spread():
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, DATA, num_steps=300, lr=0.02, seed=0, progress=False)
    report = amortization_gap(model, guide, DATA, given=5, num_draws=300, progress=False)
    assert report.given["theta"].shape == (5,)
    assert report.given["theta"].unique().numel() == 5
    spread = report.per_datum["log_evidence_spread"].to_numpy()
    theta = report.given["theta"].double()[:, None]
    exact = dist.Normal(theta, math.sqrt(2)).log_prob(DATA.double())
    np.testing.assert_allclose(spread, exact.std(0), rtol=0.05, atol=5e-3)
    error = report.per_datum["log_evidence"] - exact.mean(0).numpy()
    assert (error.abs() < 5 * report.per_datum["log_evidence_se"] + 2e-3).all()
    assert report.totals.loc["log_evidence", "total_spread"] == pytest.approx(float(exact.sum(-1).std()), rel=0.05)
    assert "total_spread" in str(report)


def test_unseen_rows_give_the_generalization_gap():
    """A guide that is right on the rows it saw, and off by a known amount on others."""
    seen, unseen = DATA[:20], DATA[20:] + 1

    def guide(x):
        wrong = 0.0 if torch.equal(x, seen) else 0.5
        pyro.sample("theta", dist.Normal(0.5, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 0.5) / 2 + wrong, math.sqrt(0.5)))

    given = {"theta": torch.tensor(0.5)}
    report = amortization_gap(model, guide, seen, given=given, unseen=unseen, progress=False)
    assert len(report.unseen.per_datum) == 20
    row = report.generalization.loc["amortization_gap"]
    assert row["seen"] == pytest.approx(0.0, abs=2e-3)
    assert row["unseen"] == pytest.approx(0.25, abs=0.02)
    assert row["difference"] == pytest.approx(0.25, abs=4 * row["difference_se"] + 5e-3)
    assert any("on unseen data" in text and "more data" in text for text in report.advice)
    assert "seen and unseen data" in str(report)
    report.plot()
    options = {"given": given, "model_kwargs": {"x": seen}, "unseen": {"x": unseen}}
    same = amortization_gap(model, guide, **options, progress=False)
    assert same.generalization.loc["amortization_gap", "unseen"] == pytest.approx(0.25, abs=0.02)


def test_neighbours_that_an_encoder_does_not_see_are_the_conditioning_gap():
    def saw(x, before):
        with pyro.plate("steps", len(x)):
            z = pyro.sample("z", dist.Normal(before, 1.0))
            pyro.sample("x", dist.Normal(0.75 * (3.0 + z), 1.0), obs=x)

    torch.manual_seed(2012)
    x = torch.zeros(101)
    for n in range(1, 101):
        x[n] = torch.randn(()) + 0.75 * (3.0 + x[n - 1] + torch.randn(()))
    narrow = AutoAmortizedNormal(saw, encoder=MLP(()), inputs="x")
    fit_svi(saw, narrow, x[1:], x[:-1], num_steps=600, lr=0.02, seed=0, progress=False)
    report = amortization_gap(saw, narrow, x[1:], x[:-1], progress=False)
    # q* has mean (before + 0.75 (x - 2.25)) / 1.5625 and the encoder the best line in x: the gap is what that leaves.
    best = (x[:-1] + 0.75 * (x[1:] - 2.25)) / 1.5625
    line = torch.stack([x[1:], torch.ones(100)], -1)
    residual = best - line @ torch.linalg.lstsq(line, best[:, None]).solution[:, 0]
    exact = float(residual.square().sum() * 1.5625 / 2)
    total, se = report.totals.loc["conditioning_gap"]
    assert total == pytest.approx(exact, abs=4 * se + 0.05 * exact + 0.5)
    assert report.totals.loc["amortization_gap", "total"] == pytest.approx(exact, abs=4 * se + 0.05 * exact + 0.5)
    assert report.per_datum["conditioning_gap_se"].notna().all()
    assert any("does not see 'before'" in text and "trained alike" in text for text in report.advice)
    wide = AutoAmortizedNormal(saw, encoder=MLP(()))
    fit_svi(saw, wide, x[1:], x[:-1], num_steps=1000, lr=0.02, seed=0, progress=False)
    whole = amortization_gap(saw, wide, x[1:], x[:-1], progress=False)
    assert "conditioning_gap" not in whole.totals.index
    assert whole.advice == ()


def test_the_conditioning_gap_takes_as_many_steps_as_are_asked_for(monkeypatch):
    def walk(x):
        with pyro.plate("series", len(x), dim=-2), pyro.plate("time", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
            pyro.factor("walk", dist.Normal(z[..., :-1], 1.0).log_prob(z[..., 1:]).sum(-1, keepdim=True) / z.shape[-1])
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    steps, train = [], conditioning.train
    monkeypatch.setattr(
        conditioning, "train", lambda *a, **options: steps.append(a[4].num_steps) or train(*a, **options)
    )
    x = 9 * torch.randn(6, 3)
    guide = AutoAmortizedNormal(walk, encoder=Window(1))
    guide.initialize(x)
    small = {"num_draws": 100, "num_steps": 100, "num_annealed": 0, "progress": False}
    report = amortization_gap(walk, guide, x, num_training_steps=30, **small)
    assert steps == [30, 30]
    assert "conditioning_gap" in report.totals.index
    without = amortization_gap(walk, guide, x, num_training_steps=0, **small)
    assert steps == [30, 30]
    assert "conditioning_gap" not in without.totals.index
    assert any("no encoder of these inputs closes it all" in text for text in without.advice)
    lacking = conditioning.conditioning_gap(
        walk, guide, (x,), {}, plan_amortization(walk, x), "series", Options(progress=False), 20, 5
    ).lacking
    assert "it sees 1 neighbour on a side, where the whole series informs it" in lacking["series/time"]


def test_one_answer_for_all_data_is_not_told_to_train_longer():
    guide = AutoAmortizedNormal(model, encoder=Constant())
    fit_svi(model, guide, DATA, num_steps=100, lr=0.05, seed=0, progress=False)
    (text,) = amortization_gap(model, guide, DATA, num_draws=200, num_steps=100, progress=False).advice
    assert "take an encoder that sees them" in text
    assert "train longer" not in text


def test_each_encoder_s_share():
    def two(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)
            with pyro.plate("repeats", 2):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(b, 1.0), obs=torch.stack([x, x]))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x / 2, math.sqrt(0.5)))
            with pyro.plate("repeats", 2):
                pyro.sample("b", dist.Normal(x / 2 + 0.4, math.sqrt(0.5)))

    report = amortization_gap(two, guide, DATA, num_draws=300, progress=False)
    shares = report.blocks["total"] / len(DATA)
    assert shares.filter(like="repeats").item() == pytest.approx(2 * 0.4**2, abs=0.03)
    assert shares.drop(shares.filter(like="repeats").index).item() == pytest.approx(0.0, abs=5e-3)
    assert "encoder by encoder" in str(report)


def test_strong_correlations_in_many_dimensions():
    """A posterior whose 30 latents are strongly correlated, so that independent normals are poor proposals."""
    ones = torch.ones(30, dtype=torch.float64)

    def summed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(30), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    x = torch.linspace(-8.0, 8.0, 6, dtype=torch.float64)
    guide = AutoAmortizedNormal(summed, encoder=MLP(()))
    fit_svi(summed, guide, x, num_steps=500, seed=0, progress=False)
    exact = dist.Normal(0.0, math.sqrt(30.25)).log_prob(x).numpy()
    report = amortization_gap(summed, guide, x, progress=False)
    assert set(report.per_datum["estimator"]) == {"mixture"}  # with normals of the posterior's own covariance
    error = (report.per_datum["log_evidence"] - exact) / report.per_datum["log_evidence_se"]
    assert error.abs().max() < 4
    assert report.per_datum["log_evidence_se"].max() < 0.05
    precision = torch.eye(30, dtype=torch.float64) + 4 * torch.outer(ones, ones)
    gap = float((precision.diagonal().log().sum() - torch.logdet(precision)) / 2)
    error = (report.per_datum["approximation_gap"] - gap) / report.per_datum["approximation_gap_se"]
    assert error.abs().max() < 4
    assert any("independent normals lose" in text for text in report.advice)


def test_a_guide_whose_sites_depend_on_each_other_is_not_split():
    def chained(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x / 3, math.sqrt(2 / 3)))
            pyro.sample("b", dist.Normal((a + x) / 2, math.sqrt(0.5)))

    report = amortization_gap(chained, guide, DATA, progress=False)
    assert "'b' of the guide depends on its draw of another latent" in report.warnings[0]
    assert report.per_datum["inference_gap"].abs().max() < 1e-4
    assert report.advice == ()


@pytest.mark.parametrize("option", [{"num_draws": 1}, {"num_annealed": -1}, {"num_training_steps": -1}, {"given": 0}])
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=f"amortization_gap: {next(iter(option))}="):
        amortization_gap(model, too_narrow, DATA, progress=False, **option)


def test_a_vae_by_hand_and_a_generated_one_have_the_same_gaps():
    """The same network in both: reports agree number by number, within their errors."""
    torch.manual_seed(0)
    decoder = torch.nn.Linear(2, 6).requires_grad_(False)

    def vae(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=3 * decoder(z)).to_event(1), obs=x)

    x = dist.Bernoulli(logits=3 * decoder(torch.randn(50, 2))).sample()
    generated = AutoAmortizedNormal(vae, encoder=MLP((16,)), prepare=None)
    fit_svi(vae, generated, x, num_steps=300, seed=0, progress=False)
    answer = generated.posterior(x)

    def by_hand(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(answer.mean["z"], answer.stddev["z"]).to_event(1))

    a, b = (amortization_gap(vae, guide, x, progress=False).per_datum for guide in (generated, by_hand))
    for name in QUANTITIES:
        error = (a[name] - b[name]) / np.hypot(a[f"{name}_se"], b[f"{name}_se"])
        assert error.abs().max() < 4


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


def test_a_guide_on_another_support_is_not_split():
    def rates(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal((x + 2).log(), 0.2)
            pyro.sample("rate", dist.TransformedDistribution(base, [SoftplusTransform()]))

    report = amortization_gap(rates, guide, torch.arange(6.0), progress=False)
    assert "site 'rate' of the guide has another support" in report.warnings[0]
    assert report.per_datum["inference_gap"].notna().all()


def test_latents_under_a_mask_have_no_gap_of_their_own():
    """Where a mask covers a whole datum, nothing is lost; elsewhere numbers are those of the unmasked model."""
    mask = torch.arange(12) % 3 != 0

    def masked(x, mask):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    guide = AutoAmortizedNormal(masked)
    fit_svi(masked, guide, DATA[:12], mask, num_steps=500, lr=0.02, seed=0, progress=False)
    frame = amortization_gap(masked, guide, DATA[:12], mask, progress=False).per_datum
    exact = torch.where(mask, dist.Normal(0.0, math.sqrt(3)).log_prob(DATA[:12]), 0.0).double().numpy()
    error = (frame["log_evidence"] - exact).abs()
    assert (error <= 4 * frame["log_evidence_se"] + 1e-5).all()
    assert frame["inference_gap"][~mask.numpy()].abs().max() < 1e-5


def test_scaled_latents_have_no_evidence():
    def scaled(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=3.0):
            pyro.sample("z", dist.Normal(x / 2 + 0.2, math.sqrt(0.5)))

    report = amortization_gap(scaled, guide, DATA, progress=False)
    assert any("poutine.scale" in text for text in report.warnings)
    assert report.per_datum["log_evidence"].isna().all()
    total, se = report.totals.loc["amortization_gap"]
    assert total == pytest.approx(40 * 3 * 0.2**2, abs=4 * se + 0.01)
    report.plot()


def test_one_row_and_unseen_ones():
    guide = AutoAmortizedNormal(model)
    fit_svi(model, guide, DATA, num_steps=300, seed=0, progress=False)
    report = amortization_gap(model, guide, DATA[:1], num_draws=200, num_steps=100, progress=False)
    assert len(report.per_datum) == 1
    report.plot()
    both = amortization_gap(model, guide, DATA, unseen=DATA[:1] + 3, num_draws=200, num_steps=100, progress=False)
    assert not any("nan" in text for text in both.advice)


def test_a_density_that_overflows_is_told():
    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(x > 100, x, (x + 1).log()), 0.3))

    report = amortization_gap(counts, guide, torch.tensor([0.0, 2.0, 200.0]), progress=False)
    assert any("ELBO is not finite on 1 of 3 data (rows 2)" in text for text in report.warnings)
    assert report.optimum.guide.posterior(torch.tensor([0.0, 2.0, 200.0])).mean["z"][2] == pytest.approx(5.27, abs=0.05)
    report.plot()


def test_k_hat_is_that_of_the_guide_and_that_of_the_evidence_stands_beside_it():
    """Of normals that are too narrow by known factors: the shape of their weights' tail is 1 - factor^2."""
    factors = torch.tensor([1.0, 0.9, 0.6, 0.3], dtype=torch.float64)

    def guide(x):
        pyro.sample("theta", dist.Normal(0.5, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 0.5) / 2, math.sqrt(0.5) * factors))

    x, given = DATA[:4].double(), {"theta": torch.tensor(0.5, dtype=torch.float64)}
    report = amortization_gap(model, guide, x, given=given, num_draws=5000, progress=False)
    assert report.per_datum["khat"].to_numpy() == pytest.approx((1 - factors**2).numpy(), abs=0.2)
    assert (report.per_datum["khat_evidence"] < 0.3).all()
    assert report.warnings == ()
    assert "k-hat of the guide: median" in str(report)


def test_rows_far_from_the_training_data_are_named_and_leave_the_advice():
    guide = AutoAmortizedNormal(model)
    x = 3 + torch.randn(200, generator=torch.Generator().manual_seed(0))
    fit_svi(model, guide, x, num_steps=600, lr=0.02, seed=0, progress=False)
    options = {"num_draws": 200, "num_steps": 100, "progress": False}
    judged = torch.cat([x[:20], torch.tensor([53.0, -40.0])])
    report = amortization_gap(model, guide, judged, **options)
    (text,) = [text for text in report.warnings if "far from the data" in text]
    assert text.startswith("2 of 22 data (rows 20, 21)")
    assert report.per_datum["amortization_gap"][20] > 1
    assert not any("train longer" in text for text in report.advice)
    assert not any("far from" in text for text in amortization_gap(model, guide, x[:20], **options).warnings)


def test_a_guide_that_was_not_trained_is_said_to_be():
    guide = AutoAmortizedNormal(model)
    guide.initialize(DATA)
    options = {"num_draws": 50, "num_steps": 10, "progress": False}
    assert any("was not trained" in text for text in amortization_gap(model, guide, DATA, **options).warnings)
    fit_svi(model, guide, DATA, num_steps=3, seed=0, progress=False)
    for trained in (guide, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert not any("was not trained" in text for text in amortization_gap(model, trained, DATA, **options).warnings)


def test_a_data_set_as_a_whole_is_one_datum():
    """Of a latent of all data with an encoder; the report says how many data sets are judged."""

    def mean(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    guide = AutoAmortizedNormal(mean, encoder={"theta": DeepSets()})
    fit_svi(mean, guide, DATA, num_steps=100, seed=0, progress=False)
    report = amortization_gap(mean, guide, DATA, num_draws=300, progress=False)
    covariance = 4 * torch.ones(40, 40, dtype=torch.float64) + torch.eye(40, dtype=torch.float64)
    evidence = float(dist.MultivariateNormal(torch.zeros(40, dtype=torch.float64), covariance).log_prob(DATA.double()))
    total, se = report.totals.loc["elbo_optimum"]
    assert total == pytest.approx(evidence, abs=4 * se + 0.05)
    assert report.totals.loc["amortization_gap", "total"] > -0.05
    assert any("put a plate around the model" in text for text in report.warnings)
