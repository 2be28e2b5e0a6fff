"""The base class of every objective: one method to write, four ways to be called.

A subclass writes :meth:`Objective.estimate`. Pyro's ``SVI``, :meth:`Objective.loss`,
:meth:`Objective.loss_and_grads`, :meth:`Objective.differentiable_loss` and the module
``objective(model, guide)`` all come from it, and agree: under the same seed they report the same
loss, and their gradients are the same estimator's.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.infer.util import is_validation_enabled, torch_backward

from pyro_vi_ext.run import Run, Structure
from pyro_vi_ext.scoring import Term, check_finite

__all__ = ["Estimate", "Objective", "ObjectiveModule", "positive_int"]


@dataclass
class Estimate:
    """What an objective returns from one evaluation.

    :ivar loss: scalar tensor, the negative bound in nats.
    :ivar surrogate: scalar tensor whose gradient is the estimator's; ``None`` if it is the loss.
    :ivar terms: the scored sites, for error messages.
    """

    loss: torch.Tensor
    surrogate: torch.Tensor | None = None
    terms: list[Term] = field(default_factory=list)

    def differentiable(self) -> torch.Tensor:
        """A scalar with the value of the loss and the gradient of the surrogate."""
        if self.surrogate is None:
            return self.loss
        return self.loss.detach() + (self.surrogate - self.surrogate.detach())

    def backward(self, retain_graph: bool = False) -> None:
        """Add the estimator's gradient to ``.grad`` of the parameters."""
        torch_backward(self.differentiable(), retain_graph=retain_graph)


class Objective(ELBO, metaclass=abc.ABCMeta):
    """Base class of the objectives of this package.

    :param num_particles: number of particles, J or K in the papers.
    :param max_plate_nesting: bound on the number of nested plates of model and guide; found by one
        run of the pair, which leaves the random state alone, if omitted.
    :param vectorize_particles: run the particles in one plate left of all others (the default), or
        one after another, for models that cannot be vectorised.
    :raises ValueError: if ``num_particles`` is not a positive integer.
    """

    #: Whether the objective estimates log q of a guide with mixing variables; if not, they raise.
    takes_mixing = False

    def __init__(
        self, num_particles=1, *, max_plate_nesting=float("inf"), vectorize_particles=True
    ):
        num_particles = positive_int("num_particles", num_particles)
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        self._given_nesting = max_plate_nesting
        self._structures: dict = {}

    @abc.abstractmethod
    def estimate(self, run: Run) -> Estimate:
        """Evaluate the objective on one run of a model/guide pair. The method a subclass writes."""

    # The four entry points.

    def loss(self, model, guide, *args, **kwargs) -> float:
        """The negative bound, in nats. Lower is better."""
        with torch.no_grad():
            return self._finite(self._evaluate(model, guide, args, kwargs))

    def differentiable_loss(self, model, guide, *args, **kwargs) -> torch.Tensor:
        """A scalar tensor: its value is the loss, its gradient the estimator of the gradient."""
        estimate = self._evaluate(model, guide, args, kwargs)
        if is_validation_enabled():
            self._finite(estimate)
        return estimate.differentiable()

    def loss_and_grads(self, model, guide, *args, **kwargs) -> float:
        """The loss as a float; gradients are added to ``.grad`` of the parameters."""
        estimate = self._evaluate(model, guide, args, kwargs)
        loss = self._finite(estimate)
        estimate.backward(self.retain_graph)
        return loss

    def differentiate(self, model, guide, *args, **kwargs) -> torch.Tensor:
        """:meth:`loss_and_grads` that does not look: the loss stays a tensor, finite or not."""
        estimate = self._evaluate(model, guide, args, kwargs)
        estimate.backward(self.retain_graph)
        return estimate.loss.detach()

    def __call__(self, model, guide) -> ObjectiveModule:
        """A :class:`torch.nn.Module` that returns the differentiable loss of the pair."""
        return ObjectiveModule(model, guide, self)

    # Shared machinery.

    def _evaluate(self, model, guide, args, kwargs) -> Estimate:
        return self.estimate(self._run(model, guide, args, kwargs))

    def _run(self, model, guide, args, kwargs, **options) -> Run:
        options = {
            "num_particles": self.num_particles,
            "vectorized": self.vectorize_particles and self.num_particles > 1,
            "vectorize_mixing": self.vectorize_particles,
            "mixing": self.takes_mixing,
            **options,
        }
        structure = self._structure(model, guide, args, kwargs)
        return Run(structure, *self._handled(model, guide), args, kwargs, **options)

    def _handled(self, model, guide):
        """Model and guide inside the effect handlers of the objective, if it has any."""
        return model, guide

    def _structure(self, model, guide, args, kwargs) -> Structure:
        key = (model, guide)
        if key not in self._structures:
            while len(self._structures) >= 8:
                self._structures.pop(next(iter(self._structures)))
            self._structures[key] = Structure.of(model, guide, args, kwargs, self._given_nesting)
        return self._structures[key]

    @staticmethod
    def _finite(estimate: Estimate) -> float:
        loss = float(estimate.loss.detach())
        if not math.isfinite(loss):  # terms of chunks cost a pass
            check_finite(loss, estimate.terms)
        return loss

    def _get_trace(self, model, guide, args, kwargs):
        """Pyro's hook: the model trace and the guide trace of one run of the pair."""
        pair = self._run(model, guide, args, kwargs).pairs[0]
        return pair.model, pair.guide


class ObjectiveModule(ELBOModule):
    """``objective(model, guide)``: a module for use with any ``torch.optim`` optimizer.

    Call it once before asking for its parameters: Pyro creates parameters when they are first used.
    From then on :meth:`parameters` is complete: it has those of modules, the unconstrained leaves
    of every ``pyro.param`` of function guides and models, and the learned parts of the objective.
    """

    def __init__(self, model, guide, objective: Objective):
        super().__init__(model, guide, objective)
        self._captured: dict[str, torch.Tensor] = {}
        self._store_size, self._stored = 0, set()

    def forward(self, *args, **kwargs) -> torch.Tensor:
        store = pyro.get_param_store()
        if self._captured and not self._replaced(store):
            loss = super().forward(*args, **kwargs)
            if len(store) != self._store_size:  # created just now
                stored = dict(store.named_parameters())
                self._captured |= {n: leaf for n, leaf in stored.items() if n not in self._stored}
        else:
            with poutine.trace(param_only=True) as capture:
                loss = super().forward(*args, **kwargs)
            self._captured = {}
            for name, site in capture.trace.nodes.items():
                value = site["value"]  # a bare leaf under Pyro's module_local_params
                self._captured[name] = getattr(value, "unconstrained", lambda v=value: v)()
        if len(store) != self._store_size:
            self._stored, self._store_size = set(store.keys()), len(store)
        return loss

    def _replaced(self, store) -> bool:
        """Whether the parameter store has lost or replaced a leaf since the last call."""
        stored = dict(store.named_parameters())
        if len(stored) != self._store_size:
            return True
        shared = [name for name in self._captured if name in stored or name in self._stored]
        return any(stored.get(name) is not self._captured[name] for name in shared)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of modules first, then those that live in Pyro's parameter store only."""
        seen = set()
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            seen.add(id(parameter))
            yield name, parameter
        for name, leaf in self._captured.items():
            if id(leaf) not in seen:
                seen.add(id(leaf))
                yield f"{prefix}.{name}" if prefix else name, leaf


def positive_int(name: str, value, minimum: int = 1) -> int:
    """``value`` as an int.

    :raises ValueError: if it is not an integer of at least ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}.")
    return value
