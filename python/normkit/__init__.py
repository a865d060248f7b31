"""normkit: every normalization of deep learning, forward and backward, on NumPy arrays and on arrays on a GPU.

One formula carries them all::

    y = weight * (x - mean) / sqrt(var + eps) + bias

`mean` and `var` (biased) are taken over a set S of elements; the norms differ only in S and in which elements share one
weight and one bias.

=================  =============================================  ==========================
function           S, for x of shape (N, C, H, W)                 weight and bias
=================  =============================================  ==========================
`batch_norm`       N, H, W: one set per channel                   one per channel
`instance_norm`    H, W: one set per sample and channel           one per channel
`group_norm`       C / groups, H, W: one per sample and group     one per channel
`layer_norm`       the trailing axes `normalized_shape`           one per element of the set
`rms_norm`         as `layer_norm`, the mean taken as zero        one per element of the set
`normalize`        any axes                                       any shape that broadcasts
=================  =============================================  ==========================

Each has a `_forward`, which also returns the statistics, and a `_backward`, which takes them and returns gradients.
Data is float64, float32, float16 or the bfloat16 of ml_dtypes. No bit of a result depends on the number of threads, nor
on the instruction set of the machine. `normkit.nn` has layers that keep their own weights, statistics and gradients;
`moments` and `Moments` are count, mean and M2, to be merged. `normkit.cuda` tells whether there is a GPU to compute on.
"""

from . import cuda, nn
from ._moments import Moments, moments
from .functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    get_num_threads,
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    normalize,
    normalize_backward,
    normalize_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    set_num_threads,
    set_output_cache,
)

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "cuda",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "moments",
    "nn",
    "normalize",
    "normalize_backward",
    "normalize_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "set_num_threads",
    "set_output_cache",
]
