"""One step of training for each kind of target: an ``SVI``, or a module with a torch optimizer.

A trainer makes the step that a loop by hand would make, refuses a loss or gradient that is not
finite before the parameters change, and hands out the state of parameters, modules and optimizers
that a checkpoint needs for an exact resumption.
"""

from __future__ import annotations

import contextlib
import math

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import SVI
from pyro.infer.util import torch_item, zero_grads
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vi_ext.alternating import Alternation, users
from pyro_vi_ext.checkpoint import (
    find_modules,
    load_modules,
    match_names,
    match_tensor,
    undisturbed,
)
from pyro_vi_ext.compiled.compiled_svi import CompiledSVI, StepNotFinite
from pyro_vi_ext.compiled.step_graph import LOOP_STEPS
from pyro_vi_ext.not_finite import bad_gradients, is_finite, listed, not_finite_sites

__all__ = ["ModuleTrainer", "SVITrainer", "Trainer", "make_trainer"]


def make_trainer(target, optimizer, scheduler, guide_steps=1):
    if isinstance(target, SVI):
        if optimizer is not None:
            raise ValueError("An SVI has its optimizer: leave out optimizer=, or pass a module.")
        if scheduler is not None:
            raise ValueError(
                "The scheduler of an SVI is its optimizer. Instead of scheduler=, give the SVI "
                "e.g. pyro.optim.ExponentialLR({'optimizer': torch.optim.Adam, 'optim_args': "
                "{'lr': 0.01}, 'gamma': 0.99}); fit steps it once per step."
            )
        trainer = CompiledTrainer if isinstance(target, CompiledSVI) else SVITrainer
        return trainer(target, guide_steps)
    if not isinstance(target, torch.nn.Module):
        raise ValueError(
            "fit takes a pyro.infer.SVI or a module such as Trace_ELBO()(model, guide), got "
            f"{type(target).__name__}."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotImplementedError("LBFGS calls the loss itself, several times. Use Adam or SGD.")
    if not callable(optimizer) or isinstance(optimizer, pyro.optim.PyroOptim):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                "A module needs optimizer=, a torch.optim.Optimizer or a callable that makes one: "
                "optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01); got "
                f"{type(optimizer).__name__}."
            )
    return ModuleTrainer(target, optimizer, scheduler, guide_steps)


