"""Benchmarks: results take each other's place, and the experiments of the paper run and know their answers."""

import gzip
import importlib
import math
from argparse import Namespace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import Constant, Table

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "benchmarks" / "paper"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def imported(name):
    return importlib.import_module(f"benchmarks.{name}")


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("name", sorted(path.stem for path in PAPER.glob("*.py")))
def test_experiments_can_be_imported(name):
    assert imported(f"paper.{name}").__doc__


def test_methods_are_fitted_alike_and_told_side_by_side():
    paper, x = imported("paper.experiment"), torch.linspace(-2, 2, 9)
    fits = paper.Experiment(model, x, num_seeds=2, num_steps=50, lr=0.05)
    fits.fit({paper.F_VI: {"encoder": Table()}, paper.CONST: {"encoder": Constant()}})
    fits.fit_warm([paper.CONST])
    compared = fits.compared(50)
    assert list(compared.index) == [(name, seed) for name in (paper.F_VI, paper.CONST, paper.WARM) for seed in (0, 1)]
    assert compared["gap"].min() == 0
    steps = fits.steps_until(float(compared["elbo"].min()) - 5)
    lines = paper.summary(fits, compared, {"steps": steps})
    assert [line.split(" | ")[1] for line in lines[2:]] == ["18", "2", "18"]

    figure, (*curves, gaps, boxes) = paper.new_figure("by step", "by time", "gaps", "steps")
    paper.draw_curves(curves, fits, float(compared["elbo"].max()), 0.1, paper.colors_of(fits.runs))
    paper.draw_gaps(gaps, ["const"], {"A-VI": [compared.loc[paper.CONST, "gap"]]}, 1.0, {"F-VI": (0.0, "black")})
    paper.draw_steps(boxes, steps, 50, "steps")
    assert paper.show(figure, "none", "A figure", quick=True) == "![A figure](none.png)"
    assert not (PAPER / "none.png").exists()


def test_colors_are_the_papers():
    paper = imported("paper.experiment")
    colors = paper.colors_of([paper.F_VI, "k = 1", paper.WARM, paper.CONST, "k = 2"])
    assert list(colors) == [paper.F_VI, "k = 1", paper.WARM, paper.CONST, "k = 2"]
    assert (colors[paper.F_VI], colors[paper.WARM], colors[paper.CONST]) == ("black", "0.45", "red")
    assert tuple(colors["k = 1"]) != tuple(colors["k = 2"])
    assert paper.colors_of([paper.CONST]) == {paper.CONST: "red"}


def test_steps_of_seeds_that_did_not_arrive():
    paper = imported("paper.experiment")
    assert paper.told([100, 200, math.inf], 3) == "150 (125 to 175), by 2 of 3"
    assert paper.told([math.inf], 2, " times") == "not reached"
    assert paper.times_fewer([100, math.inf, 50], [200, 300, math.inf]) == [2.0]


def test_a_quick_run_writes_nothing(capsys):
    before = (PAPER / "RESULTS.md").read_text()
    imported("paper.experiment").report("A title", "What it was.", ["A line"], Namespace(quick=True, threads=1))
    assert "A line" in capsys.readouterr().out
    assert (PAPER / "RESULTS.md").read_text() == before


def test_a_section_takes_the_place_of_the_one_of_its_title(tmp_path):
    path = tmp_path / "RESULTS.md"
    write_section = imported("results").write_section
    for title, text in (("One (of 2)", "1"), ("Two", "2"), ("One (of 2)", "3\n\n### Part"), ("Three", "4")):
        write_section(title, text, path)
    sections = "## One (of 2)\n\n3\n\n### Part\n\n## Two\n\n2\n\n## Three\n\n4\n"
    assert path.read_text() == f"# Results of the benchmarks\n\n{sections}"


def test_images_are_read_and_other_files_refused(tmp_path):
    read_images, path = imported("results").read_images, tmp_path / "images.gz"
    header = b"".join(number.to_bytes(4, "big") for number in (2051, 2, 1, 3))
    path.write_bytes(gzip.compress(header + bytes(range(6))))
    assert read_images(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(gzip.compress(header + bytes(5)))
    with pytest.raises(SystemExit, match=r"images\.gz is no file of images"):
        read_images(path)


class TestKnownAnswers:
    """Closed forms beside which the experiments set their fits."""

    def test_linear(self, monkeypatch):
        linear = imported("paper.linear")
        torch.manual_seed(11)
        x = torch.randn(500, dtype=torch.float64) * math.sqrt(linear.TOTAL)
        assert linear.approximation_gap(10_000) == pytest.approx(0.101845, abs=1e-6)
        monkeypatch.setattr(linear, "THETA", 10.0)
        assert linear.log_evidence(x) == pytest.approx(-1216.52714, abs=1e-5)
        assert linear.known_optima(x)["F-VI"] == pytest.approx(-1216.62897, abs=1e-5)

    def test_saw(self):
        saw = imported("paper.saw")
        x = saw.data(1000)
        torch.testing.assert_close(x[:5], torch.tensor([3.17612195, 5.44603682, 7.10823059, 8.09708118, 6.85961342]))
        known = saw.known_losses(x.double())
        found = [known[name] for name in ("F-VI", "const", "x_n, linear", "(x_{n-1}, x_n), linear")]
        assert found == pytest.approx([553.0139, 2933.567, 892.634, 553.0139], abs=1e-3)

    def test_hmm(self):
        hmm = imported("paper.hmm")
        x = torch.ones(hmm.COUNT, dtype=torch.float64)
        gaps = [hmm.gap_of_means(hmm.best_window(x, radius), x) for radius in hmm.RADII]
        assert gaps == pytest.approx([0.186033, 0.023756, 0.0034027, 0.00049491], rel=1e-4)
        assert int((hmm.papers_eigenvalues() < 0).sum()) == 23
        assert float((hmm.flat_means() - 1).abs().max()) < 1e-12

    def test_closed_forms(self):
        closed = imported("paper.closed_forms")
        precision = torch.eye(3, dtype=torch.float64) + closed.W.T @ closed.W / closed.NOISE
        gap = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
        assert gap == pytest.approx(0.290920, abs=1e-6)
