"""A vector-quantised autoencoder with a bound: bits per dimension, a learned prior, no collapse.

Trains the VQ-VAE of van den Oord et al. 2017 (arXiv:1711.00937) on MNIST (7 x 7 codes), or on
scikit-learn's small digits without --data; then an autoregressive prior on the frozen codes; and
reports on test images the bound of the whole model with either prior, beside a deep Gaussian VAE.
Then, on the small digits, a decoder that is strong enough to model images alone: with a Gaussian
guide it stops using its latents, with a quantised one it does not.

    python examples/vq_vae.py [--data path/to/MNIST] [--device cpu] [--seed 0]

prints two tables and writes to runs/vq_vae/: tables.csv and vq_vae.png, with reconstructions,
samples under both priors, and how often each code is used.
"""

import argparse
import csv
import pathlib

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch.utils.data import DataLoader

from pyro_vi_ext import VQELBO, TraceSTL_ELBO, elbo_terms, fit
from pyro_vi_ext.guides import VectorQuantizer
from pyro_vi_ext.guides.code_statistics import perplexity
from pyro_vi_ext.models.code_prior import AutoregressiveCodePrior
from pyro_vi_ext.models.deep_vae import DeepVAE
from pyro_vi_ext.models.images import binarize, load_images
from pyro_vi_ext.models.vq_vae import (
    VQVAE,
    AutoregressiveDecoder,
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    GaussianGridVAE,
    MLPDecoder,
    MLPEncoder,
)

SMALL_GRID, SMALL_CODES, SMALL_DIM = (4,), 32, 8  # of the small digits
COLUMNS = "model,ELBO,reconstruction,KL,bits/dim,perplexity,codes of another image".split(",")


