"""Have a Chromium for the browser tests: install Debian's where this runs as root, else say what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.browser import chromium  # the repository's root has to be on the path first

# the first that the distribution has; Ubuntu's `chromium` is a snap, which a container cannot run
PACKAGES = ("chromium-headless-shell", "chromium")


def main() -> int:
    """Return 0 where a Chromium is there now."""
    found = chromium.find()
    if found:
        print(f"==> browser: {found}")
        return 0
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
        print("==> no Chromium is here: installing Debian's with apt-get, about 100 MB", flush=True)
        subprocess.run(["apt-get", "update", "-qq"], env=environment, check=False)
        for package in PACKAGES:
            argv = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package, "fonts-dejavu-core"]
            done = subprocess.run(argv, env=environment, stdout=subprocess.DEVNULL, check=False)
            if done.returncode == 0 and chromium.find():
                print(f"==> browser: {chromium.find()} ({package})")
                return 0
    print(
        f"found:    no Chromium on PATH ({', '.join(chromium.NAMES)})\n"
        "expected: one, to look at the fleet report with\n"
        f"next:     apt-get install {PACKAGES[0]} (Debian), or name the one that you have: {chromium.VARIABLE}=…",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
