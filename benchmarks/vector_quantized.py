"""Vector quantisation beside vector-quantize-pytorch 1.32: indices, time, memory, codebook usage.

    pip install -e ".[bench]"
    python benchmarks/vector_quantized.py [--only SECTION ...] [--data path/to/MNIST]

layer: one training step of the quantiser alone (nearest codes, losses, backward pass, moving
averages) for N = 65,536 vectors, K = 8,192 codes, D = 64, float32. Contestants take turns; times
are medians over rounds, ratios medians of the rounds' ratios; on the CPU with one thread they are
processor times. Memory: bytes of tensors alive at the worst moment. usage: a convolutional VQ-VAE
of binarised images (MNIST with --data: 7 x 7 codes, K = 512) with either quantiser, with and
without restarts of unused codes: the same networks, initial weights, batches and optimizer.

Like for like means decay=0.99, commitment_weight=0.25, rotation_trick=False for the peer: its
defaults (0.8, 1, True) are not those of the paper.
"""

import argparse
import platform
import statistics
import time
from importlib.metadata import version

import pyro
import torch
from memory import peak_bytes

from pyro_vi_ext import VQELBO
from pyro_vi_ext.guides import VectorQuantizer
from pyro_vi_ext.guides.code_statistics import perplexity
from pyro_vi_ext.models.images import binarize, load_images
from pyro_vi_ext.models.vq_vae import VQVAE, ConvolutionalDecoder, ConvolutionalEncoder
from pyro_vi_ext.progress import progress_bar

try:
    from vector_quantize_pytorch import VectorQuantize
except ImportError as error:
    raise ImportError(
        "This benchmark needs vector-quantize-pytorch: pip install pyro_vi_ext[bench]"
    ) from error

DECAY, BETA = 0.99, 0.25


def peer(num_codes, code_dim, **options):
    """The peer's layer, configured as the paper's."""
    options = {"decay": DECAY, "commitment_weight": BETA, "rotation_trick": False, **options}
    return VectorQuantize(dim=code_dim, codebook_size=num_codes, **options)


def main(args):
    print(
        f"{platform.platform()}, {args.device}, {torch.get_num_threads()} thread(s)\n"
        f"torch {torch.__version__}, pyro {pyro.__version__}, "
        f"vector-quantize-pytorch {version('vector-quantize-pytorch')}, seed {args.seed}"
    )
    if "layer" in args.only:
        print_layer(args)
    if "usage" in args.only:
        print_usage(args)


# --- the layer -----------------------------------------------------------------------------------


def print_layer(args):
    num, num_codes, dim = args.size
    torch.manual_seed(args.seed)
    z = torch.randn(num, dim, device=args.device)
    codes = torch.randn(num_codes, dim, device=args.device)
    upstream = torch.randn(num, dim, device=args.device)  # the decoder's gradient

    def ours():
        quantizer = VectorQuantizer(num_codes, dim, DECAY).to(args.device)
        quantizer.codebook.copy_(codes)

        def step():
            z_e = z.clone().requires_grad_()
            z_q, indices = quantizer.quantize(z_e)
            _, commitment = quantizer.penalties(z_e, indices)
            quantizer.update(z_e, indices, torch.ones_like(commitment))
            # The peer's loss is the mean over elements.
            loss = (z_q * upstream).sum() + BETA * commitment.sum() / z.numel()
            return indices, torch.autograd.grad(loss, z_e)[0]

        return step

    def theirs():
        layer = peer(num_codes, dim).to(args.device)
        layer._codebook.embed.data.copy_(codes)
        layer._codebook.embed_avg.data.copy_(codes)

        def step():
            z_e = z.clone().requires_grad_()
            z_q, indices, loss = layer(z_e.unsqueeze(0))
            loss = (z_q.squeeze(0) * upstream).sum() + loss.sum()
            return indices.squeeze(0), torch.autograd.grad(loss, z_e)[0]

        return step

    contestants = {"ours": ours, "peer": theirs}
    first = {name: make()() for name, make in contestants.items()}
    report_indices(z, codes, *(first[name][0] for name in contestants))
    error = (first["ours"][1] - first["peer"][1]).abs().max()
    print(f"gradient of the encoder's output: largest difference {float(error):.1e}")

    memory = {name: peak_bytes(make(), args.device) for name, make in contestants.items()}
    steps = {name: make() for name, make in contestants.items()}
    times = {name: [] for name in contestants}
    with progress_bar(None, args.rounds, unit="round") as bar:
        for _ in range(args.rounds):
            for name, step in steps.items():
                times[name].append(clock(step, args.device))
            bar.update(1)
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["peer"], strict=True))
    print(f"\nN = {num}, K = {num_codes}, D = {dim}: ours to the peer's")
    print(f"time    {ratio:.2f}   (median of {args.rounds} rounds)")
    print(
        f"memory  {memory['ours'] / memory['peer']:.3f}   ({memory['peer'] / 2**30:.1f} GiB theirs)"
    )


def report_indices(z, codes, ours, theirs):
    """How many indices differ, and which of the two is nearer in double precision."""
    rows = (ours != theirs).nonzero().flatten()
    print(f"\nindices that differ: {len(rows)} of {len(z)}")
    if len(rows):
        z, codes = z[rows].double(), codes.double()
        distance = [(z - codes[k[rows]]).square().sum(1) for k in (ours, theirs)]
        nearest = torch.stack([(row - codes).square().sum(1).min() for row in z])
        wins = [int((d <= nearest).sum()) for d in distance]
        gap = float(((distance[0] - distance[1]).abs() / nearest).max())
        print(
            f"  nearest in double precision: ours {wins[0]}, peer {wins[1]} of {len(rows)}; "
            f"largest relative gap of the two squared distances {gap:.1e}"
        )


