r"""The two ways a guide's parameter enters a bound: through a draw, and through its density.

.. math::

    \log w = \log p(x, z) - \log q(z \mid \phi), \qquad z = z(\epsilon, \phi), \qquad
    \frac{d \log w}{d\phi} = \frac{\partial \log w}{\partial z} \frac{\partial z}{\partial \phi}
        - \frac{\partial \log q(z \mid \phi)}{\partial \phi}.

Estimators such as STL (arXiv:1703.09194) and DReG (arXiv:1810.04152) weigh the two differently.
What tells them apart here is the *path*, never the parameter, since a guide may share parameters
with its model: every gradient that passes through a draw passes through a *copy* of it that can be
weighed, and the density alone is had by scoring the guide again at detached draws. Copies
are never fed back into the draws, so a path through a chain of draws is weighed once.

Where no site of the guide depends on another draw, the distributions of the first run serve for
all scores; otherwise the guide runs again at the copies, and again at the detached draws.
"""

from __future__ import annotations

import functools

import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from pyro_vi_ext.roles import guide_roles, is_delta
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import Scored, Term, plates_of, site_log_prob, split_mask
from pyro_vi_ext.tracing import latent_sites, sample_sites, signature

__all__ = ["Detached", "Paths", "check_reparameterized", "draws", "is_reparameterized"]


def is_reparameterized(site: dict) -> bool:
    """Whether gradients pass through the draw of a guide site."""
    return bool(getattr(site["fn"], "has_rsample", False))


def draws(guide_trace: Trace) -> dict[str, dict]:
    """The sites of a guide trace that are drawn: all latents but point masses."""
    return {name: s for name, s in latent_sites(guide_trace).items() if not is_delta(s)}


def check_reparameterized(guide_trace: Trace, instead: str) -> None:
    """:raises NotImplementedError: if a draw of the guide has no path, naming the first.

    :param instead: objectives to propose.
    """
    for name, site in draws(guide_trace).items():
        if not is_reparameterized(site):
            raise NotImplementedError(
                f"Guide site '{name}' ({type(site['fn']).__name__}) is not reparameterised and has "
                "no path to differentiate. Use a distribution with rsample, or an objective with a "
                f"score-function term: {instead}."
            )


class Detached(Messenger):
    """Cuts the path of every draw before the model, or a later site of the guide, sees it.

    :ivar drawn: the guide's traces as drawn, one for each pair of the run.
    """

    def __init__(self):
        super().__init__()
        self.drawn: list[Trace] = []

    def _pyro_post_sample(self, msg):
        drawn = not msg["is_observed"] and not site_is_subsample(msg) and not is_delta(msg)
        if drawn and torch.is_tensor(msg["value"]):
            msg["value"] = msg["value"].detach()

    def show(self, run: Run, guide_trace: Trace) -> Trace:
        """The guide's trace that the model is replayed against, and that is scored."""
        self.drawn.append(guide_trace)
        trace = guide_trace.copy()
        for name, site in draws(guide_trace).items():
            trace.nodes[name] = {**site, "value": site["value"].detach()}
            trace.nodes[name].pop("drawn_log_prob", None)
        return trace


class Paths(Messenger):
    """The draws of one run, with what an estimator needs to weigh their paths.

    :param copies: show the model (and score the guide at) copies of the draws, whose backward pass
        :meth:`weigh` scales; otherwise the draws themselves.
    :ivar drawn: the guide's traces as drawn, one for each pair of the run.
    """

    def __init__(self, copies: bool):
        super().__init__()
        self.copies = copies
        self.drawn: list[Trace] = []
        # Hooks hold these lists only: a hook that held the run would keep its graph for ever.
        self._chains: list[bool] = []
        self._weights: list[torch.Tensor] = []

    # While the guide runs: a gradient through what its later sites see of a draw is a chain.

    def _pyro_post_sample(self, msg):
        value = msg["value"]
        if msg["is_observed"] or site_is_subsample(msg) or is_delta(msg):
            return
        if torch.is_tensor(value) and value.requires_grad:
            seen = value.view_as(value)
            check = functools.partial(_check_chain, self._chains, len(self.drawn), msg["name"])
            seen.register_hook(check)
            msg["value"] = seen

    # Between the guide and the model.

    def show(self, run: Run, guide_trace: Trace) -> Trace:
        """The guide's trace that the model is replayed against, and that is scored."""
        index = len(self.drawn)
        self.drawn.append(guide_trace)
        self._chains.append(is_chain(run, guide_trace))
        if not self.copies:
            return guide_trace
        values = {}
        for name, site in draws(guide_trace).items():
            copy = site["value"]
            if copy.requires_grad:
                copy = copy.view_as(copy)
                particle = None if run.vectorized else index
                event_dim = site["fn"].event_dim
                copy.register_hook(functools.partial(_weigh, self._weights, particle, event_dim))
            values[name] = copy
        return self._at(run, index, values)

    def weigh(self, weights: torch.Tensor) -> None:
        """Set the factors by which backward passes through the copies are multiplied.

        :param weights: shape (particles, \\*units), as the log-weights.
        """
        self._weights[:] = [weights]

    def _at(self, run: Run, index: int, values: dict[str, torch.Tensor]) -> Trace:
        """The guide at given values of its draws."""
        if self._chains[index]:
            trace = run.guide_at(values)
            if is_validation_enabled():
                _check_same_density(run, self.drawn[index], trace)
            return trace
        trace = self.drawn[index].copy()
        for name, value in values.items():
            trace.nodes[name] = {**trace.nodes[name], "value": value}
            trace.nodes[name].pop("drawn_log_prob", None)
        return trace

    # Densities of draws, by their own parameters.

    def log_q_at_detached(
        self, run: Run, scored: list[Scored], reparameterized_only: bool, masked: bool
    ) -> list[list[Term]]:
        """log q of each pair at detached draws: its gradient is that of the density alone.

        Point masses are left out: they are no draws, and depend on parameters by their value.

        :param reparameterized_only: only sites with reparameterised draws.
        :param masked: apply the masks; without them the terms are scores of what was drawn.
        """
        result = []
        for index, (drawn, part) in enumerate(zip(self.drawn, scored, strict=True)):
            sites = draws(drawn)
            values = {name: site["value"].detach() for name, site in sites.items()}
            trace = self._at(run, index, values)
            names = [
                n for n, s in sites.items() if not reparameterized_only or is_reparameterized(s)
            ]
            result.append([score(trace.nodes[n], part.masks[n] if masked else None) for n in names])
        return result


