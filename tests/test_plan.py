"""The plan: whatever axes, extents, memory orders and weights, every element is visited, and none twice."""

from itertools import chain, cycle, permutations
from math import prod

import numpy as np
import pytest

import bounds
import reference
from cases import DTYPES, OTHERS, Case, arithmetic, line_cases, lines, permuted, random, subsets
from normkit import _core, _debug

EPS = 1e-5
SHAPES = (
    (1,), (2,), (7,), (40,),
    (1, 1), (1, 5), (5, 1), (3, 4), (2, 33),
    (1, 3, 4), (3, 1, 4), (3, 4, 1), (2, 3, 4), (2, 3, 17),
    (2, 3, 1, 4), (3, 2, 2, 5), (1, 2, 1, 3), (2, 2, 3, 9),
    (1, 2, 1, 3, 1), (2, 3, 2, 1, 3), (2, 2, 3, 2, 3), (3, 2, 1, 2, 17),
)  # fmt: skip
SHAPES_OF_OTHERS = ((7,), (3, 4), (2, 33), (2, 3, 17), (3, 2, 2, 5))


def parameters(shape):
    """Every shape that broadcasts against `shape`, leading ones also left away; and no weight."""
    found = [None]
    for mask in [*subsets(len(shape)), ()]:
        full = tuple(extent if i in mask else 1 for i, extent in enumerate(shape))
        found.append(full)
        short = full
        while short and short[0] == 1:
            short = short[1:]
            found.append(short)
    return list(dict.fromkeys(found))


def any_memory(rng, a, order):
    """Equal values with the axes in memory in the given order, some of them backwards, some with gaps."""
    flip = tuple(slice(None, None, -1) if back else slice(None) for back in rng.random(a.ndim) < 0.25)
    gaps = [2 if gap else 1 for gap in rng.random(a.ndim) < 0.25]
    base = permuted(np.full([extent * gap for extent, gap in zip(a.shape, gaps)], np.nan, a.dtype), order)
    view = base[(..., *(slice(None, None, gap) for gap in gaps))][(..., *flip)]
    view[...] = a
    return view


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, "float32") for shape in SHAPES] + [(shape, dtype) for shape in SHAPES_OF_OTHERS for dtype in OTHERS],
    ids=str,
)
def test_all_axes_memory_orders_and_weights(rng, shape, dtype, center):
    """Every subset of axes with every shape of weight, through all memory orders of x, dy and parameters in turn."""
    norm = "axes" if center else "axes without center"
    orders = list(permutations(range(len(shape))))
    x_orders, dy_orders = cycle(orders), cycle(orders[::-1] + orders[:1])
    for axes in subsets(len(shape)):
        for parameter in parameters(shape):
            case = Case(norm, shape, {"axes": axes}, parameter=parameter, dtype=dtype)
            x = any_memory(rng, case.random(rng, 1e2), next(x_orders))
            dy = any_memory(rng, case.random(rng), next(dy_orders))
            weight = bias = None
            if parameter is not None:
                weight, bias = (
                    any_memory(rng, random(rng, parameter, dtype=dtype), rng.permutation(len(parameter)))
                    for _ in range(2)
                )
            y, mean, rstd = case.forward(x, weight, bias, eps=EPS)
            case.check_forward(y, x, weight, bias, EPS, (mean, rstd))
            case.check_backward(case.backward(dy, x, mean, rstd, weight), dy, x, (mean, rstd), weight, EPS)


def probes(shape):
    """Arrays of zeros with a single one, at each position in turn: (positions, *shape)."""
    return np.eye(prod(shape), dtype=np.float32).reshape(-1, *shape)


def check_probes(x, axes, parameter, center, calls):
    """y of every probe x, and the gradients of every probe dy, from `calls`, against the reference of all at once."""
    ones, against = probes(x.shape), tuple(axis + 1 for axis in axes)
    mu, rstd = reference.statistics(ones, against, EPS, center)
    y64, xhat64 = reference.normalize(ones, mu, rstd)
    bounds.assert_forward(np.array([calls.forward(probe) for probe in ones]), y64, xhat64, 1.0, 0.0)
    mu, rstd = reference.statistics(x[None], against, EPS, center)
    dx64, *_ = reference.gradient(ones, x[None], mu, rstd, against, 1.0, center)
    _, *terms = reference.gradient(ones, x[None], *calls.statistics(), against)
    gradients = [calls.backward(probe) for probe in ones]
    bounds.assert_dx(np.array([g[0] for g in gradients]), dx64, rstd, ones, against)
    missing = tuple(i + 1 for i, extent in enumerate(parameter) if extent == 1)
    for which, term in enumerate(terms, start=1):
        exact, absolute = (t.sum(missing, keepdims=True) for t in (term, np.abs(term)))
        bounds.assert_param_grad(np.array([g[which] for g in gradients]), exact, absolute)


