"""Discrete latents that are amortized: against sums by hand, guides by hand, and with some of them observed."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.optim import Adam
from torch import nn

from pyro_amortize import (
    MLP,
    AmortizationPlan,
    AutoAmortizedNormal,
    Constant,
    Table,
    amortization_gap,
    compare_inference,
    fit_svi,
    plan_amortization,
)

pytestmark = pytest.mark.usefixtures("float64")
WEIGHTS, CENTRES = [0.2, 0.5, 0.3], [-3.0, 0.0, 3.0]


def normal(loc=0.0, scale=1.0):
    return dist.Normal(torch.as_tensor(loc, dtype=torch.float64), scale)


def mixture(x):
    with pyro.plate("n", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor(WEIGHTS)))
        pyro.sample("x", normal(torch.tensor(CENTRES)[c]), obs=x)


def responsibilities(x):
    return (torch.tensor(WEIGHTS).log() + normal(torch.tensor(CENTRES)).log_prob(x[:, None])).softmax(-1)


def draw(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    c = torch.multinomial(torch.tensor(WEIGHTS), count, replacement=True, generator=generator)
    return torch.tensor(CENTRES)[c] + torch.randn(count, generator=generator)


def initialized(model, *args, **options):
    guide = AutoAmortizedNormal(model, **options)
    guide.initialize(*args)
    return guide


def stirred(guide):
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


# Answers known in closed form.


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
def test_a_trained_encoder_gives_the_responsibilities(marked):
    model = config_enumerate(mixture) if marked else mixture
    x = draw()
    guide = AutoAmortizedNormal(model, encoder={"c": MLP((16,))})
    fit = fit_svi(model, guide, x, num_steps=1200, lr=0.03, seed=0, progress=False)
    exact = responsibilities(x)
    torch.testing.assert_close(guide.posterior(x).probs["c"], exact, atol=0.02, rtol=0)
    new = draw(50, seed=1)
    torch.testing.assert_close(guide.posterior(new).probs["c"], responsibilities(new), atol=0.05, rtol=0)
    evidence = (torch.tensor(WEIGHTS).log() + normal(torch.tensor(CENTRES)).log_prob(x[:, None])).logsumexp(-1)
    assert fit.elbo == pytest.approx(float(evidence.sum()), abs=0.5)
    report = amortization_gap(model, guide, x, progress=False)
    off = (report.per_datum["log_evidence"].to_numpy() - evidence.numpy()) / report.per_datum["log_evidence_se"].clip(
        1e-4
    )
    assert float(off.abs().max()) < 5
    assert abs(float(report.per_datum["inference_gap"].mean())) < 5e-3
    assert any("'c' of the guide is discrete" in warning for warning in report.warnings)


def test_reweighted_wake_sleep_gives_the_responsibilities():
    x = draw()
    guide = AutoAmortizedNormal(mixture, encoder={"c": MLP((16,))})
    guide.initialize(x)
    loss = ReweightedWakeSleep(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(mixture, guide, Adam({"lr": 0.01}), loss)
    for _ in range(600):
        svi.step(x)
    torch.testing.assert_close(guide.posterior(x).probs["c"], responsibilities(x), atol=0.1, rtol=0)


def test_a_table_of_probabilities_is_mean_field():
    x = draw(20)
    guide = AutoAmortizedNormal(mixture, encoder={"c": Table()})
    fit_svi(mixture, guide, x, num_steps=800, lr=0.1, seed=0, progress=False)
    torch.testing.assert_close(guide.posterior(x).probs["c"], responsibilities(x), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="'c' has a table"):
        guide.posterior(draw(21))


def test_one_answer_for_all_data():
    x = draw(40)
    guide = initialized(mixture, x, encoder={"c": Constant()})
    torch.testing.assert_close(guide.posterior(x).probs["c"], torch.tensor(WEIGHTS).expand(40, 3))


# Guides by hand, of the same networks.


class Semi(nn.Module):
    """A semi-supervised model: a label and a code behind each datum, in either order."""

    def __init__(self, label_first, one_hot):
        super().__init__()
        self.label_first, self.one_hot = label_first, one_hot
        self.decoder = nn.Linear(2 + 3, 4).double()

    def label(self, rows, y):
        logits = torch.zeros(rows, 3)
        fn = dist.OneHotCategorical(logits=logits) if self.one_hot else dist.Categorical(logits=logits)
        return pyro.sample("y", fn, obs=y)

    def model(self, x, y=None):
        with pyro.plate("n", len(x)):
            if self.label_first:
                y = self.label(len(x), y)
            z = pyro.sample("z", normal(torch.zeros(2)).to_event(1))
            if not self.label_first:
                y = self.label(len(x), y)
            label = y if self.one_hot else nn.functional.one_hot(y, 3).to(z)
            batch = torch.broadcast_shapes(z.shape[:-1], label.shape[:-1])
            both = torch.cat([z.expand(*batch, 2), label.expand(*batch, 3)], -1)
            pyro.sample("x", normal(self.decoder(both)).to_event(1), obs=x)


def by_hand(guide, semi):
    """The guide that one would write, of a generated guide's own networks."""
    blocks = {site: guide.plan.block_of(site) for site in "yz"}
    heads = {site: guide.coder_of(block) for site, block in blocks.items()}
    shift, scale = (getattr(guide.preparation_of(blocks["y"])[0], name) for name in ("shift", "scale"))

    def hand(x, y=None):
        with pyro.plate("n", len(x)):
            rows = (x - shift) / scale
            if y is None:
                (logits,) = heads["y"](rows)
                fn = dist.OneHotCategorical(logits=logits) if semi.one_hot else dist.Categorical(logits=logits)
                y = pyro.sample("y", fn, infer={"enumerate": "parallel"})
            label = y if semi.one_hot else nn.functional.one_hot(y, 3).to(rows)
            batch = torch.broadcast_shapes(rows.shape[:-1], label.shape[:-1])
            (out,) = heads["z"](torch.cat([rows.expand(*batch, 4), label.expand(*batch, 3)], -1))
            pyro.sample("z", dist.Normal(out[..., :2], nn.functional.softplus(out[..., 2:])).to_event(1))

    return hand


