"""The sentences of all errors: subject, expectation, what came, way out.

The core checks every argument in one pass and answers None when one is not acceptable, having changed nothing. Only
then do the functions here look again, find the first argument that breaks a rule, and raise. A good call never comes
here.

An array on a GPU is known by its description, which has the attributes of NumPy's arrays that are looked at here, and
the words of its library. What its memory holds is not looked at.

Each function of the first part checks one kind of argument. The second part says, per norm, what its `spec` may be and
which shapes follow from it. The third composes both into one explanation per operation of the core.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import _gpu
from ._core import AXES, AXES_RMS, BATCH, GROUP, INSTANCE, LAYER, RMS, dtypes

Array = NDArray[Any] | _gpu.Description
Shape = tuple[int, ...]

_MAX_DIMS = 16  # of the core's views
_MAX_INT = 2**63 - 1  # of the core's ints


class _Kind(NamedTuple):
    """A role an array can have: the dtypes it may come in, and the way out when it is no such array."""

    dtypes: tuple[str, ...]
    way: str
    cast: str = ""  # the way out when only the dtype is wrong, where it is another
    why: str = ""  # what these dtypes follow from
    place: str = ""  # the GPU that it must be on; empty: it must be NumPy's


def _data_kind(words: _gpu.Words) -> _Kind:
    way = words.convert.format(name="{name}", dtype=words.dtype.format("float32"))
    return _Kind(dtypes(), way, words.cast.format(name="{name}", dtype=words.dtype.format("{nearest}")))


_X = _data_kind(_gpu.NUMPY)


def _place_of(x: Array) -> str:
    return x.place if isinstance(x, _gpu.Description) else ""


def _words_of(x: Array) -> _gpu.Words:
    return x.words if isinstance(x, _gpu.Description) else _gpu.NUMPY


def _statistics_kind(x: Array) -> _Kind:
    return _Kind(("float64",), "pass it as the forward function returned it", place=_place_of(x))


# What is written to must not be converted: the result would go to a copy.
def _running_kind(x: Array) -> _Kind:
    return _Kind(("float32", "float64"), _words_of(x).fresh, place=_place_of(x))


def _dtype_name(dtype: np.dtype[Any] | str) -> str:
    """The name by which the core knows a dtype, or one that tells it from those."""
    if isinstance(dtype, str):
        return dtype
    if not dtype.isnative:
        # NumPy would call bfloat16 a V2, which is what it calls raw bytes.
        return str(dtype) if dtype.type.__module__ == "numpy" else dtype.byteorder + dtype.newbyteorder("=").name
    if dtype.char == "g":
        return "longdouble"  # on some platforms NumPy calls it float64
    # bfloat16 goes by its name: ml_dtypes, which makes it, need not be installed. Others have made their own.
    if dtype.name == "bfloat16" and dtype.type.__module__ != "ml_dtypes":
        return f"{dtype.type.__module__}.bfloat16"
    return dtype.name if dtype.name in _X.dtypes else str(dtype)


def _beside(x: Array, *others: str) -> _Kind:
    """What stands beside x: in its dtype, or in one of the others."""
    of_x, words = _dtype_name(x.dtype), _words_of(x)
    return _Kind(
        tuple(dict.fromkeys((of_x, *others))),
        words.convert.format(name="{name}", dtype="x.dtype"),
        words.cast.format(name="{name}", dtype="x.dtype"),
        f", as x is {of_x}" if others else ", as x is",
        _place_of(x),
    )


# ---- one kind of argument --------------------------------------------------------------------------------------------


def _one_of(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _plain(name: str, value: object, way: str) -> NDArray[Any]:
    if not isinstance(value, np.ndarray):
        if _gpu.on_gpu(value):
            way = _gpu.library_of(value).words.to_numpy.format(name=name)
        raise TypeError(f"{name} must be a numpy.ndarray, got {_gpu.came(value)}; {way}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain numpy.ndarray, got MaskedArray; fill it with {name}.filled(value)")
    if isinstance(value, np.matrix):
        raise TypeError(f"{name} must be a plain numpy.ndarray, got matrix; view it with np.asarray({name})")
    return value


def _no_number(name: str, dtype: np.dtype[Any] | str) -> str:
    """The way out for a dtype that no cast makes right, empty for the others."""
    if isinstance(dtype, str):
        return "pass an array of real numbers" if dtype.startswith(("complex", "opaque", "DLPack")) else ""
    if dtype.kind not in "SUMmVc" or dtype.type.__module__ != "numpy":  # ml_dtypes' numbers are of kind V
        return ""
    if dtype == np.dtype("V2"):  # what np.load makes of bfloat16
        return f"if these are bfloat16, view them with {name}.view(ml_dtypes.bfloat16)"
    return "pass an array of real numbers"


def _array(name: str, value: object, kind: _Kind) -> Array:
    way = kind.way.format(name=name)
    array = _gpu.describe(name, value, kind.place, way) if kind.place else _plain(name, value, way)
    came = _dtype_name(array.dtype)
    if came not in kind.dtypes:
        native = came
        if not isinstance(array.dtype, str) and not array.dtype.isnative:
            native = _dtype_name(array.dtype.newbyteorder("="))
        expected = _one_of(kind.dtypes) + (" in native byte order" if native in kind.dtypes else "") + kind.why
        nearest = {"float64": "float64", "longdouble": "float64", "float16": "float16"}.get(native, "float32")
        if kind.cast:
            way = _no_number(name, array.dtype) or kind.cast.format(name=name, nearest=nearest)
        raise TypeError(f"{name} must be {expected}, got {came}; {way}")
    if isinstance(array, _gpu.Description) and any(n % array.itemsize for n in (array.address, *array.strides)):
        raise ValueError(f"{name} must be aligned to its elements on a GPU, got address {array.address:#x}; copy it")
    return array


def _shaped(name: str, value: object, kind: _Kind, shape: Shape) -> Array:
    array = _array(name, value, kind)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def _data(x: object, least_dims: int) -> Array:
    kind = _X
    if _gpu.on_gpu(x):
        described = _gpu.describe("x", x, "", "")
        kind = _data_kind(described.words)._replace(place=described.place)
    array = _array("x", x, kind)
    if not least_dims <= array.ndim <= _MAX_DIMS:
        raise ValueError(f"x must have {least_dims} to {_MAX_DIMS} dimensions, got shape {array.shape}")
    return array


def _parameter(name: str, value: object, x: Array, sets: "_Sets") -> Array | None:
    if value is None:
        return None
    array = _array(name, value, _beside(x, "float32", "float64"))
    shape = sets.parameter
    if shape is None:
        pairs = zip(reversed(array.shape), reversed(x.shape), strict=False)
        if array.ndim > x.ndim or any(n not in (1, m) for n, m in pairs):
            raise ValueError(f"{name} must broadcast to the shape of x, {x.shape}, got {array.shape}")
    elif array.shape != shape:
        way = ""
        if [n for n in array.shape if n != 1] == [n for n in shape if n != 1]:
            way = f"; reshape it with {name}.reshape({shape})"
        elif array.size == 1:
            way = "; " + _words_of(x).full.format(name=name, shape=shape)
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}{way}")
    return array


def _is_bool(value: object) -> bool:
    return isinstance(value, bool | np.bool_)


def _index(value: object) -> int:
    if _is_bool(value):
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]


def _int(name: str, value: object) -> int:
    try:
        return _index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None


def _ints(name: str, value: object) -> Shape:
    items: Iterable[object] = (value,)
    if isinstance(value, bytes | bytearray | memoryview):
        pass  # sequences of ints by their type, but not by what they mean
    elif isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0):
        items = value
    try:
        values = tuple(map(_index, items))
    except TypeError:
        came = repr(value) if isinstance(value, tuple | list) else type(value).__name__
        raise TypeError(f"{name} must be an int or a sequence of ints, got {came}") from None
    if not values:
        raise ValueError(f"{name} must not be empty, got {value!r}")
    return values


def _axis(name: str, value: int, ndim: int) -> int:
    if not -ndim <= value < ndim:
        raise ValueError(f"{name} must be from {-ndim} to {ndim - 1}, as x has {ndim} dimensions, got {value}")
    return value % ndim


def _finite(name: str, value: object, least: float = -math.inf) -> None:
    if isinstance(value, np.ndarray):  # some versions of NumPy make a number of an array of one
        way = f"; pass {name}.item()" if value.size == 1 else ""
        raise TypeError(f"{name} must be a float, got {type(value).__name__}{way}")
    try:
        if _is_bool(value):
            raise TypeError
        finite = math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        finite = False
    except TypeError:
        raise TypeError(f"{name} must be a float, got {type(value).__name__}") from None
    if not finite or float(value) < least:  # type: ignore[arg-type]
        expected = "finite" if least == -math.inf else f"finite and at least {least:g}"
        raise ValueError(f"{name} must be {expected}, got {value}")


def _statistics(name: str, value: object, x: Array, shape: Shape) -> Array:
    kind = _statistics_kind(x)
    array = _shaped(name, value, kind, shape)
    if isinstance(array, _gpu.Description) and array.size:
        inside = array.itemsize
        for stride, n in zip(reversed(array.strides), reversed(shape), strict=True):
            if n > 1 and stride != inside:
                came = f"strides {array.strides} for shape {shape}"
                raise ValueError(f"{name} must be in C order and without gaps on a GPU, got {came}; {kind.way}")
            inside *= n
    return array


def _running(mean: object, var: object, x: Array, shape: Shape, updated: bool) -> dict[str, Array]:
    kind = _running_kind(x)
    given = {"running_mean": mean, "running_var": var}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 2:
        return {}
    if missing:
        raise ValueError(f"running_mean and running_var must be given together, got {missing[0]}=None")
    arrays = {name: _shaped(name, value, kind, shape) for name, value in given.items()}
    if updated:
        for name, array in arrays.items():
            _writable(name, array, kind.way)
    return arrays


def _address(array: Array) -> int:
    return array.address if isinstance(array, _gpu.Description) else array.ctypes.data


def _same_view(a: Array, b: Array) -> bool:
    strides = [[stride for stride, n in zip(v.strides, v.shape, strict=True) if n > 1] for v in (a, b)]
    return _address(a) == _address(b) and strides[0] == strides[1]


def _bounds(array: Array) -> tuple[int, int]:
    """The first address of the array's memory, and that behind the last."""
    reaches = [stride * (n - 1) for stride, n in zip(array.strides, array.shape, strict=True)]
    low = _address(array) + sum(min(reach, 0) for reach in reaches)
    return low, low + sum(map(abs, reaches)) + array.itemsize


