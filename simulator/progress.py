"""What a person sees while something takes its time: a line at least every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

INTERVAL_S = 10.0


def say(text: str) -> None:
    """Print one line of progress on stderr, so that stdout stays for what was asked for."""
    print(f"[simulator] {text}", file=sys.stderr, flush=True)


class Waiting:
    """A block that may take long: names what it does, and says every ten seconds that it still does.

    Args:
        what: what is being done, as a phrase.
        expect: how long it usually takes, as people say it.
    """

    def __init__(self, what: str, expect: str = "") -> None:
        self.what = what
        self.expect = expect
        self.started = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Waiting:
        self.started = time.monotonic()
        say(f"{self.what}{f' (usually {self.expect})' if self.expect else ''} …")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        say(f"{self.what}: {'done' if kind is None else 'failed'} after {self.seconds():.1f} s")

    def seconds(self) -> float:
        """Return the seconds since the block was entered."""
        return time.monotonic() - self.started

    def _tick(self) -> None:
        while not self._over.wait(INTERVAL_S):
            say(f"still: {self.what} ({self.seconds():.0f} s)")
