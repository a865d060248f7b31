"""What is not accepted, the sentence that says so, and that a call that raises has changed nothing.

BAD is the table of rules: each row is tried on every function that it is about. What looks odd and is accepted all the
same stands below it, in GOOD.
"""

from array import array as typed_array
from types import FunctionType
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import gpu
import normkit as nk
from cases import MEMORY
from normkit import _core, functional

SHAPE = (2, 6, 4, 5)
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Norm(NamedTuple):
    """A valid use of a norm on x of SHAPE, and the shapes that follow from it."""

    options: dict
    parameter: tuple
    statistics: tuple
    flag: str = ""  # the argument with another meaning when it is turned round


NORMS = {
    "batch_norm": Norm({}, (6,), (6,), "training"),
    "instance_norm": Norm({}, (6,), (2, 6), "use_input_stats"),
    "group_norm": Norm({"num_groups": 3}, (6,), (2, 3)),
    "layer_norm": Norm({"normalized_shape": (4, 5)}, (4, 5), (2, 6)),
    "rms_norm": Norm({"normalized_shape": (4, 5)}, (4, 5), (2, 6)),
    "normalize": Norm({"axes": (1, 3)}, (1, 6, 1, 5), (2, 4), "center"),
}


class Call(NamedTuple):
    norm: str
    step: str  # "", "_forward", "_backward"
    flag: bool = True  # False: batch norm and instance norm with given statistics, normalize without the mean

    @property
    def function(self):
        return getattr(nk, self.norm + self.step)

    def __str__(self):
        return self.norm + self.step + ("" if self.flag else f"({NORMS[self.norm].flag}=False)")


STEPS = ("", "_forward", "_backward")
CALLS = [
    Call(norm, step, flag)
    for norm, row in NORMS.items()
    for step in STEPS
    for flag in ((True, False) if row.flag else (True,))
]


def calls(*norms, steps=STEPS, flags=(True, False), but=()):
    """The calls of these norms, or of all norms but those."""
    return [
        call
        for call in CALLS
        if call.norm in (norms or NORMS) and call.norm not in but and call.step in steps and call.flag in flags
    ]


FORWARD = {"steps": ("", "_forward")}
BACKWARD = {"steps": ("_backward",)}
CHANNELS = ("batch_norm", "instance_norm", "group_norm")
RUNNING = calls("batch_norm", "instance_norm", **FORWARD)
UPDATING = calls("batch_norm", "instance_norm", **FORWARD, flags=(True,))
GIVEN = calls("batch_norm", "instance_norm", **FORWARD, flags=(False,))
BIASED = calls(but=("rms_norm",), **FORWARD)
WITH_MEAN = [
    call for call in calls(but=("rms_norm",), **BACKWARD) if call != Call("normalize", "_backward", flag=False)
]


def floats(shape, dtype=np.float32):
    return np.random.default_rng(0).uniform(1, 2, shape).astype(dtype)


def valid(call, dtype="float32"):
    """Every argument of a valid call, with arrays of its own."""
    norm, dtype = NORMS[call.norm], DTYPES[dtype]
    arguments = {"x": floats(SHAPE, dtype), **norm.options, "weight": floats(norm.parameter, dtype)}
    arguments["out"] = floats(SHAPE, dtype)
    if norm.flag:
        arguments[norm.flag] = call.flag
    if call.step == "_backward":
        arguments |= {"dy": floats(SHAPE, dtype), "rstd": floats(norm.statistics, np.float64)}
        if call.norm != "rms_norm":
            arguments["mean"] = floats(norm.statistics, np.float64)
        return arguments
    arguments["eps"] = 1e-5
    if call.norm != "rms_norm":
        arguments["bias"] = floats(norm.parameter, dtype)
    if call.norm in ("batch_norm", "instance_norm"):
        arguments |= {"running_mean": floats(6, np.float64), "running_var": floats(6, np.float64)}
        arguments |= {"momentum": 0.1, "ddof": 1}
    return arguments


def changed(call, dtype, changes):
    """A valid call with some arguments replaced: by a value, or by a function of the arguments so far."""
    arguments = valid(call, dtype)
    for name, value in changes.items():
        arguments[name] = value(arguments) if isinstance(value, FunctionType) else value
    return arguments


def bits(value):
    """The memory that an array lives in, to the end of what it is a view of."""
    while isinstance(value, np.ndarray) and isinstance(value.base, np.ndarray):
        value = value.base
    return np.asarray(value).tobytes() if isinstance(value, np.ndarray) else None


# --- what is not accepted ---------------------------------------------------------------------------------------------

BAD = []


def bad(calls, error, message, dtype="float32", **changes):
    """A row: what all these calls say with data of this dtype and these changes. {way} and its like: see `expected`."""
    what = message.partition(";")[0] + ("" if dtype == "float32" else f" ({dtype})")
    BAD.append(pytest.param(calls, error, message, dtype, changes, id=f"{calls[0].norm}-{what}"))


def one_of(names):
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def in_dtype(name, dtype):
    return {name: lambda arguments: np.zeros(arguments[name].shape, dtype)}


