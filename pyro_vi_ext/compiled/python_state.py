"""What the code of a pass finds outside of its arguments, watched for changes.

A graph holds the numbers that Python's code found when it was traced: an annealing factor in a
global, a width in a closure, the attribute of an object.
:mod:`~pyro_vi_ext.compiled.executed_code` knows which code was run and by what names it looks
things up. What these names stand for is compared in every step: globals, variables of closures,
attributes of all objects that can be reached from there by these names, elements of short lists
and dicts.

Not seen are the contents of arrays and of long lists, names that are put together at run time, and
what libraries keep to themselves.
"""

from __future__ import annotations

import functools
import gc
import itertools
import operator
from collections import deque
from types import (
    BuiltinFunctionType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)

import numpy as np
import torch
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger

from pyro_vi_ext.compiled.executed_code import (
    ExecutedCode,
    Names,
    file_of,
    imported_by,
    inner_codes,
    is_pyro,
    names_in,
)

__all__ = ["PythonState"]

_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_DATA = (*_PLAIN, torch.Tensor, torch.Generator, np.ndarray, Trace, BuiltinFunctionType)
_MADE = (FunctionType, MethodType, functools.partial, property, staticmethod, classmethod)
_OPEN = (Messenger, Reparam, torch.distributions.Distribution)  # part of how a model is written
_SIMPLE = (*_PLAIN, *_MADE)
_LONG = 64  # elements; more are data and no settings
_MOST = 5000  # places
_ABSENT = object()


class PythonState:
    """Everything that the executed code can look up, as it is now.

    :param executed: the code of a pass.
    :param roots: what the pass starts from: model, guide, objective, modules, arguments.
    """

    def __init__(self, executed: ExecutedCode, *roots):
        walk = _Walk(executed, roots)
        if walk.asks and walk.strings:  # getattr(options, name) with names from somewhere
            walk = _Walk(executed, roots, walk.strings)
        in_dicts = [place for place in walk.places if type(place[0]) is dict]
        others = [place for place in walk.places if type(place[0]) is not dict]
        self._about = [place[2:] for place in (*in_dicts, *others)]  # label, whether the user's
        self._tables, self._keys = [t for t, *_ in in_dicts], [key for _, key, *_ in in_dicts]
        self._others = [(table.get, key) for table, key, *_ in others]
        self._values = self._look()
        self._lists = [(found, len(found), [*found], *about) for found, *about in walk.lists]

    def __len__(self) -> int:
        """The number of names, attributes and elements that are compared."""
        return len(self._values) + sum(count for _, count, *_ in self._lists)

    def _look(self) -> list:
        tables, absent = self._tables, itertools.repeat(_ABSENT)
        in_dicts = map(dict.get, tables, self._keys, absent)
        return [*in_dicts, *[get(key, _ABSENT) for get, key in self._others]]

    def change(self) -> str | None:
        """What is not as it was, in words, or ``None``."""
        now = self._look()
        if not all(map(operator.is_, now, self._values)):
            for (label, _), one, other in zip(self._about, now, self._values, strict=True):
                if not _same(one, other):
                    return label
            self._values = now  # equal numbers, but others
        for found, count, values, label, _ in self._lists:
            if len(found) != count or not all(map(operator.is_, found, values)):
                if len(found) != count or not all(map(_same, found, values)):
                    return label
        return None

    def counted(self) -> str | None:
        """A number of the user's that is not what it was, in words, or ``None``."""
        for about, one, other in zip(self._about, self._look(), self._values, strict=True):
            if about[1] and _is_plain(one) and _is_plain(other) and not _same(one, other):
                return about[0]
        for found, _, values, label, own in self._lists:
            for one, other in zip(found, values, strict=False):
                if own and _is_plain(one) and _is_plain(other) and not _same(one, other):
                    return label
        return None


def _is_plain(value) -> bool:
    return issubclass(type(value), _PLAIN)


def _is_called(value) -> bool:
    return callable(value) and not issubclass(type(value), torch.Tensor)


def _same(one, other) -> bool:
    """Whether code that finds one does what it did with the other."""
    if one is other:
        return True
    if type(one) is not type(other) or not (type(one) in _PLAIN or isinstance(one, np.generic)):
        return False
    return one == other or (one != one and other != other)


