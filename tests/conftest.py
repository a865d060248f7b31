"""Fixtures of all tests."""

from zlib import crc32

import numpy as np
import pytest

import normkit as nk


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than five seconds; deselect with -m 'not slow'")


@pytest.fixture
def rng(request):
    """Seeded by the test's own name: neither order nor selection changes the data of a test."""
    return np.random.default_rng(crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def default_threads():
    """A test may set the number of threads; the next one starts from the default."""
    yield
    nk.set_num_threads(None)
