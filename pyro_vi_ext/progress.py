"""One progress bar for all long work."""

from __future__ import annotations

__all__ = ["progress_bar"]


def progress_bar(progress: bool | None, total: int, initial: int = 0, unit: str = "step"):
    """A bar to advance, as a context; silent where none is to be shown.

    :param progress: ``None`` on a terminal only, ``True`` always, ``False`` never.
    :param total: number of units of work; 0 if :meth:`ProgressBar.reach` will tell.
    :raises ImportError: if ``progress=True`` and tqdm is missing.
    """
    return ProgressBar(_tqdm(progress, total, initial, unit))


class ProgressBar:
    """A tqdm bar, or nothing."""

    def __init__(self, bar):
        self.bar = bar

    def update(self, num: int = 1, note: str | None = None) -> None:
        """Advance by ``num``, and show a note beside the bar."""
        if self.bar is not None:
            if note is not None:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(num)

    def reach(self, done: int, total: int) -> None:
        """Advance to ``done`` of ``total``."""
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.bar is not None:
            self.bar.close()


def _tqdm(progress, total, initial, unit):
    if progress is False:
        return None
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError(
                "progress=True needs tqdm: pip install pyro_vi_ext[progress]"
            ) from error
        return None
    disable = False if progress else None
    bar = tqdm(total=total or None, initial=initial, disable=disable, unit=unit)
    return None if bar.disable else bar
