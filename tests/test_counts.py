"""The checks of counts, shared by the Pyro and the NumPyro model."""

import numpy as np
import pytest
import torch

from pyro_vi_ext.models.counts import check_counts, check_hyperparameters, count_exceedances

BAD_COUNTS = [
    ([1.0, 2.0, -3.0], r'site "x".*non-negative.*-3 at index 2 \(1 of 3'),
    ([1.0, 2.5, 0.5], r'site "x".*whole numbers.*2\.5 at index 1 \(2 of 3.*raw counts'),
    ([float("nan"), 1.0], r'site "x".*not missing.*nan at index 0.*drop'),
    ([1.0, float("inf")], r'site "x".*finite.*inf at index 1'),
    ([[1.0, 2.0]], r'site "x".*found shape \(1, 2\).*reshape'),
    (3.0, r'site "x".*found shape \(\)'),
    ([], r'site "x".*no counts'),
]


@pytest.mark.parametrize("make", [torch.tensor, np.array, lambda x: x], ids=["torch", "np", "list"])
@pytest.mark.parametrize("bad, message", BAD_COUNTS)
def test_bad_counts_are_named(make, bad, message):
    with pytest.raises(ValueError, match=message):
        check_counts(make(bad))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_good_counts_pass_in_any_dtype(dtype):
    x = check_counts(torch.tensor([0, 7, 3], dtype=dtype))
    assert x.dtype == np.float64 and x.tolist() == [0.0, 7.0, 3.0]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_hyperparameters_are_named(value):
    with pytest.raises(ValueError, match="prior parameter beta must be positive"):
        check_hyperparameters(a=0.01, beta=value)


def test_exceedances_rebuild_the_log_gamma_differences():
    x = np.array([0.0, 4.0, 1.0, 4.0, 9.0])
    r, n = 0.37, count_exceedances(x)
    xt = torch.from_numpy(x)
    direct = (torch.lgamma(xt + r) - torch.lgamma(torch.tensor(r).double())).sum().item()
    assert (n * np.log(r + np.arange(9))).sum() == pytest.approx(direct, rel=1e-7)
    assert count_exceedances(np.zeros(3)).size == 0
