"""The compiled steps of one pair, one for each kind of arguments, made when first needed."""

from __future__ import annotations

import logging
import operator

import pyro.poutine as poutine
import torch
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger

from pyro_vi_ext.compiled.arguments import Arguments
from pyro_vi_ext.compiled.program import Program
from pyro_vi_ext.compiled.refusal import CannotCompile
from pyro_vi_ext.compiled.stock_pass import StockPass
from pyro_vi_ext.compiled.verification import verify

__all__ = ["Programs"]

_TRAINING = operator.attrgetter("training")

logger = logging.getLogger("pyro_vi_ext.compiled")


class Programs:
    """Looks up the program for arguments; makes it, and makes it again when it is out of date.

    :param max_traces: how many graphs may be made.
    """

    def __init__(self, stock: StockPass, optim: PyroOptim | None, backend: str, max_traces: int):
        self.stock, self.optim, self.backend = stock, optim, backend
        self.max_traces, self.num_traces = max_traces, 0
        self.known: dict[tuple, Program] = {}
        self._modules = stock.all_modules()
        self._latest: tuple = None, None, None  # arguments, modes, and the key of both

    def find(self, args: tuple, kwargs: dict, num_steps: int = 1) -> tuple[Program, Arguments]:
        """The program for a call that will take ``num_steps`` steps, checked when that is due.

        :raises CannotCompile: if there can be none.
        """
        if not all(isinstance(h, TraceMessenger) and h.param_only for h in _PYRO_STACK):
            raise CannotCompile(
                "The step is called inside effect handlers of Pyro "
                f"({type(_PYRO_STACK[-1]).__name__}), which a compiled step does not see. Put them "
                "around the model or the guide instead."
            )
        if not torch.is_grad_enabled():
            raise CannotCompile("The step is called inside torch.no_grad: it has no gradients.")
        arguments = self._arguments(args, kwargs)
        modes = (
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            *map(_TRAINING, self._modules),
        )
        if arguments is self._latest[0] and modes == self._latest[1]:
            key = self._latest[2]
        else:
            key = (arguments.key, *modes)
            self._latest = arguments, modes, key
        program = self.known.get(key)
        reason = "the first step" if not self.known else "arguments of another kind"
        if program is not None:
            reason = program.why_stale()
            if reason is None:
                program.num_steps += num_steps
                if program.num_steps >= program.next_check:
                    program.next_check = _next_check(program.num_steps)
                    self._verify(key, args, kwargs, arguments)
                return program, arguments
        program = self.known[key] = self._make(args, kwargs, arguments, reason)
        self._verify(key, args, kwargs, arguments)
        self._report(program, reason)
        program.num_steps += num_steps
        program.next_check = _next_check(program.num_steps)
        return program, arguments

    def _arguments(self, args: tuple, kwargs: dict) -> Arguments:
        """The arguments, taken apart; those of the latest call if they are the same tensors."""
        latest = self._latest[0]
        if latest is not None and not kwargs and latest.are(args):
            return latest
        return Arguments(args, kwargs)

    def _verify(self, key, args, kwargs, arguments: Arguments, loop: bool = False) -> None:
        """Compare with plain steps; a program that differs is not used again."""
        program = self.known[key]
        try:
            with poutine.block():
                verify(program, args, kwargs, arguments.tensors, loop)
        except BaseException:
            del self.known[key]
            raise
        self._modules = self.stock.all_modules()
        program.take_guards()  # a plain pass may have changed what Python keeps

    def _make(self, args, kwargs, arguments: Arguments, reason: str) -> Program:
        if self.num_traces >= self.max_traces:
            raise CannotCompile(
                f"The step has been traced {self.num_traces} times, and would be again because of "
                f"{reason}. Let arguments keep their shapes (drop_last=True in a DataLoader, pad), "
                "give numbers that change from step to step as tensors, and hold changing state in "
                "tensors that are updated in place; or raise max_traces."
            )
        self.num_traces += 1
        with poutine.block():
            leaves = self.stock.find_leaves(args, kwargs)
            if not any(leaf.requires_grad for leaf in leaves.values()):
                raise CannotCompile("Model and guide have no parameters: nothing is to be trained.")
            try:
                program = Program(self.stock, arguments, self.optim, self.backend, leaves)
                program.compile()
            except CannotCompile:
                raise
            except Exception as error:
                kind = type(error).__name__
                raise CannotCompile(
                    f"The step has no graph that {self.backend} takes ({kind}: {error})."
                ) from error
        for name in program.capture.trained:  # as Pyro leaves it, and programs of other kinds see
            leaf = leaves[name]
            if self.optim is not None and leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
                self.known.clear()
        return program

    def _report(self, program: Program, reason: str) -> None:
        logger.log(
            logging.INFO if self.num_traces == 1 else logging.WARNING,
            "traced a step of %d operations in %.1f s, compiled it in %.1f s (%d of at most %d), "
            "because of %s",
            program.num_operations,
            program.trace_seconds,
            program.compile_seconds,
            self.num_traces,
            self.max_traces,
            reason,
        )

    def compile_loop(self, program: Program, args: tuple, kwargs: dict, arguments: Arguments):
        """Make the code of the loop, and check it beside plain steps."""
        if not program.has_loop or program.loop_is_compiled:
            return
        key = next(key for key, known in self.known.items() if known is program)
        try:
            program.compile_loop()
            self._verify(key, args, kwargs, arguments, loop=True)
        except Exception as error:  # single steps are right all the same
            logger.warning("steps are run one by one, without a compiled loop: %s", error)
            program.has_loop = False
            self.known[key] = program


def _next_check(num_steps: int) -> int:
    """When to compare with a plain step again: at 16, 64, 256, ... steps."""
    return 4 ** max(2, num_steps.bit_length() // 2 + num_steps.bit_length() % 2)
