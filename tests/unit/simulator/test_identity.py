"""What makes a root filesystem a Jetson's, and a host itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from simulator import identity
from simulator.definition import HostSpec
from simulator.errors import Problem

ORIN = HostSpec("orin-a", "36.4.7", "12.6")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root filesystem as far as identity looks at it."""
    for folder in (
        "etc/alternatives",
        "etc/python3.11",
        "etc/ssh",
        "etc/sudoers.d",
        "home/jetson",
        "usr/lib/python3.11",
        "usr/local",
        "var/lib/dpkg/info",
        "var/lib/systemd",
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text("Package: bash\nStatus: install ok installed\nVersion: 5\n\n")
    (tmp_path / "etc/python3.11/sitecustomize.py").write_text("# Debian's\n")
    (tmp_path / "usr/lib/python3.11/sitecustomize.py").symlink_to("/etc/python3.11/sitecustomize.py")
    (tmp_path / "usr/lib/python3.11/EXTERNALLY-MANAGED").write_text("[externally-managed]\n")
    monkeypatch.setattr(os, "chown", lambda *_: None)
    return tmp_path


def test_the_release_file_is_exactly_a_devices() -> None:
    first = identity.nv_tegra_release("36.4.7").splitlines()[0]
    assert first == (
        "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, "
        "DATE: Thu Sep 18 22:54:44 UTC 2025"
    )
    assert re.match(r"^# R(\d+) \(release\), REVISION: ([\d.]+)", identity.nv_tegra_release("36.5.0"))


def test_the_device_tree_is_nul_terminated() -> None:
    assert identity.device_tree(ORIN) == {
        "model": b"NVIDIA Jetson AGX Orin Developer Kit\0",
        "compatible": b"nvidia,p3737-0000+p3701-0000\0nvidia,tegra234\0",
    }


def test_a_jetpack_6_host(root: Path) -> None:
    identity.apply_platform(root, ORIN)
    assert (root / "etc/nv_tegra_release").read_text().startswith("# R36 (release), REVISION: 4.7, ")
    status = (root / "var/lib/dpkg/status").read_text()
    assert status.count("\n\n") == 2 and status.endswith("\n\n")
    assert "Package: nvidia-l4t-core\nStatus: install ok installed\n" in status
    assert "\nVersion: 36.4.7-20250918154033\n" in status
    checksum, name = (root / "var/lib/dpkg/info/nvidia-l4t-core.md5sums").read_text().split()
    assert checksum == hashlib.md5((root / name).read_bytes(), usedforsecurity=False).hexdigest()
    assert os.readlink(root / "usr/local/cuda") == "/etc/alternatives/cuda"
    assert os.readlink(root / "etc/alternatives/cuda") == "/usr/local/cuda-12.6"
    version = json.loads((root / "usr/local/cuda-12.6/version.json").read_text())
    assert version["cuda"]["version"].startswith("12.6.")
    assert not (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").exists()
    # through Ubuntu's link, not instead of it
    assert (root / "usr/lib/python3.11/sitecustomize.py").is_symlink()
    assert "apport_python_hook" in (root / "etc/python3.11/sitecustomize.py").read_text()


def test_registering_twice_is_registering_once(root: Path) -> None:
    identity.apply_platform(root, ORIN)
    once = (root / "var/lib/dpkg/status").read_text()
    identity.apply_platform(root, ORIN)
    assert (root / "var/lib/dpkg/status").read_text() == once


def test_a_jetpack_7_host_keeps_the_marker_and_needs_no_toolkit(root: Path) -> None:
    identity.apply_platform(root, HostSpec("thor", "38.4.0", None))
    assert (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").exists()
    assert list((root / "usr/local").iterdir()) == []


def test_ubuntus_sitecustomize_runs_without_apport(root: Path) -> None:
    exec(compile(identity.SITECUSTOMIZE, "sitecustomize.py", "exec"), {})


@pytest.mark.parametrize(("password", "rule"), [(None, "NOPASSWD: ALL"), ("secret", "ALL")])
def test_a_host_is_itself(root: Path, password: str | None, rule: str) -> None:
    (root / "etc/ssh/ssh_host_rsa_key").write_text("of the snapshot")
    (root / "var/lib/systemd/random-seed").write_text("of the snapshot")
    spec = HostSpec("orin-x", "36.4.7", "12.6", sudo_password=password)
    identity.apply_person(root, spec, "ssh-ed25519 AAAA fleet\n", "private\n", "public\n")
    first = (root / "etc/machine-id").read_text()
    assert re.fullmatch(r"[0-9a-f]{32}\n", first)
    assert (root / "etc/hostname").read_text() == "orin-x\n"
    assert sorted(path.name for path in (root / "etc/ssh").iterdir()) == [
        "ssh_host_ed25519_key",
        "ssh_host_ed25519_key.pub",
    ]
    assert (root / "etc/ssh/ssh_host_ed25519_key").stat().st_mode & 0o777 == 0o600
    assert (root / "etc/sudoers.d/90-jetson").read_text() == f"jetson ALL=(ALL:ALL) {rule}\n"
    assert (root / "etc/sudoers.d/90-jetson").stat().st_mode & 0o777 == 0o440
    assert not (root / "var/lib/systemd/random-seed").exists()
    identity.apply_person(root, spec, "ssh-ed25519 AAAA fleet\n", "private\n", "public\n")
    assert (root / "etc/machine-id").read_text() != first


def test_a_link_never_leads_out_of_the_root(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (root / "etc/sudoers.d").rmdir()
    (root / "etc/sudoers.d").symlink_to(outside)
    with pytest.raises(Problem, match="leads out"):
        identity.apply_person(root, ORIN, "key\n", "private\n", "public\n")
    assert list(outside.iterdir()) == []
    (root / "etc/nv_tegra_release").symlink_to(outside / "file")
    identity.apply_platform(root, ORIN)
    assert list(outside.iterdir()) == []
