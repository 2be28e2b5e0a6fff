"""KL to the exact posterior over seeds: the published recipe and AutoSemiImplicit, one protocol.

Runs examples/negative_binomial.py for several seeds and prints, per method, mean and range of the
KL bound, the ratio of posterior sd to the exact one, and the error of the correlation.

    python benchmarks/negative_binomial.py [--seeds 0 1 2] [--num-mixing 1 5 20 100]
"""

import argparse
import importlib.util
import pathlib
import platform
import tempfile

import pyro
import torch


def load_example():
    path = pathlib.Path(__file__).parents[1] / "examples" / "negative_binomial.py"
    spec = importlib.util.spec_from_file_location("negative_binomial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(args):
    example = load_example()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            argv = ["--seed", str(seed), "--output", folder, "--num-steps", str(args.num_steps)]
            argv += ["--num-mixing", *map(str, args.num_mixing), "--only", "SIVI", "SemiImplicit"]
            for row in example.main(example.parse([*argv, "--device", args.device])):
                rows.setdefault(row["method"], []).append(row)
    (exact,) = {tuple(row.items()) for row in rows.pop("exact (quadrature)")}
    exact = dict(exact)
    print(
        f"\ntorch {torch.__version__}, pyro {pyro.__version__}, python {platform.python_version()}"
    )
    print(f"{args.device}, {args.num_steps} steps, seeds {args.seeds}")
    print(
        f"{'method':24} {'KL <= mean [range]':>28} {'sd r ratio':>17} {'sd p ratio':>17} corr error"
    )
    for method, runs in rows.items():
        kl = [run["KL <="] for run in runs]
        ratios = {n: [run[f"sd {n}"] / exact[f"sd {n}"] for run in runs] for n in "rp"}
        corr = max(abs(run["corr"] - exact["corr"]) for run in runs)
        spread = [f"[{min(v):.3f}, {max(v):.3f}]" for v in ratios.values()]
        mean = sum(kl) / len(kl)
        kl_text = f"{mean:.4f} [{min(kl):.4f}, {max(kl):.4f}]"
        print(f"{method:24} {kl_text:>28} {spread[0]:>17} {spread[1]:>17} {corr:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-mixing", type=int, nargs="+", default=[1, 5, 20, 100])
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
