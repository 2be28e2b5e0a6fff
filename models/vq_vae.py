r"""Autoencoders of binary images with a grid of latent codes: quantised, or Gaussian beside it.

.. math::

    p(x, z) = p(x \mid z) \prod_{u \in \text{grid}} p(z_u), \qquad
    q(z \mid x) = \prod_{u} q(z_u \mid z_{e,u}(x)),

with :math:`z_u \in \mathbb R^D`. In the VQ-VAE (van den Oord, Vinyals and Kavukcuoglu 2017,
arXiv:1711.00937) :math:`z_u` is the code nearest to the encoder's output and the prior is over
codes: uniform while training, and learned afterwards (:mod:`.code_prior`). In the Gaussian
autoencoder :math:`q` is a diagonal Gaussian and :math:`p(z_u) = \mathcal N(0, I)`.

The decoder may be strong enough to model x without z (:class:`AutoregressiveDecoder`). The Gaussian
guide can then stop using z, at no cost to the bound (Bowman et al. 2016, arXiv:1511.06349): its KL
falls to zero. That of a quantised guide with a uniform prior is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vi_ext.code_sites import CodePrior, Quantizer, VectorQuantized

from .autoregressive import Autoregressive, CausalTransformer
from .bernoulli_vae import bernoulli, centred, checked_binary
from .free_form_guide import data_plate, register

__all__ = [
    "VQVAE",
    "AutoregressiveDecoder",
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "GaussianGridVAE",
    "MLPDecoder",
    "MLPEncoder",
]


class _GridVAE(nn.Module):
    """What the two autoencoders share: the sites "z", event (\\*grid, D), and "x", event (P,)."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, grid: Sequence[int], name: str):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.grid, self.name = tuple(grid), name
        self.register_buffer("_like", torch.zeros(decoder.data_dim), persistent=False)

    def model(
        self, x: Tensor, index: Tensor | None = None, *, size: int | None = None, prior=None
    ) -> None:
        """The generative model, as a Pyro function.

        Args:
            x: zeros and ones, shape (B, P).
            index: positions of the rows of x among all data, shape (B,), int64; only a guide with
                parameters of its own for each datum needs it.
            size: number N of all data, if x is a minibatch and the loss is to be that of all data:
                each datum then has scale N/B. None for the loss of x alone.
            prior: a distribution of z, event shape (\\*grid, D), in place of the model's own, such
                as a learned one.
        """
        register(f"{self.name}.decoder", self.decoder)
        x = checked_binary('site "x"', x, self._like)
        with data_plate(x, index, size):
            z = pyro.sample("z", self.prior() if prior is None else prior)
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(
        self, x: Tensor, index: Tensor | None = None, *, size: int | None = None, prior=None
    ) -> None:
        """The amortised guide, as a Pyro function; arguments as those of :meth:`model`."""
        register(f"{self.name}.encoder", self.encoder)
        with data_plate(x, index, size):
            pyro.sample("z", self.posterior(x))

    def decode(self, z: Tensor) -> Tensor:
        """Probabilities of ones given z (..., \\*grid, D); of a strong decoder, given draws of it.

        An autoregressive decoder has no mean in closed form: a draw stands for it, shape (..., P).
        """
        p = self.decoder(z)
        return p.sample() if isinstance(p, Autoregressive) else p.mean

    @torch.no_grad()
    def sample(self, num: int, prior=None) -> Tensor:
        """Draws of z from the prior, and of x given z; shape (num, P)."""
        prior = self.prior() if prior is None else prior
        return self.decoder(prior.sample((num,))).sample()

    def prior(self) -> dist.Distribution:
        raise NotImplementedError

    def posterior(self, x: Tensor) -> dist.Distribution:
        """q(z | x) of zeros and ones (B, P); batch shape (B,), event shape (\\*grid, D)."""
        raise NotImplementedError


