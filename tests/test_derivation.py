"""The derived log joint: equal to NumPyro's at any values of the latents, or refused by name."""

import itertools
import re
import time

import numpy as np
import pytest

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from jax import lax  # noqa: E402
from numpyro import deterministic, factor, handlers, plate, sample  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

from pyro_vi_ext.cavi.derivation import NotConjugateError, derive, unwrapped  # noqa: E402
from pyro_vi_ext.cavi.plan import make_plan  # noqa: E402


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


RNG = np.random.default_rng(3)
X, Y, T = RNG.normal(size=(6, 3)), RNG.normal(size=6), RNG.normal(size=(6, 2))
GROUP, COUNTS, BITS = np.array([0, 2, 1, 0, 3, 3]), np.array([3, 0, 1, 7, 2, 2]), Y > 0
MASK = np.array([True, False, True, True, False, True])
TABLE = RNG.normal(size=(4, 3))
Normal, Gamma = dist.Normal, dist.Gamma


# --- the comparison ------------------------------------------------------------------------------


def any_value(kind: str, shape: tuple, num_values: int, rng) -> np.ndarray:
    """A value inside of the support, not from the prior."""
    x = rng.normal(size=shape)
    if num_values:
        return rng.integers(0, num_values, shape)
    if kind in ("Gamma", "Exponential", "InverseGamma", "LogNormal"):
        return np.exp(x)
    if kind == "Beta":
        return rng.uniform(0.05, 0.95, shape)
    if kind == "Dirichlet":
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    if kind == "Wishart":
        return x @ np.swapaxes(x, -1, -2) + np.eye(shape[-1])
    return x


def start(site):
    """A first value of a latent, so that no sampler has to be compiled."""
    if site["type"] != "sample" or site["is_observed"]:
        return None
    fn, rng = unwrapped(site["fn"])[0], np.random.default_rng(9)
    num_values = 2 * fn.support.is_discrete
    return jnp.asarray(any_value(type(fn).__name__, site["fn"].shape(), num_values, rng))


def check(model, *args, num: int = 3):
    """F at the statistics of any values is the log joint at them."""
    key = jax.random.PRNGKey(5)
    model = handlers.substitute(model, substitute_fn=start)
    derivation = derive(model, args, {}, key)
    plan = make_plan(derivation)
    for seed in range(num):
        rng = np.random.default_rng(seed)
        values = {
            name: jnp.asarray(any_value(latent.kind, latent.shape, latent.num_values, rng))
            for name, latent in derivation.latents.items()
        }
        moments = {
            name: {key: np.asarray(x) for key, x in f.statistics(values).items()}
            for name, f in plan.factors.items()
        }
        found = float(plan.expected_log_joint(plan.arrays, moments, xp=np))
        expected = float(log_density(handlers.seed(model, key), args, {}, values)[0])
        assert np.isfinite(expected)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    return plan


# --- models: every prior with every likelihood that it is conjugate to ---------------------------

PRIORS = {
    "Normal": lambda: sample("v", Normal(0.3, 2.0).expand([4]).to_event(1)),
    "Normal in a plate": lambda: _in_plate(Normal(0.3, 2.0)),
    "MultivariateNormal": lambda: sample(
        "v", dist.MultivariateNormal(TABLE[:, 0], TABLE @ TABLE.T + np.eye(4))
    ),
    "precision matrix": lambda: sample(
        "v", dist.MultivariateNormal(0.0, precision_matrix=TABLE @ TABLE.T + np.eye(4))
    ),
    "LogNormal": lambda: jnp.log(_in_plate(dist.LogNormal(0.3, 2.0))),
    "Gamma": lambda: _in_plate(Gamma(2.0, 3.0)),
    "Exponential": lambda: _in_plate(dist.Exponential(3.0)),
    "InverseGamma": lambda: _in_plate(dist.InverseGamma(2.0, 3.0)),
    "Beta": lambda: _in_plate(dist.Beta(2.0, 3.0)),
    "Dirichlet": lambda: sample("v", dist.Dirichlet(np.array([1.0, 2.0, 0.5, 1.0]))),
    "Bernoulli": lambda: _in_plate(dist.Bernoulli(0.3)),
    "Bernoulli by logits": lambda: _in_plate(dist.Bernoulli(logits=0.3)),
    "Categorical": lambda: _in_plate(dist.Categorical(np.array([0.2, 0.5, 0.3]))),
    "Categorical by logits": lambda: _in_plate(dist.Categorical(logits=TABLE[0])),
}
# Sums of terms of several entries: a nonlinear function of labels then has more than one of them.
SPLIT = ("slices", "stacked", "selected")


