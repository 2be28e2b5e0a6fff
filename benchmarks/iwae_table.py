"""The MNIST table of the IWAE paper (Burda et al. 2016, arXiv:1509.00519), shortened.

One stochastic layer of 50 units, dynamic binarisation of the grey images. The paper trains for
3,280 epochs of batch 20 and reports L_5000 on all test images; here 6,000 steps of batch 100 (10
epochs; 3,000 for k = 50, and for the others beside it) and L_500 on 1,000 test images, shuffled.
Estimators of one seed see the same initial weights, batches and binarisations. Each run is kept in
a file when done.
"""

import json
import math
from pathlib import Path

import pyro
import torch

from pyro_vi_ext import ImportanceWeightedELBO, fit, log_evidence
from pyro_vi_ext.models.deep_vae import DeepVAE
from pyro_vi_ext.models.images import binarize, load_images

BATCH = 100
RUNS = ((1, 6000), (5, 6000), (1, 3000), (5, 3000), (50, 3000))  # k, steps
# L_5000 after the full protocol: the paper, and a public re-implementation with both estimators.
PUBLISHED = {1: (86.76, 86.35, 86.08), 5: (85.54, 85.18, 84.90), 50: (84.78, 84.59, 84.32)}


def print_table(args):
    images = load_images(args.data)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    print("\n-L_500 on 1,000 shuffled test images (nats), after the steps given")
    print(
        f"{'k':>4} {'estimator':>10} {'steps':>6} {'epochs':>6} {'seed':>5} {'-L_500':>8} "
        f"{'se':>6} {'active':>7} {'paper':>7} {'rerun pathwise, DReG':>21}"
    )
    results = {}
    for seed in range(args.seed, args.seed + args.num_seeds):
        for k, num_steps in RUNS:
            for gradient in ("pathwise", "dreg"):
                path = folder / f"{k}-{gradient}-{num_steps}-{seed}.json"
                if not path.exists():
                    found = run(args, images, k, gradient, num_steps, seed)
                    part = path.with_suffix(".part")
                    part.write_text(json.dumps(found))
                    part.replace(path)
                found = json.loads(path.read_text())
                results[k, gradient, num_steps, seed] = found
                paper, *rerun = PUBLISHED[k]
                print(
                    f"{k:>4} {gradient:>10} {num_steps:>6} "
                    f"{num_steps * BATCH / len(images.x_train):>6.1f} {seed:>5} "
                    f"{-found['mean']:>8.2f} {found['se']:>6.2f} {found['active']:>7} "
                    f"{paper:>7} {rerun[0]:>12} {rerun[1]:>8}",
                    flush=True,
                )
    pairs = (
        ((5, "pathwise", 6000), (1, "pathwise", 6000)),
        ((50, "pathwise", 3000), (5, "pathwise", 3000)),
        ((1, "dreg", 6000), (1, "pathwise", 6000)),
        ((5, "dreg", 6000), (5, "pathwise", 6000)),
        ((50, "dreg", 3000), (50, "pathwise", 3000)),
    )
    for seed in range(args.seed, args.seed + args.num_seeds):
        for better, other in pairs:
            each, base = (torch.tensor(results[(*key, seed)]["each"]) for key in (better, other))
            difference = each - base
            error = difference.std() / math.sqrt(len(difference))
            print(
                f"seed {seed}: {label(better)} gains {difference.mean():.2f} nats over "
                f"{label(other)} (se over the images {error:.2f})"
            )


def label(key):
    k, gradient, num_steps = key
    return f"k = {k} {gradient} after {num_steps} steps"


def run(args, images, k, gradient, num_steps, seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = DeepVAE(784, data_mean=images.x_train.mean(0)).to(args.device)
    module = ImportanceWeightedELBO(k, gradient)(vae.model, vae.guide)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    batches = torch.Generator().manual_seed(seed)
    grey = images.x_train.to(args.device)

    class Step(torch.nn.Module):
        """The bound of a fresh batch, the same for all estimators of a seed."""

        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self):
            rows = torch.randint(len(grey), (BATCH,), generator=batches)
            x = binarize(grey[rows.to(grey.device)].cpu(), batches).to(grey.device)
            return self.module(x) / BATCH

    fit(Step(), num_steps=num_steps, optimizer=optimizer)
    shuffled = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(images.x_test), generator=shuffled)[:1000]
    test = binarize(images.x_test[rows], shuffled).to(args.device)
    evidence = log_evidence(vae.model, vae.guide, test, num_particles=500, chunk_size=25)
    each = evidence.log_evidence.cpu()
    return {
        "mean": each.mean().item(),
        "se": each.std().item() / len(each) ** 0.5,
        "active": vae.active_units(test).counts[0],
        "each": each.tolist(),
    }
