import pyro
import pyro.distributions as dist
import pytest
import torch
from models import AUTOGUIDES, autoguided
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_amortize import MLP, AutoAmortizedNormal, Constant, MCMCFit, compare_inference, fit_svi


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


DATA = torch.randn(30, generator=torch.Generator().manual_seed(2))
SVI = {"num_steps": 1000, "lr": 0.02}


def by_hand(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def drawn():
    """Draws from the exact posterior in the place of chains, which take longer."""
    generator = torch.Generator().manual_seed(3)
    samples = {"z": DATA / 2 + 0.5**0.5 * torch.randn(4, 500, len(DATA), generator=generator)}
    return MCMCFit(samples, divergences=0, seconds=9.0)


@pytest.fixture(scope="module")
def comparison():
    methods = {
        "wide": AutoAmortizedNormal(model),
        "const": AutoAmortizedNormal(model, encoder=Constant()),
        "exact": by_hand,
        "mean_field": "mean_field",
        "warm": "mean_field_warm",
        "nuts": drawn(),
    }
    return compare_inference(model, DATA, methods=methods, svi=SVI, progress=False)


class TestComparison:
    def test_methods_stand_in_the_order_asked(self, comparison):
        assert list(comparison.table.index) == ["wide", "const", "exact", "mean_field", "warm", "nuts"]
        assert comparison.table.index.name == "method"

    def test_gaps_are_to_the_best_elbo(self, comparison):
        table = comparison.table
        assert table["gap"].min() == 0
        best = table["elbo"].astype(float).idxmax()
        assert set(table["gap_to"].dropna()) == {best}
        assert f"gaps are to {best}" in str(comparison)
        exact = float(dist.Normal(0.0, 2**0.5).log_prob(DATA).sum())
        assert table.loc["exact", "elbo"] == pytest.approx(exact, abs=1e-3)
        for label in ("wide", "mean_field", "warm"):
            assert abs(table.loc[label, "elbo"] - exact) < 0.2
        const = 30 * float(DATA.var(unbiased=False)) / 4
        assert table.loc["const", "gap"] == pytest.approx(const, abs=4 * table.loc["const", "gap_se"] + 0.3)

    def test_sizes_and_times(self, comparison):
        table = comparison.table
        assert table.loc["const", "num_parameters"] == 2
        assert table.loc["mean_field", "num_parameters"] == 60
        assert table.loc["exact", "num_parameters"] == 0
        assert (table["seconds_per_new_row"] > 0).all()
        rows = table.loc["mean_field", "break_even_rows"]
        assert rows >= table.loc["wide", "seconds"] / table.loc["mean_field", "seconds_per_new_row"] - 1

    def test_moments_against_mcmc(self, comparison):
        moments = comparison.moments
        for name in ("mean", "q05", "q50", "q95"):
            for label in ("exact", "wide", "warm"):
                row = moments.loc[(label, "z")]
                assert row[f"{name}_error"] < 2 * row[f"{name}_error_se"]
            row = moments.loc[("const", "z")]
            assert row[f"{name}_error"] > max(0.5, 5 * row[f"{name}_error_se"])
        wide = moments.loc[("wide", "z")]
        assert wide["sd_ratio"] == pytest.approx(1, abs=4 * wide["sd_ratio_se"] + 0.02)

    def test_prints_and_plots(self, comparison, tmp_path):
        text = str(comparison)
        assert "against MCMC" in text
        assert "±" in text
        figure = comparison.plot()
        assert [axis.get_xlabel() for axis in figure.axes[:2]] == ["step", "time, s"]
        assert all("MCMC" in axis.get_xlabel() for axis in figure.axes[2:])
        assert len(figure.axes) == 4
        (legend,) = figure.legends
        assert [entry.get_text() for entry in legend.get_texts()] == ["wide", "const", "mean_field", "warm", "exact"]
        figure.savefig(tmp_path / "elbo.png")
        assert (tmp_path / "elbo.png").stat().st_size > 1000

    def test_time_is_counted_from_before_compiling(self, comparison):
        for label, line in zip(["wide", "const", "mean_field", "warm"], comparison.plot().axes[1].lines, strict=True):
            fit = comparison.fits[label]
            assert fit.compile_seconds > 0
            assert fit.compile_seconds < line.get_xdata()[0] < line.get_xdata()[-1] <= fit.seconds
            first = 1000 // 40 / 1000 * (fit.seconds - fit.compile_seconds)  # the mean of so many steps
            assert line.get_xdata()[0] == pytest.approx(fit.compile_seconds + first)


def test_one_answer_for_all_data_does_not_break_even():
    methods = {"const": AutoAmortizedNormal(model, encoder=Constant()), "mean_field": "mean_field"}
    table = compare_inference(model, DATA, methods=methods, svi={"num_steps": 20}, progress=False).table
    assert table["break_even_rows"].isna().all()


def test_encoder_widths_as_labels():
    guides = {f"width {k}": AutoAmortizedNormal(model, encoder=MLP((k,))) for k in (2, 16)}
    comparison = compare_inference(model, DATA, methods=guides, svi={"num_steps": 20}, progress=False)
    assert comparison.table["num_parameters"].is_monotonic_increasing
    assert comparison.moments is None


def test_a_trained_fit_is_taken_as_it_is():
    fit = fit_svi(model, AutoAmortizedNormal(model), DATA, num_steps=30, seed=0, progress=False)
    answer = fit.guide.median(DATA)["z"]
    comparison = compare_inference(model, DATA, methods={"mine": fit}, progress=False)
    assert comparison.fits["mine"] is fit
    assert comparison.table.loc["mine", "seconds"] == fit.seconds
    assert torch.equal(answer, fit.guide.median(DATA)["z"])


@pytest.fixture(scope="module")
def trained():
    guide = AutoAmortizedNormal(model)
    return fit_svi(model, guide, 5 + DATA, num_steps=1000, lr=0.02, seed=0, progress=False)


def test_mean_field_short_of_its_optimum_is_said(trained):
    methods = {"trained": trained, "mean_field": "mean_field"}
    comparison = compare_inference(model, 5 + DATA, methods=methods, svi={"num_steps": 20}, progress=False)
    (text,) = [text for text in comparison.warnings if text.startswith("mean_field ended")]
    assert "below trained, though its family holds that one's" in text
    assert "add the method 'mean_field_warm'" in text
    assert "num_steps" in text


def test_a_warm_start_mends_it(trained):
    methods = {"trained": trained, "mean_field": "mean_field", "mean_field_warm": "mean_field_warm"}
    comparison = compare_inference(model, 5 + DATA, methods=methods, svi={"num_steps": 20}, progress=False)
    table = comparison.table
    assert table.loc["mean_field_warm", "gap"] < 0.5
    assert table.loc["mean_field", "gap"] > 10
    (text,) = [text for text in comparison.warnings if text.startswith("mean_field ended")]
    assert "add the method" not in text


def test_a_warm_start_takes_the_best_of_the_amortized_guides(trained):
    poor = AutoAmortizedNormal(model, encoder=Constant())
    poor.initialize(5 + DATA)
    methods = {"poor": poor, "good": trained, "poor again": poor, "warm": "mean_field_warm"}
    comparison = compare_inference(model, 5 + DATA, methods=methods, svi={"num_steps": 1, "lr": 1e-6}, progress=False)
    assert comparison.table.loc["warm", "elbo"] == pytest.approx(comparison.table.loc["good", "elbo"], abs=1e-2)


def test_a_warm_start_from_a_guide_that_cannot_be_read_is_left_out():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(5.0, x / 2, 0.7))

    methods = {"written": guide, "warm": "mean_field_warm"}
    comparison = compare_inference(model, DATA, methods=methods, progress=False)
    assert list(comparison.table.index) == ["written"]
    assert any("warm is left out" in text and "StudentT" in text for text in comparison.warnings)


