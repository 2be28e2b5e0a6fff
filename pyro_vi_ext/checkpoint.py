"""Checkpoints of :func:`~pyro_vi_ext.training.fit`: one file, never half written, safe to load.

A checkpoint is replaced in one step by the operating system: the new state is written beside the
old one, forced to disk, and renamed over it. Whoever kills the process, and whenever, finds either
the old file or the new one. It holds numbers, strings, tensors and their containers only, so
``torch.load(weights_only=True)`` reads it and no code in it can run.

Besides the file this module has what must be put into it for a resumed run to repeat the
uninterrupted one bit for bit: the random states, and the state of modules that Pyro's parameter
store does not see (buffers). The place in a ``DataLoader``'s epoch is a thing of
:mod:`~pyro_vi_ext.minibatches`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import types
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch
from pyro.infer.elbo import ELBOModule
from torch.nn.parameter import is_lazy

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = "pyro_vi_ext.fit"
VERSION = 1


# The file.


def save_checkpoint(path, state: dict) -> None:
    """Write a state to disk, so that ``path`` is at every moment the old or the new file, whole.

    :param path: the file; its folder must exist.
    :param state: a dict of numbers, strings, tensors (of any shape; stored on the CPU) and lists,
        tuples or dicts of these.
    :raises ValueError: if the state holds anything else, naming where.

    Example::

        >>> import tempfile, torch
        >>> from pyro_vi_ext.checkpoint import load_checkpoint, save_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/run.pt", {"step": 3, "losses": torch.ones(3)})
        ...     load_checkpoint(f"{folder}/run.pt")["step"]
        3
    """
    path = Path(path)
    state = _plain({"format": FORMAT, "version": VERSION, **state}, "")
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the renaming itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path) -> dict:
    """Read a state written by :func:`save_checkpoint`; all tensors arrive on the CPU.

    :raises ValueError: if the file is damaged, or was not written by :func:`save_checkpoint`, or
        by a later version of it.
    """
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types on a damaged file
            raise ValueError(
                f"'{path}' cannot be read as a checkpoint: it is truncated, damaged, or another "
                f"kind of file ({type(error).__name__}). Restore a copy of it, or delete it to "
                "start anew."
            ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"'{path}' is not a checkpoint of fit. Give another path to checkpoint=.")
    if state["version"] != VERSION:
        raise ValueError(
            f"'{path}' has checkpoint format {state['version']}, this version of pyro_vi_ext reads "
            f"{VERSION}. Install the version that wrote it, or delete it to start anew."
        )
    return state


def remove_stale(path) -> None:
    """Delete the temporary files that killed writers of ``path`` left behind."""
    path = Path(path)
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)-[0-9a-f]{8}\.tmp")
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(file.name)
        if match and not _alive(int(match[1])):
            with contextlib.suppress(OSError):
                file.unlink()


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return False  # an open file cannot be deleted there anyway
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _plain(value, where: str):
    """``value`` in types that ``torch.load(weights_only=True)`` accepts."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str, bytes, Counter):
        return value
    if isinstance(value, (torch.dtype, torch.device, torch.Size)):
        return value
    if type(value) in (list, tuple):
        return type(value)(_plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    if type(value) in (dict, OrderedDict):
        return {_plain(k, where): _plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    raise ValueError(
        f"The checkpoint cannot hold state{where}, a {type(value).__name__}: only tensors, "
        "numbers, strings and containers of these can be loaded safely. Keep it out of the "
        "state_dict of the module, optimizer or scheduler, or turn it into a tensor there."
    )


# Random states.


def get_rng_state() -> dict:
    """The states of the generators of torch (CPU and every CUDA device), ``random`` and NumPy."""
    name, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": (version, torch.tensor(words, device="cpu"), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
    }


def set_rng_state(state: dict) -> None:
    """Restore what :func:`get_rng_state` returned."""
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"]):
        if torch.cuda.is_available() and device < torch.cuda.device_count():
            torch.cuda.set_rng_state(cuda, device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


@contextlib.contextmanager
def undisturbed(parts: dict[str, torch.nn.Module]):
    """Run a pass that leaves random states, and the buffers of ``parts``, as they were."""
    rng = get_rng_state()
    buffers = [b for part in parts.values() for b in part.buffers() if not is_lazy(b)]
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        set_rng_state(rng)
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


# Modules: their buffers are in no parameter store.


def find_modules(**roots) -> dict[str, torch.nn.Module]:
    """The modules behind models, guides and losses, by a name that is the same in every process.

    A root may be a module, a method of one, an effect handler or ``partial`` around one, a function
    that uses modules of its closure or its globals, a method of an object that has modules.
    """
    found: dict[str, torch.nn.Module] = {}
    seen: set[int] = set()

    def visit(name, thing):
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, torch.nn.Module):
            seen.update(id(module) for module in thing.modules())
            found[name] = thing
            for path, module in thing.named_modules():
                if isinstance(module, ELBOModule):  # its objective may have modules
                    visit(f"{name}.{path}.elbo" if path else f"{name}.elbo", module.elbo)
            return
        for key, child in _children(thing):
            visit(f"{name}.{key}", child)

    for name, root in roots.items():
        visit(name, root)
    return found


def _children(thing):
    if isinstance(thing, functools.partial):  # also every effect handler of Pyro
        yield from {"func": thing.func, **dict(enumerate(thing.args)), **thing.keywords}.items()
    elif isinstance(thing, types.MethodType):
        yield from (("self", thing.__self__), ("func", thing.__func__))
    elif isinstance(thing, types.FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                yield name, cell.cell_contents
        for name in thing.__code__.co_names:
            if isinstance(thing.__globals__.get(name), torch.nn.Module):
                yield name, thing.__globals__[name]
        if hasattr(thing, "__wrapped__"):
            yield "wrapped", thing.__wrapped__
    elif not isinstance(thing, (type, types.ModuleType, torch.Tensor)):
        for name, value in getattr(thing, "__dict__", {}).items():
            items = value.items() if isinstance(value, dict) else ()
            items = enumerate(value) if isinstance(value, (list, tuple)) else items
            for key, item in [("", value), *items]:
                if isinstance(item, torch.nn.Module) and isinstance(key, (str, int)):
                    yield f"{name}.{key}".rstrip("."), item


def load_modules(modules: dict[str, torch.nn.Module], saved: dict) -> None:
    """Copy saved ``state_dict()`` into modules, in place.

    :raises ValueError: if modules, names, shapes or types differ.
    """
    match_names("module", modules, saved)
    for name, module in modules.items():
        own, state = module.state_dict(), OrderedDict(saved[name])
        state._metadata = getattr(own, "_metadata", {})  # versions, lost among plain containers
        for key, value in state.items():
            if isinstance(own.get(key), torch.Tensor) and not is_lazy(own[key]):
                match_tensor(f"'{key}' of module '{name}'", own[key], value)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"The checkpoint does not fit module '{name}': {error}") from error


def match_names(what: str, found, saved) -> None:
    """:raises ValueError: if the two do not have the same names."""
    missing, new = sorted(set(saved) - set(found)), sorted(set(found) - set(saved))
    if missing or new:
        raise ValueError(
            "The checkpoint is of another model, guide or loss."
            + (f" It has {what} {_quoted(missing)}, which does not exist here." if missing else "")
            + (f" It lacks {what} {_quoted(new)}." if new else "")
            + " Resume with the code that wrote it, or give another path to checkpoint=."
        )


def match_tensor(what: str, found: torch.Tensor, saved: torch.Tensor) -> None:
    """:raises ValueError: if the two differ in shape or type."""
    if found.shape != saved.shape or found.dtype != saved.dtype:
        raise ValueError(
            f"The checkpoint has {what} of shape {tuple(saved.shape)} and type {saved.dtype}; here "
            f"it has shape {tuple(found.shape)} and type {found.dtype}. Resume with the code that "
            "wrote it, or give another path to checkpoint=."
        )


def _quoted(names) -> str:
    return ", ".join(f"'{name}'" for name in names)