LOSSES = {
    "guessed": {},
    "nesting": {"max_plate_nesting": 2},
    "particles": {"num_particles": 3, "max_plate_nesting": 1},
    "vectorized": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
}


@pytest.mark.parametrize("label_first", [True, False], ids=["label-first", "code-first"])
@pytest.mark.parametrize("one_hot", [True, False], ids=["one-hot", "categorical"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")
def test_elbo_is_that_of_a_guide_by_hand(label_first, one_hot, loss):
    semi = Semi(label_first, one_hot)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    y = nn.functional.one_hot(y, 3).double() if one_hot else y
    guide = stirred(initialized(semi.model, x, encoder={"y": MLP((5,))}))
    assert guide.plan.block_of("z").inputs == ("x", "y")
    assert guide.plan.block_of("y").inputs == ("x",)
    hand = by_hand(guide, semi)
    for args in ((x,), (x, y), (x[:3],), (x[:5], y[:5]), (x,)):  # without labels and with, any number of rows
        losses = []
        for candidate in (guide, hand):
            pyro.set_rng_seed(3)
            losses.append(TraceEnum_ELBO(**LOSSES[loss]).loss(semi.model, candidate, *args))
        if loss != "guessed":  # guessing the nesting takes draws, more of them with a label first
            assert losses[0] == pytest.approx(losses[1], abs=1e-8)
        assert math.isfinite(losses[0])


@pytest.mark.parametrize("label_first", [True, False], ids=["label-first", "code-first"])
def test_gradients_are_those_of_a_guide_by_hand(label_first):
    semi = Semi(label_first, True)
    x = torch.randn(8, 4)
    guide = stirred(initialized(semi.model, x, encoder={"y": MLP((5,))}))
    gradients = []
    for candidate in (guide, by_hand(guide, semi)):
        guide.zero_grad()
        pyro.set_rng_seed(3)
        TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(semi.model, candidate, x).backward()
        gradients.append([parameter.grad.clone() for parameter in guide.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")
@pytest.mark.slow
def test_labels_of_some_rows_teach_the_encoder_of_the_others():
    pyro.set_rng_seed(1)
    y = nn.functional.one_hot(torch.arange(120) % 3, 3).double()
    x = 3 * y @ torch.randn(3, 4) + 0.5 * torch.randn(120, 4)
    semi = Semi(False, True)

    def model(x, y=None):
        pyro.module("semi", semi)
        semi.model(x, y)

    guide = AutoAmortizedNormal(model, encoder={"y": MLP((16,))})
    guide.initialize(x)
    svi = SVI(model, guide, Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    for step in range(600):
        svi.step(x[:60], y[:60])
        if step > 200:  # unlabelled rows once the decoder knows what labels mean
            svi.step(x[60:])
    found = guide.posterior(x[60:]).probs["y"].argmax(-1)
    assert float((found == y[60:].argmax(-1)).double().mean()) > 0.9
    given = guide.posterior(x[:4], y[:4])
    assert set(given.sites) == {"z"}
    assert set(guide.posterior(x[:4]).sites) == {"y", "z"}


def several(x, here):
    with pyro.plate("n", len(x)), poutine.mask(mask=here):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
        flags = pyro.sample("flags", dist.Bernoulli(torch.tensor([[0.2, 0.4], [0.6, 0.9]])[kind]).to_event(1))
        z = pyro.sample("z", normal(flags.sum(-1)))
        pyro.sample("x", normal(z + kind, 0.5), obs=x)


def test_several_discrete_sites_one_below_the_other():
    x, here = torch.randn(6), torch.tensor([True, True, False, True, True, True])
    guide = stirred(initialized(several, x, here, encoder={"kind": MLP(), "flags": MLP()}))
    assert guide.plan.block_of("flags").inputs == ("x", "here", "kind")
    assert guide.plan.block_of("z").inputs == ("x", "here", "kind", "flags")
    assert guide.plan.block_of("flags").widths(2) == [2]
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(several, guide, x, here))
    exact = TraceEnum_ELBO(max_plate_nesting=1, num_particles=300, vectorize_particles=True)
    sampled = torch.tensor([-Trace_ELBO().loss(several, guide, x, here) for _ in range(800)])
    assert abs(-exact.loss(several, guide, x, here) - float(sampled.mean())) < 5 * float(sampled.std()) / 800**0.5 + 0.1
    probs = guide.posterior(x, here).probs
    torch.testing.assert_close(probs["kind"][2], torch.tensor([0.3, 0.7]))  # no data: the prior
    assert probs["flags"].shape == (6, 2)


def test_inputs_say_whether_an_encoder_sees_a_drawn_label():
    x, here = torch.randn(6), torch.ones(6, dtype=torch.bool)
    encoder = {"kind": MLP(), "flags": MLP()}
    for chosen, seen in (
        (["x"], ("x",)),
        (["x", "kind"], ("x", "kind")),
        (lambda x, here: x[:, None], ("inputs(...)",)),
    ):
        guide = initialized(several, x, here, encoder=encoder, inputs={"z": chosen})
        assert guide.plan.block_of("z").inputs == seen
        assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(several, guide, x, here))


def test_plain_draws_are_independent_of_enumeration():
    """Marks are set under TraceEnum_ELBO only, so that other ELBOs draw without a warning."""
    x = draw(10)
    guide = initialized(mixture, x, encoder={"c": MLP()})
    for loss in (Trace_ELBO(), TraceGraph_ELBO(), Trace_ELBO(num_particles=2)):
        assert math.isfinite(SVI(mixture, guide, Adam({"lr": 0.01}), loss).step(x))
    assert poutine.trace(guide).get_trace(x).nodes["c"]["infer"].get("enumerate") is None


def schools(y):
    with pyro.plate("schools", y.shape[0], dim=-2):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))
        z = pyro.sample("z", normal(2.0 * c))
        with pyro.plate("students", y.shape[1], dim=-1):
            pyro.sample("y", normal(z), obs=y)


@pytest.mark.slow
def test_a_discrete_site_in_an_outer_plate():
    y = torch.randn(5, 3)
    guide = stirred(initialized(schools, y, encoder={"c": MLP()}))
    together = TraceEnum_ELBO(max_plate_nesting=2, num_particles=400, vectorize_particles=True)
    sampled = torch.tensor([-Trace_ELBO().loss(schools, guide, y) for _ in range(1500)])
    error = float(sampled.std()) / 1500**0.5
    assert abs(-together.loss(schools, guide, y) - float(sampled.mean())) < 6 * error
    assert guide.posterior(y[:2, :2]).sample((3,))["z"].shape == (3, 2, 1)


# Answers.


def below(x):
    with pyro.plate("n", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor(WEIGHTS)))
        z = pyro.sample("z", normal(torch.tensor(CENTRES)[c], 0.5))
        pyro.sample("x", normal(z, 0.5), obs=x)


