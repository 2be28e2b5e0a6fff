"""Which program a call gets, and when it is compared with plain steps."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_vi_ext.compiled.programs as programs_module
from pyro_vi_ext.compiled import CannotCompile
from pyro_vi_ext.compiled.programs import Programs
from pyro_vi_ext.compiled.stock_pass import StockPass

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)


def model(x, flip=False):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(-loc if flip else loc, 0.5), obs=x)


@pytest.fixture
def programs():
    guide = AutoNormal(model)
    stock = StockPass(model, guide, Trace_ELBO().loss_and_grads)
    stock(X)
    return Programs(stock, pyro.optim.Adam({"lr": 0.1}), "eager", max_traces=4)


@pytest.fixture
def checks(monkeypatch):
    """The numbers of steps at which programs were compared with plain steps."""
    found = []
    verify = programs_module.verify

    def counted(program, *args, **kwargs):
        found.append(program.num_steps)
        verify(program, *args, **kwargs)

    monkeypatch.setattr(programs_module, "verify", counted)
    return found


def test_one_program_for_each_kind(programs):
    first, arguments = programs.find((X,), {})
    assert [t is X for t in arguments.tensors] == [True]
    assert programs.find((X + 1,), {})[0] is first
    assert programs.find((X,), {"flip": True})[0] is not first
    torch.set_default_dtype(torch.float32)
    assert programs.find((X,), {})[0] is not first
    torch.set_default_dtype(torch.float64)
    assert programs.find((X,), {})[0] is first
    assert programs.num_traces == 3 and len(programs.known) == 3


def test_comparisons_are_at_powers_of_four(programs, checks):
    for _ in range(300):
        programs.find((X,), {})
    assert checks == [0, 16, 64, 256]


def test_comparisons_of_long_runs(programs, checks):
    programs.find((X,), {}, 10)
    programs.find((X,), {}, 1000)
    programs.find((X,), {}, 13)
    programs.find((X,), {}, 1)
    assert checks == [0, 1010, 1024]


def test_a_program_out_of_date_is_made_again(programs):
    first, _ = programs.find((X,), {})
    pyro.get_param_store()["AutoNormal.locs.loc"] = torch.tensor(0.3)
    second, _ = programs.find((X,), {})
    assert second is not first and programs.num_traces == 2 and len(programs.known) == 1


def test_limit(programs):
    for size in (3, 2, 1):
        programs.find((X[:size],), {})
    programs.find((X[:2], True), {})
    with pytest.raises(CannotCompile, match="traced 4 times.*arguments of another kind"):
        programs.find((X, True), {})
    programs.find((X,), {})


def test_nothing_to_train():
    stock = StockPass(model, lambda x: pyro.sample("loc", dist.Normal(0.0, 1.0)), None)
    stock.loss_and_grads = Trace_ELBO().loss_and_grads
    programs = Programs(stock, None, "eager", 4)
    with pytest.raises(CannotCompile, match="no parameters"):
        programs.find((X,), {})
