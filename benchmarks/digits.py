"""What does amortizing cost on 1,000 digits that the encoder never saw, and is the answer right, and quick?

A variational autoencoder (a code of 50 numbers, decoder and encoder of two hidden layers of 200, Bernoulli pixels) is
trained on 9,000 binarized digits of MNIST's test set. ``amortization_gap`` then splits, for each of the other 1,000,
log p(x) - ELBO into what the family and what the encoder lost. Measured beside it, in the same run:

* what one would do without the package: Pyro's ``AutoNormal`` of these digits, trained by SVI with the decoder held;
* how much a search for q* that is five times as long finds;
* how far the evidence is from annealed importance sampling (AIS) at five times as many temperatures.

Run it with ``python benchmarks/digits.py``, ten minutes on two cores, or ``--quick``, one minute. Digits are
downloaded once (1.6 MB) unless ``--images`` names the file. The tables are printed and, unless ``--quick``, written to
``benchmarks/RESULTS.md``.
"""

import copy
import math
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam
from results import machine, parser_of, publish, read_images, table, use_threads, with_error
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_amortize import MLP, AutoAmortizedNormal, amortization_gap, fit_optimum, fit_svi
from pyro_amortize.annealing import annealed_log_weights

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-images-idx3-ubyte.gz"
CODE, PIXELS, TRAINED_ON = 50, 784, 9000
DRAWS = 500
SIZES = {
    "steps": (4000, 200, "steps of training"),
    "data": (1000, 40, "unseen digits to judge on, at most 1000"),
    "annealed": (20, 2, "digits whose evidence is annealed, at most"),
    "peer-steps": (1000, 50, "steps of SVI with AutoNormal"),
    "longer": (200, 10, "digits that are searched five times as long"),
    "checked": (20, 4, "digits whose evidence is annealed for longer"),
}
"""Of each option its default, its value with --quick, and its meaning."""


class VAE(PyroModule):
    """Binary pixels explained by a code."""

    def __init__(self):
        super().__init__()
        hidden = nn.Linear(CODE, 200), nn.Softplus(), nn.Linear(200, 200), nn.Softplus()
        self.decoder = nn.Sequential(*hidden, nn.Linear(200, PIXELS))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(CODE), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def main():
    """Trains or loads, measures, prints, and writes."""
    options = parse()
    use_threads(options.threads)
    digits = (read_images(options.images or download()) > 127).float()
    if digits.shape != (10_000, PIXELS):
        raise SystemExit(f"Digits: {options.images} holds other images than MNIST's test images.")
    was_there = options.guide is not None and options.guide.exists()
    model, guide = trained(digits[: 500 if options.quick else TRAINED_ON], options)
    x = digits[TRAINED_ON:][: options.data]
    start = time.perf_counter()
    report = amortization_gap(model, guide, x, num_annealed=options.annealed, seed=options.seed)
    seconds = time.perf_counter() - start
    print(f"{report}\n{seconds:.1f} s")
    posterior = report.optimum.guide.posterior(x)
    best = posterior.mean["z"], posterior.stddev["z"]
    rows = [
        ("the whole report", f"{seconds:.1f} s"),
        ("of that the ELBOs and the search for q*", f"{report.optimum.seconds:.1f} s"),
        *beside_peer(model, x, best, report.optimum.seconds, options),
        *beside_longer_search(model, guide, x, best, options),
        *beside_longer_annealing(model, guide, x, best, report.per_datum["khat_evidence"], options),
    ]
    source = f"a guide from {options.guide.name}" if was_there else f"a guide of {options.steps} steps"
    head = f"{options.data} unseen digits, {source}, seed {options.seed}; {machine()}"
    lines = [head, "", *gap_table(report), "", *table(("Time, and nats ± se", "found"), rows)]
    publish("Gaps of digits", lines, options.quick)


def parse():
    """Reads the command line."""
    parser = parser_of(__doc__, SIZES)
    parser.add_argument("--images", type=Path, help="an idx3-ubyte.gz file of 28 x 28 digits; downloaded if not given")
    parser.add_argument("--guide", type=Path, help="a trained guide: read if the file exists, else written")
    return parser.parse_args()


def download():
    """Returns the path of the public file, fetched if it is not in the folder for temporary files yet."""
    path = Path(tempfile.gettempdir()) / "pyro_amortize" / URL.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        try:
            urllib.request.urlretrieve(URL, part)
        except (urllib.error.URLError, TimeoutError) as error:
            raise SystemExit(f"Digits: no download of {URL}; say --images PATH. {error}") from None
        part.rename(path)
    return path


def trained(x, options):
    """Returns a model and its guide, from the file if there is one."""
    pyro.set_rng_seed(options.seed)
    model, encoder = VAE(), MLP((200, 200))
    if options.guide is not None and options.guide.exists():
        return model, AutoAmortizedNormal.load(options.guide, model, encoder=encoder)
    guide = AutoAmortizedNormal(model, encoder=encoder)
    print(fit_svi(model, guide, x, num_steps=options.steps, batch_size=128, lr=1e-3, seed=options.seed))
    if options.guide is not None:
        guide.save(options.guide)
    return model, guide