def _may_overlap(a: Array, b: Array) -> bool:
    """Compare bounds, as the core does: arrays that interleave count as overlapping."""
    (low, high), (other_low, other_high) = _bounds(a), _bounds(b)
    return bool(a.size and b.size) and low < other_high and other_low < high


def _apart(name: str, array: Array, others: dict[str, Array], may_be: tuple[str, ...] = ()) -> None:
    for other_name, other in others.items():
        if other_name in may_be and _same_view(array, other):
            continue
        if _may_overlap(array, other):
            unless = f", unless it is {other_name} itself" if other_name in may_be else ""
            raise ValueError(
                f"{name} must not overlap {other_name}{unless}, got arrays that share memory; "
                f"give {name} memory of its own"
            )


def _writable(name: str, array: Array, way: str) -> None:
    writeable = array.writeable if isinstance(array, _gpu.Description) else array.flags.writeable
    if not writeable:
        raise ValueError(f"{name} must be writable, got a read-only array; {way}")
    if array.size == 0:
        return
    # No two elements share memory where, going up in stride, each axis steps over all that lies inside it.
    inside = array.itemsize  # bytes
    for stride, n in sorted((abs(stride), n) for stride, n in zip(array.strides, array.shape, strict=True)):
        if n > 1 and stride < inside:
            came = f"strides {array.strides} for shape {array.shape}"
            raise ValueError(f"{name} must not overlap itself, got {came}; {way}")
        inside += stride * (n - 1)


