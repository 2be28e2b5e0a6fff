"""Cost of SemiImplicitELBO beside Trace_ELBO and a hand-written PyTorch loop, in one run.

All three train the published guide (noise 10, ReLU 40-60-40, fixed sigma) of the negative binomial
on the mite counts with J = 50 draws, Adam, and the same dtype. The hand-written loop has no Pyro in
it: plain tensors and formulas. Steps alternate between the contestants, so that drift of the
machine's speed hits all alike; the figures are medians of rounds, the ratios medians of the rounds'
ratios.

    python benchmarks/semi_implicit.py [--rounds 15] [--steps 40] [--threads 1]
        [--device cpu] [--validate] [--memory]
"""

import argparse
import math
import platform
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
import torch.distributions as td
from memory import peak_bytes
from pyro.infer import Trace_ELBO

from pyro_vi_ext import SemiImplicitELBO
from pyro_vi_ext.guides import AutoSemiImplicit, NegativeBinomialSemiImplicit
from pyro_vi_ext.models.negative_binomial import load_mites, negative_binomial

J = 50
SIGMA = 0.1


class HandWritten:
    """The same maths in plain PyTorch: nothing but tensors, autograd and Adam."""

    def __init__(self, x, num_mixing):
        self.x, self.num_mixing = x, num_mixing
        sizes = (10, 40, 60, 40, 2)
        layers = []
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*layers[:-1]).to(x.device, x.dtype)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.lgamma_x = torch.lgamma(x + 1).sum()

    def loss(self):
        x, k = self.x, self.num_mixing
        mean = self.net(torch.randn(J, 10, device=x.device, dtype=x.dtype))
        u = mean + SIGMA * torch.randn_like(mean)  # (log r, logit p)
        log_r, logit_p = u[:, :1], u[:, 1:]
        r = log_r.exp()
        log_p, log_1p = (torch.nn.functional.logsigmoid(s * logit_p) for s in (1.0, -1.0))
        log_lik = (torch.lgamma(x + r) - torch.lgamma(r) + x * log_p + r * log_1p).sum(
            -1, keepdim=True
        ) - self.lgamma_x
        a = b = alpha = beta = 0.01
        log_prior = (a - 1) * log_r - b * r + a * math.log(b) - math.lgamma(a)
        log_prior = log_prior + (alpha - 1) * log_p + (beta - 1) * log_1p
        log_prior = log_prior + math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
        constant = -2 * (0.5 * math.log(2 * math.pi) + math.log(SIGMA))
        log_q = constant - 0.5 * ((u - mean) / SIGMA).square().sum(-1)
        if k:
            extra = self.net(torch.randn(k, 10, device=x.device, dtype=x.dtype))
            columns = constant - 0.5 * ((u[:, None] - extra) / SIGMA).square().sum(-1)
            log_q = torch.logaddexp(log_q, columns.logsumexp(1)) - math.log(k + 1)
        log_q = log_q - (log_r + log_p + log_1p).squeeze(-1)
        return -(log_lik + log_prior).mean() + log_q.mean()

    def step(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class HandWrittenDistributions(HandWritten):
    """The same without Pyro, but with the densities of torch.distributions."""

    def loss(self):
        x, k = self.x, self.num_mixing
        mean = self.net(torch.randn(J, 10, device=x.device, dtype=x.dtype))
        q_r, q_p = self.conditionals(mean)
        r, p = q_r.rsample(), q_p.rsample()
        log_q = q_r.log_prob(r) + q_p.log_prob(p)
        if k:
            extra_r, extra_p = self.conditionals(
                self.net(torch.randn(k, 10, device=x.device, dtype=x.dtype))
            )
            columns = extra_r.log_prob(r[:, None]) + extra_p.log_prob(p[:, None])
            log_q = torch.logaddexp(log_q, columns.logsumexp(1)) - math.log(k + 1)
        prior_r = td.Gamma(self.hyper, self.hyper, validate_args=False)
        prior_p = td.Beta(self.hyper, self.hyper, validate_args=False)
        likelihood = td.NegativeBinomial(r[:, None], p[:, None], validate_args=False)
        log_p = prior_r.log_prob(r) + prior_p.log_prob(p) + likelihood.log_prob(x).sum(-1)
        return (log_q - log_p).mean()

    def __init__(self, x, num_mixing):
        super().__init__(x, num_mixing)
        self.hyper = x.new_tensor(0.01)
        self.sigmoid = [td.SigmoidTransform()]

    def conditionals(self, mean):
        mu_r, mu_p = mean.unbind(-1)
        normal = td.Normal(mu_p, SIGMA, validate_args=False)
        q_p = td.TransformedDistribution(normal, self.sigmoid, validate_args=False)
        return td.LogNormal(mu_r, SIGMA, validate_args=False), q_p


class WithPyro:
    """`objective(model, guide)` with the same optimizer."""

    def __init__(self, x, objective):
        self.x = x
        guide = NegativeBinomialSemiImplicit(scale=SIGMA).to(x.device, x.dtype)
        self.module = objective(negative_binomial, guide)
        self.module(x)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-3)

    def step(self):
        self.optimizer.zero_grad()
        loss = self.module(self.x)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def contestants(x, num_mixing):
    with pyro.settings.context(module_local_params=True):
        ours = WithPyro(x, SemiImplicitELBO(J, num_mixing))
        stock = WithPyro(x, Trace_ELBO(J, vectorize_particles=True, max_plate_nesting=1))
    return {
        "SemiImplicitELBO": ours,
        "Trace_ELBO": stock,
        "torch.distributions": HandWrittenDistributions(x, num_mixing),
        "hand-written": HandWritten(x, num_mixing),
    }


