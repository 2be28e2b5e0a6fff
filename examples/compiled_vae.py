"""A small VAE trained by SVI, and by CompiledSVI under the same seed: one curve, in less time.

    z_i ~ Normal(0, I),  x_i ~ Bernoulli(decoder(z_i)),  q(z_i | x_i) = Normal(encoder(x_i)),

for digits of 8 x 8 pixels, with 8 latents and 64 hidden units, by Trace_ELBO and Adam. All images
are the argument of a step; model and guide have the same plate, and so the same 100 of them.

    python examples/compiled_vae.py [--num-steps 18000] [--backend inductor] [--device cpu]

prints a table and writes to runs/compiled_vae/: table.csv and compiled_vae.png. Seconds are elapsed
ones, on one CPU thread. Stepping is all that is neither tracing nor compiling, with the comparisons
that CompiledSVI makes with plain steps. "pays after" is (trace + compile) / (plain step - compiled
step), in steps. CompiledSVI.run finds the code of a step ready, made for CompiledSVI.step before
it; that time is counted for both. Inductor keeps code on disk as well: another run compiles faster,
unless TORCHINDUCTOR_CACHE_DIR is an empty folder. Draws are the same, so losses differ by float32's
rounding alone; training amplifies it, from 2e-7 in 100 steps to some 5e-3 in 18,000.
"""

import argparse
import csv
import functools
import math
import pathlib
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vi_ext import CompiledSVI
from pyro_vi_ext.models.images import binarize, load_images

PLAIN, STEP, RUN = METHODS = ("SVI.step", "CompiledSVI.step", "CompiledSVI.run")
HIDDEN, LATENT = 64, 8

SECONDS = "trace + compile (s),stepping (s)"
COLUMNS = f"method,steps,{SECONDS},speed,pays after,largest difference,loss".split(",")


def main(args):
    out = pathlib.Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for tensors this small more threads only cost
    x = binarize(load_images().x_train, torch.Generator().manual_seed(0)).to(args.device)
    train(PLAIN, x, parse(["--num-steps", "1"]))  # a first step imports what later ones use
    rows = []
    for method in METHODS:
        print(f"{method} ...", flush=True)
        rows.append(train(method, x, args))
    compare(*rows)
    print_table(rows)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out / "compiled_vae.png")
    print(f"\nwritten to {out}/: table.csv, compiled_vae.png")
    return rows


# --- the pair ----------------------------------------------------------------------------------


def make_pair(num_pixels, batch_size):
    """Model and guide, functions of all images, with networks that start at random."""
    encoder = nn.Sequential(nn.Linear(num_pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_pixels))

    def batch(x):  # drawn by the guide; the model is replayed with the same indices
        return pyro.plate("images", len(x), subsample_size=batch_size, device=x.device)

    def model(x):
        pyro.module("decoder", decoder.to(x.device))
        with batch(x) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[index])

    def guide(x):
        pyro.module("encoder", encoder.to(x.device))
        with batch(x) as index:
            loc, log_scale = encoder(x[index]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


# --- training, and what is measured ------------------------------------------------------------


def train(method, x, args):
    """The loss of each step, nats per image, and the seconds elapsed at the ends of some."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    kind = SVI if method == PLAIN else functools.partial(CompiledSVI, backend=args.backend)
    pair = make_pair(x.shape[1], args.batch_size)
    svi = kind(*pair, pyro.optim.Adam({"lr": args.lr}), Trace_ELBO())
    start = time.perf_counter()
    losses, ends, seconds = [], [], []
    while len(losses) < args.num_steps:
        count = min(args.every, args.num_steps - len(losses))
        if method == RUN:
            losses += svi.run(count, x).tolist()
        else:
            losses += [svi.step(x) for _ in range(count)]
        ends.append(len(losses))
        seconds.append(time.perf_counter() - start)
    programs = getattr(svi, "programs", [])
    return {
        "method": method,
        "losses": torch.tensor(losses, dtype=torch.float64) / len(x),
        "ends": ends,
        "seconds": torch.tensor(seconds, dtype=torch.float64),
        "trace": sum(program.trace_seconds for program in programs),
        "compile": sum(program.compile_seconds for program in programs),
    }


def compare(plain, step, run):
    """Adds to rows what the table says, most of it relative to plain SVI."""
    run["compile"] += step["compile"]  # whose code was ready
    run["seconds"] += step["compile"]
    same, num_steps = plain["losses"], len(plain["losses"])
    for row in (plain, step, run):
        making = row["trace"] + row["compile"]
        row |= {
            "steps": num_steps,
            "trace + compile (s)": making,
            "stepping (s)": row["seconds"][-1].item() - making,
            "largest difference": ((row["losses"] - same) / same).abs().max().item(),
            "loss": row["losses"][-max(1, num_steps // 10) :].mean().item(),
        }
        gain = plain["stepping (s)"] - row["stepping (s)"]
        row["speed"] = plain["stepping (s)"] / row["stepping (s)"]
        row["pays after"] = num_steps * making / gain if gain > 0 else math.nan


# --- what is reported --------------------------------------------------------------------------


def print_table(rows):
    formats = {"speed": "{:.1f}", "pays after": "{:.0f}", "loss": "{:.3f}"}
    formats |= {"largest difference": "{:.1e}"} | dict.fromkeys(COLUMNS[2:4], "{:.2f}")
    table = [COLUMNS, *([formats.get(c, "{}").format(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print("\nloss: nats per image, mean of the last tenth; the rest relative to plain SVI")
    for name, *rest in table:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]))


def plot(rows, path):
    """The loss by step and by time; a diamond where compilation has paid for itself."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="tight")
    looks = (("0.75", 4.0), ("tab:blue", 1.6), ("tab:red", 0.5))  # one over the other
    for row, (color, width) in zip(rows, looks, strict=True):
        ends, seconds = row["ends"], row["seconds"]
        left.plot(range(1, ends[-1] + 1), row["losses"], color=color, lw=width, label=row["method"])
        means = [row["losses"][a:b].mean().item() for a, b in zip([0, *ends], ends, strict=False)]
        right.plot(seconds, means, "o-", color=color, lw=1.6, ms=3, label=row["method"])
        paid = (seconds < rows[0]["seconds"]).nonzero().flatten().tolist()
        if paid:  # the first time it has made more steps than plain SVI
            k = paid[0]
            look = {"color": color, "ms": 9, "mec": "black", "ls": "", "zorder": 3}
            look["label"] = f"paid for: step {ends[k]}, {seconds[k]:.1f} s"
            right.plot(seconds[k], means[k], "D", **look)
    left.set(xscale="log", xlabel="step", ylabel="loss (nats per image)")
    right.set(xlabel="elapsed seconds, with tracing and compiling", xlim=(0, None))
    right.set_ylabel(f"mean loss of {rows[0]['ends'][0]} steps, at their end")
    left.legend(frameon=False, fontsize=9)
    right.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.05, 1))
    for ax in (left, right):
        ax.grid(color="0.93")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--num-steps", type=int, default=18000, help="of each method")
    add("--backend", default="inductor", help="of CompiledSVI: inductor, eager or cudagraphs")
    add("--batch-size", type=int, default=100)
    add("--lr", type=float, default=0.001, help="of Adam")
    add("--every", type=int, default=250, help="steps in a call of run, and in a point")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--output", default="runs/compiled_vae")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
