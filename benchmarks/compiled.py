"""CompiledSVI beside stock SVI, JitTrace_ELBO, a hand-written loop and NumPyro, in one run.

    pip install -e ".[bench,numpyro,data]"
    python benchmarks/compiled.py [--only PAIR ...] [--rounds 5] [--steps 1000] [--threads 1]
        [--device cpu] [--validate] [--seed 0] [--warm-cache] [--async-dispatch]

For each of seven model/guide pairs, in float32 with Adam: pyro.infer.SVI.step, the same with
JitTrace_ELBO, CompiledSVI.step with each backend, and CompiledSVI.run, many steps in one compiled
loop; for the VAE a hand-written PyTorch loop; for the pairs of Trace_ELBO their twins in NumPyro,
jit(svi.update) called from Python and inside a fori_loop. All start from the same parameters, on
the same data, and make the same number of steps first. If the mean loss of a contestant is not that
of stock Pyro, to rounding where both have the same draws, else to 4 standard errors, found from
stock Pyro under other seeds, it does not do the same work, and its line says DIFFERS.

Then they take turns, so that drift of the machine's speed hits all alike; the figures are medians
of the rounds' ratios, of processor time on one CPU thread (in which other work on the machine does
not count), otherwise of elapsed time. Pyro's validation is off, which makes stock Pyro faster. JAX
dispatches synchronously on one thread, which makes NumPyro faster than JAX's default, a second
thread; --async-dispatch is that default.

Seconds are elapsed ones of this machine: "first", construction and the first two calls; "trace"
and "compile", of all programs of a CompiledSVI, with Inductor's cache empty at the start. "pays
after" is (trace + compile) / (stock step - compiled step), in steps. CompiledSVI.run finds the code
of a step ready, made for the contestant before it; its "pays after" counts that too.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from compiled_models import PAIRS, make_pair
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO

SECONDS = 0.2  # of a contestant's turn, unless --steps are over before
ROUNDING, ERRORS = 1e-4, 4.0  # relative difference of each loss; standard errors

STOCK, JIT, RUN = "stock", "stock, JitTrace_ELBO", "compiled run"
EAGER, INDUCTOR, GRAPHS = (f"compiled step, {b}" for b in ("eager", "inductor", "cudagraphs"))
HAND, UPDATE, LOOP = "hand-written PyTorch", "NumPyro update", "NumPyro fori_loop"

# By device: pair, contestant, other, and the largest ratio of their times.
TARGETS = {
    "cpu": [
        ("VAE", INDUCTOR, STOCK, 1 / 8),
        ("eight schools", INDUCTOR, STOCK, 1 / 40),
        ("VAE", INDUCTOR, UPDATE, 0.9),
        ("eight schools", INDUCTOR, UPDATE, 0.9),
        ("VAE", RUN, LOOP, 1.3),
        ("eight schools", RUN, LOOP, 3.0),
    ],
    "cuda": [("VAE", GRAPHS, STOCK, 1 / 20)],
}


class WithPyro:
    """An SVI, or what has its interface, in a parameter store of its own."""

    def __init__(self, svi, pair):
        self.args, self.store = pair.args, {"params": {}, "constraints": {}}
        self.svi = svi(pair.model, pair.guide, pyro.optim.Adam({"lr": pair.lr}), pair.objective)

    def steps(self, n):
        return [self.svi.step(*self.args) for _ in range(n)]


class WithRun(WithPyro):
    def steps(self, n):
        return self.svi.run(n, *self.args).cpu().numpy()


def stock_jit(model, guide, optim, objective):
    return SVI(model, guide, optim, JitTrace_ELBO(ignore_jit_warnings=True))


def compiled(backend):
    def svi(*args):
        from pyro_vi_ext import CompiledSVI

        return CompiledSVI(*args, backend=backend)

    return svi


def contestants(name, pair, args):
    """By name: what makes a contestant from a fresh pair."""
    import compiled_peers as peers

    steppers = {STOCK: SVI}
    if type(pair.objective) is Trace_ELBO:
        steppers[JIT] = stock_jit
    backends = {EAGER: "eager", INDUCTOR: "inductor"}
    if args.device != "cpu":
        backends[GRAPHS] = "cudagraphs"
    steppers |= {key: compiled(backend) for key, backend in backends.items()}
    makers = {key: lambda pair, svi=svi: WithPyro(svi, pair) for key, svi in steppers.items()}
    run_backend = list(backends.values())[-1]
    makers[RUN] = lambda pair: WithRun(compiled(run_backend), pair)
    if name == "VAE":
        makers[HAND] = peers.HandWrittenVAE
    if name in peers.TWINS and peers.on(args.device):
        makers[UPDATE] = lambda pair: peers.NumPyroUpdate(name, pair, args.seed)
        makers[LOOP] = lambda pair: peers.NumPyroLoop(name, pair, args.seed)
    return makers


@dataclass
class Entry:
    """A contestant that has made its first steps."""

    contestant: Any
    first: float  # seconds
    losses: np.ndarray
    num_steps: int  # of a turn
    times: list = field(default_factory=list)  # seconds per step, for each round

    @property
    def programs(self):
        return getattr(getattr(self.contestant, "svi", None), "programs", [])

    @property
    def trace(self):
        return sum(program.trace_seconds for program in self.programs)

    @property
    def compile(self):
        return sum(program.compile_seconds for program in self.programs)


def clock(args):
    if args.device == "cpu" and args.threads == 1 and not args.async_dispatch:
        return time.process_time()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def turn(contestant, num_steps, args):
    """Losses of so many steps, and seconds per step."""
    store = getattr(contestant, "store", None)
    with nullcontext() if store is None else pyro.get_param_store().scope(store):
        began = clock(args)
        losses = contestant.steps(num_steps)
        seconds = clock(args) - began
    return np.asarray(losses, dtype=float), seconds / num_steps


def enter(make, pair, size, args):
    """Make a contestant that takes `size` steps at a time, and its first steps."""
    began = time.perf_counter()
    contestant = make(pair)
    losses = [turn(contestant, size, args)[0] for _ in range(2)]
    first = time.perf_counter() - began
    more, seconds = turn(contestant, size * max(1, math.ceil(args.check / size) - 2), args)
    losses = np.concatenate([*losses, more])[: args.check]
    num_steps = min(args.steps, math.ceil(SECONDS / seconds)) // size * size
    return Entry(contestant, first, losses, max(size, num_steps))


def enter_all(name, args):
    """The contestants that can take part; those that cannot say why."""
    entries = {}
    for key, make in contestants(name, make_pair(name, args.seed, args.device), args).items():
        pair = make_pair(name, args.seed, args.device)
        size = pair.run_steps if key in (RUN, LOOP) else 1
        pyro.set_rng_seed(args.seed)
        log(f"{name}: {key}")
        try:
            entries[key] = enter(make, pair, size, args)
        except Exception as error:  # a refusal is a result
            print(f"  {key}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return entries


def compete(name, args):
    entries = enter_all(name, args)
    for round_ in range(args.rounds):
        log(f"{name}: round {round_ + 1} of {args.rounds}")
        for entry in entries.values():
            entry.times.append(turn(entry.contestant, entry.num_steps, args)[1])
    return entries


def ratio(entries, key, other):
    """Median over rounds of the ratio of two contestants' times; nan if one did not take part."""
    if key not in entries or other not in entries:
        return math.nan
    pairs = zip(entries[key].times, entries[other].times, strict=True)
    return statistics.median(a / b for a, b in pairs)


