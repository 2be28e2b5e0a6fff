r"""A mixture of K Gaussians with unknown parameters, and Fisher's irises to try it on.

.. math::
    x_i \sim \sum_{k=0}^{K-1} \pi_k\, \mathcal N(\mu_k, \Sigma_k), \qquad
    \pi,\ \mu_k,\ \Sigma_k \ \text{with priors.}

Its little sister, two components with known parameters, is
:func:`~pyro_vi_ext.models.two_gaussians.two_gaussians`; both it and the exact densities,
:class:`~pyro_vi_ext.models.gaussian_mixture_exact.GaussianMixture`, are available from here too.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_vi_ext.objective import positive_int

from .gaussian_mixture_exact import LECTURE_MIXTURE, QUERY_POINT, GaussianMixture, check_points
from .two_gaussians import two_gaussians, two_gaussians_guide, two_gaussians_posterior

__all__ = [
    "IRIS_FEATURES",
    "LECTURE_MIXTURE",
    "QUERY_POINT",
    "GaussianMixture",
    "gaussian_mixture",
    "gaussian_mixture_labels",
    "load_iris",
    "to_mixture",
    "two_gaussians",
    "two_gaussians_guide",
    "two_gaussians_posterior",
]

#: The columns of :func:`load_iris`, in centimetres.
IRIS_FEATURES = ("sepal length", "sepal width", "petal length", "petal width")


def gaussian_mixture(
    x: Tensor,
    num_components: int,
    *,
    marginalize: bool = True,
    one_hot: bool = False,
    subsample_size: int | None = None,
    concentration: Tensor | float = 1.0,
    loc: Tensor | float | None = None,
    scale: Tensor | float | None = None,
    eta: float = 2.0,
) -> Tensor:
    r"""Pyro model of points from a mixture of K Gaussians with unknown parameters.

    .. math::
        \pi &\sim \mathrm{Dirichlet}(c), \qquad
        \mu_{kd} \sim \mathcal N(m_d, s_d^2), \qquad
        \sigma_{kd} \sim \mathrm{LogNormal}(\log \tfrac{s_d}{2}, 1), \qquad
        L_k \sim \mathrm{LKJCholesky}(\eta), \\
        x_i &\sim \sum_k \pi_k\, \mathcal N(\mu_k, \Sigma_k), \qquad
        \Sigma_k = \operatorname{diag}(\sigma_k)\, L_k L_k^\top \operatorname{diag}(\sigma_k).

    Sites: ``"weights"`` (event shape (K,)); in the plate ``"components"`` at dim -1, ``"means"``
    (event (D,)), ``"scales"`` (event (D,), component standard deviations) and, if D > 1,
    ``"corr_tril"`` (event (D, D), Cholesky factor of a correlation matrix); in the plate
    ``"data"`` at dim -1, ``"x"`` (event (D,)). By default the labels are added up, so that all
    latents are continuous; ``marginalize=False`` draws them at the site ``"z"`` in the plate
    ``"data"``: 0, ..., K - 1, or with ``one_hot=True`` vectors of length K, for a guide such as
    :func:`gaussian_mixture_labels`. One-hot labels may be relaxed: x has the mean
    :math:`\sum_k z_k \mu_k` and the Cholesky factor :math:`\sum_k z_k \operatorname{diag}(\sigma_k)
    L_k`, which is that of the component at a hard z, to the last bit, and a smooth function in
    between. A vectorised particle plate sits to the left either way. To draw points, hide the
    observation: ``pyro.poutine.uncondition(gaussian_mixture)``.

    The defaults have no units: m and s are the means and standard deviations (divisor N) of the
    columns of `x`, so the posterior is the same in any units. They use all of `x`; if `x` is one
    of several minibatches, give `loc` and `scale`, or the prior changes with the batch. The
    LogNormal vanishes at 0, so no component shrinks onto a single datum; a MAP estimate can still
    become flat, a plane through D data, unless `eta` is at least 1 + D/2. The components are
    exchangeable: the posterior has K! copies of each mode, and an autoguide stays near the one at
    which it starts (``init_loc_fn=init_to_value(values=...)``, say, from k-means).

    Args:
        x: points, shape (N, D), in any units; a floating-point tensor sets dtype and device of the
            model, whole numbers become torch's default dtype.
        num_components: K, an integer >= 1.
        marginalize: add up the labels instead of drawing them.
        one_hot: draw labels as one-hot vectors; needs ``marginalize=False``.
        subsample_size: draw a minibatch of this size in the plate ``"data"``, with its N/B scale.
        concentration: c, positive, a number or shape (K,).
        loc: m, in the units of `x`, a number or shape (D,).
        scale: s, positive, in the units of `x`, a number or shape (D,).
        eta: concentration of the correlations, positive; 1 is uniform over correlation matrices,
            larger values prefer small correlations.

    Returns:
        The points of the minibatch, shape (B, D); B = N without subsampling.

    Raises:
        ValueError: for an `x` of another shape or with NaN or inf, a constant column of `x` without
            `scale`, and arguments out of range; site or argument are named.

    References:
        Lewandowski, Kurowicka and Joe 2009, Generating random correlation matrices based on vines
        and extended onion method, Journal of Multivariate Analysis 100:1989-2001.

    Example:
        >>> import pyro
        >>> _ = pyro.set_rng_seed(0)
        >>> x = torch.randn(20, 2)
        >>> trace = pyro.poutine.trace(gaussian_mixture).get_trace(x, 3)
        >>> trace.nodes["means"]["value"].shape, trace.nodes["x"]["fn"].batch_shape
        (torch.Size([3, 2]), torch.Size([20]))
        >>> guide = pyro.infer.autoguide.AutoNormal(gaussian_mixture)
        >>> to_mixture(**guide(x, 3)).log_evidence(x).shape
        torch.Size([20])
    """
    K = positive_int("num_components", num_components)
    if one_hot and marginalize:
        raise ValueError("one_hot=True draws labels: give marginalize=False too.")
    x = check_points(x)
    N, D = x.shape
    loc = _vector("loc", x.mean(0) if loc is None else loc, D, x, positive=False)
    scale = _vector("scale", _spread(x) if scale is None else scale, D, x)
    concentration = _vector("concentration", concentration, K, x)

    weights = pyro.sample("weights", dist.Dirichlet(concentration))
    with pyro.plate("components", K, dim=-1):
        means = pyro.sample("means", dist.Normal(loc, scale).to_event(1))
        log_scale = scale.log() - math.log(2)
        scales = pyro.sample("scales", dist.LogNormal(log_scale, 1.0).to_event(1))
        scale_trils = scales.unsqueeze(-1)
        if D > 1:
            eta = _vector("eta", eta, 1, x).squeeze()
            scale_trils = scale_trils * pyro.sample("corr_tril", dist.LKJCholesky(D, eta))
    # A dimension for the data, left of the components and right of any particles.
    means, scale_trils = means.unsqueeze(-3), scale_trils.unsqueeze(-4)
    labels = (dist.OneHotCategorical if one_hot else dist.Categorical)(weights)
    with pyro.plate("data", N, subsample_size=subsample_size, dim=-1) as index:
        batch = x if subsample_size is None else x[index]
        if marginalize:
            components = dist.MultivariateNormal(means, scale_tril=scale_trils)
            points = dist.MixtureSameFamily(labels, components)
        else:
            z = pyro.sample("z", labels)
            if one_hot:
                mean = torch.einsum("...k,...kd->...d", z, means)
                scale_tril = torch.einsum("...k,...kde->...de", z, scale_trils)
            else:
                mean, scale_tril = Vindex(means)[..., z, :], Vindex(scale_trils)[..., z, :, :]
            points = dist.MultivariateNormal(mean, scale_tril=scale_tril)
        return pyro.sample("x", points, obs=batch)


def gaussian_mixture_labels(
    x: Tensor,
    num_components: int,
    *,
    one_hot: bool = False,
    subsample_size: int | None = None,
    **_,
) -> None:
    r"""Pyro guide of the labels of :func:`gaussian_mixture`: logits of its own for each point.

    .. math:: q(z) = \prod_i \mathrm{Categorical}\big(z_i;\ \mathrm{softmax}(\ell_i)\big)

    It takes the arguments of the model with ``marginalize=False`` (those not named here have no
    effect) and draws the site ``"z"`` in the plate ``"data"``. The logits are the parameter
    ``"z_logits"``, shape (N, K), of the dtype of `x`, 0 unless it exists: with a symmetric start
    all components are pulled to the middle, so set it before the first call, say from k-means. The
    other sites need a guide of their own (see the example). Given the parameters of the mixture,
    the best logits are :math:`\log \pi_k + \log \mathcal N(x_i; \mu_k, \Sigma_k)` up to a constant
    for each point: the family has the exact posterior of the labels.

    Args:
        x: points, shape (N, D).
        num_components: K, an integer >= 1.
        one_hot: as for the model.
        subsample_size: as for the model; a point has its own logits in every minibatch.

    Raises:
        ValueError: as :func:`gaussian_mixture`, for `x` and `num_components`.

    Example:
        >>> import pyro
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vi_ext import TraceREBAR_ELBO
        >>> pyro.set_rng_seed(0)
        >>> pyro.clear_param_store()
        >>> parameters = AutoNormal(pyro.poutine.block(gaussian_mixture, hide=["z"]))
        >>> def guide(*args, **kwargs):
        ...     parameters(*args, **kwargs)
        ...     gaussian_mixture_labels(*args, **kwargs)
        >>> x = torch.cat([torch.randn(20, 2) - 3.0, torch.randn(20, 2) + 3.0])
        >>> adam = pyro.optim.Adam({"lr": 0.05})
        >>> svi = pyro.infer.SVI(gaussian_mixture, guide, adam, TraceREBAR_ELBO())
        >>> losses = [svi.step(x, 2, marginalize=False, one_hot=True) for _ in range(100)]
        >>> sum(losses[-10:]) < sum(losses[:10])
        True
    """
    K = positive_int("num_components", num_components)
    x = check_points(x)
    with pyro.plate("data", len(x), subsample_size=subsample_size, dim=-1) as index:
        logits = pyro.param("z_logits", lambda: x.new_zeros(len(x), K))
        logits = logits if subsample_size is None else logits[index]
        pyro.sample("z", (dist.OneHotCategorical if one_hot else dist.Categorical)(logits=logits))


def to_mixture(
    weights: Tensor, means: Tensor, scales: Tensor, corr_tril: Tensor | None = None
) -> GaussianMixture:
    r"""The mixture with the parameters of one draw from :func:`gaussian_mixture`, by site names.

    .. math:: \Sigma_k = \operatorname{diag}(\sigma_k)\, L_k L_k^\top \operatorname{diag}(\sigma_k)

    Args:
        weights: shape (K,).
        means: shape (K, D).
        scales: component standard deviations, shape (K, D).
        corr_tril: Cholesky factors of the correlations, shape (K, D, D); left out if D = 1.

    Raises:
        ValueError: for values that are no mixture.

    Example:
        >>> to_mixture([0.3, 0.7], [[0.0], [1.0]], torch.tensor([[1.0], [2.0]])).covariances
        tensor([[[1.]],
                [[4.]]], dtype=torch.float64)
    """
    scale_trils = torch.as_tensor(scales, dtype=torch.float64).unsqueeze(-1)
    if corr_tril is not None:
        scale_trils = scale_trils * corr_tril
    return GaussianMixture(weights, means, scale_trils @ scale_trils.mT)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of each column; 0 without rounding error where it is constant."""
    return torch.where((x == x[0]).all(0), 0.0, x.std(0, correction=0))


