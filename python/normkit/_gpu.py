"""Arrays on a GPU: whose they are, on which stream their library works, how it takes results over.

No library is imported here, as whoever has an array of it has imported it; `normkit._cuda` is imported when the first
array on a GPU comes.
"""

import importlib
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

# As DLPack numbers devices.
_CPU = 1
_CUDA = (2, 13)  # 13: managed memory, which the GPU reads as its own
_UNKNOWN = (2, -1)  # some GPU: only the pointer tells

_LEGACY = 1  # the legacy default stream, as its handle; 0 may be any default stream
_MAX_POINTER = 2**64 - 1


# ---- words -----------------------------------------------------------------------------------------------------------


class Words(NamedTuple):
    """How errors say it in terms of one library; the fields in braces are filled in."""

    convert: str  # what is no array where x is
    cast: str  # what has another dtype
    dtype: str
    like: str  # what makes an array like x
    fresh: str  # what makes running statistics
    full: str  # what makes many of one
    to_numpy: str = ""


NUMPY = Words(
    "convert it with np.asarray({name}, dtype={dtype})",
    "convert it with {name}.astype({dtype})",
    "np.{}",
    "create it with np.empty_like(x)",
    "create it with np.zeros or np.ones",
    "repeat it with np.full({shape}, {name})",
)
_ANY = Words(
    "copy it to the device of x",
    "convert it to {dtype}",
    "{}",
    "create it like x",
    "create it as zeros or ones",
    "repeat it to shape {shape}",
    "copy it to the CPU, as a numpy.ndarray",
)


# ---- libraries -------------------------------------------------------------------------------------------------------


def _module(name: str) -> Any:
    return sys.modules[name]


def _current_of_torch(x: Any) -> tuple[int, object]:
    stream = _module("torch").cuda.current_stream(x.device)
    return stream.cuda_stream, stream


def _on_device_of_torch(x: Any) -> AbstractContextManager[Any]:
    """torch exports the tensors of its current device alone."""
    cuda = _module("torch").cuda
    if x.device.index == cuda.current_device():
        return nullcontext()
    device: AbstractContextManager[Any] = cuda.device(x.device)
    return device


def _current_of_cupy(x: Any) -> tuple[int, object]:
    stream = _module("cupy").cuda.get_current_stream(x.device.id)
    return stream.ptr, stream


def _to_jax(result: Any) -> Any:
    """JAX would round float64 to float32, unless it has been told to keep it."""
    jax = _module("jax")
    if result.dtype == "float64" and not jax.config.jax_enable_x64:
        return result
    return jax.dlpack.from_dlpack(result)


class Library(NamedTuple):
    words: Words
    take: Callable[[Any], Any]  # makes an array of the library of a DeviceArray
    # Pointer and object of the stream that the library works on; None: it does not tell.
    current: Callable[[Any], tuple[int, object]] | None = None
    on_device: Callable[[Any], AbstractContextManager[Any]] = lambda x: nullcontext()
    immutable: bool = False  # DLPack does not say so, nor does JAX


_JAX = Library(
    Words(
        "convert it with jax.numpy.asarray({name}, dtype={dtype}, device=x.device)",
        "convert it with {name}.astype({dtype})",
        "jax.numpy.{}",
        "leave it out",
        "create it with another library, such as CuPy",
        "repeat it with jax.numpy.full({shape}, {name})",
        "convert it with np.asarray({name})",
    ),
    _to_jax,
    immutable=True,
)
_LIBRARIES = {  # by the top module of the array's type
    "torch": Library(
        Words(
            "convert it with torch.asarray({name}, dtype={dtype}, device=x.device)",
            "convert it with {name}.to({dtype})",
            "torch.{}",
            "create it with torch.empty_like(x)",
            "create it with torch.zeros or torch.ones, with device=x.device",
            "repeat it with {name}.reshape(()).expand({shape})",
            "convert it with {name}.cpu().numpy()",
        ),
        lambda result: _module("torch").from_dlpack(result),
        _current_of_torch,
        _on_device_of_torch,
    ),
    "cupy": Library(
        Words(
            "convert it with cupy.asarray({name}, dtype={dtype})",
            "convert it with {name}.astype({dtype})",
            "cupy.{}",
            "create it with cupy.empty_like(x)",
            "create it with cupy.zeros or cupy.ones",
            "repeat it with cupy.full({shape}, {name})",
            "convert it with cupy.asnumpy({name})",
        ),
        lambda result: _module("cupy").from_dlpack(result),
        _current_of_cupy,
    ),
    "jax": _JAX,
    "jaxlib": _JAX,
}


def _take_by_namespace(x: Any) -> Callable[[Any], Any]:
    """By the array API of x's library; without one, its users get what everybody can read."""
    try:
        take: Callable[[Any], Any] = x.__array_namespace__().from_dlpack
    except (AttributeError, TypeError):
        return lambda result: result
    return take


def library_of(array: Any) -> Library:
    for base in type(array).__mro__:
        found = _LIBRARIES.get(base.__module__.partition(".")[0])
        if found is not None:
            return found
    return Library(_ANY, _take_by_namespace(array))


# ---- where an array is -----------------------------------------------------------------------------------------------


