"""Which Python code a pass has run, and by what names it looks things up.

A pass is run once under Python's profiling hook, which is told of every function that is entered,
whoever calls it: operators, hooks, registries, decorators. The names in its code say what it may
have found outside of its arguments; :mod:`~pyro_vi_ext.compiled.python_state` looks there.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib.util
import os
import sys
import sysconfig
from collections import defaultdict
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType

import pyro
import torch

__all__ = [
    "ExecutedCode",
    "Names",
    "file_of",
    "imported_by",
    "inner_codes",
    "is_pyro",
    "names_in",
]


@dataclass
class Names:
    """The names that some code uses.

    :ivar attributes: whose values it may use.
    :ivar methods: those that are called, and are of no interest unless a function is found there.
    :ivar by_string: names that ``getattr`` and ``hasattr`` may be asked for.
    :ivar asks: whether they are used at all.
    """

    attributes: set[str] = field(default_factory=set)
    methods: set[str] = field(default_factory=set)
    by_string: set[str] = field(default_factory=set)
    asks: bool = False

    def add(self, other: Names) -> None:
        self.attributes |= other.attributes
        self.methods |= other.methods
        self.by_string |= other.by_string
        self.asks |= other.asks

    def __or__(self, other: Names) -> Names:
        found = Names()
        found.add(self)
        found.add(other)
        return found


class ExecutedCode:
    """All code that was run while it was watched.

    :param roots: model and guide; what is installed together with them belongs to the user, as all
        that is not installed does.
    :ivar own: code of the user with its globals; the rest belongs to libraries.
    :ivar names: those that code uses, by package (``""`` for the user's) and by file.
    """

    def __init__(self, *roots):
        self._own_packages = {"", *map(_package_of_root, roots)}
        self.own: dict[CodeType, dict] = {}
        self.codes: set[CodeType] = set()
        self.names: dict[str, Names] = defaultdict(Names)

    @contextlib.contextmanager
    def watched(self):
        """Notes what is run. Nothing is noted while another profiler is at work."""
        if sys.getprofile() is not None:
            yield
            return
        found: dict[CodeType, dict] = {}

        def note(frame, event, argument):
            if event == "call" and frame.f_code not in found:
                found[frame.f_code] = frame.f_globals

        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)
            for code, its_globals in found.items():
                self._add(code, its_globals)

    def _add(self, code: CodeType, its_globals: dict) -> None:
        file = _source(code, its_globals)
        if code in self.codes or file is None or code.co_name == "<module>":
            return
        self.codes.add(code)
        package, (_, names, _) = self.package_of(file), names_in(code)
        if not package:
            self.own[code] = its_globals
        for where in (package, os.path.abspath(file)):
            self.names[where].add(names)

    def package_of(self, file: str | None) -> str | None:
        """The library that a file belongs to, ``""`` if it is the user's, ``None`` without one."""
        if file is None:
            return None
        package = _package_of(file)
        return "" if package in self._own_packages else package


@functools.lru_cache(maxsize=8192)
def names_in(code: CodeType) -> tuple[frozenset[str], Names, frozenset[str]]:
    """Names of the globals that code uses, of attributes, and of modules that it imports."""
    found, names, imported, strings = set(), Names(), set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            found.add(step.argval)
        elif step.opname == "LOAD_METHOD":
            names.methods.add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_SUPER_ATTR"):
            method = sys.version_info >= (3, 12) and step.arg & 1
            (names.methods if method else names.attributes).add(step.argval)
        elif step.opname == "LOAD_CONST" and isinstance(step.argval, str):
            strings.add(step.argval)
        elif step.opname == "LOAD_CONST" and isinstance(step.argval, (tuple, frozenset)):
            strings.update(value for value in step.argval if isinstance(value, str))
        elif step.opname == "IMPORT_NAME":
            imported.add(step.argval)
        elif step.opname == "IMPORT_FROM":
            names.attributes.add(step.argval)
    if (found | names.attributes | names.methods) & _BY_STRING:
        names.by_string |= strings
        names.asks = True
    for inner in inner_codes(code):
        more, attributes, modules = names_in(inner)
        found |= more
        names.add(attributes)
        imported |= modules
    return frozenset(found), names, frozenset(imported)


def inner_codes(code: CodeType) -> list[CodeType]:
    """Code of the functions that some code makes."""
    return [value for value in code.co_consts if isinstance(value, CodeType)]


_BY_STRING = {"getattr", "hasattr", "attrgetter", "vars", "__dict__", "__getattribute__"}


def imported_by(code: CodeType, its_globals: dict) -> list:
    """The modules that code imports when it runs, those in memory."""
    package = its_globals.get("__package__") or ""
    found = []
    for name in names_in(code)[2]:
        found += [sys.modules.get(name)]
        with contextlib.suppress(ImportError, ValueError):
            found += [sys.modules.get(importlib.util.resolve_name("." + name, package))]
    return [module for module in found if module is not None]


# --- whose code it is ------------------------------------------------------------------------


def _source(code: CodeType, its_globals: dict) -> str | None:
    """The file of some code, or of the module that it was made for by ``exec``."""
    if not code.co_filename.startswith("<"):
        return code.co_filename
    name = its_globals.get("__name__", "__main__")
    module = sys.modules.get(name)
    if name in ("__main__", "builtins"):
        return ""
    return None if module is None else file_of(module)


def _folder(file: str) -> str:
    return os.path.dirname(os.path.abspath(file)) + os.sep


@functools.cache
def _pyro_folders() -> tuple[str, ...]:
    """Of torch, Pyro and this package, whose parts may lie in several places."""
    found = [*torch.__path__, *pyro.__path__]
    for name in ("pyro_vi_ext", "pyro_vi_ext.guides", "pyro_vi_ext.models"):
        found += importlib.util.find_spec(name).submodule_search_locations
    return tuple(os.path.abspath(folder) + os.sep for folder in found)


_INSTALLED = tuple(sysconfig.get_path(kind) + os.sep for kind in ("purelib", "platlib"))
_STANDARD = _folder(os.__file__)


def is_pyro(package: str | None) -> bool:
    """Whether a library is torch, Pyro or this package."""
    return package in _pyro_folders()


@functools.lru_cache(maxsize=8192)
def _package_of(file: str) -> str:
    path = os.path.abspath(file)
    for folder in _pyro_folders():
        if path.startswith(folder):
            return folder
    for folder in (*_INSTALLED, _STANDARD):
        if path.startswith(folder):
            return folder + path[len(folder) :].split(os.sep)[0]
    return ""


def file_of(thing) -> str | None:
    """Where the code of a Python module or class is; ``""`` for the running program."""
    if isinstance(thing, type):
        name = thing.__dict__.get("__module__")
        thing = sys.modules.get(name) if isinstance(name, str) else None
    name = "__main__" if thing is None else vars(thing).get("__name__")
    return "" if name == "__main__" else vars(thing).get("__file__")


def _package_of_root(root) -> str:
    while isinstance(root, functools.partial):
        root = root.func
    root = root.__func__ if isinstance(root, MethodType) else root
    made = isinstance(root, FunctionType)
    file = root.__code__.co_filename if made else file_of(type(root))
    package = _package_of(file) if file else ""
    return package if package.startswith(_INSTALLED) and not is_pyro(package) else ""
