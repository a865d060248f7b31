"""One engine: where two norms have the same sets, they have the same bits."""

import numpy as np
import pytest

import bounds
from cases import MEMORY, NORMS, Case, ids, layouts, random

SHAPES = ((4, 6, 35), (3, 6, 14, 13), (2, 4, 3, 5, 6), (1, 3, 61, 67))


def pair(rng, left, right, x, weight_for=(None, None)):
    """Forward, and backward for one random dy, of two cases on one x: y, dx, and the rest as it came."""
    results = []
    dy = np.empty_like(x)
    dy[...] = random(rng, x.shape)
    for case, weight in zip((left, right), weight_for):
        y, mean, rstd = case.forward(x, weight, eps=1e-5)
        gradients = case.backward(dy, x, mean, rstd, weight)
        case.check_forward(y, x, weight, statistics=(mean, rstd))
        case.check_backward(gradients, dy, x, (mean, rstd), weight)
        results.append((y, mean, rstd, *gradients))
    return results


def same(a, b):
    bounds.assert_same_bits(a.reshape(-1), b.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", ["C", "channels last"])
def test_one_group_is_layer_norm_over_channels_and_space(rng, shape, memory):
    """Without affine: the weight of group norm is per channel, that of layer norm per element."""
    x = MEMORY[memory](random(rng, shape, 1e3))
    group = Case("group", shape, {"num_groups": 1, "channel_axis": 1})
    layer = Case("layer", shape, {"normalized_shape": shape[1:]})
    left, right = pair(rng, group, layer, x)
    for a, b in zip(left[:3], right[:3]):  # dx may differ: its sums over a set go by way of those over a parameter
        same(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", ["C", "channels last"])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_a_group_per_channel_is_instance_norm(rng, shape, memory, channel_axis):
    x = MEMORY[memory](random(rng, shape, 1e3))
    options = {"channel_axis": channel_axis}
    group = Case("group", shape, {"num_groups": shape[channel_axis], **options})
    weight = random(rng, (shape[channel_axis],))
    for a, b in zip(*pair(rng, group, Case("instance", shape, options), x, (weight, weight))):
        same(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", ["C", "channels last"])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_norm_of_one_sample_is_instance_norm(rng, shape, memory, channel_axis):
    shape = (1, *shape[1:])
    x = MEMORY[memory](random(rng, shape, 1e3))
    options = {"channel_axis": channel_axis}
    weight = random(rng, (shape[channel_axis],))
    batch, instance = Case("batch", shape, options), Case("instance", shape, options)
    for a, b in zip(*pair(rng, batch, instance, x, (weight, weight))):
        same(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", ["C", "channels last", "F"])
def test_normalize_over_trailing_axes_is_layer_and_rms_norm(rng, shape, memory):
    x = MEMORY[memory](random(rng, shape, 1e3))
    for count in range(1, len(shape) + 1):
        trailing = tuple(range(len(shape) - count, len(shape)))
        options = {"normalized_shape": shape[-count:]}
        weight = random(rng, shape[-count:])
        for named, any_sets in (("layer", "axes"), ("rms", "axes without center")):
            right = Case(any_sets, shape, {"axes": trailing}, parameter=weight.shape)
            a, b = pair(rng, Case(named, shape, options), right, x, (weight, weight))
            for left, right in zip(a, b):
                if left is not None:  # rms has no mean and no bias, and neither has a value to compare
                    same(left, right)


@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_is_batch_and_instance_norm(rng, shape):
    """With weights that broadcast as the channels do."""
    x, weight = random(rng, shape, 1e3), random(rng, (shape[1],))
    against_x = weight.reshape((-1,) + (1,) * (len(shape) - 2))
    spatial = tuple(range(2, len(shape)))
    for norm, axes in (("batch", (0, *spatial)), ("instance", spatial)):
        right = Case("axes", shape, {"axes": axes}, parameter=against_x.shape)
        a, b = pair(rng, Case(norm, shape, {"channel_axis": 1}), right, x, (weight, against_x))
        for left, right in zip(a, b):
            same(left, right)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if NORMS[norm].options((4, 6, 6))[0].get("channel_axis")])
@pytest.mark.parametrize("shape", SHAPES)
def test_channel_axis_is_moveaxis(rng, norm, shape):
    """The same memory, described in two ways."""
    for case in layouts((shape,), (norm,)):
        if case.options["channel_axis"] != -1:
            continue
        x = case.arrange(random(rng, shape, 1e3))
        moved = np.moveaxis(x, -1, 1)
        other = Case(norm, moved.shape, {**case.options, "channel_axis": 1})
        weight, bias = case.parameters(rng)
        y, mean, rstd = case.forward(x, weight, bias)
        moved_y, *moved_statistics = other.forward(moved, weight, bias)
        bounds.assert_same_bits(np.moveaxis(y, -1, 1), moved_y)
        for a, b in zip((mean, rstd), moved_statistics):
            bounds.assert_same_bits(a, b)
        dy = case.arrange(random(rng, shape))
        left = case.backward(dy, x, mean, rstd, weight)
        right = other.backward(np.moveaxis(dy, -1, 1), moved, mean, rstd, weight)
        bounds.assert_same_bits(np.moveaxis(left[0], -1, 1), right[0])
        for a, b in zip(left[1:], right[1:]):
            bounds.assert_same_bits(a, b)


ORDERED = [case for case in layouts(((2, 6, 35), (2, 6, 5, 7))) if case.norm.startswith("axes")]


@pytest.mark.parametrize("case", ORDERED, ids=ids(ORDERED))
def test_the_names_of_axes_do_not_matter(rng, case):
    """Transposing array, axes and weight together gives the transposed bits: only memory decides."""
    x = case.arrange(random(rng, case.shape, 1e3))
    y, mean, rstd = case.forward(x)
    dy = case.arrange(random(rng, case.shape))
    dx = case.backward(dy, x, mean, rstd)[0]
    order = rng.permutation(len(case.shape))
    axes = tuple(int(np.flatnonzero(order == axis)[0]) for axis in case.options["axes"])
    other = Case(case.norm, tuple(case.shape[i] for i in order), {"axes": axes})
    other_y, other_mean, other_rstd = other.forward(x.transpose(order))
    bounds.assert_same_bits(y.transpose(order), other_y)
    other_dx = other.backward(dy.transpose(order), x.transpose(order), other_mean, other_rstd)[0]
    bounds.assert_same_bits(dx.transpose(order), other_dx)
