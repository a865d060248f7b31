"""Largest errors of y and dx by mean/std of the data: normkit beside torch, JAX and ONNX Runtime where installed.

    python bench/exactness.py [--markdown FILE]

Every result is compared with the formula on the same inputs, in float64 (in long double for float64 data). --markdown
also writes the tables to a file: docs/exactness_tables.md is made so.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import normkit as nk
from normkit import _core

EPS = 1e-5
GROUPS = 8
RATIOS = (0.0, 1e2, 1e3, 1e4, 1e6)
RATIOS_HALF = (0.0, 1.0, 10.0, 100.0)  # beyond, rounding to the dtype leaves x a few values
BITS = {"float16": 11, "bfloat16": 8}  # of the significand
ONES = 10_000  # rows of ones that are summed

Array = np.ndarray[Any, Any]


class Case(NamedTuple):
    """A norm in a layout, on arrays of `shape`."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]  # of one set; for group norm, once the channels are two axes: groups, and channels of a group
    channel_axis: int = 1

    def sets(self, array: Array) -> Array:
        """View the array with the axes that `axes` counts."""
        if not self.name.startswith("group"):
            return array
        c = self.channel_axis
        return array.reshape(*array.shape[:c], GROUPS, array.shape[c] // GROUPS, *array.shape[c + 1 :])


CASES = (
    Case("layer_norm", (64, 1024), (1,)),
    Case("batch_norm NCHW", (4, 64, 32, 32), (0, 2, 3)),
    Case("batch_norm NHWC", (4, 32, 32, 64), (0, 1, 2), 3),
    Case("instance_norm NHWC", (4, 32, 32, 64), (1, 2), 3),
    Case("group_norm NHWC", (4, 32, 32, 64), (1, 2, 4), 3),
)


class Result(NamedTuple):
    y: Array
    dx: Array | None = None


class Exact(NamedTuple):
    y: Array
    dx: Array
    unit: Array  # rstd * max|dy| over the set: the unit in which the bound of dx is stated


def exact(case: Case, x: Array, dy: Array) -> Exact:
    wide = np.longdouble if x.dtype == np.float64 else np.float64
    g, d = case.sets(dy).astype(wide), case.sets(x).astype(wide)

    def mean(values: Array) -> Array:
        return np.asarray(values.mean(case.axes, keepdims=True))

    d -= mean(d)
    d -= mean(d)  # what rounding left of it
    rstd = 1 / np.sqrt(mean(d * d) + wide(EPS))
    xhat = d * rstd
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    unit = np.broadcast_to(rstd * np.abs(g).max(case.axes, keepdims=True), dx.shape)
    return Exact(*(each.reshape(x.shape) for each in (xhat, dx, unit)))


# ---- the contenders: each answers None for what it does not have -----------------------------------------------------


def normkit_result(case: Case, x: Array, dy: Array) -> Result:
    norm, spec, options = case.name.split()[0], (), {"channel_axis": case.channel_axis}
    if norm == "layer_norm":
        spec, options = (x.shape[-1],), {}
    elif norm == "group_norm":
        spec = (GROUPS,)
    training = {"training": True} if norm == "batch_norm" else {}
    y, mean, rstd = getattr(nk, norm + "_forward")(x, *spec, eps=EPS, **training, **options)
    return Result(y, getattr(nk, norm + "_backward")(dy, x, mean, rstd, *spec, needs=("x",), **options)[0])


def normkit_dbias(dy: Array) -> Array:
    n = dy.shape[-1]
    weight = np.ones(n, dy.dtype)
    _, mean, rstd = nk.layer_norm_forward(np.zeros_like(dy), n, weight)
    _, _, dbias = nk.layer_norm_backward(dy, np.zeros_like(dy), mean, rstd, n, weight)
    return dbias.astype(np.float64)


class Torch:
    def __init__(self, torch: Any, float32_weight: bool = False) -> None:
        self.torch = torch
        self.float32_weight = float32_weight  # with half types torch then takes other code than without a weight

    def tensor(self, array: Array, channel_axis: int = 1) -> Any:
        """NHWC memory becomes a tensor in channels_last, without a copy."""
        if array.dtype.name == "bfloat16":  # which torch does not take from NumPy
            tensor = self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        else:
            tensor = self.torch.from_numpy(array)
        return tensor.movedim(channel_axis, 1)

    def __call__(self, case: Case, x: Array, dy: Array) -> Result:
        functional = self.torch.nn.functional
        data = self.tensor(x, case.channel_axis).requires_grad_()
        weight = bias = None
        if self.float32_weight:
            n = data.shape[1]
            weight, bias = self.torch.ones(n), self.torch.zeros(n)
        norm = case.name.split()[0]
        if norm == "layer_norm":
            y = functional.layer_norm(data, x.shape[-1:], weight, bias, EPS)
        elif norm == "batch_norm":
            y = functional.batch_norm(data, None, None, weight, bias, True, eps=EPS)
        elif norm == "instance_norm":
            y = functional.instance_norm(data, None, None, weight, bias, eps=EPS)
        else:
            y = functional.group_norm(data, GROUPS, weight, bias, EPS)
        y.backward(self.tensor(dy, case.channel_axis))
        return Result(*(np.asarray(t.detach().double().movedim(1, case.channel_axis)) for t in (y, data.grad)))

    def dbias(self, dy: Array) -> Array:
        y_gradient = self.tensor(dy)
        bias = self.torch.zeros(dy.shape[-1], dtype=y_gradient.dtype, requires_grad=True)
        x, weight = self.torch.zeros_like(y_gradient), self.torch.ones_like(bias)
        self.torch.nn.functional.layer_norm(x, bias.shape, weight, bias).backward(y_gradient)
        return np.asarray(bias.grad.double())


class Jax:
    """jax.nn.standardize, as flax's norms compute: the mean of squares less the square of the mean."""

    def __init__(self, jax: Any) -> None:
        self.jax = jax

    def __call__(self, case: Case, x: Array, dy: Array) -> Result | None:
        if x.dtype != np.float32:  # float64 is a switch of the whole process; of half types flax makes float32 first
            return None
        standardize = self.jax.nn.standardize
        y, vjp = self.jax.vjp(lambda data: standardize(data, axis=case.axes, epsilon=EPS), case.sets(x))
        return Result(*(np.asarray(array).reshape(x.shape) for array in (y, vjp(case.sets(dy))[0])))


class OnnxRuntime:
    def __init__(self, onnxruntime: Any) -> None:
        self.onnxruntime = onnxruntime

    def __call__(self, case: Case, x: Array, dy: Array) -> Result | None:
        if case.name != "layer_norm" or x.dtype != np.float32:
            return None
        from onnx import TensorProto, helper

        x_info, weight_info, y_info = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * ndim)
            for name, ndim in (("x", 2), ("weight", 1), ("y", 2))
        )
        node = helper.make_node("LayerNormalization", ["x", "weight"], ["y"], epsilon=EPS)
        graph = helper.make_graph([node], "layer_norm", [x_info, weight_info], [y_info])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        session = self.onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return Result(session.run(None, {"x": x, "weight": np.ones(x.shape[-1], np.float32)})[0])


