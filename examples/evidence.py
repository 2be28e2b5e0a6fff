"""How large is p(x), and is the guide any good? Evidence, bounds and diagnostics on exact answers.

Three models whose evidence is known: the mixture of two Gaussians of the lecture, at a point whose
posterior is 0.76 (a sum over two labels); the irises with one factor, whose sign is free
(quadrature); and a hundred readings of sensors of unequal noise (closed form).

    python examples/evidence.py [--num-steps 600] [--device cpu] [--seed 0]

prints one table and the guide reports, and writes to runs/evidence/: table.csv and evidence.png.
"""

import argparse
import csv
import math
import pathlib
import time
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro.distributions import constraints
from pyro.infer import SVI

from pyro_vi_ext import (
    ImportanceWeightedELBO,
    TraceSTL_ELBO,
    elbo_terms,
    fit,
    guide_report,
    log_evidence,
)
from pyro_vi_ext.models.gaussian_mixture import load_iris
from pyro_vi_ext.models.two_gaussians import (
    LECTURE_MIXTURE,
    QUERY_POINT,
    two_gaussians,
    two_gaussians_guide,
)

COLUMNS = "problem,proposal,draws,estimate,se,exact,ESS,Pareto k,seconds".split(",")


def main(args):
    out = pathlib.Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # for tensors this small more threads only cost
    rows = []
    for section in (bounds_of_the_lecture, elbo_of_the_lecture, irises, sensors):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        print(f"{section.__name__.replace('_', ' ')} ...", flush=True)
        rows += section(args)
    print_table(rows)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out / "evidence.png")
    print(f"\nwritten to {out}/: table.csv, evidence.png")
    return rows


# --- the mixture of the lecture: log p(x) = log sum_z p(x, z) ------------------------------------


def bounds_of_the_lecture(args):
    """The bound L_K of each proposal lambda = q(z = 1), for growing K."""
    x = torch.tensor([QUERY_POINT], device=args.device)
    svi = SVI(two_gaussians, two_gaussians_guide, adam(), ImportanceWeightedELBO(10))
    fit(svi, x, num_steps=args.num_steps)
    proposals = {
        "prior": float(LECTURE_MIXTURE.weights[1]),
        "fitted guide": pyro.param("lambda").item(),
        "posterior": LECTURE_MIXTURE.responsibilities(x)[0, 1].item(),
    }
    return [
        lecture_bound(name, lam, K, x, args)
        for name, lam in proposals.items()
        for K in args.num_particles
    ]


def lecture_bound(name, lam, num_particles, x, args):
    """One row: each copy of the datum is a unit, so one loss is that of many independent bounds."""
    copies, guide = x.expand(args.num_copies, -1), partial(two_gaussians_guide, probs=lam)
    objective = ImportanceWeightedELBO(num_particles)
    losses = [objective.loss(two_gaussians, guide, copies) for _ in range(args.num_evaluations)]
    bounds = -torch.tensor(losses) / args.num_copies
    return {
        "problem": "lecture, L_K",
        "proposal": f"{name}, lambda = {lam:.4f}",
        "name": name,
        "draws": num_particles,
        "estimate": bounds.mean().item(),
        "se": bounds.std().item() / math.sqrt(len(bounds)),
        "exact": LECTURE_MIXTURE.importance_weighted_bound(x, labels(lam), num_particles).item(),
    }


def elbo_of_the_lecture(args):
    """The ELBO for some lambda."""
    x, rows = torch.tensor([QUERY_POINT], device=args.device), []
    for lam in (0.02, 0.1, 0.2, 0.33, 0.5, 0.65, 0.76, 0.9, 0.98):
        guide = partial(two_gaussians_guide, probs=lam)
        elbo = elbo_terms(two_gaussians, guide, x, num_particles=args.num_elbo).elbo
        row = {"problem": "lecture, ELBO", "proposal": f"lambda = {lam}", "draws": args.num_elbo}
        row |= {"estimate": elbo.value, "se": elbo.standard_error, "lambda": lam}
        rows.append(row | {"exact": LECTURE_MIXTURE.elbo(x, labels(lam)).item()})
    return rows


def labels(lam):
    """The probabilities of labels 0 and 1."""
    return torch.as_tensor([1 - lam, lam])


# --- the irises with one factor: x_i ~ N(0, w w^T + sigma^2 I) -----------------------------------


