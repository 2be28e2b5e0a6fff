"""One mixture of Gaussians, written for NumPyro and for Pyro, by every method: which to use?

    weights ~ Dirichlet, means ~ Normal, precisions ~ Gamma,  x_i ~ sum_k weights_k N(means_k, ...)

Coordinate ascent (arXiv:1811.11926) draws the labels, all others add them up. NUTS is the
reference. All start at k-means, so that all are about the same of the K! equal modes.

    python examples/compare_gmm.py [--data iris] [--num-steps 3000] [--seed 0] [--device cpu]
    python examples/compare_gmm.py --data synthetic    # N = 20,000, K = 5

prints one table and writes to runs/compare_gmm/iris/ (or synthetic/): table.csv, one ArviZ file
(NetCDF) per method, and forest.png and forest_in_sd.png, the posteriors of all parameters as they
are, and in standard deviations from their means by NUTS.
"""

import argparse
import csv
import pathlib
from functools import partial

import numpy as np
import numpyro
import pyro
import torch
from numpyro.infer.autoguide import AutoNormal as NumPyroAutoNormal
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value

from pyro_vi_ext import SemiImplicitELBO, TraceSTL_ELBO, by_pyro_svi, compare
from pyro_vi_ext.guides import AutoSemiImplicit
from pyro_vi_ext.models import gaussian_mixture_conjugate, gaussian_mixture_numpyro
from pyro_vi_ext.models.gaussian_mixture import IRIS_FEATURES, load_iris
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64
from pyro_vi_ext.numpyro_methods import by_cavi, by_numpyro_svi, by_nuts

numpyro_model = gaussian_mixture_numpyro.conjugate_mixture
pyro_model = gaussian_mixture_conjugate.conjugate_mixture
sort_components = gaussian_mixture_conjugate.sort_components

DEFAULTS = {  # with many data a gradient costs more, and the posterior is nearly Gaussian
    "iris": {
        "learning_rate": 0.03,
        "num_steps": 2000,
        "num_particles": 10,
        "num_draws": 2000,
        "num_chains": 4,
        "num_warmup": 500,
        "num_samples": 1000,
    },
    "synthetic": {
        "learning_rate": 0.05,
        "num_steps": 300,
        "num_particles": 2,
        "num_draws": 1000,
        "num_chains": 2,
        "num_warmup": 100,
        "num_samples": 250,
    },
}


def main(args):
    out = pathlib.Path(args.output) / args.data
    out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    with enable_x64(True):
        comparison = run(args)
    print(comparison)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, comparison.table[0])
        writer.writeheader()
        writer.writerows(comparison.table)
    for name, data in comparison.inference_data.items():
        data.to_netcdf(out / f"{name.replace(' ', '_')}.nc")
    comparison.plot_forest(out / "forest.png")
    comparison.plot_forest(out / "forest_in_sd.png", in_sd=True)
    print(f"\nwritten to {out}/: table.csv, two forest plots, and an ArviZ file per method")
    return comparison


def run(args):
    x, K, features, sort_by = {"iris": iris, "synthetic": synthetic}[args.data](args)
    return compare(
        methods(x, K, args),
        reference="NUTS",
        transform=partial(sort_components, feature=features.index(sort_by)),
        num_draws=args.num_draws,
        coords={"component": range(1, K + 1), "feature": features},
        dims={
            "weights": ["component"],
            "means": ["component", "feature"],
            "precisions": ["component", "feature"],
        },
        seed=args.seed,
    )


# --- the methods -------------------------------------------------------------------------------