def test_posterior_of_discrete_sites():
    x = draw(6)
    guide = stirred(initialized(below, x, encoder={"c": MLP()}))
    posterior = guide.posterior(x)
    probs = posterior.probs["c"]
    assert set(posterior.mean) == set(posterior.stddev) == set(guide.quantiles([0.1, 0.9], x)) == {"z"}
    assert set(posterior.median) == set(guide.median(x)) == {"c", "z"}
    assert torch.equal(guide.median(x)["c"], probs.argmax(-1))
    draws = posterior.sample((500, 2))
    assert draws["c"].shape == draws["z"].shape == (500, 2, 6)
    frequency = nn.functional.one_hot(draws["c"], 3).double().mean((0, 1))
    assert float((frequency - probs).abs().max()) < 5 * math.sqrt(0.25 / 1000)
    torch.testing.assert_close(posterior.log_prob({"c": draws["c"]})["c"], probs.log().expand(500, 2, 6, 3).gather(
        -1, draws["c"][..., None])[..., 0])  # fmt: skip
    means = torch.stack([
        torch.stack([draws["z"][:, :, n][draws["c"][:, :, n] == k].mean() for n in range(6)]) for k in range(3)
    ])  # fmt: skip
    spread = (means.nan_to_num(0.0).amax(0) - means.nan_to_num(0.0).amin(0)).max()
    assert float(spread) > 0.05, "z is drawn given c"
    replicas = guide.predictive(x, num_samples=40)
    assert replicas["c"].shape == replicas["x"].shape == (40, 6)


