"""Trains quantisers on a part of each batch: one of two processes, or one process with all of it.

As a script: ``two_processes.py RANK FOLDER`` writes its codebooks to ``FOLDER/RANK.pkl``.
"""

import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as distributed

from pyro_vi_ext.guides import VectorQuantizer

SPLITS = [20, 1, 0, 33, 40]  # rows of the first process; of 40, so the last leaves the second none
QUANTIZERS = {
    "ema": {"ema_decay": 0.8},
    "restart": {"restart_threshold": 2.0, "usage_decay": 0.5},
    "ema, k-means, restart": {"ema_decay": 0.8, "kmeans_init": True, "restart_threshold": 4.0},
}


def batches():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(SPLITS), 40, 2, generator=generator, dtype=torch.double)


def train(rank, world):
    """Kind -> state after k-means and after each batch."""
    result = {}
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(len(SPLITS), 40, generator=generator, dtype=torch.double)
    weights = weights * (weights > 0.3)
    for kind, options in QUANTIZERS.items():
        torch.manual_seed(7)  # the same codes at first
        quantizer = VectorQuantizer(8, 2, **options).double()
        torch.manual_seed(11 + rank)  # random choices are those of the first process
        states = result[kind] = []
        for number, (z, w, split) in enumerate(zip(batches(), weights, SPLITS, strict=True)):
            if world > 1:
                part = slice(0, split) if rank == 0 else slice(split, None)
                z, w = z[part], w[part]
            if number == 0:
                if quantizer.needs_initialization:
                    quantizer.initialize(z, w)
                states.append(state(quantizer))
            quantizer.update(z, quantizer.encode(z), w)
            states.append(state(quantizer))
        assert not quantizer.needs_initialization
    return result


def state(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=2
    )
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(train(rank, 2)))
    distributed.destroy_process_group()
