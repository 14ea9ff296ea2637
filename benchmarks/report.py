"""Turns recorded results into tables, and keeps those of README.md equal to the records.

    python benchmarks/report.py            # write the block of README.md and print everything
    python benchmarks/report.py --check    # exit with 1 if README.md says anything else

It needs no GPU and no PyTorch. Ratios are speeds: ours over the other, above 1 where ours is
faster. A provider that failed or was wrong in a cell has no figure there and enters no mean.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cells import label
from report_checks import endurance_block, sanitizer_block
from report_parts import environment_sentence, failures_of, figure, markdown_table
from report_times import extensions_block, first_call_block, host_cost_block, steps_block

REPOSITORY = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
SCHEMA = 1
OURS = "ours"
# Whom the tables compare with: the first that was timed, or the fastest of several peers.
RIVALS = ("flex", "fa3", "cudnn", "flash")
BEST, ORDERED = "best", "ordered"
_PEERS = ("fa3", "fa4")
# Other ways of providers that are there themselves.
_VARIANTS = (ORDERED, "fa3_ordered")
PASS_TITLES = {"fwd": "Forward", "bwd": "Backward"}
LABELS = {
    "ours": "flash_attn",
    "flex": "FlexAttention",
    "flash": "SDPA flash",
    "cudnn": "SDPA cuDNN",
    "fa3": "FA3",
    "fa4": "FA4",
    ORDERED: "flash_attn, deterministic",
    "fa3_ordered": "FA3, deterministic",
    BEST: "the best peer",
}


class ReportError(Exception):
    """A result file or the README is not as this program needs it."""


# ----------------------------------------------------------------------------------- figures
def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else math.nan


def providers_of(data: dict[str, Any], which: str) -> list[str]:
    """Who was timed in any cell of a pass, in the order of :data:`LABELS`, then by name."""
    seen = {name for cell in data["cells"] for name in cell["passes"].get(which, {})}
    return [x for x in LABELS if x in seen] + sorted(seen - set(LABELS))


def peers_of(data: dict[str, Any], which: str) -> list[str]:
    """Who was timed in a pass, but for ours and for variants."""
    return [x for x in providers_of(data, which) if x != OURS and x not in _VARIANTS]


def rival_of(data: dict[str, Any], which: str) -> str:
    """Whom the tables of a pass compare with."""
    timed = peers_of(data, which)
    if len(timed) > 1 and set(timed) & set(_PEERS):
        return BEST
    return next((name for name in RIVALS if name in timed), RIVALS[0])


def ratios(
    data: dict[str, Any], which: str, rival: str | None = None, ours: str = OURS
) -> dict[str, float]:
    """Speed of ours over ``rival`` by cell name, where both were timed."""
    rival = rival or rival_of(data, which)
    names = peers_of(data, which) if rival == BEST else [rival]
    found = {}
    for cell in data["cells"]:
        rows = cell["passes"].get(which, {})
        times = [rows[name]["median_ms"] for name in names if name in rows]
        if ours in rows and times:
            found[cell["name"]] = min(times) / rows[ours]["median_ms"]
    return found


def passes_of(data: dict[str, Any]) -> list[str]:
    """The passes that any cell has, forward first."""
    return [x for x in PASS_TITLES if any(x in cell["passes"] for cell in data["cells"])]


def rival_sentence(data: dict[str, Any], which: str, rival: str | None = None) -> str:
    """Geometric mean and worst cell of ours against ``rival``."""
    rival = rival or rival_of(data, which)
    found = ratios(data, which, rival)
    if not found:
        return f"{PASS_TITLES[which]}: no cell has both {LABELS[OURS]} and {LABELS[rival]}."
    worst = min(found, key=lambda name: found[name])
    cells = "1 cell" if len(found) == 1 else f"{len(found)} cells"
    return (
        f"{PASS_TITLES[which]}: {geometric_mean(found.values()):.2f} times the speed of "
        f"{LABELS[rival]} (geometric mean of {cells}; worst {found[worst]:.2f}, {worst})."
    )


def failure_lines(data: dict[str, Any]) -> list[str]:
    """Everything that was not timed, and why; what failed alike in all cells once."""
    where: dict[tuple[str, str], list[str]] = {}
    for cell in data["cells"]:
        for name, text in cell["failures"].items():
            where.setdefault((LABELS.get(name, name), text), []).append(cell["name"])
    count = len(data["cells"])
    lines = []
    for (name, text), cells in where.items():
        everywhere = count > 1 and len(cells) == count
        places = [f"all {count} cells"] if everywhere else cells
        lines += [f"{place}, {name}: {text}" for place in places]
    if data["left_out"]:
        lines.append("not run: " + ", ".join(data["left_out"]))
    return lines


# ------------------------------------------------------------------------------------ tables
def pass_table(data: dict[str, Any], which: str) -> list[str]:
    """TFLOP/s of every provider by cell, and the ratio to the rival."""
    names, found = providers_of(data, which), ratios(data, which)
    rows = []
    for cell in data["cells"]:
        timed = cell["passes"].get(which, {})
        figures = [f"{timed[name]['tflops']:.0f}" if name in timed else "–" for name in names]
        ratio = f"{found[cell['name']]:.2f}" if cell["name"] in found else "–"
        rows.append([label(cell), *figures, ratio])
    heads = [LABELS.get(name, name) for name in names]
    ratio_head = f"{LABELS[OURS]} / {LABELS[rival_of(data, which)]}"
    return markdown_table(
        [f"{PASS_TITLES[which]} (head dim, mask, length)", *heads, ratio_head], rows
    )


def ordered_sentences(data: dict[str, Any], which: str) -> list[str]:
    """How much slower ``deterministic=True`` is than the default, if both were timed."""
    found = ratios(data, which, OURS, ours=ORDERED)
    if not found:
        return []
    worst = min(found, key=lambda name: found[name])
    usual, most = (100 / x - 100 for x in (geometric_mean(found.values()), found[worst]))
    return [
        f"{PASS_TITLES[which]}: `deterministic=True` takes {usual:.0f} % longer than the default "
        f"(geometric mean of {len(found)} cells; at most {most:.0f} %, {worst}).",
        "",
    ]


def beside_table(data: dict[str, Any]) -> list[str]:
    """The speed of cells over that of another cell that each is to be as fast as."""
    cells, passes = {cell["name"]: cell for cell in data["cells"]}, passes_of(data)
    rows = []
    for cell in data["cells"]:
        other = cells.get(cell.get("beside", ""))
        if other is None:
            continue
        rates = [[x["passes"].get(which, {}).get(OURS) for x in (cell, other)] for which in passes]
        shares = [None if None in pair else pair[0]["tflops"] / pair[1]["tflops"] for pair in rates]
        rows.append([label(cell), label(other), *map(figure, shares)])
    if not rows:
        return []
    head = ["TFLOP/s of this shape", "over this one's", *(PASS_TITLES[x] for x in passes)]
    return [*markdown_table(head, rows), ""]


def _chosen(data: dict[str, Any]) -> str:
    """Which kernels of ours were timed, where a backend was named."""
    name = data["settings"].get("backend")
    named = {None: "", "auto": ", automatic choice", "triton": ", portable kernels"}
    return named.get(name, f", backend {name}")


def attention_block(data: dict[str, Any]) -> list[str]:
    """The README's section on one attention result file."""
    title = data["settings"].get("title")
    about = f"{_chosen(data)}: {title}" if title else _chosen(data)
    lines = [f"#### {data['environment']['gpu']}{about}", "", environment_sentence(data)]
    lines += [
        f"TFLOP/s in {data['settings']['dtype']}, higher is better: the median of "
        f"{data['settings']['rounds']} interleaved rounds. Operations are counted as "
        "4·batch·heads·length²·dim, half of that for causal, 2.5 times for backward"
        f"{'; of windows, what queries see' * any('left' in x for x in data['cells'])}.",
        "",
    ]
    for which in passes_of(data):
        lines += [*pass_table(data, which), ""]
        several = peers_of(data, which) if rival_of(data, which) == BEST else []
        for rival in (rival_of(data, which), *several):
            lines += [rival_sentence(data, which, rival), ""]
        lines += ordered_sentences(data, which)
    return lines + beside_table(data) + failures_of(failure_lines(data))