def matrix(array):
    return np.ones((2, 3), array.dtype).view(np.matrix)


def bad_kind(calls, name, way):
    """What is not accepted for any array: whatever is none."""
    expected = f"{name} must be a numpy.ndarray, got"
    bad(calls, TypeError, f"{expected} list; {way}", **{name: lambda a: a[name].tolist()})
    for value in (1.0, np.float32(1), np.int64(1), "1", b"1"):
        bad(calls, TypeError, f"{expected} {type(value).__name__}; {way}", **{name: value})
    bad(calls, TypeError, f"{expected} memoryview; {way}", **{name: lambda a: memoryview(a[name].astype(np.float32))})
    expected = f"{name} must be a plain numpy.ndarray, got"
    way = f"fill it with {name}.filled(value)"
    bad(calls, TypeError, f"{expected} MaskedArray; {way}", **{name: lambda a: np.ma.masked_array(a[name])})
    way = f"view it with np.asarray({name})"
    bad(calls, TypeError, f"{expected} matrix; {way}", **{name: lambda a: matrix(a[name])})


# As NumPy writes them, but for longdouble, which has another name on each platform.
OTHERS = {
    **{str(np.dtype(other)): other for other in (bool, np.int32, np.uint8, np.complex64, object, "M8[s]", "U3", "S2")},
    **{str(np.dtype(other)): other for other in ([("re", np.float32)], "V4", "V2", ml_dtypes.float8_e4m3fn)},
    "longdouble": np.longdouble,
}
NEAREST = {"longdouble": "float64"}  # else float32
# What no cast makes right.
NO_NUMBER = {str(np.dtype(other)) for other in (np.complex64, "M8[s]", "U3", "S2", [("re", np.float32)], "V4")}


def bad_dtypes(calls, name, allowed, way, why="", dtype="float32"):
    """What is not accepted for an array of these dtypes: all others, and these in the other byte order."""
    for came, other in {**OTHERS, **DTYPES}.items():
        if came not in allowed:
            if "astype" not in way:
                out = way
            elif came == "|V2":
                out = f"if these are bfloat16, view them with {name}.view(ml_dtypes.bfloat16)"
            else:
                out = "pass an array of real numbers" if came in NO_NUMBER else way.format(NEAREST.get(came, "float32"))
            message = f"{name} must be {one_of(allowed)}{why}, got {came}; {out}"
            bad(calls, TypeError, message, dtype, **in_dtype(name, other))
    for native in allowed:
        other = np.dtype(DTYPES[native]).newbyteorder("S")
        came = other.byteorder + "bfloat16" if native == "bfloat16" else other
        message = f"{name} must be {one_of(allowed)} in native byte order{why}, got {came}; "
        message += way.format("float32" if native == "bfloat16" else native)
        bad(calls, TypeError, message, dtype, **in_dtype(name, other))


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def constant(array):
    """One element seen everywhere: strides of zero."""
    return np.broadcast_to(array.dtype.type(1.5), array.shape)


# --- x, dy, weight, bias

bad_kind(CALLS, "x", "convert it with np.asarray(x, dtype=np.float32)")
bad_dtypes(CALLS, "x", tuple(DTYPES), "convert it with x.astype(np.{})")
for name, where in (("dy", calls(**BACKWARD)), ("weight", CALLS), ("bias", BIASED)):
    bad_kind(where, name, f"convert it with np.asarray({name}, dtype=x.dtype)")
    for dtype in DTYPES:
        allowed = (dtype,) if name == "dy" else tuple(dict.fromkeys((dtype, "float32", "float64")))
        why = ", as x is" if name == "dy" else f", as x is {dtype}"
        bad_dtypes(where, name, allowed, f"convert it with {name}.astype(x.dtype)", why, dtype)
for name, where, way in (
    ("x", CALLS, "convert it with np.asarray(x, dtype=np.float32)"),
    ("dy", calls(**BACKWARD), "convert it with np.asarray(dy, dtype=x.dtype)"),
):
    bad(where, TypeError, f"{name} must be a numpy.ndarray, got NoneType; {way}", **{name: None})

for least, norms in (
    (2, ("batch_norm", "group_norm")),
    (3, ("instance_norm",)),
    (1, ("layer_norm", "rms_norm", "normalize")),
):
    for shape in ((5,) * (least - 1), (1,) * 15 + (2, 2)):
        bad(calls(*norms), ValueError, f"x must have {least} to 16 dimensions, got shape {shape}", x=floats(shape))

for shape in ((2, 6, 4, 1), (240,), (2, 6, 5, 4), ()):
    bad(calls(**BACKWARD), ValueError, f"dy must have shape (2, 6, 4, 5), got {shape}", dy=floats(shape))
