"""The compiled core takes any Python objects whatever: it answers, answers None, or raises, and never crashes.

    python tests/fuzz_core.py --examples 20000

Valid calls, most of them with one or two arguments replaced: by arrays of another type, dtype, shape, memory or owner,
by numbers at their limits, by objects whose methods raise, lie, or change the arrays of the call in the middle of it.
The examples are the same in every run. They run in a child process, which notes each before it calls: a segmentation
fault, an abort or a hang is reported with its example. There every allocation of a kilobyte or more gets pages of its
own, so that memory touched after it was given back is a segmentation fault, too.

A call that does not answer must have changed nothing. One that does must have changed only what it writes to, and
have computed finite values from finite ones, and, forward in a valid call, those of the formula.
"""

import argparse
import contextlib
import faulthandler
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from cases import DTYPES as DATA_DTYPES
from cases import NORMS, Case
from normkit import _core

# The positional arguments of the core's functions: the only place that knows them.
ARGUMENTS = {
    "forward": "norm x spec weight bias eps out statistics running_mean running_var momentum ddof stream",
    "evaluate": "norm x spec weight bias eps out statistics running_mean running_var stream",
    "backward": "norm dy x mean rstd spec weight training needs out grad_dtype stream",
    "moments": "norm x spec",
    "copy": "source target stream",
    "set_num_threads": "n",
    "get_num_threads": "",
    "dtypes": "",
    "isas": "",
    "isa": "",
    "force": "isa split resident stream by_row by_sample",
    "last_path": "",
}
WRITTEN = {"out", "target", "running_mean", "running_var"}  # but for evaluate, which only reads running statistics

CODES = {"axes without center": "AXES_RMS"}  # of the norms whose name in the core is not that in cases.py
SECONDS_PER_EXAMPLE = 60  # more is a hang
MOST_MEMORY = 8 << 30  # bytes, of addresses; results for more must end in MemoryError

SHAPES = [
    (2, 6, 19, 23), (2, 6, 19, 23), (3, 8, 140), (64, 6), (5, 7), (1200,), (2, 3, 2, 4, 5), (1, 2, 300), (64, 64, 4, 5),
    (0, 4, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1), (1,), (3, *(1,) * 14, 2),
]  # fmt: skip


# --- what an argument is made of: drawn instead of the objects, so that a failing example can be read -----------------


class Owned(np.ndarray):
    """A subclass that says nothing new."""


class Pretender(np.ndarray):
    """An array that denies being one when its class is asked for, and raises when anything else is."""

    @property
    def __class__(self):
        return int

    def __getattribute__(self, name):
        if name == "__class__":
            return int
        raise RuntimeError(name)


@dataclass(frozen=True)
class Array:
    shape: tuple[int, ...]
    dtype: str = "float32"
    memory: str = "C"
    kind: str = "ndarray"
    values: str = "normal"
    seed: int = 0

    def make(self, arguments):
        rng = np.random.default_rng(self.seed)
        values = {
            "normal": rng.standard_normal,
            "positive": partial(rng.uniform, 0.5, 2.0),
            "special": partial(rng.choice, [0.0, 1.0, np.nan, np.inf, -np.inf, 3e38, 1e-45, -2.0]),
        }[self.values](self.shape)
        dtype = np.dtype(DTYPES.get(self.dtype, self.dtype))
        try:
            a = np.asarray(values).astype(dtype)
        except (TypeError, ValueError):
            a = np.zeros(self.shape, dtype)
        try:
            return KINDS[self.kind](MEMORIES[self.memory](a))
        except (TypeError, ValueError):
            return a  # NumPy has no such array


def spaced(a):
    base = np.zeros([n if n == 1 else 2 * n for n in a.shape], a.dtype)
    view = base[(..., *(slice(None) if n == 1 else slice(None, None, 2) for n in a.shape))]
    view[...] = a
    return view


