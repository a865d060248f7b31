"""Exactness: magnitudes, lengths, kinds of data, constant sets, NaN and infinity, the floating-point environment."""

import ctypes
import platform
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import bounds
import normkit as nk
from cases import DATA, DTYPES, NORMS, OTHERS, RATIOS, Case, line_cases, lines, random, ratios
from normkit import _debug

EPS = 1e-5
# Around every vector (4, 8, 16, 32), step (32), block (512) and leaf (2048), and around twice some of them.
EDGES = (4, 8, 16, 32, 64, 512, 1024, 2048, 4096)
LENGTHS = sorted({1, 2, 3, 5, 11, 48, 97, 100, 545, 2081, 10_000, *(e + d for e in EDGES for d in (-1, 0, 1))})
LENGTHS_OF_OTHERS = (2, 7, 33, 515, 2049, 4097)
LANES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65)
ROWS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 255, 256, 257, 513)
LANES_OF_OTHERS, ROWS_OF_OTHERS = (1, 3, 7, 16, 33, 65), (3, 17, 33, 257)


def with_others(values, of_others):
    """Parameters of a test, (value, dtype): all of them in float32, and some in the other dtypes."""
    return [(value, "float32") for value in values] + [(value, dtype) for value in of_others for dtype in OTHERS]


def check(rng, case, x, scale=1.0, eps=EPS, dy_scale=1.0, backward=True):
    """Forward and backward of one case with random parameters, to the bounds."""
    weight, bias = case.parameters(rng, scale)
    y, mean, rstd = case.forward(x, weight, bias, eps=eps)
    case.check_forward(y, x, weight, bias, eps, (mean, rstd))
    if backward:
        dy = random(rng, case.shape, scale=dy_scale, dtype=case.dtype)
        case.check_backward(case.backward(dy, x, mean, rstd, weight), dy, x, (mean, rstd), weight, eps)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("n", "dtype"), with_others(LENGTHS, LENGTHS_OF_OTHERS))
def test_lengths(rng, norm, n, dtype):
    """Every kind of data at every ratio of mean to standard deviation, as rows and as columns."""
    values = lines(rng, n, ratios=ratios(dtype), dtype=dtype)
    for case, x, walk in line_cases(norm, values):
        for scale in (1.0, 100.0):
            check(rng, case, x, scale)
        assert n < 4 or walk in (None, _debug.last_path()["walk"])


def test_lengths_reach_every_norm_and_both_walks(rng):
    values = lines(rng, 12)
    for norm in NORMS:
        assert {walk for *_, walk in line_cases(norm, values)} >= {"rows", "columns"}


@pytest.mark.parametrize(("kind", "dtype"), with_others(DATA, ["sorted"]))
@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "axes"])
def test_very_long_sets(rng, norm, kind, dtype):
    """The longest sets, alone (shared between threads) and beside a second one."""
    n = 1_000_000 if dtype == "float32" else 300_000
    values = lines(rng, n, (kind,), (0.0, ratios(dtype)[-1]), dtype)
    for case, x, _ in line_cases(norm, values):
        check(rng, case, x, backward=False)
    for case, x, _ in line_cases(norm, values[1:])[:1]:
        check(rng, case, x)


