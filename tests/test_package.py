"""The package as others install and import it."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

NOTHING_GLOBAL = """
import logging, random, warnings
import numpy, pyro, torch
from pyro.poutine.runtime import _PYRO_STACK

def state():
    return [
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.distributions.Distribution._validate_args,
        pyro.settings.get(), list(pyro.get_param_store()), len(_PYRO_STACK), list(warnings.filters),
        random.getstate(), torch.get_rng_state().sum().item(), numpy.random.get_state()[1].sum(),
        logging.getLogger().level, logging.getLogger("pyro").level, torch.get_num_threads(),
    ]

before = state()
import pyro_amortize
assert repr(state()) == repr(before)
import sys
heavy = {"matplotlib", "nutpie", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_changes_nothing_global(tmp_path):
    run(sys.executable, "-W", "error::FutureWarning:arviz", "-c", NOTHING_GLOBAL, cwd=tmp_path)


def test_wheel_and_sdist_import_from_another_directory(tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.stat().st_size < 500_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "pyro_amortize/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "tutorials"))]
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import pyro_amortize as p; print(p.__file__)"
    assert str(tmp_path / "site") in run(sys.executable, "-c", code, cwd=tmp_path)
