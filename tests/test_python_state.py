"""What code finds outside of its arguments: each kind of place changed once, and other places."""

import argparse
import builtins
import collections
import contextlib
import functools
import operator
import sys
import types
from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch.distributions import AffineTransform, biject_to, constraints

from pyro_vi_ext.compiled import python_state
from pyro_vi_ext.compiled.executed_code import ExecutedCode
from pyro_vi_ext.compiled.python_state import PythonState

X = torch.ones(3)
FACTOR = 0.5
DATA = torch.ones(3)
WIDTHS = [0.5, [1.0, 2.0]]
TABLE = {"width": 0.5, "deep": {"width": 1.0}}
OPTIONS = argparse.Namespace(width=0.5, unused=1.0, inner=argparse.Namespace(width=0.5))
settings = types.ModuleType("settings")
settings.__file__ = __file__
settings.width, settings.unused = 0.5, 1.0
loss, mean = 0.1, 0.2  # names of methods that models use, and of nothing else


@dataclass
class Options:
    width: float = 0.5
    unused: float = 1.0
    parts: list = field(default_factory=lambda: [Part()])


@dataclass
class Width:
    width: float = 0.5


class Part:
    width = 0.5

    def scaled(self):
        return self.width * FACTOR


class Base:
    strength = 0.5


class Experiment(Base):
    def __init__(self):
        self.width, self.num_steps, self.options = 0.5, 0, Options()

    def model(self, x):
        width = self.strength * self.width * self.options.width
        width = width * self.options.parts[0].scaled() * self.doubled
        return dist.Normal(0.0, width)

    @property
    def doubled(self):
        return 2 * WIDTHS[0]

    def count(self):
        self.num_steps += 1


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.options, self.power = Options(), 2.0
        self.prior = PyroSample(lambda self: dist.Normal(0.0, FACTOR))
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return x**self.power * self.options.width + helper(x)


class Callable:
    def __init__(self):
        self.width = 0.5

    def __call__(self, x):
        return dist.Normal(0.0, self.width)


def helper(x):
    return x.mean() * FACTOR


def uses_global(x):
    return pyro.sample("z", dist.Normal(0.0, FACTOR))


def uses_helper(x):
    return [helper(part) for part in x]


def uses_nested(x):
    return list(map(lambda part: part * FACTOR, x))


def uses_data(x):
    return x + DATA


def uses_lists(x):
    return x * WIDTHS[0] * TABLE["deep"]["width"]


def uses_options(x):
    return x * OPTIONS.width + getattr(OPTIONS.inner, "width")  # noqa: B009


def uses_settings(x):
    return x * settings.width


def uses_class(x):
    return x * Part.width


def state_of(*roots, run=None):
    """What the roots find when they are called, or when something else is."""
    executed = ExecutedCode(*roots)
    with executed.watched():
        for root in [run] if run else roots:
            root(X)
    return PythonState(executed, *roots)


def refill(table, entries):
    table.clear()
    table.update(entries)


@pytest.fixture(autouse=True)
def as_before():
    """Lists and dicts as they were, afterwards."""
    table = dict(TABLE)
    yield
    refill(TABLE, table)
    WIDTHS[:] = [0.5, WIDTHS[1]]
    WIDTHS[1][:] = [1.0, 2.0]


def set_in(table, key, value):
    if isinstance(table, list):
        return lambda monkeypatch: table.__setitem__(key, value)
    return lambda monkeypatch: monkeypatch.setitem(table, key, value)


def set_of(thing, key, value):
    return lambda monkeypatch: monkeypatch.setattr(thing, key, value)


