r"""Structured prediction: the lower half of an image from its upper half, through Bernoulli layers.

.. math::

    p(x, b \mid u) = p(b_1 \mid u) \prod_{l=1}^{L-1} p(b_{l+1} \mid b_l)\; p(x \mid b_L), \qquad
    \mathcal L_m = \mathbb E \log \frac1m \sum_{k=1}^m p(x \mid b_L^{(k)}), \quad
    b^{(k)} \sim p(b \mid u),

for the upper half u and the lower half x. The proposal is the prior given u, so there is no guide
to learn, and the weight of a draw is its likelihood. :math:`\mathcal L_m` rises with m to
:math:`\log p(x \mid u)`. The task is that of Raiko, Berglund, Alain and Dinh (2015,
arXiv:1406.2989), with the networks of the Concrete distribution (Maddison, Mnih and Teh 2017,
arXiv:1611.00712), where VIMCO (Mnih and Rezende 2016, arXiv:1602.06725) is the peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyro
from torch import Tensor, nn

from .bernoulli_vae import (
    bernoulli,
    checked_binary,
    checked_mean,
    network,
    sample_layers,
    start_output,
)
from .free_form_guide import check_widths, data_plate, register

__all__ = ["StructuredPrediction", "halves"]


class StructuredPrediction(nn.Module):
    r"""Conditional model of one half of a binary image given the other; its prior is the guide.

    .. math::
        b_1 \sim \mathrm{Bernoulli}\big(\sigma(f_1(u - \bar u))\big), \quad
        b_{l+1} \sim \mathrm{Bernoulli}\big(\sigma(f_{l+1}(2 b_l - 1))\big), \quad
        x \sim \mathrm{Bernoulli}\big(\sigma(f_{L+1}(2 b_L - 1))\big),

    every f linear. :meth:`model` and :meth:`guide` are Pyro functions of the same arguments, to be
    trained with ``ImportanceWeightedELBO(num_particles=m)``, m = 1, 5, 50 in the paper: the loss is
    :math:`-\mathcal L_m`, and the draws have VIMCO's gradient. Guide and model share all parameters
    of the hidden layers: there the densities of a draw cancel from its weight, and what the bound
    teaches them is in the score of the draw alone.

    Sites, in the plate ``"data"`` at dim -1: ``"b1"`` (nearest to u), ``"b2"``, ..., event shape
    (d_l,), and the observed ``"lower"``, event shape (D,). Particles may be vectorised on the
    left, and the latents relaxed, as in :class:`~pyro_vi_ext.models.bernoulli_vae.BernoulliVAE`.

    The networks of the paper are ``StructuredPrediction(392, 392)``, that is 392-240-240-392, and
    ``StructuredPrediction(392, 392, (240, 240, 240))``, with the means of the training data.

    Args:
        upper_dim: number of pixels of the upper half.
        lower_dim: number D of pixels of the lower half.
        latent_dims: d_1, d_2, ..., one entry for each layer of draws, from u to x.
        upper_mean: :math:`\bar u`, mean of the training data, shape (upper_dim,), subtracted
            from u. None: 1/2 everywhere.
        lower_mean: mean of the training data, shape (D,): the output's bias starts at its logit (of
            the mean clipped to [0.001, 0.999]). None: 1/2 everywhere.
        name: prefix of the parameters in Pyro's store.

    Weights start as Glorot uniform, other biases at 0, in torch's default dtype. ``.to(...)`` moves
    them; data are converted to their dtype, but not to their device.

    Raises:
        ValueError: for arguments out of range. On a call, naming the half: if it has another shape
            or device, or entries other than 0 and 1 (while Pyro's validation is on); if the halves
            differ in their number of rows or do not fit `index` and `size`; if Pyro's store holds
            parameters of another module under this name.

    References:
        Raiko et al. 2015, Techniques for learning binary stochastic feedforward neural networks,
        arXiv:1406.2989.
        Maddison, Mnih and Teh 2017, The Concrete distribution, arXiv:1611.00712.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> from pyro_vi_ext import ImportanceWeightedELBO
        >>> from pyro_vi_ext.models.images import binarize, load_images
        >>> pyro.set_rng_seed(0)
        >>> pyro.clear_param_store()
        >>> data = load_images()
        >>> upper, lower = halves(binarize(data.x_train[:200]), data.shape)
        >>> means = {"upper_mean": upper.mean(0), "lower_mean": lower.mean(0)}
        >>> net = StructuredPrediction(32, 32, (20, 20), **means)
        >>> vimco = ImportanceWeightedELBO(num_particles=5)
        >>> svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.01}), vimco)
        >>> losses = [svi.step(upper, lower) for _ in range(40)]
        >>> sum(losses[-5:]) < sum(losses[:5])
        True
        >>> net.model(upper[:3]).shape  # a draw of what may lie below
        torch.Size([3, 32])
    """

    def __init__(
        self,
        upper_dim: int,
        lower_dim: int,
        latent_dims: Sequence[int] = (240, 240),
        *,
        upper_mean: Tensor | None = None,
        lower_mean: Tensor | None = None,
        name: str = "structured_prediction",
    ):
        super().__init__()
        for dim in (upper_dim, lower_dim):
            check_widths(dim, latent_dims)
        self.name = name
        self.register_buffer("upper_mean", checked_mean("upper_mean", upper_mean, upper_dim))
        self.register_buffer("lower_mean", checked_mean("lower_mean", lower_mean, lower_dim))
        self.layers = nn.ModuleList(
            network(widths) for widths in pairwise((upper_dim, *latent_dims, lower_dim))
        )
        start_output(self.layers[-1], self.lower_mean)

    def model(
        self,
        upper: Tensor,
        lower: Tensor | None = None,
        index: Tensor | None = None,
        *,
        size: int | None = None,
    ) -> Tensor:
        """The conditional model, as a Pyro function.

        Args:
            upper: the halves that are given, zeros and ones, shape (B, upper_dim).
            lower: the halves to predict, zeros and ones, shape (B, D); None draws them.
            index: positions of the rows among all data, shape (B,), int64; not needed.
            size: number N of all data, if the rows are a minibatch and the loss is to be that of
                all data: each datum then has scale N/B. None for the loss of these rows alone.

        Returns:
            The lower halves, given or drawn, shape (..., B, D).
        """
        register(self.name, self)
        if lower is not None:
            lower = checked_binary('site "lower"', lower, self.lower_mean)
            if len(lower) != len(upper):
                raise ValueError(
                    f'site "lower": found {len(lower)} rows, and {len(upper)} rows of upper; pass '
                    "the two halves of the same images."
                )
        with data_plate(upper, index, size):
            h = self._hidden(upper)
            return pyro.sample("lower", bernoulli(self.layers[-1](h)), obs=lower)

    def guide(
        self,
        upper: Tensor,
        lower: Tensor | None = None,
        index: Tensor | None = None,
        *,
        size: int | None = None,
    ) -> None:
        """The prior given the upper half, as a Pyro function; arguments as for :meth:`model`."""
        register(self.name, self)
        with data_plate(upper, index, size):
            self._hidden(upper)

    def _hidden(self, upper: Tensor) -> Tensor:
        """Draw the hidden layers; the last one, centred."""
        upper = checked_binary('argument "upper"', upper, self.upper_mean)
        return sample_layers(self.layers[:-1], upper - self.upper_mean)


def halves(images: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cut images into an upper and a lower half; of an odd number of lines, the lower has more.

    Args:
        images: shape (N, H W), line after line.
        shape: height H and width W, as in :class:`~pyro_vi_ext.models.images.ImageData`.

    Returns:
        Upper halves, shape (N, H//2 W), and lower halves, shape (N, (H - H//2) W); views.

    Raises:
        ValueError: if the images do not have this shape, or have less than two lines.

    Example:
        >>> import torch
        >>> upper, lower = halves(torch.arange(6.0).reshape(1, 6), (3, 2))
        >>> upper.tolist(), lower.tolist()
        ([[0.0, 1.0]], [[2.0, 3.0, 4.0, 5.0]])
    """
    height, width = shape
    if height < 2 or images.dim() != 2 or images.shape[1] != height * width:
        raise ValueError(
            f"images must have shape (N, {height} * {width}) and at least two lines, found "
            f"{tuple(images.shape)} for shape={tuple(shape)}; flatten images with x.flatten(1)."
        )
    cut = height // 2 * width
    return images[:, :cut], images[:, cut:]
