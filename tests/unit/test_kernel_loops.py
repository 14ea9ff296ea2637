"""A trap of Triton's front end: values that loops carry under two names.

A loop carries the variables whose value at the end of its body is another than at its begin. Where
``x = y`` stands before the loop and again in it, before y changes, both are the same value while
Triton looks: it does not carry x, which then keeps its first value for ever.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "src" / "flash_attn" / "kernels").glob("*.py"))


def copies(statements: list[ast.stmt]) -> set[tuple[str, str]]:
    """(x, y) of all ``x = y`` in a block, nested ones too."""
    return {
        (node.targets[0].id, node.value.id)
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Name)
    }


def twice_named(source: str) -> list[str]:
    """Functions and pairs of names, as "function: x = y"."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for loop in ast.walk(function):
            if not isinstance(loop, ast.For | ast.While):
                continue
            before = [x for x in ast.walk(function) if isinstance(x, ast.Assign)]
            outside = copies([x for x in before if x.lineno < loop.lineno])
            found += [f"{function.name}: {x} = {y}" for x, y in outside & copies(loop.body)]
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_value_is_carried_under_two_names(path: Path) -> None:
    assert twice_named(path.read_text()) == []


def test_the_trap_is_seen() -> None:
    source = """
def kernel(rows):
    row = 0
    before = row
    for i in range(rows):
        use(before)
        before = row
        row += 1
"""
    assert twice_named(source) == ["kernel: before = row"]
    assert (
        twice_named(source.replace("before = row\n    for", "before = row + zero()\n    for")) == []
    )
