"""Supports that move with other latents, and where chains start."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import AffineTransform, OrderedTransform
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoNormal

from pyro_amortize import (
    MLP,
    AutoAmortizedNormal,
    MCMCFit,
    amortization_gap,
    fit_mean_field,
    fit_svi,
    mcmc,
    nuts,
    plan_amortization,
    run_mcmc,
)
from pyro_amortize.local_joint import LocalJoint
from pyro_amortize.moments import against_mcmc
from pyro_amortize.parameters import preserved
from pyro_amortize.unconstrained import LogDensity, Unconstrained

OPTIONS = {"num_samples": 200, "warmup_steps": 150, "num_chains": 2, "seed": 0, "progress": False}
SHORT = {"num_samples": 4, "warmup_steps": 4, "num_chains": 1, "seed": 0, "progress": False}


@pytest.fixture
def never_compiled(monkeypatch):
    pytest.importorskip("nutpie")
    monkeypatch.setattr(nuts, "SECONDS_A_COMPILATION", math.inf)


def pareto():
    s = pyro.sample("s", dist.Gamma(3.0, 1.0))
    pyro.sample("p", dist.Pareto(s, 5.0))


def both_ends():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(a, a + 1.0))
    pyro.sample("c", dist.Uniform(a, b))


def in_plates():
    s = pyro.sample("s", dist.Gamma(3.0, 1.0))
    with pyro.plate("n", 3):
        low = pyro.sample("low", dist.Normal(torch.arange(3.0), 1.0))
        pyro.sample("u", dist.Uniform(low[..., None], (low + s)[..., None]).expand((*low.shape, 2)).to_event(1))


def shifted():
    s = pyro.sample("s", dist.Normal(0.0, 1.0))
    pyro.sample("u", dist.TransformedDistribution(dist.Beta(2.0, 2.0), AffineTransform(s, s.exp())))


def series():
    b = pyro.sample("b_0", dist.Uniform(0.0, 1.0))
    for t in range(1, 3):
        b = pyro.sample(f"b_{t}", dist.Uniform(b - 1.0, b + 1.0))


MOVING = {model.__name__: model for model in (pareto, both_ends, in_plates, shifted, series)}


def moments(model, name, of, count=20_000):
    """Mean of a function of a site, and its standard error, by draws of the model, side by side."""
    pyro.set_rng_seed(1)
    nodes = poutine.trace(pyro.plate("draws", count, dim=-2)(model)).get_trace().nodes
    values = of(nodes[name]["value"])
    return values.mean(0).squeeze(0), values.std(0).squeeze(0) / math.sqrt(count)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.usefixtures("never_compiled")
def test_chains_without_data_draw_from_the_prior(name):
    fit = run_mcmc(MOVING[name], engine="nutpie", **OPTIONS)
    assert fit.outside == ()
    for site, draws in fit.samples.items():
        for of in (torch.tanh, lambda value: value.tanh().square()):
            values = of(draws)
            mean, se = moments(MOVING[name], site, of)
            error = (values.flatten(0, 1).std(0).square() / mcmc.arviz_bridge.ess({"": values})[""] + se**2).sqrt()
            assert ((values.mean((0, 1)) - mean).abs() < 4.5 * error).all(), site


@pytest.mark.parametrize("engine", ["nutpie", "pyro"])
def test_no_draw_lies_outside(engine):
    pytest.importorskip("nutpie")
    fit = run_mcmc(pareto, engine=engine, **OPTIONS | {"num_samples": 60, "warmup_steps": 60, "num_chains": 1})
    assert (fit.samples["p"] > fit.samples["s"]).all()
    assert fit.samples["s"].mean().item() == pytest.approx(3.0, abs=1.5)


def test_a_model_that_takes_one_draw_at_a_time():
    def model():
        s = pyro.sample("s", dist.Gamma(3.0, 1.0))
        high = s if s > 1 else s + 1
        pyro.sample("u", dist.Uniform(0.0, high))

    density = LogDensity(model, (), {}, 0)
    draws = {"s": torch.randn(6) + 1.0, "u": 3 * torch.randn(6)}
    found = density.constrained(draws)
    s = draws["s"].exp()
    high = torch.where(s > 1, s, s + 1)
    torch.testing.assert_close(found, {"s": s, "u": high * draws["u"].sigmoid()})


def test_the_density_is_that_of_constrained_space_and_the_jacobian():
    def model(y):
        s = pyro.sample("s", dist.Gamma(3.0, 1.0))
        with pyro.plate("n", 2), poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor([True, False])):
            u = pyro.sample("u", dist.Uniform(0.0, s))
            pyro.sample("y", dist.Normal(u, 1.0), obs=y)

    y = torch.tensor([0.3, 0.7])
    values = {"s": torch.tensor(0.4), "u": torch.tensor([-0.2, 0.9])}
    s = values["s"].exp()
    u = s * values["u"].sigmoid()
    expected = dist.Gamma(3.0, 1.0).log_prob(s) + values["s"]
    expected = expected + 0.5 * (-s.log() + dist.Normal(u[0], 1.0).log_prob(y[0]))
    expected = expected + (s.log() + values["u"].sigmoid().log() + (-values["u"]).sigmoid().log()).sum()
    torch.testing.assert_close(LogDensity(model, (y,), {}, 1)(values), expected)


def switched(y):
    with pyro.plate("n", len(y)):
        c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        u = pyro.sample("u", dist.Uniform(0.0, 1.0 + c))
        pyro.sample("y", dist.Normal(u, 0.5), obs=y)


def on_a_fixed_support(y):
    with pyro.plate("n", len(y)):
        c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        raw = pyro.sample("u_raw", dist.Uniform(0.0, 1.0))
        u = pyro.deterministic("u", (1.0 + c) * raw)
        pyro.sample("y", dist.Normal(u, 0.5), obs=y)


class TestSummedOut:
    Y = torch.tensor([0.2, 0.9, 1.7])

    def test_a_support_that_goes_with_one_is_refused(self):
        with pytest.raises(ValueError, match=r"support of site 'u' depends on 'c', which is summed out.*deterministic"):
            plan_amortization(switched, self.Y)
        with pytest.raises(
            ValueError, match=r"support of site 'u' depends on a latent that is summed out.*deterministic"
        ):
            run_mcmc(switched, self.Y, **SHORT)

    def test_the_ways_that_the_error_names_work(self):
        amortized = AutoAmortizedNormal(switched, encoder={"c": MLP((8,))})
        amortized.initialize(self.Y)
        draws = amortized.posterior(self.Y).sample((200,))
        assert amortized.plan.moving == ("u",)
        assert (draws["u"] <= 1 + draws["c"]).all()
        assert (draws["u"] > 1).any()
        report = amortization_gap(on_a_fixed_support, raw_guide, self.Y, progress=False)
        # p(u) is 3/4 below one and 1/4 above.
        u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 1000
        joint = torch.where(u < 1, 0.75, 0.25).log() + dist.Normal(u, 0.5).log_prob(self.Y.double()[:, None])
        expected = float((joint.logsumexp(1) - math.log(1000)).sum())
        total, se = report.totals.loc["log_evidence"][["total", "total_se"]]
        assert abs(total - expected) < 4 * se + 0.01
        assert run_mcmc(on_a_fixed_support, self.Y, **SHORT).outside == ()


def raw_guide(y):
    with pyro.plate("n", len(y)):
        pyro.sample("u_raw", dist.Uniform(0.0, 1.0))


def test_draws_outside_are_no_reference():
    fit = MCMCFit({"p": torch.randn(4, 600)}, 0, 1.0, outside=("p",))
    assert not fit.converged
    assert "draws of 'p' lie outside of its support" in fit.warnings[0]


@pytest.mark.parametrize(("p", "outside"), [(4.0, ()), (2.0, ("p",))])
def test_draws_are_looked_at(p, outside):
    chain = {"s": torch.tensor([9.0, 3.0]), "p": torch.tensor([5.0, p])}
    assert mcmc._outside(pareto, (), {}, (chain,)) == outside


def ordered(y):
    with pyro.plate("n", len(y)):
        prior = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [OrderedTransform()])
        z = pyro.sample("z", prior)
        s = pyro.sample("s", dist.Uniform(z[..., 0], z[..., 1]))
        pyro.sample("y", dist.Normal(s, 0.1), obs=y)


class TestStart:
    Y = torch.tensor([0.3, 0.7])

    def started(self, start, model=ordered, names=("z", "s")):
        found = mcmc._starts(start, (self.Y,), {}, list(names))(0)
        density = LogDensity(model, (self.Y,), {}, 1)
        return density, density.start(0, found)

    def test_values_are_where_chains_start(self):
        values = {"z": torch.tensor([[0.0, 1.0], [-1.0, 1.0]]), "s": torch.tensor([0.2, 0.9])}
        density, begin = self.started(values)
        torch.testing.assert_close(density.constrained({n: v[None] for n, v in begin.items()})["s"][0], values["s"])

    def test_others_start_at_random(self):
        values = {"z": torch.tensor([[0.0, 1.0], [-1.0, 1.0]])}
        density, begin = self.started(values)
        place = density.constrained({name: value[None] for name, value in begin.items()})
        torch.testing.assert_close(place["z"][0], values["z"])
        assert (place["s"] > place["z"][..., 0]).all()

    @pytest.mark.parametrize("kind", ["generated", "autonormal"])
    def test_each_chain_takes_a_draw_of_a_guide(self, kind):
        guide = AutoAmortizedNormal(ordered, init_scale=0.01) if kind == "generated" else AutoNormal(ordered)
        guide(self.Y)
        drawn = mcmc._starts(guide, (self.Y,), {}, ["z", "s"])
        assert set(drawn(0)) == {"z", "s"}
        assert not torch.equal(drawn(0)["z"], drawn(1)["z"])
        self.started(guide)
        assert run_mcmc(ordered, self.Y, start=guide, **SHORT).samples["z"].shape == (1, 4, 2, 2)

    @pytest.mark.parametrize(
        ("start", "error"),
        [
            ({"Z": torch.zeros(2, 2)}, r"start names 'Z'.*Known: \['z', 's'\]"),
            ({"z": torch.zeros(3)}, r"start\['z'\] has shape \(3,\). Expected \(2, 2\)"),
            (
                {"z": torch.tensor([[0.0, 1.0], [-1.0, 1.0]]), "s": torch.tensor([0.5, 3.0])},
                r"start\['s'\] lies outside",
            ),
            (torch.zeros(2), "start is a Tensor.*start=fit.guide"),
            (lambda _: None, "start samples none of the latents"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, start, error):
        with pytest.raises(ValueError, match=error):
            run_mcmc(ordered, self.Y, start=start, **SHORT)

    def test_a_fit_is_no_guide(self):
        fit = fit_svi(ordered, AutoAmortizedNormal(ordered), self.Y, num_steps=1, progress=False)
        with pytest.raises(ValueError, match=r"start is a SVIFit.*start=fit.guide"):
            run_mcmc(ordered, self.Y, start=fit, **SHORT)

    def test_a_guide_without_parameters_is_refused(self):
        guide = AutoAmortizedNormal(ordered)
        with pytest.raises(RuntimeError, match="start has no parameters yet. Train it"):
            run_mcmc(ordered, self.Y, start=guide, **SHORT)
        assert guide.plan is None

    def test_no_start_to_be_found(self):
        def nowhere():
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("wall", torch.tensor(-math.inf))

        with pytest.raises(ValueError, match="of 100 random starts none has a finite density"):
            run_mcmc(nowhere, **SHORT)

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match="no continuous latent"):
            run_mcmc(pareto, given={"s": torch.tensor(1.0), "p": torch.tensor(2.0)}, **SHORT)


def correlated():
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.999], [0.999, 1.0]])))


@pytest.mark.usefixtures("never_compiled")
class TestTuning:
    def test_shallow_trees_draw_worse(self):
        options = {**OPTIONS, "num_samples": 100, "warmup_steps": 100, "engine": "nutpie"}
        deep, shallow = (run_mcmc(correlated, max_tree_depth=depth, **options).ess["z"].min() for depth in (10, 1))
        assert deep > 3 * shallow

    def test_small_steps_diverge_less(self):
        def funnel():
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            pyro.sample("x", dist.Normal(torch.zeros(5), (v / 2).exp()).to_event(1))

        options = {**OPTIONS, "num_samples": 100, "warmup_steps": 100, "engine": "nutpie", "num_chains": 1}
        careful, bold = (run_mcmc(funnel, target_accept_prob=p, **options).divergences for p in (0.95, 0.5))
        assert careful < bold

    def test_pyros_kernel_is_told(self, monkeypatch):
        told = {}

        def kernel(**options):
            told.update(options)
            return NUTS(**options)

        monkeypatch.setattr(nuts, "NUTS", kernel)
        run_mcmc(correlated, target_accept_prob=0.9, max_tree_depth=3, engine="pyro", **SHORT)
        assert (told["target_accept_prob"], told["max_tree_depth"]) == (0.9, 3)

    @pytest.mark.parametrize("option", [{"target_accept_prob": 1.0}, {"target_accept_prob": 0}, {"max_tree_depth": 0}])
    def test_out_of_range(self, option):
        with pytest.raises(ValueError, match=f"run_mcmc: {next(iter(option))}="):
            run_mcmc(correlated, **SHORT, **option)


def test_values_are_held_where_the_model_has_their_support():
    held = Unconstrained({"s": torch.tensor(0.0), "p": torch.tensor(0.0)})
    trace = poutine.trace(held(pareto)).get_trace()
    assert trace.nodes["p"]["value"].item() == pytest.approx(2.0)
    assert held.log_det["p"].item() == pytest.approx(0.0)
    assert trace.nodes["p"]["is_observed"]


def local(y):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Gamma(3.0, 1.0))
        u = pyro.sample("u", dist.Uniform(0.0, z))
        pyro.sample("y", dist.Normal(u, 0.5), obs=y)


def of_a_global(y):
    s = pyro.sample("s", dist.Gamma(3.0, 1.0))
    with pyro.plate("n", len(y)):
        u = pyro.sample("u", dist.Uniform(0.0, s))
        pyro.sample("y", dist.Normal(u, 0.5), obs=y)


class TestGuides:
    Y = torch.tensor([0.3, 1.0, 2.5])

    @pytest.fixture
    def guide(self):
        guide = AutoAmortizedNormal(local, init_scale=0.5)
        guide.initialize(self.Y)
        return guide

    @pytest.mark.parametrize("model", [local, of_a_global, ordered])
    def test_draws_lie_inside(self, model):
        guide = AutoAmortizedNormal(model, init_scale=0.8)
        guide.initialize(self.Y)
        moving = "s" if model is ordered else "u"
        assert guide.plan.moving == (moving,)
        for draws in (guide.posterior(self.Y).sample((60,)), guide.predictive(self.Y, num_samples=60)):
            above = {"local": "z", "of_a_global": "s", "ordered": "z"}[model.__name__]
            high = draws[above][..., 1] if model is ordered else draws[above]
            high = high[..., None] if model is of_a_global else high
            assert (draws[moving] <= high).all()

    def test_the_plan_of_fixed_supports_says_so(self):
        def model(y, high):
            with pyro.plate("n", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                u = pyro.sample("u", dist.Uniform(-1.0, high))
                pyro.sample("y", dist.Normal(z + u, 1.0), obs=y)

        guide = AutoAmortizedNormal(model)
        guide.initialize(self.Y, torch.tensor([1.0, 2.0, 3.0]))
        assert guide.plan.moving == ()

    def test_answers_are_at_the_medians_above(self, guide):
        posterior = guide.posterior(self.Y)
        median = posterior.median
        assert (posterior.quantiles([0.999])["u"][0] < median["z"]).all()
        assert (median["u"] < median["z"]).all()

    def test_density_is_that_of_draws(self, guide):
        draws = guide.posterior(self.Y).sample((4,))
        found = guide.posterior(self.Y).log_prob(draws)
        for k in range(4):
            held = poutine.condition(guide, data={name: value[k] for name, value in draws.items()})
            trace = poutine.trace(held).get_trace(self.Y)
            trace.compute_log_prob()
            for name in ("z", "u"):
                torch.testing.assert_close(found[name][k], trace.nodes[name]["log_prob"])

    def test_saved_and_loaded(self, guide, tmp_path):
        guide.save(tmp_path / "guide.pt")
        again = AutoAmortizedNormal.load(tmp_path / "guide.pt", local)
        assert again.plan.moving == ("u",)
        draws = again.posterior(self.Y).sample((20,))
        assert (draws["u"] < draws["z"]).all()

    def test_evidence_and_optimum_are_those_of_quadrature(self, guide):
        report = amortization_gap(local, guide, self.Y, num_steps=100, num_particles=16, progress=False)
        # The prior of u is the integral of Gamma(z; 3, 1) / z over z > u: (1 + u) exp(-u) / 2.
        u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 1000
        joint = ((1 + u) / 2).log() - u + dist.Normal(u, 0.5).log_prob(self.Y.double()[:, None])
        expected = float((joint.logsumexp(1) - math.log(1000)).sum())
        total, se = report.totals.loc["log_evidence"][["total", "total_se"]]
        assert abs(total - expected) < 4 * se + 0.02
        assert report.totals["total"]["elbo_optimum"] < expected
        assert report.totals["total"]["amortization_gap"] > 0
        draws = poutine.trace(report.optimum.guide).get_trace(self.Y)
        assert (draws.nodes["u"]["value"] < draws.nodes["z"]["value"]).all()

    def test_the_density_per_datum_is_the_models(self, guide):
        with preserved(local, guide, evaluating=True), poutine.block(), torch.no_grad():
            plan = plan_amortization(local, self.Y)
            joint = LocalJoint(local, guide, (self.Y,), {}, plan, "n")
            raw = torch.randn(5, 3, 2)
            found = joint.log_p(raw)
            some = joint.log_p(raw[:, [2, 0]], torch.tensor([2, 0]))
        z = raw[..., 0].exp()
        u = z * raw[..., 1].sigmoid()
        expected = dist.Gamma(3.0, 1.0).log_prob(z) + raw[..., 0] - z.log() + dist.Normal(u, 0.5).log_prob(self.Y)
        expected = expected + z.log() + raw[..., 1].sigmoid().log() + (-raw[..., 1]).sigmoid().log()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(some, expected[:, [2, 0]], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", ["generated", "autonormal"])
    def test_tables_start_from_another_guide(self, guide, kind):
        start = guide if kind == "generated" else AutoNormal(local)
        start(self.Y)
        fit = fit_mean_field(local, self.Y, start=start, num_steps=1, lr=1e-9, seed=0, progress=False)
        expected = start.median(self.Y)
        torch.testing.assert_close(fit.guide.median(self.Y), expected, rtol=1e-3, atol=1e-3)

    def test_moments_are_of_joint_draws(self, guide):
        chains = {name: torch.rand(4, 50, 3) for name in ("z", "u")}
        frame, _ = against_mcmc({"a": guide}, chains, (self.Y,), {}, num_draws=10, seed=0, progress=False)
        pyro.set_rng_seed(1)
        drawn = guide.posterior(self.Y).sample((500,))["u"].std(0)
        truth = chains["u"].flatten(0, 1).std(0)
        assert frame.loc[("a", "u"), "sd_ratio"] == pytest.approx(float((drawn / truth).mean()), rel=0.1)