def one_byte_off(a):
    if a.dtype.hasobject:
        return a
    view = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape) if a.size else a
    view[...] = a
    return view


def overlapping(a):
    """Each axis steps by one element, over memory that holds them all."""
    base = np.zeros(sum(a.shape) + 1, a.dtype)
    base[: min(a.size, base.size)] = a.ravel()[: base.size]
    return as_strided(base, a.shape, (a.itemsize,) * a.ndim)


def backwards(a):
    return a[(..., *(slice(None, None, -1),) * a.ndim)]


def read_only(a):
    a.flags.writeable = False
    return a


def huge(a):
    """More elements than there is memory for, all the same one."""
    return np.broadcast_to(a.ravel()[:1] if a.size else np.zeros(1, a.dtype), (2**20, 2**10, 2**10))


def memory_mapped(a):
    if a.dtype.hasobject or not a.nbytes:
        return a
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, a.dtype, "w+", shape=a.shape)
    mapped[...] = a
    return mapped


DTYPES = {"swapped float32": ">f4" if sys.byteorder == "little" else "<f4", "structured": [("a", "f4"), ("b", "i2")]}
DTYPES["swapped float64"] = DTYPES["swapped float32"].replace("4", "8")
DTYPE_NAMES = [
    "float32", "float64", "float16", "bfloat16", "swapped float32", "swapped float64",
    "structured", "object", "int32", "uint8", "bool", "complex64", "longdouble", "U3", "V4", "V2", "M8[s]",
]  # fmt: skip
MEMORIES = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "backwards": backwards,
    "spaced": spaced,
    "one byte off": one_byte_off,
    "stride 0": lambda a: np.broadcast_to(a.ravel()[:1], a.shape) if a.size else a,
    "overlapping": overlapping,
    "read-only": read_only,
    "transposed": lambda a: a.T,
}
KINDS = {
    "ndarray": lambda a: a,
    "subclass": lambda a: a.view(Owned),
    "pretender": lambda a: a.view(Pretender),
    "masked": lambda a: np.ma.masked_array(a, np.zeros(a.shape, bool)),
    "matrix": np.asmatrix,
    "memmap": memory_mapped,
    "scalar": lambda a: a.ravel()[0] if a.size else a,
    "list": lambda a: a.tolist(),
    "buffer": memoryview,
    "chain of views": lambda a: a[None][0][...].view(),
    "huge": huge,
}


ALIASES = {
    "itself": lambda a: a,
    "view": lambda a: a.view(),
    "backwards": backwards,
    "transposed": lambda a: a.T,
    "a part": lambda a: a[..., 1:] if a.ndim else a,
    "one row for all": lambda a: np.broadcast_to(a[:1], a.shape) if a.ndim else a,
}


@dataclass(frozen=True)
class Alias:
    """Another argument of the call, or memory of it."""

    of: str
    how: str = "itself"

    def make(self, arguments):
        a = arguments.get(self.of)
        if type(a) is not np.ndarray:
            return a
        return ALIASES[self.how](a)


class Hooked:
    """Whatever the core asks of this object, it does `deed` first, and then answers."""

    def __init__(self, recipe, arguments):
        self._recipe, self._arguments = recipe, arguments

    def _answer(self):
        self._recipe.do(self._arguments)
        return self._recipe.answer

    __index__ = __int__ = __float__ = __len__ = __bool__ = __hash__ = _answer

    def __getitem__(self, i):
        return self._answer()

    def __iter__(self):
        return iter([self._answer()])

    def __eq__(self, other):
        return self._answer()

    def __str__(self):
        return self._answer()

    __repr__ = __str__

    def __array__(self, *arguments, **options):
        return self._answer()

    @property
    def __array_interface__(self):
        return self._answer()

    @property
    def __class__(self):
        return self._answer()


class HookedSequence(Hooked):
    """The same without being a number: a sequence, whose items are the answer."""

    __index__ = __int__ = __float__ = None

    def __len__(self):
        self._recipe.do(self._arguments)
        return self._recipe.length


