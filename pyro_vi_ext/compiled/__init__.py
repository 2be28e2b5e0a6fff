"""Compiled steps: a whole step of ``SVI`` as one graph. See docs/fast.md."""

from pyro_vi_ext.compiled.compile_objective import compile_objective
from pyro_vi_ext.compiled.compiled_svi import CompiledSVI
from pyro_vi_ext.compiled.refusal import CannotCompile

__all__ = ["CannotCompile", "CompiledSVI", "compile_objective"]
