"""The system packages that the simulator needs, named before they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from simulator.errors import Problem


@dataclass(frozen=True)
class Requirement:
    """A Debian or Ubuntu package, and what shows that it is there.

    Args:
        package: its name for apt.
        shown_by: commands on PATH, or absolute paths of files.
        why: what it is for.
    """

    package: str
    shown_by: tuple[str, ...]
    why: str

    def missing(self) -> bool:
        """Tell whether anything of it is missing on this machine."""
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        return not all(
            Path(sign).exists() if sign.startswith("/") else shutil.which(sign, path=path) for sign in self.shown_by
        )


REQUIREMENTS = (
    Requirement("debian-archive-keyring", ("/usr/share/keyrings/debian-archive-keyring.gpg",), "Debian's signatures"),
    Requirement("iproute2", ("ip",), "the fleet's network"),
    Requirement("mmdebstrap", ("mmdebstrap",), "making the Debian base"),
    Requirement("openssh-client", ("ssh", "ssh-keygen"), "keys, and reaching the hosts"),
    Requirement("socat", ("socat",), "reaching the hosts from outside their network"),
    Requirement("util-linux", ("nsenter", "unshare"), "namespaces"),
)
INSTALL = "python -m simulator requirements --install"


def missing() -> list[Requirement]:
    """Return the requirements that this machine lacks."""
    return [requirement for requirement in REQUIREMENTS if requirement.missing()]


def check() -> None:
    """Raise a Problem that names every missing package."""
    lacking = missing()
    if lacking:
        names = ", ".join(f"{item.package} ({item.why})" for item in lacking)
        raise Problem(f"missing system packages: {names}", "all of them installed", INSTALL)


def install() -> None:
    """Install what is missing by apt. Raises Problem if that cannot be done."""
    names = [item.package for item in missing()]
    if not names:
        return
    if shutil.which("apt-get") is None:
        raise Problem("this machine has no apt-get", "Debian or Ubuntu", f"install by its own means: {' '.join(names)}")
    if os.geteuid() != 0:
        raise Problem(f"user id {os.geteuid()}", "root, to install packages", f"sudo apt-get install {' '.join(names)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *names]
    for argv in (["apt-get", "update"], command):
        done = subprocess.run(argv, env=environment, check=False)
        # a source that does not answer need not be the one that has these packages
        if done.returncode != 0 and argv is command:
            raise Problem(f"{' '.join(argv)} ended with {done.returncode}", "the packages installed", "see its output")
    check()