def device_of(value: object) -> tuple[int, int] | None:
    """Return kind and number of the device, as DLPack numbers them; None for what is no array.

    _UNKNOWN where `value` is on a GPU and does not tell on which.
    """
    if isinstance(value, np.ndarray):
        return _CPU, 0
    compiled = sys.modules.get("normkit._cuda")
    found: tuple[int, int] | None = None if compiled is None else compiled.place_of(value)
    if found is not None:  # in a tenth of the time
        return found
    ask = getattr(type(value), "__dlpack_device__", None)
    if ask is not None:
        try:
            kind, number = ask(value)
            return int(kind), int(number)
        except Exception:  # of any library, about an array that is nowhere or in several places
            return None
    return _UNKNOWN if hasattr(type(value), "__cuda_array_interface__") else None


def on_gpu(value: object) -> bool:
    device = device_of(value)
    return device is not None and device[0] in _CUDA


def _place(kind: int, number: int) -> str:
    if kind == _CPU:
        return "the CPU"
    return f"cuda:{max(number, 0)}" if kind in _CUDA else f"DLPack device {kind}:{number}"


def came(value: object) -> str:
    """What `value` is and where, for a sentence that says what came."""
    device = None if isinstance(value, np.ndarray) else device_of(value)
    return type(value).__name__ + ("" if device is None else f" on {_place(*device)}")


# ---- the compiled half -----------------------------------------------------------------------------------------------


def core() -> Any:
    """Return `normkit._cuda`, imported by the first array on a GPU."""
    compiled = sys.modules.get("normkit._cuda")
    if compiled is not None:
        return compiled
    try:
        return importlib.import_module("normkit._cuda")
    except ModuleNotFoundError as error:
        if error.name != "normkit._cuda":
            raise
    raise RuntimeError(
        "arrays on a GPU need normkit built with CUDA, and this one is built without; build it with: "
        "pip install . -C cmake.define.NORMKIT_CUDA=ON"
    )


class Description(NamedTuple):
    """What the errors look at in an array on a GPU, under the names that NumPy has for it."""

    kind: str  # the name of its type
    place: str
    words: Words
    address: int
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    writeable: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def describe(name: str, value: object, place: str, way: str) -> Description:
    """Describe an array on the GPU `place`, or where that is empty, on any; raises where `value` is none."""
    device = device_of(value)
    there = device is not None and device[0] in _CUDA
    if not there or (place and device != _UNKNOWN and _place(*device) != place):  # type: ignore[misc]
        raise TypeError(f"{name} must be an array on {place}, as x is, got {came(value)}; {way}")
    library = library_of(value)
    try:
        with library.on_device(value):
            kind, number, address, dtype, itemsize, shape, strides, read_only = core().describe(value)
    except BufferError as error:
        raise TypeError(f"{name} must be an array that DLPack can pass on, got {came(value)}: {error}") from None
    found = place if place and number < 0 else _place(kind, number)  # an empty one is anywhere
    if place and found != place:
        raise TypeError(f"{name} must be an array on {place}, as x is, got {type(value).__name__} on {found}; {way}")
    return Description(
        type(value).__name__,
        found,
        library.words,
        address,
        dtype,
        itemsize,
        shape,
        strides,
        not read_only and not library.immutable,
    )


# ---- streams ---------------------------------------------------------------------------------------------------------


def pointer_of(stream: Any) -> int:
    """Return the address of the CUDA stream that `stream` is or has, the legacy default stream's where it is 0."""
    found = stream
    if hasattr(stream, "__cuda_stream__"):
        told = stream.__cuda_stream__
        _, found = told() if callable(told) else told
    else:
        for attribute in ("cuda_stream", "ptr"):  # of torch, of CuPy
            found = getattr(stream, attribute, found)
    if not isinstance(found, int) or isinstance(found, bool):
        raise TypeError(
            f"stream must be a stream of torch or CuPy, an int, or None, got {type(stream).__name__}; "
            "pass the address of a cudaStream_t"
        )
    if not 0 <= found <= _MAX_POINTER:
        raise ValueError(f"stream must be the address of a cudaStream_t, got {found}")
    return found or _LEGACY


def run(operation: str, x: Any, written: tuple[object, ...], arguments: tuple[object, ...], stream: object) -> Any:
    """Run an operation of `_cuda` where x is, on `stream` or on the one that x's library works on.

    Returns None where the arguments do not fit; else what the operation returns, new arrays as x's library has them.
    """
    compiled = core()
    if any(array is not None and library_of(array).immutable for array in written):
        return None
    pointer, keeper = (_LEGACY, None) if stream is None else (pointer_of(stream), stream)
    if compiled.place_of(x) is not None:  # x's library has functions of C for all that follows
        return getattr(compiled, operation)(*arguments, None if stream is None else pointer, keeper)
    library, current = library_of(x), None
    if library.current is not None:
        current, own = library.current(x)
        current = current or _LEGACY
        if stream is None:
            pointer, keeper = current, own
    with library.on_device(x):
        result = getattr(compiled, operation)(*arguments, pointer, keeper)
        if result is None:
            return None
        if current is not None and current != pointer:
            # What the library does from here on finds the results, and gives no memory back too early.
            compiled.wait(current, pointer, x.__dlpack_device__()[1])  # those that tell have it
        made = compiled.DeviceArray

        def take(array: Any) -> Any:
            new = type(array) is made and not any(array is other for other in written)
            return library.take(array) if new else array

        return tuple(map(take, result)) if isinstance(result, tuple) else take(result)