def memory_block(data: dict[str, Any]) -> list[str]:
    """The README's section on one memory result file."""
    shape = data["settings"]
    usual = f"batch 1, {shape.get('nheads')} heads, head dim {shape.get('headdim')}"
    lines = [
        f"#### Memory, {data['environment']['gpu']}",
        "",
        environment_sentence(data),
        f"Peak memory in MiB that a pass takes beyond its inputs (causal, {shape['dtype']}), "
        "beside what one matrix of scores would take. The workspace is what backward takes beyond "
        "the gradients; allowed are an accumulator of dq in float32, two numbers a row and, with "
        "fewer heads of keys, accumulators of dk and dv (in order one for each head of queries).",
        "",
    ]
    names = ("forward_bytes", "backward_bytes", "workspace_bytes", "allowed_bytes", "scores_bytes")
    rows = [
        [row.get("way", usual), str(row["seqlen"]), *(_mebibytes(row.get(name)) for name in names)]
        for row in sorted(data["rows"], key=lambda row: (row.get("way", ""), row["seqlen"]))
        if "failure" not in row
    ]
    header = ["Causal", "tokens", "forward", "backward", "workspace", "allowed", "scores"]
    lines += [*markdown_table(header, rows), ""]
    single = data.get("growth_exponent")
    powers = data.get("growth", {} if single is None else {usual: single})
    if powers:
        least, most = (f"{x(powers.values()):.2f}" for x in (min, max))
        between = least if least == most else f"{least} to {most}"
        lines += [f"Backward grows as length to the power of {between}.", ""]
    failed = [
        f"{row.get('way', usual)}, {row['seqlen']}: {row['failure']}"
        for row in data["rows"]
        if "failure" in row
    ]
    return lines + failures_of(failed + [f"not run: {x}" for x in data.get("left_out", [])])


