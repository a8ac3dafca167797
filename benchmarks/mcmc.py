"""How many seconds does NUTS take for each effective sample: ours, Pyro's, NumPyro's?

The model has a latent for each of 500 rows, 502 in all: theta ~ N(0, 3), s ~ LogNormal(0, 1), z_n ~ N(theta, 1),
y_n ~ N(z_n X_n, s). Each sampler runs one chain of 1,000 draws after 1,000 of warm-up (ours also four, its default), in
a process of its own that has compiled only something small before; seconds count compiling and not imports. The
effective sample size is the bulk one by ArviZ, of the element where it is least. All tell the posterior mean of s,
which should agree.

Run it with ``python benchmarks/mcmc.py``, half an hour on two cores, or ``--quick``, two minutes; ``--only`` picks
samplers. Tables are printed and, unless ``--quick``, written to ``benchmarks/RESULTS.md``.
"""

import time
import warnings

import jax
import numpy as np
import numpyro
import numpyro.distributions as nd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from results import alone, machine, parser_of, publish, ratios, shortly, spread, table

from pyro_amortize import run_mcmc
from pyro_amortize.arviz_bridge import ess
from pyro_amortize.capture import record
from pyro_amortize.nuts import import_nutpie

PEER = "Pyro's NUTS"
SIZES = {
    "rounds": (3, 1, "runs of each sampler"),
    "rows": (500, 50, "rows of the model"),
    "draws": (1000, 100, "draws, and as many of warm-up"),
    "only": ("", "", "part of the names of the samplers to run; the peer always runs"),
}
"""Of each option its default, its value with --quick, and its meaning."""


def model(x, y):
    """The model, for Pyro."""
    theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("y", dist.Normal(z * x, s), obs=y)


def numpyro_model(x, y):
    """The model, for NumPyro."""
    theta = numpyro.sample("theta", nd.Normal(0.0, 3.0))
    s = numpyro.sample("s", nd.LogNormal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", nd.Normal(theta, 1.0))
        numpyro.sample("y", nd.Normal(z * x, s), obs=y)


def main():
    """Measures, prints, and writes."""
    options = parser_of(__doc__, SIZES).parse_args()
    chosen = [name for name in SAMPLERS if options.only in name or name == PEER]
    found = {name: [] for name in chosen}
    for turn in range(options.rounds):
        for name in chosen:
            sizes = options.rows, options.draws, options.seed + turn
            answer, memory = alone(measured, name, *sizes, threads=options.threads)
            found[name].append((*answer, memory))
            print(f"{name}: {answer[0]:.2f} s, least effective sample size {answer[1]:.0f}", flush=True)
    rows, cost = [], {name: [run[0] / run[1] for run in runs] for name, runs in found.items()}
    for name, runs in found.items():
        seconds, sizes, means, memory = zip(*runs, strict=True)
        texts = spread(seconds), spread(sizes), spread([1e3 * c for c in cost[name]]), ratios(cost[name], cost[PEER])
        rows.append((name, *texts, spread(means), shortly(max(memory))))
    head = ("Sampler", "s", "least ESS", "ms an effective sample", "ratio to Pyro's", "mean of s", "peak MB")
    sizes = f"{options.rows} rows, chains of {options.draws} draws after {options.draws} of warm-up, one if not said"
    what = f"{sizes}; {machine('numpyro', 'jax', 'nutpie', threads=options.threads)}"
    publish("Seconds of an effective sample", [what, "", *table(head, rows)], options.quick)


def measured(name, rows, draws, seed):
    """Returns a sampler's seconds, least effective sample size, and posterior mean of s."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, generator=generator)
    y = (1 + torch.randn(rows, generator=generator)) * x + 0.5 * torch.randn(rows, generator=generator)
    compile_something_else()
    start = time.perf_counter()
    samples = SAMPLERS[name](x, y, draws, seed)
    seconds = time.perf_counter() - start
    least = min(float(value.min()) for value in ess(samples).values())
    return seconds, least, float(samples["s"].mean())


def compile_something_else():
    """Lets compilers start, and find out once what the machine can; nutpie, as the others, is imported before."""
    import_nutpie()
    points = torch.randn(9)
    record(lambda: [points.exp().sum()], [points]).compiled([points])
    torch.jit.trace(torch.exp, points)(points)
    jax.jit(jax.numpy.exp)(points.numpy()).block_until_ready()


# Samplers: from data to draws of each site, shape (chains, draws, *shape of the site).


def with_engine(engine, num_chains=1):
    """Makes a sampler of ours."""

    def run(x, y, draws, seed):
        options = {"num_samples": draws, "warmup_steps": draws, "num_chains": num_chains}
        options |= {"seed": seed, "progress": False}
        return run_mcmc(model, x, y, engine=engine, **options).samples

    return run


def with_pyro(compiling):
    """Makes a sampler of Pyro's NUTS."""

    def run(x, y, draws, seed):
        pyro.set_rng_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel = NUTS(model, jit_compile=compiling, ignore_jit_warnings=True)
            chain = MCMC(kernel, num_samples=draws, warmup_steps=draws, disable_progbar=True)
            chain.run(x, y)
        return chain.get_samples(group_by_chain=True)

    return run


def with_numpyro(x, y, draws, seed):
    """Draws by NumPyro's NUTS."""
    kernel = numpyro.infer.NUTS(numpyro_model)
    chain = numpyro.infer.MCMC(kernel, num_samples=draws, num_warmup=draws, progress_bar=False)
    chain.run(jax.random.PRNGKey(seed), jax.numpy.asarray(x.numpy()), jax.numpy.asarray(y.numpy()))
    return {site: torch.tensor(np.array(value)) for site, value in chain.get_samples(group_by_chain=True).items()}


SAMPLERS = {
    'run_mcmc(engine="nutpie")': with_engine("nutpie"),
    'run_mcmc(engine="nutpie"), four chains': with_engine("nutpie", 4),
    'run_mcmc(engine="pyro")': with_engine("pyro"),
    PEER: with_pyro(False),
    "Pyro's NUTS(jit_compile=True)": with_pyro(True),
    "NumPyro's NUTS": with_numpyro,
}


if __name__ == "__main__":
    main()
