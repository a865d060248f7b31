"""Where it is measured: whose memory arrays lie in, by whose clock calls are timed, what a copy is.

`Cpu` and `Cuda` are all that differs between the two: contenders, protocol and tables are the same.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import math
import os
import platform
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normkit
from cases import GPU_L2, L2, Shape
from normkit import _core, _gpu
from normkit import bench as plain
from normkit.__main__ import report as environment

Array = NDArray[Any]
Call = Callable[[], Any]
Facts = dict[str, str]


# ---- clocks ----------------------------------------------------------------------------------------------------------


class Clock(ABC):
    """`most_calls`: of one measurement. `late`: calls of the last one did not come as fast as the device did them."""

    most_calls: float = math.inf
    late = False

    @abstractmethod
    def seconds(self, calls: Iterable[Call]) -> float:
        """What the calls take, all together."""


class WallClock(Clock):
    def seconds(self, calls: Iterable[Call]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start


class EventClock(Clock):
    """The time between two events in the current stream: the device's own.

    Python takes longer for a call than a GPU for a small array. So the device first spins for a while, in which the
    calls queue up, and then does them without a break. `cuda` is torch.cuda.
    """

    most_calls = 64  # of which some are ten kernels: the queue takes about a thousand, and then the host waits
    FEWEST_CYCLES, MOST_CYCLES = 1 << 21, 1 << 27  # a millisecond, a fifteenth of a second

    def __init__(self, cuda: Any) -> None:
        self.cuda, self.cycles = cuda, self.FEWEST_CYCLES

    def seconds(self, calls: Iterable[Call]) -> float:
        calls = list(calls)
        while True:
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            self.cuda._sleep(self.cycles)
            start.record()
            for call in calls:
                call()
            end.record()
            self.late = start.query()
            end.synchronize()
            if not self.late or self.cycles >= self.MOST_CYCLES:
                return 1e-3 * float(start.elapsed_time(end))
            self.cycles = min(4 * self.cycles, self.MOST_CYCLES)


# ---- what is timed ---------------------------------------------------------------------------------------------------


class Run(ABC):
    """A call that is ready to be checked and timed.

    `mode` is "out" where it writes into memory that it is given, else "call".
    """

    mode: str

    @property
    def late(self) -> bool:
        """Whether the device waited for the calls, so that their time is the host's."""
        return False

    @abstractmethod
    def results(self) -> list[Array] | None:
        """What it computes, in logical shape: y, or dx and the gradients of parameters. None: it checks itself."""

    @abstractmethod
    def seconds(self, at_least: float) -> float:
        """The time of one call, the mean of as many as take `at_least` seconds."""


class InProcess(Run):
    """A Python call; `read` makes arrays of what it returns."""

    def __init__(self, call: Call, read: Callable[[Any], list[Array]], mode: str) -> None:
        self.call, self.read, self.mode = call, read, mode
        self.clock: Clock = WallClock()
        self.turns = itertools.repeat(call)
        self.repeats = 0

    def rotate(self, others: Sequence[InProcess], clock: Clock) -> InProcess:
        """Take turns with the same call on other memory, once each before anything is timed.

        All keep their result until their next turn, so that results do not all come to lie in the same memory.
        """
        self.clock = clock
        if others:
            calls = [kept(run.call) for run in (self, *others)]
            for call in calls:
                call()
            self.turns = itertools.cycle(calls)
        return self

    @property
    def late(self) -> bool:
        return self.clock.late

    def results(self) -> list[Array]:
        return self.read(self.call())

    def seconds(self, at_least: float) -> float:
        next(self.turns)()  # brings threads and caches back from the contender before
        if self.repeats == 0:
            self.repeats = self._enough(at_least)
        return self._time(self.repeats) / self.repeats

    def _enough(self, at_least: float) -> int:
        repeats, most = 1, self.clock.most_calls
        while (elapsed := self._time(repeats)) < at_least and repeats < most:
            repeats = min(most, math.ceil(repeats * min(10, 1.2 * at_least / elapsed)))
        return repeats

    def _time(self, repeats: int) -> float:
        return self.clock.seconds(itertools.islice(self.turns, repeats))


def kept(call: Call) -> Call:
    """`call`, whose result lives until it is called again."""
    results: list[Any] = [None]

    def keeping() -> None:
        results[0] = call()

    return keeping


# ---- devices ---------------------------------------------------------------------------------------------------------


class Device(ABC):
    """`threads`: of the CPU that compute, 0 where none does. `xp`: the module that has the functions of its arrays."""

    name: str
    threads: int
    xp: Any
    l2: int  # bytes, of the count of fewest bytes
    quick_elements: int  # of the largest array that a first impression has time for
    pause_seconds: float  # between contenders

    @abstractmethod
    def facts(self) -> Facts:
        """What figures depend on and may be published: no paths, no names of hosts or kernels."""

    @abstractmethod
    def normal(self, dtype: str) -> Callable[[Shape], Any]:
        """What draws arrays, the same ones each time; begins with memory as empty as may be."""

    @abstractmethod
    def sets(self, size: int) -> int:
        """How many sets of arrays take turns, where one is of `size` bytes."""

    @abstractmethod
    def clock(self) -> Clock: ...

    def has_its_cores(self) -> bool:
        """Whether each of the threads has a core now."""
        return True

    @abstractmethod
    def copies(self, size: int) -> dict[str, Run]:
        """Copies that read and write `size` bytes in all, by every way that there is."""


def hash_13_megabytes() -> None:
    """Some 14 ms of arithmetic, without the interpreter's lock."""
    digest, part = hashlib.blake2b(), bytes(1 << 18)
    for _ in range(50):
        digest.update(part)


