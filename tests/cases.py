"""Norms, layouts, memory orders and data: the tables that all tests iterate over. A new norm is a new row of NORMS."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import ml_dtypes  # registers bfloat16 with NumPy
import numpy as np
import pytest

import bounds
import normkit as nk
import reference
from normkit import _core

RATIOS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e6)  # |mean| / std

DTYPES = _core.dtypes()
OTHERS = tuple(dtype for dtype in DTYPES if dtype != "float32")


def ratios(dtype):
    """Those of RATIOS at which `dtype` still tells numbers one standard deviation apart."""
    eps = float(ml_dtypes.finfo(dtype).eps)
    return tuple(ratio for ratio in RATIOS if ratio * eps <= 1)


def arithmetic(dtype):
    """What the results for data of `dtype` are judged in."""
    if not bounds.is_double(dtype):
        return np.float64
    if not reference.EXTENDED:
        pytest.skip("longdouble has no more digits than float64 here; see test_dtypes.test_float64_against_fractions")
    return np.longdouble


# --- data ---------------------------------------------------------------------------------------------------------


def stepped(rng, n):
    """A staircase of seven levels."""
    return np.floor(np.arange(n) * (7 / n)) - 3.0


def outlier_first(rng, n):
    values = rng.standard_normal(n)
    values[0] = 1e6
    return values


DATA = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
    "stepped": stepped,
    "lognormal": lambda rng, n: np.exp(rng.standard_normal(n)),
    "outlier first": outlier_first,
}


def lines(rng, n, kinds=tuple(DATA), ratios=RATIOS, dtype="float32"):
    """One set of n elements per kind of data and ratio of mean to standard deviation: (sets, n)."""
    rows = [DATA[kind](rng, n) + sign * ratio for kind, sign in zip(kinds, (1, -1) * 3) for ratio in ratios]
    return np.clip(rows, -bounds.largest(dtype), bounds.largest(dtype)).astype(dtype)


def random(rng, shape, mean=0.0, scale=1.0, dtype="float32", offset=0.0):
    """Normal data about `offset`; the mean alternates in sign along axis 0."""
    values = rng.standard_normal(shape) * scale + offset
    if mean:
        sign = np.where(np.arange(shape[0]) % 2, -1.0, 1.0) if shape else 1.0
        values += mean * np.reshape(sign, (-1,) + (1,) * (len(shape) - 1))
    return np.asarray(values, dtype)


# --- memory -------------------------------------------------------------------------------------------------------


def permuted(a, order):
    """Equal values, with the axes in memory in the given order, the slowest first."""
    inverse = np.argsort(order)
    return a.transpose(order).copy().transpose(inverse)


def channels_last(a):
    """NHWC memory seen as NCHW."""
    return np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1) if a.ndim > 1 else a.copy()


def channels_first(a):
    """NCHW memory seen as NHWC."""
    return np.moveaxis(np.moveaxis(a, -1, 1).copy(), 1, -1) if a.ndim > 1 else a.copy()


def negative(a):
    flip = (slice(None, None, -1),) * a.ndim
    return a[flip].copy()[flip]


def strided(a):
    """Every second element of every axis, with NaN between."""
    base = np.full([2 * extent for extent in a.shape], np.nan, a.dtype)
    view = base[(slice(None, None, 2),) * a.ndim]
    view[...] = a
    return view


def padded(a):
    """Contiguous rows with a gap of three NaN after each."""
    base = np.full((*a.shape[:-1], a.shape[-1] + 3), np.nan, a.dtype)
    view = base[..., : a.shape[-1]]
    view[...] = a
    return view


def shifted(a):
    """Aligned to the element and to nothing wider."""
    base = np.empty(a.size + 16, a.dtype)
    start = 1 + (-base.ctypes.data // a.itemsize) % 16
    view = base[start : start + a.size].reshape(a.shape)
    view[...] = a
    return view


def misaligned(a):
    """One byte off the element's alignment."""
    view = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


# Each makes a new array.
MEMORY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda a: a.copy(order="C"),
    "F": lambda a: a.copy(order="F"),
    "channels last": channels_last,
    "channels first": channels_first,
    "negative": negative,
    "strided": strided,
    "padded": padded,
    "shifted": shifted,
    "misaligned": misaligned,
}


# --- norms --------------------------------------------------------------------------------------------------------


def any_axes(shape, axes):
    """`normalize`: any sets; a weight per element of the set, as layer norm has it, unless a case says otherwise."""
    axes = tuple(sorted(axis % len(shape) for axis in axes))
    return reference.Sets(shape, axes, tuple(shape[i] if i in axes else 1 for i in range(len(shape))))


def channel_options(shape, **more):
    return [{"channel_axis": axis, **more} for axis in (1, -1)]


