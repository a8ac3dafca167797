"""Rows pooled into elements and spread over them, against loops."""

import pytest
import torch

from pyro_amortize.pooling import Move, handed_on, pool, spread

LEAD = [(), (3,), (2, 3)]
ROWS, SIZE = 11, 4
INDEX = torch.tensor([0, 2, 2, 0, 3, 3, 3, 0, 2, 0, 2])  # nothing points to element 1


def over(axes, count=2, into=1):
    return Move(count, axes, None, None, 0, True, into)


def along(index=INDEX, axes=(0,), to=1, count=2, size=SIZE, pooled=True):
    return Move(count, axes, to, index, size, pooled, 1)


@pytest.mark.parametrize("lead", LEAD, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_a_plate_is_pooled_over(lead, axis, masked):
    rows = torch.randn(*lead, 5, 7, 2)
    present = torch.rand(5, 7) > 0.4 if masked else None
    found = pool(rows, present, over((axis,)))
    weights = torch.ones(5, 7) if present is None else present.float()
    count = weights.sum(axis, keepdim=True)[..., None]
    mean = (rows * weights[..., None]).sum(axis - 3, keepdim=True) / count.clamp(min=1)
    torch.testing.assert_close(found[..., :-1], mean)
    torch.testing.assert_close(found[..., -1:], count.log1p().expand(*lead, *count.shape))


def test_two_plates_at_once():
    rows = torch.randn(5, 7, 2)
    torch.testing.assert_close(pool(rows, None, over((0, 1)))[0, 0, :2], rows.mean((0, 1)))


def test_what_is_missing_may_be_nan():
    rows, present = torch.randn(5, 1, 2), torch.tensor([1, 0, 1, 1, 0]).bool()[:, None]
    found = pool(torch.where(present[..., None], rows, torch.nan), present, over((0,)))
    torch.testing.assert_close(found[0, 0, :2], rows[present[:, 0], 0].mean(0))


def test_a_set_without_rows_is_zero():
    found = pool(torch.randn(5, 1, 2), torch.zeros(5, 1, dtype=torch.bool), over((0,)))
    assert found.flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("lead", LEAD, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_are_pooled_along_an_index(lead, masked):
    rows = torch.randn(*lead, ROWS, 1, 2)
    present = (torch.rand(ROWS, 1) > 0.4) if masked else None
    found = pool(rows, present, along())
    assert found.shape == (*lead, 1, SIZE, 3)
    for element in range(SIZE):
        mine = INDEX.eq(element) & (torch.ones(ROWS).bool() if present is None else present[:, 0])
        expected = rows[..., mine, 0, :].mean(-2) if mine.any() else torch.zeros(*lead, 2)
        torch.testing.assert_close(found[..., 0, element, :2], expected)
        torch.testing.assert_close(found[..., 0, element, 2], mine.sum().float().log1p().expand(lead))


def test_rows_of_no_element_are_left_out():
    index = torch.where(torch.arange(ROWS) < 3, -1, INDEX)
    rows = torch.randn(ROWS, 1, 2)
    torch.testing.assert_close(pool(rows, None, along(index))[0, 2, :2], rows[3:][INDEX[3:] == 2, 0].mean(0))


def test_an_index_of_several_plates_keeps_the_others():
    """Words by document and place, embedded by a vocabulary, in each of two years."""
    index = torch.randint(SIZE, (5, 7))
    rows = torch.randn(2, 5, 7, 1, 3)  # years, documents, places, vocabulary
    found = pool(rows, None, along(index, (1, 2), 3, 4))
    assert found.shape == (2, 1, 1, SIZE, 4)
    for year in range(2):
        for word in index.unique().tolist():
            torch.testing.assert_close(found[year, 0, 0, word, :3], rows[year, :, :, 0][index == word].mean(0))
    spread_again = spread(found, along(index, (1, 2), 3, 4, pooled=False))
    assert spread_again.shape == (2, 5, 7, 1, 4)
    torch.testing.assert_close(spread_again[1, 2, 3, 0], found[1, 0, 0, index[2, 3]])


@pytest.mark.parametrize("lead", LEAD, ids=str)
def test_elements_are_spread_along_an_index(lead):
    elements = torch.randn(*lead, 1, SIZE, 2)
    found = spread(elements, along(pooled=False))
    assert found.shape == (*lead, ROWS, 1, 2)
    torch.testing.assert_close(found[..., 0, :], elements[..., 0, INDEX, :])


def test_presence_rises_through_levels():
    """Marks in rooms in schools: a school has data if one of its rooms has a mark."""
    marks = torch.tensor([[[True, False], [False, False]], [[False, False], [False, False]]])
    rooms = handed_on(marks, False, over((2,), 3, 1))
    schools = handed_on(rooms, False, over((1,), 3, 2))
    assert rooms.flatten().tolist() == [True, False, False, False]
    assert schools.flatten().tolist() == [True, False]


def test_presence_along_an_index():
    found = handed_on(True, False, along())
    assert found.flatten().tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [([True, False], True), ([False, False], False), ([torch.zeros(3, 1).bool(), True], True)],
    ids=["all below", "nothing observed", "all above"],
)
def test_presence_without_masks(marks, expected):
    assert handed_on(*marks, over((0,))) is expected


def test_spreading_hands_on_no_presence():
    """That a school has data does not make a student's marks present."""
    found = handed_on(True, torch.tensor([[True], [False]]), along(pooled=False))
    assert found.flatten().tolist() == [True, False]
