"""Threads: how many, from where they are called, and that one caller's settings are not another's."""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import sleep

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import bounds
import normkit as nk
from cases import Case, random
from normkit import _core, _debug

LARGE = Case("batch", (16, 32, 60, 61), {"channel_axis": 1})
HANG = 120  # seconds: no limit on how long work takes, but the end of a test that would never end

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
needs_openmp = pytest.mark.skipif(
    nk.get_num_threads() == 1 and len(os.sched_getaffinity(0)) > 1 and "OMP_NUM_THREADS" not in os.environ,
    reason="the core was built without OpenMP",
)


def run_script(script, **environment):
    """The words that the script prints, in a process of its own, where no pool has been started yet."""
    names = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=HANG,
        env=clean | environment,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    return done.stdout.split()


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


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity, which is Linux's")
def test_threads_keep_the_cores_that_they_may_use(rng):
    """A thread that was woken on the caller's core moves on, and afterwards may run wherever it might before."""
    x = rng.standard_normal((64, 4096)).astype(np.float32)
    expected = nk.layer_norm(x, 4096)
    for pause in (0, 0.02) * 5:
        sleep(pause)
        with _debug.force(threads=2):
            bounds.assert_same_bits(nk.layer_norm(x, 4096), expected)
    allowed = os.sched_getaffinity(0)
    for thread in os.listdir("/proc/self/task"):
        assert os.sched_getaffinity(int(thread)) == allowed


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


def test_eight_python_threads_at_once():
    """Each gets the bits of a call alone: all norms, calls that release the lock and calls that don't."""
    rng = np.random.default_rng(0)
    cases = [
        LARGE,
        Case("batch", (40, 70, 50), {"channel_axis": -1}),
        Case("instance", (3, 17, 40, 41), {"channel_axis": 1}),
        Case("group", (4, 30, 31, 8), {"num_groups": 2, "channel_axis": -1}),
        Case("layer", (500, 700), {"normalized_shape": (700,)}),
        Case("layer", (4, 9), {"normalized_shape": (9,)}),
        Case("rms", (64, 4096), {"normalized_shape": (4096,)}),
        Case("axes", (30, 50, 70), {"axes": (0, 2)}),
    ]
    data = [(case, random(rng, case.shape, 10.0), random(rng, case.shape), *case.parameters(rng)) for case in cases]

    def work(case, x, dy, weight, bias):
        y, mean, rstd = case.forward(x, weight, bias)
        results = [y, mean, rstd, *case.backward(dy, x, mean, rstd, weight)]
        return [result for result in results if result is not None]

    nk.set_num_threads(1)
    expected = [work(*arguments) for arguments in data]
    nk.set_num_threads(3)
    start = Barrier(8)

    def all_cases(first):
        """Every thread begins with another case, so that each runs beside itself and beside the others."""
        start.wait(HANG)
        return [(i % len(data), work(*data[i % len(data)])) for i in range(first, first + 3 * len(data))]

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(all_cases, first) for first in range(8)]:
            for i, results in future.result(HANG):
                assert len(results) == len(expected[i])
                for a, b in zip(results, expected[i]):
                    bounds.assert_same_bits(a, b)


def test_running_statistics_of_eight_python_threads():
    """Each thread updates its own; the data, which they share, is only read."""
    x = random(np.random.default_rng(0), (8, 16, 40, 41), 10.0)

    def statistics():
        mean, var = np.zeros(16), np.ones(16)
        for _ in range(5):
            nk.batch_norm(x, mean, var, training=True)
        return mean, var

    expected = statistics()
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(statistics) for _ in range(8)]:
            for a, b in zip(future.result(HANG), expected):
                bounds.assert_same_bits(a, b)


def test_the_interpreter_is_free_during_a_long_call():
    """A Python thread goes on while another one is inside a call: the lock is released."""
    x = random(np.random.default_rng(0), (64, 64, 60, 61))
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


def test_only_long_calls_free_the_interpreter():
    """Another Python thread that is ready to run gets no turn from a short call.

    It would ask for one only after an hour, so the lock goes to it when the call gives it up, and not before.
    """
    script = f"""
        import sys, threading, time
        import numpy as np
        import normkit as nk

        sys.setswitchinterval(3600)
        turns, ready = [0], threading.Semaphore(0)

        def take_turns():
            while True:
                ready.acquire()
                turns[0] += 1

        def turns_during(x, calls):
            nk.layer_norm(x, x.shape[1])  # what is done only once may free it
            ready.release()  # from here on the other thread waits for the lock of the interpreter, and for nothing else
            before = turns[0]
            for _ in range(calls):
                nk.layer_norm(x, x.shape[1])
            return turns[0] - before

        threading.Thread(target=take_turns, daemon=True).start()
        time.sleep(0.1)
        print(turns_during(np.ones((8, 64), np.float32), 1000))
        long, end = np.ones((4096, 1024), np.float32), time.monotonic() + {HANG // 2}
        while not (turn := turns_during(long, 10)) and time.monotonic() < end:
            pass
        print(turn)
    """
    short, long = map(int, run_script(script))
    assert short == 0
    assert long > 0


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


