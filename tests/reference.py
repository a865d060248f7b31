"""The formula in NumPy: what every test compares with, short enough to be believed by reading.

`dtype` is that of the arithmetic: float64, and longdouble where float64 data is to be judged.
"""

from typing import NamedTuple

import numpy as np

EXTENDED = np.finfo(np.longdouble).nmant >= 63  # whether longdouble has digits to judge float64 by


def mean(a, axes):
    """Mean over `axes`, kept with extent 1; the second pass takes away the rounding of the first."""
    first = a.mean(axes, keepdims=True)
    return first + (a - first).mean(axes, keepdims=True)


def statistics(x, axes, eps=1e-5, center=True, dtype=np.float64):
    """Mean (zeros unless `center`) and 1 / sqrt(variance + eps) of every set, axes kept with extent 1."""
    x = np.asarray(x, dtype)
    mu = mean(x, axes) if center else np.zeros_like(x.sum(axes, keepdims=True))
    var = mean((x - mu) ** 2, axes)
    return mu, 1 / np.sqrt(var + eps)


def normalize(x, mu, rstd, weight=1.0, bias=0.0, dtype=np.float64):
    """y and xhat."""
    xhat = (np.asarray(x, dtype) - mu) * rstd
    return weight * xhat + bias, xhat


def gradient(dy, x, mu, rstd, axes, weight=1.0, center=True, training=True, dtype=np.float64):
    """dx, and the terms that sum to dweight (dy * xhat) and to dbias (dy).

    `training`: mu and rstd were made from x, and dx flows through them too; else they are constants.
    """
    dy = np.asarray(dy, dtype)
    xhat = (np.asarray(x, dtype) - mu) * rstd
    g = weight * dy
    through_mean = mean(g, axes) if training and center else 0.0
    through_rstd = xhat * mean(g * xhat, axes) if training else 0.0
    return rstd * (g - through_mean - through_rstd), dy * xhat, dy


def sum_to(terms, shape):
    """The sum of `terms` over the axes where `shape` has extent 1."""
    return terms.sum(tuple(i for i, extent in enumerate(shape) if extent == 1), keepdims=True)


class Sets(NamedTuple):
    """How a norm divides an array.

    Reshaped to `view`, elements that differ only along `axes` are one set, which has one mean and one variance.
    `parameter` is the shape of weight and bias against the view: elements that differ only where it is 1 share both.
    """

    view: tuple[int, ...]
    axes: tuple[int, ...]
    parameter: tuple[int, ...]


def batch(shape, channel_axis):
    """A set per channel; a weight per channel."""
    channel = channel_axis % len(shape)
    axes = tuple(i for i in range(len(shape)) if i != channel)
    return Sets(shape, axes, tuple(1 if i in axes else shape[i] for i in range(len(shape))))


def instance(shape, channel_axis):
    """A set per sample and channel; a weight per channel."""
    per_channel = batch(shape, channel_axis)
    return per_channel._replace(axes=per_channel.axes[1:])  # axis 0 holds the samples


def group(shape, num_groups, channel_axis):
    """A set per sample and group of neighbouring channels; a weight per channel."""
    channel = channel_axis % len(shape)
    view = (*shape[:channel], num_groups, shape[channel] // num_groups, *shape[channel + 1 :])
    axes = tuple(i for i in range(1, len(view)) if i != channel)
    return Sets(view, axes, tuple(view[i] if i in (channel, channel + 1) else 1 for i in range(len(view))))


def trailing(shape, normalized_shape):
    """A set per row of the leading axes; a weight per element of the set."""
    leading = len(shape) - len(normalized_shape)
    return Sets(shape, tuple(range(leading, len(shape))), (1,) * leading + tuple(normalized_shape))


NORMS = {"batch": batch, "instance": instance, "group": group, "layer": trailing, "rms": trailing}