def _in_plate(fn, num: int = 4):
    with plate("groups", num):
        return sample("v", fn)


# How four values become one for each of six rows; each leaves powers of one entry.
LAYOUTS = {
    "indexed": lambda v: v[GROUP],
    "reversed": lambda v: v[::-1][GROUP],
    "slices": lambda v: jnp.concatenate([v[1:], v[::2]])[:5][jnp.array([0, 1, 2, 3, 4, 0])],
    "scalar": lambda v: v[2],
    "reshaped": lambda v: v.reshape(2, 2).T[GROUP // 2, GROUP % 2],
    "stacked": lambda v: jnp.stack([v[0], v[3], v[1], v[1], v[0], v[2]]),
    "vmap": lambda v: jax.vmap(lambda g: v[g])(jnp.asarray(GROUP)),
    "jit": lambda v: jax.jit(lambda a, g: a[g])(v, GROUP),
    "selected": lambda v: jnp.where(MASK, v[GROUP], v[0]),
    "noted": lambda v: deterministic("noted", v[GROUP]),
}


def normal_mean(v):
    sample("y", Normal(v * X[:, 0] + 1.0, 0.7), obs=Y)


LIKELIHOODS = {
    "mean": (
        normal_mean,
        {"Normal", "Normal in a plate", "MultivariateNormal", "precision matrix", "LogNormal"}
        | {"Bernoulli", "Bernoulli by logits", "Categorical", "Categorical by logits"},
    ),
    "precision": (
        lambda v: sample("y", Normal(0.1, 1 / jnp.sqrt(2 * v)), obs=Y),
        {"Gamma", "Exponential"},
    ),
    "variance": (lambda v: sample("y", Normal(0.1, jnp.sqrt(v)), obs=Y), {"InverseGamma"}),
    "rate": (lambda v: sample("y", dist.Poisson(v * np.exp(Y)), obs=COUNTS), {"Gamma"}),
    "gamma rate": (lambda v: sample("y", Gamma(2.0, 3 * v), obs=np.exp(Y)), {"Exponential"}),
    "probability": (lambda v: sample("y", dist.Bernoulli(v), obs=BITS), {"Beta"}),
    "binomial": (lambda v: sample("y", dist.Binomial(9, v), obs=COUNTS), {"Beta"}),
    "function": (
        lambda v: sample("y", Normal(jnp.exp(v) - v**2, 1 + v), obs=Y),
        {"Bernoulli", "Bernoulli by logits", "Categorical", "Categorical by logits"},
    ),
}  # fmt: skip

# What is done to the observed site, by plates, scales and masks.
CONTEXTS = {
    "plate": lambda observe: _within([plate("rows", 6)], observe),
    "event": lambda observe: observe(),
    "nested plates": lambda observe: _within(
        [plate("rows", 6), plate("copies", 2, dim=-2)], observe
    ),
    "scale": lambda observe: _within([handlers.scale(scale=2.5)], observe),
    "mask": lambda observe: _within([plate("rows", 6), handlers.mask(mask=MASK)], observe),
    "both": lambda observe: _within(
        [handlers.scale(scale=0.5), plate("rows", 6), handlers.mask(mask=~MASK)], observe
    ),
}


def _within(managers, function):
    if not managers:
        return function()
    with managers[0]:
        return _within(managers[1:], function)


PAIRS = [(p, k) for k, (_, priors) in LIKELIHOODS.items() for p in PRIORS if p in priors]


@pytest.mark.parametrize(
    ("prior", "likelihood"),
    [pytest.param(*p, marks=[pytest.mark.slow] if i % 3 else []) for i, p in enumerate(PAIRS)],
)
def test_every_conjugate_pair_in_some_layout_and_context(prior, likelihood):
    """Each pair meets another layout and context; all of both are met."""
    number = PAIRS.index((prior, likelihood))
    for shift in (0, 1):
        layouts = [x for x in LAYOUTS if likelihood != "function" or x not in SPLIT]
        layout = layouts[(number + 5 * shift) % len(layouts)]
        context = list(CONTEXTS)[(number + shift) % len(CONTEXTS)]

        def model(layout=layout, context=context):
            v = LAYOUTS[layout](PRIORS[prior]())
            CONTEXTS[context](lambda: LIKELIHOODS[likelihood][0](v))

        check(model, num=2)


@pytest.mark.parametrize(
    ("layout", "context"),
    [
        pytest.param(layout, context, marks=[pytest.mark.slow] if context == "mask" else [])
        for layout, context in itertools.product(LAYOUTS, ["plate", "mask"])
    ],
)
def test_every_layout(layout, context):
    def model():
        v = LAYOUTS[layout](PRIORS["Normal in a plate"]())
        CONTEXTS[context](lambda: normal_mean(v))

    check(model, num=1)


# --- models: one for each thing that may go wrong -------------------------------------------------


def normal_wishart_mixture():
    pi = sample("pi", dist.Dirichlet(np.ones(4)))
    with plate("components", 4):
        mu = sample("mu", dist.MultivariateNormal(np.zeros(3), np.eye(3)))
        precision = sample("precision", dist.Wishart(5.0, rate_matrix=np.eye(3)))
    with plate("rows", 6):
        z = sample("z", dist.Categorical(pi))
        sample("x", dist.MultivariateNormal(mu[z], precision_matrix=precision[z]), obs=X)


def wishart_of_size_one():
    with plate("components", 4):
        precision = sample("precision", dist.Wishart(3.0, rate_matrix=np.eye(1)))
    with plate("rows", 6):
        z = sample("z", dist.Categorical(np.full(4, 0.25)))
        fn = dist.MultivariateNormal(np.zeros(1), precision_matrix=precision[z])
        sample("x", fn, obs=X[:, :1])


def diagonal_mixture():
    pi = sample("pi", dist.Dirichlet(np.ones(4)))
    with plate("components", 4), plate("dims", 3):
        mu = sample("mu", Normal(0, 1))
        tau = sample("tau", Gamma(2.0, 1.0))
    with plate("rows", 6):
        z = sample("z", dist.Categorical(pi))
        scale = 1 / jnp.sqrt(tau[:, z].T)
        sample("x", Normal(mu[:, z].T, scale).to_event(1), obs=X)


def a_column_of_a_table():
    mu = sample("mu", Normal(0, 1).expand([4, 3]).to_event(2))
    with plate("rows", 6):
        z = sample("z", dist.Categorical(np.full(4, 0.25)))
        sample("y", Normal(mu[z][:, 0] - mu[z][:, 2], 1), obs=Y)


def two_labels():
    a = sample("a", Normal(0, 1).expand([4, 3]).to_event(2))
    with plate("rows", 6):
        z = sample("z", dist.Categorical(np.full(4, 0.25)))
        y = sample("y", dist.Categorical(jax.nn.softmax(jnp.asarray(TABLE), -1)[GROUP]))
        sample("x", Normal(a[z, y], 1), obs=Y)


def chain():
    """Transitions A[z1, z2] of three steps."""
    with plate("states", 3):
        rows = sample("rows", dist.Dirichlet(np.ones(3)))
        mu = sample("mu", Normal(0, 1))
    z1 = sample("z1", dist.Categorical(np.full(3, 1 / 3)))
    z2 = sample("z2", dist.Categorical(rows[z1]))
    z3 = sample("z3", dist.Categorical(rows[z2]))
    for i, z in enumerate((z1, z2, z3)):
        sample(f"x{i}", Normal(mu[z], 1), obs=Y[i])


def topics():
    theta = sample("theta", dist.Dirichlet(np.ones(3)).expand([4]).to_event(1))
    phi = sample("phi", dist.Dirichlet(np.ones(5)).expand([3]).to_event(1))
    with plate("words", 6):
        z = sample("z", dist.Categorical(theta[GROUP]))
        sample("word", dist.Categorical(phi[z]), obs=COUNTS % 5)


def multinomial():
    theta = sample("theta", dist.Dirichlet(np.ones(3)))
    with plate("rows", 2):
        sample(
            "n", dist.Multinomial(probs=theta, total_count=6), obs=np.array([[3, 0, 3], [1, 1, 4]])
        )


def linear_regression():
    tau = sample("tau", Gamma(2.0, 1.0))
    w = sample("w", Normal(0, 2).expand([3]).to_event(1))
    b = sample("b", Normal(0, 1))
    with plate("rows", 6):
        sample("y", Normal(X @ w + b, 1 / jnp.sqrt(tau)), obs=Y)


def factor_analysis():
    alpha = sample("alpha", Gamma(2.0, 1.0).expand([2]).to_event(1))
    w = sample("w", Normal(0, 1 / jnp.sqrt(alpha)).expand([3, 2]).to_event(2))
    with plate("rows", 6):
        h = sample("h", Normal(0, 1).expand([2]).to_event(1))
        sample("x", Normal(jnp.einsum("nk,dk->nd", h, w), 0.5).to_event(1), obs=X)


def matmul_in_the_other_order():
    w = sample("w", Normal(0, 1).expand([2, 3]).to_event(2))
    h = sample("h", Normal(0, 1).expand([6, 2]).to_event(2))
    sample("x", Normal((w.T @ h.T).T, 1).to_event(2), obs=X)


def squared_sum():
    w = sample("w", Normal(0, 1).expand([6]).to_event(1))
    sample("y", Normal(w - w.sum(), 1).to_event(1), obs=Y)
    sample("m", Normal(w.mean() * 2 + w[0], 1), obs=0.3)


def random_walk_by_a_matrix():
    e = sample("e", Normal(0, 1).expand([6]).to_event(1))
    sample("y", Normal(jnp.tril(jnp.ones((6, 6))) @ e, 1).to_event(1), obs=Y)


def centred_hierarchy():
    m = sample("m", Normal(0, 5))
    v = sample("v", dist.InverseGamma(2.0, 1.0))
    with plate("groups", 4):
        a = sample("a", Normal(m, jnp.sqrt(v)))
    with plate("rows", 6):
        sample("y", Normal(a[GROUP], np.exp(X[:, 0])), obs=Y)


def scale_mixture():
    with plate("rows", 6):
        u = sample("u", Gamma(2.0, 2.0))
        w = sample("w", Normal(0, 1))
        sample("y", Normal(w, 1 / jnp.sqrt(3.0 * u)), obs=Y)


def spike_and_slab():
    w = sample("w", Normal(0, 1).expand([3]).to_event(1))
    s = [sample(f"s{i}", dist.Bernoulli(0.3)) for i in range(3)]
    sample("y", Normal(X @ (jnp.stack(s) * w), 1).to_event(1), obs=Y)


def chosen_precision():
    tau = sample("tau", Gamma(2.0, 1.0).expand([2]).to_event(1))
    with plate("rows", 6):
        z = sample("z", dist.Bernoulli(0.3))
        sample("y", Normal(jnp.where(z == 1, 1.0, -1.0), 1 / jnp.sqrt(tau[z])), obs=Y)
        sample("x", Normal(0, 1 / jnp.sqrt(jnp.where(z == 1, tau[0], tau[1]))), obs=Y)


def a_scalar_label():
    z = sample("z", dist.Categorical(np.full(4, 0.25)))
    mu = sample("mu", Normal(0, 1).expand([4, 3]).to_event(2))
    sample("y", Normal(mu[z], 1 + z).to_event(1), obs=X[0])
    sample("k", dist.Categorical(jax.nn.softmax(jnp.asarray(TABLE)[z], -1)), obs=1)


def masks_inside_and_outside_of_events():
    w = sample("w", Normal(0, 1))
    square = X[:3]
    sample("a", Normal(w, 1).expand([3, 3]).mask(square > 0).to_event(1), obs=square)
    sample("b", Normal(w, 1).expand([3, 3]).to_event(1).mask(square[0] > 0), obs=square)
    sample(
        "c", Normal(w, 1).expand([3, 3]).mask(square > 0).to_event(1).mask(Y[:3] > 0), obs=square
    )
    sample("d", Normal(w, 1).expand([3, 3]).mask(square > 0).to_event(2), obs=square)


def missing_data():
    w = sample("w", Normal(0, 1))
    with plate("rows", 6), handlers.mask(mask=MASK):
        sample("y", Normal(w, 1), obs=np.where(MASK, Y, np.nan))
        sample(
            "x",
            dist.MultivariateNormal(w * jnp.ones(3), np.eye(3)),
            obs=np.where(MASK[:, None], X, np.nan),
        )


def masked_away():
    w = sample("w", Normal(0, 1))
    with handlers.mask(mask=False):
        sample("y", Normal(w, 1), obs=0.3)
    sample("x", Normal(w, 1).mask(True), obs=0.3)


def a_scale_for_each_row():
    w = sample("w", Normal(0, 1))
    with plate("rows", 6), handlers.scale(scale=np.exp(Y)):
        sample("y", Normal(w, 1), obs=Y)
        sample("x", Normal(w, 1).expand([6, 3]).to_event(1), obs=X)


def subsample():
    w = sample("w", Normal(0, 1))
    with plate("rows", 6, subsample_size=3) as i:
        sample("y", Normal(w * jnp.asarray(X)[i, 0], 1), obs=jnp.asarray(Y)[i])


def broadcast_observation():
    w = sample("w", Normal(0, 1))
    with plate("rows", 6):
        sample("y", Normal(w, 1), obs=0.3)
        factor("f", w * 0.1)
    sample("x", Normal(w, 1).expand([5, 2]).to_event(1), obs=np.ones((5, 1)))


def interstitial_expansion():
    w = sample("w", Normal(0, 1).expand([3, 1]).to_event(2))
    sample("y", Normal(w, 1).expand([3, 4]).to_event(2), obs=TABLE.T)
    sample("x", Normal(w, 1).expand([2, 3, 4]).to_event(1), obs=np.stack([TABLE.T, 2 * TABLE.T]))


def factors():
    w = sample("w", Normal(0, 1).expand([3]).to_event(1))
    tau = sample("tau", Gamma(2.0, 1.0))
    factor("penalty", -0.5 * tau * (w**2).sum() + jnp.log(tau))
    sample("unit", dist.Unit(w), obs=np.zeros((3, 0)))


def observed_residual():
    w = sample("w", Normal(0, 1).expand([3]).to_event(1))
    sample("y", Normal(0, 1).expand([6]).to_event(1), obs=Y - X @ w)


def integers_and_booleans():
    w = sample("w", Normal(0, 1))
    p = sample("p", dist.Beta(1.0, 2.0))
    big = np.full(6, 100_000, np.int32)
    with plate("rows", 6):
        sample("y", Normal(w * jnp.asarray(big), 1e5), obs=big)
        sample("b", dist.Bernoulli(p), obs=BITS)


def categories_out_of_order():
    """Reversed categories are not the categories: [z = k] [z = reverse(k)]."""
    with plate("rows", 6):
        z = sample("z", dist.Categorical(np.full(4, 0.25)))
        hot = jax.nn.one_hot(z, 4, dtype=float)
        sample("y", Normal((hot * hot[..., ::-1] * TABLE[:, 0]).sum(-1) + z // 2, 1), obs=Y)


def sizes_zero_and_one():
    w = sample("w", Normal(0, 1).expand([0]).to_event(1))
    u = sample("u", Normal(0, 1).expand([1, 3]).to_event(2))
    with plate("one", 1):
        tau = sample("tau", Gamma(2.0, 1.0))
        sample("y", Normal(jnp.concatenate([w, u[0, :1]]), 1 / jnp.sqrt(tau)), obs=Y[:1])
    sample("v", Normal(u * tau / tau, 1 / jnp.sqrt(tau[0])).to_event(2), obs=X[:1])


def known_functions():
    w = sample("w", Normal(0, 1).expand([3]).to_event(1))
    scale = jax.nn.softplus(jnp.asarray(X[:, 0]))
    design = jax.nn.relu(X) + lax.fori_loop(0, 3, lambda i, c: c * 0.5, jnp.asarray(X))
    sample("y", Normal(design @ w, scale).to_event(1), obs=Y)


def gamma_hierarchy():
    rate = sample("rate", Gamma(2.0, 1.0))
    with plate("rows", 6):
        lam = sample("lam", Gamma(1.5, rate))
        sample("n", dist.Poisson(lam), obs=COUNTS)


def label_dependent_shapes():
    with plate("rows", 6):
        z = sample("z", dist.Bernoulli(0.4))
        lam = sample("lam", Gamma(1.0 + z, 2.0))
        sample("n", dist.Poisson(lam), obs=COUNTS)
        sample("b", dist.Bernoulli(logits=2.0 * z - 1), obs=BITS)


def log_normal_observation():
    w = sample("w", Normal(0, 1))
    tau = sample("tau", Gamma(2.0, 1.0))
    with plate("rows", 6):
        sample("y", dist.LogNormal(w, 1 / jnp.sqrt(tau)), obs=np.exp(Y))


MODELS = [
    normal_wishart_mixture, wishart_of_size_one, diagonal_mixture, a_column_of_a_table, two_labels,
    chain, topics, multinomial, linear_regression, factor_analysis, matmul_in_the_other_order,
    squared_sum, random_walk_by_a_matrix, centred_hierarchy, scale_mixture, spike_and_slab,
    chosen_precision, a_scalar_label, masks_inside_and_outside_of_events, missing_data,
    masked_away, a_scale_for_each_row, subsample, broadcast_observation, interstitial_expansion,
    factors, observed_residual, integers_and_booleans, categories_out_of_order,
    sizes_zero_and_one, known_functions, gamma_hierarchy, label_dependent_shapes,
    log_normal_observation,
]  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=[pytest.mark.slow] if i % 2 else []) for i, m in enumerate(MODELS)],
    ids=lambda model: model.__name__,
)
def test_the_log_joint_is_that_of_numpyro(model):
    check(model)


