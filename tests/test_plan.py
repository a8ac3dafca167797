"""Plans, from facts."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES, SIGMA, TAU, TOTAL
from pyro import poutine

from pyro_amortize import MLP, AmortizationPlan, AutoAmortizedNormal, Constant, plan_amortization
from pyro_amortize.examination import examine
from pyro_amortize.planner import build_plan

cases = pytest.mark.parametrize("name", CASES)


def plan_of(name, rows=None):
    case = CASES[name]
    args, kwargs = case.example(rows)
    return plan_amortization(case.make(), *args, **kwargs)


@cases
def test_plans_of_the_zoo(name):
    case = CASES[name]
    plan = build_plan(examine(case.make(), *case.example()))  # by encoders of an element's own data
    encoded = {site for block in plan.blocks if block.amortized for site in block.sites}
    assert encoded == {plan.turn_of(site)[0] for site in case.amortized}
    assert {site: set(plan.block_of(site).inputs) for site in case.amortized} == case.amortized
    assert tuple(site for block in plan.blocks if not block.amortized for site in block.sites) == case.tables
    assert plan.left_to_model == case.left
    assert plan.verdict.closable is case.closable
    assert plan.verdict.reason
    for block in plan.blocks:
        in_series = set(block.sites) <= set(case.series)
        assert block.closable is (None if not block.amortized else case.closable or bool(case.series) > in_series)
        plates = case.plates.get(block.sites[0], ("n",) if block.amortized else ())
        plates = tuple(plate for plate in plates if plate not in case.own)
        assert block.plates == ((*plates, "steps") if in_series and len(plates) < 2 else plates)
        assert block.dim == sum(block.dims)


@pytest.mark.parametrize("name", ["chain", "linear", "lengths"])
def test_plans_are_those_of_the_default_guide(name):
    case = CASES[name]
    args, kwargs = case.example()
    guide = AutoAmortizedNormal(case.make())
    guide.initialize(*args, **kwargs)
    plan = plan_of(name)
    assert plan.verdict == guide.plan.verdict
    assert [b.reach for b in plan.blocks] == [b.reach for b in guide.plan.blocks]
    assert [b.closable for b in plan.blocks] == [b.closable for b in guide.plan.blocks]


@cases
def test_plans_survive_being_written_as_plain_data(name, tmp_path):
    plan = plan_of(name)
    torch.save(plan.to_dict(), tmp_path / "plan.pt")
    assert AmortizationPlan.from_dict(torch.load(tmp_path / "plan.pt", weights_only=True)) == plan


@cases
def test_plans_print_every_site_once(name):
    case, text = CASES[name], str(plan_of(name))
    for site in case.latents:
        assert plan_of(name).turn_of(site)[0] in text
    header, *rows = text.splitlines()
    assert header.split() == ["block", "sites", "plates", "dim", "parameters", "from", "features", "closable"]
    assert rows[-1].startswith("closable: ")
    assert ("left to the model" in text) is bool(case.left)


@cases
def test_planning_twice_gives_the_same_plan(name):
    assert plan_of(name) == plan_of(name)


def test_plan_as_a_table():
    assert str(plan_of("linear")).splitlines() == [
        "block  sites  plates  dim  parameters from  features  closable",
        "theta  theta  -       1    table of 1       -         -",
        "n      z      n       1    encoder(x)       1         yes",
        "closable: True (rows of 'n' are independent given the globals, and the encoder sees all of a row's data)",
    ]


@pytest.mark.parametrize(
    ("name", "dim", "features"),
    [("ppca", 3, 8), ("supports", 17, 1), ("categorical", 4, 4), ("obs_mask", 1, 2), ("nested_arguments", 1, 3)],
)
def test_dims_and_features(name, dim, features):
    block = plan_of(name).blocks[-1]
    assert (block.dim, block.features) == (dim, features)


def test_rows_of_tables():
    assert plan_of("plate_of_globals").block_of("w").rows == 3
    assert plan_of("subsample_size").block_of("z").rows == 12
    assert plan_of("minibatch").block_of("z").rows == 40


def test_block_of_an_unknown_site_is_none():
    assert plan_of("linear").block_of("y") is None


def test_nothing_amortized():
    plan = plan_of("no_local_latent")
    assert not any(block.amortized for block in plan.blocks)
    assert "nothing is amortized" in plan.verdict.reason


# Verdicts.


def normal(loc=0.0):
    return dist.Normal(torch.as_tensor(loc), 1.0)


def model_of(loc):
    def model(x, c=None):
        theta = pyro.sample("theta", normal())
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", normal(theta + loc(z, x, c)), obs=x)

    return model


@pytest.mark.parametrize(
    ("loc", "closable", "factorizes", "named"),
    [
        (lambda z, x, c: z, True, True, "'n'"),
        (lambda z, x, c: z * c, True, True, "'n'"),
        (lambda z, x, c: z.cumsum(0), False, False, "'z' are coupled through 'x'"),
        (lambda z, x, c: z + x.mean(), False, False, "'x' enters the densities of other rows"),
        (lambda z, x, c: z + c.roll(1), False, False, "'c' enters the densities of other rows"),
        (lambda z, x, c: z + torch.arange(9.0), False, True, "equal data have different densities"),
    ],
    ids=["simple", "covariate", "series", "mean", "neighbour", "index"],
)
def test_verdict(loc, closable, factorizes, named):
    verdict = plan_amortization(model_of(loc), torch.randn(9), torch.randn(9)).verdict
    assert verdict.closable is closable
    assert verdict.factorizes is factorizes
    assert named in verdict.reason


def test_the_saw_series_is_not_closable_from_one_row():
    """z_n ~ N(x_{n-1}, 1), x_n ~ N(a (theta + z_n), 1): section 4.5 of Margossian & Blei (2024)."""

    def model(x):
        theta = pyro.sample("theta", normal())
        before = torch.cat([torch.zeros(1), x[:-1]])
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal(before))
            pyro.sample("x", normal(0.75 * (theta + z)), obs=x)

    plan = plan_amortization(model, torch.randn(20))
    assert plan.verdict.closable is False
    assert "neighbours" in plan.verdict.reason


def test_equal_rows_of_a_covariate_leave_the_verdict_open():
    plan = plan_amortization(model_of(lambda z, x, c: z + c), torch.randn(9), torch.ones(9))
    assert plan.verdict.closable is None
    assert "'c'" in plan.verdict.reason
    assert "inputs=" in plan.verdict.reason


def test_closable_is_the_theorem_for_the_linear_model():
    """There, E q(z_n) is linear in x_n given the optimal q(theta): answer 1 of the known ones."""
    plan = plan_amortization(CASES["linear"].make(), torch.randn(50) * (TAU**2 + SIGMA**2) ** 0.5)
    assert plan.verdict.closable is True
    assert plan.verdict.factorizes


def plan_with(encoder):
    args, _ = CASES["linear"].example()
    guide = AutoAmortizedNormal(CASES["linear"].make(), encoder=encoder)
    guide.initialize(*args)
    return guide.plan


@pytest.mark.parametrize("encoder", [Constant(), {"z": Constant()}, {"n": Constant()}], ids=str)
def test_one_answer_for_all_rows_is_not_taken_for_an_encoder_that_sees_them(encoder):
    plan = plan_with(encoder)
    assert plan.block_of("z").amortized
    assert plan.block_of("z").closable is plan.verdict.closable is False
    assert plan.verdict.factorizes
    assert "Constant()" in plan.verdict.reason
    assert "'z'" in plan.verdict.reason
    assert re.split(" {2,}", str(plan).splitlines()[2])[1:] == ["z", "n", "1", "one row for all", "-", "no"]
    assert AmortizationPlan.from_dict(plan.to_dict()) == plan


def test_one_answer_is_all_that_a_global_needs():
    plan = plan_with({"theta": Constant(), "z": MLP()})
    assert plan.block_of("theta").closable is plan.block_of("z").closable is plan.verdict.closable is True


# Choices.


def test_tables_and_encoders_apart():
    args, _ = CASES["supports"].example()
    facts = examine(CASES["supports"].make(), args, {})
    whole = build_plan(facts)
    assert [block.name for block in whole.blocks] == ["n"]
    apart = build_plan(facts, tables=frozenset(["simplex"]), apart=frozenset(["unit"]))
    assert {block.name: block.amortized for block in apart.blocks} == {"n": True, "unit": True, "simplex": False}
    assert apart.block_of("simplex").rows == 12
    assert "unit" not in apart.block_of("positive").sites


def test_a_plate_of_tables():
    args, _ = CASES["linear"].example()
    facts = examine(CASES["linear"].make(), args, {})
    plan = build_plan(facts, tables=frozenset(["n"]))
    assert {block.name: block.rows for block in plan.blocks} == {"theta": 1, "z": 12}


def inputs_of(inputs, name="covariates_in_likelihood"):
    args, kwargs = CASES[name].example()
    guide = AutoAmortizedNormal(CASES[name].make(), inputs=inputs)
    guide.initialize(*args, **kwargs)
    return guide.plan


@pytest.mark.parametrize("inputs", ["y", ["y"], ("y",), {"n": ["y"]}, {"z": "y"}], ids=str)
def test_inputs_may_be_named(inputs):
    plan = inputs_of(inputs)
    assert plan.block_of("z").inputs == ("y",)
    assert plan.verdict.closable is False
    assert "leaves out 'c'" in plan.verdict.reason


def test_all_inputs_named_in_another_order_close_the_gap():
    plan = inputs_of(["y", "c"])
    assert plan.block_of("z").inputs == ("y", "c")
    assert plan.verdict.closable is True


def test_an_argument_that_the_probe_did_not_find_may_be_named():
    assert inputs_of(["y", "c", "unused"]).block_of("z").inputs == ("y", "c", "unused")


def test_an_observed_site_may_be_named_as_an_input():
    plan = inputs_of(["x"], name="keyword_only")
    assert plan.block_of("z").inputs == ("x",)


def test_inputs_that_are_unknown_are_refused():
    with pytest.raises(ValueError, match=r"'u', which is no observed site and no argument with 12 rows.*Known"):
        inputs_of(["u"])


def test_hidden_sites_are_left_out():
    case = CASES["several_observed"]
    args, kwargs = case.example()
    plan = plan_amortization(poutine.block(case.make(), hide=["b"]), *args, **kwargs)
    assert [block.sites for block in plan.blocks] == [("a",)]


def test_conditioned_latents_are_data():
    model = pyro.condition(CASES["linear"].make(), data={"theta": torch.tensor(0.0)})
    args, kwargs = CASES["linear"].example()
    plan = plan_amortization(model, *args, **kwargs)
    assert [block.sites for block in plan.blocks] == [("z",)]


def test_a_prior_without_data_is_guided_whole():
    def model(scale):
        pyro.sample("a", dist.Normal(torch.tensor(0.0), scale))
        with pyro.plate("k", 3):
            pyro.sample("b", normal())

    plan = plan_amortization(model, 2.0)
    assert [(block.sites, block.rows) for block in plan.blocks] == [(("a",), 1), (("b",), 3)]


@pytest.fixture
def part_of_few(monkeypatch):
    """Counts more than 20 rows as many, and looks at 12 of them and those of the extremes."""
    monkeypatch.setattr("pyro_amortize.excerpt.LARGE", 20)
    monkeypatch.setattr("pyro_amortize.examination.FEW", 12)


def many_rows(monkeypatch, model, *args):
    """Returns the plans from a part of the rows and from all, and whether there was a part."""
    facts = examine(model, args, {})
    monkeypatch.setattr("pyro_amortize.excerpt.LARGE", 10**9)
    return build_plan(facts), build_plan(examine(model, args, {})), facts.part is not None


class TestPartOfTheRows:
    """Of a long call some rows are looked at; the plan is that of all. Closures and indices leave no choice."""

    WITHOUT = ("conditioned", "closure", "forecast", "explicit_subsample")

    @cases
    def test_plans_of_the_zoo_are_those_of_all_rows(self, name, part_of_few, monkeypatch):
        case = CASES[name]
        args, kwargs = case.example(TOTAL if case.resizable else None)
        model = case.make()
        facts = examine(model, args, kwargs)
        assert (facts.part is None) is (name in self.WITHOUT)
        monkeypatch.setattr("pyro_amortize.excerpt.LARGE", 10**9)
        whole = examine(model, args, kwargs)
        assert build_plan(facts) == build_plan(whole)
        assert facts.plates == whole.plates

    def test_groups_nan_and_gaps_of_late_rows_are_seen(self, monkeypatch):
        def model(y, group, mask):
            with pyro.plate("groups", int(group.max()) + 1):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Normal(b[..., group], 1.0))
                there = mask & ~y.isnan()
                with poutine.mask(mask=there):
                    pyro.sample("y", dist.Normal(z, 1.0), obs=y.nan_to_num())

        n = 15_000
        y, group, mask = torch.randn(n), torch.arange(n) * 3 // n, torch.ones(n, dtype=torch.bool)
        y[-2], group[-1], mask[-3] = torch.nan, 7, False
        part, whole, there = many_rows(monkeypatch, model, y, group, mask)
        assert there
        assert part == whole
        assert part.plates == {"groups": 8, "data": n}
        assert part.block_of("z").sources[0].missing

    def test_nan_in_one_late_row_has_a_column(self, monkeypatch):
        def model(y):
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with poutine.mask(mask=~y.isnan()):
                    pyro.sample("y", dist.Normal(z, 1.0), obs=y.nan_to_num())

        y = torch.randn(15_000)
        y[-1] = torch.nan
        guide = AutoAmortizedNormal(model)
        guide.initialize(y)
        assert guide.plan.block_of("z").features == 2
        assert guide.posterior(y[-3:]).mean["z"].isfinite().all()

    def test_a_number_that_depends_on_that_of_the_rows_is_taken_from_all(self, monkeypatch):
        def model(x):
            with pyro.plate("components", int(math.log(len(x)))):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(b.sum(), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        part, whole, there = many_rows(monkeypatch, model, torch.randn(15_000))
        assert not there
        assert part == whole
        assert part.plates["components"] == 9

    def test_models_that_insist_on_their_number_of_rows_are_run_on_all(self, monkeypatch):
        def model(x):
            with pyro.plate("data", 15_000):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        part, whole, there = many_rows(monkeypatch, model, torch.randn(15_000))
        assert not there
        assert part == whole

    def test_nothing_is_changed_by_looking(self):
        def model(x):
            width = pyro.param("width", lambda: torch.ones(len(x)))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, width), obs=x)

        before = torch.get_rng_state()
        x = torch.randn(15_000, generator=torch.Generator().manual_seed(0))
        plan_amortization(model, x)
        assert torch.equal(before, torch.get_rng_state())
        assert "width" not in pyro.get_param_store()
