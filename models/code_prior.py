r"""An autoregressive prior over codes, learned when the codes are (arXiv:1711.00937).

.. math:: p(k_1, \ldots, k_T) = \prod_{t=1}^T p(k_t \mid k_{<t}), \qquad
    \max \sum_i \log p\big(k(x_i)\big), \qquad
    \mathrm{ELBO} = \log p\big(x \mid z = e_{k(x)}\big) + \log p\big(k(x)\big).

A VQ-VAE (van den Oord, Vinyals and Kavukcuoglu 2017) is trained with a uniform prior over its
codes. Then encoder, codes and decoder rest, and a prior is fitted to the indices k(x) of the data
by maximum likelihood: in place of the uniform one it raises the bound, and it can be sampled from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vi_ext.code_sites import (
    CodePrior,
    Quantizer,
    check_vectors,
    codes_of,
    expanded,
    remember_codes,
)
from pyro_vi_ext.objective import positive_int

from .autoregressive import Autoregressive, CausalTransformer
from .free_form_guide import data_plate, register

__all__ = ["AutoregressiveCodePrior", "AutoregressiveCodes"]


class AutoregressiveCodePrior(nn.Module):
    r"""A causal transformer over the indices of a grid of codes.

    .. math:: p(k) = \prod_{t=1}^T p(k_t \mid k_{<t}), \quad
        k \in \{0, \ldots, K - 1\}^T, \quad T = |\text{grid}| \cdot |\text{code\_shape}|

    in raster order, the indices of one latent (``code_shape``) after each other. :meth:`model` and
    :meth:`guide` are Pyro functions of indices: training is maximum likelihood, and its loss
    :math:`-\sum_i \log p(k_i)` is the KL of the whole model. :meth:`site` is then the prior of z.

    The quantiser is referred to, and is no part of the module: it is not trained, moved or saved
    with the prior, nor is its codebook read but to tell codes from indices.

    Args:
        quantizer: the quantiser of the guide whose codes they are.
        grid: shape of the positions of a datum, such as (7, 7); ``()`` for a single latent.
        width, num_layers, num_heads: of the :class:`~.autoregressive.CausalTransformer`.
        name: prefix of the parameters in Pyro's store.

    Raises:
        ValueError: for arguments out of range. On a call, naming the site: for indices of another
            shape or dtype, or (while Pyro's validation is on) out of range; if Pyro's store holds
            parameters of another module under this name.

    References:
        van den Oord, Vinyals and Kavukcuoglu 2017, Neural discrete representation learning,
        arXiv:1711.00937.

    Example: pairs of equal codes; log 4 of entropy instead of log 16.
        >>> import pyro
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_vi_ext import fit
        >>> from pyro_vi_ext.guides import VectorQuantizer
        >>> pyro.set_rng_seed(0)
        >>> pyro.clear_param_store()
        >>> quantizer = VectorQuantizer(4, 3)
        >>> indices = torch.arange(4).repeat(25).unsqueeze(1).expand(100, 2)
        >>> prior = AutoregressiveCodePrior(quantizer, (2,), width=16, num_layers=1)
        >>> svi = SVI(prior.model, prior.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> result = fit(svi, indices, num_steps=100)
        >>> math.log(4) < float(result.losses[-1]) / 100 < math.log(4) + 0.1
        True
        >>> prior.sample(3).shape, prior.site().sample((3,)).shape
        (torch.Size([3, 2]), torch.Size([3, 2, 3]))
    """

    def __init__(
        self,
        quantizer: Quantizer,
        grid: Sequence[int],
        *,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        name: str = "code_prior",
    ):
        super().__init__()
        if not isinstance(quantizer, Quantizer):
            raise ValueError(
                "quantizer must be a Quantizer, such as the VectorQuantizer of the guide; got "
                f"{type(quantizer).__name__}."
            )
        if not isinstance(grid, list | tuple):
            raise ValueError(f"grid must be a tuple of integers such as (7, 7), got {grid!r}.")
        self.grid = tuple(positive_int("each entry of grid", size) for size in grid)
        self.name = name
        object.__setattr__(self, "quantizer", quantizer)  # a reference, not a submodule
        options = {"width": width, "num_layers": num_layers, "num_heads": num_heads}
        length = math.prod(self.indices_shape)
        self.network = CausalTransformer(quantizer.num_codes, length, **options)

    @property
    def indices_shape(self) -> tuple[int, ...]:
        r"""Shape of the indices of a datum, (\*grid, \*code_shape)."""
        return self.grid + tuple(self.quantizer.code_shape)

    def model(self, indices: Tensor, *, size: int | None = None) -> None:
        r"""The prior as a Pyro model: plate ``"data"`` at dim -1, observed site ``"codes"``.

        Args:
            indices: codes of the data, int64, shape (B, \*grid, \*code_shape). The site's event
                shape is (T,).
            size: number N of all data, if these are a minibatch and the loss is to be that of all
                data: each datum then has scale N/B. None for the loss of these alone.
        """
        register(self.name, self)
        tokens = self._checked(indices)
        with data_plate(tokens, None, size):
            pyro.sample("codes", Autoregressive(self.network), obs=tokens)

    def guide(self, indices: Tensor, *, size: int | None = None) -> None:
        """The guide of :meth:`model`: empty, since all is observed."""

    def sample(self, num: int) -> Tensor:
        r"""Draws of indices, int64, shape (num, \*grid, \*code_shape)."""
        return Autoregressive(self.network).sample((num,)).reshape(num, *self.indices_shape)

    def site(self) -> AutoregressiveCodes:
        r"""The prior as a distribution of codes z, event shape (\*grid, D): a site of a model.

        Its parameters are registered with Pyro by :meth:`model` only. A model that is to train them
        through this site says ``pyro.module(prior.name, prior)``.
        """
        return AutoregressiveCodes(self)

    def _checked(self, indices: Tensor) -> Tensor:
        """Indices as sequences (B, T); ValueError if they cannot be codes."""
        shape, last = self.indices_shape, self.quantizer.num_codes - 1
        if indices.dtype != torch.long or tuple(indices.shape[1:]) != shape:
            raise ValueError(
                f'site "codes": expected indices of codes, int64, shape '
                f"({', '.join(map(str, ('B', *shape)))}), found {indices.dtype} of shape "
                f"{tuple(indices.shape)}."
            )
        if is_validation_enabled():
            bad = (indices < 0) | (indices > last)
            if bad.any():
                raise ValueError(
                    f'site "codes": expected indices from 0 to {last}, found from '
                    f"{int(indices.min())} to {int(indices.max())}; they are of another quantizer."
                )
        return indices.reshape(len(indices), self.network.length)


class AutoregressiveCodes(TorchDistribution):
    r"""Codes on a grid under an :class:`AutoregressiveCodePrior`: the site of z in a model.

    .. math:: p(z = e_k) = \prod_{t=1}^T p(k_t \mid k_{<t})

    It takes the place of ``CodePrior(quantizer).expand(grid).to_event(len(grid))``. Made by
    :meth:`AutoregressiveCodePrior.site`; batch shape (), event shape (\*grid, D). A value is scored
    at its codes: the indices with which it was drawn, or the nearest ones. The gradient of the
    score reaches the transformer, not the value or the codebook; draws are without gradient.

    Raises:
        ValueError: from `log_prob`, for values that are not on the grid.

    Example:
        >>> from pyro_vi_ext.guides import VectorQuantizer
        >>> quantizer = VectorQuantizer(2, 3)
        >>> p = AutoregressiveCodePrior(quantizer, (2,), width=8).site()
        >>> states = torch.cartesian_prod(torch.arange(2), torch.arange(2))
        >>> total = p.log_prob(quantizer.decode(states)).exp().sum()
        >>> round(total.item(), 4)
        1.0
    """

    arg_constraints = {}

    def __init__(self, prior: AutoregressiveCodePrior, validate_args=None):
        self.prior, self.quantizer = prior, prior.quantizer
        event_shape = torch.Size((*prior.grid, self.quantizer.code_dim))
        super().__init__(torch.Size(), event_shape, validate_args=validate_args)

    @property
    def support(self):
        return constraints.independent(CodePrior(self.quantizer).support, len(self.prior.grid))

    def expand(self, batch_shape, _instance=None):
        return expanded(self, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        check_vectors(value, self.quantizer)
        dims = len(self.event_shape)
        if value.shape[-dims:] != self.event_shape:
            raise ValueError(
                f"AutoregressiveCodes: expected codes on a grid, shape (..., "
                f"{', '.join(map(str, self.event_shape))}), found {tuple(value.shape)}."
            )
        shape = torch.broadcast_shapes(value.shape[:-dims], self.batch_shape)
        indices = codes_of(value, self.quantizer)
        tokens = indices.reshape(value.shape[:-dims] + (self.prior.network.length,))
        return Autoregressive(self.prior.network).log_prob(tokens).expand(shape)

    @torch.no_grad()
    def sample(self, sample_shape=()) -> Tensor:
        """Draws of codes, shape (\\*sample_shape, \\*batch_shape, \\*grid, D)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        tokens = Autoregressive(self.prior.network).sample(shape)
        indices = tokens.reshape(shape + self.prior.indices_shape)
        value = self.quantizer.decode(indices)
        remember_codes(value, self.quantizer, indices)
        return value
