"""The compiled core. Private: the public functions in `normkit.functional` call it, `normkit._debug` steers it.

All arguments are positional. `forward`, `evaluate`, `backward` and `moments` check all they are given in one pass and
answer None, having changed nothing, when an argument is not acceptable. That is why arguments are `object` here. Arrays
on a GPU and a `stream` are not acceptable: they are for `_cuda`, whose operations have the same arguments.
"""

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from ._debug import Path

__version__: str

# Which norm: the first argument of every operation. It also says what `spec` is.
BATCH: int  # spec: channel_axis
INSTANCE: int  # spec: channel_axis
GROUP: int  # spec: (num_groups, channel_axis)
LAYER: int  # spec: normalized_shape
RMS: int  # spec: normalized_shape
AXES: int  # spec: axes
AXES_RMS: int  # spec: axes; the mean is taken as zero

@overload
def forward(
    norm: int,
    x: object,
    spec: object,
    weight: object,
    bias: object,
    eps: object,
    out: object,
    stats: Literal[False],
    running_mean: object,
    running_var: object,
    momentum: object,
    ddof: object,
    stream: object,
    /,
) -> NDArray[Any] | None: ...
@overload
def forward(
    norm: int,
    x: object,
    spec: object,
    weight: object,
    bias: object,
    eps: object,
    out: object,
    stats: Literal[True],
    running_mean: object,
    running_var: object,
    momentum: object,
    ddof: object,
    stream: object,
    /,
) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]] | None: ...
@overload
def evaluate(
    norm: int,
    x: object,
    spec: object,
    weight: object,
    bias: object,
    eps: object,
    out: object,
    stats: Literal[False],
    running_mean: object,
    running_var: object,
    stream: object,
    /,
) -> NDArray[Any] | None: ...
@overload
def evaluate(
    norm: int,
    x: object,
    spec: object,
    weight: object,
    bias: object,
    eps: object,
    out: object,
    stats: Literal[True],
    running_mean: object,
    running_var: object,
    stream: object,
    /,
) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]] | None: ...

# needs: 1 for dx, 2 for dweight, 4 for dbias. grad_dtype: 0 that of weight, or of x without; 1 float32; 2 float64.
def backward(
    norm: int,
    dy: object,
    x: object,
    mean: object,
    rstd: object,
    spec: object,
    weight: object,
    training: bool,
    needs: int,
    out: object,
    grad_dtype: int,
    stream: object,
    /,
) -> tuple[NDArray[Any] | None, NDArray[Any] | None, NDArray[Any] | None] | None: ...
def moments(norm: int, x: object, spec: object, /) -> tuple[int, NDArray[np.float64], NDArray[np.float64]] | None: ...
def copy(source: object, target: object, stream: bool, /) -> bool: ...
def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def set_output_cache(limit_bytes: int, /) -> int: ...
def output_cache_bytes() -> int: ...
def dtypes() -> tuple[str, ...]: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def force(isa: str | None, split: int, resident: int, stream: int, by_row: int, by_sample: int, /) -> None: ...
def last_path() -> Path: ...
