"""Versions and wheel names: which spellings mean the same thing, and which wheels fit which machine."""

from __future__ import annotations

import re
from typing import NamedTuple

_VERSION = re.compile(
    r"""
    v?(?:(?P<epoch>\d+)!)?
    (?P<release>\d+(?:\.\d+)*)
    (?:[-_.]?(?P<pre>alpha|a|beta|b|preview|pre|c|rc)[-_.]?(?P<pre_number>\d*))?
    (?:-(?P<implicit_post>\d+)|[-_.]?(?P<post>post|rev|r)[-_.]?(?P<post_number>\d*))?
    (?:[-_.]?(?P<dev>dev)[-_.]?(?P<dev_number>\d*))?
    (?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?
    """,
    re.VERBOSE,
)
_PRE_LETTER = {"alpha": "a", "beta": "b", "c": "rc", "pre": "rc", "preview": "rc"}
# NVIDIA writes nv<year>.<month> and, in file names only, the number of the build behind it
_NV_RELEASE = re.compile(r"nv\d{2}")
_BUILD_ID_DIGITS = 5

# the oldest glibc that a manylinux tag can mean is 2.5; each legacy name stands for one version
_LEGACY_MANYLINUX = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_(\w+)")
_LEGACY_TAG = re.compile(r"(manylinux1|manylinux2010|manylinux2014)_(\w+)")


class Target(NamedTuple):
    """What a wheel is for: machine ("aarch64"), Python ("3.10") and the newest glibc that is there ("2.35")."""

    machine: str
    python: str
    glibc: str

    @classmethod
    def from_dict(cls, data: dict[str, str]) -> Target:
        """Return the target that a mapping with the keys machine, python and glibc describes.

        Raises:
            ValueError: a key is missing, or python or glibc is no major.minor version.
        """
        missing = [key for key in ("machine", "python", "glibc") if not data.get(key)]
        if missing:
            raise ValueError("target lacks {}".format(", ".join(missing)))
        for key in ("python", "glibc"):
            if not re.match(r"\d+\.\d+", str(data[key])):
                raise ValueError(f"target's {key} is {data[key]!r}, not a version such as 3.10")
        major_minor = ".".join(str(data["python"]).split(".")[:2])
        return cls(str(data["machine"]), major_minor, ".".join(str(data["glibc"]).split(".")[:2]))

    @property
    def abi(self) -> str:
        """The CPython ABI, e.g. cp310."""
        return "cp" + self.python.replace(".", "")

    def describe(self) -> str:
        """Return the target in words for a message."""
        return f"Python {self.python} on {self.machine} with glibc {self.glibc}"


class WheelName(NamedTuple):
    """The parts of a wheel's file name; tags are lists because a name can stand for several."""

    name: str
    version: str
    build: str
    pythons: list[str]
    abis: list[str]
    platforms: list[str]