def test_more_threads_than_any_machine_starts():
    """The number is a limit: work for a hundred thousand threads must not ask the system for as many."""
    script = """
        import numpy as np
        import normkit as nk

        nk.set_num_threads(2**31 - 1)
        print(nk.moments(np.broadcast_to(np.float32(1), (2**31,)), 0).mean)
    """
    assert run_script(script) == ["1.0"]


# --- where the default comes from -------------------------------------------------------------------------------------


def used_threads(x=np.ones((64, 16, 60, 61), np.float32)):  # noqa: B008
    nk.batch_norm(x, training=True)
    return _debug.last_path()["threads"]


@needs_openmp
@pytest.mark.parametrize(("value", "expected"), [(None, 0), ("1", 1), ("5", 5), ("4,2", 4)])
def test_threads_of_a_call_follow_the_environment(value, expected):
    """Without OMP_NUM_THREADS all cores; a list is one number per nested level. set_num_threads overrules it."""
    script = """
        import numpy as np
        import normkit as nk
        from normkit import _debug

        x = np.ones((64, 16, 60, 61), np.float32)
        for n in ("default", 3, None):
            if n != "default":
                nk.set_num_threads(n)
            nk.batch_norm(x, training=True)
            print(_debug.last_path()["threads"])
    """
    expected = expected or len(os.sched_getaffinity(0))
    environment = {} if value is None else {"OMP_NUM_THREADS": value}
    assert [int(n) for n in run_script(script, **environment)] == [expected, 3, expected]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs os.sched_setaffinity")
def test_default_threads_follow_the_cores_of_the_process():
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert run_script(f"{one}; import normkit as nk; print(nk.get_num_threads())") == ["1"]


@needs_openmp
@pytest.mark.parametrize("n", [1, 4])
def test_threads_of_a_call_follow_threadpoolctl(n):
    """Inside the block, unless a number was set; outside as before."""
    default = nk.get_num_threads()
    assert used_threads() == default
    with threadpool_limits(n, user_api="openmp"):
        assert nk.get_num_threads() == used_threads() == n
        nk.set_num_threads(3)
        assert nk.get_num_threads() == used_threads() == 3
        nk.set_num_threads(None)
        assert nk.get_num_threads() == used_threads() == n
    assert nk.get_num_threads() == used_threads() == default


def test_the_number_of_threads_is_that_of_the_process():
    """Set by one Python thread, it holds for the others."""
    with ThreadPoolExecutor(1) as pool:
        for n in (3, 7):
            pool.submit(nk.set_num_threads, n).result()
            assert nk.get_num_threads() == n
            nk.set_num_threads(n + 1)
            assert pool.submit(nk.get_num_threads).result() == n + 1


# --- other processes --------------------------------------------------------------------------------------------------

