"""A mixture of three Gaussians on Fisher's irises, with the labels drawn instead of added up.

    z_i ~ Categorical(pi),  x_i | z_i = k ~ N(mu_k, Sigma_k),  q = q(pi, mu, Sigma) prod_i q(z_i),

with independent normals (in unconstrained coordinates) for the parameters, whose draws have a path,
and logits of its own for each flower, whose draws have none. TraceRLOO_ELBO, TraceREBAR_ELBO
(arXiv:1703.07370) and TraceRELAX_ELBO (arXiv:1711.00123) train the same pair from the same start as
Pyro's TraceEnum_ELBO, which adds up the labels exactly and is the answer to compare with.

    python examples/iris_mixture.py [--num-steps 500] [--seed 0]

prints two tables and writes to runs/iris_mixture/: table.csv, gradients.csv and iris_mixture.png.
The first is what training reaches, every ELBO with the labels added up; best labels: with the same
q(pi, mu, Sigma) and the posterior of the labels given them. The second compares the gradients for
the logits, all of them 0, at given parameters, where exact ones can be enumerated.
"""

import argparse
import csv
import itertools
import math
import pathlib
import statistics
import time
from functools import partial

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_value

from pyro_vi_ext import (
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
    TraceRLOO_ELBO,
    TraceScore_ELBO,
    fit,
    gradient_report,
)
from pyro_vi_ext.models.gaussian_mixture import (
    IRIS_FEATURES,
    gaussian_mixture,
    gaussian_mixture_labels,
    load_iris,
    to_mixture,
)

OBJECTIVES = {
    "labels added up": lambda: TraceEnum_ELBO(max_plate_nesting=1),
    "RLOO-2": lambda: TraceRLOO_ELBO(2),
    "REBAR": lambda: TraceREBAR_ELBO(name="rebar"),
    "RELAX": lambda: TraceRELAX_ELBO(name="relax"),
}
COLUMNS = "objective,ELBO,se,best labels,se of best labels,flowers right,ms per step".split(",")
GRADIENT_COLUMNS = "name,loss,variance,bias,bias_standard_error,max_z,seconds,cost".split(",")

model = partial(gaussian_mixture, num_components=3, marginalize=False, one_hot=True)


def main(args):
    out = pathlib.Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    x, species = load_iris()
    start = k_means(x, args.seed)
    rows = []
    for name, make in OBJECTIVES.items():
        print(f"{name} ...", flush=True)
        rows.append({"objective": name} | train(make(), x, species, start, args))
    print_table(rows)
    write(out / "table.csv", COLUMNS, rows)
    report = compare_gradients(x, start[0], args)
    print(f"\nGradient for the logits, parameters given\n{report}")
    rated = [{c: getattr(row, c) for c in GRADIENT_COLUMNS} for row in report.rows]
    write(out / "gradients.csv", GRADIENT_COLUMNS, rated)
    plot(rows, x, species, out / "iris_mixture.png")
    print(f"\nwritten to {out}/: table.csv, gradients.csv, iris_mixture.png")
    return rows, report


# --- the pair ----------------------------------------------------------------------------------


def k_means(x, seed):
    """Parameters and logits at a partition of the flowers, by scikit-learn."""
    from sklearn.cluster import KMeans

    found = KMeans(3, n_init=10, random_state=seed).fit(x.numpy())
    labels = torch.from_numpy(found.labels_).long()
    groups = [x[labels == k] for k in range(3)]
    parameters = {
        "weights": torch.tensor([len(group) / len(x) for group in groups]),
        "means": torch.stack([group.mean(0) for group in groups]),
        "scales": torch.stack([group.std(0) for group in groups]),
        "corr_tril": torch.eye(x.shape[1]).repeat(3, 1, 1),
    }
    return parameters, 2.0 * torch.nn.functional.one_hot(labels, 3).to(x)


def make_guide(start):
    """The guide, marked for enumeration, and the part that draws the parameters."""
    values, logits = start
    pyro.param("z_logits", logits.clone())
    parameters = AutoNormal(
        poutine.block(model, hide=["z"]), init_loc_fn=init_to_value(values=values), init_scale=0.05
    )

    def guide(x):
        parameters(x)
        labels(x)

    return config_enumerate(guide), parameters


def labels(x):
    """The guide's labels alone."""
    gaussian_mixture_labels(x, 3, one_hot=True)


# --- training, and what is measured ------------------------------------------------------------