class VQVAE(_GridVAE):
    r"""Model and guide with one code at each position of a grid (a residual quantiser: several).

    :meth:`model` and :meth:`guide` are Pyro functions of the same arguments, for
    :class:`~pyro_vi_ext.VQELBO`. Sites, in the plate ``"data"`` at dim -1: ``"z"``, event shape
    (\*grid, D), and the observed ``"x"``, event shape (P,).

    Args:
        encoder: module from x, shape (B, P), to vectors (B, \*grid, D).
        decoder: module from codes (..., \*grid, D) to a distribution of x with event shape (P,); it
            has P as ``data_dim``.
        quantizer: a quantiser of ``pyro_vi_ext.guides``.
        grid: shape of the grid of positions.
        name: prefix of the parameters in Pyro's store: name.encoder, name.quantizer, name.decoder.

    Raises:
        ValueError: on a call, naming the site: if x is not binary or of another shape or device; if
            the encoder's output does not fit the grid; if Pyro's store holds parameters of another
            module under this name.

    References:
        van den Oord, Vinyals and Kavukcuoglu 2017, Neural discrete representation learning,
        arXiv:1711.00937.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> from pyro_vi_ext import VQELBO
        >>> from pyro_vi_ext.guides import VectorQuantizer
        >>> from pyro_vi_ext.models.images import binarize, load_images
        >>> pyro.set_rng_seed(0)
        >>> pyro.clear_param_store()
        >>> x = binarize(load_images().x_train[:100])
        >>> quantizer = VectorQuantizer(16, 8, ema_decay=0.99, kmeans_init=True)
        >>> vae = VQVAE(MLPEncoder(64, (4,), 8), MLPDecoder((4,), 8, 64), quantizer, (4,))
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.003}), VQELBO())
        >>> losses = [svi.step(x) for _ in range(30)]
        >>> sum(losses[-5:]) < sum(losses[:5])
        True
        >>> vae.codes(x).shape, vae.decode(quantizer.decode(vae.codes(x))).shape
        (torch.Size([100, 4]), torch.Size([100, 64]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        quantizer: Quantizer,
        grid: Sequence[int],
        *,
        name: str = "vq_vae",
    ):
        super().__init__(encoder, decoder, grid, name)
        self.quantizer = quantizer

    def guide(
        self, x: Tensor, index: Tensor | None = None, *, size: int | None = None, prior=None
    ) -> None:
        """The quantised guide, as a Pyro function; arguments as those of :meth:`model`."""
        if any(True for _ in self.quantizer.parameters()):
            register(f"{self.name}.quantizer", self.quantizer)
        super().guide(x, index, size=size)

    def posterior(self, x: Tensor) -> dist.Distribution:
        """All mass on one code at each position; batch shape (B,), event shape (\\*grid, D)."""
        z_e = self.encoder(checked_binary('site "x"', x, self._like))
        expected = (len(x), *self.grid, self.quantizer.code_dim)
        if z_e.shape != expected:
            raise ValueError(
                f'site "z": the encoder gave shape {tuple(z_e.shape)}, and the grid and the '
                f"quantizer need {expected}."
            )
        return VectorQuantized(z_e, self.quantizer).to_event(len(self.grid))

    @torch.no_grad()
    def codes(self, x: Tensor, batch_size: int = 1000) -> Tensor:
        """Indices of the codes of x (N, P): int64, shape (N, \\*grid, \\*code_shape)."""
        parts = [self.posterior(part).base_dist.indices for part in x.split(batch_size)]
        return torch.cat(parts)

    def prior(self) -> dist.Distribution:
        return CodePrior(self.quantizer).expand(self.grid).to_event(len(self.grid))


class GaussianGridVAE(_GridVAE):
    r"""The same with a diagonal Gaussian guide and a standard normal prior.

    Args:
        encoder: module from x, shape (B, P), to means and log-scales (B, \*grid, 2 D).
        decoder: as for :class:`VQVAE`.
        grid: shape of the grid of positions.
        code_dim: D.
        name: prefix of the parameters in Pyro's store.

    Example:
        >>> encoder, decoder = MLPEncoder(64, (4,), 2 * 8), MLPDecoder((4,), 8, 64)
        >>> vae = GaussianGridVAE(encoder, decoder, (4,), 8)
        >>> vae.sample(3).shape
        torch.Size([3, 64])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        grid: Sequence[int],
        code_dim: int,
        *,
        name: str = "gaussian_grid_vae",
    ):
        super().__init__(encoder, decoder, grid, name)
        self.code_dim = code_dim

    def posterior(self, x: Tensor) -> dist.Distribution:
        """The Gaussian whose mean and log-scale are the two halves of the encoder's output."""
        loc, log_scale = self.encoder(checked_binary('site "x"', x, self._like)).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(len(self.grid) + 1)

    def prior(self) -> dist.Distribution:
        zeros = self._like.new_zeros((*self.grid, self.code_dim))
        return dist.Normal(zeros, 1.0).to_event(zeros.dim())


