r"""A semi-implicit guide made from a model (Yin and Zhou 2018, arXiv:1805.11183).

.. math::

    q(z) = \int q(z \mid \psi)\, q(\psi)\, d\psi, \qquad
    q(z \mid \psi) = \mathcal N\big(z;\; c + L\, \mu(\psi),\;
        L\, \mathrm{diag}(\sigma(\psi))^2 L^\top\big), \qquad
    \psi \sim \mathcal N(0, I),

over the unconstrained coordinates :math:`z` of all latent sites; the latents are
:math:`\theta = T(z)` with :math:`T` Pyro's ``biject_to`` of their supports. :math:`c` and :math:`L`
(lower triangular) are learned, :math:`\mu` and :math:`\log \sigma` are a network. As the network
works in units of :math:`L`, one setting of it serves posteriors of any scale and correlation. A
:math:`\sigma` that depends on :math:`\psi` is what follows funnels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.util import eye_like
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import biject_to

from .affine_normal import AffineNormal

__all__ = ["AutoSemiImplicit"]

# One setting for all models. Tried on the negative-binomial posterior, a banana, an X, bimodal
# targets, a ten-dimensional Gaussian and a funnel.
_KERNEL_SHARE = 0.5  # initial sd of q(z | psi) over that of q(z); >= 0.8 misses modes
_HEAD_GAIN = 0.1  # the network starts as a small departure from a linear one
_LOG_SCALE_RANGE = 2.0  # log sigma(psi) stays within +- 2 of its learned centre


class AutoSemiImplicit(AutoContinuous):
    r"""Guide whose Gaussian has a mean and a scale that a network makes from noise.

    .. math::

        \theta = T(z), \quad
        z = c + L\, \big(\mu(\psi) + \sigma(\psi) \odot u\big), \quad
        \psi \sim \mathcal N(0, I_E), \quad u \sim \mathcal N(0, I_D),

    .. math::

        \mu(\psi) = A \psi + B\, f(\psi) + b, \qquad
        \log \sigma(\psi) = s + 2 \tanh\big(\tfrac12 [B' f(\psi) + b']\big),

    with :math:`f` a tanh network (nearly odd at first, so that it does not slide into one of two
    modes), and :math:`c, L, A, B, b, B', b', s` and the weights of :math:`f` learned. Marginally in
    :math:`\psi` the latents may be skewed, curved, multi-modal and correlated across sites; given
    :math:`\psi` the density is a Gaussian one, pushed through :math:`T`. On the negative-binomial
    model with ``covariance="diagonal"`` and ``noise_dependent_scale=False`` it is the LogNormal x
    LogitNormal conditional of the paper.

    Train it with :class:`pyro_vi_ext.SemiImplicitELBO`. ``Trace_ELBO`` would add the entropy of
    the noise to the bound. Sites, besides the model's latents (``Delta``, in their plates):

    * ``_AutoSemiImplicit_noise``, auxiliary: :math:`\psi`, event shape ``(noise_dim,)``;
    * ``_AutoSemiImplicit_latent``, auxiliary: :math:`z`, event shape ``(latent_dim,)``, all sites
      packed in the model's order, with the density :math:`q(z \mid \psi)`.

    Parameters, made at the first call on the dtype and device of the model's latents (load a
    ``state_dict`` after one call): ``loc`` (D,) is :math:`c`; ``scale`` (D,) and ``unit_tril``
    (D, D) are :math:`L = \mathrm{diag}(scale)\, unit\_tril`; ``network`` holds the rest.

    Args:
        model: any model whose latents are all continuous and in full plates.
        hidden_dims: widths of the hidden layers of f; ``()`` makes :math:`\mu` linear.
        noise_dim: E, the dimension of the noise.
        init_loc_fn: the point where :math:`c` starts, per site. Pyro's ``init_to_median`` draws it
            from the prior, which for vague priors is far away: log r is about -70 under
            Gamma(0.01, 0.01).
        init_scale: initial standard deviation of each unconstrained coordinate under q(z).
        covariance: ``"full"``, or ``"diagonal"`` for a diagonal L (in D dimensions, 2 D instead of
            D + D^2 parameters: for thousands of latents).
        noise_dependent_scale: whether :math:`\sigma` depends on :math:`\psi`.

    Raises:
        ValueError: for arguments out of range; at the first call, if a latent is discrete or if
            Pyro's parameter store holds parameters of another model's guide under this name.
        NotImplementedError: at the first call, if a latent is in a subsampled plate (one network
            makes all latents jointly: there is no slice of it for a minibatch). The site, the plate
            and the remedy are named. Also if a latent is in a sequential plate.

    Reference: M. Yin and M. Zhou, *Semi-Implicit Variational Inference*, ICML 2018,
    arXiv:1805.11183.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_vi_ext import SemiImplicitELBO
        >>> from pyro_vi_ext.guides import AutoSemiImplicit
        >>> def model(x):
        ...     scale = pyro.sample("scale", dist.HalfNormal(2.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, scale), obs=x)
        >>> pyro.set_rng_seed(0)
        >>> pyro.clear_param_store()
        >>> x = torch.tensor([0.4, -1.3, 2.1])
        >>> guide = AutoSemiImplicit(model)
        >>> objective = SemiImplicitELBO(num_particles=20, num_mixing_particles=20)
        >>> adam = pyro.optim.Adam({"lr": 0.01})
        >>> svi = pyro.infer.SVI(model, guide, adam, objective)
        >>> losses = [svi.step(x) for _ in range(150)]
        >>> sum(losses[-10:]) < sum(losses[:10])
        True
        >>> guide.sample_posterior(1000, x)["scale"].shape
        torch.Size([1000])
    """

    def __init__(
        self,
        model: Callable,
        *,
        hidden_dims: Sequence[int] = (48, 48),
        noise_dim: int = 10,
        init_loc_fn: Callable = init_to_feasible,
        init_scale: float = 0.1,
        covariance: str = "full",
        noise_dependent_scale: bool = True,
    ):
        if not isinstance(hidden_dims, list | tuple):
            raise ValueError(f"hidden_dims must be a tuple of integers, got {hidden_dims!r}.")
        for width in hidden_dims:
            _positive_int("each of hidden_dims", width)
        _positive_int("noise_dim", noise_dim)
        is_number = isinstance(init_scale, Real) and not isinstance(init_scale, bool)
        if not is_number or not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale must be a positive number, got {init_scale!r}.")
        if covariance not in ("full", "diagonal"):
            raise ValueError(f"covariance must be 'full' or 'diagonal', got {covariance!r}.")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.hidden_dims = tuple(hidden_dims)
        self.noise_dim = noise_dim
        self.init_scale = float(init_scale)
        self.covariance = covariance
        self.noise_dependent_scale = bool(noise_dependent_scale)

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        try:
            self._check_plates()
            self._make_parameters()
        except Exception:
            self.prototype_trace = None  # the next call sets up again
            raise

    def _make_parameters(self) -> None:
        loc = self._init_loc()
        D = self.latent_dim
        network = _MixingNetwork(
            self.noise_dim, self.hidden_dims, D, self.noise_dependent_scale, loc
        )
        shapes = {f"network.{name}": value.shape for name, value in network.named_parameters()}
        self._check_store({"loc": (D,), "scale": (D,), "unit_tril": (D, D), **shapes})
        # Attributes set during a call take the value that the parameter store has for their name.
        self.loc = nn.Parameter(loc)
        self.scale = PyroParam(torch.full_like(loc, self.init_scale), constraints.positive)
        if self.covariance == "full":
            self.unit_tril = PyroParam(eye_like(loc, D), constraints.unit_lower_cholesky)
        self.network = network
        for module in network.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                module._parameters.pop(name)  # `del` would remove it from the store, too
                setattr(module, name, value)

    def _check_store(self, shapes: dict) -> None:
        if pyro.settings.get("module_local_params"):
            return
        store = pyro.get_param_store()
        for name, shape in shapes.items():
            stored = f"{self._pyro_name}.{name}"
            if stored in store and store[stored].shape != shape:
                raise ValueError(
                    f"Pyro's parameter store holds '{stored}' of another guide or model: shape "
                    f"{tuple(store[stored].shape)} where {tuple(shape)} is needed. Call "
                    "pyro.clear_param_store() before a new fit."
                )

    def _check_plates(self) -> None:
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            for frame in site["cond_indep_stack"]:
                if frame.full_size is not None and frame.full_size != frame.size:
                    raise NotImplementedError(
                        f"AutoSemiImplicit: latent site '{name}' is in plate '{frame.name}', which "
                        f"is subsampled ({frame.size} of {frame.full_size}). Its joint network "
                        "cannot make the latents of a minibatch. Use the full plate, or "
                        "pyro.infer.autoguide.AutoNormal for this site, or a guide of your own "
                        "whose noise is drawn inside the plate."
                    )

    def _ensure_setup(self, *args, **kwargs) -> None:
        if self.prototype_trace is None:
            with self._pyro_context:  # as in a call
                self._setup_prototype(*args, **kwargs)

    def _conditional(self, noise: Tensor) -> AffineNormal:
        """q(z | psi) for noise psi (*batch, E)."""
        shift, log_sigma = self.network(noise)
        unit_tril = self.unit_tril if self.covariance == "full" else None
        return AffineNormal(self.loc, self.scale, unit_tril, shift, log_sigma)

    def _draw_noise(self, num: int) -> Tensor:
        return torch.randn(num, self.noise_dim, dtype=self.loc.dtype, device=self.loc.device)

    def sample_latent(self, *args, **kwargs) -> Tensor:
        """Sample the noise, and given it the packed unconstrained latent ``(*batch, D)``."""
        noise_scale = self.loc.new_ones(self.noise_dim)
        noise = pyro.sample(
            f"_{self._pyro_name}_noise",
            dist.Normal(torch.zeros_like(noise_scale), noise_scale).to_event(1),
            infer={"is_auxiliary": True},
        )
        return pyro.sample(
            f"_{self._pyro_name}_latent",
            self._conditional(noise),
            infer={"is_auxiliary": True},
        )

    def get_posterior(self, *args, num_mixing_particles: int = 1000, **kwargs):
        r"""The posterior of the packed unconstrained latent, as a finite mixture over fresh noise.

        .. math:: \frac1K \sum_{k=1}^K q(z \mid \psi^{(k)}), \qquad \psi^{(k)} \sim q(\psi)

        An unbiased estimate of the density q(z) at every z, the same at all calls of the returned
        distribution's ``log_prob``, ``sample``, ``mean`` and ``variance``.

        Args:
            args: the model's, used if the guide has not been called yet. `kwargs` likewise.
            num_mixing_particles: K.

        Returns:
            A ``MixtureSameFamily`` of batch shape () and event shape (D,). ``log_prob`` of S
            values takes memory S x K x D.
        """
        _positive_int("num_mixing_particles", num_mixing_particles)
        self._ensure_setup(*args, **kwargs)
        components = self._conditional(self._draw_noise(num_mixing_particles))
        weights = dist.Categorical(logits=self.loc.new_zeros(num_mixing_particles))
        return dist.MixtureSameFamily(weights, components)

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args, **kwargs) -> dict[str, Tensor]:
        """Independent draws of all latents, in the constrained space, each with noise of its own.

        Args:
            num_samples: S.
            args: the model's, used if the guide has not been called yet. `kwargs` likewise.

        Returns:
            dict, site name -> draws of shape (S,) + shape of the site in the model.
        """
        _positive_int("num_samples", num_samples)
        self._ensure_setup(*args, **kwargs)
        return dict(self._constrain(self._conditional(self._draw_noise(num_samples)).sample()))

    @torch.no_grad()
    def quantiles(self, quantiles, *args, num_samples: int = 1000, **kwargs) -> dict[str, Tensor]:
        """Empirical quantiles of each coordinate, taken in the unconstrained space.

        As in Pyro's other guides they are then mapped to the site's support (so that the quantile
        of a simplex is a simplex). They come from random draws and carry their Monte-Carlo error.

        Args:
            quantiles: Q numbers in [0, 1].
            args: the model's, used if the guide has not been called yet. `kwargs` likewise.
            num_samples: number of draws.

        Returns:
            dict, site name -> tensor of shape (Q,) + shape of the site in the model.
        """
        _positive_int("num_samples", num_samples)
        self._ensure_setup(*args, **kwargs)
        levels = torch.as_tensor(quantiles, dtype=self.loc.dtype, device=self.loc.device)
        if levels.dim() != 1 or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"quantiles must be a list of numbers in [0, 1], got {quantiles!r}.")
        draws = self._conditional(self._draw_noise(num_samples)).sample().sort(0).values
        position = levels * (num_samples - 1)  # torch.quantile limits the size of its input
        below = position.floor().long()
        above = position.ceil().long()
        packed = torch.lerp(draws[below], draws[above], (position - below).unsqueeze(-1))
        return dict(self._constrain(packed))

    def median(self, *args, num_samples: int = 1000, **kwargs) -> dict[str, Tensor]:
        """The median of each latent: :meth:`quantiles` at 0.5, without the leading dimension."""
        result = self.quantiles([0.5], *args, num_samples=num_samples, **kwargs)
        return {name: value[0] for name, value in result.items()}

    def _constrain(self, packed: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Site by site, packed latents (S, D) -> values (S, *shape of the site)."""
        sites = [site for _, site in self.prototype_trace.iter_stochastic_nodes()]
        rank = max(len(site["fn"].batch_shape) for site in sites)
        latent = packed.reshape(packed.shape[:1] + (1,) * rank + packed.shape[1:])
        for site, unconstrained in self._unpack_latent(latent):
            value = biject_to(site["fn"].support)(unconstrained)
            yield site["name"], value.reshape(packed.shape[:1] + site["value"].shape)


