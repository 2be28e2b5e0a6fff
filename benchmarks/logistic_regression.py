# ruff: noqa: E402 -- threads are set before the libraries look
"""Bayesian logistic regression: how close each posterior comes (study of arXiv:1805.11183).

    pip install -e ".[numpyro,data,plot,progress]"
    python benchmarks/logistic_regression.py [--data breast_cancer | path/to/waveform.mat]
        [--num-steps 10000] [--seed 0] [--only NAME ...]

Coordinate ascent with Polya-Gamma variables, AutoNormal, AutoMultivariateNormal, AutoSemiImplicit,
and NUTS as the reference; for the files of the paper also the Gaussian and the Gibbs draws that
they hold. All in float64.

log p(y): importance sampling from a Student t with the moments of the NUTS draws. bound: the mean
of log p(w, y) - log q(w) over draws of q (log h_K, with --num-mixing draws, if q is semi-implicit;
for CAVI too it is that of q(w), without the Polya-Gamma variables). KL: log p(y) - bound, with its
standard error; for a semi-implicit q it is an upper bound, and KL >= a lower one, in expectation.
Against NUTS: sd, the mean and range over weights of the ratio of posterior standard deviations;
corr, the root mean square error over pairs of weights of their correlation. test: mean log of the
posterior predictive probability of a test label, and the share of labels that it gets wrong. k:
Pareto shape of the importance weights. seconds: of this machine, training only.

Guides are trained by Adam with a cosine schedule down to zero and J = 50 draws: the Gaussian ones
for 10,000 steps from 0.03, after which their bound has settled; AutoSemiImplicit, with its
defaults and K = 100, from the location and scale of the multivariate Gaussian for 4,000 more from
0.01 (its seconds are those of both). From scratch, 4,000 steps from 0.03, it ends higher on all
three data sets.
"""

import argparse
import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import math
import pathlib
import platform
import sys
import time

import jax
import numpy as np
import numpyro
import pyro
import pyro.distributions as dist
import torch
from numpyro.diagnostics import summary
from numpyro.infer import MCMC, NUTS
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_feasible

from pyro_vi_ext import SemiImplicitELBO, fit, guide_report, log_evidence
from pyro_vi_ext.cavi import CAVI
from pyro_vi_ext.cavi.augmentations import PolyaGammaReparam
from pyro_vi_ext.guides import AutoSemiImplicit
from pyro_vi_ext.models import logistic_regression_numpyro
from pyro_vi_ext.models.logistic_regression import load_logistic_data, logistic_regression

jax.config.update("jax_enable_x64", True)

J, K = 50, 100  # draws of w and mixing draws, in training
REFERENCE = "NUTS"
COLUMNS = {  # of the table, and their widths
    "bound": 10,
    "KL": 10,
    "se": 8,
    "KL >=": 8,
    "sd": 7,
    "range": 11,
    "corr": 7,
    "test LL": 9,
    "error": 8,
    "k": 6,
    "seconds": 9,
}


def main(args):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.settings.set(module_local_params=True)  # each guide owns its parameters
    data = load_logistic_data(args.data)
    print(f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores, one thread")
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, jax {jax.__version__}, "
        f"numpyro {numpyro.__version__}, seed {args.seed}"
    )
    print(
        f"{args.data}: X {tuple(data.X_train.shape)}, test {tuple(data.X_test.shape)}", flush=True
    )

    reference = run_nuts(data, args)
    evidence = evidence_from(reference.draws, data, args)
    print(
        f"log p(y) = {evidence.total:.4f} +- {evidence.total_standard_error:.4f}, "
        f"k = {float(evidence.pareto_k):.2f}, ESS {float(evidence.ess):.0f} "
        f"of {evidence.num_particles}\n"
    )
    print_cells(["", *COLUMNS])
    draws = {}
    for name, run in methods(data, args).items():
        if not any(part in name for part in args.only):
            continue
        pyro.set_rng_seed(args.seed)
        posterior = run(data, args)
        draws[name] = posterior.draws
        print_row(name, posterior, reference, evidence, data, args)
    draws[REFERENCE] = reference.draws
    print_row(REFERENCE, reference, reference, evidence, data, args)
    plot(draws, pathlib.Path(args.output))


# --- the methods --------------------------------------------------------------------------------


class Posterior:
    """Draws of w (S, D), the guide they are from if it has a density, and seconds of training."""

    semi_implicit = False

    def __init__(self, draws, guide=None, seconds=None):
        self.draws, self.guide, self.seconds = draws, guide, seconds


def methods(data, args):
    found = {
        "CAVI, Polya-Gamma": run_cavi,
        "AutoNormal": run_auto_normal,
        "AutoMultivariateNormal": run_auto_multivariate_normal,
        "AutoSemiImplicit": run_semi_implicit,
    }
    if data.vb is not None:
        found["Gaussian in the file"] = lambda data, args: gaussian(*data.vb, data, args)
    if data.gibbs is not None:
        found["Gibbs in the file"] = lambda data, args: Posterior(data.gibbs)
    return found


