"""What makes a Debian root filesystem look like a Jetson, and what makes one host differ from the next.

Everything here is a stand-in made of version files: there is no driver, compiler or library of NVIDIA's in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from pathlib import Path

from simulator.definition import HostSpec
from simulator.errors import Problem

USER = "jetson"
USER_ID = 1000
DEVICE_TREE = "firmware/devicetree/base"

# releases whose build stamps are known; another release gets a stamp that says that it is none
RELEASES = {
    "36.4.7": ("42132812", "Thu Sep 18 22:54:44 UTC 2025", "20250918154033"),
    "36.3.0": ("36191598", "Mon May  6 17:34:21 UTC 2024", "20240506102626"),
}
UNKNOWN_RELEASE = ("00000000", "Thu Jan  1 00:00:00 UTC 1970", "19700101000000")

CUDA_PATCHES = {"12.2": ("12.2.12", "12.2.140"), "12.6": ("12.6.11", "12.6.68")}

# as Ubuntu ships it, for its crash reporter
SITECUSTOMIZE = """\
# install the apport exception handler if available
try:
    import apport_python_hook
except ImportError:
    pass
else:
    apport_python_hook.install()
"""

DPKG_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}


def nv_tegra_release(l4t: str) -> str:
    """Return the text of /etc/nv_tegra_release for an L4T release."""
    major, _, revision = l4t.partition(".")
    gcid, date, _ = RELEASES.get(l4t, UNKNOWN_RELEASE)
    return (
        f"# R{major} (release), REVISION: {revision}, GCID: {gcid}, BOARD: generic, EABI: aarch64, DATE: {date}\n"
        "# KERNEL_VARIANT: oot\n"
        "TARGET_USERSPACE_LIB_DIR=nvidia\n"
        "TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\n"
    )


def l4t_core_version(l4t: str) -> str:
    """Return the dpkg version of nvidia-l4t-core for an L4T release."""
    return f"{l4t}-{RELEASES.get(l4t, UNKNOWN_RELEASE)[2]}"


def cuda_version_json(cuda: str) -> str:
    """Return the text of a toolkit's version.json."""
    sdk, parts = CUDA_PATCHES.get(cuda, (f"{cuda}.0", f"{cuda}.0"))
    names = {"cuda_cudart": "CUDA Runtime (cudart)", "cuda_nvcc": "CUDA NVCC"}
    data = {"cuda": {"name": "CUDA SDK", "version": sdk}}
    data.update({key: {"name": name, "version": parts} for key, name in names.items()})
    return json.dumps(data, indent=3) + "\n"


def device_tree(spec: HostSpec) -> dict[str, bytes]:
    """Return the device tree's files by name, NUL-terminated as the kernel gives them."""
    return {
        "model": spec.model.encode() + b"\0",
        "compatible": b"".join(item.encode() + b"\0" for item in spec.compatible),
    }


def apply_platform(root: Path, spec: HostSpec) -> None:
    """Give a bare root filesystem the identity of a Jetson. Raises Problem or OSError."""
    major = int(spec.l4t.partition(".")[0])
    _write(root, "etc/nv_tegra_release", nv_tegra_release(spec.l4t))
    _register_l4t_core(root, spec.l4t)
    if spec.cuda is not None:
        _install_cuda(root, spec.cuda)
    for library in sorted((root / "usr/lib").glob("python3.[0-9]*")):
        hook = library / "sitecustomize.py"
        # Debian's is a link into /etc, like Ubuntu's
        target = f"etc/{library.name}/sitecustomize.py" if hook.is_symlink() else str(hook.relative_to(root))
        _write(root, target, SITECUSTOMIZE)
        if major <= 36:  # Ubuntu 22.04 and older: before the marker was introduced
            (library / "EXTERNALLY-MANAGED").unlink(missing_ok=True)