def _mebibytes(size: float | None) -> str:
    return "–" if size is None else f"{size / 2**20:.1f}"


# What the table of float8 errors shows, of rows with one factor for each tensor.
FLOAT8_COLUMNS = {
    "Gaussian": ("gaussian", False),
    "outliers": ("outliers", False),
    "outliers, rotated": ("outliers", True),
}
FLOAT8_NAMES = {"ours": "flash_attn", "cudnn": "cuDNN"}


def _float8_error(row: dict[str, Any] | None, name: str, target: str) -> float | None:
    """A relative error in the Frobenius norm, in percent."""
    found = None if row is None else row[name]
    return None if found is None else 100.0 * float(found[target]["frobenius"])


def float8_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Errors by shape and kind of inputs, and the worst ratio of a shape."""
    table = []
    for name in dict.fromkeys(label(row) for row in rows):
        of_shape = [row for row in rows if label(row) == name]
        found = {(row["inputs"], row["hadamard"]): row for row in of_shape}
        errors = [
            _float8_error(found.get(key), who, "inputs")
            for key in FLOAT8_COLUMNS.values()
            for who in FLOAT8_NAMES
        ]
        known = [row["ratio"] for row in of_shape if row["ratio"] is not None]
        table.append([name, *map(figure, [*errors, max(known, default=None)])])
    heads = [f"{kind}: {who}" for kind in FLOAT8_COLUMNS for who in FLOAT8_NAMES.values()]
    return markdown_table(["Head dim, mask, length", *heads, "worst ratio"], table)


def float8_failure_lines(data: dict[str, Any]) -> list[str]:
    """Everything that has no error, and why, each once."""
    lines = []
    for row in data["rows"]:
        if "cudnn_refused" in row:
            lines.append(f"{label(row)}, cuDNN: {row['cudnn_refused']}")
        lines += [f"{row['cell']}, {FLOAT8_NAMES[x]}: {y}" for x, y in row["failures"].items()]
    lines += [f"not run: {name}" for name in data["left_out"]]
    return list(dict.fromkeys(lines))


def float8_block(data: dict[str, Any]) -> list[str]:
    """The README's section on one file of float8 errors."""
    env, rows = data["environment"], [row for row in data["rows"] if not row["per_head"]]
    lines = [
        f"#### Float8 errors, {env['gpu']}",
        "",
        environment_sentence(data),
        "Percent, in the Frobenius norm, against attention in float64 on the inputs before they "
        "were quantised with one factor for each tensor. Both are given the same numbers; cuDNN is "
        f"{env['cudnn']}, its frontend {env['cudnn_frontend']}. The ratio is of our error over "
        "cuDNN's, the worst of all inputs, rotated or not, in the Frobenius norm and, against the "
        "float8 numbers, of one element.",
        "",
        *float8_table(rows),
        "",
    ]
    for name, who in FLOAT8_NAMES.items():
        added = [_float8_error(row, name, "float8") for row in rows]
        worst = max((x for x in added if x is not None), default=None)
        if worst is not None:
            lines.append(f"{who} is off by at most {worst:.2f} % from the float8 numbers' own.")
    return [*lines, "", *failures_of(float8_failure_lines(data))]