def _vector(name: str, value, size: int, like: Tensor, positive: bool = True) -> Tensor:
    """A hyper-parameter as a vector of the dtype and device of the data."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.shape not in ((), (size,)):
        raise ValueError(
            f"{name} must be a number or have shape ({size},), found shape {tuple(value.shape)}."
        )
    if is_validation_enabled():
        if not bool((value.isfinite() & ((value > 0) | (not positive))).all()):
            wanted = "positive and finite" if positive else "finite"
            remedy = "; give a column of x that is constant a scale by hand" * (name == "scale")
            raise ValueError(f"{name} must be {wanted}, found {value.tolist()}{remedy}.")
    return value.expand(size)


def load_iris(
    standardize: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Fisher's 150 irises: four measurements of each flower, and its species.

    Args:
        standardize: give each column mean 0 and standard deviation 1 (divisor N).
        dtype: type of the measurements; torch's default dtype if None.
        device: device of the result.

    Returns:
        Measurements in cm, or in standard deviations, shape (150, 4), columns `IRIS_FEATURES`; and
        labels 0, 1, 2 (setosa, versicolor, virginica; 50 of each), int64, shape (150,).

    Raises:
        ImportError: without scikit-learn.

    References:
        Fisher 1936, The use of multiple measurements in taxonomic problems, Annals of Eugenics
        7:179-188.

    Example:
        >>> x, labels = load_iris()
        >>> x.shape, labels.bincount().tolist()
        (torch.Size([150, 4]), [50, 50, 50])
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("load_iris needs scikit-learn: pip install pyro_vi_ext[data]") from error
    iris = datasets.load_iris()
    x = torch.tensor(iris.data, dtype=torch.float64)
    if standardize:
        x = (x - x.mean(0)) / x.std(0, correction=0)
    labels = torch.tensor(iris.target, dtype=torch.int64, device=device)
    return x.to(dtype=dtype or torch.get_default_dtype(), device=device), labels
