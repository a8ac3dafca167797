import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import AUTOGUIDES, autoguided
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn

from pyro_amortize import AutoAmortizedNormal, Table, fit_svi
from pyro_amortize.capture import Graph
from pyro_amortize.densities import log_densities
from pyro_amortize.excerpt import LARGE
from pyro_amortize.minibatch import exact_minibatches


def sliced(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def indexed(x):
    with pyro.plate("data", len(x)) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def constant_size(x):
    with pyro.plate("data", 60):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def size_in_the_prior(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 10.0 / len(x)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def standardizes_inside(x):
    x = (x - x.mean()) / x.std()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def coupled_rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.cumsum(-1), 1.0), obs=x)


DATA = torch.randn(60, generator=torch.Generator().manual_seed(0))


def closure():
    with pyro.plate("data", 60) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=DATA[i])


def nested(y):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", y.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        with pyro.plate("members", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def grouped(y, index):
    with pyro.plate("groups", 4):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b[..., index], 1.0), obs=y)


class TestMinibatches:
    @pytest.mark.parametrize(
        ("model", "args", "inject", "slices"),
        [
            (sliced, (DATA,), False, ["x"]),
            (indexed, (DATA,), True, []),
            (constant_size, (DATA,), True, ["x"]),
            (closure, (), True, []),
        ],
        ids=["slice", "inject", "both", "closure"],
    )
    def test_the_exact_way_is_found(self, model, args, inject, slices):
        way = exact_minibatches(model, args, {})
        assert (way.inject, [source.name for source in way.slices]) == (inject, slices)

    @pytest.mark.parametrize(
        ("model", "why"),
        [(size_in_the_prior, "at site 'theta'"), (standardizes_inside, "at site 'x'"), (coupled_rows, "at site 'x'")],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_a_biased_way_is_refused_with_the_reason(self, model, why):
        assert why in exact_minibatches(model, (DATA,), {})
        guide = AutoAmortizedNormal(model)
        with pytest.warns(UserWarning, match=f"batch_size=20 is not used.*{why}"):
            fit_svi(model, guide, DATA, batch_size=20, num_steps=2, progress=False)

    def test_nested_data_are_sliced_along_the_outer_plate(self):
        y = DATA.reshape(12, 5)
        guide = AutoAmortizedNormal(nested, init_scale=1e-4)
        guide.initialize(y)
        way = exact_minibatches(nested, (y,), {}, guide.plan.pooled)
        assert way.plate.name == "groups"
        elbo = TraceMeanField_ELBO()
        full, parts = elbo.loss(nested, guide, y), []
        for rows in torch.randperm(12).split(4):
            args, kwargs, handler = way.rows(rows)
            with handler:
                parts.append(elbo.loss(nested, guide, *args, **kwargs))
        assert sum(parts) / 3 == pytest.approx(full, rel=1e-3)

    @pytest.mark.parametrize("encoder", [None, {"b": Table()}], ids=["pooled", "table"])
    def test_rows_that_the_guide_pools_are_not_batched(self, encoder):
        """A guide that saw some of a group's rows would not be the one that answers for all of them."""
        index = torch.arange(60) % 4
        guide = AutoAmortizedNormal(grouped, encoder=encoder)
        guide.initialize(DATA, index)
        way = exact_minibatches(grouped, (DATA, index), {}, guide.plan.pooled)
        if encoder is None:
            assert way == "the guide pools all rows of plate 'data' for 'b'"
            with pytest.warns(UserWarning, match="batch_size=20 is not used.*pools all rows"):
                fit_svi(grouped, guide, DATA, index, batch_size=20, num_steps=2, progress=False)
        else:
            assert way.plate.name == "data"
            fit_svi(grouped, guide, DATA, index, batch_size=20, num_steps=2, progress=False)

    def test_a_model_that_subsamples_is_left_alone(self):
        def model(x):
            with pyro.plate("data", len(x), subsample_size=7) as i:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

        fit_svi(model, AutoAmortizedNormal(model), DATA, batch_size=20, num_steps=2, progress=False)

    @pytest.mark.parametrize("model", [sliced, indexed, constant_size], ids=lambda model: model.__name__)
    @pytest.mark.parametrize("encoder", [None, Table()], ids=["mlp", "table"])
    def test_losses_of_batches_average_to_the_full_loss(self, model, encoder):
        guide = AutoAmortizedNormal(model, encoder=encoder, init_scale=1e-4)
        guide.initialize(DATA)
        way = exact_minibatches(model, (DATA,), {})
        elbo = TraceMeanField_ELBO()
        full = elbo.loss(model, guide, DATA)
        parts = []
        for rows in torch.randperm(60).split(15):
            args, kwargs, handler = way.rows(rows)
            guide.row_ids = {} if way.inject else {"data": rows}
            with handler:
                parts.append(elbo.loss(model, guide, *args, **kwargs))
        assert sum(parts) / 4 == pytest.approx(full, rel=1e-3)

    @pytest.mark.parametrize("model", [sliced, indexed, constant_size], ids=lambda model: model.__name__)
    def test_table_learns_every_row_from_batches(self, model):
        guide = AutoAmortizedNormal(model, encoder=Table())
        fit = fit_svi(model, guide, DATA, batch_size=20, num_steps=3000, lr=0.03, seed=0, progress=False)
        posterior = fit.guide.posterior(DATA)
        prior = posterior.mean.get("theta", torch.zeros(()))
        torch.testing.assert_close(posterior.mean["z"], (DATA + prior) / 2, atol=0.1, rtol=0)


class TestManyRows:
    """Steps, set-up and end of a fit see some rows only."""

    N = 20_000

    def test_no_run_sees_all_rows(self, tmp_path):
        seen = []

        def model(x):
            seen.append(len(x))
            sliced(x)

        x = torch.from_file(str(tmp_path / "x.bin"), shared=True, size=1_000_000).normal_()
        guide = AutoAmortizedNormal(model)
        fit = fit_svi(model, guide, x, batch_size=50, num_steps=3, seed=0, progress=False)
        assert max(seen) <= LARGE
        assert guide.plan.plates == {"data": 1_000_000}
        assert fit.num_parameters == sum(p.numel() for p in guide.parameters())

    @pytest.mark.parametrize("model", [sliced, indexed], ids=lambda model: model.__name__)
    @pytest.mark.parametrize("encoder", [None, Table()], ids=["mlp", "table"])
    def test_losses_of_batches_average_to_the_full_loss(self, model, encoder):
        x = torch.randn(self.N)
        guide = AutoAmortizedNormal(model, encoder=encoder, init_scale=1e-4)
        guide.initialize(x)
        way = exact_minibatches(model, (x,), {})
        elbo, parts = TraceMeanField_ELBO(), []
        for rows in torch.randperm(self.N).split(self.N // 4):
            args, kwargs, handler = way.rows(rows)
            guide.row_ids = {} if way.inject else {"data": rows}
            with handler:
                parts.append(elbo.loss(model, guide, *args, **kwargs))
        guide.row_ids = {}
        assert sum(parts) / 4 == pytest.approx(elbo.loss(model, guide, x), rel=1e-3)

    def test_a_biased_way_is_refused_with_the_reason(self):
        x, guide = torch.randn(self.N), AutoAmortizedNormal(size_in_the_prior)
        with pytest.warns(UserWarning, match="batch_size=20 is not used.*at site 'theta'"):
            fit_svi(size_in_the_prior, guide, x, batch_size=20, num_steps=1, progress=False)

    @pytest.mark.parametrize("model", [sliced, indexed], ids=lambda model: model.__name__)
    def test_elbo_is_the_log_evidence_where_the_guide_is_exact(self, model):
        def indexed_guide(x):
            with pyro.plate("data", len(x)) as i:
                loc, scale = pyro.param("slope", torch.tensor(0.5)) * x[i], math.sqrt(0.5)
                pyro.sample("z", dist.Normal(loc, scale))

        def sliced_guide(x):
            pyro.sample("theta", dist.Delta(torch.tensor(0.0)))
            indexed_guide(x)

        x = 2.0 * torch.randn(self.N)
        guide = indexed_guide if model is indexed else sliced_guide
        fit = fit_svi(model, guide, x, batch_size=50, num_steps=1, lr=1e-9, seed=0, progress=False)
        exact = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum())
        exact += float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))) if model is sliced else 0.0
        assert fit.elbo_se < 0.01 * abs(exact)
        assert fit.elbo == pytest.approx(exact, abs=4 * fit.elbo_se)

    def test_elbo_is_that_of_all_rows_where_latents_are_summed_out(self):
        def model(x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + 3 * k, 1.0), obs=x)

        x = torch.randn(self.N) + 3 * (torch.rand(self.N) < 0.3)
        fit = fit_svi(model, AutoAmortizedNormal(model), x, batch_size=100, num_steps=20, seed=0, progress=False)
        exact = log_densities(model, fit.guide, (x,), {}, num_draws=20).log_ratio
        se = math.hypot(fit.elbo_se, float(exact.std()) / math.sqrt(20))
        assert fit.elbo == pytest.approx(float(exact.mean()), abs=4 * se)

    def test_a_table_has_a_row_for_each(self):
        x = torch.randn(self.N)
        guide = AutoAmortizedNormal(indexed, encoder=Table())
        fit = fit_svi(indexed, guide, x, batch_size=5_000, num_steps=200, lr=0.1, seed=0, progress=False)
        assert fit.num_parameters == 2 * self.N
        assert float((guide.posterior(x).mean["z"] - x / 2).abs().quantile(0.99)) < 0.3

    def test_a_model_that_insists_on_their_number_is_run_on_all(self):
        def model(x):
            with pyro.plate("data", self.N):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide, x = AutoAmortizedNormal(model), torch.randn(self.N)
        fit = fit_svi(model, guide, x, batch_size=50, num_steps=5, seed=0, progress=False)
        assert fit.losses.isfinite().all()

    @pytest.mark.parametrize("batch_size", [128, 5_000, 6_000])
    def test_a_guide_that_keeps_to_the_rows_it_saw_first_takes_all(self, batch_size):
        guide, x = AutoNormal(sliced), torch.randn(self.N)
        with pytest.warns(UserWarning, match=f"batch_size={batch_size} is not used, since the guide, AutoNormal"):
            fit_svi(sliced, guide, x, batch_size=batch_size, num_steps=2, progress=False)
        assert guide.median(x)["z"].shape == (self.N,)