for name, where in (("weight", CALLS), ("bias", BIASED)):
    shaped = [call for call in where if call.norm != "normalize"]
    message = name + " must have shape {parameter}, got "
    for shape in ((3,), (2, 6, 4, 5), (0,)):
        bad(shaped, ValueError, f"{message}{shape}", **{name: floats(shape)})
    for shape in ((), (1,), (1, 1)):
        way = f"repeat it with np.full({{parameter}}, {name})"
        bad(shaped, ValueError, f"{message}{shape}; {way}", **{name: floats(shape)})
    way = f"reshape it with {name}.reshape({{parameter}})"
    bad(
        calls(*CHANNELS, steps=STEPS if name == "weight" else FORWARD["steps"]),
        ValueError,
        f"{message}(1, 6, 1, 1); {way}",
        **{name: floats((1, 6, 1, 1))},
    )
    bad(
        [call for call in where if call.norm in ("layer_norm", "rms_norm")],
        ValueError,
        f"{message}(1, 4, 5); {way}",
        **{name: floats((1, 4, 5))},
    )
    broadcast = [call for call in where if call.norm == "normalize"]
    for shape in ((6,), (2, 6, 4, 5, 1), (1, 2, 6, 4, 5), (0,)):
        message = f"{name} must broadcast to the shape of x, (2, 6, 4, 5), got {shape}"
        bad(broadcast, ValueError, message, **{name: floats(shape)})

# --- the sets

for value in (1.0, None, (1,), "1", b"1", True, np.True_, np.array([1])):
    message = f"must be an int, got {type(value).__name__}"
    bad(calls(*CHANNELS), TypeError, f"channel_axis {message}", channel_axis=value)
    bad(calls("group_norm"), TypeError, f"num_groups {message}", num_groups=value)
for axis in (4, -5, 10**30):
    message = f"channel_axis must be from -4 to 3, as x has 4 dimensions, got {axis}"
    bad(calls(*CHANNELS), ValueError, message, channel_axis=axis)
for axis in (0, -4):
    message = f"channel_axis must not be axis 0 of x, which holds the samples, got {axis}"
    bad(calls("instance_norm", "group_norm"), ValueError, message, channel_axis=axis)
for groups in (0, -3, -(10**30)):
    bad(calls("group_norm"), ValueError, f"num_groups must be at least 1, got {groups}", num_groups=groups)
for groups in (4, 12, 10**30):
    message = f"num_groups must divide the 6 channels of x, got {groups}"
    bad(calls("group_norm"), ValueError, message, num_groups=groups)
message = f"num_groups must be at most {2**63 - 1}, got {2**63}"
without_channels = {name: floats((2, 0, 4)) for name in ("x", "out")}
bad(calls("group_norm", **FORWARD), ValueError, message, num_groups=2**63, **without_channels, weight=None, bias=None)
for name, norms in (("normalized_shape", ("layer_norm", "rms_norm")), ("axes", ("normalize",))):
    for value, came in (
        (5.0, "float"),
        (None, "NoneType"),
        ("45", "str"),
        ((1, 5.0), "(1, 5.0)"),
        ([None], "[None]"),
        ({1: 2}, "dict"),
        (True, "bool"),
        ((1, True), "(1, True)"),
        (b"\1", "bytes"),
        (bytearray(b"\1"), "bytearray"),
        (memoryview(b"\1"), "memoryview"),
        (np.array([True]), "ndarray"),
        (np.array([[4, 5]]), "ndarray"),
    ):
        message = f"{name} must be an int or a sequence of ints, got {came}"
        bad(calls(*norms), TypeError, message, **{name: value})
    for value in ((), [], np.array([], dtype=int)):
        bad(calls(*norms), ValueError, f"{name} must not be empty, got {value!r}", **{name: value})
for value in (4, (5, 4), (4,), (1, 2, 6, 4, 5), (-1,), (10**30,)):
    came = (value,) if isinstance(value, int) else value
    message = f"normalized_shape must be the last dimensions of x, shape (2, 6, 4, 5), got {came}"
    bad(calls("layer_norm", "rms_norm"), ValueError, message, normalized_shape=value)
for axes, worst in ((4, 4), (-5, -5), ((0, 10**30), 10**30)):
    message = f"axes must be from -4 to 3, as x has 4 dimensions, got {worst}"
    bad(calls("normalize"), ValueError, message, axes=axes)
for axes in ((1, 1), (0, -4)):
    bad(calls("normalize"), ValueError, f"axes must name each axis once, got {axes}", axes=axes)
for norm, kind, shape, statistics, way, changes in (
    ("batch_norm", "channel", (1, 6), (6,), "use more samples, or training=False", {}),
    ("batch_norm", "channel", (1, 6, 1, 1), (6,), "use more samples, or training=False", {}),
    ("instance_norm", "channel", (2, 6, 1), (2, 6), "use more space, or use_input_stats=False", {}),
    ("group_norm", "group", (2, 6), (2, 6), "use fewer groups", {"num_groups": 6}),
):
    message = f"expected more than 1 value per {kind}, got x of shape {shape}; {way}"
    changes |= {"x": floats(shape), "out": floats(shape)}
    bad(calls(norm, **FORWARD, flags=(True,)), ValueError, message, **changes)
    changes |= {"dy": floats(shape), "mean": floats(statistics, np.float64), "rstd": floats(statistics, np.float64)}
    bad(calls(norm, **BACKWARD, flags=(True,)), ValueError, message, **changes)

