"""The benchmarks: names and bytes of the cases, what compare.py writes, `python -m normkit.bench`."""

import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import normkit
from normkit import _core, bench, functional

FOLDER = Path(__file__).parents[1] / "bench"
MODULES = ("cases", "contenders", "report", "compare")  # tests have a module `cases` too
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
    "arguments", [["--cases", "no such case"], ["--contenders", "no such peer"], ["--benchdnn", "no such program"]]
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
    problem = contenders.Problem(case, dtype)
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
    compare, case = modules["compare"], modules["cases"].Case(*case)
    options = compare.parse(["--contenders", "torch,numpy", "--mode", mode])
    problem = modules["contenders"].Problem(case, dtype)
    for which in case.passes:
        runs, wrong = compare.Bench(options, 1).ready(problem, which)
        assert (list(runs), wrong) == (["normkit", "torch", "NumPy"], [])
        assert runs["normkit"].mode == mode
    assert capsys.readouterr().err == ""


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
