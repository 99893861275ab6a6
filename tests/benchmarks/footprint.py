"""Time and memory of a piece of work in this process, above what the process held before."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable

import psutil


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, seconds of the processors ("cpu"), and bytes.

    peak: the largest resident set (ru_maxrss), in which pages of files that are mapped count as well. private: the largest
    resident set less the pages of files, sampled every 5 ms: what the system cannot take back.
    """
    process, over, most = psutil.Process(), threading.Event(), 0

    def private() -> int:
        held = process.memory_info()
        return held.rss - getattr(held, "shared", 0)

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, private())

    before, before_private = process.memory_info().rss, private()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start, used = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    over.set()
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "cpu": cpu, "peak": peak - before, "private": most - before_private}
