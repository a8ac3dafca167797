"""Where priors live, told against quadrature: transformed and periodic priors, and distributions that do not say."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import AbsTransform, AffineTransform, ExpTransform, OrderedTransform
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.optim import Adam

from pyro_amortize import AutoAmortizedNormal, amortization_gap, plan_amortization, run_mcmc

QUICK = {"num_steps": 100, "num_particles": 16, "num_draws": 500, "progress": False}
BRIEF = {"num_samples": 20, "warmup_steps": 20, "num_chains": 1, "seed": 0, "progress": False}


def known(prior):
    """Rows, each a normal of standard deviation 0.5 around a draw of the prior."""

    def model(y):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    return model


def of_base(base, loc, scale):
    return dist.TransformedDistribution(base, AffineTransform(torch.tensor(loc), torch.tensor(scale)))


def exact(log_prior, y, low, high):
    """Evidence and posterior means by the midpoint rule, log_prior(z) being known between two ends."""
    edges = torch.linspace(low, high, 20_001, dtype=torch.float64)
    z = (edges[1:] + edges[:-1]) / 2
    joint = log_prior(z) + dist.Normal(z, 0.5).log_prob(y.double()[:, None])
    width = math.log((high - low) / 20_000)
    return joint.logsumexp(1) + width, (joint.softmax(1) * z).sum(1)


beta = dist.Beta(torch.tensor(6.0, dtype=torch.float64), 4.0)
PRIORS = {
    # prior, its log density and where it begins and ends
    "beta": (of_base(dist.Beta(6.0, 4.0), 2.0, 1.0), lambda z: beta.log_prob(z - 2), 2.0, 3.0),
    "exponential": (of_base(dist.Exponential(1.0), 2.0, 1.0), lambda z: 2 - z, 2.0, 12.0),
    "twice": (
        of_base(of_base(dist.Beta(6.0, 4.0), -1.0, 2.0), 3.0, -1.5),
        lambda z: beta.log_prob((3 - z) / 3 + 0.5) - math.log(3.0),
        1.5,
        4.5,
    ),
    "kumaraswamy": (
        dist.Kumaraswamy(2.0, 3.0),
        lambda z: (6 * z * (1 - z**2) ** 2).log(),
        0.0,
        1.0,
    ),
    "student": (dist.StudentT(1.0, 0.0, 1.0), lambda z: -(math.pi * (1 + z**2)).log(), -60.0, 60.0),
    "open": (dist.GeneralizedPareto(0.0, 1.0, 0.3), lambda z: -(1 / 0.3 + 1) * (1 + 0.3 * z).log(), 0.0, 60.0),
    "half-cauchy": (dist.HalfCauchy(1.0), lambda z: (2 / math.pi / (1 + z**2)).log(), 0.0, 60.0),
}


@pytest.mark.parametrize("name", PRIORS)
def test_evidence_is_that_of_quadrature(name):
    prior, log_prior, low, high = PRIORS[name]
    y = torch.linspace(0.0, 3.0, 4)
    guide = AutoAmortizedNormal(known(prior))
    guide.initialize(y)
    report = amortization_gap(guide.model, guide, y, **QUICK)
    expected, mean = exact(log_prior, y, low, high)
    total, se = report.totals.loc["log_evidence"][["total", "total_se"]]
    # The errors of rows add up, and the search leaves no row by more than a thousandth.
    assert abs(total - float(expected.sum())) < 4 * se + 0.01
    assert report.per_datum.notna().all().all()
    found = report.optimum.guide.posterior(y)
    if name in ("beta", "twice"):  # where q's family holds nearly all
        assert ((found.mean["z"] - mean).abs() < 0.1 * found.stddev["z"]).all()
    assert bool(prior.support.check(found.sample((100,))["z"]).all())


def test_ordered_and_exponentiated_is_ordered_with_a_logarithm():
    def model(y, transforms, to_reals):
        with pyro.plate("n", len(y)):
            prior = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), transforms)
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(to_reals(z), 1.0).to_event(1), obs=y)

    torch.manual_seed(3)
    y = torch.randn(4, 3).sort(-1).values
    totals = []
    for transforms, to_reals in (
        ([OrderedTransform()], lambda z: z),
        ([OrderedTransform(), ExpTransform()], torch.log),
    ):
        guide = AutoAmortizedNormal(lambda y, t=transforms, f=to_reals: model(y, t, f))
        guide.initialize(y)
        report = amortization_gap(guide.model, guide, y, **QUICK)
        totals.append(report.totals["total"][["elbo_optimum", "log_evidence"]])
        z = guide.posterior(y).sample((50,))["z"]
        assert (z.diff(dim=-1) > 0).all()
    assert (z > 0).all()
    torch.testing.assert_close(*(torch.tensor(total.to_numpy()) for total in totals), rtol=0.0, atol=0.02)


def test_a_transform_that_is_no_bijection_is_refused():
    y = torch.randn(5)
    folded = dist.TransformedDistribution(dist.Normal(0.0, 1.0), AbsTransform())
    with pytest.raises(ValueError, match=r"site 'z' is transformed by AbsTransform.*HalfNormal"):
        plan_amortization(known(folded), y)
    with pytest.raises(ValueError, match="site 'z' is transformed by AbsTransform"):
        run_mcmc(known(folded), y, **BRIEF)
    guide = AutoAmortizedNormal(known(dist.FoldedDistribution(dist.Normal(0.0, 1.0))))
    guide.initialize(y)
    assert (guide.median(y)["z"] > 0).all()


def apart(y):
    with pyro.plate("n", len(y)):
        components = dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]))
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def test_a_mixture_of_several_supports_is_refused():
    with pytest.raises(ValueError, match="site 'z' is a mixture whose components have bounds of their own"):
        plan_amortization(apart, torch.randn(5))


# Angles.

torch.manual_seed(0)
ANGLES = 2 * math.pi * torch.rand(50) - math.pi
ON_THE_PLANE = torch.stack([ANGLES.cos(), ANGLES.sin()], -1) + 1.5 * torch.randn(50, 2)


def on_the_circle(prior):
    def model(y):
        with pyro.plate("n", len(y)):
            a = pyro.sample("a", prior)
            a = a if prior.event_dim == 0 else a[..., 0]
            pyro.sample("y", dist.Normal(torch.stack([a.cos(), a.sin()], -1), 1.5).to_event(1), obs=y)

    return model


class Wrapped(dist.Normal):
    """A normal that is wound around the circle, as users write it: on the reals."""

    def log_prob(self, value):
        turns = 2 * math.pi * torch.arange(-3.0, 4.0)
        distance = (value - self.loc + math.pi) % (2 * math.pi) - math.pi
        wound = dist.Normal(0.0, self.scale[..., None]).log_prob(distance[..., None] + turns)
        return wound.logsumexp(-1)


@pytest.mark.parametrize(
    "prior",
    [
        dist.VonMises(0.0, 1.0),
        dist.VonMises(0.0, 1.0).expand([2]).to_event(1),
        dist.SineBivariateVonMises(0.0, 0.0, 1.0, 1.0, 0.5),
        dist.TransformedDistribution(dist.VonMises(0.0, 1.0), AffineTransform(0.0, 0.5)),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.tensor([0.0, 1.0]), 3.0)),
        Wrapped(torch.tensor(0.5), torch.tensor(1.0)),
    ],
    ids=["one", "several", "pairs", "scaled", "mixture", "user's"],
)
def test_angles_are_refused(prior):
    for refused in (
        lambda: AutoAmortizedNormal(on_the_circle(prior)).initialize(ON_THE_PLANE),
        lambda: run_mcmc(on_the_circle(prior), ON_THE_PLANE, **BRIEF),
        lambda: amortization_gap(on_the_circle(prior), lambda _: None, ON_THE_PLANE, progress=False),
    ):
        with pytest.raises(ValueError, match=r"site 'a' is an angle.*dist.Uniform.*ProjectedNormalReparam"):
            refused()


@pytest.mark.parametrize(
    "prior", [dist.Normal(0.0, 1.0), dist.Normal(0.0, 1e4), dist.Cauchy(0.0, 1e-3), dist.Laplace(0.4, 1.0)]
)
def test_what_is_no_angle_is_not_refused(prior):
    assert plan_amortization(on_the_circle(prior), ON_THE_PLANE).blocks[0].sites == ("a",)


def cut(y):
    with pyro.plate("n", len(y)):
        a = pyro.sample("a", dist.Uniform(-math.pi, math.pi))
        pyro.factor("a_prior", math.log(2 * math.pi) + dist.VonMises(0.0, 1.0).log_prob(a))
        pyro.sample("y", dist.Normal(torch.stack([a.cos(), a.sin()], -1), 1.5).to_event(1), obs=y)


@poutine.reparam(config={"a": ProjectedNormalReparam()})
def direction(y):
    with pyro.plate("n", len(y)):
        a = pyro.sample("a", dist.ProjectedNormal(torch.zeros(2)))
        pyro.sample("y", dist.Normal(a, 1.5).to_event(1), obs=y)


@pytest.mark.parametrize(("model", "kappa"), [(cut, 1.0), (direction, 0.0)], ids=["cut", "direction"])
def test_the_ways_that_the_error_names_are_right(model, kappa):
    grid = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)[1:]
    prior = kappa * grid.cos() - math.log(2 * math.pi) - math.log(float(torch.special.i0(torch.tensor(kappa))))
    mean = torch.stack([grid.cos(), grid.sin()], -1)
    joint = prior + dist.Normal(mean, 1.5).log_prob(ON_THE_PLANE.double()[:, None]).sum(-1)
    expected = float((joint.logsumexp(1) + math.log(2 * math.pi / 4000)).sum())
    guide = AutoAmortizedNormal(model)
    guide.initialize(ON_THE_PLANE)
    report = amortization_gap(model, guide, ON_THE_PLANE, **QUICK | {"num_annealed": 50})
    total, se = report.totals.loc["log_evidence"][["total", "total_se"]]
    assert abs(total - expected) < 4 * se + 0.02
    assert report.totals["total"]["elbo_optimum"] < expected


@pytest.mark.parametrize(
    "prior", [dist.VonMises(0.0, 2.0), dist.ProjectedNormal(torch.tensor([2.0, 0.0, 0.0]))], ids=["circle", "sphere"]
)
def test_angles_without_data_are_left_to_the_model(prior):
    def model(y):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", prior)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoAmortizedNormal(model)
    guide.initialize(torch.randn(5))
    assert guide.plan.left_to_model == ("a",)
    assert guide.predictive(torch.randn(4), num_samples=3)["a"].shape[:2] == (3, 4)


def test_observed_angles_are_data():
    def model(a):
        with pyro.plate("n", len(a)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.VonMises(z, 4.0), obs=a)

    assert plan_amortization(model, ANGLES).blocks[0].inputs == ("a",)


# Distributions that have a density, and nothing else.


class Wald(dist.TorchDistribution):
    """First-passage times."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, drift):
        self.drift = drift
        super().__init__(drift.shape, validate_args=False)

    def log_prob(self, t):
        return -0.5 * (2 * math.pi * t**3).log() - (1 - self.drift * t) ** 2 / (2 * t)


