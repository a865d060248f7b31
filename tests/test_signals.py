"""A long call answers signals: Ctrl-C ends it, a handler that returns lets it go on, and nothing is left behind.

Each call runs in a process of its own, on arrays whose elements are all the same one (strides of 0): much work, and no
memory. No test says how fast an answer must be beyond ANSWER, which leaves room for a machine with much else to do.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ANSWER = 5  # seconds from the signal to its exception; the promise is one, on a machine of one's own
HANG = 60  # seconds after which a child that does not end is killed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

# From ten seconds to hours. Not hours for all: rows keep the moments of every leaf until the end, 24 bytes for 2,048
# elements, and those of more than this need more memory than some machines have.
ROW = 2**35
LONG_CALLS = {
    "moments, one long row": "nk.moments(same(ROW), 0)",
    "moments, few long rows": "nk.moments(same(3, ROW // 2), 1)",
    "moments, many rows": "nk.moments(same(2**20, ROW // 2**20), (0, 1))",
    "moments, many short sets": "nk.moments(same(2**4, 2**16, 2**15), (0, 2))",
    "moments, columns": "nk.moments(same(2**16, 2**10, 2**10, 64), (0, 1, 2))",
    "moments, scattered axes": "nk.moments(same(2**8, 2, 2**19, 2, 2**6), (0, 2, 4))",
    "moments, float64": "nk.moments(same(ROW, dtype=np.float64), 0)",
    "moments, float16 columns": "nk.moments(same(2**38, 64, dtype=np.float16), 0)",
    "batch backward, rows": "batch_backward(same(ROW // 2**22, 8, 2**20), 1)",
    "batch backward, columns": "batch_backward(same(2**38, 64), 1)",
    "normalize backward, one weight": "normalize_backward(same(8, ROW // 4))",
    "normalize backward, columns": "normalize_backward(same(2**34, 64), axis=0)",
}

SETUP = """
import hashlib
import os
import signal
import sys
import time

import numpy as np
import normkit as nk


ROW = LONGEST


def same(*shape, dtype=np.float32):
    return np.broadcast_to(dtype(1.5), shape)


def batch_backward(x, axis):
    mean, rstd = np.ones((2, x.shape[axis]))
    return nk.batch_norm_backward(x, x, mean, rstd, channel_axis=axis, needs=("weight", "bias"))


def normalize_backward(x, axis=1):
    mean, rstd = np.ones((2, x.shape[1 - axis]))
    return nk.normalize_backward(x, x, mean, rstd, axis, np.ones((1, 1), np.float32), needs=("weight", "bias"))


def digest():
    x = np.random.default_rng(0).standard_normal((64, 16, 60, 61), dtype=np.float32)
    y, mean, rstd = nk.layer_norm_forward(x, 61)
    results = [nk.batch_norm(x, training=True), y, mean, rstd, *nk.layer_norm_backward(y, x, mean, rstd, 61)]
    return hashlib.sha256(b"".join(a.tobytes() for a in results)).hexdigest()


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
nk.set_num_threads(THREADS)
expected = digest()
"""


def start(script, threads):
    setup = SETUP.replace("THREADS", str(threads)).replace("LONGEST", str(ROW))
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", setup + textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child):
    """The words that the child prints until its end."""
    try:
        printed, errors = child.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        raise AssertionError(f"no end after {HANG} seconds") from None
    assert child.returncode == 0, f"status {child.returncode}\n{errors}"
    return printed.split()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", LONG_CALLS.values(), ids=LONG_CALLS)
def test_ctrl_c_ends_a_long_call(call, threads):
    """By KeyboardInterrupt; afterwards the same process computes what it did before."""
    child = start(
        f"""
        print("ready", flush=True)
        try:
            {call}
            print("computed")
        except KeyboardInterrupt:
            print("interrupted", time.monotonic())
        print(digest() == expected)
        """,
        threads,
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.5)
    sent = time.monotonic()  # of the system, as the child's
    child.send_signal(signal.SIGINT)
    how, when, same = finish(child)
    assert how == "interrupted"
    assert float(when) - sent < ANSWER
    assert same == "True"


@pytest.mark.parametrize("threads", [1, 2])
def test_the_exception_of_a_handler_ends_a_long_call(threads):
    """Not KeyboardInterrupt alone: this is how Python code sets itself a time limit."""
    script = """
    def handler(number, frame):
        raise TimeoutError("the handler's")

    signal.signal(signal.SIGALRM, handler)
    for _ in range(3):
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            nk.moments(same(ROW), 0)
        except TimeoutError as error:
            print(error)
    print(digest() == expected)
    """
    assert finish(start(script, threads)) == ["the", "handler's"] * 3 + ["True"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_handler_that_returns_does_not_end_a_call(threads):
    """It runs in the middle of the call, and no bit changes."""
    script = """
    x = np.broadcast_to(np.random.default_rng(0).standard_normal(1 << 12, dtype=np.float32), (1 << 20, 1 << 12))
    seconds = []
    signal.signal(signal.SIGALRM, lambda number, frame: seconds.append(time.monotonic()))
    quiet = nk.moments(x, (0, 1))
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    begin = time.monotonic()
    disturbed = nk.moments(x, (0, 1))
    end = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0)
    # Without an answer in the middle, the handler would run once, when the call has ended.
    print(len([s for s in seconds if begin < s < end]) > 2)
    print(quiet.mean.tobytes() == disturbed.mean.tobytes() and quiet.M2.tobytes() == disturbed.M2.tobytes())
    """
    assert finish(start(script, threads)) == ["True", "True"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_handler_may_call_the_library(threads):
    """In the middle of a long call, which still answers Ctrl-C afterwards."""
    script = """
    same_bits = []

    def handler(number, frame):
        same_bits.append(digest() == expected)
        if len(same_bits) == 3:
            signal.raise_signal(signal.SIGINT)
        signal.setitimer(signal.ITIMER_REAL, 0.2)  # not before: the handler's own calls answer signals too

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        nk.moments(same(ROW), 0)
    except KeyboardInterrupt:
        print("interrupted", same_bits == [True] * len(same_bits), digest() == expected)
    """
    assert finish(start(script, threads)) == ["interrupted", "True", "True"]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupted_call_leaves_running_statistics(threads):
    """The signal arrives at once, and is answered before the call could have ended: 1e9 elements, 1 GB of results."""
    script = """
    x = np.broadcast_to(np.arange(8, dtype=np.float16), (1 << 26, 8))
    mean, var = np.zeros(8), np.ones(8)

    def handler(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        nk.batch_norm(x, mean, var, training=True)
        print("computed")
    except TimeoutError:
        print("interrupted", mean.tobytes() == np.zeros(8).tobytes(), var.tobytes() == np.ones(8).tobytes())
    print(digest() == expected)
    """
    assert finish(start(script, threads)) == ["interrupted", "True", "True", "True"]


def test_a_call_of_another_python_thread_does_not_keep_ctrl_c_waiting():
    """Signals reach the main thread only, and it is free while others compute."""
    child = start(
        """
        import threading

        threading.Thread(target=lambda: nk.moments(same(ROW), 0), daemon=True).start()
        print("ready", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("interrupted", time.monotonic(), digest() == expected, flush=True)
            os._exit(0)  # the other thread goes on
        """,
        2,
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.5)
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    how, when, same = finish(child)
    assert (how, same) == ("interrupted", "True")
    assert float(when) - sent < ANSWER
