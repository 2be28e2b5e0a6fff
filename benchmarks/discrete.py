"""Estimators of the gradient through discrete latents: variance, time, and training.

    python benchmarks/discrete.py --data static_mnist.npz [--only SECTION ...]

variance: linear autoencoder of 200 Bernoulli latents, at one checkpoint for all estimators: log of
the mean variance per logit, time per step, and their product. training: the 1-sample ELBO and the
100-sample bound after equal steps. storchastic: beside that library (the extra `bench`). Without
--data: the handwritten digits of scikit-learn.

The checkpoint is trained with DisARM, learning rate 1e-3, batch 100. Control variates and baselines
then learn for 600 steps, with the autoencoder at rest. Variances are those of the gradient for the
logits of 24 images, from 200 draws each, in nats^2 per image. Contestants take turns in the timing;
times are medians over rounds, ratios medians of the rounds' ratios; on the CPU with one thread they
are processor times, in which other work on the machine does not count.
"""

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import pyro_vi_ext
from pyro_vi_ext import ImportanceWeightedELBO, TraceDisARM_ELBO, fit
from pyro_vi_ext.models.bernoulli_vae import BernoulliVAE
from pyro_vi_ext.models.images import binarize, load_images, load_static_mnist

NUM_IMAGES, NUM_DRAWS, BATCH = 24, 200, 100


def objectives():
    """By name: estimator, and number of evaluations of the log-weight in a step."""
    ours = pyro_vi_ext
    return {
        "REINFORCE": ours.TraceScore_ELBO(),
        "NVIL": ours.TraceNVIL_ELBO(),
        "RLOO-2": ours.TraceRLOO_ELBO(2),
        "RLOO-4": ours.TraceRLOO_ELBO(4),
        "MuProp": ours.TraceMuProp_ELBO(),
        "ARM": ours.TraceARM_ELBO(),
        "DisARM": ours.TraceDisARM_ELBO(),
        "REBAR": ours.TraceREBAR_ELBO(),
        "REBAR, uncoupled": ours.TraceREBAR_ELBO(coupled=False, name="rebar_uncoupled"),
        "REBAR-2": ours.TraceREBAR_ELBO(2, name="rebar_2"),
        "REBAR-2, leave one out": ours.TraceREBAR_ELBO(2, leave_one_out=True, name="rebar_loo"),
        "RELAX": ours.TraceRELAX_ELBO(hidden_dims=(200, 200)),
        "RELAX, uncoupled": ours.TraceRELAX_ELBO(
            hidden_dims=(200, 200), coupled=False, name="relax_uncoupled"
        ),
        "Concrete (biased)": ours.TraceConcrete_ELBO(0.5),
    }


# Log variance found before, by other code, at such a checkpoint (2,500 steps, batch 100).
BEFORE = {
    "REINFORCE": 8.13,
    "RLOO-2": 2.51,
    "ARM": 2.38,
    "DisARM": 2.04,
    "REBAR": 1.46,
    "RELAX": 1.37,
}


def load(args):
    """Images to train and to test, zeros and ones."""
    if args.data is not None:
        train, valid, _ = load_static_mnist(args.data)
        return train.to(args.device), valid.to(args.device)
    images = load_images()
    generator = torch.Generator().manual_seed(0)
    parts = (images.x_train, images.x_test)
    return tuple(binarize(x, generator).to(args.device) for x in parts)


