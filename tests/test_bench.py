"""The benchmarks: names and bytes of the cases, what compare.py writes, `python -m normkit.bench`."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import normkit
from normkit import _core, bench, functional

FOLDER = Path(__file__).parents[1] / "bench"
MODULES = ("cases", "devices", "contenders", "report", "compare")  # tests have a module `cases` too
TINY = "bn_forward/nchw/12x4x8x8/float32"


@pytest.fixture
def modules(monkeypatch):
    """The modules of bench/ by name, imported as compare.py imports them."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "cases", raising=False)
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def cases(modules):
    return modules["cases"]


def every_row(cases):
    return [(case, which) for case in cases.CASES for which in case.passes]


def test_every_row_counts_in_one_group(modules):
    cases, report = modules["cases"], modules["report"]
    rows = [{"name": cases.name(case, which, "float32")} for case, which in every_row(cases)]
    groups = report.grouped(rows)
    assert sorted(row["name"] for group in groups.values() for row in group) == sorted(row["name"] for row in rows)
    assert len(groups["BN evaluation"]) == len([case for case in cases.CASES if case.norm == "bn"])


# ---- cases.py --------------------------------------------------------------------------------------------------------


def test_names(cases):
    names = [cases.name(*row, "float32") for row in every_row(cases)]
    assert len(set(names)) == len(names)
    assert {
        TINY,
        "bn_forward/nchw/32x64x56x56/float32",
        "bn_evaluate/nchw/1x64x8x8/float32",
        "bn_backward/nchw/3136x256/float32",
        "ln_forward/rows/4096x768/float32",
        "rms_backward/rows/1x1048576/float32",
        "gn_backward/nhwc/2x320x64x64/g32/float32",
        "in_forward/nhwc/2x32x64x64x64/float32",
    } <= set(names)
    assert not any("bn" not in name and "evaluate" in name for name in names)
    assert set(cases.HALF_CASES) <= set(cases.CASES)
    assert not set(cases.MORE_CASES) & set(cases.CASES)


@pytest.mark.parametrize(
    ("name", "itemsize", "passes"),
    [
        ("ln_forward/rows/4096x768", 4, 2),
        ("ln_backward/rows/4096x768", 4, 3),
        ("ln_forward/rows/1x1048576", 4, 3),
        ("rms_backward/rows/1x1048576", 2, 5),
        ("bn_forward/nchw/32x64x56x56", 4, 2),  # a channel is 392 KiB; in float64, or with its dy, more than 512
        ("bn_forward/nchw/32x64x56x56", 8, 3),
        ("bn_backward/nchw/32x64x56x56", 4, 5),
        ("bn_backward/nchw/32x64x56x56", 2, 3),
        ("bn_forward/nhwc/32x64x56x56", 2, 3),
        ("bn_backward/nhwc/32x64x56x56", 4, 5),
        ("bn_evaluate/nhwc/32x64x112x112", 8, 2),
        ("bn_forward/nchw/3136x256", 4, 3),
        ("gn_forward/nchw/1x512x64x64/g32", 4, 2),  # a group is 256 KiB, the sample 8 MiB
        ("gn_forward/nhwc/1x512x64x64/g32", 4, 3),
        ("in_backward/nchw/4x128x128x128", 4, 3),
        ("in_backward/nhwc/4x128x128x128", 4, 5),
    ],
)
def test_fewest_bytes(cases, name, itemsize, passes):
    ((case, which),) = (row for row in every_row(cases) if cases.name(*row) == name)
    assert cases.passes_over_memory(case, which, itemsize) == passes
    assert cases.fewest_bytes(case, which, itemsize) == passes * math.prod(case.shape) * itemsize


