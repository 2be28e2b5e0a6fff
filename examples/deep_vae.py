"""A variational autoencoder of handwritten digits, and how good it is.

Trains the architecture of Burda et al. 2016 (arXiv:1509.00519) on MNIST, or on scikit-learn's small
digits without --data, and reports on static test images: ELBO <= IWAE-K <= log p(x), bits per
dimension, active units, and the amortisation gap, by a free-form guide of some of them.

    python examples/deep_vae.py [--data path/to/MNIST] [--objective dreg] [--device cpu] [--seed 0]

prints one table and writes to runs/deep_vae/: table.csv and deep_vae.png, with reconstructions,
samples and attribute vectors.
"""

import argparse
import csv
import json
import math
import pathlib

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.utils.data import DataLoader

from pyro_vi_ext import (
    ImportanceWeightedELBO,
    TraceSTL_ELBO,
    elbo_terms,
    fit,
    log_evidence,
)
from pyro_vi_ext.models.deep_vae import DeepVAE, FreeFormGuide
from pyro_vi_ext.models.images import binarize, load_images

# The sizes of the paper: widths of the stochastic layers, and of the hidden ones below each.
SIZES = {1: ((50,), ((200, 200),)), 2: ((100, 50), ((200, 200), (100, 100)))}
OBJECTIVES = {
    "elbo": lambda k: Trace_ELBO(k, max_plate_nesting=1, vectorize_particles=True),
    "stl": TraceSTL_ELBO,
    "iwae": ImportanceWeightedELBO,
    "dreg": lambda k: ImportanceWeightedELBO(k, gradient="dreg"),
}
COLUMNS = (
    "images,guide,N,ELBO,se,reconstruction,KL,bits/dim,K,IWAE-K,se of IWAE,se over images,k > 0.7,"
    "active units"
).split(",")


def main(args):
    out = pathlib.Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    images = load_images(args.data)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    vae = DeepVAE(
        images.x_train.shape[1],
        *SIZES[args.num_layers],
        likelihood=args.likelihood,
        data_mean=images.x_train.mean(0),
    ).to(args.device)
    losses = train(vae, images, args)
    vae.requires_grad_(False).eval()

    generator = torch.Generator().manual_seed(0)  # the same test data for every model
    test = observe(images.x_test[: args.num_test], args, generator).to(args.device)
    seen = observe(images.x_train[: len(test)], args, generator).to(args.device)
    few = test[: args.num_free]
    pyro.set_rng_seed(args.seed + 1)  # the same draws, whatever the training has used
    free = fit_free_form(vae, few, args)
    rows = [
        evaluate("test", "amortised", vae, vae.guide, test, args),
        evaluate("training", "amortised", vae, vae.guide, seen, args),
        evaluate("some of test", "amortised", vae, vae.guide, few, args),
        evaluate("some of test", "free-form", vae, free, few, args),
    ]

    print_table(rows)
    print_gaps(*rows[2:], args)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(vae, images, losses, rows[0], args, out / "deep_vae.png")
    print(f"\nwritten to {out}/: table.csv, deep_vae.png")
    return rows


# --- data and training -------------------------------------------------------------------------


def observe(grey, args, generator=None):
    """A draw of x given grey values, both of shape (N, D): what the likelihood can produce.

    Bernoulli: zeros and ones. Gaussian: each of the L grey levels becomes an interval of width 1/L,
    filled evenly, because a density of values that repeat has no upper bound.
    """
    if args.likelihood == "bernoulli":
        return binarize(grey, generator)
    levels = num_levels(args)
    noise = torch.rand(grey.shape, generator=generator)
    return ((grey * (levels - 1)).round() + noise) / levels


def num_levels(args):
    """Values that a pixel can take."""
    if args.likelihood == "bernoulli":
        return 2
    return 17 if args.data is None else 256


def train(vae, images, args):
    """Fit model and guide to fresh draws in each batch; the losses, nats per image."""
    size = min(args.batch_size, len(images.x_train))
    loader = DataLoader(
        images.x_train,
        batch_size=size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: observe(torch.stack(rows), args).to(args.device),
    )
    if args.checkpoint is not None:
        check_settings(args)
    objective = OBJECTIVES[args.objective](args.num_particles)
    result = fit(
        objective(vae.model, vae.guide),
        loader,
        num_steps=args.num_steps,
        optimizer=torch.optim.Adam(vae.parameters(), lr=args.lr),
        scheduler=cosine(args.num_steps),
        guide_steps=args.guide_steps,
        checkpoint=args.checkpoint,
    )
    epochs = args.num_steps * size / len(images.x_train)
    print(f"trained for {args.num_steps} steps of {size} images ({epochs:.1f} epochs)", flush=True)
    return result.losses / size


