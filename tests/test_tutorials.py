"""Notebooks agree with the texts that are reviewed, and the demo can be imported. ``make test`` runs the notebooks."""

import json
import re
import runpy
from pathlib import Path

import jupytext
import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
ABSOLUTE = re.compile(r"(?<![\w.:/])(?:/(?:home|Users|root|work|tmp|usr|opt|var|mnt|content)/|[A-Z]:\\\\)")


def cells(path):
    return [(cell.cell_type, cell.source.rstrip()) for cell in jupytext.read(path).cells]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_agrees_with_its_text(self, path):
        assert cells(path) == cells(path.with_suffix(".py"))

    def test_holds_the_outputs_of_a_whole_run_in_order(self, path):
        code = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        kinds = [output.output_type for cell in code for output in cell.outputs]
        assert "stream" in kinds
        assert "display_data" in kinds
        assert "error" not in kinds

    def test_writes_no_log_or_progress_into_the_page(self, path):
        code = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
        assert [output for cell in code for output in cell.outputs if output.get("name") == "stderr"] == []

    def test_is_small_and_can_be_moved(self, path):
        text = path.read_text()
        assert len(text.encode()) < 500_000
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            for output in cell.get("outputs", ()):
                for kind in [kind for kind in output.get("data", ()) if kind.startswith("image/")]:
                    del output["data"][kind]
        assert ABSOLUTE.findall(json.dumps(notebook)) == []
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"

    def test_sets_its_sizes_by_one_variable_and_ends_with_assertions(self, path):
        text = path.with_suffix(".py").read_text()
        assert text.count("PYRO_AMORTIZE_SMOKE") == 1
        kind, last = cells(path)[-1]
        assert kind == "code"
        assert "assert " in last


def test_every_numbered_text_has_a_notebook():
    assert [path.stem for path in sorted(TUTORIALS.glob("[0-9]*.py"))] == [path.stem for path in NOTEBOOKS]


def test_demo_imports_without_running(capsys, monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    scope = runpy.run_path(str(TUTORIALS / "demo.py"), run_name="demo")
    seen, unseen = scope["load_counts"]()
    assert (len(seen), len(unseen)) == (1500, 297)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