class TestRecord:
    def test_fields(self):
        guide = AutoAmortizedNormal(sliced)
        fit = fit_svi(sliced, guide, DATA, num_steps=50, seed=0, progress=False)
        assert fit.guide is guide
        assert fit.losses.shape == (50,)
        assert fit.num_parameters == sum(p.numel() for p in guide.parameters())
        assert fit.elbo_se > 0
        assert fit.seconds > 0
        assert "50 steps" in str(fit)

    def test_elbo_is_that_of_many_draws(self):
        guide = AutoAmortizedNormal(indexed)
        fit = fit_svi(indexed, guide, DATA, num_steps=300, seed=0, progress=False)
        losses = torch.tensor([Trace_ELBO().loss(indexed, guide, DATA) for _ in range(200)])
        se = math.hypot(fit.elbo_se, float(losses.std()) / math.sqrt(200))
        assert fit.elbo == pytest.approx(-float(losses.mean()), abs=4 * se)

    def test_a_seed_repeats_the_fit_and_leaves_the_random_state(self):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        fits = [fit_svi(sliced, AutoAmortizedNormal(sliced), DATA, num_steps=20, seed=1, progress=False) for _ in "ab"]
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(fits[0].losses, fits[1].losses)
        assert fits[0].elbo == fits[1].elbo

    def test_a_short_fit_says_that_it_has_not_converged(self):
        far = DATA + 30
        fit = fit_svi(sliced, AutoAmortizedNormal(sliced), far, num_steps=200, seed=0, progress=False)
        assert not fit.converged
        assert "NOT converged" in str(fit)
        assert f"about {fit.remaining:.2g} nats left".split(".")[0][:8] in str(fit)
        few = fit_svi(sliced, AutoAmortizedNormal(sliced), far, num_steps=20, seed=0, progress=False)
        assert not few.converged
        assert "too few steps to tell" in str(few)


