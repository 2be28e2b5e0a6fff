# ruff: noqa: E402 -- threads are set before the libraries look
"""Coordinate ascent derived from a NumPyro model, beside hand-written JAX, scikit-learn, BayesPy.

    pip install -e ".[bench,numpyro,data]"
    python benchmarks/cavi.py [--only SECTION ...]

sweep: one sweep (all updates and the bound) of a Gaussian mixture with diagonal and with full
covariances, N = 20,000, D = 5, K = 10, double precision: against the same updates written by hand
in jitted JAX, an iteration of scikit-learn's BayesianGaussianMixture (full; it has a Normal-Wishart
factor, nearly the same work), and a sweep of BayesPy (full; the same model). From the same start,
all that report the bound must report the same one. start: construction, and the first sweep with
its compilation, in seconds of this machine. growth: of a sweep with N, D and K.

Times are processor times on one thread, contestants in turn, medians over rounds; ratios are
medians of the rounds' ratios.
"""

import argparse
import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import math
import platform
import statistics
import time
import warnings
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import digamma, gammaln

from pyro_vi_ext.cavi import CAVI

jax.config.update("jax_enable_x64", True)


def mixture(x, num_components, full):
    """The model of all contestants but scikit-learn."""
    dim = x.shape[1]
    pi = numpyro.sample("pi", dist.Dirichlet(2.0 * jnp.ones(num_components)))
    with numpyro.plate("components", num_components):
        if full:
            prior = dist.MultivariateNormal(jnp.zeros(dim), precision_matrix=0.1 * jnp.eye(dim))
            mu = numpyro.sample("mu", prior)
            tau = numpyro.sample("tau", dist.Wishart(dim + 3.0, rate_matrix=jnp.eye(dim)))
        else:
            mu = numpyro.sample("mu", dist.Normal(0.0, 3.0).expand([dim]).to_event(1))
            tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0).expand([dim]).to_event(1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(pi))
        if full:
            likelihood = dist.MultivariateNormal(mu[z], precision_matrix=tau[z])
        else:
            likelihood = dist.Normal(mu[z], 1 / jnp.sqrt(tau[z])).to_event(1)
        numpyro.sample("x", likelihood, obs=x)


def make_data(num, dim, num_components, seed=0):
    rng = np.random.default_rng(seed)
    centers = 4.0 * rng.normal(size=(num_components, dim))
    return rng.normal(size=(num, dim)) + centers[rng.integers(0, num_components, num)]


# --- by hand -------------------------------------------------------------------------------------


def _weights(r, a0):
    """The factor of the weights: expected logarithms, and its KL to the prior."""
    a = a0 + r.sum(0)
    log_pi = digamma(a) - digamma(a.sum())
    k = len(a)
    kl = gammaln(a.sum()) - gammaln(a).sum() + ((a - a0) * log_pi).sum()
    return log_pi, kl - gammaln(k * a0) + k * gammaln(a0)


def _assign(logits):
    log_sum = jax.nn.logsumexp(logits, 1)
    return jnp.exp(logits - log_sum[:, None]), log_sum.sum()


@jax.jit
def diagonal_sweep(x, r, tau):
    """q(pi), q(mu), q(tau), q(z) in turn; responsibilities, E[tau], and the bound."""
    dim = x.shape[1]
    n, s1, s2 = r.sum(0)[:, None], r.T @ x, r.T @ (x * x)
    log_pi, kl = _weights(r, 2.0)
    v = 1 / (1 / 9.0 + n * tau)
    m = v * tau * s1
    a, b = 2.0 + n / 2, 1.0 + 0.5 * (s2 - 2 * m * s1 + n * (m * m + v))
    tau, log_tau = a / b, digamma(a) - jnp.log(b)
    kl += 0.5 * ((m * m + v) / 9.0 - 1 - jnp.log(v / 9.0)).sum()
    kl += ((a - 2.0) * digamma(a) - gammaln(a) + 2.0 * jnp.log(b) + tau - a).sum()
    square = (x * x) @ tau.T - 2 * x @ (tau * m).T + (tau * (m * m + v)).sum(1)
    logits = log_pi + 0.5 * (log_tau.sum(1) * jnp.ones_like(n).T[0]) - 0.5 * square
    r, evidence = _assign(logits - 0.5 * dim * math.log(2 * math.pi))
    return r, tau, evidence - kl


