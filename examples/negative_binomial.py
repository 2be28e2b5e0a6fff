"""One real posterior by every method: red mites on apple leaves, negative-binomial counts.

The posterior of (r, p) is a narrow ridge. Mean-field methods see neither its length nor its slope;
a semi-implicit guide does, and its lower and upper bound say how well. Everything is measured
against the exact answer by quadrature.

    python examples/negative_binomial.py [--num-steps 2000] [--device cpu] [--seed 0]

prints one table and writes to runs/negative_binomial/: table.csv, posterior.png, and one ArviZ
file (NetCDF) per method.
"""

import argparse
import csv
import math
import pathlib
import sys
import time

import arviz as az
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import Beta, Gamma

from pyro_vi_ext import SemiImplicitELBO, fit, from_pyro_svi
from pyro_vi_ext.guides import (
    AutoSemiImplicit,
    NegativeBinomialSemiImplicit,
    gamma_beta_guide,
)
from pyro_vi_ext.models.negative_binomial import exact_posterior, load_mites, negative_binomial

COLUMNS = (
    "method,E[r],sd r,E[p],sd p,corr,lower bound,upper bound,KL <=,se,KS r,KS p,seconds"
).split(",")


def main(args):
    out = pathlib.Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # for tensors this small more threads only cost
    pyro.settings.set(module_local_params=True)  # each guide owns its parameters
    x = load_mites(device=args.device)
    exact = exact_posterior(x.cpu())
    rows = [exact_row(exact)]
    draws = {}

    for name, run in methods(args):
        if not any(part in name for part in args.only):
            continue
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        result = run(x, args)
        seconds = time.perf_counter() - start
        row, draws[name] = result.summarise(x, exact, args)
        rows.append({"method": name, **row, "seconds": seconds})
        result.to_arviz(x, args).to_netcdf(out / f"{file_name(name)}.nc")

    print_table(rows)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(exact, draws, out / "posterior.png")
    print(f"\nwritten to {out}/: table.csv, posterior.png, and an ArviZ file per method")
    return rows


# --- the methods -------------------------------------------------------------------------------


def methods(args):
    yield "mean field, CAVI", run_cavi
    yield "mean field, SGD", run_gamma_beta
    yield "AutoNormal", run_auto_normal
    for k in args.num_mixing:
        yield f"SIVI published, K={k}", lambda x, args, k=k: run_published(x, args, k)
    for k in args.num_mixing:
        yield f"AutoSemiImplicit, K={k}", lambda x, args, k=k: run_auto(x, args, k)
    yield "NUTS", run_nuts


class Fitted:
    """A trained Pyro guide; ``marginals()`` are its Gamma and Beta, if that is what it is."""

    def __init__(self, guide, semi_implicit=False, marginals=None):
        self.guide, self.semi_implicit, self.marginals = guide, semi_implicit, marginals

    def summarise(self, x, exact, args):
        draws = sample_guide(self.guide, x, args.num_draws)
        if self.marginals is not None:
            return {**moments(draws), **exact_scores(exact, *self.marginals())}, draws
        lower, error = average(SemiImplicitELBO(500, 1000), self.guide, x, args)
        row = {"lower bound": lower, "KL <=": exact.log_evidence - lower, "se": error}
        if self.semi_implicit:
            upper = SemiImplicitELBO(500, 1000, bound="upper")
            row["upper bound"], _ = average(upper, self.guide, x, args)
        return {**moments(draws), **row, **ks_distances(exact, draws)}, draws

    def to_arviz(self, x, args):
        return from_pyro_svi(negative_binomial, self.guide, x, num_draws=args.num_exported)


class FromNumPyro:
    """The result of coordinate ascent or NUTS."""

    def __init__(self, draws, idata, marginals=None):
        self.draws, self.idata, self.marginals = draws, idata, marginals

    def summarise(self, x, exact, args):
        if self.marginals is None:
            row = ks_distances(exact, self.draws)
        else:
            row = exact_scores(exact, *self.marginals)
        return {**moments(self.draws), **row}, self.draws

    def to_arviz(self, x, args):
        return self.idata