class Cpu(Device):
    name = "cpu"
    xp = np
    l2 = L2
    quick_elements = 1 << 22
    pause_seconds = 0.01  # threads of a pool spin for up to 7 ms after their work, in the way of the next contender
    # In shares of the number of threads: what they compute together, over what one does alone, BLAKE2b of 13 MB each.
    # Two threads of a Zen 4: 0.95 on two cores, 0.72 where the kernel began with both on one, 0.59 on the two halves of
    # one core; nothing in between.
    least_speed_up = 0.65

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def facts(self) -> Facts:
        return {
            "CPU": cpu(),
            "cores": str(cores()),
            "caches": caches() or "unknown",
            "instruction set": _core.isa(),
            "system": f"{platform.system()} {platform.machine()}",
            "Python": platform.python_version(),
        }

    def normal(self, dtype: str) -> Callable[[Shape], Any]:
        rng = np.random.default_rng(0)

        def draw(shape: Shape) -> Array:
            if dtype == "float64":
                return rng.standard_normal(shape)
            return rng.standard_normal(shape, dtype=np.float32).astype(dtype_of(dtype), copy=False)

        return draw

    def sets(self, size: int) -> int:
        """One: what fits in a cache stays there, for the copy too."""
        return 1

    def clock(self) -> Clock:
        return WallClock()

    def has_its_cores(self) -> bool:
        """A hypervisor may let two cores of its guest share one of its own, for seconds; no count of CPU time tells.

        A copy is as fast then, and whatever computes takes two to three times as long.
        """

        def seconds(threads: int) -> float:
            team = [Thread(target=hash_13_megabytes) for _ in range(threads)]
            start = time.perf_counter()
            for thread in team:
                thread.start()
            for thread in team:
                thread.join()
            return time.perf_counter() - start

        return self.threads < 2 or seconds(1) >= self.least_speed_up * seconds(self.threads)

    def copies(self, size: int) -> dict[str, Run]:
        return {kind: InProcess(copy, lambda _: [], "out") for kind, copy in plain.copies(size).items()}


class Cuda(Device):
    """The current GPU of `torch`, whose tensors the arrays are."""

    name = "cuda"
    place = "cuda"  # of the arrays, in torch's words
    threads = 0
    l2 = GPU_L2
    quick_elements = 1 << 25
    pause_seconds = 0.0
    # What lies between two uses of the same memory, in sizes of the L2 cache. A cache that forgets the oldest first has
    # forgotten it after one; of others nothing is said.
    APART = 4

    def __init__(self, torch: Any) -> None:
        self.xp, self.cuda = torch, torch.cuda
        self.properties = self.cuda.get_device_properties(self.place)

    @staticmethod
    def missing() -> str:
        """What it takes and is not there, in a sentence with the way out; empty where nothing is missing."""
        otherwise = "or leave --device out, to measure on the CPU"
        try:
            _gpu.core()
        except (ImportError, RuntimeError) as error:
            return f"{error}, {otherwise}"
        try:
            torch = importlib.import_module("torch")
        except ImportError as error:
            way = "install it as https://pytorch.org/get-started says"
            return f"--device cuda needs torch with CUDA, got {type(error).__name__}: {error}; {way}, {otherwise}"
        if torch.version.cuda is None:
            way = "install another build, as https://pytorch.org/get-started says"
            return f"--device cuda needs torch with CUDA, got torch {torch.__version__} without; {way}, {otherwise}"
        for library, sees_gpu in (("torch", torch.cuda.is_available), ("normkit", normkit.cuda.is_available)):
            if not sees_gpu():
                return f"--device cuda needs a GPU and its driver, and {library} sees none; see nvidia-smi, {otherwise}"
        return ""

    def facts(self) -> Facts:
        return {
            "GPU": self.properties.name,
            "driver": driver(),
            "CUDA": self.xp.version.cuda or "none",
            "L2": f"{self.properties.L2_cache_size / (1 << 20):g} MiB",
            "CPU": cpu(),
            "system": f"{platform.system()} {platform.machine()}",
            "Python": platform.python_version(),
        }

    def normal(self, dtype: str) -> Callable[[Shape], Any]:
        self.cuda.empty_cache()  # blocks of another size are of no use to the next case
        generator = self.xp.Generator(device=self.place).manual_seed(0)
        wide = self.xp.float64 if dtype == "float64" else self.xp.float32

        def draw(shape: Shape) -> Any:
            made = self.xp.randn(shape, generator=generator, device=self.place, dtype=wide)
            return made.to(getattr(self.xp, dtype))

        return draw

    def sets(self, size: int) -> int:
        return max(1, math.ceil(self.APART * self.properties.L2_cache_size / size))

    def clock(self) -> Clock:
        return EventClock(self.cuda)

    def copies(self, size: int) -> dict[str, Run]:
        """By torch, which has the driver do it; of random bytes, as constant ones need less power."""
        runs = []
        for _ in range(self.sets(size)):
            source = self.xp.randint(256, (size // 2,), device=self.place, dtype=self.xp.uint8)
            runs.append(InProcess(partial(self.xp.empty_like(source).copy_, source), lambda _: [], "out"))
        first, *others = runs
        return {"copy": first.rotate(others, self.clock())}


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    return dict(environment())["CPU"]


def caches() -> str:
    """Sizes of the data caches of a core, from the first level on, where Linux tells."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return ", ".join(
        (folder / "size").read_text().strip()
        for folder in folders
        if (folder / "type").read_text().strip() != "Instruction"
    )


def driver() -> str:
    """The version of NVIDIA's driver, which CUDA itself does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return output.partition("\n")[0].strip() or "unknown"