@dataclass(frozen=True)
class Hook:
    deed: str
    on: str = "x"
    answer: Any = 1
    before: tuple | None = None  # the honest items before it, where it is the last of a tuple
    length: int | None = None  # None: no sequence

    def do(self, arguments):
        if self.deed in RAISED:
            raise RAISED[self.deed]()
        a = arguments.get(self.on)
        if is_array(a) and self.deed in DEEDS:
            with contextlib.suppress(TypeError, ValueError, AttributeError, RuntimeError):  # as not every array can
                DEEDS[self.deed](a)

    def make(self, arguments):
        made = Hooked(self, arguments) if self.length is None else HookedSequence(self, arguments)
        return made if self.before is None else (*self.before, made)


def reshape(a):
    a.shape = (a.size,)


def redtype(a):
    a.dtype = np.uint8


def restride(a):
    a.strides = (0,) * a.ndim


RAISED = {
    "value": ValueError,
    "type": TypeError,
    "memory": MemoryError,
    "recursion": RecursionError,
    "stop": StopIteration,
    "base": BaseException,
    "unicode": lambda: UnicodeDecodeError("utf-8", b"", 0, 1, "hook"),
}
DEEDS = {
    "nothing": lambda a: None,
    "shrink": lambda a: a.resize((0,), refcheck=False),
    "grow": lambda a: a.resize((a.size + 100_000,), refcheck=False),
    "reshape": reshape,
    "other dtype": redtype,
    "other strides": restride,
    "lock": lambda a: a.setflags(write=False),
    "fill": lambda a: a.fill(np.nan),
}


@dataclass(frozen=True)
class Value:
    value: Any

    def make(self, arguments):
        return self.value


@dataclass
class Example:
    function: str
    recipes: dict[str, Any]
    case: Case | None = None  # what the arguments were before some were replaced
    replaced: list[str] = field(default_factory=list)
    more: list[Any] = field(default_factory=list)  # further positional arguments
    fewer: int = 0
    forced: tuple = (None, -1, -1, -1, -1, -1)
    threads: int = 0


# --- drawing ----------------------------------------------------------------------------------------------------------

LIMITS = [0, 1, -1, 2, 3, 7, 15, 16, 17, 31, 32, 63, 64]
LIMITS += [2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 1, -(2**63), 2**63, 2**64, 10**400]
FLOATS = [0.0, -0.0, 1e-5, 0.5, 1.0, -1.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]
ODD = [None, True, False, np.float32(1), np.int64(1), np.bool_(True), 1j, ..., np.datetime64("nat"), np.dtype("f4")]
ODD += ["", "batch", "\ud800", "x" * 100, b"", b"ab", (), [], {}, (1, (2,)), [None], (-1, -1), {1: 2}, [0] * 100]
ODD += [range(3), range(100), tuple(range(17)), slice(3), iter(()), object, type, len, np.ones]
values = st.one_of(
    st.sampled_from(LIMITS), st.sampled_from(FLOATS), st.sampled_from(ODD), st.lists(st.integers(-5, 17), max_size=5)
).map(Value)

ARRAYS = ("x", "dy", "out", "weight", "bias", "mean", "rstd", "running_mean", "running_var", "source", "target")
ANSWERS = (1, 0, 2, 3, 1.0, -1, 10**30, None, "a", int, (1,), True, float("nan"))


@st.composite
def hooks(draw, recipe, names):
    """In place of `recipe`; half of them answer as it would."""
    valid = isinstance(recipe, Value) and draw(st.booleans())
    answer = recipe.value if valid else draw(st.sampled_from(ANSWERS))
    inside = isinstance(answer, tuple) and len(answer) > 0
    return Hook(
        draw(st.sampled_from(("shrink",) * 6 + (*DEEDS, *RAISED))),
        draw(st.sampled_from(["x"] * 4 + [name for name in names if name in ARRAYS])),
        answer[-1] if inside else answer,
        answer[:-1] if inside else None,
        None if valid else draw(st.sampled_from((None, None, 0, 1, 2, 16, 17, -1, 2**62, 10**30))),
    )