def libraries() -> dict[str, Any]:
    """The modules that are installed, by name."""
    found = {}
    for name in ("torch", "jax", "onnxruntime"):
        try:
            found[name] = importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed: left out")
    return found


# ---- the tables ------------------------------------------------------------------------------------------------------


def dtype_of(name: str) -> Any:
    return importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def error_of_y(result: Result, truth: Exact) -> float:
    return float((np.abs(result.y - truth.y) / np.maximum(1, np.abs(truth.y))).max())


def error_of_dx(result: Result, truth: Exact) -> float | None:
    return None if result.dx is None else float((np.abs(result.dx - truth.dx) / truth.unit).max())


def ulps_of_y(bits: int) -> Callable[[Result, Exact], float]:
    """The error in units in the last place of a dtype with so many bits of significand."""

    def measure(result: Result, truth: Exact) -> float:
        seen = np.abs(truth.y) >= 1 / 16  # below, the last place is finer than the bound before the final rounding
        y, y64 = result.y.astype(np.float64)[seen], truth.y[seen]
        ulp = 2.0 ** (np.floor(np.log2(np.abs(y64))) - (bits - 1))
        return float((np.abs(y - y64) / ulp).max())

    return measure


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def table(
    contenders: dict[str, Callable[..., Result | None]],
    dtype: str,
    ratios: tuple[float, ...],
    measure: Callable[[Result, Exact], float | None],
    form: str = ".1e",
) -> list[str]:
    """The lines of a Markdown table: the largest error by norm, library and mean/std."""
    lines = [row("norm", "library", *(f"{ratio:.0e}".replace("e+0", "e") if ratio else "0" for ratio in ratios))]
    lines.append(row(*["---"] * (2 + len(ratios))))
    for case in CASES:
        inputs, truths = [], []
        for ratio in ratios:
            rng = np.random.default_rng(0)
            x = (rng.standard_normal(case.shape) + ratio).astype(dtype_of(dtype))
            dy = rng.standard_normal(case.shape).astype(dtype_of(dtype))
            inputs.append((x, dy))
            truths.append(exact(case, x, dy))
        for library, call in contenders.items():
            cells = []
            for (x, dy), truth in zip(inputs, truths):
                result = call(case, x, dy)
                error = None if result is None else measure(result, truth)
                if error is not None:
                    cells.append(f"{error:{form}}")
            if cells:
                lines.append(row(case.name, library, *cells))
    return lines


