r"""The variational autoencoder with Bernoulli latents, of one or more layers.

.. math::

    p(x, b) = p(b_L) \prod_{l=1}^{L-1} p(b_l \mid b_{l+1})\; p(x \mid b_1), \qquad
    q(b \mid x) = q(b_1 \mid x) \prod_{l=1}^{L-1} q(b_{l+1} \mid b_l),

all distributions products of Bernoullis whose logits come from a network; those of
:math:`p(b_L)` are parameters. It is the model on which estimators of the gradient through
discrete draws are compared: networks, centring and initialisation are those of REBAR (Tucker,
Mnih, Maddison, Lawson and Sohl-Dickstein 2017, arXiv:1703.07370) and RELAX (Grathwohl, Choi, Wu,
Roeder and Duvenaud 2018, arXiv:1711.00123).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from .free_form_guide import check_widths, data_plate, register

__all__ = ["BernoulliVAE"]


class BernoulliVAE(nn.Module):
    r"""Model and amortised guide of binary vectors with Bernoulli latent layers.

    .. math::
        \text{model: } & b_L \sim \mathrm{Bernoulli}\big(\sigma(\alpha)\big), \quad
            b_l \sim \mathrm{Bernoulli}\big(\sigma(f_{l+1}(2 b_{l+1} - 1))\big), \quad
            x \sim \mathrm{Bernoulli}\big(\sigma(f_1(2 b_1 - 1))\big), \\
        \text{guide: } & b_1 \sim \mathrm{Bernoulli}\big(\sigma(g_1(x - \bar x))\big), \quad
            b_{l+1} \sim \mathrm{Bernoulli}\big(\sigma(g_{l+1}(2 b_l - 1))\big).

    :meth:`model` and :meth:`guide` are Pyro functions of the same arguments, for ``SVI`` or an
    objective. Sites, in the plate ``"data"`` at dim -1: ``"b1"`` (bottom), ``"b2"``, ..., event
    shape (d_l,), and the observed ``"x"``, event shape (D,). Particles may be vectorised on the
    left. The latents may be relaxed: everything is a smooth function of values in [0, 1] of shape
    (..., B, d_l), and the density of such a value is
    :math:`\sum_d b_d \log p_d + (1 - b_d) \log(1 - p_d)` (Pyro's validation has to be off).

    The models of the papers, with ``data_mean=x_train.mean(0)``:

    ==================  =======================================================
    linear, one layer   ``BernoulliVAE(784)``
    linear, two layers  ``BernoulliVAE(784, (200, 200))``
    nonlinear           ``BernoulliVAE(784, (200,), ((200, 200),))``
    ==================  =======================================================

    Args:
        data_dim: D.
        latent_dims: d_1, d_2, ..., one entry for each stochastic layer, bottom to top.
        hidden_dims: for each layer the widths of the tanh layers of its network in the guide; the
            network between the same two layers in the model has them in reverse. None: all
            networks are linear.
        data_mean: :math:`\bar x`, mean of the training data, shape (D,): it is subtracted from the
            guide's input, and the output's bias starts at its logit (of the mean clipped to
            [0.001, 0.999]). None: 1/2 everywhere.
        name: prefix of the parameters in Pyro's store: those of the guide are `name`.encoder, those
            of the model `name`.decoder, with the logits :math:`\alpha` among them.

    Weights start as Glorot uniform, other biases and :math:`\alpha` at 0, in torch's default dtype.
    ``.to(...)`` moves them; x is converted to their dtype, but not to their device.

    Raises:
        ValueError: for arguments out of range. On a call, naming the site: if x has another shape
            or device, has entries other than 0 and 1 (while Pyro's validation is on), or does not
            fit `index` and `size`; if Pyro's store holds parameters of another module under this
            name.

    References:
        Tucker et al. 2017, REBAR: low-variance, unbiased gradient estimates for discrete latent
        variable models, arXiv:1703.07370.
        Grathwohl et al. 2018, Backpropagation through the void, arXiv:1711.00123.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI
        >>> from pyro_vi_ext import ImportanceWeightedELBO
        >>> from pyro_vi_ext.models.images import binarize, load_images
        >>> pyro.set_rng_seed(0)
        >>> pyro.clear_param_store()
        >>> images = load_images().x_train
        >>> vae = BernoulliVAE(64, (20,), data_mean=images.mean(0))
        >>> vimco = ImportanceWeightedELBO(num_particles=5)
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), vimco)
        >>> losses = [svi.step(binarize(images[:100])) for _ in range(30)]
        >>> sum(losses[-5:]) < sum(losses[:5])
        True
        >>> vae.sample(2).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        data_dim: int,
        latent_dims: Sequence[int] = (200,),
        hidden_dims: Sequence[Sequence[int]] | None = None,
        *,
        data_mean: Tensor | None = None,
        name: str = "bernoulli_vae",
    ):
        super().__init__()
        check_widths(data_dim, latent_dims, () if hidden_dims is None else hidden_dims)
        hidden_dims = ((),) * len(latent_dims) if hidden_dims is None else hidden_dims
        if len(hidden_dims) != len(latent_dims):
            raise ValueError(
                f"hidden_dims must have one tuple of widths for each of the {len(latent_dims)} "
                f"stochastic layers, or be None for linear networks; found {hidden_dims!r}."
            )
        self.data_dim, self.latent_dims, self.name = data_dim, tuple(latent_dims), name
        self.register_buffer("data_mean", checked_mean("data_mean", data_mean, data_dim))
        widths = [
            [below, *hidden, above]
            for (below, above), hidden in zip(
                pairwise((data_dim, *latent_dims)), hidden_dims, strict=True
            )
        ]
        self.encoder = nn.ModuleList(network(w) for w in widths)
        self.decoder = nn.ModuleList(network(w[::-1]) for w in widths)
        self.decoder.prior_logits = nn.Parameter(torch.zeros(latent_dims[-1]))
        start_output(self.decoder[0], self.data_mean)

    def model(self, x: Tensor, index: Tensor | None = None, *, size: int | None = None) -> None:
        """The generative model, as a Pyro function.

        Args:
            x: zeros and ones, shape (B, D).
            index: positions of the rows of x among all data, shape (B,), int64; only a guide with
                parameters of its own for each datum needs it.
            size: number N of all data, if x is a minibatch and the loss is to be that of all data:
                each datum then has scale N/B. None for the loss of x alone, the convention of the
                literature (in nats per image when divided by B).
        """
        register(f"{self.name}.decoder", self.decoder)
        x = checked_binary('site "x"', x, self.data_mean)
        with data_plate(x, index, size):
            logits = self.decoder.prior_logits
            for layer in range(len(self.decoder), 0, -1):
                b = pyro.sample(f"b{layer}", bernoulli(logits))
                logits = self.decoder[layer - 1](centred(b))
            pyro.sample("x", bernoulli(logits), obs=x)

    def guide(self, x: Tensor, index: Tensor | None = None, *, size: int | None = None) -> None:
        """The amortised guide, as a Pyro function; arguments as those of :meth:`model`."""
        register(f"{self.name}.encoder", self.encoder)
        x = checked_binary('site "x"', x, self.data_mean)
        with data_plate(x, index, size):
            sample_layers(self.encoder, x - self.data_mean)

    @torch.no_grad()
    def sample(self, num: int) -> Tensor:
        """Draws of x from the model, all layers drawn in turn, shape (num, D)."""
        b = bernoulli(self.decoder.prior_logits).sample((num,))
        for layer in reversed(self.decoder):
            b = bernoulli(layer(centred(b))).sample()
        return b