class _Walk:
    """Looks for everything that executed code may find, from some roots.

    :ivar places: tables, keys, what to call them, and whether they are the user's.
    :ivar lists: lists, the keys and the values of dicts, what to call them, whose they are.
    :ivar strings: identifiers among the values.
    :ivar asks: whether attributes are looked up by such strings.
    """

    def __init__(self, executed: ExecutedCode, roots, by_string=()):
        self.executed = executed
        self.own_names = executed.names[""] | Names(by_string=set(by_string))
        self.asks, self.strings = self.own_names.asks, set()
        self.places: list[tuple] = []
        self.lists: list[tuple] = []
        self._num_elements = 0
        self._seen: dict[int, object] = {}
        self._watched: dict[tuple[int, str], object] = {}
        self._classes: dict[type, tuple[Names, bool]] = {}
        self._inside = False  # an object of torch or Pyro
        self._todo = deque((root, "an argument", False, False) for root in roots)
        for code, its_globals in executed.own.items():
            for name in sorted(names_in(code)[0]):
                if name in its_globals or name not in _builtins(its_globals):
                    self._watch(its_globals, name, "the global '{}'", True)
            for module in imported_by(code, its_globals):
                self._visit(module, "", True)
        self._walk()
        self._visit_unreached()

    def _walk(self) -> None:
        while self._todo and len(self.places) + self._num_elements < _MOST:
            *thing, self._inside = self._todo.popleft()
            self._look_into(*thing)

    def _visit_unreached(self) -> None:
        """Functions that only libraries know: registered, or made in a decorator."""
        reached = {x.__code__ for x in self._seen.values() if issubclass(type(x), FunctionType)}
        nested = {inner for code in self.executed.own for inner in inner_codes(code)}
        unreached = {c for c in self.executed.own if c.co_freevars} - reached - nested
        for thing in gc.get_referrers(*unreached) if unreached else ():
            if issubclass(type(thing), FunctionType) and thing.__code__ in unreached:
                self._visit(thing, "", True)
        self._walk()

    def _visit(self, thing, label: str, own: bool) -> None:
        self._todo.append((thing, label, own, self._inside))

    def _watch(self, table, key: str, label: str, own: bool) -> None:
        """A name, and what it stands for."""
        value = table.get(key, _ABSENT)
        library = issubclass(type(value), ModuleType) and self._package(value) != ""
        if (id(table), key) not in self._watched and not library:
            self._watched[id(table), key] = table
            self.places.append((table, key, label.format(key), own))
        self._visit(value, label.format(key), own)

    def _look_into(self, thing, label: str, own: bool) -> None:
        kind = type(thing)
        if kind is str and thing.isidentifier():
            self.strings.add(thing)
        if issubclass(kind, np.ndarray) and thing.size <= _LONG:
            self.lists.append((_Array(thing), label, own))
        if issubclass(kind, _DATA) or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if issubclass(kind, FunctionType):
            self._function(thing)
        elif issubclass(kind, MethodType):
            self._visit(thing.__func__, label, own)
            self._visit(thing.__self__, label, own)
        elif issubclass(kind, functools.partial):  # also every effect handler of Pyro
            if thing.keywords:
                self._elements(thing.keywords, label, own)
            for part in (thing.func, *thing.args):
                self._visit(part, label, own)
        elif issubclass(kind, operator.attrgetter):
            self.asks, names = True, thing.__reduce__()[1]
            self.strings.update(part for name in names for part in name.split("."))
        elif issubclass(kind, (staticmethod, classmethod)):
            self._visit(thing.__func__, label, own)
        elif issubclass(kind, property):
            self._visit(thing.fget, label, own)
        elif issubclass(kind, ModuleType):
            if self._package(thing) == "":
                self._named(vars(thing), self.own_names, f"'{{}}' of {thing.__name__}")
        elif issubclass(kind, type):
            self._class(thing)
        else:
            if issubclass(kind, (list, tuple, dict, set, frozenset, deque)):
                self._elements(thing, label, own)
            pyros = is_pyro(self._package(kind))
            if not (pyros and self._inside) or issubclass(kind, _OPEN):
                self._inside = self._inside or pyros
                self._object(thing)

    def _named(self, table, names: Names, label: str, own: bool = True) -> None:
        for name in sorted((names.attributes | names.by_string) & table.keys()):
            self._watch(table, name, label, own)
        for name in sorted(names.methods & table.keys()):
            if _is_called(table[name]):
                self._watch(table, name, label, own)

    def _function(self, function: FunctionType) -> None:
        code, name = function.__code__, function.__qualname__
        self._visit(getattr(function, "__wrapped__", None), "", True)
        if code not in self.executed.codes:
            return
        own = code in self.executed.own
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            cell = _Getter(cell, "cell_contents")
            if own:
                self._watch(cell, key, f"'{{}}' in the closure of {name}", True)
            else:  # a library does not assign to it, but it may be around a function of the user
                self._visit(cell.get(key), key, False)
        if own:
            self._named(vars(function), self.own_names, f"'{{}}' of {name}")
            for key in ("__code__", "__defaults__"):
                if getattr(function, key) is not None:
                    self._watch(_Getter(function, key), key, f"{{}} of {name}", True)
            if function.__kwdefaults__:
                self._elements(function.__kwdefaults__, f"a default of {name}", True)

    def _class(self, kind: type) -> None:
        if type(kind) is not type:
            self._visit(type(kind), "", True)
        for base in kind.__mro__[1:]:
            self._visit(base, "", True)
        own = self._package(kind) == ""
        for value in list(kind.__dict__.values()):
            if issubclass(type(value), _MADE):
                self._visit(value, "", own)
        if own:
            self._named(kind.__dict__, self._names_for(kind)[0], f"'{{}}' of {kind.__name__}")

    def _elements(self, found, label: str, own: bool) -> None:
        if len(found) > _LONG:
            return
        values = dict.values(found) if isinstance(found, dict) else found
        if not isinstance(found, (tuple, frozenset)):
            self.lists.append((values, label, own))
        if isinstance(found, dict):
            self.lists.append((found, label, own))
        self._num_elements += len(found)
        for value in list(values):
            self._visit(value, label, own)

    def _object(self, thing) -> None:
        kind = type(thing)
        names, own = self._names_for(kind)
        label = f"the attribute '{{}}' of a {kind.__name__}"
        self._visit(kind, "", own)
        for base in kind.__mro__:  # what the class has, the object may get
            for name, value in list(base.__dict__.items()):
                slot = issubclass(type(value), MemberDescriptorType) and own
                if slot and name in names.attributes | names.by_string:
                    self._watch(_Slot(thing), name, label, own)
        table = _attributes(thing)
        if table is None:
            return
        self._visit(table.get("__wrapped__"), "", own)
        if issubclass(kind, torch.nn.Module):
            self._module(table, names, label, own)
        elif own or not is_pyro(self._package(kind)):
            self._named(table, names, label, own)
        else:  # settings, but no caches
            kept = {n: v for n, v in table.items() if n[:1] != "_" or issubclass(type(v), _SIMPLE)}
            for name in sorted((names.attributes | names.methods) & kept.keys()):
                if name in names.attributes or _is_called(kept[name]):
                    self._watch(table, name, label, False)
        if own:
            self._named_absent(table, kind, label)

    def _named_absent(self, table, kind: type, label: str) -> None:
        """What ``hasattr`` may ask for, and numbers that so far only the class has."""
        names = self.own_names
        for name in names.by_string - table.keys():
            if name.isidentifier():
                self._watch(table, name, label, True)
        for base in kind.__mro__:
            for name in names.attributes & base.__dict__.keys() - table.keys():
                if _is_plain(base.__dict__[name]):
                    self._watch(table, name, label, True)

    def _module(self, table: dict, names: Names, label: str, own: bool) -> None:
        """Its parameters, buffers and training mode are looked at by programs."""
        for name, value in list(table.items()):
            kind = type(value)
            if issubclass(kind, torch.Tensor) or name in ("training", *_OF_MODULES):
                continue
            if name in ("_forward_hooks", "_forward_pre_hooks", "_pyro_samples"):
                if value:
                    self._inside = False
                    self._elements(value, label.format(name), own)
            elif own or issubclass(kind, _SIMPLE) or name == "_model":
                found = names.attributes | names.by_string
                if name in found or (name in names.methods and _is_called(value)):
                    self._watch(table, name, label, own)

    def _names_for(self, kind: type) -> tuple[Names, bool]:
        """The names by which code may look for attributes of a class, and whether it is own."""
        if kind not in self._classes:
            known, own = self.executed.names, self._package(kind) == ""
            names = Names() | self.own_names
            for base in kind.__mro__:
                package, file = self._package(base), file_of(base)
                if package:
                    names.add(known.get(file if own else package, Names()))
            self._classes[kind] = names, own
        return self._classes[kind]

    def _package(self, thing) -> str | None:
        return self.executed.package_of(file_of(thing))


_OF_MODULES = ("_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_name", "_pyro_context")


def _attributes(thing) -> dict | None:
    """The ``__dict__`` of an object."""
    try:
        table = thing.__dict__
    except Exception:  # of objects that are made to be odd
        return None
    return table if type(table) is dict else None


def _builtins(its_globals: dict):
    found = its_globals.get("__builtins__", {})
    return vars(found) if issubclass(type(found), ModuleType) else found


class _Getter:
    """One attribute of a thing, looked up like an entry of a dict."""

    def __init__(self, thing, name: str):
        self._thing, self._name = thing, name

    def get(self, key, default=None):
        try:
            return getattr(self._thing, self._name)
        except ValueError:  # a variable of a closure that is not assigned yet
            return default


class _Array:
    """The numbers of a small array."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def __len__(self):
        return self._array.size

    def __iter__(self):
        return iter(self._array.ravel().tolist())


class _Slot:
    """An object without ``__dict__``, as a table of its slots."""

    def __init__(self, thing):
        self._thing = thing

    def get(self, key, default=None):
        return getattr(self._thing, key, default)
