"""What the code of model, guide and objective finds outside of its arguments, watched for changes.

A graph holds the numbers that Python's code found when it was traced: an annealing factor in a
global, a width in a closure, the attribute of an object. Code says by name what it looks up. So
what these names stand for is compared in every step: globals, variables of closures, attributes of
objects, classes and Python modules, elements of short lists and dicts, in all functions that can be
reached, but for those of libraries. A name that is put together at run time (``getattr``) and
the contents of arrays and long lists are not seen.
"""

from __future__ import annotations

import dis
import functools
import operator
import os
import sys
import sysconfig
import types
from types import CodeType, FunctionType, MethodType, ModuleType

import pyro
import torch
from pyro.nn import PyroModule

__all__ = ["PythonState"]

_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_GIVEN = (FunctionType, MethodType, functools.partial)  # to an object of a library
_LONG = 64  # elements; more are data and no settings
# What runs without being named in code.
_IMPLICIT = {"__call__", "forward", "model", "_model", "guide"}


class PythonState:
    """Everything that can be looked up from ``roots``, as it is now.

    :param roots: functions, methods, modules, objectives, effect handlers around them. What they
        are made of belongs to the user, even where it is installed like a library.
    """

    def __init__(self, *roots):
        names: set[str] = set()
        while True:  # until nothing that is reached uses a new name
            walk = _Walk(names | _IMPLICIT, roots)
            if walk.names <= names:
                break
            names |= walk.names
        in_dicts = [place for place in walk.places if type(place[0]) is dict]
        others = [place for place in walk.places if type(place[0]) is not dict]
        self._labels = [label for _, _, label in (*in_dicts, *others)]
        self._tables, self._keys = [t for t, _, _ in in_dicts], [key for _, key, _ in in_dicts]
        self._others = [(table.get, key) for table, key, _ in others]
        self._values = self._look()
        self._lists = [(found, len(found), [*found], label) for found, label in walk.lists]

    def __len__(self) -> int:
        """The number of names, attributes and elements that are compared."""
        return len(self._values) + sum(count for _, count, _, _ in self._lists)

    def _look(self) -> list:
        return [*map(dict.get, self._tables, self._keys), *(get(key) for get, key in self._others)]

    def change(self) -> str | None:
        """What is not as it was, in words, or ``None``."""
        now = self._look()
        if not all(map(operator.is_, now, self._values)):
            for label, one, other in zip(self._labels, now, self._values, strict=True):
                if not _same(one, other):
                    return label
            self._values = now  # equal numbers, but others
        for found, count, values, label in self._lists:
            if len(found) != count or not all(map(operator.is_, found, values)):
                if len(found) != count or not all(map(_same, found, values)):
                    return label
        return None


def _same(one, other) -> bool:
    """Whether code that finds one does what it did with the other."""
    if one is other:
        return True
    if type(one) is not type(other) or not isinstance(one, _PLAIN):
        return False
    return one == other or (one != one and other != other)


