import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import MLP, AutoAmortizedNormal, Constant, compare_inference, fit_svi, run_mcmc


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


DATA = torch.randn(30, generator=torch.Generator().manual_seed(2))
SVI = {"num_steps": 1500, "lr": 0.02}


def by_hand(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


@pytest.fixture(scope="module")
def comparison():
    methods = {
        "wide": AutoAmortizedNormal(model),
        "const": AutoAmortizedNormal(model, encoder=Constant()),
        "exact": by_hand,
        "mean_field": "mean_field",
        "nuts": run_mcmc(model, DATA, num_samples=300, warmup_steps=100, num_chains=2, seed=0, progress=False),
    }
    return compare_inference(model, DATA, methods=methods, svi=SVI, progress=False)


class TestComparison:
    def test_methods_stand_in_the_order_asked(self, comparison):
        assert list(comparison.table.index) == ["wide", "const", "exact", "mean_field", "nuts"]
        assert comparison.table.index.name == "method"

    def test_gaps_are_to_the_best_elbo(self, comparison):
        table = comparison.table
        assert table["gap"].min() == 0
        exact = float(dist.Normal(0.0, 2**0.5).log_prob(DATA).sum())
        assert table.loc["exact", "elbo"] == pytest.approx(exact, abs=1e-3)
        for label in ("wide", "mean_field"):
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
        fastest = table.loc[["wide", "const"], "seconds"].min()
        assert rows >= fastest / table.loc["mean_field", "seconds_per_new_row"] - 1

    def test_moments_against_mcmc(self, comparison):
        moments = comparison.moments
        assert moments.loc[("exact", "z"), "mean_error"] < 0.2
        assert moments.loc[("const", "z"), "mean_error"] > 0.5
        assert moments.loc[("wide", "z"), "sd_ratio"] == pytest.approx(1, abs=0.1)

    def test_prints_and_plots(self, comparison, tmp_path):
        assert "against MCMC" in str(comparison)
        comparison.plot().savefig(tmp_path / "elbo.png")
        assert (tmp_path / "elbo.png").stat().st_size > 1000


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


def test_mean_field_short_of_its_optimum_is_said():
    trained = fit_svi(model, AutoAmortizedNormal(model), 5 + DATA, num_steps=1500, lr=0.02, seed=0, progress=False)
    methods = {"trained": trained, "mean_field": "mean_field"}
    comparison = compare_inference(model, 5 + DATA, methods=methods, svi={"num_steps": 20}, progress=False)
    assert any("mean_field ended" in text and "num_steps" in text for text in comparison.warnings)


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
