"""ImportanceWeightedELBO beside exact answers, pyro.infer.RenyiELBO and a hand-written loop.

    python benchmarks/importance_weighted.py [--only SECTION ...] [--data PATH]

stock: what stock Pyro reports in four cases. exactness: bounds and minibatches of a linear-Gaussian
model. snr: signal-to-noise ratio of the guide's gradient. speed: a training step of the MNIST
autoencoder. memory: evaluation with 5,000 particles. table: the IWAE paper's MNIST table, with
--data a folder of the MNIST files.

Contestants take turns, so that drift of the machine's speed hits all alike; times are medians of
rounds, ratios medians of the rounds' ratios. On the CPU with one thread they are processor times,
in which other work on the machine does not count.
"""

import argparse
import math
import platform
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
from iwae_table import print_table
from memory import peak_bytes
from pyro.infer import SVI, RenyiELBO
from pyro.infer.importance import vectorized_importance_weights
from renyi_elbo import print_stock

from pyro_vi_ext import ImportanceWeightedELBO, log_evidence
from pyro_vi_ext.models.deep_vae import DeepVAE

NUM_PARTICLES = (1, 10, 100, 1000)


# --- a model whose evidence is known -----------------------------------------------------------


class LinearGaussian:
    """z_i ~ N(0, I_d), x_i ~ N(W z_i, s^2 I_D); the guide has the wrong mean and no correlation."""

    def __init__(self, num_data=1000, data_dim=10, latent_dim=3, dtype=torch.float64):
        self.num_data, self.latent_dim, self.noise = num_data, latent_dim, 0.5
        self.weight = torch.randn(data_dim, latent_dim, dtype=dtype)
        z = torch.randn(num_data, latent_dim, dtype=dtype)
        self.x = z @ self.weight.T + self.noise * torch.randn(num_data, data_dim, dtype=dtype)
        eye = torch.eye(latent_dim, dtype=dtype)
        cov = torch.linalg.inv(eye + self.weight.T @ self.weight / self.noise**2)
        self.mean = self.x @ self.weight @ cov / self.noise**2 + 0.2
        self.scale = (cov.diagonal() ** 0.5 * 0.8).clone()
        marginal = self.weight @ self.weight.T + self.noise**2 * torch.eye(data_dim, dtype=dtype)
        zero = torch.zeros(data_dim, dtype=dtype)
        self.log_evidence = dist.MultivariateNormal(zero, marginal).log_prob(self.x)
        self.seen = None

    def model(self, batch=None):
        with pyro.plate("data", self.num_data, subsample_size=batch) as index:
            self.seen = index
            zero = self.x.new_zeros(self.latent_dim)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            mean = z @ self.weight.T
            pyro.sample("x", dist.Normal(mean, self.noise).to_event(1), obs=self.x[index])

    def guide(self, batch=None):
        with pyro.plate("data", self.num_data, subsample_size=batch) as index:
            pyro.sample("z", dist.Normal(self.mean[index], self.scale).to_event(1))


