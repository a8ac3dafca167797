"""How long does one step of SVI take: ours, eager and compiled, Pyro's, plain PyTorch's, NumPyro's?

The models are in ``workloads.py``: variational autoencoders, a linear model with all rows in each step, and a
regression in groups. All contenders have the same loss, with analytic KL divergences where they exist (Pyro's
``JitTrace_ELBO`` has none, and its ``JitTraceMeanField_ELBO`` is left out, since it records a graph anew at every
step), the same networks, and Adam at the same rate. Rows of a minibatch are picked in the step, from a new permutation
an epoch, and each step hands its loss to Python, but for ``lax.scan``, which takes ten steps a call.

A contender first takes some steps that count apart, all compiling among them; what their last losses were is told as a
check that all do the same. Then they take turns. ``fit_svi`` makes its own optimizer and compiles in each fit, so a
turn of it is a fit from the start; the clock stands until it has taken as many first steps, and while it judges the
guide in the end.

Run it with ``python benchmarks/steps.py``, half an hour on two cores, or ``--quick``, five minutes; ``--only`` picks
models. Tables are printed and, unless ``--quick``, written to ``benchmarks/RESULTS.md``.
"""

import time
from functools import partial

import jax
import numpy as np
import numpyro
import pyro
import torch
from pyro.infer import SVI, JitTrace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from results import (
    clock_of_steps,
    machine,
    nothing_compiled,
    parser_of,
    publish,
    ratios,
    shortly,
    spread,
    table,
    use_threads,
)
from workloads import WORKLOADS

from pyro_amortize import AutoAmortizedNormal, CompiledTraceMeanField_ELBO, fit_svi

LR = 1e-3
SCANNED = 10
PEER = "hand-written guide, TraceMeanField_ELBO, SVI.step"
SIZES = {
    "rounds": (7, 2, "turns of each contender"),
    "fit-rounds": (3, 1, "turns of fit_svi, which take longer"),
    "turn": (0.5, 0.05, "seconds of a turn, about"),
    "fit-turn": (1.0, 0.2, "seconds that as many steps of the hand-written guide take as a turn of fit_svi has"),
    "first": (200, 20, "steps that each contender takes before"),
    "only": ("", "", "part of the names of the models to measure"),
}
"""Of each option its default, its value with --quick, and its meaning."""


def main():
    """Measures, prints, and writes."""
    options = parser_of(__doc__, SIZES).parse_args()
    use_threads(options.threads)
    lines = [f"Peer of the ratios: {PEER}. {machine('numpyro', 'jax')}"]
    for name, make in WORKLOADS.items():
        if options.only in name:
            with nothing_compiled():
                lines += ["", f"**{name}**", "", *measured(name, make, options)]
    publish("Seconds of a step", lines, options.quick)


def measured(name, make, options):
    """Lets contenders take turns on a model; returns the lines of a table."""
    pyro.clear_param_store()
    torch.manual_seed(options.seed)
    workload = make()
    data = workload.data()
    rows_of_step = workload.batch or len(data[0])
    runs, seconds, first, losses = {}, {}, {}, {}
    for label, build in CONTENDERS.items():
        torch.manual_seed(options.seed)
        start = time.perf_counter()
        runs[label] = build(make(), data)
        values = runs[label](options.first)
        losses[label] = np.mean(values[-20:]) / rows_of_step
        first[label] = time.perf_counter() - start
        start = time.perf_counter()
        runs[label](SCANNED)
        seconds[label] = (time.perf_counter() - start) / SCANNED
        print(f"{name}: {label}: {1e3 * seconds[label]:.2f} ms, loss {losses[label]:.3f}", flush=True)
    times = {label: [] for label in [*CONTENDERS, *FITS]}
    longer = max(SCANNED, round(options.fit_turn / seconds[PEER]))
    for turn in range(options.rounds):
        for label, run in runs.items():
            times[label].append(timed(run, options.turn / seconds[label]))
        for label, compiling in FITS.items() if turn < options.fit_rounds else ():
            found, until, loss = timed_fit(make(), data, compiling, options.first, longer)
            times[label].append(found)
            first.setdefault(label, until)
            losses.setdefault(label, loss)
    rows = []
    for label, values in times.items():
        took = spread([1e3 * seconds for seconds in values]), ratios(values, times[PEER])
        rows.append((label, *took, shortly(first[label]), f"{losses[label]:.3f}"))
    head = "Contender", "ms a step", "ratio to the peer", f"s of set-up and {options.first} steps", "loss a row then"
    return table(head, rows)