def stock_means(name, args):
    """Mean losses of stock Pyro from the same start under other seeds."""
    means = []
    for repeat in range(args.repeats):
        log(f"{name}: stock under another seed, {repeat + 1} of {args.repeats}")
        stock = WithPyro(SVI, make_pair(name, args.seed, args.device))
        pyro.set_rng_seed(args.seed + 1 + repeat)
        means.append(turn(stock, args.check, args)[0].mean())
    return means


def print_losses(name, entries, args):
    stock = entries[STOCK].losses
    others = [entry.losses for entry in entries.values()]
    same_draws = [np.allclose(losses, stock, rtol=ROUNDING, atol=0) for losses in others]
    means = [stock.mean()] + ([] if all(same_draws) else stock_means(name, args))
    center, error = statistics.fmean(means), math.nan
    if len(means) > 1:
        error = statistics.stdev(means) * math.sqrt(1 + 1 / len(means))
    print(f"  {'':26} {f'mean of {len(stock)} losses':>19} {'- stock':>9} {'se':>8}")
    for (key, entry), same in zip(entries.items(), same_draws, strict=True):
        line = f"  {key:26} {entry.losses.mean():19.3f}"
        if same:
            print(line + "   the same draws and losses")
        else:
            gap = entry.losses.mean() - center
            agrees = abs(gap) <= ERRORS * error
            print(f"{line} {gap:9.3f} {error:8.3f}{'' if agrees else '  DIFFERS'}")