def main(args):
    out = pathlib.Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    images = load_images(args.data)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    test = fixed(images.x_test[: args.num_test], args)

    vae = make_vq_vae(args, images).to(args.device)
    train("VQ-VAE", VQELBO(args.commitment_cost), vae, images, args.num_steps, args)
    vae.requires_grad_(False).eval()
    prior = AutoregressiveCodePrior(vae.quantizer, vae.grid).to(args.device)
    train("prior", Trace_ELBO(), prior, images, args.num_prior_steps, args, vae.codes)
    deep = DeepVAE(images.x_train.shape[1], data_mean=images.x_train.mean(0)).to(args.device)
    train("deep VAE", TraceSTL_ELBO(), deep, images, args.num_steps, args)
    rows = [
        evaluate("VQ-VAE, uniform prior", vae, test),
        evaluate("VQ-VAE, learned prior", vae, test, prior=prior.site()),
        evaluate("deep Gaussian VAE", deep, test),
    ]
    print_table("MNIST" if args.data else "digits", rows, len(test))

    strong = compare_strong_decoders(args)
    rows += strong
    with open(out / "tables.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(vae, prior, images, test, strong, args, out / "vq_vae.png")
    print(f"\nwritten to {out}/: tables.csv, vq_vae.png")
    return rows


# --- models and training -------------------------------------------------------------------------


def make_vq_vae(args, images):
    """Convolutional for MNIST, fully connected for the small digits."""
    if args.data is None:
        networks = (
            MLPEncoder(images.x_train.shape[1], SMALL_GRID, SMALL_DIM),
            MLPDecoder(SMALL_GRID, SMALL_DIM, images.x_train.shape[1]),
        )
        return VQVAE(*networks, make_quantizer(args, SMALL_CODES, SMALL_DIM), SMALL_GRID)
    sizes = (images.shape, args.code_dim, args.width)
    quantizer = make_quantizer(args, args.num_codes, args.code_dim)
    grid = tuple(side // 4 for side in images.shape)
    return VQVAE(ConvolutionalEncoder(*sizes), ConvolutionalDecoder(*sizes), quantizer, grid)


def make_quantizer(args, num_codes, code_dim):
    return VectorQuantizer(
        num_codes,
        code_dim,
        ema_decay=0.99,
        kmeans_init=True,
        restart_threshold=1.0,
        rotation_trick=args.rotation_trick,
    )


def train(name, objective, pair, images, num_steps, args, transform=None):
    """Fit a pair to fresh draws of x in each batch, or to what a function makes of them."""

    def collate(rows):
        x = binarize(torch.stack(rows)).to(args.device)
        return x if transform is None else transform(x)

    size = min(args.batch_size, len(images.x_train))
    loader = DataLoader(
        images.x_train, batch_size=size, shuffle=True, drop_last=True, collate_fn=collate
    )
    checkpoint = args.checkpoint and f"{args.checkpoint}/{name.replace(' ', '_')}.pt"
    result = fit(
        objective(pair.model, pair.guide),
        loader,
        num_steps=num_steps,
        optimizer=torch.optim.Adam(pair.parameters(), lr=args.lr),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, num_steps),
        checkpoint=checkpoint,
    )
    epochs = num_steps * size / len(images.x_train)
    last = float(result.losses[-100:].mean()) / size
    print(
        f"{name}: {num_steps} steps of {size} images ({epochs:.1f} epochs), "
        f"loss {last:.2f} nats per image in the last ones",
        flush=True,
    )
    pyro.clear_param_store()  # the modules have their parameters


def fixed(grey, args):
    """One draw of binary images, the same for every model."""
    return binarize(grey, torch.Generator().manual_seed(0)).to(args.device)


# --- what is reported ----------------------------------------------------------------------------


@torch.no_grad()
def evaluate(name, vae, x, **options):
    """A row of a table, nats per image; bits per dimension are those of the bound."""
    # All mass on one code: nothing to average.
    draws = {VQVAE: 2, DeepVAE: 50, GaussianGridVAE: 10}[type(vae)]
    totals = torch.zeros(3, dtype=torch.float64)
    for part in x.split(500):
        terms = elbo_terms(vae.model, vae.guide, part, num_particles=draws, **options)
        kl = sum(map(float, terms.kl.values()))
        parts = [terms.elbo.value, terms.reconstruction["x"].value, kl]
        totals += torch.tensor(parts, dtype=torch.float64)
    elbo, reconstruction, kl = (totals / len(x)).tolist()
    row = {"model": name, "ELBO": elbo, "reconstruction": reconstruction, "KL": kl}
    row["bits/dim"] = -elbo / (x.shape[1] * torch.tensor(2.0).log().item())
    if isinstance(vae, VQVAE):
        row["perplexity"] = float(perplexity(code_counts(vae, x)))
    if not isinstance(vae, DeepVAE):
        row["codes of another image"] = reconstruction - loss_of_codes(vae, x)
    return row


def code_counts(vae, x):
    """How often each code is used."""
    return torch.bincount(vae.codes(x).flatten(), minlength=vae.quantizer.num_codes).double()


@torch.no_grad()
def loss_of_codes(vae, x):
    """Nats per image that reconstruction loses with the latents of another image."""
    lost = 0.0
    for part in x.split(500):
        z = vae.posterior(part).sample()
        own, other = (vae.decoder(value).log_prob(part).sum() for value in (z, z.roll(1, 0)))
        lost += float(own - other)
    return lost / len(x)


def print_table(title, rows, num):
    formats = {"model": "{}", "bits/dim": "{:.4f}", "perplexity": "{:.1f}"}
    table = [COLUMNS]
    for row in rows:
        table.append([formats.get(c, "{:.2f}").format(row[c]) if c in row else "" for c in COLUMNS])
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print(f"\n{title}: {num} test images, nats per image")
    for line in table:
        cells = [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]))
    print("codes of another image: reconstruction with the latents of the next image")


# --- a strong decoder ----------------------------------------------------------------------------


def compare_strong_decoders(args):
    """The same autoregressive decoder with a Gaussian and with a quantised guide."""
    images = load_images()
    test = fixed(images.x_test, args)
    grid, dim, pixels = SMALL_GRID, SMALL_DIM, images.x_train.shape[1]
    rows = []
    for name in ("Gaussian guide", "VQ guide"):
        pyro.set_rng_seed(args.seed)
        decoder = AutoregressiveDecoder(grid, dim, pixels, width=32)
        if name == "VQ guide":
            quantizer = make_quantizer(args, SMALL_CODES, dim)
            vae = VQVAE(MLPEncoder(pixels, grid, dim), decoder, quantizer, grid)
            objective = VQELBO(args.commitment_cost)
        else:
            vae = GaussianGridVAE(MLPEncoder(pixels, grid, 2 * dim), decoder, grid, dim)
            objective = TraceSTL_ELBO()
        vae.to(args.device)
        label = f"strong decoder, {name}"
        train(label, objective, vae, images, args.num_strong_steps, args)
        vae.requires_grad_(False).eval()
        if isinstance(vae, GaussianGridVAE):
            rows.append(evaluate(label, vae, test))
            continue
        prior = AutoregressiveCodePrior(vae.quantizer, grid).to(args.device)
        steps = args.num_prior_steps
        train(
            "prior beside the strong decoder", Trace_ELBO(), prior, images, steps, args, vae.codes
        )
        rows.append(evaluate(f"{label}, uniform prior", vae, test))
        rows.append(evaluate(f"{label}, learned prior", vae, test, prior=prior.site()))
    print_table("strong decoder, digits", rows, len(test))
    return rows


