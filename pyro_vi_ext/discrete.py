r"""ELBO objectives whose guides have draws without a path.

.. math::

    L = \mathbb{E}_{q(b, z)} f, \qquad f = \log p(x, b, z) - \log q(b, z).

The reparameterised draws z and the model's parameters have the plain derivative of f. Its term
:math:`-\nabla \log q(b_i \mid \cdot)` at a draw without a path has mean zero and is left out; what
remains of the gradient is, for each such draw i,

.. math::

    \nabla_{\phi_i} \mathbb{E}_{q(b_i \mid \cdot; \phi_i)} f_i, \qquad
    f_i = \log p(x, b, z) - \sum_{j \ge i} \log q(b_j, z_j \mid \cdot)

(what the guide drew before :math:`b_i` cannot depend on it), summed over the plates that site i is
not in, kept apart along those it is in. An estimator of it is what a subclass of
:class:`DiscreteObjective` writes.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from pyro_vi_ext.objective import Estimate, Objective
from pyro_vi_ext.paths import draws, is_reparameterized, score
from pyro_vi_ext.relaxations import Relaxation, relaxation_of
from pyro_vi_ext.run import Run
from pyro_vi_ext.score_function import learning_signal
from pyro_vi_ext.scoring import Term, linear_bound, pair_terms, plates_of, split_mask

__all__ = ["DiscreteObjective", "Site", "stacked"]


class DiscreteObjective(Objective):
    """Base class: the ELBO, with a gradient estimator for the draws that have no path."""

    def estimate(self, run: Run) -> Estimate:
        scored = [pair_terms(run, pair) for pair in run.pairs]
        rows = [[*part.model, *part.guide.values()] for part in scored]
        terms = [term for row in rows for term in row]
        bound = linear_bound(terms, run)
        if not torch.is_grad_enabled():
            return Estimate(-bound, terms=terms)
        sites = self.sites(run, rows)
        own = {site.name for site in sites}
        pathwise = linear_bound([t for t in terms if t.sign > 0 or t.name not in own], run)
        learned = [site for site in sites if site.log_q.requires_grad]
        self.prepare(learned)
        return Estimate(-bound, -(pathwise + self.surrogate(run, learned, pathwise)), terms)

    @abc.abstractmethod
    def surrogate(self, run: Run, sites: list[Site], pathwise: torch.Tensor):
        """A scalar whose gradient estimates that of the bound through the sites.

        :param sites: the draws without a path whose distributions have parameters to learn.
        :param pathwise: the scalar with the rest of the gradient, to which this is added.
        """

    def prepare(self, sites: list[Site]) -> None:
        """Refuse sites, and make what is learned of new ones."""

    def is_scored(self, site: dict) -> bool:
        """Whether a drawn site of the guide belongs to :meth:`surrogate`."""
        return not is_reparameterized(site)

    def sites(self, run: Run, rows: list[list[Term]]) -> list[Site]:
        """The draws without a path, in the order of the guide."""
        traces = [pair.guide for pair in run.pairs]
        names = [name for name, site in draws(traces[0]).items() if self.is_scored(site)]
        for trace in traces:
            other = [name for name, site in draws(trace).items() if self.is_scored(site)]
            if other != names:
                name = min(set(other) ^ set(names), default=names[0] if names else "")
                raise NotImplementedError(
                    f"Guide site '{name}' is in one particle and not in another, or in another "
                    "place. Sample the same sites in the same order in every run of the guide."
                )
        return [Site(name, run, rows) for name in names]


@dataclass
class Site:
    r"""A draw of the guide without a path, of all J particles.

    Shapes: (J, \*batch) or (J, \*batch, \*event), where batch has a dimension for each plate
    dimension of model and guide, of size 1 where there is no such plate, and J may be 1 where
    particles do not differ.

    :ivar name: the site.
    :ivar rows: terms of model and guide, of each pair of the run.
    """

    name: str
    run: Run
    rows: Sequence[Sequence[Term]]

    @cached_property
    def nodes(self) -> list[dict]:
        """The site in the guide's trace of each pair."""
        return [pair.guide.nodes[self.name] for pair in self.run.pairs]

    @property
    def plates(self) -> dict:
        """The plates of the site, by name."""
        return plates_of(self.nodes[0])

    @property
    def event_dim(self) -> int:
        return self.nodes[0]["fn"].event_dim

    @cached_property
    def value(self) -> torch.Tensor:
        """The draws, detached."""
        values = [node["value"].detach() for node in self.nodes]
        return stacked(self.run, values, self.event_dim)

    @cached_property
    def log_q(self) -> torch.Tensor:
        """Log-density of the draws given their ancestors, unmasked and unscaled, (J, \\*batch)."""
        return stacked(self.run, [score(node).log_prob for node in self.nodes])

    @cached_property
    def signal(self) -> torch.Tensor:
        """:math:`f_i`, detached: (J, \\*batch)."""
        return self.signal_of(self.run, self.rows).detach()

    def signal_of(self, run: Run, rows: Sequence[Sequence[Term]]) -> torch.Tensor:
        """:math:`f_i` of any run of the pair: (particles, \\*batch), with gradients."""
        signals = [learning_signal(row, self.plates) for row in self._kept(run, rows)]
        return stacked(run, signals)

    def total_of(self, run: Run, rows: Sequence[Sequence[Term]]) -> torch.Tensor:
        r"""The terms of :meth:`signal_of`, each once: a scalar.

        A term outside a plate of the site is in the signal of every unit of that plate. The
        derivative of each unit's signal for its own draw is that of this sum, since the units of a
        plate are independent.
        """
        return sum(
            term.sign * (term.log_prob * term.scale).sum()
            for row in self._kept(run, rows)
            for term in row
        )

    def _kept(self, run: Run, rows: Sequence[Sequence[Term]]) -> list[list[Term]]:
        order = list(run.pairs[0].guide.nodes)
        later = set(order[order.index(self.name) :])
        return [[t for t in row if t.sign > 0 or t.name in later] for row in rows]

    @cached_property
    def _relaxation(self) -> tuple[Relaxation | None, torch.Tensor | None]:
        found = [relaxation_of(split_mask(node)[0]) for node in self.nodes]
        relaxation = found[0][0]
        if relaxation is None:
            return None, None
        extra = self.event_dim + int(not relaxation.relaxes_value)
        return relaxation, stacked(self.run, [logits for _, logits in found], extra)

    @property
    def relaxation(self) -> Relaxation | None:
        """Its continuous relaxation; ``None`` if there is none."""
        return self._relaxation[0]

    @property
    def logits(self) -> torch.Tensor:
        """Logits of its distribution, (J, \\*batch, \\*event), with gradients."""
        return self._relaxation[1]

    @property
    def num_extra_dims(self) -> int:
        """Dimensions of the logits beyond those of the value: 1 for integer categories."""
        return int(self.relaxation is not None and not self.relaxation.relaxes_value)

    def per_variable(self, tensor: torch.Tensor) -> torch.Tensor:
        """(J, \\*batch) with ones for the dimensions that the logits have beyond it."""
        return tensor.reshape(tensor.shape + (1,) * (self.logits.dim() - tensor.dim()))

    def per_unit(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the logits' shape summed to (J, \\*batch)."""
        extra = tensor.dim() - self.run.structure.max_plate_nesting - 1
        return tensor.flatten(-extra).sum(-1) if extra else tensor


def stacked(run: Run, tensors: Sequence[torch.Tensor], event_dim: int = 0) -> torch.Tensor:
    """Tensors of the pairs of a run as one, particles along dimension 0, a full batch after it."""
    rank = run.structure.max_plate_nesting + 1
    rows = []
    for tensor in tensors:
        missing = rank - (tensor.dim() - event_dim)
        rows.append(tensor.reshape((1,) * missing + tensor.shape))
    return rows[0] if len(rows) == 1 else torch.cat(rows)
