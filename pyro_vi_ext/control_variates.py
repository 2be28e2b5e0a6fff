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
from contextlib import suppress
from dataclasses import dataclass

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from pyro.ops.provenance import get_provenance
from pyro.poutine.replay_messenger import ReplayMessenger
from torch import nn

from pyro_vi_ext.discrete import DiscreteObjective, Site, stacked
from pyro_vi_ext.learned import graph_leaves, register_learned
from pyro_vi_ext.objective import Estimate
from pyro_vi_ext.roles import TrackSites
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import plates_of
from pyro_vi_ext.tracing import sample_sites, signature, trace_inside

__all__ = [
    "Control",
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

    def estimate(self, run: Run) -> Estimate:
        if not torch.is_grad_enabled():
            self._set_up(run)
        return super().estimate(run)

    def _set_up(self, run: Run) -> None:
        """Make what is learned in a first call without gradients, so that optimizers see it."""
        key = ("set up", signature(run.pairs[0].guide))
        if key in run.structure.checked:
            return
        run.structure.checked.add(key)
        with torch.random.fork_rng(), torch.enable_grad(), poutine.block(hide_types=["sample"]):
            again = run.again()
            sites = [site for site in self.sites(again, []) if site.log_q.requires_grad]
            with suppress(NotImplementedError):  # without a gradient any site will do
                self.prepare(sites)

    def prepare(self, sites: list[Site]) -> None:
        for site in sites:
            self.prepare_site(site)
        self.register()

    def prepare_site(self, site: Site) -> None:
        """Refuse a site, or make its learned parts if it is new."""

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
    return "'" + name.replace("%", "%25").replace(".", "%2E") + "'"


class _undisturbed:
    """Inside, random numbers come from a state of their own, so that set-up costs none."""

    def __enter__(self):
        self._fork = torch.random.fork_rng()
        self._fork.__enter__()
        torch.manual_seed(int(torch.randint(2**62, (), device="cpu")))

    def __exit__(self, *error):
        self._fork.__exit__(*error)


@dataclass
class Control:
    r"""A control variate at C values of z.

    :ivar values: in nats, one for each unit: (C, J, \*batch).
    :ivar total: the sum of its parts, each once, a scalar: a part that several units share is in
        the value of each, but its derivative for the draw of one of them counts once.
    """

    values: torch.Tensor
    total: torch.Tensor

    def __add__(self, other: Control) -> Control:
        return Control(self.values + other.values, self.total + other.total)

    def scaled(self, scale: torch.Tensor) -> Control:
        """Times a number."""
        return Control(self.values * scale, self.total * scale)


def slopes_at(
    total: torch.Tensor, points: Sequence[torch.Tensor], train: bool
) -> Sequence[torch.Tensor]:
    """The derivative of :attr:`Control.total` at each point; zero if it does not depend on z."""
    if not total.requires_grad:
        return [torch.zeros_like(z) for z in points]
    return torch.autograd.grad(total, points, create_graph=train, materialize_grads=True)


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
    independent = independent_data(run)
    for name, node in sample_sites(models[0]).items():
        if name in independent and _is_data_of(node, site):
            values = _stack_values(run, [trace.nodes[name] for trace in models])
            parts.append(values.nan_to_num().asinh())  # masked, perhaps; of any size
    parts = [features(value, site).to(site.log_q.dtype) for value in parts]
    return _concatenated(parts) if parts else None


def independent_data(run: Run) -> set[str]:
    """The observed sites of the model whose values do not depend on a latent.

    Read off one run of the model; where that is impossible, none.
    """
    trace = run.pairs[0].model
    key, known = ("data", signature(trace)), run.structure.chains
    if key not in known:
        around = [ReplayMessenger(run.pairs[0].guide), *run._around({}), TrackSites()]
        try:
            with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
                with poutine.block():
                    tracked = trace_inside(run.model, run.args, run.kwargs, *around)
        except Exception:  # a model that cannot be followed
            known[key] = set()
        else:
            nodes = sample_sites(tracked).items()
            known[key] = {
                n for n, s in nodes if s["is_observed"] and not get_provenance(s["value"])
            }
    return known[key]


def inputs(site: Site, value: torch.Tensor) -> torch.Tensor:
    r"""A value of the site beside its :func:`context`: (J, \*batch, features)."""
    known, value = context(site), features(value, site)
    value = value.to(site.log_q.dtype)
    return value if known is None else _concatenated([value, known])


def _is_data_of(node: dict, site: Site) -> bool:
    """Whether observed values are those of a unit, of a number that is the same in every call."""
    if not torch.is_tensor(node["value"]) or not node["value"].numel():
        return False
    plates = set(plates_of(node))
    return set(site.plates) <= plates and bool(site.plates or not plates)


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


def own_control(
    control_variate, site: Site, points: Sequence[torch.Tensor], names: Sequence[str]
) -> Control:
    r"""A user's control variate at values of a site.

    :param points: each (J, \*batch, \*event), perhaps with a dimension of categories.
    :param names: the scored sites, in the order of the guide.
    :raises ValueError: if it does not return one value per unit, or mixes units.
    """
    parts = [_own_control(control_variate, site, z, names) for z in points]
    return Control(torch.stack([c for c, _ in parts]), sum(total for _, total in parts))


def _own_control(control_variate, site: Site, z: torch.Tensor, names) -> tuple:
    run, values, total = site.run, [], 0.0
    for j, pair in enumerate(run.pairs):
        nodes = pair.guide.nodes
        known = {name: nodes[name]["value"].detach() for name in names[: names.index(site.name)]}
        node = nodes[site.name]
        own = z if run.vectorized else z[j]
        trailing = z.shape[z.dim() - site.num_extra_dims :] if site.num_extra_dims else ()
        own = known[site.name] = own.reshape(node["value"].shape + trailing)
        value = control_variate(known, *run.args, **run.kwargs)
        values.append(one_per_unit(value, node, "control variate"))
        total = total + value.sum()
        if is_validation_enabled():
            _check_units(run, value, own, node)
    return stacked(run, values), total


def _check_units(run: Run, value: torch.Tensor, own: torch.Tensor, node: dict) -> None:
    """The control variate of a unit depends on that unit's draw alone; checked once for a site.

    :raises ValueError: if it does not: its derivative could not be told from the others'.
    """
    key = ("units", node["name"], signature(run.pairs[0].guide))
    if key in run.structure.checked or not value.requires_grad or not own.requires_grad:
        return
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(2, value.shape, generator=generator) * 2 - 1).to(value)
    options = dict(retain_graph=True, materialize_grads=True)
    (alone,) = torch.autograd.grad(value.sum(), own, **options)
    (signed,) = torch.autograd.grad((value * signs).sum(), own, **options)
    batch_dim = len(node["fn"].batch_shape)
    signs = signs.reshape((1,) * (batch_dim - signs.dim()) + signs.shape)
    signs = signs.reshape(signs.shape + (1,) * (own.dim() - batch_dim))
    error = (signed - signs * alone).abs().max()
    if not bool(error <= 1e-4 * (alone.abs().max() + signed.abs().max())):
        raise ValueError(
            f"The control variate's value for one unit of site '{node['name']}' depends on the "
            "draws of other units, which biases the gradient. Let the value of a unit be a "
            "function of its own draw, or sum over the units and return one value that broadcasts."
        )
    run.structure.checked.add(key)


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
