r"""Ways to a posterior, in Pyro and in NumPyro, that end in the same thing: draws with weights.

.. math::

    z_s \sim q, \qquad \log w_s = \log p(x, z_s) - \log q(z_s), \qquad s = 1, \dots, S.

A method is a function ``method(num_draws=..., seed=..., progress=...)`` that returns an
:class:`Outcome`; ``by_...`` makes one out of a model and its data. That of Pyro is here, those of
NumPyro are in :mod:`pyro_vi_ext.numpyro_methods`; :func:`~pyro_vi_ext.comparison.compare`
runs them, and any of the user's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_vi_ext.draws import draw
from pyro_vi_ext.tracing import latent_sites, sample_sites
from pyro_vi_ext.training import fit

__all__ = ["Outcome", "by_pyro_svi", "scaled", "weighted"]

_NUM_GROUPS = 20  # or more, of draws that share the extra draws of h_K
_ELEMENTS = 2**18  # numbers in the sites of a model in one run: above, caches are too small


@dataclass(frozen=True, eq=False)
class Outcome:
    r"""What a method returns.

    :ivar draws: site -> draws, shape (chains, draws, \*site); deterministic sites too.
    :ivar log_p: :math:`\log p(x, z_s)`, nats, shape (draws,); ``None`` if q has no known density.
    :ivar log_q: :math:`\log q(z_s)`, likewise.
    :ivar bound: lower bound on the log evidence, nats, where it is known without Monte Carlo.
    :ivar group_size: number of consecutive draws whose weights depend on each other; ``None`` if
        no weight depends on another.
    :ivar independent: whether the draws are; those of a Markov chain are not.
    :ivar seconds: wall clock of the fit, with compilation, without the draws from q.
    :ivar notes: what a reader of the numbers should know.
    :ivar fitted: what the library itself returned.
    """

    draws: Mapping[str, np.ndarray]
    log_p: np.ndarray | None = None
    log_q: np.ndarray | None = None
    bound: float | None = None
    group_size: int | None = None
    independent: bool = True
    seconds: float = float("nan")
    notes: tuple[str, ...] = ()
    fitted: Any = None


def by_pyro_svi(
    model,
    guide,
    optim,
    objective,
    *args,
    num_steps: int,
    num_mixing_particles: int = 1000,
    max_plate_nesting: float = float("inf"),
    vectorize_particles: bool = True,
    **kwargs,
) -> Callable[..., Outcome]:
    r"""Stochastic variational inference by Pyro, with any objective of this package or of Pyro.

    The guide is trained from the state it has, with parameters in a store of its own: those of
    modules stay in them, other ``pyro.param`` are gone afterwards. Of a guide with mixing variables
    the density is :math:`h_K` (arXiv:1805.11183), so that the mean log-weight is a lower bound.

    :param model: the first four as given to ``pyro.infer.SVI``.
    :param args: arguments of model and guide; ``kwargs`` likewise.
    :param num_steps: number of gradient steps, by :func:`~pyro_vi_ext.fit`.
    :param num_mixing_particles: K, and the others, as of :func:`~pyro_vi_ext.from_pyro_svi`.

    When it runs: the errors of ``fit`` and ``from_pyro_svi``; ``NotImplementedError`` for sites of
    the model under ``poutine.scale``.

    Example:

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_vi_ext import TraceSTL_ELBO
    >>> from pyro_vi_ext.inference_methods import by_pyro_svi
    >>> def model():
    ...     pyro.sample("z", dist.Gamma(2.0, 1.0))
    >>> adam = pyro.optim.Adam({"lr": 0.01})
    >>> method = by_pyro_svi(model, AutoNormal(model), adam, TraceSTL_ELBO(), num_steps=10)
    >>> outcome = method(num_draws=100, seed=0, progress=False)
    >>> outcome.draws["z"].shape, outcome.log_q.shape
    ((1, 100), (100,))
    """

    def method(num_draws: int, seed: int, progress: bool | None) -> Outcome:
        with torch.random.fork_rng(), pyro.get_param_store().scope():
            torch.manual_seed(seed)
            names, size = _inspect(model, args, kwargs)
            svi = SVI(model, guide, optim, objective)
            start = time.perf_counter()
            result = fit(svi, *args, num_steps=num_steps, progress=progress, **kwargs)
            seconds = time.perf_counter() - start
            batch_size = max(1, min(-(-num_draws // _NUM_GROUPS), _ELEMENTS // size))
            found = draw(
                model,
                guide,
                args,
                kwargs,
                num_draws=num_draws,
                num_mixing_particles=num_mixing_particles,
                posterior_predictive=False,
                log_likelihood=False,
                batch_size=batch_size,
                max_plate_nesting=max_plate_nesting,
                vectorize_particles=vectorize_particles,
            )
        sites = {name: site.values.detach().cpu().numpy() for name, site in found.posterior.items()}
        return weighted(
            sites,
            names,
            found.log_p.cpu().numpy(),
            found.log_q.cpu().numpy(),
            group_size=batch_size if found.has_mixing else None,
            seconds=seconds,
            fitted=result,
        )

    return method


def _inspect(model, args, kwargs) -> tuple[set[str], int]:
    """Continuous latents of a model without scales; how many numbers its sites have."""
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    for name, site in sample_sites(trace).items():
        expected = 1.0
        for frame in site["cond_indep_stack"]:
            expected *= (frame.full_size or frame.size) / frame.size
        if bool(((torch.as_tensor(site["scale"]) / expected - 1).abs() > 1e-5).any()):
            raise scaled(name)
    size = sum(site["value"].numel() for site in sample_sites(trace).values())
    latents = latent_sites(trace)
    smooth = {n for n in latents if not trace.nodes[n]["fn"].support.is_discrete}
    return smooth, max(1, size)


# --- for all methods --------------------------------------------------------------------------


def weighted(sites: dict, names: set, log_p, log_q, **options) -> Outcome:
    """Independent draws, without weights if q is a point mass at one of the sites named."""
    masses = [
        n for n in sorted(names) if sites[n].dtype.kind == "f" and not np.ptp(sites[n], 0).any()
    ]
    if masses and len(log_p) > 1:
        note = f"q is a point mass at site '{masses[0]}', so it has no bound and no weights."
        log_p, log_q, options["notes"] = None, None, (note,)
    return Outcome({n: v[None] for n, v in sites.items()}, log_p, log_q, **options)


def scaled(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"Site '{name}' of the model is scaled or subsampled, so its log-density is not that of "
        "all data. Give the model without subsample_size and without a scale."
    )
