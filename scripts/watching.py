"""Reads what a child process prints, and ends it when it is silent for too long or time is up."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence


class Watched:
    """A child process, by the lines that it prints.

    Attributes:
        end: why there are no more lines: ``exit code N``, ``silent for N s`` or ``out of time``.
    """

    def __init__(
        self, command: Sequence[str], patience: float, until: float, env: Mapping[str, str]
    ) -> None:
        """``patience`` is in seconds, ``until`` a time of :func:`time.monotonic`."""
        self.patience, self.until, self.end = patience, until, ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._child = subprocess.Popen(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=dict(env), start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as stream:
            for line in stream:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def lines(self) -> Iterator[str]:
        """Every line, until the child ends or is ended."""
        while True:
            left = self.until - time.monotonic()
            try:
                line = self._lines.get(timeout=max(0.01, min(self.patience, left)))
            except queue.Empty:
                late = time.monotonic() >= self.until
                self.end = "out of time" if late else f"silent for {self.patience:.0f} s"
                self._kill()
                return
            if line is None:
                self.end = f"exit code {self._child.wait()}"
                return
            yield line

    def _kill(self) -> None:
        """End the child and its children: their group is of their own."""
        os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._reader.join(timeout=10)
