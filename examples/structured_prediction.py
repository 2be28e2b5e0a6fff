"""The lower half of a digit from its upper half, through layers of Bernoulli draws.

    L_m = E log 1/m sum_k p(x | b^(k)),  b^(k) ~ p(b | u),

for the upper half u and the lower half x; the proposal is the prior given u, so nothing is inferred
(Raiko et al. 2015, arXiv:1406.2989). The network is trained with m = 1, 5 and 50 draws, by VIMCO
(arXiv:1602.06725), and compared by the bound of 100 draws. With one draw VIMCO has no other to take
a baseline from; TraceRLOO_ELBO(2), of the same bound, is trained beside it.

    python examples/structured_prediction.py [--data static_mnist.npz] [--num-draws 1 5 50]
        [--num-steps 400] [--device cpu] [--seed 0]

prints a table and writes to runs/structured_prediction/: table.csv and structured_prediction.png.
Without --data: the handwritten digits of scikit-learn, binarised once.
"""

import argparse
import csv
import math
import pathlib
import statistics
import time

import pyro
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

from pyro_vi_ext import ImportanceWeightedELBO, TraceRLOO_ELBO, fit, log_evidence
from pyro_vi_ext.models.images import binarize, load_images, load_static_mnist
from pyro_vi_ext.models.structured_prediction import StructuredPrediction, halves

COLUMNS = (
    "m,gradient,training L_m,se of training L_m,training L_100,se of training L_100,"
    "test L_100,se of test L_100,se over images,ms per step"
).split(",")


def main(args):
    out = pathlib.Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    x_train, x_test, shape = load(args)
    train_halves, test_halves = halves(x_train, shape), halves(x_test, shape)
    seen, test = (
        [half[: args.num_images] for half in pair] for pair in (train_halves, test_halves)
    )
    rows = []
    for m in args.num_draws:
        for gradient, objective in objectives(m).items():
            print(f"m = {m}, {gradient} ...", flush=True)
            net, milliseconds = train(objective, train_halves, args)
            pyro.set_rng_seed(args.seed + 1)  # the same draws, whatever the training has used
            row = {"m": m, "gradient": gradient, "ms per step": milliseconds, "net": net}
            rows.append(row | evaluate(net, seen, test, m))
    print_table(rows)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, test, shape, args, out / "structured_prediction.png")
    print(f"\nwritten to {out}/: table.csv, structured_prediction.png")
    return rows


# --- data and training -------------------------------------------------------------------------


def load(args):
    """Images to train and to test, zeros and ones, shape (N, D), and their height and width."""
    if args.data is not None:
        train, _, test = load_static_mnist(args.data)
        return train.to(args.device), test.to(args.device), (28, 28)
    images = load_images()
    generator = torch.Generator().manual_seed(0)  # binarised once, the same for everybody
    train, test = (binarize(x, generator) for x in (images.x_train, images.x_test))
    return train.to(args.device), test.to(args.device), images.shape


def objectives(m):
    """By the name of the gradient: the objectives with the bound L_m."""
    if m == 1:
        return {"no baseline": ImportanceWeightedELBO(1), "RLOO": TraceRLOO_ELBO(2)}
    return {"VIMCO": ImportanceWeightedELBO(m)}


def train(objective, pair, args):
    """A network fitted to pairs of halves, and the time per step; the same start and batches."""
    upper, lower = pair
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    net = StructuredPrediction(
        upper.shape[1],
        lower.shape[1],
        args.latent_dims,
        upper_mean=upper.mean(0),
        lower_mean=lower.mean(0),
    ).to(args.device)
    order = torch.Generator().manual_seed(args.seed)  # of its own: no objective disturbs it
    options = {"shuffle": True, "drop_last": True, "generator": order}
    size = min(args.batch_size, len(upper))
    times = []
    fit(
        objective(net.model, net.guide),
        DataLoader(TensorDataset(upper, lower), batch_size=size, **options),
        num_steps=args.num_steps,
        optimizer=torch.optim.Adam(net.parameters(), lr=args.lr),
        callback=lambda step, loss: times.append(time.perf_counter()),
    )
    between = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
    return net.requires_grad_(False).eval(), 1000 * statistics.median(between)


# --- what is reported --------------------------------------------------------------------------


