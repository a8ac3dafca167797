"""What the experiments share: fits by all methods alike, their ELBOs on common draws, and how they are told.

A method is a generated guide, told by its options; that whose encoder is a table is F-VI. All are fitted with the same
seeds, optimizer and schedule of learning rates, and all fits are then judged on the same draws.
"""

import io
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.results import clock_of_steps, machine, publish, shortly, spread, table
from pyro_amortize import AutoAmortizedNormal, SVIFit, compare_inference, fit_mean_field, fit_svi

PLACE = Path(__file__).parent
F_VI, CONST, WARM = "F-VI", "const", "F-VI, from the best encoder"
WINDOW = 20
"""Steps over which losses are averaged before they are held against an ELBO, as in the paper."""


@dataclass(frozen=True)
class Run:
    """A fit, and when each of its steps ended, in seconds from the start."""

    fit: SVIFit
    times: np.ndarray

    @property
    def seconds_a_step(self):
        """Median time of a step, which leaves compiling out."""
        return float(np.median(np.diff(self.times)))

    def steps_until(self, elbo):
        """Returns after how many steps the mean of the last losses first says so high an ELBO; infinity for never."""
        means = np.convolve(-self.fit.losses.numpy(), np.ones(WINDOW) / WINDOW, "valid")
        there = np.flatnonzero(means >= elbo)
        return int(there[0]) + WINDOW if len(there) else math.inf


class Experiment:
    """Fits of several methods, with several seeds each, to the same data.

    Args:
        model: A Pyro model.
        args: Its arguments.
        num_seeds: How many seeds.
        svi: Options of every fit, as of ``fit_svi``.

    Attributes:
        runs: Method -> its runs, one a seed.
    """

    def __init__(self, model, *args, num_seeds, **svi):
        self.model, self.args, self.num_seeds, self.svi = model, args, num_seeds, svi
        self.runs = {}

    def fit(self, methods, example=None):
        """Fits generated guides.

        Args:
            methods: Method -> options of its guide.
            example: Arguments to plan from, where the data cannot tell, since all rows are alike.
        """
        for name, options in methods.items():

            def fit(svi, options=options):
                guide = AutoAmortizedNormal(self.model, **options)
                if example is not None:
                    guide.initialize(*example)
                return fit_svi(self.model, guide, *self.args, **svi)

            self._fit(name, fit)

    def fit_warm(self, among, name=WARM, **svi):
        """Fits F-VI from the answer of the best of other methods, seed by seed; with options that differ, if any."""

        def fit(svi):
            best = max((self.runs[method][svi["seed"]].fit for method in among), key=lambda fit: fit.elbo)
            return fit_mean_field(self.model, *self.args, start=best.guide, **svi)

        self._fit(name, fit, **svi)

    def _fit(self, name, fit, **svi):
        self.runs[name] = []
        svi = {**self.svi, **svi}
        for seed in range(self.num_seeds):
            pyro.set_rng_seed(seed)
            start = time.perf_counter()
            with clock_of_steps(svi["num_steps"]) as times:
                found = fit({"seed": seed, "progress": False, **svi})
            self.runs[name].append(Run(found, np.array(times) - start))
            print(f"{name}, seed {seed}: {found}", flush=True)

    def compared(self, num_draws):
        """Returns ELBOs and gaps to the best fit of all, on common draws: index method, seed; columns in nats."""
        fits = {(name, seed): run.fit for name, runs in self.runs.items() for seed, run in enumerate(runs)}
        methods = {f"{name}, seed {seed}": fit for (name, seed), fit in fits.items()}
        found = compare_inference(self.model, *self.args, methods=methods, num_draws=num_draws, progress=False).table
        return found.set_index(pd.MultiIndex.from_tuples(fits, names=["method", "seed"]))

    def steps_until(self, elbo):
        """Returns method -> steps of each seed."""
        return {name: [run.steps_until(elbo) for run in runs] for name, runs in self.runs.items()}

    def seconds_a_step(self, name):
        """Returns the median over seeds."""
        return float(np.median([run.seconds_a_step for run in self.runs[name]]))


def summary(experiment, compared, steps, more=None):
    """Returns the lines of a table with a row a method.

    Args:
        experiment: The fits.
        compared: Their ELBOs, as of :meth:`Experiment.compared`.
        steps: A heading -> method -> steps of each seed to some ELBO.
        more: A heading -> method -> what stands there.
    """
    rows = []
    for name, runs in experiment.runs.items():
        here = compared.loc[name]
        settled = f"{sum(run.fit.converged for run in runs)} of {len(runs)}"
        row = [name, f"{runs[0].fit.num_parameters:,}", settled, spread(here["elbo"].tolist(), 6)]
        row += [f"{spread(here['gap'].tolist())}; {shortly(float(here['gap_se'].max()), 2)}"]
        row += [texts[name] for texts in (more or {}).values()]
        for by_method in steps.values():
            row += [told(by_method[name]), told(times_fewer(by_method[name], by_method[F_VI]), 2)]
        rows.append((*row, f"{1e3 * experiment.seconds_a_step(name):.2f}"))
    columns = [*(more or {}), *(each for head in steps for each in (head, f"times fewer than {F_VI}"))]
    return table(
        ("Method", "parameters", "converged", "ELBO", "gap to the best fit; its se", *columns, "ms a step"), rows
    )