def wald(t):
    with pyro.plate("n", len(t)):
        drift = pyro.sample("drift", dist.Normal(2.0, 0.5))
        pyro.sample("t", Wald(drift), obs=t)


def test_a_likelihood_needs_a_density_only():
    torch.manual_seed(0)
    t = torch.rand(5) + 0.1
    guide = AutoAmortizedNormal(wald)
    SVI(wald, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(t)
    report = amortization_gap(wald, guide, t, **QUICK)
    # p(t | drift) = t^-2 Normal(drift; 1 / t, 1 / t), as a function of the drift.
    evidence = dist.Normal(2.0, (0.25 + 1 / t).sqrt()).log_prob(1 / t) - 2 * t.log()
    found = torch.tensor(report.per_datum["log_evidence"].to_numpy())
    torch.testing.assert_close(found, evidence.double(), rtol=0.0, atol=0.01)
    with pytest.raises(NotImplementedError, match=r"site 't' cannot be drawn: its Wald.*sample"):
        guide.predictive(t, num_samples=2)


def test_a_latent_has_to_say_where_it_lives():
    def model(y):
        with pyro.plate("n", len(y)):
            t = pyro.sample("t", Wald(torch.ones(len(y))))
            pyro.sample("y", dist.Normal(t, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"site 't' is a Wald, which does not say where it lives.*support ="):
        plan_amortization(model, torch.rand(5))


def test_chains_leave_angles_without_data_to_the_model():
    def model(y):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.VonMises(3 * z, 50.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

    y = torch.tensor([-0.5, 0.5])
    fit = run_mcmc(model, y, **BRIEF | {"num_samples": 100, "warmup_steps": 100, "num_chains": 2})
    assert fit.outside == ()
    assert fit.samples["a"].shape == fit.samples["z"].shape == (2, 100, 2)
    turned = (fit.samples["a"] - 3 * fit.samples["z"]).flatten(0, 1)
    assert (turned.abs() < 1).all()
    assert float(turned.std()) == pytest.approx(50**-0.5, rel=0.2)  # nearly normal
    assert float(fit.samples["z"].mean((0, 1))[1]) == pytest.approx(0.495, abs=0.05)
