"""What benchmarks share: options, clocks, and how they write down what they found.

A result is a section of RESULTS.md, one for each benchmark, with markdown tables. Times are medians with quartiles over
repeats, and the contenders of a repeat run one after the other, so that noise of the machine hits all alike.
"""

import argparse
import datetime
import gzip
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyro_amortize

RESULTS = Path(__file__).with_name("RESULTS.md")


def parser_of(description, sizes):
    """Makes a parser of the command line.

    Args:
        description: What the benchmark measures.
        sizes: Name of an option -> its default, its value with ``--quick``, and its meaning.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of each contender; by default what torch takes")
    parser.add_argument("--quick", action="store_true", help="small sizes, and nothing is written")
    is_quick = "--quick" in sys.argv
    for name, (usual, quick, meaning) in sizes.items():
        meaning = f"{meaning} (default {usual})"
        parser.add_argument(f"--{name}", type=type(usual), default=quick if is_quick else usual, help=meaning)
    return parser


def use_threads(count):
    """Lets this process run on so many cores; libraries with threads of their own look at what it may use."""
    if count is not None:
        torch.set_num_threads(count)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def alone(function, *args, threads=None):
    """Runs a function of a benchmark in a process of its own, with nothing compiled before.

    Returns:
        What it returned, and by how many MB memory had grown at its peak, over that of the imports.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, threads, function, *args))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__}{args} ended with exit code {process.exitcode}.") from None
    process.join()
    return found


def _answer(sender, threads, function, *args):
    use_threads(threads)
    with nothing_compiled():
        before = peak_memory()
        found = function(*args)
        sender.send((found, peak_memory() - before))


@contextmanager
def nothing_compiled():
    """Keeps what earlier runs compiled out of sight."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


@contextmanager
def clock_of_steps(num_steps):
    """Yields a list that afterwards holds when each step of a fit ended; one may be that of several optimizers."""
    times, found = [], []
    hook = register_optimizer_step_post_hook(lambda *_: found.append(time.perf_counter()))
    try:
        yield times
    finally:
        hook.remove()
    each, rest = divmod(len(found), num_steps)
    if each == 0 or rest:
        raise RuntimeError(f"{len(found)} steps of torch's optimizers were seen in {num_steps} steps of a fit.")
    times += found[each - 1 :: each]


def peak_memory():
    """Returns the most memory in MB that this process has held, the pages of mapped files among it."""
    # Not getrusage: its figure starts from that of the process which started this one.
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 1024)


def read_images(path):
    """Returns the images of an idx3-ubyte.gz file, one a row, pixels from 0 to 255."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    magic, count, height, width = (int.from_bytes(raw[i : i + 4], "big") for i in range(0, 16, 4))
    if magic != 2051 or len(raw) != 16 + count * height * width:
        raise SystemExit(f"{path} is no file of images in MNIST's idx format.")
    return torch.frombuffer(raw, dtype=torch.uint8, offset=16).reshape(count, height * width)


def spread(values, digits=3):
    """Writes the median of values, and their quartiles if there are several."""
    if len(values) == 1:
        return shortly(values[0], digits)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{shortly(middle, digits)} ({shortly(low, digits)} to {shortly(high, digits)})"


def shortly(value, digits=3):
    """Writes a number with so many digits, and all of those before the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def ratios(values, peer):
    """Writes the ratio of values to those of a peer, repeat by repeat; where one has fewer, of the first ones."""
    return spread([value / other for value, other in zip(values, peer, strict=False)], 2)


def with_error(values):
    """Writes a mean with its standard error."""
    return f"{float(values.mean()):.3f} ± {float(values.std()) / math.sqrt(len(values)):.3f}"


def table(head, rows):
    """Returns the lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def machine(*packages, threads=None):
    """Says on what a benchmark ran, with which versions (those of ``packages`` among them), and when."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    cpu = name[1] if name else platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "pyro-ppl", "arviz", *packages))
    return (
        f"{cpu}, {os.cpu_count()} cores, {threads or torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, {versions}, pyro_amortize {pyro_amortize.__version__}; "
        f"{datetime.date.today()}."
    )


def publish(title, lines, quick, path=RESULTS):
    """Prints a section, and writes it to a file of results unless it is of a quick run."""
    text = "\n".join(lines)
    print(f"\n{text}")
    if not quick:
        write_section(title, text, path)


def write_section(title, text, path):
    """Puts a section in the place of the one of that title, or at the end of the file."""
    old = path.read_text() if path.exists() else "# Results of the benchmarks\n"
    section = f"\n## {title}\n\n{text}\n"
    there = re.search(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", old, flags=re.DOTALL)
    start, end = there.span() if there else (len(old), len(old))
    path.write_text(old[:start] + section + old[end:])