# --- numbers

for name, where in (("eps", calls(**FORWARD)), ("momentum", UPDATING), ("ddof", UPDATING)):
    for value in ("1e-5", b"1", 1j, True, [1.0], np.zeros(2)):
        bad(where, TypeError, f"{name} must be a float, got {type(value).__name__}", **{name: value})
    for value in (np.array(0.5), np.array([0.5], np.float32)):
        bad(where, TypeError, f"{name} must be a float, got ndarray; pass {name}.item()", **{name: value})
    expected = "finite" if name == "momentum" else "finite and at least 0"
    for value in (float("nan"), float("inf"), -float("inf"), 10**400):
        bad(where, ValueError, f"{name} must be {expected}, got {value}", **{name: value})
bad(BIASED, TypeError, "eps must be a float, got NoneType", eps=None)
bad(calls(**FORWARD), ValueError, "eps must be finite and at least 0, got -1e-05", eps=-1e-5)
bad(UPDATING, TypeError, "momentum must be a float, got NoneType", momentum=None)
bad(UPDATING, TypeError, "ddof must be a float, got NoneType", ddof=None)
bad(UPDATING, ValueError, "ddof must be finite and at least 0, got -1", ddof=-1)
for norm, values in (("batch_norm", 40), ("instance_norm", 20)):
    for ddof in (values, values + 0.5, 1e300):
        message = f"ddof must be less than the {values} values per channel of x, got {ddof}"
        bad(calls(norm, **FORWARD, flags=(True,)), ValueError, message, ddof=ddof)

# --- flags

for norm, flag in (("batch_norm", "training"), ("instance_norm", "use_input_stats"), ("normalize", "center")):
    for value in (None, 0, 1, 1.0, "no", np.array(True), np.int8(1)):
        bad(calls(norm), TypeError, f"{flag} must be a bool, got {type(value).__name__}", **{flag: value})

# --- statistics

for name in ("running_mean", "running_var"):
    way = "create it with np.zeros or np.ones"
    bad_kind(RUNNING, name, way)
    bad_dtypes(RUNNING, name, ("float32", "float64"), way)
    for shape in ((2, 6), (5,), (6, 1), ()):
        bad(RUNNING, ValueError, f"{name} must have shape (6,), got {shape}", **{name: floats(shape)})
    bad(RUNNING, ValueError, f"running_mean and running_var must be given together, got {name}=None", **{name: None})
    bad(UPDATING, ValueError, f"{name} must be writable, got a read-only array; {way}", **{name: read_only(floats(6))})
    one = as_strided(floats(1), (6,), (0,))
    message = f"{name} must not overlap itself, got strides (0,) for shape (6,); {way}"
    bad(UPDATING, ValueError, message, **{name: one})
for norm in ("batch_norm", "instance_norm"):
    flag = NORMS[norm].flag
    message = f"{flag}=False needs running_mean and running_var, got None; pass both, or {flag}=True"
    bad(calls(norm, **FORWARD, flags=(False,)), ValueError, message, running_mean=None, running_var=None)
for values, came, index in (
    (np.array([1, 1, 1, -0.5, 1, -2]), -0.5, 3),
    (np.array([-np.inf, 1, 1, 1, 1, 1]), -np.inf, 0),
    (np.array([1, np.nan, 1, 1, 1, -5e-324]), -5e-324, 5),
    (np.array([1, 1, -0.25, 1, 1, 1], dtype=np.float32)[::-1], -0.25, 3),
):
    message = f"running_var must not be negative, got {came} at index {index}; "
    message += "no average of variances is: restore it, or reset it with running_var.fill(1)"
    bad(GIVEN, ValueError, message, running_var=values)
    empty = {name: floats((0, 6, 5)) for name in ("x", "out")}
    bad(GIVEN, ValueError, message, running_var=values, **empty)
for name, where in (("mean", WITH_MEAN), ("rstd", calls(**BACKWARD))):
    way = "pass it as the forward function returned it"
    bad_kind(where, name, way)
    bad_dtypes(where, name, ("float64",), way)
    bad(where, TypeError, f"{name} must be a numpy.ndarray, got NoneType; {way}", **{name: None})
    for shape in ((7,), (), (2, 6, 1)):
        message = name + f" must have shape {{statistics}}, got {shape}"
        bad(where, ValueError, message, **{name: floats(shape, np.float64)})

# --- memory

way = "create it with np.empty_like(x)"
bad_kind(CALLS, "out", way)
for dtype in DTYPES:
    bad_dtypes(CALLS, "out", (dtype,), way, ", as x is", dtype)
for shape in ((6, 2, 4, 5), (240,), (2, 6, 4, 5, 1)):
    bad(CALLS, ValueError, f"out must have shape (2, 6, 4, 5), got {shape}", out=floats(shape))
