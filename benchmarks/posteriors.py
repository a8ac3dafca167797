"""How long do posteriors of 100,000 rows take that nothing was fitted to, and how much memory?

``guide.posterior(x).mean`` and ``.stddev`` are set against the bare encoder, its layers called directly without a
gradient, which is the least that any guide could take; on all rows at once and in chunks. The rest is what one would do
without an encoder: search for the parameters of each row (our ``fit_optimum``; Pyro's ``AutoNormal``, 1,000 steps of
SVI), and sample each row (``run_mcmc``, one chain, 1,000 draws after 1,000 of warm-up). These are done for a few
hundred rows, side by side, with globals held, and *extrapolated* to all in proportion.

Three models: a number a row below a global mean, with an encoder of two layers of 64; and variational autoencoders
784-32-20 and 784-400-20. Rows are mapped from a file; each contender's memory is measured in a process of its own,
from after the guide was trained, and counts the rows as they are read.

Run it with ``python benchmarks/posteriors.py``, twenty minutes on two cores, or ``--quick``, two minutes; ``--only``
picks a model. Tables are printed and, unless ``--quick``, written to ``benchmarks/RESULTS.md``.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam, ClippedAdam
from results import alone, machine, parser_of, peak_memory, publish, ratios, shortly, spread, table
from torch import nn
from torch.nn.functional import softplus

from pyro_amortize import MLP, AutoAmortizedNormal, fit_optimum, run_mcmc

CODE, PIXELS, TRAINED_ON = 20, 784, 2048
SIZES = {
    "rows": (100_000, 4000, "unseen rows"),
    "rounds": (9, 2, "turns of the guide and the bare encoder"),
    "some": (300, 20, "rows to extrapolate from, by search"),
    "sampled": (100, 4, "rows to extrapolate from, by MCMC"),
    "training": (500, 50, "steps of training the guide"),
    "steps": (1000, 50, "steps of AutoNormal, and draws and warm-up of MCMC"),
    "only": ("", "", "part of the names of the models to measure"),
}
"""Of each option its default, its value with --quick, and its meaning."""


class Linear(PyroModule):
    """A number a row, a latent for each, below a global mean."""

    width, encoder = 1, MLP((64, 64))

    def forward(self, x):
        theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


class VAE(PyroModule):
    """Binary pixels explained by a code."""

    width = PIXELS

    def __init__(self, hidden):
        super().__init__()
        self.encoder = MLP((hidden,), activation=nn.Softplus)
        self.decoder = nn.Sequential(nn.Linear(CODE, hidden), nn.Softplus(), nn.Linear(hidden, PIXELS))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(CODE), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


MODELS = {
    "linear, a number a row": Linear,
    "VAE 784-32-20": partial(VAE, 32),
    "VAE 784-400-20": partial(VAE, 400),
}


def main():
    """Measures, prints, and writes."""
    options = parser_of(__doc__, SIZES).parse_args()
    lines = [f"{options.rows:,} rows; {machine(threads=options.threads)}"]
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in MODELS.items():
            if options.only in name:
                path = written(Path(folder, "data"), options.rows, kind().width, options.seed)
                lines += ["", f"**{name}**", "", *measured(path, name, options)]
    publish("Posteriors of unseen rows", lines, options.quick)


def measured(path, name, options):
    """Runs the contenders on a model; returns the lines of a table."""
    rows = []
    for chunk in (options.rows, 10_000, 1000):
        if chunk > options.rows:
            continue
        times, _ = alone(take_turns, path, name, chunk, options, threads=options.threads)
        for label in ANSWERS:
            memory, _ = alone(memory_of, path, name, chunk, label, options, threads=options.threads)
            what = f"{label}, {'at once' if chunk == options.rows else f'{chunk:,} rows a chunk'}"
            rows.append((what, spread(times[label]), ratios(times[label], times[BARE]), shortly(memory), ""))
            print(name, *rows[-1][:4], sep=" | ", flush=True)
    bare = times[BARE]
    counts = {"fit_optimum": options.some, "AutoNormal, SVI": options.some, "run_mcmc": options.sampled}
    for label, count in counts.items():
        (seconds, memory), _ = alone(without_encoder, path, name, label, count, options, threads=options.threads)
        total = seconds * options.rows / count
        ratio = shortly(total / float(np.median(bare)), 2)
        rows.append((label, shortly(total), ratio, shortly(memory), f"{shortly(seconds)} s for {count} rows"))
        print(name, *rows[-1], sep=" | ", flush=True)
    return table(("Contender", "s", f"ratio to {BARE}", "peak MB", "extrapolated from"), rows)


def guide_answer(guide, x):
    """Returns mean and standard deviation by the guide."""
    posterior = guide.posterior(x)
    return posterior.mean["z"], posterior.stddev["z"]


@torch.no_grad()
def bare_answer(guide, x):
    """Returns mean and standard deviation by the layers of the guide's encoder."""
    (parameters,) = guide.coder_of(guide.plan.block_of("z"))(x)
    loc, raw = parameters.chunk(2, -1)
    return loc, softplus(raw)


