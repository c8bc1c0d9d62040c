"""Send files to a device: large ones one by one, small ones in one archive, and say that it goes on."""

from __future__ import annotations

import os
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from ansible_collections.jetson.mamba.plugins.module_utils.wheels import SMALL_FILES

# below this a transfer of its own costs more than its bytes
SMALL_BYTES = 4 << 20
PROGRESS_SECONDS = 15.0


class StillWorking:
    """While the body runs, report every 15 seconds what is going on and for how long.

    Args:
        report: called with a line of text, from another thread.
        what: what is going on.
    """

    def __init__(self, report: Callable[[str], None], what: str, interval: float = PROGRESS_SECONDS) -> None:
        self._report = report
        self._what = what
        self._interval = interval
        self._over = threading.Event()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> StillWorking:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self._report(f"{self._what}, for {time.monotonic() - self._started:.0f} s")


def pack(paths: Sequence[str], folder: str | Path) -> list[tuple[str, str]]:
    """Return (local path, name on the device) of what is to be sent, with small files packed into one archive.

    Args:
        paths: files on the controller, with different names.
        folder: where the archive is written; it is the caller's to remove.
    """
    small = [path for path in paths if os.path.getsize(path) < SMALL_BYTES]
    large = [(path, os.path.basename(path)) for path in paths if path not in small]
    if len(small) < 2:
        return large + [(path, os.path.basename(path)) for path in small]
    archive = os.path.join(folder, SMALL_FILES)
    with tarfile.open(archive, "w") as tar:
        for path in small:
            tar.add(os.path.realpath(path), arcname=os.path.basename(path))
    return [(archive, SMALL_FILES), *large]