class Calls:
    """`normalize` in one memory order."""

    def __init__(self, case, x, order):
        self.case, self.order, self.x = case, order, permuted(x, order)
        self.weight = np.ones(case.parameter, np.float32)
        _, self.mean, self.rstd = case.forward(self.x, eps=EPS)

    def statistics(self):
        return [self.case.expand(a)[None] for a in (self.mean, self.rstd)]

    def forward(self, probe):
        return self.case.plain(permuted(probe, self.order), eps=EPS)

    def backward(self, probe):
        return self.case.backward(permuted(probe, self.order), self.x, self.mean, self.rstd, self.weight)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (5, 1), (2, 3, 4), (3, 1, 4), (2, 3, 1, 3), (2, 1, 3, 2, 2)], ids=str)
def test_a_single_one_at_every_position(rng, shape, center):
    """An element that is missed or visited twice changes its probe by far more than any rounding."""
    norm, x = "axes" if center else "axes without center", random(rng, shape, 1.0)
    orders = cycle(permutations(range(len(shape))))
    for axes in subsets(len(shape)):
        kept = tuple(1 if i in axes else extent for i, extent in enumerate(shape))
        within = tuple(extent if i in axes else 1 for i, extent in enumerate(shape))
        for parameter in dict.fromkeys((kept, within, shape, (1,) * len(shape))):
            case = Case(norm, shape, {"axes": axes}, parameter=parameter)
            check_probes(x, axes, parameter, center, Calls(case, x, next(orders)))


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer", "rms", "axes"])
@pytest.mark.parametrize(
    ("n", "dtype"),
    [(n, "float32") for n in (33, 66, 513, 514, 600, 2049)] + [(n, dtype) for n in (33, 545) for dtype in OTHERS],
)
def test_a_single_one_in_long_sets(rng, norm, n, dtype):
    """Set i has its only one at position i: every position of every vector, block, leaf and tail, in every layout."""
    ones = np.eye(n, dtype=dtype)
    noise = random(rng, (n, n), 1.0, dtype=dtype)
    for (case, x, walk), (_, data, _) in zip(line_cases(norm, ones), line_cases(norm, noise)):
        y, mean, rstd = case.forward(x, eps=0.0)
        case.check_forward(y, x, eps=0.0, statistics=(mean, rstd))
        assert walk in (None, _debug.last_path()["walk"])
        _, mean, rstd = case.forward(data, eps=EPS)
        gradients = case.backward(x, data, mean, rstd)  # x is dy here
        case.check_backward(gradients, x, data, (mean, rstd), eps=EPS)
        assert walk in (None, _debug.last_path()["walk"])


def test_the_walk_follows_the_memory():
    """Rows where a set is contiguous, columns where neighbours belong to different sets; names of axes play no part."""
    x = np.ones((4, 8, 16, 32), np.float32)
    nhwc = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    for norm, options in (
        ("batch", {"channel_axis": 1}),
        ("instance", {"channel_axis": 1}),
        ("group", {"num_groups": 2, "channel_axis": 1}),
        ("axes", {"axes": (3,)}),
    ):
        for a, walk in ((x, "rows"), (nhwc, "columns")):
            case = Case(norm, x.shape, options)
            _, mean, rstd = case.forward(a)
            assert _debug.last_path()["walk"] == walk
            case.backward(a, a, mean, rstd)
            assert _debug.last_path()["walk"] == walk
    for norm, options in (("layer", {"normalized_shape": (8, 16, 32)}), ("axes", {"axes": (1,)})):
        Case(norm, x.shape, options).forward(nhwc)
        assert _debug.last_path()["walk"] == "rows"


# --- more elements than an int32 counts -----------------------------------------------------------------------------
# Overlapping windows of a small base and stride-0 axes: memory stays small, and every index is still computed.


