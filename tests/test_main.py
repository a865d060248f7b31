"""`python -m normkit`: what it says is so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import normkit as nk
from normkit import __main__ as main
from normkit import _core

LABELS = (
    "normkit",
    "Python",
    "NumPy",
    "platform",
    "CPU",
    "instruction sets",
    "threads",
    "dtypes",
    "OpenMP",
    "other OpenMP",
    "CUDA",
)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def python(*arguments, **environment):
    """The output of a fresh interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NORMKIT_ISA", "OMP_NUM_THREADS")}
    run = subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout


def parsed(output):
    """Label to text; lines that begin with blanks continue the text above."""
    found = {}
    for line in output.splitlines():
        label, text = line[:18].strip(), line[18:]
        if label:
            found[label] = text
        else:
            found[list(found)[-1]] += "\n" + text
    return found


def test_report():
    report = parsed(python("-m", "normkit"))
    assert tuple(label for label in report if label in LABELS) == tuple(report)
    assert set(LABELS) - set(report) <= {"other OpenMP"}
    assert report["normkit"].startswith(f"{nk.__version__}, ") or f"{nk.__version__}, core " in report["normkit"]
    assert Path(report["normkit"].rpartition(", ")[2]) == Path(nk.__file__).parent
    assert report["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert report["NumPy"] == np.__version__
    assert report["CPU"]
    available, chosen = re.fullmatch(
        r"(.+); chosen: (\w+) \(NORMKIT_ISA not set\)", report["instruction sets"]
    ).groups()
    assert tuple(available.split(", ")) == _core.isas() and chosen in _core.isas()
    assert report["dtypes"].startswith(f"{', '.join(_core.dtypes())} (ml_dtypes ")
    assert all(text == text.strip() != "" for text in report.values())


@linux
def test_cpu_and_cores():
    report = parsed(python("-m", "normkit"))
    cpuinfo = Path("/proc/cpuinfo").read_text()
    if "model name" in cpuinfo:
        assert re.search(rf"^model name\s*: {re.escape(report['CPU'])}$", cpuinfo, re.MULTILINE)
    usable = len(os.sched_getaffinity(0))
    assert f"({usable} of {os.cpu_count()} cores usable; OMP_NUM_THREADS not set)" in report["threads"]
    assert report["threads"].startswith(python("-c", "import normkit; print(normkit.get_num_threads(), end=' (')"))


def test_settings_are_shown():
    report = parsed(python("-m", "normkit", OMP_NUM_THREADS="1", NORMKIT_ISA="baseline"))
    assert report["threads"].startswith("1 (") and report["threads"].endswith("OMP_NUM_THREADS=1)")
    assert report["instruction sets"].endswith("; chosen: baseline (NORMKIT_ISA=baseline)")


ALONE = """
import runpy, sys
for name in ("threadpoolctl", "ml_dtypes"):
    sys.modules[name] = None
sys.argv[0] = "normkit"
runpy.run_module("normkit", run_name="__main__")
"""


@linux
@pytest.mark.parametrize("how", [("-m", "normkit"), ("-c", ALONE)], ids=["as it is", "without threadpoolctl"])
def test_openmp_of_the_core(how):
    """The runtime that the loader gives to the core, with threadpoolctl or without."""
    report = parsed(python(*how))
    linked = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, timeout=60, check=True).stdout
    paths = re.findall(r"lib(?:gomp|omp|iomp5)\S* => (\S+)", linked)
    if paths:
        assert report["OpenMP"] == os.path.realpath(paths[0])
    else:
        assert report["OpenMP"] == "none: built without"


@linux
def test_other_copies_of_openmp():
    """scikit-learn's wheel brings a copy of its own; the one of the core is not listed twice."""
    pytest.importorskip("sklearn", reason="scikit-learn, whose copy is looked for, is not installed")
    report = parsed(python("-m", "normkit", "--import", "sklearn"))
    loaded = python("-c", "import normkit, sklearn; print(open('/proc/self/maps').read())")
    copies = set(re.findall(r"/\S*/lib(?:gomp|omp|iomp5)\S*", loaded))
    others = copies - {report["OpenMP"]}
    assert set(report["other OpenMP"].split("\n")) == (
        others or {"none loaded; see that of torch, for one, with --import torch"}
    )


def test_import_shows_versions_and_failures():
    report = parsed(python("-m", "normkit", "--import", "numpy.linalg", "--import", "numpy", "--import", "no_such"))
    assert report["numpy.linalg"] == "version unknown"
    assert report["numpy"] == np.__version__
    assert report["no_such"] == "cannot be imported: ModuleNotFoundError: No module named 'no_such'"
    assert "CUDA" in report


def test_without_optional_packages():
    report = parsed(python("-c", ALONE))
    assert set(LABELS) - set(report) <= {"other OpenMP"}


@pytest.mark.parametrize(
    "name",
    [
        "libgomp.so.1",
        "libgomp.so.1.0.0",
        "libgomp-a34b3233.so.1.0.0",
        "libomp.dylib",
        "libomp.so",
        "libomp-ff0a1b.so.5",
        "libiomp5.so",
        "libiomp5md.dll",
        "libomp140.x86_64.dll",
        "vcomp140.dll",
        "vcomp140-0f1e2d.dll",
    ],
)
def test_names_of_openmp_runtimes(name):
    assert main._OPENMP.fullmatch(name)
    assert main._OPENMP.search(f"\0GLIBC_2.34\0{name}\0libm.so.6\0")[0] == name


@pytest.mark.parametrize("name", ["libompitrace.so.40", "libgomp.py", "libcomp.so", "libm.so.6", "libgomp"])
def test_names_of_others(name):
    assert not main._OPENMP.fullmatch(name)


def test_where_nothing_tells_which_copies_are_loaded(monkeypatch):
    monkeypatch.setattr(main, "_loaded_openmp", lambda: None)
    report = dict(main.report())
    assert report["OpenMP"].endswith("; pip install threadpoolctl to see the copies that are loaded")
    assert "other OpenMP" not in report


def test_help():
    output = python("-m", "normkit", "--help")
    assert output.startswith("usage: python -m normkit [-h] [--import MODULE]")
    assert "bug report" in output


def test_versions_of_optional_packages():
    assert main._version("numpy") == np.__version__
    assert main._version("no-such-distribution") == "not installed"