def evaluate(net, seen, test, m):
    """Bounds, nats per image, with Monte-Carlo errors of these images' mean over 10 repeats."""
    num = len(seen[0])
    objective = ImportanceWeightedELBO(m, chunk_size=chunk(seen))
    losses = [objective.loss(net.model, net.guide, *seen) / num for _ in range(10)]
    row = {
        "training L_m": -statistics.fmean(losses),
        "se of training L_m": statistics.stdev(losses) / math.sqrt(len(losses)),
    }
    for name, pair in (("training", seen), ("test", test)):
        options = {"num_particles": 100, "chunk_size": chunk(pair)}
        bounds = [log_evidence(net.model, net.guide, *pair, **options) for _ in range(10)]
        bounds = torch.stack([bound.log_evidence for bound in bounds])  # (10, images)
        row[f"{name} L_100"] = float(bounds.mean())
        row[f"se of {name} L_100"] = float(bounds.mean(1).std()) / math.sqrt(len(bounds))
    return row | {"se over images": float(bounds.mean(0).std()) / math.sqrt(len(test[0]))}


def chunk(pair):
    """Particles at once: 1 MB for each tensor of the size of the data."""
    return max(1, 2**18 // pair[1].numel())


def print_table(rows):
    formats = dict.fromkeys(COLUMNS[2:9], "{:.3f}") | {"ms per step": "{:.1f}"}
    table = [COLUMNS, *([formats.get(c, "{}").format(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print("\nnats per lower half; se: Monte-Carlo standard error for these images")
    for line in table:
        cells = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
        print("  ".join([cells[0], line[1].ljust(widths[1]), *cells[2:]]))


# --- the picture -------------------------------------------------------------------------------


def plot(rows, test, shape, args, path):
    """Test images, and five completions of their upper halves by each network; the bounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pyro.set_rng_seed(args.seed + 2)  # the same picture, whatever was evaluated
    upper, lower = (half[: args.num_shown] for half in test)
    widths = [2, *(5 for _ in rows), 6]
    figure, axes = plt.subplots(
        1,
        len(widths),
        figsize=(0.5 * sum(widths) + 1.0, 0.5 * len(upper) + 1.0),
        width_ratios=widths,
        layout="constrained",
    )
    given = torch.cat([upper, torch.zeros_like(lower)], -1)
    truth = torch.stack([given, torch.cat([upper, lower], -1)], 1)
    show(axes[0], truth, shape, "u     u, x")
    for ax, row in zip(axes[1:-1], rows, strict=True):
        title = f"m = {row['m']}, {row['gradient']}"
        show(ax, completions(row["net"], upper, lower, 5), shape, title)
    draw_bounds(axes[-1], rows)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def completions(net, upper, lower, num):
    """Whole images with the mean of the lower half given a draw of b, shape (N, num, D)."""
    many = upper.repeat_interleave(num, 0)
    mean = poutine.trace(net.model).get_trace(many).nodes["lower"]["fn"].mean
    return torch.cat([many, mean], -1).unflatten(0, (len(upper), num))


def show(ax, images, shape, title):
    """A table of images, shape (rows, columns, D), with a line below what is given."""
    height, width = shape
    gap = max(1, height // 10)
    canvas = torch.nn.functional.pad(images.cpu().unflatten(-1, shape), (gap, 0, gap, 0))
    canvas = canvas.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    ax.imshow(canvas.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    for row in range(len(images)):
        cut = row * (height + gap) + gap + height // 2 - 0.5
        ax.axhline(cut, color="tab:red", lw=0.7)
    ax.set_title(title, fontsize=10)
    ax.set_axis_off()


def draw_bounds(ax, rows):
    """The three bounds of each network, with two standard errors."""
    for column, color, marker in (
        ("training L_m", "tab:blue", "o"),
        ("training L_100", "tab:orange", "s"),
        ("test L_100", "tab:green", "D"),
    ):
        values, errors = [row[column] for row in rows], [2 * row[f"se of {column}"] for row in rows]
        look = {"color": color, "marker": marker, "ms": 5, "ls": "", "capsize": 4}
        ax.errorbar(values, range(len(rows)), xerr=errors, label=column, **look)
    ax.set_yticks(range(len(rows)), [f"m = {row['m']},\n{row['gradient']}" for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("nats per lower half (± 2 se)")
    ax.grid(axis="x", color="0.9")
    ax.legend(frameon=False, loc="lower left", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", help="static_mnist.npz; scikit-learn's digits without it")
    add("--num-draws", type=int, nargs="+", default=[1, 5, 50], help="m, one after another")
    add("--latent-dims", type=int, nargs="+", help="layers of draws; 240 240, or 60 60 for digits")
    add("--num-steps", type=int, default=400, help="of each network")
    add("--batch-size", type=int, default=100)
    add("--lr", type=float, default=0.003, help="of Adam")
    add("--num-images", type=int, default=300, help="evaluated, of each set")
    add("--num-shown", type=int, default=8, help="test images in the picture")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--output", default="runs/structured_prediction")
    args = parser.parse_args(argv)
    if args.latent_dims is None:
        args.latent_dims = [60, 60] if args.data is None else [240, 240]
    return args


if __name__ == "__main__":
    main(parse())
