"""How benchmarks write down what they found: markdown tables, one section of RESULTS.md a benchmark."""

import datetime
import math
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch

import pyro_amortize

RESULTS = Path(__file__).with_name("RESULTS.md")


def with_error(values):
    """Writes a mean with its standard error."""
    return f"{float(values.mean()):.3f} ± {float(values.std()) / math.sqrt(len(values)):.3f}"


def table(head, rows):
    """Returns the lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def machine():
    """Says on what a benchmark ran, with which versions, and when."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    cpu = name[1] if name else platform.machine()
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "pyro-ppl", "arviz"))
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"{packages}, pyro_amortize {pyro_amortize.__version__}; {datetime.date.today()}."
    )


def write_section(title, text):
    """Puts a section in the place of the one of that title, or at the end of the results."""
    old = RESULTS.read_text() if RESULTS.exists() else "# Results of the benchmarks\n"
    others = re.sub(rf"\n## {title}\n.*?(?=\n## |\Z)", "", old, flags=re.DOTALL)
    RESULTS.write_text(f"{others.rstrip()}\n\n## {title}\n\n{text}\n")
