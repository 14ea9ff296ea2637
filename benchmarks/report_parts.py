"""Parts that the README's sections on results are made of. It needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table whose first column is text and whose others are right-aligned figures."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]


def figure(value: float | None, digits: int = 2) -> str:
    """A number for a table, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def failures_of(lines: Sequence[str]) -> list[str]:
    """What a section ends with where something has no figure."""
    return ["Without a figure:", "", *[f"- {line}" for line in lines], ""] if lines else []


def environment_sentence(data: dict[str, Any]) -> str:
    """Where, with what and when the figures were measured."""
    env = data["environment"]
    commit = env["commit"] if env["commit"] == "unknown" else env["commit"][:12]
    return (
        f"Measured on {env['date'].split()[0]} on one {env['gpu']} (driver {env['driver']}, "
        f"PyTorch {env['torch']}, Triton {env['triton']}, Python {env['python']}; "
        f"commit {commit}, source {env['source']})."
    )


def heading(title: str, data: dict[str, Any]) -> list[str]:
    """A section's first lines."""
    return [f"#### {title}, {data['environment']['gpu']}", "", environment_sentence(data)]