shapes = st.one_of(
    st.sampled_from(SHAPES),
    st.lists(st.integers(0, 4), max_size=5).map(tuple),
    st.integers(0, 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32).map(lambda n: (1,) * n),
)


@st.composite
def arrays(draw, shape=None):
    """Of the given shape more often than not."""
    other = shape is None or draw(st.integers(0, 3)) == 0
    return Array(
        draw(shapes) if other else shape,
        draw(st.sampled_from(("float32",) * 3 + ("float64",) * 2 + tuple(DTYPE_NAMES))),
        draw(st.sampled_from(("C", *MEMORIES))),
        draw(st.sampled_from(("ndarray",) * 8 + tuple(KINDS))),
        draw(st.sampled_from(("normal", "positive", "special"))),
    )


@st.composite
def cases(draw):
    """Arguments of a valid call, before anything is replaced."""
    norm = draw(st.sampled_from(tuple(NORMS)))
    row = NORMS[norm]
    shape = draw(st.sampled_from([s for s in SHAPES if len(s) >= row.least_ndim]))
    options = [{"num_groups": 1, "channel_axis": 1}] if norm == "group" and 0 in shape else row.options(shape)
    if not options:
        shape = (2, 6, 19, 23)
        options = row.options(shape)
    return Case(norm, shape, draw(st.sampled_from(options)), dtype=draw(st.sampled_from(DATA_DTYPES)))


def spec_of(case):
    options = case.options
    if "num_groups" in options:
        return options["num_groups"], options["channel_axis"]
    (value,) = options.values()
    return value


@st.composite
def examples(draw):
    function = draw(
        st.sampled_from(("forward",) * 8 + ("backward",) * 8 + ("evaluate",) * 4 + ("moments",) * 3 + tuple(ARGUMENTS))
    )
    names = ARGUMENTS[function].split()
    case = draw(cases())
    x = partial(Array, case.shape, memory=draw(st.sampled_from(("C", "C", "C", "F", "spaced", "backwards"))))
    dtype = case.dtype
    parameter = Array(case.weight_shape, dtype, seed=1)
    channels = case.weight_shape if case.row.evaluation else (1,)
    running = function == "evaluate" or (case.row.evaluation is not None and draw(st.booleans()))
    statistics = partial(Array, case.statistics_shape, "float64")
    given_out = draw(st.booleans())
    valid = {
        "norm": Value(getattr(_core, CODES.get(case.norm, case.norm.upper()))),
        "x": x(dtype=dtype),
        "dy": x(dtype=dtype, seed=2),
        "spec": Value(spec_of(case)),
        "weight": parameter if draw(st.booleans()) else Value(None),
        "bias": parameter if case.row.has_bias and draw(st.booleans()) else Value(None),
        "eps": Value(1e-5),
        "out": x(dtype=dtype) if given_out else Value(None),
        "statistics": Value(draw(st.booleans())),
        "running_mean": Array(channels, "float64", seed=3) if running else Value(None),
        "running_var": Array(channels, "float64", values="positive") if running else Value(None),
        "momentum": Value(0.1),
        "ddof": Value(1),
        "mean": statistics(seed=4) if case.row.center else Value(None),
        "rstd": statistics(values="positive"),
        "training": Value(True),
        "needs": Value(7 if given_out else draw(st.integers(0, 7))),
        "grad_dtype": Value(draw(st.integers(0, 2))),
        "source": Array(case.shape),
        "target": Array(case.shape, seed=1),
        "stream": Value(
            draw(st.booleans()) if function == "copy" else draw(st.integers(-1, 1)) if function == "force" else None
        ),
        "n": Value(draw(st.integers(0, 4))),
        "isa": Value(draw(st.sampled_from((None, *_core.isas())))),
        "split": Value(draw(st.integers(-1, 1))),
        "resident": Value(draw(st.integers(-1, 1))),
        "by_row": Value(draw(st.integers(-1, 1))),
        "by_sample": Value(draw(st.integers(-1, 1))),
    }
    example = Example(function, {name: valid[name] for name in names}, case)
    replaced = draw(st.sampled_from((0, 1, 1, 2))) if names else 0
    for name in dict.fromkeys(draw(st.sampled_from(names)) for _ in range(replaced)):
        recipe = valid[name]
        others = [st.builds(Alias, st.sampled_from(names), st.sampled_from(tuple(ALIASES)))]
        others += [arrays(recipe.shape)] * 4 if isinstance(recipe, Array) else [arrays()]
        example.recipes[name] = draw(st.one_of(values, hooks(recipe, names), hooks(recipe, names), *others))
        example.replaced.append(name)
    if draw(st.integers(0, 30)) == 0:
        example.fewer = draw(st.integers(0, len(names)))
        example.more = draw(st.lists(values, max_size=2))
    if draw(st.booleans()):
        isa = st.sampled_from((None, *_core.isas()))
        example.forced = (draw(isa), *(draw(st.integers(-1, 2)) for _ in range(5)))
        example.threads = draw(st.sampled_from((0, 1, 2, 3, 8)))
    return example


