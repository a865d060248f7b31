"""The cases of all benchmarks, and the fewest bytes that each has to move: the one place of both.

    python bench/cases.py [--device cuda | --more] [--cpp]

prints the names of all cases, of the CPU, those beyond its list, or of a GPU; with --cpp the table that the C++
benchmark is compiled with, a row for each case and pass:

    NORMKIT_CASE(name, norm, pass, layout, num_groups, passes2, passes4, passes8, extents...)

The name lacks its dtype; norm is an enumerator of normkit::Norm; passesN is `passes_over_memory` for elements of N
bytes; the extents are those of the logical shape, N, C, then the spatial ones, or rows, D.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

Shape = tuple[int, ...]

# In bytes: constants, so that figures of two machines compare.
L2 = 1 << 20  # of one core, as on recent servers
GPU_L2 = 50 << 20  # as on the H100
NORMS = {"bn": "batch", "ln": "layer", "rms": "rms", "gn": "group", "in": "instance"}
DTYPES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}  # bytes per element


@dataclass(frozen=True)
class Case:
    """One norm of one array.

    `shape` is (N, C, ...) whatever the memory looks like, or (rows, D). `layout` is the order in memory: "nchw",
    "nhwc", or "rows" where the norm has no channel axis. `num_groups` is 0 but for "gn".
    """

    norm: str
    layout: str
    shape: Shape
    num_groups: int = 0

    @property
    def passes(self) -> tuple[str, ...]:
        """ "forward" is training; "evaluate" normalizes with running statistics."""
        return ("forward", "evaluate", "backward") if self.norm == "bn" else ("forward", "backward")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def shape_in_memory(self) -> Shape:
        """The shape that is C-contiguous."""
        return (self.shape[0], *self.shape[2:], self.shape[1]) if self.layout == "nhwc" else self.shape

    @property
    def channel_axis_in_memory(self) -> int:
        return -1 if self.layout == "nhwc" else 1

    @property
    def parameter_shape(self) -> Shape:
        return self.shape[1:2]

    @property
    def unit(self) -> int:
        """Elements that must have been read before the first result can be written, walking memory as it lies.

        A row of layer and RMS norm. In NCHW: the plane of a sample and channel (instance), the group (group), all of
        a channel (batch). Where channels are innermost the sets lie interleaved, and whatever they share is one unit:
        the sample (instance, group), everything (batch, 2-D data included).
        """
        n, c = self.shape[:2]
        if self.norm in ("ln", "rms"):
            return c
        if self.layout == "nhwc" or len(self.shape) == 2:
            return self.size if self.norm == "bn" else self.size // n
        return {"bn": self.size // c, "gn": self.size // (n * (self.num_groups or 1)), "in": self.size // (n * c)}[
            self.norm
        ]


def name(case: Case, which: str, dtype: str = "") -> str:
    """The name of a pass of a case; without `dtype` what all dtypes share of it."""
    groups = f"g{case.num_groups}" if case.num_groups else ""
    parts = (f"{case.norm}_{which}", case.layout, "x".join(map(str, case.shape)), groups, dtype)
    return "/".join(part for part in parts if part)


def passes_over_memory(case: Case, which: str, itemsize: int, l2: int = L2) -> int:
    """How many times the bytes of x cross between memory and the cores, at least, where memory is walked as it lies.

    Forward reads x and writes y: 2. Backward reads x and dy and writes dx: 3. Both read their inputs a second time, 3
    and 5, where a unit (backward: x and dy of it) does not stay in cache until its statistics are known. What stays is
    what fits in half of L2; the other half is left to results and prefetching. Evaluation knows its statistics: 2.

    Where sets lie interleaved (2-D batch norm; batch, instance and group norm in NHWC) this is no strict bound: whoever
    goes down a few channels at a time, against the order of memory, has a smaller unit and may get by with 2 and 3.

    Not counted: weight, bias, statistics and the gradients of parameters, thousands of times smaller in most cases;
    and the reading of a cache line before an ordinary store, which non-temporal stores avoid.
    """
    inputs = 2 if which == "backward" else 1
    again = which != "evaluate" and inputs * case.unit * itemsize > l2 // 2
    return inputs * (2 if again else 1) + 1


def fewest_bytes(case: Case, which: str, itemsize: int, l2: int = L2) -> int:
    """The bytes that a pass of a case has to move; see `passes_over_memory` for how, and what "fewest" means there."""
    return passes_over_memory(case, which, itemsize, l2) * case.size * itemsize


# ---- the list --------------------------------------------------------------------------------------------------------


def images(n: int, c: int, *spatial: int) -> Shape:
    """(n, c, side, side) from one side, else (n, c, *spatial)."""
    return (n, c, *(spatial * 2 if len(spatial) == 1 else spatial))


BN = [
    *(images(32, c, side) for c, side in ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (1024, 14), (2048, 7))),
    *(images(1, 512, 64), images(1, 3, 1024)),
    *(images(4, 24, 160, 256), images(4, 40, 64)),
    *(images(2, 251, 28), images(12, 4, 8)),  # awkward: an odd number of channels; runs of 64 in 3,072 elements
]
BN_2D = [(3136, 256), (128, 8192)]
ROWS = [
    *((1, 768), (64, 768), (4096, 768), (25088, 128), (6272, 256), (8192, 1024), (8192, 4096)),
    *((16, 65536), (1, 1 << 20), (131072, 64), (4096, 1000), (4096, 1023)),
]
GN = [
    *((images(2, c, side), 32) for c, side in ((320, 64), (640, 32), (1280, 16), (2560, 8), (960, 64))),
    *((images(1, 128, 512), 32), (images(1, 512, 64), 32)),
    (images(32, 256, 56), 32),
    (images(8, 64, 64), 1),
]
IN = [
    *(images(4, 128, 128), images(8, 64, 256)),
    *(images(2, 32, 64, 64, 64), images(2, 320, 8, 8, 8)),
    images(256, 128, 28),
]
# These and ln 1x768: small enough that a call costs more than the arithmetic.
SMALL = [Case("bn", "nchw", images(1, 64, 8)), Case("gn", "nchw", images(1, 32, 4), 32)]

CASES: tuple[Case, ...] = (
    *(Case("bn", layout, shape) for layout in ("nchw", "nhwc") for shape in BN),
    *(Case("bn", "nchw", shape) for shape in BN_2D),
    *(Case(norm, "rows", shape) for norm in ("ln", "rms") for shape in ROWS),
    *(Case("gn", layout, shape, groups) for layout in ("nchw", "nhwc") for shape, groups in GN),
    *(Case("in", layout, shape) for layout in ("nchw", "nhwc") for shape in IN),
    *SMALL,
)

# What bfloat16 and float16 are compared on; the C++ benchmark has every case in every dtype.
HALF_CASES: tuple[Case, ...] = (
    *(Case(norm, "rows", shape) for norm in ("ln", "rms") for shape in ((4096, 768), (8192, 4096))),
    *(Case("gn", layout, images(2, 320, 64), 32) for layout in ("nchw", "nhwc")),
    *(Case("bn", layout, images(32, 64, 56)) for layout in ("nchw", "nhwc")),
)

# Beyond the list: small images and small sets, as the last stages of networks have them, and groups of vectors.
MORE_CASES: tuple[Case, ...] = (
    *(Case("bn", "nchw", images(*shape)) for shape in ((2, 2048, 7), (8, 512, 4), (128, 512, 4), (512, 512, 2))),
    *(Case("bn", "nchw", shape) for shape in ((256, 1024), (64, 1280))),
    *(Case("gn", "nchw", shape, 32) for shape in (images(128, 64, 8), images(1, 512, 8), (256, 512), (4096, 256))),
    *(Case("gn", "nchw", shape, 4) for shape in (images(64, 32, 4), (1024, 64))),
    *(Case("in", "nchw", shape) for shape in (images(8, 512, 4), images(32, 64, 10), (64, 256, 1, 8))),
    *(Case("ln", "rows", shape) for shape in ((32, 4096), (100, 5000), (1000, 32), (1024, 384), (2048, 160))),
    *(Case("rms", "rows", shape) for shape in ((32, 4096), (24576, 64))),
)

# What a GPU is measured on, in every dtype: arrays large enough for it.
GPU_ROWS = [
    *((32768, d) for d in (256, 1024, 4096, 8192, 16384)),
    *((4096, d) for d in (1000, 1023, 5120, 12288)),
    *((131072, 128), (16, 10**6)),
]
GPU_GN = [
    *(images(n, c, side) for n in (2, 16) for c, side in ((320, 64), (640, 32), (1280, 16), (960, 64))),
    images(1, 128, 512),  # of a decoder of images
]
GPU_IN = [images(256, 128, 28), images(8, 64, 256), images(2, 32, 128, 128, 128)]
GPU_BN = [
    *(images(n, c, side) for n in (32, 256) for c, side in ((64, 112), (256, 56), (1024, 14), (2048, 7))),
    images(32, 65, 56),  # awkward: vectors of channels don't fit
]
GPU_CASES: tuple[Case, ...] = (
    *(Case(norm, "rows", shape) for norm in ("ln", "rms") for shape in GPU_ROWS),
    *(Case("gn", layout, shape, 32) for layout in ("nchw", "nhwc") for shape in GPU_GN),
    *(Case("in", layout, shape) for layout in ("nchw", "nhwc") for shape in GPU_IN),
    *(Case("bn", layout, shape) for layout in ("nchw", "nhwc") for shape in GPU_BN),
    Case("bn", "nchw", (160000, 256)),
)


def cpp_row(case: Case, which: str) -> str:
    counts = (passes_over_memory(case, which, itemsize) for itemsize in (2, 4, 8))
    cells = (f'"{name(case, which)}"', NORMS[case.norm], which, case.layout, case.num_groups, *counts, *case.shape)
    return f"NORMKIT_CASE({', '.join(map(str, cells))})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the cases of the benchmarks.")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose cases (default: cpu)")
    whose.add_argument("--more", action="store_true", help="those of the CPU beyond its list")
    parser.add_argument("--cpp", action="store_true", help="as the table that the C++ benchmark is compiled with")
    options = parser.parse_args()
    if options.cpp:
        print("// Made by bench/cases.py --cpp, which says what the columns are.")
    for case in GPU_CASES if options.device == "cuda" else MORE_CASES if options.more else CASES:
        for which in case.passes:
            print(cpp_row(case, which) if options.cpp else name(case, which))


if __name__ == "__main__":
    main()
