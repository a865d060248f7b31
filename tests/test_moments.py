"""Moments of parts, merged, are those of the whole: exact to the contract, however the data are divided."""

import dataclasses
import doctest
import inspect
import pickle
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bounds
import normkit as nk
from cases import DATA, MEMORY, RATIOS, lines, random
from normkit import _moments
from test_properties import common, seeds


def exact_moments(values):
    """Count, mean and M2 of a flat array, in fractions: no rounding but the last."""
    numbers = [Fraction(float(value)) for value in values]
    mean = sum(numbers) / len(numbers)
    return len(numbers), float(mean), float(sum((number - mean) ** 2 for number in numbers))


def assert_moments(found, values, bound=bounds.FORWARD):
    """`values` is (sets, n). The mean is as exact as it must be for xhat, and so is the standard deviation."""
    counts, means, m2s = zip(*map(exact_moments, values))
    assert {found.count} == set(counts)
    std = np.sqrt(np.array(m2s) / found.count)
    assert found.mean.dtype == found.M2.dtype == np.float64
    # The mean itself is a float64, and has no more digits than that.
    bounds.assert_within("mean", found.mean, means, bound * std + np.spacing(np.abs(means)))
    bounds.assert_within("std", np.sqrt(found.M2 / found.count), std, bound * std)


def parts(values, cuts):
    """The moments of consecutive pieces of the rows."""
    return [nk.moments(np.ascontiguousarray(piece), 1) for piece in np.split(values, sorted(cuts), axis=1)]


def from_left(pieces):
    return reduce(nk.Moments.merge, pieces)


def from_right(pieces):
    return reduce(lambda a, b: b.merge(a), reversed(pieces))


def in_a_tree(pieces):
    if len(pieces) == 1:
        return pieces[0]
    middle = len(pieces) // 2
    return in_a_tree(pieces[:middle]).merge(in_a_tree(pieces[middle:]))


ORDERS = (from_left, from_right, in_a_tree)
every_order = pytest.mark.parametrize("merge", ORDERS, ids=[order.__name__ for order in ORDERS])


# --- moments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 33, 515, 2050])
@pytest.mark.parametrize("kind", DATA)
def test_moments_are_exact(rng, kind, n):
    values = lines(rng, n, (kind,))
    assert_moments(nk.moments(values, 1), values)
    assert_moments(nk.moments(np.asfortranarray(values), -1), values)
    assert_moments(nk.moments(values.T.copy(), 0), values)


@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16"])
def test_dtypes(rng, name):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes, which has bfloat16, is not installed")
    bound = bounds.FLOAT64 if name == "float64" else bounds.FORWARD
    ratios = RATIOS if name == "float64" else (0.0, 1.0, 1e2)
    values = np.array([rng.standard_normal(515) + ratio for ratio in ratios]).astype(name)
    assert_moments(nk.moments(values, 1), values, bound)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("axes", [0, 1, (2,), (-1, 0), [1, 2], (0, 1, 2)], ids=str)
def test_axes_and_memory(rng, memory, axes):
    x = MEMORY[memory](random(rng, (4, 5, 6), 100.0))
    reduced = {axis % 3 for axis in (axes if isinstance(axes, tuple | list) else (axes,))}
    kept = tuple(axis for axis in range(3) if axis not in reduced)
    found = nk.moments(x, axes)
    assert found.mean.shape == found.M2.shape == tuple(x.shape[axis] for axis in kept)
    assert isinstance(found.mean, np.ndarray) and isinstance(found.M2, np.ndarray)
    sets = x.transpose(*kept, *sorted(reduced)).reshape(-1, found.count)
    flat = nk.Moments(found.count, found.mean.reshape(-1), found.M2.reshape(-1))
    assert_moments(flat, sets)


def test_the_norms_use_the_same(rng):
    x = lines(rng, 515)
    _, mean, rstd = nk.normalize_forward(x, 1, eps=0.5)
    found = nk.moments(x, 1)
    bounds.assert_same_bits(found.mean, mean)
    bounds.assert_within("rstd", rstd, 1 / np.sqrt(found.var() + 0.5), bounds.FLOAT64 * rstd)


