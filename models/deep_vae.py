r"""The variational autoencoder with one or more stochastic layers, and a guide not amortised.

.. math::

    p(x, z) = p(z_L) \prod_{l=1}^{L-1} p(z_l \mid z_{l+1})\; p(x \mid z_1), \qquad
    q(z \mid x) = q(z_1 \mid x) \prod_{l=1}^{L-1} q(z_{l+1} \mid z_l),

:math:`p(z_L) = \mathcal N(0, I)`; every other Gaussian has a diagonal covariance, and a network
makes its mean and the logarithm of its scale. The networks, their initialisation and the default
sizes are those of the importance-weighted autoencoder (Burda, Grosse and Salakhutdinov 2016,
arXiv:1509.00519).

What the network that makes :math:`q(z \mid x_i)` loses against the best :math:`q_{\lambda_i}(z)` of
the same kind, fitted to datum i alone, is the *amortisation gap*: :class:`FreeFormGuide` measures
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from .free_form_guide import FreeFormGuide, check_widths, data_plate, register

__all__ = ["ActiveUnits", "DeepVAE", "FreeFormGuide"]


class ActiveUnits(NamedTuple):
    """Which latent dimensions a model uses.

    Attributes:
        counts: number of active units of each layer, bottom to top.
        variances: of each layer, the variance over the data of each unit's posterior mean,
            shape (d_l,), in squared units of z.
    """

    counts: list[int]
    variances: list[Tensor]


class DeepVAE(nn.Module):
    r"""Model and amortised guide of images (or other vectors) with Gaussian latent layers.

    .. math::
        \text{model: } & z_L \sim \mathcal N(0, I), \quad
            z_l \sim \mathcal N\big(\mu_l(z_{l+1}), \sigma_l(z_{l+1})^2\big), \quad
            x \sim \mathrm{Bernoulli}\big(\text{logits } f(z_1)\big)
            \text{ or } \mathcal N\big(f(z_1), s^2\big), \\
        \text{guide: } & z_1 \sim \mathcal N\big(m_1(x), \tau_1(x)^2\big), \quad
            z_{l+1} \sim \mathcal N\big(m_{l+1}(z_l), \tau_{l+1}(z_l)^2\big).

    :meth:`model` and :meth:`guide` are Pyro functions of the same arguments, for ``SVI`` or an
    objective. Sites, in the plate ``"data"`` at dim -1: ``"z1"`` (bottom), ``"z2"``, ..., event
    shape (d_l,), and the observed ``"x"``, event shape (D,). Particles may be vectorised on the
    left; the networks that see only x then run once per datum and not once per particle.

    The architecture of the paper is ``DeepVAE(784, data_mean=x_train.mean(0))`` with one layer, and
    ``latent_dims=(100, 50), hidden_dims=((200, 200), (100, 100))`` with two.

    Args:
        data_dim: D.
        latent_dims: d_1, d_2, ..., one entry for each stochastic layer, bottom to top.
        hidden_dims: for each layer the widths of the hidden layers of its network in the guide; the
            network between the same two layers in the model has them in reverse. ``()`` makes a
            linear map; with a Gaussian likelihood the model is then factor analysis.
        likelihood: ``"bernoulli"`` for binary x, or ``"gaussian"``, whose scale s is learned, one
            positive number per dimension, the same for all data, starting at 1.
        activation: makes the module between two hidden layers.
        data_mean: mean of the training data, shape (D,): the output's bias starts there
            (Bernoulli: at its logit, clipped to [0.001, 0.999]). None: at 0.
        name: prefix of the parameters in Pyro's store: those of the guide are `name`.encoder, those
            of the model `name`.decoder.

    Weights start as Glorot uniform, other biases at 0, in torch's default dtype. ``.to(...)``
    moves them; x is converted to their dtype, but not to their device. To keep the model fixed
    while a guide is trained: ``vae.requires_grad_(False).eval()``.

    Raises:
        ValueError: for arguments out of range. On a call, naming the site: if x has another shape
            or device, has entries that the likelihood cannot have produced (while Pyro's
            validation is on), or does not fit `index` and `size`; if Pyro's store holds parameters
            of another module under this name.

    References:
        Kingma and Welling 2014, Auto-encoding variational Bayes, arXiv:1312.6114.
        Burda, Grosse and Salakhutdinov 2016, Importance weighted autoencoders, arXiv:1509.00519.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_vi_ext.models.images import binarize, load_images
        >>> pyro.set_rng_seed(0)
        >>> pyro.clear_param_store()
        >>> images = load_images().x_train
        >>> vae = DeepVAE(64, (8,), ((32,),), data_mean=images.mean(0))
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.003}), Trace_ELBO())
        >>> losses = [svi.step(binarize(images[:100])) for _ in range(30)]
        >>> sum(losses[-5:]) < sum(losses[:5])
        True
        >>> loc, scale = vae.encode(binarize(images[:3]))
        >>> loc.shape, vae.decode(loc).shape, vae.sample(2).shape
        (torch.Size([3, 8]), torch.Size([3, 64]), torch.Size([2, 64]))
    """

    def __init__(
        self,
        data_dim: int,
        latent_dims: Sequence[int] = (50,),
        hidden_dims: Sequence[Sequence[int]] = ((200, 200),),
        *,
        likelihood: str = "bernoulli",
        activation: Callable[[], nn.Module] = nn.Tanh,
        data_mean: Tensor | None = None,
        name: str = "deep_vae",
    ):
        super().__init__()
        check_widths(data_dim, latent_dims, hidden_dims)
        if len(hidden_dims) != len(latent_dims):
            raise ValueError(
                f"hidden_dims must have one tuple of widths for each of the {len(latent_dims)} "
                f"stochastic layers, found {hidden_dims!r}."
            )
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be 'bernoulli' or 'gaussian', got {likelihood!r}.")
        self.data_dim, self.latent_dims = data_dim, tuple(latent_dims)
        self.likelihood, self.name = likelihood, name
        below = (data_dim, *latent_dims)  # widths of x, z1, z2, ...
        layers = range(len(latent_dims))
        self.encoder = nn.ModuleList(
            _network([below[i], *hidden_dims[i], below[i + 1]], activation, heads=2) for i in layers
        )
        self.decoder = nn.ModuleList(
            _network(
                [below[i + 1], *hidden_dims[i][::-1], below[i]], activation, heads=2 if i else 1
            )
            for i in layers
        )
        log_scale = nn.Parameter(torch.zeros(data_dim)) if likelihood == "gaussian" else None
        self.decoder.register_parameter("x_log_scale", log_scale)
        if data_mean is not None:
            with torch.no_grad():
                self.decoder[0][-1].bias.copy_(self._output_bias(torch.as_tensor(data_mean)))

    def model(self, x: Tensor, index: Tensor | None = None, *, size: int | None = None) -> None:
        """The generative model, as a Pyro function.

        Args:
            x: data, shape (B, D).
            index: positions of the rows of x among all data, shape (B,), int64; only a guide with
                parameters of its own for each datum needs it.
            size: number N of all data, if x is a minibatch and the loss is to be that of all data:
                each datum then has scale N/B. None for the loss of x alone, the convention of the
                literature (in nats per image when divided by B).
        """
        register(f"{self.name}.decoder", self.decoder)
        x = self.checked(x)
        top = len(self.latent_dims)
        with data_plate(x, index, size):
            z = pyro.sample(f"z{top}", self._prior(top))
            for layer in range(top - 1, 0, -1):
                z = pyro.sample(f"z{layer}", self._prior(layer, z))
            pyro.sample("x", self._likelihood(z), obs=x)

    def guide(self, x: Tensor, index: Tensor | None = None, *, size: int | None = None) -> None:
        """The amortised guide, as a Pyro function; arguments as those of :meth:`model`."""
        register(f"{self.name}.encoder", self.encoder)
        below = x = self.checked(x)
        with data_plate(x, index, size):
            for layer, network in enumerate(self.encoder, 1):
                below = pyro.sample(f"z{layer}", _gaussian(network, below))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of the bottom layer's q(z1 | x), each of shape (B, d_1), for x (B, D)."""
        q = _gaussian(self.encoder[0], self.checked(x))
        return q.mean, q.stddev

    def decode(self, z: Tensor, layer: int = 1) -> Tensor:
        """Mean of x (for binary x, the probabilities) given one layer, shape (..., D).

        Args:
            z: value of the layer, shape (..., d_layer). From a layer above the first, the layers
                below take their means in turn.
            layer: which layer, counted from the bottom, from 1.
        """
        for below in range(layer - 1, 0, -1):
            z = self._prior(below, z).mean
        return self._likelihood(z).mean

    @torch.no_grad()
    def sample(self, num: int) -> Tensor:
        """Draws of x from the model, all layers drawn in turn, shape (num, D)."""
        top = len(self.latent_dims)
        z = self._prior(top).sample((num,))
        for layer in range(top - 1, 0, -1):
            z = self._prior(layer, z).sample()
        return self._likelihood(z).sample()

    @torch.no_grad()
    def active_units(self, x: Tensor, threshold: float = 0.01, num_draws: int = 100) -> ActiveUnits:
        r"""Count the latent units whose posterior mean depends on the datum.

        .. math:: A_u = \mathrm{Var}_x\, \mathbb E_{q(z \mid x)}[z_u] > 0.01

        The inner expectation is exact in the first layer. In a layer above it is a mean over draws
        of the layers below; the variance over x is then the covariance of two means over
        independent halves of the draws, to which their noise adds nothing on average.

        Args:
            x: data, shape (N, D), N >= 2.
            threshold: a unit is active if its variance is larger.
            num_draws: draws for each datum, at least 2; one at a time is in memory.

        Raises:
            ValueError: for fewer than two data or draws.

        References:
            Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519.
        """
        if len(x) < 2 or num_draws < 2:
            raise ValueError(
                "active_units needs two or more rows of x and num_draws >= 2, found "
                f"{len(x)} and {num_draws}."
            )
        bottom = _gaussian(self.encoder[0], self.checked(x))
        variances = [bottom.mean.var(0)]
        for layer in range(2, len(self.encoder) + 1):
            half = num_draws // 2
            a, b = (sum(self._drawn_mean(bottom, layer) for _ in range(half)) for _ in range(2))
            covariance = ((a - a.mean(0)) * (b - b.mean(0))).sum(0) / (len(x) - 1)
            variances.append(covariance / half**2)
        return ActiveUnits([int((v > threshold).sum()) for v in variances], variances)

    def _drawn_mean(self, bottom: dist.Distribution, layer: int) -> Tensor:
        """The mean of a layer of the guide given a draw of those below."""
        z = bottom.sample()
        for network in self.encoder[1 : layer - 1]:
            z = _gaussian(network, z).sample()
        return _gaussian(self.encoder[layer - 1], z).mean

    def _prior(self, layer: int, above: Tensor | None = None) -> dist.Distribution:
        if above is None:
            zeros = next(self.parameters()).new_zeros(self.latent_dims[layer - 1])
            return dist.Normal(zeros, 1.0).to_event(1)
        return _gaussian(self.decoder[layer], above)

    def _likelihood(self, z: Tensor) -> dist.Distribution:
        output = self.decoder[0](z)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=output).to_event(1)
        return dist.Normal(output, self.decoder.x_log_scale.exp()).to_event(1)

    def _output_bias(self, data_mean: Tensor) -> Tensor:
        if data_mean.shape != (self.data_dim,) or not bool(data_mean.isfinite().all()):
            raise ValueError(
                f"data_mean must be {self.data_dim} finite numbers, the mean of the data over its "
                f"rows, x.mean(0); found shape {tuple(data_mean.shape)}."
            )
        if self.likelihood == "gaussian":
            return data_mean
        if data_mean.min() < 0 or data_mean.max() > 1:
            raise ValueError(
                "data_mean must be in [0, 1] for the Bernoulli likelihood, found values from "
                f"{data_mean.min():g} to {data_mean.max():g}."
            )
        return data_mean.clamp(0.001, 0.999).logit()

    def checked(self, x: Tensor) -> Tensor:
        """x, of shape (B, D), in the dtype of the networks; ValueError if it cannot be data."""
        like = next(self.parameters())
        if x.dim() != 2 or x.shape[1] != self.data_dim:
            raise ValueError(
                f'site "x": expected data of shape (B, {self.data_dim}), found {tuple(x.shape)}; '
                "flatten images with x.flatten(1), or make the DeepVAE with data_dim=D."
            )
        if x.device != like.device:
            raise ValueError(
                f'site "x": found data on {x.device} and the networks on {like.device}; move '
                f"either, vae.to({str(x.device)!r}) before training."
            )
        x = x.to(like.dtype)
        if is_validation_enabled():
            binary = self.likelihood == "bernoulli"
            bad = ~((x == 0) | (x == 1)) if binary else ~x.isfinite()
            if bad.any():
                row, column = bad.nonzero()[0].tolist()
                value = float(x[row, column])
                grey = binary and 0 < value < 1
                raise ValueError(
                    f'site "x": the {self.likelihood} likelihood needs '
                    f"{'zeros and ones' if binary else 'finite numbers'}, found {value:g} in row "
                    f"{row}, column {column} ({int(bad.sum())} of {bad.numel()} entries); "
                    + ("draw them with binarize(x)." if grey else "correct or drop these rows.")
                )
        return x


# --- helpers -----------------------------------------------------------------------------------


def _gaussian(network: nn.Module, given: Tensor) -> dist.Distribution:
    """The Gaussian whose mean and log-scale are the two halves of a network's output."""
    loc, log_scale = network(given).chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def _network(widths: list[int], activation: Callable[[], nn.Module], heads: int) -> nn.Sequential:
    """Fully connected; the last layer is linear, with several outputs of the last width."""
    layers: list[nn.Module] = []
    last = len(widths) - 1
    for i in range(1, last + 1):
        copies = heads if i == last else 1
        linear = nn.Linear(widths[i - 1], copies * widths[i])
        for block in linear.weight.chunk(copies):  # each head is a layer of its own
            nn.init.xavier_uniform_(block)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])
