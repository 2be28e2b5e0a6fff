"""An autoencoder with Bernoulli latents, trained by one gradient estimator after another.

    p(x, b) = p(b_L) ... p(b_1 | b_2) p(x | b_1),  q(b | x) = q(b_1 | x) ... q(b_L | b_{L-1}),

the model on which REBAR (arXiv:1703.07370) and RELAX (arXiv:1711.00123) compare estimators. All
start from the same weights and see the same batches in the same order, for equally many steps, on
images binarised once. What they reach is measured with hard draws for all of them: the ELBO (one
sample) of training and validation images, and the bound of 100 samples of the latter.

    python examples/bernoulli_vae.py [--data static_mnist.npz] [--objective rloo disarm rebar]
        [--layers 1] [--num-steps 1000] [--device cpu] [--seed 0]

prints a table and writes to runs/bernoulli_vae/: table.csv and bernoulli_vae.png. Without --data:
the handwritten digits of scikit-learn, where the test images are the validation images.
"""

import argparse
import csv
import json
import math
import pathlib
import statistics
import time

import pyro
import torch
from pyro import poutine
from torch.utils.data import DataLoader

from pyro_vi_ext import (
    ImportanceWeightedELBO,
    TraceARM_ELBO,
    TraceConcrete_ELBO,
    TraceDisARM_ELBO,
    TraceMuProp_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
    TraceRLOO_ELBO,
    TraceScore_ELBO,
    elbo_terms,
    fit,
    log_evidence,
)
from pyro_vi_ext.models.bernoulli_vae import BernoulliVAE
from pyro_vi_ext.models.images import binarize, load_images, load_static_mnist

# Widths of the stochastic layers, and of the hidden ones of the networks between them.
SIZES = {
    "1": ((200,), None),
    "2": ((200, 200), None),
    "nonlinear": ((200,), ((200, 200),)),
}
# Name: what its loss is a bound of, and how it is made.
OBJECTIVES = {
    "score": ("ELBO", TraceScore_ELBO),
    "rloo": ("ELBO", TraceRLOO_ELBO),
    "nvil": ("ELBO", TraceNVIL_ELBO),
    "muprop": ("ELBO", TraceMuProp_ELBO),
    "arm": ("ELBO", TraceARM_ELBO),
    "disarm": ("ELBO", TraceDisARM_ELBO),
    "concrete": ("relaxed model's", TraceConcrete_ELBO),
    "rebar": ("ELBO", TraceREBAR_ELBO),
    "relax": ("ELBO", lambda: TraceRELAX_ELBO(hidden_dims=(200, 200))),
    "vimco": ("L_5", lambda: ImportanceWeightedELBO(num_particles=5)),
}
COLUMNS = (
    "objective,trains on,steps,training ELBO,se of training ELBO,valid ELBO,se of valid ELBO,"
    "valid L_100,se of valid L_100,se over images,ms per step"
).split(",")


def main(args):
    out = pathlib.Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    x_train, x_valid, shape = load(args)
    seen, valid = x_train[: args.num_images], x_valid[: args.num_images]
    rows = []
    for name in args.objective:
        print(f"{name} ...", flush=True)
        vae, losses, milliseconds = train(name, x_train, args)
        pyro.set_rng_seed(args.seed + 1)  # the same draws, whatever the training has used
        row = {"objective": name, "trains on": OBJECTIVES[name][0], "steps": len(losses)}
        rows.append(row | evaluate(vae, seen, valid) | {"ms per step": milliseconds})
        rows[-1] |= {"vae": vae, "losses": losses}
    print_table(rows)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, valid, shape, args, out / "bernoulli_vae.png")
    print(f"\nwritten to {out}/: table.csv, bernoulli_vae.png")
    return rows


# --- data and training -------------------------------------------------------------------------


