"""Backward: every norm in every layout, training and evaluation, to the bounds; what is left out by `needs`."""

from itertools import chain, combinations

import numpy as np
import pytest

import bounds
import normkit as nk
from cases import DTYPES, NORMS, Case, any_axes, ids, in_every_dtype, layouts, random, ratios, with_evaluation

pytestmark = pytest.mark.any_device

EPS = 1e-5
LAYOUTS = with_evaluation(layouts())
EVERY = in_every_dtype(LAYOUTS, 5)
SOME = in_every_dtype(LAYOUTS[::5], 2)
NEEDS = ("x", "weight", "bias")


def arguments(rng, case, ratio=0.0, dy_mean=0.0):
    """x, dy, weight, and the keywords that give an evaluating case its statistics."""
    x = case.random(rng, ratio)
    dy = case.random(rng, offset=dy_mean)
    weight, _ = case.parameters(rng)
    running = None if case.training else case.running(rng, ratio)
    more = {} if case.training else {"running_mean": running[0], "running_var": running[1]}
    return x, dy, weight, running, more


@pytest.mark.parametrize("case", EVERY, ids=ids(EVERY))
def test_layouts(rng, case):
    for ratio in ratios(case.dtype):
        x, dy, weight, running, more = arguments(rng, case, ratio)
        for gamma in (None, weight):
            _, mean, rstd = case.forward(x, gamma, eps=EPS, **more)
            gradients = case.backward(dy, x, mean, rstd, gamma)
            case.check_backward(gradients, dy, x, (mean, rstd), gamma, EPS, running)


@pytest.mark.parametrize("case", in_every_dtype(LAYOUTS[::3], 5), ids=ids(in_every_dtype(LAYOUTS[::3], 5)))
@pytest.mark.parametrize("dy_mean", [1e2, 1e6])
def test_dy_far_from_zero(rng, case, dy_mean):
    """dx is what is left when the mean of dy is taken away."""
    farthest = ratios(case.dtype)[-1]
    x, dy, weight, running, more = arguments(rng, case, min(farthest, 1e3), min(farthest, dy_mean))
    _, mean, rstd = case.forward(x, eps=EPS, **more)
    case.check_backward(case.backward(dy, x, mean, rstd, weight), dy, x, (mean, rstd), weight, EPS, running)


@pytest.mark.parametrize("norm", NORMS)
def test_memory_of_dy_is_its_own(rng, norm):
    """dy may lie in another order than x; dx takes the order of x."""
    for shape in ((6, 35), (3, 6, 35), (2, 6, 5, 7)):
        for case in layouts((shape,), (norm,)):
            x, _, weight, *_ = arguments(rng, case, 1e2)
            values = random(rng, shape)
            _, mean, rstd = case.forward(x, eps=EPS)
            for order in ("C", "F", "channels last", "negative", "strided", "misaligned"):
                dy = Case(norm, shape, case.options, order).arrange(values)
                gradients = case.backward(dy, x, mean, rstd, weight)
                case.check_backward(gradients, dy, x, (mean, rstd), weight, EPS)
                assert gradients[0].strides == np.empty_like(x).strides


@pytest.mark.parametrize("case", SOME, ids=ids(SOME))
def test_needs(rng, case):
    """A gradient that is not named is None; the others keep their bits."""
    x, dy, weight, _, more = arguments(rng, case, 1.0)
    _, mean, rstd = case.forward(x, eps=EPS, **more)
    names = NEEDS if case.row.has_bias else NEEDS[:2]
    every = case.backward(dy, x, mean, rstd, weight)
    for needs in chain.from_iterable(combinations(names, k) for k in range(len(names) + 1)):
        some = case.backward(dy, x, mean, rstd, weight, needs=needs)
        for name, a, b in zip(names, every, some):
            assert (b is None) == (name not in needs)
            if b is not None:
                bounds.assert_same_bits(a, b)


def test_needs_every_gradient_by_default(rng):
    case = Case("layer", (3, 8), {"normalized_shape": (8,)})
    x = random(rng, case.shape)
    _, mean, rstd = case.forward(x)
    assert all(gradient is not None for gradient in nk.layer_norm_backward(x, x, mean, rstd, 8))


@pytest.mark.parametrize("norm", [norm for norm in NORMS if NORMS[norm].function != "normalize"])
def test_without_weight_gamma_is_one(rng, norm):
    """The five norms know the shape of their parameters, and give the gradients of a weight of ones, of x's dtype."""
    for case in in_every_dtype(layouts(((4, 6, 35),), (norm,))):
        x, dy, *_ = arguments(rng, case, 1.0)
        _, mean, rstd = case.forward(x, eps=EPS)
        without = case.backward(dy, x, mean, rstd)
        ones = case.backward(dy, x, mean, rstd, np.ones(case.weight_shape, case.dtype))
        for a, b in zip(without, ones):
            assert (a is None) == (b is None)
            assert a is None or a.dtype == b.dtype == case.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", LAYOUTS[::7], ids=ids(LAYOUTS[::7]))
