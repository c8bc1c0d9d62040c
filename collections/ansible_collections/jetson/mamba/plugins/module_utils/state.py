"""Read a device's whole state, as plain data, without changing anything.

Everything is read below a `top` folder ("/" on a device), so that tests and recorded trees can be surveyed too.
"""

from __future__ import annotations

import glob
import grp
import json
import os
import platform as host_platform
import pwd
import re
import shutil
import subprocess
import time
from typing import Any, Dict, List, Mapping, Optional, Sequence

from ansible_collections.jetson.mamba.plugins.module_utils import cuda_env, elf, files, inspection, records

SCHEMA = 1
DEVICE_TREE = "sys/firmware/devicetree/base"
RELEASE_LINE = re.compile(r"^# R(\d+) \(release\), REVISION: ([\d.]+)")
SOC = re.compile(r"^nvidia,(tegra\d+)$")
DEBS = ("nvidia-l4t-core", "unattended-upgrades")
# asked of every interpreter found, in one start each
INTERPRETER_FACTS = """
import json, os, site, sys, sysconfig
paths = sysconfig.get_paths()
print(json.dumps({
    "version": "%d.%d.%d" % sys.version_info[:3],
    "abi": "cp%d%d" % sys.version_info[:2],
    "soabi": sysconfig.get_config_var("SOABI"),
    "prefix": sys.prefix,
    "headers": os.path.exists(os.path.join(paths["include"], "Python.h")),
    "externally_managed": os.path.exists(os.path.join(paths["stdlib"], "EXTERNALLY-MANAGED")),
    "user_site": site.getusersitepackages(),
    "user_base": site.getuserbase(),
    "bits": 64 if sys.maxsize > 2**32 else 32,
}))
"""


def read_text(path: str, limit: int = 65536) -> Optional[str]:
    """Return the start of a text file (at most `limit` bytes), or None where it can't be read."""
    try:
        with open(path, "rb") as handle:
            return handle.read(limit).decode("utf-8", "replace")
    except OSError:
        return None


