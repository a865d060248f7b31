"""One engine: where two norms have the same sets, they have the same bits."""

from dataclasses import replace

import numpy as np
import pytest

import bounds
from cases import MEMORY, NORMS, OTHERS, Case, ids, in_every_dtype, layouts, random

pytestmark = pytest.mark.any_device

SHAPES = ((4, 6, 35), (3, 6, 14, 13), (2, 4, 3, 5, 6), (1, 3, 61, 67))
every_shape = pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, "float32") for shape in SHAPES] + [(shape, dtype) for shape in (SHAPES[0], SHAPES[3]) for dtype in OTHERS],
)


def pair(rng, left, right, x, weight_for=(None, None)):
    """Forward, and backward for one random dy, of two cases on one x: y, dx, and the rest as it came."""
    results = []
    dy = np.empty_like(x)
    dy[...] = random(rng, x.shape, dtype=x.dtype)
    for case, weight in zip((left, right), weight_for):
        y, mean, rstd = case.forward(x, weight, eps=1e-5)
        gradients = case.backward(dy, x, mean, rstd, weight)
        case.check_forward(y, x, weight, statistics=(mean, rstd))
        case.check_backward(gradients, dy, x, (mean, rstd), weight)
        results.append((y, mean, rstd, *gradients))
    return results


def same(a, b):
    bounds.assert_same_bits(a.reshape(-1), b.reshape(-1))


@every_shape
@pytest.mark.parametrize("memory", ["C", "channels last"])
def test_one_group_is_layer_norm_over_channels_and_space(rng, shape, dtype, memory):
    """Without affine: the weight of group norm is per channel, that of layer norm per element."""
    x = MEMORY[memory](random(rng, shape, 1e2, dtype=dtype))
    group = Case("group", shape, {"num_groups": 1, "channel_axis": 1})
    layer = Case("layer", shape, {"normalized_shape": shape[1:]})
    left, right = pair(rng, group, layer, x)
    for a, b in zip(left[:3], right[:3]):  # dx may differ: its sums over a set go by way of those over a parameter
        same(a, b)


@every_shape
@pytest.mark.parametrize("memory", ["C", "channels last"])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_a_group_per_channel_is_instance_norm(rng, shape, dtype, memory, channel_axis):
    x = MEMORY[memory](random(rng, shape, 1e2, dtype=dtype))
    options = {"channel_axis": channel_axis}
    group = Case("group", shape, {"num_groups": shape[channel_axis], **options})
    weight = random(rng, (shape[channel_axis],), dtype=dtype)
    for a, b in zip(*pair(rng, group, Case("instance", shape, options), x, (weight, weight))):
        same(a, b)


@every_shape
@pytest.mark.parametrize("memory", ["C", "channels last"])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_norm_of_one_sample_is_instance_norm(rng, shape, dtype, memory, channel_axis):
    shape = (1, *shape[1:])
    x = MEMORY[memory](random(rng, shape, 1e2, dtype=dtype))
    options = {"channel_axis": channel_axis}
    weight = random(rng, (shape[channel_axis],), dtype=dtype)
    batch, instance = Case("batch", shape, options), Case("instance", shape, options)
    for a, b in zip(*pair(rng, batch, instance, x, (weight, weight))):
        same(a, b)


@every_shape
@pytest.mark.parametrize("memory", ["C", "channels last", "F"])
def test_normalize_over_trailing_axes_is_layer_and_rms_norm(rng, shape, dtype, memory):
    x = MEMORY[memory](random(rng, shape, 1e2, dtype=dtype))
    for count in range(1, len(shape) + 1):
        trailing = tuple(range(len(shape) - count, len(shape)))
        options = {"normalized_shape": shape[-count:]}
        weight = random(rng, shape[-count:], dtype=dtype)
        for named, any_sets in (("layer", "axes"), ("rms", "axes without center")):
            right = Case(any_sets, shape, {"axes": trailing}, parameter=weight.shape)
            a, b = pair(rng, Case(named, shape, options), right, x, (weight, weight))
            for left, right in zip(a, b):
                if left is not None:  # rms has no mean and no bias, and neither has a value to compare
                    same(left, right)


@every_shape
def test_normalize_is_batch_and_instance_norm(rng, shape, dtype):
    """With weights that broadcast as the channels do."""
    x, weight = random(rng, shape, 1e2, dtype=dtype), random(rng, (shape[1],), dtype=dtype)
    against_x = weight.reshape((-1,) + (1,) * (len(shape) - 2))
    spatial = tuple(range(2, len(shape)))
    for norm, axes in (("batch", (0, *spatial)), ("instance", spatial)):
        right = Case("axes", shape, {"axes": axes}, parameter=against_x.shape)
        a, b = pair(rng, Case(norm, shape, {"channel_axis": 1}), right, x, (weight, against_x))
        for left, right in zip(a, b):
            same(left, right)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if NORMS[norm].options((4, 6, 6))[0].get("channel_axis")])
@every_shape
def test_channel_axis_is_moveaxis(rng, norm, shape, dtype):
    """The same memory, described in two ways."""
    for case in layouts((shape,), (norm,)):
        if case.options["channel_axis"] != -1:
            continue
        case = replace(case, dtype=dtype)
        x = case.random(rng, 1e2)
        moved = np.moveaxis(x, -1, 1)
        other = replace(case, shape=moved.shape, options={**case.options, "channel_axis": 1})
        weight, bias = case.parameters(rng)
        y, mean, rstd = case.forward(x, weight, bias)
        moved_y, *moved_statistics = other.forward(moved, weight, bias)
        bounds.assert_same_bits(np.moveaxis(y, -1, 1), moved_y)
        for a, b in zip((mean, rstd), moved_statistics):
            bounds.assert_same_bits(a, b)
        dy = case.random(rng)
        left = case.backward(dy, x, mean, rstd, weight)
        right = other.backward(np.moveaxis(dy, -1, 1), moved, mean, rstd, weight)
        bounds.assert_same_bits(np.moveaxis(left[0], -1, 1), right[0])
        for a, b in zip(left[1:], right[1:]):
            bounds.assert_same_bits(a, b)


ORDERED = in_every_dtype([case for case in layouts(((2, 6, 35), (2, 6, 5, 7))) if case.norm.startswith("axes")], 3)


@pytest.mark.parametrize("case", ORDERED, ids=ids(ORDERED))
def test_the_names_of_axes_do_not_matter(rng, case):
    """Transposing array, axes and weight together gives the transposed bits: only memory decides."""
    x = case.random(rng, 1e2)
    y, mean, rstd = case.forward(x)
    dy = case.random(rng)
    dx = case.backward(dy, x, mean, rstd)[0]
    order = rng.permutation(len(case.shape))
    axes = tuple(int(np.flatnonzero(order == axis)[0]) for axis in case.options["axes"])
    other = replace(case, shape=tuple(case.shape[i] for i in order), options={"axes": axes})
    other_y, other_mean, other_rstd = other.forward(x.transpose(order))
    bounds.assert_same_bits(y.transpose(order), other_y)
    other_dx = other.backward(dy.transpose(order), x.transpose(order), other_mean, other_rstd)[0]
    bounds.assert_same_bits(dx.transpose(order), other_dx)