bad(CALLS, ValueError, f"out must be writable, got a read-only array; {way}", out=read_only(floats(SHAPE)))
for strides in ((0, 80, 20, 4), (480, 80, 20, 0), (480, 80, 16, 4), (96, 16, 4, 3)):
    bad(
        CALLS,
        ValueError,
        f"out must not overlap itself, got strides {strides} for shape (2, 6, 4, 5); create it with np.empty_like(x)",
        out=lambda a, strides=strides: as_strided(floats(SHAPE), SHAPE, strides),
    )


def overlap(calls, name, other, unless="", **changes):
    message = f"{name} must not overlap {other}{unless}, got arrays that share memory; give {name} memory of its own"
    bad(calls, ValueError, message, **changes)


def inside(array, shape, dtype=np.float32, offset=0):
    """A view of `shape` on the memory of `array`, from element `offset`."""
    return array.reshape(-1).view(dtype)[offset : offset + int(np.prod(shape))].reshape(shape)


# One element apart.
memory = floats(241)
first, second = inside(memory, SHAPE), inside(memory, SHAPE, offset=1)
overlap(CALLS, "out", "x", ", unless it is x itself", x=first, out=second)
overlap(calls(**BACKWARD), "out", "dy", ", unless it is dy itself", dy=first, out=second)
# Exactly x, but x overlaps dy.
overlap(calls(**BACKWARD), "out", "dy", ", unless it is dy itself", dy=second, x=first, out=first)
# The memory of x, walked in another order.
square = {"x": floats((6, 6, 5)), "out": lambda a: a["x"].transpose(1, 0, 2)}
overlap(calls(*CHANNELS, **FORWARD), "out", "x", ", unless it is x itself", **square)
for name, where in (
    ("weight", [call for call in CALLS if call.norm != "normalize"]),
    ("bias", BIASED),
    ("mean", WITH_MEAN),
    ("rstd", calls(**BACKWARD)),
    ("running_mean", RUNNING),
    ("running_var", RUNNING),
):
    within = {name: lambda a, name=name: inside(a["out"], a[name].shape, a[name].dtype)}
    overlap(where, "out", name, **within)
for name in ("running_mean", "running_var"):
    for other in ("x", "weight", "bias"):
        overlap(UPDATING, name, other, **{name: lambda a, other=other: inside(a[other], (6,))})
overlap(UPDATING, "running_var", "running_mean", running_var=lambda a: a["running_mean"])
overlap(UPDATING, "running_var", "running_mean", running_var=lambda a: a["running_mean"][::-1])

# --- gradients asked for

for where, names in (
    (calls(but=("rms_norm",), **BACKWARD), '"x", "weight", "bias"'),
    (calls("rms_norm", **BACKWARD), '"x", "weight"'),
):
    for needs, came in (("x", '"x"'), (None, "NoneType"), (1, "int")):
        bad(where, TypeError, f"needs must be a tuple of names out of {names}, got {came}", needs=needs)
    for needs in (("x", "gamma"), (1,)):
        bad(where, ValueError, f"needs must name gradients out of {names}, got {needs}", needs=needs)
for value in (np.float16, ml_dtypes.bfloat16, int, "float31", ">f4", "i4, (2", {"f4": 1}, 32, np.zeros(1, np.float16)):
    message = f"grad_dtype must be None, numpy.float32 or numpy.float64, got {value!r}"
    bad(calls(**BACKWARD), TypeError, message, grad_dtype=value)
message = 'out must be None when needs does not name "x", got an array; it takes dx'
bad(calls(**BACKWARD), ValueError, message, needs=("weight",))
message = """needs must name gradients out of "x", "weight", got ['bias']"""
bad(calls("rms_norm", **BACKWARD), ValueError, message, needs=["bias"])


def error_of(call, arguments):
    """The type and text of the error of a call, which must have changed nothing, or None."""
    before = {name: bits(value) for name, value in arguments.items()}
    try:
        call.function(**arguments)
    except Exception as error:
        assert {name: bits(value) for name, value in arguments.items()} == before, call
        return type(error), str(error)
    return None


@pytest.mark.any_device
@pytest.mark.parametrize(("calls", "error", "message", "dtype", "changes"), BAD)
def test_bad_call(calls, error, message, dtype, changes, library):
    if library is not None and message.startswith("running_var must not be negative"):
        pytest.skip("to look into the memory of a GPU is to wait for it")
    expected = {}
    for call in calls:
        norm = NORMS[call.norm]
        text = message.replace("{parameter}", str(norm.parameter)).replace("{statistics}", str(norm.statistics))
        expected[str(call)] = error, text if library is None else gpu.in_words_of(library, text)
    assert {str(call): error_of(call, changed(call, dtype, changes)) for call in calls} == expected


