r"""The toy of RELAX (arXiv:1711.00123): which estimators find theta = 0 through the noise?

    minimise L(theta) = E (b - t)^2,  b ~ Bernoulli(theta),  theta = sigmoid(logit),
    dL / d logit = ((1 - t)^2 - t^2) theta (1 - theta),

from theta = 1/2, for t = 0.499, where the gradient is 0.0005 and the standard deviation of the
plain score-function estimate 1/8, and for t = 0.45. As a pair: the bound of a model with one
factor, -(b - t)^2, and with its draw masked, which removes log p(b) and log q(b) from it.

    python examples/toy_bernoulli.py [--num-steps 1000] [--num-seeds 20] [--seed 0]

prints a table and writes to runs/toy_bernoulli/: table.csv and toy_bernoulli.png. Seeds are
independent copies in one plate, each with a logit and a control variate of its own; only the
running mean of NVIL is one for all. The variance is that of repeated estimates at fixed theta.
"""

import argparse
import copy
import csv
import math
import pathlib
import time

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import nn

from pyro_vi_ext import (
    TraceARM_ELBO,
    TraceDisARM_ELBO,
    TraceMuProp_ELBO,
    TraceNVIL_ELBO,
    TraceRELAX_ELBO,
    TraceRLOO_ELBO,
    TraceScore_ELBO,
)

COLUMNS = "t,estimator,f per step,loss,se,log var at start,log var at end,ms per step".split(",")


def controlled(num_hidden, **options):
    """REBAR (no hidden units) or RELAX, with a control variate for each of n copies."""
    return lambda n: TraceRELAX_ELBO(Control(n, num_hidden), **options)


LEAVE_ONE_OUT = {"num_particles": 2, "leave_one_out": True}

# Name: evaluations of f for one step, and the objective for n copies.
ESTIMATORS = {
    "exact gradient": (2, lambda n: None),
    "REINFORCE": (1, lambda n: TraceScore_ELBO()),
    "MuProp": (2, lambda n: TraceMuProp_ELBO()),
    "running mean": (1, lambda n: TraceNVIL_ELBO()),
    "RLOO": (2, lambda n: TraceRLOO_ELBO(num_particles=2)),
    "ARM": (2, lambda n: TraceARM_ELBO()),
    "DisARM": (2, lambda n: TraceDisARM_ELBO()),
    "REBAR": (2, controlled(0)),
    "REBAR, uncoupled": (3, controlled(0, coupled=False)),
    "REBAR, leave-one-out": (4, controlled(0, **LEAVE_ONE_OUT)),
    "RELAX": (2, controlled(10)),
    "RELAX, leave-one-out": (4, controlled(10, **LEAVE_ONE_OUT)),
}


def main(args):
    out = pathlib.Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # for tensors this small more threads only cost
    rows = []
    for t in args.targets:
        for name, (evaluations, make) in ESTIMATORS.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(args.seed)
            print(f"t = {t}, {name} ...", flush=True)
            row = {"t": t, "estimator": name, "f per step": evaluations}
            rows.append(row | learn(make(args.num_seeds), torch.tensor(t), args))
    print_table(rows)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out / "toy_bernoulli.png")
    print(f"\nwritten to {out}/: table.csv, toy_bernoulli.png")
    return rows


# --- the pair ----------------------------------------------------------------------------------


def model(logits, t):
    """One factor for each copy; the prior is masked, and with it the guide's density."""
    with copies(logits):
        with poutine.mask(mask=False):
            b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.factor("log f", -((b - t) ** 2))


def guide(logits, t):
    """logits: (num_repeats, num_copies)."""
    with copies(logits):
        pyro.sample("b", dist.Bernoulli(logits=logits))


def copies(logits):
    return pyro.plate_stack("copies", logits.shape)


def expected_loss(logits, t):
    """L(theta), for each logit."""
    theta = logits.sigmoid()
    return theta * (1 - t) ** 2 + (1 - theta) * t**2


def exact_gradient(logits, t):
    """dL / d logit."""
    theta = logits.sigmoid()
    return ((1 - t) ** 2 - t**2) * theta * (1 - theta)


class Control(nn.Module):
    r"""c(z) = -eta (sigmoid(z / lambda) - t)^2 + r(z), with eta, lambda and r of each copy.

    r is a network of one layer of tanh units, zero at first; REBAR is that of no units. Without a
    module, TraceREBAR_ELBO() and TraceRELAX_ELBO() learn one control variate for the whole plate.
    """

    def __init__(self, num_copies, num_hidden):
        super().__init__()
        shape = (num_copies, num_hidden)
        self.log_temperature = nn.Parameter(torch.full((num_copies,), math.log(0.5)))
        self.scale = nn.Parameter(torch.ones(num_copies))
        self.slope = nn.Parameter(torch.rand(shape) * 2 - 1)
        self.bias = nn.Parameter(torch.rand(shape) * 2 - 1)
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, sites, logits, t):
        relaxed = torch.sigmoid(sites["b"] / self.log_temperature.exp())
        hidden = torch.tanh(self.slope * (2 * relaxed - 1).unsqueeze(-1) + self.bias)
        return -self.scale * (relaxed - t) ** 2 + (hidden * self.weight).sum(-1)