def check_settings(args):
    """Continue a checkpoint only with the settings that it was begun with."""
    names = "data objective num_particles num_layers likelihood guide_steps num_steps batch_size lr"
    settings = {name: getattr(args, name) for name in [*names.split(), "seed"]}
    path = pathlib.Path(f"{args.checkpoint}.json")
    if not pathlib.Path(args.checkpoint).exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
        return
    found = json.loads(path.read_text()) if path.exists() else {}
    other = {name: found.get(name) for name in settings if settings[name] != found.get(name)}
    if other:
        raise ValueError(
            f"The checkpoint '{args.checkpoint}' was begun with {other}, here it is "
            f"{ {name: settings[name] for name in other} }. Continue it with the options it was "
            "begun with, or give another --checkpoint."
        )


def fit_free_form(vae, x, args):
    """A Gaussian of its own for each row of x, from where the amortised guide is."""
    free = FreeFormGuide.from_amortised(vae, x)
    fit(
        TraceSTL_ELBO(10)(vae.model, free),
        x,
        num_steps=args.num_free_steps,
        optimizer=torch.optim.Adam(free.parameters(), lr=0.02),
        scheduler=cosine(args.num_free_steps),
    )
    return free


def cosine(num_steps):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)


# --- what is reported --------------------------------------------------------------------------


