r"""The exact gradient of an ELBO whose guide draws discrete values only, by enumeration.

.. math::

    L = \sum_u \sum_s q(b_{us}) \, [\log p(x_u, b_{us}) - \log q(b_{us})],

where u runs over the units (the elements of the plates common to all sites; the whole model, if
there are none) and s over all joint values of a unit's discrete draws: units are enumerated side by
side.
"""

from __future__ import annotations

import itertools
import math

import torch
from pyro.poutine.messenger import Messenger

from pyro_vi_ext.paths import draws, score
from pyro_vi_ext.relaxations import BERNOULLI, relaxation_of
from pyro_vi_ext.run import Run, Structure
from pyro_vi_ext.scoring import pair_terms, split_mask, sum_to_units, unit_plates

__all__ = ["enumerated_elbo"]


def enumerated_elbo(
    model, guide, args=(), kwargs=None, *, subsample: Messenger | None = None, max_states=4096
) -> torch.Tensor | None:
    """The exact ELBO in nats, differentiable; ``None`` if it cannot be enumerated.

    It can if every draw of the guide is Bernoulli, Categorical or OneHotCategorical, with at most
    ``max_states`` joint values per unit.

    :param subsample: optional :class:`~pyro_vi_ext.tracing.SharedSubsample` that fixes minibatches.
    """
    structure = Structure.of(model, guide, args, kwargs or {})
    pair = (model, guide, args, kwargs or {})
    with torch.random.fork_rng(), torch.no_grad():
        run = Run(structure, *pair, num_particles=1, vectorized=False, subsample=subsample)
        values = _all_values(run, max_states)
    if values is None:
        return None
    num = len(next(iter(values.values())))
    options = dict(num_particles=num, vectorized=True, subsample=run.subsample, given=[values])
    with torch.random.fork_rng():
        run = Run(structure, *pair, **options, check_alone=False)
    scored = pair_terms(run, run.pairs[0])
    terms = [*scored.model, *scored.guide.values()]
    plates = unit_plates(terms)
    log_q = [score(site) for site in draws(run.pairs[0].guide).values()]
    log_q = sum(_per_unit(term.log_prob, plates, run) for term in log_q)
    log_w = sum(term.sign * _per_unit(term.log_prob * term.scale, plates, run) for term in terms)
    return (log_q.exp() * log_w).sum()


def _per_unit(log_prob: torch.Tensor, plates: dict, run: Run) -> torch.Tensor:
    rank = run.structure.max_plate_nesting + 1
    log_prob = log_prob.reshape((1,) * (rank - log_prob.dim()) + log_prob.shape)
    return sum_to_units(log_prob, plates, keep=1)


def _all_values(run: Run, max_states: int) -> dict[str, torch.Tensor] | None:
    """Every joint value of a unit's draws, for all units at once: (states, \\*batch, \\*event)."""
    (pair,) = run.pairs
    scored = pair_terms(run, pair)
    dims = {f.dim for f in unit_plates([*scored.model, *scored.guide.values()]).values()}
    sites, sizes = [], []
    for name, site in draws(pair.guide).items():
        fn, _ = split_mask(site)
        relaxation, logits = relaxation_of(fn)
        if relaxation is None:
            return None
        rank = run.structure.max_plate_nesting
        batch = (1,) * (rank - len(fn.batch_shape)) + tuple(fn.batch_shape)
        inner = [1 if d - rank in dims else size for d, size in enumerate(batch)]
        event = tuple(fn.event_shape)
        if relaxation is not BERNOULLI and relaxation.relaxes_value:
            event = event[:-1]  # of one-hot vectors
        num_values = 2 if relaxation is BERNOULLI else logits.shape[-1]
        shape = (*inner, *event)
        sites.append((name, site, relaxation, logits, batch, shape))
        sizes += [num_values] * math.prod(shape)
    if not sites or math.log(max_states) < sum(map(math.log, sizes)) - 1e-9:
        return None
    states = torch.tensor(list(itertools.product(*map(range, sizes))))
    values, start = {}, 0
    for name, site, relaxation, logits, batch, shape in sites:
        stop = start + math.prod(shape)
        value = states[:, start:stop].to(logits.device).reshape(-1, *shape)
        start = stop
        if relaxation is BERNOULLI:
            value = value.to(site["value"].dtype)
        elif relaxation.relaxes_value:
            value = torch.nn.functional.one_hot(value, logits.shape[-1]).to(logits.dtype)
        event = value.shape[1 + len(batch) :]
        values[name] = value.expand((len(states), *batch, *event))
    return values