class TestOptions:
    def test_optimizer_and_loss_of_the_user(self):
        def sgd(params):
            return torch.optim.SGD(params, lr=1e-4, momentum=0.5)

        loss = RenyiELBO(num_particles=2)
        fit = fit_svi(sliced, AutoAmortizedNormal(sliced), DATA, num_steps=5, optim=sgd, loss=loss, progress=False)
        assert fit.losses.isfinite().all()

    def test_progress_shows_the_loss(self, capsys, terminal):
        fit_svi(sliced, AutoAmortizedNormal(sliced), DATA, num_steps=3)
        assert "loss" in capsys.readouterr().err

    @pytest.mark.parametrize("option", [{"num_steps": 0}, {"num_particles": 0}, {"lr": -1.0}, {"batch_size": 0}])
    def test_out_of_range(self, option):
        with pytest.raises(ValueError, match=next(iter(option))):
            fit_svi(sliced, AutoAmortizedNormal(sliced), DATA, **option, progress=False)

    def test_keyword_arguments_of_the_model(self):
        def model(x, *, scale):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, scale))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        kwargs = {"scale": torch.tensor(2.0)}
        fit = fit_svi(model, AutoAmortizedNormal(model), DATA, num_steps=5, progress=False, model_kwargs=kwargs)
        assert fit.losses.isfinite().all()

    def test_guide_written_by_hand(self):
        def guide(x):
            loc = pyro.param("slope", torch.tensor(0.0)) * x
            scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, scale))

        fit = fit_svi(indexed, guide, DATA, num_steps=1500, lr=0.05, seed=0, progress=False)
        assert pyro.param("slope").item() == pytest.approx(0.5, abs=0.05)
        assert pyro.param("scale").item() == pytest.approx(math.sqrt(0.5), abs=0.05)
        assert fit.num_parameters == 2


