"""A compiled objective as a module, for a training loop of one's own.

The graph computes the loss and all gradients in one go. The module's output carries these gradients
to ``backward``, scaled by whatever comes after the loss.
"""

from __future__ import annotations

import functools
import warnings

import pyro
import torch
from pyro.infer.elbo import ELBO

from pyro_vi_ext.compiled.backends import check_backend
from pyro_vi_ext.compiled.programs import Programs
from pyro_vi_ext.compiled.refusal import CannotCompile
from pyro_vi_ext.compiled.stock_pass import StockPass
from pyro_vi_ext.objective import ObjectiveModule, positive_int

__all__ = ["CompiledObjectiveModule", "compile_objective"]


def compile_objective(objective: ELBO, *, backend="inductor", fallback=False, max_traces=16):
    r"""An objective whose modules evaluate it as one compiled graph.

    ``compile_objective(objective)(model, guide)`` is used as ``objective(model, guide)``: a call
    returns :math:`\ell`, a scalar tensor in nats, whose gradient is the objective's estimate of
    :math:`\nabla_\theta \ell`; :meth:`parameters` is complete after the first call, which is not
    compiled. The gradient is computed with the loss, so that ``torch.no_grad`` evaluates the
    objective uncompiled, and a second derivative is an error.

    :param objective: of this package or of Pyro, with one loss.
    :param backend: see :class:`~pyro_vi_ext.compiled.CompiledSVI`, as the other keywords.
    :returns: a function of model and guide that makes a :class:`torch.nn.Module`.
    :raises ValueError: if ``objective`` is no ELBO, or the backend is unknown.
    :raises CannotCompile: at a call that cannot be compiled.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vi_ext import compile_objective
        >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> loss = compile_objective(Trace_ELBO(), backend="eager")(model, AutoNormal(model))
        >>> x = torch.tensor([0.5, 1.5])
        >>> first = loss(x)  # makes the parameters
        >>> optimizer = torch.optim.LBFGS(loss.parameters(), lr=0.1)
        >>> optimizer = torch.optim.RMSprop(loss.parameters(), lr=0.05)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss(x).backward()
        ...     optimizer.step()
        >>> bool(loss(x) < first)
        True
    """
    if not isinstance(objective, ELBO):
        raise ValueError(f"compile_objective takes an ELBO, got {type(objective).__name__}.")
    return functools.partial(
        CompiledObjectiveModule,
        objective=objective,
        backend=check_backend(backend),
        fallback=fallback,
        max_traces=positive_int("max_traces", max_traces),
    )


class CompiledObjectiveModule(ObjectiveModule):
    """``compile_objective(objective)(model, guide)``."""

    def __init__(self, model, guide, objective, backend, fallback, max_traces):
        super().__init__(model, guide, objective)
        stock = StockPass(model, guide, objective.loss_and_grads)
        self._programs = Programs(stock, None, backend, max_traces)
        self._fallback, self._refused = fallback, None

    def forward(self, *args, **kwargs) -> torch.Tensor:
        if not self._captured or self._refused or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        if self._replaced(pyro.get_param_store()):
            self._captured = {}
            return super().forward(*args, **kwargs)
        try:
            program, arguments = self._programs.find(args, kwargs)
        except CannotCompile as refusal:
            if not self._fallback:
                raise
            self._refused = refusal
            warnings.warn(f"The objective is not compiled. {refusal}", stacklevel=2)
            return super().forward(*args, **kwargs)
        return _Loss.apply(program, arguments.tensors, *program.updated)

    @property
    def programs(self):
        """What has been compiled, with ``trace_seconds``, ``compile_seconds``, ``num_steps``."""
        return list(self._programs.known.values())


class _Loss(torch.autograd.Function):
    """The loss, with gradients that are there already."""

    @staticmethod
    def forward(ctx, program, tensors, *leaves):
        losses, _, gradients = program.gradients(tensors)
        ctx.save_for_backward(*gradients)
        dtype = functools.reduce(torch.promote_types, [g.dtype for g in gradients])
        return losses[0].to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        gradients = ctx.saved_tensors
        return None, None, *(scale.to(gradient.dtype) * gradient for gradient in gradients)
