r"""Two guides for the negative-binomial model: mean field, and semi-implicit.

.. math::
    q(r, p) &= \mathrm{Gamma}(r)\, \mathrm{Beta}(p), \\
    q(r, p) &= \int \mathrm{LogNormal}(r; \mu_r(\epsilon), \sigma_0^2)\,
        \mathrm{LogitNormal}(p; \mu_p(\epsilon), \sigma_0^2)\, \mathcal N(\epsilon; 0, I)\,
        d\epsilon .

The second is the guide of Yin and Zhou 2018, arXiv:1805.11183, section 4.1: r and p are
independent given the noise, and as dependent as the network makes them without it. The model is
:func:`pyro_vi_ext.models.negative_binomial.negative_binomial`.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions.transforms import SigmoidTransform

__all__ = ["NegativeBinomialSemiImplicit", "gamma_beta_guide"]


def _reference(x, default: Tensor | None = None) -> Tensor:
    """A tensor of the dtype and device that the model gives its sites."""
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else x.to(torch.get_default_dtype())
    return torch.empty(()) if default is None else default


def gamma_beta_guide(x: Tensor | None = None, *args, **kwargs) -> None:
    r"""Mean-field guide of the family that coordinate ascent finds, for stochastic gradients.

    .. math:: q(r, p) = \mathrm{Gamma}(r; a, \text{rate } b)\, \mathrm{Beta}(p; \alpha, \beta)

    Both sites are reparameterised (implicitly), so any pathwise objective trains it. Parameters,
    all positive scalars of the dtype and device of `x`: ``"r_concentration"``, ``"r_rate"``,
    ``"p_concentration1"``, ``"p_concentration0"``; they start at 10, that is at r of about
    1 +- 0.3 and p of about 0.5 +- 0.1. On the mite counts the best of this family is at
    KL(q || posterior) = 0.97252 nats.

    Args:
        x: counts, shape (N,), of which only dtype and device are used; torch's default dtype if
            None or of an integer dtype.
        args: the model's other arguments, ignored.
        kwargs: the model's keyword arguments, ignored.

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_vi_ext.models.negative_binomial import load_mites, negative_binomial
        >>> pyro.set_rng_seed(0)
        >>> pyro.clear_param_store()
        >>> adam = pyro.optim.Adam({"lr": 0.1})
        >>> loss = Trace_ELBO(num_particles=20, vectorize_particles=True)
        >>> svi = SVI(negative_binomial, gamma_beta_guide, adam, loss)
        >>> losses = [svi.step(load_mites()) for _ in range(40)]
        >>> sum(losses[-10:]) < sum(losses[:10])
        True
    """
    like = _reference(x)

    def parameter(name: str) -> Tensor:
        return pyro.param(name, lambda: like.new_tensor(10.0), constraint=constraints.positive)

    pyro.sample("r", dist.Gamma(parameter("r_concentration"), parameter("r_rate")))
    pyro.sample("p", dist.Beta(parameter("p_concentration1"), parameter("p_concentration0")))


class NegativeBinomialSemiImplicit(PyroModule):
    r"""The published semi-implicit guide of the negative-binomial model.

    .. math::
        \epsilon \sim \mathcal N(0, I), \quad (\mu_r, \mu_p) = \mathrm{MLP}(\epsilon), \quad
        \log r \sim \mathcal N(\mu_r, \sigma_0^2), \quad
        \operatorname{logit} p \sim \mathcal N(\mu_p, \sigma_0^2)

    Sites: ``"noise"`` (auxiliary, event shape (noise_dim,)), ``"r"`` and ``"p"`` (scalars, to
    whose left an enclosing particle plate may put any batch shape). Train it with
    ``SemiImplicitELBO``: an objective that scores the noise does not optimise a bound on it.

    Args:
        noise_dim: dimension of the noise.
        hidden_dims: widths of the hidden ReLU layers.
        scale: standard deviation of log r and of logit p given the noise.
        learn_scale: train the two scales, as ``PyroParam`` ``scale``, instead of fixing them.

    The network has torch's default dtype until ``.to(...)`` changes that; weights start as Glorot
    uniform and biases at 0. Calls take the model's arguments; r and p get the dtype of `x`.

    Raises:
        ValueError: if noise_dim < 1 or scale <= 0, and on a call if the counts lie on another
            device than the network.

    References:
        Yin and Zhou 2018, Semi-implicit variational inference, arXiv:1805.11183, section 4.1.

    Example:
        >>> import pyro
        >>> _ = torch.manual_seed(0)
        >>> guide = NegativeBinomialSemiImplicit()
        >>> with pyro.plate("particles", 5, dim=-2):
        ...     draws = guide(torch.tensor([0.0, 2.0, 1.0]))
        >>> draws["r"].shape, draws["p"].shape
        (torch.Size([5, 1]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        noise_dim: int = 10,
        hidden_dims: tuple[int, ...] = (40, 60, 40),
        scale: float = 0.1,
        learn_scale: bool = False,
    ):
        super().__init__()
        if noise_dim < 1 or not scale > 0.0:
            raise ValueError(
                'sites "r" and "p": the guide needs noise_dim >= 1 and scale > 0, found '
                f"noise_dim={noise_dim}, scale={scale}."
            )
        self.noise_dim = noise_dim
        widths = (noise_dim, *hidden_dims, 2)
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            linear = nn.Linear(width_in, width_out)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        scales = torch.full((2,), float(scale))
        if learn_scale:
            self.scale = PyroParam(scales, constraint=constraints.positive)
        else:
            self.register_buffer("scale", scales)

    def forward(self, x: Tensor | None = None, *args, **kwargs) -> dict[str, Tensor]:
        """Sample the sites; returns ``{"r": r, "p": p}``."""
        net = self.net  # one access: it registers the parameters with Pyro
        weight = net[0].weight
        like = _reference(x, default=weight)
        if like.device != weight.device:
            raise ValueError(
                f'site "x": found counts on {like.device} and the guide\'s network on '
                f"{weight.device}; call guide.to({str(like.device)!r}) before training."
            )
        loc = weight.new_zeros(self.noise_dim)
        noise = pyro.sample(
            "noise", dist.Normal(loc, 1.0).to_event(1), infer={"is_auxiliary": True}
        )
        mean = net(noise).to(like.dtype)
        scale = self.scale.to(like.dtype)
        r = pyro.sample("r", dist.LogNormal(mean[..., 0], scale[0]))
        logit_p = dist.Normal(mean[..., 1], scale[1])
        p = pyro.sample("p", dist.TransformedDistribution(logit_p, [SigmoidTransform()]))
        return {"r": r, "p": p}