# --- one example ------------------------------------------------------------------------------------------------------


def is_array(a):
    """Of its true type: isinstance asks the object, too."""
    return issubclass(type(a), np.ndarray) and type(a) is not Pretender


def base_of(a):
    while is_array(a.base):
        a = a.base
    return a


def memory(arguments):
    """The bytes of all that the call could reach, by argument."""
    found = {}
    for name, a in arguments.items():
        if is_array(a) and not a.dtype.hasobject:
            base = base_of(a)
            found[name] = base.tobytes() if base.size < 1 << 20 else None
    return found


def changed(before, arguments):
    after = memory(arguments)
    return {name for name in before if before[name] != after.get(name)}


def too_long(example, arguments):
    """Whether the call could be a good one, and take years: moments of more elements than any memory holds."""
    data = [arguments.get(name) for name in ("x", "dy", "out", "source")]
    return any(type(a) is np.ndarray and a.size > 1 << 24 for a in data) and not (
        example.function in ("forward", "evaluate") and arguments.get("out") is None
    )


def check_answer(example, arguments, result):
    """Types and shapes, finite values, and the values of the formula."""
    x = arguments["x"]
    if example.function == "moments":
        count, mean, M2 = result
        parts = [mean, M2]
        assert count >= 0 and mean.shape == M2.shape and mean.dtype == M2.dtype == np.float64
        assert not np.any(M2 < 0)
    elif example.function == "backward":
        parts = [part for part in result if part is not None]
        needs = int(arguments["needs"])
        assert (result[0] is not None) == bool(needs & 1)
        assert result[0] is None or (result[0].shape == x.shape and result[0].dtype == x.dtype)
        assert result[1] is None or needs & 2
        assert result[2] is None or needs & 4
    else:
        assert isinstance(result, tuple) == bool(arguments["statistics"])
        parts = list(result) if isinstance(result, tuple) else [result]
        assert parts[0].shape == x.shape and parts[0].dtype == x.dtype
    out = arguments.get("out")
    assert out is None or any(part is out for part in parts)
    if example.replaced or not x.size:
        return
    for part in parts:
        assert np.isfinite(part.astype(np.float64)).all()
    if example.function == "forward" and out is None:
        example.case.check_forward(parts[0], x, arguments["weight"], arguments["bias"])