def log_joint(model, x, z):
    """Returns log p(x_n, z_n), shape (draws, rows)."""
    log_x = -binary_cross_entropy_with_logits(model.decoder(z), x.expand(len(z), *x.shape), reduction="none")
    return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + log_x.sum(-1)


@torch.no_grad()
def elbos(model, x, guides):
    """Returns the mean ELBO a datum of normals, (loc, scale) each, on common draws, shape (guides, draws)."""
    found, generator = [], torch.Generator().manual_seed(1)
    for _ in range(DRAWS):
        noise = torch.randn(1, len(x), CODE, generator=generator)
        draws = [(loc + scale * noise, dist.Normal(loc, scale)) for loc, scale in guides]
        found.append(torch.stack([(log_joint(model, x, z) - q.log_prob(z).sum(-1)).double().mean() for z, q in draws]))
    return torch.stack(found, 1)


def beside_peer(model, x, best, our_seconds, options):
    """Fits Pyro's own mean-field guide to the same digits."""
    steps = options.peer_steps
    pyro.set_rng_seed(options.seed)
    held = copy.deepcopy(model).requires_grad_(False).eval()
    start = time.perf_counter()
    guide = AutoNormal(held)
    svi = SVI(held, guide, ClippedAdam({"lr": 0.01, "lrd": 0.1 ** (1 / steps)}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x)
    seconds = time.perf_counter() - start
    ours, theirs = elbos(model, x, [best, (guide.locs.z.detach(), guide.scales.z.detach())])
    return [
        (f"the peer: AutoNormal, {steps} steps of SVI, 1 particle, lr 0.01 decaying to 0.001", f"{seconds:.1f} s"),
        ("ELBOs and search for q* / AutoNormal, seconds", f"{our_seconds / seconds:.2f}"),
        ("ELBO a datum: q*", with_error(ours)),
        ("ELBO a datum: AutoNormal", with_error(theirs)),
        ("ELBO a datum: q* less AutoNormal, on common draws", with_error(ours - theirs)),
    ]


def beside_longer_search(model, guide, x, best, options):
    """Searches some of the digits five times as long, with another seed."""
    some = x[: options.longer]
    longer = fit_optimum(model, guide, some, num_steps=1500, seed=options.seed + 1).guide.posterior(some)
    found, ours = elbos(model, some, [(longer.mean["z"], longer.stddev["z"]), [part[: len(some)] for part in best]])
    name = f"ELBO a datum: a search of 1500 steps less that of 300, {len(some)} digits"
    return [(name, with_error(found - ours))]


def beside_longer_annealing(model, guide, x, best, k_hat, options):
    """Sets PSIS and AIS against a longer AIS, on the digits of the highest k-hat and on the first of the others."""
    order = torch.tensor(k_hat.to_numpy()).argsort(descending=True)
    half = options.checked // 2
    rows = torch.cat([order[:half], order[half:].sort().values[: options.checked - half]])
    psis = amortization_gap(model, guide, x[rows], num_annealed=0, seed=options.seed + 1).per_datum["log_evidence"]
    short, long = (annealed(model, x[rows], [part[rows] for part in best], count) for count in (100, 500))
    found = []
    for name, here in (("digits of the highest k-hat", slice(half)), ("other digits", slice(half, None))):
        for method, value in (("PSIS", torch.tensor(psis.to_numpy())), ("AIS of 100", short)):
            difference = (value - long)[here]
            what = f"log evidence: {method} less AIS of 500 temperatures, {len(difference)} {name}"
            found.append((what, with_error(difference)))
    return found


@torch.no_grad()
def annealed(model, x, best, num_temperatures):
    """Returns the log evidence of digits, less the bias of the logarithm of a mean."""
    pyro.set_rng_seed(num_temperatures)
    weights = annealed_log_weights(
        lambda z: log_joint(model, x, z), *best, num_temperatures=num_temperatures, progress=True
    ).log_weights
    value = weights.logsumexp(0) - math.log(len(weights))
    return value + (weights - value).exp().var(0) / len(weights) / 2


def gap_table(report):
    """Returns the lines of the gaps, and of how sure they are."""
    rows = [
        (name, f"{row['mean']:.3f} ± {row['mean_se']:.3f}", f"{row['max']:.2f}")
        for name, row in report.summary().iterrows()
    ]
    k_hat, by = report.per_datum["khat_evidence"], report.per_datum["estimator"].value_counts()
    return [
        *table(("Nats a datum", "mean ± se of the draws", "largest"), rows),
        "",
        f"* k-hat: median {k_hat.median():.2f}, largest {k_hat.max():.2f}, above 0.7 for {int((k_hat > 0.7).sum())}",
        f"* evidence by {', '.join(f'{name} for {count}' for name, count in by.items())}",
        *(f"* warning: {text}" for text in report.warnings),
    ]


if __name__ == "__main__":
    main()
