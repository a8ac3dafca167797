import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_amortize import MCMCFit, run_mcmc
from pyro_amortize.arviz_bridge import r_hat
from pyro_amortize.mcmc import _r_hat_limit


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.ones(3) * z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)


class TestMCMC:
    def test_a_plate_that_subsamples_is_refused(self):
        def model(x):
            with pyro.plate("data", len(x), subsample_size=3) as i:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

        with pytest.raises(ValueError, match=r"'data', which shows 3 of its 10 elements.*pyro.plate"):
            run_mcmc(model, torch.randn(10), progress=False)

    def test_doubts_are_stated(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z.abs(), 0.01), obs=x)

        fit = run_mcmc(
            model, torch.tensor([3.0, 4.0]), num_samples=50, warmup_steps=50, num_chains=4, seed=0, progress=False
        )
        assert any("R-hat of 'z'" in text for text in fit.warnings)
        assert not fit.converged
        assert "NOT converged" in str(fit)

    def test_unknown_engine(self):
        with pytest.raises(ValueError, match="engine='stan'"):
            run_mcmc(model, torch.randn(3, 3), engine="stan")

    def test_nutpie_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "nutpie", None)
        monkeypatch.setitem(sys.modules, "nutpie.compiled_pyfunc", None)
        options = {"num_samples": 4, "warmup_steps": 2, "num_chains": 1, "seed": 0, "progress": False}
        with pytest.raises(ImportError, match=r'pip install "pyro_amortize\[nutpie\]"'):
            run_mcmc(model, torch.randn(3, 3), engine="nutpie", **options)
        fit = run_mcmc(model, torch.randn(3, 3), **options)
        assert fit.engine == "pyro"
        assert fit.fallback is None
        assert "4 draws by pyro" in str(fit)

    @pytest.mark.parametrize("engine", ["auto", "pyro"])
    def test_a_seed_repeats_and_none_goes_on(self, engine):
        options = {"engine": engine, "num_samples": 4, "warmup_steps": 2, "num_chains": 1, "progress": False}
        x = torch.randn(4, 3)
        first, same = (run_mcmc(model, x, seed=3, **options).samples["z"] for _ in range(2))
        assert torch.equal(first, same)
        one, other = (run_mcmc(model, x, **options).samples["z"] for _ in range(2))
        assert not torch.equal(one, other)

    @pytest.mark.parametrize("num_samples", [1, 3])
    def test_one_short_chain_is_no_reference(self, num_samples):
        fit = run_mcmc(
            model,
            torch.randn(4, 3),
            num_samples=num_samples,
            warmup_steps=2,
            num_chains=1,
            seed=0,
            progress=False,
        )
        assert not fit.converged
        assert "raise num_chains" in str(fit)


def recorded(samples, divergences=0):
    return MCMCFit(samples, divergences, 1.0)


class TestConvergence:
    def test_independent_draws(self):
        fit = recorded({"theta": torch.randn(4, 600), "z": torch.randn(4, 600, 50)})
        assert fit.converged
        assert fit.warnings == ()
        assert str(fit).splitlines()[0].endswith("converged")

    def test_one_chain_elsewhere(self):
        draws = torch.randn(4, 600, 50)
        draws[2, :, 7] += 1.0
        fit = recorded({"z": draws})
        assert not fit.converged
        assert "R-hat of 'z'" in fit.warnings[0]

    def test_too_few_effective_draws(self):
        fit = recorded({"z": torch.randn(4, 80)})
        assert not fit.converged
        assert any("effective sample size of 'z'" in text and "below 400" in text for text in fit.warnings)

    @pytest.mark.parametrize("num_draws", [2, 100])
    def test_chains_that_do_not_move(self, num_draws):
        for place in (torch.arange(4.0), torch.zeros(4)):
            fit = recorded({"z": place[:, None, None].expand(4, num_draws, 3)})
            assert not fit.converged
            assert "NOT converged" in str(fit)

    def test_a_value_that_is_none(self):
        draws = torch.randn(4, 600, 3)
        draws[0, 5, 1] = torch.nan
        assert not recorded({"z": draws}).converged

    def test_elements_of_one_value_do_not_count(self):
        factor = torch.randn(4, 600, 2, 2)
        factor[..., 0, 1] = 0.0
        fit = recorded({"factor": factor})
        assert fit.r_hat["factor"].isnan().sum() == 1
        assert fit.converged

    def test_divergences_are_warned_of(self):
        fit = recorded({"z": torch.randn(4, 600)}, divergences=3)
        assert fit.converged
        assert any("3 divergent" in text for text in fit.warnings)

    def test_many_elements_pass_as_often_as_one(self):
        generator = torch.Generator().manual_seed(0)
        # So few draws that R-hat of one element is above 1.01 now and then.
        values = r_hat({"z": torch.randn(4, 130, 1500, generator=generator)})["z"]
        one = float((values > _r_hat_limit(1, 4)).double().mean())
        assert _r_hat_limit(1, 4) == 1.01
        assert 0.01 < one < 0.3
        for num_elements in (5, 50):
            worst = values.reshape(-1, num_elements).max(1).values
            share = float((worst > _r_hat_limit(num_elements, 4)).double().mean())
            assert share < one + 3 * math.sqrt(one / len(worst))


class TestMasks:
    OPTIONS = {"num_samples": 500, "warmup_steps": 300, "num_chains": 2, "seed": 0, "progress": False}  # noqa: RUF012

    def test_what_obs_mask_makes_for_data_that_are_there_does_not_drift_off(self):
        def model(x, here):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=here)

        x, here = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([True, True, False])
        fit = run_mcmc(model, x, here, **self.OPTIONS)
        assert fit.converged
        mean, sd = (getattr(fit.samples["z"].flatten(0, 1), name)(0) for name in ("mean", "std"))
        torch.testing.assert_close(mean, torch.tensor([1.0, 1.0, 0.0]), atol=0.15, rtol=0)
        torch.testing.assert_close(sd, torch.tensor([0.5, 0.5, 1.0]).sqrt(), atol=0.1, rtol=0)
        drawn = fit.samples["x_unobserved"].flatten(0, 1).std(0)
        torch.testing.assert_close(drawn, torch.tensor([1.5, 1.5, 2.0]).sqrt(), atol=0.2, rtol=0)

    def test_a_prior_under_a_mask_is_flat_where_data_depend_on_it(self):
        def model(x):
            with poutine.mask(mask=False):
                theta = pyro.sample("theta", dist.Normal(0.0, 0.1))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

        fit = run_mcmc(model, torch.full((25,), 3.0), **self.OPTIONS)
        assert fit.samples["theta"].mean().item() == pytest.approx(3.0, abs=0.05)
        assert fit.samples["theta"].std().item() == pytest.approx(0.2, abs=0.04)