def run(example, log=None):
    arguments = {}
    # The arrays first: the others may refer to them.
    for name, recipe in sorted(example.recipes.items(), key=lambda item: not isinstance(item[1], Array)):
        arguments[name] = recipe.make(arguments)
    if too_long(example, arguments):
        return
    positional = [arguments[name] for name in ARGUMENTS[example.function].split()]
    positional = positional[: len(positional) - example.fewer] + [recipe.make(arguments) for recipe in example.more]
    if log is not None:
        log(example)
    hooked = any(isinstance(recipe, Hook) for recipe in [*example.recipes.values(), *example.more])
    before = {} if hooked else memory(arguments)
    _core.force(*example.forced)
    _core.set_num_threads(example.threads)
    error = result = None
    try:
        result = getattr(_core, example.function)(*positional)
    except (KeyboardInterrupt, SystemError):
        raise  # SystemError: an error that was set and not raised, or the other way round
    except BaseException as raised:
        error = raised
    finally:
        _core.force(None, -1, -1, -1, -1, -1)
        _core.set_num_threads(0)
    good = not (example.replaced or example.more or example.fewer)
    assert not (good and error), f"a valid call raised {error!r}"
    if example.function not in ("forward", "evaluate", "backward", "moments", "copy"):
        return
    if result is None or result is False:
        assert not (good and is_accepted(example)), "a valid call was refused"
        assert not changed(before, arguments), "a call that was refused changed its arguments"
    elif not hooked:
        written = WRITTEN - ({"running_mean", "running_var"} if example.function == "evaluate" else set())
        aliases = {name for name in arguments for other in written if shares(arguments, name, other)}
        assert not changed(before, arguments) - written - aliases
        if example.function != "copy":
            check_answer(example, arguments, result)


def shares(arguments, a, b):
    a, b = arguments.get(a), arguments.get(b)
    return is_array(a) and is_array(b) and base_of(a) is base_of(b)


def is_accepted(example):
    """Whether a call with nothing replaced is good: not every norm has evaluation, nor takes sets of one value."""
    case = example.case
    if example.function == "evaluate":
        return case.row.evaluation is not None
    if example.function in ("forward", "backward", "moments") and 0 not in case.shape:
        return case.set_size >= case.row.least_set
    return example.function != "copy" or 0 not in case.shape


# --- all of them ------------------------------------------------------------------------------------------------------


def fuzz(count, log=None):
    """Run `count` examples, the same ones every time."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(examples())
    def body(example):
        faulthandler.dump_traceback_later(SECONDS_PER_EXAMPLE, exit=True)
        run(example, log)

    try:
        body()
    finally:
        faulthandler.cancel_dump_traceback_later()


def child(count, path):
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY,) * 2)
    np.seterr(all="ignore")
    calls = [0]
    with open(path, "wb", buffering=0) as file:

        def log(example):
            calls[0] += 1
            text = repr(example).encode("utf-8", "backslashreplace")
            os.pwrite(file.fileno(), text, 0)
            os.ftruncate(file.fileno(), len(text))

        fuzz(count, log)
    print(f"{calls[0]} calls of the core, no crash")


def in_child(count):
    """The exit status, what the child printed, and the last example that it called with."""
    # Other allocations than those of Python objects get pages of their own, and garbage when they are given back.
    guarded = {"MALLOC_MMAP_THRESHOLD_": "1024", "MALLOC_MMAP_MAX_": "30000", "MALLOC_PERTURB_": "165"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example"
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(path), "--examples", str(count)]
        done = subprocess.run(command, env={**os.environ, **guarded}, capture_output=True, text=True)
        last = path.read_text(errors="replace") if path.exists() else ""
    return done.returncode, done.stdout + done.stderr, last


def check(count):
    status, printed, last = in_child(count)
    if status != 0:
        crashed = f"status {status}; the last example called was\n{last}\n" if "Error" not in printed else ""
        raise AssertionError(f"{crashed}{printed}")
    return printed


def test_any_objects():
    assert "no crash" in check(300)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.examples, options.child)
    else:
        print(check(options.examples), end="")


if __name__ == "__main__":
    main()
