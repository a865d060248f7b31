"""Which path ran, and how to force one: for tests and measurements.

None of these settings changes a bit of any result; they change only how it is reached.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, Literal, NamedTuple, TypedDict

from ._core import force as _force
from ._core import get_num_threads, isas, last_path, set_num_threads

__all__ = ["Path", "force", "isas", "last_path"]


class Path(TypedDict):
    """What the last forward or backward of this thread ran through, as `last_path()` tells it."""

    walk: Literal["rows", "columns"]
    isa: str
    threads: int
    split: bool
    resident: bool
    stream: bool
    by_row: bool
    by_sample: bool
    in_eights: bool
    in_parts: bool


class _Settings(NamedTuple):
    isa: str | None = None
    split: bool | None = None
    resident: bool | None = None
    stream: bool | None = None
    by_row: bool | None = None
    by_sample: bool | None = None


class _Forced(local):
    """What this thread forces: the core does not tell, and a `force` block has to restore what was around it."""

    settings = _Settings()


_forced = _Forced()


def _apply(settings: _Settings) -> None:
    isa, *switches = settings
    _force(isa, *(-1 if switch is None else int(switch) for switch in switches))
    _forced.settings = settings


@contextmanager
def force(
    *,
    isa: str | None = None,
    threads: int | None = None,
    split: bool | None = None,
    resident: bool | None = None,
    stream: bool | None = None,
    by_row: bool | None = None,
    by_sample: bool | None = None,
) -> Iterator[None]:
    """Force a path inside a `with` block. What is None stays as it was outside the block.

    Parameters
    ----------
    isa : str, optional
        Instruction set, one of `isas()`.
    threads : int, optional
        Number of threads. Unlike the other settings, which hold for the calling thread, it holds for the process.
    split : bool, optional
        Share one set among threads, through partial results.
    resident : bool, optional
        Moments and normalization of one unit while it is in the cache (True), or in two sweeps (False).
    stream : bool, optional
        Non-temporal stores, and what else suits arrays from memory: lines are asked for, long rows go in parts.
    by_row : bool, optional
        The sums of one set beside the writing of another, where kernels can do that; of short rows, eight at a time.
    by_sample : bool, optional
        Two sweeps down the rows: of some samples before those of the next (True), or of all together (False).
    """
    wanted: dict[str, Any] = {
        "isa": isa,
        "split": split,
        "resident": resident,
        "stream": stream,
        "by_row": by_row,
        "by_sample": by_sample,
    }
    before, threads_before = _forced.settings, get_num_threads()
    _apply(before._replace(**{name: value for name, value in wanted.items() if value is not None}))
    try:
        if threads is not None:
            set_num_threads(threads)
        yield
    finally:
        if threads is not None:
            set_num_threads(threads_before)
        _apply(before)
