"""Layers with state, for those who train with NumPy and no framework.

A layer holds the parameters of a norm, their gradients, the running statistics where it keeps them, and between
`forward` and `backward` what the gradients need. Constructors have the names, order and defaults of `torch.nn`, and a
state dict has PyTorch's keys, so weights go from one to the other as they are. One class serves any number of
dimensions: `BatchNorm` is `BatchNorm1d`, `2d` and `3d`.

A training loop, with a linear layer written out. The layer's `backward` returns the gradient for what lies before it
and adds to the gradients of its own parameters, until `zero_grad`:

>>> import numpy as np
>>> import normkit as nk
>>> rng = np.random.default_rng(0)
>>> x = rng.standard_normal((64, 3)).astype(np.float32)
>>> target = x @ np.array([[1], [-2], [3]], np.float32) + 4
>>> linear = rng.standard_normal((3, 1)).astype(np.float32)
>>> norm = nk.nn.BatchNorm(1)
>>> for step in range(200):
...     error = norm(x @ linear) - target  # the loss is mean(error**2) / 2
...     norm.zero_grad()
...     dx = norm.backward(error / len(x))
...     linear -= 0.5 * (x.T @ dx)
...     for name, parameter in norm.parameters().items():
...         parameter -= 0.5 * norm.gradients()[name]
>>> bool(np.abs(error).max() < 0.01)
True

And its use, with the running statistics:

>>> norm = norm.eval()
>>> norm(x[:1] @ linear).shape
(1, 1)

Training a layer is not thread-safe; any number of threads may use one in evaluation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, SupportsIndex, TypeAlias, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _core, _errors, functional
from .functional import Ints

__all__ = ["BatchNorm", "GroupNorm", "IncompatibleKeys", "InstanceNorm", "Layer", "LayerNorm", "RMSNorm"]

Array: TypeAlias = NDArray[Any]
_Self = TypeVar("_Self", bound="Layer")

_ALL = ("x", "weight", "bias")

# Why there is nothing that backward could use.
_NO_FORWARD = "got none; call forward(x) first"
_USED = "got one that backward has used, and freed; call forward(x) again"


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` did not load, under PyTorch's names."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Functions(NamedTuple):
    """The functions of one norm. In a tuple, as functions that are attributes of a class become its methods."""

    plain: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


class _Saved(NamedTuple):
    """What backward needs of the last forward."""

    x: Array
    statistics: list[Array]
    arguments: dict[str, Any]


# ---- arguments of constructors and of load_state_dict ----------------------------------------------------------------


def _dtype(value: DTypeLike) -> np.dtype[Any]:
    """The dtype of parameters. None, NumPy's name for float64, is none."""
    names = _core.dtypes()
    try:
        dtype = np.dtype(value)
    except TypeError:
        dtype = None
    if value is None or dtype is None or dtype.name not in names or not dtype.isnative:
        raise TypeError(f"dtype must be {_errors._one_of(names)}, got {value!r}")
    return dtype


