"""Memory of large results: huge pages, kept for the next result, given back at a limit."""

import gc
import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import normkit as nk
from cases import random
from normkit import _core

HANG = 120  # seconds
HUGE_PAGE = 2 << 20
LARGE = (1024, 1024)  # 4 MiB of float32

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
needs_linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@pytest.fixture(autouse=True)
def empty_cache():
    """Every test starts with nothing kept, and the limit is what it was."""
    gc.collect()
    limit = nk.set_output_cache(0)
    nk.set_output_cache(limit)
    yield
    nk.set_output_cache(limit)


@pytest.fixture
def x(rng):
    return random(rng, LARGE)


def norm(x, **options):
    return nk.layer_norm(x, x.shape[1], **options)


def address(array):
    return array.ctypes.data


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_script(script):
    """The words that the script prints, in a process of its own."""
    before = f"""
        import os
        import signal
        import sys
        import threading

        import numpy as np
        import normkit as nk

        x = np.random.default_rng(0).standard_normal({LARGE}, dtype=np.float32)
        """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(before) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    assert not done.stderr
    return done.stdout.split()


# --- what a result is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 4, 10, 409, 410, 511, 512, 513, 1000, 3000])  # of 4 KiB; 1.6 MiB are 409.6
def test_a_result_is_an_array_like_any_other(rows, rng):
    """It owns its memory, can be resized, viewed, pickled; NumPy's own memory stays what it was."""
    x = random(rng, (rows, 1024))
    y = norm(x)
    assert y.flags.owndata and y.base is None and y.flags.writeable and y.flags.c_contiguous
    expected = y.copy()
    assert np.array_equal(pickle.loads(pickle.dumps(y)), expected)
    y.resize((2 * rows, 1024), refcheck=False)
    assert np.array_equal(y[:rows], expected) and not y[rows:].any()
    y.resize((1, 1024), refcheck=False)
    assert np.array_equal(y, expected[:1])


@pytest.mark.parametrize("rows", [4, 5, 17, 100, 409])
def test_smaller_results_begin_on_a_line(rng, rows):
    x = random(rng, (rows, 1024))
    kept = []  # so that every result is a fresh one
    for _ in range(5):
        kept += [norm(x), nk.layer_norm_backward(x, x, *statistics(x), 1024)[0], np.empty(3, np.uint8)]
    assert all(address(y) % 64 == 0 for y in kept if y.size > 3)


@needs_linux
def test_large_results_begin_at_a_huge_page(rng):
    x = random(rng, (512, 1024))
    results = [norm(x), *nk.layer_norm_forward(x, 1024)[:1], *nk.layer_norm_backward(x, x, *statistics(x), 1024)[:1]]
    wide = random(rng, (2, 1 << 19))  # every parameter's gradient is 2 MiB
    results += nk.layer_norm_backward(wide, wide, *statistics(wide), 1 << 19)
    results.append(nk.normalize_forward(random(rng, (1 << 18, 2)), 1)[1])  # statistics of 2 MiB
    assert [address(y) % HUGE_PAGE for y in results] == [0] * len(results)


def statistics(x):
    return nk.layer_norm_forward(x, x.shape[1])[1:]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", _core.dtypes())
def test_old_contents_are_overwritten(order, dtype, rng):
    """Memory of a result full of NaN gives the same bits as fresh memory."""
    x = np.asarray(random(rng, (1500, 1027)), dtype=dtype, order=order)
    weight = np.ones(1027, x.dtype)
    first = [*nk.layer_norm_forward(x, 1027, weight)]
    expected = [a.tobytes() for a in first]
    where = address(first[0])
    for a in first:
        a.view(np.uint8 if order == "C" else a.dtype)[...] = 255
    del first, a
    again = nk.layer_norm_forward(x, 1027, weight)
    assert address(again[0]) == where
    assert [a.tobytes() for a in again] == expected


# --- reuse ------------------------------------------------------------------------------------------------------------


def test_the_next_result_takes_the_memory_of_the_last(x):
    y = norm(x)
    first, expected = address(y), y.tobytes()
    assert _core.output_cache_bytes() == 0
    del y
    assert _core.output_cache_bytes() == x.nbytes
    for _ in range(3):
        y = norm(x)
        assert address(y) == first and y.tobytes() == expected
        assert _core.output_cache_bytes() == 0
        del y


def test_other_sizes_take_it_where_little_is_wasted(rng):
    y = norm(random(rng, (2048, 1024)))  # 8 MiB
    first = address(y)
    del y
    y = norm(random(rng, (1638, 1024)))  # four fifths of it are just not enough
    assert address(y) != first
    z = norm(random(rng, (1639, 1024)))
    assert address(z) == first


