"""What holds for any shape, axes, memory, scale and data, with examples drawn by hypothesis."""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import bounds
from cases import DTYPES, NORMS, Case, permuted, random, ratios
from normkit import _debug

common = settings(
    deadline=None,
    max_examples=200,
    derandomize=True,  # the same examples in every run
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

seeds = st.integers(0, 1000)


@st.composite
def cases(draw, norms=tuple(NORMS), dtypes=DTYPES):
    """A norm, its arguments on some shape, and a dtype."""
    norm, dtype = draw(st.sampled_from(norms)), draw(st.sampled_from(dtypes))
    row = NORMS[norm]
    extents = st.one_of(st.integers(1, 6), st.sampled_from([7, 8, 9, 16, 17, 31, 32, 33, 65]))
    shapes = st.lists(extents, min_size=row.least_ndim, max_size=5).map(tuple)
    shape = draw(shapes.filter(lambda shape: np.prod(shape) < 30_000))
    if norm.startswith("axes"):
        axes = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True).map(tuple))
        parameter = tuple(draw(st.sampled_from((1, extent))) for extent in shape)
        left_away = draw(st.integers(0, parameter_start(parameter)))
        return Case(norm, shape, {"axes": axes}, parameter=parameter[left_away:], dtype=dtype)
    options = [o for o in row.options(shape) if Case(norm, shape, o).set_size >= row.least_set]
    assume(options)  # there are none where every set would have one element, which raises
    return Case(norm, shape, draw(st.sampled_from(options)), dtype=dtype)


def parameter_start(parameter):
    """How many leading axes of extent 1 may be left away."""
    return next((i for i, extent in enumerate(parameter) if extent != 1), len(parameter))


@dataclass(frozen=True)
class Recipe:
    """Data of any scale and offset, in any memory order, some axes with gaps between their elements or behind them, or
    backwards."""

    dtype: str
    seed: int
    exponent: int
    ratio: float
    steps: tuple[int, ...]
    order: tuple[int, ...]
    gaps: tuple[int, ...]

    def array(self, shape):
        largest = float(ml_dtypes.finfo(self.dtype).max)
        values = (np.random.default_rng(self.seed).standard_normal(shape) + self.ratio) * 10.0**self.exponent
        extents = [n * abs(step) + gap for n, step, gap in zip(shape, self.steps, self.gaps)]
        base = permuted(np.full(extents, np.nan, self.dtype), self.order)
        base = base[tuple(slice(0, extent - gap) for extent, gap in zip(extents, self.gaps))]
        view = base[(..., *(slice(None, None, step) for step in self.steps))]
        view[...] = np.clip(values, -largest, largest)
        return view


@st.composite
def recipes(draw, case, steps=(1, 1, 1, -1, 2), rows=False):
    """Drawn instead of the array: hypothesis shows it when an example fails. rows: the last axis has no gaps."""
    outer = len(case.shape) - rows
    return Recipe(
        case.dtype,
        draw(seeds),
        draw(st.integers(-6, 6)),
        draw(st.sampled_from(ratios(case.dtype))) * draw(st.sampled_from([1, -1])),
        tuple(draw(st.sampled_from(steps)) for _ in case.shape),
        (*draw(st.permutations(range(outer))), *range(outer, len(case.shape))),
        (*(draw(st.sampled_from([0, 0, 1, 3])) for _ in range(outer)), *(0,) * rows),
    )


@st.composite
def short_rows(draw):
    """Sets that are short rows, as heads of attention, or small images; so many that kernels take several at once."""
    norm = draw(st.sampled_from(("layer", "rms", "layer", "rms", "batch", "instance", "group")))
    extents = st.sampled_from([1, 2, 3, 5, 7, 16, 17, 33, 40])
    outer = draw(st.lists(extents, min_size=2, max_size=4).map(tuple))
    shape = (*outer, draw(st.sampled_from([4, 8, 17, 64])))
    assume(512 <= np.prod(shape) < 100_000)
    dtype = draw(st.sampled_from(DTYPES))
    if norm in ("layer", "rms"):
        return Case(norm, shape, {"normalized_shape": shape[-1:]}, dtype=dtype)
    options = [o for o in NORMS[norm].options(shape) if Case(norm, shape, o).set_size >= NORMS[norm].least_set]
    assume(options)
    return Case(norm, shape, draw(st.sampled_from(options)), dtype=dtype)


