"""Count, mean and sum of squared deviations: what can be known of a data set in parts, and put together exactly."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core, _errors
from .functional import Ints


@dataclass(frozen=True, init=False, eq=False)  # == of arrays would be an array
class Moments:
    r"""Count, mean and M2 of one or more sets of numbers, all of the same count.

    .. math:: \mathrm{mean} = \frac{1}{n} \sum x, \qquad M_2 = \sum (x - \mathrm{mean})^2

    `merge` joins those of two disjoint parts of the data, such as batches, files or machines. The result does not
    depend on how the data were divided, but for rounding.

    Parameters
    ----------
    count : int or float
        n; a float where it is a sum of weights. Not negative.
    mean, M2 : array_like of float
        One entry for each set, or scalars. Both are kept as float64 arrays, of the same shape.

    Raises
    ------
    TypeError
        `count` is no number, or `mean` or `M2` cannot be made float64, or is a masked array or a matrix.
    ValueError
        `count` is negative, NaN or infinite, `M2` is negative, or the shapes differ.

    References
    ----------
    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.

    Examples
    --------
    Moments of data that never are in memory at once. An empty part is where to start:

    >>> import numpy as np
    >>> import normkit as nk
    >>> seen = nk.Moments(0, np.zeros(2), np.zeros(2))
    >>> for part in ([[1, 10], [3, 14]], [[5, 18]]):
    ...     seen = seen.merge(nk.moments(np.array(part, dtype=np.float32), axes=0))
    >>> print(seen.count, seen.mean, seen.var(ddof=1))
    3 [ 3. 14.] [ 4. 16.]
    """

    count: int | float
    mean: NDArray[np.float64]
    M2: NDArray[np.float64]

    def __init__(self, count: int | float, mean: ArrayLike, M2: ArrayLike) -> None:
        _errors._finite("count", count, least=0)
        values = {}
        for name, value in (("mean", mean), ("M2", M2)):
            if isinstance(value, np.ndarray):
                _errors._plain(name, value, "")
            try:
                array = np.asarray(value)
            except ValueError:  # lists of different lengths
                array = np.asarray(None)
            if not np.can_cast(array.dtype, np.float64):
                raise TypeError(f"{name} must be a float or an array of floats, got {type(value).__name__}")
            values[name] = array.astype(np.float64, copy=False)
        if values["mean"].shape != values["M2"].shape:
            raise ValueError(f"M2 must have the shape of mean, {values['mean'].shape}, got {values['M2'].shape}")
        if np.count_nonzero(values["M2"] < 0):
            least = np.nanmin(values["M2"])
            raise ValueError(f"M2 must not be negative, got {least}; it is the sum of squares of x - mean")
        for name, each in {"count": count, **values}.items():
            object.__setattr__(self, name, each)

    def merge(self, other: "Moments") -> "Moments":
        r"""Return the moments of the union with a disjoint part of the data.

        .. math::

            \delta = \mathrm{mean}_b - \mathrm{mean}_a, \qquad
            \mathrm{mean} = \mathrm{mean}_a + \delta \frac{n_b}{n}, \qquad
            M_2 = M_{2,a} + M_{2,b} + \delta^2 \frac{n_a n_b}{n}

        Exact where both parts are constant with the same value. An empty part is neutral on either side.

        Parameters
        ----------
        other : Moments
            Of the same shape.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError
            `other` is not Moments.
        ValueError
            It has another shape.

        References
        ----------
        Chan, Golub and LeVeque, 1979, equation 2.1.

        Examples
        --------
        >>> import normkit as nk
        >>> whole = nk.Moments(1, 4.0, 0.0).merge(nk.Moments(2, 1.0, 2.0))
        >>> print(whole.count, whole.mean, whole.M2)
        3 2.0 8.0
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other must be Moments, got {type(other).__name__}; make them with Moments or moments")
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other must have shape {self.mean.shape}, as these moments, got {other.mean.shape}")
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        share = other.count / count
        with np.errstate(invalid="ignore", over="ignore"):  # infinite and NaN data give NaN, as in the norms
            delta = other.mean - self.mean
            mean = self.mean + delta * share
            m2 = self.M2 + other.M2 + delta * delta * (self.count * share)
        return Moments(count, mean, m2)

    def var(self, ddof: int | float = 0) -> NDArray[np.float64]:
        """Return the variance, M2 / (count - ddof).

        Parameters
        ----------
        ddof : int or float
            0: the biased variance, by which the norms divide. 1: the unbiased one, for running statistics.

        Returns
        -------
        ndarray of float64, shape of `mean`
            NaN where `count` is not larger than `ddof`.

        Raises
        ------
        TypeError, ValueError
            `ddof` is not a finite number.

        Examples
        --------
        >>> import normkit as nk
        >>> part = nk.Moments(3, 2.0, 8.0)
        >>> print(part.var(ddof=1), part.var(ddof=3))
        4.0 nan
        """
        _errors._finite("ddof", ddof)
        return np.asarray(self.M2 / (self.count - ddof) if self.count > ddof else np.full_like(self.M2, np.nan))

    def std(self, ddof: int | float = 0) -> NDArray[np.float64]:
        """Return the standard deviation, the root of `var`.

        Parameters
        ----------
        ddof : int or float
            As in `var`.

        Returns
        -------
        ndarray of float64, shape of `mean`
            NaN where `count` is not larger than `ddof`.

        Raises
        ------
        TypeError, ValueError
            As `var`.

        Examples
        --------
        >>> import normkit as nk
        >>> print(nk.Moments(3, 2.0, 8.0).std(ddof=1))
        2.0
        """
        return np.asarray(np.sqrt(self.var(ddof)))


def moments(x: NDArray[Any], axes: Ints) -> Moments:
    r"""Count, mean and M2 over any axes, as exact as in the norms.

    .. math:: \mathrm{mean} = \frac{1}{n} \sum x, \qquad M_2 = \sum (x - \mathrm{mean})^2

    They are sums over the elements that differ in their indices on `axes` alone.

    Parameters
    ----------
    x : ndarray of float64, float32, float16 or bfloat16, 1 to 16 dimensions
        Data. Any strides.
    axes : int or sequence of int
        The axes to reduce, each once; negative ones count from the end.

    Returns
    -------
    Moments
        `mean` and `M2` are float64, of the shape of x without the `axes`; `count` is the number of elements of each
        set. Where that is 0, `mean` and `M2` are NaN.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        An axis is out of range or named twice.

    References
    ----------
    Welford, "Note on a Method for Calculating Corrected Sums of Squares and Products", 1962; Chan, Golub and LeVeque,
    "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.

    Examples
    --------
    Digits that float32 does not lose:

    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 3, 5], [1000001, 1000003, 1000005]], dtype=np.float32)
    >>> found = nk.moments(x, axes=1)
    >>> print(found.count, found.mean, found.M2)
    3 [3.000000e+00 1.000003e+06] [8. 8.]
    """
    found = _core.moments(_core.AXES, x, axes)
    if found is None:
        _errors.explain_moments(x, axes)
    return Moments(*found)
