"""Long calls, and the rows of them that are looked at."""

import math

import pytest
import torch

from pyro_amortize.calls import Call
from pyro_amortize.excerpt import LARGE, Long, random_rows

N = LARGE + 5_000


def ways(**arguments):
    def model(**kwargs): ...

    return [(long.length, long.axes) for long in Long.ways(Call(model, (), arguments))]


class TestLong:
    def test_short_calls_are_none(self):
        assert ways(x=torch.zeros(LARGE, 2), n=N, name="x") == []

    def test_rows_may_stand_on_any_axis_and_the_longest_come_first(self):
        x, y, genes = torch.zeros(N, 2), torch.zeros(2, N), torch.zeros(3, N + 1)
        expected = [(N + 1, {"genes": 1}), (N, {"x": 0, "batch['y']": 1})]
        assert ways(x=x, batch={"y": y}, genes=genes, short=torch.zeros(3)) == expected

    def test_a_tensor_as_long_along_two_axes_is_ambiguous(self):
        assert ways(square=torch.zeros(1).expand(N, N)) == []

    def test_rows_are_cut_from_all_tensors_that_have_them(self):
        def model(batch, weights): ...

        batch = {"x": torch.arange(2 * N).reshape(2, N), "n": 3}
        (long,) = Long.ways(Call(model, (batch, torch.ones(4)), {}))
        (cut, weights), _ = long.on(torch.tensor([1, N - 1]))
        assert cut["x"].tolist() == [[1, N - 1], [N + 1, 2 * N - 1]]
        assert cut["n"] == 3
        assert len(weights) == 4

    @pytest.mark.parametrize("columns", [1, 3, 100])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_extremes_are_found_wherever_they_stand(self, columns, transposed, monkeypatch):
        monkeypatch.setattr("pyro_amortize.excerpt.CHUNK", 1_000 * columns)
        x = torch.rand(N, columns)
        x[N - 1, 0], x[N - 2, columns - 1], group = 2.0, -1.0, torch.zeros(N, dtype=torch.long)
        group[7_777] = 5
        mask = torch.ones(N, dtype=torch.bool)
        mask[1_234] = False
        arguments = {"x": x.T if transposed else x, "group": group, "mask": mask}
        (long,) = Long.ways(Call(lambda x, group, mask: None, (), arguments))
        found = long.extremes().tolist()
        assert {N - 1, N - 2, 7_777, 1_234} <= set(found)
        assert len(found) <= 2 * columns + 4

    def test_nan_is_an_extreme(self):
        x = torch.rand(N, 2)
        x[N - 3, 1] = math.nan
        (long,) = Long.ways(Call(lambda x: None, (x,), {}))
        assert N - 3 in long.extremes()


class TestRandomRows:
    @pytest.mark.parametrize("count", [1, 3, 8, 10])
    def test_subsets_are_uniform(self, count):
        draws = [random_rows(10, count) for _ in range(4_000)]
        assert all(len(rows) == count and torch.equal(rows, rows.unique()) for rows in draws)
        share = torch.bincount(torch.cat(draws), minlength=10) / len(draws)
        se = math.sqrt(count / 10 * (1 - count / 10) / len(draws))
        assert bool(((share - count / 10).abs() <= 4 * se + 1e-9).all())

    def test_pairs_are_uniform(self):
        draws = torch.stack([random_rows(5, 2) for _ in range(4_000)])
        share = torch.bincount(5 * draws[:, 0] + draws[:, 1])
        assert int((share > 0).sum()) == 10
        assert bool(((share[share > 0] - 400).abs() < 4 * math.sqrt(400 * 0.9)).all())