@pytest.mark.parametrize(("lanes", "dtype"), with_others(LANES, LANES_OF_OTHERS))
@pytest.mark.parametrize("far", [False, True])
def test_columns(rng, lanes, far, dtype):
    """Lanes and rows around every edge of the columns walk: one block, several blocks, merged lanes, inner sets."""
    for rows in ROWS if dtype == "float32" else ROWS_OF_OTHERS:
        x = random(rng, (2, rows, lanes), ratios(dtype)[-1] if far else 1.0, dtype=dtype)
        check(rng, Case("axes", x.shape, {"axes": (1,)}, dtype=dtype), x)
        check(rng, Case("axes", x.shape, {"axes": (0, 1)}, dtype=dtype), x)
        check(rng, Case("batch", x.shape, {"channel_axis": 2}, dtype=dtype), x)
        check(rng, Case("axes", x.shape, {"axes": (0, 1)}, parameter=(lanes,), dtype=dtype), x)
        for groups in {g for g in (1, 2, 3, lanes // 2) if g and lanes % g == 0 and rows * lanes > g}:
            check(rng, Case("group", x.shape, {"num_groups": groups, "channel_axis": 2}, dtype=dtype), x)


@pytest.mark.parametrize("runs", [2, 3, 5, 32, 33])
@pytest.mark.parametrize(
    ("run", "dtype"), with_others([1, 2, 3, 4, 7, 16, 31, 32, 33, 49, 196, 511, 513, 2047, 2049], [3, 49, 2049])
)
def test_runs(rng, runs, run, dtype):
    """A set of several contiguous runs: short ones share a leaf, long ones have leaves of their own."""
    for ratio in (1.0, ratios(dtype)[-1]):
        x = random(rng, (runs, 3, run), dtype=dtype, offset=ratio)
        check(rng, Case("batch", x.shape, {"channel_axis": 1}, dtype=dtype), x)
        check(rng, Case("axes", x.shape, {"axes": (0, 2)}, dtype=dtype), x)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize(("ratio", "dtype"), with_others(RATIOS, [0.0, 1e2]))
@pytest.mark.parametrize("n", [2, 3])
def test_tiny_sets(rng, kind, ratio, dtype, n):
    """Two or three elements of many sets, where xhat tells only which is larger, and dx is what is left over."""
    scales = 10.0 ** np.linspace(-3, min(3, np.log10(bounds.largest(dtype)) - 3), 50)
    x = np.concatenate([lines(rng, n, (kind,), (ratio,), "float64") * scale for scale in scales])
    x = np.clip(x, -bounds.largest(dtype), bounds.largest(dtype)).astype(dtype)
    for norm in NORMS:
        for case, arranged, _ in line_cases(norm, x):
            check(rng, case, arranged)
            check(rng, case, arranged, eps=1e-12)


# --- constant sets --------------------------------------------------------------------------------------------------

CONSTANTS = (0.0, 1.0, -1.0, 0.1, 1e6 / 3, -1e6 / 7, 1e30, -1e-30, 3e38, -3.4028235e38, 1e-40, 1.4e-45)


def constants(dtype):
    """Those of CONSTANTS that `dtype` holds, and its extremes."""
    limits = ml_dtypes.finfo(dtype)
    extremes = [float(a) for a in (limits.max, -limits.max, limits.smallest_normal, limits.smallest_subnormal)]
    held = [value for value in CONSTANTS if abs(value) <= bounds.largest(dtype)]
    return np.array([*held, *extremes]).astype(dtype)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if NORMS[norm].center])
@pytest.mark.parametrize(
    ("n", "dtype"), with_others([n for n in LENGTHS if n < 5000] + [100_001], [*LENGTHS_OF_OTHERS, 20_001])
)
def test_constant_sets_give_exactly_beta(rng, norm, n, dtype):
    values = np.repeat(constants(dtype)[:, None], n, axis=1)
    for case, x, _ in line_cases(norm, values):
        for scale in (1.0, 100.0):
            weight, bias = case.parameters(rng, scale)
            y = case.plain(x, weight, bias, eps=EPS)
            beta = np.broadcast_to(bias.reshape(case.sets.parameter), case.sets.view)
            np.testing.assert_array_equal(y.reshape(case.sets.view), beta)
            np.testing.assert_array_equal(case.plain(x, weight, eps=1e-12), np.zeros(case.shape))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_sets_with_zero_eps(norm, dtype):
    """0 / 0: NaN, as IEEE division gives it; without a mean to subtract, only zeros have no scale."""
    values = np.repeat(np.array([0.0, 7.0], dtype)[:, None], 50, axis=1)
    for case, x, _ in line_cases(norm, values):
        expected = np.full(case.shape, np.nan) if case.row.center else np.where(x == 0, np.nan, 1.0)
        bounds.assert_same_bits(case.plain(x, eps=0.0), expected.astype(dtype))


# --- magnitudes -----------------------------------------------------------------------------------------------------


