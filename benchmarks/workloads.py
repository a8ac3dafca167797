"""Models for ``steps.py``, each with a guide, written for Pyro, in plain PyTorch, and for NumPyro.

A workload has ``model``, for Pyro; ``guide``, written by hand; ``encoder``, of which our guide generates the same;
``loss``, in PyTorch, minus the ELBO with the KL divergences written out; ``numpyro_model`` and ``numpyro_guide``. The
networks are the same in all, but for the scales, which are exp of the encoder's output in guides that are written by
hand and softplus in generated ones.
"""

import itertools

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as nd
import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_amortize import MLP


def kl(loc, scale, prior_loc, prior_scale):
    """Returns KL(N(loc, scale) || N(prior_loc, prior_scale)) in nats, summed."""
    ratio = (scale / prior_scale).square()
    return 0.5 * (ratio + ((loc - prior_loc) / prior_scale).square() - 1 - ratio.log()).sum()


def draw(loc, scale):
    """Draws from normals."""
    return loc + scale * torch.randn_like(loc)


NUMBERS = itertools.count()
"""Names of modules in the param store: Pyro would not train one under the name of another."""


class Normals(nn.Module):
    """Locations and scales of normals, which start at N(0, 0.1)."""

    def __init__(self, *shape):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.full(shape, -2.3))

    def forward(self):
        return self.loc, self.log_scale.exp()


class Encoder(nn.Module):
    """The encoder of Pyro's VAE: from hidden units a layer of locations and one of scales."""

    def __init__(self, trunk, width, out):
        super().__init__()
        self.trunk, self.loc, self.log_scale = trunk, nn.Linear(width, out), nn.Linear(width, out)

    def forward(self, x):
        hidden = self.trunk(x)
        return self.loc(hidden), self.log_scale(hidden).exp()


def perceptron(name, x, widths, activation):
    """Runs layers in NumPyro, which start as PyTorch's do."""
    for i, out in enumerate(widths):
        x = activation(linear(f"{name}.{i}", x, out))
    return x


def linear(name, x, out):
    """Runs a layer in NumPyro."""

    def start(*shape):
        return lambda key: jax.random.uniform(key, shape, minval=-1, maxval=1) / x.shape[-1] ** 0.5

    return x @ numpyro.param(f"{name}.weight", start(x.shape[-1], out)) + numpyro.param(f"{name}.bias", start(out))


def encoded(name, hidden, out):
    """Returns locations and scales from hidden units in NumPyro."""
    return linear(f"{name}.loc", hidden, out), jnp.exp(linear(f"{name}.log_scale", hidden, out))


def normals(name, *shape):
    """Returns locations and scales of normals in NumPyro, which start at N(0, 0.1)."""
    log_scale = numpyro.param(f"{name}.log_scale", jnp.full(shape, -2.3))
    return numpyro.param(f"{name}.loc", jnp.zeros(shape)), jnp.exp(log_scale)


