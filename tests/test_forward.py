"""Forward: every norm in every layout; parameters, statistics given back, running statistics, defaults."""

from math import prod

import numpy as np
import pytest

import bounds
import normkit as nk
import reference
from cases import (
    DTYPES,
    NORMS,
    Case,
    arithmetic,
    ids,
    in_every_dtype,
    layouts,
    random,
    ratios,
    subsets,
    with_evaluation,
)

pytestmark = pytest.mark.any_device

EPS = 1e-5
LAYOUTS = layouts()
EVERY = in_every_dtype(LAYOUTS, 5)
EVALUATED = in_every_dtype([case for case in with_evaluation(LAYOUTS) if not case.training], 5)
RUNNING = in_every_dtype([case for case in LAYOUTS if case.row.evaluation is not None], 5)
WITH_MOMENTUM = [norm for norm in NORMS if NORMS[norm].evaluation is not None]


@pytest.mark.parametrize("case", EVERY, ids=ids(EVERY))
def test_layouts(rng, case):
    for ratio in sorted({0.0, 1e2, ratios(case.dtype)[-1]}):
        x = case.random(rng, ratio)
        weight, bias = case.parameters(rng)
        for given in ((None, None), (weight, None), (None, bias), (weight, bias)):
            y, mean, rstd = case.forward(x, *given, eps=EPS)
            case.check_forward(y, x, *given, eps=EPS, statistics=(mean, rstd))
            bounds.assert_same_bits(case.plain(x, *given, eps=EPS), y)


@pytest.mark.parametrize("case", EVALUATED, ids=ids(EVALUATED))
@pytest.mark.parametrize("buffers", [np.float32, np.float64])
def test_evaluation(rng, case, buffers):
    """With data around the running mean, and far from it; the running statistics stay as they are."""
    for ratio in ratios(case.dtype):
        for center in (ratio, 0.0):
            x = case.random(rng, offset=ratio)
            running = case.running(rng, center, buffers)
            before = [a.copy() for a in running]
            weight, bias = case.parameters(rng, 3.0)
            more = {"running_mean": running[0], "running_var": running[1], "eps": EPS}
            y, mean, rstd = case.forward(x, weight, bias, **more)
            case.check_forward(y, x, weight, bias, EPS, (mean, rstd), running)
            bounds.assert_same_bits(case.plain(x, weight, bias, **more), y)
            for now, then in zip(running, before):
                bounds.assert_same_bits(now, then)


@pytest.mark.parametrize("case", RUNNING, ids=ids(RUNNING))
@pytest.mark.parametrize("buffers", [np.float32, np.float64])
def test_running_statistics(rng, case, buffers):
    """(1 - momentum) * old + momentum * new, the new variance over n - ddof; instance norm averages over the samples.

    ddof is 1 unless it is given.
    """
    sets, farthest = case.sets, ratios(case.dtype)[-1]
    for ratio, momentum, ddof in (
        (0.0, 0.1, None), (0.0, 0.1, 0), (0.0, 0.1, 1.5), (1e2, 0.1, 1), (farthest, 0.75, 0), (1.0, 1.0, 1.5),
        (1.0, 0.0, 0),
    ):  # fmt: skip
        more = {} if ddof is None else {"ddof": ddof}
        correction = case.set_size / (case.set_size - (1 if ddof is None else ddof))
        x = case.random(rng, scale=2.0, offset=ratio)
        running = case.running(rng, ratio, buffers)
        old = [a.astype(np.float64) for a in running]
        more |= {"running_mean": running[0], "running_var": running[1], "momentum": momentum, "eps": EPS}
        y, _, _ = case.forward(x, **more)
        case.check_forward(y, x, eps=EPS)
        mean, rstd = reference.statistics(x.reshape(sets.view), sets.axes, eps=0.0, dtype=arithmetic(case.dtype))
        # instance norm keeps one statistic per sample and channel: the samples' average is stored
        new = [a.mean(0) if case.norm == "instance" else a for a in (mean, correction / rstd**2)]
        new = [a.reshape(case.weight_shape) for a in new]
        exact = [(1 - momentum) * a + momentum * b for a, b in zip(old, new)]
        bounds.assert_running("running_mean", running[0], exact[0], np.sqrt(new[1]), case.dtype)
        bounds.assert_running("running_var", running[1], exact[1], 2 * new[1], case.dtype)