def magnitudes(rng, n, dtype):
    """Sets of n at the far ends of a dtype, and how each is built. In the comments: what it comes to in float32."""
    limits = ml_dtypes.finfo(dtype)
    largest, smallest = bounds.largest(dtype), max(float(limits.smallest_normal), 1e-300)
    far, near = 2.0 ** (limits.maxexp * 3 // 4), 2.0 ** (limits.minexp * 3 // 4)  # 8e28, 3e-29
    ratio = min(1e6, 0.1 / float(limits.eps), largest / far / 8)
    normal = rng.standard_normal(n)
    uniform = np.append(rng.uniform(-1, 1, n - 2), [1.0, -1.0])
    one_side = np.full(n, -0.99)
    one_side[n // 2] = 1.0
    sets = {
        "far": far * normal,
        "far around farther": far * (normal + ratio),
        "near": near * normal,
        "near around less near": near * (normal + ratio),
        "almost the largest": 0.9 * largest * uniform,
        "the largest": largest * uniform,
        "all near the largest": largest * (1 - max(1e-3, 8 * float(limits.eps)) * rng.uniform(0, 1, n)),
        "one against all": largest * one_side,  # the deviation itself overflows
        "an outlier first": np.append(0.9 * largest, normal[1:]),
        "an outlier last": np.append(normal[1:], -(2.0 ** (limits.maxexp * 5 // 8))),  # -1e24
        "the smallest": smallest * normal,
        "squares that are subnormal": 10 * np.sqrt(smallest) * normal,  # 1e-18
        "squares that overflow": np.sqrt(largest) * normal,  # 2e19
    }
    for name, values in sets.items():
        rounded = values.astype(dtype)
        if (rounded == rounded[0]).all():  # with eps = 0 that would be another test
            rounded[0] /= 2
        sets[name] = rounded
    return sets


MAGNITUDES = tuple(magnitudes(np.random.default_rng(0), 4, "float32"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("n", "dtype"), with_others([2, 3, 7, 33, 515, 2050, 7001], [2, 33, 2050]))
def test_magnitudes(rng, norm, n, dtype):
    """eps = 0, so that the smallest are normalized too; with eps they and the largest are as the formula says."""
    values = np.array(list(magnitudes(rng, n, dtype).values()))
    assert np.isfinite(values).all()
    for case, x, _ in line_cases(norm, values):
        for eps in (0.0, EPS):
            check(rng, case, x, eps=eps, backward=False)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("n", "dtype"), with_others([3, 33, 2050], [3, 515]))
@pytest.mark.parametrize("kind", MAGNITUDES)
def test_magnitudes_backward(rng, norm, n, dtype, kind):
    """dy of a scale that leaves dx a normal number: in float32, rstd goes from 1e-39 to 1e38."""
    values = np.array([magnitudes(rng, n, dtype)[kind] for _ in range(4)])
    least = max(1e-8, np.sqrt(float(ml_dtypes.finfo(dtype).smallest_normal)))
    for case, x, _ in line_cases(norm, values):
        scale = float(np.median(np.abs(case.exact_statistics(x, 0.0)[1])))
        check(rng, case, x, eps=0.0, dy_scale=min(max(least, 1 / scale), 1 / least))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("n", "dtype"), with_others([2, 3, 33, 515, 2050], [3, 515]))
def test_subnormal_data(rng, norm, n, dtype):
    """Subnormal x is normalized like any other, and with eps it gives the (normal or subnormal) y of the formula."""
    limits = ml_dtypes.finfo(dtype)
    tiny, smallest = float(limits.smallest_normal), float(limits.smallest_subnormal)
    scales = tiny * np.array([1.0, 0.1, 0.05, 0.05, 0.05, 0.05])
    values = (rng.standard_normal((6, n)) * scales[:, None]).astype(dtype)
    assert (np.abs(values[2:]) < tiny).all()
    values = values[[len(set(row)) > 1 for row in values.tolist()]]  # with eps = 0, a constant set is another test
    for case, x, _ in line_cases(norm, values):
        if dtype != "float64":  # there rstd, 1e308 and more, leaves the range of its own dtype
            check(rng, case, x, eps=0.0, backward=False)
        y = case.plain(x, eps=1.0)
        deviation = x.reshape(case.sets.view).astype(np.float64) - case.exact_statistics(x, 1.0)[0]
        lost = (y.reshape(case.sets.view) == 0) & (np.abs(deviation) > 2 * smallest)
        assert not lost.any(), "subnormal results were flushed to zero"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_parameters_and_gradients(rng, norm, dtype):
    """gamma and dy far below the least normal number give subnormal y and dx, not zeros."""
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    for case, x, _ in line_cases(norm, random(rng, (6, 300), dtype=dtype)):
        small_weight, _ = case.parameters(rng, tiny / 8)
        small_dy = random(rng, case.shape, scale=tiny / 8, dtype=dtype)
        y, mean, rstd = case.forward(x, small_weight)
        assert np.count_nonzero((y != 0) & (np.abs(y) < tiny)) > 0.8 * y.size
        dx, dweight, dbias = case.backward(small_dy, x, mean, rstd)
        assert np.count_nonzero(dx) > 0.8 * dx.size
        assert all(d is None or np.count_nonzero(d) > 0.8 * d.size for d in (dweight, dbias))


# What leaves the range of normal numbers is rounded there, and float16 has no room for any of these.
POWERS = [
    (k, dtype)
    for k in (-900, -90, -20, 20, 90, 900)
    for dtype in DTYPES
    if abs(k) + 30 <= -ml_dtypes.finfo(dtype).minexp
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("k", "dtype"), POWERS)
def test_powers_of_two_in_parameters_are_exact(rng, norm, k, dtype):
    """gamma and beta times 2^k give y times 2^k, gamma and dy give dx and dweight: at any scale, bit for bit."""
    for case, x, _ in line_cases(norm, lines(rng, 515, ("normal", "sorted"), (0.0, ratios(dtype)[-1]), dtype)):
        weight, bias = case.parameters(rng)
        dy = random(rng, case.shape, dtype=dtype)
        scaled_weight, scaled_bias = (None if a is None else np.ldexp(a, k) for a in (weight, bias))
        y, mean, rstd = case.forward(x, weight, bias)
        bounds.assert_same_bits(case.plain(x, scaled_weight, scaled_bias), np.ldexp(y, k))
        dx, dweight, dbias = case.backward(dy, x, mean, rstd, weight)
        bounds.assert_same_bits(case.backward(dy, x, mean, rstd, scaled_weight)[0], np.ldexp(dx, k))
        for a, b in zip(case.backward(np.ldexp(dy, k), x, mean, rstd, weight), (dx, dweight, dbias)):
            assert (a is None) == (b is None)
            if a is not None:
                bounds.assert_same_bits(a, np.ldexp(b, k))


# --- NaN and infinity -----------------------------------------------------------------------------------------------


def per_set(case, a):
    """One row for each set."""
    axes, view = case.sets.axes, case.sets.view
    kept = [i for i in range(len(view)) if i not in axes]
    return a.reshape(view).transpose(*kept, *axes).reshape(-1, case.set_size)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("n", "dtype"), with_others([3, 31, 33, 515, 2050], [3, 33, 515]))
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_set(rng, norm, n, dtype, poison):
    values = lines(rng, n, ("normal",), (0.0, 1.0, ratios(dtype)[-1], 0.0, 1.0), dtype)
    for at in (0, n // 2, n - 1):
        poisoned = values.copy()
        poisoned[2, at] = poison
        for (case, clean_x, _), (_, x, _) in zip(line_cases(norm, values), line_cases(norm, poisoned)):
            assert np.count_nonzero(~np.isfinite(per_set(case, x))) == 1
            hit = ~np.isfinite(per_set(case, x)).all(axis=1)
            weight, bias = case.parameters(rng)
            dy = random(rng, case.shape, dtype=dtype)
            clean, dirty = ([*case.forward(a, weight, bias)] for a in (clean_x, x))
            for result in (clean, dirty):
                result[1:] = [np.zeros(case.statistics_shape) if a is None else a for a in result[1:]]
            y = per_set(case, dirty[0])
            # Without a mean, infinity makes rstd 0, and only the element itself 0 * infinity.
            assert np.isnan(y[hit]).all() if case.row.center else np.isnan(y[hit]).any()
            bounds.assert_same_bits(y[~hit], per_set(case, clean[0])[~hit])
            for a, b in zip(clean[1:], dirty[1:]):
                bounds.assert_same_bits(a.reshape(-1)[~hit], b.reshape(-1)[~hit])
            clean_gradients, dirty_gradients = (
                case.backward(dy, a, *statistics[1:], weight) for a, statistics in ((clean_x, clean), (x, dirty))
            )
            dx, clean_dx = (per_set(case, g[0]) for g in (dirty_gradients, clean_gradients))
            assert np.isnan(dx[hit]).any()
            bounds.assert_same_bits(dx[~hit], clean_dx[~hit])
            same_parameter_gradients(case, hit, clean_gradients, dirty_gradients)


def same_parameter_gradients(case, hit, clean, dirty):
    """Only parameters that the poisoned set uses may differ."""
    _, axes, parameter = case.sets
    used = np.zeros(case.sets.view, bool)
    kept = [i for i in range(len(case.sets.view)) if i not in axes]
    rows = used.transpose(*kept, *axes)
    rows[...] = hit.reshape([case.sets.view[i] for i in kept] + [1] * len(axes))
    lacking = tuple(i for i, extent in enumerate(parameter) if extent == 1)
    untouched = ~used.any(axis=lacking, keepdims=True)
    for a, b in zip(clean[1:], dirty[1:]):
        if a is not None:
            bounds.assert_same_bits(a.reshape(parameter)[untouched], b.reshape(parameter)[untouched])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_dy_stays_in_its_set(rng, norm, poison, dtype):
    for case, x, _ in line_cases(norm, lines(rng, 515, ("normal",), (0.0, 1.0, ratios(dtype)[-1], 0.0), dtype)):
        weight, _ = case.parameters(rng)
        _, mean, rstd = case.forward(x)
        dy = random(rng, case.shape, dtype=dtype)
        dirty = dy.copy()
        dirty.reshape(-1)[x.size // 2] = poison
        hit = ~np.isfinite(per_set(case, dirty)).all(axis=1)
        assert np.count_nonzero(hit) == 1
        clean_gradients, dirty_gradients = (case.backward(a, x, mean, rstd, weight) for a in (dy, dirty))
        dx, clean_dx = (per_set(case, g[0]) for g in (dirty_gradients, clean_gradients))
        assert np.isnan(dx[hit]).any()
        bounds.assert_same_bits(dx[~hit], clean_dx[~hit])
        same_parameter_gradients(case, hit, clean_gradients, dirty_gradients)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if NORMS[norm].evaluation is not None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_in_evaluation_stays_an_element(rng, norm, dtype):
    """Given statistics, nothing is shared: only the element itself is lost."""
    case = Case(norm, (3, 4, 50), {"channel_axis": 1}, training=False, dtype=dtype)
    x, running = case.random(rng), case.running(rng)
    more = {"running_mean": running[0], "running_var": running[1]}
    clean = case.plain(x, **more)
    x[1, 2, 33] = np.nan
    y = case.plain(x, **more)
    assert np.isnan(y[1, 2, 33]) and np.count_nonzero(np.isnan(y)) == 1
    bounds.assert_same_bits(y[~np.isnan(y)], clean[~np.isnan(y)])


# --- the floating-point environment ---------------------------------------------------------------------------------

ENVIRONMENT = """
import ctypes, platform, sys
import numpy as np

def environment():
    "Rounding, and on x86 the control bits of the SSE unit: flush to zero, denormals are zero, masks."
    libm = ctypes.CDLL(None)
    state = (ctypes.c_uint32 * 16)()
    assert libm.fegetenv(state) == 0
    control = (state[7] & ~0x3F, state[0] & 0xFFFF) if platform.machine() in ("x86_64", "AMD64") else ()
    return libm.fegetround(), control, float(np.float32(1e-40) * np.float32(0.5)) != 0.0, np.geterr()

before = environment()
import normkit as nk
assert environment() == before, (before, environment())
x = np.full((64, 4096), np.nan, np.float32)
for threads in (1, 2):
    nk.set_num_threads(threads)
    for poison in (np.nan, np.inf, 1e-40, 3e38, 1.0):
        x[...] = poison
        x[:, ::2] *= -1
        y, mean, rstd = nk.layer_norm_forward(x, 4096)
        nk.layer_norm_backward(y, x, mean, rstd, 4096)
        nk.batch_norm(x, training=True)
        assert environment() == before, (before, environment())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the environment through glibc's fegetenv")
def test_environment_in_a_fresh_process():
    """Neither the import nor a call changes rounding, flushing or masks; subnormals still work in NumPy afterwards."""
    run = subprocess.run([sys.executable, "-c", ENVIRONMENT], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


def test_flushing_would_be_seen():
    """The probe of the test above does read the bit that fast-math sets (x86)."""
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        pytest.skip("x86 under glibc")
    libm, state = ctypes.CDLL(None), (ctypes.c_uint32 * 16)()
    assert libm.fegetenv(state) == 0
    kept = state[7]
    assert not kept & 0x8040, "flush to zero or denormals-are-zero is set in the test process"
    try:
        state[7] = kept | 0x8040
        assert libm.fesetenv(state) == 0
        flushed = float(np.float32(1e-40) * np.float32(0.5)) == 0.0
    finally:
        state[7] = kept
        assert libm.fesetenv(state) == 0
    assert flushed


@pytest.mark.parametrize("value", [np.nan, np.inf, "max", "smallest_subnormal", 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_error_state_is_not_consulted(rng, value, dtype):
    """IEEE results come without warnings or errors, whatever np.errstate says, and it stays what it was."""
    x = random(rng, (8, 100), dtype=dtype)
    value = getattr(ml_dtypes.finfo(dtype), value) if isinstance(value, str) else value
    x[3, 5] = value
    x[4] = value
    with np.errstate(all="raise"):
        state = np.geterr()
        y, mean, rstd = nk.layer_norm_forward(x, 100, eps=0.0)
        nk.layer_norm_backward(x, x, mean, rstd, 100)
        assert np.geterr() == state
        assert float(np.float64(1.0) + y[0, 0]) == 1.0 + float(y[0, 0])
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        np.float32(3e38) * np.float32(10)
