"""normkit beside its peers, and beside a copy of the same size: speed from Python.

    python bench/compare.py [--threads 1,2] [--cases 'bn_*nhwc*,ln'] [--mode out] [--json FILE] [--plot FILE]
    python bench/compare.py --device cuda [...]

Peers are found, not required: torch (eager and torch.compile), jax.jit, ONNX Runtime, NumPy; oneDNN where --benchdnn
names its benchmark. On a GPU torch is required, and the peers are its two ways, Apex, Liger-Kernel and QuACK.
bench/README.md says how it is measured and how to read the tables.

--loose names a normkit._core built with -C cmake.define.NORMKIT_LOOSE=ON (contracts compiled out); the column
"contracts" is what our time is more than its time.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

import report
from cases import CASES, DTYPES, GPU_CASES, HALF_CASES, MORE_CASES, Case, fewest_bytes, name
from contenders import (
    Apex,
    Contender,
    Jax,
    Liger,
    Loose,
    Normkit,
    NumPy,
    OneDnn,
    OnnxRuntime,
    Problem,
    Quack,
    Torch,
    TorchCompile,
    exact,
)
from devices import Array, Cpu, Cuda, Device, Facts, InProcess, Run, cores
from normkit import bench as plain

ROUNDS = 7
ROUND_SECONDS = 0.02
# A contender that has used up its patience leaves after so many rounds: NumPy on 100 MB needs no seventh figure.
PATIENCE_SECONDS = 0.5
FEWEST_ROUNDS = 3
# A round begins when each of its threads has a core, or after so many looks, so far apart; after one that got none, the
# next look once.
CORES_PATIENCE = 20
CORES_SECONDS = 0.2

# The largest difference to the exact result, over the largest magnitude in it. Wide enough for all who compute in the
# dtype; what normkit promises is tested elsewhere.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}

DEVICES: dict[str, type[Device]] = {device.name: device for device in (Cpu, Cuda)}
PEERS: dict[str, dict[str, Callable[[Device], Contender]]] = {
    "cpu": {"torch": Torch, "compile": TorchCompile, "jax": Jax, "onnxruntime": OnnxRuntime, "numpy": NumPy},
    "cuda": {"torch": Torch, "compile": TorchCompile, "apex": Apex, "liger": Liger, "quack": Quack},
}

Seconds = dict[str, list[float]]  # of a call, by contender, a figure for each round


# ---- one row ---------------------------------------------------------------------------------------------------------


def agree(results: Sequence[Array], expected: Sequence[Array], problem: Problem) -> bool:
    def near(result: Array, reference: Array) -> bool:
        result, reference = (problem.device.xp.asarray(array, dtype=problem.wide) for array in (result, reference))
        return bool(abs(result - reference).max() <= TOLERANCE[problem.dtype] * abs(reference).max())

    return len(results) == len(expected) and all(
        result.shape == reference.shape and near(result, reference) for result, reference in zip(results, expected)
    )


def spread(times: Sequence[float]) -> float:
    """How far a round is from the median, in shares of it: the median of that."""
    middle = statistics.median(times)
    return statistics.median(abs(time - middle) for time in times) / middle


class Others:
    """What other processes take of the machine, from here on; a hypervisor's other guests included."""

    def __init__(self) -> None:
        self.start = self.now()

    def cores(self) -> float:
        wall, machine, own = (now - start for now, start in zip(self.now(), self.start))
        return max(0.0, (machine - own) / wall)

    @staticmethod
    def now() -> tuple[float, float, float]:
        """Wall time, CPU time of the machine (0 where nothing tells), of this process with its children; in seconds."""
        wall, own = time.perf_counter(), sum(os.times()[:4])
        try:
            words = Path("/proc/stat").read_text().partition("\n")[0].split()
        except OSError:
            return wall, 0.0, own
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in words[1:9])
        return wall, (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own


class Bench:
    """Measures rows on a device, with the contenders that are found."""

    def __init__(self, options: argparse.Namespace, device: Device) -> None:
        self.options, self.device = options, device
        self.said: set[tuple[str, str]] = set()
        self.cores_patience = CORES_PATIENCE
        self.normkit = Normkit(device)
        self.contenders: list[Contender] = []
        for key in options.contenders:
            self.find(key, partial(PEERS[device.name][key], device))
        if options.benchdnn:
            self.find("oneDNN", partial(OneDnn, device, options.benchdnn))
        if options.loose:
            self.contenders.append(Loose(device, options.loose))

    def find(self, key: str, make: Callable[[], Contender]) -> None:
        try:
            self.contenders.append(make())
        except Exception as error:  # a broken installation may raise anything
            tqdm.write(f"{key} is left out: {type(error).__name__}: {error}", file=sys.stderr)

    def say(self, contender: str, where: str, error: Exception) -> None:
        """Why a contender is left out of a row; once for each kind of reason."""
        kind = type(error).__name__
        if (contender, kind) not in self.said:
            self.said.add((contender, kind))
            reason = str(error).strip().partition("\n")[0]
            tqdm.write(f"{contender} fails in {where}, and maybe in others: {kind}: {reason}", file=sys.stderr)

    def row(self, problem: Problem, which: str) -> report.Row:
        case, dtype = problem.case, problem.dtype
        runs, wrong = self.ready(problem, which)
        working_set = (3 if which == "backward" else 2) * problem.x.nbytes
        copies = self.device.copies(working_set)
        others = Others()
        seconds, shared = self.measure({**runs, **copies})
        seconds["copy"] = [min(ways) for ways in zip(*(seconds.pop(way) for way in copies))]
        ours = seconds["normkit"]
        bytes_moved = fewest_bytes(case, which, problem.x.itemsize, self.device.l2)
        ratios = {contender: plain.ratio(times, ours) for contender, times in seconds.items() if contender != "normkit"}
        return {
            "name": name(case, which, dtype),
            "threads": self.device.threads,
            "mode": self.options.mode,
            "seconds": {contender: statistics.median(times) for contender, times in seconds.items()},
            "ratio": ratios,
            "bandwidth": bytes_moved / statistics.median(ours),
            "copy_bandwidth": working_set / statistics.median(seconds["copy"]),
            "roofline": ratios["copy"] * bytes_moved / working_set,
            "spread": {contender: spread(seconds[contender]) for contender in ("normkit", "copy")},
            "others": others.cores(),
            "shared": shared,
            "other_mode": [contender for contender, run in runs.items() if run.mode != self.options.mode],
            "late": [contender for contender, run in runs.items() if run.late],
            "wrong": wrong,
        }

    def ready(self, problem: Problem, which: str) -> tuple[dict[str, Run], list[str]]:
        """normkit and those that can do it and are right; the names of all that are wrong, normkit's too."""
        expected = exact(problem, which)
        runs: dict[str, Run] = {}
        wrong = []
        for contender in (self.normkit, *self.contenders):
            try:
                run = contender.prepare(problem, which, self.options.mode)
                results = run.results() if run else None
                right = results is None or agree(results, expected, problem)
                if isinstance(run, InProcess) and (right or contender is self.normkit):
                    self.rotate(run, contender, problem, which)
            except Exception as error:
                if contender is self.normkit:
                    raise
                self.say(contender.name, name(problem.case, which, problem.dtype), error)
                continue
            if not right:
                wrong.append(contender.name)
            if run and (right or contender is self.normkit):
                runs[contender.name] = run
        return runs, wrong

    def rotate(self, run: InProcess, contender: Contender, problem: Problem, which: str) -> None:
        others = [contender.prepare(other, which, self.options.mode) for other in problem.others]
        run.rotate([other for other in others if isinstance(other, InProcess)], self.device.clock())

    def measure(self, runs: dict[str, Run]) -> tuple[Seconds, int]:
        """A B C A B C: so that a machine that drifts drifts for all. And the rounds whose threads had no core each."""
        seconds: Seconds = {contender: [] for contender in runs}
        spent = dict.fromkeys(runs, 0.0)
        shared = 0
        for i in range(self.options.rounds):
            shared += not self.gets_its_cores()
            for contender, run in runs.items():
                if i >= FEWEST_ROUNDS and spent[contender] > PATIENCE_SECONDS:
                    continue
                time.sleep(self.device.pause_seconds)
                start = time.perf_counter()
                seconds[contender].append(run.seconds(self.options.round_seconds))
                spent[contender] += time.perf_counter() - start
        return seconds, shared

    def gets_its_cores(self) -> bool:
        """Wait for them, but not for ever, and where there are none, not again."""
        for look in range(self.cores_patience):
            if look > 0:
                time.sleep(CORES_SECONDS)
            if self.device.has_its_cores():
                self.cores_patience = CORES_PATIENCE
                return True
        self.cores_patience = 1
        return False


# ---- all rows --------------------------------------------------------------------------------------------------------


class Results:
    """The rows measured so far, and the file that has them after each."""

    def __init__(self, path: Path | None, resume: bool, machine: Facts, versions: Facts) -> None:
        self.path = path
        self.file: report.File = {"machine": machine, "versions": versions, "rows": []}
        if path and resume and path.exists():
            before = json.loads(path.read_text())
            used = {contender: versions.get(contender, version) for contender, version in before["versions"].items()}
            self.refuse_others(before["machine"] | before["versions"], machine | used)
            self.file["versions"] = before["versions"] | versions
            self.file["rows"] = [row for row in before["rows"] if "normkit" not in row["wrong"]]  # measure those again

    def refuse_others(self, then: Facts, now: Facts) -> None:
        """Rows of two machines, or of two versions of a contender, must not stand in one table."""
        keys = [key for key in then | now if then.get(key) != now.get(key)]
        differences = [f"{key} {then.get(key, 'not said')}, now {now.get(key, 'not said')}" for key in keys]
        if differences:
            sys.exit(
                f"--resume needs the machine and the versions of {self.path}: {'; '.join(differences)}; name "
                "another file by --json, or begin this one anew without --resume"
            )

    @property
    def rows(self) -> list[report.Row]:
        rows: list[report.Row] = self.file["rows"]
        return rows

    def has(self, row_name: str, threads: int, mode: str) -> bool:
        return any((row["name"], row["threads"], row["mode"]) == (row_name, threads, mode) for row in self.rows)

    def add(self, row: report.Row) -> None:
        self.rows.append(row)
        if self.path:
            unfinished = self.path.with_name(self.path.name + ".part")
            unfinished.write_text(json.dumps(self.file, indent=1) + "\n")
            unfinished.replace(self.path)


def wanted(options: argparse.Namespace) -> list[tuple[Case, str, str]]:
    """Case, pass and dtype of every row that is asked for."""
    patterns = [pattern if set(pattern) & set("*?[") else f"*{pattern}*" for pattern in options.cases.split(",")]

    def cases(dtype: str) -> tuple[Case, ...]:
        if options.device == "cuda":
            return GPU_CASES
        if options.more_cases:
            return MORE_CASES
        return CASES if options.all_cases or DTYPES[dtype] > 2 else HALF_CASES

    def chosen(case: Case, which: str, dtype: str) -> bool:
        if options.quick and case.size > DEVICES[options.device].quick_elements:
            return False
        return any(fnmatch.fnmatchcase(name(case, which, dtype), pattern.strip()) for pattern in patterns)

    return [
        (case, which, dtype)
        for dtype in options.dtype
        for case in cases(dtype)
        for which in case.passes
        if chosen(case, which, dtype)
    ]


def sweep(options: argparse.Namespace, device: Device) -> None:
    """Measure the rows that are not in the file yet, and report."""
    bench = Bench(options, device)
    versions = {contender.name: contender.version for contender in (bench.normkit, *bench.contenders)}
    results = Results(options.json, options.resume, device.facts(), versions)
    print(f"{report.title(results.file, options.mode)}; {report.in_words(device.threads)}", flush=True)
    todo = [row for row in wanted(options) if not results.has(name(*row), device.threads, options.mode)]
    problem: Problem | None = None
    with tqdm(todo, unit="row") as bar:
        for case, which, dtype in bar:
            bar.set_postfix_str(name(case, which, dtype), refresh=False)
            if problem is None or (problem.case, problem.dtype) != (case, dtype):
                problem = None  # frees its arrays before the next one makes its own
                problem = Problem(case, dtype, device)
            results.add(bench.row(problem, which))
    if options.plot:
        report.plot(results.file, options.mode, options.plot)
    rows = report.chosen(results.file, options.mode, device.threads)
    print(report.text(rows))
    if wrong := [row["name"] for row in rows if "normkit" in row["wrong"]]:
        sys.exit(f"normkit's own results are wrong, so none of this counts: {', '.join(wrong)}")


def sweep_each(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """A process for each number of threads: JAX fixes its own for good when it is first used."""
    with tempfile.TemporaryDirectory() as folder:
        path = options.json or Path(folder, "results.json")
        if not options.resume:
            path.unlink(missing_ok=True)
        for threads in options.threads:
            command = [sys.executable, __file__, *arguments, f"--threads={threads}", f"--json={path}", "--resume"]
            status = subprocess.run(command).returncode
            if status != 0:
                sys.exit(status)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def names(text: str) -> list[str]:
        return [peer for peer in text.split(",") if peer]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=list(DEVICES), default="cpu", help="default: cpu")
    add("--threads", type=numbers, help="one after the other; default: 1, and all cores")
    add("--cases", default="*", help="comma-separated parts of names, or patterns with *; cases.py prints all names")
    add("--dtype", action="append", choices=list(DTYPES), help="may be repeated; default: float32 and the half types")
    add("--all-cases", action="store_true", help="the half types on every case, as on a GPU, not on the few of a CPU")
    add(
        "--more-cases", action="store_true", help="small images and small sets, beyond the list of a CPU, and no others"
    )
    add("--mode", choices=("call", "out"), default="call", help="fresh outputs, or outputs given (default: call)")
    choices = "; ".join(f"{device}: {','.join(peers)}" for device, peers in PEERS.items())
    add("--contenders", type=names, help=f"peers, if installed; default: all, which are ({choices})")
    add("--benchdnn", metavar="PATH", help="oneDNN's benchmark: makes oneDNN a contender")
    add("--loose", metavar="PATH", help="a _core built without the contracts")
    most = ", ".join(f"{kind.quick_elements:,} ({device})" for device, kind in DEVICES.items())
    add("--rounds", type=int, help=f"default: {ROUNDS}, with --quick {FEWEST_ROUNDS}")
    add("--quick", action="store_true", help=f"three short rounds; no array of more than {most} elements")
    add("--json", type=Path, metavar="FILE", help="write the figures there, after each row")
    add("--resume", action="store_true", help="keep the rows that --json has already, measure those it lacks")
    add("--plot", metavar="FILE", help="draw ratios and rooflines of all rows (needs matplotlib)")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ["float32", "bfloat16", "float16"]
    if options.rounds is None:
        options.rounds = FEWEST_ROUNDS if options.quick else ROUNDS
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {options.rounds}")
    given = [key for key in ("threads", "benchdnn", "loose", "more_cases") if getattr(options, key)]
    if options.device != "cpu" and given:
        parser.error(
            f"--{given[0].replace('_', '-')} must be left out with --device {options.device}: it is of the CPU"
        )
    options.threads = options.threads or sorted({1, cores()})
    if min(options.threads) < 1:
        parser.error(f"--threads must be 1 or more, got {min(options.threads)}")
    peers = list(PEERS[options.device])
    options.contenders = peers if options.contenders is None else options.contenders
    if unknown := set(options.contenders) - set(peers):
        parser.error(f"--contenders must be of {', '.join(peers)}, got {', '.join(unknown)}")
    options.round_seconds = ROUND_SECONDS / 4 if options.quick else ROUND_SECONDS
    if options.benchdnn and not shutil.which(options.benchdnn):
        parser.error(f"--benchdnn must name a program, got {options.benchdnn!r}")
    if not wanted(options):
        whose = f" --device {options.device}" if options.device != "cpu" else " --more" * options.more_cases
        prints = f"python bench/cases.py{whose}"
        parser.error(f"--cases must match a name that `{prints}` prints, got {options.cases!r}")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    if options.device == "cuda":
        if missing := Cuda.missing():
            sys.exit(missing)
        sweep(options, Cuda(importlib.import_module("torch")))
    elif len(options.threads) > 1:
        sweep_each(options, arguments)
    else:
        sweep(options, Cpu(options.threads[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
