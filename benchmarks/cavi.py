# ruff: noqa: E402 -- threads are set before the libraries look
"""Coordinate ascent derived from a NumPyro model, beside hand-written JAX, scikit-learn, BayesPy.

    pip install -e ".[bench,numpyro,data]"
    python benchmarks/cavi.py [--only SECTION ...]

sweep: one sweep (all updates and the bound) of a Gaussian mixture with diagonal and with full
covariances, N = 20,000, D = 5, K = 10, double precision: against the same updates written by hand
in jitted JAX, an iteration of scikit-learn's BayesianGaussianMixture (full; it has a Normal-Wishart
factor, nearly the same work), and a sweep of BayesPy (full; the same model). From the same start,
all that report the bound must report the same one. wishart: the same with a joint Normal-Wishart
factor, which is scikit-learn's model: parameters after 20 sweeps from the same start, and time.
start: construction, and the first sweep with its compilation, in seconds of this machine. growth:
of a sweep with N, D and K. minibatches: natural-gradient steps on 1,000 of 1,000,000 rows.

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
os.environ.setdefault("NPROC", "1")  # of XLA's pool, which the flags leave alone

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

from pyro_vi_ext.cavi import CAVI, StochasticCAVI
from pyro_vi_ext.cavi.stochastic import CHUNK

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_enable_async_dispatch", False)  # of processor time it costs more


def mixture(x, num_components, full, joint=False):
    """The model of all contestants; ``joint``, with the precision in the prior of the means."""
    dim = x.shape[1]
    pi = numpyro.sample("pi", dist.Dirichlet(2.0 * jnp.ones(num_components)))
    with numpyro.plate("components", num_components):
        if joint:
            tau = numpyro.sample("tau", dist.Wishart(dim + 3.0, rate_matrix=jnp.eye(dim)))
            prior = dist.MultivariateNormal(jnp.zeros(dim), precision_matrix=0.1 * tau)
            mu = numpyro.sample("mu", prior)
        elif full:
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


def sklearn_mixture(x, num_components, start, num_steps):
    """BayesianGaussianMixture of the same model after some iterations from the same start."""
    from sklearn.mixture import BayesianGaussianMixture

    class Started(BayesianGaussianMixture):
        def _initialize_parameters(self, x, *args, **kwargs):
            self._initialize(x, start)

    dim = x.shape[1]
    model = Started(
        n_components=num_components,
        max_iter=num_steps,
        tol=0.0,
        reg_covar=0.0,
        weight_concentration_prior_type="dirichlet_distribution",
        weight_concentration_prior=2.0,
        mean_precision_prior=0.1,
        mean_prior=np.zeros(dim),
        degrees_of_freedom_prior=dim + 3.0,
        covariance_prior=np.eye(dim),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, on purpose
        return model.fit(x)


def sklearn_seconds(x, num_components, start, sweeps):
    """Processor time of an iteration of BayesianGaussianMixture."""
    times = []
    for num in (1, 1 + sweeps):
        began = time.process_time()
        sklearn_mixture(x, num_components, start, num)
        times.append(time.process_time() - began)
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
    if "wishart" in args.only:
        print_wishart(args, x, num_components, start)
    if "start" in args.only:
        print_start(x, num_components)
    if "growth" in args.only:
        print_growth(args)
    if "minibatches" in args.only:
        print_minibatches(args)


def print_wishart(args, x, num_components, start):
    print(f"\nNormal-Wishart factors, N, D, K = {*x.shape, num_components}")
    cavi = CAVI(mixture, x, num_components, True, True, blocks=[("mu", "tau")])
    state = cavi.run(1, progress=False).state
    state["z"] = {"onehot": jnp.asarray(start)}
    # Its iterations end with these parameters, ours with the responsibilities: one more of ours.
    result = cavi.run(21, tol=0, state=state, progress=False)
    q, peer = result.params["mu, tau"], sklearn_mixture(x, num_components, start, 20)
    pairs = {
        "means": (q["loc"][:, 0], peer.means_),
        "mean precisions": (1 / q["covariance"][:, 0, 0], peer.mean_precision_),
        "degrees of freedom": (q["concentration"], peer.degrees_of_freedom_),
        "covariances": (q["rate_matrix"] / q["concentration"][:, None, None], peer.covariances_),
        "weights": (result.params["pi"]["concentration"], peer.weight_concentration_),
    }
    for name, (ours, theirs) in pairs.items():
        worst = np.abs(np.asarray(ours) / theirs - 1).max()
        print(f"  largest relative difference to scikit-learn after 20 sweeps, {name}: {worst:.1e}")
    ours = {"state": state}

    def sweep():
        ours["state"], _, bound, _ = cavi._first(cavi.plan.arrays, ours["state"])
        return float(bound)

    sweep()
    ratios = []
    for _ in range(args.rounds):
        began = time.process_time()
        for _ in range(args.sweeps):
            sweep()
        own = (time.process_time() - began) / args.sweeps
        ratios.append(own / sklearn_seconds(x, num_components, start, args.sweeps))
    print(f"  time of a sweep, ours to scikit-learn: {statistics.median(ratios):.3f}")


def print_minibatches(args):
    num, dim, num_components, size = 1_000_000, 5, 10, 1000
    print(f"\nminibatches of {size} rows, N, D, K = {num, dim, num_components}")
    x = make_data(num, dim, num_components, args.seed)
    cavi = CAVI(mixture, x, num_components, True, True, blocks=[("mu", "tau")])
    stochastic = StochasticCAVI(cavi, "data", size)
    key, ends = jax.random.PRNGKey(args.seed), {}
    for num_steps in (100, 1000, 5000):
        result = stochastic.run(num_steps, key, progress=False)
        ends[num_steps] = result.bound
    moments = {n: f.moments(result.params[n]) for n, f in result.factors.items()}
    moments["z"] = {"onehot": jax.nn.softmax(result.local(np.arange(num)).params["z"]["logits"])}
    full = cavi.run(200, tol=1e-3, state=moments, progress=False)
    for num_steps, bound in ends.items():
        print(
            f"  after {num_steps} steps ({num_steps * size / num:g} passes over the data): "
            f"{(full.bound - bound) / num:.2e} nats a row below the optimum of coordinate ascent"
        )
    steps = stochastic.run(CHUNK, key, progress=False).state
    rows = np.stack([np.arange(size) + i * size for i in range(CHUNK)])
    draws, arrays = steps["draws"], jax.tree.map(jnp.asarray, cavi.plan.arrays)
    ratios = []
    for _ in range(args.rounds):
        began = time.process_time()
        jax.block_until_ready(stochastic._many(arrays, draws, steps["eta"], rows, np.arange(CHUNK)))
        own = (time.process_time() - began) / CHUNK
        began = time.process_time()
        jax.block_until_ready(cavi._first(arrays, full.state))
        ratios.append(own / (time.process_time() - began))
    print(
        f"  time of a step to that of a sweep over all rows: {statistics.median(ratios):.5f} "
        f"(rows: {size / num:.5f}); responsibilities held: {size * num_components} numbers, "
        f"not {num * num_components}"
    )


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
            sklearn_seconds(x, num_components, start, args.sweeps) for _ in range(args.rounds)
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
    sections = ("sweep", "wishart", "start", "growth", "minibatches")
    add("--only", nargs="+", choices=sections, default=sections)
    add("--size", type=int, nargs=3, default=(20000, 5, 10), metavar=("N", "D", "K"))
    add("--rounds", type=int, default=5)
    add("--sweeps", type=int, default=10, help="in each round")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
