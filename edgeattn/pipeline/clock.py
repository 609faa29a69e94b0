"""Wall seconds per stage, progress, and how often Python looks for garbage meanwhile."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]


class Clock:
    """Wall seconds per stage, and the current stage's progress.

    Args:
        progress: called with (stage, done, total).
    """

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress
        self._stage = ""
        self._began = 0.0

    def start(self, stage: str) -> None:
        """Ends the current stage and begins another."""
        self.stop()
        self._stage, self._began = stage, time.perf_counter()
        self.count(0, 1)

    def stop(self) -> None:
        """Ends the current stage, if there is one."""
        if self._stage:
            spent = time.perf_counter() - self._began
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + spent
            self._stage = ""

    def count(self, done: int, total: int) -> None:
        """Tells how far the current stage is."""
        if self.progress:
            self.progress(self._stage, done, total)

    def staged(self, stage: str) -> Callable[[int, int], None]:
        """A counter of a stage that may not happen: it starts when first counted."""

        def count(done: int, total: int) -> None:
            if self._stage != stage:
                self.start(stage)
            self.count(done, total)

        return count


@contextmanager
def rare_collections() -> Iterator[None]:
    """Looks for garbage less often.

    Importing and running torch's exporter makes millions of objects that live to the end; searching
    them every 700 allocations was measured at a fifth of an export's time.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