def evaluate(label, name, vae, guide, x, args):
    """A row of the table, nats per image: parts of the ELBO, the IWAE bound, Monte-Carlo errors."""
    n = len(x)
    chunk = max(1, 2**21 // x.numel())  # 8 MB for each tensor
    num = args.num_iwae_particles
    terms = elbo_terms(vae.model, guide, x, num_particles=num // 5, chunk_size=chunk)
    evidence = log_evidence(vae.model, guide, x, num_particles=num, chunk_size=chunk)
    row = {
        "images": label,
        "guide": name,
        "N": n,
        "ELBO": terms.elbo.value / n,
        "se": terms.elbo.standard_error / n,
        "reconstruction": terms.reconstruction["x"].value / n,
        "KL": sum(map(float, terms.kl.values())) / n,
        "bits/dim": terms.bits_per_dim,
        "K": evidence.num_particles,
        "IWAE-K": evidence.total / n,
        "se of IWAE": evidence.total_standard_error / n,
        "se over images": float(evidence.log_evidence.std()) / math.sqrt(n),
        "k > 0.7": int((evidence.pareto_k > 0.7).sum()),
    }
    if args.likelihood == "gaussian":  # from a density to the grey levels, intervals of width 1/L
        row["bits/dim"] += math.log2(num_levels(args))
    if guide == vae.guide:
        counts = zip(vae.active_units(x).counts, vae.latent_dims, strict=True)
        row["active units"] = ", ".join(f"{count} of {dim}" for count, dim in counts)
    return row


def print_table(rows):
    formats = dict.fromkeys(COLUMNS, "{}") | dict.fromkeys(COLUMNS[3:12], "{:.3f}") | {"K": "{}"}
    table = [COLUMNS, *([formats[c].format(row.get(c, "")) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print("\nnats per image; se: Monte-Carlo standard error")
    for line in table:
        cells = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), line[1].ljust(widths[1]), *cells[2:]]))


def print_gaps(amortised, free, args):
    """How the distance of the ELBO to log p(x) divides (Cremer et al. 2018, arXiv:1801.03558)."""
    gap = free["ELBO"] - amortised["ELBO"]
    rest = free["IWAE-K"] - free["ELBO"]
    print(f"\namortisation gap, free-form less amortised ELBO: {gap:.3f}", end="")
    print(f" (se {math.hypot(free['se'], amortised['se']):.3f})")
    if args.num_layers > 1:
        print("  less what the free-form guide loses because its layers are independent")
    error = math.hypot(free["se"], free["se of IWAE"])
    print(
        f"approximation gap, IWAE-{free['K']} less free-form ELBO: >= {rest:.3f} (se {error:.3f})"
    )
    if free["k > 0.7"]:
        print(f"  k > 0.7 in {free['k > 0.7']} of {free['N']} images: their IWAE has not settled")


# --- the picture -------------------------------------------------------------------------------


def plot(vae, images, losses, row, args, path):
    """Reconstructions, samples from the prior, attribute vectors, and the bound in training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pyro.set_rng_seed(args.seed + 2)  # the same picture, whatever was evaluated
    first = [int((images.y_test == label).nonzero()[0]) for label in range(10)]
    x = observe(images.x_test[first], args).to(args.device)  # one of each class
    pairs = torch.stack([x, vae.decode(vae.encode(x)[0])])
    shown, steps = attribute_rows(vae, images, x, args)
    samples = prior_means(vae, x, 64).unflatten(0, (8, 8))

    figure, axes = plt.subplot_mosaic(
        [["data", "samples", "bound"], ["attributes", "samples", "bound"]],
        figsize=(15, 4.4),
        width_ratios=(1.5, 1.05, 1.0),
        height_ratios=(2.2, len(shown) + 0.8),
        layout="constrained",
    )
    show(axes["data"], pairs, images.shape, ["x", "mean of x\ngiven E[z]"])
    axes["data"].set_title("Test images and their reconstructions")
    show(axes["samples"], samples, images.shape)
    axes["samples"].set_title("Samples: mean of x given z from the prior")
    labels = [f"{c} + t ({a} − {b})" for a, b, c in args.attribute]
    show(axes["attributes"], shown, images.shape, labels, ["x", *(f"{t:g}" for t in steps)])
    axes["attributes"].set(title="Attribute vectors: mean codes of two classes", xlabel="t")
    draw_bound(axes["bound"], losses, row, args)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def prior_means(vae, x, num):
    """Means of x given draws of all layers from the prior, shape (num, D)."""
    trace = poutine.trace(vae.model).get_trace(x[:1].expand(num, -1))
    return trace.nodes["x"]["fn"].mean


def attribute_rows(vae, images, x, args):
    """For each (a, b, c): x[c], then the mean given its code + t (mean code of a - that of b)."""
    codes = vae.encode(observe(images.x_train, args).to(args.device))[0]
    mean = {label: codes[images.y_train == label].mean(0) for label in range(10)}
    steps = torch.linspace(0.0, 2.0, 9)
    rows = []
    for a, b, c in args.attribute:
        z = vae.encode(x[c : c + 1])[0] + steps.to(x)[:, None] * (mean[a] - mean[b])
        rows.append(torch.cat([x[c : c + 1], vae.decode(z)]))
    return torch.stack(rows), steps.tolist()


def show(ax, images, shape, rows=(), columns=()):
    """A table of images, shape (rows, columns, D), dark on white."""
    height, width = shape
    gap = max(1, height // 14)
    canvas = torch.nn.functional.pad(images.cpu().unflatten(-1, shape), (gap, 0, gap, 0))
    canvas = canvas.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    ax.imshow(canvas.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    for labels, ticks, step in ((rows, ax.set_yticks, height), (columns, ax.set_xticks, width)):
        places = [gap + step / 2 + i * (step + gap) for i in range(len(labels))]
        ticks(places, labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def draw_bound(ax, losses, row, args):
    """The bound of the minibatches, in 100 means, beside ELBO and IWAE of the test images."""
    parts = (-losses).tensor_split(min(100, len(losses)))
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    name = args.objective if args.num_particles == 1 else f"{args.objective}-{args.num_particles}"
    means = [float(part.mean()) for part in parts]
    ax.plot(ends.numpy(), means, color="tab:blue", label=f"training bound ({name})")
    ax.axhline(row["ELBO"], color="tab:orange", ls="--", label=f"test ELBO {row['ELBO']:.2f}")
    iwae = f"test IWAE-{row['K']} {row['IWAE-K']:.2f}"
    ax.axhline(row["IWAE-K"], color="tab:green", ls="--", label=iwae)
    ax.set(xlabel="steps", title="Bounds on log p(x), nats per image")
    ax.set_ylim(bottom=min(means[len(means) // 10], row["ELBO"] - 1.0))
    ax.legend(frameon=False, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", help="folder of MNIST's IDX files; scikit-learn's digits without it")
    add("--objective", choices=OBJECTIVES, default="elbo")
    add("--num-particles", type=int, help="of the objective: 1 for elbo and stl, else 5")
    add("--num-layers", type=int, choices=SIZES, default=1, help="stochastic layers")
    add("--likelihood", choices=("bernoulli", "gaussian"), default="bernoulli")
    add("--guide-steps", type=int, default=1, help="updates of the guide for each of the model")
    add("--num-steps", type=int, default=4000)
    add("--batch-size", type=int, default=100)
    add("--lr", type=float, default=0.002, help="at the start; falls to 0 along a cosine")
    add("--num-test", type=int, default=1000, help="images evaluated, of test and training set")
    add("--num-free", type=int, default=100, help="test images with a free-form guide")
    add("--num-free-steps", type=int, default=500, help="gradient steps of the free-form guide")
    add("--num-iwae-particles", type=int, default=5000, help="K of the IWAE bound")
    add(
        "--attribute",
        type=int,
        nargs=3,
        choices=range(10),
        action="append",
        metavar=("A", "B", "C"),
        help="mean code of class A less that of B, added to an image of C; may be repeated",
    )
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--checkpoint", help="file to save the training to, and to continue from if it exists")
    add("--output", default="runs/deep_vae")
    args = parser.parse_args(argv)
    if args.num_particles is None:
        args.num_particles = 1 if args.objective in ("elbo", "stl") else 5
    if args.attribute is None:
        args.attribute = [(8, 3, 3), (8, 3, 5), (9, 7, 7), (9, 7, 4)]
    return args


if __name__ == "__main__":
    main(parse())
