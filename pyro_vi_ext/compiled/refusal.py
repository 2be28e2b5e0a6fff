"""What cannot be compiled says so: an error with the user's line, the site, and what to do."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from types import FrameType, TracebackType

import pyro
import torch

__all__ = ["CannotCompile", "explain", "user_line"]


def _folder(path: str) -> str:
    return os.path.dirname(os.path.abspath(path)) + os.sep


_MACHINERY = (_folder(torch.__file__), _folder(os.__file__), _folder(__file__))
_LIBRARIES = (*_MACHINERY, _folder(pyro.__file__), _folder(_folder(__file__)))


class CannotCompile(NotImplementedError):
    """Model, guide or objective do something that one fixed graph cannot repeat.

    The message names the user's line and the site, and what to write instead. It is a
    :class:`NotImplementedError`.
    """


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and those it was raised from."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def explain(error: BaseException, reason: str, remedy: str) -> CannotCompile:
    """A refusal that names where in the user's code ``error`` came from."""
    return CannotCompile(f"{reason}{where(error.__traceback__)} {remedy}")


def where(tb: TracebackType | None) -> str:
    """Which line, the user's if there is one, and which site a traceback belongs to."""
    walked = list(traceback.walk_tb(tb))[::-1]
    users = [step for step in walked if not _is_in(step[0], _LIBRARIES)]
    theirs = [step for step in walked if not _is_in(step[0], _MACHINERY)]
    place = "".join(f" at {_describe(*step)}" for step in (users or theirs)[:1])
    site = next((name for name in (_site(frame) for frame, _ in walked) if name), None)
    return f"{place}{f' (site {site!r})' if site else ''}."


def user_line() -> str:
    """The innermost line of the running stack that belongs to the user."""
    frame = sys._getframe(1)
    while frame is not None:
        if not _is_in(frame, _LIBRARIES):
            return _describe(frame, frame.f_lineno)
        frame = frame.f_back
    return "an unknown line"


def _describe(frame: FrameType, number: int) -> str:
    path = frame.f_code.co_filename
    text = linecache.getline(path, number).strip()
    return f"{os.path.basename(path)}:{number}" + (f" `{text}`" if text else "")


def _is_in(frame: FrameType, folders: tuple[str, ...]) -> bool:
    path = frame.f_code.co_filename
    return path.startswith("<") or os.path.abspath(path).startswith(folders)


def _site(frame: FrameType) -> str | None:
    """The name of the site that a frame of Pyro is processing."""
    message = frame.f_locals.get("msg")
    if isinstance(message, dict) and message.get("type") in ("sample", "param"):
        return message.get("name")
    return None