# --- networks: from binary x (..., P) to vectors on a grid, and back to a distribution of x -------


class MLPEncoder(nn.Module):
    """Fully connected: x (..., P) to (..., \\*grid, D), one hidden layer with ReLU."""

    def __init__(self, data_dim: int, grid: Sequence[int], code_dim: int, width: int = 256):
        super().__init__()
        self.shape = (*grid, code_dim)
        out = math.prod(self.shape)
        self.net = nn.Sequential(nn.Linear(data_dim, width), nn.ReLU(), nn.Linear(width, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(centred(x)).unflatten(-1, self.shape)


class MLPDecoder(nn.Module):
    """Fully connected: z (..., \\*grid, D) to independent Bernoullis of P pixels."""

    def __init__(self, grid: Sequence[int], code_dim: int, data_dim: int, width: int = 256):
        super().__init__()
        self.data_dim, self.event_dim = data_dim, len(grid) + 1
        dim = math.prod(grid) * code_dim
        self.net = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, data_dim))

    def forward(self, z: Tensor) -> dist.Distribution:
        return bernoulli(self.net(z.flatten(-self.event_dim)))


class AutoregressiveDecoder(nn.Module):
    r"""A strong decoder: each pixel sees z and all pixels before it.

    .. math:: p(x \mid z) = \prod_{t=1}^P p(x_t \mid x_{<t}, z)

    Args:
        grid, code_dim: shape of z, (..., \*grid, D).
        data_dim: P.
        options: of :class:`~.autoregressive.CausalTransformer`.
    """

    def __init__(self, grid: Sequence[int], code_dim: int, data_dim: int, **options):
        super().__init__()
        self.data_dim, self.event_dim = data_dim, len(grid) + 1
        context_dim = math.prod(grid) * code_dim
        self.net = CausalTransformer(2, data_dim, context_dim=context_dim, **options)

    def forward(self, z: Tensor) -> dist.Distribution:
        return Autoregressive(self.net, z.flatten(-self.event_dim), dtype=z.dtype)


class _Residual(nn.Module):
    """h + conv(relu(conv(relu(h)))), 3 x 3 and 1 x 1, as in the paper."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
            *(nn.ReLU(), nn.Conv2d(width, width, 1)),
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


class ConvolutionalEncoder(nn.Module):
    """x (B, H W) to (B, H/4, W/4, D): two strided 4 x 4 convolutions and two residual blocks.

    Args:
        image_shape: (H, W), both divisible by 4; the grid is (H/4, W/4).
        code_dim: D.
        width: channels of the hidden layers (256 in the paper).
    """

    def __init__(self, image_shape: tuple[int, int], code_dim: int, width: int = 32):
        super().__init__()
        self.image_shape = _divisible(image_shape)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 4, 2, 1)),
            *(_Residual(width), _Residual(width), nn.ReLU(), nn.Conv2d(width, code_dim, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(centred(x).reshape(-1, 1, *self.image_shape)).movedim(1, -1)
        return h.reshape(x.shape[:-1] + h.shape[1:])


class ConvolutionalDecoder(nn.Module):
    """z (..., H/4, W/4, D) to independent Bernoullis of H W pixels; the encoder's mirror image."""

    def __init__(self, image_shape: tuple[int, int], code_dim: int, width: int = 32):
        super().__init__()
        height, breadth = _divisible(image_shape)
        self.data_dim = height * breadth
        self.net = nn.Sequential(
            *(nn.Conv2d(code_dim, width, 3, padding=1), _Residual(width), _Residual(width)),
            *(nn.ReLU(), nn.ConvTranspose2d(width, width, 4, 2, 1)),
            *(nn.ReLU(), nn.ConvTranspose2d(width, 1, 4, 2, 1)),
        )

    def forward(self, z: Tensor) -> dist.Distribution:
        maps = z.reshape(-1, *z.shape[-3:]).movedim(-1, 1)
        return bernoulli(self.net(maps).reshape(*z.shape[:-3], self.data_dim))


def _divisible(image_shape: tuple[int, int]) -> tuple[int, int]:
    if len(image_shape) != 2 or any(side % 4 for side in image_shape):
        raise ValueError(
            f"image_shape must be (height, width), both divisible by 4; got {image_shape!r}."
        )
    return tuple(image_shape)
