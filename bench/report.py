"""Tables and the picture of what compare.py measured.

    python bench/report.py FILE [--mode out] [--markdown] [--plot FILE]

FILE is what compare.py --json wrote: the machine, the versions of the contenders, and the rows. A row is a dict: name,
threads (0 on a GPU), mode, seconds and ratio by contender, bandwidth, that of the copy, roofline, spread of the rounds
(of normkit and of the copy), cores that other processes took, rounds whose threads had no core each ("shared"), the
contenders that ran in the other mode, those whose calls the GPU waited for ("late"), those whose results were wrong. A
ratio is a contender's time over normkit's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cases import DTYPES, NORMS

Row = dict[str, Any]
File = dict[str, Any]  # machine, versions, rows

YARDSTICKS = ("normkit", "loose", "copy")  # all others are peers
BEHIND = 0.97  # a ratio below is no noise
SUMMARY = ("group", "cases", "torch, mean", "worst", "best peer, mean", "worst", "behind", "roofline")
COLORS = {"beside torch": "#2a6f97", "beside the best peer": "#e07a5f", "share of the copy speed": "#52796f"}


def chosen(file: File, mode: str, threads: int) -> list[Row]:
    return [row for row in file["rows"] if (row["mode"], row["threads"]) == (mode, threads)]


def thread_counts(file: File, mode: str) -> list[int]:
    return sorted({row["threads"] for row in file["rows"] if row["mode"] == mode})


def title(file: File, mode: str) -> str:
    machine = file["machine"]
    if "GPU" in machine:
        place = f"{machine['GPU']}, driver {machine['driver']}, CUDA {machine['CUDA']}, L2 {machine['L2']}"
    else:
        place = f"{machine['CPU']}, {machine['cores']} cores, {machine['instruction set']}"
    return (
        f"{place}; "
        f"{', '.join(f'{contender} {version}' for contender, version in file['versions'].items())}; "
        f"{'outputs given' if mode == 'out' else 'fresh outputs'}"
    )


def in_words(threads: int) -> str:
    if threads == 0:
        return "GPU"
    return f"{threads} thread{'s' if threads > 1 else ''}"


def peers(row: Row) -> dict[str, float]:
    return {name: ratio for name, ratio in row["ratio"].items() if name not in YARDSTICKS}


def best_peer(row: Row) -> tuple[str, float] | None:
    return min(peers(row).items(), key=lambda item: item[1], default=None)


def on_gpu(row: Row) -> bool:
    return row.get("threads") == 0


def group_of(row: Row) -> tuple[tuple[int, ...], str]:
    """The line of the summary that a row counts in, after what sorts the lines."""
    operation, layout, *_, dtype = row["name"].split("/")
    if DTYPES[dtype] == 2 and not on_gpu(row):  # a CPU has few of them
        return (len(DTYPES),), "half types"
    norm, which = operation.split("_")
    words = [norm.upper(), "evaluation" if which == "evaluate" else which]
    by_layout = layout != "rows" and which != "evaluate"
    if by_layout:
        words.append(layout.upper())
    if dtype != "float32":
        words.append(dtype)
    passes = ("forward", "backward", "evaluate")
    order = (list(DTYPES).index(dtype), list(NORMS).index(norm), passes.index(which), by_layout and layout == "nhwc")
    return order, " ".join(words)


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[tuple[tuple[int, ...], str], list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return {label: groups[order, label] for order, label in sorted(groups)}


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each row, those behind a peer first; `*`: it ran in the other mode."""
    names = list(dict.fromkeys(name for row in rows for name in (*peers(row), *row["wrong"])))
    columns = [name for name in names if name not in YARDSTICKS]
    loose = any("loose" in row["ratio"] for row in rows)
    head = f"{'case':42}{'µs':>10}{'GB/s':>8}{'roofline':>10}{'copy':>8}{'copy ±':>8}"
    lines = [head + "".join(f"{name:>15}" for name in columns) + ("      contracts" if loose else "") + "  best peer"]
    for row in sorted(rows, key=lambda row: (best_peer(row) or ("", math.inf))[1]):
        cells = [f"{cell(row, name):>15}" for name in columns]
        if loose:
            contracts = f"{100 / row['ratio']['loose'] - 100:+.0f}%" if "loose" in row["ratio"] else ""
            cells.append(f"{contracts:>15}")
        best = best_peer(row)
        time = f"{1e6 * row['seconds']['normkit']:.1f}{waited(row, 'normkit')}"
        ours = (
            f"{time:>10}{row['bandwidth'] / 1e9:8.1f}{row['roofline']:10.2f}"
            f"{copy_bandwidth(row) / 1e9:8.1f}{row['spread']['copy']:8.1%}"
        )
        last = f"  {best[1]:.2f} {best[0]}" if best else ""
        if "normkit" in row["wrong"]:
            last += "  NORMKIT IS WRONG"
        lines.append(f"{row['name']:42}{ours}{''.join(cells)}{last}")
    return lines