def train(objective, vae, x, num_steps, seed, lr=1e-3):
    """Train on random batches; the average loss per image of the last tenth."""
    rows = torch.Generator().manual_seed(seed)
    module = objective(vae.model, vae.guide)

    def batch():
        return x[torch.randint(len(x), (BATCH,), generator=rows).to(x.device)]

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self):
            return self.module(batch()) / BATCH

    module(batch())  # makes what is learned
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    losses = fit(Step(), num_steps=num_steps, optimizer=optimizer).losses
    return statistics.fmean(map(float, losses[-max(1, num_steps // 10) :]))


def checkpoint(args, x):
    """The autoencoder at which all estimators are compared."""
    path = Path(args.out) / f"checkpoint-{x.shape[1]}-{args.num_steps}.pt"
    vae = BernoulliVAE(x.shape[1], (200,), data_mean=x.mean(0)).to(args.device)
    if not path.exists():
        train(TraceDisARM_ELBO(), vae, x, args.num_steps, args.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(vae.state_dict(), part)
        part.replace(path)
    vae.load_state_dict(torch.load(path))
    return vae


def adapt(objective, vae, x, num_steps, seed):
    """Let the learned parts of an objective learn at the checkpoint."""
    rows = torch.Generator().manual_seed(seed)

    def loss():
        index = torch.randint(len(x), (BATCH,), generator=rows).to(x.device)
        return objective.differentiable_loss(vae.model, vae.guide, x[index]) / BATCH

    loss()
    module = getattr(objective, "learned", None)
    learned = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    if not learned:
        return
    adam = torch.optim.Adam(learned, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
    for _ in range(num_steps):
        for parameter, slope in zip(learned, torch.autograd.grad(loss(), learned), strict=True):
            parameter.grad = slope
        adam.step()
        schedule.step()


def clock(args):
    """Seconds; see the top of the file."""
    alone = args.device == "cpu" and args.num_threads == 1
    return time.process_time() if alone else time.perf_counter()


def log_variance(objective, vae, x, num_draws):
    """Log of the mean variance of the gradient for a logit, and its standard error."""
    with torch.no_grad():
        start = vae.encoder[0](x - vae.data_mean)
    logits = start.clone().requires_grad_()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("b1", dist.Bernoulli(logits=logits).to_event(1))

    draws = torch.stack(
        [
            torch.autograd.grad(objective.differentiable_loss(vae.model, guide, x), logits)[0]
            for _ in range(num_draws)
        ]
    )
    squares = (draws - draws.mean(0)).square() * (num_draws / (num_draws - 1))
    each = squares.mean((1, 2))
    mean = each.mean().item()
    return math.log(mean), each.std().item() / math.sqrt(num_draws) / mean


def print_variance(args, x, valid):
    vae = checkpoint(args, x)
    images = valid[:NUM_IMAGES]
    found, times = {}, {name: [] for name in objectives()}
    learners = objectives()
    for name, objective in learners.items():
        pyro.set_rng_seed(args.seed)
        adapt(objective, vae, x, args.num_adapt, args.seed)
        found[name] = log_variance(objective, vae, images, NUM_DRAWS)
        print(f"  {name}: {found[name][0]:.2f}", flush=True)
    steps = {}
    for name, objective in learners.items():
        module = objective(vae.model, vae.guide)
        module(x[:BATCH])
        parameters = [p for p in module.parameters() if p.requires_grad]
        steps[name] = module, torch.optim.Adam(parameters, lr=0.0)
    for _ in range(args.num_rounds):
        for name, (module, adam) in steps.items():
            start = clock(args)
            for _ in range(5):
                adam.zero_grad()
                module(x[:BATCH]).backward()
                adam.step()
            if x.is_cuda:
                torch.cuda.synchronize()
            times[name].append((clock(args) - start) / 5)
    print(f"\nat the checkpoint: {args.num_steps} steps of DisARM, batch {BATCH}")
    print(
        f"{'':24} {'log var':>8} {'se':>6} {'before':>7} {'time':>6} {'var x time':>11}   "
        "(time and cost relative to REINFORCE and RLOO-2)"
    )
    reference = statistics.median(times["RLOO-2"]) * math.exp(found["RLOO-2"][0])
    for name, (value, error) in found.items():
        pairs = zip(times[name], times["REINFORCE"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        cost = statistics.median(times[name]) * math.exp(value) / reference
        before = f"{BEFORE[name]:.2f}" if name in BEFORE and args.data is not None else "-"
        print(f"{name:24} {value:8.2f} {error:6.2f} {before:>7} {ratio:6.2f} {cost:11.2f}")


def print_training(args, x, valid):
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"\nafter {args.num_steps} steps, batch {BATCH}, learning rate 1e-3; 1,000 images")
    print(f"{'':24} {'train, 1 sample':>16} {'valid, 1 sample':>16} {'valid, 100':>11}")
    for name in objectives():
        path = folder / f"train-{x.shape[1]}-{args.num_steps}-{name.replace(' ', '_')}.json"
        if not path.exists():
            pyro.clear_param_store()
            pyro.set_rng_seed(args.seed)
            vae = BernoulliVAE(x.shape[1], (200,), data_mean=x.mean(0)).to(args.device)
            train(objectives()[name], vae, x, args.num_steps, args.seed)
            bounds = [-bound(vae, part[:1000], k) for part, k in ((x, 1), (valid, 1), (valid, 100))]
            part = path.with_suffix(".part")
            part.write_text(json.dumps(bounds))
            part.replace(path)
        bounds = json.loads(path.read_text())
        print("{:24} {:16.2f} {:16.2f} {:11.2f}".format(name, *bounds), flush=True)


def bound(vae, x, num_particles):
    """Nats per image, of hard draws."""
    objective = ImportanceWeightedELBO(num_particles, chunk_size=10 if num_particles > 10 else None)
    repeats = max(1, 100 // num_particles)
    losses = [objective.loss(vae.model, vae.guide, x) for _ in range(repeats)]
    return statistics.fmean(losses) / len(x)


def print_storchastic(args, x, valid):
    from storchastic_peer import print_storchastic as print_peer  # patches torch when imported

    print_peer(args, x, valid)


SECTIONS = {
    "variance": print_variance,
    "training": print_training,
    "storchastic": print_storchastic,
}
DEFAULT = ["variance", "training"]


def main(args):
    torch.set_num_threads(args.num_threads)
    pyro.set_rng_seed(args.seed)
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, python {platform.python_version()}, "
        f"{args.device}, {args.num_threads} threads, seed {args.seed}, "
        f"data {'scikit-learn digits' if args.data is None else Path(args.data).name}"
    )
    x, valid = load(args)
    for name in args.only:
        SECTIONS[name](args, x, valid)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="static_mnist.npz")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=DEFAULT)
    parser.add_argument("--num-steps", type=int, default=2500)
    parser.add_argument("--num-adapt", type=int, default=600)
    parser.add_argument("--num-rounds", type=int, default=10)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/discrete")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
