"""Threads: how many, from where they are called, and that one caller's settings are not another's."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import sleep

import numpy as np
import pytest

import bounds
import normkit as nk
from cases import Case, random
from normkit import _core, _debug

LARGE = Case("batch", (16, 32, 60, 61), {"channel_axis": 1})


def test_number_of_threads():
    default = nk.get_num_threads()
    assert default >= 1
    for n in (1, 2, 3, 8, 100):
        nk.set_num_threads(n)
        assert nk.get_num_threads() == n
    nk.set_num_threads(None)
    assert nk.get_num_threads() == default


@pytest.mark.parametrize("n", [1, 2, 5])
def test_default_number_of_threads(n):
    """OMP_NUM_THREADS, and all cores without it; one thread where the core was built without OpenMP."""
    code = "import normkit as nk; d = nk.get_num_threads(); nk.set_num_threads(7); nk.set_num_threads(None); "
    code += "print(d, nk.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for more, expected in (({"OMP_NUM_THREADS": str(n)}, n), ({}, len(os.sched_getaffinity(0)))):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**environment, **more}
        )
        assert run.stdout.split() in ([str(expected)] * 2, ["1", "1"])


def test_large_work_is_shared_and_small_work_is_not(rng):
    small = random(rng, (4, 8))
    large = random(rng, LARGE.shape)
    for n in (1, 2, 3, 8):
        nk.set_num_threads(n)
        nk.layer_norm(small, 8)
        assert _debug.last_path()["threads"] == 1
        LARGE.plain(large)
        assert _debug.last_path()["threads"] == n


@pytest.mark.parametrize(
    "case",
    [
        Case("batch", (1, 3, 500, 501), {"channel_axis": 1}),
        Case("layer", (1, 1_000_000), {"normalized_shape": (1_000_000,)}),
        Case("group", (1, 300, 301, 4), {"num_groups": 1, "channel_axis": -1}),
    ],
    ids=str,
)
def test_a_set_is_shared_when_sets_are_few(rng, case):
    """Fewer sets than threads: the set itself is split."""
    x, dy = random(rng, case.shape, 10.0), random(rng, case.shape)
    nk.set_num_threads(8)
    y, mean, rstd = case.forward(x)
    assert _debug.last_path()["split"] and _debug.last_path()["threads"] > 1
    case.check_forward(y, x, statistics=(mean, rstd))
    gradients = case.backward(dy, x, mean, rstd)
    assert _debug.last_path()["split"] and _debug.last_path()["threads"] > 1
    case.check_backward(gradients, dy, x, (mean, rstd))


def test_calls_from_many_python_threads(rng):
    """The functions may be called at the same time, each call with threads of its own, and the bits stay."""
    cases = [
        LARGE,
        Case("layer", (500, 700), {"normalized_shape": (700,)}),
        Case("group", (4, 30, 31, 8), {"num_groups": 2, "channel_axis": -1}),
    ]
    data = [(case, random(rng, case.shape, 10.0), random(rng, case.shape)) for case in cases]

    def work(case, x, dy):
        y, mean, rstd = case.forward(x)
        return [y, mean, rstd, *case.backward(dy, x, mean, rstd)]

    expected = [work(*arguments) for arguments in data]
    with ThreadPoolExecutor(6) as pool:
        futures = [(i, pool.submit(work, *data[i])) for _ in range(8) for i in range(len(data))]
        for i, future in futures:
            for a, b in zip(future.result(), expected[i]):
                bounds.assert_same_bits(a, b)


def test_the_interpreter_is_free_during_a_call(rng):
    """Python runs while a large call does: the lock is released."""
    x = random(rng, (64, 64, 60, 61))
    out = np.empty_like(x)
    case = Case("batch", x.shape, {"channel_axis": 1})
    nk.set_num_threads(1)  # the call takes longer

    def turns_during_a_call():
        """How often this thread wakes while another one is inside the call: before it begins, and after, at most."""
        start, turns = Barrier(2), 0

        def call():
            start.wait()
            case.plain(x, out=out)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(call)
            start.wait()
            while not future.done():
                sleep(1e-4)
                turns += 1
        return turns

    assert max(turns_during_a_call() for _ in range(5)) > 5


def test_forced_paths_belong_to_their_thread(rng):
    """Overrides of one thread are not seen by another, end with the block, and may be nested."""
    x = random(rng, (64, 512))
    first, best = _debug.isas()[0], _core.isa()

    def isa():
        nk.layer_norm(x, 512)
        return _debug.last_path()["isa"]

    with _debug.force(isa=first):
        assert isa() == first
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(isa).result() == best
        with _debug.force(isa=best):
            assert isa() == best
        assert isa() == first
    assert isa() == best
    with pytest.raises(KeyError), _debug.force(isa=first):
        raise KeyError
    assert isa() == best


def test_forced_threads_end_with_the_block():
    nk.set_num_threads(5)
    with _debug.force(threads=3):
        assert nk.get_num_threads() == 3
    assert nk.get_num_threads() == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_of_a_parallel_parent_computes():
    """In a fresh process, because the pool must be started before the fork; libgomp would wait for it for ever."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        import numpy as np
        import normkit as nk

        nk.set_num_threads(2)
        x = np.random.default_rng(0).standard_normal((64, 64, 32, 32), dtype=np.float32)
        y = nk.layer_norm(x, 32)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if nk.layer_norm(x, 32).tobytes() == y.tobytes() else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], timeout=120)
    assert done.returncode == 0