def apply_person(root: Path, spec: HostSpec, authorized_key: str, host_key: str, host_key_public: str) -> None:
    """Give a root filesystem, bare or from a snapshot, what no two hosts share.

    Args:
        root: the mounted root filesystem.
        spec: the host.
        authorized_key: the public key that may log in.
        host_key: sshd's private ed25519 key.
        host_key_public: its public half.
    """
    _write(root, "etc/hostname", spec.name + "\n")
    _write(root, "etc/hosts", f"127.0.0.1\tlocalhost\n127.0.1.1\t{spec.name}\n::1\tlocalhost\n")
    _write(root, "etc/machine-id", uuid.uuid4().hex + "\n", 0o444)
    for stale in ("random-seed", "credential.secret"):
        (root / "var/lib/systemd" / stale).unlink(missing_ok=True)
    for old in (root / "etc/ssh").glob("ssh_host_*"):
        old.unlink()
    _write(root, "etc/ssh/ssh_host_ed25519_key", host_key, 0o600)
    _write(root, "etc/ssh/ssh_host_ed25519_key.pub", host_key_public)
    folder = root / "home" / USER / ".ssh"
    folder.mkdir(mode=0o700, exist_ok=True)
    _write(root, f"home/{USER}/.ssh/authorized_keys", authorized_key, 0o600)
    for path in (folder, folder / "authorized_keys"):
        os.chown(path, USER_ID, USER_ID)
    rule = "ALL" if spec.sudo_password is not None else "NOPASSWD: ALL"
    _write(root, f"etc/sudoers.d/90-{USER}", f"{USER} ALL=(ALL:ALL) {rule}\n", 0o440)


def _register_l4t_core(root: Path, l4t: str) -> None:
    status = root / "var/lib/dpkg/status"
    text = status.read_text(encoding="utf-8")
    if "\nPackage: nvidia-l4t-core\n" in f"\n{text}":
        return
    machine = platform.machine()
    stanza = (
        "Package: nvidia-l4t-core\n"
        "Status: install ok installed\n"
        "Priority: standard\n"
        "Section: metapackages\n"
        "Installed-Size: 20\n"
        "Maintainer: Simulated Jetson <root@localhost>\n"
        f"Architecture: {DPKG_ARCHITECTURE.get(machine, machine)}\n"
        f"Version: {l4t_core_version(l4t)}\n"
        "Description: NVIDIA Core Package (stand-in of a simulated Jetson: version files only)\n"
    )
    _write(root, "var/lib/dpkg/status", text.rstrip("\n") + "\n\n" + stanza + "\n")
    info = "var/lib/dpkg/info/nvidia-l4t-core"
    _write(root, f"{info}.list", "/.\n/etc\n/etc/nv_tegra_release\n")
    checksum = hashlib.md5(nv_tegra_release(l4t).encode(), usedforsecurity=False).hexdigest()
    _write(root, f"{info}.md5sums", f"{checksum}  etc/nv_tegra_release\n")


def _install_cuda(root: Path, cuda: str) -> None:
    home = root / "usr/local" / f"cuda-{cuda}"
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    _write(root, f"usr/local/cuda-{cuda}/version.json", cuda_version_json(cuda))
    _write(
        root,
        f"usr/local/cuda-{cuda}/README",
        "A stand-in of a simulated Jetson: version files only, no compiler and no libraries.\n",
    )
    # the chain of links that NVIDIA's packages make
    major = cuda.partition(".")[0]
    for link, target in (
        ("usr/local/cuda", "/etc/alternatives/cuda"),
        (f"usr/local/cuda-{major}", f"/etc/alternatives/cuda-{major}"),
        ("etc/alternatives/cuda", f"/usr/local/cuda-{cuda}"),
        (f"etc/alternatives/cuda-{major}", f"/usr/local/cuda-{cuda}"),
    ):
        (root / link).unlink(missing_ok=True)
        (root / link).symlink_to(target)


def _write(root: Path, name: str, text: str, mode: int = 0o644) -> None:
    """Write a file below root, replacing a link rather than following it out of root."""
    top = root.resolve()
    folder = (root / name).parent.resolve()
    if top != folder and top not in folder.parents:
        raise Problem(f"/{name} leads out of the host's root filesystem", f"a path below {root}", "remake the base")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(name).name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    temporary = folder / f".{path.name}.simulator"
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(mode)
    os.replace(temporary, path)