def load(args):
    """Images to train and to validate, zeros and ones, shape (N, D), and their height and width."""
    if args.data is not None:
        train, valid, _ = load_static_mnist(args.data)
        return train.to(args.device), valid.to(args.device), (28, 28)
    images = load_images()
    generator = torch.Generator().manual_seed(0)  # binarised once, the same for everybody
    train, valid = (binarize(x, generator) for x in (images.x_train, images.x_test))
    return train.to(args.device), valid.to(args.device), images.shape


def train(name, x, args):
    """Fit model and guide; the autoencoder, nats per image at each step, and time per step."""
    checkpoint = open_checkpoint(name, args)
    size = min(args.batch_size, len(x))
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    vae = BernoulliVAE(x.shape[1], *SIZES[args.layers], data_mean=x.mean(0)).to(args.device)
    module = OBJECTIVES[name][1]()(vae.model, vae.guide)
    module(x[:size])  # makes what the objective learns, so that the optimizer has it
    pyro.set_rng_seed(args.seed)
    order = torch.Generator().manual_seed(args.seed)  # of its own: no objective disturbs it
    loader = DataLoader(x, batch_size=size, shuffle=True, drop_last=True, generator=order)
    times = []
    result = fit(
        module,
        loader,
        num_steps=args.num_steps,
        optimizer=torch.optim.Adam(module.parameters(), lr=args.lr),
        checkpoint=checkpoint,
        callback=lambda step, loss: times.append(time.perf_counter()),
    )
    between = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
    milliseconds = 1000 * statistics.median(between) if between else math.nan
    return vae.requires_grad_(False).eval(), result.losses / size, milliseconds


def open_checkpoint(name, args):
    """The file of an objective; ValueError if it was begun with other settings."""
    if args.checkpoint is None:
        return None
    path = pathlib.Path(args.checkpoint) / f"{name}.pt"
    notes = path.with_suffix(".json")
    settings = {key: getattr(args, key) for key in ("data", "layers", "batch_size", "lr", "seed")}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(json.dumps(settings))
        return path
    found = json.loads(notes.read_text()) if notes.exists() else {}
    other = {key: found.get(key) for key in settings if settings[key] != found.get(key)}
    if other:
        raise ValueError(
            f"The checkpoint '{path}' was begun with {other}, here it is "
            f"{ {key: settings[key] for key in other} }. Continue it with the options it was "
            "begun with, or give another --checkpoint."
        )
    return path


# --- what is reported --------------------------------------------------------------------------


def evaluate(vae, seen, valid):
    """Bounds of hard draws, nats per image, with Monte-Carlo errors of these images' mean."""
    row = {}
    for name, x in (("training", seen), ("valid", valid)):
        elbo = elbo_terms(vae.model, vae.guide, x, num_particles=100, chunk_size=chunk(x)).elbo
        row[f"{name} ELBO"], row[f"se of {name} ELBO"] = (v / len(x) for v in vars(elbo).values())
    options = {"num_particles": 100, "chunk_size": chunk(valid)}
    bounds = [log_evidence(vae.model, vae.guide, valid, **options) for _ in range(10)]
    bounds = torch.stack([bound.log_evidence for bound in bounds])  # (10, images)
    return row | {
        "valid L_100": float(bounds.mean()),
        "se of valid L_100": float(bounds.mean(1).std()) / math.sqrt(len(bounds)),
        "se over images": float(bounds.mean(0).std()) / math.sqrt(len(valid)),
    }


