"""The training loop: progress, history, schedule, minibatches, stopping rules, checkpoints.

:func:`fit` drives either of Pyro's two interfaces, an ``SVI`` or a module ``objective(model,
guide)`` with a ``torch.optim`` optimizer, and adds nothing to what is computed: the losses and
parameters are those of the loop a user would write by hand.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import SVI
from pyro.infer.util import torch_item, zero_grads
from pyro.poutine.util import site_is_subsample
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vi_ext.checkpoint import (
    Minibatches,
    find_modules,
    get_rng_state,
    load_checkpoint,
    load_modules,
    match_names,
    match_tensor,
    remove_stale,
    save_checkpoint,
    undisturbed,
)

__all__ = ["FitResult", "fit"]


@dataclass(eq=False)
class FitResult:
    """What :func:`fit` returns.

    :ivar losses: 1-D float64 tensor of length ``num_steps``: the loss of each step in the units of
        the objective (nats), with the steps before a resumption.
    :ivar num_steps: number of steps run, with those before a resumption.
    :ivar stopped: why training ended: ``"num_steps"``, ``"plateau"`` or ``"callback"``.
    """

    losses: torch.Tensor
    num_steps: int
    stopped: str

    def __repr__(self):
        if not self.num_steps:
            return f"FitResult(num_steps=0, stopped={self.stopped!r})"
        last = self.losses[-max(1, self.num_steps // 10) :]
        return (
            f"FitResult(num_steps={self.num_steps}, stopped={self.stopped!r}, "
            f"first loss={self.losses[0]:.6g}, mean of last {len(last)}={last.mean():.6g})"
        )


def fit(
    target,
    *args,
    num_steps,
    optimizer=None,
    scheduler=None,
    plateau_window=None,
    patience=2,
    progress=None,
    checkpoint=None,
    checkpoint_every=None,
    resume=True,
    callback=None,
    **kwargs,
) -> FitResult:
    r"""Minimise the loss of an ``SVI``, or of a module ``objective(model, guide)``.

    With ``plateau_window`` w, every w steps the mean loss :math:`\bar\ell_j` of the last w steps is
    compared with that of the w steps before. Training stops when ``patience`` times in a row

    .. math:: \bar\ell_{j-1} - \bar\ell_j \le 2 \sqrt{(s_{j-1}^2 + s_j^2) / b},

    an improvement within its noise: :math:`s_j^2` is the variance of :math:`b = \lfloor\sqrt
    w\rfloor` means of consecutive batches of losses, so neighbouring losses may be correlated.

    With ``checkpoint`` the state is written every ``checkpoint_every`` steps, at the end, and when
    interrupted from the keyboard (which waits for the end of the running step; a second interrupt
    does not wait). An existing file is continued, also by a new process with fresh objects, and
    the result is bit for bit that of a run that was never interrupted: losses, parameters,
    optimizer and random states. What that needs: every ``pyro.param`` is used in the first step;
    other state changes only in buffers and parameters of modules that model, guide or loss are,
    are methods of, or refer to; nothing random happens inside ``DataLoader`` *workers*.

    :param target: a :class:`pyro.infer.SVI`; or a module that returns a differentiable loss.
    :param args: arguments of model and guide, and of a module. A map-style ``DataLoader`` among
        them stands for its current batch, at each step; a tuple or list becomes several arguments.
    :param num_steps: total number of steps, with those before a resumption.
    :param optimizer: for a module only: a ``torch.optim.Optimizer``, or a callable that makes one
        from a list of parameters (those of lazy guides exist only after a first call, which is
        then made and leaves the random state alone).
    :param scheduler: for a module only: a scheduler, or a callable that makes one from the
        optimizer; stepped at every step. A ``PyroLRScheduler`` of an ``SVI`` is stepped likewise.
        ``ReduceLROnPlateau`` is given the loss.
    :param plateau_window: the number w of steps, at least 4 (hundreds, to be useful).
    :param patience: windows in a row without improvement that end the training.
    :param progress: show a bar with the current bound, ``-loss`` averaged over about 50 steps:
        ``None`` on a terminal only, ``True`` always, ``False`` never.
    :param checkpoint: path of the file; its folder is created.
    :param checkpoint_every: default: a tenth of ``num_steps``.
    :param resume: ``False`` to refuse to continue from an existing file.
    :param callback: ``callback(step, loss)`` after each step, counted from 1; ends training by
        returning ``True``.
    :param kwargs: keyword arguments of model and guide.
    :raises ValueError: if the loss or a gradient is NaN or infinite, naming the sites or
        parameters; the parameters are then those before that step (except for an ``SVI`` subclass
        with its own ``step``) and no checkpoint is written. For options that do not go together,
        and for a checkpoint that is damaged or of another target.
    :raises FileExistsError: if the file exists and ``resume=False``; nothing is computed before.
    :raises NotImplementedError: for an ``IterableDataset`` and for ``LBFGS``.
    :raises ImportError: if ``progress=True`` and tqdm is missing.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vi_ext.training import fit
        >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        >>> result = fit(svi, torch.tensor([0.5, 1.5]), num_steps=100)
        >>> result.losses.shape, result.stopped
        (torch.Size([100]), 'num_steps')

    The same with a module and a torch optimizer::

        >>> guide = AutoNormal(model)
        >>> loss = Trace_ELBO()(model, guide)
        >>> make_adam = lambda parameters: torch.optim.Adam(parameters, lr=0.05)
        >>> fit(loss, torch.tensor([0.5, 1.5]), num_steps=50, optimizer=make_adam).num_steps
        50
    """
    _check_at_least("num_steps", num_steps, 1)
    _check_at_least("patience", patience, 1)
    if plateau_window is not None:
        _check_at_least("plateau_window", plateau_window, 4)
    if checkpoint_every is None:
        checkpoint_every = max(1, num_steps // 10)
    elif checkpoint is None:
        raise ValueError("checkpoint_every needs a file: add checkpoint='run.pt'.")
    _check_at_least("checkpoint_every", checkpoint_every, 1)

    trainer = _trainer(target, optimizer, scheduler)
    feed = Minibatches(args, kwargs)
    saved = _open_checkpoint(checkpoint, resume, trainer.kind)
    losses: list[float] = []

    def why_stop():
        if plateau_window is not None and _plateaued(losses, plateau_window, patience):
            return "plateau"
        return "num_steps" if len(losses) >= num_steps else None

    if saved is not None:
        losses = saved["losses"].tolist()
        feed.restore(saved["minibatches"], saved["rng"])
        trainer.set_up(feed.peek(), kwargs)
        trainer.load(saved["target"])
    elif trainer.lazy:
        trainer.set_up(feed.peek(), kwargs)
    stopped = why_stop()
    if stopped:
        feed.restore(saved["minibatches"], saved["rng"])  # the set-up's batch was not a step's

    def save():
        state = {
            "target": trainer.state(),
            "losses": _tensor(losses),
            "minibatches": feed.state(),
            "rng": get_rng_state(),
        }
        save_checkpoint(checkpoint, {"kind": trainer.kind, "step": len(losses), **state})

    with _Bar(progress, num_steps, losses) as bar, _Interrupt(checkpoint is not None) as interrupt:
        while not stopped:
            losses.append(trainer.step(feed.take(), kwargs, len(losses) + 1))
            bar.update(losses[-1])
            stopped = why_stop()
            try:
                if callback is not None and callback(len(losses), losses[-1]) is True:
                    stopped = stopped or "callback"
            except KeyboardInterrupt as error:
                interrupt.received = error
            interrupted = interrupt.received  # read once: another may come at any moment
            due = stopped or interrupted or len(losses) % checkpoint_every == 0
            if checkpoint is not None and due:
                save()
            if interrupted:
                raise interrupted
    return FitResult(_tensor(losses), len(losses), stopped)


def _check_at_least(name, value, minimum):
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}.")


def _tensor(losses: list[float]) -> torch.Tensor:
    return torch.tensor(losses, dtype=torch.float64, device="cpu")


def _open_checkpoint(path, resume, kind) -> dict | None:
    """The state to continue from, if there is one; else the folder is made ready for writing."""
    if path is None:
        return None
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"checkpoint='{path}' is a folder. Name a file in it: '{path / 'fit.pt'}'."
        )
    if path.exists() and not resume:
        raise FileExistsError(
            f"The checkpoint '{path}' exists already and resume=False. Continue from it with "
            "resume=True, delete it to start anew, or give another path."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"No checkpoint can be written in the folder '{path.parent}'.")
    remove_stale(path)
    if not path.exists():
        return None
    saved = load_checkpoint(path)
    if saved["kind"] != kind:
        raise ValueError(
            f"The checkpoint '{path}' is of {_KINDS[saved['kind']]}, and the target is "
            f"{_KINDS[kind]}. Resume with the target it was written with, or give another path."
        )
    return saved


_KINDS = {"svi": "an SVI", "module": "a module with a torch optimizer"}


# When to stop.


def _plateaued(losses: list[float], window: int, patience: int) -> bool:
    """Whether the last ``patience`` comparisons of windows showed no improvement beyond noise."""
    if len(losses) % window or len(losses) < (patience + 1) * window:
        return False
    recent = _tensor(losses[-(patience + 1) * window :])
    windows = recent.reshape(patience + 1, window)
    means = windows.mean(1)
    num = math.isqrt(window)
    batches = windows[:, window % num :].reshape(patience + 1, num, -1).mean(-1)
    variances = batches.var(1) / num
    noise = 2 * (variances[:-1] + variances[1:]).sqrt()
    return bool((means[:-1] - means[1:] <= noise).all())


class _Interrupt:
    """Holds a keyboard interrupt back until the running step is complete, so it can be saved."""

    def __init__(self, enabled: bool):
        main = threading.current_thread() is threading.main_thread()
        ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self.enabled = enabled and ours
        self.received: BaseException | None = None

    def _handle(self, signum, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = KeyboardInterrupt()

    def __enter__(self):
        if self.enabled:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc_info):
        if self.enabled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.received and exc_info[0] is None:
            raise self.received


class _Bar:
    """A tqdm bar with the current bound; nothing if there is no tqdm, or no terminal."""

    def __init__(self, progress: bool | None, total: int, losses: list[float]):
        self.bar = None
        if progress is not False:
            try:
                from tqdm import tqdm
            except ImportError as error:
                if progress:
                    raise ImportError(
                        "progress=True needs tqdm: pip install pyro_vi_ext[progress]"
                    ) from error
            else:
                disable = None if progress is None else False
                bar = tqdm(total=total, initial=len(losses), disable=disable, unit="step")
                self.bar = None if bar.disable else bar
        self.mean = self.weight = 0.0

    def update(self, loss: float):
        if self.bar is None:
            return
        self.mean += 0.02 * (loss - self.mean)
        self.weight += 0.02 * (1 - self.weight)
        self.bar.set_postfix_str(f"bound={-self.mean / self.weight:.5g}", refresh=False)
        self.bar.update()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.bar is not None:
            self.bar.close()


# The two kinds of target.


def _trainer(target, optimizer, scheduler):
    if isinstance(target, SVI):
        if optimizer is not None:
            raise ValueError("An SVI has its optimizer: leave out optimizer=, or pass a module.")
        if scheduler is not None:
            raise ValueError(
                "The scheduler of an SVI is its optimizer. Instead of scheduler=, give the SVI "
                "e.g. pyro.optim.ExponentialLR({'optimizer': torch.optim.Adam, 'optim_args': "
                "{'lr': 0.01}, 'gamma': 0.99}); fit steps it once per step."
            )
        return _SVITrainer(target)
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
    return _ModuleTrainer(target, optimizer, scheduler)


class _Trainer:
    """One step of training, and the state that it changes."""

    kind = ""
    lazy = False  # whether a set-up pass must come before the first step

    def __init__(self, model, guide, **roots):
        self.model, self.guide = model, guide
        self.modules = find_modules(**roots, model=model, guide=guide)
        self.leaves: dict[str, torch.Tensor] = {}  # unconstrained, by name in the parameter store
        self.before: torch.Tensor | None = None  # the random state before the step

    def state(self) -> dict:
        leaves = self._stored()
        return {
            "leaves": leaves,
            "with_gradient": [name for name, leaf in leaves.items() if leaf.grad is not None],
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer_state(),
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
            bad = _bad_gradients(gradients)
            if not bad:
                return
            what = f"the loss is finite, the gradient of {_listed('parameter', bad)} is not"
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
        bad = {id(p): name for name, p in named if not _finite(p)}
        found = [_listed("parameter", bad.values())] if bad else []
        if self.model is not None and self.guide is not None:
            with undisturbed(self.modules):
                torch.set_rng_state(self.before)
                for _ in range(tries):  # first with the draws of the step, then with others
                    sites = _not_finite_sites(self.model, self.guide, args, kwargs)
                    if sites:
                        return found + sites
        return found


class _SVITrainer(_Trainer):
    kind = "svi"

    def __init__(self, svi: SVI):
        super().__init__(svi.model, svi.guide, loss=svi.loss)
        self.svi = svi
        self.own_step = type(svi).step is not SVI.step or "step" in vars(svi)

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
            svi.optim(parameters)
            zero_grads(parameters)
        if isinstance(svi.optim, pyro.optim.PyroLRScheduler):
            with_loss = any(isinstance(o, ReduceLROnPlateau) for o in svi.optim.optim_objs.values())
            svi.optim.step(*losses[:1] if with_loss else ())
        return losses[0]

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


class _ModuleTrainer(_Trainer):
    kind = "module"

    def __init__(self, target, optimizer, scheduler):
        parts = {name: getattr(target, name, None) for name in ("model", "guide", "elbo")}
        super().__init__(parts["model"], parts["guide"], target=target, loss=parts["elbo"])
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
        with undisturbed(self.modules), torch.no_grad(), poutine.trace(param_only=True) as capture:
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
                f"The first call created {_listed('parameter', new)}, which the optimizer cannot "
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
        self._check([value], self._held(), args, kwargs, step)
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


# What is not finite.


def _finite(tensor: torch.Tensor) -> bool:
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(tensor.isfinite().all())


def _bad_gradients(named) -> list[str]:
    """Names of the parameters with a NaN or infinite gradient; one device synchronisation."""
    named = [(name, p) for name, p in named if p.grad is not None]
    dense = [p.grad._values() if p.grad.is_sparse else p.grad for _, p in named]
    if not dense or math.isfinite(float(get_total_norm(dense))):
        return []
    return [name for name, p in named if not _finite(p.grad)]  # a norm may overflow by itself


def _listed(noun: str, names) -> str:
    names = [f"'{name}'" for name in names]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{noun}{'s' if len(names) > 1 else ''} {shown}"


def _not_finite_sites(model, guide, args, kwargs) -> list[str]:
    """Run guide and model once, and describe the sites with NaN or infinite values or densities."""
    found = []
    with torch.no_grad(), pyro.validation_enabled(False), contextlib.suppress(Exception):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        found += _describe(guide_trace, "guide", {})
        replayed = poutine.replay(model, trace=guide_trace)
        found += _describe(poutine.trace(replayed).get_trace(*args, **kwargs), "model", guide_trace)
    return found


def _describe(trace, where: str, seen) -> list[str]:
    found = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        density_ok = _density_is_finite(site)
        value = site["value"]
        number = int((~value.isfinite()).sum()) if isinstance(value, torch.Tensor) else 0
        if site["is_observed"] and number and (site["mask"] is None or not density_ok):
            found.append(f"data of observed site '{name}' ({number} of {value.numel()} entries)")
        elif number and not site["is_observed"] and name not in seen:
            found.append(f"value of site '{name}' in the {where} ({number} of {value.numel()})")
        elif not density_ok:
            found.append(f"log-density of site '{name}' in the {where}")
    return found


def _density_is_finite(site) -> bool:
    with contextlib.suppress(Exception):
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        mask = site["mask"]
        if isinstance(mask, bool):
            return _finite(log_prob) if mask else True
        return _finite(log_prob if mask is None else torch.where(mask, log_prob, 0.0))
    return True