def test_sets_of_nothing():
    """No elements: no moments, and neutral in a merge. No sets: nothing to know."""
    empty = nk.moments(np.zeros((3, 0), np.float32), 1)
    assert empty.count == 0 and empty.mean.shape == (3,)
    assert np.isnan(empty.mean).all() and np.isnan(empty.var()).all()
    none = nk.moments(np.zeros((0, 3), np.float32), 1)
    assert none.mean.shape == none.M2.shape == (0,)


X = np.arange(6, dtype=np.float32).reshape(2, 3)
REFUSED = [
    ((X.tolist(), 0), TypeError, "x must be a numpy.ndarray, got list; "),
    ((X.astype(np.int64), 0), TypeError, "x must be "),
    ((X.astype(">f4"), 0), TypeError, "x must be "),
    ((X[0, 0], 0), TypeError, "x must be a numpy.ndarray, got float32; "),
    ((np.zeros((), np.float32), 0), ValueError, "x must have 1 to 16 dimensions, got shape ()"),
    ((np.ma.masked_array(X), 0), TypeError, "x must be a plain numpy.ndarray, got MaskedArray; "),
    ((X, 2), ValueError, "axes must be from -2 to 1, as x has 2 dimensions, got 2"),
    ((X, (0, -2)), ValueError, "axes must name each axis once, got (0, -2)"),
    ((X, ()), ValueError, "axes must not be empty, got ()"),
    ((X, None), TypeError, "axes must be an int or a sequence of ints, got NoneType"),
    ((X, 1.0), TypeError, "axes must be an int or a sequence of ints, got float"),
    ((X, "1"), TypeError, "axes must be an int or a sequence of ints, got str"),
]