class _Walk:
    """Looks for what is found by ``attributes``, names that code uses, from some roots.

    :ivar names: those that the code uses which was reached.
    :ivar places: tables, keys, and what to call them.
    :ivar lists: lists, the keys and the values of dicts, and what to call them.
    """

    def __init__(self, attributes: set[str], roots):
        self.attributes, self.names = attributes, set()
        self.places: list[tuple] = []
        self.lists: list[tuple] = []
        self._seen: dict[int, object] = {}
        self._watched: set[tuple[int, str]] = set()
        self._own = tuple(filter(None, map(_package_of, roots)))
        self._todo = [(root, "") for root in reversed(roots)]
        while self._todo:
            self._look_into(*self._todo.pop())

    def _visit(self, thing, label: str) -> None:
        self._todo.append((thing, label))

    def _look_into(self, thing, label: str) -> None:
        if isinstance(thing, (*_PLAIN, torch.Tensor)) or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, FunctionType):
            self._function(thing)
        elif isinstance(thing, MethodType):
            self._visit(thing.__func__, label)
            self._visit(thing.__self__, label)
        elif isinstance(thing, functools.partial):  # also every effect handler of Pyro
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                self._visit(part, label)
        elif isinstance(thing, (property, staticmethod, classmethod)):
            self._visit(getattr(thing, "fget", None) or getattr(thing, "__func__", None), label)
        elif isinstance(thing, ModuleType):
            if self._is_own(_file(thing)):
                self._named(vars(thing), f"'{{}}' of {thing.__name__}")
        elif isinstance(thing, type):
            if self._is_own(_file_of_class(thing)):
                self._named(thing.__dict__, f"'{{}}' of {thing.__name__}")
            for base in thing.__mro__[1:]:
                self._visit(base, label)
        elif isinstance(thing, (list, tuple, dict)):
            self._elements(thing, label)
        else:
            self._object(thing)

    def _watch(self, table, key: str, label: str) -> None:
        """A name, and what it stands for."""
        value = table.get(key)
        if (id(table), key) not in self._watched and not self._is_of_library(value):
            self._watched.add((id(table), key))
            self.places.append((table, key, label.format(key)))
        self._visit(value, label.format(key))

    def _named(self, table, label: str) -> None:
        for name in sorted(self.attributes & table.keys()):
            self._watch(table, name, label)

    def _function(self, function: FunctionType) -> None:
        own = self._is_own(function.__code__.co_filename)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            cell = _Cell(cell)
            if own:
                self._watch(cell, name, f"'{{}}' in the closure of {function.__qualname__}")
            else:  # a library does not assign to it, but it may be around a function of the user
                self._visit(cell.get(name), name)
        self._visit(getattr(function, "__wrapped__", None), "")
        if not own:
            return
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(value, f"a default of {function.__qualname__}")
        global_names, names = _names_in(function.__code__)
        self.names |= names
        for name in global_names & function.__globals__.keys():
            self._watch(function.__globals__, name, "the global '{}'")

    def _elements(self, found, label: str) -> None:
        if len(found) > _LONG:
            return
        values = found.values() if isinstance(found, dict) else found
        if not isinstance(found, tuple):
            self.lists.append((values, label))
        if isinstance(found, dict):
            self.lists.append((found, label))
        for value in values:
            self._visit(value, label)

    def _object(self, thing) -> None:
        kind, table = type(thing), getattr(thing, "__dict__", None)
        if not isinstance(table, dict):
            return
        label = f"the attribute '{{}}' of a {kind.__name__}"
        own = self._is_own(_file_of_class(kind))
        self._visit(kind, "")
        for name, value in list(table.items()):
            if isinstance(thing, torch.nn.Module) and isinstance(value, (*_PLAIN, torch.Tensor)):
                continue  # Program looks at these
            if name in self.attributes or not own and isinstance(value, (*_PLAIN, *_GIVEN)):
                self._watch(table, name, label)
        for base in kind.__mro__ if own else ():  # the class has a value, the object may get one
            for name in self.attributes & base.__dict__.keys() - table.keys():
                if isinstance(base.__dict__[name], _PLAIN):
                    self._watch(table, name, label)
        if isinstance(thing, PyroModule):
            for name, prior in table["_pyro_samples"].items():  # PyroSample(lambda self: ...)
                if isinstance(prior, _GIVEN):
                    self._visit(prior, name)

    def _is_own(self, file: str | None) -> bool:
        """Whether code in a file belongs to the user."""
        if file is None:
            return False
        path = os.path.abspath(file)
        return path.startswith(self._own) or not path.startswith(_LIBRARIES)

    def _is_of_library(self, value) -> bool:
        if isinstance(value, ModuleType):
            return not self._is_own(_file(value))
        if isinstance(value, type):
            return not self._is_own(_file_of_class(value))
        if isinstance(value, FunctionType):
            return not self._is_own(value.__code__.co_filename)
        return isinstance(value, types.BuiltinFunctionType)


class _Cell:
    """A variable of a closure, looked up like an entry of a dict."""

    def __init__(self, cell):
        self._cell = cell

    def get(self, key, default=None):
        try:
            return self._cell.cell_contents
        except ValueError:  # not assigned yet
            return default


@functools.lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> tuple[set[str], set[str]]:
    """Names of globals that code uses, with the functions in it, and those of attributes."""
    instructions = list(dis.get_instructions(code))
    global_names = {i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names = set(code.co_names) | {value for value in code.co_consts if isinstance(value, str)}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more, attributes = _names_in(inner)
            global_names, names = global_names | more, names | attributes
    return global_names, names


# --- whose code it is ------------------------------------------------------------------------


def _folders(*files: str) -> tuple[str, ...]:
    return tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in files)


_PYRO = _folders(torch.__file__, pyro.__file__, os.path.dirname(__file__))
_INSTALLED = tuple(sysconfig.get_path(kind) + os.sep for kind in ("purelib", "platlib"))
_LIBRARIES = (*_PYRO, *_INSTALLED, *_folders(os.__file__))


def _file(module: ModuleType | None) -> str | None:
    """Where its code is; ``""`` for the running program, ``None`` for what is built in."""
    if module is None or module.__name__ == "__main__":
        return ""
    return getattr(module, "__file__", None)


def _file_of_class(kind: type) -> str | None:
    return _file(sys.modules.get(kind.__module__))


def _package_of(root) -> str | None:
    """The installed package that a model or guide comes from, if it is not Pyro or ours."""
    while isinstance(root, functools.partial):
        root = root.func
    code = getattr(getattr(root, "__func__", root), "__code__", None)
    path = os.path.abspath(code.co_filename if code else _file_of_class(type(root)) or "")
    for folder in _INSTALLED:
        if path.startswith(folder) and not path.startswith(_PYRO):
            return folder + path[len(folder) :].split(os.sep)[0]
    return None
