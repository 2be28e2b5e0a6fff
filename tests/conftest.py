"""Fixtures of several test files."""

import pyro
import pytest
import torch


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