def clock(step, device):
    """Seconds of a step: processor time on the CPU with one thread."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    timer = time.process_time if _alone(device) else time.perf_counter
    start = timer()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return timer() - start


def _alone(device):
    return torch.device(device).type == "cpu" and torch.get_num_threads() == 1


# --- usage after training ------------------------------------------------------------------------


class PeerQuantizer(torch.nn.Module):
    """The peer's layer with the methods that this benchmark needs."""

    def __init__(self, *args, **options):
        super().__init__()
        self.layer = peer(*args, **options)

    def forward(self, z_e):
        z_q, indices, loss = self.layer(z_e.flatten(1, -2))
        return z_q.reshape(z_e.shape), indices, loss.sum() * z_e.numel()


def print_usage(args):
    """Perplexity and number of used codes over the test images, after equal training."""
    images = load_images(args.data)
    x, test = (v.to(args.device) for v in (images.x_train, images.x_test))
    generator = torch.Generator().manual_seed(0)
    test = binarize(test.cpu(), generator).to(args.device)
    num_codes = 512 if args.data else 32
    runs = {
        "ours": (VectorQuantizer, {}),
        "ours, restarts below 1": (VectorQuantizer, {"restart_threshold": 1.0}),
        "ours, restarts, k-means": (
            VectorQuantizer,
            {"restart_threshold": 1.0, "kmeans_init": True},
        ),
        "peer": (PeerQuantizer, {"threshold_ema_dead_code": 0}),
        "peer, restarts below 1": (PeerQuantizer, {"threshold_ema_dead_code": 1}),
        "peer, restarts, k-means": (
            PeerQuantizer,
            {"threshold_ema_dead_code": 1, "kmeans_init": True},
        ),
    }
    print(
        f"\n{'MNIST' if args.data else 'digits'}, K = {num_codes}, D = {args.code_dim}, "
        f"{args.num_steps} steps of {args.batch_size} images, Adam {args.lr}; "
        f"on {len(test)} test images"
    )
    print(f"{'':26}{'perplexity':>11}{'codes used':>12}{'reconstruction, nats':>22}")
    for name, (kind, options) in runs.items():
        counts, reconstruction = train_vq_vae(args, x, test, images.shape, num_codes, kind, options)
        used = f"{int((counts > 0).sum())} of {num_codes}"
        value = float(perplexity(counts))
        print(f"{name:26}{value:>11.1f}{used:>12}{reconstruction:>22.2f}", flush=True)


def train_vq_vae(args, x, test, shape, num_codes, kind, options):
    """Counts of the codes of the test images, and their reconstruction error in nats per image."""
    torch.manual_seed(args.seed)
    pyro.clear_param_store()
    encoder = ConvolutionalEncoder(shape, args.code_dim, args.width).to(args.device)
    decoder = ConvolutionalDecoder(shape, args.code_dim, args.width).to(args.device)
    if kind is VectorQuantizer:
        options = {"ema_decay": DECAY, **options}
    quantizer = kind(num_codes, args.code_dim, **options).to(args.device)
    grid = tuple(side // 4 for side in shape)
    batches = torch.Generator().manual_seed(args.seed)
    if kind is VectorQuantizer:
        vae = VQVAE(encoder, decoder, quantizer, grid)
        module = VQELBO(BETA)(vae.model, vae.guide)

        def loss(batch):
            return module(batch)

        def encode(batch):
            indices = vae.codes(batch)
            return indices, quantizer.decode(indices)
    else:

        def loss(batch):
            z_q, _, penalty = quantizer(encoder(batch))
            return penalty - decoder(z_q).log_prob(batch).sum()

        def encode(batch):
            z_q, indices, _ = quantizer(encoder(batch))
            return indices, z_q

    loss(binarize(x[: args.batch_size].cpu(), batches).to(args.device))
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr)
    with progress_bar(None, args.num_steps, unit="step") as bar:
        for _ in range(args.num_steps):
            rows = torch.randint(len(x), (args.batch_size,), generator=batches)
            batch = binarize(x[rows.to(x.device)].cpu(), batches).to(args.device)
            optimizer.zero_grad()
            (loss(batch) / len(batch)).backward()
            optimizer.step()
            bar.update(1)
    quantizer.eval()
    counts, total = torch.zeros(num_codes, device=args.device), 0.0
    with torch.no_grad():
        for batch in test.split(500):
            indices, z_q = encode(batch)
            counts += torch.bincount(indices.flatten(), minlength=num_codes)
            total -= float(decoder(z_q).log_prob(batch).sum())
    return counts, total / len(test)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=("layer", "usage"), default=("layer", "usage"))
    add("--data", help="folder of MNIST's IDX files; scikit-learn's digits without it")
    add("--size", type=int, nargs=3, default=(65536, 8192, 64), metavar=("N", "K", "D"))
    add("--rounds", type=int, default=3)
    add("--num-steps", type=int, default=1000)
    add("--batch-size", type=int, default=100)
    add("--code-dim", type=int, default=64)
    add("--width", type=int, default=32, help="channels of the networks")
    add("--lr", type=float, default=1e-3)
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