ARRAYS = {"x", "dy", "weight", "bias", "out", "mean", "rstd", "running_mean", "running_var"}
NUMBERS = [
    *(-(2**63), -1, 0, 1, 2, 3, 6, 20, 40, 2**63 - 1, 2**63, 10**400, np.int8(3), np.array(1), True, np.True_),
    *(0.0, 0.5, -1e-5, np.float32(2), np.longdouble(1), 1e300, float("inf"), float("nan"), 1j, "1", b"1", None),
    *((), (0,), (1, 3), [3, 1], (1, 1), (4, 5), (2**63,), (1, None), (True,), (0,) * 17, range(2), {1: 2}),
    *(np.array([1]), np.array([4, 5]), np.array([[1]]), np.array([]), typed_array("d", [1]), bytearray(2)),
]
SHAPES = [SHAPE, (6,), (4, 5), (2, 6), (1, 6, 1, 5), (2, 6, 1, 1), (1, 6), (2, 0, 4, 5), (0,), (1,), (), (1,) * 17]


def another_array(draw, arguments):
    """An array of some kind, dtype, shape and memory, often that of another argument."""
    arrays = [value for value in arguments.values() if isinstance(value, np.ndarray)]
    base = draw(st.sampled_from([floats(shape, dtype) for shape in SHAPES for dtype in DTYPES.values()]))
    base = draw(st.sampled_from([base, *arrays]))
    changes = [
        read_only,
        constant,
        np.transpose,
        np.ravel,
        np.flip,
        lambda a: a.reshape(-1)[1:7],
        lambda a: a[..., None],
    ]
    changes += [lambda a, other=other: np.zeros(a.shape, other) for other in (*DTYPES.values(), ">f8", "i4", "c8", "O")]
    changes += [lambda a: as_strided(np.zeros(8, a.dtype), a.shape, [0] * a.ndim)]
    return draw(st.sampled_from([lambda a: a, *changes]))(base)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_every_refusal_has_its_sentence(data):
    call = data.draw(st.sampled_from(CALLS))
    arguments = valid(call, data.draw(st.sampled_from(list(DTYPES))))
    if data.draw(st.booleans()):
        shape = data.draw(st.sampled_from(SHAPES))
        arguments |= {name: floats(shape, arguments["x"].dtype) for name in ("x", "dy", "out") if name in arguments}
    for name in data.draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=3, unique=True)):
        if name in ARRAYS and data.draw(st.integers(0, 4)):
            arguments[name] = another_array(data.draw, arguments)
        elif name != NORMS[call.norm].flag:
            arguments[name] = data.draw(st.sampled_from(NUMBERS))
    said = error_of(call, arguments)
    assert said is None or said[0] in (TypeError, ValueError), said  # no RuntimeError: "no rule says why"


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_core_and_python_agree(call, monkeypatch):
    """Python finds nothing wrong with a valid call. When the core does all the same, the user is asked to report it."""
    for operation in ("forward", "evaluate", "backward"):
        monkeypatch.setattr(functional, operation, lambda *arguments: None)
    with pytest.raises(RuntimeError, match="please report it"):
        call.function(**valid(call))


# --- what is accepted ------------------------------------------------------------------------------------------------

GOOD = []


def good(calls, what, dtype="float32", **changes):
    GOOD.append(pytest.param(calls, dtype, changes, id=f"{calls[0].norm}-{what}"))


class Subclass(np.ndarray):
    pass


for name, where in (
    ("x", CALLS),
    ("dy", calls(**BACKWARD)),
    ("weight", CALLS),
    ("bias", BIASED),
    ("mean", WITH_MEAN),
    ("rstd", calls(**BACKWARD)),
    ("running_mean", RUNNING),
    ("running_var", RUNNING),
    ("out", CALLS),
):
    for memory in ("F", "negative", "strided", "misaligned"):
        change = {name: lambda a, name=name, memory=memory: MEMORY[memory](a[name])}
        for dtype in ("float32", "bfloat16", "float64"):
            good(where, f"{memory} {name} ({dtype})", dtype, **change)
for name, where in (
    ("x", CALLS),
    ("dy", calls(**BACKWARD)),
    ("weight", CALLS),
    ("bias", BIASED),
    ("mean", WITH_MEAN),
    ("rstd", calls(**BACKWARD)),
    ("running_mean", GIVEN),
    ("running_var", GIVEN),
):
    for change in (read_only, constant):
        good(where, f"{change.__name__} {name}", **{name: lambda a, name=name, change=change: change(a[name])})
good(CALLS, "subclass", x=lambda a: a["x"].view(Subclass))
good(CALLS, "no weight", weight=None)
good(BIASED, "no bias", bias=None)
good(CALLS, "no out", out=None)
good(CALLS, "out is x", out=lambda a: a["x"])
good(CALLS, "out is another view like x", out=lambda a: a["x"][...])
good(calls(**BACKWARD), "out is dy", out=lambda a: a["dy"])
good(calls(**BACKWARD), "dy is x, and out", dy=lambda a: a["x"], out=lambda a: a["x"])
good(calls("normalize", **BACKWARD, flags=(False,)), "no mean", mean=None)
good(UPDATING, "no running statistics", running_mean=None, running_var=None)
for dtype in DTYPES:
    good(CALLS, f"{dtype} data", dtype)
    for other in ("float32", "float64"):
        good(CALLS, f"{dtype} data, {other} weight", dtype, **in_dtype("weight", DTYPES[other]))
        good(BIASED, f"{dtype} data, {other} bias", dtype, **in_dtype("bias", DTYPES[other]))
    good(calls(**BACKWARD), f"{dtype} out is dy", dtype, out=lambda a: a["dy"])