# --- the picture ---------------------------------------------------------------------------------


def plot(vae, prior, images, test, strong, args, path):
    """Reconstructions, samples under both priors, code usage, and what a strong decoder uses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pyro.set_rng_seed(args.seed + 1)
    first = [int((images.y_test == label).nonzero()[0]) for label in range(10)]
    x = fixed(images.x_test[first], args)
    mean = vae.decode(vae.quantizer.decode(vae.codes(x)))
    figure = plt.figure(figsize=(12, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1.0))
    axes = left.subplot_mosaic(
        [["data", "data"], ["uniform", "learned"]], height_ratios=(0.42, 1.0)
    ) | right.subplot_mosaic([["usage"], ["strong"]])
    show(axes["data"], torch.stack([x, mean]), images.shape, ["x", "mean of x\ngiven its codes"])
    axes["data"].set_title("Test images and their reconstructions")
    with torch.no_grad():
        uniform = vae.decode(vae.prior().sample((36,)))
        learned = vae.decode(prior.site().sample((36,)))
    for name, sample in (("uniform", uniform), ("learned", learned)):
        show(axes[name], sample.unflatten(0, (6, 6)), images.shape)
        axes[name].set_title(f"Samples, {name} prior")
    draw_usage(axes["usage"], code_counts(vae, test))
    draw_strong(axes["strong"], strong)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_usage(ax, counts):
    """Frequencies of the codes, sorted."""
    frequencies = (counts / counts.sum()).sort(descending=True).values.cpu()
    num = len(frequencies)
    ax.bar(range(num), frequencies.numpy(), width=1.0, color="tab:blue")
    ax.axhline(1 / num, color="tab:orange", ls="--", label=f"1/{num}")
    ax.set(
        xlabel="code, by frequency",
        ylabel="frequency in test images",
        title=f"Code usage: perplexity {float(perplexity(counts)):.0f} of {num}",
    )
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def draw_strong(ax, rows):
    """What the latents cost a strong decoder, and what they tell it."""
    bars = {
        "KL": [row["KL"] for row in rows],
        "reconstruction lost with the\nlatents of another image": [
            row["reconstruction"] - row["codes of another image"] for row in rows
        ],
    }
    for i, (label, values) in enumerate(bars.items()):
        places = [place + 0.38 * (i - 0.5) for place in range(len(rows))]
        drawn = ax.bar(places, values, width=0.36, label=label)
        ax.bar_label(drawn, fmt="%.1f", padding=2)
    labels = [row["model"].removeprefix("strong decoder, ").replace(", ", "\n") for row in rows]
    ax.set_xticks(range(len(rows)), labels)
    ax.set(ylabel="nats per image", title="A strong decoder: what latents cost, what they tell")
    ax.margins(y=0.4)
    ax.legend(frameon=False, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)


def show(ax, images, shape, rows=()):
    """A table of images, shape (rows, columns, P), dark on white."""
    height, width = shape
    gap = max(1, height // 14)
    canvas = torch.nn.functional.pad(images.cpu().unflatten(-1, shape), (gap, 0, gap, 0))
    canvas = canvas.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    ax.imshow(canvas.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_yticks([gap + height / 2 + i * (height + gap) for i in range(len(rows))], rows)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", help="folder of MNIST's IDX files; scikit-learn's digits without it")
    add("--num-steps", type=int, default=2000, help="of the VQ-VAE and of the deep VAE")
    add("--num-prior-steps", type=int, default=1000, help="of the prior over codes")
    add("--num-strong-steps", type=int, default=1500, help="of each guide with a strong decoder")
    add("--batch-size", type=int, default=100)
    add("--lr", type=float, default=0.002, help="at the start; falls to 0 along a cosine")
    add("--commitment-cost", type=float, default=0.25)
    add("--rotation-trick", action="store_true", help="in place of the straight-through gradient")
    add("--num-codes", type=int, default=512, help="K, of MNIST")
    add("--code-dim", type=int, default=64, help="D, of MNIST")
    add("--width", type=int, default=32, help="channels of the convolutions")
    add("--num-test", type=int, default=1000)
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add(
        "--checkpoint",
        help="folder to save the training to, and to continue from; its own for "
        "each set of options",
    )
    add("--output", default="runs/vq_vae")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
