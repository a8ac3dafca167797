"""What a call's data say: which element each row belongs to, and which elements have no data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_amortize import AutoAmortizedNormal, amortization_gap, fit_mean_field

SCHOOL = torch.arange(6) % 3


def classes_in_schools(y, cls, school, number):
    with pyro.plate("schools", number):
        a = pyro.sample("a", dist.Normal(0.5, 2.0))
    with pyro.plate("classes", len(school)):
        b = pyro.sample("b", dist.Normal(a[..., school], 3.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(b[..., cls], 1.0), obs=y)


def with_the_prior(stddev, of):
    """Elements whose standard deviation is that of the prior; q starts at 0.1."""
    return (stddev == of).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("cls", "classes", "schools"),
    [
        ([0, 1, 2, 3, 4], [5], []),
        ([0, 1, 4, 5, 5], [2, 3], []),
        ([5, 4, 3, 2, 1], [0], []),
        ([0, 2, 3, 5, 0], [1, 4], [1]),
        ([2], [0, 1, 3, 4, 5], [0, 1]),
    ],
    ids=["last class", "middle classes", "first class", "a whole school", "all but one row"],
)
def test_groups_in_groups_without_rows_have_their_prior(cls, classes, schools):
    guide = AutoAmortizedNormal(classes_in_schools)
    guide.initialize(torch.randn(12), torch.arange(12) % 6, SCHOOL, 3)
    answer = guide.posterior(torch.randn(len(cls)), torch.tensor(cls), SCHOOL, 3)
    assert with_the_prior(answer.stddev["b"], 3.0) == classes
    assert with_the_prior(answer.stddev["a"], 2.0) == schools
    given = answer.median["a"][SCHOOL]
    torch.testing.assert_close(answer.mean["b"][classes], given[classes])


def test_groups_in_groups_may_be_of_other_numbers():
    guide = AutoAmortizedNormal(classes_in_schools)
    guide.initialize(torch.randn(10), torch.arange(10) % 5, SCHOOL, 3)  # class 5 has no row
    answer = guide.posterior(torch.randn(8), torch.arange(8), torch.arange(20) % 10, 10)
    assert with_the_prior(answer.stddev["b"], 3.0) == list(range(8, 20))
    assert with_the_prior(answer.stddev["a"], 2.0) == [8, 9]


def masked_rows_of_groups(y, seen, g, number):
    with pyro.plate("groups", int(number)):
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(b[..., g - 1] + z, 1.0), obs=y)


@pytest.mark.parametrize("number", [3, torch.tensor(3)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("missing", "empty"), [([], [2]), ([1, 4], [2]), ([1, 4, 5], [1, 2])], ids=["none", "some", "all of a group"]
)
def test_the_number_of_groups_is_an_argument(number, missing, empty):
    """Groups counted from one, of which the last has no rows."""
    y, g = torch.randn(8), torch.tensor([1, 2, 1, 1, 2, 2, 1, 1])
    seen = ~torch.isin(torch.arange(8), torch.tensor(missing, dtype=torch.long))
    guide = AutoAmortizedNormal(masked_rows_of_groups)
    guide.initialize(y, seen, g, number)
    assert with_the_prior(guide.posterior(y, seen, g, number).stddev["b"], 2.0) == empty


def test_data_and_masks_of_groups_stand_beside_rows_of_an_index():
    def model(y, v, seen, cls, school):
        with pyro.plate("schools", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("classes", len(school)):
            b = pyro.sample("b", dist.Normal(a[..., school], 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("v", dist.Normal(b, 1.0), obs=v)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b[..., cls], 1.0), obs=y)

    seen = torch.tensor([True, False, True, False, True, False])
    args = torch.randn(10), torch.randn(6), seen, torch.arange(10) % 5, SCHOOL
    guide = AutoAmortizedNormal(model)
    guide.initialize(*args)
    answer = guide.posterior(*args)
    assert with_the_prior(answer.stddev["b"], 1.0) == [5]  # neither rows nor v
    y = args[0] + (args[3] == 3)  # the rows of a class whose own v is missing reach its school
    moved = guide.posterior(y, *args[1:]).mean["a"] != answer.mean["a"]
    assert moved.tolist() == [True, False, False]
    options = {"num_steps": 10, "progress": False}
    assert torch.tensor(fit_mean_field(model, *args, **options).elbo).isfinite()
    assert amortization_gap(model, guide, *args, **options).totals is not None