@pytest.mark.parametrize("methods", [("mean_field_warm", "amortized"), ("mean_field", "mean_field_warm")])
def test_nothing_to_start_from(methods):
    with pytest.raises(ValueError, match="no method before it is one.*Put it after"):
        compare_inference(model, DATA, methods=methods, progress=False)


def test_chains_that_did_not_converge_are_no_reference():
    mcmc = {"num_samples": 8, "warmup_steps": 2, "num_chains": 2}
    comparison = compare_inference(
        model, DATA, methods=("amortized", "mcmc"), svi={"num_steps": 10}, mcmc=mcmc, progress=False
    )
    assert comparison.moments is None
    assert "against MCMC" not in str(comparison)
    (text,) = [text for text in comparison.warnings if "did not converge" in text]
    assert "num_samples" in text
    assert any("effective sample size of 'z'" in text for text in comparison.warnings)
    assert len(comparison.plot().axes) == 2


def test_a_seed_repeats_everything():
    def run(seed):
        return compare_inference(
            model,
            DATA[:4],
            methods={"amortized": "amortized", "warm": "mean_field_warm", "exact": by_hand, "mcmc": "mcmc"},
            svi={"num_steps": 10},
            mcmc={"num_samples": 10, "warmup_steps": 5, "num_chains": 2},
            num_draws=50,
            seed=seed,
            progress=False,
        )

    before = torch.get_rng_state()
    first, same, other = run(1), run(1), run(2)
    assert torch.equal(before, torch.get_rng_state())
    columns = ["elbo", "elbo_se", "gap", "gap_se"]
    assert first.table[columns].equals(same.table[columns])
    assert not first.table[columns].equals(other.table[columns])
    draws, again = (result.fits["mcmc"].samples["z"] for result in (first, same))
    assert torch.equal(draws, again)