def _out(out: object, x: Array, inputs: dict[str, Array], may_be: tuple[str, ...]) -> None:
    if out is None:
        return
    way = _words_of(x).like
    array = _shaped("out", out, _beside(x)._replace(way=way, cast=""), x.shape)
    _writable("out", array, way)
    _apart("out", array, inputs, may_be)


# ---- one norm --------------------------------------------------------------------------------------------------------


class _Sets(NamedTuple):
    """What follows from `spec` and the shape of x."""

    parameter: Shape | None  # shape of weight and bias; None: what broadcasts to x
    statistics: Shape  # shape of mean and rstd
    extent: int  # elements of one set
    owner: str = ""  # what a set belongs to; empty where a set of one element is fine
    way: str = ""  # the way out where it is not


def _batch(x: Array, spec: object) -> _Sets:
    axis = _axis("channel_axis", _int("channel_axis", spec), x.ndim)
    channels = (x.shape[axis],)
    extent = math.prod(x.shape[:axis] + x.shape[axis + 1 :])
    return _Sets(channels, channels, extent, "channel", "use more samples, or training=False")


def _channels_of_samples(x: Array, spec: object) -> tuple[int, int, int]:
    """Count samples, channels, and elements of one channel of one sample."""
    axis = _axis("channel_axis", _int("channel_axis", spec), x.ndim)
    if axis == 0:
        raise ValueError(f"channel_axis must not be axis 0 of x, which holds the samples, got {spec}")
    return x.shape[0], x.shape[axis], math.prod(x.shape[1:axis] + x.shape[axis + 1 :])


