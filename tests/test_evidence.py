import math
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch

from pyro_amortize.arviz_bridge import ess, good_k, psis, r_hat
from pyro_amortize.evidence import Evidence, annealed_evidence, estimate_evidence, standard_error


def weights(narrow, draws=20_000, rows=12):
    z = narrow * torch.randn(draws, rows, dtype=torch.float64)
    return dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, narrow).log_prob(z)


@pytest.mark.parametrize("narrow", [0.6, 0.8, 0.9])
def test_k_hat_of_a_normal_that_is_too_narrow(narrow):
    smoothed, k_hat = psis(weights(narrow))
    assert float(k_hat.mean()) == pytest.approx(1 - narrow**2, abs=0.15)
    assert smoothed.logsumexp(0).sub(math.log(20_000)).abs().max() < 0.2


def test_k_hat_of_a_perfect_guide_is_good():
    smoothed, k_hat = psis(torch.full((100, 3), -7.0))
    assert torch.equal(k_hat, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(smoothed, torch.full((100, 3), -7.0, dtype=torch.float64))


def test_smoothing_keeps_the_body_and_the_scale():
    raw = weights(0.7) - 123.0
    smoothed, _ = psis(raw)
    body = raw < raw.quantile(0.5, 0)
    torch.testing.assert_close(smoothed[body], raw[body])


@pytest.mark.parametrize("narrow", [0.8, 1.0, 1.3])
def test_evidence_covers_the_truth_at_the_stated_rate(narrow):
    log_ratio = weights(narrow, draws=1000, rows=400) + 2.5
    evidence = estimate_evidence(log_ratio)
    z = (evidence.value - 2.5) / standard_error(evidence.influences["common"]).clamp(min=1e-9)
    assert float((z.abs() < 2).double().mean()) > 0.85


def test_good_k_depends_on_the_number_of_draws():
    assert good_k(100) == pytest.approx(0.5)
    assert good_k(10**6) == 0.7


def test_r_hat_and_ess_tell_chains_that_agree():
    draws = torch.randn(4, 500, 2, dtype=torch.float64)
    apart = draws + torch.arange(4.0, dtype=torch.float64)[:, None, None]
    samples = {"net.weight": draws, "chain": apart}
    assert (r_hat(samples)["net.weight"] < 1.01).all()
    assert (r_hat(samples)["chain"] > 1.2).all()
    assert ess(samples)["net.weight"].shape == (2,)
    assert (ess(samples)["net.weight"] > 1000).all()


def test_annealed_data_are_replaced_and_the_others_corrected_by_them(monkeypatch):
    """Also where k-hat of the importance weights is nearer to its limit: it does not show that they are low."""
    rows, low = 40, 0.5

    def evidence(value, k_hat, limit, by, stream):
        zeros = torch.zeros(rows if by == "PSIS" else len(value), dtype=torch.float64)
        return Evidence(
            value, {stream: torch.zeros(8, len(value)).double()}, zeros + k_hat, zeros + limit, [by] * len(value), zeros
        )

    exact = torch.linspace(-3.0, 3.0, rows, dtype=torch.float64)
    monkeypatch.setattr(
        "pyro_amortize.evidence._by_annealing",
        lambda joint, optimum, modes, chosen, progress: evidence(exact[chosen], 0.44, 0.446, "AIS", "AIS"),
    )
    joint = SimpleNamespace(loc=torch.zeros(rows, 30))
    found = annealed_evidence(evidence(exact - low, 0.3, 0.667, "PSIS", "common"), joint, None, None, 15, False)
    assert sorted(set(found.by)) == ["AIS", "PSIS+AIS"]
    assert found.by.count("AIS") == 15
    torch.testing.assert_close(found.value, exact)
    assert found.correction == pytest.approx((low, 0.0), abs=1e-9)
