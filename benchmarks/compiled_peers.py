"""The contestants of benchmarks/compiled.py that have no Pyro in them.

The VAE by hand in PyTorch, and the pairs of Trace_ELBO in NumPyro. Every contestant has
``steps(n)``, which makes n steps and returns their losses. JAX reads its environment when it is
first used: it has to be set before this file is imported.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from compiled_models import LATENT
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.initialization import init_to_value

VERSIONS = f"jax {jax.__version__}, numpyro {numpyro.__version__}"


class HandWrittenVAE:
    """The same loss in plain PyTorch: nothing but tensors, autograd and Adam."""

    def __init__(self, pair):
        (self.x,) = pair.args
        self.encoder, self.decoder = pair.start["encoder"], pair.start["decoder"]
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=pair.lr)

    def loss(self):
        loc, log_scale = self.encoder(self.x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        nats = torch.nn.functional.binary_cross_entropy_with_logits(
            self.decoder(z), self.x, reduction="sum"
        )
        return nats + (0.5 * (z.square() - noise.square()) - log_scale).sum()

    def step(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def steps(self, n):
        return [self.step() for _ in range(n)]


# --- NumPyro -------------------------------------------------------------------------------------


def schools_model(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def regression_model(x, y):
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 5.0).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(jnp.ones(2)).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("groups", x.shape[-1], dim=-1):
        a = numpyro.sample("a", dist.Normal(mu[..., 0], tau[..., 0]))
        b = numpyro.sample("b", dist.Normal(mu[..., 1], tau[..., 1]))
        with numpyro.plate("observations", len(x), dim=-2):
            numpyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)


def auto(guide_class, model):
    """The twin of a pair with an autoguide."""

    def twin(pair):
        values = {name: as_jax(value) for name, value in pair.start.items()}
        return model, guide_class(model, init_loc_fn=init_to_value(values=values))

    return twin


def vae_twin(pair):
    weights = {
        f"{name}.{i}.{part}": as_jax(value.T if part == "weight" else value)
        for name, network in pair.start.items()
        for i, layer in enumerate(network)
        for part, value in layer.named_parameters()
    }

    def network(name, h):
        def linear(i, h):
            weight, bias = (f"{name}.{i}.{part}" for part in ("weight", "bias"))
            return h @ numpyro.param(weight, weights[weight]) + numpyro.param(bias, weights[bias])

        return linear(2, jax.nn.relu(linear(0, h)))

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=network("decoder", z)).to_event(1)
            numpyro.sample("x", likelihood, obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            loc, log_scale = jnp.split(network("encoder", x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide


def as_jax(tensor):
    return jnp.asarray(tensor.detach().cpu().numpy())


TWINS = {
    "eight schools": auto(AutoNormal, schools_model),
    "eight schools, MVN": auto(AutoMultivariateNormal, schools_model),
    "VAE": vae_twin,
    "regression": auto(AutoNormal, regression_model),
}


def set_dispatch(asynchronous):
    """Whether JAX hands every call to another thread, which on one thread costs more."""
    jax.config.update("jax_cpu_enable_async_dispatch", asynchronous)


def on(device):
    """Whether JAX runs on that kind of device here: else its times say nothing."""
    return (torch.device(device).type == "cuda") == (jax.default_backend() == "gpu")


class NumPyroUpdate:
    """``jit(svi.update)`` from a Python loop, which waits for the last one."""

    def __init__(self, name, pair, seed):
        model, guide = TWINS[name](pair)
        self.svi = SVI(model, guide, numpyro.optim.Adam(pair.lr), Trace_ELBO())
        self.args = tuple(map(as_jax, pair.args))
        self.state = self.svi.init(jax.random.PRNGKey(seed), *self.args)
        self.update = jax.jit(self.svi.update)

    def steps(self, n):
        losses = []
        for _ in range(n):
            self.state, loss = self.update(self.state, *self.args)
            losses.append(loss)
        jax.block_until_ready(self.state)
        return losses


class NumPyroLoop(NumPyroUpdate):
    """All n steps in one compiled ``fori_loop``."""

    def __init__(self, name, pair, seed):
        super().__init__(name, pair, seed)

        def many(n, state, *args):
            def body(i, carry):
                state, losses = carry
                state, loss = self.svi.update(state, *args)
                return state, losses.at[i].set(loss)

            return jax.lax.fori_loop(0, n, body, (state, jnp.zeros(n)))

        self.many = jax.jit(many, static_argnums=0)

    def steps(self, n):
        self.state, losses = self.many(n, self.state, *self.args)
        return np.asarray(jax.block_until_ready(losses))
