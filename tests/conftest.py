"""Fixtures of several test files."""

import pyro
import pytest
import torch
from _pytest.doctest import DoctestModule


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path, parent):
    """No doctests of test files: their collector forgives a failed import, and pytest then takes
    the half-made module for one without tests, so a broken file would pass."""
    found = yield
    return [collector for collector in found if not isinstance(collector, DoctestModule)]


@pytest.fixture
def float64():
    """Doubles, one thread, no parameters, seed 0."""
    old = torch.get_default_dtype()
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(old)
    torch.set_num_threads(threads)