def canonical_name(name: str) -> str:
    """Return a distribution's name as PEP 503 normalises it ("Mamba_SSM" -> "mamba-ssm")."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _parse(version: str) -> tuple[tuple[object, ...], tuple[object, ...]] | None:
    """Return (comparable public part, normalised local segments), or None for what is no PEP 440 version."""
    match = _VERSION.fullmatch(version.strip().lower())
    if not match:
        return None
    release = [int(part) for part in match["release"].split(".")]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    pre = (_PRE_LETTER.get(match["pre"], match["pre"]), int(match["pre_number"] or 0)) if match["pre"] else None
    post: int | None = None
    if match["implicit_post"]:
        post = int(match["implicit_post"])
    elif match["post"]:
        post = int(match["post_number"] or 0)
    dev = int(match["dev_number"] or 0) if match["dev"] else None
    public = (int(match["epoch"] or 0), tuple(release), pre, post, dev)
    segments = re.split(r"[-_.]", match["local"]) if match["local"] else []
    return public, tuple(int(segment) if segment.isdigit() else segment for segment in segments)


def _is_nv_build(shorter: tuple[object, ...], longer: tuple[object, ...]) -> bool:
    """Return whether `longer` is `shorter`, which ends in nvYY.MM, with a build number behind it."""
    return (
        len(shorter) >= 2
        and len(longer) == len(shorter) + 1
        and longer[: len(shorter)] == shorter
        and bool(_NV_RELEASE.fullmatch(str(shorter[-2])))
        and isinstance(shorter[-1], int)
        and isinstance(longer[-1], int)
        and len(str(longer[-1])) >= _BUILD_ID_DIGITS
    )


def same_version(first: str, second: str) -> bool:
    """Return whether two spellings mean one version.

    Both are normalised as PEP 440 says, the local part too (nv24.08 is nv24.8). One local part may be longer than the
    other only by the build number that NVIDIA puts into file names (nv24.08.17622132). What is no PEP 440 version is
    the same only as itself.
    """
    one, other = _parse(first), _parse(second)
    if one is None or other is None:
        return first.strip() == second.strip()
    if one[0] != other[0]:
        return False
    local, other_local = one[1], other[1]
    return local == other_local or _is_nv_build(local, other_local) or _is_nv_build(other_local, local)


def pip_spelling(version: str) -> str:
    """Return a version as pip shows it once installed: normalised local part, without NVIDIA's build number.

    "2.5.0a0+872d972e41.nv24.08.17622132" -> "2.5.0a0+872d972e41.nv24.8". The public part is left as it was.
    """
    parsed = _parse(version)
    if parsed is None or not parsed[1]:
        return version
    local = parsed[1]
    if _is_nv_build(local[:-1], local):
        local = local[:-1]
    return version.strip().split("+")[0] + "+" + ".".join(str(segment) for segment in local)


def matching_torchvision(torch_version: str) -> str | None:
    """Return the torchvision series made for a torch version, as a specifier's value ("2.5.0a0+…" -> "0.20.*").

    torchvision 0.(15 + n) belongs to torch 2.n; for other majors None.
    """
    match = re.match(r"2\.(\d+)(?!\d)", torch_version.strip())
    return f"0.{15 + int(match.group(1))}.*" if match else None


def parse_wheel_name(filename: str) -> WheelName:
    """Return the parts of a wheel's file name.

    Raises:
        ValueError: the name does not have a wheel's five or six parts.
    """
    stem = filename[: -len(".whl")] if filename.endswith(".whl") else ""
    parts = stem.split("-")
    if len(parts) not in (5, 6) or not all(parts):
        raise ValueError(f"{filename} is not a wheel's file name (name-version-python-abi-platform.whl)")
    build = parts[2] if len(parts) == 6 else ""
    pythons, abis, platforms = (part.split(".") for part in parts[-3:])
    return WheelName(parts[0], parts[1], build, pythons, abis, platforms)


def platform_tags(machine: str, glibc: str) -> list[str]:
    """Return the platform tags that run on a machine with this glibc, best first (x86_64, 2.36 -> manylinux_2_36 …)."""
    major, minor = (int(part) for part in glibc.split(".")[:2])
    if major != 2:
        raise ValueError(f"glibc {glibc}: only 2.x is known")
    # aarch64 begins with manylinux2014
    oldest = 5 if machine in ("x86_64", "i686") else 17
    legacy = {version[1]: name for name, version in _LEGACY_MANYLINUX.items()}
    tags = []
    for number in range(minor, oldest - 1, -1):
        tags.append(f"manylinux_2_{number}_{machine}")
        if number in legacy:
            tags.append(f"{legacy[number]}_{machine}")
    return [*tags, "linux_" + machine]


def _python_fits(python: str, abi: str, target: Target) -> bool:
    wanted = target.abi
    if python == wanted:
        return abi in (wanted, "abi3", "none")
    match = re.fullmatch(r"(py|cp)(\d)(\d*)", python)
    if not match or match.group(2) != target.python.split(".")[0]:
        return False
    minor, wanted_minor = int(match.group(3) or 0), int(target.python.split(".")[1])
    if match.group(1) == "py":
        return abi == "none" and minor <= wanted_minor
    return abi == "abi3" and minor <= wanted_minor


def tag_mismatch(wheel: WheelName, target: Target) -> str | None:
    """Return why a wheel of this name cannot be for the target, or None where it fits."""
    if not any(_python_fits(python, abi, target) for python in wheel.pythons for abi in wheel.abis):
        return "it is for {}-{}, not for Python {}".format(".".join(wheel.pythons), ".".join(wheel.abis), target.python)
    fitting: set[str] = {"any", *platform_tags(target.machine, target.glibc)}
    if not fitting.intersection(wheel.platforms):
        return "it is for {}, not for {} with glibc {}".format(".".join(wheel.platforms), target.machine, target.glibc)
    return None