class _MixingNetwork(PyroModule):
    r"""Noise (*batch, E) -> :math:`\mu` and :math:`\log \sigma`, both (*batch, D)."""

    def __init__(self, noise_dim, hidden_dims, latent_dim, noise_dependent_scale, like):
        super().__init__()
        self.latent_dim = latent_dim
        self.noise_dependent_scale = noise_dependent_scale
        options = {"dtype": like.dtype, "device": like.device}
        linear = PyroModule[nn.Linear]
        layers, width = [], noise_dim
        for next_width in hidden_dims:
            layers += [linear(width, next_width, **options), PyroModule[nn.Tanh]()]
            nn.init.normal_(layers[-2].weight, std=width**-0.5)
            nn.init.normal_(layers[-2].bias, std=0.1)
            width = next_width
        self.hidden = PyroModule[nn.Sequential](*layers)
        self.head = linear(width, latent_dim * (1 + noise_dependent_scale), **options)
        nn.init.normal_(self.head.weight, std=_HEAD_GAIN * width**-0.5)
        nn.init.zeros_(self.head.bias)
        self.skip = linear(noise_dim, latent_dim, bias=False, **options)
        directions = nn.init.orthogonal_(torch.empty(latent_dim, noise_dim, dtype=torch.float64))
        directions = nn.functional.normalize(directions, dim=-1)
        with torch.no_grad():
            self.skip.weight.copy_(directions * (1 - _KERNEL_SHARE**2) ** 0.5)
        log_sigma = torch.full((latent_dim,), math.log(_KERNEL_SHARE), **options)
        self.log_sigma = nn.Parameter(log_sigma)

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head(self.hidden(noise))
        shift = out[..., : self.latent_dim] + self.skip(noise)
        if not self.noise_dependent_scale:
            return shift, self.log_sigma
        bounded = _LOG_SCALE_RANGE * torch.tanh(out[..., self.latent_dim :] / _LOG_SCALE_RANGE)
        return shift, self.log_sigma + bounded


def _positive_int(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