def gaussian(seed, case, offset=0.0):
    return random(np.random.default_rng(seed), case.shape, dtype=case.dtype, offset=offset)


def assert_same_results(results, expected):
    for a, b in zip(results, expected):
        assert (a is None) == (b is None)
        if a is not None:
            bounds.assert_same_bits(a, b)


@common
@given(st.data())
def test_bounds(data):
    """Forward and backward are within the bounds."""
    case = data.draw(cases())
    x, dy = (data.draw(recipes(case)).array(case.shape) for _ in range(2))
    seed, scale = data.draw(seeds), data.draw(st.floats(0.01, 100))
    weight, bias = case.parameters(np.random.default_rng(seed), scale)
    eps = data.draw(st.sampled_from([1e-5, 1e-12, 1e-3, 1.0]))
    y, mean, rstd = case.forward(x, weight, bias, eps=eps)
    case.check_forward(y, x, weight, bias, eps, (mean, rstd))
    case.check_backward(case.backward(dy, x, mean, rstd, weight), dy, x, (mean, rstd), weight, eps)


@common
@given(st.data())
def test_schedule_changes_no_bit(data):
    """Any schedule on any instruction set has the bits of the automatic one."""
    case = data.draw(cases())
    x, dy = (data.draw(recipes(case)).array(case.shape) for _ in range(2))
    weight, bias = case.parameters(np.random.default_rng(0))
    names = ("split", "resident", "stream", "by_row", "by_sample")
    forced = {name: data.draw(st.sampled_from([None, False, True])) for name in names}
    isa, threads = data.draw(st.sampled_from(_debug.isas())), data.draw(st.sampled_from([1, 2, 3, 8]))

    def run():
        y, mean, rstd = case.forward(x, weight, bias)
        return [y, mean, rstd, *case.backward(dy, x, mean, rstd, weight)]

    expected = run()
    with _debug.force(isa=isa, threads=threads, **forced):
        assert_same_results(run(), expected)


@settings(common, max_examples=600)
@given(st.data())
def test_views_have_the_same_bits_on_any_path(data):
    """Axes in any order, with gaps: what lies where decides which kernels take the rows, and not on any bit."""
    case = data.draw(short_rows())
    rows = case.norm in ("layer", "rms")
    recipe, other = (data.draw(recipes(case, steps=(1,), rows=rows)) for _ in range(2))
    if data.draw(st.sampled_from([True, True, False])):
        other = replace(recipe, seed=recipe.seed + 1)
    x, dy = recipe.array(case.shape), other.array(case.shape)
    weight, bias = case.parameters(np.random.default_rng(0))

    def run(**forced):
        with _debug.force(**forced):
            y, mean, rstd = case.forward(x, weight, bias)
            return [y, mean, rstd, *case.backward(dy, x, mean, rstd, weight, grad_dtype=np.float64)]

    expected = run(threads=1, isa=_debug.isas()[0], by_row=False, stream=False)
    row_by_row = {"by_row": True, "resident": True, "split": False}
    for forced in ({"threads": 3}, {"threads": 2, "stream": True, **row_by_row}, {"threads": 3, "split": True}):
        assert_same_results(run(**forced), expected)


