r"""A Gaussian guide with parameters of its own for each datum: variational inference not amortised.

.. math:: q_{\lambda_i}(z) = \prod_l \mathcal N\big(z_l; m_{il}, \tau_{il}^2\big), \quad
    \lambda_i = (m_{il}, \log \tau_{il})_l .

With the model fixed, the best bound over all :math:`\lambda_i` less the bound of a network's
:math:`q(z \mid x_i)` is the *amortisation gap* (Cremer, Li and Duvenaud 2018, arXiv:1801.03558).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

if TYPE_CHECKING:
    from .deep_vae import DeepVAE

__all__ = ["FreeFormGuide"]


class FreeFormGuide(nn.Module):
    r"""Guide with variational parameters of its own for each datum: no amortisation.

    .. math:: q_{\lambda_i}(z) = \prod_l \mathcal N\big(z_l; m_{il}, \tau_{il}^2\big), \quad
        \lambda_i = (m_{il}, \log \tau_{il})_l

    Mean field: the layers are independent, unlike in :meth:`DeepVAE.guide`. With one layer both
    families are the same, so the difference of the two optimal bounds is the amortisation gap; with
    more, it is the gap less what is lost by independence.

    A module that is its own Pyro guide: pass it where ``vae.guide`` would stand. The parameters
    belong to fixed data: binarise once, not dynamically. They are dense, so Adam also moves those
    of the data outside a minibatch, by momentum: use all rows at once where that is possible.

    Args:
        num_data: N, the number of data.
        latent_dims: widths of the layers, bottom to top, those of the model.
        name: prefix of the parameters in Pyro's store: `name`.locs and `name`.log_scales, of shape
            (N, d_l) for each layer. They start at 0, the prior N(0, 1).

    Raises:
        ValueError: for arguments out of range. On a call, naming the sites: without `index` unless
            x has N rows; for an `index` out of range (while Pyro's validation is on); for a `size`
            other than N.

    References:
        Cremer, Li and Duvenaud 2018, Inference suboptimality in variational autoencoders,
        arXiv:1801.03558.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_vi_ext.models.deep_vae import DeepVAE
        >>> pyro.set_rng_seed(0)
        >>> pyro.clear_param_store()
        >>> x = torch.eye(4)
        >>> vae = DeepVAE(4, (2,), ((8,),)).requires_grad_(False).eval()
        >>> free = FreeFormGuide.from_amortised(vae, x)
        >>> elbo = Trace_ELBO(num_particles=100, vectorize_particles=True)
        >>> amortised_loss = elbo.loss(vae.model, vae.guide, x)
        >>> svi = SVI(vae.model, free, pyro.optim.Adam({"lr": 0.03}), elbo)
        >>> for _ in range(50):
        ...     loss = svi.step(x)
        >>> loss < amortised_loss
        True
    """

    def __init__(self, num_data: int, latent_dims: Sequence[int] = (50,), name: str = "free_form"):
        super().__init__()
        check_widths(num_data, latent_dims)
        self.name = name
        self.locs, self.log_scales = (
            nn.ParameterList(nn.Parameter(torch.zeros(num_data, d)) for d in latent_dims)
            for _ in range(2)
        )

    @classmethod
    def from_amortised(cls, vae: DeepVAE, x: Tensor, name: str = "free_form") -> FreeFormGuide:
        """A free-form guide of the rows of x that starts where the amortised guide is.

        Layers above the first start at the encoder's output given the means of those below.

        Args:
            vae: supplies widths, dtype, device and starting values; it is not changed.
            x: all data, shape (N, D).
            name: as for the class.
        """
        guide = cls(len(x), vae.latent_dims, name)
        with torch.no_grad():
            below = vae.checked(x)
            guide.to(below)
            for layer, network in enumerate(vae.encoder):
                below, log_scale = network(below).chunk(2, -1)
                guide.locs[layer].copy_(below)
                guide.log_scales[layer].copy_(log_scale)
        return guide

    def forward(self, x: Tensor, index: Tensor | None = None, *, size: int | None = None) -> None:
        """Sample the latents of the rows of x; arguments as those of :meth:`DeepVAE.model`.

        Args:
            x: data, of which only the number of rows is used.
            index: which lambda belongs to each row, shape (B,); None if x is all data in order.
            size: as for the model.
        """
        register(self.name, self)
        num_data = len(self.locs[0])
        found = None
        if size not in (None, num_data):
            found = f"size={size}; make the guide with num_data=size"
        elif index is None and len(x) != num_data:
            found = f"{len(x)} rows of x; pass index, their positions among all data"
        elif index is not None and is_validation_enabled():
            if bool(((index < 0) | (index >= num_data)).any()):
                low, high = int(index.min()), int(index.max())
                found = f"index from {low} to {high}; count the data from 0 to {num_data - 1}"
        if found:
            raise ValueError(
                f"sites {', '.join(repr(f'z{i + 1}') for i in range(len(self.locs)))}: the guide "
                f"has parameters for {num_data} data, found {found}."
            )
        with data_plate(x, index, size):
            for layer, (loc, log_scale) in enumerate(
                zip(self.locs, self.log_scales, strict=True), 1
            ):
                if index is not None:
                    loc, log_scale = loc[index], log_scale[index]
                pyro.sample(f"z{layer}", dist.Normal(loc, log_scale.exp()).to_event(1))


# --- shared with the deep VAE ---------------------------------------------------------------------


def register(name: str, module: nn.Module) -> None:
    """Show the parameters to Pyro, which keeps the first that it sees under a name for good."""
    pyro.module(name, module)
    store = pyro.get_param_store()
    for key, parameter in module.named_parameters():
        full = f"{name}$$${key}"
        if parameter.requires_grad and store.param_name(parameter) != full:
            raise ValueError(
                f"Pyro's parameter store holds another tensor under '{full}': of another module of "
                "this name, or loaded from a file. Call pyro.clear_param_store() first, give this "
                "module another name=..., or load files with module.load_state_dict()."
            )


def data_plate(x: Tensor, index: Tensor | None, size: int | None) -> pyro.plate:
    """The plate of the rows of x, each of scale N/B if they are a minibatch of `size` = N data."""
    rows = len(x)
    if index is not None and tuple(index.shape) != (rows,):
        raise ValueError(
            f'plate "data": x has {rows} rows and index shape {tuple(index.shape)}; pass one '
            "position among all data for each row."
        )
    if size is None:
        return pyro.plate("data", rows, dim=-1)
    if size < rows:
        raise ValueError(
            f'plate "data": size={size} is the number of all data, and x alone has {rows} rows.'
        )
    # Without an index the positions matter to nobody: they are not drawn, which would take N steps.
    index = torch.arange(rows, device=x.device) if index is None else index
    return pyro.plate("data", size, subsample=index, dim=-1)


def check_widths(data_dim, latent_dims, hidden_dims=()) -> None:
    """All are integers >= 1, given in tuples or lists, and there is a stochastic layer."""
    groups = [latent_dims, *hidden_dims] if isinstance(hidden_dims, list | tuple) else [None]
    nested = all(isinstance(group, list | tuple) for group in groups)
    widths = [data_dim, *(w for group in groups for w in group)] if nested else []
    if not nested or not latent_dims or any(not isinstance(w, int) or w < 1 for w in widths):
        raise ValueError(
            "Dimensions must be integers >= 1: latent_dims=(d_1, ...) for the stochastic layers, "
            "hidden_dims=((h_1, ...), ...) with a tuple of widths for each of them; found "
            f"{data_dim!r}, latent_dims={latent_dims!r}, hidden_dims={hidden_dims!r}."
        )
