"""What a pass writes to is as it was; what it makes is left alone."""

import pytest
import torch
from torch import nn

from pyro_vi_ext.compiled.written import Written


def test_written_tensors_are_put_back():
    x, y, z = torch.arange(4.0), torch.ones(2), torch.zeros(3)
    with Written().put_back() as written, written:
        x.mul_(2)
        x[1:3].add_(10)
        torch.add(y, 1, out=y)
        z.copy_(torch.ones(3))
        assert (x.tolist(), y.tolist()) == ([0.0, 12.0, 14.0, 6.0], [2.0, 2.0])
    assert (x.tolist(), y.tolist(), z.tolist()) == ([0.0, 1.0, 2.0, 3.0], [1.0, 1.0], [0.0] * 3)


def test_a_view_written_first():
    x = torch.arange(4.0)
    with Written().put_back() as written, written:
        x[:2].zero_()
        x.zero_()
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_what_the_pass_makes_stays():
    with Written().put_back() as written, written:
        made = torch.empty(3)
        nn.init.constant_(made, 7.0)
        parameter = nn.Parameter(torch.randn(2))
        with torch.no_grad():
            parameter.fill_(3.0)
        view = made[:1]
        view.add_(1.0)
    assert made.tolist() == [8.0, 7.0, 7.0] and parameter.tolist() == [3.0, 3.0]


def test_made_and_older_tensors_are_told_apart():
    old, written = torch.ones(1), Written()
    with written.put_back(), written:
        new, view = old * 2, old[:]
        assert written.made(new) and not written.made(old) and not written.made(view)


def test_errors_put_back_too():
    x = torch.zeros(2)
    written = Written()
    with pytest.raises(RuntimeError), written.put_back(), written:
        x.add_(1)
        raise RuntimeError
    assert x.tolist() == [0.0, 0.0]
