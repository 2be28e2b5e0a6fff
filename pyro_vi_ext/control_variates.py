r"""Control variates that learn to lower the variance of the gradient they are part of.

For guide parameters :math:`\phi`, an unbiased estimate :math:`g` of the gradient and parameters
:math:`\psi` of a control variate on which :math:`\mathbb{E} g` does not depend,

.. math::

    \nabla_\psi \sum \mathrm{Var}(g) = \nabla_\psi \mathbb{E} \sum g^2
        = \mathbb{E} \big[ \nabla_\psi \textstyle\sum g^2 \big]

(Tucker et al. 2017, arXiv:1703.07370; Grathwohl et al. 2018, arXiv:1711.00123). That is all that
:math:`\psi` ever sees, and neither guide nor model sees any of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pyro_vi_ext.discrete import DiscreteObjective, Site, stacked
from pyro_vi_ext.learned import graph_leaves, register_learned
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import plates_of
from pyro_vi_ext.tracing import sample_sites

__all__ = [
    "ControlledObjective",
    "SiteModules",
    "as_module",
    "context",
    "features",
    "inputs",
    "mlp",
    "one_per_unit",
    "own_control",
    "slopes_at",
]


class ControlledObjective(DiscreteObjective):
    """Base class of objectives with learned control variates.

    :param name: name of the learned parts in Pyro's parameter store; default: the class's.
    """

    def __init__(self, num_particles=1, *, name: str | None = None, **options):
        super().__init__(num_particles, **options)
        self.name = type(self).__name__ if name is None else name
        self.learned: nn.Module | None = None

    def register(self) -> list[nn.Parameter]:
        """Hand the learned parts to Pyro; the parameters that are trained."""
        if self.learned is None or not any(p.requires_grad for p in self.learned.parameters()):
            return []
        self.learned = register_learned(self, self.name, self.learned)
        return [p for p in self.learned.parameters() if p.requires_grad]

    @staticmethod
    def combine(outputs, cotangents, pathwise, learned) -> torch.Tensor:
        r"""A scalar whose gradient is g for the guide, and that of :math:`-\sum g^2` for psi.

        :param outputs: what g passes through on its way to the guide's parameters (logits).
        :param cotangents: the estimated gradient of the bound for each output, as functions of psi.
        :param pathwise: a scalar with the rest of the guide's gradient.
        :param learned: psi.
        """
        if not learned:
            pairs = zip(outputs, cotangents, strict=True)
            return sum((output * cotangent.detach()).sum() for output, cotangent in pairs)
        leaves = graph_leaves(outputs)
        given = dict(grad_outputs=cotangents, create_graph=True, allow_unused=True)
        gradient = torch.autograd.grad(outputs, leaves, **given)
        rest = [None] * len(leaves)
        if torch.is_tensor(pathwise) and pathwise.requires_grad:
            rest = torch.autograd.grad(pathwise, leaves, retain_graph=True, allow_unused=True)
        total, square = 0.0, 0.0
        for leaf, own, other in zip(leaves, gradient, rest, strict=True):
            if own is not None:
                total = total + (leaf * own.detach()).sum()
                square = square + (own if other is None else own + other).square().sum()
        slopes = torch.autograd.grad(square, learned, retain_graph=True, allow_unused=True)
        for parameter, slope in zip(learned, slopes, strict=True):
            if slope is not None:
                total = total - (parameter * slope).sum()
        return total


class SiteModules(nn.Module):
    """Modules by the name of a site, made when a site is first seen."""

    def __init__(self):
        super().__init__()
        self.by_site = nn.ModuleDict()

    def at(self, site: Site, make) -> nn.Module:
        """The module of a site; ``make()`` if it is new. The random state stays as it was."""
        if self.get(site.name) is None:
            with _undisturbed():
                module = make().to(site.log_q.device, site.log_q.dtype)
                self.by_site[_key(site.name)] = module
        return self.get(site.name)

    def get(self, name: str) -> nn.Module | None:
        """The module of a site, if there is one."""
        return self.by_site[_key(name)] if _key(name) in self.by_site else None


def _key(name: str) -> str:
    """A name that a module may have: no dots, and nothing that ``ModuleDict`` has already."""
    return "'" + name.replace(".", "/") + "'"


class _undisturbed:
    """Inside, random numbers come from a state of their own, so that set-up costs none."""

    def __enter__(self):
        self._fork = torch.random.fork_rng()
        self._fork.__enter__()
        torch.manual_seed(int(torch.randint(2**62, (), device="cpu")))

    def __exit__(self, *error):
        self._fork.__exit__(*error)


def slopes_at(
    c: torch.Tensor, points: Sequence[torch.Tensor], train: bool
) -> Sequence[torch.Tensor]:
    """The gradient of c at each point; zero for a c that does not depend on z, a baseline."""
    if not c.requires_grad:
        return [torch.zeros_like(z) for z in points]
    return torch.autograd.grad(c.sum(), points, create_graph=train, materialize_grads=True)


def mlp(num_inputs: int, hidden_dims: Sequence[int], nonlinearity=nn.ReLU) -> nn.Sequential:
    """A network with one output, which is zero at first."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(num_inputs, width), nonlinearity()]
        num_inputs = width
    last = nn.Linear(num_inputs, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def context(site: Site) -> torch.Tensor | None:
    r"""What may be known of a unit before site i is drawn: earlier draws and observed values.

    :returns: (J, \*batch, features), or ``None`` if there is nothing.
    """
    run, parts = site.run, []
    guides, models = [pair.guide for pair in run.pairs], [pair.model for pair in run.pairs]
    for name, node in sample_sites(guides[0]).items():
        if name == site.name:
            break
        if set(plates_of(node)) <= set(site.plates):
            parts.append(_stack_values(run, [trace.nodes[name] for trace in guides]))
    for name, node in sample_sites(models[0]).items():
        if _is_data_of(node, site):
            values = _stack_values(run, [trace.nodes[name] for trace in models])
            parts.append(values.nan_to_num().asinh())  # masked, perhaps; of any size
    parts = [features(value, site) for value in parts]
    return _concatenated(parts) if parts else None


def inputs(site: Site, value: torch.Tensor) -> torch.Tensor:
    r"""A value of the site beside its :func:`context`: (J, \*batch, features)."""
    known, value = context(site), features(value, site)
    return value if known is None else _concatenated([value, known])


def _is_data_of(node: dict, site: Site) -> bool:
    """Whether observed values tell the units of a site apart."""
    observed = node["is_observed"] and torch.is_tensor(node["value"]) and node["value"].numel()
    return bool(observed) and bool(site.plates) and set(site.plates) <= set(plates_of(node))


def _stack_values(run: Run, nodes: list[dict]) -> torch.Tensor:
    event_dim = nodes[0]["fn"].event_dim
    dtype = torch.get_default_dtype()
    values = [node["value"].detach() for node in nodes]
    values = [v if v.is_floating_point() else v.to(dtype) for v in values]
    return stacked(run, values, event_dim)


def features(value: torch.Tensor, site: Site) -> torch.Tensor:
    r"""(J, \*batch, \*anything) -> (J, \*batch of the site, features)."""
    rank = site.run.structure.max_plate_nesting
    own = {rank + 1 + frame.dim for frame in site.plates.values()}
    others = [d for d in range(1, rank + 1) if d not in own]
    value = value.movedim(others, list(range(-len(others), 0))) if others else value
    value = value.flatten(1 + len(own)) if value.dim() > 1 + len(own) else value.unsqueeze(-1)
    for d in others:
        value = value.unsqueeze(d)
    return value


def _concatenated(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Features side by side, batches broadcast."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(shape + part.shape[-1:]) for part in parts], -1)


# --- control variates of the user ----------------------------------------------------------------


def as_module(control_variate) -> nn.Module | None:
    """A user's control variate, if it has parameters to learn.

    :raises ValueError: if it cannot be called.
    """
    if not callable(control_variate):
        raise ValueError(
            "control_variate must be a module or function of (sites, *args, **kwargs), got "
            f"{type(control_variate).__name__}."
        )
    return control_variate if isinstance(control_variate, nn.Module) else None


def own_control(control_variate, site: Site, z: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    r"""A user's control variate at one value of a site: (J, \*batch).

    :param z: (J, \*batch, \*event), perhaps with a dimension of categories.
    :param names: the scored sites, in the order of the guide.
    :raises ValueError: if it does not return one value per unit.
    """
    run, values = site.run, []
    for j, pair in enumerate(run.pairs):
        nodes = pair.guide.nodes
        known = {name: nodes[name]["value"].detach() for name in names[: names.index(site.name)]}
        node = nodes[site.name]
        own = z if run.vectorized else z[j]
        trailing = z.shape[z.dim() - site.num_extra_dims :] if site.num_extra_dims else ()
        known[site.name] = own.reshape(node["value"].shape + trailing)
        value = control_variate(known, *run.args, **run.kwargs)
        values.append(one_per_unit(value, node, "control variate"))
    return stacked(run, values)


def one_per_unit(value, node: dict, what: str) -> torch.Tensor:
    """A user's value at the batch shape of a site.

    :raises ValueError: if it does not broadcast to it.
    """
    batch = node["fn"].batch_shape
    try:
        if torch.is_tensor(value) and torch.broadcast_shapes(value.shape, batch) == batch:
            return value.expand(batch)
    except RuntimeError:
        pass
    found = f"shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
    raise ValueError(
        f"The {what} returned {found} for site '{node['name']}', expected one value per unit: "
        f"the site's batch shape {tuple(batch)}, without its event dimensions."
    )