def copy_bandwidth(row: Row) -> float:
    bandwidth: float = row.get("copy_bandwidth") or row["bandwidth"] / row["roofline"]  # older files do not say it
    return bandwidth


def cell(row: Row, name: str) -> str:
    if name in row["wrong"]:
        return "wrong"
    if name not in row["ratio"]:
        return "-"
    return f"{row['ratio'][name]:.2f}{waited(row, name)}" + ("*" if name in row["other_mode"] else " ")


def waited(row: Row, name: str) -> str:
    return "'" if name in row.get("late", ()) else ""


def summary(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Under the names of `SUMMARY`: geometric means and worst cases by group, and of all."""
    lines: list[tuple[str, ...]] = []
    groups: dict[str, Sequence[Row]] = {**grouped(rows)}
    if all(map(on_gpu, rows)):
        groups |= {
            f"all {which}": [row for row in rows if f"_{which}/" in row["name"]] for which in ("forward", "backward")
        }
    for group, members in {**groups, "all": rows}.items():
        torch = [row["ratio"]["torch"] for row in members if "torch" in row["ratio"]]
        best = [peer[1] for row in members if (peer := best_peer(row))]
        roofline = [row["roofline"] for row in members]
        behind = str(sum(ratio < BEHIND for ratio in best))
        cells = (mean(torch), worst(torch), mean(best), worst(best), behind, mean(roofline))
        lines.append((group, str(len(members)), *cells))
    return lines


def mean(ratios: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f}" if ratios else "-"


def worst(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}" if ratios else "-"


def lists(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """What is behind and what is wrong: a heading, and a line for each."""
    slower = sorted((peer[1], row["name"], peer[0]) for row in rows if (peer := best_peer(row)) and peer[1] < BEHIND)
    return [
        (f"behind the best peer (below {BEHIND})", [f"{ratio:.2f}  {name}  {peer}" for ratio, name, peer in slower]),
        ("wrong results", [f"{row['name']}  {contender}" for row in rows for contender in row["wrong"]]),
    ]


def noise(rows: Sequence[Row]) -> str:
    ours, copy = (statistics.median(row["spread"][name] for row in rows) for name in ("normkit", "copy"))
    others, counts = [row["others"] for row in rows], [row.get("shared", 0) for row in rows]
    shared, sharing = sum(counts), sum(map(bool, counts))
    return (
        f"noise: half of the rounds within {ours:.1%} of their row's median, those of the copy within {copy:.1%} "
        f"({max(row['spread']['copy'] for row in rows):.1%} in the worst row); other processes took "
        f"{statistics.median(others):.2f} cores in the median row, {max(others):.2f} in the worst"
        f"{f'; rounds whose threads had no core each: {shared}, in {sharing} of {len(rows)} rows' if shared else ''}"
    )


def text(rows: Sequence[Row]) -> str:
    late = "; ': the GPU waited for its calls" if any(row.get("late") for row in rows) else ""
    lines = [f"time of the others over normkit's; *: not in this mode{late}", *table(rows), ""]
    lines += [f"{group:24}" + "".join(f"{cell:>17}" for cell in cells) for group, *cells in (SUMMARY, *summary(rows))]
    for heading, members in lists(rows):
        lines += ["", f"{heading}: {len(members)}", *(f"  {member}" for member in members)]
    return "\n".join([*lines, "", noise(rows)])


def markdown(file: File, mode: str) -> str:
    """The figures of bench/README.md."""
    lines = [title(file, mode)]
    for threads in thread_counts(file, mode):
        rows = chosen(file, mode, threads)
        lines += ["", f"### {in_words(threads)}", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (SUMMARY, ["---"] * len(SUMMARY), *summary(rows))]
        for heading, members in lists(rows):
            lines += ["", f"{heading}: {len(members)}", "", *(f"    {member}" for member in members)]
        lines += ["", noise(rows)]
    return "\n".join(lines)


# ---- the picture -----------------------------------------------------------------------------------------------------


def plot(file: File, mode: str, path: str) -> None:
    """A strip for each group, a dot for each case: ratios on the left, share of the copy speed on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    counts = thread_counts(file, mode)
    groups = list(grouped(row for row in file["rows"] if row["mode"] == mode))
    size = (12, 1.2 + len(counts) * (0.7 + 0.25 * len(groups)))
    figure, axes = pyplot.subplots(
        len(counts), 2, figsize=size, sharex="col", sharey=True, squeeze=False, layout="constrained"
    )
    for (left, right), threads in zip(axes, counts):
        members = grouped(chosen(file, mode, threads))
        for height, group in enumerate(groups):
            strips(left, right, height, members.get(group, []))
        left.set(title=in_words(threads), yticks=range(len(groups)), yticklabels=groups)
        for axis in (left, right):
            axis.axvline(1, color="black", linewidth=0.8)
            axis.grid(linewidth=0.3)
    left, right = axes[-1]
    left.invert_yaxis()
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("time of the peer / time of normkit; bar: geometric mean")
    right.set_xlabel("fewest bytes / time, over the speed of a copy")
    right.set_xlim(left=0)
    figure.suptitle(title(file, mode).replace("; ", "\n"), fontsize="medium")
    handles = [Line2D([], [], marker="o", linestyle="", color=COLORS[name], label=name) for name in COLORS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(COLORS))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def strips(left: Any, right: Any, height: float, rows: Sequence[Row]) -> None:
    torch = [row["ratio"]["torch"] for row in rows if "torch" in row["ratio"]]
    best = [peer[1] for row in rows if (peer := best_peer(row))]
    for axis, label, values, shift in (
        (left, "beside torch", torch, -0.18),
        (left, "beside the best peer", best, 0.18),
        (right, "share of the copy speed", [row["roofline"] for row in rows], 0),
    ):
        look = {"color": COLORS[label], "markersize": 4.5, "markeredgewidth": 0}
        axis.plot(values, [height + shift] * len(values), "o", alpha=0.5, **look)
        if values:
            mean = statistics.geometric_mean(values)
            axis.plot([mean] * 2, [height + shift - 0.17, height + shift + 0.17], linewidth=2, color=COLORS[label])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what compare.py --json wrote")
    parser.add_argument("--mode", choices=("call", "out"), default="call", help="of the rows to show (default: call)")
    parser.add_argument("--markdown", action="store_true", help="print the figures as bench/README.md has them")
    parser.add_argument("--plot", metavar="FILE", help="draw ratios and rooflines (needs matplotlib)")
    options = parser.parse_args()
    file, mode = json.loads(options.file.read_text()), options.mode
    counts = thread_counts(file, mode)
    if not counts:
        parser.error(f"{options.file} must have rows of mode {mode}, and has none")
    if options.plot:
        plot(file, mode, options.plot)
    if options.markdown:
        print(markdown(file, mode))
    else:
        for threads in counts:
            print(f"{title(file, mode)}; {in_words(threads)}\n{text(chosen(file, mode, threads))}\n")


if __name__ == "__main__":
    main()
