"""The README's sections on checks that need a GPU: many launches, equal bits, compute-sanitizer."""

from __future__ import annotations

from typing import Any

from report_parts import failures_of, heading, markdown_table


def endurance_block(data: dict[str, Any]) -> list[str]:
    """The section on one file of many launches and repeats."""
    lines, failures = heading("Launches and repeats", data), []
    part = data.get("launches")
    if part is not None:
        ended = part["end"] == "exit code 0"
        lines += [
            "",
            f"{part['launches']} launches forward and as many backward over {part['shapes']} "
            f"random shapes {'all ended' if ended else 'until one did not end'}; the last results "
            f"of {len(part['wrong']) or 'none'} of them differ from the reference's.",
        ]
        failures += [] if ended else [f"launches: {part['end']}"]
        failures += [f"{name}: {', '.join(found)}" for name, found in part["wrong"].items()]
    part = data.get("repeats")
    if part is not None:
        table = [
            [row["name"], str(row["repeats"]), *(str(n) for n in row["differing"].values())]
            for row in part["rows"]
        ]
        names = list(part["rows"][0]["differing"]) if part["rows"] else []
        lines += [
            "",
            "Elements whose bits differed from the first pass's in any later one; without "
            "`deterministic` dq is added up in any order:",
            "",
            *markdown_table(["Problem", "passes", *names], table),
        ]
        failures += [] if part["end"] == "exit code 0" else [f"repeats: {part['end']}"]
        failures += [f"{row['name']}: wrong {', '.join(row['wrong'])}"
                     for row in part["rows"] if row["wrong"]]  # fmt: skip
    return [*lines, "", *failures_of(failures)]


def sanitizer_block(data: dict[str, Any]) -> list[str]:
    """The section on one file of compute-sanitizer's."""
    found, wanted = data["sanitizer"], len(data["settings"]["cases"])
    lines = heading("compute-sanitizer", data)
    if found["path"] == "none":
        return [*lines, "", "The machine had no compute-sanitizer.", ""]
    table, failures = [], []
    for row in data["rows"]:
        right = sum(text == "right" for text in row["cases"].values())
        summary = "; ".join(row["summaries"]) or "–"
        table.append([row["tool"], f"{right} of {wanted}", summary, str(row["seconds"])])
        failures += [f"{row['tool']}, {count} times: {text}"
                     for text, count in row["reports"].items()]  # fmt: skip
        if row["end"] != "exit code 0":
            failures.append(f"{row['tool']}: {row['end']}")
        failures += [f"{row['tool']}, {name}: {text}"
                     for name, text in row["cases"].items() if text != "right"]  # fmt: skip
    lines += [
        f"Version {found['version']}; small problems ({', '.join(data['settings']['cases'])}), "
        "forward and backward, by the Hopper kernels, results compared with the CPU's.",
        "",
        *markdown_table(["Tool", "right", "summary", "seconds"], table),
        "",
    ]
    return lines + (["Reported:", "", *[f"- {x}" for x in failures], ""] if failures else [])
