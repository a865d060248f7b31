"""The norms as plain functions of NumPy arrays, and of arrays on a GPU.

Names, positions and defaults are those of `torch.nn.functional`; bfloat16 is `ml_dtypes.bfloat16`. Every function is
one call of the compiled core, which checks its arguments and answers None when it cannot accept them;
`normkit._dispatch` then takes arrays on a GPU there, and has the sentence found and raised for all others.
"""

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex, TypeAlias, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _core, _dispatch
from ._core import AXES, AXES_RMS, BATCH, GROUP, INSTANCE, LAYER, RMS, backward, evaluate, forward
from ._errors import explain_needs, flag, grad_code, memory_limit, thread_count

# The element type of x, dy, out, y and dx. Not bound by np.floating, which bfloat16 is none of.
Element = TypeVar("Element", bound=np.generic)
Array: TypeAlias = NDArray[Element]
Parameter: TypeAlias = NDArray[Any]
Statistics: TypeAlias = NDArray[np.float64]
Running: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
Ints: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
Stream: TypeAlias = Any  # an int, or an object of torch, CuPy or others
Gradients: TypeAlias = tuple[Array[Element] | None, Parameter | None, Parameter | None]

# The gradients a backward can give, in the order of the core's bits: 1, 2, 4.
_ALL = ("x", "weight", "bias")
_ALL_RMS = ("x", "weight")


def _bits(needs: Iterable[str], names: tuple[str, ...]) -> int:
    """Set one bit for each gradient that `needs` names."""
    bits = 0
    if isinstance(needs, str):  # would be taken letter by letter
        explain_needs(needs, names)
    try:
        for name in needs:
            bits |= 1 << names.index(name)
    except (TypeError, ValueError):
        explain_needs(needs, names)
    return bits


# ---- batch norm ------------------------------------------------------------------------------------------------------


