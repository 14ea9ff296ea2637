"""The README's sections on steps, on the host's share, on first calls, and on float8's speed."""

from __future__ import annotations

from typing import Any

from report_parts import failures_of, figure, heading, markdown_table

JOBS = {
    "attention": "attention of a Llama-8B layer (32/8 heads of 128, 8k tokens, causal)",
    "layer": "that attention with its projections and rotary embedding",
    "demo": "the GPU model of `make demo`, with its loss",
}
_STEPS = {
    "ours": "flash_attn",
    "ordered": "flash_attn, deterministic",
    "fa3": "FA3",
    "fa4": "FA4",
    "flash": "SDPA flash",
    "cudnn": "SDPA cuDNN",
}


def not_run(data: dict[str, Any]) -> list[str]:
    """What a run that was cut did not come to."""
    return [f"not run: {name}" for name in data["left_out"]]


def steps_block(data: dict[str, Any]) -> list[str]:
    """The section on one file of steps."""
    rows, timed = data["rows"], {name for row in data["rows"] for name in row["median_ms"]}
    names = [x for x in _STEPS if x in timed] + sorted(timed - set(_STEPS))
    table = []
    for row in rows:
        times = row["median_ms"]
        ratio = times["fa3"] / times["ours"] if {"fa3", "ours"} <= set(times) else None
        label = JOBS.get(row["job"], row["job"])
        table.append([label, *(figure(times.get(x)) for x in names), figure(ratio)])
    head = ["Forward and backward", *(_STEPS.get(x, x) for x in names), "FA3 / flash_attn"]
    lines = heading("Steps", data)
    lines += [
        f"Milliseconds of a step in {data['settings']['dtype']}, lower is better, forward and "
        f"backward, back to back: the median of {data['settings']['rounds']} interleaved rounds. "
        "Only the attention differs.",
        "",
        *markdown_table(head, table),
        "",
    ]
    failures = [f"{row['job']}, {_STEPS.get(name, name)}: {text}"
                for row in rows for name, text in row["failures"].items()]  # fmt: skip
    return lines + failures_of(failures + not_run(data))


def host_cost_block(data: dict[str, Any]) -> list[str]:
    """The section on one file of host costs."""
    shape, figures = data["settings"], data["microseconds"]
    lines = heading("Host cost", data)
    sizes = ", ".join(f"{name} {shape[name]}" for name in ("batch", "seqlen", "nheads", "headdim"))
    lines += [
        f"Microseconds of an eager call ({sizes}, {shape['dtype']}), back to back, the best round; "
        "`recorded` is with gradients enabled. Machines differ: compare within the table.",
        "",
        *markdown_table(
            ["Call, in turns", "µs"],
            [[name, figure(value, 1)] for name, value in figures["side by side"].items()],
        ),
        "",
    ]
    backends = [name for name in figures if name != "side by side"]
    calls = list(dict.fromkeys(call for name in backends for call in figures[name]))
    if backends:
        heads = [f"{name} ({data['served'][name]})" for name in backends]
        table = [[call, *(figure(figures[name].get(call), 1) for name in backends)]
                 for call in calls]  # fmt: skip
        lines += [*markdown_table(["By backend", *heads], table), ""]
    return lines + failures_of(not_run(data))


def first_call_block(data: dict[str, Any]) -> list[str]:
    """The section on one file of first calls."""
    rows = [row for row in data["rows"] if row["medians"]]
    names = list(rows[0]["medians"]) if rows else []
    table = []
    for row in rows:
        phases = [figure(row["medians"][name]) for name in names]
        slowest = max(row["kernels"].values(), default=None)
        table.append([f"{row['case']}, {row['kind']} cache, {row['processes']} processes", *phases,
                      figure(row["beyond"]), figure(slowest)])  # fmt: skip
    lines = heading("First call of a process", data)
    lines += [
        "Seconds, medians: what a first forward call takes beyond importing torch and triton and "
        "creating the device's context, and its parts.",
        "",
        *markdown_table(["First call", *names, "beyond", "slowest kernel to compile"], table),
        "",
    ]
    failures = [f"{row['case']}, {row['kind']}: {text}"
                for row in data["rows"] for text in row["failures"]]  # fmt: skip
    return lines + failures_of(failures + not_run(data))


def extensions_block(data: dict[str, Any]) -> list[str]:
    """The section on one file of extensions: float8 beside bfloat16 on whole sequences."""
    table, failures = [], []
    for row in data["rows"]:
        times = row["median_ms"]
        failures += [f"{row['cell']}, {way}: {text}" for way, text in row["failures"].items()]
        if {"bfloat16", "float8"} <= set(times):
            ratio = times["bfloat16"] / times["float8"]
            figures = (times["bfloat16"], times["float8"], ratio)
            table.append([row["cell"].removeprefix("float8 "), *(figure(x, 3) for x in figures)])
    lines = heading("Float8 beside bfloat16", data)
    lines += [
        "Milliseconds of the portable kernels' forward, 16k tokens and hidden size 2048; the ratio "
        "is above 1 where float8 is faster.",
        "",
        *markdown_table(["Cell", "bfloat16", "float8", "bfloat16 / float8"], table),
        "",
    ]
    return lines + failures_of(failures + not_run(data))
