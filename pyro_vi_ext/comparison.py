r"""One posterior by several methods, in one table.

Of draws :math:`z_s \sim q` against those of a reference, with mean :math:`m_j` and standard
deviation :math:`\sigma_j` of its entry j,

.. math::

    e_j = \frac{\bar z_j - m_j}{\sigma_j}, \qquad
    r_j = \frac{\mathrm{sd}(z_j)}{\sigma_j}, \qquad
    \log w_s = \log p(x, z_s) - \log q(z_s), \qquad
    \mathrm{bound} = \frac{1}{S} \sum_s \log w_s \le \log p(x).
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pyro_vi_ext.forest_plot import plot_forest
from pyro_vi_ext.inference_methods import Outcome
from pyro_vi_ext.objective import positive_int
from pyro_vi_ext.proposal import GroupedSummary

__all__ = ["Comparison", "compare"]

#: key of a row -> its heading, width and format
_COLUMNS = {
    "bound": ("bound", 14, ".3f"),
    "bound_standard_error": ("+-", 7, ".3f"),
    "gap": ("gap", 9, ".3f"),
    "log_evidence": ("log p(x)", 12, ".3f"),
    "rms_error": ("RMS error", 11, ".3f"),
    "max_error": ("largest", 9, ".3f"),
    "noise": ("noise", 7, ".3f"),
    "sd_ratio": ("sd ratio", 10, ".2f"),
    "least_sd_ratio": ("least", 7, ".2f"),
    "pareto_k": ("k", 7, ".2f"),
    "seconds": ("seconds", 9, ".1f"),
}


@dataclass(eq=False)
class Comparison:
    r"""What :func:`compare` returns: ``print`` it.

    :ivar table: a dict for each method, with the keys ``method``, ``bound``,
        ``bound_standard_error`` (0 if it is exact), ``gap`` (of the bound to the log evidence that
        was given), ``log_evidence`` (an estimate, the log of the mean weight) and
        ``log_evidence_standard_error``, in nats;
        ``rms_error`` and ``max_error`` of the :math:`e_j`; ``noise``, the ``rms_error`` that Monte
        Carlo alone gives; ``sd_ratio``, the median of the :math:`r_j`, and ``least_sd_ratio``;
        ``pareto_k`` of the :math:`w_s`; ``seconds``. ``None`` where there is no such number, NaN
        where it is not finite.
    :ivar outcomes: method -> :class:`~pyro_vi_ext.inference_methods.Outcome`, its draws
        transformed.
    :ivar compared: names of the sites that all methods have, over which errors are taken.
    :ivar reference: the method that the others are compared with.
    :ivar r_hat: largest split r-hat of the reference; ``None`` if its draws are independent.
    :ivar reference_error: largest Monte-Carlo standard error of its means, in its own standard
        deviations.
    """

    table: list[dict]
    outcomes: dict[str, Outcome]
    compared: list[str]
    reference: str | None
    r_hat: float | None
    reference_error: float | None
    coords: Mapping[str, Sequence] = field(repr=False)
    dims: Mapping[str, Sequence[str]] = field(repr=False)

    def __getitem__(self, method: str) -> dict:
        """The row of a method."""
        return next(row for row in self.table if row["method"] == method)

    @functools.cached_property
    def inference_data(self) -> dict:
        """method -> ArviZ object: groups posterior and, where q has a density, sample_stats.

        The latter has ``log_p``, ``log_q`` and ``log_weight``. They are ``InferenceData`` with
        arviz 0.x, ``DataTree`` with later ones or arviz-base.

        :raises ImportError: without ArviZ.
        """
        make = _arviz()
        return {
            name: make(_groups(outcome), coords=dict(self.coords), dims=dict(self.dims))
            for name, outcome in self.outcomes.items()
        }

    def plot_forest(self, path=None, var_names: Sequence[str] | None = None, in_sd: bool = False):
        """Means with 50% and 94% intervals of every entry, by every method.

        :param path: file to write.
        :param var_names: sites to show; by default those compared.
        :param in_sd: show every entry less its mean by the reference, in its standard deviations.
        :returns: the matplotlib figure.
        :raises ImportError: without matplotlib.
        """
        names = self.compared if var_names is None else list(var_names)
        draws = {}
        for method, outcome in self.outcomes.items():
            for name in names:
                if name not in outcome.draws:
                    raise ValueError(
                        f"var_names has '{name}', which {method} does not have. All methods have "
                        f"{', '.join(self.compared)}."
                    )
            draws[method] = {n: outcome.draws[n] for n in names}
        options = {"reference": self.reference, "coords": self.coords, "dims": self.dims}
        return plot_forest(draws, path, in_sd=in_sd, **options)

    def __str__(self) -> str:
        width = max(len("method"), *(len(row["method"]) for row in self.table))
        shown = {
            key: column
            for key, column in _COLUMNS.items()
            if any(row[key] is not None for row in self.table)
        }
        head = "".join(title.rjust(size) for title, size, _ in shown.values())
        lines = ["method".ljust(width) + head]
        for row in self.table:
            cells = [_cell(key, row[key]) for key in shown]
            lines.append((row["method"].ljust(width) + "".join(cells)).rstrip())
        return "\n".join([*lines, *self._footnotes()])

    def _footnotes(self) -> list[str]:
        lines = [
            "bound: in nats. log p(x): an estimate from the weights p(x, z) / q(z), of use if k, "
            "their Pareto k, is below 0.7."
        ]
        if self.reference is not None:
            lines.append(
                f"errors: of posterior means, in sd of {self.reference}, over all entries of "
                f"{', '.join(self.compared)}; noise: the RMS error that Monte Carlo alone gives."
            )
            draws = next(iter(self.outcomes[self.reference].draws.values()))
            line = f"{self.reference}: {draws.shape[0]} x {draws.shape[1]} draws"
            line += f", means known to {self.reference_error:.3f} sd or better"
            lines.append(
                line + ("" if self.r_hat is None else f", r-hat <= {self.r_hat:.4f}") + "."
            )
        lines.append("seconds: wall clock of the fit on this machine, compilation included.")
        for name, outcome in self.outcomes.items():
            lines += [f"{name}: {note}" for note in outcome.notes]
        return lines


def compare(
    methods: Mapping[str, Callable[..., Outcome]],
    *,
    reference: str | None = None,
    log_evidence: float | None = None,
    transform: Callable[[dict], dict] | None = None,
    num_draws: int = 2000,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Comparison:
    r"""Run several methods on one posterior, and put what they found into one table.

    Bound, weights and Pareto k are those of q itself; draws are transformed before means and
    standard deviations are taken. Errors are over the entries of all sites that all methods have;
    entries that are constant in both are left out.

    :param methods: name -> method: :func:`~pyro_vi_ext.inference_methods.by_pyro_svi`, those of
        :mod:`pyro_vi_ext.numpyro_methods`, or a function ``method(num_draws=..., seed=...,
        progress=...)`` that returns an :class:`~pyro_vi_ext.inference_methods.Outcome`.
    :param reference: the method to compare the others with; ``None`` for no errors.
    :param log_evidence: log p(x), nats, where it is known; an :class:`~pyro_vi_ext.Evidence` will
        do.
    :param transform: draws -> draws, both dicts of arrays (chains, draws, \*site); sorts the
        components of a mixture, say.
    :param num_draws: S, draws of each q; at least 25.
    :param coords: dimension -> values, of the ArviZ objects and the plot; ``dims``: site -> names
        of its dimensions.
    :param seed: of every method; random states stay as they were.
    :param progress: show bars: ``None`` on a terminal only, ``True`` always, ``False`` never.
    :returns: a :class:`Comparison`.
    :raises ValueError: for a reference that is no method, methods without a common site, and sites
        of different shapes; the errors of the methods.

    .. warning:: A ``UserWarning`` says so if a reference of several chains has an r-hat above 1.01:
        the errors are then against an unknown posterior.

    Reference: Y. Yao, A. Vehtari, D. Simpson and A. Gelman, *Yes, but Did It Work?: Evaluating
    Variational Inference*, ICML 2018, arXiv:1802.02538. A. Gelman et al., *Bayesian Data Analysis*,
    3rd edition, section 11.4 (r-hat).

    Example: a guide against the exact posterior N(2.5, 1/6) of five data.

    >>> import numpy as np, pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceSTL_ELBO
    >>> from pyro_vi_ext.comparison import compare
    >>> from pyro_vi_ext.inference_methods import Outcome, by_pyro_svi
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     loc = pyro.param("loc", torch.tensor(2.0))
    ...     pyro.sample("z", dist.Normal(loc, 6**-0.5))
    >>> def exact(num_draws, seed, progress):
    ...     rng = np.random.default_rng(seed)
    ...     return Outcome({"z": rng.normal(2.5, 6**-0.5, (1, num_draws))})
    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    >>> adam = pyro.optim.Adam({"lr": 0.05})
    >>> guided = by_pyro_svi(model, guide, adam, TraceSTL_ELBO(), x, num_steps=200)
    >>> comparison = compare({"exact": exact, "guide": guided}, reference="exact", progress=False)
    >>> comparison["guide"]["rms_error"] < 4 * comparison["guide"]["noise"]
    True
    """
    num_draws = positive_int("num_draws", num_draws, 25)
    if reference is not None and reference not in methods:
        raise ValueError(f"reference is '{reference}', which is none of {', '.join(methods)}.")
    outcomes = {}
    for name, method in methods.items():
        outcome = method(num_draws=num_draws, seed=seed, progress=progress)
        if transform is not None:
            outcome = replace(outcome, draws=transform(dict(outcome.draws)))
        outcomes[name] = replace(outcome, notes=outcome.notes + _rounding(outcome))
    compared = _common(outcomes)
    moments = {n: _moments(o, compared) for n, o in outcomes.items()}
    evidence = None if log_evidence is None else float(log_evidence)
    table = []
    for name, outcome in outcomes.items():
        row = {"method": name, **_weights(outcome, evidence)}
        of_reference = None if reference in (None, name) else moments[reference]
        table.append({**row, **_errors(moments[name], of_reference), "seconds": outcome.seconds})
    r_hat = error = None
    if reference is not None:
        mean, sd, mcse, r_hat = moments[reference]
        error = float(np.max(mcse[sd > 0] / sd[sd > 0], initial=0.0))
        if r_hat is not None and not r_hat <= 1.01:
            warnings.warn(
                f"The reference {reference} has r-hat {r_hat:.3f} at an entry of "
                f"{', '.join(compared)}: its chains have not settled on one posterior, and errors "
                "against it mean little. Run longer chains, or undo label switching by transform.",
                UserWarning,
                stacklevel=2,
            )
    return Comparison(table, outcomes, compared, reference, r_hat, error, coords or {}, dims or {})


# --- the numbers of a row ----------------------------------------------------------------------


def _weights(outcome: Outcome, log_evidence: float | None) -> dict:
    """Bound, gap, evidence and Pareto k."""
    keys = ("bound", "bound_standard_error", "gap", "log_evidence", "log_evidence_standard_error")
    row: dict[str, float | None] = dict.fromkeys((*keys, "pareto_k"))
    if outcome.log_p is not None:
        log_w = np.asarray(outcome.log_p, np.float64) - np.asarray(outcome.log_q, np.float64)
        row |= dict.fromkeys(row, math.nan) | {"gap": None}
        if not (np.isnan(log_w) | (log_w == np.inf)).any():
            size = outcome.group_size
            summary = GroupedSummary(len(log_w), size and -(-len(log_w) // size))
            for group in np.split(log_w, range(size or len(log_w), len(log_w), size or 1)):
                summary.add(torch.from_numpy(group))
            row["bound"] = float(summary.mean_log)
            row["bound_standard_error"] = float(summary.mean_log_se)
            row["log_evidence"] = float(summary.log_mean)
            row["log_evidence_standard_error"] = float(summary.log_mean_se)
            row["pareto_k"] = float(summary.pareto_k)
    if outcome.bound is not None:
        row |= {"bound": outcome.bound, "bound_standard_error": 0.0}
    if log_evidence is not None and row["bound"] is not None:
        row["gap"] = log_evidence - row["bound"]
    return row


def _errors(own: tuple, reference: tuple | None) -> dict:
    """Errors of the means, and ratios of the standard deviations."""
    keys = ("rms_error", "max_error", "noise", "sd_ratio", "least_sd_ratio")
    if reference is None:
        return dict.fromkeys(keys)
    (mean, sd, mcse, _), (true_mean, true_sd, true_mcse, _) = own, reference
    constant = (true_sd == 0) & (sd == 0) & (mean == true_mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = (np.abs(mean - true_mean) / true_sd)[~constant]
        noise = (np.hypot(mcse, true_mcse) / true_sd)[~constant]
        ratio = (sd / true_sd)[~constant]
    if not error.size:
        return dict.fromkeys(keys)
    values = _rms(error), error.max(), _rms(noise), np.median(ratio), ratio.min()
    return dict(zip(keys, map(float, values), strict=True))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _moments(outcome: Outcome, names: Sequence[str]) -> tuple:
    """Of every entry mean, standard deviation and Monte-Carlo error of the mean; largest r-hat."""
    x = np.concatenate([_flat(outcome.draws[n]) for n in names], -1).astype(np.float64)
    varies = np.ptp(x, (0, 1)) != 0  # NaN varies: it has to show
    mean = np.where(varies, x.mean((0, 1)), x[0, 0])
    sd = np.where(varies, x.std((0, 1), ddof=1), 0.0)
    if outcome.independent:
        return mean, sd, sd / math.sqrt(x.shape[0] * x.shape[1]), None
    try:
        from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
    except ImportError as error:
        raise ImportError(
            "The Monte-Carlo error of a Markov chain needs NumPyro: pip install "
            "pyro_vi_ext[numpyro]; or say Outcome(..., independent=True) of thinned draws."
        ) from error
    mcse = np.zeros_like(sd)
    if not varies.any():
        return mean, sd, mcse, None
    mcse[varies] = sd[varies] / np.sqrt(effective_sample_size(x[..., varies]))
    return mean, sd, mcse, float(np.max(split_gelman_rubin(x[..., varies])))


def _flat(draws: np.ndarray) -> np.ndarray:
    """(chains, draws, entries)."""
    return np.reshape(draws, (*draws.shape[:2], -1))


def _common(outcomes: Mapping[str, Outcome]) -> list[str]:
    """The sites that all methods have, of one shape."""
    first, *others = outcomes
    names = [n for n in outcomes[first].draws if all(n in outcomes[o].draws for o in others)]
    if not names:
        found = "; ".join(f"{m}: {', '.join(o.draws)}" for m, o in outcomes.items())
        raise ValueError(f"The methods have no site in common. They have {found}.")
    for name in names:
        shape = np.shape(outcomes[first].draws[name])[2:]
        for other in others:
            found = np.shape(outcomes[other].draws[name])[2:]
            if found != shape:
                raise ValueError(
                    f"Site '{name}' has shape {shape} by {first} and {found} by {other}. Write the "
                    "models alike, or reshape in transform."
                )
    return names


def _rounding(outcome: Outcome) -> tuple[str, ...]:
    """A note on densities in single precision, if their rounding can be seen."""
    if outcome.log_p is None or np.asarray(outcome.log_p).dtype == np.float64:
        return ()
    unit = float(np.finfo(np.float32).eps) * float(np.nanmax(np.abs(outcome.log_p)))
    note = f"single precision: each log p(x, z) is rounded by {unit:.1g} nats or more."
    return (note,) if unit > 1e-3 else ()


def _cell(key: str, value: float | None) -> str:
    _, width, form = _COLUMNS[key]
    return ("" if value is None else f"{value:{form}}").rjust(width)


# --- ArviZ -------------------------------------------------------------------------------------


def _groups(outcome: Outcome) -> dict:
    groups = {"posterior": {name: np.asarray(v) for name, v in outcome.draws.items()}}
    if outcome.log_p is not None:
        stats = {"log_p": outcome.log_p, "log_q": outcome.log_q}
        stats["log_weight"] = outcome.log_p - outcome.log_q
        groups["sample_stats"] = {name: value[None] for name, value in stats.items()}
    return groups


def _arviz() -> Callable:
    """``from_dict`` of the ArviZ that is installed, of groups by name."""
    for package in ("arviz", "arviz_base"):
        try:
            arviz = importlib.import_module(package)
        except ImportError:
            continue
        if hasattr(arviz, "InferenceData"):  # arviz 0.x
            return lambda groups, **options: arviz.from_dict(**groups, **options)
        return arviz.from_dict
    raise ImportError("inference_data needs ArviZ: pip install pyro_vi_ext[arviz]")