def test_the_best_fit_is_taken(rng):
    sizes = [2048, 2560, 3072]
    results = [norm(random(rng, (rows, 1024))) for rows in sizes]
    addresses = [address(y) for y in results]
    del results
    y = norm(random(rng, (2500, 1024)))
    assert address(y) == addresses[1]


def test_views_keep_the_memory(x):
    y = norm(x)
    first, view = address(y), y[5:7, ::3].T
    expected = view.copy()
    del y
    others = [norm(x * 2 + i) for i in range(3)]
    assert first not in [address(a) for a in others]
    assert np.array_equal(view, expected)
    del view
    assert address(norm(x)) == first


def test_a_result_may_die_on_another_thread(x):
    results = [norm(x) for _ in range(4)]
    thread = threading.Thread(target=results.clear)
    thread.start()
    thread.join()
    assert _core.output_cache_bytes() == 4 * x.nbytes


def test_threads_share_it_safely(rng):
    """Every thread gets its own bits, whoever had the memory before."""
    data = [random(rng, (500 + 100 * i, 1024)) for i in range(4)]
    expected = [norm(a).tobytes() for a in data]
    wrong, waiting = [], []

    def work(i):
        for turn in range(30):
            y = norm(data[i])
            waiting.append(y)  # to die on any thread
            if turn % 10 == 0 and y.tobytes() != expected[i]:
                wrong.append(i)
            if len(waiting) > 6:
                del waiting[:3], y

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_out_takes_nothing_of_it(x):
    where = address(norm(x))
    out = np.empty_like(x)
    assert norm(x, out=out) is out
    assert _core.output_cache_bytes() == x.nbytes
    y = norm(x)  # and a result may be given as out
    assert address(y) == where and norm(x, out=y) is y


@pytest.mark.parametrize("bad", [{"eps": -1.0}, {"weight": np.ones(3, np.float32)}])
def test_a_call_that_raises_gives_it_back(x, bad):
    y = norm(x)
    del y
    with pytest.raises(ValueError, match="must"):
        norm(x, **bad)
    assert _core.output_cache_bytes() == x.nbytes


def test_numpy_keeps_its_own_memory(x):
    """The handler is in force while a result is made, and no longer; what is derived from a result is NumPy's."""
    handler_name = np._core.multiarray.get_handler_name if hasattr(np, "_core") else np.core.multiarray.get_handler_name
    y = norm(x)
    assert handler_name(y) == "normkit"
    assert handler_name(norm(x[:4])) == "normkit_lined_up"
    assert {handler_name(a) for a in (x, y.copy(), y + 1, norm(x[:3]))} == {handler_name()} == {"default_allocator"}


def test_tracemalloc_sees_results(x):
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        y = norm(x)
        assert 0 <= tracemalloc.get_traced_memory()[0] - before - x.nbytes < 10_000
        del y
        assert tracemalloc.get_traced_memory()[0] - before < 10_000
    finally:
        tracemalloc.stop()


# --- the limit --------------------------------------------------------------------------------------------------------


def test_the_limit(x):
    default = nk.set_output_cache(3 * x.nbytes)
    assert default == 256 << 20
    results = [norm(x) for _ in range(5)]
    addresses = [address(y) for y in results]
    while results:
        del results[0]  # the oldest first
    assert _core.output_cache_bytes() == 3 * x.nbytes
    assert {address(y) for y in [norm(x) for _ in range(3)]} == set(addresses[2:])
    assert nk.set_output_cache(x.nbytes) == 3 * x.nbytes
    assert _core.output_cache_bytes() == x.nbytes
    large = norm(np.concatenate([x, x]))
    del large  # more than the limit
    assert _core.output_cache_bytes() == x.nbytes


def test_the_limit_zero(x):
    y = norm(x)
    del y
    nk.set_output_cache(0)
    assert _core.output_cache_bytes() == 0
    y = norm(x)
    del y
    assert _core.output_cache_bytes() == 0


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (-1, ValueError, "limit_bytes must be from 0 to 9223372036854775807, got -1; 0 keeps nothing"),
        (2**64, ValueError, "limit_bytes must be from 0 to"),
        (1.5, TypeError, "limit_bytes must be an int, got float"),
        (True, TypeError, "limit_bytes must be an int, got bool"),
        (None, TypeError, "limit_bytes must be an int, got NoneType"),
        ("1", TypeError, "limit_bytes must be an int, got str"),
    ],
)
def test_limits_that_are_none(limit, error, message):
    with pytest.raises(error, match=message):
        nk.set_output_cache(limit)
    assert nk.set_output_cache(0) == 256 << 20