def one_factor(x):
    """Probabilistic principal components with loadings w; -w has the same likelihood."""
    zero = x.new_zeros(x.shape[1])
    w = pyro.sample("w", dist.Normal(zero, 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(x.new_zeros(()), 1.0))
    variances = sigma.square().unsqueeze(-1).expand(w.shape)
    with pyro.plate("flowers", len(x)):
        pyro.sample("x", dist.LowRankMultivariateNormal(zero, w.unsqueeze(-1), variances), obs=x)


def one_factor_guide(x, both_signs=False):
    """A Gaussian around one sign of the loadings, or an even mixture of the two signs."""
    loc = pyro.param("loc", lambda: x.new_full((x.shape[1],), 0.5))
    start = 0.1 * torch.eye(len(loc)).to(x)
    tril = pyro.param("tril", start, constraint=constraints.lower_cholesky)
    log_sigma = pyro.param("log_sigma", lambda: x.new_zeros(()))
    sd = pyro.param("sd", lambda: x.new_tensor(0.1), constraint=constraints.positive)
    q = dist.MultivariateNormal(loc, scale_tril=tril)
    if both_signs:
        signs = dist.MultivariateNormal(torch.stack([loc, -loc]), scale_tril=tril)
        q = dist.MixtureSameFamily(dist.Categorical(x.new_ones(2)), signs)
    pyro.sample("w", q)
    pyro.sample("sigma", dist.LogNormal(log_sigma, sd))


def irises(args):
    """The evidence from the prior, from the fitted guide, and by annealing."""
    x, _ = load_iris(standardize=True, device=args.device)
    fit(SVI(one_factor, one_factor_guide, adam(), TraceSTL_ELBO(10)), x, num_steps=args.num_steps)
    exact = one_factor_quadrature(x)
    signs = partial(one_factor_guide, both_signs=True)
    few, many = args.num_draws
    anneal = {"method": "ais", "num_temperatures": args.num_temperatures, "num_leapfrog_steps": 3}
    runs = (
        (f"prior, {few:,} draws", None, few, {}),
        (f"prior, {many:,} draws", None, many, {}),
        ("guide, one sign", one_factor_guide, few, {}),
        ("guide, both signs", signs, few, {}),
        ("annealed from the prior", None, args.num_annealed, anneal),
    )
    return [
        evidence_row("irises", name, exact, one_factor, guide, x, num_particles=num, **options)
        for name, guide, num, options in runs
    ]


def one_factor_quadrature(x, num_nodes=9):
    r"""log p(x) by a product Gauss-Hermite rule around the guide; twice, for the two signs."""
    loc, tril, log_sigma, sd = (
        pyro.param(name).detach() for name in ("loc", "tril", "log_sigma", "sd")
    )
    nodes, weights = (torch.as_tensor(part).to(x) for part in hermegauss(num_nodes))
    D, N = len(loc), len(x)
    eps = torch.cartesian_prod(*[nodes] * (D + 1))
    log_weight = torch.cartesian_prod(*[weights.log() + nodes.square() / 2] * (D + 1)).sum(-1)
    w, log_sigma = loc + eps[:, :D] @ tril.T, log_sigma + eps[:, D] * sd
    identity = torch.eye(D).to(x)
    covariance = w.unsqueeze(-1) * w.unsqueeze(-2)
    covariance = covariance + (2 * log_sigma).exp()[:, None, None] * identity
    trace = torch.linalg.solve(covariance, x.T @ x).diagonal(dim1=-2, dim2=-1).sum(-1)
    log_likelihood = -(N * (covariance.logdet() + D * math.log(2 * math.pi)) + trace) / 2
    normal = dist.Normal(x.new_zeros(()), 1.0)
    log_prior = normal.log_prob(w).sum(-1) + normal.log_prob(log_sigma)
    volume = tril.diagonal().log().sum() + sd.log()
    total = torch.logsumexp(log_likelihood + log_prior + log_weight, 0) + volume
    return total.item() + math.log(2)


# --- sensors: z_i ~ N(0, 1), x_i ~ N(z_i, s_i^2) with known s_i ----------------------------------


def sensor_model(x, noise):
    with pyro.plate("sensors", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def sensor_guide(x, noise, sees_noise):
    """An amortised Gaussian: one slope and scale for all, or with exponents of s_i of their own."""
    mean, scale = encode(noise, sees_noise)
    with pyro.plate("sensors", len(x)):
        pyro.sample("z", dist.Normal(mean * x, scale))


def encode(noise, sees_noise):
    """Slope of the mean and standard deviation of q(z_i)."""
    slope, scale = (pyro.param(name, lambda: noise.new_zeros(2)) for name in ("slope", "scale"))
    feature = noise.log() if sees_noise else torch.zeros_like(noise)
    return (slope[0] + slope[1] * feature).sigmoid(), (scale[0] + scale[1] * feature).exp()


def sensors(args):
    """Two encoders, datum by datum: one ignores that the sensors differ."""
    noise = torch.logspace(-0.7, 0.5, 100, device=args.device)
    marginal = dist.Normal(0.0, (1 + noise.square()).sqrt())
    x = marginal.sample()
    exact, rows = marginal.log_prob(x).sum().item(), []
    variance = noise.square() / (1 + noise.square())  # of p(z_i | x_i)
    for name, sees_noise in (("encoder of x", False), ("encoder of x and s", True)):
        pyro.clear_param_store()
        guide = partial(sensor_guide, sees_noise=sees_noise)
        fit(SVI(sensor_model, guide, adam(), TraceSTL_ELBO(10)), x, noise, num_steps=args.num_steps)
        num = {"num_particles": args.num_draws[0]}
        row = evidence_row("sensors", name, exact, sensor_model, guide, x, noise, **num)
        report = guide_report(sensor_model, guide, x, noise, **num)
        limit = 1 - encode(noise, sees_noise)[1].detach().square() / variance
        row |= {"noise": noise.cpu(), "pareto_k": report.pareto_k.cpu()}
        rows.append(row | {"limit": limit.clamp(min=0).cpu()})
        print(f"\n{name}\n{report}\n")
    return rows


# --- what is reported --------------------------------------------------------------------------


def adam():
    return pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.995})