def test_saved_copied_and_planned(tmp_path):
    x = draw(30)
    guide = stirred(initialized(below, x, encoder={"c": MLP((4,))}))
    guide.save(tmp_path / "guide.pt")
    loaded = AutoAmortizedNormal.load(tmp_path / "guide.pt", below)
    for twin in (loaded, copy.deepcopy(guide)):
        torch.testing.assert_close(twin.posterior(x).probs["c"], guide.posterior(x).probs["c"])
        torch.testing.assert_close(twin.posterior(x).mean["z"], guide.posterior(x).mean["z"])
    assert AmortizationPlan.from_dict(guide.plan.to_dict()) == guide.plan
    assert guide.plan.verdict.closable is True


def test_comparison_of_a_guide_that_amortizes_with_one_that_sums_out():
    model = config_enumerate(below)
    methods = {"amortized": AutoAmortizedNormal(model, encoder={"c": MLP()}), "summed out": AutoAmortizedNormal(model)}
    result = compare_inference(model, draw(40), methods=methods, svi={"num_steps": 300, "lr": 0.03}, progress=False)
    assert list(result.table.index) == ["amortized", "summed out"]
    assert result.table["elbo"].notna().all()


# Loops, globals, bad input.


def switching(x):
    with pyro.plate("n", len(x)):
        c, z = torch.zeros(len(x), dtype=torch.long), x.new_zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            c = pyro.sample(f"c_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[c]))
            z = pyro.sample(f"z_{t}", normal(z + 2.0 * c))
            pyro.sample(f"x_{t}", normal(z), obs=x[:, t])


def test_discrete_sites_of_a_loop():
    x = torch.randn(6, 4)
    guide = initialized(switching, x, encoder={"c_*": MLP()})
    assert guide.plan.block_of("c_2").plates == ("n", "steps")
    svi = SVI(switching, guide, Adam({"lr": 0.01}), TraceGraph_ELBO())
    assert all(math.isfinite(svi.step(torch.randn(3, steps))) for steps in (4, 7, 2))
    posterior = guide.posterior(torch.randn(3, 6))
    assert set(posterior.probs) == {f"c_{t}" for t in range(6)}
    assert posterior.probs["c_5"].shape == (3, 2)
    summed = config_enumerate(switching)
    guide = initialized(summed, x)
    assert guide.plan.enumerated == ("c_*",)
    assert guide.plan.verdict.closable is True  # Recurrent() sees the series
    assert str(plan_amortization(summed, x)) == str(guide.plan)
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(summed, guide, torch.randn(3, 7)))


def test_errors():
    x = draw(12)

    def poisson(x):
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", normal(k), obs=x)

    with pytest.raises(ValueError, match=r"'k' is none of these.*hide=\['k'\]"):
        initialized(poisson, x, encoder={"k": MLP()})
    with pytest.raises(ValueError, match=r"discrete sample site 'c'.*amortize it, encoder=\{'c': MLP\(\)\}"):
        initialized(mixture, x)
    with pytest.raises(ValueError, match=r"discrete sample site 'c'"):
        initialized(mixture, x, encoder=Table())
    semi = Semi(True, False)
    with pytest.raises(ValueError, match=r"'y' is observed in this call. Initialize the guide by a call"):
        initialized(semi.model, torch.randn(6, 4), torch.zeros(6, dtype=torch.long), encoder={"y": MLP()})
