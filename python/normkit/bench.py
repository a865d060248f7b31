"""How fast normkit is on this machine, in ten seconds: ``python -m normkit.bench``.

A line for each norm and pass: the time of a call with a fresh output; the bytes of all arrays over that time; the same
as a share of the speed at which this machine copies as many bytes; the time of the formula in NumPy, and of torch
where it is installed, over that of normkit. Results are compared before they are timed.
"""

import argparse
import contextlib
import importlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import __version__, _core, functional, get_num_threads, set_num_threads

Array = NDArray[Any]
Call = Callable[[], Any]

EPS = 1e-5
ROUNDS = 5
PAUSE_SECONDS = 0.01  # threads of OpenMP spin for up to 7 ms after their work, in the way of whoever comes next
TOLERANCE = 1e-3  # the largest difference of results in float32, over the largest magnitude in them


class Case(NamedTuple):
    norm: str
    shape: tuple[int, ...]  # (N, C, ...), whatever memory looks like, or (rows, D)
    channels_last: bool = False  # in memory
    num_groups: int = 0


CASES = (
    Case("layer", (1, 768)),
    Case("layer", (4096, 768)),
    Case("rms", (4096, 768)),
    Case("batch", (32, 64, 28, 28)),
    Case("batch", (32, 64, 28, 28), channels_last=True),
    Case("group", (2, 320, 32, 32), num_groups=32),
    Case("instance", (4, 64, 64, 64)),
)


# ---- the formula in NumPy --------------------------------------------------------------------------------------------


class Sets(NamedTuple):
    """What a norm normalizes over."""

    axes: tuple[int, ...]  # of the elements with one mean
    shared: tuple[int, ...]  # of the elements with one weight
    center: bool  # else the mean is taken as zero, and there is no bias


def moments(x: Array, sets: Sets) -> tuple[Any, Array]:
    """The mean of each set, and the reciprocal of its standard deviation; of tensors too, as all of the formula."""
    mean = x.mean(sets.axes, keepdims=True) if sets.center else 0
    return mean, 1 / (((x - mean) ** 2).mean(sets.axes, keepdims=True) + EPS) ** 0.5


def apply(x: Array, mean: Any, rstd: Array, weight: Array, bias: Array, sets: Sets) -> Array:
    y: Array = (x - mean) * rstd * weight
    return y + bias if sets.center else y


def gradients(dy: Array, x: Array, mean: Any, rstd: Array, weight: Array, sets: Sets) -> list[Array]:
    """The gradients of x, of weight and, where there is one, of bias."""
    g, xhat = weight * dy, (x - mean) * rstd
    dx = g - xhat * (g * xhat).mean(sets.axes, keepdims=True)
    dweight = (dy * xhat).sum(sets.shared)
    if not sets.center:
        return [dx * rstd, dweight]
    return [(dx - g.mean(sets.axes, keepdims=True)) * rstd, dweight, dy.sum(sets.shared)]


# ---- the same arrays for everyone ------------------------------------------------------------------------------------


