"""Memory: any strides in, memory order kept, results into a given `out`; inputs are never written."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import bounds
import normkit as nk
from cases import DTYPES, MEMORY, NORMS, Case, ids, in_every_dtype, layouts, random, with_evaluation
from normkit import _debug

EPS = 1e-5
CASES = layouts(((33, 12), (3, 4, 37), (2, 6, 5, 7)))
EVERY = with_evaluation(CASES)
SOME = in_every_dtype(EVERY[::2], 7)


def base_of(a):
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a


class Unchanged:
    """The whole memory under some arrays, gaps included, is as it was."""

    def __init__(self, *arrays):
        self.bases = [base_of(a) for a in arrays if a is not None]
        self.before = [base.tobytes() for base in self.bases]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        assert kind or [base.tobytes() for base in self.bases] == self.before, "an input was written to"


def example(rng, case):
    x, dy = case.random(rng, 1e2), case.random(rng)
    weight, bias = case.parameters(rng)
    running = None if case.training else case.running(rng, 1.0)
    more = {} if case.training else {"running_mean": running[0], "running_var": running[1]}
    return x, dy, weight, bias, running, more


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("norm", NORMS)
def test_strides_of_x_and_dy(rng, norm, memory):
    for case in in_every_dtype(with_evaluation(layouts(((33, 12), (3, 4, 37), (2, 6, 5, 7)), (norm,))), 4):
        case = replace(case, memory=memory)
        x, dy, weight, bias, running, more = example(rng, case)
        with Unchanged(x, dy, weight, bias, *(running or ())):
            y, mean, rstd = case.forward(x, weight, bias, eps=EPS, **more)
            gradients = case.backward(dy, x, mean, rstd, weight)
        case.check_forward(y, x, weight, bias, EPS, (mean, rstd), running)
        case.check_backward(gradients, dy, x, (mean, rstd), weight, EPS, running)
        for result in (y, gradients[0]):
            assert result.strides == np.empty_like(x).strides
            assert result.flags.owndata and result.flags.writeable and result.flags.aligned


@pytest.mark.parametrize("memory", ["F", "negative", "strided", "shifted", "misaligned"])
@pytest.mark.parametrize("case", SOME, ids=ids(SOME))
def test_strides_of_parameters(rng, case, memory):
    """They have the bits of contiguous ones."""
    x, dy, weight, bias, _, more = example(rng, case)
    other_weight, other_bias = (None if a is None else MEMORY[memory](a) for a in (weight, bias))
    with Unchanged(other_weight, other_bias):
        y, mean, rstd = case.forward(x, other_weight, other_bias, eps=EPS, **more)
        gradients = case.backward(dy, x, mean, rstd, other_weight)
    bounds.assert_same_bits(y, case.plain(x, weight, bias, eps=EPS, **more))
    for a, b in zip(gradients, case.backward(dy, x, mean, rstd, weight)):
        assert (a is None) == (b is None)
        if a is not None:
            bounds.assert_same_bits(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_parameters_of_stride_zero(rng, norm):
    """One number, broadcast to the parameter's shape."""
    for case in in_every_dtype(layouts(((3, 4, 37),), (norm,))):
        x, dy, *_ = example(rng, case)
        weight, bias = (np.broadcast_to(np.array(a, case.dtype), case.weight_shape) for a in (1.5, -0.5))
        bias = bias if case.row.has_bias else None
        y, mean, rstd = case.forward(x, weight, bias, eps=EPS)
        bounds.assert_same_bits(y, case.plain(x, weight.copy(), None if bias is None else bias.copy(), eps=EPS))
        case.check_backward(case.backward(dy, x, mean, rstd, weight), dy, x, (mean, rstd), weight, EPS)