# In the README's order.
BLOCKS = {
    "attention": attention_block,
    "steps": steps_block,
    "host_cost": host_cost_block,
    "first_call": first_call_block,
    "memory": memory_block,
    "extensions": extensions_block,
    "float8_error": float8_block,
    "endurance": endurance_block,
    "sanitizer": sanitizer_block,
}


# ------------------------------------------------------------------------------------ README
def load_results(folder: Path) -> list[dict[str, Any]]:
    """Every result file in ``folder``, by :data:`BLOCKS`, then by file name."""
    results = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if data.get("benchmark") not in BLOCKS or data.get("schema") != SCHEMA:
            kind = (data.get("benchmark"), data.get("schema"))
            raise ReportError(
                f"{path.name} must hold {' or '.join(BLOCKS)} of schema {SCHEMA}, found {kind}"
            )
        results.append(data)
    return sorted(results, key=lambda data: list(BLOCKS).index(data["benchmark"]))


def block(results: Sequence[dict[str, Any]]) -> str:
    """What belongs between the markers, without them."""
    if not results:
        return "No results are recorded yet.\n"
    lines = [line for data in results for line in BLOCKS[data["benchmark"]](data)]
    return "\n".join(lines).strip() + "\n"


def with_block(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers, and nothing else changed.

    Raises:
        ReportError: the markers are not there, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    old, end, after = rest.partition(END)
    if (
        not begin
        or not end
        or any(mark in part for mark in (BEGIN, END) for part in (before, old, after))
    ):
        raise ReportError(f"the README must hold {BEGIN} and, after it, {END}, once each")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def summary_lines(data: dict[str, Any]) -> list[str]:
    """A short table for the terminal: ours over the rival by cell, means and worst cells."""
    passes = passes_of(data)
    by_pass = {which: ratios(data, which) for which in passes}
    rivals = ", ".join(sorted({LABELS[rival_of(data, which)] for which in passes}))
    lines = [f"{LABELS[OURS]} / {rivals}  " + "".join(f"{which:>7}" for which in passes)]
    for cell in data["cells"]:
        values = [by_pass[which].get(cell["name"]) for which in passes]
        figures = "".join(f"{'-' if value is None else f'{value:.2f}':>7}" for value in values)
        lines.append(f"{cell['name']:<26}{figures}")
    for which in passes:
        others = [x for x in providers_of(data, which) if ratios(data, which, x) and x != OURS]
        lines += [rival_sentence(data, which, other) for other in others]
    return lines + ["!! " + line for line in failure_lines(data)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the README's block; 1 if the check fails, 2 if a file is unusable."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if not equal")
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    try:
        results = load_results(args.results)
        readme = args.readme.read_text(encoding="utf-8")
        wanted = with_block(readme, block(results))
    except (OSError, ValueError, KeyError, ReportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if args.check:
        if readme != wanted:
            print(f"{args.readme.name} differs from the recorded results", file=sys.stderr)
        return int(readme != wanted)
    args.readme.write_text(wanted, encoding="utf-8")
    print(block(results))
    for data in results:
        if data["benchmark"] == "attention":
            print("\n".join(summary_lines(data)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
