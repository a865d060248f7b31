"""Same bits: for any threads, schedule, instruction set and batch; and the hook proves that the paths differed."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import bounds
import normkit as nk
from cases import (
    DTYPES,
    MEMORY,
    NORMS,
    OTHERS,
    Case,
    channels_last,
    ids,
    in_every_dtype,
    layouts,
    permuted,
    random,
    shifted,
)
from normkit import _core, _debug

EPS = 1e-5
THREADS = (1, 2, 3, 8)

# Several leaves in each set or blocks in each parameter gradient, many sets and few, and work for eight threads.
BIG = [
    Case("batch", (4, 6, 80, 81), {"channel_axis": 1}),
    Case("batch", (4, 6, 80, 81), {"channel_axis": 1}, "channels last"),
    Case("batch", (1, 3, 220, 221), {"channel_axis": 1}),
    Case("batch", (300, 8, 9, 10), {"channel_axis": 1}),
    Case("batch", (7, 601, 7, 7), {"channel_axis": 1}),
    Case("batch", (70, 40, 8, 8), {"channel_axis": 1}),
    Case("batch", (9, 500, 6, 5), {"channel_axis": 1}),
    Case("batch", (140, 70, 4, 4), {"channel_axis": 1}),
    Case("batch", (3, 5000, 3, 3), {"channel_axis": 1}),
    Case("batch", (9000, 8, 2), {"channel_axis": 1}),
    Case("batch", (9, 130, 10, 12), {"channel_axis": 1}),
    Case("batch", (5, 160, 14, 14), {"channel_axis": 1}),
    Case("batch", (6, 90, 17, 17), {"channel_axis": 1}),
    Case("batch", (3, 25, 45, 46), {"channel_axis": 1}),
    Case("batch", (5, 9, 56, 56), {"channel_axis": 1}),
    Case("batch", (4, 12, 13, 700), {"channel_axis": -1}),
    Case("batch", (4100, 33), {"channel_axis": 1}),
    Case("batch", (140_001, 1), {"channel_axis": 1}),
    Case("instance", (2, 3, 160, 161), {"channel_axis": 1}),
    Case("instance", (2, 3, 160, 161), {"channel_axis": 1}, "channels last"),
    Case("group", (2, 8, 96, 97), {"num_groups": 2, "channel_axis": 1}),
    Case("group", (2, 96, 97, 8), {"num_groups": 2, "channel_axis": -1}),
    Case("group", (70, 60, 6, 7), {"num_groups": 20, "channel_axis": 1}),
    Case("group", (1400, 96), {"num_groups": 12, "channel_axis": 1}),
    Case("group", (2, 30, 31, 192), {"num_groups": 2, "channel_axis": -1}),
    Case("group", (1, 12, 13, 2304), {"num_groups": 24, "channel_axis": -1}),
    Case("group", (1, 20, 21, 600), {"num_groups": 2, "channel_axis": -1}),
    Case("group", (1, 6, 8, 55, 56), {"num_groups": 3, "channel_axis": 1}, "channels last"),
    Case("layer", (1500, 97), {"normalized_shape": (97,)}),
    Case("layer", (170, 1003), {"normalized_shape": (1003,)}),
    Case("layer", (90, 1537), {"normalized_shape": (1537,)}),
    Case("layer", (40, 5003), {"normalized_shape": (5003,)}),
    Case("layer", (2, 70_011), {"normalized_shape": (70_011,)}),
    Case("layer", (3, 5, 96, 97), {"normalized_shape": (5, 96, 97)}, "channels last"),
    Case("layer", (1100, 130), {"normalized_shape": (130,)}, "F"),
    Case("layer", (3, 60, 41, 70), {"normalized_shape": (70,)}, "channels first"),
    Case("layer", (5, 70_003), {"normalized_shape": (70_003,)}, "F"),
    Case("group", (9, 12, 50, 51), {"num_groups": 3, "channel_axis": 1}, "F"),
    Case("rms", (1500, 97), {"normalized_shape": (97,)}),
    Case("rms", (40, 5003), {"normalized_shape": (5003,)}),
    Case("rms", (1, 140_011), {"normalized_shape": (140_011,)}),
    Case("axes", (6, 150, 160), {"axes": (0, 2)}),
    Case("axes", (190, 6, 130), {"axes": (0,)}, parameter=(6, 130)),
    Case("axes without center", (6, 150, 160), {"axes": (0, 2)}, parameter=(150, 1)),
]
# In the other dtypes only conversions and the width of vectors differ: a case of each walk and each kind of sum, with
# work for three threads.
BIG_OF_OTHERS = [
    replace(case, dtype=dtype)
    for dtype in OTHERS
    for case in (
        Case("batch", (3, 4, 70, 71), {"channel_axis": 1}),
        Case("batch", (3, 4, 70, 71), {"channel_axis": 1}, "channels last"),
        Case("batch", (8, 130, 7, 7), {"channel_axis": 1}),
        Case("batch", (32, 100, 4, 4), {"channel_axis": 1}),
        Case("group", (42, 60, 4, 5), {"num_groups": 20, "channel_axis": 1}),
        Case("group", (520, 96), {"num_groups": 12, "channel_axis": 1}),
        Case("batch", (3, 90, 14, 14), {"channel_axis": 1}),
        Case("batch", (3, 7, 50, 50), {"channel_axis": 1}),
        Case("group", (2, 17, 16, 96), {"num_groups": 2, "channel_axis": -1}),
        Case("instance", (2, 3, 95, 97), {"channel_axis": 1}, "strided"),
        Case("group", (2, 50, 51, 12), {"num_groups": 3, "channel_axis": -1}),
        Case("layer", (700, 97), {"normalized_shape": (97,)}),
        Case("layer", (750, 70), {"normalized_shape": (70,)}, "F"),
        Case("layer", (2, 30, 41, 24), {"normalized_shape": (24,)}, "channels first"),
        Case("rms", (1, 70_011), {"normalized_shape": (70_011,)}),
        Case("axes", (6, 120, 70), {"axes": (0, 2)}, parameter=(120, 1)),
        Case("axes without center", (120, 6, 70), {"axes": (0,)}, parameter=(6, 70)),
    )
]
EVALUATED = [replace(case, training=False) for case in BIG + BIG_OF_OTHERS if case.row.evaluation is not None]
ALL = BIG + BIG_OF_OTHERS + EVALUATED


def everything(case, x, dy, weight, bias, running=None):
    """All that a forward and a backward give back, as a list of arrays, and the paths they took."""
    more = {} if running is None else {"running_mean": running[0], "running_var": running[1]}
    y, mean, rstd = case.forward(x, weight, bias, eps=EPS, **more)
    paths = [_debug.last_path()]
    gradients = case.backward(dy, x, mean, rstd, weight)
    paths.append(_debug.last_path())
    return [a for a in (y, mean, rstd, *gradients) if a is not None], paths


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        bounds.assert_same_bits(a, b)


def example(rng, case):
    x, dy = case.random(rng, 1e2), case.random(rng)
    return x, dy, *case.parameters(rng), None if case.training else case.running(rng)


def test_every_norm_is_here():
    assert {case.norm for case in BIG} == set(NORMS)


RUNNING = [case for case in BIG + BIG_OF_OTHERS if case.row.evaluation is not None]
NAMES = ("split", "resident", "stream", "by_row", "by_sample")
SWITCHES = [dict(zip(NAMES, (*values, False, not values[0]))) for values in product((False, True), repeat=3)]
SWITCHES += [dict(zip(NAMES, (False, True, stream, True, False))) for stream in (False, True)]


def forced_paths(case):
    threads = THREADS if case.dtype == "float32" else (1, 3)
    return product(_debug.isas(), threads, SWITCHES)


def taken(walk, split, resident, stream, by_row, by_sample):
    """What these switches come to: a split set is in no one's cache, and columns that are streamed are split."""
    return {
        "split": split or (walk == "columns" and not resident),
        "resident": resident and not split,
        "stream": stream,
        "by_sample": by_sample and walk == "columns" and not resident,
    }