@pytest.mark.parametrize("norm", WITH_MOMENTUM)
def test_momentum_defaults_to_a_tenth(rng, norm):
    case = Case(norm, (4, 3, 5), {"channel_axis": 1})
    x = case.random(rng)
    left, right = ([np.zeros(3), np.ones(3)] for _ in range(2))
    case.forward(x, running_mean=left[0], running_var=left[1])
    case.forward(x, running_mean=right[0], running_var=right[1], momentum=0.1)
    for a, b in zip(left, right):
        bounds.assert_same_bits(a, b)
        assert (a != 0).all()


@pytest.mark.parametrize("norm", WITH_MOMENTUM)
def test_running_statistics_may_be_strided(rng, norm):
    """They are written in place, through their strides, and nothing between is."""
    case = Case(norm, (4, 3, 50), {"channel_axis": 1})
    x = case.random(rng, 10.0)
    plain, memory = [np.zeros(3), np.ones(3)], np.full((2, 7), np.nan)
    strided = [memory[0, 1:6:2], memory[1, 5:0:-2]]
    strided[0][...], strided[1][...] = plain
    for running in (plain, strided):
        case.forward(x, running_mean=running[0], running_var=running[1])
    for a, b in zip(plain, strided):
        bounds.assert_same_bits(a, b)
    assert np.isnan(memory[:, ::2]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_eps(rng, norm, dtype):
    """eps is added to the variance; the default is 1e-5, for rms_norm that of the type of arithmetic."""
    shape = (4, 6, 5)
    for options in NORMS[norm].options(shape):
        case = Case(norm, shape, options, dtype=dtype)
        x = case.random(rng, scale=1e-2)
        for eps in (0.0, 1e-12, 1e-3, 1.0, 100.0):
            y, mean, rstd = case.forward(x, eps=eps)
            case.check_forward(y, x, eps=eps, statistics=(mean, rstd))
        finfo = np.finfo(np.float64 if bounds.is_double(dtype) else np.float32)
        default = float(finfo.eps) if norm == "rms" else 1e-5
        x = case.random(rng, scale=default**0.5)
        bounds.assert_same_bits(case.plain(x), case.plain(x, eps=default))
        assert (case.plain(x) != case.plain(x, eps=2 * default)).any()


def test_positions_of_arguments(rng):
    """The positions are torch's."""
    x = random(rng, (4, 6, 5))
    w, b, mean, var = rng.uniform(0.5, 1.5, (4, 6)).astype(np.float32)
    row_w, row_b = rng.uniform(0.5, 1.5, (2, 5)).astype(np.float32)
    same = bounds.assert_same_bits
    same(
        nk.batch_norm(x, mean, var, w, b, False, 0.2, 0.5),
        nk.batch_norm(x, running_mean=mean, running_var=var, weight=w, bias=b, training=False, momentum=0.2, eps=0.5),
    )
    same(nk.batch_norm(x, mean, var, w, b), nk.batch_norm(x, mean, var, w, b, False, 0.1, 1e-5, channel_axis=1))
    same(nk.layer_norm(x, 5, row_w, row_b, 0.5), nk.layer_norm(x, (5,), weight=row_w, bias=row_b, eps=0.5))
    same(
        nk.instance_norm(x, None, None, w, b, True, 0.2, 0.5),
        nk.instance_norm(x, weight=w, bias=b, use_input_stats=True, eps=0.5, channel_axis=1),
    )
    same(
        nk.instance_norm(x, mean, var, w, b, False, 0.2, 0.5),
        nk.instance_norm(x, mean, var, weight=w, bias=b, use_input_stats=False, eps=0.5),
    )
    same(nk.group_norm(x, 2, w, b, 0.5), nk.group_norm(x, num_groups=2, weight=w, bias=b, eps=0.5, channel_axis=1))
    same(nk.rms_norm(x, [5], row_w, 0.5), nk.rms_norm(x, normalized_shape=5, weight=row_w, eps=0.5))
    same(
        nk.normalize(x, -1, row_w, row_b, 0.5),
        nk.normalize(x, axes=(2,), weight=row_w, bias=row_b, eps=0.5, center=True),
    )


@pytest.mark.parametrize("norm", NORMS)
def test_negative_axes(rng, norm):
    """An axis may be counted from the end."""
    shape = (4, 6, 6)
    for options in NORMS[norm].options(shape):
        x = random(rng, shape, 1.0)
        if "channel_axis" in options:
            other = {**options, "channel_axis": options["channel_axis"] % 3 - 3 * (options["channel_axis"] >= 0)}
        elif "axes" in options:
            other = {**options, "axes": tuple(axis - 3 for axis in reversed(options["axes"]))}
        else:
            other = {**options, "normalized_shape": list(options["normalized_shape"])}
        assert other != options
        bounds.assert_same_bits(Case(norm, shape, options).plain(x), Case(norm, shape, other).plain(x))


@pytest.mark.parametrize("channel_axis", [0, 1, 2, 3])
def test_batch_norm_over_any_channel_axis(rng, channel_axis):
    case = Case("batch", (5, 4, 6, 7), {"channel_axis": channel_axis})
    x, (weight, bias) = case.random(rng, 1e3), case.parameters(rng)
    case.check_forward(case.plain(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("channel_axis", [1, 2, 3])
def test_channels_between_spatial_axes(rng, norm, channel_axis):
    options = {"num_groups": 2, "channel_axis": channel_axis} if norm == "group" else {"channel_axis": channel_axis}
    case = Case(norm, (5, 4, 6, 8), options)
    x, (weight, bias) = case.random(rng, 1e3), case.parameters(rng)
    y, mean, rstd = case.forward(x, weight, bias)
    case.check_forward(y, x, weight, bias, statistics=(mean, rstd))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 4, 0), (0, 4, 0), (2, 4, 0, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_normalize(norm, shape, dtype):
    """An empty x gives an empty y, and statistics of empty sets are NaN; running statistics stay."""
    for options in NORMS[norm].options((2, 4, 6, 5)[: len(shape)]):
        if "normalized_shape" in options:
            options = {"normalized_shape": shape[len(shape) - len(options["normalized_shape"]) :]}
        if "num_groups" in options:
            options = {**options, "num_groups": 1}
        case = Case(norm, shape, options)
        running = {}
        if case.row.evaluation is not None:
            running = {"running_mean": np.ones(case.weight_shape), "running_var": np.ones(case.weight_shape)}
        y, mean, rstd = case.forward(np.empty(shape, dtype), **running)
        assert y.shape == shape and y.dtype == dtype
        for statistic in (mean, rstd) if case.row.has_mean else (rstd,):
            assert statistic.shape == case.statistics_shape and statistic.dtype == np.float64
            assert np.isnan(statistic).all() or (statistic is mean and not case.row.center)
        assert all((a == 1).all() for a in running.values())


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1, 4), (1, 5, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sets_of_one_element_give_beta(rng, shape, dtype):
    """Without a deviation only the bias is left."""
    x = random(rng, shape, 1e3, dtype=dtype)
    for axes in subsets(len(shape)):
        if prod(shape[axis] for axis in axes) == 1:
            bias = random(rng, shape, dtype=dtype)
            np.testing.assert_array_equal(nk.normalize(x, axes, random(rng, shape, dtype=dtype), bias), bias)


def test_weight_and_bias_of_different_shapes(rng):
    """`normalize` broadcasts each against x on its own."""
    case = Case("axes", (4, 5, 6), {"axes": (2,)}, parameter=(4, 5, 6))
    x = case.random(rng, 1e3)
    for weight_shape, bias_shape in (((6,), (5, 1)), ((1, 5, 6), (1,)), ((4, 1, 1), (5, 6)), ((), (4, 5, 6))):
        weight, bias = random(rng, weight_shape), random(rng, bias_shape)
        y = case.plain(x, weight, bias)
        case.check_forward(y, x, np.broadcast_to(weight, x.shape), np.broadcast_to(bias, x.shape))
