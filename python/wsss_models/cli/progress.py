"""A progress bar on a terminal, a line now and then everywhere else."""

from __future__ import annotations

import sys
import time

try:
    from tqdm import tqdm
except ModuleNotFoundError:  # plain lines do
    tqdm = None

_SECONDS = 10.0  # between two plain lines


class Progress:
    """Counts pictures. `with Progress(total) as progress: progress.add(); progress.say("text")`; all on stderr."""

    def __init__(self, total: int, unit: str = "picture") -> None:
        self._total, self._unit, self._done = total, unit, 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total, unit=unit) if tqdm is not None and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(count)
        elif now - self._last >= _SECONDS:
            self._last = now
            rate = self._done / (now - self._start)
            self.say(f"{self._done} of {self._total} {self._unit}s, {rate:.1f} a second")

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
