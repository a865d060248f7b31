"""normkit and torch in one process: what taking turns costs, beside each of them alone.

    python bench/beside_torch.py [--threads 2] [--import-first torch|normkit] [--rounds 9] [--json FILE]

Two thread pools in one process fight when the idle threads of one spin on the cores that the other needs. So the time
of a loop that calls torch and normkit in turn is compared with the sum of the times of both loops alone, in the same
process, on all threads. Each row shows the median of the per-round ratios, over blocks of about 60 ms and more; a pause
of 20 ms before each block lets every pool fall asleep. 1.0: no cost. The column "1 thread" is the same with one thread
each, where nothing can spin: what it shows is the caches, which the two share.

The order of the imports decides which copies of an OpenMP runtime are loaded and used: try both.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

BLOCK_SECONDS = 0.06
PAUSE_SECONDS = 0.02

Call = Callable[[], Any]


def load(first: str) -> tuple[ModuleType, ModuleType]:
    """Import normkit and torch, in the order asked for."""
    importlib.import_module(first)
    return importlib.import_module("normkit"), importlib.import_module("torch")


def torch_calls(torch: Any) -> dict[str, Call]:
    """Matrix products from about 0.2 to 5 ms on two cores, and a small training step with its backward pass."""

    def product(n: int) -> Call:
        a, b, c = (torch.randn(n, n) for _ in range(3))
        return lambda: torch.mm(a, b, out=c)

    layer = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256))
    samples = torch.randn(256, 256)

    def step() -> None:
        layer.zero_grad()
        layer(samples).square().mean().backward()

    return {"mm 256": product(256), "mm 512": product(512), "mm 896": product(896), "training step": step}


def normkit_calls(nk: Any) -> dict[str, Call]:
    """Forward from about 0.1 to 5 ms on two cores, and forward with backward."""
    rng = np.random.default_rng(0)

    def layer(rows: int, columns: int) -> Call:
        x = rng.standard_normal((rows, columns), dtype=np.float32)
        out = np.empty_like(x)
        return lambda: nk.layer_norm(x, columns, out=out)

    images = rng.standard_normal((16, 64, 56, 56), dtype=np.float32)
    normalized = np.empty_like(images)
    x, dy = rng.standard_normal((2, 1024, 768), dtype=np.float32)
    y, dx = np.empty_like(x), np.empty_like(x)

    def both() -> None:
        _, mean, rstd = nk.layer_norm_forward(x, 768, out=y)
        nk.layer_norm_backward(dy, x, mean, rstd, 768, out=dx)

    return {
        "ln 512x768": layer(512, 768),
        "ln 4096x768": layer(4096, 768),
        "bn 16x64x56^2": lambda: nk.batch_norm(images, training=True, out=normalized),
        "ln 1024x768, both ways": both,
    }


def block(calls: tuple[Call, ...], repeats: int) -> float:
    """Seconds of `repeats` turns through `calls`."""
    time.sleep(PAUSE_SECONDS)
    for call in calls:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        for call in calls:
            call()
    return time.perf_counter() - start


def measure(a: Call, b: Call, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of each alone, and the ratio of the time in turns to the sum of both."""
    repeats = max(2, round(2 * BLOCK_SECONDS / block((a, b), 2)))
    alone_a, alone_b, ratios = [], [], []
    for _ in range(rounds):
        times = [block(calls, repeats) for calls in ((a,), (a, b), (b,))]
        alone_a.append(1e3 * times[0] / repeats)
        alone_b.append(1e3 * times[2] / repeats)
        ratios.append(times[1] / (times[0] + times[2]))
    return statistics.median(alone_a), statistics.median(alone_b), statistics.median(ratios)


def runtimes() -> list[str]:
    """The OpenMP runtimes that this process has loaded."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    names = ("libgomp", "libomp", "libiomp")
    files = {line.split()[-1] for line in maps.splitlines() if "/" in line}
    return sorted(file for file in files if Path(file).name.startswith(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of each library; by default what each takes by itself")
    parser.add_argument("--import-first", choices=("torch", "normkit"), default="torch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {options.rounds}")
    nk, torch = load(options.import_first)

    def set_threads(n: int | None) -> None:
        nk.set_num_threads(n)
        torch.set_num_threads(n or default)

    default = torch.get_num_threads()
    set_threads(options.threads)
    print(f"normkit: {nk.get_num_threads()} threads, torch: {torch.get_num_threads()}; {options.import_first} first")
    print(f"OpenMP runtimes: {', '.join(runtimes()) or 'unknown'}")
    print(f"{'torch':16}{'normkit':24}{'torch ms':>10}{'normkit ms':>12}{'in turns':>10}{'1 thread':>10}")
    rows, ratios = [], []
    for torch_name, a in torch_calls(torch).items():
        for normkit_name, b in normkit_calls(nk).items():
            set_threads(options.threads)
            torch_ms, normkit_ms, ratio = measure(a, b, options.rounds)
            ratios.append(ratio)
            set_threads(1)
            _, _, serial = measure(a, b, max(3, options.rounds // 3))
            rows.append(
                {
                    "torch": torch_name,
                    "normkit": normkit_name,
                    "torch_ms": torch_ms,
                    "normkit_ms": normkit_ms,
                    "ratio": ratio,
                    "ratio_one_thread": serial,
                }
            )
            print(
                f"{torch_name:16}{normkit_name:24}{torch_ms:10.2f}{normkit_ms:12.2f}{ratio:10.2f}{serial:10.2f}",
                flush=True,
            )
    print(f"median of the rows {statistics.median(ratios):.2f}, largest {max(ratios):.2f}")
    if options.json:
        machine = {"python": sys.version.split()[0], "torch": torch.__version__, "normkit": nk.__version__}
        Path(options.json).write_text(json.dumps({**machine, "runtimes": runtimes(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