@pytest.mark.parametrize("norm", NORMS)
def test_x_and_dy_of_stride_zero(rng, norm):
    """A broadcast x is read as if it were whole; the results are whole."""
    shape = (6, 4, 10)
    for axis in range(3):
        small = tuple(1 if i == axis else extent for i, extent in enumerate(shape))
        for case in in_every_dtype(layouts((shape,), (norm,)), 2):
            x = np.broadcast_to(random(rng, small, 1e2, dtype=case.dtype), shape)
            dy = np.broadcast_to(random(rng, small, dtype=case.dtype), shape)
            weight, bias = case.parameters(rng)
            y, mean, rstd = case.forward(x, weight, bias, eps=EPS)
            case.check_forward(y, x, weight, bias, EPS, (mean, rstd))
            case.check_backward(case.backward(dy, x, mean, rstd, weight), dy, x, (mean, rstd), weight, EPS)
            assert 0 not in y.strides and y.flags.writeable


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_overlapping_x(rng, norm, dtype):
    """Windows that share memory are fine to read."""
    windows = np.lib.stride_tricks.sliding_window_view(random(rng, (4, 46), 1e2, dtype=dtype), 37, axis=1)[:, ::3]
    assert windows.shape == (4, 4, 37)
    for case in layouts((windows.shape,), (norm,)):
        case = replace(case, dtype=dtype)
        weight, bias = case.parameters(rng)
        with Unchanged(windows):
            y, mean, rstd = case.forward(windows, weight, bias, eps=EPS)
            gradients = case.backward(windows, windows, mean, rstd, weight)
        case.check_forward(y, windows, weight, bias, EPS, (mean, rstd))
        case.check_backward(gradients, windows, windows, (mean, rstd), weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("buffers", [np.float32, np.float64])
def test_a_column_of_a_table_of_records(rng, dtype, buffers):
    """Strides that are no multiple of the element size."""
    table = np.zeros((50, 7), [("tag", np.uint8), ("x", dtype), ("id", np.int16)])
    table["x"] = random(rng, (50, 7), 1e2, dtype=dtype)
    x = table["x"]
    assert x.strides[1] % x.itemsize
    for norm in ("batch", "layer", "rms", "axes"):
        for case in layouts((x.shape,), (norm,)):
            y, mean, rstd = case.forward(x, eps=EPS)
            case.check_forward(y, x, eps=EPS, statistics=(mean, rstd))
            case.check_backward(case.backward(x, x, mean, rstd), x, x, (mean, rstd), eps=EPS)
    running = [np.zeros(7, [("tag", np.uint8), ("statistic", buffers)]) for _ in range(2)]
    plain = [np.zeros(7, buffers) for _ in range(2)]
    nk.batch_norm(x, *(a["statistic"] for a in running), training=True)
    nk.batch_norm(x, *plain, training=True)
    for a, b in zip(running, plain):
        bounds.assert_same_bits(a["statistic"], b)
        assert not a["tag"].any()
    assert not table["tag"].any() and not table["id"].any()


# --- out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", sorted(set(MEMORY) - {"channels first"}))
@pytest.mark.parametrize("case", SOME, ids=ids(SOME))
def test_out(rng, case, memory):
    """`out` of any writable memory is what comes back, its gaps stay, and with x's strides it gets a new array's bits.

    With other strides, x and out may have fewer axes to walk as one, and a set is cut into other leaves.
    """
    x, dy, weight, bias, running, more = example(rng, case)
    y, mean, rstd = case.forward(x, weight, bias, eps=EPS, **more)
    gradients = case.backward(dy, x, mean, rstd, weight)
    with Unchanged(x, dy, weight, bias, *(running or ())):
        for function in (case.plain, case.forward):
            out = MEMORY[memory](np.zeros(case.shape, case.dtype))
            gaps = outside(out)
            result = function(x, weight, bias, eps=EPS, out=out, **more)
            assert (result if function == case.plain else result[0]) is out
            case.check_forward(out, x, weight, bias, EPS, running=running)
            assert outside(out) == gaps
            if out.strides == x.strides:
                bounds.assert_same_bits(out, y)
        out = MEMORY[memory](np.zeros(case.shape, case.dtype))
        gaps = outside(out)
        results = case.backward(dy, x, mean, rstd, weight, out=out)
    assert results[0] is out
    assert outside(out) == gaps
    case.check_backward(results, dy, x, (mean, rstd), weight, EPS, running)
    if out.strides == x.strides:
        for a, b in zip(results, gradients):
            assert (a is None) == (b is None)
            if a is not None:
                bounds.assert_same_bits(a, b)


def outside(a):
    """The memory under an array, with the array's own elements blanked."""
    kept = a.copy()
    a[...] = 0
    memory = base_of(a).tobytes()
    a[...] = kept
    return memory


def a_byte_apart(shape, axis):
    """Floats whose neighbours along `axis` lie a byte too far apart; rows with gaps, the first on a line."""
    strides = [4] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        strides[i] = strides[i + 1] * shape[i + 1] + (i == axis) + 80 * (i == len(shape) - 2)
    memory = np.zeros(strides[0] * shape[0] + 64, np.uint8)
    return np.ndarray(shape, np.float32, memory, -memory.ctypes.data % 64, strides)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("isa", _debug.isas())
def test_elements_may_lie_between_multiples_of_their_size(rng, isa, by_row, axis):
    """Most of them, where the first does not: no store past the caches takes one for a whole vector."""
    x, dy, out = (a_byte_apart((3, 20, 2, 300), axis) for _ in range(3))
    x[...], dy[...] = random(rng, x.shape), random(rng, x.shape)
    for forward, backward in (
        (nk.instance_norm_forward, nk.instance_norm_backward),
        (partial(nk.batch_norm_forward, training=True), nk.batch_norm_backward),
    ):
        y, mean, rstd = forward(x.copy())
        dx = backward(dy.copy(), x.copy(), mean, rstd)[0]
        with _debug.force(isa=isa, threads=1, stream=True, by_row=by_row, resident=True):
            bounds.assert_same_bits(forward(x, out=out)[0], y)
            bounds.assert_same_bits(backward(dy, x, mean, rstd, out=out)[0], dx)


@pytest.mark.parametrize("memory", ["C", "F", "channels last", "negative", "strided", "padded", "misaligned"])
@pytest.mark.parametrize("norm", NORMS)
def test_in_place(rng, norm, memory):
    """out=x, and in backward out=dy or out=x: the bits of a new array."""
    for case in in_every_dtype(with_evaluation(layouts(((33, 12), (3, 4, 37), (2, 6, 50, 37)), (norm,))), 5):
        case = replace(case, memory=memory)
        x, dy, weight, bias, _, more = example(rng, case)
        y, mean, rstd = case.forward(x, weight, bias, eps=EPS, **more)
        gradients = case.backward(dy, x, mean, rstd, weight)
        for name in ("dy", "x"):
            arrays = {"x": case.arrange(x), "dy": case.arrange(dy)}
            results = case.backward(arrays["dy"], arrays["x"], mean, rstd, weight, out=arrays[name])
            assert results[0] is arrays[name]
            bounds.assert_same_bits(arrays["x" if name == "dy" else "dy"], x if name == "dy" else dy)
            for a, b in zip(results, gradients):
                assert (a is None) == (b is None)
                if a is not None:
                    bounds.assert_same_bits(a, b)
        assert case.plain(x, weight, bias, eps=EPS, out=x, **more) is x
        bounds.assert_same_bits(x, y)


@pytest.mark.parametrize("norm", NORMS)
def test_one_array_as_x_and_dy_and_out(rng, norm):
    for case in in_every_dtype(layouts(((3, 4, 37),), (norm,))):
        x = case.random(rng)
        _, mean, rstd = case.forward(x)
        expected = case.backward(x.copy(order="K"), x, mean, rstd)
        results = case.backward(x, x, mean, rstd, out=x)
        for a, b in zip(results, expected):
            if a is not None:
                bounds.assert_same_bits(a, b)


def test_in_place_through_another_view(rng):
    """The same memory with the same strides is x itself, whichever array object it comes in."""
    x = random(rng, (6, 50))
    y = nk.layer_norm(x, 50)
    out = x[:, :]
    assert nk.layer_norm(x, 50, out=out) is out
    bounds.assert_same_bits(x, y)


def test_out_beside_x_in_one_buffer(rng):
    """The other half of a buffer is not x's memory."""
    buffer = random(rng, (12, 50))
    x, out = buffer[:6], buffer[6:]
    before = x.copy()
    y = nk.layer_norm(before, 50)
    assert nk.layer_norm(x, 50, out=out) is out
    bounds.assert_same_bits(out, y)
    bounds.assert_same_bits(x, before)


@pytest.mark.parametrize("norm", NORMS)
def test_memory_order_of_results(rng, norm):
    """Axes lie in memory as those of x do; gaps and directions are not kept."""
    for case in in_every_dtype(layouts(((2, 6, 5, 7),), (norm,))[::3]):
        values = random(rng, case.shape, dtype=case.dtype)
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 3, 1), (1, 0, 3, 2), (2, 0, 1, 3)):
            x = np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
            for view in (x, x[:, ::-1], x[..., ::-1]):
                y, mean, rstd = case.forward(view)
                dx = case.backward(np.ascontiguousarray(view), view, mean, rstd)[0]
                assert y.strides == dx.strides == np.empty_like(view).strides


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_dimensions(rng, dtype):
    shape = (2, 1, 3) + (1,) * 10 + (2, 2, 3)
    x, dy = random(rng, shape, 1e2, dtype=dtype), random(rng, shape, dtype=dtype)
    for norm, options in (
        ("batch", {"channel_axis": 2}),
        ("instance", {"channel_axis": 2}),
        ("group", {"num_groups": 3, "channel_axis": 2}),
        ("layer", {"normalized_shape": shape[3:]}),
        ("rms", {"normalized_shape": shape[1:]}),
        ("axes", {"axes": tuple(range(0, 16, 2))}),
    ):
        case = Case(norm, shape, options)
        y, mean, rstd = case.forward(x, eps=EPS)
        case.check_forward(y, x, eps=EPS, statistics=(mean, rstd))
        case.check_backward(case.backward(dy, x, mean, rstd), dy, x, (mean, rstd), eps=EPS)