def run_cavi(data, args):
    start = time.perf_counter()
    model = numpyro.handlers.reparam(
        logistic_regression_numpyro.logistic_regression, config={"y": PolyaGammaReparam()}
    )
    cavi = CAVI(model, data.X_train.numpy(), data.y_train.numpy())
    q = cavi.run(num_steps=2000).posterior["w"]
    seconds = time.perf_counter() - start
    mean, covariance = (torch.tensor(np.asarray(a)) for a in (q.mean, q.covariance_matrix))
    return gaussian(mean, covariance, data, args, seconds)


def run_auto_normal(data, args):
    return run_gaussian(AutoNormal, data, args)


def run_auto_multivariate_normal(data, args):
    return run_gaussian(AutoMultivariateNormal, data, args)


def run_gaussian(kind, data, args):
    guide = kind(logistic_regression, init_loc_fn=init_to_feasible)
    objective = Trace_ELBO(J, max_plate_nesting=1, vectorize_particles=True)
    return trained(guide, objective, data, args.num_steps, args.lr, args)


def run_semi_implicit(data, args):
    """From the best Gaussian: its parameters are those of the guide, with a network in between."""
    found = run_auto_multivariate_normal(data, args)
    guide = AutoSemiImplicit(logistic_regression)
    guide(data.X_train, data.y_train)  # makes its parameters
    with torch.no_grad():
        guide.loc.copy_(found.guide.loc)
        guide.scale, guide.unit_tril = found.guide.scale, found.guide.scale_tril
    objective = SemiImplicitELBO(J, K)
    posterior = trained(guide, objective, data, args.num_mixing_steps, args.mixing_lr, args)
    posterior.seconds += found.seconds
    posterior.semi_implicit = True
    return posterior


def trained(guide, objective, data, num_steps, lr, args):
    start = time.perf_counter()
    with pyro.validation_enabled(False):
        fit(
            objective(logistic_regression, guide),
            data.X_train,
            data.y_train,
            num_steps=num_steps,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr),
            scheduler=lambda adam: torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps),
        )
    seconds = time.perf_counter() - start
    return Posterior(sample(guide, data, args), guide, seconds)


def gaussian(mean, covariance, data, args, seconds=None):
    """A known Gaussian, as a guide."""

    def guide(X, y):
        pyro.sample("w", dist.MultivariateNormal(mean, covariance))

    return Posterior(sample(guide, data, args), guide, seconds)


def run_nuts(data, args):
    start = time.perf_counter()
    mcmc = MCMC(
        NUTS(logistic_regression_numpyro.logistic_regression, dense_mass=True),
        num_warmup=1000,
        num_samples=args.num_nuts,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=sys.stderr.isatty(),  # as in fit
    )
    mcmc.run(jax.random.PRNGKey(args.seed), data.X_train.numpy(), data.y_train.numpy())
    seconds = time.perf_counter() - start
    found = summary(mcmc.get_samples(group_by_chain=True))["w"]
    print(
        f"NUTS: 4 x {args.num_nuts} draws, R-hat <= {found['r_hat'].max():.4f}, "
        f"ESS >= {found['n_eff'].min():.0f}, {seconds:.0f} s"
    )
    return Posterior(torch.tensor(np.asarray(mcmc.get_samples()["w"])), seconds=seconds)


def sample(guide, data, args):
    with torch.no_grad(), pyro.plate("draws", args.num_draws, dim=-2):
        trace = pyro.poutine.trace(guide).get_trace(data.X_train, data.y_train)
    return trace.nodes["w"]["value"].reshape(args.num_draws, -1)


# --- what is reported ---------------------------------------------------------------------------


def evidence_from(draws, data, args):
    """log p(y), proposed from a Student t that has the moments of the draws."""
    degrees = 10.0
    scale_tril = torch.linalg.cholesky(draws.T.cov() * (degrees - 2) / degrees)

    def guide(X, y):
        pyro.sample("w", dist.MultivariateStudentT(degrees, draws.mean(0), scale_tril))

    pyro.set_rng_seed(args.seed)
    return log_evidence(
        logistic_regression,
        guide,
        data.X_train,
        data.y_train,
        num_particles=10 * args.num_draws,
        chunk_size=1000,
    )


def print_row(name, posterior, reference, evidence, data, args):
    cells = {column: "" for column in COLUMNS}
    if posterior.guide is not None:
        cells |= bounds(posterior, evidence, data, args)
    cells |= agreement(posterior.draws, reference.draws)
    cells |= prediction(posterior.draws, data)
    cells["seconds"] = f"{posterior.seconds:.0f}" if posterior.seconds else ""
    print_cells([name, *cells.values()])


def print_cells(cells):
    first, *rest = cells
    print(
        f"{first:22}" + "".join(f"{c:>{COLUMNS[n]}}" for n, c in zip(COLUMNS, rest, strict=True)),
        flush=True,
    )


