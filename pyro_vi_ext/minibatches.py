"""The place in a ``DataLoader``'s epoch, rebuilt exactly.

A resumed run draws the order of the epoch once more, from the random states in which the epoch
began, and skips the batches that were used without loading their data.
"""

from __future__ import annotations

import copy
import zlib

import torch
from torch.utils.data import DataLoader, IterableDataset

from pyro_vi_ext.checkpoint import get_rng_state, set_rng_state

__all__ = ["Minibatches"]


class Minibatches:
    """The arguments of each step: as given, or with a ``DataLoader`` replaced by its next batch.

    Under one seed the batches are those of ``for batch in loader``, epoch after epoch.

    :raises ValueError: if there are two loaders, one is a keyword argument, or one has no batches.
    :raises NotImplementedError: if the loader's dataset is an ``IterableDataset``.
    """

    def __init__(self, args: tuple, kwargs: dict):
        self.args = args
        where = [i for i, arg in enumerate(args) if isinstance(arg, DataLoader)]
        if any(isinstance(value, DataLoader) for value in kwargs.values()) or len(where) > 1:
            raise ValueError(
                "fit takes at most one DataLoader, as a positional argument. Join the datasets "
                "(torch.utils.data.StackDataset) and give one loader."
            )
        self.place = where[0] if where else None
        self._pending = self._batches = None
        self._index = 0  # batches of this epoch that were used
        if where:
            self._open(args[self.place])

    def _open(self, loader: DataLoader):
        if isinstance(loader.dataset, IterableDataset):
            raise NotImplementedError(
                "fit cannot resume in the middle of an IterableDataset. Use a map-style dataset "
                "(with __getitem__ and __len__)."
            )
        self._sampler = _EpochSampler(loader)
        self._loader = copy.copy(loader)  # a subclass of DataLoader keeps its ways
        key = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._loader.__dict__.update({key: self._sampler, "_iterator": None})

    @property
    def changes(self) -> bool:
        """Whether each step has arguments of its own."""
        return self.place is not None

    def peek(self) -> tuple:
        """The positional arguments of the next step."""
        if self.place is None:
            return self.args
        if self._pending is None:
            self._pending = (self._next_batch(),)
        batch = self._pending[0]
        batch = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
        return (*self.args[: self.place], *batch, *self.args[self.place + 1 :])

    def take(self) -> tuple:
        """The positional arguments of the next step, which now counts as used."""
        args = self.peek()
        self._pending = None
        self._index += 1
        return args

    def _next_batch(self):
        for _ in range(2):
            if self._batches is None:
                if self._sampler.resume is None:
                    self._index = 0
                self._batches = iter(self._loader)
            batch = next(self._batches, self)
            if batch is not self:
                return batch
            self._batches = None
        raise ValueError(
            "The DataLoader has no batches: its dataset is empty, or smaller than a batch with "
            "drop_last=True. Use a smaller batch_size."
        )

    def state(self) -> dict | None:
        """Where the epoch stands; ``None`` without a loader."""
        if self.place is None:
            return None
        return {
            "index": self._index,
            "length": len(self._sampler.order),
            "digest": self._sampler.digest(),
            "epoch": self._sampler.epoch_start,
            "generators": self._sampler.generator_states(),
        }

    def restore(self, state: dict | None, rng: dict) -> None:
        """Return to a saved place, and to the random state ``rng`` of that moment.

        :raises ValueError: if there is a loader now and was none then, or the other way round.
        """
        if (state is None) != (self.place is None):
            now, then = ("no", "one") if self.place is None else ("a", "none")
            raise ValueError(
                f"There is {now} DataLoader among the arguments, and the checkpoint was written "
                f"with {then}. Resume with the arguments it was written with."
            )
        self._pending = self._batches = None
        if state is not None:
            self._sampler.set_generators(state["generators"])
            self._index = state["index"]
            if self._index < state["length"]:
                self._sampler.resume = (state, rng)
        set_rng_state(rng)


class _EpochSampler:
    """Draws the whole order of an epoch at once, and starts it where a checkpoint left it.

    The used batches are skipped here, so none of their data are loaded. What is drawn meanwhile
    (the epoch's order, once more) leaves no trace: the random states of the moment of saving are
    restored before the next batch is loaded.
    """

    def __init__(self, loader: DataLoader):
        self.base = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        inner = (loader.sampler, loader.batch_sampler, getattr(self.base, "sampler", None))
        owned = [getattr(thing, "generator", None) for thing in (loader, *inner)]
        self.generators = list({id(g): g for g in owned if g is not None}.values())
        self.resume = None
        self.order: list = []
        self.epoch_start: dict = {}
        self._digest = None

    def __iter__(self):
        resume, self.resume, self._digest = self.resume, None, None
        if resume is not None:
            state, rng = resume
            set_rng_state(state["epoch"]["rng"])
            self.set_generators(state["epoch"]["generators"])
        self.epoch_start = {"rng": get_rng_state(), "generators": self.generator_states()}
        self.order = list(self.base)
        start = 0
        if resume is not None:
            if self.digest() != state["digest"]:
                raise ValueError(
                    "The DataLoader's order of the epoch cannot be repeated: the dataset's length, "
                    "the batch size or the sampler has changed, or the sampler draws from a "
                    "generator of its own that it does not show as `.generator`."
                )
            start = state["index"]
            set_rng_state(rng)
            self.set_generators(state["generators"])
        yield from self.order[start:]

    def __len__(self):
        return len(self.base)

    def digest(self) -> int:
        if self._digest is None:
            self._digest = zlib.crc32(repr(self.order).encode())
        return self._digest

    def generator_states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self.generators]

    def set_generators(self, states: list[torch.Tensor]) -> None:
        if len(states) != len(self.generators):
            raise ValueError(
                f"The DataLoader has {len(self.generators)} generators of its own, and had "
                f"{len(states)} when the checkpoint was written. Give it the same ones."
            )
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
