r"""Several updates of the guide for each update of the model.

With parameters :math:`\theta` of the model alone, all others :math:`\phi`, and the loss
:math:`\ell_t` of step t on its own minibatch,

.. math:: \phi \leftarrow \phi - \eta \nabla_\phi \ell_t(\theta, \phi)
          \quad \text{at every step } t, \qquad
          \theta \leftarrow \theta - \eta \nabla_\theta \ell_t(\theta, \phi)
          \quad \text{at } t = n, 2n, 3n, \dots

so that a guide which lags behind the model's posterior can catch up before the model moves on (He
et al. 2019, "Lagging inference networks and posterior collapse in variational autoencoders",
arXiv:1901.05534). There the guide is trained until it stops improving, and only early in training;
here n is fixed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pyro.poutine as poutine
import torch
from pyro.poutine.trace_struct import Trace

from pyro_vi_ext.learned import graph_leaves
from pyro_vi_ext.tracing import sample_sites, trace_pair

__all__ = ["Alternation", "users"]


class Alternation:
    """Which parameters rest at a step of training.

    :param guide_steps: the number n of guide updates for each update of the model.
    :ivar sides: by name of a parameter, who uses it: ``"guide"`` (the model perhaps too),
        ``"model"`` (it alone), ``"objective"`` (neither: a baseline, a control variate).
    """

    def __init__(self, guide_steps: int):
        self.guide_steps = guide_steps
        self.sides: dict[str, str] = {}

    def resting(self, named, step: int, find_users: Callable) -> list[torch.Tensor]:
        """The parameters that are not updated at a step, counted from 1.

        :param named: pairs of the name and the leaf of each parameter, with the step's gradients.
        :param find_users: returns :func:`users`; called when a parameter has its first gradient.
        :raises ValueError: if no parameter is the model's alone, or none is the guide's, or if one
            of the model and one of the guide share memory.
        """
        if self.guide_steps == 1:
            return []
        if any(leaf.grad is not None and name not in self.sides for name, leaf in named):
            self._decide(named, *find_users())
        if step % self.guide_steps == 0:
            return []
        return [leaf for name, leaf in named if self.sides.get(name) == "model"]

    def _decide(self, named, by_guide: set[int], by_model: set[int]) -> None:
        for name, leaf in named:
            if id(leaf) in by_guide:
                self.sides[name] = "guide"
            elif id(leaf) in by_model and self.sides.get(name) != "guide":
                self.sides[name] = "model"
            elif leaf.grad is not None:
                self.sides.setdefault(name, "objective")
        self._check(named)

    def _check(self, named) -> None:
        for side, found in (
            ("model", "no parameter that is trained is used by the model and not by the guide"),
            ("guide", "no parameter that is trained is used by the guide"),
        ):
            if side not in self.sides.values():
                raise ValueError(
                    f"guide_steps={self.guide_steps} alternates updates of guide and model, and "
                    f"{found}. Leave out guide_steps=."
                )
        trained = [(name, leaf) for name, leaf in named if name in self.sides and leaf.numel()]
        own = {leaf.data_ptr(): name for name, leaf in trained if self.sides[name] == "model"}
        for name, leaf in trained:
            other = own.get(leaf.data_ptr())
            if self.sides[name] == "guide" and other is not None:
                raise ValueError(
                    f"Parameters '{other}' of the model and '{name}' of the guide share memory, so "
                    "an update of either changes both: one was initialised with the other's tensor "
                    "(init_to_mean of an AutoGuide does so). Initialise it with a copy (.clone())."
                )


def users(model, guide, args: tuple, kwargs: dict) -> tuple[set[int], set[int]]:
    """Run the pair once: the ids of the leaves that the guide uses, and of those the model uses.

    A parameter is used if the value or the density of a site depends on it, however it is
    registered; one that only the guide uses may also be among the model's, through the latents.
    """
    with torch.enable_grad(), poutine.block():
        pair = trace_pair(model, guide, args, kwargs)
        return _leaves(pair.guide), _leaves(pair.model)


def _leaves(trace: Trace) -> set[int]:
    """Ids of the leaves in the graphs of a trace's values, scales and densities."""
    tensors = []
    for site in sample_sites(trace).values():
        tensors += [site["value"], site["scale"]]
        with contextlib.suppress(NotImplementedError):  # of an implicit distribution
            tensors.append(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]))
    return {id(leaf) for leaf in graph_leaves(t for t in tensors if isinstance(t, torch.Tensor))}