def _instance(x: Array, spec: object) -> _Sets:
    samples, channels, extent = _channels_of_samples(x, spec)
    return _Sets((channels,), (samples, channels), extent, "channel", "use more space, or use_input_stats=False")


def _group(x: Array, spec: tuple[object, object]) -> _Sets:
    samples, channels, extent = _channels_of_samples(x, spec[1])
    groups = _int("num_groups", spec[0])
    if groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {groups}")
    if channels % groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {groups}")
    if groups > _MAX_INT:  # only without channels
        raise ValueError(f"num_groups must be at most {_MAX_INT}, got {groups}")
    return _Sets((channels,), (samples, groups), channels // groups * extent, "group", "use fewer groups")


def _trailing(x: Array, spec: object) -> _Sets:
    shape = _ints("normalized_shape", spec)
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"normalized_shape must be the last dimensions of x, shape {x.shape}, got {shape}")
    return _Sets(shape, x.shape[: x.ndim - len(shape)], math.prod(shape))


def _any_axes(x: Array, spec: object) -> _Sets:
    given = _ints("axes", spec)
    axes = {_axis("axes", axis, x.ndim) for axis in given}
    if len(axes) != len(given):
        raise ValueError(f"axes must name each axis once, got {given}")
    kept = tuple(n for axis, n in enumerate(x.shape) if axis not in axes)
    return _Sets(None, kept, math.prod(x.shape[axis] for axis in axes))


class _Norm(NamedTuple):
    least_dims: int  # of x
    sets: Callable[[Array, Any], _Sets]
    flag: str = ""  # the argument that chooses between statistics from x and given ones


_NORMS = {
    BATCH: _Norm(2, _batch, "training"),
    INSTANCE: _Norm(3, _instance, "use_input_stats"),
    GROUP: _Norm(2, _group),
    LAYER: _Norm(1, _trailing),
    RMS: _Norm(1, _trailing),
    AXES: _Norm(1, _any_axes),
    AXES_RMS: _Norm(1, _any_axes),
}


# ---- one operation of the core: raises, always -----------------------------------------------------------------------


def explain_forward(
    norm: int,
    x: object,
    spec: object,
    weight: object,
    bias: object,
    eps: object,
    out: object,
    running_mean: object = None,
    running_var: object = None,
    momentum: object = 0.0,
    ddof: object = 1,
) -> NoReturn:
    data, sets, inputs = _forward_inputs(norm, x, spec, weight, bias, eps)
    _finite("momentum", momentum)
    _finite("ddof", ddof, least=0)
    # Instance norm keeps running statistics per channel, as batch norm does, though it has its own for each sample.
    running = _running(running_mean, running_var, data, sets.statistics[-1:], updated=True)
    if sets.owner and data.size and sets.extent == 1:
        raise ValueError(f"expected more than 1 value per {sets.owner}, got x of shape {data.shape}; {sets.way}")
    if running and data.size and float(ddof) >= sets.extent:  # type: ignore[arg-type]
        raise ValueError(f"ddof must be less than the {sets.extent} values per {sets.owner} of x, got {ddof}")
    for name, array in running.items():
        _apart(name, array, inputs)
        inputs[name] = array
    _out(out, data, inputs, may_be=("x",))
    _unexplained()


def explain_evaluate(
    norm: int,
    x: object,
    spec: object,
    weight: object,
    bias: object,
    eps: object,
    out: object,
    running_mean: object,
    running_var: object,
) -> NoReturn:
    data, sets, inputs = _forward_inputs(norm, x, spec, weight, bias, eps)
    running = _running(running_mean, running_var, data, sets.statistics[-1:], updated=False)
    if not running:
        flag = _NORMS[norm].flag
        raise ValueError(f"{flag}=False needs running_mean and running_var, got None; pass both, or {flag}=True")
    var = running["running_var"]
    for index in np.flatnonzero(var < 0) if isinstance(var, np.ndarray) else ():
        raise ValueError(
            f"running_var must not be negative, got {var[index]} at index {index}; "
            "no average of variances is: restore it, or reset it with running_var.fill(1)"
        )
    _out(out, data, inputs | running, may_be=("x",))
    _unexplained()