def bounds(posterior, evidence, data, args):
    """What the density of q gives: the bound, the divergence, and the tail of the weights."""
    pyro.set_rng_seed(args.seed + 1)
    xy = (data.X_train, data.y_train)
    pair = (logistic_regression, posterior.guide, *xy)
    options = {"num_particles": args.num_draws, "num_mixing_particles": args.num_mixing}
    report = guide_report(*pair, **options)
    kl = evidence.total - float(report.elbo)
    se = math.hypot(float(report.elbo_standard_error), evidence.total_standard_error)
    cells = {
        "bound": f"{float(report.elbo):.3f}",
        "KL": f"{'<= ' * posterior.semi_implicit}{kl:.3f}",
        "se": f"{se:.4f}",
        "k": f"{float(report.pareto_k):.2f}",
    }
    if posterior.semi_implicit:
        upper = SemiImplicitELBO(100, args.num_mixing, bound="upper")
        losses = [upper.loss(*pair) for _ in range(args.num_draws // 100)]
        cells["KL >="] = f"{evidence.total + sum(losses) / len(losses):.3f}"
    return cells


def agreement(draws, reference):
    """Ratios of standard deviations to the reference's, and the error of the correlations."""
    ratio = draws.std(0) / reference.std(0)
    i, j = torch.triu_indices(len(ratio), len(ratio), 1)
    error = (draws.T.corrcoef() - reference.T.corrcoef())[i, j]
    return {
        "sd": f"{ratio.mean():.3f}",
        "range": f"{ratio.min():.2f}-{ratio.max():.2f}",
        "corr": f"{error.square().mean().sqrt():.3f}",
    }


def prediction(draws, data):
    """Of the posterior predictive distribution: mean log-probability and share of errors."""
    p = torch.cat([(rows @ draws.T).sigmoid().mean(1) for rows in data.X_test.split(200)])
    return {
        "test LL": f"{dist.Bernoulli(p).log_prob(data.y_test).mean():.4f}",
        "error": f"{((p > 0.5) != data.y_test.bool()).double().mean():.4f}",
    }


# --- the picture --------------------------------------------------------------------------------


def plot(draws, folder):
    """Marginals of the three weights of largest skewness, and the most correlated pair."""
    try:
        import matplotlib
    except ImportError:
        print("\nno picture: pip install pyro_vi_ext[plot]")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reference = draws[REFERENCE]
    centred = (reference - reference.mean(0)) / reference.std(0)
    marginals = centred.pow(3).mean(0).abs().topk(3).indices.tolist()
    correlation = reference.T.corrcoef().tril(-1)
    i, j = divmod(int(correlation.abs().argmax()), len(correlation))
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for name, w in draws.items():
        style = {"color": "black", "lw": 2} if name == REFERENCE else {"lw": 1.3}
        for axis, d in zip(axes, marginals, strict=False):
            low, high = reference[:, d].quantile(torch.tensor([0.001, 0.999])).tolist()
            height, edges = np.histogram(w[:, d], 50, range=(low, high))
            density = height / len(w) / (edges[1] - edges[0])
            axis.plot((edges[1:] + edges[:-1]) / 2, density, label=name, **style)
            axis.set(xlabel=f"w[{d}]", yticks=[])
        axes[3].plot(*ellipse(w[:, [j, i]]), **style)
    axes[3].plot(*reference[:2000, [j, i]].T, ".", color="0.8", ms=2, zorder=0)
    axes[3].set(xlabel=f"w[{j}]", ylabel=f"w[{i}]", title="two standard deviations, NUTS draws")
    axes[0].legend(fontsize=7, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "posterior.png", dpi=130)
    plt.close(figure)
    print(f"\nwritten to {folder / 'posterior.png'}")


def ellipse(pairs):
    """The ellipse of two standard deviations, x and y."""
    angle = torch.linspace(0, 2 * math.pi, 100)
    circle = 2 * torch.stack([angle.cos(), angle.sin()])
    return pairs.mean(0)[:, None] + torch.linalg.cholesky(pairs.T.cov()) @ circle


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default="breast_cancer", help="or the path of waveform.mat or nodal.mat")
    add("--num-steps", type=int, default=10_000, help="of the Gaussian guides")
    add("--lr", type=float, default=0.03, help="of the Gaussian guides")
    add("--num-mixing-steps", type=int, default=4000, help="of AutoSemiImplicit, from the Gaussian")
    add("--mixing-lr", type=float, default=0.01, help="of AutoSemiImplicit")
    add("--num-draws", type=int, default=40_000, help="of each q; ten times as many for log p(y)")
    add("--num-mixing", type=int, default=1000, help="K of the semi-implicit bound, evaluated")
    add("--num-nuts", type=int, default=5000, help="draws of each of four chains")
    add("--only", nargs="+", default=[""], help="methods whose name contains one of these")
    add("--output", default="runs/logistic_regression")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
