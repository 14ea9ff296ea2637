"""Types of command-line arguments that several tools take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path


def names_among(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A type for argparse: names of ``known``, separated by commas."""
    names = list(known)

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(names):
            raise argparse.ArgumentTypeError(f"takes {', '.join(names)}, found {text}")
        return found

    return parse


def existing_folder(text: str) -> Path:
    """A type for argparse: a folder that is there."""
    folder = Path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return folder
