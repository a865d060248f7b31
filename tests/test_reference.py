"""The reference itself: against loops over plain Python numbers, finite differences, exact fractions, known answers."""

from fractions import Fraction
from math import fsum, prod, sqrt

import numpy as np
import pytest

import bounds
import reference

# Which set, and which weight, the element at `index` belongs to, written without any reshape.
LOOPS = {
    "batch": lambda i, shape, options: (i[options["channel_axis"]], i[options["channel_axis"]]),
    "instance": lambda i, shape, options: ((i[0], i[options["channel_axis"]]), i[options["channel_axis"]]),
    "group": lambda i, shape, options: (
        (i[0], i[options["channel_axis"]] // (shape[options["channel_axis"]] // options["num_groups"])),
        i[options["channel_axis"]],
    ),
    "layer": lambda i, shape, options: (
        i[: len(shape) - len(options["normalized_shape"])],
        i[len(shape) - len(options["normalized_shape"]) :],
    ),
}
LOOPS["rms"] = LOOPS["layer"]

EXAMPLES = [
    ("batch", (3, 4), {"channel_axis": 1}),
    ("batch", (3, 2, 4), {"channel_axis": 1}),
    ("batch", (3, 2, 4), {"channel_axis": -1}),
    ("batch", (3, 2, 4), {"channel_axis": 0}),
    ("instance", (3, 2, 4), {"channel_axis": 1}),
    ("instance", (2, 3, 2, 2), {"channel_axis": -1}),
    ("group", (2, 6, 3), {"num_groups": 2, "channel_axis": 1}),
    ("group", (2, 3, 6), {"num_groups": 3, "channel_axis": -1}),
    ("group", (2, 6), {"num_groups": 2, "channel_axis": 1}),
    ("layer", (3, 2, 4), {"normalized_shape": (4,)}),
    ("layer", (3, 2, 4), {"normalized_shape": (2, 4)}),
    ("layer", (3, 2, 4), {"normalized_shape": (3, 2, 4)}),
    ("rms", (3, 5), {"normalized_shape": (5,)}),
    ("rms", (3, 2, 4), {"normalized_shape": (2, 4)}),
]


def example(rng, norm, shape, options):
    sets = reference.NORMS[norm](shape, **options)
    x, dy = rng.standard_normal((2, *sets.view)) + 3
    weight, bias = rng.standard_normal((2, *sets.parameter))
    return sets, x, dy, weight, bias


def test_examples_cover_every_norm():
    assert {norm for norm, *_ in EXAMPLES} == set(reference.NORMS)


@pytest.mark.parametrize(("norm", "shape", "options"), EXAMPLES)
def test_loops_over_plain_numbers(rng, norm, shape, options):
    sets, x, _, weight, bias = example(rng, norm, shape, options)
    y, _ = reference.normalize(x, *reference.statistics(x, sets.axes, 0.25, center=norm != "rms"), weight, bias)
    x, y, members = x.reshape(shape), y.reshape(shape), {}
    for i in np.ndindex(shape):
        members.setdefault(LOOPS[norm](i, shape, options)[0], []).append(float(x[i]))
    parameters = sorted({LOOPS[norm](i, shape, options)[1] for i in np.ndindex(shape)})
    assert len(parameters) == prod(sets.parameter)
    for i in np.ndindex(shape):
        of_set, of_parameter = LOOPS[norm](i, shape, options)
        values, p = members[of_set], parameters.index(of_parameter)
        mu = 0.0 if norm == "rms" else fsum(values) / len(values)
        xhat = (x[i] - mu) / sqrt(fsum((v - mu) ** 2 for v in values) / len(values) + 0.25)
        gamma, beta = weight.ravel()[p], bias.ravel()[p]
        bound = bounds.FLOAT64 * max(1.0, abs(gamma * xhat) + abs(beta))
        bounds.assert_within("y", y[i], gamma * xhat + beta, bound)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "shape", "options"), EXAMPLES)
def test_gradient_by_finite_differences(rng, norm, shape, options, training):
    """Central differences of the loss <dy, y>, by every element of x, weight and bias."""
    sets, x, dy, weight, bias = example(rng, norm, shape, options)
    center, step = norm != "rms", 2.0**-14
    mu, rstd = reference.statistics(x, sets.axes, center=center)

    def loss(x, weight, bias):
        statistics = reference.statistics(x, sets.axes, center=center) if training else (mu, rstd)
        return np.vdot(dy, reference.normalize(x, *statistics, weight, bias)[0])

    def differences(which):
        arguments = [x, weight, bias]
        found = np.empty_like(arguments[which])
        for i in np.ndindex(found.shape):
            up, down = arguments[which].copy(), arguments[which].copy()
            up[i] += step
            down[i] -= step
            high, low = ([*arguments[:which], moved, *arguments[which + 1 :]] for moved in (up, down))
            found[i] = (loss(*high) - loss(*low)) / (2 * step)
        return found

    dx, *terms = reference.gradient(dy, x, mu, rstd, sets.axes, weight, center, training)
    # Differences are no more exact than float32 is.
    bounds.assert_dx(differences(0), dx, rstd, weight * dy, sets.axes, dtype=np.float32)
    for which, term in zip((1, 2), terms):
        exact, absolute = (reference.sum_to(t, sets.parameter) for t in (term, np.abs(term)))
        bounds.assert_param_grad(differences(which), exact, absolute, data=np.float32)


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("n", [2, 3, 1000])
@pytest.mark.parametrize("center", [True, False])
def test_against_fractions(rng, ratio, n, center):
    """float64 is enough to judge float32, longdouble to judge float64: far closer to the exact value than any bound."""
    dtypes = {np.float32: np.float64, np.float64: np.longdouble} if reference.EXTENDED else {np.float32: np.float64}
    for data, dtype in dtypes.items():
        x = (rng.standard_normal(n) + ratio).astype(data)
        xhat = exact_xhat(x, center)
        y, _ = reference.normalize(x, *reference.statistics(x, (0,), center=center, dtype=dtype), dtype=dtype)
        far_closer = 1e-2 * bounds.forward_factor(data)
        bounds.assert_within("xhat", y, xhat, far_closer * np.maximum(1.0, np.abs(xhat)))


def exact_xhat(x, center, eps=1e-5):
    """In fractions, but for the last step."""
    exact = [Fraction(float(v)) for v in x]
    mu = sum(exact) / len(exact) if center else Fraction(0)
    var = float(sum((v - mu) ** 2 for v in exact) / len(exact))
    return np.array([float(v - mu) for v in exact]) / sqrt(var + eps)


@pytest.mark.parametrize(
    ("x", "mean", "std", "digits"),
    [
        ([33, 72, 40, 104, 52, 56, 89, 24, 52, 73], 59.5, 23.7834, 4),
        ([9, 8, 7, 10, 5, 8, 7, 9, 8, 7], 7.8, 1.32665, 5),
    ],
)
def test_known_answers(x, mean, std, digits):
    mu, rstd = reference.statistics(x, (0,), eps=0.0)
    assert round(mu.item(), digits) == mean
    assert round(1 / rstd.item(), digits) == std
