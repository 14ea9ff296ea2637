"""Clocks: of a call on a device from a cold L2 cache, and of a call on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

FLUSH_BYTES = 256 << 20
CYCLES_PER_SECOND = 1.9e9


class DeviceLostError(RuntimeError):
    """The GPU context is gone: nothing further can run in this process."""


class CudaClock:
    """Times calls with device events, from a cold L2 cache and without launch costs."""

    def __init__(self, budget: float = 0.05) -> None:
        self.budget = budget
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds of one warm call on the device, and until it returns on the host."""
        call()
        self.synchronize()
        start, end = self._events()
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        host = time.perf_counter() - began
        self.synchronize()
        return max(start.elapsed_time(end) * 1e-3, 5e-6), host

    def measure(self, call: Callable[[], object]) -> float:
        """Median milliseconds of ``call``."""
        device, host = self._estimate(call)
        # While the device sleeps the host queues the whole call: its cost stays out of the figure.
        sleep = min(0.01, 1.5 * host)
        count = int(min(50, max(5, self.budget / (device + sleep + 1e-4))))
        pairs = [self._events() for _ in range(count)]
        for start, end in pairs:
            self.scratch.zero_()
            torch.cuda._sleep(int(sleep * CYCLES_PER_SECOND))
            start.record()
            call()
            end.record()
        self.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)


class HostClock:
    """Times calls on the CPU: to try the tool out, not to compare providers."""

    def synchronize(self) -> None:
        pass

    def measure(self, call: Callable[[], object]) -> float:
        """Median milliseconds of three calls."""
        times = []
        for _ in range(3):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)


Clock = CudaClock | HostClock


def rotations(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """``rounds`` orders of ``names``, each beginning one further on."""
    for start in range(rounds):
        shift = start % len(names) if names else 0
        yield [*names[shift:], *names[:shift]]
