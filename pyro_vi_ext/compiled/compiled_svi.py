r"""``SVI`` whose step is one compiled graph.

Pyro's step is mostly Python: effect handlers, traces, distribution objects, one small tensor
operation after another. For most models all that Python does the same in every step. So it runs
once, on tensors without values; what it asks of tensors, forward and backward, is recorded as a
graph :math:`(\theta, s, x) \mapsto (\ell, \theta', s')` together with the optimizer's update, and
the graph is compiled. Random numbers stay inputs of chance: each step draws its own, from torch's
generator, in the order of a plain step.
"""

from __future__ import annotations

import warnings

import torch
from pyro.infer import SVI
from pyro.infer.util import zero_grads

from pyro_vi_ext.checkpoint import undisturbed
from pyro_vi_ext.compiled.backends import check_backend
from pyro_vi_ext.compiled.optimizer_state import TorchOptimizer
from pyro_vi_ext.compiled.program import Program
from pyro_vi_ext.compiled.programs import Programs
from pyro_vi_ext.compiled.refusal import CannotCompile
from pyro_vi_ext.compiled.step_graph import LOOP_STEPS
from pyro_vi_ext.compiled.stock_pass import StockPass
from pyro_vi_ext.not_finite import not_finite_sites
from pyro_vi_ext.objective import positive_int

__all__ = ["CompiledSVI"]