def print_times(entries):
    others = {"/hand": HAND, "/update": UPDATE, "/fori": LOOP}
    others = {title: key for title, key in others.items() if key in entries}
    titles = "".join(f" {title:>8}" for title in others)
    print(
        f"\n  {'':26} {'x stock':>8}{titles} {'first s':>8} {'trace s':>8} {'compile s':>9} "
        f"{'pays after':>10}"
    )
    for key, entry in entries.items():
        line = f"  {key:26} {1 / ratio(entries, key, STOCK):8.1f}"
        line += "".join(f" {ratio(entries, key, other):8.2f}" for other in others.values())
        line += f" {entry.first:8.2f}"
        if entry.programs:
            line += f" {entry.trace:8.2f} {entry.compile:9.2f} {pays_after(entries, key):>10}"
        print(line, flush=True)


def pays_after(entries, key):
    entry = entries[key]
    cost = entry.trace + entry.compile
    if key == RUN and INDUCTOR in entries:
        cost += entries[INDUCTOR].compile
    gains = zip(entries[STOCK].times, entry.times, strict=True)
    gain = statistics.median(stock - own for stock, own in gains)
    return f"{cost / gain:.0f}" if gain > 0 else "never"


def print_targets(results, args):
    targets = TARGETS["cpu" if args.device == "cpu" else "cuda"]
    if not any(name in results for name, *_ in targets):
        return
    print("\ntargets: ratio of times, at most")
    for name, key, other, bound in targets:
        if name in results:
            found = ratio(results[name], key, other)
            verdict = "not run" if math.isnan(found) else "met" if found <= bound else "missed"
            print(f"  {name:14} {key:24} to {other:18} {found:7.3f} {bound:7.3f}  {verdict}")


def log(text):
    print(text, file=sys.stderr, flush=True)


def main(args):
    os.environ["XLA_FLAGS"] = (
        f"--xla_cpu_multi_thread_eigen={'false' if args.threads == 1 else 'true'} "
        f"intra_op_parallelism_threads={args.threads} {os.environ.get('XLA_FLAGS', '')}"
    )
    os.environ["NPROC"] = str(args.threads)  # of XLA's pool, which the flags leave alone
    import compiled_peers as peers

    peers.set_dispatch(args.async_dispatch or args.threads > 1)

    torch.set_num_threads(args.threads)
    pyro.enable_validation(args.validate)
    on_cpu = args.device == "cpu"
    hardware = platform.processor() or platform.machine()
    if not on_cpu:
        hardware = torch.cuda.get_device_name(args.device)
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, {peers.VERSIONS}, "
        f"python {platform.python_version()}\n{args.device}: {hardware}, {os.cpu_count()} cores, "
        f"threads {args.threads}, seed {args.seed}, float32, "
        f"validation {'on' if args.validate else 'off'} in Pyro"
    )
    results = {}
    with nullcontext() if args.warm_cache else tempfile.TemporaryDirectory() as folder:
        if folder is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for name in args.only:
            print(f"\n{name}")
            results[name] = compete(name, args)
            print_losses(name, results[name], args)
            print_times(results[name])
    print_targets(results, args)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="PAIR")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=1000, help="most steps of a contestant's turn")
    add("--check", type=int, default=200, help="steps whose losses are compared")
    add("--repeats", type=int, default=11, help="of stock Pyro, for the error of its mean loss")
    add("--threads", type=int, default=1, help="more make small tensors slower")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--validate", action="store_true", help="with Pyro's validation on")
    add("--warm-cache", action="store_true", help="leave Inductor's cache of earlier runs")
    add("--async-dispatch", action="store_true", help="of JAX; all times are elapsed then")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