def _check_chain(chains: list[bool], index: int, name: str, grad: torch.Tensor) -> None:
    if not chains[index]:
        raise ValueError(
            f"A distribution of the guide depends on the draw of site '{name}' where no dependence "
            "was seen before: it comes and goes between calls, or cannot be followed "
            "(torch.func). Make it the same in every call, with plain torch operations, or use "
            "gradient='pathwise'."
        )


def _weigh(
    held: list[torch.Tensor], particle: int | None, event_dim: int, grad: torch.Tensor
) -> torch.Tensor:
    (weights,) = held
    if particle is not None:
        weights = weights[particle]
    batch_dim = grad.dim() - event_dim
    weights = weights.reshape(weights.shape[weights.dim() - min(batch_dim, weights.dim()) :])
    return grad * weights.reshape(weights.shape + (1,) * event_dim)


def score(site: dict, mask=None) -> Term:
    """The log-density of a guide site as a term of sign +1, unmasked unless a mask is given."""
    fn, _ = split_mask(site)
    log_prob = scale_and_mask(site_log_prob(site, fn), 1.0, mask)
    return Term(site["name"], log_prob, site["scale"], plates_of(site), +1, site)


def is_chain(run: Run, guide_trace: Trace) -> bool:
    """Whether the distribution of some guide site depends on the draw of another.

    A point mass or a factor beside a draw counts as dependent, and so does whatever cannot be told.
    Cached by the sites of the guide.
    """
    sites, drawn = sample_sites(guide_trace), draws(guide_trace)
    if not drawn:
        return False
    if len(drawn) < len(sites) or isinstance(poutine.unwrap(run.guide), GuideMessenger):
        return True
    if len(sites) == 1:
        return False
    key, known = signature(guide_trace), run.structure.chains
    if key not in known:
        try:
            parents = guide_roles(run.guide, run.args, run.kwargs, {}, run.subsample).parents
        except Exception:  # a guide that cannot be followed: running it again is always right
            known[key] = True
        else:
            known[key] = any(parents.get(name, {name}) for name in drawn)
    return known[key]


def _check_same_density(run: Run, drawn: Trace, again: Trace) -> None:
    """A guide run again at its own draws has the densities it had; checked once for its sites.

    :raises ValueError: naming a site of which this is not true (dropout in the guide, for one).
    """
    key = ("same density", signature(drawn))
    if key in run.structure.checked:
        return
    with torch.no_grad():
        for name, site in draws(drawn).items():
            # At other tensors of the same values: transforms remember what they have inverted, and
            # would answer the scores to come without a gradient.
            first, second = (
                site_log_prob({**s, "value": s["value"].detach()}, split_mask(s)[0])
                for s in (site, again.nodes[name])
            )
            rounding = torch.finfo(first.dtype).eps ** 0.5 * (1 + first.abs())
            if not bool(((first - second).abs() <= 10 * rounding).all()):
                raise ValueError(
                    f"Guide site '{name}' has another log-density when the guide is run again at "
                    "the same draws, so something in the guide is random that is no sample site "
                    "(dropout?). Switch it off (.eval()), make it an auxiliary sample site, or use "
                    "gradient='pathwise'."
                )
    run.structure.checked.add(key)
