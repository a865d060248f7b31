"""normkit beside torch, beside itself without its contracts, and beside a copy of the same size.

    python bench/compare.py [--threads 2] [--cases bn,ln] [--loose PATH/_core*.so] [--json FILE] [--plot FILE]

Protocol: the same arrays for all, results compared before anything is timed, outputs given, rounds that interleave the
contenders (A B C A B C), and the median of the per-round ratios. Each round lasts at least 20 ms a contender, and a
pause lets one OpenMP pool fall asleep before another starts, else the two slow each other.

`--loose` names a normkit._core built with -C cmake.define.NORMKIT_LOOSE=ON (contracts compiled out); the last column is
then our time over its time.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from normkit import _core

ROUNDS = 9
ROUND_SECONDS = 0.02
PAUSE_SECONDS = 0.01

Shape = tuple[int, ...]
# name: (norm, shape as the layout has it, channel axis or number of trailing axes, groups)
CASES: dict[str, tuple[str, Shape, int, int]] = {
    "bn nchw 32x64x56^2": ("batch", (32, 64, 56, 56), 1, 0),
    "bn nchw 32x64x112^2": ("batch", (32, 64, 112, 112), 1, 0),
    "bn nchw 1x3x1024^2": ("batch", (1, 3, 1024, 1024), 1, 0),
    "bn nchw 32x2048x7^2": ("batch", (32, 2048, 7, 7), 1, 0),
    "bn nhwc 32x64x56^2": ("batch", (32, 56, 56, 64), 3, 0),
    "bn nhwc 32x2048x7^2": ("batch", (32, 7, 7, 2048), 3, 0),
    "ln 4096x768": ("layer", (4096, 768), 1, 0),
    "ln 8192x4096": ("layer", (8192, 4096), 1, 0),
    "ln 131072x64": ("layer", (131072, 64), 1, 0),
    "ln 1x1048576": ("layer", (1, 1048576), 1, 0),
    "rms 4096x768": ("rms", (4096, 768), 1, 0),
    "rms 8192x4096": ("rms", (8192, 4096), 1, 0),
    "gn nchw 2x320x64^2": ("group", (2, 320, 64, 64), 1, 32),
    "gn nhwc 2x320x64^2": ("group", (2, 64, 64, 320), 3, 32),
    "in nchw 4x128x128^2": ("instance", (4, 128, 128, 128), 1, 0),
    "in nhwc 4x128x128^2": ("instance", (4, 128, 128, 128), 3, 0),
}


def load_core(path: str) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("normkit_loose._core", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Case:
    """The arrays of one case and, per contender, a forward and a backward call on them."""

    def __init__(self, norm: str, shape: Shape, axis: int, groups: int) -> None:
        rng = np.random.default_rng(0)
        self.norm, self.shape, self.axis, self.groups = norm, shape, axis, groups
        self.x = rng.standard_normal(shape, dtype=np.float32)
        self.dy = rng.standard_normal(shape, dtype=np.float32)
        parameters = shape[-axis:] if norm in ("layer", "rms") else (shape[axis],)
        self.weight = rng.standard_normal(parameters, dtype=np.float32)
        self.bias = rng.standard_normal(parameters, dtype=np.float32)
        self.out = np.empty_like(self.x)

    def of_core(self, core: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        norm = getattr(core, self.norm.upper())
        spec: Any = self.axis
        if self.norm == "group":
            spec = (self.groups, self.axis)
        elif self.norm in ("layer", "rms"):
            spec = self.shape[-self.axis :]
        bias = None if self.norm == "rms" else self.bias
        _, mean, rstd = core.forward(norm, self.x, spec, self.weight, bias, 1e-5, None, True, None, None, 0.1)

        def forward() -> Any:
            return core.forward(norm, self.x, spec, self.weight, bias, 1e-5, self.out, False, None, None, 0.1)

        def backward() -> Any:
            return core.backward(norm, self.dy, self.x, mean, rstd, spec, self.weight, True, 7, self.out)

        return forward, backward

    def of_torch(self, torch: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        functional = torch.nn.functional
        x, dy = torch.from_numpy(self.x), torch.from_numpy(self.dy)
        if self.norm in ("batch", "instance", "group") and self.axis != 1:
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)  # channels_last memory
        weight, bias = torch.from_numpy(self.weight), torch.from_numpy(self.bias)
        calls = {
            "batch": lambda x, w, b: functional.batch_norm(x, None, None, w, b, True),
            "instance": lambda x, w, b: functional.instance_norm(x, None, None, w, b),
            "group": lambda x, w, b: functional.group_norm(x, self.groups, w, b),
            "layer": lambda x, w, b: functional.layer_norm(x, self.weight.shape, w, b),
            "rms": lambda x, w, b: functional.rms_norm(x, self.weight.shape, w, 1e-5),
        }
        call = calls[self.norm]
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        leaves[0] = x.detach().requires_grad_()
        y = call(*leaves)
        wanted = leaves[:2] if self.norm == "rms" else leaves

        def forward() -> Any:
            with torch.no_grad():
                return call(x, weight, bias)

        def backward() -> Any:
            return torch.autograd.grad(y, wanted, dy, retain_graph=True)

        return forward, backward

    def copies(self) -> dict[str, Callable[[], Any]]:
        """Reads x and writes out with every thread, by either kind of store: the machine's measure."""
        return {
            "copy": lambda: _core.copy(self.x, self.out, False),
            "copy past the caches": lambda: _core.copy(self.x, self.out, True),
        }