class Trainer:
    """One step of training, and the state that it changes."""

    kind = ""
    lazy = False  # whether a set-up pass must come before the first step

    def __init__(self, model, guide, guide_steps, **roots):
        self.model, self.guide = model, guide
        self.alternation = Alternation(guide_steps)
        self.modules = find_modules(**roots, model=model, guide=guide)
        self.leaves: dict[str, torch.Tensor] = {}  # unconstrained, by name in the parameter store
        self.before: torch.Tensor | None = None  # the random state before the step

    def steps(self, args, kwargs, step: int, ahead: int | None) -> list[float]:
        """The next step, or up to ``ahead`` of them if that is possible; their losses."""
        return [self.step(args, kwargs, step)]

    def state(self) -> dict:
        leaves = self._stored()
        return {
            "leaves": leaves,
            "with_gradient": [name for name, leaf in leaves.items() if leaf.grad is not None],
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer_state(),
            "sides": self.alternation.sides,
        }

    def load(self, saved: dict) -> None:
        """Copy a saved state into the parameters, modules and optimizers, which must exist."""
        leaves = self._stored()
        match_names("parameter", leaves, saved["leaves"])
        for name, value in saved["leaves"].items():
            match_tensor(f"parameter '{name}'", leaves[name], value)
        load_modules(self.modules, saved["modules"])
        with torch.no_grad():
            for name, value in saved["leaves"].items():
                leaves[name].copy_(value)
                # Pyro's zero_grads leaves zeros, and an optimizer skips a parameter without them.
                some = name in saved["with_gradient"]
                leaves[name].grad = torch.zeros_like(leaves[name]) if some else None
        self.load_optimizer(saved["optimizer"])
        self.alternation.sides = dict(saved.get("sides", {}))

    def _stored(self) -> dict[str, torch.Tensor]:
        """The leaves; where a loss has put a new tensor under a name (a running mean), that one."""
        stored = dict(pyro.get_param_store().named_parameters())
        return {name: stored.get(name, leaf) for name, leaf in self.leaves.items()}

    def _record(self, capture) -> dict[str, torch.Tensor]:
        nodes = capture.trace.nodes
        values = {name: site["value"] for name, site in nodes.items() if site["type"] == "param"}
        leaves = {
            n: v.unconstrained() if hasattr(v, "unconstrained") else v for n, v in values.items()
        }
        self.leaves.update(leaves)
        return leaves

    @contextlib.contextmanager
    def _evaluating(self, args, kwargs, step):
        """Makes an error in the loss say at which step, and what is not finite."""
        self.before = torch.get_rng_state()
        try:
            yield
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            found = self._not_finite(args, kwargs, tries=1)
            found = f"\nNot finite: {'; '.join(found)}." if found else ""
            raise ValueError(f"At step {step} of fit: {error}{found}") from error

    @contextlib.contextmanager
    def _alternating(self, named, args, kwargs, step):
        """Parameters that rest at this step have no gradient inside: an optimizer skips them."""

        def find_users():
            with undisturbed(self.modules):
                torch.set_rng_state(self.before)
                return users(self.model, self.guide, args, kwargs)

        try:
            resting = self.alternation.resting(named, step, find_users)
        except Exception:
            zero_grads(leaf for _, leaf in named)
            raise
        gradients = [leaf.grad for leaf in resting]
        for leaf in resting:
            leaf.grad = None
        yield
        for leaf, gradient in zip(resting, gradients, strict=True):
            leaf.grad = gradient

    def _check(self, losses, gradients, args, kwargs, step, intact=True) -> None:
        """:raises ValueError: if a loss or gradient is not finite, naming where it comes from."""
        if not all(map(math.isfinite, losses)):
            found = self._not_finite(args, kwargs, tries=10)
            what = f"the loss is {next(x for x in losses if not math.isfinite(x))}"
            if found:
                what += f". Not finite: {'; '.join(found)}"
            elif self.model is not None:
                what += ", with draws that did not come up again when looking for the site"
        else:
            bad = bad_gradients(gradients)
            if not bad:
                return
            what = f"the loss is finite, the gradient of {listed('parameter', bad)} is not"
        zero_grads(leaf for _, leaf in gradients)
        raise ValueError(
            f"At step {step} of fit {what}. "
            + ("The parameters are still those from before this step. " if intact else "")
            + "Remove such data or mask them (poutine.mask, obs_mask); otherwise lower the "
            "learning rate, clip gradients, or constrain the value that runs to the edge."
        )

    def _not_finite(self, args, kwargs, tries: int) -> list[str]:
        named = [item for module in self.modules.values() for item in module.named_parameters()]
        named += self._stored().items()
        bad = {id(p): name for name, p in named if not is_finite(p)}
        found = [listed("parameter", bad.values())] if bad else []
        if self.model is not None and self.guide is not None:
            with undisturbed(self.modules):
                torch.set_rng_state(self.before)
                for _ in range(tries):  # first with the draws of the step, then with others
                    sites = not_finite_sites(self.model, self.guide, args, kwargs)
                    if sites:
                        return found + sites
        return found