HERE = sys.modules[__name__]
TO_FACTOR, NEW_FACTOR = set_of(HERE, "FACTOR", 0.6), "the global 'FACTOR'"
CHANGES = {
    "global": (uses_global, TO_FACTOR, NEW_FACTOR),
    "global of a helper": (uses_helper, TO_FACTOR, NEW_FACTOR),
    "global of a function in it": (uses_nested, TO_FACTOR, NEW_FACTOR),
    "a helper": (uses_helper, set_of(HERE, "helper", lambda x: x), "the global 'helper'"),
    "another kind of number": (uses_global, set_of(HERE, "FACTOR", 1), NEW_FACTOR),
    "data": (uses_data, set_of(HERE, "DATA", torch.ones(3)), "the global 'DATA'"),
    "element": (uses_lists, set_in(WIDTHS, 0, 0.6), "the global 'WIDTHS'"),
    "element of an element": (uses_lists, set_in(WIDTHS[1], 1, 0.6), "the global 'WIDTHS'"),
    "more elements": (uses_lists, set_of(HERE, "WIDTHS", [0.5, 1.0]), "the global 'WIDTHS'"),
    "entry": (uses_lists, set_in(TABLE, "width", 0.6), "the global 'TABLE'"),
    "entry of an entry": (uses_lists, set_in(TABLE["deep"], "width", 0.6), "the global 'TABLE'"),
    "new entry": (uses_lists, set_in(TABLE, "another", 0.6), "the global 'TABLE'"),
    "namespace": (uses_options, set_of(OPTIONS, "width", 0.6), "'width' of a Namespace"),
    "by getattr": (uses_options, set_of(OPTIONS.inner, "width", 1), "'width' of a Namespace"),
    "Python module": (uses_settings, set_of(settings, "width", 0.6), "'width' of settings"),
    "class": (uses_class, set_of(Part, "width", 0.6), "'width' of Part"),
    "partial": (functools.partial(uses_global), TO_FACTOR, NEW_FACTOR),
    "handler": (poutine.mask(uses_global, mask=True), TO_FACTOR, NEW_FACTOR),
    "decorator of Pyro": (config_enumerate(uses_global), TO_FACTOR, NEW_FACTOR),
    "cached": (functools.lru_cache(uses_global), TO_FACTOR, NEW_FACTOR),
    "function of an automatic guide": (AutoNormal(uses_global), TO_FACTOR, NEW_FACTOR),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_named(case, monkeypatch):
    root, change, words = CHANGES[case]
    state = state_of(root)
    assert state.change() is None and len(state)
    change(monkeypatch)
    assert words in (state.change() or "nothing")


OWNERS = {
    "attribute": lambda e: setattr(e, "width", 0.6),
    "of a base": lambda e: setattr(Base, "strength", 0.6),
    "of an object in it": lambda e: setattr(e.options, "width", 0.6),
    "of an object in its list": lambda e: setattr(e.options.parts[0], "width", 0.6),
    "of another method": lambda e: setattr(HERE, "FACTOR", 0.6),
    "of a property": lambda e: WIDTHS.__setitem__(0, 0.6),
    "an object": lambda e: setattr(e, "options", Options()),
    "removed": lambda e: delattr(e, "width"),
}


@pytest.mark.parametrize("change", OWNERS.values(), ids=OWNERS)
def test_methods(change, monkeypatch):
    for thing, name in ((HERE, "FACTOR"), (Base, "strength")):
        monkeypatch.setattr(thing, name, getattr(thing, name))  # as before, afterwards
    experiment = Experiment()
    state = state_of(experiment.model)
    experiment.count()
    experiment.options.unused = 2.0
    assert state.change() is None
    change(experiment)
    assert state.change() is not None


def test_closures():
    width = 0.5

    def model(x):
        return dist.Normal(later, width)

    def attempt(x):
        with contextlib.suppress(NameError):
            model(x)

    state = state_of(model, run=attempt)
    assert state.change() is None  # a variable without a value is one too
    later = 1.0
    assert "'later' in the closure" in state.change()
    state = state_of(model)
    width = 0.6
    assert "'width' in the closure of" in state.change()


def test_handlers_and_objectives():
    model = poutine.scale(uses_global, scale=0.5)
    state = state_of(model)
    messenger = next(p for p in (*model.args, *model.keywords.values()) if hasattr(p, "scale"))
    messenger.scale = 0.6
    assert "'scale' of a ScaleMessenger" in state.change()


def uses_data_and_parameter(x):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


class Tempered(Trace_ELBO):
    """Its own attributes, and those that its base reads."""

    def __init__(self):
        super().__init__()
        self.unread, self.options = 1.0, {"strength": 0.5}

    def differentiable_loss(self, *args):
        return self.options["strength"] * super().differentiable_loss(*args)


SET = {
    "alpha": (RenyiELBO, lambda o: setattr(o, "alpha", 0.6), "'alpha' of a RenyiELBO"),
    "particles": (Tempered, lambda o: setattr(o, "num_particles", 3), "'num_particles' of a"),
    "of a subclass": (Tempered, lambda o: o.options.update(strength=1), "'options' of a Tempered"),
}


@pytest.mark.parametrize("case", SET)
def test_objectives(case):
    make, change, words = SET[case]
    objective = make(alpha=0.5, num_particles=2) if make is RenyiELBO else make()
    model = uses_data_and_parameter
    entry = getattr(objective, "differentiable_loss", objective.loss_and_grads)
    loss = lambda x: entry(model, model, x)  # noqa: E731
    state = state_of(model, objective, run=loss)
    objective.unread = 2.0
    assert state.change() is None
    change(objective)
    assert words in state.change()


def test_objects_that_are_called():
    model = Callable()
    state = state_of(model)
    model.width = 0.6
    assert "'width' of a Callable" in state.change()


def test_modules(monkeypatch):
    """Their tensors are looked at by programs, what they hold besides is here."""
    net = Net()
    state = state_of(net)
    net.unread, net.shift = 3.0, torch.zeros(2)
    assert state.change() is None
    net.power = 3.0
    assert "'power' of a Net" in state.change()
    state = state_of(net)
    net.options.width = 0.6
    assert "'width' of a Options" in state.change()
    state = state_of(net)
    monkeypatch.setattr(HERE, "FACTOR", 0.6)  # by forward and by the prior
    assert NEW_FACTOR in state.change()


def layer_with(prior):
    layer = PyroModule[torch.nn.Linear](3, 1)
    layer.weight = PyroSample(prior)
    return layer


def test_the_prior_of_a_module(monkeypatch):
    layer = layer_with(lambda self: dist.Normal(0.0, FACTOR).expand([1, 3]).to_event(2))
    state = state_of(layer)
    layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    assert "'_pyro_samples'" in state.change()
    layer = layer_with(lambda self: dist.Normal(0.0, FACTOR).expand([1, 3]).to_event(2))
    state = state_of(layer)
    monkeypatch.setattr(HERE, "FACTOR", 0.6)
    assert NEW_FACTOR in state.change()


class Scaled(dist.Normal):
    """A distribution of the user's, with settings of the class, made by an operator."""

    strength = 0.5

    def log_prob(self, value):
        return self.strength * FACTOR * super().log_prob(value)


class Made:
    def __mul__(self, other):
        return other * FACTOR

    def __enter__(self):
        return WIDTHS[0]

    def __exit__(self, *exc_info):
        pass


class Slots:
    __slots__ = ("unread", "width")

    def __init__(self):
        self.width, self.unread = 0.5, 1.0


class Like(collections.UserDict):
    """Configuration as libraries make it."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


def uses_set(x):
    return x * (0.5 in CHOICES)


def uses_import(x):
    import their_settings

    return x * their_settings.width


OBSERVED = {"z": torch.tensor(0.5)}
MADE, SLOTS, LIKE, CHOICES = Made(), Slots(), Like(width=0.5), {0.5, 1.0}
ACTIVATION = torch.tanh
their_settings = types.ModuleType("their_settings")
their_settings.__file__, their_settings.width = __file__, 0.5
sys.modules["their_settings"] = their_settings
NEW_LIKE = set_of(HERE, "LIKE", Like(width=0.6))
UNNAMED = {
    "method of a distribution": (lambda x: Scaled(0.0, 1.0).log_prob(x), TO_FACTOR, NEW_FACTOR),
    "class of a distribution": (
        lambda x: Scaled(0.0, 1.0).log_prob(x),
        set_of(Scaled, "strength", 0.6),
        "'strength' of Scaled",
    ),
    "operator": (lambda x: MADE * x, TO_FACTOR, NEW_FACTOR),
    "with": (lambda x: MADE.__enter__(), set_in(WIDTHS, 0, 0.6), "the global 'WIDTHS'"),
    "slots": (lambda x: x * SLOTS.width, set_of(SLOTS, "width", 0.6), "'width' of a Slots"),
    "like a dict": (
        lambda x: x * LIKE.width,
        lambda monkeypatch: LIKE.update(width=0.7),
        "'data' of a Like",
    ),
    "another object": (lambda x: x * LIKE.width, NEW_LIKE, "the global 'LIKE'"),
    "set": (uses_set, lambda monkeypatch: CHOICES.discard(0.5), "the global 'CHOICES'"),
    "function of torch": (
        lambda x: ACTIVATION(x),
        set_of(HERE, "ACTIVATION", torch.sigmoid),
        "the global 'ACTIVATION'",
    ),
    "import": (uses_import, set_of(their_settings, "width", 0.6), "'width' of their_settings"),
    "asked for": (
        lambda x: x * getattr(SLOTS, "strength", getattr(OPTIONS, "strength", 1.0)),
        lambda monkeypatch: monkeypatch.setattr(OPTIONS, "width", 0.6),
        None,
    ),
    "absent": (
        lambda x: x * getattr(MADE, "strength", 1.0),
        lambda monkeypatch: monkeypatch.setattr(MADE, "strength", 0.6, raising=False),
        "'strength' of a Made",
    ),
    "small array": (
        lambda x: x * float(NUMBERS[0]),
        lambda monkeypatch: NUMBERS.__setitem__(0, 0.7),
        "the global 'NUMBERS'",
    ),
    "condition": (
        poutine.condition(uses_global, data=OBSERVED),
        set_in(OBSERVED, "z", torch.tensor(0.7)),
        "'data' of a ConditionMessenger",
    ),
}
NUMBERS = np.array([0.5, 1.0])


WIDTH, ONE = "width", 1.0
ASKS = operator.attrgetter("width")


class Meta(type):
    width = 0.5


class OfMeta(metaclass=Meta):
    pass


def uses_from_import(x):
    from their_settings import width

    return x * width


def uses_absent(x):
    with contextlib.suppress(NameError):
        return x * LATER  # noqa: F821
    return len(x)


def with_default(x, width=0.5):
    return x * width


def with_keyword(x, *, width=0.5):
    return x * width


PARTIAL = functools.partial(with_keyword, width=0.5)
HERE_MODULE = types.SimpleNamespace(activation=torch.tanh, mean=0.5)
MORE = {
    "equal, of another type": (lambda x: x * ONE, set_of(HERE, "ONE", 1), "the global 'ONE'"),
    "by a name from elsewhere": (
        lambda x: x * getattr(OPTIONS, WIDTH),
        set_of(OPTIONS, "width", 0.6),
        "'width' of a Namespace",
    ),
    "attrgetter": (
        lambda x: x * ASKS(OPTIONS),
        set_of(OPTIONS, "width", 0.6),
        "'width' of a Namespace",
    ),
    "keywords of a partial": (
        PARTIAL,
        lambda monkeypatch: monkeypatch.setitem(PARTIAL.keywords, "width", 0.6),
        "an argument",
    ),
    "keyword's default": (
        with_keyword,
        lambda monkeypatch: monkeypatch.setitem(with_keyword.__kwdefaults__, "width", 0.6),
        "a default of with_keyword",
    ),
    "defaults": (
        with_default,
        set_of(with_default, "__defaults__", (1,)),
        "__defaults__ of with_default",
    ),
    "metaclass": (lambda x: x * OfMeta.width, set_of(Meta, "width", 0.6), "'width' of Meta"),
    "called attribute": (
        lambda x: HERE_MODULE.activation(x),
        set_of(HERE_MODULE, "activation", torch.sigmoid),
        "'activation' of a SimpleNamespace",
    ),
    "number with the name of a method": (
        lambda x: HERE_MODULE.activation(x).mean(),
        set_of(HERE_MODULE, "mean", 0.6),
        None,
    ),
    "another key": (
        uses_lists,
        lambda monkeypatch: refill(TABLE, {"other": TABLE["width"], "deep": TABLE["deep"]}),
        "the global 'TABLE'",
    ),
    "import from": (
        uses_from_import,
        set_of(their_settings, "width", 0.6),
        "'width' of their_settings",
    ),
    "absent global": (
        uses_absent,
        lambda monkeypatch: monkeypatch.setattr(HERE, "LATER", 0.5, raising=False),
        "the global 'LATER'",
    ),
    "builtin": (lambda x: len(x), set_of(builtins, "license", 1), None),
}


PLACES = {**UNNAMED, **MORE}


@pytest.mark.parametrize("case", PLACES)
def test_places_that_are_not_named_or_odd(case, monkeypatch):
    root, change, words = PLACES[case]
    state = state_of(root)
    assert state.change() is None
    change(monkeypatch)
    found = state.change()
    assert found is None if words is None else words in (found or "nothing"), found


def test_builtins_are_not_watched():
    assert len(state_of(lambda x: len(x) + abs(1))) == 1  # its own code


def closures(width):
    """Functions with a variable in a closure, each reached in another way."""

    def model(x):
        return x * width

    class Owner:
        @property
        def width(self):
            return width

        def model(self, x):
            return x * width

        @staticmethod
        def fixed(x):
            return x * width

    def change():
        nonlocal width
        width += 0.1

    owner = Owner()
    return {
        "decorator of Pyro": config_enumerate(model),
        "cached": functools.lru_cache(model),
        "method": owner.model,
        "property": lambda x: x * owner.width,
        "staticmethod": lambda x: owner.fixed(x),
        "handler": poutine.mask(model, mask=True),
    }, change


@pytest.mark.parametrize("way", closures(0.5)[0])
def test_closures_of_functions_that_are_reached(way, monkeypatch):
    """Without a look at everything that is in memory."""
    monkeypatch.setattr(python_state._Walk, "_visit_unreached", lambda self: None)
    roots, change = closures(0.5)
    state = state_of(roots[way])
    assert state.change() is None
    change()
    assert "'width' in the closure of closures" in state.change()


def test_a_function_that_only_a_library_knows():
    width = 0.5

    class Positive(constraints.Constraint):
        pass

    @biject_to.register(Positive)
    def transform(constraint):
        return AffineTransform(0.0, width)

    state = state_of(lambda x: biject_to(Positive())(x))
    assert state.change() is None
    width = 0.6
    assert "'width' in the closure" in state.change()


def test_a_loss_that_svi_has_wrapped():
    """Its wrapper says nothing but by its closure."""
    objective = Tempered()
    svi = SVI(
        uses_data_and_parameter,
        uses_data_and_parameter,
        pyro.optim.Adam({"lr": 0.1}),
        objective.differentiable_loss,
    )
    wrapper = svi.loss_and_grads
    run = lambda x: wrapper(svi.model, svi.guide, x)  # noqa: E731
    state = state_of(wrapper, run=run)
    objective.options["strength"] = 0.6
    assert "'options' of a Tempered" in state.change()


def test_defaults_of_a_method_without_a_name():
    state = state_of(lambda x: x * Width().width)
    defaults = Width.__init__.__defaults__
    Width.__init__.__defaults__ = (0.6,)
    try:
        assert "__defaults__ of Width.__init__" in state.change()
    finally:
        Width.__init__.__defaults__ = defaults


def test_strategies_of_reparam():
    config = {"z": LocScaleReparam(centered=0.5)}
    state = state_of(poutine.reparam(uses_global, config=config))
    assert state.change() is None
    config["z"].centered = 0.6
    assert "'centered' of a LocScaleReparam" in state.change()


def test_what_the_pass_counts_itself():
    calls, history = [0], []

    def model(x):
        calls[0] += 1
        history.append(x)

    state = state_of(model)
    model(X)
    assert "'calls' in the closure" in state.counted()
    calls[0] -= 1
    assert state.counted() is None and state.change()  # a list that grows is no number


def test_an_object_that_counts_its_calls():
    class Counts(Callable):
        calls = 0

        def __call__(self, x):
            self.calls += 1
            return self.width

    model = Counts()
    state = state_of(model)
    assert state.counted() is None
    model(X)
    assert "'calls' of a Counts" in state.counted()


def test_what_libraries_count_is_their_own_affair():
    objective = RenyiELBO(alpha=0.5, num_particles=2)
    model = uses_data_and_parameter
    state = state_of(model, objective, run=lambda x: objective.loss_and_grads(model, model, x))
    objective.alpha = 0.6
    assert state.counted() is None and state.change()


def test_equal_numbers_are_no_change(monkeypatch):
    state = state_of(uses_global, uses_lists)
    monkeypatch.setattr(HERE, "FACTOR", float("0.5"))
    monkeypatch.setitem(TABLE, "width", float("0.5"))
    assert state.change() is None
    monkeypatch.setattr(HERE, "FACTOR", float("nan"))
    state = state_of(uses_helper)
    monkeypatch.setattr(HERE, "FACTOR", float("nan"))
    assert state.change() is None


def test_what_code_does_not_use_is_free(monkeypatch):
    state = state_of(uses_helper, uses_options, uses_settings)
    monkeypatch.setattr(HERE, "mean", 0.3)  # x.mean() is another mean
    monkeypatch.setattr(HERE, "loss", 0.3)
    monkeypatch.setattr(HERE, "DATA", torch.zeros(3))
    monkeypatch.setattr(settings, "unused", 2.0)
    DATA.add_(0.0)
    assert state.change() is None


def test_data_are_not_settings(monkeypatch):
    """Values of tensors and long lists."""
    monkeypatch.setattr(HERE, "WIDTHS", [0.0] * 1000)
    state = state_of(uses_lists, uses_data)
    assert len(state) < 20
    WIDTHS.append(1.0)
    DATA.mul_(1.0)
    assert state.change() is None


def test_libraries_are_not_looked_at():
    def model(x):
        return pyro.sample("z", dist.Normal(np.float64(1.0), torch.nn.functional.softplus(x)))

    assert len(state_of(model)) == 1  # its own code


def test_a_model_that_is_installed_is_no_library(tmp_path, monkeypatch):
    """It may lie where libraries lie: what it is made of is looked at all the same."""
    from pyro_vi_ext.compiled import executed_code

    package = tmp_path / "site" / "their_models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "numbers.py").write_text("width = 0.5\ndef scaled(x):\n    return x * width\n")
    lines = "from . import numbers\ndef model(x):\n    return numbers.scaled(x) * numbers.width\n"
    (package / "model.py").write_text(lines)
    folder = str(tmp_path / "site") + "/"
    monkeypatch.setattr(executed_code, "_INSTALLED", (folder,))
    monkeypatch.syspath_prepend(folder)
    from their_models import model, numbers

    def mine(x):
        return model.model(x)

    states = state_of(model.model), state_of(mine)
    numbers.width = 0.6
    assert "'width'" in states[0].change() and states[1].change() is None
