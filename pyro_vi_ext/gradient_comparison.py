r"""Which gradient estimator for my model? Their bias, variance and cost, side by side.

For an estimate g of the gradient of the ELBO for the guide's parameters, over n repeats with
everything else fixed,

.. math::

    \mathrm{variance} = \sum_i \widehat{\mathrm{Var}}(g_i), \qquad
    z_i = \frac{\bar g_i - \nabla_i L}{\sqrt{\widehat{\mathrm{Var}}(g_i) / n}}, \qquad
    \mathrm{cost} = \mathrm{variance} \times \mathrm{seconds\ per\ step}.

The cost is what counts: half the variance at twice the time is no more than averaging two draws.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vi_ext.alternating import users
from pyro_vi_ext.enumeration import enumerated_elbo
from pyro_vi_ext.learned import graph_leaves
from pyro_vi_ext.objective import positive_int
from pyro_vi_ext.progress import progress_bar
from pyro_vi_ext.tracing import SharedSubsample
from pyro_vi_ext.vector_quantized import codes_at_rest

__all__ = ["GradientReport", "GradientRow", "gradient_report"]


@dataclass(eq=False)
class GradientRow:
    """One objective of a :class:`GradientReport`.

    :ivar name: of the objective.
    :ivar loss: mean loss, nats; ``loss_standard_error``: its standard error.
    :ivar variance: of the gradient, summed over the guide's parameters.
    :ivar seconds: median time of a step: loss and gradients.
    :ivar bias: Euclidean norm of mean - exact gradient; ``None`` without the exact one.
    :ivar bias_standard_error: what this norm is, in root mean square, of an unbiased estimator.
    :ivar max_z: largest deviation of a coordinate in standard errors.
    :ivar num_parameters: coordinates of the gradient that vary or differ from the exact one.
    :ivar mean: the mean gradient, one tensor for each parameter.
    """

    name: str
    loss: float
    loss_standard_error: float
    variance: float
    seconds: float
    bias: float | None
    bias_standard_error: float
    max_z: float | None
    num_parameters: int
    mean: list[Tensor] = field(repr=False)

    @property
    def cost(self) -> float:
        """Variance times seconds per step."""
        return self.variance * self.seconds

    @property
    def efficiency(self) -> float:
        """One over :attr:`cost`."""
        return 1 / self.cost if self.cost > 0 else math.inf

    @property
    def looks_biased(self) -> bool | None:
        """Whether ``max_z`` would be as large in less than one of 10,000 unbiased estimators.

        That holds for means that are close to normal. If the gradient depends on values so rare
        that they were hardly drawn, the variance is underestimated: repeat with more draws.
        """
        if self.max_z is None:
            return None
        return self.num_parameters * math.erfc(self.max_z / math.sqrt(2)) < 1e-4


@dataclass(eq=False)
class GradientReport:
    """What :func:`gradient_report` returns: ``print`` it, or :meth:`plot` it.

    :ivar rows: a :class:`GradientRow` for each objective, in the order given.
    :ivar exact: whether the exact gradient was enumerated.
    :ivar num_repeats: n.
    """

    rows: list[GradientRow]
    exact: bool
    num_repeats: int

    def __getitem__(self, name: str) -> GradientRow:
        return next(row for row in self.rows if row.name == name)

    def best(self) -> GradientRow:
        """The least cost among those that do not look biased.

        :raises ValueError: if all do.
        """
        unbiased = [row for row in self.rows if not row.looks_biased]
        if not unbiased:
            raise ValueError("Every objective of this report looks biased.")
        return min(unbiased, key=lambda row: row.cost)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        known = "exact gradient by enumeration" if self.exact else "no exact gradient: bias unknown"
        lines = [
            f"Gradient report: {self.num_repeats} repeats; {known}",
            f"  {'':{width}}  {'loss':>10} {'se':>8} {'variance':>10} {'bias':>9} {'of noise':>9} "
            f"{'max |z|':>8} {'ms/step':>8} {'cost':>6}",
        ]
        least = min((row.cost for row in self.rows if row.cost > 0), default=math.nan)
        for row in self.rows:
            bias, z = ("-", "-") if row.bias is None else (f"{row.bias:.3g}", f"{row.max_z:.1f}")
            relative = row.cost / least
            lines.append(
                f"  {row.name:{width}}  {row.loss:10.4f} {row.loss_standard_error:8.4f} "
                f"{row.variance:10.4g} {bias:>9} {row.bias_standard_error:9.3g} {z:>8} "
                f"{1000 * row.seconds:8.2f} {relative:6.1f}"
                + ("  biased" if row.looks_biased else "")
            )
        lines.append("  cost: variance x time per step, relative to the least")
        return "\n".join(lines)

    def plot(self, path=None):
        """Variance against time per step, with lines of equal cost; needs the extra ``plot``.

        :param path: file to write the picture to.
        :returns: the matplotlib figure.
        :raises ImportError: if matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install pyro_vi_ext[plot]") from error
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for k, row in enumerate(self.rows):
            label = row.name + (" (biased)" if row.looks_biased else "")
            marker = "x" if row.looks_biased else "os^vD"[k // 10 % 5]
            place = (1000 * row.seconds, row.variance)
            axes.scatter(*place, marker=marker, color=f"C{k % 10}", label=label)
        axes.set(xscale="log", yscale="log")
        axes.margins(0.15)
        low, high = axes.get_xlim()
        for row in self.rows:
            line = [row.cost / (t / 1000) for t in (low, high)]
            axes.plot([low, high], line, color="0.85", lw=0.7, zorder=0, scaley=False)
        axes.set_xlim(low, high)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        axes.set(
            xlabel="time per step (ms)",
            ylabel="variance of the gradient, summed",
            title="Lower left is better; grey: equal cost",
        )
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def gradient_report(
    objectives,
    model,
    guide,
    *args,
    num_repeats: int = 100,
    num_training: int = 0,
    max_states: int = 4096,
    progress: bool | None = None,
    **kwargs,
) -> GradientReport:
    r"""Measure gradient estimators on one model and guide as they are.

    Each objective is called ``num_repeats`` times; parameters and codebooks do not move, and
    subsampled plates keep one minibatch. Where the guide has Bernoulli, Categorical and
    OneHotCategorical draws only, and few joint values per unit, the exact gradient of the ELBO is
    enumerated, and bias is told from noise; of an objective that is not the ELBO (a bound with
    several weights, a relaxation) it is the difference between the two.

    :param objectives: the objectives to compare: a sequence, or a mapping from names.
    :param model: the model, as given to ``SVI``.
    :param guide: the guide.
    :param args: arguments of model and guide; ``kwargs`` likewise.
    :param num_repeats: n, an integer >= 2.
    :param num_training: steps of Adam, learning rate 0.01, in which the learned parts of an
        objective (control variates, baselines) adapt before it is measured; they keep what they
        learned.
    :param max_states: most joint values of a unit that are enumerated.
    :param progress: show a bar: ``None`` on a terminal only, ``True`` always, ``False`` never.
    :returns: a :class:`GradientReport`.
    :raises ValueError: for arguments out of range; if the guide has nothing to learn.

    Example: one Bernoulli draw.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceDisARM_ELBO, TraceRLOO_ELBO, TraceScore_ELBO, gradient_report
    >>> logits = torch.tensor([0.3, -0.2], requires_grad=True)
    >>> def model():
    ...     b = pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
    ...     pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=torch.tensor(0.8))
    >>> def guide():
    ...     pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
    >>> _ = torch.manual_seed(0)
    >>> elbos = [TraceScore_ELBO(2), TraceRLOO_ELBO(2), TraceDisARM_ELBO(1)]
    >>> report = gradient_report(elbos, model, guide, num_repeats=300)
    >>> [row.name for row in sorted(report.rows, key=lambda row: row.variance)]
    ['TraceDisARM_ELBO', 'TraceRLOO_ELBO', 'TraceScore_ELBO']
    >>> any(row.looks_biased for row in report.rows)
    False
    """
    num_repeats = positive_int("num_repeats", num_repeats, 2)
    num_training = positive_int("num_training", num_training, 0)
    named = _named(objectives)
    _check_differentiable(named)
    subsample = SharedSubsample()
    pair = (subsample(model), subsample(guide))
    exact, leaves = None, None
    rows = []
    with codes_at_rest(), progress_bar(progress, len(named) * (num_repeats + num_training)) as bar:
        for name, objective in named.items():
            loss = objective.differentiable_loss(*pair, *args, **kwargs)
            if leaves is None:
                leaves = _guide_leaves(loss, pair, args, kwargs)
                exact = enumerated_elbo(*pair, args, kwargs, max_states=max_states)
                if exact is not None:
                    exact = _gradient(-exact, leaves)
            _train(objective, pair, args, kwargs, num_training, bar)
            rows.append(
                _measure(name, objective, pair, args, kwargs, leaves, exact, bar, num_repeats)
            )
    return GradientReport(rows, exact is not None, num_repeats)


def _named(objectives) -> dict:
    if isinstance(objectives, Mapping):
        return dict(objectives)
    if not isinstance(objectives, Sequence):
        objectives = [objectives]
    result: dict = {}
    for objective in objectives:
        name, k = type(objective).__name__, 2
        while name in result:
            name, k = f"{type(objective).__name__} ({k})", k + 1
        result[name] = objective
    if not result:
        raise ValueError("objectives is empty: pass at least one, such as TraceRLOO_ELBO(2).")
    return result


def _check_differentiable(named: dict) -> None:
    for name, objective in named.items():
        if not hasattr(objective, "differentiable_loss"):
            raise ValueError(
                f"Objective '{name}' has no differentiable_loss (Pyro's TraceGraph_ELBO and "
                "RenyiELBO have none). Use TraceScore_ELBO or TraceRLOO_ELBO, or "
                "ImportanceWeightedELBO, in their place."
            )


def _guide_leaves(loss: Tensor, pair, args, kwargs) -> list[Tensor]:
    own, _ = users(*pair, args, kwargs)
    leaves = [leaf for leaf in graph_leaves([loss]) if id(leaf) in own]
    if not leaves:
        raise ValueError("No parameter of the guide gets a gradient, so there is none to report.")
    return leaves


def _gradient(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]


def _train(objective, pair, args, kwargs, num_training: int, bar) -> None:
    module = getattr(objective, "learned", None)
    learned = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    if not learned:
        bar.update(num_training)
        return
    adam = torch.optim.Adam(learned, lr=0.01)
    for _ in range(num_training):
        loss = objective.differentiable_loss(*pair, *args, **kwargs)
        for parameter, slope in zip(learned, _gradient(loss, learned), strict=True):
            parameter.grad = slope
        adam.step()
        adam.zero_grad()
        bar.update()


def _measure(name, objective, pair, args, kwargs, leaves, exact, bar, num_repeats) -> GradientRow:
    losses, seconds = [], []
    mean = [torch.zeros_like(leaf) for leaf in leaves]
    square = [torch.zeros_like(leaf) for leaf in leaves]  # sum of squared deviations
    for k in range(1, num_repeats + 1):
        _synchronize(leaves)
        start = time.perf_counter()
        loss = objective.differentiable_loss(*pair, *args, **kwargs)
        gradient = _gradient(loss, leaves)
        _synchronize(leaves)
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
        for m, s, g in zip(mean, square, gradient, strict=True):
            step = g - m
            m += step / k
            s += step * (g - m)
        bar.update()
    variance = [s / (num_repeats - 1) for s in square]
    total = float(sum(v.sum() for v in variance))
    bias = max_z = None
    num = sum(v.numel() for v in variance)
    if exact is not None:
        differences = [m - e for m, e in zip(mean, exact, strict=True)]
        bias = math.sqrt(float(sum(d.square().sum() for d in differences)))
        max_z = max(
            float(_standardised(d, v / num_repeats, e).max())
            for d, v, e in zip(differences, variance, exact, strict=True)
        )
    return GradientRow(
        name=name,
        loss=statistics.fmean(losses),
        loss_standard_error=statistics.stdev(losses) / math.sqrt(num_repeats),
        variance=total,
        seconds=statistics.median(seconds),
        bias=bias,
        bias_standard_error=math.sqrt(total / num_repeats),
        max_z=max_z,
        num_parameters=num,
        mean=mean,
    )


def _standardised(difference: Tensor, variance: Tensor, exact: Tensor) -> Tensor:
    """|z|, with rounding as the least standard error."""
    rounding = torch.finfo(exact.dtype).eps * (1 + exact.abs()) * 100
    return difference.abs() / (variance.sqrt() + rounding)


def _synchronize(leaves: list[Tensor]) -> None:
    if leaves[0].is_cuda:
        torch.cuda.synchronize(leaves[0].device)