class SVITrainer(Trainer):
    kind = "svi"

    def __init__(self, svi: SVI, guide_steps: int):
        super().__init__(svi.model, svi.guide, guide_steps, loss=svi.loss)
        self.svi = svi
        self.own_step = type(svi).step is not SVI.step or "step" in vars(svi)
        if self.own_step and guide_steps > 1:
            raise ValueError(
                f"guide_steps={guide_steps} needs an SVI that leaves the update to fit, and "
                f"{type(svi).__name__} has its own step. Alternate in that step, or pass an SVI "
                "without one."
            )

    def set_up(self, args, kwargs):
        """Create all parameters, also those that only the gradient pass asks for."""
        with undisturbed(self.modules), poutine.trace(param_only=True) as capture:
            self.svi.loss_and_grads(self.svi.model, self.svi.guide, *args, **kwargs)
        zero_grads(self._record(capture).values())

    def step(self, args, kwargs, step: int) -> float:
        svi = self.svi
        with poutine.trace(param_only=True) as capture, self._evaluating(args, kwargs, step):
            if self.own_step:
                loss = svi.step(*args, **kwargs)
            else:
                loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
        losses = [torch_item(x) for x in (loss if isinstance(loss, tuple) else (loss,))]
        leaves = self._record(capture)
        if self.own_step:
            self._check(losses, [], args, kwargs, step, intact=False)
        else:
            self._check(losses, leaves.items(), args, kwargs, step)
            parameters = list({id(leaf): leaf for leaf in leaves.values()}.values())
            with self._alternating(leaves.items(), args, kwargs, step):
                svi.optim(parameters)
            zero_grads(parameters)
        self._step_schedule(losses[0])
        return losses[0]

    def _step_schedule(self, loss: float):
        optim = self.svi.optim
        if isinstance(optim, pyro.optim.PyroLRScheduler):
            with_loss = any(isinstance(o, ReduceLROnPlateau) for o in optim.optim_objs.values())
            optim.step(*[loss] if with_loss else ())

    def optimizer_state(self):
        objects = self.svi.optim.optim_objs
        leaves = self._stored()
        return {n: _optimizer_state(objects[p]) for n, p in leaves.items() if p in objects}

    def load_optimizer(self, saved):
        optim, leaves = self.svi.optim, self._stored()
        for name, state in saved.items():
            leaf = leaves[name]
            if leaf not in optim.optim_objs:  # PyroOptim makes them when it first sees a parameter
                optim.optim_objs[leaf] = optim._get_optim(leaf)
                optim.grad_clip[leaf] = optim._get_grad_clip(leaf)
            _load_optimizer(optim.optim_objs[leaf], state)


class CompiledTrainer(SVITrainer):
    """Many steps in one call, and a set-up after which the next step is a compiled one."""

    def set_up(self, args, kwargs):
        super().set_up(args, kwargs)
        self.svi.skip_first_step()

    def steps(self, args, kwargs, step, ahead):
        svi = self.svi
        if svi.is_first_step:
            return [self.step(args, kwargs, step)]
        one_by_one = ahead is None or isinstance(svi.optim, pyro.optim.PyroLRScheduler)
        count = 1 if one_by_one else min(ahead, LOOP_STEPS)
        self.before = torch.get_rng_state()
        try:
            losses = [svi.step(*args, **kwargs)] if one_by_one else svi.run(count, *args, **kwargs)
        except StepNotFinite as error:
            raise ValueError(f"At step {step + error.at - 1} of fit {error.what}") from error
        self.leaves.update(svi.leaves())
        losses = [loss[0] if isinstance(loss, (tuple, list)) else loss for loss in _listed(losses)]
        self._check(losses, [], args, kwargs, step, intact=False)
        self._step_schedule(losses[-1])
        return losses


def _listed(losses):
    return losses.tolist() if isinstance(losses, torch.Tensor) else losses