class Problem:
    """The arrays of a case and, for each library, a call of forward and one of backward."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(0)
        n, c, *spatial = case.shape
        in_memory = (n, *spatial, c) if case.channels_last else case.shape
        self.case = case
        self.name = f"{case.norm}_norm"
        x, dy = (rng.standard_normal(in_memory, dtype=np.float32) for _ in range(2))
        self.x, self.dy = (np.moveaxis(a, -1, 1) if case.channels_last else a for a in (x, dy))
        self.weight, self.bias = (rng.standard_normal(c, dtype=np.float32) for _ in range(2))
        # What tells a norm its sets, and comes before weight in every function of it.
        self.extra = {"group": (case.num_groups,), "layer": ((c,),), "rms": ((c,),)}.get(case.norm, ())

    def arguments(self, convert: Callable[[Array], Any]) -> list[Any]:
        """The positional arguments of the norm, in normkit as in torch.nn.functional."""
        x, weight, bias = map(convert, (self.x, self.weight, self.bias))
        if self.case.norm == "batch":
            return [x, None, None, weight, bias, True]
        if self.case.norm == "instance":
            return [x, None, None, weight, bias]
        return [x, *self.extra, weight, EPS if self.case.norm == "rms" else bias]

    def normkit(self) -> tuple[Call, Call]:
        arguments = self.arguments(lambda array: array)
        forward = partial(getattr(functional, self.name), *arguments)
        _, *saved = getattr(functional, f"{self.name}_forward")(*arguments)
        backward = getattr(functional, f"{self.name}_backward")
        return forward, partial(backward, self.dy, self.x, *saved, *self.extra, self.weight)

    def torch(self, torch: Any) -> tuple[Call, Call]:
        function = getattr(torch.nn.functional, self.name)
        arguments = self.arguments(torch.from_numpy)
        leaves = self.arguments(lambda array: torch.from_numpy(array).requires_grad_())
        y = function(*leaves)
        wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        dy = torch.from_numpy(self.dy)
        return partial(function, *arguments), partial(torch.autograd.grad, y, wanted, dy, retain_graph=True)

    def numpy(self) -> tuple[Call, Call]:
        n, c, *spatial = self.case.shape
        channels = (self.case.num_groups, c // self.case.num_groups) if self.case.num_groups else (c,)
        x, dy = (array.reshape(n, *channels, *spatial) for array in (self.x, self.dy))
        weight, bias = (array.reshape(*channels, *(1 for _ in spatial)) for array in (self.weight, self.bias))
        kept = {"batch": (1,), "instance": (0, 1), "group": (0, 1)}.get(self.case.norm, (0,))
        sets = Sets(
            axes=tuple(axis for axis in range(x.ndim) if axis not in kept),
            shared=(0, *range(1 + len(channels), x.ndim)),
            center=self.case.norm != "rms",
        )

        saved = moments(x, sets)

        def forward() -> Array:
            return apply(x, *moments(x, sets), weight, bias, sets).reshape(self.x.shape)

        def backward() -> list[Array]:
            dx, *rest = gradients(dy, x, *saved, weight, sets)
            return [dx.reshape(self.x.shape), *(gradient.reshape(c) for gradient in rest)]

        return forward, backward


def copies(size: int) -> dict[str, Call]:
    """Copies that read and write `size` bytes in all, by ordinary and by non-temporal stores."""
    source, target = np.ones((2, size // 2 // 4), np.float32)
    return {
        "copy": partial(_core.copy, source, target, False),
        "copy past the caches": partial(_core.copy, source, target, True),
    }


def check(results: dict[str, Any], what: str) -> None:
    """Raise ArithmeticError where the libraries do not agree."""

    def arrays(result: Any) -> list[Array]:
        return [np.asarray(array) for array in (result if isinstance(result, Sequence) else [result])]

    expected = arrays(results["normkit"])
    for library, result in results.items():
        got = arrays(result)
        shapes, their_shapes = [array.shape for array in expected], [array.shape for array in got]
        if shapes != their_shapes:
            raise ArithmeticError(
                f"{what}: results of normkit and {library} must have the same shapes, got {shapes} and {their_shapes}; "
                "please report it, with what `python -m normkit` says"
            )
        for ours, theirs in zip(expected, got):
            largest, difference = float(np.abs(theirs).max()), float(np.abs(ours - theirs).max())
            if not difference <= TOLERANCE * largest:
                raise ArithmeticError(
                    f"{what}: normkit and {library} must agree within {TOLERANCE:g} of the largest value, {largest:g}, "
                    f"got a difference of {difference:.1e}; please report it, with what `python -m normkit` says"
                )


# ---- time ------------------------------------------------------------------------------------------------------------


def block(call: Call, repeats: int) -> float:
    """Seconds of one call, the mean of `repeats`."""
    time.sleep(PAUSE_SECONDS)
    if repeats > 1:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call in each round, A B C A B C, in about `seconds` in all."""
    share = seconds / (len(calls) * ROUNDS)
    repeats = {library: max(1, math.ceil(share / block(call, 2))) for library, call in calls.items()}
    times: dict[str, list[float]] = {library: [] for library in calls}
    for _ in range(ROUNDS):
        for library, call in calls.items():
            times[library].append(block(call, repeats[library]))
    return times


def ratio(times: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(time / our for time, our in zip(times, ours))


def report(seconds: float, torch: Any) -> None:
    """Measure every case for about `seconds` in all, and print a line for each."""
    versions = f"normkit {__version__} ({_core.isa()}), NumPy {np.__version__}"
    versions += f", torch {torch.__version__}" if torch else ", no torch"
    threads = get_num_threads()
    print(f"{versions}; float32, {threads} thread{'s' if threads > 1 else ''}; time of the others over normkit's")
    print(
        f"{'norm':10}{'array':>14}{'layout':>8}{'pass':>10}{'µs':>9}{'GB/s':>8}{'of copy':>9}{'NumPy':>8}{'torch':>8}"
    )
    for case in CASES:
        problem = Problem(case)
        libraries = {"normkit": problem.normkit(), "NumPy": problem.numpy()}
        if torch:
            libraries["torch"] = problem.torch(torch)
        for i, which in enumerate(("forward", "backward")):
            calls = {library: pair[i] for library, pair in libraries.items()}
            size = (2 if which == "forward" else 3) * problem.x.nbytes
            check({library: call() for library, call in calls.items()}, f"{problem.name} {which} of {case.shape}")
            times = measure({**calls, **copies(size)}, seconds / (2 * len(CASES)))
            print(line(case, which, times, size), flush=True)


def line(case: Case, which: str, times: dict[str, list[float]], size: int) -> str:
    ours = times["normkit"]
    copy = [min(pair) for pair in zip(times["copy"], times["copy past the caches"])]
    layout = "" if len(case.shape) == 2 else "NHWC" if case.channels_last else "NCHW"
    median = statistics.median(ours)
    torch = f"{ratio(times['torch'], ours):7.1f}x" if "torch" in times else ""
    return (
        f"{case.norm:10}{'x'.join(map(str, case.shape)):>14}{layout:>8}{which:>10}{1e6 * median:9.1f}"
        f"{size / median / 1e9:8.1f}{ratio(copy, ours):9.0%}{ratio(times['NumPy'], ours):7.1f}x{torch}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m normkit.bench",
        description="Time normkit beside a copy of as many bytes, the formula in NumPy, and torch if it is installed.",
    )
    parser.add_argument("--threads", type=int, help="of normkit and torch; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, in all (default: 2)")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out where it is installed")
    options = parser.parse_args(arguments)
    torch = None
    if not options.no_torch:
        with contextlib.suppress(ImportError):
            torch = importlib.import_module("torch")
    set_num_threads(options.threads)
    if torch:
        torch.set_num_threads(get_num_threads())
    report(options.seconds, torch)


if __name__ == "__main__":
    main()