def measure(contenders: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds a call, one figure a round."""
    repeats = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(ROUND_SECONDS / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            time.sleep(PAUSE_SECONDS)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def ratio(times: list[float], ours: list[float]) -> float:
    return statistics.median(t / o for t, o in zip(times, ours, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default="", help="comma-separated beginnings of case names")
    parser.add_argument("--loose", help="a _core built without the contracts")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--plot", help="draw the ratios to torch into this file (needs matplotlib)")
    options = parser.parse_args()

    cores: dict[str, Any] = {"normkit": _core}
    if options.loose:
        cores["loose"] = load_core(options.loose)
    for core in cores.values():
        core.set_num_threads(options.threads)
    try:
        import torch
    except ImportError:
        torch = None
    if torch is not None:
        torch.set_num_threads(options.threads)

    wanted = [c.strip() for c in options.cases.split(",")]
    rows = []
    print(f"{_core.isa()}, {options.threads} threads; microseconds (normkit), ratios of the others' time to it")
    print(f"{'case':24}{'pass':10}{'normkit':>10}{'torch':>8}{'copy':>8}{'contracts':>11}")
    for name, case_row in CASES.items():
        if not any(name.startswith(w) for w in wanted):
            continue
        case = Case(*case_row)
        calls = {contender: case.of_core(core) for contender, core in cores.items()}
        if torch is not None:
            calls["torch"] = case.of_torch(torch)
        for i, which in enumerate(("forward", "backward")):
            check(case, calls, i)
            contenders = {contender: pair[i] for contender, pair in calls.items()}
            seconds = measure({**contenders, **case.copies()})
            # The better of the two stores, round by round.
            past_the_caches = seconds.pop("copy past the caches")
            seconds["copy"] = [min(pair) for pair in zip(seconds["copy"], past_the_caches, strict=True)]
            ours = seconds["normkit"]
            row = {"case": name, "pass": which, "us": 1e6 * statistics.median(ours)}
            row.update({other: ratio(times, ours) for other, times in seconds.items() if other != "normkit"})
            rows.append(row)
            contracts = f"{100 / row['loose'] - 100:+10.0f}%" if "loose" in row else ""
            peer = f"{row['torch']:7.2f}x" if "torch" in row else " " * 8
            print(f"{name:24}{which:10}{row['us']:10.0f}{peer}{row['copy']:8.2f}{contracts}", flush=True)
    if options.plot and torch is not None:
        plot(rows, f"float32, {options.threads} threads, {_core.isa()}, outputs given", options.plot)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"isa": _core.isa(), "threads": options.threads, "rows": rows}, file, indent=1)


def plot(rows: list[dict[str, Any]], title: str, path: str) -> None:
    """Our speed over torch's, and how much of the copy speed we reach, case by case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 7), sharey=True, layout="constrained")
    names = list(dict.fromkeys(row["case"] for row in rows))
    for which, shift, color in (("forward", -0.2, "#2a6f97"), ("backward", 0.2, "#e07a5f")):
        chosen = [row for row in rows if row["pass"] == which]
        places = [names.index(row["case"]) + shift for row in chosen]
        axes[0].barh(places, [row["torch"] for row in chosen], height=0.38, color=color, label=which)
        axes[1].barh(places, [row["copy"] for row in chosen], height=0.38, color=color, label=which)
    axes[0].set(xscale="log", xlabel="torch's time / normkit's time", yticks=range(len(names)), yticklabels=names)
    axes[0].axvline(1, color="black", linewidth=0.8)
    axes[1].set(xlabel="time of a copy of x / normkit's time")
    axes[0].invert_yaxis()
    axes[1].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def check(case: Case, calls: dict[str, Any], which: int) -> None:
    """Compares results before they are timed: a wrong one is no contender."""
    results = {}
    for name, pair in calls.items():
        result = pair[which]()
        result = result[0] if isinstance(result, tuple) else result
        if hasattr(result, "detach"):
            result = result.detach()
            result = (result if case.axis == 1 or case.norm in ("layer", "rms") else result.movedim(1, -1)).numpy()
        results[name] = np.array(result)
    for name, result in results.items():
        np.testing.assert_allclose(result, results["normkit"], rtol=1e-3, atol=1e-3, err_msg=name)


if __name__ == "__main__":
    main()
