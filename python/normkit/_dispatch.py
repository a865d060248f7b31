"""Where calls go that the core does not accept: to the GPU where x is there, else to the sentence that says why not.

The operations have the arguments of the core's own.
"""

from typing import Any

from . import _gpu
from ._errors import explain_backward, explain_evaluate, explain_forward, explain_stream


def _run(operation: str, x: Any, written: tuple[object, ...], given: tuple[object, ...], stream: object) -> Any:
    """Return None where the arguments have a mistake, which is then to be explained."""
    if _gpu.on_gpu(x):
        return _gpu.run(operation, x, written, given, stream)
    if stream is not None:
        explain_stream(x, stream)
    return None


def forward(
    norm: int,
    x: object,
    spec: Any,
    weight: object,
    bias: object,
    eps: object,
    out: object,
    statistics: bool,
    running_mean: object,
    running_var: object,
    momentum: object,
    ddof: object,
    stream: object,
) -> Any:
    given = (norm, x, spec, weight, bias, eps, out, statistics, running_mean, running_var, momentum, ddof)
    result = _run("forward", x, (out, running_mean, running_var), given, stream)
    if result is None:
        explain_forward(norm, x, spec, weight, bias, eps, out, running_mean, running_var, momentum, ddof)
    return result


def evaluate(
    norm: int,
    x: object,
    spec: Any,
    weight: object,
    bias: object,
    eps: object,
    out: object,
    statistics: bool,
    running_mean: object,
    running_var: object,
    stream: object,
) -> Any:
    given = (norm, x, spec, weight, bias, eps, out, statistics, running_mean, running_var)
    result = _run("evaluate", x, (out,), given, stream)
    if result is None:
        explain_evaluate(norm, x, spec, weight, bias, eps, out, running_mean, running_var)
    return result


def backward(
    norm: int,
    dy: object,
    x: object,
    mean: object,
    rstd: object,
    spec: Any,
    weight: object,
    training: bool,
    needs: int,
    out: object,
    grad_dtype: int,
    stream: object,
) -> Any:
    given = (norm, dy, x, mean, rstd, spec, weight, training, needs, out, grad_dtype)
    result = _run("backward", x, (out,), given, stream)
    if result is None:
        explain_backward(norm, dy, x, mean, rstd, spec, weight, training, needs, out)
    return result
