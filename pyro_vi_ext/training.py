"""The training loop: progress, history, schedule, minibatches, stopping rules, checkpoints.

:func:`fit` drives either of Pyro's two interfaces, an ``SVI`` or a module ``objective(model,
guide)`` with a ``torch.optim`` optimizer, and adds nothing to what is computed: the losses and
parameters are those of the loop a user would write by hand.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from pyro_vi_ext.checkpoint import (
    get_rng_state,
    load_checkpoint,
    remove_stale,
    save_checkpoint,
)
from pyro_vi_ext.minibatches import Minibatches
from pyro_vi_ext.progress import progress_bar
from pyro_vi_ext.targets import make_trainer

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
    guide_steps=1,
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
    are methods of, refer to, or are given as arguments; nothing random happens inside
    ``DataLoader`` *workers*.

    A :class:`~pyro_vi_ext.compiled.CompiledSVI` runs up to 250 steps in one call where nothing has
    to be looked at in between: no callback, no ``DataLoader``, no schedule.

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
    :param guide_steps: the number n of guide updates for each update of the model, so that the
        guide does not lag behind (He et al. 2019, arXiv:1901.05534; 1 is joint training). Every
        step is a gradient on its own minibatch, and updates the guide; the parameters that the
        model alone uses change at steps n, 2n, ... only and rest in between (no momentum, no
        weight decay, no moments). Those that the guide uses too, and learned parts of the
        objective, are updated at every step. Who uses what is found by running model and guide
        once more in the first step, and whenever a parameter has its first gradient. For a module
        it needs a ``.model`` and a ``.guide``; an ``SVI`` may not have its own ``step``.
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
        for ``guide_steps`` when model or guide has no parameters of its own to train, and for a
        checkpoint that is damaged, of another target or with other ``guide_steps``.
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
    _check_at_least("guide_steps", guide_steps, 1)
    if guide_steps > num_steps:
        raise ValueError(
            f"guide_steps={guide_steps} is more than num_steps={num_steps}, the number of all "
            "steps: the model would never be updated. Raise num_steps."
        )
    _check_at_least("patience", patience, 1)
    if plateau_window is not None:
        _check_at_least("plateau_window", plateau_window, 4)
    if checkpoint_every is None:
        checkpoint_every = max(1, num_steps // 10)
    elif checkpoint is None:
        raise ValueError("checkpoint_every needs a file: add checkpoint='run.pt'.")
    _check_at_least("checkpoint_every", checkpoint_every, 1)

    trainer = make_trainer(target, optimizer, scheduler, guide_steps)
    trainer.modules |= _modules_given(args, kwargs)
    feed = Minibatches(args, kwargs)
    saved = _open_checkpoint(checkpoint, resume, trainer.kind, guide_steps)
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

    def steps_ahead():
        """Steps that nothing has to look at one by one, before the next thing that is due."""
        if callback is not None or feed.changes:
            return None
        due = [num_steps]
        due += [] if checkpoint is None else [checkpoint_every]
        due += [] if plateau_window is None else [plateau_window]
        return min(every - len(losses) % every for every in due)

    def save():
        state = {
            "guide_steps": guide_steps,
            "target": trainer.state(),
            "losses": _tensor(losses),
            "minibatches": feed.state(),
            "rng": get_rng_state(),
        }
        save_checkpoint(checkpoint, {"kind": trainer.kind, "step": len(losses), **state})

    running = _RunningBound()
    with (
        progress_bar(progress, num_steps, len(losses)) as bar,
        _Interrupt(checkpoint is not None) as interrupt,
    ):
        while not stopped:
            new = trainer.steps(feed.take(), kwargs, len(losses) + 1, steps_ahead())
            losses += new
            bar.update(len(new), note=[running.note(loss) for loss in new][-1])
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


def _open_checkpoint(path, resume, kind, guide_steps) -> dict | None:
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
    written_with = saved.get("guide_steps", 1)
    if written_with != guide_steps:
        raise ValueError(
            f"The checkpoint '{path}' was written with guide_steps={written_with}, here it is "
            f"{guide_steps}. Resume with the number it was written with, or give another path."
        )
    return saved


_KINDS = {"svi": "an SVI", "module": "a module with a torch optimizer"}


def _modules_given(args, kwargs) -> dict[str, torch.nn.Module]:
    """Modules among the arguments: they may have state too."""
    given = {f"argument {key}": thing for key, thing in (*enumerate(args), *kwargs.items())}
    return {name: m for name, m in given.items() if isinstance(m, torch.nn.Module)}


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


class _RunningBound:
    """The bound beside the bar: the mean of about 50 steps."""

    def __init__(self):
        self.mean = self.weight = 0.0

    def note(self, loss: float) -> str:
        self.mean += 0.02 * (loss - self.mean)
        self.weight += 0.02 * (1 - self.weight)
        return f"bound={-self.mean / self.weight:.5g}"