class CompiledSVI(SVI):
    r"""A drop-in for :class:`pyro.infer.SVI` that runs a step as one compiled graph.

    Given the same random draws, losses, parameters, buffers and the optimizer's state after n steps
    are those of ``SVI`` up to rounding (relative 1e-5 in float32, 1e-10 in float64, until training
    has amplified it: two long runs in float32 part as any two do that differ in a last digit).
    Draws come from torch's generator in the same order, so the same seed gives the same draws. The
    first step is a plain one: it makes the parameters. The second makes the graph, which takes
    seconds; later ones are calls of compiled code.

    It is right or it says so. What the graph takes for granted is checked in every step (shapes,
    types, which tensors are parameters and buffers, training mode, hyperparameters, the globals,
    closures and attributes that the code uses); if it has changed, the step is traced again, at
    most ``max_traces`` times. Two records of the pass with different parameter values must be
    equal. The compiled step is compared with a plain one from the same state when it is made, and
    again after 16, 64, 256, ... steps. What Python decides anew in every call cannot be compiled:
    conditions on values of tensors, shapes that depend on them, NumPy, ``TraceGraph_ELBO`` with
    decaying-average baselines. docs/fast.md has the list.

    A step whose loss or gradient is not finite changes no parameter, and raises.

    :param model: the model.
    :param guide: the guide.
    :param optim: of :mod:`pyro.optim`, or a ``torch.optim`` optimizer of existing parameters.
        Adam, AdamW, ClippedAdam and SGD are part of the graph, with their schedules of learning
        rates; any other runs after it.
    :param loss: an objective of this package or of Pyro, or a differentiable loss function.
    :param backend: ``"inductor"`` (machine code, by a C++ compiler on the CPU), ``"eager"`` (the
        graph, operation by operation, without a compiler) or ``"cudagraphs"`` (a captured CUDA
        graph, for small models on a GPU).
    :param fallback: if the step cannot be compiled, warn once and run plain steps; by default that
        is an error.
    :param max_traces: how many graphs are made, for other kinds of arguments or changed settings.
    :raises ValueError: for an unknown backend, and at a step whose loss is not finite.
    :raises CannotCompile: at a step, a :class:`NotImplementedError` that names the user's line.

    Reference: M. D. Hoffman, D. M. Blei, C. Wang and J. Paisley, *Stochastic Variational
    Inference*, JMLR 2013, for what a step is.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vi_ext import CompiledSVI
        >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> optim = pyro.optim.Adam({"lr": 0.05})
        >>> svi = CompiledSVI(model, AutoNormal(model), optim, Trace_ELBO(), backend="eager")
        >>> x = torch.tensor([0.5, 1.5])
        >>> loss = svi.step(x)
        >>> losses = svi.run(99, x)
        >>> losses.shape, bool(losses[-20:].mean() < loss)
        (torch.Size([99]), True)
    """

    def __init__(
        self,
        model,
        guide,
        optim,
        loss,
        loss_and_grads=None,
        *,
        backend="inductor",
        fallback=False,
        max_traces=16,
    ):
        if isinstance(optim, torch.optim.Optimizer):
            optim = TorchOptimizer(optim)
        super().__init__(model, guide, optim, loss, loss_and_grads)
        self.backend = check_backend(backend)
        self.fallback = fallback
        self.max_traces = positive_int("max_traces", max_traces)
        self._programs: Programs | None = None
        self._refused: CannotCompile | None = None

    @property
    def programs(self) -> list[Program]:
        """What has been compiled, with ``trace_seconds``, ``compile_seconds``, ``num_steps``."""
        return [] if self._programs is None else list(self._programs.known.values())

    @property
    def refused(self) -> CannotCompile | None:
        """Why plain steps are taken instead, with ``fallback=True``."""
        return self._refused

    def prepare(self, *args, **kwargs) -> None:
        """Make the parameters and compile, without a step.

        Random states are as before, unless parameters are made.

        :param args: arguments of model and guide, of the kind that :meth:`step` will have.
        """
        self.skip_first_step()
        self._compile(0, args, kwargs)

    def step(self, *args, **kwargs):
        """A gradient step; returns the loss, a float in nats (a tuple for several losses)."""
        if self._programs is None:
            return self._first_step(args, kwargs)
        found = self._compile(1, args, kwargs)
        if found is None:
            return super().step(*args, **kwargs)
        program, arguments = found
        losses, finite = self._one_step(program, arguments.tensors)
        if not finite:
            raise self._not_finite(losses.tolist(), args, kwargs)
        if program.optimizer is not None:
            program.optimizer.after_steps(1)
        losses = losses.tolist()
        return losses[0] if program.capture.scalar else tuple(losses)

    def leaves(self) -> dict[str, torch.Tensor]:
        """The unconstrained parameters of the compiled steps, by name in the parameter store."""
        return {name: leaf for p in self.programs for name, leaf in p.entries.items()}

    def run(self, num_steps: int, *args, **kwargs) -> torch.Tensor:
        """Many steps with the same arguments, in a compiled loop that does not look at the losses.

        With Inductor on a CPU the loop is compiled too, once for any number of steps.

        :param num_steps: how many; :class:`pyro.infer.SVI` has another, deprecated ``run``.
        :returns: the losses in nats, float64, of shape (num_steps,), or (num_steps, number of
            losses) for an objective with several.
        :raises ValueError: if a loss or gradient is not finite; the parameters are those before
            that step.
        """
        positive_int("num_steps", num_steps)
        losses = []
        done = 0
        if self._programs is None:
            losses.append(self._row(self._first_step(args, kwargs)))
            done = 1
        if done < num_steps:
            found = self._compile(num_steps - done, args, kwargs, loop=True)
            if found is None:
                while len(losses) < num_steps:
                    losses.append(self._row(super().step(*args, **kwargs)))
            else:
                program, arguments = found
                runner = self._loops if program.has_loop else self._steps
                losses += runner(program, arguments.tensors, num_steps - done, done, args, kwargs)
        device = losses[-1].device
        losses = torch.cat([part.to(device) for part in losses])
        return losses.squeeze(-1) if losses.shape[-1] == 1 else losses

    # How it is done.

    @property
    def is_first_step(self) -> bool:
        """Whether the next step is the first, plain one."""
        return self._programs is None

    def skip_first_step(self, stock: StockPass | None = None) -> None:
        """Let the next step be a compiled one; it makes missing parameters before it draws."""
        if self._programs is None:
            stock = stock or StockPass(self.model, self.guide, self.loss_and_grads)
            self._programs = Programs(stock, self.optim, self.backend, self.max_traces)

    def _first_step(self, args, kwargs):
        stock = StockPass(self.model, self.guide, self.loss_and_grads)
        with stock.watching_modules():
            loss = super().step(*args, **kwargs)
        self.skip_first_step(stock)
        return loss

    def _compile(self, num_steps, args, kwargs, loop=False):
        """The program and the arguments, or ``None`` if plain steps are to be taken."""
        if self._refused is not None:
            return None
        parts = self._programs.stock, self._programs.optim
        if parts[1] is not self.optim or not parts[0].is_of(self):  # assigned since
            self._programs = None
            self.skip_first_step()
        try:
            program, arguments = self._programs.find(args, kwargs, num_steps)
            if loop:
                self._programs.compile_loop(program, args, kwargs, arguments)
        except CannotCompile as refusal:
            if not self.fallback:
                raise
            self._refused = refusal
            warnings.warn(f"Plain SVI steps are taken. {refusal}", stacklevel=3)
            return None
        return program, arguments

    def _one_step(self, program: Program, tensors):
        """The losses, and whether the step was finite and so was taken."""
        if program.optimizer is not None:
            return program.step(tensors)
        losses, finite, gradients = program.gradients(tensors)
        if finite:  # the optimizer is Python
            for leaf, gradient in zip(program.updated, gradients, strict=True):
                leaf.grad = gradient
            self.optim(list(program.capture.leaves.values()))
            zero_grads(program.updated)
        return losses, finite

    def _loops(self, program: Program, tensors, num_steps, done, args, kwargs):
        parts = []
        while num_steps:
            count = min(num_steps, LOOP_STEPS)
            losses, number, finite = program.loop(count, tensors)
            begun, finite = int(number), bool(finite)  # on a CPU: nothing to wait for
            program.optimizer.after_steps(begun if finite else begun - 1)
            if not finite:
                at = done + sum(len(part) for part in parts) + begun
                raise self._not_finite(losses[begun - 1].tolist(), args, kwargs, at)
            parts.append(losses)
            num_steps -= count
        return parts

    def _steps(self, program: Program, tensors, num_steps, done, args, kwargs):
        """Many single steps; on a GPU nothing is looked at before the end."""
        parts, flags = [], []
        wait = program.device.type == "cpu"
        for _ in range(num_steps):
            losses, finite = self._one_step(program, tensors)
            parts.append(losses.unsqueeze(0))
            flags.append(finite)
            if wait and not finite:
                break
            if wait and program.optimizer is not None:
                program.optimizer.after_steps(1)
        finite = torch.stack(flags)
        if not wait and program.optimizer is not None:
            program.optimizer.after_steps(int(finite.sum()))
        if not finite.all():
            k = int(finite.logical_not().int().argmax())
            raise self._not_finite(parts[k][0].tolist(), args, kwargs, done + k + 1)
        return parts

    @staticmethod
    def _row(loss) -> torch.Tensor:
        losses = loss if isinstance(loss, tuple) else (loss,)
        return torch.tensor([losses], dtype=torch.float64)

    def _not_finite(self, losses, args, kwargs, at: int = 1) -> StepNotFinite:
        """The error of a step whose loss or gradient is not finite."""
        with undisturbed(self._programs.stock.modules):
            found: list[str] = []
            for _ in range(10):
                found = found or not_finite_sites(self.model, self.guide, args, kwargs)
        bad = [loss for loss in losses if loss - loss != 0]
        what = f"the loss is {bad[0]}" if bad else "the loss is finite, a gradient is not"
        where = f" Not finite: {'; '.join(found)}." if found else ""
        return StepNotFinite(
            at,
            f"{what}; the parameters are still those from before this step.{where} Remove such "
            "data or mask them (poutine.mask, obs_mask); otherwise lower the learning rate, clip "
            "gradients, or constrain the value that runs to the edge.",
        )


class StepNotFinite(ValueError):
    """The loss or a gradient of a step is not finite.

    :ivar at: which step of the call, from 1.
    :ivar what: the rest of the message.
    """

    def __init__(self, at: int, what: str):
        super().__init__(f"At step {at} of the call {what}")
        self.at, self.what = at, what