def group_options(shape):
    found = []
    for options in channel_options(shape):
        channels = shape[options["channel_axis"]]
        elements = int(np.prod(shape[1:]))
        divisors = [d for d in (1, 2, 3, channels) if channels % d == 0 and elements > d]
        found += [{"num_groups": d, **options} for d in sorted(set(divisors))]
    return found


def trailing_options(shape):
    return [{"normalized_shape": shape[i:]} for i in range(len(shape))]


def axes_options(shape):
    """Sets that none of the five norms has, too: leading axes, and axes apart from each other."""
    every = tuple(range(len(shape)))
    return [{"axes": axes} for axes in dict.fromkeys((every[:1], every[1:] or every, every[::2], every[1::2] or every))]


def batch_lines(values):
    sets, n = values.shape
    found = [((1, sets, n), {"channel_axis": 1}, values[None], "rows")]
    found += [((n, sets), {"channel_axis": 1}, values.T, "columns")]
    if n % 3 == 0:
        runs = values.reshape(sets, 3, n // 3).transpose(1, 0, 2)
        found += [(runs.shape, {"channel_axis": 1}, runs, None)]
    return found if n > 1 else []


def instance_lines(values):
    sets, n = values.shape
    found = [((1, sets, n), {"channel_axis": 1}, values[None], "rows")]
    found += [((1, n, sets), {"channel_axis": -1}, values.T[None], "columns")]
    return found if n > 1 else []


def group_lines(values):
    """Two or three channels to a group where the length allows it."""
    sets, n = values.shape
    merged = next(d for d in (2, 3, 1) if n % d == 0)
    rows = values.reshape(1, sets * merged, n // merged)
    columns = values.reshape(sets, merged, n // merged).transpose(2, 0, 1).reshape(1, n // merged, sets * merged)
    found = [(rows.shape, {"num_groups": sets, "channel_axis": 1}, rows, "rows")]
    if n > merged:
        found += [(columns.shape, {"num_groups": sets, "channel_axis": -1}, columns, "columns")]
    return found if n > 1 else []


def trailing_lines(values):
    options = {"normalized_shape": values.shape[1:]}
    return [(values.shape, options, values, "rows"), (values.shape, options, np.asfortranarray(values), "columns")]


def axes_lines(values):
    return [(values.shape, {"axes": (1,)}, values, "rows"), (values.shape[::-1], {"axes": (0,)}, values.T, "columns")]


@dataclass(frozen=True)
class Norm:
    """One norm: its functions, its sets, and the arguments to try.

    function: name in normkit; `_forward` and `_backward` are its other two.
    sets: (shape, **options) -> reference.Sets.
    options: shape -> the arguments to try on an array of that shape.
    lines: (sets, n) array -> the same sets in this norm's layouts, with the walk that each must take; None: either.
    training, evaluation: what asks for statistics of x, and what for given ones; None if the norm has no evaluation.
    fixed: further arguments of every call.
    """

    function: str
    sets: Callable[..., reference.Sets]
    options: Callable[[tuple[int, ...]], list[dict[str, Any]]]
    lines: Callable[[np.ndarray], list]
    training: dict[str, bool] = field(default_factory=dict)
    evaluation: dict[str, bool] | None = None
    fixed: dict[str, bool] = field(default_factory=dict)
    least_ndim: int = 1
    least_set: int = 1
    center: bool = True
    has_bias: bool = True
    has_mean: bool = True
    per_sample: bool = True  # a sample's results do not depend on the others in the batch


NORMS = {
    "batch": Norm(
        "batch_norm", reference.NORMS["batch"], channel_options, batch_lines,
        {"training": True}, {"training": False}, least_ndim=2, least_set=2, per_sample=False,
    ),
    "instance": Norm(
        "instance_norm", reference.NORMS["instance"], channel_options, instance_lines,
        {"use_input_stats": True}, {"use_input_stats": False}, least_ndim=3, least_set=2,
    ),
    "group": Norm("group_norm", reference.NORMS["group"], group_options, group_lines, least_ndim=2, least_set=2),
    "layer": Norm("layer_norm", reference.NORMS["layer"], trailing_options, trailing_lines),
    "rms": Norm(
        "rms_norm", reference.NORMS["rms"], trailing_options, trailing_lines,
        center=False, has_bias=False, has_mean=False,
    ),
    "axes": Norm("normalize", any_axes, axes_options, axes_lines),
    "axes without center": Norm("normalize", any_axes, axes_options, axes_lines, fixed={"center": False}, center=False),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One norm with its arguments on arrays of one shape and dtype, x in one memory order."""

    norm: str
    shape: tuple[int, ...]
    options: dict[str, Any]
    memory: str = "C"
    parameter: tuple[int, ...] | None = None  # shape of weight and bias against x, for normalize; None: by the set
    training: bool = True
    dtype: str = "float32"

    def __str__(self):
        options = ",".join(f"{v}" for v in self.options.values()).replace(" ", "")
        parameter = "" if self.parameter is None else f"-w{self.parameter}".replace(" ", "")
        shape = "x".join(map(str, self.shape))
        dtype = "" if self.dtype == "float32" else f"-{self.dtype}"
        mode = "" if self.training else "-evaluation"
        return f"{self.norm}-{shape}-{options}-{self.memory}{parameter}{mode}{dtype}"

    @property
    def row(self):
        return NORMS[self.norm]

    @property
    def sets(self):
        sets = self.row.sets(self.shape, **self.options)
        if self.parameter is None:
            return sets
        return sets._replace(parameter=(1,) * (len(self.shape) - len(self.parameter)) + self.parameter)

    @property
    def weight_shape(self):
        """As the user gives it."""
        if "channel_axis" in self.options:
            return (self.shape[self.options["channel_axis"]],)
        if "normalized_shape" in self.options:
            return tuple(self.options["normalized_shape"])
        return self.sets.parameter if self.parameter is None else self.parameter

    @property
    def statistics_shape(self):
        return tuple(extent for i, extent in enumerate(self.sets.view) if i not in self.sets.axes)

    @property
    def set_size(self):
        return int(np.prod([self.sets.view[i] for i in self.sets.axes]))

    # -- arguments

    def arrange(self, values):
        return MEMORY[self.memory](np.asarray(values, self.dtype))

    def random(self, rng, mean=0.0, scale=1.0, offset=0.0):
        """An x, or a dy, of the case's shape, dtype and memory order."""
        return self.arrange(random(rng, self.shape, mean, scale, self.dtype, offset))

    def parameters(self, rng, scale=1.0, dtypes=None):
        """Random weight and bias, of x's dtype unless `dtypes` names two; bias is None where the norm has none."""
        dtypes = dtypes or (self.dtype, self.dtype)
        weight, bias = (random(rng, self.weight_shape, scale=scale, dtype=dtype) for dtype in dtypes)
        return weight, bias if self.row.has_bias else None

    def running(self, rng, mean=0.0, dtype=np.float64):
        """Statistics to evaluate with."""
        (channels,) = self.weight_shape
        return (rng.standard_normal(channels) + mean).astype(dtype), rng.uniform(0.5, 2.0, channels).astype(dtype)

    def expand(self, statistic):
        """A statistic as the user has it, in a shape that broadcasts against the view."""
        return statistic.reshape([1 if i in self.sets.axes else n for i, n in enumerate(self.sets.view)])

    def _arguments(self, weight, bias):
        arguments = {**self.options, **self.row.fixed, "weight": weight}
        if self.row.has_bias:
            arguments["bias"] = bias
        return arguments

    # -- the library

    def plain(self, x, weight=None, bias=None, **more):
        """y of the function that returns y alone."""
        mode = self.row.training if self.training else self.row.evaluation
        return getattr(nk, self.row.function)(x, **self._arguments(weight, bias), **{**mode, **more})

    def forward(self, x, weight=None, bias=None, **more):
        """y, mean, rstd; mean is None where the norm has none."""
        mode = self.row.training if self.training else self.row.evaluation
        function = getattr(nk, f"{self.row.function}_forward")
        result = function(x, **self._arguments(weight, bias), **{**mode, **more})
        return result if self.row.has_mean else (result[0], None, result[1])

    def backward(self, dy, x, mean, rstd, weight=None, **more):
        """dx, dweight, dbias; dbias is None where the norm has none."""
        mode = self.row.training if self.training else self.row.evaluation
        statistics = (mean, rstd) if self.row.has_mean else (rstd,)
        function = getattr(nk, f"{self.row.function}_backward")
        arguments = {**self.options, **self.row.fixed, **mode, "weight": weight, **more}
        result = function(dy, x, *statistics, **arguments)
        return result if self.row.has_bias else (*result, None)

    # -- the reference and the comparison

    def _against_view(self, parameter, default, dtype):
        return default if parameter is None else np.asarray(parameter, dtype).reshape(self.sets.parameter)

    def exact_statistics(self, x, eps, running=None):
        """Mean and rstd in the reference's arithmetic, broadcasting against the view."""
        dtype = arithmetic(x.dtype)
        if running is None:
            return reference.statistics(x.reshape(self.sets.view), self.sets.axes, eps, self.row.center, dtype)
        mean, var = (np.asarray(a, dtype).reshape(self.sets.parameter) for a in running)
        return mean, 1 / np.sqrt(var + eps)

    def check_forward(self, y, x, weight=None, bias=None, eps=1e-5, statistics=None, running=None):
        """y, and the statistics (mean, rstd) if given, are within the bounds; x must still hold what y was made of."""
        dtype = arithmetic(x.dtype)
        gamma, beta = self._against_view(weight, 1.0, dtype), self._against_view(bias, 0.0, dtype)
        view, (mean, rstd) = self.sets.view, self.exact_statistics(x, eps, running)
        y64, xhat64 = reference.normalize(x.reshape(view), mean, rstd, gamma, beta, dtype)
        assert y.dtype == x.dtype and y.shape == x.shape
        bounds.assert_forward(y.reshape(view), y64, xhat64, gamma, beta)
        if statistics is not None:
            got_mean, got_rstd = statistics
            assert (got_mean is None) == (not self.row.has_mean)
            got_mean = np.zeros(self.statistics_shape) if got_mean is None else got_mean
            for statistic in (got_mean, got_rstd):
                assert statistic.dtype == np.float64 and statistic.shape == self.statistics_shape
            bounds.assert_statistics(x.reshape(view), self.expand(got_mean), self.expand(got_rstd), xhat64)

    def check_backward(self, gradients, dy, x, statistics, weight=None, eps=1e-5, running=None, grad_dtype=None):
        """dx, dweight, dbias are within the bounds; `normalize` without a weight has no shape for the last two.

        dx is judged against the statistics of x in float64; that of float64 data against the statistics (mean, rstd)
        that backward was given (bounds.py says why). dweight and dbias are sums of terms, and judged by their terms:
        those with the given statistics, which are checked where they were made.
        """
        view, axes, parameter = self.sets
        dx, dweight, dbias = gradients
        dtype = arithmetic(x.dtype)
        expected = np.dtype(grad_dtype or (x.dtype if weight is None else weight.dtype))
        dy, x, gamma = dy.reshape(view), x.reshape(view), self._against_view(weight, 1.0, dtype)
        given = [0.0 if a is None else self.expand(a) for a in statistics]
        mean, rstd = given if bounds.is_double(x.dtype) else self.exact_statistics(x, eps, running)
        dx64, *_ = reference.gradient(dy, x, mean, rstd, axes, gamma, self.row.center, self.training, dtype)
        assert dx.dtype == x.dtype and dx.shape == self.shape
        bounds.assert_dx(dx.reshape(view), dx64, rstd, gamma * dy.astype(dtype), axes)
        known = weight is not None or "axes" not in self.options
        assert (dweight is None) == (not known)
        assert (dbias is None) == (not known or not self.row.has_bias)
        _, *terms = reference.gradient(dy, x, *given, axes, dtype=dtype)
        for gradient, term in zip((dweight, dbias), terms):
            if gradient is not None:
                assert gradient.dtype == expected and gradient.shape == self.weight_shape
                exact, absolute = reference.sum_to(term, parameter), reference.sum_to(np.abs(term), parameter)
                bounds.assert_param_grad(gradient.reshape(parameter), exact, absolute, data=x.dtype)


# --- the cases ----------------------------------------------------------------------------------------------------

SHAPES = ((6, 5), (33, 70), (3, 4, 7), (2, 18, 50), (2, 6, 5, 7), (3, 20, 14, 13), (2, 4, 3, 5, 6), (2, 3, 4, 9, 17))


def layouts(shapes=SHAPES, norms=tuple(NORMS)):
    """Every norm, its arguments and the memory orders of NCHW and NHWC, on every shape that it takes."""
    found = []
    for norm in norms:
        for shape in shapes:
            memories = ("C", "F") if len(shape) < 3 else ("C", "channels last", "channels first")
            if len(shape) >= NORMS[norm].least_ndim:
                for options in NORMS[norm].options(shape):
                    found += [Case(norm, shape, options, memory) for memory in memories]
    return [case for case in found if case.set_size >= case.row.least_set]


def with_evaluation(cases):
    """The cases, and each again with given statistics where the norm has that."""
    return [*cases, *(replace(case, training=False) for case in cases if case.row.evaluation is not None)]


def in_every_dtype(cases, step=1):
    """The cases, and every `step`-th of them again in each of the other dtypes, not the same ones for each."""
    more = [replace(case, dtype=dtype) for i, dtype in enumerate(OTHERS) for case in cases[i % step :: step]]
    return [*cases, *more]


def line_cases(norm, values):
    """The sets of `values` (sets, n) in the layouts of one norm: (case, x, walk), x as it lies in memory."""
    found = []
    for shape, options, x, walk in NORMS[norm].lines(values):
        assert x.shape == shape
        order = "A" if norm in ("layer", "rms") else "C"  # there the columns come from Fortran memory
        found.append((Case(norm, shape, options, dtype=values.dtype.name), np.array(x, order=order), walk))
    return found


def subsets(ndim):
    """Every set of axes that is not empty."""
    return [axes for size in range(1, ndim + 1) for axes in combinations(range(ndim), size)]


def ids(cases):
    return [str(case) for case in cases]