@pytest.mark.parametrize("case", ALL, ids=ids(ALL))
def test_same_bits_on_every_path(rng, case):
    """Every instruction set, number of threads, split or not, resident or streamed, both kinds of store."""
    arguments = example(rng, case)
    with _debug.force(isa=_debug.isas()[0], threads=1, split=False, resident=True, stream=False, by_row=False):
        expected, _ = everything(case, *arguments)
    for isa, threads, forced in forced_paths(case):
        with _debug.force(isa=isa, threads=threads, **forced):
            results, paths = everything(case, *arguments)
        same(results, expected)
        for path in paths:
            assert path["isa"] == isa
            assert path["threads"] == threads
            assert path["stream"] == forced["stream"]
            assert forced["by_row"] or not path["by_row"]
            if case.training:  # evaluation has no moments to share or to keep
                assert path == {**path, **taken(path["walk"], **forced)}
    same(everything(case, *arguments)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 16, 24, 40, 48, 64, 80, 100, 200, 640, 1001, 1025, 1040, 1680, 2051])
def test_same_bits_wherever_results_lie(rng, dtype, lanes):
    """Down the rows: results that begin within a line, on both kinds of store, and nothing beside them is written.

    Rows that follow each other, and rows with gaps in between, of what is read and what is written.
    """
    rows, margin = 37, 128
    dtype = np.dtype(dtype)
    x, dy, weight, bias = (random(rng, shape, dtype=dtype.name) for shape in [(rows, lanes)] * 2 + [(lanes,)] * 2)
    mean, var = random(rng, (lanes,)), np.full(lanes, 2, np.float32)
    rstd = 1 / np.sqrt(var.astype(np.float64))
    apart = [np.zeros((rows, lanes + 3), dtype)[:, :lanes] for _ in range(2)]
    apart[0][:], apart[1][:] = x, dy
    calls = (
        lambda x, dy, out: nk.batch_norm(x, None, None, weight, bias, True, out=out),
        lambda x, dy, out: nk.batch_norm(x, mean, var, weight, bias, out=out),
        lambda x, dy, out: nk.batch_norm_backward(dy, x, mean.astype(np.float64), rstd, weight, out=out)[0],
    )
    for call in calls:
        with _debug.force(stream=False):
            expected = call(x, dy, None)
        for isa, stream in product(_debug.isas(), (False, True)):
            for past, gap in product((0, dtype.itemsize, 16, 48), (0, 3)):
                row = (lanes + gap) * dtype.itemsize
                memory = np.full(rows * row + 2 * margin, 0xA5, np.uint8)
                first = -memory.ctypes.data % 64 + past
                all_rows = memory[first : first + rows * row].reshape(rows, row)
                out = all_rows[:, : x.nbytes // rows].view(dtype)
                with _debug.force(isa=isa, stream=stream):
                    same([call(x, dy, out)], [expected])
                    same([call(*apart, None)], [expected])
                out.view(np.uint8)[:] = 0xA5
                assert (memory == 0xA5).all()


def test_few_channels_last_go_past_the_caches():
    """Where rows of the result follow each other and come from memory; on the paths that the tests above force."""

    def streamed(rows, out=None):
        x = np.ones((rows, 3), np.float32)
        with _debug.force(threads=1):
            y = nk.batch_norm(x, np.ones(3), np.ones(3), out=out)
        assert not y.any()
        return _debug.last_path()["stream"]

    assert streamed(1 << 20)
    assert not streamed(1 << 18)
    assert not streamed(1 << 20, np.empty((1 << 20, 4), np.float32)[:, :3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [50, 64, 128, 129, 256, 391, 1000, 2049, 4100])
@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
def test_same_bits_wherever_rows_lie(rng, norm, lanes, dtype):
    """Rows and images that begin and end within a vector are put together across their ends, in every kind of pass.

    One set in the midst has to be scaled, and interrupts the run of rows; in wider arrays there are gaps between rows.
    """
    dtype = np.dtype(dtype)
    shape = (5, 7, lanes) if norm == "batch" else (35, lanes)
    x, dy = (random(rng, shape, dtype=dtype.name) for _ in range(2))
    x[..., 3, :] *= np.array(2.0**-120 if dtype.name in ("float32", "bfloat16", "float64") else 1, dtype)
    weight, bias = (random(rng, shape[1:2], dtype=dtype.name) for _ in range(2))
    last = () if norm == "batch" else (lanes,)
    statistics = (None, None) if norm == "batch" else ()
    parameters = (weight,) if norm == "rms" else (weight, bias)
    forward, backward = getattr(nk, f"{norm}_norm_forward"), getattr(nk, f"{norm}_norm_backward")
    more = (True,) if norm == "batch" else ()
    with _debug.force(stream=False, by_row=False):
        y, *moments = forward(x, *statistics, *last, *parameters, *more, eps=0.0)
        expected = [y, backward(dy, x, *moments, *last, weight)[0]]
    calls = (
        lambda out: forward(x, *statistics, *last, *parameters, *more, eps=0.0, out=out)[0],
        lambda out: backward(dy, x, *moments, *last, weight, out=out)[0],
    )
    if norm == "batch":
        mean, var = random(rng, (7,)), np.full(7, 2, np.float32)
        calls += (lambda out: nk.batch_norm(x, mean, var, weight, bias, out=out),)
        with _debug.force(stream=False):
            expected.append(calls[-1](None))
    isas = _debug.isas() if dtype == np.float32 else _debug.isas()[-1:]
    for isa, threads, by_row, past, gap in product(isas, (1, 3), (False, True), (0, dtype.itemsize, 16), (0, 5)):
        width = lanes + gap
        memory = np.full((x.nbytes // lanes * width) + 256, 0xA5, np.uint8)
        first = -memory.ctypes.data % 64 + past
        wide = memory[first : first + x.nbytes // lanes * width].view(dtype).reshape(*shape[:-1], width)
        out = wide[..., :lanes]
        for call, result in zip(calls, expected):
            memory[:] = 0xA5
            with _debug.force(isa=isa, threads=threads, stream=True, by_row=by_row, resident=True, split=False):
                same([call(out)], [result])
            assert (memory[:first] == 0xA5).all() and (memory[first + wide.nbytes :] == 0xA5).all()
            assert (wide[..., lanes:].copy().view(np.uint8) == 0xA5).all()


def placed(a, past, gap=0):
    """A copy that begins `past` bytes behind a line, with `gap` bytes between its rows."""
    rows, width = a.size // a.shape[-1], a.shape[-1] * a.itemsize + gap
    memory = np.zeros(rows * width + 128, np.uint8)
    first = -memory.ctypes.data % 64 + past
    strides = (width, a.itemsize) if a.ndim == 2 else (a.itemsize,)
    view = np.ndarray(a.shape, a.dtype, memory, first, strides)
    view[...] = a
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [512, 768, 1000, 1024, 1037, 1792, 2048, 2049, 3072, 4096, 6151])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_same_bits_wherever_x_and_parameters_lie(rng, norm, lanes, dtype):
    """Past the caches, vectors begin where lines of x do, and not with the row; sums are none the wiser.

    Rows are whole lines or not, with gaps or without; weight and bias lie as x does, or not.
    """
    x, dy = (random(rng, (41, lanes), dtype=dtype) for _ in range(2))
    x[3] += 1000
    if dtype != "float16":  # rounding that would tell another order of additions, also of doubles
        x[9] = x[9].astype(np.float64) * 2.0 ** rng.integers(-40, 40, lanes)
        x[21] *= np.array(2.0**-120, x.dtype)  # has to be scaled
    x[17, 5::7] = 0
    weight, bias = (random(rng, (lanes,), dtype=np.result_type(dtype, "float32")) for _ in range(2))
    forward, backward = getattr(nk, f"{norm}_norm_forward"), getattr(nk, f"{norm}_norm_backward")

    def run(x, dy, weight, bias, past=0):
        y, *moments = forward(x, (lanes,), weight, *([bias] if norm == "layer" else []), out=placed(x, past))
        path = _debug.last_path()
        return [y, *moments, *backward(dy, x, *moments, (lanes,), weight, out=placed(x, past))], path

    with _debug.force(isa=_debug.isas()[0], stream=False, by_row=False):
        expected, _ = run(x, dy, weight, bias)
    isas = _debug.isas() if dtype == "float32" else _debug.isas()[-1:]
    size = x.itemsize
    for isa, threads, past_x, past_y, past_w in product(isas, (1, 2), (0, size, 16, 64 - size), (0, 16), (0, 8)):
        gap = {0: 0, size: 64, 16: 0, 64 - size: size}[past_x]
        arrays = placed(x, past_x, gap), placed(dy, past_x, gap), placed(weight, past_w), placed(bias, past_w)
        with _debug.force(isa=isa, threads=threads, stream=True, by_row=True, resident=True, split=False):
            got, path = run(*arrays, past_y)
        assert path["stream"] and path["by_row"]
        # In parts: rows of two leaves that differ, and those without a mean of two and more.
        lines = lanes * size % 64 == 0
        parts = 2048 < lanes < 4096 and (lines or lanes >= 2560) if norm == "layer" else lanes >= 4096 and lines
        assert path["in_parts"] == (parts and size >= 4)
        same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "lanes"), [(1, 300), (1, 5000), (2, 2100), (3, 2064), (16, 4999), (17, 2100)])
def test_gradients_of_few_long_rows(rng, rows, lanes, dtype):
    """What so few rows add up to goes straight to the gradients, on lines or beside them, in the gradients' dtype."""
    dtype = np.dtype(dtype)
    whole = [random(rng, (rows * lanes + 64,), dtype=dtype.name) for _ in range(2)]

    def results(weight, past, grad_dtype, needs=("x", "weight", "bias")):
        """Of the same numbers, and into a result, that begin so many elements past a line."""
        arrays = []
        for array in (*whole, whole[0]):
            memory = np.empty(array.nbytes + 64, np.uint8)
            first = -memory.ctypes.data % 64 + past * dtype.itemsize
            placed = memory[first : first + rows * lanes * dtype.itemsize].view(dtype).reshape(rows, lanes)
            placed[...] = array[: rows * lanes].reshape(rows, lanes)
            arrays.append(placed)
        x, dy, dx = arrays
        _, mean, rstd = nk.layer_norm_forward(x, (lanes,), weight, weight)
        out = dx if "x" in needs else None
        return nk.layer_norm_backward(dy, x, mean, rstd, (lanes,), weight, needs=needs, grad_dtype=grad_dtype, out=out)

    for of, grad_dtype in product(dict.fromkeys((dtype.name, "float32")), (None, np.float32, np.float64)):
        if dtype == np.float64 and (of, grad_dtype) != ("float64", None):
            continue
        weight = random(rng, (lanes,), dtype=of)
        with _debug.force(isa=_debug.isas()[0], threads=1, stream=False, split=True):
            expected = results(weight, 0, grad_dtype)
        for isa, threads, stream, past in product(_debug.isas(), (1, 3), (False, True), (0, 4, 5)):
            with _debug.force(isa=isa, threads=threads, stream=stream):
                same(results(weight, past, grad_dtype), expected)
                same(results(weight, past, grad_dtype, ("x", "bias"))[::2], expected[::2])
                same(results(weight, past, grad_dtype, ("weight",))[1:2], expected[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", [1, 5, 16, 33, 600, 2051])
def test_gradients_across_lanes(rng, pixels, dtype):
    """Layer norm over the channels of NCHW: neighbours in memory have means of their own and share their weight.

    The same bits wherever dy lies, and on every instruction set; with sets so small that they are scaled.
    """
    case = Case("layer", (3, pixels, 1, 19), {"normalized_shape": (19,)}, "channels first", dtype=dtype)
    for least in (1.0, {"float32": 1e-20, "bfloat16": 1e-20, "float64": 1e-160}.get(dtype, 1.0)):
        x, dy = case.random(rng, 1e2), case.random(rng)
        x[1, : pixels // 2] *= np.asarray(least, x.dtype)
        weight, _ = case.parameters(rng)
        _, mean, rstd = case.forward(x, eps=0.0)
        gradients = case.backward(dy, x, mean, rstd, weight)
        case.check_backward(gradients, dy, x, (mean, rstd), weight, 0.0)
        for isa, memory, threads in product(_debug.isas(), ("channels first", "C", "strided"), (1, 3)):
            elsewhere = replace(case, memory=memory).arrange(dy)
            with _debug.force(isa=isa, threads=threads):
                same(case.backward(elsewhere, x, mean, rstd, weight)[1:], gradients[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 7), (33, 65, 7, 7), (9, 5, 14, 14), (67, 4, 14, 14), (20, 6, 16, 16), (5, 7, 17, 17)]
)
def test_neighbouring_small_images(rng, shape, dtype):
    """Channels whose short runs lie side by side are summed together; those with gaps between are not, nor pieces."""
    x, dy = (random(rng, shape, dtype=dtype) for _ in range(2))
    x[:, 1] = 2  # constant
    weight = random(rng, shape[1:2], dtype=dtype)

    def results(x, dy):
        _, mean, rstd = nk.batch_norm_forward(x, None, None, weight, training=True)
        return [mean, rstd, *nk.batch_norm_backward(dy, x, mean, rstd, weight)]

    with _debug.force(isa=_debug.isas()[0], threads=1, stream=False, split=True):
        expected = results(*(np.repeat(array, 2, axis=1)[:, ::2] for array in (x, dy)))
    isas = _debug.isas() if dtype == "float32" else _debug.isas()[-1:]
    for isa, threads, stream, split in product(isas, (1, 2), (False, True), (False, True)):
        with _debug.force(isa=isa, threads=threads, stream=stream, split=split):
            same(results(x, dy), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [3, 16, 33, 64, 100, 128, 257, 512, 700, 1024, 1025])
@pytest.mark.parametrize("norm", ["layer", "rms", "instance"])
def test_short_rows_in_eights(rng, norm, lanes, dtype):
    """Eight rows at a time, as one by one; among them such as no eight can have: constant, tiny, huge, not finite."""
    dtype, rows = np.dtype(dtype), 403
    wide = dtype.name in ("float32", "bfloat16", "float64")
    x, dy = (random(rng, (rows, lanes), dtype=dtype.name) for _ in range(2))
    x[3] = x[290] = 0
    x[60:70, : lanes // 2] = -x[60:70, -(lanes // 2) :]
    x[140] *= np.array(2.0**-120 if wide else 2.0**-14, dtype)
    x[141, -1], x[230, 0] = np.inf, np.nan
    x[231] = np.array(3e38 if wide else 6e4, dtype)
    of = (rows,) if norm == "instance" else (lanes,)
    weight, bias = (random(rng, of, dtype=dtype.name) for _ in range(2))

    def run(past):
        """Into outputs that begin so many elements past a line."""
        outs = []
        for _ in range(2):
            memory = np.empty(x.nbytes + 128, np.uint8)
            first = -memory.ctypes.data % 64 + past * dtype.itemsize
            outs.append(memory[first : first + x.nbytes].view(dtype).reshape(x.shape))
        if norm == "instance":
            running = [np.zeros(rows, np.float32), np.ones(rows, np.float32)]
            images, out = (a.reshape(1, rows, lanes) for a in (x, outs[0]))
            results = [*nk.instance_norm_forward(images, *running, weight, bias, eps=0.0, out=out)[1:], *running]
        else:
            forward, backward = (getattr(nk, f"{norm}_norm_{name}") for name in ("forward", "backward"))
            biases = (bias,) if norm == "layer" else ()
            results = [*forward(x, lanes, weight, *biases, eps=0.0, out=outs[0])[1:]]
        in_eights = [_debug.last_path()["in_eights"]]
        if norm != "instance":
            results += [a for a in backward(dy, x, *results, lanes, weight, out=outs[1])[1:] if a is not None]
            in_eights.append(_debug.last_path()["in_eights"])
        return [*outs[: len(in_eights)], *results], in_eights

    with np.errstate(all="ignore"), _debug.force(isa=_debug.isas()[0], by_row=False, stream=False, threads=1):
        expected, in_eights = run(0)
    assert not any(in_eights)
    for isa, threads, stream, past in product(_debug.isas(), (1, 3), (False, True), (0, 1)):
        with np.errstate(all="ignore"), _debug.force(isa=isa, threads=threads, stream=stream, split=False):
            results, in_eights = run(past)
        same(results, expected)
        most = 512 // dtype.itemsize * 2 if stream else 1024  # of elements forward; backward half as many
        for arrays, one in enumerate(in_eights, start=1):
            assert one is (dtype.itemsize < 8 and lanes * arrays <= most)


def by_token(a):
    """(batch, head, token, lane) as (batch, token, head, lane) in memory."""
    return np.ascontiguousarray(a.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def packed(a):
    """One of three that lie side by side, those of each head or (by token) of all heads."""
    if not a.flags.c_contiguous:
        return packed(a.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    return np.stack([a, a, a], axis=2)[:, :, 1]


def heads_outside(a):
    """(batch, head, token, lane) as (head, batch, token, lane) in memory, with a gap behind each batch."""
    memory = np.zeros((a.shape[1], a.shape[0], a.shape[2] + 1, a.shape[3]), a.dtype)
    view = memory[:, :, :-1].transpose(1, 0, 2, 3)
    view[...] = a
    return view


HEADS = (lambda a: a, by_token, packed, lambda a: packed(by_token(a)), heads_outside)


@pytest.mark.parametrize("norm", ["layer", "rms", "group"])
@pytest.mark.parametrize(
    ("tokens", "groups", "lanes"), [(100, 6, 64), (533, 3, 17), (1100, 5, 24), (21, 40, 8), (70, 12, 200)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "wild"])
def test_short_rows_with_gaps_in_eights(rng, norm, tokens, groups, lanes, dtype, plain):
    """Heads of attention as views, and groups of vectors: eight rows at a time along one of their axes.

    If not plain, among them such as no eight can have (then gradients of parameters are mostly NaN). Rows are as in any
    other layout; so are statistics, wherever these belong. Sums over the rows are the same on any path.
    """
    dtype = np.dtype(dtype)
    x, dy = (random(rng, (2, groups, tokens, lanes), dtype=dtype.name) for _ in range(2))
    if plain and dtype.name != "float16":
        # Sums of 16 rows that are far apart: their rounding in double tells another order of additions.
        exponents = rng.integers(-40, 40, (2, groups, tokens // 16 + 1, 1)).repeat(16, axis=2)
        dy *= (2.0 ** exponents[:, :, :tokens]).astype(dtype)
    if not plain:
        x[0, 0, 3] = x[1, -1, tokens - 2] = 0
        x[0, 0, 9, -1], x[1, 0, 11, 0] = np.inf, np.nan
        x[0, 1, 5:8] *= np.array(2.0**-14, dtype)
    of = groups * lanes if norm == "group" else lanes
    weight, bias = (random(rng, (of,), dtype=dtype.name) for _ in range(2))

    def run(lay_out):
        """y, the statistics and the gradients, those of the parameters as they were summed."""
        sums = {"grad_dtype": np.float64}
        if norm == "group":  # a vector a token
            vectors, gradient = (a.transpose(0, 2, 1, 3).reshape(-1, of) for a in (x, dy))
            y, mean, rstd = nk.group_norm_forward(vectors, groups, weight, bias)
            results = [y, mean, rstd, *nk.group_norm_backward(gradient, vectors, mean, rstd, groups, weight, **sums)]
        elif norm == "layer":
            y, mean, rstd = nk.layer_norm_forward(lay_out(x), lanes, weight, bias)
            results = [
                y,
                mean,
                rstd,
                *nk.layer_norm_backward(lay_out(dy), lay_out(x), mean, rstd, lanes, weight, **sums),
            ]
        else:
            y, rstd = nk.rms_norm_forward(lay_out(x), lanes, weight)
            results = [y, rstd, *nk.rms_norm_backward(lay_out(dy), lay_out(x), rstd, lanes, weight, **sums)]
        return results, _debug.last_path()["in_eights"]

    first = None
    assert packed(by_token(x)).strides[1:3] == (x.strides[2], 3 * groups * x.strides[2])
    for lay_out in HEADS if norm != "group" else [None]:
        with np.errstate(all="ignore"), _debug.force(isa=_debug.isas()[0], by_row=False, stream=False, threads=1):
            expected, in_eights = run(lay_out)
        assert not in_eights
        first = first or expected
        # Sums over the rows are in the order of memory.
        same(*([a for a in arrays if a.ndim > 1] for arrays in (expected, first)))
        for isa, threads, stream in product(_debug.isas(), (1, 3), (False, True)):
            with np.errstate(all="ignore"), _debug.force(isa=isa, threads=threads, stream=stream, split=False):
                results, in_eights = run(lay_out)
            same(results, expected)
            # Backward, from memory, rows of 512 bytes at most.
            assert in_eights is (dtype.itemsize < 8 and not (stream and lanes * dtype.itemsize > 512))
        for choices in ({"by_row": False}, {"split": True}, {"resident": False}):
            with np.errstate(all="ignore"), _debug.force(threads=2, **choices):
                same(run(lay_out)[0], expected)


def test_in_eights_is_said_only_where_it_is(rng):
    """Where rows lie side by side, and enough of them; axes that are one in memory are taken for one."""

    def in_eights(call, *shape):
        call(rng.standard_normal(shape).astype(np.float32))
        return _debug.last_path()["in_eights"]

    assert in_eights(lambda x: nk.layer_norm(x, 64), 16, 64)
    assert in_eights(lambda x: nk.layer_norm(x, 64), 2, 3, 4, 64)
    assert not in_eights(lambda x: nk.layer_norm(x, 64), 15, 64)
    assert in_eights(lambda x: nk.layer_norm(x.transpose(1, 0, 2), 64), 20, 30, 64)
    assert in_eights(lambda x: nk.layer_norm(x[:, :15, 1], 64), 20, 16, 3, 64)  # along the first axis
    assert not in_eights(lambda x: nk.layer_norm(x[:, :15, 1], 64), 15, 16, 3, 64)
    assert in_eights(nk.instance_norm, 20, 15, 7, 7)
    assert in_eights(lambda x: nk.instance_norm(x, weight=np.ones(16, np.float32)), 20, 16, 7, 7)
    assert in_eights(lambda x: nk.instance_norm(x, weight=np.ones(15, np.float32)), 20, 15, 7, 7)
    assert not in_eights(lambda x: nk.instance_norm(x, weight=np.ones(15, np.float32)), 15, 15, 7, 7)
    assert in_eights(lambda x: nk.group_norm(x, 16), 2, 32, 4, 4)
    assert not in_eights(lambda x: nk.group_norm(x, 16, np.ones(32, np.float32)), 2, 32, 4, 4)
    assert in_eights(lambda x: nk.group_norm(x, 4, np.ones(32, np.float32)), 20, 32)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    ("of_weight", "of_bias"), [(1, 0.0), (-1, -0.0), (np.inf, 0.0), (3e38, 1.0), (np.nan, 1.0)], ids=str
)
def test_row_by_row_with_extreme_parameters(rng, norm, of_weight, of_bias):
    """Rows without a mean, or with one of exactly 0, add the bias as it is on every path; it says that it was taken."""
    x = rng.standard_normal((40, 96)).astype(np.float32)
    x[::2, 48:] = -x[::2, :48]
    x[1] = -0.0
    weight = (of_weight * rng.choice([1, 1e-3], 96)).astype(np.float32)
    bias = np.full(96, of_bias, np.float32)
    bias_too = (bias,) if norm == "layer" else ()

    def run(by_row):
        with np.errstate(all="ignore"), _debug.force(by_row=by_row, resident=True, split=False):
            results = getattr(nk, f"{norm}_norm_forward")(x, 96, weight, *bias_too)
            assert _debug.last_path()["by_row"] is by_row
            gradients = getattr(nk, f"{norm}_norm_backward")(x[::-1].copy(), x, *results[1:], 96, weight)
            assert _debug.last_path()["by_row"] is by_row
        return [*results, *gradients]

    same(run(True), run(False))


@pytest.mark.parametrize(("of_weight", "of_bias"), [(-1, -0.0), (np.inf, 0.0), (3e38, 1.0)], ids=str)
@pytest.mark.parametrize("shape", [(12, 66, 50), (12, 66, 7, 7), (12, 66, 700), (12, 66, 4, 4), (12, 66, 2)], ids=str)
def test_a_set_that_is_scaled_changes_no_other(rng, shape, of_weight, of_bias):
    """Its neighbours, whose mean is exactly 0, have the same bits beside it as without it, on every path."""
    half = shape[0] // 2
    x = rng.standard_normal(shape).astype(np.float32)
    x[half:] = -x[:half]
    x[0, :, ..., :3] = x[half, :, ..., :3] = -0.0
    weight, bias = np.full(66, of_weight, np.float32), np.full(66, of_bias, np.float32)
    mean, var = np.zeros(66, np.float32), np.ones(66, np.float32)

    def run(scaled):
        data, of_var = x.copy(), var.copy()
        data[:, scaled] *= np.float32(1e-38)
        of_var[scaled] = 1e-40
        with np.errstate(all="ignore"):
            y = nk.batch_norm(data, None, None, weight, bias, True, eps=0)
            evaluated = nk.batch_norm(x, mean, of_var, weight, bias, False, eps=0)
            dx = nk.batch_norm_backward(x, x, mean.astype(float), np.where(of_var < 1, 1e20, 1.0), weight, False)[0]
        return [np.delete(a, [1, 40], 1) for a in (y, evaluated, dx)]

    expected = run([])
    for threads, by_row, resident in product((1, 2, 3), (False, True), (False, True)):
        with _debug.force(threads=threads, by_row=by_row, resident=resident):
            same(run([1, 40]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(3, 9, 10, 192), (3, 192, 9, 10), (3, 192, 2, 2)],
    ids=["channels last", "channels first", "tiny images"],
)
def test_groups_whose_mean_is_zero(rng, shape, dtype):
    """Dead channels (all zero), and such as cancel: the bias is added as it is, on every path, alone and in a batch."""
    axis = -1 if shape[-1] == 192 else 1
    x = np.moveaxis(random(rng, shape, dtype=dtype), axis, -1).copy()
    x[..., :48] = 0
    x[..., 48:96:2], x[..., 49:96:2] = 1, -1
    x = np.ascontiguousarray(np.moveaxis(x, -1, axis))
    weight = np.where(np.arange(192) % 5, -1, np.inf).astype(dtype)
    bias = np.full(192, -0.0, dtype)

    def run(x, **forced):
        with np.errstate(all="ignore"), _debug.force(**forced):
            return nk.group_norm(x, 4, weight, bias, channel_axis=axis)

    expected = run(x, threads=1)
    assert np.signbit(np.moveaxis(expected.astype(float), axis, -1)[..., 1:5]).all()
    for isa, threads, resident, split in product(_debug.isas(), (1, 2, 3), (False, True), (False, True)):
        same([run(x, isa=isa, threads=threads, resident=resident, split=split)], [expected])
    same([run(x[1:2], threads=1)], [expected[1:2]])
    scaled = np.moveaxis(x.copy(), axis, -1)
    scaled[..., 144:] *= 1e30 if dtype in ("float32", "bfloat16") else 1
    same(
        [np.moveaxis(run(np.moveaxis(scaled, -1, axis)), axis, -1)[..., :144]],
        [np.moveaxis(expected, axis, -1)[..., :144]],
    )


@pytest.mark.parametrize("parameters", ["weight", "bias", "neither"])
@pytest.mark.parametrize("lanes", [2049, 5003, 8193])
def test_row_by_row_without_parameters(rng, lanes, parameters):
    x, dy = rng.standard_normal((2, 24, lanes)).astype(np.float32)
    weight = rng.standard_normal(lanes).astype(np.float32) if parameters == "weight" else None
    bias = rng.standard_normal(lanes).astype(np.float32) if parameters == "bias" else None

    def run(by_row):
        with _debug.force(by_row=by_row, resident=True, split=False):
            results = nk.layer_norm_forward(x, lanes, weight, bias)
            assert _debug.last_path()["by_row"] is by_row
            return [*results, *nk.layer_norm_backward(dy, x, *results[1:], lanes, weight)]

    same(run(True), run(False))


def test_row_by_row_is_said_only_where_it_is(rng):
    def by_row(x, weight):
        with _debug.force(by_row=True, resident=True, split=False):
            nk.layer_norm(x, x.shape[-1], weight)
        return _debug.last_path()["by_row"]

    long, strided = np.ones((4, 65_537), np.float32), np.ones((40, 2000), np.float32)[:, ::2]
    assert by_row(long[:, :-1], np.ones(65_536, np.float32))
    assert not by_row(long, np.ones(65_537, np.float32))
    assert by_row(long, None)
    assert not by_row(strided, np.ones(1000, np.float32))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_images_go_row_by_row_backward_where_all_arrays_are_rows(rng, norm):
    case = Case(norm, (3, 4, 9, 40), {"channel_axis": 1, **({"num_groups": 2} if norm == "group" else {})})
    x, dy = (case.random(rng) for _ in range(2))
    _, mean, rstd = case.forward(x)

    def run(dy, by_row=True):
        with _debug.force(by_row=by_row, resident=True, split=False):
            results = case.backward(dy, x, mean, rstd)
        return results, _debug.last_path()["by_row"]

    results, by_row = run(dy)
    assert by_row
    same(results, run(dy, by_row=False)[0])
    assert not run(MEMORY["channels last"](dy))[1]


@pytest.mark.parametrize(
    ("pixels", "channels", "walk"), [(32, 24, "columns"), (31, 24, "rows"), (40, 256, "columns"), (40, 257, "rows")]
)
def test_pixels_of_one_group_are_rows_backward(rng, pixels, channels, walk):
    case = Case("group", (3, pixels, channels), {"num_groups": 1, "channel_axis": -1})
    x, dy = (case.random(rng) for _ in range(2))
    _, mean, rstd = case.forward(x)
    assert _debug.last_path()["walk"] == "rows"
    case.check_backward(case.backward(dy, x, mean, rstd), dy, x, (mean, rstd))
    assert _debug.last_path()["walk"] == walk


def test_both_walks_are_here(rng):
    for norm in NORMS:
        walks = set()
        for case in BIG:
            if case.norm == norm:
                walks |= {path["walk"] for path in everything(case, *example(rng, case))[1]}
        assert "rows" in walks
    assert {path["walk"] for case in BIG for path in everything(case, *example(rng, case))[1]} == {"rows", "columns"}


SMALL = in_every_dtype(layouts(((33, 70), (2, 18, 50), (2, 6, 5, 7), (9, 34, 7, 7), (2, 3, 4, 9, 17))), 4)


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_same_bits_on_every_path_small(rng, case):
    """The same where tails and short runs are most of the work."""
    arguments = example(rng, case)
    expected, _ = everything(case, *arguments)
    for isa in _debug.isas():
        for threads, *switches in (
            (1, 0, 0, 0, 0),
            (1, 1, 1, 1, 0),
            (3, 1, 0, 1, 0),
            (2, 0, 1, 0, 1),
            (1, 0, 1, 1, 1),
            (8, 1, 0, 0, 0),
        ):
            forced = {name: bool(on) for name, on in zip(NAMES, switches)}
            with _debug.force(isa=isa, threads=threads, **forced):
                results, paths = everything(case, *arguments)
            same(results, expected)
            assert all(path["isa"] == isa for path in paths)


@pytest.mark.parametrize("case", ALL, ids=ids(ALL))
def test_run_to_run(rng, case):
    arguments = example(rng, case)
    for threads in (1, None):
        nk.set_num_threads(threads)
        expected, _ = everything(case, *arguments)
        for _ in range(5):
            same(everything(case, *arguments)[0], expected)


@pytest.mark.parametrize("case", RUNNING, ids=ids(RUNNING))
def test_running_statistics(rng, case):
    """They are results too."""
    x = example(rng, case)[0]
    expected = None
    for isa, threads, split in product(_debug.isas(), THREADS, (False, True)):
        running = [np.full(case.weight_shape, 0.5, np.float32) for _ in range(2)]
        with _debug.force(isa=isa, threads=threads, split=split):
            case.plain(x, running_mean=running[0], running_var=running[1])
        expected = expected or running
        same(running, expected)


WITHOUT_GAPS = [case for case in BIG + BIG_OF_OTHERS if case.memory != "strided"]


@pytest.mark.parametrize("case", WITHOUT_GAPS, ids=ids(WITHOUT_GAPS))
def test_alignment_does_not_matter(rng, case):
    """Nothing is peeled: data that starts anywhere has the bits of data that starts at a cache line."""
    x, dy, weight, bias, _ = example(rng, case)
    expected, _ = everything(case, x, dy, weight, bias)
    order = np.argsort([-stride for stride in x.strides], kind="stable")

    def moved(a):
        return shifted(np.ascontiguousarray(a.transpose(order))).transpose(np.argsort(order))

    def shift(a):
        return None if a is None else shifted(a)

    assert moved(x).strides == x.strides and moved(x).ctypes.data % 64
    same(everything(case, moved(x), moved(dy), shift(weight), shift(bias))[0], expected)


# --- alone and in a batch -------------------------------------------------------------------------------------------

PER_SAMPLE = [
    Case("instance", (9, 5, 33), {"channel_axis": 1}),
    Case("instance", (9, 5, 33), {"channel_axis": -1}),
    Case("instance", (5, 3, 50, 51), {"channel_axis": 1}),
    Case("instance", (5, 3, 50, 51), {"channel_axis": 1}, "channels last"),
    Case("group", (9, 6, 33), {"num_groups": 2, "channel_axis": 1}),
    Case("group", (9, 120, 3, 3), {"num_groups": 40, "channel_axis": 1}),
    Case("group", (40, 60), {"num_groups": 12, "channel_axis": 1}),
    Case("group", (9, 33, 6), {"num_groups": 2, "channel_axis": -1}),
    Case("group", (9, 7, 12, 3, 5), {"num_groups": 4, "channel_axis": 2}),
    Case("instance", (9, 7, 12, 3, 5), {"channel_axis": 2}),
    Case("axes", (9, 12, 5, 7), {"axes": (1, 3)}),
    Case("group", (9, 220, 130), {"num_groups": 2, "channel_axis": -1}),
    Case("group", (9, 33, 24), {"num_groups": 1, "channel_axis": -1}),
    Case("group", (5, 8, 50, 51), {"num_groups": 2, "channel_axis": 1}),
    Case("group", (5, 8, 50, 51), {"num_groups": 2, "channel_axis": 1}, "channels last"),
    Case("layer", (70, 33), {"normalized_shape": (33,)}),
    Case("layer", (70, 1025), {"normalized_shape": (1025,)}),
    Case("layer", (5, 3, 50, 51), {"normalized_shape": (3, 50, 51)}),
    Case("layer", (5, 3, 50, 51), {"normalized_shape": (3, 50, 51)}, "channels last"),
    Case("layer", (9, 4, 300), {"normalized_shape": (300,)}),
    Case("layer", (5, 9, 7, 19), {"normalized_shape": (19,)}, "channels first"),
    Case("rms", (70, 33), {"normalized_shape": (33,)}),
    Case("rms", (70, 5000), {"normalized_shape": (5000,)}),
    Case("rms", (9, 4, 300), {"normalized_shape": (300,)}),
    Case("axes", (9, 40, 50), {"axes": (1,)}),
    Case("axes without center", (9, 40, 50), {"axes": (1,)}),
]
PER_SAMPLE = in_every_dtype(PER_SAMPLE, 2)


@pytest.mark.parametrize("case", PER_SAMPLE, ids=ids(PER_SAMPLE))
def test_a_sample_alone_and_in_a_batch(rng, case):
    """y, mean, rstd and dx do not depend on what else is in the batch, nor on how much."""
    x, dy, weight, bias, _ = example(rng, case)
    (y, *statistics), dx = results = batch_results(case, x, dy, weight, bias)
    assert len(results) == 2
    for part in (slice(0, 1), slice(2, 3), slice(-1, None), slice(1, 4), slice(None, None, 2), slice(None, None, -1)):
        alone = replace(case, shape=(len(range(*part.indices(len(x)))), *case.shape[1:]))
        (other_y, *other_statistics), other_dx = batch_results(alone, x[part], dy[part], weight, bias)
        bounds.assert_same_bits(other_y, y[part])
        bounds.assert_same_bits(other_dx, dx[part])
        for a, b in zip(other_statistics, statistics):
            bounds.assert_same_bits(a, b[part])
        copied = np.empty_like(x[part])
        copied[...] = x[part]
        bounds.assert_same_bits(alone.plain(copied, weight, bias, eps=EPS), y[part])


def batch_results(case, x, dy, weight, bias):
    y, mean, rstd = case.forward(x, weight, bias, eps=EPS)
    dx = case.backward(dy, x, mean, rstd, weight)[0]
    return [a for a in (y, mean, rstd) if a is not None], dx


def test_every_norm_without_the_batch_in_its_sets_is_here():
    assert {case.norm for case in PER_SAMPLE} == {norm for norm in NORMS if NORMS[norm].per_sample}


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_a_sample_alone_with_many_parameters_of_another_dtype(rng, norm):
    """The larger of two batches converts them beforehand, the other on the way."""
    shape = (2, 2, 65_537) if norm == "instance" else (2, 65_538, 2)
    spec = () if norm == "instance" else (2,)
    axis = {"channel_axis": -1 if norm == "instance" else 1}
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    weight = rng.standard_normal(shape[axis["channel_axis"]])
    forward, backward = getattr(nk, f"{norm}_norm_forward"), getattr(nk, f"{norm}_norm_backward")
    none = (None, None) if norm == "instance" else ()
    y, mean, rstd = forward(x, *(spec or none), weight, **axis)
    dx = backward(dy, x, mean, rstd, *spec, weight, **axis)[0]
    alone_y, alone_mean, alone_rstd = forward(x[:1], *(spec or none), weight, **axis)
    same([alone_y, alone_mean, alone_rstd], [y[:1], mean[:1], rstd[:1]])
    same([backward(dy[:1], x[:1], alone_mean, alone_rstd, *spec, weight, **axis)[0]], [dx[:1]])


@pytest.mark.parametrize("channels", [slice(0, 2), slice(3, 7), slice(None, None, 3)])
@pytest.mark.parametrize("shape", [(4, 7, 40, 41), (40, 7, 4, 4), (3, 7, 5), (200, 7, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_alone_and_together(rng, channels, shape, dtype):
    """What holds for samples holds for the channels of batch norm: no set knows of another."""
    x = random(rng, shape, 1e2, dtype=dtype)
    for memory in ("C", "channels last"):
        a = MEMORY[memory](x)
        part = MEMORY[memory](x[:, channels])
        bounds.assert_same_bits(nk.batch_norm(part, training=True), nk.batch_norm(a, training=True)[:, channels])


@pytest.mark.parametrize("lanes", [2, 3, 4, 8, 16, 17, 63])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lanes_alone_and_together(rng, lanes, dtype):
    """Columns: the bits of a lane do not depend on how many lie beside it (one alone is contiguous: another walk)."""
    x = random(rng, (2, 3000, 64), 1e2, dtype=dtype)
    y, mean, rstd = nk.instance_norm_forward(x, channel_axis=-1)
    part = np.ascontiguousarray(x[:, :, :lanes])
    other = nk.instance_norm_forward(part, channel_axis=-1)
    for a, b in zip(other, (y[:, :, :lanes], mean[:, :lanes], rstd[:, :lanes])):
        bounds.assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 33, 40, 48, 63, 65, 67, 72, 131])
def test_few_lanes_alone_and_together(rng, lanes, dtype):
    """Down few lanes, kernels take several leaves at once: the same bits as among many lanes, forward and backward.

    As many rows as leave some leaves over, and a part of one; with gaps between rows; on every instruction set.
    """
    dtype, rows = np.dtype(dtype), 32 * 37 + 21
    x, dy = (random(rng, (rows, 256), 1e2, dtype=dtype.name) for _ in range(2))
    weight, bias = (random(rng, (256,), dtype=dtype.name) for _ in range(2))

    def results(x, dy, weight, bias):
        y, mean, rstd = nk.batch_norm_forward(x, None, None, weight, bias, training=True)[:3]
        return [y, mean, rstd, *nk.batch_norm_backward(dy, x, mean, rstd, weight)]

    for n in (rows, 2, 15, 33, 32 * 5):
        with _debug.force(isa=_debug.isas()[0], threads=1):
            expected = [np.ascontiguousarray(a[..., :lanes]) for a in results(x[:n], dy[:n], weight, bias)]
        for isa, stream, gap in product(_debug.isas(), (False, True), (0, 3)):
            part, part_dy = (np.zeros((n, lanes + gap), dtype)[:, :lanes] for _ in range(2))
            part[:], part_dy[:] = x[:n, :lanes], dy[:n, :lanes]
            with _debug.force(isa=isa, stream=stream):
                same(results(part, part_dy, weight[:lanes], bias[:lanes]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [2, 3, 4, 7, 8, 9, 15, 16, 17, 25, 31, 32, 33])
def test_short_cells_eight_at_a_time(rng, lanes, dtype):
    """Backward of tiny images, kernels sum eight channels at once: the same bits as one by one, as gaps force it.

    Groups of fewer channels than eight, of some more, and of one (instance norm); samples alone too.
    """
    dtype = np.dtype(dtype)
    for channels, groups in ((24, 8), (40, 2), (36, 3), (11, 11)):
        x, dy = (random(rng, (5, channels, lanes), 1e2, dtype=dtype.name) for _ in range(2))
        weight = random(rng, (channels,), dtype=dtype.name)
        mean, rstd = nk.group_norm_forward(x, groups, weight)[1:]
        apart = [np.zeros((5, channels, lanes, 2), dtype)[..., 0] for _ in range(2)]
        apart[0][:], apart[1][:] = dy, x
        with _debug.force(isa=_debug.isas()[0]):
            expected = nk.group_norm_backward(*apart, mean, rstd, groups, weight)
        for isa in _debug.isas():
            with _debug.force(isa=isa):
                same(nk.group_norm_backward(dy, x, mean, rstd, groups, weight), expected)
                for part in (slice(1), slice(2, 4)):
                    alone = nk.group_norm_backward(dy[part], x[part], mean[part], rstd[part], groups, weight)
                    bounds.assert_same_bits(alone[0], expected[0][part])


AT_THE_END = """
import ctypes, mmap, sys
import ml_dtypes
import numpy as np
import normkit as nk
from normkit import _debug

page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


def at_the_end(a, kept=[]):
    size = -(-a.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (first, first + page + size):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    kept.append(memory)
    out = np.frombuffer(memory, a.dtype, a.size, page + size - a.nbytes).reshape(a.shape)
    out[...] = a
    return out


rng = np.random.default_rng(0)
# As many rows as leave slots of the last vector empty, and as few.
for lanes in (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 24, 40, 67):
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        for rows in (2, 33, 32 * 7, 32 * 9):
            x, dy = (at_the_end(rng.standard_normal((rows, lanes)).astype(np.dtype(dtype))) for _ in range(2))
            weight, bias = (at_the_end(rng.standard_normal(lanes).astype(np.dtype(dtype))) for _ in range(2))
            for isa in _debug.isas():
                for stream in (False, True):
                    with _debug.force(isa=isa, stream=stream):
                        y, mean, rstd = nk.batch_norm_forward(x, None, None, weight, bias, training=True)[:3]
                        nk.batch_norm_backward(dy, x, mean, rstd, weight)
# Cells of tiny images, eight at a time, and some more.
for lanes in (2, 3, 7, 8, 9, 15, 16, 17, 25, 31, 32, 33):
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        x, dy = (at_the_end(rng.standard_normal((3, 20, lanes)).astype(np.dtype(dtype))) for _ in range(2))
        for isa in _debug.isas():
            with _debug.force(isa=isa):
                for groups in (2, 5, 20):
                    y, mean, rstd = nk.group_norm_forward(x, groups)
                    nk.group_norm_backward(dy, x, mean, rstd, groups)
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect is Linux's")
def test_nothing_beyond_an_array_is_read():
    """Arrays between pages that cannot be read: reading past an end would kill the process."""
    done = in_a_fresh_process(AT_THE_END)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr


# --- instruction sets -----------------------------------------------------------------------------------------------


def in_a_fresh_process(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def test_instruction_sets():
    """The best is in force unless one is forced; the baseline is everywhere."""
    assert len(set(_debug.isas())) == len(_debug.isas()) >= 1
    assert _core.isa() == os.environ.get("NORMKIT_ISA", _debug.isas()[-1])
    for isa in _debug.isas():
        with _debug.force(isa=isa):
            nk.layer_norm(np.ones((2, 8), np.float32), 8)
            assert _debug.last_path()["isa"] == isa
    nk.layer_norm(np.ones((2, 8), np.float32), 8)
    assert _debug.last_path()["isa"] == _core.isa()


DIGEST = """
import hashlib
import ml_dtypes
import numpy as np
import normkit as nk
from normkit import _core
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for dtype in _core.dtypes():
    x, dy = (rng.standard_normal((2, 4, 6, 30, 31)) + 1e2).astype(dtype)
    for forward, backward, more in (
        (nk.batch_norm_forward, nk.batch_norm_backward, {"training": True}),
        (nk.layer_norm_forward, nk.layer_norm_backward, {"normalized_shape": (6, 30, 31)}),
    ):
        for a, b in ((x, dy), (np.asfortranarray(x), np.asfortranarray(dy))):
            y, mean, rstd = forward(a, **more)
            for result in (y, mean, rstd, *backward(b, a, mean, rstd, **more)):
                digest.update(result.tobytes())
print(_core.isa(), nk.get_num_threads(), digest.hexdigest())
"""


def test_environment_variables_do_not_change_a_bit():
    """NORMKIT_ISA and OMP_NUM_THREADS choose the path in a new process, and the bits stay."""
    digests = set()
    for isa, threads in zip(_debug.isas(), (1, 2, 3, 1, 2, 3)):
        run = in_a_fresh_process(DIGEST, NORMKIT_ISA=isa, OMP_NUM_THREADS=str(threads))
        assert run.returncode == 0, run.stderr
        chosen, _, digest = run.stdout.split()
        assert chosen == isa
        digests.add(digest)
    assert len(digests) == 1


def test_an_unknown_instruction_set_is_an_import_error():
    run = in_a_fresh_process("import normkit", NORMKIT_ISA="pentium")
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert all(isa in last for isa in _debug.isas())


def test_a_transposed_array_is_not_copied_to_the_same_bits_by_chance(rng):
    """NCHW and NHWC memory take different walks, so nothing promises equal bits; both are within the bounds."""
    x = random(rng, (4, 6, 40, 41), 1e3)
    case = Case("batch", x.shape, {"channel_axis": 1})
    walks = []
    for a in (x, channels_last(x), permuted(x, (2, 3, 0, 1))):
        case.check_forward(case.plain(a), a)
        walks.append(_debug.last_path()["walk"])
    assert walks == ["rows", "columns", "columns"]