def tables() -> list[str]:
    found = libraries()
    contenders: dict[str, Any] = {"normkit": normkit_result}
    contenders |= {name: {"torch": Torch, "jax": Jax, "onnxruntime": OnnxRuntime}[name](found[name]) for name in found}
    dtypes = [name for name in _core.dtypes() if name != "bfloat16" or importlib.util.find_spec("ml_dtypes")]
    versions = [f"normkit {nk.__version__}"]
    versions += [f"{name} {module.__version__.partition('+')[0]}" for name, module in found.items()]
    lines = [f"{', '.join(versions)}; {platform.machine()}, {_core.isa()}. Columns: mean/std of x."]
    for name in ("float32", "float64"):
        if name in dtypes:
            lines += ["", f"**{name}, forward.** Largest error of y, in units of max(1, |x̂|):", ""]
            lines += table(contenders, name, RATIOS, error_of_y)
            lines += ["", f"**{name}, backward.** Largest error of dx, in units of rstd · max|dy| over the set:", ""]
            lines += table(contenders, name, RATIOS, error_of_dx)
    halves = [name for name in BITS if name in dtypes]
    contenders = {"normkit": normkit_result}
    if "torch" in found:
        contenders["torch"] = Torch(found["torch"])
        contenders["torch, float32 weight"] = Torch(found["torch"], float32_weight=True)
    for name in halves:
        lines += ["", f"**{name}, forward.** Largest error of y in units in the last place, where |y| ≥ 1/16:", ""]
        lines += table(contenders, name, RATIOS_HALF, ulps_of_y(BITS[name]), ".3f")
    if halves:
        sums = {"exact, rounded": lambda dy: np.asarray([ONES], dy.dtype), "normkit": normkit_dbias}
        if "torch" in found:
            sums["torch"] = contenders["torch"].dbias
        lines += ["", f"**Half types, long sums.** dbias of layer_norm of {ONES:,} rows whose dy is 1:", ""]
        lines += [row("library", *halves), row(*["---"] * (1 + len(halves)))]
        for name, call in sums.items():
            lines.append(row(name, *(f"{float(call(np.ones((ONES, 8), dtype_of(half)))[0]):.0f}" for half in halves)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Largest errors of y and dx, by mean/std of the data.")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables there too")
    options = parser.parse_args()
    text = "\n".join(tables()) + "\n"
    print(text, end="")
    if options.markdown:
        options.markdown.write_text("<!-- made by bench/exactness.py --markdown -->\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