def chunk(x):
    """Particles at once: 1 MB for each tensor of the size of the data."""
    return max(1, 2**18 // x.numel())


def print_table(rows):
    formats = dict.fromkeys(COLUMNS[3:10], "{:.3f}") | {"ms per step": "{:.1f}"}
    table = [COLUMNS, *([formats.get(c, "{}").format(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print("\nnats per image; se: Monte-Carlo standard error for these images")
    for line in table:
        cells = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


# --- the picture -------------------------------------------------------------------------------


def plot(rows, valid, shape, args, path):
    """Bounds in training and in the end; reconstructions and samples of the best model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pyro.set_rng_seed(args.seed + 2)  # the same picture, whatever was evaluated
    best = max(rows, key=lambda row: row["valid L_100"])
    pairs = torch.stack([valid[:10], mean_of_x(best["vae"], valid[:10])])
    prior = prior_means(best["vae"], valid, 60).unflatten(0, (6, 10))

    figure, axes = plt.subplot_mosaic(
        [["curves", "ends", "pairs"], ["curves", "ends", "samples"]],
        figsize=(15, 4.6),
        width_ratios=(1.2, 1.0, 1.3),
        height_ratios=(2, 6),
        layout="constrained",
    )
    draw_curves(axes["curves"], rows)
    draw_ends(axes["ends"], rows)
    show(axes["pairs"], pairs, shape, ["x", "mean of x\ngiven b"])
    axes["pairs"].set_title(f"{best['objective']}: validation images, reconstructed")
    show(axes["samples"], prior, shape)
    axes["samples"].set_title(f"{best['objective']}: mean of x given b from the prior")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean_of_x(vae, x):
    """Mean of x given one draw of the guide, shape (N, D)."""
    drawn = poutine.trace(vae.guide).get_trace(x)
    trace = poutine.trace(poutine.replay(vae.model, drawn)).get_trace(x)
    return trace.nodes["x"]["fn"].mean


def prior_means(vae, x, num):
    """Means of x given draws of all layers from the prior, shape (num, D)."""
    trace = poutine.trace(vae.model).get_trace(x[:1].expand(num, -1))
    return trace.nodes["x"]["fn"].mean


def draw_curves(ax, rows):
    """Bounds of the minibatches in 60 means; dashed where the bound is not the ELBO."""
    lowest = []
    for k, row in enumerate(rows):
        parts = (-row["losses"]).tensor_split(min(60, len(row["losses"])))
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        means = [float(part.mean()) for part in parts]
        lowest.append(means[len(means) // 12])
        own = row["trains on"] == "ELBO"
        label = row["objective"] + ("" if own else f" ({row['trains on']} bound)")
        ax.plot(ends, means, "-" if own else "--", color=f"C{k}", lw=1.3, label=label)
    ax.set(xlabel="steps", ylabel="nats per image", title="Training bound of the batches")
    ax.set_ylim(bottom=min(lowest))
    ax.legend(frameon=False, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)


def draw_ends(ax, rows):
    """The three bounds of each model, with two standard errors."""
    for column, color, marker in (
        ("training ELBO", "tab:blue", "o"),
        ("valid ELBO", "tab:orange", "s"),
        ("valid L_100", "tab:green", "D"),
    ):
        values, errors = [row[column] for row in rows], [2 * row[f"se of {column}"] for row in rows]
        look = {"color": color, "marker": marker, "ms": 5, "ls": "", "capsize": 4}
        ax.errorbar(values, range(len(rows)), xerr=errors, label=column, **look)
    ax.set_yticks(range(len(rows)), [row["objective"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set(xlabel="nats per image (± 2 se)", title="After training, with hard draws")
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3)
    ax.grid(axis="x", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)


def show(ax, images, shape, rows=()):
    """A table of images, shape (rows, columns, D), dark on white."""
    height, width = shape
    gap = max(1, height // 14)
    canvas = torch.nn.functional.pad(images.cpu().unflatten(-1, shape), (gap, 0, gap, 0))
    canvas = canvas.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    ax.imshow(canvas.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([gap + height / 2 + i * (height + gap) for i in range(len(rows))], rows)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", help="static_mnist.npz; scikit-learn's digits without it")
    default = ["rloo", "disarm", "rebar"]
    add("--objective", choices=OBJECTIVES, nargs="+", default=default, help="one after another")
    add("--layers", choices=SIZES, default="1", help="stochastic layers; 1 and 2 are linear")
    add("--num-steps", type=int, default=1000, help="of each objective")
    add("--batch-size", type=int, default=100)
    add("--lr", type=float, default=0.001, help="of Adam, for all parts")
    add("--num-images", type=int, default=1000, help="evaluated, of each set")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--checkpoint", help="folder to save the trainings to, and to continue from")
    add("--output", default="runs/bernoulli_vae")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