def test_cpp_table(cases):
    output = subprocess.run(
        [sys.executable, FOLDER / "cases.py", "--cpp"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    comment, *rows = output.splitlines()
    assert comment.startswith("//") and len(rows) == len(every_row(cases))
    for row, (case, which) in zip(rows, every_row(cases)):
        name, norm, passed, layout, groups, *numbers = re.fullmatch(r"NORMKIT_CASE\((.+)\)", row)[1].split(", ")
        assert name == f'"{cases.name(case, which)}"'
        assert (norm, passed, layout, int(groups)) == (cases.NORMS[case.norm], which, case.layout, case.num_groups)
        counts = [cases.passes_over_memory(case, which, itemsize) for itemsize in (2, 4, 8)]
        assert [int(number) for number in numbers] == [*counts, *case.shape]


# ---- compare.py ------------------------------------------------------------------------------------------------------

# What the test of it looks at, as benchdnn prints it: the time is 0.25 ms whatever is asked for.
BENCHDNN = """#!{python}
import sys
if "--mode=C" in sys.argv:
    print("0:PASSED __REPRO: " + " ".join(sys.argv[2:]))
    print("tests:1 passed:1 skipped:0 mistrusted:0 unimplemented:0 invalid_arguments:0 failed:0 listed:0")
else:
    print("Output template: perf,%0time%\\nperf,0.25\\ntests:1 passed:1")
"""


@pytest.fixture
def benchdnn(tmp_path):
    path = tmp_path / "benchdnn"
    path.write_text(BENCHDNN.format(python=sys.executable))
    path.chmod(0o755)
    return path


def compared(compare, path, *arguments):
    """The rows that compare.py writes for the tiniest case."""
    compare.main(["--cases", TINY, "--threads", "1", "--rounds", "1", "--quick", "--json", str(path), *arguments])
    return json.loads(path.read_text())["rows"]


def test_rounds_wait_for_the_cores(modules, monkeypatch, tmp_path, capsys):
    compare, cpu = modules["compare"], modules["devices"].Cpu
    monkeypatch.setattr(compare, "CORES_SECONDS", 0)
    patience = compare.CORES_PATIENCE
    looks = iter([False, False, True, *[False] * patience, False, True, *[False] * (patience - 1), True])
    monkeypatch.setattr(cpu, "has_its_cores", lambda self: next(looks))
    (row,) = compared(compare, tmp_path / "results.json", "--contenders", "", "--rounds", "5")
    assert row["shared"] == 2 and next(looks, None) is None
    assert "; rounds whose threads had no core each: 2, in 1 of 1 rows" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity: Linux")
def test_two_threads_on_one_core_are_seen(modules):
    cpu = modules["devices"].Cpu
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:  # often: beside a third thread on that core, two are less than twice as slow as one
        assert not all(cpu(2).has_its_cores() for _ in range(50))
    finally:
        os.sched_setaffinity(0, before)
    assert cpu(1).has_its_cores()


def test_compare(modules, benchdnn, tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = ["--contenders", "numpy", "--benchdnn", str(benchdnn)]
    (row,) = compared(modules["compare"], path, *arguments, "--plot", str(tmp_path / "picture.png"))
    assert (row["name"], row["threads"], row["mode"], row["wrong"]) == (TINY, 1, "call", [])
    assert set(row["seconds"]) == {"normkit", "NumPy", "oneDNN", "copy"}
    assert row["seconds"]["oneDNN"] == 0.25e-3
    assert row["other_mode"] == ["oneDNN"]
    assert row["others"] >= 0 and set(row["spread"]) == {"normkit", "copy"} and min(row["spread"].values()) >= 0
    for contender, ratio in row["ratio"].items():
        assert ratio == pytest.approx(row["seconds"][contender] / row["seconds"]["normkit"])
    size = 12 * 4 * 8 * 8 * 4
    assert row["bandwidth"] == pytest.approx(2 * size / row["seconds"]["normkit"])
    assert row["roofline"] == pytest.approx(row["ratio"]["copy"])
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    output = capsys.readouterr().out
    assert TINY in output and f"{row['ratio']['oneDNN']:.2f}*" in output and "BN forward NCHW" in output
    assert "wrong results: 0" in output

    (row_again,) = compared(modules["compare"], path, *arguments, "--resume")
    assert row_again == row
    first, second = compared(modules["compare"], path, *arguments, "--resume", "--mode", "out")
    assert first == row and second["mode"] == "out" and second["other_mode"] == ["NumPy"]


def test_compare_in_a_process_for_each_number_of_threads(modules, tmp_path):
    path = tmp_path / "results.json"
    rows = compared(modules["compare"], path, "--contenders", "", "--threads", "1,2")
    assert [(row["name"], row["threads"]) for row in rows] == [(TINY, 1), (TINY, 2)]


def test_compare_leaves_out_what_is_wrong(modules, tmp_path, monkeypatch, capsys):
    contenders = modules["contenders"]
    right = contenders.NumPy.prepare

    def prepare(*arguments):
        run = right(*arguments)
        return contenders.InProcess(run.call, lambda y: [1.01 * run.read(y)[0]], run.mode)

    monkeypatch.setattr(contenders.NumPy, "prepare", prepare)
    (row,) = compared(modules["compare"], tmp_path / "results.json", "--contenders", "numpy")
    assert row["wrong"] == ["NumPy"] and set(row["ratio"]) == {"copy"}
    output = capsys.readouterr().out
    assert re.search(rf"^{TINY}.*\bwrong\b", output, re.MULTILINE) and "wrong results: 1" in output


def test_compare_sees_that_normkit_is_wrong(modules, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    right = functional.batch_norm

    def wrong(*arguments, **given):
        y = right(*arguments, **given)
        y[-1, -1, -1, -1] += 0.01 * np.abs(y).max()
        return y

    with monkeypatch.context() as patch:
        patch.setattr(normkit, "batch_norm", wrong)
        with pytest.raises(SystemExit, match=rf"normkit's own results are wrong.*: {TINY}$"):
            compared(modules["compare"], path, "--contenders", "numpy")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["wrong"] == ["normkit"] and "NumPy" in row["ratio"]
    output = capsys.readouterr().out
    assert re.search(rf"^{TINY}.*NORMKIT IS WRONG$", output, re.MULTILINE) and "wrong results: 1" in output

    (row,) = compared(modules["compare"], path, "--contenders", "numpy", "--resume")
    assert row["wrong"] == []


@pytest.mark.parametrize(("what", "name"), [("machine", "CPU"), ("machine", "instruction set"), ("versions", "NumPy")])
def test_compare_resumes_only_what_compares(modules, tmp_path, what, name):
    path = tmp_path / "results.json"
    compared(modules["compare"], path, "--contenders", "numpy")
    file = json.loads(path.read_text())
    assert list(file["machine"]) == ["CPU", "cores", "caches", "instruction set", "system", "Python"]
    assert file["versions"] == {"normkit": normkit.__version__, "NumPy": np.__version__}
    now, file[what][name] = file[what][name], "another"
    before = json.dumps(file)
    path.write_text(before)
    with pytest.raises(SystemExit, match=f"{name} another, now {re.escape(now)}; name another file by --json"):
        compared(modules["compare"], path, "--contenders", "numpy", "--resume")
    assert path.read_text() == before


def test_report_as_markdown(modules, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    compared(modules["compare"], path, "--contenders", "numpy")
    file = json.loads(path.read_text())
    (row,) = file["rows"]
    row["ratio"]["NumPy"] = 0.5
    file["rows"].append(row | {"threads": 2, "wrong": ["torch"]})
    path.write_text(json.dumps(file))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["report.py", str(path), "--markdown"])
    modules["report"].main()
    one, two = capsys.readouterr().out.split("### 2 threads")
    group = f"| BN forward NCHW | 1 | - | - | 0.50 | 0.50 | 1 | {row['roofline']:.2f} |"
    assert group in one and group in two
    assert f"    0.50  {TINY}  NumPy\n" in one
    assert "wrong results: 0\n" in one and f"wrong results: 1\n\n    {TINY}  torch\n" in two


def test_compare_leaves_out_what_fails(modules, benchdnn, tmp_path, capsys):
    benchdnn.write_text(benchdnn.read_text().replace("passed:1", "passed:0").replace("failed:0", "failed:1"))
    (row,) = compared(modules["compare"], tmp_path / "results.json", "--contenders", "", "--benchdnn", str(benchdnn))
    assert "oneDNN" not in row["ratio"]
    assert re.search(rf"oneDNN fails in {TINY}.*must pass benchdnn's check", capsys.readouterr().err)


def test_compare_with_another_core(modules, tmp_path, capsys):
    core = tmp_path / Path(_core.__file__).name
    shutil.copy(_core.__file__, core)
    (row,) = compared(modules["compare"], tmp_path / "results.json", "--contenders", "", "--loose", str(core))
    assert row["wrong"] == [] and row["ratio"]["loose"] > 0
    assert "contracts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cases", "no such case"],
        ["--cases", "no such case", "--more-cases"],
        ["--contenders", "no such peer"],
        ["--benchdnn", "no such program"],
    ],
)
def test_compare_says_what_there_is(modules, arguments, capsys):
    with pytest.raises(SystemExit):
        modules["compare"].main(arguments)
    assert re.search(r"must (match|be of|name) .+, got '?no such", capsys.readouterr().err)


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
@pytest.mark.parametrize("number", [0, -3])
def test_compare_needs_a_round_and_a_thread(modules, option, number, capsys):
    with pytest.raises(SystemExit):
        modules["compare"].main([f"{option}={number}"])
    assert f"{option} must be 1 or more, got {number}" in capsys.readouterr().err


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    yield torch
    torch.set_num_threads(threads)


TINY_CASES = [
    ("bn", "nchw", (3, 4, 5, 6), 0),
    ("bn", "nhwc", (3, 4, 5, 6), 0),
    ("bn", "nchw", (7, 5), 0),
    ("ln", "rows", (4, 24), 0),
    ("rms", "rows", (4, 24), 0),
    ("gn", "nchw", (2, 6, 5, 4), 3),
    ("gn", "nhwc", (2, 6, 5, 4), 3),
    ("in", "nchw", (2, 3, 4, 5, 6), 0),
    ("in", "nhwc", (2, 3, 4, 5, 6), 0),
]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_exact_results_piece_by_piece(modules, case, dtype, monkeypatch):
    contenders, case = modules["contenders"], modules["cases"].Case(*case)
    problem = contenders.Problem(case, dtype, modules["devices"].Cpu(1))
    for which in case.passes:
        whole = contenders.exact(problem, which)
        with monkeypatch.context() as patch:
            patch.setattr(contenders, "PIECE", 1)
            pieces = contenders.exact(problem, which)
        for a, b in zip(whole, pieces, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if dtype == "bfloat16" else 1e-13)


@pytest.mark.parametrize("mode", ["call", "out"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_contenders_agree(modules, torch, case, dtype, mode, capsys):
    compare, case, cpu = modules["compare"], modules["cases"].Case(*case), modules["devices"].Cpu(1)
    options = compare.parse(["--contenders", "torch,numpy", "--mode", mode])
    problem = modules["contenders"].Problem(case, dtype, cpu)
    for which in case.passes:
        runs, wrong = compare.Bench(options, cpu).ready(problem, which)
        assert (list(runs), wrong) == (["normkit", "torch", "NumPy"], [])
        assert runs["normkit"].mode == mode
    assert capsys.readouterr().err == ""


# ---- compare.py --device cuda, on a CPU in place of the GPU ----------------------------------------------------------


class Gpu:
    """What devices.Cuda asks of torch.cuda: a device that computes at once, so that its time is the CPU's."""

    def __init__(self):
        self.properties = SimpleNamespace(name="NVIDIA Stand-in", L2_cache_size=1 << 10)
        self.spins, self.enough = [], 0  # cycles; how many of them it takes until all calls are there

    def get_device_properties(self, place):
        return self.properties

    def empty_cache(self):
        pass

    def _sleep(self, cycles):
        self.spins.append(cycles)

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu, self.time = gpu, None

    def record(self):
        self.time = time.perf_counter()

    def query(self):
        return self.gpu.spins[-1] < self.gpu.enough

    def synchronize(self):
        assert self.time is not None

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def through_numpy(torch, function):
    """A function of normkit for tensors on the CPU, which it would refuse."""

    def array_of(value):
        if not isinstance(value, torch.Tensor):
            return value
        assert not value.requires_grad
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()

    def tensor_of(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def call(*arguments, **given):
        result = function(*map(array_of, arguments), **{name: array_of(value) for name, value in given.items()})
        return tuple(map(tensor_of, result)) if isinstance(result, tuple) else tensor_of(result)

    return call


@pytest.fixture
def gpu(modules, torch, monkeypatch):
    gpu = Gpu()
    torch.set_num_threads(1)
    for name in ("Event", "_sleep", "empty_cache", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    cuda = modules["devices"].Cuda
    monkeypatch.setattr(cuda, "place", "cpu")
    monkeypatch.setattr(cuda, "missing", staticmethod(lambda: ""))
    for norm in modules["cases"].NORMS.values():
        for name in (f"{norm}_norm", f"{norm}_norm_forward", f"{norm}_norm_backward"):
            monkeypatch.setattr(normkit, name, through_numpy(torch, getattr(normkit, name)))
    monkeypatch.setattr(modules["compare"], "GPU_CASES", tuple(modules["cases"].Case(*case) for case in TINY_CASES))
    return gpu


def compared_on_gpu(compare, path, *arguments):
    compare.main(["--device", "cuda", "--rounds", "1", "--quick", "--json", str(path), *arguments])
    return json.loads(path.read_text())


@pytest.mark.parametrize("mode", ["call", "out"])
def test_compare_on_gpu(modules, gpu, tmp_path, mode, capsys):
    path = tmp_path / "results.json"
    picture = str(tmp_path / "picture.png")
    arguments = ["--contenders", "torch", "--dtype", "float32", "--dtype", "bfloat16", "--mode", mode]
    file = compared_on_gpu(modules["compare"], path, *arguments, "--plot", picture)
    assert list(file["machine"]) == ["GPU", "driver", "CUDA", "L2", "CPU", "system", "Python"]
    assert file["machine"]["GPU"] == "NVIDIA Stand-in" and file["machine"]["L2"] == "0.000976562 MiB"
    assert list(file["versions"]) == ["normkit", "torch"]

    cases = modules["cases"]
    passes = {
        cases.name(case, which, dtype): (case, which, dtype)
        for dtype in ("float32", "bfloat16")
        for case in modules["compare"].GPU_CASES
        for which in case.passes
    }
    assert [row["name"] for row in file["rows"]] == list(passes)
    for row in file["rows"]:
        case, which, dtype = passes[row["name"]]
        itemsize = cases.DTYPES[dtype]
        assert (row["threads"], row["mode"], row["wrong"], row["late"]) == (0, mode, [], [])
        assert set(row["seconds"]) == {"normkit", "torch", "copy"} and min(row["seconds"].values()) > 0
        assert row["other_mode"] == (["torch"] if mode == "out" else [])
        size = cases.fewest_bytes(case, which, itemsize, cases.GPU_L2)
        assert row["bandwidth"] == pytest.approx(size / row["seconds"]["normkit"])
        copied = (3 if which == "backward" else 2) * case.size * itemsize
        assert row["copy_bandwidth"] == pytest.approx(copied / row["seconds"]["copy"])

    output = capsys.readouterr().out
    assert "NVIDIA Stand-in, driver" in output and "; GPU\n" in output
    for group in ("BN forward NHWC", "RMS backward bfloat16", "all forward", "all backward"):
        assert re.search(rf"^{group} ", output, re.MULTILINE), group
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert compared_on_gpu(modules["compare"], path, *arguments, "--resume") == file


def test_compare_on_gpu_does_not_go_on_with_rows_of_a_cpu(modules, gpu, tmp_path):
    path = tmp_path / "results.json"
    cheap = ["--threads", "1", "--quick", "--rounds", "1", "--contenders", "", "--json", str(path)]
    modules["compare"].main(["--cases", TINY, *cheap])
    with pytest.raises(SystemExit, match="GPU not said, now NVIDIA Stand-in; "):
        compared_on_gpu(modules["compare"], path, "--contenders", "", "--resume")
    compared_on_gpu(modules["compare"], path, "--contenders", "", "--cases", "ln_forward/rows/4x24/float32")
    with pytest.raises(SystemExit, match="GPU NVIDIA Stand-in, now not said; "):
        modules["compare"].main([*cheap, "--resume"])


def test_rotation_past_the_cache(modules, torch, gpu):
    devices, contenders = modules["devices"], modules["contenders"]
    case = modules["cases"].Case("ln", "rows", (4, 256))
    assert contenders.Problem(case, "float32", devices.Cuda(torch)).others == []
    gpu.properties.L2_cache_size = 16 << 10
    problem = contenders.Problem(case, "float32", devices.Cuda(torch))
    assert len(problem.others) == 7  # forward uses 8 KiB of each set, and they are to be four times the cache
    for name in contenders.Problem.ARRAYS:
        arrays = [getattr(each, name) for each in (problem, *problem.others)]
        assert len({array.data_ptr() for array in arrays}) == 8
        assert name == "out" or all(torch.equal(array, arrays[0]) for array in arrays)


def test_calls_take_turns_and_keep_results(modules, torch, gpu):
    devices = modules["devices"]
    log, alive = [], weakref.WeakSet()

    class Result:
        pass

    def run(number):
        def call():
            log.append(number)
            alive.add(result := Result())
            return result

        return devices.InProcess(call, lambda result: [result], "call")

    first = run(0)
    first.rotate([run(1), run(2)], devices.EventClock(gpu))
    assert log == [0, 1, 2] and len(alive) == 3  # each has been called before anything is timed
    first.repeats = 5
    first.seconds(0.0)
    assert log[3:] == [0, 1, 2, 0, 1, 2] and len(alive) == 3


def test_measurement_on_gpu_is_of_few_calls(modules, gpu):
    devices = modules["devices"]
    run = devices.InProcess(lambda: None, lambda _: [], "call")
    run.rotate([], devices.EventClock(gpu))
    run.seconds(10.0)
    assert run.repeats == devices.EventClock.most_calls


def test_gpu_spins_until_all_calls_are_there(modules, gpu):
    clock = modules["devices"].EventClock(gpu)
    calls = [lambda: None] * 3
    clock.seconds(iter(calls))
    assert gpu.spins == [clock.FEWEST_CYCLES] and not clock.late
    gpu.enough = 10 * clock.FEWEST_CYCLES
    clock.seconds(iter(calls))
    assert gpu.spins[1:] == [clock.FEWEST_CYCLES * factor for factor in (1, 4, 16)] and not clock.late
    clock.seconds(iter(calls))
    assert gpu.spins[4:] == [16 * clock.FEWEST_CYCLES]


def test_compare_says_that_the_gpu_waited(modules, gpu, tmp_path, capsys):
    gpu.enough = math.inf
    arguments = ["--contenders", "torch", "--cases", "ln_forward/*/float32"]
    (row,) = compared_on_gpu(modules["compare"], tmp_path / "results.json", *arguments)["rows"]
    assert row["late"] == ["normkit", "torch"]
    output = capsys.readouterr().out
    assert "': the GPU waited for its calls" in output
    assert re.search(rf"^{row['name']} +[\d.]+' .* {row['ratio']['torch']:.2f}' ", output, re.MULTILINE)


def stand_ins(torch):
    """Libraries of kernels, as far as contenders.py calls them, by torch: their functions, their arguments."""
    functional = torch.nn.functional

    class InPlace(torch.autograd.Function):
        """dx comes to lie on dy."""

        @staticmethod
        def forward(context, x, weight, eps):
            context.save_for_backward(x, weight)
            context.eps = eps
            return functional.rms_norm(x, weight.shape, weight, eps)

        @staticmethod
        def backward(context, dy):
            x, weight = (tensor.detach().requires_grad_() for tensor in context.saved_tensors)
            with torch.enable_grad():
                y = functional.rms_norm(x, weight.shape, weight, context.eps)
            dx, dweight = torch.autograd.grad(y, (x, weight), dy)
            return dy.copy_(dx), dweight, None

    def liger_layer_norm(X, W, B, eps):
        return functional.layer_norm(X, W.shape, W, B, eps)

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert in_place
        return InPlace.apply(X, W, eps)

    def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
        assert X.is_contiguous() and X.shape[1] == num_channels
        return functional.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)

    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)

    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        return functional.rms_norm(input, normalized_shape, weight, eps)

    class GroupNorm(torch.nn.GroupNorm):
        SUPPORTED_CHANNELS, SUPPORTED_GROUPS = frozenset([6]), frozenset([3])

    def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
        assert weight.dtype == bias.dtype == torch.float32
        y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
        return (y.to(x.dtype), rstd, mean) if return_rstd and return_mean else y.to(x.dtype)

    def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
        arguments = (x.shape[1:], mean, rstd, weight, weight, [True, True, has_bias])
        return torch.ops.aten.native_layer_norm_backward(dout.float(), x.float(), *arguments)

    def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6):
        return functional.rms_norm(x, weight.shape, weight, eps)

    return {
        "liger_kernel.transformers.functional": (liger_layer_norm, liger_rms_norm, liger_group_norm),
        "fused_layer_norm_cuda": (),
        "apex.normalization.fused_layer_norm": (fused_layer_norm_affine, fused_rms_norm_affine),
        "apex.contrib.group_norm": (GroupNorm,),
        "quack.rmsnorm": (layernorm_fwd, layernorm_bwd, rmsnorm),
    }


@pytest.fixture
def kernels(torch, monkeypatch):
    for name, members in stand_ins(torch).items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        module = ModuleType(name)
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules


CAN = {
    "ln": ["apex", "Liger", "quack"],
    "rms": ["apex", "Liger", "quack"],
    "gn nchw": ["Liger"],
    "gn nhwc": ["apex"],
}


@pytest.mark.parametrize("mode", ["call", "out"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_contenders_on_gpu_agree(modules, torch, gpu, kernels, case, dtype, mode, capsys):
    compare, case = modules["compare"], modules["cases"].Case(*case)
    device = modules["devices"].Cuda(torch)
    options = compare.parse(["--device", "cuda", "--contenders", "torch,apex,liger,quack", "--mode", mode])
    bench = compare.Bench(options, device)
    problem = modules["contenders"].Problem(case, dtype, device)
    dy = problem.dy.clone()
    others = CAN.get(case.norm, CAN.get(f"{case.norm} {case.layout}", []))
    for which in case.passes:
        runs, wrong = bench.ready(problem, which)
        assert (list(runs), wrong) == (["normkit", "torch", *others], [])
        assert [run.mode for run in runs.values()] == [mode] + ["call"] * (len(runs) - 1)
        assert torch.equal(problem.dy, dy)
    assert capsys.readouterr().err == ""


def test_compare_on_gpu_leaves_out_who_is_wrong_or_fails(modules, gpu, kernels, tmp_path, monkeypatch, capsys):
    def fails(*arguments, **given):
        raise RuntimeError("must be 64 KiB or less")

    right = kernels["apex.normalization.fused_layer_norm"].fused_layer_norm_affine
    monkeypatch.setattr(
        kernels["apex.normalization.fused_layer_norm"],
        "fused_layer_norm_affine",
        lambda *arguments: 1.01 * right(*arguments),
    )
    monkeypatch.setattr(kernels["quack.rmsnorm"], "layernorm_fwd", fails)
    arguments = ["--contenders", "apex,liger,quack", "--cases", "ln_forward/*/float32"]
    (row,) = compared_on_gpu(modules["compare"], tmp_path / "results.json", *arguments)["rows"]
    assert row["wrong"] == ["apex"] and set(row["ratio"]) == {"Liger", "copy"}
    output, errors = capsys.readouterr()
    assert "wrong results: 1" in output
    assert "quack fails in ln_forward/rows/4x24/float32, and maybe in others: RuntimeError: must be 64" in errors


def test_compare_on_gpu_finds_its_peers(modules, gpu, monkeypatch, tmp_path, capsys):
    for name in ("apex", "fused_layer_norm_cuda", "liger_kernel", "quack"):
        monkeypatch.setitem(sys.modules, name, None)  # cannot be imported
    arguments = ["--contenders", "torch,apex,liger,quack", "--cases", "rms_forward/*/float16"]
    (row,) = compared_on_gpu(modules["compare"], tmp_path / "results.json", *arguments)["rows"]
    assert set(row["ratio"]) == {"torch", "copy"}
    errors = capsys.readouterr().err
    assert all(f"{peer} is left out: " in errors for peer in ("apex", "liger", "quack"))


@pytest.mark.parametrize(
    ("normkit_is_built", "found", "words"),
    [
        (False, None, "normkit built with CUDA, and this one is built without; build it with: pip install"),
        (True, "no torch", "needs torch with CUDA, got ModuleNotFoundError"),
        (True, "no CUDA", r"needs torch with CUDA, got torch \S+ without"),
        (True, "no GPU", "needs a GPU and its driver, and torch sees none"),
        (True, "normkit sees no GPU", "needs a GPU and its driver, and normkit sees none"),
    ],
)
def test_compare_says_what_it_takes_on_gpu(modules, normkit_is_built, found, words, torch, monkeypatch):
    def is_built():
        if not normkit_is_built:
            return core()

    core = normkit._gpu.core
    monkeypatch.setitem(sys.modules, "normkit._cuda", None)
    monkeypatch.setattr(normkit._gpu, "core", is_built)
    monkeypatch.setattr(torch.version, "cuda", None if found == "no CUDA" else "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found != "no GPU")
    monkeypatch.setattr(normkit.cuda, "is_available", lambda: found != "normkit sees no GPU")
    if found == "no torch":
        monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as exit:
        modules["compare"].main(["--device", "cuda"])
    sentence = exit.value.code
    assert re.search(words, sentence) and sentence.endswith("or leave --device out, to measure on the CPU")
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "2"], "--threads must be left out with --device cuda"),
        (["--loose", "core.so"], "--loose must be left out with --device cuda"),
        (["--more-cases"], "--more-cases must be left out with --device cuda"),
        (["--contenders", "jax"], "--contenders must be of torch, compile, apex, liger, quack, got jax"),
        (["--cases", "no such case"], "`python bench/cases.py --device cuda` prints, got 'no such case'"),
    ],
)
def test_arguments_of_compare_on_gpu(modules, arguments, words, capsys):
    with pytest.raises(SystemExit):
        modules["compare"].main(["--device", "cuda", *arguments])
    assert words in capsys.readouterr().err


def test_cases_of_gpu(cases):
    names = [cases.name(case, which) for case in cases.GPU_CASES for which in case.passes]
    assert len(set(names)) == len(names)
    assert {
        "ln_forward/rows/32768x16384",
        "rms_backward/rows/4096x1023",
        "rms_forward/rows/16x1000000",
        "gn_forward/nhwc/16x960x64x64/g32",
        "gn_backward/nchw/1x128x512x512/g32",
        "in_backward/nhwc/2x32x128x128x128",
        "bn_backward/nchw/256x64x112x112",
        "bn_forward/nhwc/32x65x56x56",
        "bn_forward/nchw/160000x256",
    } <= set(names)
    output = subprocess.run(
        [sys.executable, FOLDER / "cases.py", "--device", "cuda"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert output.splitlines() == names


# ---- python -m normkit.bench -----------------------------------------------------------------------------------------

SMALL = (
    bench.Case("layer", (3, 8)),
    bench.Case("rms", (3, 8)),
    bench.Case("batch", (2, 4, 3, 3)),
    bench.Case("batch", (2, 4, 3, 3), channels_last=True),
    bench.Case("group", (2, 4, 3, 3), channels_last=True, num_groups=2),
    bench.Case("instance", (2, 4, 3, 3)),
)


@pytest.mark.parametrize("with_torch", [False, True])
def test_bench(with_torch, request, monkeypatch, capsys):
    if with_torch:
        request.getfixturevalue("torch")
    monkeypatch.setattr(bench, "CASES", SMALL)
    bench.main(["--threads", "1", "--seconds", "0.01", *([] if with_torch else ["--no-torch"])])
    head, columns, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("normkit ") and ("no torch" in head) is not with_torch
    assert columns.split()[-2:] == ["NumPy", "torch"]
    assert len(lines) == 2 * len(SMALL)
    ratios = r" +[\d.]+x" * (1 + with_torch)
    for line in lines:
        assert re.fullmatch(rf"\w+ +[\dx]+ +(N\w+ +)?(forward|backward) +[\d.]+ +[\d.]+ +\d+%{ratios}", line)


def test_bench_checks_before_it_times(monkeypatch):
    monkeypatch.setattr(bench, "CASES", SMALL[:1])
    monkeypatch.setattr(functional, "layer_norm", lambda x, *others: np.zeros_like(x))
    with pytest.raises(ArithmeticError, match=r"layer_norm forward of \(3, 8\): normkit and NumPy must agree within"):
        bench.main(["--threads", "1", "--seconds", "0.01", "--no-torch"])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("layer_norm", lambda y: y[:1]),  # would broadcast
        ("layer_norm_backward", lambda gradients: gradients[:2]),
    ],
)
def test_bench_checks_counts_and_shapes(monkeypatch, name, wrong):
    monkeypatch.setattr(bench, "CASES", SMALL[:1])
    right = getattr(functional, name)
    monkeypatch.setattr(functional, name, lambda *arguments: wrong(right(*arguments)))
    with pytest.raises(ArithmeticError, match=r"layer_norm (for|back)ward of \(3, 8\): .* must have the same shapes"):
        bench.main(["--threads", "1", "--seconds", "0.01", "--no-torch"])


def test_cases_of_bench_fit_a_laptop():
    assert len(bench.CASES) >= 6
    assert max(math.prod(case.shape) for case in bench.CASES) * 4 <= 16 << 20