def test_statistics_may_be_strided(rng, case, library):
    """mean and rstd of any strides give the bits of contiguous ones."""
    if library is not None:
        pytest.skip("on a GPU statistics must be as forward gave them")
    x, dy, weight, _, more = arguments(rng, case, 1.0)
    _, mean, rstd = case.forward(x, eps=EPS, **more)

    def spread(statistic):
        if statistic is None or statistic.ndim == 0:
            return statistic
        base = np.full([3 * n for n in statistic.shape], np.nan)
        view = base[(slice(None, None, -3),) * statistic.ndim]
        view[...] = statistic
        return view

    plain = case.backward(dy, x, mean, rstd, weight)
    for statistics in ((spread(mean), spread(rstd)), (None if mean is None else mean.copy("F"), rstd.copy("F"))):
        for a, b in zip(plain, case.backward(dy, x, *statistics, weight)):
            assert (a is None) == (b is None)
            if a is not None:
                bounds.assert_same_bits(a, b)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_evaluation_treats_statistics_as_constants(rng, norm):
    """Far from x, too: there dx is rstd * gamma * dy, whatever xhat is."""
    for case in layouts(((4, 6, 35), (4, 6, 5, 7)), (norm,)):
        case = Case(norm, case.shape, case.options, case.memory, training=False)
        x, dy, weight, *_ = arguments(rng, case)
        running = case.running(rng, 1e6)
        _, mean, rstd = case.forward(x, running_mean=running[0], running_var=running[1], eps=EPS)
        gradients = case.backward(dy, x, mean, rstd, weight)
        case.check_backward(gradients, dy, x, (mean, rstd), weight, EPS, running)
        assert (gradients[0] != case.backward(dy, x, mean, rstd, weight, **case.row.training)[0]).all()


@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 1, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sets_of_one_element_have_no_gradient(rng, shape, dtype):
    """xhat is 0 whatever x is."""
    axes = tuple(i for i, extent in enumerate(shape) if extent == 1)
    case = Case("axes", shape, {"axes": axes}, parameter=shape, dtype=dtype)
    x, dy, weight = (case.random(rng) for _ in range(3))
    _, mean, rstd = case.forward(x, weight, eps=EPS)
    gradients = case.backward(dy, x, mean, rstd, weight)
    case.check_backward(gradients, dy, x, (mean, rstd), weight, EPS)
    bounds.assert_same_bits(gradients[2], dy)
    np.testing.assert_array_equal(gradients[1], 0.0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 4, 0), (0, 4, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_differentiate(norm, shape, dtype):
    """An empty x has an empty dx; a sum over nothing is zero."""
    for options in NORMS[norm].options((3, 4, 6)):
        if "normalized_shape" in options:
            options = {"normalized_shape": shape[len(shape) - len(options["normalized_shape"]) :]}
        if "num_groups" in options:
            options = {**options, "num_groups": 1}
        case = Case(norm, shape, options)
        x, statistics = np.empty(shape, dtype), np.full(case.statistics_shape, np.nan)
        weight = np.ones(case.weight_shape, dtype)
        dx, dweight, dbias = case.backward(x, x, statistics, statistics, weight)
        assert dx.shape == shape and dx.dtype == dtype
        for gradient in (dweight, dbias) if case.row.has_bias else (dweight,):
            assert gradient.shape == case.weight_shape and gradient.dtype == dtype
            np.testing.assert_array_equal(gradient, 0.0)


def test_backward_of_any_sets_against_five_dimensions(rng):
    """Sets and weights that no named norm has."""
    shape = (3, 4, 5, 6, 7)
    for axes, parameter in (((0, 2, 4), (4, 1, 6, 1)), ((1, 3), (3, 1, 1, 6, 7)), ((4, 0), (5, 1, 1)), ((2,), shape)):
        axes = any_axes(shape, axes).axes
        for norm in ("axes", "axes without center"):
            case = Case(norm, shape, {"axes": axes}, parameter=parameter)
            x, dy, weight, *_ = arguments(rng, case, 1e3)
            _, mean, rstd = case.forward(x, weight, eps=EPS)
            case.check_backward(case.backward(dy, x, mean, rstd, weight), dy, x, (mean, rstd), weight, EPS)
