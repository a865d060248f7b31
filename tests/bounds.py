"""The bounds that the library promises. No test has another tolerance, but for 1e-5 in the ONNX node tests.

float16 and bfloat16 are computed in float32 and rounded once, so their bound is that of float32 "before the final
rounding": half a unit in the last place more. float64 has bounds of its own:

- Forward: the 5e-11 of the contract, which holds up to mean/std 1e6.
- Gradients: twice that, as in float32 GRADIENT is twice FORWARD. Backward takes mean and rstd as given, so its results
  are judged by the formula with these very numbers. (The mean of the data itself is no measure: a float64 at mean/std
  1e6 is known to 5.8e-11 standard deviations, more than the bound. In float32 that is nothing beside the bound.)
"""

import ml_dtypes
import numpy as np

FORWARD = 5e-7  # of max(1, |gamma * xhat| + |beta|)
GRADIENT = 1e-6  # of rstd * max|g| over the set; of the sum of the absolute terms
FLOAT64 = 5e-11  # FORWARD where the arithmetic is float64
FLOAT64_GRADIENT = 1e-10  # GRADIENT likewise
ULP = 0.51  # of a half type, where no bias cancels what is relatively as exact


def is_double(dtype):
    """Whether data of this dtype is computed in float64; all other dtypes are in float32."""
    return np.dtype(dtype) == np.float64


def forward_factor(dtype):
    return FLOAT64 if is_double(dtype) else FORWARD


def gradient_factor(dtype):
    return FLOAT64_GRADIENT if is_double(dtype) else GRADIENT


def half_ulp(dtype, exact):
    """Half a unit in the last place of `dtype` at `exact`; subnormal numbers share that of the least normal one."""
    limits = ml_dtypes.finfo(dtype)
    _, exponent = np.frexp(np.asarray(exact, np.float64))
    exponent = np.clip(exponent - 1, limits.minexp, limits.maxexp - 1)
    return np.ldexp(0.5, exponent - limits.nmant)


def rounding(dtype, data, exact, bound):
    """What the final rounding to `dtype` adds to `bound`: nothing where it is the type of arithmetic or a wider one."""
    if np.dtype(dtype).itemsize >= (8 if is_double(data) else 4):
        return 0.0
    return half_ulp(dtype, np.abs(exact) + bound)


def largest(dtype):
    """The largest finite number of `dtype`."""
    return float(ml_dtypes.finfo(dtype).max)


def in_range(dtype, a):
    """Infinity as rounding means it: the first power of two that `dtype` does not hold, and all beyond."""
    limit = np.ldexp(1.0, ml_dtypes.finfo(dtype).maxexp)
    return np.clip(a, -limit, limit)


def wide(a):
    """As float64, or as longdouble where it is one."""
    a = np.asarray(a)
    return a if a.dtype == np.longdouble else a.astype(np.float64)


def assert_within(what, value, exact, bound):
    """|value - exact| <= bound everywhere; a NaN is never within, a shape that would broadcast is wrong."""
    dtype = np.asarray(value).dtype
    value, exact = wide(value), wide(exact)
    assert value.shape == exact.shape, f"{what} has shape {value.shape}, expected {exact.shape}"
    if dtype.itemsize < 8:
        value, exact = in_range(dtype, value), in_range(dtype, exact)
    bound = np.broadcast_to(np.asarray(bound, np.float64), value.shape)
    with np.errstate(invalid="ignore"):
        error = np.abs(value - exact)
    within = error <= bound
    if within.all():
        return
    with np.errstate(all="ignore"):
        excess = np.where(within, 0.0, np.where(np.isfinite(error), error / bound, np.inf))
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    raise AssertionError(
        f"{what}: {np.count_nonzero(~within)} of {within.size} out of bound, worst at {tuple(map(int, worst))}: "
        f"{value[worst]!r} against {exact[worst]!r}, error {error[worst]:.3g}, bound {bound[worst]:.3g}"
    )


def forward_bound(dtype, y64, xhat64, gamma, beta):
    """Of y of this dtype, the final rounding included."""
    size = np.maximum(1.0, np.abs(gamma * xhat64) + np.abs(beta)).astype(np.float64)
    bound = forward_factor(dtype) * size
    bound = bound + rounding(dtype, dtype, y64, bound)
    if np.dtype(dtype).itemsize >= 4:
        return bound
    # y64 itself is as exact as float64 makes it.
    relative = 2 * ULP * half_ulp(dtype, y64) + FLOAT64 * size
    return np.where(np.asarray(beta) == 0, np.minimum(bound, relative), bound)


def assert_forward(y, y64, xhat64, gamma, beta):
    assert_within("y", y, y64, forward_bound(y.dtype, y64, xhat64, gamma, beta))


def assert_statistics(x, mean, rstd, xhat64):
    """The statistics given back make xhat as exact as y must be; mean and rstd broadcast against x.

    They are float64. Where the data is too, the rounding of the mean to that shows beside the bound.
    """
    rounding_of_mean = half_ulp(np.float64, mean) * rstd if is_double(x.dtype) else 0.0
    xhat = (np.asarray(x, wide(xhat64).dtype) - mean) * rstd
    bound = forward_factor(x.dtype) * np.maximum(1.0, np.abs(xhat64)) + rounding_of_mean
    assert_within("(x - mean) * rstd", xhat, xhat64, bound)


def assert_running(what, running, exact, scale, data=np.float32):
    """A running statistic: the bound of xhat in units of the statistic's `scale`, and one rounding to its own dtype."""
    rounding = np.spacing(np.abs(exact).astype(running.dtype)).astype(np.float64)
    assert_within(what, running, exact, forward_factor(data) * scale + rounding)


def dx_bound(dtype, dx64, rstd, g, axes):
    """Of dx of this dtype, the final rounding included. Per set: the elements that differ only along `axes`."""
    largest = np.abs(g).max(axes, keepdims=True)
    bound = (gradient_factor(dtype) * rstd * largest).astype(np.float64)
    return bound + rounding(dtype, dtype, dx64, bound)


def assert_dx(dx, dx64, rstd, g, axes, dtype=None):
    """`dtype`: whose bound; None: that of dx."""
    assert_within("dx", dx, dx64, dx_bound(dx.dtype if dtype is None else dtype, dx64, rstd, g, axes))


def assert_param_grad(d, d64, absolute, by_statistics=0.0, data=None):
    """`absolute`: the sum of the absolute terms of which d64 is the sum; `data`: the dtype of x, None: that of d.

    Where d64 was not made with the mean and rstd that backward was given, `by_statistics` says what these may add: the
    sum of |dy| * max(1, |xhat|), each term moved as far as the forward bound lets its xhat move.
    """
    d = np.asarray(d)
    data = d.dtype if data is None else data
    bound = wide(gradient_factor(data) * absolute + forward_factor(data) * by_statistics).astype(np.float64)
    assert_within("parameter gradient", d, d64, bound + rounding(d.dtype, data, d64, bound))


def assert_same_bits(a, b):
    """Every bit, but for the payload of a NaN."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype} {a.shape} against {b.dtype} {b.shape}"
    bits = f"u{a.dtype.itemsize}"
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    with np.errstate(invalid="ignore"):  # ml_dtypes converts to float32 to see, and a signalling NaN signals
        differ = (a.view(bits) != b.view(bits)) & ~(np.isnan(a) & np.isnan(b))
    if differ.any():
        first = tuple(map(int, np.argwhere(differ)[0]))
        raise AssertionError(
            f"{np.count_nonzero(differ)} of {a.size} differ, first at {first}: {a[first]!r} against {b[first]!r}"
        )