def run(argv: Sequence[str], timeout: float = 20.0) -> Optional[str]:
    """Return what a command prints, or None where it is absent, fails or takes longer than `timeout` seconds."""
    env = dict(os.environ, LC_ALL="C", PYTHONDONTWRITEBYTECODE="1")
    try:
        done = subprocess.run(
            list(argv), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=timeout, env=env, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def parse_release(text: str) -> Optional[str]:
    """Return the L4T release ("36.4.7") of /etc/nv_tegra_release's text, or None."""
    match = RELEASE_LINE.match(text)
    return "{}.{}".format(*match.groups()) if match else None


def parse_deb_release(version: str) -> Optional[str]:
    """Return the L4T release of a nvidia-l4t-core version such as 36.4.7-20250918154033, or None."""
    match = re.match(r"^(\d+\.\d+(?:\.\d+)?)(?:-|$)", version)
    return match.group(1) if match else None


def read_soc(top: str) -> Dict[str, Any]:
    """Return {model, compatible, soc} from the device tree; None or [] where there is none."""
    base = os.path.join(top, DEVICE_TREE)
    model = read_text(os.path.join(base, "model"))
    compatible = (read_text(os.path.join(base, "compatible")) or "").split("\0")
    socs = [match.group(1) for match in map(SOC.match, compatible) if match]
    return {
        "model": model.rstrip("\0\n") if model else None,
        "compatible": [name for name in compatible if name],
        "soc": socs[0] if socs else None,
    }


def read_debs(top: str, names: Sequence[str]) -> Dict[str, Dict[str, str]]:
    """Return {package: {version, status}} of the named packages that dpkg knows."""
    text = read_text(os.path.join(top, "var/lib/dpkg/status"), limit=64 << 20) or ""
    found: Dict[str, Dict[str, str]] = {}
    for name in names:
        match = re.search(rf"^Package: {re.escape(name)}\n(?:.+\n)*", text, re.MULTILINE)
        if match:
            fields = dict(re.findall(r"^(Status|Version): (.*)$", match.group(0), re.MULTILINE))
            found[name] = {"version": fields.get("Version", ""), "status": fields.get("Status", "")}
    return found


def read_cuda(top: str, further: Sequence[str] = ()) -> Dict[str, Any]:
    """Return {link, toolkits: [{path, version, nvcc}]} of the toolkits under /usr/local and at `further` places."""
    toolkits = []
    usual = sorted(glob.glob(os.path.join(top, "usr/local/cuda-*")))
    named = [os.path.join(top, path.lstrip("/")) for path in further]
    for path in [*usual, *(path for path in named if path not in usual)]:
        if not os.path.isdir(path) or (os.path.islink(path) and path not in named):
            continue
        toolkits.append(
            {
                "path": "/" + os.path.relpath(path, top),
                "version": cuda_env.toolkit_version(path),
                "nvcc": os.access(os.path.join(path, "bin/nvcc"), os.X_OK),
            }
        )
    link = os.path.join(top, "usr/local/cuda")
    target = os.path.realpath(link) if os.path.exists(link) else None
    return {"link": target, "toolkits": toolkits}


def read_memory(top: str) -> Dict[str, int]:
    """Return memory in MiB: total, available, swap_free (without zram, which is memory again) and zram."""
    text = read_text(os.path.join(top, "proc/meminfo")) or ""
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    swap = zram = 0
    for line in (read_text(os.path.join(top, "proc/swaps")) or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 4:
            free = int(fields[2]) - int(fields[3])
            if "zram" in fields[0]:
                zram += free
            else:
                swap += free
    return {
        "total_mb": kib.get("MemTotal", 0) // 1024,
        "available_mb": kib.get("MemAvailable", 0) // 1024,
        "swap_free_mb": swap // 1024,
        "zram_free_mb": zram // 1024,
    }


def read_disk(path: str) -> Dict[str, Any]:
    """Return where `path` lives or would live: {path, existing, exists, device, free_mb, read_only, writable}.

    `device` tells file systems apart; `existing` is the path itself or the nearest parent that is there.
    """
    existing = path
    while not os.path.exists(existing) and existing != os.path.dirname(existing):
        existing = os.path.dirname(existing)
    info = os.statvfs(existing)
    return {
        "path": path,
        "existing": existing,
        "exists": existing == path,
        "device": os.stat(existing).st_dev,
        "free_mb": info.f_bavail * info.f_frsize // (1 << 20),
        "read_only": bool(info.f_flag & getattr(os, "ST_RDONLY", 1)),
        "writable": os.access(existing, os.W_OK),
    }


def read_interpreters(top: str) -> List[Dict[str, Any]]:
    """Return the facts of each python3.X in the usual folders, newest last."""
    found: Dict[str, Dict[str, Any]] = {}
    for pattern in ("usr/bin/python3.*", "usr/local/bin/python3.*"):
        for path in sorted(glob.glob(os.path.join(top, pattern))):
            if not re.search(r"/python3\.\d+$", path):
                continue
            printed = run([path, "-c", INTERPRETER_FACTS])
            try:
                facts = json.loads(printed or "")
            except ValueError:
                continue
            found.setdefault(os.path.realpath(path), dict(facts, path="/" + os.path.relpath(path, top)))
    return sorted(found.values(), key=lambda facts: [int(part) for part in facts["version"].split(".")])


def read_libraries(wanted: Sequence[str]) -> List[str]:
    """Return those of the wanted sonames that the linker cache holds."""
    printed = run(["ldconfig", "-p"]) or run(["/sbin/ldconfig", "-p"]) or ""
    names = {line.split()[0] for line in printed.splitlines()[1:] if line.strip()}
    return sorted(names.intersection(wanted))


def read_tools() -> Dict[str, Optional[str]]:
    """Return the paths of the tools that a build, a patch or Triton needs; None for an absent one."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    return {name: shutil.which(name, path=path) for name in ("gcc", "g++", "cc", "patch", "nvidia-smi", "sshd")}


def read_torch(site_packages: str) -> Optional[Dict[str, Any]]:
    """Return {version, cuda, cxx11_abi} of the torch in a site folder without importing it, or None."""
    text = read_text(os.path.join(site_packages, "torch/version.py"))
    if text is None:
        return None
    values = dict(re.findall(r"^(__version__|cuda)(?:\s*:[^=]+)?\s*=\s*['\"]?([^'\"\n]*)['\"]?", text, re.MULTILINE))
    config = read_text(os.path.join(site_packages, "torch/share/cmake/Torch/TorchConfig.cmake")) or ""
    abi = re.search(r"_GLIBCXX_USE_CXX11_ABI=(\d)", config)
    cuda = values.get("cuda")
    return {
        "version": values.get("__version__"),
        "cuda": None if cuda in (None, "", "None") else cuda,
        "cxx11_abi": abi.group(1) == "1" if abi else None,
    }


def read_site(
    site_packages: str,
    machine: str,
    hash_packages: Sequence[str],
    site_files: Sequence[str],
    inspect: Sequence[Mapping[str, Any]] = (),
) -> Dict[str, Any]:
    """Return what one site folder holds: packages with the state of their RECORD, foreign libraries, hashes.

    Args:
        site_packages: the folder.
        machine: what uname -m says; shared objects for another one are listed under `foreign`.
        hash_packages: packages whose files are hashed; of the others existence and size are compared.
        site_files: paths relative to the folder whose sha256 is wanted.
        inspect: {package, modules} each; what is installed of it is looked into (see inspection.read_installed).
    """
    looked = {row["package"]: inspection.read_installed(site_packages, **row) for row in inspect}
    return {
        "site_packages": site_packages,
        "exists": os.path.isdir(site_packages),
        "packages": records.survey(site_packages, hash_packages),
        "torch": read_torch(site_packages),
        "foreign": elf.find_foreign(site_packages, machine),
        "files": {name: files.sha256_file(os.path.join(site_packages, name)) for name in site_files},
        "inspection": {package: facts for package, facts in looked.items() if facts is not None},
    }


def read_records(folder: str) -> Dict[str, Any]:
    """Return the JSON records (name without .json -> data) of a state folder; unreadable ones are None."""
    found: Dict[str, Any] = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.json"))):
        name = os.path.basename(path)[: -len(".json")]
        try:
            found[name] = json.loads(read_text(path, limit=1 << 20) or "")
        except ValueError:
            found[name] = None
    return found


def read_environments(
    root: str,
    machine: str,
    hash_packages: Sequence[str],
    site_files: Sequence[str],
    inspect: Sequence[Mapping[str, Any]] = (),
) -> Dict[str, Any]:
    """Return {current, venvs: {env_id: site data}} of the environments under `root`."""
    current = os.path.join(root, "current")
    venvs: Dict[str, Any] = {}
    for env in sorted(glob.glob(os.path.join(root, "envs", "*"))):
        sites = glob.glob(os.path.join(env, "lib", "python3.*", "site-packages"))
        python = os.path.join(env, "bin", "python")
        venvs[os.path.basename(env)] = dict(
            read_site(sites[0] if sites else env, machine, hash_packages, site_files, inspect),
            exists=bool(sites),
            python_runs=bool(sites) and run([python, "-S", "-c", ""]) is not None,
            config={name: read_text(os.path.join(env, name)) for name in ("constraints.txt", "pip.conf")},
            records=read_records(os.path.join(root, "state", os.path.basename(env))),
        )
    return {"current": os.readlink(current) if os.path.islink(current) else None, "venvs": venvs}


def read_user() -> Dict[str, Any]:
    """Return who is connected: name, uid, group, home."""
    entry = pwd.getpwuid(os.getuid())
    try:
        group = grp.getgrgid(entry.pw_gid).gr_name
    except KeyError:
        group = str(entry.pw_gid)
    return {"name": entry.pw_name, "uid": entry.pw_uid, "group": group, "home": entry.pw_dir}


def collect(
    root: str,
    build_root: str,
    tmp_root: str,
    scope: str = "venv",
    hash_packages: Sequence[str] = (),
    site_files: Sequence[str] = (),
    config_files: Sequence[str] = (),
    toolkits: Sequence[str] = (),
    libraries: Sequence[str] = (),
    inspect: Sequence[Mapping[str, Any]] = (),
    top: str = "/",
) -> Dict[str, Any]:
    """Return the whole state of this device as plain data (schema 1).

    Args:
        root, build_root, tmp_root: the folders of this project on the device.
        scope: "venv" surveys the environments under `root`, "user" the user sites of the interpreters too.
        hash_packages: packages whose installed files are hashed one by one.
        site_files: paths below a site folder whose sha256 is wanted.
        config_files: absolute paths whose sha256 is wanted.
        toolkits: CUDA toolkit folders beside those under /usr/local.
        libraries: sonames to look for in the linker cache.
        inspect: {package, modules} each, extensions that are looked into in every environment and user site.
        top: the folder that stands for "/" (tests).
    """
    release = read_text(os.path.join(top, "etc/nv_tegra_release")) or ""
    debs = read_debs(top, DEBS)
    machine = host_platform.machine()
    interpreters = read_interpreters(top)
    user_sites = {}
    if scope == "user":
        for facts in interpreters:
            user_sites[facts["path"]] = dict(
                read_site(facts["user_site"], machine, hash_packages, site_files, inspect),
                config={"constraints.txt": read_text(os.path.join(root, "state", "user", "constraints.txt"))},
                python_runs=True,
                records=read_records(os.path.join(root, "state", "user")),
            )
    return {
        "schema": SCHEMA,
        "soc": read_soc(top),
        "l4t": {
            "release": parse_release(release) or parse_deb_release(debs.get("nvidia-l4t-core", {}).get("version", "")),
            "source": "/etc/nv_tegra_release" if parse_release(release) else "nvidia-l4t-core",
            "text": release.splitlines()[0][:200] if release else None,
        },
        "debs": debs,
        "os": dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)"?$', read_text(top + "/etc/os-release") or "", re.M)),
        "kernel": host_platform.release(),
        "machine": machine,
        "glibc": host_platform.libc_ver()[1] or None,
        "clock": int(time.time()),
        "cuda": read_cuda(top, toolkits),
        "interpreters": interpreters,
        "tools": read_tools(),
        "libraries": read_libraries(libraries),
        "memory": read_memory(top),
        "cpus": os.cpu_count() or 1,
        "disk": {
            "root": read_disk(root),
            "build": read_disk(build_root),
            "tmp": read_disk(tmp_root),
            "user": read_disk(os.path.expanduser("~")),
        },
        "environments": read_environments(root, machine, hash_packages, site_files, inspect),
        "user_sites": user_sites,
        "files": {path: files.sha256_file(path) for path in config_files},
        "environment_path": environment_path(top),
        "sshd": cuda_env.survey_sshd(top.rstrip("/")),
        "user": read_user(),
    }


def environment_path(top: str) -> Dict[str, Optional[str]]:
    """Return the texts from which the PATH of a command over ssh is made (see cuda_env)."""
    return {
        "environment": read_text(os.path.join(top, "etc/environment")),
        "login_defs": "\n".join(re.findall(r"^\s*ENV_PATH.*$", read_text(top + "/etc/login.defs") or "", re.MULTILINE)),
    }