def moments_of(values, counts):
    """Mean and sum of squared deviations of values that occur so often."""
    values, counts = np.asarray(values, np.float64), np.asarray(counts, np.float64)
    mean = np.average(values, weights=counts)
    mean += np.average(values - mean, weights=counts)
    return mean, np.sum(counts * (values - mean) ** 2)


def check_moments(got, values, counts):
    """By what they make of xhat, as any statistics are judged."""
    count, mean, m2 = got
    assert count == np.sum(counts)
    mean, m2 = np.asarray(mean), np.asarray(m2)
    assert mean.dtype == m2.dtype == np.float64 and mean.shape == m2.shape == ()
    n, (mean64, m2_64) = np.sum(counts), moments_of(values, counts)
    xhat64 = (np.asarray(values, np.float64) - mean64) / np.sqrt(m2_64 / n + EPS)
    bounds.assert_statistics(values, mean, 1 / np.sqrt(m2 / n + EPS), xhat64)


MORE = 2**31 + 2**16


def test_rows_beyond_int32(rng):
    """One set: a row of 2^16 elements 2^15 + 1 times."""
    row = random(rng, (2**16,)) + np.float32(1e3)
    x = np.broadcast_to(row, (MORE // 2**16, 2**16))
    assert x.size > 2**31
    check_moments(_core.moments(_core.LAYER, x, x.shape), row, np.full(row.size, len(x)))


def test_windows_beyond_int32(rng):
    """One set: all windows of a base, where element k lies in as many windows as it has places in them."""
    side = 46_342
    base = random(rng, (2 * side - 1,)) + np.float32(1e3)
    x = np.lib.stride_tricks.sliding_window_view(base, side)
    assert x.size > 2**31
    places = np.arange(base.size) + 1
    check_moments(_core.moments(_core.AXES, x, (0, 1)), base, np.minimum(places, places[::-1]))


def test_columns_beyond_int32(rng):
    """2^8 lanes, each a set of 2^23 + 2^10 elements; lane k holds the base from k on, again and again."""
    lanes, times = 256, 2**13 + 1
    base = random(rng, (1024 + lanes,)) + np.float32(1e3)
    windows = np.lib.stride_tricks.sliding_window_view(base, lanes)[:1024]
    x = np.lib.stride_tricks.as_strided(windows, (times, 1024, lanes), (0, *windows.strides))
    assert x.size > 2**31
    count, mean, m2 = _core.moments(_core.BATCH, x, 2)
    assert mean.shape == m2.shape == (lanes,)
    for lane in range(lanes):
        check_moments((count, mean[lane], m2[lane]), base[lane : lane + 1024], np.full(1024, times))


@pytest.mark.slow
@pytest.mark.parametrize("inner", [1, 2])
def test_stride_zero_within_the_row_beyond_int32(inner):
    """The innermost axis itself has stride 0: two values, each 2^30 and some times, or one, 2^31 and some."""
    values = np.array([3.0, 5.0], np.float32)[:inner]
    x = np.broadcast_to(values[:, None], (inner, MORE // inner))
    assert x.size > 2**31
    check_moments(_core.moments(_core.AXES, x, (0, 1)), values, np.full(inner, MORE // inner))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 33, 515, 2081])
def test_moments(rng, n, dtype):
    """Of rows and of columns, of any dtype: count, mean and M2, float64."""
    values = lines(rng, n, dtype=dtype)
    for norm, x, spec in ((_core.LAYER, values, (n,)), (_core.AXES, np.asfortranarray(values), (1,))):
        count, mean, m2 = _core.moments(norm, x, spec)
        assert type(count) is int and count == n
        assert mean.dtype == m2.dtype == np.float64 and mean.shape == m2.shape == (len(values),)
        mean64, rstd64 = reference.statistics(x, (1,), EPS, dtype=arithmetic(dtype))
        _, xhat64 = reference.normalize(x, mean64, rstd64, dtype=arithmetic(dtype))
        bounds.assert_statistics(x, mean[:, None], 1 / np.sqrt(m2 / n + EPS)[:, None], xhat64)


def test_weights_of_every_shape_are_tried():
    """The list above is NumPy's: 2^ndim masks, and each again without its leading ones."""
    found = parameters((2, 3, 4))
    assert None in found and () in found and (4,) in found and (3, 1) in found and (2, 1, 4) in found
    assert len(found) == 1 + 8 + len([s for s in found if s is not None and len(s) < 3])
    assert set(chain.from_iterable(s for s in found if s)) == {1, 2, 3, 4}