class VAE(nn.Module):
    """Binary pixels explained by a code of 20: ``examples/vae/vae.py`` of Pyro, resized, with logits for pixels.

    Args:
        hidden: Hidden units of the encoder and of the decoder.
        batch: Rows of a step.
    """

    code, rows, pixels = 20, 2048, 784

    def __init__(self, hidden, batch):
        super().__init__()
        self.number = next(NUMBERS)
        self.hidden, self.batch = hidden, batch
        self.encoder = Encoder(nn.Sequential(nn.Linear(self.pixels, hidden), nn.Softplus()), hidden, self.code)
        self.decoder = nn.Sequential(nn.Linear(self.code, hidden), nn.Softplus(), nn.Linear(hidden, self.pixels))
        self.our_encoder = MLP((hidden,), activation=nn.Softplus)

    def data(self):
        return ((torch.rand(self.rows, self.pixels) < torch.rand(self.pixels).square()).float(),)

    def model(self, x):
        pyro.module(f"decoder{self.number}", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.code), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module(f"encoder{self.number}", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.encoder(x)).to_event(1))

    def loss(self, x):
        loc, scale = self.encoder(x)
        logits = self.decoder(draw(loc, scale))
        return kl(loc, scale, 0.0, 1.0) + binary_cross_entropy_with_logits(logits, x, reduction="sum")

    def numpyro_model(self, x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", nd.Normal(jnp.zeros(self.code), 1.0).to_event(1))
            hidden = perceptron("decoder", z, [self.hidden], jax.nn.softplus)
            logits = linear("decoder.out", hidden, self.pixels)
            numpyro.sample("x", nd.Bernoulli(logits=logits).to_event(1), obs=x)

    def numpyro_guide(self, x):
        with numpyro.plate("data", len(x)):
            hidden = perceptron("encoder", x, [self.hidden], jax.nn.softplus)
            numpyro.sample("z", nd.Normal(*encoded("encoder", hidden, self.code)).to_event(1))


class Linear(nn.Module):
    """A mean, and a latent for each of 10,000 numbers, all in each step: theta, z_n ~ N(theta, 1), x_n ~ N(z_n, 1)."""

    rows, batch = 10_000, None

    def __init__(self):
        super().__init__()
        self.number = next(NUMBERS)
        self.theta = Normals()
        self.encoder = Encoder(MLP((64, 64))(1), 64, 1)
        self.our_encoder = MLP((64, 64))

    def data(self):
        return (3 + torch.randn(self.rows) * 2**0.5,)

    def model(self, x):
        theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        pyro.module(f"guide{self.number}", self)
        pyro.sample("theta", dist.Normal(*self.theta()))
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x[:, None])
            pyro.sample("z", dist.Normal(loc[:, 0], scale[:, 0]))

    def loss(self, x):
        theta = draw(*self.theta())
        loc, scale = self.encoder(x[:, None])
        z = draw(loc, scale)
        log_x = dist.Normal(z[:, 0], 1.0, validate_args=False).log_prob(x).sum()
        return kl(*self.theta(), 0.0, 10.0) + kl(loc, scale, theta, 1.0) - log_x

    def numpyro_model(self, x):
        theta = numpyro.sample("theta", nd.Normal(0.0, 10.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", nd.Normal(theta, 1.0))
            numpyro.sample("x", nd.Normal(z, 1.0), obs=x)

    def numpyro_guide(self, x):
        numpyro.sample("theta", nd.Normal(*normals("theta")))
        with numpyro.plate("data", len(x)):
            hidden = perceptron("encoder", x[:, None], (64, 64), jax.nn.silu)
            loc, scale = encoded("encoder", hidden, 1)
            numpyro.sample("z", nd.Normal(loc[:, 0], scale[:, 0]))


class Groups(nn.Module):
    """A line for each of 100 groups, to which 2,000 rows belong by an index, all in each step.

    a_g ~ N(mu_0, tau_0), b_g ~ N(mu_1, tau_1), y_n ~ N(a_g(n) + b_g(n) x_n, sigma). The encoder pools the rows of a
    group. NumPyro knows no KL divergence of log-normals: those of tau and sigma are by the draw there.
    """

    groups, rows, batch = 100, 2000, None

    def __init__(self):
        super().__init__()
        self.number = next(NUMBERS)
        self.mu, self.tau, self.sigma = Normals(2), Normals(2), Normals()
        self.phi = MLP((64, 64))(2)
        self.encoder = Encoder(MLP((64, 64))(67), 64, 2)
        self.our_encoder = MLP((64, 64))

    def data(self):
        group, x = torch.randint(self.groups, (self.rows,)), torch.randn(self.rows)
        a, b = 1 + 0.5 * torch.randn(self.groups), 2 + 0.5 * torch.randn(self.groups)
        return x, a[group] + b[group] * x + 0.5 * torch.randn(self.rows), group

    def model(self, x, y, group):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", self.groups):
            a = pyro.sample("a", dist.Normal(mu[0], tau[0]))
            b = pyro.sample("b", dist.Normal(mu[1], tau[1]))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a[group] + b[group] * x, sigma), obs=y)

    def pooled(self, x, y, group):
        rows = torch.stack([x, y], -1)
        rows = torch.cat([rows, self.phi(rows), torch.ones_like(x)[:, None]], -1)
        sums = rows.new_zeros(self.groups, rows.shape[-1]).index_add(0, group, rows)
        return torch.cat([sums[:, :-1] / sums[:, -1:].clamp(min=1), sums[:, -1:].log1p()], -1)

    def guide(self, x, y, group):
        pyro.module(f"guide{self.number}", self)
        pyro.sample("mu", dist.Normal(*self.mu()).to_event(1))
        pyro.sample("tau", dist.LogNormal(*self.tau()).to_event(1))
        pyro.sample("sigma", dist.LogNormal(*self.sigma()))
        loc, scale = self.encoder(self.pooled(x, y, group))
        with pyro.plate("groups", self.groups):
            pyro.sample("a", dist.Normal(loc[:, 0], scale[:, 0]))
            pyro.sample("b", dist.Normal(loc[:, 1], scale[:, 1]))

    def loss(self, x, y, group):
        mu, tau, sigma = draw(*self.mu()), draw(*self.tau()).exp(), draw(*self.sigma()).exp()
        loc, scale = self.encoder(self.pooled(x, y, group))
        a, b = draw(loc, scale).unbind(-1)
        log_y = dist.Normal(a[group] + b[group] * x, sigma, validate_args=False).log_prob(y).sum()
        above = kl(*self.mu(), 0.0, 10.0) + kl(*self.tau(), 0.0, 1.0) + kl(*self.sigma(), 0.0, 1.0)
        return above + kl(loc, scale, mu, tau) - log_y

    def numpyro_model(self, x, y, group):
        mu = numpyro.sample("mu", nd.Normal(jnp.zeros(2), 10.0).to_event(1))
        tau = numpyro.sample("tau", nd.LogNormal(jnp.zeros(2), 1.0).to_event(1))
        sigma = numpyro.sample("sigma", nd.LogNormal(0.0, 1.0))
        with numpyro.plate("groups", self.groups):
            a = numpyro.sample("a", nd.Normal(mu[0], tau[0]))
            b = numpyro.sample("b", nd.Normal(mu[1], tau[1]))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", nd.Normal(a[group] + b[group] * x, sigma), obs=y)

    def numpyro_guide(self, x, y, group):
        numpyro.sample("mu", nd.Normal(*normals("mu", 2)).to_event(1))
        numpyro.sample("tau", nd.LogNormal(*normals("tau", 2)).to_event(1))
        numpyro.sample("sigma", nd.LogNormal(*normals("sigma")))
        rows = jnp.stack([x, y], -1)
        rows = jnp.concatenate([rows, perceptron("phi", rows, (64, 64), jax.nn.silu), jnp.ones_like(x)[:, None]], -1)
        sums = jax.ops.segment_sum(rows, group, num_segments=self.groups)
        rows = jnp.concatenate([sums[:, :-1] / jnp.maximum(sums[:, -1:], 1), jnp.log1p(sums[:, -1:])], -1)
        loc, scale = encoded("encoder", perceptron("encoder", rows, (64, 64), jax.nn.silu), 2)
        with numpyro.plate("groups", self.groups):
            numpyro.sample("a", nd.Normal(loc[:, 0], scale[:, 0]))
            numpyro.sample("b", nd.Normal(loc[:, 1], scale[:, 1]))


WORKLOADS = {
    "VAE 784-32-20, batch 128": lambda: VAE(32, 128),
    "VAE 784-32-20, batch 1024": lambda: VAE(32, 1024),
    "VAE 784-400-20, batch 128": lambda: VAE(400, 128),
    "VAE 784-400-20, batch 1024": lambda: VAE(400, 1024),
    "linear, 10,000 rows": Linear,
    "regression, 100 groups of 20 rows": Groups,
}
"""Each called for every contender, so that all start alike and share no parameters."""