def evidence_row(problem, name, exact, *args, **kwargs):
    """A row of log_evidence(*args, **kwargs); of many units the worst ESS and k are reported."""
    start = time.perf_counter()
    evidence = log_evidence(*args, chunk_size=1000, **kwargs)
    return {
        "problem": f"{problem}, log p(x)",
        "proposal": name,
        "draws": evidence.num_particles,
        "estimate": evidence.total,
        "se": evidence.total_standard_error,
        "exact": exact,
        "ESS": evidence.ess.min().item(),
        "Pareto k": evidence.pareto_k.max().item(),
        "seconds": time.perf_counter() - start,
    }


def print_table(rows):
    formats = dict.fromkeys(("estimate", "se", "exact"), "{:.4f}")
    formats |= {"ESS": "{:.0f}", "Pareto k": "{:.2f}", "seconds": "{:.1f}"}
    table = [COLUMNS] + [
        [formats.get(c, "{}").format(row[c]) if c in row else "" for c in COLUMNS] for row in rows
    ]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print()
    for first, second, *rest in table:
        left = [first.ljust(widths[0]), second.ljust(widths[1])]
        right = [cell.rjust(w) for cell, w in zip(rest, widths[2:], strict=True)]
        print("  ".join(left + right))


def plot(rows, path):
    """Bounds over K; ELBO and KL over lambda; estimates against the truth; k of each datum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    panels = {"lecture, L_K": draw_bounds, "lecture, ELBO": draw_elbo}
    panels |= {"irises, log p(x)": draw_estimates, "sensors, log p(x)": draw_pareto_k}
    for ax, (problem, draw) in zip(axes.flat, panels.items(), strict=True):
        draw(ax, [row for row in rows if row["problem"] == problem])
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_bounds(ax, rows):
    log_p = exact_at_query_point()
    ax.axhline(log_p, color="black", lw=1.2)
    ax.annotate(f"log p(x) = {log_p:.4f}", (1, log_p), (0, 5), textcoords="offset points")
    ax.plot([], [], color="0.4", lw=1, ls="--", label="exact $L_K$")
    styles = {"prior": ("tab:blue", "o"), "fitted guide": ("tab:green", "D")}
    styles |= {"posterior": ("tab:red", "x")}
    for name, (color, marker) in styles.items():
        mine = [row for row in rows if row["name"] == name]
        K = [row["draws"] for row in mine]
        ax.plot(K, [row["exact"] for row in mine], color=color, lw=1, ls="--")
        errorbar(ax, K, mine, mine[0]["proposal"].replace("lambda", "λ"), color, marker)
    ax.set(xscale="log", xlabel="K, number of draws", ylabel="$L_K$, nats (± 2 SE)")
    ax.set_xticks(K, [f"{k:,}" for k in K])
    ax.minorticks_off()
    ax.set_ylim(top=log_p + 0.04)
    ax.set_title("Lecture's mixture: the bound climbs to log p(x)")
    ax.legend(loc="lower right", frameon=False)


def draw_elbo(ax, rows):
    x, log_p = torch.tensor(QUERY_POINT), exact_at_query_point()
    lam = torch.linspace(0.0, 1.0, 401)
    q = torch.stack([1 - lam, lam], -1)
    best = LECTURE_MIXTURE.responsibilities(x)[1].item()
    ax.plot(lam, LECTURE_MIXTURE.kl(x, q), color="tab:red", label="KL(q || p(z | x))")
    ax.axhline(log_p, color="black", lw=1.2, label=f"log p(x) = {log_p:.4f}")
    ax.plot(lam, LECTURE_MIXTURE.elbo(x, q), color="tab:blue", label="ELBO")
    lambdas = [row["lambda"] for row in rows]
    errorbar(ax, lambdas, rows, "elbo_terms (± 2 SE)", "tab:blue", "o")
    ax.axvline(best, color="0.6", lw=1, ls=":")
    ax.text(best + 0.02, -2.6, f"p(z = 1 | x)\n= {best:.2f}", va="center")
    ax.set(xlabel="λ = q(z = 1)", ylabel="nats")
    ax.set_title("Lecture's mixture: ELBO + KL = log p(x)")
    ax.legend(loc="center left", frameon=False)


def draw_estimates(ax, rows):
    ax.axvline(0, color="black", lw=1.2)
    ax.axvline(-math.log(2), color="0.6", lw=1, ls=":")
    for y, row in enumerate(reversed(rows)):
        color = "tab:green" if row["Pareto k"] <= 0.7 else "tab:red"
        error = row["estimate"] - row["exact"]
        ax.errorbar(error, y, xerr=2 * row["se"], color=color, marker="o", ms=5, capsize=4)
        text = f"k = {row['Pareto k']:.2f}\nESS = {row['ESS']:,.0f} of {row['draws']:,}"
        ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", color=color)
    ax.text(-math.log(2), len(rows) - 0.4, "−log 2 ", ha="right", va="top", color="0.4")
    ax.text(0, len(rows) - 0.4, " exact", va="top")
    ax.set_yticks(range(len(rows)), [row["proposal"] for row in reversed(rows)])
    ax.set(ylim=(-0.5, len(rows) - 0.4), xlabel="estimate less exact log p(x), nats (± 2 SE)")
    ax.set_title(f"Irises, one factor: log p(x) = {rows[0]['exact']:.3f}")


def draw_pareto_k(ax, rows):
    for row, color, marker in zip(rows, ("tab:red", "tab:green"), "os", strict=True):
        k = row["pareto_k"].clamp(min=0)
        ax.plot(row["noise"], k, marker, color=color, ms=4, label=row["proposal"])
        ax.plot(row["noise"], row["limit"], color=color, lw=1, ls="--")
    ax.plot([], [], color="0.4", lw=1, ls="--", label="limit of many draws")
    ax.axhline(0.7, color="black", lw=1.2)
    ax.text(0.2, 0.715, "0.7: no trust above")
    ax.set(xscale="log", xlabel="s, noise of the sensor", ylabel="Pareto k (negative ones at 0)")
    ax.set_xticks([0.2, 0.5, 1, 2, 3], ["0.2", "0.5", "1", "2", "3"])
    ax.minorticks_off()
    ax.set_title("Sensors: data on which the encoder fails")
    ax.legend(loc="upper left", frameon=False)


def errorbar(ax, at, rows, label, color, marker):
    means, errors = [row["estimate"] for row in rows], [2 * row["se"] for row in rows]
    ax.errorbar(at, means, errors, label=label, color=color, marker=marker, ms=5, ls="", capsize=3)


def exact_at_query_point():
    return LECTURE_MIXTURE.log_evidence(torch.tensor(QUERY_POINT)).item()


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bounds, draws = [1, 3, 10, 30, 100, 300, 1000], [5000, 100_000]
    parser.add_argument("--num-steps", type=int, default=600, help="gradient steps of each fit")
    parser.add_argument("--num-particles", type=int, nargs="+", default=bounds, help="K of L_K")
    parser.add_argument("--num-evaluations", type=int, default=40, help="of each bound")
    parser.add_argument("--num-copies", type=int, default=100, help="of the point, in each of them")
    parser.add_argument("--num-elbo", type=int, default=2000, help="draws of each ELBO")
    parser.add_argument("--num-draws", type=int, nargs=2, default=draws, help="few and many")
    parser.add_argument("--num-annealed", type=int, default=200, help="particles that anneal")
    parser.add_argument("--num-temperatures", type=int, default=400, help="of annealing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/evidence")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
