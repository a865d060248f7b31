"""What a bug report should begin with: ``python -m normkit``."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from . import __version__, _core, cuda, get_num_threads

# File names of OpenMP runtimes, those that wheel tools have renamed (libgomp-a34b3233.so.1.0.0) included.
_OPENMP = re.compile(
    r"lib(?:gomp|i?omp5?)(?:-\w+)?[.](?:so[.\d]*|dylib)|(?:vcomp|(?:lib)?i?omp)\d[\w.-]*[.]dll", re.IGNORECASE
)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _cores() -> str:
    installed = os.cpu_count()
    if not hasattr(os, "sched_getaffinity"):
        return f"{installed} cores"
    return f"{len(os.sched_getaffinity(0))} of {installed} cores usable"


def _setting(name: str) -> str:
    value = os.environ.get(name)
    return f"{name} not set" if value is None else f"{name}={value}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _loaded_openmp() -> list[str] | None:
    """Paths of the OpenMP runtimes in this process; None where nothing tells."""
    try:
        pools = importlib.import_module("threadpoolctl").threadpool_info()
    except ImportError:
        try:
            maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        except OSError:
            return None
        paths = {line.split(maxsplit=5)[-1] for line in maps}
        return sorted(path for path in paths if _OPENMP.fullmatch(os.path.basename(path)))
    return sorted({os.path.realpath(pool["filepath"]) for pool in pools if pool["user_api"] == "openmp"})


def _needed_openmp() -> str | None:
    """The OpenMP runtime that the core is linked to, as its file names it."""
    found = _OPENMP.search(Path(_core.__file__).read_bytes().decode("latin-1"))
    return found and found[0]


def _openmp() -> Iterable[tuple[str, str]]:
    needed, loaded = _needed_openmp(), _loaded_openmp()
    if loaded is None:
        yield "OpenMP", f"{needed or 'none'}; pip install threadpoolctl to see the copies that are loaded"
        return
    # What asks for libgomp.so.1 gets the file libgomp.so.1.0.0.
    own = [path for path in loaded if needed and os.path.basename(path).startswith(needed)]
    yield "OpenMP", ", ".join(own) or needed or "none: built without"
    others = [path for path in loaded if path not in own]
    yield "other OpenMP", "\n".join(others) or "none loaded; see that of torch, for one, with --import torch"


def _import(name: str) -> str:
    """Import a module; returns its version, or why there is none."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken installation may raise anything, and is worth reporting
        return f"cannot be imported: {type(error).__name__}: {error}"
    return str(getattr(module, "__version__", "version unknown"))


def _cuda() -> str:
    spec = importlib.util.find_spec(f"{__package__}._cuda")
    if spec is None:
        return "not built"
    try:
        devices = f"devices: {cuda.device_count()}"
    except ImportError as error:
        devices = f"cannot be imported: {error}"
    return f"{spec.origin}; {devices}"


def report(modules: Iterable[str] = ()) -> Iterable[tuple[str, str]]:
    """Import `modules`, and yield what there is to say, as label and text."""
    core = "" if _core.__version__ == __version__ else f", core {_core.__version__}"
    yield "normkit", f"{__version__}{core}, {Path(__file__).parent}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    yield "NumPy", np.__version__
    for name in modules:
        yield name, _import(name)
    yield "platform", platform.platform()
    yield "CPU", _cpu()
    yield "instruction sets", f"{', '.join(_core.isas())}; chosen: {_core.isa()} ({_setting('NORMKIT_ISA')})"
    yield "threads", f"{get_num_threads()} ({_cores()}; {_setting('OMP_NUM_THREADS')})"
    yield "dtypes", f"{', '.join(_core.dtypes())} (ml_dtypes {_version('ml_dtypes')})"
    yield from _openmp()
    yield "CUDA", _cuda()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m normkit",
        description="Show versions, instruction sets, threads, OpenMP runtimes: what a bug report should begin with.",
    )
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import MODULE after normkit, to see its version and the OpenMP runtime it brings; may be repeated",
    )
    for label, text in report(parser.parse_args(arguments).modules):
        print(f"{label:<18}" + text.replace("\n", "\n" + " " * 18))


if __name__ == "__main__":
    main()