@jax.jit
def full_sweep(x, r, tau):
    dim = x.shape[1]
    eye, nu0 = jnp.eye(dim), dim + 3.0
    n, s1 = r.sum(0), r.T @ x
    s2 = jnp.einsum("nk,nd,ne->kde", r, x, x)
    log_pi, kl = _weights(r, 2.0)
    precision = 0.1 * eye + n[:, None, None] * tau
    v = jnp.linalg.inv(precision)
    m = jnp.einsum("kde,kef,kf->kd", v, tau, s1)
    mm = v + m[:, :, None] * m[:, None, :]
    log_det_v = -jnp.linalg.slogdet(precision)[1]
    kl += (
        0.5 * (0.1 * jnp.trace(mm, axis1=1, axis2=2) - dim - log_det_v - dim * math.log(0.1)).sum()
    )
    nu, cross = nu0 + n, s1[:, :, None] * m[:, None, :]
    rate = eye + s2 - cross - jnp.swapaxes(cross, 1, 2) + n[:, None, None] * mm
    tau = nu[:, None, None] * jnp.linalg.inv(rate)
    halves = (nu[:, None] - jnp.arange(dim)) / 2
    log_det_rate = jnp.linalg.slogdet(rate)[1]
    log_det = digamma(halves).sum(1) + dim * math.log(2) - log_det_rate

    def log_gamma(nu):
        return gammaln((nu[:, None] - jnp.arange(dim)) / 2).sum(1)

    kl += (
        0.5 * (nu - nu0) * log_det - 0.5 * nu * dim + 0.5 * jnp.trace(tau, axis1=1, axis2=2)
    ).sum()
    kl += (0.5 * nu * log_det_rate - 0.5 * nu * dim * math.log(2) - log_gamma(nu)).sum()
    kl += (0.5 * nu0 * dim * math.log(2) + log_gamma(jnp.full_like(nu, nu0))).sum()
    square = jnp.einsum("nd,kde,ne->nk", x, tau, x)
    square += -2 * x @ jnp.einsum("kde,ke->dk", tau, m) + (tau * mm).sum((1, 2))
    logits = log_pi + 0.5 * log_det - 0.5 * square - 0.5 * dim * math.log(2 * math.pi)
    r, evidence = _assign(logits)
    return r, tau, evidence - kl


# --- contestants: functions that make one sweep --------------------------------------------------


def contestants(x, num_components, full, start):
    """name -> (sweep, bound after it or None)."""
    cavi = CAVI(mixture, x, num_components, full)
    state = cavi.run(1, progress=False).state
    state["z"] = {"onehot": jnp.asarray(start)}
    ours = {"state": state}

    def sweep():
        moments, _, bound, _ = cavi._first(cavi.plan.arrays, ours["state"])
        ours["state"] = moments
        return float(bound)

    hand = {"r": jnp.asarray(start), "tau": state["tau"]["pow1"]}
    by_hand = full_sweep if full else diagonal_sweep

    def hand_sweep():
        hand["r"], hand["tau"], bound = by_hand(x, hand["r"], hand["tau"])
        return float(bound)

    return {"ours": sweep, "by hand": hand_sweep}, state


def bayespy_sweep(x, num_components, start, tau):
    """A sweep of BayesPy in the same order from the same start; None if it is not installed."""
    try:
        from bayespy.inference import VB
        from bayespy.nodes import Categorical, Dirichlet, Gaussian, Mixture, Wishart
    except ImportError:
        return None
    dim = x.shape[1]
    pi = Dirichlet(2.0 * np.ones(num_components))
    z = Categorical(pi, plates=(len(x),))
    mu = Gaussian(np.zeros(dim), 0.1 * np.identity(dim), plates=(num_components,))
    precision = Wishart(dim + 3.0, np.identity(dim), plates=(num_components,))
    y = Mixture(z, Gaussian, mu, precision)
    y.observe(x)
    z.initialize_from_value(start.argmax(1))
    precision.initialize_from_value(np.asarray(tau))  # q(mu) comes first
    inference = VB(y, z, pi, mu, precision)

    def sweep():
        inference.update(pi, mu, precision, z, repeat=1, verbose=False, tol=None)
        return float(inference.loglikelihood_lowerbound())

    return sweep