def batch_norm(
    x: Array[Element],
    running_mean: Running | None = None,
    running_var: Running | None = None,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: SupportsIndex = 1,
    ddof: float = 1,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> Array[Element]:
    r"""Normalize each channel over the batch and all other axes.

    .. math:: y = \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} \, \gamma_c + \beta_c

    In training, the mean and the biased variance of channel c come from x: over every axis but `channel_axis`. In
    evaluation they are `running_mean` and `running_var`.

    Parameters
    ----------
    x : ndarray of float64, float32, float16 or bfloat16, 2 to 16 dimensions
        Data with C channels on `channel_axis`. Any strides: NHWC memory seen as NCHW runs without a copy. Float64 is
        computed in float64, all others in float32.
    running_mean, running_var : ndarray of float32 or float64, shape (C,), optional
        Statistics over the batches seen so far; both or neither. Evaluation requires them. Training updates them in
        place: ``running = (1 - momentum) * running + momentum * new``, where the new variance is divided by
        n - ddof.
    weight, bias : ndarray of x's dtype, float32 or float64, shape (C,), optional
        Gamma and beta, each in its own dtype. None: ones and zeros.
    training : bool
        Statistics from x (True) or from `running_mean` and `running_var` (False).
    momentum : float
        Weight of the new value in the running statistics, 0 to 1 in normal use. Evaluation does not look at it.
    eps : float
        Added to the variance, in units of x squared; not negative. ``eps=0`` with zero variance gives NaN.
    channel_axis : int
        The axis of the channels; negative ones count from the end.
    ddof : float
        The variance that goes into `running_var` is divided by n - ddof, n being the number of values of a channel;
        0 <= ddof < n. 1, as in PyTorch, makes it unbiased; 0 is the one that normalizes. Evaluation does not look at
        it.
    out : ndarray, dtype and shape of x, optional
        Array to write y into. It may be x itself, and must not overlap anything else.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    ndarray
        y, of the dtype and shape of x and in its memory order; `out` if given. An empty x gives an empty y and leaves
        the running statistics as they were.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, axis, number or `out` is not acceptable; in training, a channel has a single value; in evaluation,
        the running statistics are missing or `running_var` is negative. A call that raises has changed nothing.
    MemoryError
        There is no memory for the result or for scratch. Nothing has changed either.
    KeyboardInterrupt
        Ctrl-C in a long call. `out` may be half written, running statistics are as they were.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    Two samples of two channels:

    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 10], [3, 14]], dtype=np.float32)
    >>> print(nk.batch_norm(x, training=True, eps=0.0))
    [[-1. -1.]
     [ 1.  1.]]

    Training moves the running statistics, evaluation uses them:

    >>> running_mean, running_var = np.zeros(2), np.ones(2)
    >>> y = nk.batch_norm(x, running_mean, running_var, training=True)
    >>> print(running_mean, running_var)
    [0.2 1.2] [1.1 1.7]
    >>> running_mean[:], running_var[:] = 2, 4
    >>> print(nk.batch_norm(x, running_mean, running_var, eps=0.0))
    [[-0.5  4. ]
     [ 0.5  6. ]]

    The biased variance, as the running one:

    >>> y = nk.batch_norm(x, running_mean, running_var, training=True, momentum=1.0, ddof=0)
    >>> print(running_var)
    [1. 4.]
    """
    if flag("training", training):
        y = forward(
            BATCH, x, channel_axis, weight, bias, eps, out, False, running_mean, running_var, momentum, ddof, stream
        )
        if y is None:
            y = _dispatch.forward(
                BATCH, x, channel_axis, weight, bias, eps, out, False, running_mean, running_var, momentum, ddof, stream
            )
        return y
    y = evaluate(BATCH, x, channel_axis, weight, bias, eps, out, False, running_mean, running_var, stream)
    if y is None:
        y = _dispatch.evaluate(BATCH, x, channel_axis, weight, bias, eps, out, False, running_mean, running_var, stream)
    return y


def batch_norm_forward(
    x: Array[Element],
    running_mean: Running | None = None,
    running_var: Running | None = None,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: SupportsIndex = 1,
    ddof: float = 1,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> tuple[Array[Element], Statistics, Statistics]:
    """`batch_norm` that also returns the statistics it used, for `batch_norm_backward`.

    ``y = (x - mean) * rstd * weight + bias`` with ``rstd = 1 / sqrt(var + eps)``.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis, ddof, out, stream
        As in `batch_norm`.

    Returns
    -------
    y : ndarray
        What `batch_norm` returns.
    mean, rstd : ndarray of float64, shape (C,)
        Mean of each channel and reciprocal of its standard deviation, from x in training, from the running statistics
        in evaluation. NaN where a channel of x is empty in training.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As `batch_norm`.

    References
    ----------
    Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 10], [3, 14]], dtype=np.float32)
    >>> y, mean, rstd = nk.batch_norm_forward(x, training=True, eps=0.0)
    >>> print(mean, rstd)
    [ 2. 12.] [1.  0.5]
    """
    if flag("training", training):
        result = forward(
            BATCH, x, channel_axis, weight, bias, eps, out, True, running_mean, running_var, momentum, ddof, stream
        )
        if result is None:
            result = _dispatch.forward(
                BATCH, x, channel_axis, weight, bias, eps, out, True, running_mean, running_var, momentum, ddof, stream
            )
        return result
    result = evaluate(BATCH, x, channel_axis, weight, bias, eps, out, True, running_mean, running_var, stream)
    if result is None:
        result = _dispatch.evaluate(
            BATCH, x, channel_axis, weight, bias, eps, out, True, running_mean, running_var, stream
        )
    return result


def batch_norm_backward(
    dy: Array[Element],
    x: Array[Element],
    mean: Statistics,
    rstd: Statistics,
    weight: Parameter | None = None,
    training: bool = True,
    *,
    channel_axis: SupportsIndex = 1,
    out: Array[Element] | None = None,
    needs: Iterable[str] = _ALL,
    grad_dtype: DTypeLike | None = None,
    stream: Stream | None = None,
) -> Gradients[Element]:
    r"""Gradients of `batch_norm` with respect to x, weight and bias.

    With :math:`\hat x = (x - \mu_c) r_c`, :math:`r` = `rstd`, :math:`g = \gamma_c \, dy`, means and sums over a
    channel:

    .. math::

        dx = r_c \, (g - \overline{g} - \hat x \, \overline{g \hat x}), \qquad
        d\gamma_c = \sum dy \, \hat x, \qquad d\beta_c = \sum dy

    In evaluation mean and rstd do not depend on x, and :math:`dx = r_c \, g`.

    Parameters
    ----------
    dy : ndarray, dtype and shape of x
        Gradient of the loss with respect to y.
    x : ndarray
        The data that `batch_norm_forward` was given.
    mean, rstd : ndarray of float64, shape (C,)
        The statistics that `batch_norm_forward` returned.
    weight : ndarray of x's dtype, float32 or float64, shape (C,), optional
        Gamma. None: ones; its gradient and that of the bias are still returned.
    training : bool
        Whether mean and rstd were taken from x (True) or are given constants (False).
    channel_axis : int
        The axis of the channels, as in the forward call.
    out : ndarray, dtype and shape of x, optional
        Array to write dx into. It may be dy itself or x itself, and must not overlap anything else.
    needs : iterable of str
        The gradients to compute, of "x", "weight", "bias". The others come back as None.
    grad_dtype : numpy.float32, numpy.float64 or None
        Dtype of dweight and dbias. None: that of the weight, or of x where there is no weight.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    dx : ndarray, dtype and shape of x, or None
        In the memory order of x; `out` if given.
    dweight, dbias : ndarray of `grad_dtype`, shape (C,), or None

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, axis, name in `needs` or `out` is not acceptable. A call that raises has changed nothing.
    MemoryError, KeyboardInterrupt
        As `batch_norm`.

    References
    ----------
    Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167: the six equations of section 3, collected.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1], [1], [3], [3]], dtype=np.float32)
    >>> y, mean, rstd = nk.batch_norm_forward(x, training=True, eps=0.0)
    >>> dy = np.array([[4], [0], [0], [4]], dtype=np.float32)
    >>> dx, dweight, dbias = nk.batch_norm_backward(dy, x, mean, rstd)
    >>> print(dx.ravel(), dweight, dbias)
    [ 2. -2. -2.  2.] [0.] [8.]
    """
    needed = 7 if needs is _ALL else _bits(needs, _ALL)
    grad = 0 if grad_dtype is None else grad_code(grad_dtype)
    training = flag("training", training)
    gradients = backward(BATCH, dy, x, mean, rstd, channel_axis, weight, training, needed, out, grad, stream)
    if gradients is None:
        gradients = _dispatch.backward(
            BATCH, dy, x, mean, rstd, channel_axis, weight, training, needed, out, grad, stream
        )
    return gradients


# ---- layer norm ------------------------------------------------------------------------------------------------------


def layer_norm(
    x: Array[Element],
    normalized_shape: Ints,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    eps: float = 1e-5,
    *,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> Array[Element]:
    r"""Normalize each sample over its trailing axes.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \, \gamma + \beta

    The mean and the biased variance are those of one sample: the elements that share the leading indices of x. Weight
    and bias have an entry for each element of a sample.

    Parameters
    ----------
    x : ndarray of float64, float32, float16 or bfloat16, 1 to 16 dimensions
        Data whose shape ends in `normalized_shape`. Any strides. Float64 is computed in float64, all others in float32.
    normalized_shape : int or sequence of int
        Shape of one sample, the last dimensions of x. An int n stands for (n,).
    weight, bias : ndarray of x's dtype, float32 or float64, shape `normalized_shape`, optional
        Gamma and beta, each in its own dtype. None: ones and zeros.
    eps : float
        Added to the variance, in units of x squared; not negative. ``eps=0`` with zero variance gives NaN.
    out : ndarray, dtype and shape of x, optional
        Array to write y into. It may be x itself, and must not overlap anything else.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    ndarray
        y, of the dtype and shape of x and in its memory order; `out` if given. A sample of one element gives the bias.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, `eps` or `out` is not acceptable. A call that raises has changed nothing.
    MemoryError
        There is no memory for the result or for scratch. Nothing has changed either.
    KeyboardInterrupt
        Ctrl-C in a long call. `out` may be half written.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450

    Examples
    --------
    A sample with mean 5 and standard deviation 2:

    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([2, 4, 4, 4, 5, 5, 7, 9], dtype=np.float32)
    >>> print(nk.layer_norm(x, 8, eps=0.0))
    [-1.5 -0.5 -0.5 -0.5  0.   0.   1.   2. ]

    Half precision, with a sum that float16 could not hold:

    >>> print(nk.layer_norm(np.array([60000, 60064], dtype=np.float16), 2, eps=0.0))
    [-1.  1.]

    Images, each normalized as a whole, in place:

    >>> images = np.random.default_rng(0).normal(size=(10, 3, 8, 8)).astype(np.float32)
    >>> nk.layer_norm(images, (3, 8, 8), out=images) is images
    True
    """
    y = forward(LAYER, x, normalized_shape, weight, bias, eps, out, False, None, None, 0.0, 1, stream)
    if y is None:
        y = _dispatch.forward(LAYER, x, normalized_shape, weight, bias, eps, out, False, None, None, 0.0, 1, stream)
    return y


def layer_norm_forward(
    x: Array[Element],
    normalized_shape: Ints,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    eps: float = 1e-5,
    *,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> tuple[Array[Element], Statistics, Statistics]:
    """`layer_norm` that also returns the statistics, for `layer_norm_backward`.

    ``y = (x - mean) * rstd * weight + bias`` with ``rstd = 1 / sqrt(var + eps)``.

    Parameters
    ----------
    x, normalized_shape, weight, bias, eps, out, stream
        As in `layer_norm`.

    Returns
    -------
    y : ndarray
        What `layer_norm` returns.
    mean, rstd : ndarray of float64, shape of x without the `normalized_shape` at its end
        Mean of each sample and reciprocal of its standard deviation. NaN where a sample is empty.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As `layer_norm`.

    References
    ----------
    Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 3], [10, 14]], dtype=np.float32)
    >>> y, mean, rstd = nk.layer_norm_forward(x, 2, eps=0.0)
    >>> print(mean, rstd)
    [ 2. 12.] [1.  0.5]
    """
    result = forward(LAYER, x, normalized_shape, weight, bias, eps, out, True, None, None, 0.0, 1, stream)
    if result is None:
        result = _dispatch.forward(LAYER, x, normalized_shape, weight, bias, eps, out, True, None, None, 0.0, 1, stream)
    return result


def layer_norm_backward(
    dy: Array[Element],
    x: Array[Element],
    mean: Statistics,
    rstd: Statistics,
    normalized_shape: Ints,
    weight: Parameter | None = None,
    *,
    out: Array[Element] | None = None,
    needs: Iterable[str] = _ALL,
    grad_dtype: DTypeLike | None = None,
    stream: Stream | None = None,
) -> Gradients[Element]:
    r"""Gradients of `layer_norm` with respect to x, weight and bias.

    With :math:`\hat x = (x - \mu) r`, :math:`r` = `rstd`, :math:`g = \gamma \, dy`, means over a sample, sums over the
    samples:

    .. math::

        dx = r \, (g - \overline{g} - \hat x \, \overline{g \hat x}), \qquad
        d\gamma = \sum dy \, \hat x, \qquad d\beta = \sum dy

    Parameters
    ----------
    dy : ndarray, dtype and shape of x
        Gradient of the loss with respect to y.
    x : ndarray
        The data that `layer_norm_forward` was given.
    mean, rstd : ndarray of float64, shape of x without the `normalized_shape` at its end
        The statistics that `layer_norm_forward` returned.
    normalized_shape : int or sequence of int
        Shape of one sample, as in the forward call.
    weight : ndarray of x's dtype, float32 or float64, shape `normalized_shape`, optional
        Gamma. None: ones; its gradient and that of the bias are still returned.
    out : ndarray, dtype and shape of x, optional
        Array to write dx into. It may be dy itself or x itself, and must not overlap anything else.
    needs : iterable of str
        The gradients to compute, of "x", "weight", "bias". The others come back as None.
    grad_dtype : numpy.float32, numpy.float64 or None
        Dtype of dweight and dbias. None: that of the weight, or of x where there is no weight.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    dx : ndarray, dtype and shape of x, or None
        In the memory order of x; `out` if given.
    dweight, dbias : ndarray of `grad_dtype`, shape `normalized_shape`, or None

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, a name in `needs` or `out` is not acceptable. A call that raises has changed nothing.
    MemoryError, KeyboardInterrupt
        As `layer_norm`.

    References
    ----------
    Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 1, 3, 3]], dtype=np.float32)
    >>> y, mean, rstd = nk.layer_norm_forward(x, 4, eps=0.0)
    >>> dy = np.array([[4, 1, 1, 4]], dtype=np.float32)
    >>> dx, dweight, dbias = nk.layer_norm_backward(dy, x, mean, rstd, 4)
    >>> print(dx, dweight, dbias)
    [[ 1.5 -1.5 -1.5  1.5]] [-4. -1.  1.  4.] [4. 1. 1. 4.]

    Parameters of half precision, and a gradient of them that float16 could not hold:

    >>> x, weight = np.zeros((3, 2), dtype=np.float16), np.ones(2, dtype=np.float16)
    >>> y, mean, rstd = nk.layer_norm_forward(x, 2, weight)
    >>> dy = np.full((3, 2), 30000, dtype=np.float16)
    >>> dx, dweight, dbias = nk.layer_norm_backward(dy, x, mean, rstd, 2, weight, grad_dtype=np.float32)
    >>> print(dbias)
    [90000. 90000.]
    """
    needed = 7 if needs is _ALL else _bits(needs, _ALL)
    grad = 0 if grad_dtype is None else grad_code(grad_dtype)
    gradients = backward(LAYER, dy, x, mean, rstd, normalized_shape, weight, True, needed, out, grad, stream)
    if gradients is None:
        gradients = _dispatch.backward(
            LAYER, dy, x, mean, rstd, normalized_shape, weight, True, needed, out, grad, stream
        )
    return gradients


# ---- instance norm ---------------------------------------------------------------------------------------------------


def instance_norm(
    x: Array[Element],
    running_mean: Running | None = None,
    running_var: Running | None = None,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: SupportsIndex = 1,
    ddof: float = 1,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> Array[Element]:
    r"""Normalize each channel of each sample over space.

    .. math:: y = \frac{x - \mu_{nc}}{\sqrt{\sigma_{nc}^2 + \epsilon}} \, \gamma_c + \beta_c

    With `use_input_stats`, the mean and the biased variance of channel c of sample n come from x: over every axis but
    0 (the samples) and `channel_axis`. Without, they are `running_mean` and `running_var`, the same for every sample.

    Parameters
    ----------
    x : ndarray of float64, float32, float16 or bfloat16, 3 to 16 dimensions
        Data with N samples on axis 0 and C channels on `channel_axis`. Any strides: NHWC memory seen as NCHW runs
        without a copy. Float64 is computed in float64, all others in float32.
    running_mean, running_var : ndarray of float32 or float64, shape (C,), optional
        Statistics over the samples seen so far; both or neither. ``use_input_stats=False`` requires them. Otherwise
        they are updated in place: ``running = (1 - momentum) * running + momentum * new``, where the new mean and the
        new variance, divided by n - ddof, are averages over the N samples, as in PyTorch.
    weight, bias : ndarray of x's dtype, float32 or float64, shape (C,), optional
        Gamma and beta, each in its own dtype. None: ones and zeros.
    use_input_stats : bool
        Statistics from x (True) or from `running_mean` and `running_var` (False).
    momentum : float
        Weight of the new value in the running statistics, 0 to 1 in normal use. ``use_input_stats=False`` does not
        look at it.
    eps : float
        Added to the variance, in units of x squared; not negative. ``eps=0`` with zero variance gives NaN.
    channel_axis : int
        The axis of the channels, not axis 0; negative ones count from the end.
    ddof : float
        The variance that goes into `running_var` is divided by n - ddof, n being the number of values of a channel of a
        sample; 0 <= ddof < n. 1, as in PyTorch, makes it unbiased; 0 is the one that normalizes.
        ``use_input_stats=False`` does not look at it.
    out : ndarray, dtype and shape of x, optional
        Array to write y into. It may be x itself, and must not overlap anything else.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    ndarray
        y, of the dtype and shape of x and in its memory order; `out` if given. An empty x gives an empty y and leaves
        the running statistics as they were.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, axis, number or `out` is not acceptable; a channel of a sample has a single value and
        `use_input_stats` is True; the running statistics are missing, or `running_var` is negative, and it is False. A
        call that raises has changed nothing.
    MemoryError
        There is no memory for the result or for scratch. Nothing has changed either.
    KeyboardInterrupt
        Ctrl-C in a long call. `out` may be half written, running statistics are as they were.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016,
    https://arxiv.org/abs/1607.08022

    Examples
    --------
    One sample of two channels of two values:

    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[[1, 3], [10, 14]]], dtype=np.float32)
    >>> print(nk.instance_norm(x, eps=0.0))
    [[[-1.  1.]
      [-1.  1.]]]
    """
    if flag("use_input_stats", use_input_stats):
        y = forward(
            INSTANCE, x, channel_axis, weight, bias, eps, out, False, running_mean, running_var, momentum, ddof, stream
        )
        if y is None:
            given = INSTANCE, x, channel_axis, weight, bias, eps, out, False, running_mean, running_var, momentum, ddof
            y = _dispatch.forward(*given, stream)
        return y
    y = evaluate(INSTANCE, x, channel_axis, weight, bias, eps, out, False, running_mean, running_var, stream)
    if y is None:
        y = _dispatch.evaluate(
            INSTANCE, x, channel_axis, weight, bias, eps, out, False, running_mean, running_var, stream
        )
    return y


def instance_norm_forward(
    x: Array[Element],
    running_mean: Running | None = None,
    running_var: Running | None = None,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: SupportsIndex = 1,
    ddof: float = 1,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> tuple[Array[Element], Statistics, Statistics]:
    """`instance_norm` that also returns the statistics it used, for `instance_norm_backward`.

    ``y = (x - mean) * rstd * weight + bias`` with ``rstd = 1 / sqrt(var + eps)``.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, channel_axis, ddof, out, stream
        As in `instance_norm`.

    Returns
    -------
    y : ndarray
        What `instance_norm` returns.
    mean, rstd : ndarray of float64, shape (N, C)
        Mean of each channel of each sample and reciprocal of its standard deviation, from x, or the running
        statistics repeated for every sample. NaN where a set is empty and `use_input_stats` is True.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As `instance_norm`.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, 2016, https://arxiv.org/abs/1607.08022

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[[1, 3], [10, 14]]], dtype=np.float32)
    >>> y, mean, rstd = nk.instance_norm_forward(x, eps=0.0)
    >>> print(mean, rstd)
    [[ 2. 12.]] [[1.  0.5]]
    """
    if flag("use_input_stats", use_input_stats):
        result = forward(
            INSTANCE, x, channel_axis, weight, bias, eps, out, True, running_mean, running_var, momentum, ddof, stream
        )
        if result is None:
            given = INSTANCE, x, channel_axis, weight, bias, eps, out, True, running_mean, running_var, momentum, ddof
            result = _dispatch.forward(*given, stream)
        return result
    result = evaluate(INSTANCE, x, channel_axis, weight, bias, eps, out, True, running_mean, running_var, stream)
    if result is None:
        result = _dispatch.evaluate(
            INSTANCE, x, channel_axis, weight, bias, eps, out, True, running_mean, running_var, stream
        )
    return result


def instance_norm_backward(
    dy: Array[Element],
    x: Array[Element],
    mean: Statistics,
    rstd: Statistics,
    weight: Parameter | None = None,
    use_input_stats: bool = True,
    *,
    channel_axis: SupportsIndex = 1,
    out: Array[Element] | None = None,
    needs: Iterable[str] = _ALL,
    grad_dtype: DTypeLike | None = None,
    stream: Stream | None = None,
) -> Gradients[Element]:
    r"""Gradients of `instance_norm` with respect to x, weight and bias.

    With :math:`\hat x = (x - \mu_{nc}) r_{nc}`, :math:`r` = `rstd`, :math:`g = \gamma_c \, dy`, means over space, sums
    over space and samples:

    .. math::

        dx = r_{nc} \, (g - \overline{g} - \hat x \, \overline{g \hat x}), \qquad
        d\gamma_c = \sum dy \, \hat x, \qquad d\beta_c = \sum dy

    With given statistics, mean and rstd do not depend on x, and :math:`dx = r_{nc} \, g`.

    Parameters
    ----------
    dy : ndarray, dtype and shape of x
        Gradient of the loss with respect to y.
    x : ndarray
        The data that `instance_norm_forward` was given.
    mean, rstd : ndarray of float64, shape (N, C)
        The statistics that `instance_norm_forward` returned.
    weight : ndarray of x's dtype, float32 or float64, shape (C,), optional
        Gamma. None: ones; its gradient and that of the bias are still returned.
    use_input_stats : bool
        Whether mean and rstd were taken from x (True) or are given constants (False).
    channel_axis : int
        The axis of the channels, as in the forward call.
    out : ndarray, dtype and shape of x, optional
        Array to write dx into. It may be dy itself or x itself, and must not overlap anything else.
    needs : iterable of str
        The gradients to compute, of "x", "weight", "bias". The others come back as None.
    grad_dtype : numpy.float32, numpy.float64 or None
        Dtype of dweight and dbias. None: that of the weight, or of x where there is no weight.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    dx : ndarray, dtype and shape of x, or None
        In the memory order of x; `out` if given.
    dweight, dbias : ndarray of `grad_dtype`, shape (C,), or None

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, axis, name in `needs` or `out` is not acceptable. A call that raises has changed nothing.
    MemoryError, KeyboardInterrupt
        As `instance_norm`.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, 2016, https://arxiv.org/abs/1607.08022

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[[1, 1, 3, 3]]], dtype=np.float32)
    >>> y, mean, rstd = nk.instance_norm_forward(x, eps=0.0)
    >>> dy = np.array([[[4, 1, 1, 4]]], dtype=np.float32)
    >>> dx, dweight, dbias = nk.instance_norm_backward(dy, x, mean, rstd, needs=("x", "bias"))
    >>> print(dx, dweight, dbias)
    [[[ 1.5 -1.5 -1.5  1.5]]] None [10.]
    """
    needed = 7 if needs is _ALL else _bits(needs, _ALL)
    grad = 0 if grad_dtype is None else grad_code(grad_dtype)
    use_input_stats = flag("use_input_stats", use_input_stats)
    gradients = backward(INSTANCE, dy, x, mean, rstd, channel_axis, weight, use_input_stats, needed, out, grad, stream)
    if gradients is None:
        gradients = _dispatch.backward(
            INSTANCE, dy, x, mean, rstd, channel_axis, weight, use_input_stats, needed, out, grad, stream
        )
    return gradients


# ---- group norm ------------------------------------------------------------------------------------------------------


def group_norm(
    x: Array[Element],
    num_groups: SupportsIndex,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: SupportsIndex = 1,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> Array[Element]:
    r"""Normalize each group of neighbouring channels of each sample.

    .. math:: y = \frac{x - \mu_{ng}}{\sqrt{\sigma_{ng}^2 + \epsilon}} \, \gamma_c + \beta_c

    The mean and the biased variance of group g of sample n are taken over its C / `num_groups` channels and every axis
    but 0 (the samples) and `channel_axis`. As many groups as channels: `instance_norm`. One group: `layer_norm` of the
    sample, with one weight per channel.

    Parameters
    ----------
    x : ndarray of float64, float32, float16 or bfloat16, 2 to 16 dimensions
        Data with N samples on axis 0 and C channels on `channel_axis`. Any strides: NHWC memory seen as NCHW runs
        without a copy. Float64 is computed in float64, all others in float32.
    num_groups : int
        Number of groups; it divides C.
    weight, bias : ndarray of x's dtype, float32 or float64, shape (C,), optional
        Gamma and beta, each in its own dtype. None: ones and zeros.
    eps : float
        Added to the variance, in units of x squared; not negative. ``eps=0`` with zero variance gives NaN.
    channel_axis : int
        The axis of the channels, not axis 0; negative ones count from the end.
    out : ndarray, dtype and shape of x, optional
        Array to write y into. It may be x itself, and must not overlap anything else.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    ndarray
        y, of the dtype and shape of x and in its memory order; `out` if given.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, axis, number or `out` is not acceptable, or a group has a single value. A call that raises has
        changed nothing.
    MemoryError
        There is no memory for the result or for scratch. Nothing has changed either.
    KeyboardInterrupt
        Ctrl-C in a long call. `out` may be half written.

    References
    ----------
    Wu and He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    One sample of four channels in two groups:

    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 3, 10, 14]], dtype=np.float32)
    >>> print(nk.group_norm(x, 2, eps=0.0))
    [[-1.  1. -1.  1.]]
    """
    y = forward(GROUP, x, (num_groups, channel_axis), weight, bias, eps, out, False, None, None, 0.0, 1, stream)
    if y is None:
        y = _dispatch.forward(
            GROUP, x, (num_groups, channel_axis), weight, bias, eps, out, False, None, None, 0.0, 1, stream
        )
    return y


def group_norm_forward(
    x: Array[Element],
    num_groups: SupportsIndex,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: SupportsIndex = 1,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> tuple[Array[Element], Statistics, Statistics]:
    """`group_norm` that also returns the statistics, for `group_norm_backward`.

    ``y = (x - mean) * rstd * weight + bias`` with ``rstd = 1 / sqrt(var + eps)``.

    Parameters
    ----------
    x, num_groups, weight, bias, eps, channel_axis, out, stream
        As in `group_norm`.

    Returns
    -------
    y : ndarray
        What `group_norm` returns.
    mean, rstd : ndarray of float64, shape (N, num_groups)
        Mean of each group of each sample and reciprocal of its standard deviation. NaN where a group is empty.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As `group_norm`.

    References
    ----------
    Wu and He, 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 3, 10, 14]], dtype=np.float32)
    >>> y, mean, rstd = nk.group_norm_forward(x, 2, eps=0.0)
    >>> print(mean, rstd)
    [[ 2. 12.]] [[1.  0.5]]
    """
    result = forward(GROUP, x, (num_groups, channel_axis), weight, bias, eps, out, True, None, None, 0.0, 1, stream)
    if result is None:
        result = _dispatch.forward(
            GROUP, x, (num_groups, channel_axis), weight, bias, eps, out, True, None, None, 0.0, 1, stream
        )
    return result


def group_norm_backward(
    dy: Array[Element],
    x: Array[Element],
    mean: Statistics,
    rstd: Statistics,
    num_groups: SupportsIndex,
    weight: Parameter | None = None,
    *,
    channel_axis: SupportsIndex = 1,
    out: Array[Element] | None = None,
    needs: Iterable[str] = _ALL,
    grad_dtype: DTypeLike | None = None,
    stream: Stream | None = None,
) -> Gradients[Element]:
    r"""Gradients of `group_norm` with respect to x, weight and bias.

    With :math:`\hat x = (x - \mu_{ng}) r_{ng}`, :math:`r` = `rstd`, :math:`g = \gamma_c \, dy`, means over a group,
    sums over space and samples:

    .. math::

        dx = r_{ng} \, (g - \overline{g} - \hat x \, \overline{g \hat x}), \qquad
        d\gamma_c = \sum dy \, \hat x, \qquad d\beta_c = \sum dy

    Parameters
    ----------
    dy : ndarray, dtype and shape of x
        Gradient of the loss with respect to y.
    x : ndarray
        The data that `group_norm_forward` was given.
    mean, rstd : ndarray of float64, shape (N, num_groups)
        The statistics that `group_norm_forward` returned.
    num_groups : int
        Number of groups, as in the forward call.
    weight : ndarray of x's dtype, float32 or float64, shape (C,), optional
        Gamma. None: ones; its gradient and that of the bias are still returned.
    channel_axis : int
        The axis of the channels, as in the forward call.
    out : ndarray, dtype and shape of x, optional
        Array to write dx into. It may be dy itself or x itself, and must not overlap anything else.
    needs : iterable of str
        The gradients to compute, of "x", "weight", "bias". The others come back as None.
    grad_dtype : numpy.float32, numpy.float64 or None
        Dtype of dweight and dbias. None: that of the weight, or of x where there is no weight.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    dx : ndarray, dtype and shape of x, or None
        In the memory order of x; `out` if given.
    dweight, dbias : ndarray of `grad_dtype`, shape (C,), or None

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, axis, number, name in `needs` or `out` is not acceptable. A call that raises has changed nothing.
    MemoryError, KeyboardInterrupt
        As `group_norm`.

    References
    ----------
    Wu and He, 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 1, 3, 3]], dtype=np.float32)
    >>> y, mean, rstd = nk.group_norm_forward(x, 1, eps=0.0)
    >>> dy = np.array([[4, 1, 1, 4]], dtype=np.float32)
    >>> dx, dweight, dbias = nk.group_norm_backward(dy, x, mean, rstd, 1)
    >>> print(dx, dweight, dbias)
    [[ 1.5 -1.5 -1.5  1.5]] [-4. -1.  1.  4.] [4. 1. 1. 4.]
    """
    needed = 7 if needs is _ALL else _bits(needs, _ALL)
    spec = (num_groups, channel_axis)
    grad = 0 if grad_dtype is None else grad_code(grad_dtype)
    gradients = backward(GROUP, dy, x, mean, rstd, spec, weight, True, needed, out, grad, stream)
    if gradients is None:
        gradients = _dispatch.backward(GROUP, dy, x, mean, rstd, spec, weight, True, needed, out, grad, stream)
    return gradients


# ---- RMS norm --------------------------------------------------------------------------------------------------------


def rms_norm(
    x: Array[Element],
    normalized_shape: Ints,
    weight: Parameter | None = None,
    eps: float | None = None,
    *,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> Array[Element]:
    r"""Divide each sample by the root of the mean of its squares.

    .. math:: y = \frac{x}{\sqrt{\overline{x^2} + \epsilon}} \, \gamma

    `layer_norm` without the mean and the bias: a sample is the elements that share the leading indices of x.

    Parameters
    ----------
    x : ndarray of float64, float32, float16 or bfloat16, 1 to 16 dimensions
        Data whose shape ends in `normalized_shape`. Any strides. Float64 is computed in float64, all others in float32.
    normalized_shape : int or sequence of int
        Shape of one sample, the last dimensions of x. An int n stands for (n,).
    weight : ndarray of x's dtype, float32 or float64, shape `normalized_shape`, optional
        Gamma. None: ones.
    eps : float, optional
        Added to the mean of squares, in units of x squared; not negative. None: the machine epsilon of the
        arithmetic, as in PyTorch: ``np.finfo(np.float64).eps`` for float64, ``np.finfo(np.float32).eps`` for all other
        dtypes. ``eps=0`` with a sample of zeros gives NaN.
    out : ndarray, dtype and shape of x, optional
        Array to write y into. It may be x itself, and must not overlap anything else.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    ndarray
        y, of the dtype and shape of x and in its memory order; `out` if given.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, `eps` or `out` is not acceptable. A call that raises has changed nothing.
    MemoryError
        There is no memory for the result or for scratch. Nothing has changed either.
    KeyboardInterrupt
        Ctrl-C in a long call. `out` may be half written.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467

    Examples
    --------
    A sample whose mean square is 4:

    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([3, -3, 3, 1, -1, 1, -1, 1], dtype=np.float32)
    >>> print(nk.rms_norm(x, 8, eps=0.0))
    [ 1.5 -1.5  1.5  0.5 -0.5  0.5 -0.5  0.5]
    """
    y = forward(RMS, x, normalized_shape, weight, None, eps, out, False, None, None, 0.0, 1, stream)
    if y is None:
        y = _dispatch.forward(RMS, x, normalized_shape, weight, None, eps, out, False, None, None, 0.0, 1, stream)
    return y


def rms_norm_forward(
    x: Array[Element],
    normalized_shape: Ints,
    weight: Parameter | None = None,
    eps: float | None = None,
    *,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> tuple[Array[Element], Statistics]:
    """`rms_norm` that also returns the statistics, for `rms_norm_backward`.

    ``y = x * rstd * weight`` with ``rstd = 1 / sqrt(mean(x * x) + eps)``.

    Parameters
    ----------
    x, normalized_shape, weight, eps, out, stream
        As in `rms_norm`.

    Returns
    -------
    y : ndarray
        What `rms_norm` returns.
    rstd : ndarray of float64, shape of x without the `normalized_shape` at its end
        Reciprocal of the root mean square of each sample. NaN where a sample is empty.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As `rms_norm`.

    References
    ----------
    Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[2, 2], [-4, 4]], dtype=np.float32)
    >>> y, rstd = nk.rms_norm_forward(x, 2, eps=0.0)
    >>> print(rstd)
    [0.5  0.25]
    """
    result = forward(RMS, x, normalized_shape, weight, None, eps, out, True, None, None, 0.0, 1, stream)
    if result is None:
        result = _dispatch.forward(RMS, x, normalized_shape, weight, None, eps, out, True, None, None, 0.0, 1, stream)
    return result[0], result[-1]


def rms_norm_backward(
    dy: Array[Element],
    x: Array[Element],
    rstd: Statistics,
    normalized_shape: Ints,
    weight: Parameter | None = None,
    *,
    out: Array[Element] | None = None,
    needs: Iterable[str] = _ALL_RMS,
    grad_dtype: DTypeLike | None = None,
    stream: Stream | None = None,
) -> tuple[Array[Element] | None, Parameter | None]:
    r"""Gradients of `rms_norm` with respect to x and weight.

    With :math:`\hat x = x r`, :math:`r` = `rstd`, :math:`g = \gamma \, dy`, means over a sample, sums over the samples:

    .. math:: dx = r \, (g - \hat x \, \overline{g \hat x}), \qquad d\gamma = \sum dy \, \hat x

    Parameters
    ----------
    dy : ndarray, dtype and shape of x
        Gradient of the loss with respect to y.
    x : ndarray
        The data that `rms_norm_forward` was given.
    rstd : ndarray of float64, shape of x without the `normalized_shape` at its end
        The statistics that `rms_norm_forward` returned.
    normalized_shape : int or sequence of int
        Shape of one sample, as in the forward call.
    weight : ndarray of x's dtype, float32 or float64, shape `normalized_shape`, optional
        Gamma. None: ones; its gradient is still returned.
    out : ndarray, dtype and shape of x, optional
        Array to write dx into. It may be dy itself or x itself, and must not overlap anything else.
    needs : iterable of str
        The gradients to compute, of "x", "weight". The others come back as None.
    grad_dtype : numpy.float32, numpy.float64 or None
        Dtype of dweight. None: that of the weight, or of x where there is no weight.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    dx : ndarray, dtype and shape of x, or None
        In the memory order of x; `out` if given.
    dweight : ndarray of `grad_dtype`, shape `normalized_shape`, or None

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, a name in `needs` or `out` is not acceptable. A call that raises has changed nothing.
    MemoryError, KeyboardInterrupt
        As `rms_norm`.

    References
    ----------
    Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[2, 2, -2, -2]], dtype=np.float32)
    >>> y, rstd = nk.rms_norm_forward(x, 4, eps=0.0)
    >>> dy = np.array([[4, 1, 1, 2]], dtype=np.float32)
    >>> dx, dweight = nk.rms_norm_backward(dy, x, rstd, 4)
    >>> print(dx, dweight)
    [[1.75 0.25 0.75 1.25]] [ 4.  1. -1. -2.]
    """
    needed = 3 if needs is _ALL_RMS else _bits(needs, _ALL_RMS)
    grad = 0 if grad_dtype is None else grad_code(grad_dtype)
    gradients = backward(RMS, dy, x, None, rstd, normalized_shape, weight, True, needed, out, grad, stream)
    if gradients is None:
        gradients = _dispatch.backward(
            RMS, dy, x, None, rstd, normalized_shape, weight, True, needed, out, grad, stream
        )
    return gradients[0], gradients[1]


# ---- any axes --------------------------------------------------------------------------------------------------------


def normalize(
    x: Array[Element],
    axes: Ints,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    eps: float = 1e-5,
    *,
    center: bool = True,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> Array[Element]:
    r"""Normalize over any axes: the formula behind every norm.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \, \gamma + \beta

    The mean and the biased variance are those of the elements that differ in their indices on `axes` alone. Without
    `center` the mean is taken as zero, and the variance is the mean of squares.

    Parameters
    ----------
    x : ndarray of float64, float32, float16 or bfloat16, 1 to 16 dimensions
        Data. Any strides. Float64 is computed in float64, all others in float32.
    axes : int or sequence of int
        The axes to normalize over, each once; negative ones count from the end.
    weight, bias : ndarray of x's dtype, float32 or float64, optional
        Gamma and beta, each in its own dtype, of any shape that broadcasts to that of x by NumPy's rules. None: ones
        and zeros.
    eps : float
        Added to the variance, in units of x squared; not negative. ``eps=0`` with zero variance gives NaN.
    center : bool
        Subtract the mean (True), or take it as zero as in `rms_norm` (False).
    out : ndarray, dtype and shape of x, optional
        Array to write y into. It may be x itself, and must not overlap anything else.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    ndarray
        y, of the dtype and shape of x and in its memory order; `out` if given.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, axis, `eps` or `out` is not acceptable. A call that raises has changed nothing.
    MemoryError
        There is no memory for the result or for scratch. Nothing has changed either.
    KeyboardInterrupt
        Ctrl-C in a long call. `out` may be half written.

    References
    ----------
    The formula that Wu and He, 2018, https://arxiv.org/abs/1803.08494, section 3.1, give for all these norms.

    Examples
    --------
    Over the columns of a matrix, with a weight per row:

    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 3], [10, 14]], dtype=np.float32)
    >>> weight = np.array([[1], [100]], dtype=np.float32)
    >>> print(nk.normalize(x, 1, weight, eps=0.0))
    [[  -1.    1.]
     [-100.  100.]]
    """
    norm = AXES if flag("center", center) else AXES_RMS
    y = forward(norm, x, axes, weight, bias, eps, out, False, None, None, 0.0, 1, stream)
    if y is None:
        y = _dispatch.forward(norm, x, axes, weight, bias, eps, out, False, None, None, 0.0, 1, stream)
    return y


def normalize_forward(
    x: Array[Element],
    axes: Ints,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    eps: float = 1e-5,
    *,
    center: bool = True,
    out: Array[Element] | None = None,
    stream: Stream | None = None,
) -> tuple[Array[Element], Statistics, Statistics]:
    """`normalize` that also returns the statistics, for `normalize_backward`.

    ``y = (x - mean) * rstd * weight + bias`` with ``rstd = 1 / sqrt(var + eps)``.

    Parameters
    ----------
    x, axes, weight, bias, eps, center, out, stream
        As in `normalize`.

    Returns
    -------
    y : ndarray
        What `normalize` returns.
    mean, rstd : ndarray of float64, shape of x without the `axes`
        Mean of each set and reciprocal of its standard deviation (of its root mean square, with means of zero, without
        `center`). NaN where a set is empty.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As `normalize`.

    References
    ----------
    Wu and He, 2018, https://arxiv.org/abs/1803.08494, section 3.1

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 10], [3, 14]], dtype=np.float32)
    >>> y, mean, rstd = nk.normalize_forward(x, 0, eps=0.0)
    >>> print(mean, rstd)
    [ 2. 12.] [1.  0.5]
    """
    norm = AXES if flag("center", center) else AXES_RMS
    result = forward(norm, x, axes, weight, bias, eps, out, True, None, None, 0.0, 1, stream)
    if result is None:
        result = _dispatch.forward(norm, x, axes, weight, bias, eps, out, True, None, None, 0.0, 1, stream)
    return result


def normalize_backward(
    dy: Array[Element],
    x: Array[Element],
    mean: Statistics | None,
    rstd: Statistics,
    axes: Ints,
    weight: Parameter | None = None,
    *,
    center: bool = True,
    out: Array[Element] | None = None,
    needs: Iterable[str] = _ALL,
    grad_dtype: DTypeLike | None = None,
    stream: Stream | None = None,
) -> Gradients[Element]:
    r"""Gradients of `normalize` with respect to x, weight and bias.

    With :math:`\hat x = (x - \mu) r`, :math:`r` = `rstd`, :math:`g = \gamma \, dy`, means over a set, sums over the
    elements that share one weight:

    .. math::

        dx = r \, (g - \overline{g} - \hat x \, \overline{g \hat x}), \qquad
        d\gamma = \sum dy \, \hat x, \qquad d\beta = \sum dy

    Without `center`, :math:`\mu` and :math:`\overline{g}` are left out.

    Parameters
    ----------
    dy : ndarray, dtype and shape of x
        Gradient of the loss with respect to y.
    x : ndarray
        The data that `normalize_forward` was given.
    mean, rstd : ndarray of float64, shape of x without the `axes`
        The statistics that `normalize_forward` returned. Without `center` the mean is not looked at.
    axes : int or sequence of int
        The axes of the forward call.
    weight : ndarray of x's dtype, float32 or float64, optional
        Gamma, of a shape that broadcasts to that of x. None: ones.
    center : bool
        As in the forward call.
    out : ndarray, dtype and shape of x, optional
        Array to write dx into. It may be dy itself or x itself, and must not overlap anything else.
    needs : iterable of str
        The gradients to compute, of "x", "weight", "bias". The others come back as None.
    grad_dtype : numpy.float32, numpy.float64 or None
        Dtype of dweight and dbias. None: that of the weight, or of x where there is no weight.
    stream : int, stream of torch or CuPy, or None
        Of CUDA, for x on a GPU alone. None: the one that the library of x works on.

    Returns
    -------
    dx : ndarray, dtype and shape of x, or None
        In the memory order of x; `out` if given.
    dweight, dbias : ndarray of `grad_dtype`, shape of the weight, or None
        None also where `weight` is None: nothing tells their shape.

    Raises
    ------
    TypeError
        An argument has a wrong type or dtype. Nothing is converted silently.
    ValueError
        A shape, axis, name in `needs` or `out` is not acceptable. A call that raises has changed nothing.
    MemoryError, KeyboardInterrupt
        As `normalize`.

    References
    ----------
    Wu and He, 2018, https://arxiv.org/abs/1803.08494, section 3.1

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.array([[1, 1, 3, 3]], dtype=np.float32)
    >>> weight = np.array([2], dtype=np.float32)
    >>> y, mean, rstd = nk.normalize_forward(x, 1, weight, eps=0.0)
    >>> dy = np.array([[4, 1, 1, 2]], dtype=np.float32)
    >>> dx, dweight, dbias = nk.normalize_backward(dy, x, mean, rstd, 1, weight)
    >>> print(dx, dweight, dbias)
    [[ 3. -3. -1.  1.]] [-2.] [8.]
    """
    norm = AXES if flag("center", center) else AXES_RMS
    if norm == AXES_RMS:
        mean = None
    needed = 7 if needs is _ALL else _bits(needs, _ALL)
    grad = 0 if grad_dtype is None else grad_code(grad_dtype)
    gradients = backward(norm, dy, x, mean, rstd, axes, weight, True, needed, out, grad, stream)
    if gradients is None:
        gradients = _dispatch.backward(norm, dy, x, mean, rstd, axes, weight, True, needed, out, grad, stream)
    return gradients


# ---- threads ---------------------------------------------------------------------------------------------------------


def set_num_threads(n: SupportsIndex | None) -> None:
    """Set the number of threads for all calls of this process. It changes no bit of any result.

    A forked child works on one thread, whatever is set: threads of OpenMP do not live on in it.

    Parameters
    ----------
    n : int or None
        At least 1. None restores the default: `OMP_NUM_THREADS`, or all cores.

    Raises
    ------
    TypeError
        `n` is neither an int nor None.
    ValueError
        `n` is less than 1, or more than the core can count.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.set_num_threads(1)
    >>> nk.get_num_threads()
    1
    >>> nk.set_num_threads(None)
    """
    _core.set_num_threads(0 if n is None else thread_count(n))


def get_num_threads() -> int:
    """Return the number of threads that calls may use.

    Returns
    -------
    int
        As set by `set_num_threads`, or the default: `OMP_NUM_THREADS`, or all cores. 1 in a forked child.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


def set_output_cache(limit_bytes: SupportsIndex) -> int:
    """Set how much memory of results that are no longer used is kept for the next ones.

    Finding fresh pages can take the system longer than the norm takes. So results of 1.6 MiB and more get the memory of
    such results that have died, where it fits. What is kept beyond 32 MiB the system may take back when it runs short.

    Parameters
    ----------
    limit_bytes : int
        At least 0. 0 keeps nothing, and gives back what has been kept. The default is 256 MiB.

    Returns
    -------
    int
        The former limit.

    Raises
    ------
    TypeError
        `limit_bytes` is not an int.
    ValueError
        `limit_bytes` is negative, or more than the core can count.

    Examples
    --------
    >>> import normkit as nk
    >>> before = nk.set_output_cache(0)
    >>> before // 2**20
    256
    >>> nk.set_output_cache(before)
    0
    """
    return _core.set_output_cache(memory_limit(limit_bytes))