def print_exactness(args):
    pair = LinearGaussian()
    exact = float(pair.log_evidence.sum())
    print(f"\nlinear-Gaussian, N = 1000, D = 10: log p(x) = {exact:.3f}")
    print("bounds: mean +- se of many evaluations, the exact evidence of the drawn data as control")
    print(f"{'K':>5} {'B':>5} {'ours':>11} {'se':>7} {'z vs B = N':>11} {'RenyiELBO':>13}")
    for num_particles in NUM_PARTICLES:
        ours = ImportanceWeightedELBO(num_particles)
        stock = RenyiELBO(
            alpha=0, num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1
        )
        full = None
        for batch in (None, 100, 10, 1):
            size = batch or pair.num_data
            repeats = max(20, min(2000, 4_000_000 // (size * num_particles)))
            mean, error = bound(pair, ours, batch, repeats, exact)
            full = full or (mean, error)
            z = (mean - full[0]) / math.hypot(error, full[1]) if batch else 0.0
            other = (
                "-" if num_particles == 1 else f"{bound(pair, stock, batch, repeats, exact)[0]:.1f}"
            )
            print(
                f"{num_particles:>5} {size:>5} {mean:>11.3f} {error:>7.3f} {z:>11.2f} {other:>13}"
            )


def bound(pair, objective, batch, repeats, exact):
    gaps = []
    for _ in range(repeats):
        value = -objective.loss(pair.model, pair.guide, batch)
        drawn = float(pair.log_evidence[pair.seen].sum()) * pair.num_data / len(pair.seen)
        gaps.append(value - drawn)
    gaps = torch.tensor(gaps)
    return exact + gaps.mean().item(), gaps.std().item() / repeats**0.5


# --- gradient quality --------------------------------------------------------------------------


def print_snr(args, repeats=4000, dim=5):
    """The Gaussian toy of Rainforth et al. (1802.04537): q = N(x / 2 + 0.05, 2/3), too wide.

    Each of `repeats` copies of one datum has parameters of its own: its own draw of the gradient.
    """
    x = torch.randn(dim, dtype=torch.float64)
    mean = (x / 2 + 0.05).repeat(repeats, 1).requires_grad_()
    log_scale = torch.full_like(mean, 0.5 * math.log(2 / 3)).requires_grad_()

    def model():
        with pyro.plate("copies", repeats):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide():
        with pyro.plate("copies", repeats):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    print("\ngradient of the guide's mean and log-scale, one datum, mean over the parameters")
    print(f"{'K':>5} {'estimator':>10} {'variance':>11} {'|signal|/noise':>15} {'bias, se':>9}")
    for num_particles in NUM_PARTICLES:
        draws = {}
        for gradient in ("pathwise", "stl", "dreg"):
            objective = ImportanceWeightedELBO(num_particles, gradient, chunk_size=50)
            for p in (mean, log_scale):
                p.grad = None
            objective.loss_and_grads(model, guide)
            draws[gradient] = torch.cat([mean.grad, log_scale.grad], 1)
        signal = draws["dreg"].mean(0)  # the most precise of the unbiased ones
        for gradient, rows in draws.items():
            error = torch.stack([rows.std(0), draws["dreg"].std(0)]).square().sum(0).sqrt()
            bias = (rows.mean(0) - signal) / (error / repeats**0.5)
            own = rows.mean(0) if gradient == "stl" else signal
            print(
                f"{num_particles:>5} {gradient:>10} {rows.var(0).mean():>11.3g} "
                f"{(own.abs() / rows.std(0)).mean():>15.3f} {bias.abs().max():>9.1f}"
            )


# --- speed -------------------------------------------------------------------------------------


class HandWritten:
    """The same autoencoder and bound in plain PyTorch; the densities as formulas."""

    def __init__(self, vae, x, num_particles, doubly):
        self.vae, self.x, self.num, self.doubly = vae, x, num_particles, doubly
        self.optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)

    def log_q(self, z, loc, log_scale):
        standardised = (z - loc) * (-log_scale).exp()
        return -(0.5 * standardised.square() + log_scale).sum(-1) - self.constant(z)

    @staticmethod
    def constant(z):
        return 0.5 * math.log(2 * math.pi) * z.shape[-1]

    def step(self):
        loc, log_scale = self.vae.encoder[0](self.x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn(self.num, *loc.shape)
        if self.doubly:
            z = z + 0.0
            z.register_hook(lambda grad: grad * weights.unsqueeze(-1))
            loc, log_scale = loc.detach(), log_scale.detach()
        logits = self.vae.decoder[0](z)
        log_lik = -torch.nn.functional.binary_cross_entropy_with_logits(
            logits, self.x.expand_as(logits), reduction="none"
        ).sum(-1)
        log_prior = -0.5 * z.square().sum(-1) - self.constant(z)
        log_w = log_lik + log_prior - self.log_q(z, loc, log_scale)
        weights = log_w.detach().softmax(0)
        loss = -(weights * log_w).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def clock(args):
    """Seconds; see the top of the file."""
    alone = args.device == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


class WithSVI:
    def __init__(self, vae, x, objective):
        self.x = x
        self.svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective)

    def step(self):
        self.svi.step(self.x)


def print_speed(args, rounds=15, steps=5):
    num, batch = 50, 20
    x = (torch.rand(batch, 784, device=args.device) < 0.2).float()
    stock = RenyiELBO(alpha=0, num_particles=num, vectorize_particles=True, max_plate_nesting=1)

    def vae(name):
        return DeepVAE(784, name=name).to(args.device)

    runners = {
        "RenyiELBO(alpha=0)": WithSVI(vae("a"), x, stock),
        "pathwise": WithSVI(vae("b"), x, ImportanceWeightedELBO(num)),
        "stl": WithSVI(vae("c"), x, ImportanceWeightedELBO(num, "stl")),
        "dreg": WithSVI(vae("d"), x, ImportanceWeightedELBO(num, "dreg")),
        "dreg, 5 chunks": WithSVI(vae("e"), x, ImportanceWeightedELBO(num, "dreg", 10)),
        "hand-written": HandWritten(vae("f"), x, num, doubly=False),
        "hand-written dreg": HandWritten(vae("g"), x, num, doubly=True),
    }
    times = {name: [] for name in runners}
    for round_ in range(rounds + 1):
        for name, runner in runners.items():
            start = clock(args)
            for _ in range(steps):
                runner.step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                times[name].append((clock(args) - start) / steps)
    print(f"\none step, 784-200-200-50 autoencoder, K = {num}, batch {batch}, float32, Adam")
    print(f"{'':>20} {'ms':>8} {'x RenyiELBO':>12} {'x hand-written':>15} {'peak MB':>8}")
    for name, values in times.items():
        ratios = [
            statistics.median(a / b for a, b in zip(values, times[other], strict=True))
            for other in ("RenyiELBO(alpha=0)", "hand-written")
        ]
        memory = peak_bytes(runners[name].step, args.device) / 2**20
        median = 1000 * statistics.median(values)
        print(f"{name:>20} {median:>8.2f} {ratios[0]:>12.2f} {ratios[1]:>15.2f} {memory:>8.1f}")


# --- evaluation --------------------------------------------------------------------------------


def print_memory(args, num_particles=5000, rounds=5):
    pair = LinearGaussian(dtype=torch.float32)

    def one_go():
        with torch.no_grad():
            log_w = vectorized_importance_weights(
                pair.model, pair.guide, num_samples=num_particles, max_plate_nesting=1
            )[0]
            return log_w

    def ours(chunk_size=100):
        return log_evidence(
            pair.model, pair.guide, num_particles=num_particles, chunk_size=chunk_size
        )

    calls = {
        "vectorized_importance_weights": one_go,
        "log_evidence, chunks of 100": ours,
        "log_evidence, chunks of 20": lambda: ours(20),
    }
    times = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = clock(args)
            call()
            if round_:
                times[name].append(clock(args) - start)
    peaks = {name: peak_bytes(call, args.device) for name, call in calls.items()}
    reference = "vectorized_importance_weights"
    print(f"\nlinear-Gaussian, N = 1000, D = 10, {num_particles} particles per datum, float32")
    print(f"{'':>32} {'peak MB':>8} {'x':>7} {'time x':>7}")
    for name in calls:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))
        relative = peaks[name] / peaks[reference]
        print(f"{name:>32} {peaks[name] / 2**20:>8.1f} {relative:>7.3f} {ratio:>7.2f}")


SECTIONS = {
    "stock": print_stock,
    "exactness": print_exactness,
    "snr": print_snr,
    "speed": print_speed,
    "memory": print_memory,
    "table": print_table,
}


def main(args):
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    hardware = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, python {platform.python_version()}")
    print(f"{args.device}: {hardware}, {torch.get_num_threads()} threads, seed {args.seed}")
    for name, section in SECTIONS.items():
        if name in args.only and (name != "table" or args.data):
            pyro.clear_param_store()
            pyro.set_rng_seed(args.seed)
            section(args)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--data", help="folder with the MNIST files; the table needs it")
    parser.add_argument("--out", default="runs/iwae_table", help="where the table keeps its runs")
    parser.add_argument("--num-seeds", type=int, default=1, help="of the table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