def measure(x, num_mixing, rounds, steps):
    with pyro.settings.context(module_local_params=True):
        runners = contestants(x, num_mixing)
        times = {name: [] for name in runners}
        for round_ in range(rounds + 1):
            for name, runner in runners.items():
                start = time.perf_counter()
                for _ in range(steps):
                    runner.step()
                if round_:  # the first one warms up
                    times[name].append((time.perf_counter() - start) / steps)
        memory = {name: peak_bytes(runner.step, x.device) for name, runner in runners.items()}
    return times, memory


class Widened(torch.nn.Module):
    """n Normal conditionals around n noises, with a fixed or a learned scale."""

    def __init__(self, n, learned):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(n))
        self.log_scale = torch.nn.Parameter(torch.zeros(n), requires_grad=learned)

    def forward(self):
        noise = dist.Normal(torch.zeros_like(self.factor), 1.0).to_event(1)
        psi = pyro.sample("psi", noise, infer={"is_auxiliary": True})
        scale = self.log_scale.exp() if self.log_scale.requires_grad else 0.5
        pyro.sample("z", dist.Normal(self.factor * psi, scale).to_event(1))


def print_memory():
    """Peak bytes of a step over b J (K + 1) n: the constant c of SemiImplicitELBO's docstring."""
    print(f"\n{'guide':>22} {'J':>4} {'K':>5} {'n':>3} {'c':>6}")
    for j, k, n in [(50, 1000, 1), (50, 1000, 20), (200, 1000, 20), (50, 100, 20)]:

        def model(n=n):
            pyro.sample("z", dist.Normal(torch.zeros(n), 1.0).to_event(1))

        guides = {
            "Normal, fixed scale": Widened(n, learned=False),
            "Normal, learned scale": Widened(n, learned=True),
            "AutoSemiImplicit": AutoSemiImplicit(model),
        }
        for name, guide in guides.items():
            pyro.clear_param_store()
            module = SemiImplicitELBO(j, k)(model, guide)
            module()
            peak = peak_bytes(lambda module=module: module().backward(), "cpu")
            print(f"{name:>22} {j:>4} {k:>5} {n:>3} {peak / (4 * j * (k + 1) * n):>6.2f}")


def main(args):
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    pyro.enable_validation(args.validate)
    x = load_mites(dtype=torch.float32).to(args.device)
    hardware = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, python {platform.python_version()}")
    print(f"{args.device}: {hardware}, {torch.get_num_threads()} threads, seed {args.seed}")
    if args.memory:
        return print_memory()
    print(
        f"J = {J}, float32, validation {'on' if args.validate else 'off'} (Pyro, not hand-written)"
    )
    print(f"\n{'K':>5} {'objective':>18} {'steps/s':>9} {'x hand-written':>15} {'peak MB':>8}")
    for num_mixing in args.num_mixing:
        times, memory = measure(x, num_mixing, args.rounds, args.steps)
        for name, values in times.items():
            ratios = [a / b for a, b in zip(values, times["hand-written"], strict=True)]
            print(
                f"{num_mixing:>5} {name:>18} {1 / statistics.median(values):>9.0f} "
                f"{statistics.median(ratios):>15.2f} {memory[name] / 2**20:>8.2f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-mixing", type=int, nargs="+", default=[0, 20, 100, 1000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="more make small tensors slower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="the constant of the memory formula")
    parser.add_argument("--validate", action="store_true", help="with Pyro's validation on")
    main(parser.parse_args())