for flag in (np.True_, np.False_):
    good(calls("batch_norm"), f"training={flag!r}", training=flag)
    good(calls("instance_norm"), f"use_input_stats={flag!r}", use_input_stats=flag)
    good(calls("normalize", **FORWARD), f"center={flag!r}", center=flag)
for ddof in (0, 0.5, 19.5, np.int8(2)):
    good(UPDATING, f"ddof={ddof!r}", ddof=ddof)
good(UPDATING, "ddof without running statistics", ddof=1000, running_mean=None, running_var=None)
good(GIVEN, "ddof=None", ddof=None)
good(GIVEN, "variance of -0.0", running_var=np.full(6, -0.0))
good(UPDATING, "negative variance", running_var=np.full(6, -1.0))
good(RUNNING, "float32 running mean", running_mean=floats(6))
good(RUNNING, "float32 running variance", running_var=floats(6))
for axis in (-3, np.int64(1), np.array(1)):
    good(calls(*CHANNELS), f"channel_axis={axis!r}", channel_axis=axis)
# For batch norm alone no axis is special.
first = {"x": floats((6, 2, 5)), "channel_axis": 0, "out": None}
good(calls("batch_norm", **FORWARD), "channel_axis=0", **first)
good(calls("batch_norm", **BACKWARD), "channel_axis=0", **first, dy=floats((6, 2, 5)))
good(calls("group_norm"), "num_groups=int32", num_groups=np.int32(3))
for shape in ([4, 5], (np.int64(4), np.int8(5)), range(4, 6), np.array([4, 5])):
    good(calls("layer_norm", "rms_norm"), f"normalized_shape={shape!r}", normalized_shape=shape)
for axes in ([1, 3], (3, 1), (-3, -1), (np.int64(1), np.int8(3)), typed_array("q", [1, 3])):
    good(calls("normalize"), f"axes={axes!r}", axes=axes)
for eps in (0, 0.0, 1, np.float32(1e-5), np.float64(1e-5)):
    good(calls(**FORWARD), f"eps={eps!r}", eps=eps)
good(calls("rms_norm", **FORWARD), "eps=None", eps=None)
for momentum in (0, 1, -0.5, 2.5, np.float32(0.1)):
    good(UPDATING, f"momentum={momentum!r}", momentum=momentum)
good(GIVEN, "momentum=None", momentum=None)
for shape in ((5,), (1, 5), (4, 1), (), (1, 1, 1, 1), (2, 6, 4, 5)):
    good(calls("normalize"), f"weight of shape {shape}", weight=floats(shape))
    good(calls("normalize", **FORWARD), f"bias of shape {shape}", bias=floats(shape))


@pytest.mark.any_device
@pytest.mark.parametrize(("calls", "dtype", "changes"), GOOD)
def test_good_call(calls, dtype, changes, library):
    if library is not None and changes.keys() & {"mean", "rstd"}:
        pytest.skip("on a GPU statistics must be as forward gave them")
    for call in calls:
        arguments = changed(call, dtype, changes)
        result = call.function(**arguments)
        if not isinstance(result, tuple):
            result = (result,)
        if arguments["out"] is not None:
            assert result[0] is arguments["out"], call
        assert type(result[0]) is np.ndarray, call
        assert result[0].dtype == DTYPES[dtype] and result[0].shape == arguments["x"].shape, call
        for array in result[1:]:
            assert array is None or np.isfinite(array.astype(np.float64)).all(), call