def timed(run, steps):
    """Returns the seconds of a step, of about so many."""
    count = max(1, round(steps / SCANNED)) * SCANNED
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def timed_fit(workload, data, compiling, first, steps):
    """Returns the seconds of a step of ``fit_svi`` after the first ones, those until then, and the losses then."""
    options = {"num_steps": first + steps, "batch_size": workload.batch, "lr": LR, "compile": compiling}
    start = time.perf_counter()
    with clock_of_steps(first + steps) as times:
        fit = fit_svi(workload.model, ours(workload), *data, **options, progress=False)
    seconds = (times[-1] - times[first - 1]) / steps
    return seconds, times[first - 1] - start, float(fit.losses[first - 20 : first].mean()) / len(data[0])


def minibatches(data, size):
    """Yields the rows of a step: parts of a permutation an epoch, or all."""
    while size is None:
        yield data
    while True:
        for rows in torch.randperm(len(data[0])).split(size):
            yield tuple(part[rows] for part in data)


def ours(workload):
    """Returns a generated guide."""
    return AutoAmortizedNormal(workload.model, prepare=None, encoder=workload.our_encoder)


# Contenders: from a workload and data to a function that takes so many steps and returns their losses.


def with_svi(make_guide, make_loss):
    """Makes a contender of Pyro's SVI."""

    def build(workload, data):
        batches = minibatches(data, workload.batch)
        svi = SVI(workload.model, make_guide(workload), Adam({"lr": LR}), make_loss())
        return lambda count: [svi.step(*next(batches)) for _ in range(count)]

    return build


def plain(compiling):
    """Makes a contender of PyTorch alone."""

    def build(workload, data):
        batches = minibatches(data, workload.batch)
        optimizer = torch.optim.Adam(workload.parameters(), lr=LR, fused=True)
        loss_of = torch.compile(workload.loss) if compiling else workload.loss

        def step():
            optimizer.zero_grad()
            loss = loss_of(*next(batches))
            loss.backward()
            optimizer.step()
            return loss.item()

        return lambda count: [step() for _ in range(count)]

    return build


def with_numpyro(scanned):
    """Makes a contender of NumPyro; it takes one step a call, or ten."""

    def build(workload, data):
        arrays = [jax.numpy.asarray(part.numpy()) for part in data]
        size = workload.batch
        indices = minibatches((torch.arange(len(data[0])),), size)
        loss = numpyro.infer.TraceMeanField_ELBO()
        svi = numpyro.infer.SVI(workload.numpyro_model, workload.numpyro_guide, numpyro.optim.Adam(LR), loss)

        def update(state, rows):
            return svi.update(state, *(arrays if size is None else (part[rows] for part in arrays)))

        def picked():
            return next(indices)[0].numpy() if size is not None else 0

        step = jax.jit(update)
        steps = jax.jit(lambda state, rows: jax.lax.scan(update, state, rows))
        state = svi.init(jax.random.PRNGKey(0), *(part[:size] for part in arrays))

        def take(count):
            nonlocal state
            losses = []
            while len(losses) < count:
                if scanned:
                    state, found = steps(state, np.stack([picked() for _ in range(SCANNED)]))
                else:
                    state, found = step(state, picked())
                losses.extend(np.atleast_1d(found))
            return losses

        return take

    return build


def by_hand(workload):
    """Returns the guide that is written by hand."""
    return workload.guide


CONTENDERS = {
    PEER: with_svi(by_hand, TraceMeanField_ELBO),
    "hand-written guide, JitTrace_ELBO, SVI.step": with_svi(by_hand, partial(JitTrace_ELBO, ignore_jit_warnings=True)),
    "hand-written guide, CompiledTraceMeanField_ELBO, SVI.step": with_svi(by_hand, CompiledTraceMeanField_ELBO),
    "our guide, TraceMeanField_ELBO, SVI.step": with_svi(ours, TraceMeanField_ELBO),
    "our guide, CompiledTraceMeanField_ELBO, SVI.step": with_svi(ours, CompiledTraceMeanField_ELBO),
    "PyTorch alone, fused Adam": plain(False),
    "PyTorch alone, fused Adam, torch.compile": plain(True),
    "NumPyro, SVI.update jitted": with_numpyro(False),
    "NumPyro, SVI.update in lax.scan": with_numpyro(True),
}
FITS = {"our guide, fit_svi(compile=False)": False, "our guide, fit_svi(compile=True)": True}


if __name__ == "__main__":
    main()