BARE = "the bare encoder"
ANSWERS = {"guide.posterior": guide_answer, BARE: bare_answer}


def take_turns(path, name, chunk, options):
    """Lets the guide and the bare encoder take turns; returns their seconds."""
    x, _, guide = prepared(path, name, options)
    ours, bare = (answer(guide, x[:100]) for answer in ANSWERS.values())
    torch.testing.assert_close(ours[0].reshape(100, -1), bare[0])
    torch.testing.assert_close(ours[1].reshape(100, -1), bare[1])
    times = {label: [] for label in ANSWERS}
    for turn in range(options.rounds + 1):
        for label, answer in ANSWERS.items():
            start = time.perf_counter()
            in_chunks(answer, guide, x, chunk)
            if turn:  # the first reads the file
                times[label].append(time.perf_counter() - start)
    return times


def memory_of(path, name, chunk, label, options):
    """Returns by how many MB the answer for all rows raised the peak of memory."""
    x, _, guide = prepared(path, name, options)
    before = peak_memory()
    in_chunks(ANSWERS[label], guide, x, chunk)
    return peak_memory() - before


def in_chunks(answer, guide, x, chunk):
    """Returns means and standard deviations of all rows."""
    return [torch.cat(parts) for parts in zip(*(answer(guide, part) for part in x.split(chunk)), strict=True)]


def without_encoder(path, name, label, count, options):
    """Returns the seconds and the growth of memory of a method that starts from nothing for each row."""
    x, model, guide = prepared(path, name, options)
    x = x[:count].clone()
    medians = guide.median(x)
    held = {site: value for site, value in medians.items() if site != "z"}
    before, start = peak_memory(), time.perf_counter()
    if label == "fit_optimum":
        fit_optimum(model, guide, x, progress=False)
    elif label == "run_mcmc":
        lengths = {"num_samples": options.steps, "warmup_steps": options.steps, "num_chains": 1}
        run_mcmc(model, x, given=held, seed=options.seed, progress=False, **lengths)
    else:
        model.requires_grad_(False)
        conditioned = poutine.condition(model, data=held)
        optim = ClippedAdam({"lr": 0.01, "lrd": 0.1 ** (1 / options.steps)})
        svi = SVI(conditioned, AutoNormal(conditioned), optim, Trace_ELBO())
        for _ in range(options.steps):
            svi.step(x)
    return time.perf_counter() - start, peak_memory() - before


def prepared(path, name, options):
    """Returns the rows, the model, and its guide, trained on a few of them."""
    pyro.set_rng_seed(options.seed)
    model = MODELS[name]()
    x = torch.from_file(str(path), shared=True, size=options.rows * model.width).reshape(-1, model.width)
    guide = AutoAmortizedNormal(model, prepare=None, encoder=model.encoder)
    svi = SVI(model, guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    for _ in range(options.training):
        svi.step(x[torch.randint(TRAINED_ON, (128,))])
    return x, model, guide


def written(path, rows, width, seed):
    """Writes data to a file, part by part; returns its path."""
    generator = np.random.default_rng(seed)
    values = np.memmap(path, np.float32, "w+", shape=(rows, width))
    weights = generator.standard_normal((CODE, width), np.float32)
    for start in range(0, rows, 10_000):
        part = values[start : start + 10_000]
        if width > 1:
            part[:] = generator.standard_normal((len(part), CODE), np.float32) @ weights > 3
        else:
            part[:] = 3 + 2**0.5 * generator.standard_normal(part.shape, np.float32)
    values.flush()
    return path


if __name__ == "__main__":
    main()
