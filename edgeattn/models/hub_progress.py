"""How much of a download has reached the disk, from what huggingface_hub tells a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int], None]


def byte_counter(total: int, progress: Progress | None) -> type[Any]:
    """A class that huggingface_hub takes for a progress bar, one instance per file.

    Bytes that reach the disk are counted, not those on the wire: hf_xet reports both.
    """

    class Counter:
        done = 0

        def __init__(self, *args: object, initial: int = 0, **options: object) -> None:
            self.total = self.n = 0
            self.update(initial)

        def update(self, count: float | None = 1) -> None:
            Counter.done += int(count or 0)
            if progress and total:
                progress(min(Counter.done, total), total)

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *raised: object) -> None:
            pass

        def _ignore(self, *args: object, **options: object) -> None:
            pass

        update_transfer = set_postfix_str = set_transfer_postfix_str = refresh = close = _ignore

    return Counter