def methods(x, K, args):
    start = k_means(x, K, args.seed)
    points = torch.as_tensor(x, device=args.device)
    at_start = init_to_value(values={n: torch.as_tensor(v).to(points) for n, v in start.items()})
    numpyro_start = numpyro.infer.init_to_value(values=start)
    spread = (K / len(x)) ** 0.5  # what the posterior of a mean has
    adam = numpyro.optim.Adam(decaying(args))
    chosen = {
        "CAVI": by_cavi(partial(numpyro_model, marginalize=False), x, K, marginal=numpyro_model),
        "NumPyro AutoNormal": by_numpyro_svi(
            numpyro_model,
            NumPyroAutoNormal(numpyro_model, init_loc_fn=numpyro_start, init_scale=spread),
            adam,
            numpyro.infer.Trace_ELBO(num_particles=args.num_particles),
            x,
            K,
            num_steps=args.num_steps,
        ),
        "NUTS": by_nuts(
            numpyro.infer.NUTS(numpyro_model, init_strategy=numpyro_start),
            x,
            K,
            num_chains=args.num_chains,
            num_warmup=args.num_warmup,
            num_samples=args.num_samples,
        ),
    }
    options = {"init_loc_fn": at_start, "init_scale": spread}
    stl = TraceSTL_ELBO(args.num_particles, max_plate_nesting=1)
    sivi = SemiImplicitELBO(args.num_particles, 20, max_plate_nesting=1)
    for name, guide, objective in (
        ("Pyro AutoNormal", AutoNormal(pyro_model, **options), stl),
        ("Pyro AutoMultivariateNormal", AutoMultivariateNormal(pyro_model, **options), stl),
        ("Pyro AutoSemiImplicit", AutoSemiImplicit(pyro_model, **options), sivi),
    ):
        schedule = {"lr": args.learning_rate, "lrd": 0.01 ** (1 / args.num_steps)}
        optimizer = pyro.optim.ClippedAdam(schedule)
        chosen[name] = by_pyro_svi(
            pyro_model, guide, optimizer, objective, points, K, num_steps=args.num_steps
        )
    return chosen


def decaying(args):
    """A learning rate that falls to a hundredth."""
    return lambda step: args.learning_rate * 0.01 ** (step / args.num_steps)


def k_means(x, K, seed):
    """Parameters at a partition of the data, by scikit-learn."""
    from sklearn.cluster import KMeans

    labels = KMeans(K, n_init=10, random_state=seed).fit(x).labels_
    groups = [x[labels == k] for k in range(K)]
    return {
        "weights": np.array([len(group) / len(x) for group in groups]),
        "means": np.stack([group.mean(0) for group in groups]),
        "precisions": np.stack([1 / group.var(0) for group in groups]),
    }


# --- the data ----------------------------------------------------------------------------------


def iris(args):
    x, _ = load_iris(standardize=True)
    return x.numpy(), 3, list(IRIS_FEATURES), "petal length"


def synthetic(args):
    """Five clouds in a plane, two of which overlap."""
    rng = np.random.default_rng(args.seed)
    centres = np.array([[-4.0, 0.0], [-1.5, 3.0], [0.0, -1.0], [1.5, 0.5], [4.0, -2.0]])
    scales = np.array([[0.5, 1.0], [1.0, 0.5], [0.7, 0.7], [0.6, 1.0], [1.0, 0.4]])
    labels = rng.choice(5, args.num_data, p=[0.3, 0.25, 0.2, 0.15, 0.1])
    x = centres[labels] + scales[labels] * rng.normal(size=(args.num_data, 2))
    return (x - x.mean(0)) / x.std(0), 5, ["first", "second"], "first"


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["iris", "synthetic"], default="iris")
    parser.add_argument("--num-data", type=int, default=20_000, help="rows of synthetic data")
    parser.add_argument("--learning-rate", type=float, help="at first")
    parser.add_argument("--num-steps", type=int, help="gradient steps of each fit")
    parser.add_argument("--num-particles", type=int, help="draws of a gradient")
    parser.add_argument("--num-draws", type=int, help="draws of each fitted guide")
    parser.add_argument("--num-chains", type=int, help="of NUTS")
    parser.add_argument("--num-warmup", type=int, help="of each chain")
    parser.add_argument("--num-samples", type=int, help="of each chain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="of the fits by Pyro")
    parser.add_argument("--output", default="runs/compare_gmm")
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.data].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main(parse())