def run_gamma_beta(x, args):
    """Mean field in the family of coordinate ascent, by stochastic gradients with stock Pyro."""
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.2}, "gamma": 0.997}
    optimizer = pyro.optim.ExponentialLR(schedule)
    loss = Trace_ELBO(50, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(negative_binomial, gamma_beta_guide, optimizer, loss)
    fit(svi, x, num_steps=args.num_steps)

    def marginals():
        names = ("r_concentration", "r_rate", "p_concentration1", "p_concentration0")
        a, b, alpha, beta = (pyro.param(name).detach().cpu() for name in names)
        return Gamma(a, b), Beta(alpha, beta)

    return Fitted(gamma_beta_guide, marginals=marginals)


def run_auto_normal(x, args):
    guide = AutoNormal(negative_binomial)
    loss = Trace_ELBO(50, max_plate_nesting=1, vectorize_particles=True)(negative_binomial, guide)
    fit(loss, x, num_steps=args.num_steps, optimizer=adam(0.01), scheduler=decay(0.998))
    return Fitted(guide)


def run_published(x, args, num_mixing):
    """Section 4.1 of Yin and Zhou 2018: noise 10, ReLU 40-60-40, fixed sigma 0.1."""
    guide = NegativeBinomialSemiImplicit().to(x.device)
    loss = SemiImplicitELBO(50, num_mixing)(negative_binomial, guide)
    published = decay(0.75 ** (1 / 100))
    fit(loss, x, num_steps=args.num_steps, optimizer=adam(0.01), scheduler=published)
    return Fitted(guide, semi_implicit=True)


def run_auto(x, args, num_mixing):
    guide = AutoSemiImplicit(negative_binomial)
    loss = SemiImplicitELBO(50, num_mixing)(negative_binomial, guide)
    fit(loss, x, num_steps=args.num_steps, optimizer=adam(0.01), scheduler=cosine(args.num_steps))
    return Fitted(guide, semi_implicit=True)


def run_cavi(x, args):
    from pyro_vi_ext.models.negative_binomial_numpyro import cavi

    result = cavi(x.cpu().numpy())
    r, p = (result.posterior[name] for name in "rp")
    q_r = Gamma(float(r.concentration), float(r.rate))
    q_p = Beta(float(p.concentration1), float(p.concentration0))
    draws = {"r": q_r.sample((args.num_draws,)), "p": q_p.sample((args.num_draws,))}
    exported = {name: v[None, : args.num_exported].numpy() for name, v in draws.items()}
    return FromNumPyro(draws, az.from_dict(posterior=exported), (q_r, q_p))


def run_nuts(x, args):
    import jax

    from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64, nuts

    key = jax.random.PRNGKey(args.seed)
    bar = sys.stderr.isatty()  # as in fit
    mcmc = nuts(x.cpu().numpy(), num_samples=args.num_nuts, rng_key=key, progress_bar=bar)
    samples = mcmc.get_samples()
    draws = {name: torch.tensor(samples[name].tolist()) for name in "rp"}
    with enable_x64(True):
        return FromNumPyro(draws, az.from_numpyro(mcmc))


def adam(lr):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def decay(gamma):
    return lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)


def cosine(num_steps):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)


# --- what is reported --------------------------------------------------------------------------


def sample_guide(guide, x, num_draws):
    """Draws of r and p, each of shape (num_draws,)."""
    with torch.no_grad(), pyro.plate("draws", num_draws, dim=-2):
        trace = pyro.poutine.trace(guide).get_trace(x)
    return {name: trace.nodes[name]["value"].reshape(-1).cpu() for name in "rp"}


def average(objective, guide, x, args):
    """Mean and standard error of the bound at K = 1000, on the same draws for every objective."""
    pyro.set_rng_seed(args.seed + 1)
    n = args.num_evaluations
    bounds = torch.tensor([-objective.loss(negative_binomial, guide, x) for _ in range(n)])
    return bounds.mean().item(), bounds.std().item() / math.sqrt(n)


def moments(draws):
    r, p = draws["r"], draws["p"]
    corr = torch.corrcoef(torch.stack([r, p]))[0, 1]
    values = (r.mean(), r.std(), p.mean(), p.std(), corr)
    return dict(zip(COLUMNS[1:6], map(float, values), strict=True))


def ks_distances(exact, draws):
    return {f"KS {name}": exact.ks_distance(name, draws[name]) for name in "rp"}


def exact_scores(exact, q_r, q_p):
    """KL and Kolmogorov distances of Gamma x Beta, by quadrature."""
    from scipy.stats import beta

    def beta_cdf(values):
        return torch.as_tensor(
            beta.cdf(values, float(q_p.concentration1), float(q_p.concentration0))
        )

    kl = exact.kl_from(lambda r, p: q_r.log_prob(r) + q_p.log_prob(p)).item()
    return {
        "lower bound": exact.log_evidence - kl,
        "KL <=": kl,
        "se": 0.0,
        "KS r": exact.ks_distance_cdf("r", q_r.cdf),
        "KS p": exact.ks_distance_cdf("p", beta_cdf),
    }


def exact_row(exact):
    values = (exact.mean["r"], exact.sd["r"], exact.mean["p"], exact.sd["p"], exact.corr)
    row = dict(zip(COLUMNS[1:6], values, strict=True))
    zeros = dict.fromkeys(("KL <=", "se", "KS r", "KS p"), 0.0)
    bounds = {"lower bound": exact.log_evidence, "upper bound": exact.log_evidence}
    return {"method": "exact (quadrature)", **row, **bounds, **zeros}


