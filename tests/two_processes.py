"""Trains quantisers on a part of each batch: one of two processes, or one process with all of it.

Their statistics alone (:func:`train`), and a whole model by VQELBO and torch's
``DistributedDataParallel`` (:func:`train_model`). As a script: ``two_processes.py RANK FOLDER``
writes its results to ``FOLDER/RANK.pkl``.
"""

import pickle
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as distributed
from torch import nn

from pyro_vi_ext import VQELBO
from pyro_vi_ext.guides import CodePrior, VectorQuantized, VectorQuantizer

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


def train_model(rank, world):
    """Kind -> losses of the batches, gradients of the last, and all parameters and buffers."""
    result = {}
    for kind, options in QUANTIZERS.items():
        pyro.clear_param_store()
        torch.manual_seed(7)
        quantizer = VectorQuantizer(8, 2, **options)
        encoder, decoder = nn.Linear(2, 6), nn.Linear(6, 2)

        def model(x, quantizer=quantizer, decoder=decoder):
            pyro.module("decoder", decoder)
            with pyro.plate("data", 40, subsample=torch.arange(len(x))):
                z = pyro.sample("z", CodePrior(quantizer).expand([3]).to_event(1))
                p = dist.Normal(decoder(z.flatten(-2)), 1.0).to_event(1)
                pyro.sample("x", p, obs=x)

        def guide(x, quantizer=quantizer, encoder=encoder):
            pyro.module("encoder", encoder)
            with pyro.plate("data", 40, subsample=torch.arange(len(x))):
                z_e = encoder(x).unflatten(-1, (3, 2))
                pyro.sample("z", VectorQuantized(z_e, quantizer).to_event(1))

        def part(x):
            return x if world == 1 else x.chunk(2)[rank]

        module = VQELBO()(model, guide)
        torch.manual_seed(11 + rank)
        module(part(batches()[0]))  # makes the parameters, and starts the codes
        parameters = list(module.parameters())
        if world > 1:
            module = nn.parallel.DistributedDataParallel(module)
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.5)
        losses = []
        for x in batches():
            optimizer.zero_grad()
            loss = module(part(x))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        result[kind] = {"losses": torch.stack(losses)}
        for name, owner in (("encoder", encoder), ("decoder", decoder), ("codes", quantizer)):
            result[kind] |= {f"{name}.{k}": v for k, v in state(owner).items()}
        result[kind] |= {f"gradient {i}": p.grad for i, p in enumerate(parameters)}
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
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps((train(rank, 2), train_model(rank, 2))))
    distributed.destroy_process_group()