def explain_backward(
    norm: int,
    dy: object,
    x: object,
    mean: object,
    rstd: object,
    spec: object,
    weight: object,
    training: object,
    needs: int,
    out: object,
) -> NoReturn:
    least_dims, sets_of, _ = _NORMS[norm]
    data = _data(x, least_dims)
    sets = sets_of(data, spec)
    inputs = {"dy": _shaped("dy", dy, _beside(data), data.shape), "x": data}
    if norm not in (RMS, AXES_RMS):
        inputs["mean"] = _statistics("mean", mean, data, sets.statistics)
    inputs["rstd"] = _statistics("rstd", rstd, data, sets.statistics)
    gamma = _parameter("weight", weight, data, sets)
    if gamma is not None:
        inputs["weight"] = gamma
    _out(out, data, inputs, may_be=("dy", "x"))
    if out is not None and not needs & 1:
        raise ValueError('out must be None when needs does not name "x", got an array; it takes dx')
    if training and sets.owner and data.size and sets.extent == 1:
        raise ValueError(f"expected more than 1 value per {sets.owner}, got x of shape {data.shape}; {sets.way}")
    _unexplained()


def explain_moments(x: object, axes: object) -> NoReturn:
    _array("x", x, _X)  # there are none on a GPU
    explain_forward(AXES, x, axes, None, None, 0.0, None)


def _forward_inputs(
    norm: int, x: object, spec: object, weight: object, bias: object, eps: object
) -> tuple[Array, _Sets, dict[str, Array]]:
    least_dims, sets_of, _ = _NORMS[norm]
    data = _data(x, least_dims)
    sets = sets_of(data, spec)
    parameters = {name: _parameter(name, value, data, sets) for name, value in (("weight", weight), ("bias", bias))}
    if not (eps is None and norm == RMS):  # None: the core's choice
        _finite("eps", eps, least=0)
    return data, sets, {"x": data} | {name: array for name, array in parameters.items() if array is not None}


def _unexplained() -> NoReturn:
    raise RuntimeError(
        "the core refused these arguments, and no rule says why: this is a bug in normkit; "
        "please report it with the shapes, strides and dtypes of the arguments"
    )


# ---- arguments that never reach the core -----------------------------------------------------------------------------


def explain_stream(x: object, stream: object) -> NoReturn:
    what = _gpu.came(x) if x is not None else "None"
    raise ValueError(f"stream must be None, as x is not on a GPU but {what}, got {type(stream).__name__}; leave it out")


def explain_needs(needs: object, names: tuple[str, ...]) -> NoReturn:
    allowed = ", ".join(f'"{name}"' for name in names)
    if isinstance(needs, str) or not isinstance(needs, Iterable):
        came = f'"{needs}"' if isinstance(needs, str) else type(needs).__name__
        raise TypeError(f"needs must be a tuple of names out of {allowed}, got {came}") from None
    raise ValueError(f"needs must name gradients out of {allowed}, got {needs}") from None


def flag(name: str, value: object) -> bool:
    """Return `value` where it is a bool, Python's or NumPy's."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def grad_code(grad_dtype: object) -> int:
    """Return the core's number for the dtype that gradients of parameters are asked in."""
    try:
        if type(grad_dtype).__module__ == "torch":
            grad_dtype = str(grad_dtype).removeprefix("torch.")
        dtype = np.dtype(grad_dtype)  # type: ignore[call-overload]
    except (TypeError, ValueError, SyntaxError):  # what NumPy raises for what is none
        dtype = None
    for code, allowed in ((1, np.float32), (2, np.float64)):
        if dtype == allowed:
            return code
    raise TypeError(f"grad_dtype must be None, numpy.float32 or numpy.float64, got {grad_dtype!r}")


def thread_count(n: object) -> int:
    """Return `n` as an int that the core can count to."""
    threads = _int("n", n)
    if not 1 <= threads < 2**31:
        raise ValueError(f"n must be from 1 to 2147483647, or None for the default, got {threads}")
    return threads


def memory_limit(limit_bytes: object) -> int:
    """Return `limit_bytes` as an int that the core can count to."""
    limit = _int("limit_bytes", limit_bytes)
    if not 0 <= limit <= _MAX_INT:
        raise ValueError(f"limit_bytes must be from 0 to {_MAX_INT}, got {limit}; 0 keeps nothing")
    return limit