def sklearn_seconds(x, num_components, sweeps):
    """Processor time of an iteration of BayesianGaussianMixture."""
    from sklearn.mixture import BayesianGaussianMixture

    times = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, on purpose
        for num in (1, 1 + sweeps):
            model = BayesianGaussianMixture(
                n_components=num_components,
                max_iter=num,
                tol=0.0,
                reg_covar=0.0,
                init_params="random_from_data",
                random_state=0,
            )
            start = time.process_time()
            model.fit(x)
            times.append(time.process_time() - start)
    return (times[1] - times[0]) / sweeps


def main(args):
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, one thread\n"
        f"jax {jax.__version__}, numpyro {numpyro.__version__}, "
        f"scikit-learn {version('scikit-learn')}, seed {args.seed}"
    )
    num, dim, num_components = args.size
    x = make_data(num, dim, num_components, args.seed)
    rng = np.random.default_rng(args.seed + 1)
    start = np.eye(num_components)[rng.integers(0, num_components, num)]
    if "sweep" in args.only:
        for full in (False, True):
            print_sweep(args, x, num_components, full, start)
    if "start" in args.only:
        print_start(x, num_components)
    if "growth" in args.only:
        print_growth(args)


def print_sweep(args, x, num_components, full, start):
    print(f"\n{'full' if full else 'diagonal'} covariances, N, D, K = {*x.shape, num_components}")
    sweeps, state = contestants(x, num_components, full, start)
    if full:
        peer = bayespy_sweep(x, num_components, start, state["tau"]["pow1"])
        if peer is not None:
            sweeps[f"BayesPy {version('bayespy')}"] = peer
    bounds = {name: [sweep() for _ in range(3)] for name, sweep in sweeps.items()}
    for name, values in bounds.items():
        print(f"  bound after sweeps 1 to 3, {name:14}" + "".join(f"{v:18.6f}" for v in values))
    times = {name: [] for name in sweeps}
    for _ in range(args.rounds):
        for name, sweep in sweeps.items():
            began = time.process_time()
            for _ in range(args.sweeps):
                sweep()
            times[name].append((time.process_time() - began) / args.sweeps)
    if full:
        times["scikit-learn"] = [
            sklearn_seconds(x, num_components, args.sweeps) for _ in range(args.rounds)
        ]
    for name in list(times)[1:]:
        ratios = [a / b for a, b in zip(times["ours"], times[name], strict=True)]
        print(f"  time of a sweep, ours to {name}: {statistics.median(ratios):.3f}")


def print_start(x, num_components):
    for full in (False, True):
        jax.clear_caches()
        began = time.perf_counter()
        cavi = CAVI(mixture, x, num_components, full)
        constructed = time.perf_counter() - began
        state = cavi.run(1, progress=False).state
        jax.clear_caches()
        began = time.perf_counter()
        jax.block_until_ready(jax.jit(cavi._sweep)(cavi.plan.arrays, state))
        kind = "full" if full else "diagonal"
        print(
            f"\n{kind}: construction {constructed:.1f} s, first sweep with its compilation "
            f"{time.perf_counter() - began:.1f} s (this machine)"
        )


def print_growth(args):
    print("\ngrowth of a sweep, full covariances, to that of N = 5,000, D = 5, K = 5")
    base = None
    for num, dim, num_components in (
        (5000, 5, 5),
        (20000, 5, 5),
        (80000, 5, 5),
        (5000, 10, 5),
        (5000, 20, 5),
        (5000, 5, 10),
        (5000, 5, 20),
    ):
        x = make_data(num, dim, num_components, args.seed)
        start = np.eye(num_components)[np.arange(num) % num_components]
        sweep = contestants(x, num_components, True, start)[0]["ours"]
        sweep()
        times = []
        for _ in range(args.rounds):
            began = time.process_time()
            for _ in range(args.sweeps):
                sweep()
            times.append((time.process_time() - began) / args.sweeps)
        value = statistics.median(times)
        base = base or value
        print(f"  N = {num:6}, D = {dim:2}, K = {num_components:2}: {value / base:6.1f}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    sections = ("sweep", "start", "growth")
    add("--only", nargs="+", choices=sections, default=sections)
    add("--size", type=int, nargs=3, default=(20000, 5, 10), metavar=("N", "D", "K"))
    add("--rounds", type=int, default=5)
    add("--sweeps", type=int, default=10, help="in each round")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