def print_table(rows):
    formats = dict.fromkeys(COLUMNS[1:], "{:.4f}") | {"seconds": "{:.1f}", "corr": "{:+.4f}"}
    table = [COLUMNS] + [
        [row["method"]] + [formats[c].format(row[c]) if c in row else "" for c in COLUMNS[1:]]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print()
    for line in table:
        first, *rest = (cell.rjust(w) for cell, w in zip(line, widths, strict=True))
        print("  ".join([line[0].ljust(widths[0]), *rest]))


def file_name(method):
    return "".join(c if c.isalnum() else "_" for c in method.lower()).replace("__", "_")


# --- the picture -------------------------------------------------------------------------------


def plot(exact, draws, path):
    """Joint posterior of (r, p), 90% regions, and both marginals: mean field left, SIVI right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    semi = [name for name in draws if "SIVI" in name or "SemiImplicit" in name]
    left = [name for name in draws if name not in semi]
    published = [name for name in semi if "published" in name]
    auto = [name for name in semi if "published" not in name]
    best = [name for name in auto if name.endswith("K=100")] or auto[-1:]
    palette = dict(zip(left, ["tab:blue", "tab:cyan", "tab:purple", "black"], strict=False))
    shades = plt.get_cmap("plasma")(torch.linspace(0.85, 0.1, max(2, len(published))).tolist())
    palette |= dict(zip(published, shades, strict=False))
    palette |= dict.fromkeys(best, "tab:green")

    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subfigures(1, 2)
    titles = ("Mean field, and NUTS", "Semi-implicit")
    for panel, names, title in zip(panels, (left, published + best), titles, strict=True):
        draw_panel(panel, exact, {name: draws[name] for name in names}, palette, title)
    figure.suptitle("Negative-binomial posterior of the red-mite counts: 90% regions and marginals")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_panel(panel, exact, draws, palette, title):
    limits = {"r": (0.3, 2.6), "p": (0.25, 0.78)}
    axes = panel.subplot_mosaic(
        [["top", "."], ["joint", "side"]], width_ratios=(4, 1.2), height_ratios=(1.2, 4)
    )
    joint, top, side = axes["joint"], axes["top"], axes["side"]
    r, p = (torch.linspace(*limits[name], 300) for name in "rp")
    density = exact.log_density(r[:, None].expand(300, 300), p.expand(300, 300)).exp()
    levels = [hdr_level(density, mass) for mass in (0.99, 0.9, 0.5)]
    shades = ["0.88", "0.74", "0.55"]
    joint.contourf(r, p, density.T, [*levels, float(density.max())], colors=shades)
    for name, ax, swap in (("r", top, False), ("p", side, True)):
        grid, values = exact.grid[name], exact.density[name]
        keep = (grid > limits[name][0]) & (grid < limits[name][1])
        line = (values[keep], grid[keep]) if swap else (grid[keep], values[keep])
        (ax.fill_betweenx if swap else ax.fill_between)(grid[keep], values[keep], color="0.75")
        ax.plot(*line, color="0.4", lw=1)
    joint.plot([], [], color="0.74", lw=8, label="exact: 50, 90, 99%")
    for name, values in draws.items():
        color = palette[name]
        coarse_r, coarse_p = r[::3], p[::3]
        surface = kde_2d(values, coarse_r, coarse_p)
        level = hdr_level(surface, 0.9)
        style = "--" if name == "NUTS" else "-"
        joint.contour(
            coarse_r, coarse_p, surface.T, [level], colors=[color], linewidths=1.8, linestyles=style
        )
        joint.plot([], [], color=color, lw=1.8, ls=style, label=name)
        top.plot(r, kde_1d(values["r"], r), color=color, lw=1.5, ls=style)
        side.plot(kde_1d(values["p"], p), p, color=color, lw=1.5, ls=style)
    joint.set(xlim=limits["r"], ylim=limits["p"], xlabel="r (dispersion)", ylabel="p (probability)")
    top.set(xlim=limits["r"], title=title)
    side.set(ylim=limits["p"])
    for ax in (top, side):
        ax.tick_params(labelbottom=False, labelleft=False, length=0)
        ax.spines[:].set_visible(False)
    joint.legend(fontsize=9, loc="upper right", frameon=False)


def hdr_level(density, mass):
    """The density level whose superlevel set on the grid holds the given share of the mass."""
    values = density.reshape(-1).sort(descending=True).values
    share = values.cumsum(0) / values.sum()
    return float(values[(share < mass).sum()])


def kde_2d(draws, r, p, num=10_000):
    """Kernel density of draws on the grid r x p, estimated in (log r, logit p)."""
    from scipy.stats import gaussian_kde

    u = torch.stack([draws["r"].log(), draws["p"].logit()])[:, :num]
    grid = torch.cartesian_prod(r.log(), p.logit()).T
    value = torch.as_tensor(gaussian_kde(u.numpy())(grid.numpy())).reshape(len(r), len(p))
    return value / r[:, None] / (p * (1 - p))


def kde_1d(draws, grid, num=20_000):
    from scipy.stats import gaussian_kde

    return gaussian_kde(draws[:num].numpy())(grid.numpy())


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=2000, help="gradient steps of each fit")
    parser.add_argument("--num-mixing", type=int, nargs="+", default=[0, 1, 5, 20, 100, 1000])
    parser.add_argument("--num-draws", type=int, default=100_000, help="draws for moments and KS")
    parser.add_argument("--num-exported", type=int, default=2000, help="draws in the ArviZ files")
    parser.add_argument(
        "--num-evaluations", type=int, default=80, help="of the bounds, 500 draws each"
    )
    parser.add_argument("--num-nuts", type=int, default=2500, help="draws per chain")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of method names")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/negative_binomial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
