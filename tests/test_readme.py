"""The README's code runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_code_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    assert scope["posterior"].mean["z"].shape == (20,)
    exact = (scope["x_new"] / 0.25 + scope["x"].mean()) / (1 / 0.25 + 1)
    assert (scope["posterior"].mean["z"] - exact).abs().max() < 0.15
    assert "amortization_gap" in capsys.readouterr().out
