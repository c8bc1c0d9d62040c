"""An installed component: is it the one that is wanted, whole, and how did it come to be."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any, Dict, NamedTuple, Optional

from ansible_collections.jetson.mamba.plugins.module_utils import build, files, records, versions
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

SCHEMA = 1
NV_RELEASE = "/etc/nv_tegra_release"


class Place(NamedTuple):
    """Where a component is installed.

    Args:
        python: the interpreter that installs.
        site_packages: the folder that it installs into.
        state: the folder of this environment's records.
        user: install into the user's site rather than into an environment.
    """

    python: str
    site_packages: str
    state: str
    user: bool = False


def record_path(place: Place, component: str) -> str:
    """Return the file that says how a component came to be."""
    return os.path.join(place.state, component + ".json")


def query(place: Place, component: str, version: str, key: str) -> Dict[str, Any]:
    """Compare what is installed with what is wanted. The files are believed, the record only beside them.

    Returns:
        {reason: why it must be installed, or None; installed: version or None; record}.
    """
    record = build.read_json(record_path(place, component))
    found = records.survey(place.site_packages, [component]).get(records.canonical_name(component))
    return {
        "reason": _reason(found, record, component, version, key),
        "installed": found["version"] if found else None,
        "record": record,
    }


def _reason(
    found: Optional[Dict[str, Any]], record: Optional[Dict[str, Any]], component: str, version: str, key: str
) -> Optional[str]:
    if not found:
        return f"{component} is not installed"
    if not versions.same_version(str(found["version"]).split("+")[0], version):
        return "{} {} is installed, {} is wanted".format(component, found["version"], version)
    if found["damage"]:
        return "{} is damaged: {}".format(component, found["damage"])
    if not record:
        return f"nothing says how the installed {component} was built"
    if record.get("key") != key:
        return f"{component} was built from other inputs (key {str(record.get('key'))[:12]}, wanted {key[:12]})"
    return None


def install(place: Place, component: str, version: str, wheel: str, record: Dict[str, Any]) -> Dict[str, Any]:
    """Install a wheel and write down how it came to be, last.

    Args:
        wheel: path of the wheel on the device; record["wheel_sha256"] is checked against it.
        record: what to remember; key, version, class_id, sm, build_flags, source_sha256, origin, wheel, wheel_sha256.

    Returns:
        The record as written.

    Raises:
        Problem: the wheel is another, pip fails, or what is installed afterwards is not whole.
    """
    found = files.sha256_file(wheel)
    if found != record["wheel_sha256"]:
        raise Problem(
            f"{wheel} has the sha256 {found}",
            "sha256 {}, as in the wheelhouse".format(record["wheel_sha256"]),
            "run again, to have it sent anew; if it stays, look at the device's storage (dmesg)",
        )
    path = record_path(place, component)
    if os.path.exists(path):
        # an interrupted installation must not be taken for the one that this tells of
        os.unlink(path)
    command = [place.python, "-m", "pip", "install", "--no-index", "--no-deps", "--force-reinstall", "--no-cache-dir"]
    command += ["--user", wheel] if place.user else [wheel]
    environment = {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME") if name in os.environ}
    environment.update(
        LC_ALL="C.UTF-8",
        PATH="/usr/local/bin:/usr/bin:/bin",
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_INPUT="1",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        raise Problem(
            "pip could not install {}:\n    {}".format(wheel, "\n    ".join(build.tail(output, 20))),
            "exit status 0 of: {}".format(" ".join(command)),
            "cure what pip says, then run again; nothing is built anew",
        )
    installed = records.survey(place.site_packages, [component]).get(records.canonical_name(component))
    if not installed or installed["damage"]:
        raise Problem(
            f"after pip's success {component} is {installed['damage'] if installed else 'not in that folder'}",
            f"{component} {version} whole in {place.site_packages}",
            f"check that {place.python} installs there: {place.python} -m site",
        )
    written = dict(
        record,
        schema=SCHEMA,
        component=component,
        l4t=l4t_line(),
        installed_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    files.write_atomic(path, (json.dumps(written, indent=1, sort_keys=True) + "\n").encode("utf-8"), 0o644)
    return written


def l4t_line(path: str = NV_RELEASE) -> Optional[str]:
    """Return the first line of the L4T release file, or None where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.readline().strip() or None
    except OSError:
        return None