class TestModelParameters:
    def test_are_trained_and_left_trained(self):
        class Model(PyroModule):
            def __init__(self):
                super().__init__()
                self.decoder = nn.Linear(1, 2)

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        model = Model()
        before = model.decoder.weight.clone()
        fit_svi(model, AutoAmortizedNormal(model), torch.randn(30, 2), num_steps=5, progress=False)
        assert not torch.equal(before, model.decoder.weight)


class TestNaN:
    @staticmethod
    def model(x):
        width = pyro.param("width", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, (width - 0.45).sqrt()), obs=x)

    @pytest.mark.parametrize("validate", [True, False], ids=["validating", "not"])
    def test_stops_at_the_last_good_parameters(self, validate):
        guide = AutoAmortizedNormal(self.model)
        x = 0.01 * DATA
        with pyro.validation_enabled(validate):
            with pytest.raises(RuntimeError, match=r"not finite at step \d+ \(site 'x'.*lr=0.02"):
                fit_svi(self.model, guide, x, lr=0.2, num_steps=200, seed=0, progress=False)
            assert all(parameter.isfinite().all() for parameter in guide.parameters())
            assert pyro.param("width").item() > 0.45
            assert guide.posterior(x).mean["z"].isfinite().all()

    def test_a_site_of_the_guide_is_named(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            scale = pyro.param("scale", torch.tensor(1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, scale * 1e-30))

        with pytest.raises(RuntimeError, match=r"not finite at step 0 \(site 'z' of the guide"):
            fit_svi(model, guide, DATA, num_steps=3, progress=False)


@pytest.mark.parametrize("make", AUTOGUIDES)
@pytest.mark.parametrize("stepped", [False, True], ids=["new", "after a step"])
def test_pyro_s_guides_are_trained(make, stepped):
    x = torch.randn(8)
    guide = make(autoguided)
    if stepped:
        SVI(autoguided, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    fit = fit_svi(autoguided, guide, x, num_steps=30, lr=0.05, seed=0, progress=False)
    assert fit.guide is guide
    assert fit.num_parameters == sum(p.numel() for p in guide.parameters())
    assert fit.losses[-10:].mean() < fit.losses[:10].mean()


class TestCompile:
    @pytest.fixture
    def uncompiled(self, monkeypatch):
        """Graphs run as recorded: a compiler takes seconds for each."""
        monkeypatch.setattr(Graph, "compiled", lambda graph, inputs: graph)

    @staticmethod
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, pyro.param("width", torch.ones(()), dist.constraints.positive)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @staticmethod
    def indexed(x):
        with pyro.plate("data", len(x)) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    @pytest.mark.parametrize("encoder", [None, Table()], ids=["encoder", "table"])
    @pytest.mark.parametrize("batch_size", [None, 16], ids=["all", "batches"])
    @pytest.mark.parametrize("kind", ["model", "indexed"])
    def test_a_seed_gives_the_same_fit_either_way(self, kind, batch_size, encoder, uncompiled):
        def take(compile):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            model = getattr(self, kind)
            guide = AutoAmortizedNormal(model, encoder=encoder)
            options = {"num_steps": 40, "batch_size": batch_size, "seed": 0, "compile": compile, "progress": False}
            return fit_svi(model, guide, DATA, **options)

        plain, graph = take(False), take(True)
        assert plain.compile_seconds == 0 < graph.compile_seconds < graph.seconds
        assert plain.fallback is graph.fallback is None
        torch.testing.assert_close(graph.losses, plain.losses, rtol=1e-4, atol=1e-3)
        assert graph.elbo == pytest.approx(plain.elbo, rel=1e-4)
        assert "compiling" in str(graph)
        assert "compiling" not in str(plain)

    def test_guides_written_by_hand_and_other_losses(self, uncompiled):
        def guide(x):
            pyro.sample("theta", dist.Normal(pyro.param("loc", torch.zeros(())), 0.5))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(pyro.param("slope", torch.zeros(())) * x, 0.7))

        options = {"num_steps": 30, "seed": 0, "progress": False, "loss": Trace_ELBO(num_particles=2)}
        fits = [fit_svi(self.model, guide, DATA, compile=True, **options)]
        pyro.clear_param_store()
        fits.append(fit_svi(self.model, guide, DATA, compile=False, **options))
        torch.testing.assert_close(fits[0].losses, fits[1].losses, rtol=1e-4, atol=1e-3)

    def test_an_automatic_fit_says_in_its_record_why_there_is_no_graph(self):
        def model(x):
            scale = 2.0 if float(x.mean()) > 100 else 1.0
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, scale))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        fit = fit_svi(model, AutoAmortizedNormal(model), DATA, num_steps=300, progress=False)
        assert "Python number or a branch" in fit.fallback
        with pytest.warns(UserWarning, match="Python number or a branch"):
            fit_svi(model, AutoAmortizedNormal(model), DATA, num_steps=5, compile=True, progress=False)

    def test_a_loss_that_has_no_compiled_form(self):
        options = {"num_steps": 5, "loss": RenyiELBO(num_particles=2), "progress": False}
        with pytest.warns(UserWarning, match="RenyiELBO has no compiled form"):
            fit_svi(self.model, AutoAmortizedNormal(self.model), DATA, compile=True, **options)
        fit_svi(self.model, AutoAmortizedNormal(self.model), DATA, **options)

    def test_short_fits_do_not_pay(self):
        fit = fit_svi(self.model, AutoAmortizedNormal(self.model), DATA, num_steps=50, progress=False)
        assert fit.compile_seconds == 0

    def test_errors(self):
        with pytest.raises(ValueError, match="compile='yes'. Expected True, False or 'auto'"):
            fit_svi(self.model, AutoAmortizedNormal(self.model), DATA, compile="yes", progress=False)


@pytest.mark.parametrize("size", [1, 4])
def test_a_guide_with_a_row_for_each_datum_takes_all_rows(size):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.warns(UserWarning, match=f"batch_size={size} is not used, since the guide, AutoNormal"):
        fit = fit_svi(model, AutoNormal(model), torch.randn(12), batch_size=size, num_steps=3, progress=False)
    assert math.isfinite(fit.elbo)
