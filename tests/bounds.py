"""The bounds that the library promises. No test has another tolerance, but for 1e-5 in the ONNX node tests."""

import numpy as np

FORWARD = 5e-7  # of max(1, |gamma * xhat| + |beta|)
GRADIENT = 1e-6  # of rstd * max|g| over the set; of the sum of the absolute terms
FLOAT64 = 5e-11  # the forward bound where the arithmetic is float64


def assert_within(what, value, exact, bound):
    """|value - exact| <= bound everywhere; a NaN is never within, a shape that would broadcast is wrong."""
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    assert value.shape == exact.shape, f"{what} has shape {value.shape}, expected {exact.shape}"
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


def forward_bound(xhat64, gamma, beta):
    return FORWARD * np.maximum(1.0, np.abs(gamma * xhat64) + np.abs(beta))


def assert_forward(y, y64, xhat64, gamma, beta):
    assert_within("y", y, y64, forward_bound(xhat64, gamma, beta))


def assert_statistics(x, mean, rstd, xhat64):
    """The statistics given back make xhat as exact as y must be; mean and rstd broadcast against x."""
    xhat = (np.asarray(x, np.float64) - mean) * rstd
    assert_within("(x - mean) * rstd", xhat, xhat64, forward_bound(xhat64, 1.0, 0.0))


def assert_running(what, running, exact, scale):
    """A running statistic: the bound of xhat in units of the statistic's `scale`, and one rounding to its own dtype."""
    rounding = np.spacing(np.abs(exact).astype(running.dtype)).astype(np.float64)
    assert_within(what, running, exact, FORWARD * scale + rounding)


def assert_dx(dx, dx64, rstd, g, axes):
    """Per set: the elements that differ only along `axes`."""
    largest = np.abs(g).max(axes, keepdims=True)
    assert_within("dx", dx, dx64, GRADIENT * rstd * largest)


def assert_param_grad(d, d64, absolute, by_statistics=0.0):
    """`absolute`: the sum of the absolute terms of which d64 is the sum.

    Where d64 was not made with the mean and rstd that backward was given, `by_statistics` says what these may add: the
    sum of |dy| * max(1, |xhat|), each term moved as far as the forward bound lets its xhat move.
    """
    assert_within("parameter gradient", d, d64, GRADIENT * absolute + FORWARD * by_statistics)


def assert_same_bits(a, b):
    """Every bit, but for the payload of a NaN."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype} {a.shape} against {b.dtype} {b.shape}"
    bits = {4: np.uint32, 8: np.uint64}[a.dtype.itemsize]
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    differ = (a.view(bits) != b.view(bits)) & ~(np.isnan(a) & np.isnan(b))
    if differ.any():
        first = tuple(map(int, np.argwhere(differ)[0]))
        raise AssertionError(
            f"{np.count_nonzero(differ)} of {a.size} differ, first at {first}: {a[first]!r} against {b[first]!r}"
        )
