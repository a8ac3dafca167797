"""What the probes see of a model, exactly."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import CASES
from pyro import poutine
from torch.nn import functional as F

from pyro_amortize.examination import examine


def normal(loc=0.0):
    return dist.Normal(torch.as_tensor(loc), 1.0)


def local(x, loc, plate="n", **options):
    """A latent z a row, and x observed around a function of it."""
    with pyro.plate(plate, len(x), **options) as i:
        z = pyro.sample("z", normal())
        pyro.sample("x", normal(loc(z, i)), obs=x[i])


def facts(model, *args, **kwargs):
    return examine(model, args, kwargs)


def sources(model, *args, **kwargs):
    return {source.name: source for source in facts(model, *args, **kwargs).sources}


def zoo_sources(name, rows=None):
    case = CASES[name]
    args, kwargs = case.example(rows)
    return sources(case.make(), *args, **kwargs)


# Where data enter.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", {"x": (0, False, (), {"x"}, "x")}),
        ("ppca", {"x": (0, False, (8,), {"x"}, "x")}),
        ("square", {"x": (0, False, (6,), {"x"}, "x")}),
        ("transposed", {"columns": (1, False, (6,), {"x"}, "x")}),
        ("covariates_in_prior", {"c": (0, False, (2,), {"z"}, None), "y": (0, False, (), {"y"}, "y")}),
        ("covariates_in_likelihood", {"c": (0, False, (), {"y"}, None), "y": (0, False, (), {"y"}, "y")}),
        (
            "nested_arguments",
            {"batch['x']": (0, False, (), {"x"}, "x"), "batch['parts'][0]": (0, False, (2,), {"z"}, None)},
        ),
        ("several_observed", {"x": (0, False, (), {"x"}, "x"), "flag": (0, False, (), {"flag"}, "flag")}),
        ("subsample_size", {"x": (0, True, (), {"x"}, "x")}),
        ("pyro_subsample", {"x": (0, True, (), {"x"}, "x")}),
        ("explicit_subsample", {"x": (0, True, (), {"x"}, "x")}),
        ("minibatch", {"x": (0, False, (), {"x"}, "x")}),
        ("closure", {"x": (None, False, (), {"x"}, "x")}),
        ("conditioned", {"x": (None, False, (), {"x"}, "x")}),
        ("plate_at_minus_two", {"x": (0, False, (3,), {"x"}, "x")}),
        ("mask_and_scale", {"x": (0, False, (), {"x"}, "x"), "mask": (0, False, (), {"x"}, None)}),
        ("vae", {"x": (0, False, (4,), {"x"}, "x")}),
        ("forecast", {"x": (0, False, (), {"x"}, "x")}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sources(name, expected):
    found = zoo_sources(name)
    seen = {n: (s.axes and s.axes[0], bool(s.indexed), s.shape, set(s.reaches), s.feeds) for n, s in found.items()}
    assert seen == expected
    assert all(source.plates == ("n",) for source in found.values())
    assert not any(source.couples for source in found.values())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("linear", {"x": ("real", 0)}),
        ("gamma_poisson", {"x": ("count", 0)}),
        ("binomial", {"x": ("level", 0)}),
        ("categorical", {"x": ("category", 4)}),
        ("several_observed", {"x": ("real", 0), "flag": ("binary", 0)}),
        ("mask_and_scale", {"x": ("real", 0), "mask": ("binary", 0)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinds_of_data(name, kinds):
    assert {n: (s.kind, s.categories) for n, s in zoo_sources(name).items()} == kinds


def test_data_seen_through_numpy():
    def model(x, c):
        weights = torch.from_numpy(np.exp(c.numpy()))
        local(x, lambda z, i: z * weights)

    assert set(sources(model, torch.randn(9), torch.randn(9))) == {"x", "c"}


def test_data_written_in_place_and_arguments_kept():
    def model(x, c):
        c.mul_(2)
        local(x, lambda z, i: z + c)

    c = torch.randn(9)
    before = c.clone()
    assert set(sources(model, torch.randn(9), c)) == {"x", "c"}
    assert torch.equal(c, before)


def test_integer_covariates():
    def model(x, group, table):
        local(x, lambda z, i: z + table[group])

    found = sources(model, torch.randn(9), torch.arange(9) % 3, torch.randn(3))
    assert set(found) == {"x", "group", "table"}
    assert (found["table"].axes, found["table"].through) == ((0,), ("group",))


def test_integer_covariates_without_gradient_or_order_are_data_though_they_look_like_indices():
    def model(x, rank):
        local(x, lambda z, i: z + rank.to(z))

    assert set(sources(model, torch.randn(9), torch.randperm(9))) == {"x", "rank"}


def test_index_arguments_are_never_data():
    def model(x, index):
        local(x, lambda z, i: z, subsample=index)

    assert set(sources(model, torch.randn(30), torch.randperm(30)[:7])) == {"x"}


def test_a_permutation_of_all_rows_indexes_the_data():
    def model(x, index):
        local(x, lambda z, i: z, subsample=index)

    assert sources(model, torch.randn(7), torch.randperm(7))["x"].indexed


@pytest.mark.parametrize("seed", range(8))
def test_data_reached_through_a_threshold_only(seed):
    """Few pairs of rows lie on different sides of it."""

    def model(x, weight):
        with poutine.mask(mask=weight > 6):
            local(x, lambda z, i: z)

    torch.manual_seed(seed)
    assert set(sources(model, torch.randn(9), torch.randperm(9).float())) == {"x", "weight"}


def test_data_reached_through_a_scale_only():
    def model(x, weight):
        with poutine.scale(scale=weight.exp()):
            local(x, lambda z, i: z)

    assert set(sources(model, torch.randn(9), torch.randn(9))) == {"x", "weight"}


def test_arguments_of_one_length_that_do_not_enter_are_no_sources():
    def model(x, shared, unused):
        local(x, lambda z, i: z + shared.sum())

    assert set(sources(model, torch.randn(9), torch.randn(9), torch.randn(9, 2))) == {"x"}


@pytest.mark.parametrize("where", ["before", "after"])
def test_random_noise_inside_the_model_is_held(where):
    def model(x, unused):
        def noise():
            return F.dropout(torch.ones(3), 0.5, training=True).sum() + torch.randn(())

        if where == "before":
            before = noise()
            local(x, lambda z, i: z + before)
        else:
            local(x, lambda z, i: z + noise())

    assert set(sources(model, torch.randn(9), torch.randn(9))) == {"x"}


def test_hidden_sites_are_held_like_other_noise():
    case = CASES["several_observed"]
    args, _ = case.example()
    assert set(sources(poutine.block(case.make(), hide=["b"]), *args)) == {"x", "flag"}


def test_a_transformed_argument_does_not_feed_the_site():
    def model(x):
        local(x.log1p(), lambda z, i: z)

    found = sources(model, torch.rand(9))["x"]
    assert found.feeds is None
    assert found.reaches == {"x"}


def test_rows_that_hold_nan_under_a_mask():
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal())
            with poutine.mask(mask=~x.isnan()):
                pyro.sample("x", normal(z), obs=x.nan_to_num())

    x = torch.randn(9)
    assert facts(lambda x: local(x, lambda z, i: z), x).sites["x"].mask is None
    assert facts(model, x).sites["x"].mask == "x"  # all are there, but others need not be
    found = facts(model, torch.where(x > 0.5, torch.nan, x))
    assert found.sites["x"].mask == "x"
    assert found.sources[0].missing


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_sizes_that_agree_do_not_confuse_the_axes(axis):
    def model(x):
        with pyro.plate("n", 5):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(z[:, None].expand(5, 5), 1.0).to_event(1), obs=x if axis == 0 else x.T)

    assert sources(model, torch.randn(5, 5))["x"].axes == (axis,)


# Coupling.


COUPLED_DATA = {
    "centred inside": lambda x: local(x - x.mean(), lambda z, i: z),
    "standardized inside": lambda x: local((x - x.mean()) / x.std(), lambda z, i: z),
    "mean in the likelihood": lambda x: local(x, lambda z, i: z + x.mean()),
    "next row": lambda x: local(x, lambda z, i: z + x.roll(-1)),
    "sum of rows before": lambda x: local(x, lambda z, i: z + x.cumsum(0)),
}
COUPLED_LATENTS = {
    "cumulated": lambda x: local(x, lambda z, i: z.cumsum(0)),
    "rolled": lambda x: local(x, lambda z, i: z.roll(1)),
    "mean": lambda x: local(x, lambda z, i: z + z.mean()),
}


@pytest.mark.parametrize("model", COUPLED_DATA.values(), ids=COUPLED_DATA.keys())
@pytest.mark.parametrize("seed", range(8))
def test_coupled_rows_of_data_are_a_source_all_the_same(model, seed):
    torch.manual_seed(seed)
    found = facts(model, torch.randn(20))
    assert [(source.name, source.axes, source.couples) for source in found.sources] == [("x", (0,), {"n"})]
    assert not found.sites["z"].couples


@pytest.mark.parametrize("model", COUPLED_LATENTS.values(), ids=COUPLED_LATENTS.keys())
def test_coupled_latents(model):
    found = facts(model, torch.randn(9))
    assert found.sites["z"].couples
    assert [(source.name, source.couples) for source in found.sources] == [("x", frozenset())]


@pytest.mark.parametrize("name", ["linear", "supports", "square", "masked_prior", "subsample_size", "plate_of_globals"])
def test_uncoupled_rows(name):
    case = CASES[name]
    args, kwargs = case.example()
    found = examine(case.make(), args, kwargs)
    assert not any(found.sites[site].couples for site in case.amortized)


def test_a_factor_outside_the_plate_couples():
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", normal(z), obs=x)
        pyro.factor("sum_to_zero", -z.sum().square())

    assert facts(model, torch.randn(9)).sites["z"].couples


def test_a_global_that_depends_on_local_latents_couples():
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal())
        total = pyro.sample("total", normal(z.sum()))
        pyro.sample("y", normal(total), obs=x.sum())

    assert facts(model, torch.randn(9)).sites["z"].couples


# Latents.


@pytest.mark.parametrize(
    ("name", "children"),
    [
        ("linear", {"theta": {"x"}, "z": {"x"}}),
        ("covariates_in_prior", {"w": {"z"}, "z": {"y"}}),
        ("several_observed", {"a": {"x", "flag"}, "b": {"x"}}),
        ("plate_of_globals", {"w": {"x"}, "z": {"x"}}),
        ("forecast", {"theta": {"z", "z_new", "prefers_small"}, "z": {"x"}, "z_new": set(), "delta": set()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_children(name, children):
    case = CASES[name]
    args, kwargs = case.example()
    found = examine(case.make(), args, kwargs)
    assert {site.name: set(site.children) for site in found.latents} == children


def test_reach_goes_through_other_latents():
    case = CASES["covariates_in_prior"]
    args, kwargs = case.example()
    assert examine(case.make(), args, kwargs).reaches("w") == {"z", "y"}


def test_unconstrained_shapes_without_plates():
    case = CASES["supports"]
    args, kwargs = case.example()
    found = examine(case.make(), args, kwargs)
    assert {site.name: site.shape for site in found.latents} == {
        "positive": (),
        "unit": (),
        "pair": (2,),
        "simplex": (3,),
        "cholesky": (3,),
        "interval": (),
        "vector": (2, 3),
    }


def test_plates():
    case = CASES["subsample_size"]
    args, kwargs = case.example()
    (plate,) = examine(case.make(), args, kwargs).plates.values()
    assert (plate.name, plate.dim, plate.size, plate.full_size) == ("n", -1, 5, 12)


def grouped(group, y, pick=lambda group: group, loc=lambda b, group: b[group]):
    with pyro.plate("groups", 5):
        b = pyro.sample("b", normal().expand([5]))
    with pyro.plate("n", len(y)):
        pyro.sample("y", normal(loc(b, pick(group))), obs=y)


Y, GROUP = torch.randn(20), torch.arange(20) * 7 % 5
LINKS = {
    "as it stands": (GROUP, lambda group: group, (0, 0)),
    "counted from one": (GROUP + 1, lambda group: group - 1, (0, -1)),
    "one of several columns": (torch.stack([GROUP.flip(0), GROUP], 1), lambda index: index[:, 1], (1, 0)),
}


@pytest.mark.parametrize(("group", "pick", "expected"), LINKS.values(), ids=LINKS.keys())
def test_indexed_groups_are_links(group, pick, expected):
    found = facts(grouped, group, Y, pick)
    assert not found.sites["b"].couples
    (link,) = found.links
    assert (link.rows, link.to, link.argument, link.axes) == (("n",), "groups", "group", (0,))
    assert (link.column, link.offset) == expected


COUPLED_GROUPS = {
    "two elements a row": lambda b, group: b[group] - b[(group + 1) % 5],
    "one element, and a little of all": lambda b, group: b[group] + 1e-2 * b.mean(),
    "running sums": lambda b, group: b.cumsum(0)[group],
}


@pytest.mark.parametrize("loc", COUPLED_GROUPS.values(), ids=COUPLED_GROUPS.keys())
def test_rows_that_depend_on_several_elements_are_no_links(loc):
    found = facts(grouped, GROUP, Y, loc=loc)
    assert found.links == ()
    assert found.sites["b"].couples == {"groups"}


def test_an_index_that_no_argument_holds_is_no_link():
    found = facts(grouped, Y, Y, lambda _: GROUP)
    assert found.links == ()


def test_groups_that_no_row_points_to_do_not_hide_the_link():
    group = torch.tensor([0, 3] * 10)
    (link,) = facts(grouped, group, Y).links
    assert link.argument == "group"


@pytest.mark.parametrize(
    ("data", "plates", "axes", "shape"),
    [
        (torch.randn(6, 5), ("outer", "inner"), (0, 1), ()),
        (torch.randn(5, 5), ("outer", "inner"), (0, 1), ()),
        (torch.randn(6, 5, 3), ("outer", "inner"), (0, 1), (3,)),
        (torch.randn(5, 5, 5), ("outer", "inner"), (0, 1), (5,)),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else "",
)
@pytest.mark.parametrize("transposed", [False, True])
def test_nested_plates_have_an_axis_each(data, plates, axes, shape, transposed):
    def model(y, t):
        y = y.transpose(0, 1) if transposed else y
        with pyro.plate("outer", y.shape[0], dim=-2):
            z = pyro.sample("z", normal())
            with pyro.plate("inner", y.shape[1], dim=-1):
                w = pyro.sample("w", normal(z + t))
                loc = w.reshape(w.shape + (1,) * len(shape)).expand(y.shape)
                pyro.sample("y", dist.Normal(loc, 1.0).to_event(len(shape)), obs=y)

    found = sources(model, data.transpose(0, 1) if transposed else data, torch.randn(data.shape[1]))
    assert (found["y"].plates, found["y"].axes, found["y"].shape) == (plates, axes[::-1] if transposed else axes, shape)
    assert (found["t"].plates, found["t"].axes, found["t"].reaches) == (("inner",), (0,), {"w"})
    assert not found["y"].couples
    assert found["y"].feeds == "y"


def test_deterministic_sites_are_no_sites():
    case = CASES["forecast"]
    args, kwargs = case.example()
    found = examine(case.make(), args, kwargs)
    assert set(found.sites) == {"theta", "delta", "z", "x", "z_new", "prefers_small"}
    assert found.sites["delta"].fixed


def test_masked_out_observations_are_no_data():
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", normal())
            with poutine.mask(mask=False):
                pyro.sample("x", normal(z), obs=x)

    assert "x" not in facts(model, torch.randn(9)).sites


@pytest.mark.parametrize("discrete", ["enumerated", "plain"])
def test_discrete_latents(discrete):
    infer = {"enumerate": "parallel"} if discrete == "enumerated" else {}

    def model(x):
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer=infer)
            pyro.sample("x", normal(k), obs=x)

    site = facts(model, torch.randn(9)).sites["k"]
    assert site.discrete
    assert site.enumerated is (discrete == "enumerated")
    assert site.children == {"x"}


# What a row has beside its arguments.


def test_hidden_knowledge_of_rows():
    secret = torch.randn(9)
    assert facts(lambda x: local(x, lambda z, i: z + secret), torch.randn(9)).hidden["n"] is True
    assert facts(lambda x: local(x, lambda z, i: z + secret.sum()), torch.randn(9)).hidden["n"] is False
    assert facts(lambda x: local(x, lambda z, i: z), torch.randn(1)).hidden["n"] is None


def test_equal_rows_cannot_be_told():
    found = facts(lambda x, c: local(x, lambda z, i: z + c), torch.randn(9), torch.ones(9))
    assert found.indistinct == ("c",)
    assert {source.name for source in found.sources} == {"x"}


def test_masks_of_equal_rows_are_flipped():
    case = CASES["mask_and_scale"]
    found = sources(case.make(), torch.randn(9), torch.ones(9, dtype=torch.bool))
    assert set(found) == {"x", "mask"}


def test_an_argument_that_few_rows_depend_on():
    """Only row 3 of the covariate is used; it informs a row all the same."""

    def model(x, c):
        local(x, lambda z, i: torch.where(torch.arange(9) == 3, z + c, z))

    assert "c" in sources(model, torch.randn(9), torch.randn(9))
