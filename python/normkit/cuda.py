"""CUDA: whether arrays on a GPU can be computed with, and the type of results that no library takes over.

Arrays on a GPU go to the same functions as NumPy arrays do, and come back as arrays of the same library.
"""

from typing import TYPE_CHECKING, Any

from . import _gpu

__all__ = ["DeviceArray", "device_count", "is_available"]

if TYPE_CHECKING:
    DeviceArray = Any


def __getattr__(name: str) -> Any:
    if name == "DeviceArray":  # which needs the compiled half
        return _gpu.core().DeviceArray
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def device_count() -> int:
    """Return the number of GPUs that can be used.

    Returns
    -------
    int
        0 where normkit is built without CUDA, or where there is no driver or no GPU.

    Raises
    ------
    ImportError
        normkit is built with CUDA, and what was built cannot be loaded.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.cuda.device_count() >= 0
    True
    """
    try:
        core = _gpu.core()
    except RuntimeError:
        return 0
    count: int = core.device_count()
    return count


def is_available() -> bool:
    """Return whether arrays on a GPU can be computed with.

    Returns
    -------
    bool
        Whether normkit is built with CUDA, and there are a driver and a GPU.

    Raises
    ------
    ImportError
        normkit is built with CUDA, and what was built cannot be loaded.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.cuda.is_available() == (nk.cuda.device_count() > 0)
    True
    """
    return device_count() > 0
