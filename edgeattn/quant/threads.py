"""Work on independent pieces, spread over the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch


def for_each(work: Callable[[int], None], pieces: Iterable[int]) -> None:
    """Calls `work` for every piece, on as many threads as torch uses, each running torch alone.

    torch would rather share every single operation between its threads. For operations of
    microseconds that is slow, and many times slower where another process holds a core: the
    threads wait for each other by spinning.
    """
    inference = torch.is_inference_mode_enabled()  # torch keeps it per thread

    def in_thread(piece: int) -> None:
        with torch.inference_mode(inference):
            work(piece)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(in_thread, pieces):
            pass