# --- refusals ------------------------------------------------------------------------------------


def w_of(size=3):
    return sample("w", Normal(0, 1).expand([size]).to_event(1))


def y_at(loc, scale=1.0):
    sample("y", Normal(loc, scale).to_event(jnp.ndim(loc)), obs=jnp.ones(jnp.shape(loc)))


def label():
    return sample("z", dist.Categorical(np.full(4, 0.25)))


def _loop(w):
    return lax.fori_loop(0, 2, lambda i, c: c * w, jnp.ones(3))


def spike_and_slab_in_a_plate():
    s = sample("s", dist.Bernoulli(0.3).expand([3]).to_event(1))
    y_at(X @ (s * w_of()))


def observed_exp():
    w = w_of()
    sample("y", Normal(0, 1).expand([3]).to_event(1), obs=jnp.exp(w))


def mask_of_a_latent():
    w = w_of()
    with handlers.mask(mask=w > 0):
        sample("y", Normal(w, 1), obs=X[0])


def scale_of_a_latent():
    tau = sample("tau", Gamma(1.0, 1.0))
    with handlers.scale(scale=tau):
        sample("y", Normal(0, 1), obs=0.0)


def if_of_a_latent():
    if sample("w", Normal(0, 1)) > 0:
        sample("y", Normal(0, 1), obs=0.0)