# --- shared with structured prediction ------------------------------------------------------------


def sample_layers(networks: Sequence[nn.Module], h: Tensor) -> Tensor:
    """Draw the sites "b1", "b2", ... upwards from a centred input; the last draw, centred."""
    for layer, logits in enumerate(networks, 1):
        h = centred(pyro.sample(f"b{layer}", bernoulli(logits(h))))
    return h


def bernoulli(logits: Tensor) -> dist.Distribution:
    """Independent Bernoullis, one event."""
    return dist.Bernoulli(logits=logits).to_event(1)


def centred(b: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return 2.0 * b - 1.0


def network(widths: Sequence[int]) -> nn.Sequential:
    """Fully connected with tanh between the layers, linear at the end; Glorot uniform, biases 0."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def start_output(output: nn.Sequential, mean: Tensor) -> None:
    """Put the bias of a network's last layer at the logit of a mean in [0, 1]."""
    output[-1].bias.copy_(mean.clamp(0.001, 0.999).logit())


def checked_mean(argument: str, mean: Tensor | None, dim: int) -> Tensor:
    """The mean of binary data, shape (dim,), in torch's default dtype; 1/2 in place of None."""
    result = torch.full((dim,), 0.5)
    if mean is None:
        return result
    mean = torch.as_tensor(mean).detach()
    if mean.shape != (dim,) or not bool(((mean >= 0) & (mean <= 1)).all()):
        found = f"shape {tuple(mean.shape)}"
        if mean.shape == (dim,):
            found = f"values from {float(mean.min()):g} to {float(mean.max()):g}"
        raise ValueError(
            f"{argument} must be {dim} numbers in [0, 1], the mean of the training data over its "
            f"rows, x.mean(0); found {found}."
        )
    return result.copy_(mean)


def checked_binary(what: str, x: Tensor, like: Tensor) -> Tensor:
    """x, of shape (B, D), in the dtype of its mean; ValueError if it cannot be data."""
    (dim,) = like.shape
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(
            f"{what}: expected data of shape (B, {dim}), found {tuple(x.shape)}; flatten images "
            "with x.flatten(1), or make the module for data of this width."
        )
    if x.device != like.device:
        raise ValueError(
            f"{what}: found data on {x.device} and the networks on {like.device}; move either, "
            f"module.to({str(x.device)!r}) before training."
        )
    x = x.to(like.dtype)
    if is_validation_enabled():
        bad = ~((x == 0) | (x == 1))  # NaN is bad too
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            value = float(x[row, column])
            remedy = "draw them with binarize(x)" if 0 < value < 1 else "correct or drop these rows"
            raise ValueError(
                f"{what}: expected zeros and ones, found {value:g} in row "
                f"{row}, column {column} ({int(bad.sum())} of {bad.numel()} entries); {remedy}."
            )
    return x