@pytest.mark.parametrize("weight", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_results(dtype, weight):
    """y and dx: that of x. Statistics: float64. Gradients of parameters: that of the weight, or what is asked for."""
    if weight not in (None, dtype, "float32", "float64"):
        return
    for call in calls(steps=("_forward", "_backward")):
        arguments = valid(call, dtype)
        arguments["out"] = None
        arguments["weight"] = None if weight is None else floats(NORMS[call.norm].parameter, DTYPES[weight])
        result, *others = call.function(**arguments)
        assert result.dtype == DTYPES[dtype], call
        if call.step == "_forward":
            assert {other.dtype for other in others} == {np.dtype(np.float64)}, call
            continue
        for grad_dtype in (None, np.float32, np.float64, float, "f4", np.dtype(np.float64)):
            _, *gradients = call.function(**arguments, grad_dtype=grad_dtype)
            expected = DTYPES[weight or dtype] if grad_dtype is None else grad_dtype
            assert {gradient.dtype for gradient in gradients if gradient is not None} <= {np.dtype(expected)}, call
            if call.norm != "normalize" or weight is not None:
                assert gradients[0] is not None, call


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_memory_map(call, tmp_path):
    arguments = valid(call)
    arguments["x"].tofile(tmp_path / "x")
    arguments["x"] = np.memmap(tmp_path / "x", np.float32, "r", shape=SHAPE)
    call.function(**arguments)


@pytest.mark.parametrize("call", calls(**BACKWARD), ids=str)
def test_needs(call):
    names = ("x", "weight") if call.norm == "rms_norm" else ("x", "weight", "bias")
    arguments = valid(call) | {"out": None}
    every = call.function(**arguments)
    assert len(every) == len(names)
    for needs in ((), ["x"], {"weight"}, iter(names), names[::-1], (*names, "x"), *((name,) for name in names)):
        needs = list(needs)
        some = call.function(**arguments, needs=iter(needs))
        assert [gradient is not None for gradient in some] == [name in needs for name in names]
        for gradient, same in zip(some, every):
            assert gradient is None or np.array_equal(gradient, same)


def test_gradients_of_absent_parameters():
    """Where the norm tells their shape they are given, otherwise not."""
    for call in calls(**BACKWARD):
        _, *gradients = call.function(**valid(call) | {"weight": None})
        shapes = {None if gradient is None else gradient.shape for gradient in gradients}
        assert shapes == {None if call.norm == "normalize" else NORMS[call.norm].parameter}


# A set of one value: its mean is the value and its variance 0. Nothing is wrong with that where nothing else is stored.
@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 1, 1, 1)])
def test_one_value(shape):
    x, weight, bias = floats(shape), floats(1), np.float32([0.25])
    assert (nk.layer_norm(x, 1, weight, bias) == bias).all()
    assert (nk.normalize(x, -1, weight, bias) == bias).all()
    _, mean, rstd = nk.normalize_forward(x, tuple(range(x.ndim)))
    assert mean.shape == rstd.shape == ()
    _, mean, rstd = nk.layer_norm_forward(x, 1)
    dx, dweight, dbias = nk.layer_norm_backward(x, x, mean, rstd, 1)
    assert dx.shape == shape and dweight.shape == dbias.shape == (1,)
    assert np.isfinite(nk.rms_norm(x, 1)).all()


@pytest.mark.parametrize("call", GIVEN, ids=str)
def test_one_value_with_given_statistics(call):
    call.function(**valid(call) | {"x": floats((1, 6, 1)), "out": None})


@pytest.mark.parametrize("shape", [(0, 6, 4, 5), (2, 6, 0, 5), (2, 0, 4, 5), (0, 6, 1)])
@pytest.mark.parametrize("norm", NORMS)
def test_empty(norm, shape):
    """Nothing to normalize: an empty y, running statistics as they were, NaN for the statistics of empty sets."""
    options = dict(NORMS[norm].options)
    if "normalized_shape" in options:
        options["normalized_shape"] = shape[2:]
    if "axes" in options:
        options["axes"] = (1, -1)
    running = {}
    if norm in ("batch_norm", "instance_norm"):
        running = {"running_mean": floats(shape[1]), "running_var": floats(shape[1])}
        options[NORMS[norm].flag] = True
    x, out = floats(shape), floats(shape)
    y, *statistics = getattr(nk, norm + "_forward")(x, **options, **running, out=out)
    assert y is out
    assert all(np.isnan(statistic).all() for statistic in statistics)
    assert all((statistic == floats(shape[1])).all() for statistic in running.values())
    dx, *gradients = getattr(nk, norm + "_backward")(x, x, *statistics, **options)
    assert dx.shape == shape
    assert all(gradient is None or not gradient.any() for gradient in gradients)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_num_threads():
    default = nk.get_num_threads()
    nk.set_num_threads(np.int64(3))
    assert nk.get_num_threads() == 3
    nk.set_num_threads(None)
    assert nk.get_num_threads() == default


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (True, TypeError, "n must be an int, got bool"),
        (2.0, TypeError, "n must be an int, got float"),
        ("2", TypeError, "n must be an int, got str"),
        (0, ValueError, "n must be from 1 to 2147483647, or None for the default, got 0"),
        (-1, ValueError, "n must be from 1 to 2147483647, or None for the default, got -1"),
        (2**31, ValueError, f"n must be from 1 to 2147483647, or None for the default, got {2**31}"),
    ],
)
def test_bad_num_threads(n, error, message):
    nk.set_num_threads(2)
    with pytest.raises(error) as caught:
        nk.set_num_threads(n)
    assert str(caught.value) == message
    assert nk.get_num_threads() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "takes 3 arguments, got 0"),
        ((_core.AXES, None, 0, 0), "takes 3 arguments, got 4"),
        (("axes", None, 0), "integer"),
        ((2**31, None, 0), "expects a C int"),
        ((-(2**70), None, 0), "expects a C int"),
    ],
)
def test_the_core_alone(arguments, message):
    """What only its own functions can get wrong."""
    with pytest.raises(TypeError, match=message):
        _core.moments(*arguments)
    x = np.ones((2, 3), np.float32)
    assert _core.moments(2**31 - 1, x, 0) is None
    with pytest.raises(TypeError, match="expects a bool, got int"):
        _core.evaluate(_core.BATCH, x, 1, None, None, 1e-5, None, 1, x[0], x[0], None)