def loop_to_a_latent():
    for _ in range(label()):
        sample("y", Normal(0, 1), obs=0.0)


def ising():
    z = sample("z", dist.Bernoulli(0.5).expand([4]).to_event(1))
    factor("y", (z[1:] * z[:-1]).sum())


def non_centred_scale():
    tau, w = sample("tau", Gamma(1.0, 1.0)), w_of()
    y_at(tau * w * w[0])


def mixture_same_family():
    mu = w_of()
    fn = dist.MixtureSameFamily(dist.Categorical(np.ones(3) / 3), Normal(mu, 1))
    sample("y", fn, obs=0.0)


REFUSED = {
    "exp": (lambda: y_at(jnp.exp(w_of())), "exp of a continuous latent"),
    "logistic regression": (
        lambda: sample("y", dist.Bernoulli(logits=X @ w_of()).to_event(1), obs=BITS), "logits",
    ),
    "Poisson regression": (
        lambda: sample("y", dist.Poisson(jnp.exp(X @ w_of())).to_event(1), obs=COUNTS), "exp",
    ),
    "a square": (lambda: y_at(w_of() ** 2), r"w\^4"),
    "relu": (lambda: y_at(jax.nn.relu(w_of())), "max of a continuous latent"),
    "a denominator": (lambda: y_at(1.0 / w_of()), "power -1 of a continuous"),
    "conversion": (lambda: y_at(w_of().astype(int) * 1.0), "conversion of a continuous"),
    "argmax": (lambda: y_at(jnp.argmax(w_of()) * 1.0), "argmax"),
    "sort": (lambda: y_at(jnp.sort(w_of())), "sort"),
    "cumsum": (lambda: y_at(jnp.cumsum(w_of())), "cumsum"),
    "scan": (lambda: y_at(lax.scan(lambda c, x: (c + x, c), 0.0, w_of())[1]), "scan"),
    "fori_loop": (lambda: y_at(_loop(w_of())), "scan|while"),
    "cond": (lambda: y_at(lax.cond(True, lambda x: x, lambda x: -x, w_of())), "cond"),
    "shape": (
        lambda: sample("y", Gamma(sample("w", Gamma(1.0, 1.0)), 1.0), obs=1.0), "log-gamma",
    ),
    "half-Cauchy": (lambda: y_at(0.0, sample("w", dist.HalfCauchy(1.0))), "'w' .*HalfCauchy"),
    "a standard deviation": (lambda: y_at(0.0, sample("w", Gamma(1.0, 1.0))), r"w\^-2"),
    "an update at a label": (lambda: y_at(w_of(4).at[label()].set(0.0)), "depend on a latent"),
    "obs": (observed_exp, "its value .* exp"),
    "mask": (mask_of_a_latent, "a mask that depends on latents"),
    "scale": (scale_of_a_latent, "a scale that depends on latents"),
    "Ising": (ising, r"\[z = k\] x \[z = k\]"),
    "spike and slab": (spike_and_slab_in_a_plate, r"\[s = k\] x \[s = k\]"),
    "non-centred": (non_centred_scale, r"tau\^2|w\^2 x w\^2"),
    "mixture": (mixture_same_family, "MixtureSameFamily"),
    "largest label": (
        lambda: y_at(jnp.max(_in_plate(dist.Categorical(np.ones(3) / 3))) * 1.0), "reduce_max",
    ),
    "covariance": (
        lambda: sample("y", dist.MultivariateNormal(
            np.zeros(2), sample("w", dist.Wishart(3.0, rate_matrix=np.eye(2)))), obs=np.ones(2)),
        "a latent where only a known number",
    ),
    "missing without a mask": (
        lambda: sample("y", Normal(sample("w", Normal(0, 1)), 1), obs=np.nan), "infinite or NaN",
    ),
    "one less and a bit": (
        lambda: sample("y", dist.Bernoulli(1.0000001 - sample("w", dist.Beta(1.0, 1.0))), obs=1),
        "a logarithm of a continuous latent",
    ),
    "counts": (lambda: sample("y", dist.Poisson(3.0)), "discrete without a finite support"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_closed_form_is_refused_by_site_and_reason(name):
    model, reason = REFUSED[name]
    with numpyro.validation_enabled(False):
        with pytest.raises(NotConjugateError, match=reason) as caught:
            start_at = handlers.substitute(model, substitute_fn=start)
            make_plan(derive(start_at, (), {}, jax.random.PRNGKey(0)))
    assert re.search(r"[Ss]ite '[wy]'", str(caught.value))


@pytest.mark.parametrize(
    "model",
    [if_of_a_latent, loop_to_a_latent, lambda: y_at(np.asarray(w_of()))]
    + [lambda: y_at((lambda w: w[w > 0].sum())(w_of())), lambda: y_at(float(w_of()[0]))],
    ids=["if", "range", "NumPy", "a Boolean index", "float"],
)
def test_python_that_looks_at_a_latent_is_our_error(model):
    with pytest.raises(NotConjugateError, match=r"looks at a value in Python.*jnp\.where"):
        derive(model, (), {}, jax.random.PRNGKey(0))


def test_a_model_without_latents_is_refused():
    with pytest.raises(NotConjugateError, match="no latent sites"):
        derive(lambda: sample("y", Normal(0, 1), obs=0.0), (), {}, jax.random.PRNGKey(0))


def test_poison_that_no_density_needs_refuses_nothing():
    def model():
        w = w_of()
        deterministic("noted", jnp.exp(jnp.sort(w)))
        y_at(w)

    check(model)


# --- size ----------------------------------------------------------------------------------------


def test_the_mixture_holds_no_array_larger_than_its_data_and_is_derived_fast():
    rows = RNG.normal(size=(20_000, 5))

    def model(x):
        pi = sample("pi", dist.Dirichlet(jnp.ones(10)))
        with plate("components", 10):
            mu = sample("mu", dist.MultivariateNormal(jnp.zeros(5), jnp.eye(5)))
            precision = sample("precision", dist.Wishart(7.0, rate_matrix=jnp.eye(5)))
        with plate("rows", len(x)):
            z = sample("z", dist.Categorical(pi))
            sample("x", dist.MultivariateNormal(mu[z], precision_matrix=precision[z]), obs=x)

    model = handlers.substitute(model, substitute_fn=start)  # its samplers take JAX seconds
    derive(model, (rows[:10],), {}, jax.random.PRNGKey(0))
    began = time.process_time()
    plan = make_plan(derive(model, (rows,), {}, jax.random.PRNGKey(0)))
    assert time.process_time() - began < 5  # about 1 s
    shapes = {np.shape(array) for array in plan.arrays}
    assert max(np.size(array) for array in plan.arrays) == rows.size
    assert {shape for shape in shapes if 20_000 in shape} == {(20_000, 5)}


def test_a_plate_has_one_size():
    def model():
        w = sample("w", Normal(0, 1))
        with plate("rows", 6):
            sample("y", Normal(w, 1), obs=Y)
        with plate("rows", 3):
            sample("x", Normal(w, 1), obs=Y[:3])

    with pytest.raises(NotConjugateError, match="Plate 'rows' has 6 and 3 rows"):
        derive(model, (), {}, jax.random.PRNGKey(0))
