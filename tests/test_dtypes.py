"""Dtypes: parameters of another one than x, dtypes of gradients, conversions bit by bit, running statistics.

The other tests run over all dtypes too; here is what would have no point in one alone.
"""

import subprocess
import sys
from dataclasses import replace
from itertools import product

import ml_dtypes
import numpy as np
import pytest

import bounds
import normkit as nk
from cases import DTYPES, MEMORY, NORMS, Case, ids, layouts, lines, random, ratios, with_evaluation
from normkit import _debug
from test_reference import exact_xhat

EPS = 1e-5
HALVES = [dtype for dtype in DTYPES if np.dtype(dtype).itemsize == 2]
WITH_RUNNING = [norm for norm in NORMS if NORMS[norm].evaluation is not None]


def parameter_dtypes(dtype):
    """x's dtype, float32 and float64, for weight and bias each."""
    return list(product(dict.fromkeys((dtype, "float32", "float64")), repeat=2))


def compute_dtype(dtype):
    return "float64" if bounds.is_double(dtype) else "float32"


def given(case, running):
    return {} if case.training else {"running_mean": running[0], "running_var": running[1]}


def test_every_dtype_is_known_to_numpy():
    assert set(DTYPES) == {"float64", "float32", "float16", "bfloat16"}
    for dtype in DTYPES:
        x = np.ones((2, 8), dtype)
        assert nk.layer_norm(x, 8).dtype == x.dtype == ml_dtypes.finfo(dtype).dtype


# --- parameters -----------------------------------------------------------------------------------------------------

