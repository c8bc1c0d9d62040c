"""What a user installs later must neither replace torch, torchvision or numpy, nor fetch a torchvision that can't work.

Asked of pip's own resolver, for the platform row of the guide (JetPack 6.1 to 6.2, Python 3.10 on aarch64), against the
package index that pip is configured with. torch and torchvision are stood in for by empty wheels of the same names,
versions and requirements; only metadata is downloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.module_utils import environment, versions
from ansible_collections.jetson.mamba.plugins.plugin_utils import locks

DATA = Path(__file__).parents[2] / "collections/ansible_collections/jetson/mamba/plugins/data"
GLIBC = "2.35"


def row(name: str) -> dict:
    """Return a platform row."""
    platforms = yaml.safe_load((DATA / "platforms.yml").read_text(encoding="utf-8"))["platforms"]
    return next(platform for platform in platforms if platform["id"] == name)


def make_wheel(folder: Path, filename: str, version: str, requires: list[str]) -> None:
    """Write an empty wheel."""
    name = filename.split("-")[0]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / filename, "w") as archive:
        tag = "-".join(filename[: -len(".whl")].split("-")[-3:])
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        lines = [f"Requires-Dist: {requirement}\n" for requirement in requires]
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{''.join(lines)}"
        )
        archive.writestr(f"{info}/RECORD", "")


def fake_wheels(folder: Path, platform: dict) -> None:
    """Write stand-ins of a row's wheels; names as pip spells the version, since an index is asked by that."""
    torch = versions.pip_spelling(platform["torch"]["version"])
    make_wheel(
        folder,
        f"torch-{torch}-cp310-cp310-linux_aarch64.whl",
        torch,
        ["filelock", "typing-extensions>=4.8.0", "networkx", "jinja2", "fsspec", "sympy==1.13.1"],
    )
    if platform["torchvision"]:
        vision = platform["torchvision"]["version"]
        make_wheel(
            folder,
            f"torchvision-{vision}-cp310-cp310-linux_aarch64.whl",
            vision,
            ["numpy", f"torch=={torch}", "pillow!=8.3.*,>=5.3.0"],
        )


def resolve(tmp_path: Path, constraints: list[str], *wanted: str) -> tuple[dict[str, str], str]:
    """Return {name: version} of what pip would install, and its error output."""
    file = tmp_path / "constraints.txt"
    file.write_text(environment.constraints_text(constraints), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command += ["--target", str(tmp_path / "target"), "--only-binary", ":all:", "--python-version", "3.10"]
    command += ["--implementation", "cp", "--abi", "cp310", "--find-links", str(tmp_path), "--constraint", str(file)]
    for tag in versions.platform_tags("aarch64", GLIBC):
        command += ["--platform", tag]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if done.returncode:
        return {}, done.stderr
    report = json.loads(done.stdout)
    found = [item["metadata"] for item in report["install"]]
    return {versions.canonical_name(item["name"]): item["version"] for item in found}, ""


def lines_of(platform: dict) -> list[str]:
    """Return the constraints that an environment of this row gets."""
    entries = locks.read_lock(DATA / "locks" / platform["lock"])
    wheels = [{"name": entry.name, "version": entry.version} for entry in entries]
    wheels += [dict(platform[name], name=name) for name in ("torch", "torchvision") if platform[name]]
    return environment.constraint_lines(wheels, platform["torchvision_version"])


@pytest.mark.parametrize("wanted", ["ultralytics", "timm"])
def test_torch_torchvision_and_numpy_stay(tmp_path: Path, wanted: str) -> None:
    platform = row("jetpack-6.1-6.2")
    fake_wheels(tmp_path, platform)
    chosen, error = resolve(tmp_path, lines_of(platform), wanted)
    assert not error
    locked = locks.read_lock(DATA / "locks" / platform["lock"])
    assert versions.same_version(chosen["torch"], platform["torch"]["version"])
    assert versions.same_version(chosen["torchvision"], platform["torchvision"]["version"])
    assert chosen["numpy"] == locks.find_version(locked, "numpy")


def test_without_the_torchvision_line_another_one_is_fetched(tmp_path: Path) -> None:
    """The trap itself: should this begin to fail, the test above proves nothing any more."""
    platform = row("jetpack-6.1-6.2")
    fake_wheels(tmp_path, dict(platform, torchvision=None))
    kept = [line for line in lines_of(platform) if not line.startswith("torchvision")]
    chosen, error = resolve(tmp_path, kept, "timm")
    assert not error
    assert not versions.same_version(chosen["torchvision"], platform["torchvision"]["version"])


def test_a_platform_without_torchvision_refuses_a_wrong_one(tmp_path: Path) -> None:
    platform = row("jetpack-6.0")
    fake_wheels(tmp_path, platform)
    chosen, error = resolve(tmp_path, lines_of(platform), "torchvision")
    assert not chosen
    assert "torchvision" in error and "conflict" in error.lower()
