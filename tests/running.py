"""Running an example as a module, with what it sets globally put back."""

import importlib.util
import pathlib

import pyro
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def restored():
    local = pyro.settings.get("module_local_params")
    yield
    pyro.settings.set(module_local_params=local)
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
