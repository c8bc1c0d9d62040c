"""Where pip is told to look for packages: asked of pip itself, so that its files and variables all count."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

from simulator.errors import Problem

# What `pip download` would use, from pip's defaults, files and environment, as pip itself merges them.
_QUESTION = """
import json
from pip._internal.commands import create_command
options, _ = create_command("download").parse_args([])
print(json.dumps({
    "index_urls": [] if options.no_index else [options.index_url, *options.extra_index_urls],
    "find_links": list(options.find_links),
    "trusted_hosts": list(options.trusted_hosts),
    "cert": options.cert,
    "timeout_s": float(options.timeout),
}))
"""


@dataclass(frozen=True)
class PipSettings:
    """The sources that pip is configured with: indexes, places of links, hosts, CA file and time-out in seconds."""

    index_urls: list[str] = field(default_factory=list)
    find_links: list[str] = field(default_factory=list)
    trusted_hosts: list[str] = field(default_factory=list)
    cert: str | None = None
    timeout_s: float = 15.0


def no_pip(reason: str) -> Problem:
    """Return the Problem of an interpreter without a working pip."""
    return Problem(
        f"{sys.executable} -m pip does not work: {reason}",
        "an interpreter with pip, whose settings say where packages come from",
        f"run: {sys.executable} -m ensurepip --upgrade",
    )


def read_pip_settings() -> PipSettings:
    """Return the sources that this interpreter's pip is configured with; raise Problem when there is no pip."""
    answer = subprocess.run(
        [sys.executable, "-c", _QUESTION], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if answer.returncode != 0:
        raise no_pip((answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1])
    return PipSettings(**json.loads(answer.stdout))