@needs_linux
def test_memory_does_not_grow(rng):
    """Results of many sizes, some of which stay for a while."""
    limit = 32 << 20
    nk.set_output_cache(limit)
    data = random(rng, (4096, 1024))
    sizes = [int(n) for n in np.random.default_rng(0).integers(400, 4096, 300)]
    keep = []
    before = resident()
    for n in sizes:
        keep.append(norm(data[:n]))
        del keep[:-4]
        assert _core.output_cache_bytes() <= limit
    assert resident() - before < limit + 5 * (data.nbytes + HUGE_PAGE) + (8 << 20)
    keep.clear()
    nk.set_output_cache(0)
    assert resident() - before < 8 << 20


# --- processes --------------------------------------------------------------------------------------------------------


@needs_fork
def test_a_forked_child_has_its_own():
    """It can free the parent's results and make its own; neither disturbs the other."""
    script = """
    y, z = nk.layer_norm(x, 1024), nk.layer_norm(x, 1024)
    expected = y.tobytes()
    del z
    assert nk._core.output_cache_bytes() == x.nbytes
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        assert nk._core.output_cache_bytes() == 0
        del y  # whose pages the parent has, too
        assert nk._core.output_cache_bytes() == 0
        for _ in range(3):
            y = nk.layer_norm(x, 1024)
            assert y.tobytes() == expected
            y[...] = 0
            del y
        os._exit(0 if nk._core.output_cache_bytes() == x.nbytes else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), y.tobytes() == expected)
    """
    assert run_script(script) == ["0", "True"]


@needs_fork
def test_a_fork_while_other_threads_take_and_give():
    script = """
    stop = threading.Event()
    expected = nk.layer_norm(x, 1024).tobytes()
    nk.set_num_threads(1)


    def work(rows):
        while not stop.is_set():
            nk.layer_norm(x[:rows], 1024)


    threads = [threading.Thread(target=work, args=(rows,)) for rows in (512, 1024)]
    for thread in threads:
        thread.start()
    statuses = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if all(nk.layer_norm(x, 1024).tobytes() == expected for _ in range(3)) else 1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    for thread in threads:
        thread.join()
    print(*statuses)
    """
    assert run_script(script) == ["0"] * 20


def test_the_interpreter_ends_while_results_live():
    """In a module, in a cycle, in a thread's hands, in an object that is freed last of all."""
    script = """
    import builtins


    class Last:
        def __del__(self):
            self.y[...] = 1
            del self.y


    y = nk.layer_norm(x, 1024)
    cycle = [nk.layer_norm(x, 1024)]
    cycle.append(cycle)
    last = Last()
    last.y = nk.layer_norm(x, 1024)
    builtins.last = last
    sys.modules["somebody"] = nk.layer_norm(x, 1024)
    held = nk.layer_norm(x, 1024)
    threading.Thread(target=lambda held=held: threading.Event().wait(), daemon=True).start()
    print("done")
    """
    assert run_script(script) == ["done"]


@needs_linux
@pytest.mark.parametrize("call", ["nk.layer_norm(x, 1024)", "nk.layer_norm_backward(x, x, mean, rstd, 1024)"])
def test_no_memory_for_the_result(call):
    """MemoryError, and nothing changed; what is kept idle is given back before it comes to that."""
    script = f"""
    import resource


    def allow(more):
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + more, unlimited[1]))


    nk.set_num_threads(1)
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    mean, rstd = nk.layer_norm_forward(x, 1024)[1:]
    before, twice = x.copy(), np.concatenate([x, x])
    {call}

    nk.set_output_cache(0)
    allow(1 << 20)
    try:
        {call}
    except MemoryError as error:
        print("refused", "(1024, 1024)" in str(error))
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    print(np.array_equal(x, before))

    nk.set_output_cache(1 << 28)
    nk.layer_norm(twice, 1024)  # leaves more than it takes, which does not fit
    allow(1 << 20)
    {call}
    print("computed")
    """
    assert run_script(script) == ["refused", "True", "True", "computed"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_tensor_of_torch_keeps_the_memory(x):
    torch = pytest.importorskip("torch")
    y = norm(x)
    expected = y.copy()
    tensor = torch.from_numpy(y)
    del y
    for _ in range(3):
        norm(x * 2)
    assert np.array_equal(tensor.numpy(), expected)