class ModuleTrainer(Trainer):
    kind = "module"

    def __init__(self, target, optimizer, scheduler, guide_steps):
        parts = {name: getattr(target, name, None) for name in ("model", "guide", "elbo")}
        model, guide = parts["model"], parts["guide"]
        if guide_steps > 1 and not (callable(model) and callable(guide)):
            raise ValueError(
                f"guide_steps={guide_steps} needs a module with a .model and a .guide, such as "
                "Trace_ELBO()(model, guide), to tell their parameters apart; got "
                f"{type(target).__name__}."
            )
        super().__init__(model, guide, guide_steps, target=target, loss=parts["elbo"])
        self.target = target
        self.make_scheduler = scheduler
        self.make_optimizer, self.optimizer = optimizer, None
        self.lazy = not isinstance(optimizer, torch.optim.Optimizer)
        self.known: set[int] | None = None  # parameters before the first call
        if not self.lazy:
            self.known = {id(p) for p in target.parameters()}
            self._take_optimizer(optimizer)

    def set_up(self, args, kwargs):
        """Create all parameters, then the optimizer."""
        with undisturbed(self.modules), poutine.trace(param_only=True) as capture:
            self.target(*args, **kwargs)
        self._record(capture)
        if self.optimizer is None:
            parameters = list(self.target.parameters())
            if not any(p.requires_grad for p in parameters):
                raise ValueError(
                    "The module has no parameters to train, even after a first call. With function "
                    "guides use an objective of pyro_vi_ext, an AutoGuide or PyroModule, or SVI."
                )
            self._take_optimizer(self.make_optimizer(parameters))
        self._check_known()

    def _take_optimizer(self, optimizer):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                "optimizer= must be a torch.optim.Optimizer or make one from a list of parameters; "
                f"it made a {type(optimizer).__name__}."
            )
        scheduler = self.make_scheduler
        if scheduler is not None and not isinstance(scheduler, LRScheduler):
            scheduler = scheduler(optimizer)
        if scheduler is not None and scheduler.optimizer is not optimizer:
            raise ValueError(
                "The scheduler belongs to another optimizer. Pass a callable: scheduler=lambda "
                "optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)."
            )
        self.optimizer, self.scheduler = optimizer, scheduler

    def _check_known(self):
        """:raises ValueError: if the first call made parameters unknown to the optimizer."""
        if self.known is None:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        new = [
            name
            for name, p in self.target.named_parameters()
            if p.requires_grad and id(p) not in held and id(p) not in self.known
        ]
        self.known = None
        if new:
            raise ValueError(
                f"The first call created {listed('parameter', new)}, which the optimizer cannot "
                "know. Pass a callable, optimizer=lambda parameters: torch.optim.Adam(parameters), "
                "or call the module once before making the optimizer."
            )

    def step(self, args, kwargs, step: int) -> float:
        self.optimizer.zero_grad()
        with poutine.trace(param_only=True) as capture, self._evaluating(args, kwargs, step):
            loss = self.target(*args, **kwargs)
        self._record(capture)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                "The module must return a differentiable scalar loss, got "
                + (
                    f"a tensor of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}."
                    if isinstance(loss, torch.Tensor)
                    else f"{type(loss).__name__}."
                )
            )
        self._check_known()
        loss.backward()
        value = loss.item()
        held = self._held()
        self._check([value], held, args, kwargs, step)
        with self._alternating(held, args, kwargs, step):
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            plateau = isinstance(self.scheduler, ReduceLROnPlateau)
            self.scheduler.step(*[value] if plateau else ())
        return value

    def _held(self):
        """The parameters of the optimizer, with their names in the module."""
        names = {id(p): name for name, p in self.target.named_parameters()}
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [(names.get(id(p), f"#{i}"), p) for i, p in enumerate(held)]

    def optimizer_state(self):
        source = self.optimizer if self.scheduler is None else self.scheduler
        return {"names": [name for name, _ in self._held()], **_optimizer_state(source)}

    def load_optimizer(self, saved):
        names = [name for name, _ in self._held()]
        if names != saved["names"]:
            match_names("parameter in the optimizer", names, saved["names"])
            raise ValueError(
                "The optimizer has its parameters in another order than the checkpoint. Give them "
                "to it as they were: list(module.parameters())."
            )
        _load_optimizer(self.optimizer if self.scheduler is None else self.scheduler, saved)


# Optimizers.


def _split(thing):
    """An optimizer, or a scheduler around one, as (optimizer, scheduler or None)."""
    return (thing.optimizer, thing) if hasattr(thing, "optimizer") else (thing, None)


def _types(*things) -> list[str]:
    return ["none" if thing is None else type(thing).__name__ for thing in things]


def _optimizer_state(thing) -> dict:
    optimizer, scheduler = _split(thing)
    return {
        "types": _types(optimizer, scheduler),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }


def _load_optimizer(thing, saved: dict) -> None:
    optimizer, scheduler = _split(thing)
    types = _types(optimizer, scheduler)
    if types != saved["types"]:
        raise ValueError(
            "The checkpoint was written with optimizer {} and scheduler {}, here they are {} and "
            "{}. Resume with those it was written with.".format(*saved["types"], *types)
        )
    if scheduler is not None:
        scheduler.load_state_dict(saved["scheduler"])
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except ValueError as error:
        raise ValueError(f"The checkpoint does not fit the optimizer: {error}") from error