@common
@given(st.data())
def test_powers_of_two_scale_exactly(data):
    """x * 2^k gives the same y (eps = 0): scaling by a power of two is exact in every step."""
    case = data.draw(cases(dtypes=[dtype for dtype in DTYPES if ml_dtypes.finfo(dtype).minexp < -100]))
    x = gaussian(data.draw(seeds), case)
    k = data.draw(st.integers(-30, 30))
    weight, bias = case.parameters(np.random.default_rng(1))
    assume(case.set_size > 1)
    y, scaled = (case.plain(a, weight, bias, eps=0.0) for a in (x, np.ldexp(x, k)))
    bounds.assert_same_bits(y, scaled)


@common
@given(st.data())
def test_negation_mirrors(data):
    """-x gives -y where there is no bias."""
    case = data.draw(cases())
    x = gaussian(data.draw(seeds), case, data.draw(st.sampled_from([0.0, 1e4])))
    np.testing.assert_array_equal(case.plain(-x), -case.plain(x))


@common
@given(st.data())
def test_dx_is_orthogonal(data):
    """In every set dx sums to zero, and so does dx * xhat (eps = 0): moving or scaling x leaves y as it is."""
    case = data.draw(cases())
    assume(case.set_size > 1)
    x, dy = (gaussian(data.draw(seeds), case) for _ in range(2))
    _, mean, rstd = case.forward(x, eps=0.0)
    dx = case.backward(dy, x, mean, rstd)[0]
    view, axes, _ = case.sets
    mean64, rstd64 = case.exact_statistics(x, 0.0)
    xhat = (x.reshape(view).astype(mean64.dtype) - mean64) * rstd64
    dx = dx.reshape(view).astype(np.float64)
    bound = bounds.dx_bound(case.dtype, dx, rstd64, dy.reshape(view).astype(np.float64), axes)
    for against in (np.ones(view), xhat) if case.row.center else (xhat,):
        total = (dx * against).sum(axes, keepdims=True)
        bounds.assert_within("sum", total, np.zeros_like(total), (bound * np.abs(against)).sum(axes, keepdims=True))


@common
@given(st.data())
def test_what_is_outside_a_set_does_not_matter(data):
    """Reversing the order of the samples reverses the results, bit by bit."""
    case = data.draw(cases(norms=tuple(norm for norm in NORMS if NORMS[norm].per_sample)))
    assume(0 not in case.sets.axes)
    x, dy = (gaussian(data.draw(seeds), case) for _ in range(2))
    y, mean, rstd = case.forward(x)
    backwards = [a[::-1].copy() for a in (x, dy)]
    other_y, other_mean, other_rstd = case.forward(backwards[0])
    bounds.assert_same_bits(other_y, y[::-1])
    bounds.assert_same_bits(other_rstd, rstd[::-1])
    dx = case.backward(dy, x, mean, rstd)[0]
    other_dx = case.backward(backwards[1], backwards[0], other_mean, other_rstd)[0]
    bounds.assert_same_bits(other_dx, dx[::-1])


@common
@given(st.data())
def test_normalizing_twice_is_normalizing_once(data):
    """y has mean 0 and variance 1 (eps = 0), as far as the bound of y reaches."""
    case = data.draw(cases())
    assume(case.set_size > 1)
    x = gaussian(data.draw(seeds), case)
    view, axes, _ = case.sets
    sets = x.reshape(view).astype(np.float64)
    varied = sets.max(axes, keepdims=True) > sets.min(axes, keepdims=True)  # two numbers of 16 bits may well be equal
    y = np.where(varied, case.plain(x, eps=0.0).reshape(view).astype(np.float64), np.nan)
    error = bounds.forward_bound(case.dtype, y, y, 1.0, 0.0)
    mean_error, square_error = (a.mean(axes, keepdims=True) for a in (error, error * (2 * np.abs(y) + error)))
    if case.row.center:
        mean = y.mean(axes, keepdims=True)
        bounds.assert_within("mean of y", mean[varied], np.zeros_like(mean[varied]), mean_error[varied])
    square = (y**2).mean(axes, keepdims=True)[varied]
    bounds.assert_within("mean square of y", square, np.ones_like(square), square_error[varied])
