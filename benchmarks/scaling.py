"""An encoder or a table: how do time, parameters and memory grow with the rows of the data?

The linear model (theta ~ N(0, 10), z_n ~ N(theta, 1), x_n ~ N(z_n, 1)) is fitted to 10^3 to 10^6 rows with an encoder
(A-VI, ``fit_svi``) and with a row of parameters for each datum (F-VI, ``fit_mean_field``), both in minibatches of 1,000
and by the same schedule; A-VI also to 10^7 rows. When has the loss, averaged over 50 steps, come to within 1 % of
the best ELBO that any fit to these rows ended with? Where F-VI does not in as many steps as A-VI, it is given four
times as many, once, and again, up to ``--longest``.

Each fit runs in a process of its own, on data in a file that is mapped into memory. Seconds count from the start of
the fit: set-up, compiling, steps. The ELBO on all rows in the end, which tells what "best" is, is told apart.

Run it with ``python benchmarks/scaling.py``, an hour on two cores, or ``--quick``, two minutes. Tables are printed and,
unless ``--quick``, written to ``benchmarks/RESULTS.md``.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from results import alone, clock_of_steps, machine, parser_of, publish, ratios, shortly, spread, table

from pyro_amortize import AutoAmortizedNormal, fit_mean_field, fit_svi

AMORTIZED, MEAN_FIELD = "A-VI", "F-VI"
WINDOW, WITHIN = 50, 0.01
SIZES = {
    "rows": (10**6, 10**4, "most rows for both"),
    "most-rows": (10**7, 10**5, "most rows for A-VI"),
    "steps": (2000, 300, "steps of a fit"),
    "longest": (32_000, 1200, "most steps of F-VI"),
    "batch": (1000, 500, "rows of a step"),
    "rounds": (3, 1, "fits of each method, with as many seeds"),
}
"""Of each option its default, its value with --quick, and its meaning."""


@dataclass(frozen=True)
class Fit:
    """What is kept of a fit."""

    losses: np.ndarray
    elbo: float
    num_parameters: int
    times: np.ndarray
    """When each step ended, in seconds from the start; then when all was done."""


def main():
    """Measures, prints, and writes."""
    options = parser_of(__doc__, SIZES).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (10**power for power in range(3, 8)):
            if size <= max(options.rows, options.most_rows):
                path = written(Path(folder, "data"), size, options.seed)
                rows += measured(path, size, options)
    head = ("Rows", "Method", "steps", "parameters", "ms a step", "s to the first", "steps to 1 %")
    head += ("s to 1 %", "ratio to F-VI", "s of the last ELBO", "ELBO a row", "peak MB")
    what = f"Batches of {options.batch:,}, {options.rounds} seeds; {machine(threads=options.threads)}"
    publish("An encoder or a table", [what, "", *table(head, rows)], options.quick)


def measured(path, size, options):
    """Fits by both methods, and by F-VI for longer; returns rows of the table."""
    methods = [AMORTIZED, MEAN_FIELD] if size <= options.rows else [AMORTIZED]
    found = {(method, options.steps): [] for method in methods}
    for turn in range(options.rounds):
        for method in methods:
            found[method, options.steps].append(fitted(path, size, method, options.steps, options.seed + turn, options))
    steps = options.steps
    while MEAN_FIELD in methods and steps < options.longest and not arrived(found, (MEAN_FIELD, steps)):
        steps *= 4
        found[MEAN_FIELD, steps] = [fitted(path, size, MEAN_FIELD, steps, options.seed, options)]
    peer = arrived(found, (MEAN_FIELD, steps)) if MEAN_FIELD in methods else None
    return [row(size, kind, runs, arrived(found, kind), peer) for kind, runs in found.items()]


def fitted(path, size, method, steps, seed, options):
    """Fits in a process of its own; returns the fit and the peak of its memory."""
    fit, memory = alone(fit_rows, path, size, method, steps, options.batch, seed, threads=options.threads)
    print(f"{size:,} rows, {method}, {steps} steps: {fit.elbo / size:.4f} nats a row, {memory:.0f} MB", flush=True)
    return fit, memory


def arrived(found, kind):
    """Returns for each fit of a kind at which step it came close to the best, and in how many seconds; or None."""
    best = max(fit.elbo for runs in found.values() for fit, _ in runs)
    places = []
    for fit, _ in found[kind]:
        means = np.convolve(fit.losses, np.ones(WINDOW) / WINDOW, "valid")
        close = np.flatnonzero(means <= -best + WITHIN * abs(best))
        if not len(close):
            return None
        step = close[0] + WINDOW
        places.append((step, fit.times[step - 1]))
    return places


def row(size, kind, runs, places, peer):
    """Returns a row of the table."""
    method, steps = kind
    fits = [fit for fit, _ in runs]
    when = ["not reached", "", ""]
    if places is not None:
        took, seconds = zip(*places, strict=True)
        when = [spread(took), spread(seconds), ratios(seconds, [s for _, s in peer]) if peer is not None else ""]
    return (
        f"{size:,}",
        method,
        f"{steps:,}",
        f"{fits[0].num_parameters:,}",
        spread([1e3 * float(np.median(np.diff(fit.times[:-1]))) for fit in fits]),
        spread([fit.times[0] for fit in fits]),
        *when,
        spread([fit.times[-1] - fit.times[-2] for fit in fits]),
        f"{max(fit.elbo for fit in fits) / size:.4f}",
        shortly(max(memory for _, memory in runs)),
    )


def model(x):
    """The linear model."""
    theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def fit_rows(path, size, method, steps, batch, seed):
    """Fits by a method."""
    x = torch.from_file(str(path), shared=True, size=size)
    options = {"num_steps": steps, "batch_size": batch, "seed": seed, "progress": False}
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    with clock_of_steps(steps) as times:
        if method == AMORTIZED:
            fit = fit_svi(model, AutoAmortizedNormal(model), x, **options)
        else:
            fit = fit_mean_field(model, x, **options)
    times = np.array([*times, time.perf_counter()]) - start
    return Fit(fit.losses.numpy(), fit.elbo, fit.num_parameters, times)


def written(path, size, seed):
    """Writes data to a file, part by part; returns its path."""
    generator = np.random.default_rng(seed)
    values = np.memmap(path, np.float32, "w+", shape=(size,))
    for start in range(0, size, 10**6):
        part = values[start : start + 10**6]
        part[:] = 3 + 2**0.5 * generator.standard_normal(len(part), np.float32)
    values.flush()
    return path


if __name__ == "__main__":
    main()