# --- learning, and what is measured ------------------------------------------------------------


def learn(objective, t, args):
    """A row of the table, with its curves: Adam from theta = 1/2."""
    logits = torch.zeros(args.num_seeds, requires_grad=True)
    every, seconds = max(1, args.num_steps // args.num_points), 0.0
    curves = [measure(objective, logits, t, 0, args)]  # a first call makes the control variate
    optimizer = torch.optim.Adam([logits, *parameters_of(objective)], lr=args.learning_rate)
    for step in range(1, args.num_steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_of(objective, logits.unsqueeze(0), t).backward()
        optimizer.step()
        seconds += time.perf_counter() - start
        if step % every == 0 or step == args.num_steps:
            curves.append(measure(objective, logits, t, step, args))
    steps, losses, log_variances = zip(*curves, strict=True)
    return {
        "loss": losses[-1].mean().item(),
        "se": losses[-1].std().item() / math.sqrt(args.num_seeds),
        "log var at start": log_variances[0],
        "log var at end": log_variances[-1],
        "ms per step": 1000 * seconds / args.num_steps,
        "steps": steps,
        "losses": torch.stack(losses),
        "log variances": log_variances,
    }


def measure(objective, logits, t, step, args):
    """The step, the exact loss of each copy, and the log of the copies' mean variance."""
    draws = gradient_draws(objective, logits, t, args.num_repeats)
    return step, expected_loss(logits.detach(), t), log(draws.var(0).mean().item())


def loss_of(objective, logits, t):
    """A scalar whose gradient is the estimate for each logit."""
    if objective is None:
        return expected_loss(logits, t).sum()
    return objective.differentiable_loss(model, guide, logits, t)


def gradient_draws(objective, logits, t, num_repeats):
    """Independent estimates of the gradient for each copy: (num_repeats, num_copies)."""
    means = copy.deepcopy(getattr(objective, "means", None))  # a running mean learns at each call
    repeated = logits.detach().expand(num_repeats, -1).clone().requires_grad_()
    (draws,) = torch.autograd.grad(loss_of(objective, repeated, t), repeated)
    if means is not None:
        objective.means = means
    return draws


def parameters_of(objective):
    """The learned parts of an objective that has been called."""
    learned = getattr(objective, "learned", None)
    return [] if learned is None else list(learned.parameters())


def log(variance):
    """The natural logarithm; less than rounding of the gradient is nothing."""
    return math.log(variance) if variance > 1e-30 else -math.inf


# --- what is reported --------------------------------------------------------------------------


def print_table(rows):
    formats = {"loss": "{:.6f}", "se": "{:.6f}", "ms per step": "{:.2f}"}
    formats |= dict.fromkeys(("log var at start", "log var at end"), "{:.2f}")
    table = [COLUMNS] + [[formats.get(c, "{}").format(row[c]) for c in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print()
    for t, name, *rest in table:
        left = [t.ljust(widths[0]), name.ljust(widths[1])]
        right = [cell.rjust(width) for cell, width in zip(rest, widths[2:], strict=True)]
        print("  ".join(left + right))


STYLES = {
    "exact gradient": ("black", "-"),
    "REINFORCE": ("0.55", "-"),
    "MuProp": ("0.55", "--"),
    "running mean": ("tab:green", "-"),
    "RLOO": ("tab:green", "--"),
    "ARM": ("tab:orange", "-"),
    "DisARM": ("tab:orange", "--"),
    "REBAR": ("tab:blue", "-"),
    "REBAR, uncoupled": ("tab:blue", ":"),
    "REBAR, leave-one-out": ("tab:blue", "--"),
    "RELAX": ("tab:red", "-"),
    "RELAX, leave-one-out": ("tab:red", "--"),
}


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    targets = list(dict.fromkeys(row["t"] for row in rows))
    figure, axes = plt.subplots(
        2, len(targets), figsize=(6.5 * len(targets), 9), sharex="col", squeeze=False
    )
    for (above, below), t in zip(axes.T, targets, strict=True):
        for row in [row for row in rows if row["t"] == t]:
            color, style = STYLES[row["estimator"]]
            look = {"color": color, "ls": style, "lw": 1.6, "label": row["estimator"]}
            above.plot(row["steps"], row["losses"].mean(1), **look)
            below.plot(row["steps"], row["log variances"], **look)
        above.axhline(t**2, color="0.8", lw=1, zorder=0)
        above.set(title=f"t = {t} (thin lines: t², log 1/64)", ylabel="L(θ) (mean over seeds)")
        below.axhline(-math.log(64), color="0.8", lw=1, zorder=0)
        below.set(xlabel="step", ylabel="log variance of the gradient (mean over seeds)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=6, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.499, 0.45], help="t")
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--num-seeds", type=int, default=20, help="copies that learn apart")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of Adam, for all parts")
    parser.add_argument("--num-repeats", type=int, default=500, help="estimates of each variance")
    parser.add_argument("--num-points", type=int, default=30, help="of each curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/toy_bernoulli")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
