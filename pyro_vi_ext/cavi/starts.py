r"""Where coordinate ascent begins: at clusters of the data, and otherwise at draws of the prior.

.. math:: q_{\text{start}}(z_n = k) = [k = \text{cluster of datum } n]

The bound of a mixture has many local optima, and a start in which all components are alike is a
stationary point that updates never leave. So discrete latents start at clusters of the data they
select among, found by scikit-learn if it is there, and otherwise at random weights; all others
start at a draw from the prior, and are updated before the discrete ones.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from pyro_vi_ext.cavi.derivation import PriorDraws
from pyro_vi_ext.cavi.plan import Plan
from pyro_vi_ext.cavi.symbolic import Label

__all__ = ["first_moments"]

MOST_FEATURES = 200  # more columns than this are no features to cluster by


def first_moments(draws: PriorDraws, plan: Plan, key, restart: int) -> dict:
    """Expected statistics of all latents at the start of a run, by site.

    :param draws: draws from the prior.
    :param plan: the expected log joint, whose known arrays are the features to cluster by.
    :param restart: the first one (0) takes the best of ten k-means runs, others a rough one each.
    """
    example = draws(key)
    moments = {}
    for i, (name, factor) in enumerate(plan.factors.items()):
        if factor.num_values:
            shape = (*factor.axes.shape, factor.num_values)
            features = _features(plan, name)
            labels = None if features is None else _clusters(features, shape[-1], key, restart)
            if labels is None:
                weights = jax.random.dirichlet(
                    jax.random.fold_in(key, i), jnp.ones(shape[-1]), shape[:-1]
                )
            else:
                weights = jax.nn.one_hot(labels, shape[-1]).reshape(shape)
            moments[name] = {"onehot": weights}
        else:
            moments[name] = factor.statistics(example)
    return moments


def _features(plan: Plan, name: str) -> np.ndarray | None:
    """Known arrays with a row for each element of a discrete latent, side by side."""
    columns: dict[int, np.ndarray] = {}
    for product in plan.products:
        own = [moment for moment in product.moments if moment.factor == name]
        if not own or len(own[0].entries) != 2 or not isinstance(own[0].entries[0], Label):
            continue
        row = own[0].entries[0]
        for slot, labels in product.knowns:
            if row in labels:
                array = np.moveaxis(np.asarray(plan.arrays[slot]), labels.index(row), 0)
                columns[slot] = array.reshape(row.size, -1)
    if not columns:
        return None
    features = np.unique(np.concatenate(list(columns.values()), 1), axis=1)
    spread = features.std(0)
    features = features[:, spread > 0] / spread[spread > 0]
    return features if 0 < features.shape[1] <= MOST_FEATURES else None


def _clusters(features: np.ndarray, num: int, key, restart: int) -> np.ndarray | None:
    """A cluster for each row; None without scikit-learn, or with too few distinct rows."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        return None
    if len(np.unique(features, axis=0)) < num:
        return None
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    options = {"n_init": 10} if restart == 0 else {"n_init": 1, "init": "random", "max_iter": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rough run has not converged, on purpose
        return KMeans(num, random_state=seed, **options).fit_predict(features)