MIXED = with_evaluation(layouts(((5, 12), (3, 4, 37), (2, 6, 5, 7))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MIXED[::2], ids=ids(MIXED[::2]))
def test_parameters_of_another_dtype(rng, case, dtype):
    """Within the bounds, and with the bits of parameters that were converted to the type of arithmetic beforehand."""
    case = replace(case, dtype=dtype)
    x, dy = case.random(rng, ratios(dtype)[-1]), case.random(rng)
    running = None if case.training else case.running(rng, 1.0)
    more = given(case, running)
    for dtypes in parameter_dtypes(dtype):
        weight, bias = case.parameters(rng, dtypes=dtypes)
        y, mean, rstd = case.forward(x, weight, bias, eps=EPS, **more)
        case.check_forward(y, x, weight, bias, EPS, (mean, rstd), running)
        gradients = case.backward(dy, x, mean, rstd, weight)
        case.check_backward(gradients, dy, x, (mean, rstd), weight, EPS, running)
        converted = [None if a is None else a.astype(compute_dtype(dtype)) for a in (weight, bias)]
        bounds.assert_same_bits(y, case.plain(x, *converted, eps=EPS, **more))
        others = case.backward(dy, x, mean, rstd, converted[0], grad_dtype=np.float64)
        bounds.assert_same_bits(gradients[0], others[0])
        for a, b in zip(gradients[1:], others[1:]):
            assert (a is None) == (b is None)
            if a is not None:
                bounds.assert_same_bits(a, b.astype(weight.dtype))  # one rounding of the sum, from float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", ["C", "strided"])
def test_large_parameters(rng, dtype, memory):
    """As many parameters as x has elements are converted strip by strip: the bits are those of one conversion."""
    shape = (9, 83, 101)
    assert np.prod(shape) > 65536
    for axes, center in (((2,), True), ((0, 1), True), ((1, 2), False)):
        case = Case("axes" if center else "axes without center", shape, {"axes": axes}, parameter=shape, dtype=dtype)
        x, dy = case.random(rng, 1e2), case.random(rng)
        for dtypes in parameter_dtypes(dtype):
            weight, bias = (MEMORY[memory](a) for a in case.parameters(rng, dtypes=dtypes))
            converted = [MEMORY[memory](a.astype(compute_dtype(dtype))) for a in (weight, bias)]
            y, mean, rstd = case.forward(x, weight, bias, eps=EPS)
            bounds.assert_same_bits(y, case.plain(x, *converted, eps=EPS))
            gradients, others = (case.backward(dy, x, mean, rstd, w, needs=("x",)) for w in (weight, converted[0]))
            bounds.assert_same_bits(gradients[0], others[0])


@pytest.mark.parametrize("isa", _debug.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_long_rows_with_parameters_to_convert(rng, dtype, isa):
    """More parameters than are converted beforehand, one to an element of a row: the bits are those of one
    conversion."""
    n = 70_001
    assert n > 65536
    for rows, norm in product((1, 3), ("layer", "rms")):
        case = Case(norm, (rows, n), {"normalized_shape": (n,)}, dtype=dtype)
        x, dy = case.random(rng, 1e2), case.random(rng)
        for dtypes in parameter_dtypes(dtype):
            weight, bias = case.parameters(rng, dtypes=dtypes)
            converted = [None if a is None else a.astype(compute_dtype(dtype)) for a in (weight, bias)]
            with _debug.force(isa=isa):
                y, mean, rstd = case.forward(x, weight, bias, eps=EPS)
                gradients = case.backward(dy, x, mean, rstd, weight)
            bounds.assert_same_bits(y, case.plain(x, *converted, eps=EPS))
            others = case.backward(dy, x, mean, rstd, converted[0], grad_dtype=np.float64)
            for a, b in zip(gradients, others):
                assert (a is None) == (b is None)
                if a is not None:
                    bounds.assert_same_bits(a, b.astype(a.dtype))


PEAK = """
import resource
import ml_dtypes
import numpy as np
import normkit as nk

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

nk.set_num_threads(1)
shape, dtype = (2048, 2048), np.dtype("{dtype}")
x, dy, out = (np.ones((shape[0], 2 * shape[1]), dtype)[:, ::2] for _ in range(3))
weight, bias = np.ones(shape, "{other}"), np.ones(shape, "{other}")
for rows in (8, shape[0]):
    before = peak()
    a, g, o, w, b = (array[:rows] for array in (x, dy, out, weight, bias))
    _, mean, rstd = nk.normalize_forward(a, 1, w, b, out=o)
    nk.normalize_backward(g, a, mean, rstd, 1, w, needs=("x",), out=o)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory in Linux's units")
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_array_is_copied_as_a_whole(dtype):
    """Strided arrays of 4 million elements and as many parameters to convert: no copy of any, by the process's peak."""
    other = "float32" if bounds.is_double(dtype) else "float64"
    code = PEAK.format(dtype=dtype, other=other)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    smallest_copy = 2048 * 2048 * 2
    assert int(run.stdout) < smallest_copy / 2


# --- dtypes of gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_grad_dtype(rng, norm, dtype):
    """None: the weight's, x's where there is none; float32 and float64 on request. dx has x's whatever is asked."""
    for case in with_evaluation(layouts(((4, 6, 35),), (norm,))):
        case = replace(case, dtype=dtype)
        x, dy = case.random(rng, 1.0), case.random(rng)
        running = None if case.training else case.running(rng)
        for weight_dtype in dict.fromkeys((None, dtype, "float32", "float64")):
            weight, _ = case.parameters(rng, dtypes=(weight_dtype or dtype,) * 2)
            weight = None if weight_dtype is None else weight
            _, mean, rstd = case.forward(x, weight, eps=EPS, **given(case, running))
            plain = case.backward(dy, x, mean, rstd, weight)
            finest = case.backward(dy, x, mean, rstd, weight, grad_dtype=np.float64)
            for grad_dtype in (None, np.float32, np.float64, "float32", np.dtype("float64")):
                gradients = case.backward(dy, x, mean, rstd, weight, grad_dtype=grad_dtype)
                case.check_backward(gradients, dy, x, (mean, rstd), weight, EPS, running, grad_dtype)
                bounds.assert_same_bits(gradients[0], plain[0])
                for a, b in zip(gradients[1:], finest[1:]):
                    if a is not None:
                        bounds.assert_same_bits(a, b.astype(a.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_ten_thousand_rows_of_ones(dtype, order):
    """Sums of parameters don't stop where the data's dtype no longer counts by one: at 256 in bfloat16, 2048 in
    float16."""
    rows = 10_000
    ones = np.ones((rows, 33), dtype, order=order)
    for grad_dtype in (None, np.float32, np.float64):
        expected = np.array(rows).astype(grad_dtype or dtype)
        if grad_dtype or dtype != "bfloat16":
            assert expected == rows  # which bfloat16 does not hold
        _, rstd = nk.rms_norm_forward(ones, 33, eps=0.0)
        _, dweight = nk.rms_norm_backward(ones, ones, rstd, 33, grad_dtype=grad_dtype)
        _, mean, rstd = nk.layer_norm_forward(ones, 33)
        _, _, dbias = nk.layer_norm_backward(ones, ones, mean, rstd, 33, grad_dtype=grad_dtype)
        batch = {"training": False, "grad_dtype": grad_dtype}
        _, *per_channel = nk.batch_norm_backward(ones, ones, np.zeros(33), np.ones(33), **batch)
        for gradient in (dweight, dbias, *per_channel):
            bounds.assert_same_bits(gradient, np.full(33, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_many_elements_of_a_channel(dtype, channel_axis):
    """100,000 ones: in float32 and float64 exactly that; float16 ends at 65504, and bfloat16 has 8 digits (binary)."""
    ones = np.ones((10, 3, 10_000) if channel_axis == 1 else (10, 10_000, 3), dtype)
    for grad_dtype in (None, np.float32, np.float64):
        given = {"training": False, "channel_axis": channel_axis, "grad_dtype": grad_dtype}
        _, *gradients = nk.batch_norm_backward(ones, ones, np.zeros(3), np.ones(3), **given)
        with np.errstate(over="ignore"):
            expected = np.full(3, np.array(100_000).astype(grad_dtype or dtype))
        assert np.isinf(expected).all() == (grad_dtype is None and dtype == "float16")
        for gradient in gradients:
            bounds.assert_same_bits(gradient, expected)


def rounded(v, dtype):
    """Numbers of float64 to the nearest of `dtype`, ties to even."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.maximum(np.frexp(np.abs(v))[1] - 1, info.minexp)
    nearest = np.ldexp(np.rint(np.ldexp(v, info.nmant - exponent)), exponent - info.nmant)
    with np.errstate(over="ignore"):
        return nearest.astype(dtype)


@pytest.mark.parametrize("isa", _debug.isas())
@pytest.mark.parametrize("dtype", HALVES)
def test_sums_of_blocks_are_rounded_once(dtype, isa):
    """Sums halfway between two numbers of 16 bits, and so close to that that float32 would not see the difference."""
    normal = finite_patterns(dtype)
    normal = normal[np.abs(normal.astype(np.float64)) >= 2.0**-12].astype(np.float64)
    half = np.ldexp(1.0, np.frexp(normal)[1] - 2 - ml_dtypes.finfo(dtype).nmant)
    rows = np.zeros((33, 3, len(normal)), dtype)  # of three blocks: float32 adds up each, float64 the blocks
    rows[0], rows[16] = normal, half
    rows[32] = np.array([[-1], [0], [1]]) * 2.0**-24
    dy = rows.reshape(33, -1)
    sums = rows.astype(np.float64).sum(axis=0).ravel()
    expected = rounded(sums, dtype)
    with np.errstate(over="ignore"):
        by_way_of_float32 = sums.astype(np.float32).astype(dtype)
    assert (expected != by_way_of_float32).sum() > 1000
    weight = np.ones(dy.shape[1], dtype)
    mean, rstd = np.zeros(33), np.ones(33)
    with _debug.force(isa=isa):
        _, _, dbias = nk.layer_norm_backward(dy, np.zeros_like(dy), mean, rstd, dy.shape[1], weight)
    bounds.assert_same_bits(dbias, expected)


# --- conversions ----------------------------------------------------------------------------------------------------


def patterns(dtype):
    """Every number of 16 bits."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


def finite_patterns(dtype):
    with np.errstate(invalid="ignore"):  # signalling NaN
        return patterns(dtype)[np.isfinite(patterns(dtype))]


def identity(x, out=None):
    """An evaluation whose every step is exact; the bias -0 leaves the sign of -0 alone."""
    channels = x.shape[-1]
    return nk.batch_norm(
        x, np.zeros(channels), np.ones(channels), None, np.full(channels, -0.0, np.float32), eps=0.0,
        channel_axis=-1, out=out,
    )  # fmt: skip


@pytest.mark.parametrize("isa", _debug.isas())
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("memory", ["C", "F", "negative", "strided", "misaligned"])
def test_every_bit_pattern_comes_through(dtype, isa, memory):
    """To the type of arithmetic and back: every number is itself, subnormals, -0 and infinities too; NaN stays NaN."""
    with _debug.force(isa=isa):
        for shape in ((2**16, 1), (2**8, 2**8), (2**13, 2**3), (2**3, 2**13)):
            x = MEMORY[memory](patterns(dtype).reshape(shape))
            bounds.assert_same_bits(identity(x), x)
            assert _debug.last_path()["isa"] == isa
            out = MEMORY[memory](np.zeros(shape, dtype))
            bounds.assert_same_bits(identity(x, out), x)
        tails = patterns(dtype)[: 65535 // 7 * 7].reshape(-1, 7)
        bounds.assert_same_bits(identity(tails), tails)


@pytest.mark.parametrize("isa", _debug.isas())
@pytest.mark.parametrize("dtype", HALVES)
def test_without_bias_negative_zero_becomes_zero(dtype, isa):
    """-0 + 0 = 0, as IEEE addition has it; all else is the same."""
    x = patterns(dtype).reshape(2**8, 2**8)
    with _debug.force(isa=isa):
        y = nk.batch_norm(x, np.zeros(2**8), np.ones(2**8), eps=0.0)
    bounds.assert_same_bits(y, np.where(x.view(np.uint16) == 2**15, np.zeros((), dtype), x))


def weights_to_round(rng, dtype):
    """float32 numbers: any bits, any exponent, and for all neighbours in `dtype` the middle and what is beside it."""
    any_bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    limits = ml_dtypes.finfo(dtype)
    exponents = rng.integers(limits.minexp - limits.nmant - 2, limits.maxexp + 1, 100_000)
    in_range = np.ldexp(rng.uniform(-2, 2, exponents.size), exponents)
    numbers = np.append(finite_patterns(dtype).astype(np.float64), [-(2.0**limits.maxexp), 2.0**limits.maxexp])
    numbers = np.unique(numbers)
    with np.errstate(over="ignore"):
        middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
        rest = in_range.astype(np.float32)
    beside = [np.nextafter(middles, np.float32(to)) for to in (-np.inf, np.inf)]
    weights = np.concatenate([any_bits, rest, middles, *beside])
    return weights[np.isfinite(weights) & (weights != 0)]


@pytest.mark.parametrize("isa", _debug.isas())
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("walk", ["rows", "columns"])
def test_rounding_to_nearest_even(rng, dtype, isa, walk):
    """x = 1 and -1 give y = weight and -weight, rounded as NumPy and ml_dtypes round: ties, overflow, subnormals."""
    weight = weights_to_round(rng, dtype)
    x = np.repeat(np.array([1, -1], dtype), weight.size).reshape(2, -1)
    with np.errstate(over="ignore"):
        expected = np.stack([weight, -weight]).astype(dtype)
    bias = np.full(weight.size, -0.0, np.float32)  # leaves the sign of what underflows
    with _debug.force(isa=isa):
        if walk == "columns":
            y = nk.batch_norm(x, np.zeros(weight.size), np.ones(weight.size), weight, bias, eps=0.0)
        else:  # a row of ones has itself for xhat
            y = nk.normalize(x, 1, weight, bias, eps=0.0, center=False)
            assert _debug.last_path()["walk"] == "rows"
        assert _debug.last_path()["isa"] == isa
    bounds.assert_same_bits(y, expected)
    assert np.isinf(y).any() and (y == 0).any() and np.isfinite(y).any()


@pytest.mark.parametrize("dtype", HALVES)
def test_parameters_of_16_bits_are_themselves(dtype):
    """Every pattern as a bias, every finite one as a weight."""
    numbers = patterns(dtype)
    x = np.full((1, 2**16), -0.0, dtype)
    y = nk.batch_norm(x, np.zeros(2**16), np.ones(2**16), None, numbers, eps=0.0)
    bounds.assert_same_bits(y[0], numbers)
    numbers = finite_patterns(dtype)
    x = np.ones((1, numbers.size), dtype)
    y = nk.batch_norm(x, np.zeros(numbers.size), np.ones(numbers.size), numbers, eps=0.0)
    np.testing.assert_array_equal(y[0].astype(np.float32), numbers.astype(np.float32))


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_rounded_once(rng, dtype):
    """dbias of two rows is their sum: taken to 16 bits to the nearest, ties to even; in float32 as it is."""
    numbers = finite_patterns(dtype)
    dy = np.stack([numbers, rng.permutation(numbers)])
    exact = dy.astype(np.float64).sum(0)
    _, _, dbias = nk.batch_norm_backward(dy, dy, np.zeros(numbers.size), np.ones(numbers.size), training=False)
    assert dbias.dtype == dtype
    bound = bounds.half_ulp(dtype, np.minimum(np.abs(exact), bounds.largest(dtype)))
    bounds.assert_within("dbias", dbias, exact, bound)
    ties = np.stack([np.ones(4), [0, 1, 2, 3]]) * [[2.0], [float(ml_dtypes.finfo(dtype).eps)]]
    _, _, dbias = nk.batch_norm_backward(*[ties.astype(dtype)] * 2, np.zeros(4), np.ones(4), training=False)
    np.testing.assert_array_equal(dbias.astype(np.float64), 2 + np.array([0, 0, 1, 2]) * 2 * float(
        ml_dtypes.finfo(dtype).eps
    ))  # fmt: skip


# --- float64 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 33, 200])
@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("center", [True, False])
def test_float64_against_fractions(rng, n, ratio, center):
    """The bound of float64 where no type of the machine has more digits: rows and columns, against exact numbers."""
    values = lines(rng, n, ratios=(ratio,), dtype="float64")
    xhat = np.array([exact_xhat(row, center, EPS) for row in values])
    bound = bounds.FLOAT64 * np.maximum(1.0, np.abs(xhat))
    for x in (values, np.asfortranarray(values)):
        bounds.assert_within("y", nk.normalize(x, 1, eps=EPS, center=center), xhat, bound)


def test_float64_is_not_computed_in_float32(rng):
    """Parameters, statistics and data that differ from their float32 neighbours make a difference."""
    case = Case("batch", (50, 3), {"channel_axis": 1}, dtype="float64")
    x, (weight, bias), dy = case.random(rng), case.parameters(rng), case.random(rng)
    y, mean, rstd = case.forward(x, weight, bias)
    for arguments in ((x.astype("f4").astype("f8"), weight, bias), (x, weight.astype("f4"), bias),
                      (x, weight, bias.astype("f4"))):  # fmt: skip
        assert (case.plain(*arguments) != y).mean() > 0.9
    dx = case.backward(dy, x, mean, rstd, weight)[0]
    assert (case.backward(dy.astype("f4").astype("f8"), x, mean, rstd, weight)[0] != dx).all()


# --- running statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("buffers", ["float32", "float64"])
@pytest.mark.parametrize("norm", WITH_RUNNING)
def test_running_statistics_that_make_no_sense(rng, norm, buffers, dtype):
    """A negative variance raises; a NaN is data, and stays in its channel."""
    case = Case(norm, (4, 3, 50), {"channel_axis": 1}, training=False, dtype=dtype)
    x, (mean, var) = case.random(rng), case.running(rng, dtype=buffers)
    clean = case.plain(x, running_mean=mean, running_var=var)
    for which, poison in ((0, np.nan), (1, np.nan), (0, np.inf)):
        running = [mean.copy(), var.copy()]
        running[which][1] = poison
        y = case.plain(x, running_mean=running[0], running_var=running[1])
        assert (~np.isfinite(y[:, 1])).all()
        bounds.assert_same_bits(y[:, ::2], clean[:, ::2])
    var[1] = -1e-3
    with pytest.raises(ValueError, match="running_var"):
        case.plain(x, running_mean=mean, running_var=var)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("buffers", ["float32", "float64"])
@pytest.mark.parametrize("norm", WITH_RUNNING)
def test_running_statistics_of_calls_that_raise(rng, norm, buffers, dtype):
    """They are as they were, and so is `out`."""
    case = Case(norm, (4, 3, 50), {"channel_axis": 1}, dtype=dtype)
    x, running = case.random(rng), case.running(rng, dtype=buffers)
    out, before = np.full(case.shape, 7, dtype), [a.copy() for a in running]
    more = {"running_mean": running[0], "running_var": running[1], "out": out}
    wrong = [
        {"weight": np.ones(4, dtype)}, {"bias": np.ones((3, 1), dtype)}, {"eps": -1.0}, {"momentum": np.nan},
        {"ddof": -1}, {"ddof": case.set_size}, {"ddof": np.nan}, {"weight": np.ones(3, np.int32)},
    ]  # fmt: skip
    for arguments in wrong:
        parameters = {name: arguments.get(name) for name in ("weight", "bias")}
        rest = {name: value for name, value in arguments.items() if name not in parameters}
        with pytest.raises((ValueError, TypeError)):
            case.plain(x, *parameters.values(), **more, **rest)
        for a, b in zip(running, before):
            bounds.assert_same_bits(a, b)
        np.testing.assert_array_equal(out.astype(np.float64), 7.0)
    case.plain(x, **more)
    assert all((a != b).all() for a, b in zip(running, before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_float64(rng, dtype):
    """And they are taken as such again: far from zero, a mean rounded to float32 would give another dx."""
    x = random(rng, (5, 300), dtype=dtype, offset=ratios(dtype)[-1])
    _, mean, rstd = nk.layer_norm_forward(x, 300)
    assert mean.dtype == rstd.dtype == np.float64
    assert (mean != mean.astype(np.float32)).any() and (rstd != rstd.astype(np.float32)).any()
    if ratios(dtype)[-1] == 1e6:
        dy = random(rng, x.shape, dtype=dtype)
        dx, other = (nk.layer_norm_backward(dy, x, m, rstd, 300)[0] for m in (mean, mean.astype("f4").astype("f8")))
        assert (dx != other).mean() > 0.9


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "bfloat16"])
def test_native_order_named_outright(rng, dtype):
    """'<f4' on a little-endian machine is float32, though the dtype object is another one."""
    x = random(rng, (4, 6)).astype(dtype)
    outright = x.view(x.dtype.newbyteorder("<" if sys.byteorder == "little" else ">"))
    y = nk.layer_norm(outright, 6, outright[0], out=np.empty_like(outright))
    bounds.assert_same_bits(y, nk.layer_norm(x, 6, x[0]))