def _count(name: str, value: SupportsIndex) -> int:
    count = _errors._int(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def _check_entry(key: str, value: object, target: Array) -> None:
    """Accept what `target` holds exactly: float16 for float32, but never the other way."""
    value = _errors._plain(key, value, "convert it with np.asarray")
    floats = [each.dtype.name in _core.dtypes() for each in (value, target)]
    if floats[0] != floats[1] or value.dtype.kind == "b" or not np.can_cast(value.dtype, target.dtype):
        way = _errors._no_number(key, value.dtype) or f"convert it with .astype({target.dtype.name!r})"
        if all(floats):
            way += f", or make the layer with dtype={value.dtype.name!r}"
        raise TypeError(f"{key} must be {target.dtype}, or exact in it, got {value.dtype}; {way}")
    if value.shape != target.shape:
        raise ValueError(f"{key} must have shape {target.shape}, got {value.shape}")
    if target.dtype.kind == "i" and value < 0:
        raise ValueError(f"{key} must be at least 0, got {value}; it is a count")
    _errors._writable(f"the layer's own {key}", target, "set a copy of it in the layer")


def _explain_keys(own: Iterable[str], missing: list[str], unexpected: list[str]) -> NoReturn:
    def listed(names: Iterable[str]) -> str:
        names = [repr(name) for name in names]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    came = [f"{what} {listed(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    raise ValueError(
        f"state must have exactly the keys {listed(own) or '(none)'}, got {' and '.join(came)}; "
        f"pass prefix= for one layer of a model, or strict=False to load what there is"
    )


# ---- what all layers share -------------------------------------------------------------------------------------------


class Layer(ABC):
    """What all layers share; the norms are its subclasses.

    Attributes
    ----------
    weight, bias : ndarray of `dtype`, or None
        The parameters. An optimizer changes them in place, or sets new ones.
    dweight, dbias : ndarray, or None
        Their gradients, added up over calls of `backward`. They are float32 for float16 and bfloat16 parameters,
        where small terms would be lost, and of `dtype` otherwise.
    dtype : numpy.dtype
    training : bool
        True after `train()`, as at first; False after `eval()`.
    """

    _functions: ClassVar[_Functions]
    # What repr shows: always; by name; and by name where it is not the default.
    _required: ClassVar[tuple[str, ...]]
    _options: ClassVar[tuple[str, ...]]
    _extras: ClassVar[dict[str, object]] = {"channel_axis": 1, "dtype": np.dtype(np.float32), "ddof": 1}
    _state: ClassVar[tuple[str, ...]] = ("weight", "bias")
    _eps_by_dtype: ClassVar[bool] = False  # eps may be None
    _evaluated: ClassVar[str] = "got one in evaluation, which saves nothing; call train() before it"

    def __init__(self, shape: tuple[int, ...], eps: float | None, weight: bool, bias: bool, dtype: DTypeLike) -> None:
        if not (eps is None and self._eps_by_dtype):
            _errors._finite("eps", eps, least=0)
        self.eps = eps
        self.dtype = _dtype(dtype)
        self.training = True
        # What adds up over many calls needs the digits of float32; a half type stops growing at 256 or 2048 ones.
        self._sum_dtype = self.dtype if self.dtype == np.float64 else np.dtype(np.float32)
        self.weight: Array | None = np.ones(shape, self.dtype) if weight else None
        self.bias: Array | None = np.zeros(shape, self.dtype) if bias else None
        self.dweight: Array | None = np.zeros(shape, self._sum_dtype) if weight else None
        self.dbias: Array | None = np.zeros(shape, self._sum_dtype) if bias else None
        self._saved: _Saved | None = None
        self._unsaved = _NO_FORWARD

    @property
    @abstractmethod
    def _spec(self) -> dict[str, Any]:
        """The arguments that say what a set is."""

    def _statistics(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments that say where the statistics come from: for forward and backward, and for forward alone."""
        return {}, {}

    def forward(self, x: Array) -> Array:
        """Normalize x.

        In training, x itself (not a copy) and its statistics are kept until `backward` or the next forward: do not
        write into x or the weight before. In evaluation nothing is kept.

        Parameters
        ----------
        x : ndarray of float64, float32, float16 or bfloat16
            Data. Parameters of another dtype than that of x must be float32 or float64.

        Returns
        -------
        ndarray of the dtype and shape of x
            y, in the memory order of x.

        Raises
        ------
        TypeError, ValueError
            As the function of the norm. A call that raises has changed nothing.
        """
        source, more = self._statistics()
        arguments = {**self._spec, **source, **more, **self.parameters(), "eps": self.eps}
        y: Array
        if self.training:
            y, *statistics = self._functions.forward(x, **arguments)
            self._saved = _Saved(x, statistics, {**self._spec, **source, "weight": self.weight})
        else:
            y = self._functions.plain(x, **arguments)
            self._forget(self._evaluated)
        return y

    def __call__(self, x: Array) -> Array:
        """As `forward`."""
        return self.forward(x)

    def backward(self, dy: Array, *, needs: Iterable[str] = _ALL, out: Array | None = None) -> Array | None:
        """Return the gradient with respect to x, and add those of the parameters to `dweight` and `dbias`.

        It belongs to the last forward, and there is one for each: what that forward saved is freed.

        Parameters
        ----------
        dy : ndarray of the dtype and shape of x
            Gradient of the loss with respect to y.
        needs : iterable of str
            The gradients to compute, of "x", "weight", "bias". Those of parameters that the layer lacks are left out.
        out : ndarray of the dtype and shape of x, optional
            Array to write dx into. It may be dy itself or x itself, and must not overlap anything else.

        Returns
        -------
        ndarray of the dtype and shape of x, or None
            dx; None where `needs` does not name it.

        Raises
        ------
        RuntimeError
            There was no forward in training, or backward has used it already.
        TypeError, ValueError
            As the backward function of the norm. A call that raises has changed nothing, and may be repeated.
        """
        if self._saved is None:
            raise RuntimeError(f"backward must follow a forward in training, {self._unsaved}")
        bits = functional._bits(needs, _ALL)
        present = self.gradients()
        dx, *gradients = self._functions.backward(
            dy,
            self._saved.x,
            *self._saved.statistics,
            **self._saved.arguments,
            needs=[name for i, name in enumerate(_ALL) if bits >> i & 1 and (name == "x" or name in present)],
            out=out,
            grad_dtype=self._sum_dtype,
        )
        for name, gradient in zip(_ALL[1:], gradients, strict=False):  # RMS norm has no bias
            if gradient is not None:
                present[name] += gradient
        self._forget(_USED)
        return dx  # type: ignore[no-any-return]

    def _forget(self, why: str) -> None:
        self._saved, self._unsaved = None, why

    def zero_grad(self) -> None:
        """Set `dweight` and `dbias` to zero, in place."""
        for gradient in self.gradients().values():
            gradient[...] = 0

    def train(self: _Self, mode: bool = True) -> _Self:
        """Train (True) or evaluate (False) from now on; returns the layer."""
        self.training = _errors.flag("mode", mode)
        return self

    def eval(self: _Self) -> _Self:
        """Evaluate from now on, as `train(False)`; returns the layer."""
        return self.train(False)

    def parameters(self) -> dict[str, Array]:
        """Return "weight" and "bias", as far as the layer has them: the arrays themselves."""
        return {name: array for name, array in (("weight", self.weight), ("bias", self.bias)) if array is not None}

    def gradients(self) -> dict[str, Array]:
        """Return `dweight` and `dbias` under the names of their parameters: the arrays themselves."""
        return {name: array for name, array in (("weight", self.dweight), ("bias", self.dbias)) if array is not None}

    def state_dict(self, *, prefix: str = "") -> dict[str, Array]:
        """Return parameters and running statistics under PyTorch's names.

        Parameters
        ----------
        prefix : str
            What the keys begin with, such as "encoder.norm1.".

        Returns
        -------
        dict of str to ndarray
            As in PyTorch, the arrays themselves: write them to a file, or copy them, before training goes on.
        """
        state = {prefix + name: getattr(self, name) for name in self._state}
        return {key: array for key, array in state.items() if array is not None}

    def load_state_dict(self, state: Mapping[str, Array], strict: bool = True, *, prefix: str = "") -> IncompatibleKeys:
        """Copy parameters and running statistics from `state`, into the layer's own arrays.

        Parameters
        ----------
        state : mapping of str to ndarray
            As `state_dict` returns it, `np.load` or `safetensors.numpy.load_file` reads it. Shapes must be the
            layer's. dtypes too, or narrower ones, whose values are exact in the layer's (float16 in float32).
        strict : bool
            Require all keys of the layer, and no others.
        prefix : str
            What the layer's keys begin with, such as "encoder.norm1."; keys that begin otherwise are not looked at.

        Returns
        -------
        IncompatibleKeys
            The lists `missing_keys` and `unexpected_keys`; both are empty where `strict`.

        Raises
        ------
        TypeError
            `state` is no mapping, or a value no array of an acceptable dtype.
        ValueError
            A key is missing or unexpected, a shape is wrong, a count negative, or an array of the layer read-only. A
            call that raises has changed nothing.

        Examples
        --------
        >>> import numpy as np
        >>> import normkit as nk
        >>> model = {"norm.weight": np.float32([1, 2]), "norm.bias": np.float32([3, 4]), "head.weight": np.eye(2)}
        >>> layer = nk.nn.LayerNorm(2)
        >>> keys = layer.load_state_dict(model, prefix="norm.")
        >>> print(layer.weight, layer.bias)
        [1. 2.] [3. 4.]
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
        own = self.state_dict(prefix=prefix)
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if str(key).startswith(prefix) and key not in own]
        if strict and (missing or unexpected):
            _explain_keys(own, missing, unexpected)
        found = [(key, state[key], target) for key, target in own.items() if key in state]
        for each in found:
            _check_entry(*each)
        # All are read before one is written: `state` may hold the layer's own arrays under other keys.
        values = [value.astype(target.dtype) for _, value, target in found]
        for (_, _, target), value in zip(found, values, strict=True):
            target[...] = value
        return IncompatibleKeys(missing, unexpected)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies are made without what `backward` needs: x may be large."""
        return {**self.__dict__, "_saved": None, "_unsaved": _NO_FORWARD}

    def __repr__(self) -> str:
        def shown(name: str) -> str:
            value = getattr(self, name)
            if name == "bias":
                value = value is not None
            return repr(value.name if isinstance(value, np.dtype) else value)

        extras = [name for name, default in self._extras.items() if getattr(self, name, default) != default]
        by_name = [f"{name}={shown(name)}" for name in (*self._options, *extras)]
        return f"{type(self).__name__}({', '.join([*map(shown, self._required), *by_name])})"


class _ChannelLayer(Layer):
    """A layer with a weight and a bias for each channel."""

    def __init__(self, channels: int, eps: float, affine: bool, channel_axis: SupportsIndex, dtype: DTypeLike) -> None:
        self.affine = _errors.flag("affine", affine)
        super().__init__((channels,), eps, affine, affine, dtype)
        self.channel_axis = _errors._int("channel_axis", channel_axis)
        self._channels = channels

    @property
    def _spec(self) -> dict[str, Any]:
        return {"channel_axis": self.channel_axis}

    def forward(self, x: Array) -> Array:
        axis = self.channel_axis
        # The functions would blame the weight, and cannot know where there is none.
        if isinstance(x, np.ndarray) and -x.ndim <= axis < x.ndim and x.shape[axis] != self._channels:
            raise ValueError(f"x must have {self._channels} channels on axis {axis}, got shape {x.shape}")
        return super().forward(x)


class _TrackingLayer(_ChannelLayer):
    """A layer that may keep running statistics of its channels."""

    _required = ("num_features",)
    _options = ("eps", "momentum", "affine", "track_running_stats")
    _state = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    _evaluated = f"{Layer._evaluated}, with frozen = True if the running statistics are to be used and kept"
    _flag: ClassVar[str]  # the argument of the functions that chooses statistics from x

    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        channel_axis: SupportsIndex = 1,
        dtype: DTypeLike = np.float32,
        ddof: float = 1,
    ) -> None:
        self.num_features = _count("num_features", num_features)
        super().__init__(self.num_features, eps, affine, channel_axis, dtype)
        if momentum is not None:
            _errors._finite("momentum", momentum)
        _errors._finite("ddof", ddof, least=0)
        self.momentum = momentum
        self.ddof = ddof
        self.track_running_stats = _errors.flag("track_running_stats", track_running_stats)
        self.frozen = False
        self.running_mean: Array | None = None
        self.running_var: Array | None = None
        self.num_batches_tracked: NDArray[np.int64] | None = None
        if track_running_stats:
            self.running_mean = np.zeros(self.num_features, self._sum_dtype)
            self.running_var = np.ones(self.num_features, self._sum_dtype)
            self.num_batches_tracked = np.zeros((), np.int64)

    def _statistics(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.running_mean is None or self.num_batches_tracked is None:
            if self.frozen:
                raise ValueError(
                    "frozen = True needs running statistics, got a layer without them; "
                    "make it with track_running_stats=True, or set frozen = False"
                )
            return {self._flag: True}, {}
        given: dict[str, Any] = {"running_mean": self.running_mean, "running_var": self.running_var}
        if not self.training or self.frozen:
            return {self._flag: False}, given
        momentum = 1 / (int(self.num_batches_tracked) + 1) if self.momentum is None else self.momentum
        return {self._flag: True}, {**given, "momentum": momentum, "ddof": self.ddof}

    def forward(self, x: Array) -> Array:
        try:
            y = super().forward(x)
        except ValueError as error:
            # The way out of one value per channel is that of the functions: an argument that layers do not have.
            sentence, found, _ = str(error).partition(f", or {self._flag}=False")
            if not found:
                raise
            way = "eval()" if self.num_batches_tracked is not None else "track_running_stats=True and eval()"
            raise ValueError(f"{sentence}, or {way}") from None
        # An empty batch has no statistics: it moves none, and does not count.
        if self.training and not self.frozen and self.num_batches_tracked is not None and y.size:
            self.num_batches_tracked += 1
        return y


# ---- the norms -------------------------------------------------------------------------------------------------------


class BatchNorm(_TrackingLayer):
    r"""Normalize each channel over the batch and all other axes.

    .. math:: y = \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} \, \gamma_c + \beta_c

    Training takes mean and variance from x and moves the running statistics; evaluation uses these. Without them,
    evaluation takes mean and variance from x, too. See `normkit.batch_norm`.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance, in units of x squared.
    momentum : float or None
        Weight of the new value in the running statistics. None: 1 / `num_batches_tracked`, which makes them the plain
        averages over all batches.
    affine : bool
        Have `weight` (gamma) and `bias` (beta).
    track_running_stats : bool
        Have `running_mean`, `running_var` and `num_batches_tracked`.
    channel_axis : int
        The axis of the channels; negative ones count from the end.
    dtype : dtype
        Of the parameters: float64, float32, float16 or bfloat16.
    ddof : float
        The running variance is that of n values divided by n - ddof: 1 is PyTorch's rule.

    Attributes
    ----------
    weight, bias : ndarray of `dtype`, shape (C,), or None
    dweight, dbias : ndarray of float32, or float64 for float64 parameters, shape (C,), or None
        Gradients, added up since `zero_grad`.
    running_mean, running_var : ndarray of float32, or float64 for float64 parameters, shape (C,), or None
    num_batches_tracked : ndarray of int64, shape (), or None
    frozen : bool
        Set it True to train what lies before the layer, weight and bias with the running statistics as constants:
        forward uses them and does not move them, and backward knows that they do not depend on x. Unlike `eval()`,
        which saves nothing for a backward, it is not undone by `train()`. A layer without running statistics refuses.
    training : bool

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> layer = nk.nn.BatchNorm(2, eps=0.0)
    >>> x = np.array([[1, 10], [3, 14]], dtype=np.float32)
    >>> print(layer(x))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(layer.running_mean, layer.running_var, layer.num_batches_tracked)
    [0.2 1.2] [1.1 1.7] 1

    The loss sum(y) does not depend on x, and on the bias of each channel twice:

    >>> dx = layer.backward(np.ones_like(x))
    >>> print(dx, layer.dweight, layer.dbias)
    [[0. 0.]
     [0. 0.]] [0. 0.] [2. 2.]
    """

    _functions = _Functions(functional.batch_norm, functional.batch_norm_forward, functional.batch_norm_backward)
    _flag = "training"


class InstanceNorm(_TrackingLayer):
    r"""Normalize each channel of each sample over space.

    .. math:: y = \frac{x - \mu_{nc}}{\sqrt{\sigma_{nc}^2 + \epsilon}} \, \gamma_c + \beta_c

    Without running statistics, the default, training and evaluation do the same. With them, training moves them by
    their averages over the samples, and evaluation uses them. See `normkit.instance_norm`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, channel_axis, dtype, ddof
        As in `BatchNorm`; `affine` and `track_running_stats` are False unless given, and `channel_axis` may not be
        axis 0.

    Attributes
    ----------
    weight, bias, dweight, dbias, running_mean, running_var, num_batches_tracked, frozen, training
        As in `BatchNorm`.

    Notes
    -----
    PyTorch's layer never counts: `num_batches_tracked` stays 0, and ``momentum=None`` leaves the statistics as they
    are. Here both work as in `BatchNorm`.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016,
    https://arxiv.org/abs/1607.08022

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> layer = nk.nn.InstanceNorm(2, eps=0.0)
    >>> print(layer(np.array([[[1, 3], [10, 14]]], dtype=np.float32)))
    [[[-1.  1.]
      [-1.  1.]]]
    """

    _functions = _Functions(
        functional.instance_norm, functional.instance_norm_forward, functional.instance_norm_backward
    )
    _flag = "use_input_stats"

    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        channel_axis: SupportsIndex = 1,
        dtype: DTypeLike = np.float32,
        ddof: float = 1,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, channel_axis=channel_axis, dtype=dtype, ddof=ddof
        )


class GroupNorm(_ChannelLayer):
    r"""Normalize each group of neighbouring channels of each sample.

    .. math:: y = \frac{x - \mu_{ng}}{\sqrt{\sigma_{ng}^2 + \epsilon}} \, \gamma_c + \beta_c

    See `normkit.group_norm`.

    Parameters
    ----------
    num_groups : int
        G, a divisor of C.
    num_channels : int
        C.
    eps : float
        Added to the variance, in units of x squared.
    affine : bool
        Have `weight` (gamma) and `bias` (beta).
    channel_axis : int
        The axis of the channels, not axis 0; negative ones count from the end.
    dtype : dtype
        Of the parameters: float64, float32, float16 or bfloat16.

    Attributes
    ----------
    weight, bias : ndarray of `dtype`, shape (C,), or None
    dweight, dbias : ndarray of float32, or float64 for float64 parameters, shape (C,), or None
        Gradients, added up since `zero_grad`.
    training : bool

    References
    ----------
    Wu and He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> layer = nk.nn.GroupNorm(2, 4, eps=0.0)
    >>> print(layer(np.array([[1, 3, 10, 14]], dtype=np.float32)))
    [[-1.  1. -1.  1.]]
    """

    _functions = _Functions(functional.group_norm, functional.group_norm_forward, functional.group_norm_backward)
    _required = ("num_groups", "num_channels")
    _options = ("eps", "affine")

    def __init__(
        self,
        num_groups: SupportsIndex,
        num_channels: SupportsIndex,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        channel_axis: SupportsIndex = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_groups = _count("num_groups", num_groups)
        self.num_channels = _count("num_channels", num_channels)
        if self.num_channels % self.num_groups:
            raise ValueError(f"num_groups must divide num_channels, {self.num_channels}, got {self.num_groups}")
        super().__init__(self.num_channels, eps, affine, channel_axis, dtype)

    @property
    def _spec(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, **super()._spec}


class _TrailingLayer(Layer):
    """A layer with a weight for each element of a sample, the trailing axes of x."""

    _required = ("normalized_shape",)

    def __init__(self, normalized_shape: Ints, eps: float | None, weight: bool, bias: bool, dtype: DTypeLike) -> None:
        self.normalized_shape = _errors._ints("normalized_shape", normalized_shape)
        if min(self.normalized_shape) < 1:
            raise ValueError(f"normalized_shape must hold extents of at least 1, got {self.normalized_shape}")
        self.elementwise_affine = _errors.flag("elementwise_affine", weight)
        super().__init__(self.normalized_shape, eps, weight, bias, dtype)

    @property
    def _spec(self) -> dict[str, Any]:
        return {"normalized_shape": self.normalized_shape}


class LayerNorm(_TrailingLayer):
    r"""Normalize each sample over its trailing axes.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \, \gamma + \beta

    See `normkit.layer_norm`.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Shape of one sample, the last dimensions of x. An int n stands for (n,).
    eps : float
        Added to the variance, in units of x squared.
    elementwise_affine : bool
        Have `weight` (gamma), and `bias` (beta) unless that is False.
    bias : bool
        False leaves out the bias.
    dtype : dtype
        Of the parameters: float64, float32, float16 or bfloat16.

    Attributes
    ----------
    weight, bias : ndarray of `dtype`, shape `normalized_shape`, or None
    dweight, dbias : ndarray of float32, or float64 for float64 parameters, shape `normalized_shape`, or None
        Gradients, added up since `zero_grad`.
    training : bool

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> layer = nk.nn.LayerNorm(8, eps=0.0)
    >>> print(layer(np.array([2, 4, 4, 4, 5, 5, 7, 9], dtype=np.float32)))
    [-1.5 -0.5 -0.5 -0.5  0.   0.   1.   2. ]
    """

    _functions = _Functions(functional.layer_norm, functional.layer_norm_forward, functional.layer_norm_backward)
    _options = ("eps", "elementwise_affine", "bias")

    def __init__(
        self,
        normalized_shape: Ints,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            normalized_shape, eps, elementwise_affine, _errors.flag("bias", bias) and elementwise_affine, dtype
        )


class RMSNorm(_TrailingLayer):
    r"""Divide each sample by the root of the mean of its squares.

    .. math:: y = \frac{x}{\sqrt{\overline{x^2} + \epsilon}} \, \gamma

    See `normkit.rms_norm`.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Shape of one sample, the last dimensions of x. An int n stands for (n,).
    eps : float or None
        Added to the mean of squares, in units of x squared. None: ``np.finfo(np.float32).eps``, or that of float64 for
        float64 data.
    elementwise_affine : bool
        Have `weight` (gamma).
    dtype : dtype
        Of the weight: float64, float32, float16 or bfloat16.

    Attributes
    ----------
    weight : ndarray of `dtype`, shape `normalized_shape`, or None
    dweight : ndarray of float32, or float64 for a float64 weight, shape `normalized_shape`, or None
        Gradient, added up since `zero_grad`.
    bias, dbias : None
    training : bool

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> layer = nk.nn.RMSNorm(8, eps=0.0)
    >>> print(layer(np.array([3, -3, 3, 1, -1, 1, -1, 1], dtype=np.float32)))
    [ 1.5 -1.5  1.5  0.5 -0.5  0.5 -0.5  0.5]
    """

    _functions = _Functions(functional.rms_norm, functional.rms_norm_forward, functional.rms_norm_backward)
    _options = ("eps", "elementwise_affine")
    _eps_by_dtype = True

    def __init__(
        self,
        normalized_shape: Ints,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, False, dtype)