# Fresh processes, because a pool must be started before a fork, and in a way that the test decides.
PARALLEL = """
import hashlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import normkit as nk

x = np.random.default_rng(0).standard_normal((64, 16, 60, 61), dtype=np.float32)


def digest(i=0):
    y, mean, rstd = nk.layer_norm_forward(x[i:], 61)
    results = [nk.batch_norm(x[i:], training=True), y, mean, rstd, *nk.layer_norm_backward(y, x[i:], mean, rstd, 61)]
    return hashlib.sha256(b"".join(a.tobytes() for a in results)).hexdigest()


def fork_and_compute(expected):
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os._exit(0 if digest() == expected else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
""".replace("SECONDS", str(HANG // 4))


@needs_fork
def test_a_forked_child_of_a_parallel_parent_computes():
    """libgomp would wait for the parent's threads for ever."""
    main = """
nk.set_num_threads(2)
print(fork_and_compute(digest()))
"""
    assert run_script(PARALLEL + main) == ["0"]


@needs_fork
def test_a_fork_while_another_thread_computes():
    """The child has a copy of a pool in the middle of its work."""
    main = """
nk.set_num_threads(2)
expected, stop = digest(), threading.Event()


def compute():
    while not stop.is_set():
        nk.layer_norm(x, 61)


thread = threading.Thread(target=compute)
thread.start()
print(*(fork_and_compute(expected) for _ in range(5)))
stop.set()
thread.join()
"""
    assert run_script(PARALLEL + main) == ["0"] * 5


@needs_fork
def test_a_fork_pool_of_a_parallel_parent():
    """Its workers, and the children of workers, compute the parent's bits; the parent goes on as before."""
    main = f"""
nk.set_num_threads(2)
expected = [digest(i) for i in range(4)]
fork = multiprocessing.get_context("fork")
with fork.Pool(2) as pool:
    assert pool.map_async(digest, range(4)).get({HANG // 4}) == expected
    assert [digest(i) for i in range(4)] == expected
with ProcessPoolExecutor(2, mp_context=fork) as pool:  # whose workers may have children
    assert list(pool.map(fork_and_compute, expected[:1] * 2, timeout={HANG // 4})) == [0, 0]
assert [digest(i) for i in range(4)] == expected
print("done")
"""
    assert run_script(PARALLEL + main) == ["done"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_pool_of_fresh_processes(method, tmp_path):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    main = f"""
if __name__ == "__main__":
    nk.set_num_threads(2)
    expected = [digest(i) for i in range(2)]
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        assert pool.map_async(digest, range(2)).get({HANG // 2}) == expected
    print("done")
"""
    path = tmp_path / "fresh.py"  # they import what they run
    path.write_text(PARALLEL + main)
    done = subprocess.run([sys.executable, "-W", "ignore", path], capture_output=True, text=True, timeout=HANG)
    assert done.stdout == "done\n", done.stderr


@needs_fork
@needs_torch
@pytest.mark.parametrize("first", ["torch", "normkit"])
def test_a_dataset_of_torch_normalizes_in_forked_workers(first):
    """After both have computed in parallel; the first to be imported has brought the OpenMP runtime."""
    script = f"""
        import {first}
        import numpy as np
        import normkit as nk
        import torch

        x = np.random.default_rng(0).standard_normal((8, 64, 60, 61), dtype=np.float32)

        class Normalized(torch.utils.data.Dataset):
            def __len__(self):
                return len(x)

            def __getitem__(self, i):
                return torch.from_numpy(nk.layer_norm(x[i], 61))

        nk.set_num_threads(2)
        y = nk.layer_norm(x, 61)
        torch.mm(torch.ones(500, 500), torch.ones(500, 500))
        loader = torch.utils.data.DataLoader(
            Normalized(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout={HANG // 2}
        )
        for _ in range(2):
            batches = [batch.numpy() for batch in loader]
            assert np.concatenate(batches).tobytes() == y.tobytes()
        print("done")
    """
    assert run_script(script) == ["done"]


@needs_fork
@needs_torch
@pytest.mark.parametrize("first", ["torch", "normkit"])
def test_a_forked_child_of_a_parent_where_only_torch_has_computed(first):
    """The OpenMP runtime may be one for both, and its threads torch's doing. The child is normkit's first user."""
    main = """
import torch

torch.set_num_threads(2)
torch.mm(torch.ones(500, 500), torch.ones(500, 500))
child = os.fork()
if child == 0:
    signal.alarm(SECONDS)
    nk.set_num_threads(2)
    os._exit(0 if np.array_equal(nk.layer_norm(x, 61), nk.layer_norm(x[::1], 61)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""".replace("SECONDS", str(HANG // 4))
    assert run_script(f"import {first}\n" + PARALLEL + main) == ["0"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["while True: nk.layer_norm(x, 61)", "nk.moments(np.broadcast_to(x[:1], shape), 0)"])
def test_the_interpreter_ends_while_a_daemon_thread_computes(threads, call):
    """Short calls one after the other, and one that would take hours."""
    main = f"""
nk.set_num_threads({threads})
shape = (2**30, *x[0].shape)


def compute():
    {call}


threading.Thread(target=compute, daemon=True).start()
threading.Event().wait(0.3)
print("done")
"""
    assert run_script(PARALLEL + main) == ["done"]


STACK = """
    import threading
    from itertools import product
    import ml_dtypes, numpy as np, normkit as nk
    nk.set_num_threads(1)

    def calls():
        for norm, shape, options in (
            ("batch", (32, 70, 7, 7), {"training": True}),
            ("batch", (2, 49, 2560), {"channel_axis": -1, "training": True}),
            ("group", (1, 64, 2560), {"num_groups": 40, "channel_axis": -1}),
            ("group", (2, 64, 320), {"num_groups": 32, "channel_axis": -1}),
            ("instance", (2, 3, 9, 1000), {}),
            ("layer", (40, 2560), {"normalized_shape": 2560}),
            ("layer", (1, 70_000), {"normalized_shape": 70_000}),
            ("rms", (40, 2560), {"normalized_shape": 2560}),
        ):
            extent = options.get("normalized_shape") or shape[options.get("channel_axis", 1)]
            whole = rng.standard_normal((*shape[:-1], 2 * shape[-1])).astype(dtype)
            arrays = whole[..., : shape[-1]].copy(), whole[..., ::2]
            for x, parameter in product(arrays, dict.fromkeys((dtype, "float32"))):
                weight = np.ones(extent, parameter)
                bias = {} if norm == "rms" else {"bias": weight}
                _, *statistics = getattr(nk, f"{norm}_norm_forward")(x, weight=weight, **bias, **options)
                getattr(nk, f"{norm}_norm_backward")(x, x, *statistics, weight=weight, **options)
                if norm == "batch":
                    given = np.zeros(extent), np.ones(extent)
                    nk.batch_norm(x, *given, weight, weight, **{**options, "training": False})
        print(dtype)

    rng = np.random.default_rng(0)
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        threading.stack_size(224 * 1024)
        thread = threading.Thread(target=calls)
        thread.start()
        thread.join()
"""


def test_the_stack_that_the_guide_promises_is_enough():
    assert run_script(STACK) == ["float64", "float32", "float16", "bfloat16"]