def test_pyro_s_own_guides_are_judged_and_not_taken_for_amortized():
    fit = fit_svi(model, AutoNormal(model), DATA, num_steps=50, seed=0, progress=False)
    comparison = compare_inference(model, DATA, methods={"auto": fit, "exact": by_hand}, progress=False)
    assert comparison.table.loc["auto", "seconds_per_new_row"] == fit.seconds / 30
    assert comparison.plot().legends


def test_pyro_s_own_guides_stand_beside_ours():
    x = DATA[:8]
    methods = {make.__name__: make(autoguided) for make in AUTOGUIDES}
    trained = fit_svi(autoguided, AutoMultivariateNormal(autoguided), x, num_steps=30, seed=0, progress=False)
    pyro.clear_param_store()  # from which a guide of the same class would take what this one learnt
    comparison = compare_inference(
        autoguided,
        x,
        methods={**methods, "trained": trained, "ours": "amortized"},
        svi={"num_steps": 10},
        num_draws=20,
        progress=False,
    )
    assert comparison.table["elbo"].notna().all()
    assert comparison.table.loc["trained", "elbo"] > comparison.table.loc["AutoMultivariateNormal", "elbo"]
    assert all(not list(guide.parameters()) for guide in methods.values())
    warned = [text.split()[0] for text in comparison.warnings if "was never called" in text and "fit_svi" in text]
    assert warned == list(methods)


def test_mcmc_that_cannot_run_is_left_out_with_the_reason():
    def subsampled(x):
        with pyro.plate("data", len(x), subsample_size=8) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    comparison = compare_inference(subsampled, DATA, svi={"num_steps": 10}, progress=False)
    assert list(comparison.table.index) == ["amortized", "mean_field"]
    assert any("mcmc is left out" in text and "subsample" in text for text in comparison.warnings)


@pytest.mark.parametrize("methods", [("amortised",), {"a": 3}], ids=["name", "type"])
def test_unknown_methods(methods):
    with pytest.raises(ValueError, match="amortized.*mean_field.*mcmc"):
        compare_inference(model, DATA, methods=methods)


def shared(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


MANY = 2 + torch.randn(300, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def learnt():
    return fit_svi(shared, AutoAmortizedNormal(shared), MANY, num_steps=800, lr=0.02, seed=0, progress=False)


class TestGlobalsThatWereLearntElsewhere:
    @pytest.mark.parametrize("what", ["fit", "guide"])
    def test_are_held_and_cost_nothing(self, learnt, what):
        """The prior is 2.6 sd from what 300 rows say, whose divergence is no loss on four others."""
        x = MANY[:4] + 0.3
        methods = {"mine": learnt if what == "fit" else learnt.guide, "mean_field": "mean_field"}
        options = {"svi": {"num_steps": 600, "lr": 0.03}, "progress": False}
        result = compare_inference(shared, x, methods=methods, **options)
        (text,) = [text for text in result.warnings if "was trained on other data" in text]
        assert "'theta' are held" in text
        theta = learnt.guide.median(x)["theta"]
        evidence = float(dist.Normal(theta, 2**0.5).log_prob(x).sum())
        assert result.table.loc["mine", "elbo"] == pytest.approx(evidence, abs=0.1)
        assert result.table.loc["mine", "gap"] < 0.1
        free = compare_inference(shared, x, methods=methods, given={}, **options)
        assert free.table.loc["mine", "gap"] > 1
        assert not any("was trained on other data" in text for text in free.warnings)

    def test_are_free_on_the_data_of_the_fit(self, learnt):
        for mine in (learnt, learnt.guide):
            result = compare_inference(shared, MANY, methods={"mine": mine}, progress=False)
            assert not any("other data" in text for text in result.warnings)
            assert result.table.loc["mine", "elbo"] == pytest.approx(learnt.elbo, abs=1)
            assert f"{learnt.elbo:.0f}"[:4] in str(result)
