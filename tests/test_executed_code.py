"""Which code a pass runs, whose it is, and the names in it."""

import cProfile
import functools
import sys
import types

import pyro
import pyro.distributions as dist
import torch

from pyro_vi_ext.compiled import executed_code
from pyro_vi_ext.compiled.executed_code import ExecutedCode, file_of, imported_by, names_in
from pyro_vi_ext.models.gaussian_mixture import gaussian_mixture

OPTIONS, STEPS = types.SimpleNamespace(width=0.5), [1]


def helper(x):
    return x.mean() * OPTIONS.width


class Thing:
    def __mul__(self, other):
        return other + STEPS[0]


def model(x):
    """A docstring is no name."""
    pyro.sample("z", dist.Normal(0.0, 1.0))
    return [Thing() * helper(part) for part in x]


def watched(function, *args):
    executed = ExecutedCode(function)
    with executed.watched():
        function(*args)
    return executed


def test_own_code_is_found_whoever_calls_it():
    executed = watched(model, torch.ones(2))
    own = {code.co_name for code in executed.own}
    assert {"model", "helper", "__mul__"} <= own <= {"model", "helper", "__mul__", "<listcomp>"}
    assert all(found is globals() for found in executed.own.values())
    libraries = {code.co_name for code in executed.codes} - own
    assert {"sample", "__call__"} <= libraries  # of Pyro
    assert watched(functools.partial(model, torch.ones(2))).own.keys() == executed.own.keys()


def test_names():
    code = helper.__code__
    found, names, imported = names_in(code)
    assert found == {"OPTIONS"} and names.attributes == {"width"} and names.methods == {"mean"}
    assert not names.by_string and not names.asks and not imported
    found, names, _ = names_in(model.__code__)
    assert {"pyro", "dist", "Thing", "helper"} <= found and not names.by_string


def test_names_by_string():
    def asks(x):
        return getattr(x, "width") + hasattr(x, "height")  # noqa: B009

    _, names, _ = names_in(asks.__code__)
    assert {"width", "height"} <= names.by_string and names.asks
    executed = watched(asks, types.SimpleNamespace(width=1))
    assert executed.names[""].by_string == names.by_string


def test_names_of_inner_functions():
    def outer(x):
        return lambda: x.width * STEPS[0]

    found, names, _ = names_in(outer.__code__)
    assert found == {"STEPS"} and names.attributes == {"width"}


def test_imports():
    def imports():
        import json
        from json import decoder

        return json, decoder

    assert names_in(imports.__code__)[2] == {"json"}
    assert imported_by(imports.__code__, globals()) == [sys.modules["json"]]


def test_relative_imports():
    code = compile("from .compiled import refusal", "<string>", "exec")
    found = imported_by(code, {"__package__": "pyro_vi_ext"})
    assert found == [sys.modules["pyro_vi_ext.compiled"]]


def test_whose_code_it_is():
    executed = ExecutedCode()
    assert executed.package_of(__file__) == "" and executed.package_of("<stdin>") == ""
    assert executed.package_of(file_of(Thing)) == ""
    for library in (
        torch,
        pyro,
        functools,
        executed_code,
        sys.modules[gaussian_mixture.__module__],
    ):
        assert executed.package_of(file_of(library))
    assert executed.package_of(file_of(sys)) is None  # built in
    assert executed_code.is_pyro(executed.package_of(file_of(torch.nn.Linear)))
    assert not executed_code.is_pyro(executed.package_of(file_of(functools.partial)))


def test_code_made_by_exec_belongs_to_its_module():
    own = {"__name__": "__main__"}
    exec("def mine(x): return x", own)
    assert watched(own["mine"], 1).own
    library = {"__name__": "torch.nn.functional"}
    exec("def theirs(x): return x", library)
    assert not watched(library["theirs"], 1).own


def test_a_profiler_at_work_is_left_alone():
    profiler = cProfile.Profile()
    profiler.enable()
    before = sys.getprofile()
    executed = watched(model, torch.ones(2))
    assert sys.getprofile() is before and not executed.own
    profiler.disable()
    assert watched(model, torch.ones(2)).own and sys.getprofile() is None


def test_modules_that_a_pass_imports_first_are_not_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "imported_first.py").write_text("step = 1\ndef run(x): return x\n")
    monkeypatch.syspath_prepend(tmp_path)

    def imports(x):
        import imported_first

        return imported_first.run(x)

    assert {code.co_name for code in watched(imports, 1).own} == {"imports", "run"}
