"""Errors of moments and quantiles against draws, and their noise, against what is known of normals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import AutoAmortizedNormal
from pyro_amortize.moments import against_mcmc

ROWS, CHAINS, DRAWS = 40, 4, 500
DATA = torch.linspace(-1, 1, ROWS)
OPTIONS = {"num_draws": 400, "seed": 0, "progress": False}


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def written(shift=0.0, scale=1.0):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shift, scale).expand([len(x)]))

    return guide


def frame(guide, draws):
    return against_mcmc({"guide": guide}, draws, (DATA,), {}, **OPTIONS)


def draws(*shape):
    return {"z": torch.randn(CHAINS, DRAWS, *shape)}


def test_an_exact_guide_shows_noise_alone():
    row = frame(written(), draws(ROWS))[0].loc[("guide", "z")]
    # Means of independent draws have a standard error that is known: of 2,000 by MCMC and 400 of the guide.
    assert row["mean_error_se"] == pytest.approx(math.sqrt(1 / 2000 + 1 / 400), rel=0.1)
    for name in ("mean", "q05", "q50", "q95"):
        # The mean square over independent elements scatters by sqrt(2 / elements).
        ratio = row[f"{name}_error"] ** 2 / row[f"{name}_error_se"] ** 2
        assert ratio < 1 + 4 * math.sqrt(2 / ROWS)
        assert row[f"{name}_error"] > 0.3 * row[f"{name}_error_se"]
    assert abs(row["sd_ratio"] - 1) < 4 * row["sd_ratio_se"]
    assert row["sd_ratio_se"] == pytest.approx(math.sqrt((1 / 2000 + 1 / 400) / 2 / ROWS), rel=0.3)


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 0.6), (0.0, 1.5)], ids=["off", "narrow", "wide"])
def test_errors_of_a_guide_that_is_wrong(shift, scale):
    row = frame(written(shift, scale), draws(ROWS))[0].loc[("guide", "z")]
    normal = dist.Normal(0.0, 1.0).icdf(torch.tensor([0.05, 0.5, 0.95]))
    expected = dict(zip(("q05", "q50", "q95"), (shift + (scale - 1) * normal).tolist(), strict=True))
    for name, error in {"mean": shift, **expected}.items():
        size, noise = row[f"{name}_error"], row[f"{name}_error_se"]
        assert size == pytest.approx(math.hypot(error, noise), abs=noise)
    assert abs(row["sd_ratio"] - scale) < 4 * row["sd_ratio_se"]


def test_the_error_of_a_ratio_knows_that_elements_move_together():
    one = torch.randn(CHAINS, DRAWS, 1)
    guide = AutoAmortizedNormal(model)
    guide.initialize(DATA)
    together = frame(guide, {"z": one.expand(-1, -1, ROWS)})[0]
    apart = frame(guide, draws(ROWS))[0]
    ratio = together["sd_ratio_se"].iloc[0] / apart["sd_ratio_se"].iloc[0]
    assert ratio == pytest.approx(math.sqrt(ROWS), rel=0.3)


def test_generated_guides_have_no_noise_of_their_own_where_their_moments_are_known():
    guide = AutoAmortizedNormal(model)
    guide.initialize(DATA)
    row = frame(guide, draws(ROWS))[0].loc[("guide", "z")]
    assert row["mean_error_se"] == pytest.approx(1 / math.sqrt(2000), rel=0.1)


def test_sites_on_an_interval_and_a_simplex():
    def bounded(x):
        u = pyro.sample("u", dist.Uniform(-1.0, 2.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(u + p[0], 1.0), obs=x)

    guide = AutoAmortizedNormal(bounded, init_scale=0.5)
    guide.initialize(DATA)
    posterior = guide.posterior(DATA)
    own = {name: value[None].expand(2, -1, *value.shape[1:]) for name, value in posterior.sample((3000,)).items()}
    found = frame(guide, own)[0]
    assert set(found.index.get_level_values("site")) == {"u", "p"}
    errors = found[[name for name in found if name.endswith("_error")]].to_numpy()
    noise = found[[name for name in found if name.endswith("_error_se")]].to_numpy()
    assert (errors < 4 * noise).all()


def test_elements_that_never_change_are_left_out():
    values = draws(ROWS)["z"].clone()
    values[..., :10] = 3.0
    row = frame(written(), {"z": values})[0].loc[("guide", "z")]
    assert row["mean_error"] < 0.2
    assert row.notna().all()


def test_discrete_latents_are_left_out_by_name():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(0.5).expand([len(x)]))
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))

    found, left_out = frame(guide, draws(ROWS))
    assert list(found.index) == [("guide", "z")]
    assert left_out == ["c"]


def test_a_seed_repeats():
    values = draws(ROWS)
    first = frame(written(), values)[0]
    torch.rand(3)
    assert first.equals(frame(written(), values)[0])
