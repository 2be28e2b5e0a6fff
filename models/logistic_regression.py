r"""Bayesian logistic regression, and the data of the study in the semi-implicit paper.

.. math::
    w \sim \mathcal N(0, \alpha^{-1} I_D), \qquad
    y_n \sim \mathrm{Bernoulli}\big(\sigma(x_n^\top w)\big), \qquad
    \sigma(t) = \frac{1}{1 + e^{-t}}.

The posterior of :math:`w` is log-concave and skewed away from the origin: a full-covariance
Gaussian is close and not exact, a factorised one misses the correlations (Yin and Zhou 2018,
arXiv:1805.11183, section 4.2). The same model in NumPyro is
:func:`pyro_vi_ext.models.logistic_regression_numpyro.logistic_regression`.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["LogisticData", "load_logistic_data", "log_joint", "logistic_regression"]


def logistic_regression(X: Tensor, y: Tensor | None = None, alpha: float | Tensor = 0.01) -> Tensor:
    r"""Pyro model of binary labels with Gaussian weights.

    .. math::
        w \sim \mathcal N(0, \alpha^{-1} I_D), \qquad
        y_n \sim \mathrm{Bernoulli}(\text{logits} = x_n^\top w).

    Sites: ``"w"`` (weights, event shape (D,): log-odds per unit of the covariate) and, in the plate
    ``"data"`` at dim -1, ``"y"`` (0 or 1). Vectorised particle plates sit to its left. There is no
    intercept: give `X` a column of ones, whose weight then has the same prior.

    Args:
        X: covariates, shape (N, D). A floating-point tensor sets dtype and device of the model;
            whole numbers are converted to torch's default dtype.
        y: observed labels, 0 or 1, shape (N,), of any dtype. None draws labels instead.
        alpha: precision of the prior of each weight, positive.

    Returns:
        The labels, shape (..., N).

    Raises:
        ValueError: for an `X` that is no matrix and a `y` of another length; while Pyro's
            validation is on also for covariates that are not finite, labels other than 0 and 1
            and an `alpha` that is not positive. Site or argument are named.

    References:
        Yin and Zhou 2018, Semi-implicit variational inference, arXiv:1805.11183.

    Example:
        >>> import pyro
        >>> _ = pyro.set_rng_seed(0)
        >>> X = torch.tensor([[1.0, 0.3], [1.0, -2.0], [1.0, 1.1]])
        >>> trace = pyro.poutine.trace(logistic_regression).get_trace(X, torch.tensor([1, 0, 1]))
        >>> trace.nodes["w"]["fn"].event_shape, trace.nodes["y"]["fn"].batch_shape
        (torch.Size([2]), torch.Size([3]))
        >>> logistic_regression(X).shape
        torch.Size([3])
    """
    X = torch.as_tensor(X)
    X = X if X.is_floating_point() else X.to(torch.get_default_dtype())
    y = None if y is None else torch.as_tensor(y, device=X.device)
    check_shapes(X, y)
    if is_validation_enabled():
        check_values(X, y, alpha)
    y = None if y is None else y.to(X.dtype)
    alpha = torch.as_tensor(alpha, dtype=X.dtype, device=X.device)
    w = pyro.sample("w", dist.Normal(X.new_zeros(X.shape[1]), alpha.rsqrt()).to_event(1))
    # Particles are to the left of the plate, (..., 1, D): their logits are (..., N).
    logits = X @ w if w.dim() == 1 else (w @ X.mT).squeeze(-2)
    with pyro.plate("data", len(X), dim=-1):
        return pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def log_joint(w: Tensor, X: Tensor, y: Tensor, alpha: float = 0.01) -> Tensor:
    r"""log p(w, y given X) of many weights at once, in closed form.

    .. math::
        \log p(w, y) = \sum_n \log \sigma\big((2 y_n - 1)\, x_n^\top w\big)
            - \tfrac{\alpha}{2} \|w\|^2 + \tfrac{D}{2} \log \tfrac{\alpha}{2 \pi}

    Args:
        w: weights, shape (..., D).
        X: covariates, shape (N, D), of the dtype of `w`.
        y: labels, 0 or 1, shape (N,).
        alpha: precision of the prior.

    Returns:
        The log joint density in nats, shape (...,).

    Raises:
        ValueError: as :func:`logistic_regression`.

    Example:
        >>> X, y = torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 1.0])
        >>> log_joint(torch.zeros(3, 1), X, y, alpha=2 * math.pi)  # 2 log(1/2)
        tensor([-1.3863, -1.3863, -1.3863])
    """
    check_shapes(X, y)
    check_values(X, y, alpha)
    signs = 2 * y.to(X.dtype) - 1
    prior = 0.5 * (X.shape[1] * math.log(alpha / (2 * math.pi)) - alpha * w.square().sum(-1))
    return logsigmoid(signs * (w @ X.mT)).sum(-1) + prior


def check_shapes(X, y) -> None:
    """Raise ValueError unless `X` is (N, D) and `y` None or (N,); tensors or arrays of any library.

    Example:
        >>> check_shapes(torch.ones(3, 2), torch.ones(3, 1))
        Traceback (most recent call last):
        ValueError: site "y": labels must have shape (3,), one for each row of X, found (3, 1)...
    """
    if len(X.shape) != 2 or 0 in X.shape:
        raise ValueError(
            f"X must be a matrix of covariates, shape (N, D) with N, D >= 1, found shape "
            f"{tuple(X.shape)}; pass X[:, None] for a single covariate."
        )
    if y is not None and tuple(y.shape) != tuple(X.shape[:1]):
        raise ValueError(
            f'site "y": labels must have shape ({X.shape[0]},), one for each row of X, found '
            f"{tuple(y.shape)}; pass y.reshape(-1) if they are a column, or y=None to draw labels."
        )


def check_values(X, y, alpha) -> None:
    """Raise ValueError for covariates, labels or a precision that the model does not have.

    Example:
        >>> check_values(torch.ones(2, 1), torch.tensor([-1, 1]), 0.01)
        Traceback (most recent call last):
        ValueError: site "y": labels must be 0 or 1, found -1 at index 0 (1 of 2 entries); ...
    """
    X = _numpy(X)
    if not np.isfinite(X).all():
        row, column = np.argwhere(~np.isfinite(X))[0]
        raise ValueError(
            f"X must be finite, found {X[row, column]:g} at row {row}, column {column}; drop or "
            "fill in the rows with missing covariates."
        )
    if y is not None:
        y = _numpy(y)
        bad = (y != 0) & (y != 1)
        if bad.any():
            raise ValueError(
                f'site "y": labels must be 0 or 1, found {y[bad][0]:g} at index {bad.argmax()} '
                f"({bad.sum()} of {len(y)} entries); pass (y > 0) for labels -1 and 1."
            )
    precision = _numpy(alpha)
    if precision.shape != () or not 0 < precision < math.inf:
        raise ValueError(
            f"alpha, the precision of the prior of each weight, must be a positive finite number, "
            f"found {precision.tolist()}; the paper has 0.01."
        )


def _numpy(value) -> np.ndarray:
    return value.detach().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)


# --- data ----------------------------------------------------------------------------------------


class LogisticData(NamedTuple):
    """Covariates and labels, split into a training and a test set; the first column of X is 1.

    Attributes:
        X_train: covariates, shape (N, D), torch's default dtype, on the CPU.
        y_train: labels, 0 or 1, shape (N,), the same dtype.
        X_test: covariates of the test set, shape (M, D).
        y_test: its labels, shape (M,).
        vb: mean (D,) and covariance (D, D) of the Gaussian that the file holds, which is that of
            the bound of Jaakkola and Jordan (2000); None without a file.
        gibbs: the draws of the weights that the file holds, shape (S, D); None without a file.
    """

    X_train: Tensor
    y_train: Tensor
    X_test: Tensor
    y_test: Tensor
    vb: tuple[Tensor, Tensor] | None = None
    gibbs: Tensor | None = None


def load_logistic_data(name_or_path: str | Path = "breast_cancer") -> LogisticData:
    """Return the breast-cancer data of scikit-learn, or one of the files of the SIVI paper.

    ``"breast_cancer"``: 569 biopsies, 400 to train and 169 to test, the same for everybody; y is 1
    for benign. The 30 measurements have mean 0 and standard deviation 1 (divisor N) on the training
    set, after a column of ones (Street, Wolberg and Mangasarian 1993).

    A path: ``waveform.mat`` or ``nodal.mat`` from the code that Yin and Zhou published with
    arXiv:1805.11183, as they are (the first column is 1 already).

    Args:
        name_or_path: ``"breast_cancer"``, or where the file is.

    Raises:
        ImportError: without scikit-learn or SciPy.
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is damaged or lacks a variable, and for a set with labels of one
            kind only; the file and the variable are named.

    Example:
        >>> data = load_logistic_data()
        >>> data.X_train.shape, data.y_train.mean()
        (torch.Size([400, 31]), tensor(0.6325))
    """
    if name_or_path == "breast_cancer":
        return _load_breast_cancer()
    return _load_mat(Path(name_or_path))


def _load_breast_cancer() -> LogisticData:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the breast-cancer data need scikit-learn: pip install pyro_vi_ext[data]"
        ) from error
    X, y = datasets.load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    X, y = X[order], y[order]
    X = (X - X[:400].mean(0)) / X[:400].std(0)
    X = np.concatenate([np.ones((len(X), 1)), X], 1)
    return LogisticData(*map(_default, (X[:400], y[:400], X[400:], y[400:])))


def _load_mat(path: Path) -> LogisticData:
    try:
        import scipy.io
    except ImportError as error:
        raise ImportError(
            "reading a .mat file needs SciPy: pip install pyro_vi_ext[data]"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(
            f"Found no file '{path}'. Give 'breast_cancer', or the path of waveform.mat or "
            "nodal.mat of the paper's code."
        )
    try:
        found = scipy.io.loadmat(path)
    except Exception as error:  # it has many ways to fail on a file that is none of its kind
        raise ValueError(f"'{path}' cannot be read as a MATLAB file: {error}") from error
    wanted = ("X_train", "y_train", "X_test", "y_test", "mu_Beta", "Sig_Beta", "BetaMCMC")
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"'{path}' has no variable {', '.join(missing)}: not a file of the paper.")
    X, y, X_test, y_test, mean, covariance, draws = (_default(found[name]) for name in wanted)
    data = LogisticData(
        X, y.reshape(-1), X_test, y_test.reshape(-1), (mean.reshape(-1), covariance), draws.mT
    )
    for part, (X, y) in {"train": data[:2], "test": data[2:4]}.items():
        try:
            check_shapes(X, y)
            check_values(X, y, 0.01)
        except ValueError as error:
            raise ValueError(f"'{path}', variables X_{part} and y_{part}: {error}") from error
        if len(y.unique()) < 2:
            raise ValueError(f"'{path}': all labels of y_{part} are {y[0]:g}, useless as a set.")
    return data


def _default(array) -> Tensor:
    return torch.as_tensor(np.asarray(array, np.float64)).to(torch.get_default_dtype())
