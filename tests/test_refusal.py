"""Refusals name the user's line and the site, not a library's."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_vi_ext import TraceDisARM_ELBO
from pyro_vi_ext.compiled.refusal import CannotCompile, causes, explain, user_line, where

pytestmark = pytest.mark.usefixtures("float64")


def raised(function, *args):
    with pytest.raises(Exception) as caught:
        function(*args)
    return caught.value


def test_it_is_a_not_implemented_error():
    assert issubclass(CannotCompile, NotImplementedError)


def test_the_users_line_is_named():
    def user(x):
        return x + torch.ones(5)

    error = raised(user, torch.ones(3))
    message = str(explain(error, "It fails", "Do otherwise."))
    line = user.__code__.co_firstlineno + 1
    assert (
        message == f"It fails at test_refusal.py:{line} `return x + torch.ones(5)`. Do otherwise."
    )


def test_the_innermost_line_of_the_user_is_named():
    def inner():
        raise ValueError

    def outer():
        inner()

    assert "`raise ValueError`" in where(raised(outer).__traceback__)


def test_the_line_is_named_through_pyro_and_torch():
    class Draw(dist.Normal):
        def rsample(self, sample_shape=()):
            raise ValueError

    def model():
        pyro.sample("here", Draw(0.0, 1.0))

    traced = poutine.trace(pyro.plate("p", 2)(model))
    message = where(raised(traced.get_trace).__traceback__)
    assert "`raise ValueError`" in message and "(site 'here')" in message


def test_a_site_is_named_if_the_error_is_a_librarys():
    def model():
        pyro.sample("there", dist.Normal(torch.zeros(2), 1.0), obs=torch.zeros(3))

    def scored():
        poutine.trace(model).get_trace().compute_log_prob()

    message = where(raised(scored).__traceback__)
    assert "test_refusal.py" in message, message


def test_without_a_line_of_the_user_the_library_is_named():
    def user():
        TraceDisARM_ELBO(num_particles=0)

    error = raised(user)
    below = error.__traceback__.tb_next.tb_next  # without this file's frames
    assert "objective.py" in where(below) or "antithetic.py" in where(below)


def test_without_a_traceback_nothing_is_named():
    assert where(None) == "."


def test_user_line():
    named = user_line()
    assert named.startswith("test_refusal.py:") and named.endswith("`named = user_line()`")


def test_user_line_from_within_torch():
    lines = []

    class Module(torch.nn.Module):
        def forward(self, x):
            return x

    module = Module()
    module.register_forward_hook(lambda *_: lines.append(user_line()))
    module(torch.ones(1))
    assert "lines.append(user_line())" in lines[0]


def test_causes():
    error = None
    try:
        try:
            raise KeyError("a")
        except KeyError as inner:
            raise ValueError("b") from inner
    except ValueError as outer:
        error = outer
    assert [type(e) for e in causes(error)] == [ValueError, KeyError] and causes(None) == []
    error.__cause__.__cause__ = error  # a circle ends
    assert len(causes(error)) == 2
