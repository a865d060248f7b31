"""Fixtures of all tests."""

import os
import re
from zlib import crc32

import numpy as np
import pytest

import gpu
import normkit as nk

MARKERS = (
    "slow: takes more than five seconds; deselect with -m 'not slow'",
    "gpu: computes on a GPU; select with -m gpu",
    "any_device: runs on NumPy's arrays and, where there is a GPU, on those of each library that has arrays there",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """`-n auto`: tests compute on all cores themselves, so that more processes get into each other's way."""
    return None if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") else min(os.cpu_count() or 1, 4)


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("any_device") and gpu.present():
        on_gpu = [pytest.param(name, marks=pytest.mark.gpu, id=name) for name in gpu.present()]
        metafunc.parametrize("library", [pytest.param("", id="numpy"), *on_gpu], indirect=True)


@pytest.fixture(autouse=True)
def library(request, monkeypatch):
    """Let the test's calls of normkit compute on a GPU, on arrays of this library; None: as they are, on the CPU."""
    found = gpu.LIBRARIES.get(getattr(request, "param", ""))
    if found is not None:
        for name in gpu.FUNCTIONS:
            monkeypatch.setattr(nk, name, gpu.through(found, getattr(nk, name)))
    return found


@pytest.fixture
def rng(request):
    """Seeded by the test's own name: neither order nor selection, nor the device, changes the data of a test."""
    libraries = "|".join(("numpy", *gpu.LIBRARIES))
    name = re.sub(rf"\[({libraries})]$|-({libraries})(?=]$)|(?<=\[)({libraries})-", "", request.node.nodeid)
    return np.random.default_rng(crc32(name.encode()))


@pytest.fixture(autouse=True)
def default_threads():
    """A test may set the number of threads; the next one starts from the default."""
    yield
    nk.set_num_threads(None)