def train(objective, x, species, start, args):
    """A row of the table, with the losses and the mixture at the guide's medians."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    guide, parameters = make_guide(start)
    decay = 0.1 ** (1 / args.num_steps)
    adam = pyro.optim.ClippedAdam(
        lambda name: {"lr": 0.3 if name == "z_logits" else 0.05, "lrd": decay}
    )
    times = []
    losses = fit(
        SVI(model, guide, adam, objective),
        x,
        num_steps=args.num_steps,
        callback=lambda step, loss: times.append(time.perf_counter()),
    ).losses
    pyro.set_rng_seed(args.seed + 1)  # the same draws, whatever the training has used
    exact = TraceEnum_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    elbos = [-exact.loss(model, guide, x) for _ in range(20)]
    enumerated = config_enumerate(model)  # as under the posterior of the labels
    best = [-exact.loss(enumerated, parameters, x) for _ in range(20)]
    found = pyro.param("z_logits").detach().argmax(-1)
    between = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
    return {
        "ELBO": statistics.fmean(elbos),
        "se": statistics.stdev(elbos) / math.sqrt(len(elbos)),
        "best labels": statistics.fmean(best),
        "se of best labels": statistics.stdev(best) / math.sqrt(len(best)),
        "flowers right": num_right(found, species),
        "ms per step": 1000 * statistics.median(between),
        "losses": losses,
        "labels": found,
        "mixture": to_mixture(**{k: v.detach() for k, v in parameters.median(x).items()}),
    }


def num_right(found, species):
    """Flowers in the component of their species, under the best names of the components."""
    return max(
        int((torch.tensor(names)[found] == species).sum())
        for names in itertools.permutations(range(3))
    )


def compare_gradients(x, values, args):
    """Estimators for the logits alone: the parameters are given."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    given = poutine.block(poutine.condition(model, values), hide=list(values))
    objectives = {"REINFORCE": TraceScore_ELBO()}
    objectives |= {name: OBJECTIVES[name]() for name in ("RLOO-2", "REBAR", "RELAX")}
    options = {"num_repeats": args.num_repeats, "num_training": args.num_repeats}
    return gradient_report(objectives, given, labels, x, **options)


# --- what is reported --------------------------------------------------------------------------


def write(path, columns, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows):
    formats = dict.fromkeys(COLUMNS[1:5], "{:.2f}") | {"ms per step": "{:.1f}"}
    table = [COLUMNS, *([formats.get(c, "{}").format(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print("\nELBO in nats, all flowers; se: Monte-Carlo standard error")
    for line in table:
        cells = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


STYLES = {
    "labels added up": ("black", "-", 1.2),
    "RLOO-2": ("tab:green", "--", 1.8),
    "REBAR": ("tab:blue", "-.", 1.8),
    "RELAX": ("tab:red", ":", 2.4),
}


def plot(rows, x, species, path):
    """The flowers in two planes with the components found by each objective; the bounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for ax, columns in zip(axes[:2], ((0, 1), (2, 3)), strict=True):
        points = x[:, columns]
        for label, (name, marker) in enumerate(
            (("setosa", "o"), ("versicolor", "s"), ("virginica", "^"))
        ):
            mine = points[species == label]
            color = ("#b9d7ea", "#f6c9a0", "#c7e0b4")[label]
            ax.scatter(*mine.T, marker=marker, color=color, s=22, label=name, zorder=1)
        for row in rows:
            color, style, width = STYLES[row["objective"]]
            look = {"color": color, "ls": style, "lw": width, "zorder": 2}
            for k, line in enumerate(ellipses(row["mixture"], columns)):
                ax.plot(*line, **look, label=row["objective"] if k == 0 else None)
        ax.set(
            xlabel=f"{IRIS_FEATURES[columns[0]]} (cm)", ylabel=f"{IRIS_FEATURES[columns[1]]} (cm)"
        )
    axes[0].set_title("Two standard deviations of each component")
    axes[1].set_title("The same in the other plane")
    axes[1].legend(frameon=False, loc="upper left", fontsize=9)
    for row in rows:
        color, style, width = STYLES[row["objective"]]
        parts = (-row["losses"]).tensor_split(min(60, len(row["losses"])))
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        means = [float(part.mean()) for part in parts]
        label = f"{row['objective']}: {row['ELBO']:.1f}, {row['flowers right']} of {len(x)} right"
        axes[2].plot(ends, means, color=color, ls=style, lw=width, label=label)
    best = max(row["ELBO"] for row in rows)
    axes[2].set(
        xlabel="steps", ylabel="ELBO, nats", title="Of each step; in the legend, at the end"
    )
    axes[2].set_ylim(best - 150, best + 15)
    axes[2].legend(frameon=False, loc="lower right")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ellipses(mixture, columns):
    """Where the Mahalanobis distance in a plane is 2: coordinates, (2, points), by component."""
    angle = torch.linspace(0.0, 2 * math.pi, 200)
    circle = torch.stack([angle.cos(), angle.sin()])
    index = torch.tensor(columns)
    scale_trils = torch.linalg.cholesky(mixture.covariances[:, index][:, :, index])
    return mixture.means[:, index, None] + 2 * scale_trils @ circle


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=500, help="gradient steps of each fit")
    parser.add_argument("--num-repeats", type=int, default=300, help="draws of each gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/iris_mixture")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