def told(values, digits=1, unit=""):
    """Writes steps of several seeds, or ratios of them, of which some may be infinite."""
    reached = [each for each in values if each < math.inf]
    if not reached:
        return "not reached"
    by = "" if len(reached) == len(values) else f", by {len(reached)} of {len(values)}"
    return spread(reached, digits) + unit + by


def times_fewer(own, peer):
    """Returns how many times fewer steps a method took than a peer, seed by seed, where both arrived."""
    return [theirs / ours for ours, theirs in zip(own, peer, strict=True) if max(ours, theirs) < math.inf]


def claims(rows):
    """Returns the lines of a table of what the paper says: claim, its figure, ours, whether they agree, and why."""
    head = "The paper says", "its figure", "here", "agrees", "why"
    return table(head, [(*row[:3], "yes" if row[3] else "**no**", *row[4:]) for row in rows])


def colors_of(names):
    """Returns a color for each method: black and greys for F-VI, red for const, as in the paper."""
    f_vi = [name for name in names if name.startswith(F_VI)]
    encoders = [name for name in names if name not in (*f_vi, CONST)]
    shades = colormaps["viridis"](np.linspace(0.1, 0.9, max(1, len(encoders))))
    colors = dict(zip(f_vi, ("black", "0.45", "0.65"), strict=False)) | dict(zip(encoders, shades, strict=False))
    return {name: colors.get(name, "red") for name in names}


def draw_curves(axes, experiment, best, floor, colors):
    """Draws how far the loss of every fit is from the best ELBO, the best at the top.

    Args:
        axes: Where, against steps, and against seconds: steps at the median time of one.
        experiment: The fits.
        best: The ELBO at the top.
        floor: Nats below which distances are not told apart.
        colors: Method -> its color; others are left out.
    """
    for name, color in colors.items():
        for run in experiment.runs[name]:
            losses = run.fit.losses.double().numpy()
            edges = np.unique(np.geomspace(1, len(losses), 80).astype(int))
            behind = np.add.reduceat(losses, edges[:-1] - 1) / np.diff(np.append(edges[:-1], len(losses) + 1)) + best
            first = run is experiment.runs[name][0]
            style = {"color": color, "linewidth": 0.9, "alpha": 0.8, "label": name if first else None}
            for axis, unit in zip(axes, (1.0, experiment.seconds_a_step(name)), strict=True):
                axis.plot(edges[:-1] * unit, np.maximum(behind, floor), **style)
    for axis, xlabel in zip(axes, ("step", "seconds, without compiling"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="nats below the best ELBO")
        axis.invert_yaxis()
    axes[0].legend(framealpha=0.8, edgecolor="none", fontsize="xx-small", loc="best")


def draw_steps(axis, steps, most, xlabel):
    """Draws boxes of the steps of every method, those that did not arrive at the right end."""
    values = [[min(each, most) for each in of_seeds] for of_seeds in steps.values()]
    axis.boxplot(values, orientation="horizontal", tick_labels=list(steps), patch_artist=True)
    axis.axvline(most, color="0.6", linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel=xlabel)
    axis.set_xlim(left=0.8 * min(each for of_method in values for each in of_method))
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.invert_yaxis()


def draw_gaps(axis, labels, series, floor, lines=None):
    """Draws gaps, a point a seed and a line through the medians, on a scale that is linear below ``floor`` nats.

    Args:
        axis: Where.
        labels: What stands below each place.
        series: What -> for each place the gaps of all seeds.
        floor: In nats.
        lines: What -> a gap and a color, drawn as a level line.
    """
    for color, (name, gaps) in enumerate(series.items()):
        for place, values in enumerate(gaps):
            axis.plot([place] * len(values), values, "o", markersize=3, color=f"C{color}", alpha=0.6)
        axis.plot([np.median(values) for values in gaps], color=f"C{color}", linewidth=1, label=name)
    for name, (gap, color) in (lines or {}).items():
        axis.axhline(gap, color=color, linewidth=1, linestyle="--", label=name)
    axis.set_yscale("symlog", linthresh=floor)
    axis.set_ylim(bottom=-floor / 2)
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylabel("gap to the best, nats")
    axis.legend(frameon=False, fontsize="xx-small")


def new_figure(*titles):
    """Returns a figure with a panel for each title, and the panels."""
    figure = Figure(figsize=(4.2 * len(titles), 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(titles)))
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize="small")
    return figure, axes


def show(figure, name, caption, quick):
    """Writes a figure next to the results, unless of a quick run; returns the line that shows it there."""
    figure.savefig(io.BytesIO() if quick else PLACE / f"{name}.png", dpi=80, format="png")
    return f"![{caption}]({name}.png)"


def report(title, what, lines, options):
    """Prints a section, and writes it to the results of the paper unless it is of a quick run."""
    head = f"{what} {machine(threads=options.threads)}"
    publish(title, [head, "", *lines], options.quick, PLACE / "RESULTS.md")