@pytest.mark.parametrize(("arguments", "error", "sentence"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_moments_refuses(arguments, error, sentence):
    with pytest.raises(error) as raised:
        nk.moments(*arguments)
    assert str(raised.value).startswith(sentence)


# --- merge ----------------------------------------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("pieces", [2, 3, 64])
def test_merged_parts_are_the_whole(rng, merge, kind, pieces):
    """Every ratio of mean to standard deviation; pieces from nothing to nearly all."""
    values = lines(rng, 1030, (kind,))
    cuts = rng.integers(0, 1031, pieces - 1)
    merged = merge(parts(values, cuts))
    assert_moments(merged, values)


@every_order
@common
@given(st.data())
def test_any_split(merge, data):
    ratio = data.draw(st.sampled_from([*RATIOS, -1e6]))
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    n = data.draw(st.integers(1, 200))
    rng = np.random.default_rng(data.draw(seeds))
    values = ((rng.standard_normal((2, n)) + ratio) * scale).astype(np.float32)
    cuts = data.draw(st.lists(st.integers(0, n), max_size=12))
    assert_moments(merge(parts(values, cuts)), values)


@common
@given(st.data())
def test_associative_and_commutative(data):
    """To the rounding of float64, for counts that may be weights and moments that need not be of any data."""
    scale = st.floats(0.5, 2)

    def drawn():
        count = data.draw(st.one_of(st.integers(1, 10**6), st.floats(0.1, 1e6)))
        return nk.Moments(count, [data.draw(scale), 1e3 * data.draw(scale)], [count * data.draw(scale) for _ in "ab"])

    a, b, c = (drawn() for _ in range(3))
    left = a.merge(b).merge(c)
    for other in (a.merge(b.merge(c)), c.merge(b).merge(a), b.merge(a.merge(c))):
        bounds.assert_within("count", other.count, left.count, bounds.FLOAT64 * left.count)
        bounds.assert_within("mean", other.mean, left.mean, bounds.FLOAT64 * left.std())
        bounds.assert_within("M2", other.M2, left.M2, bounds.FLOAT64 * left.M2)


def test_equation(rng):
    """Of two parts, against the equation in fractions."""
    for counts in ((3, 5), (1, 1000), (0.25, 2.5)):
        means, m2s = rng.standard_normal(2), rng.uniform(0, 1, 2)
        (na, nb), (ma, mb), (a, b) = ([Fraction(float(v)) for v in pair] for pair in (counts, means, m2s))
        merged = nk.Moments(counts[0], means[0], m2s[0]).merge(nk.Moments(counts[1], means[1], m2s[1]))
        assert merged.count == sum(counts)
        mean, m2 = (na * ma + nb * mb) / (na + nb), a + b + (ma - mb) ** 2 * na * nb / (na + nb)
        bounds.assert_within("mean", merged.mean, float(mean), bounds.FLOAT64)
        bounds.assert_within("M2", merged.M2, float(m2), bounds.FLOAT64 * float(m2))


@pytest.mark.parametrize("value", [0.0, -1.0, 0.1, 1e6 / 3, 3e38, 1e-40, 1e300])
def test_constant_parts_stay_exact(value):
    merged = nk.Moments(1, value, 0.0)
    for count in (1, 2, 7, 1000, 3, 10**12):
        merged = nk.Moments(count, value, 0.0).merge(merged)
        assert merged.mean == value and merged.M2 == 0
    assert merged.count == 1 + 1 + 2 + 7 + 1000 + 3 + 10**12


@pytest.mark.parametrize("nothing", [np.zeros(3), np.full(3, np.nan), np.full(3, np.inf)], ids=str)
def test_empty_is_neutral(rng, nothing):
    full = nk.Moments(5, rng.standard_normal(3), rng.uniform(0, 1, 3))
    empty = nk.Moments(0, nothing, nothing)
    for merged in (full.merge(empty), empty.merge(full)):
        assert merged.count == 5
        bounds.assert_same_bits(merged.mean, full.mean)
        bounds.assert_same_bits(merged.M2, full.M2)
    assert empty.merge(empty).count == 0


def test_merge_leaves_its_parts_alone(rng):
    a, b = (nk.Moments(n, rng.standard_normal(3), rng.uniform(0, 1, 3)) for n in (2, 3))
    before = pickle.dumps((a, b))
    merged = a.merge(b)
    merged.mean[:] = merged.M2[:] = 7
    assert pickle.dumps((a, b)) == before


def test_poison_stays_in_its_set():
    """Infinity and NaN give NaN without a warning, and only where they are."""
    a = nk.Moments(2, [1.0, np.inf, np.nan, -np.inf, 1e200], [0.5, 1.0, 1.0, 1.0, 1.0])
    b = nk.Moments(2, [3.0, np.inf, 0.0, 5.0, -1e200], [0.5, 1.0, 1.0, 1.0, 1.0])
    merged = a.merge(b)
    np.testing.assert_array_equal(merged.mean, [2.0, np.nan, np.nan, np.nan, 0.0])
    np.testing.assert_array_equal(merged.M2, [5.0, np.nan, np.nan, np.inf, np.inf])


def test_merge_refuses():
    a = nk.Moments(2, [1.0, 2.0], [0.0, 0.0])
    with pytest.raises(TypeError, match=r"^other must be Moments, got tuple; "):
        a.merge((2, 1.0, 0.0))
    for other in (nk.Moments(2, [1.0], [0.0]), nk.Moments(0, 0.0, 0.0)):
        with pytest.raises(ValueError, match=r"^other must have shape \(2,\), as these moments, got \((1,)?\)$"):
            a.merge(other)


# --- what one makes and asks ----------------------------------------------------------------------------------------


def test_scalars_and_arrays():
    for mean, m2 in ((2, 8), (np.float32(2), np.float64(8)), (np.array(2.0), np.array(8))):
        found = nk.Moments(3, mean, m2)
        for array, value in ((found.mean, 2), (found.M2, 8), (found.var(), 8 / 3), (found.std(1), 2)):
            assert isinstance(array, np.ndarray) and array.dtype == np.float64 and array.shape == () and array == value
    assert nk.Moments(3, [[1, 2]], [[3, 4]]).mean.shape == (1, 2)


def test_variance(rng):
    x = random(rng, (4, 100), 10.0).astype(np.float64)
    found = nk.Moments(100, x.mean(1), ((x - x.mean(1, keepdims=True)) ** 2).sum(1))
    for ddof in (0, 1, 2.5):
        expected = ((x - x.mean(1, keepdims=True)) ** 2).sum(1) / (100 - ddof)
        bounds.assert_within("var", found.var(ddof), expected, bounds.FLOAT64 * expected)
        bounds.assert_within("std", found.std(ddof), np.sqrt(expected), bounds.FLOAT64 * np.sqrt(expected))


@pytest.mark.parametrize(("count", "ddof"), [(0, 0), (1, 1), (1, 2), (0.5, 1), (3, 3)])
def test_variance_of_too_few(count, ddof):
    found = nk.Moments(count, [1.0, 2.0], [0.0, 5.0])
    np.testing.assert_array_equal(found.var(ddof), [np.nan, np.nan])
    np.testing.assert_array_equal(found.std(ddof), [np.nan, np.nan])


CONSTRUCTORS = [
    ((-1, 0.0, 0.0), ValueError, "count must be finite and at least 0, got -1"),
    ((float("nan"), 0.0, 0.0), ValueError, "count must be finite and at least 0, got nan"),
    ((float("inf"), 0.0, 0.0), ValueError, "count must be finite and at least 0, got inf"),
    (("many", 0.0, 0.0), TypeError, "count must be a float, got str"),
    ((2, "zero", 0.0), TypeError, "mean must be a float or an array of floats, got str"),
    ((2, 0.0, None), TypeError, "M2 must be a float or an array of floats, got NoneType"),
    ((2, [1.0, [2.0]], 0.0), TypeError, "mean must be a float or an array of floats, got list"),
    ((2, "1.5", 0.0), TypeError, "mean must be a float or an array of floats, got str"),
    ((2, 1j, 0.0), TypeError, "mean must be a float or an array of floats, got complex"),
    ((2, np.zeros(3), np.zeros(2)), ValueError, "M2 must have the shape of mean, (3,), got (2,)"),
    ((2, np.zeros(3), 0.0), ValueError, "M2 must have the shape of mean, (3,), got ()"),
    (
        (2, np.zeros(3), [0.0, -1.5, np.nan]),
        ValueError,
        "M2 must not be negative, got -1.5; it is the sum of squares of x - mean",
    ),
    (
        (2, np.ma.masked_array([1.0, 2.0], [0, 1]), np.zeros(2)),
        TypeError,
        "mean must be a plain numpy.ndarray, got MaskedArray; fill it with mean.filled(value)",
    ),
    (
        (2, np.zeros((1, 2)), np.ones((1, 2)).view(np.matrix)),
        TypeError,
        "M2 must be a plain numpy.ndarray, got matrix; view it with np.asarray(M2)",
    ),
    ((np.array(2), 0.0, 0.0), TypeError, "count must be a float, got ndarray; pass count.item()"),
]


@pytest.mark.parametrize(("arguments", "error", "sentence"), CONSTRUCTORS, ids=[row[2] for row in CONSTRUCTORS])
def test_constructor_refuses(arguments, error, sentence):
    with pytest.raises(error) as raised:
        nk.Moments(*arguments)
    assert str(raised.value) == sentence


def test_ddof_refuses():
    found = nk.Moments(2, 0.0, 0.0)
    for method in (found.var, found.std):
        with pytest.raises(TypeError, match=r"^ddof must be a float, got str$"):
            method("one")
        with pytest.raises(ValueError, match=r"^ddof must be finite, got nan$"):
            method(float("nan"))


def test_object(rng):
    """It does not change, and shows, pickles and compares as an object, not as arrays."""
    found = nk.Moments(3, [1.0, 2.0], [0.0, 0.5])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.count = 4
    assert repr(found) == "Moments(count=3, mean=array([1., 2.]), M2=array([0. , 0.5]))"
    again = pickle.loads(pickle.dumps(found))
    assert again.count == 3
    bounds.assert_same_bits(again.mean, found.mean)
    bounds.assert_same_bits(again.M2, found.M2)
    assert found == found and found != again


def test_docstrings_and_examples():
    for each in (nk.Moments, nk.Moments.merge, nk.Moments.var, nk.Moments.std, nk.moments):
        doc = inspect.getdoc(each)
        for section in ("Parameters", "Raises", "Examples"):
            assert f"\n{section}\n---" in doc
    log = []
    for test in doctest.DocTestFinder().find(_moments, "moments", globs={}):
        doctest.DocTestRunner().run(test, out=log.append)
    assert not log, "".join(log)
