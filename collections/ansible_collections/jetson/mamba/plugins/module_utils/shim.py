"""The import shim: which files it consists of, where they go, and what else lies there that people should know of."""

from __future__ import annotations

import glob
import os
import re

from ansible_collections.jetson.mamba.plugins.module_utils import shim_payload
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import FileSpec, read_text

MODULE_NAME = "jetson_mamba_shim"
MODULE_FILE = MODULE_NAME + ".py"
PTH_FILE = MODULE_NAME + ".pth"

_PYTHON_FOLDER = re.compile(r"/(python3\.\d+)/(?:site|dist)-packages/?$")


def payload_source() -> str:
    """Return the source text that is installed as jetson_mamba_shim.py.

    It is asked of the loader, because on a device this package lies inside a zip file.
    """
    spec = shim_payload.__spec__
    get_source = getattr(spec.loader, "get_source", None) if spec is not None else None
    source = get_source(shim_payload.__name__) if get_source is not None else None
    if not source:
        raise Problem(
            "the shim's source text (module_utils/shim_payload.py) is not available",
            "the collection jetson.mamba with its Python sources",
            "install the collection again, from a source checkout and not as bytecode only",
        )
    # Ansible's own loader of collections answers in bytes
    return source.decode("utf-8") if isinstance(source, bytes) else str(source)


def wanted_files(site_packages: str) -> dict[str, FileSpec]:
    """Return the shim's files for one site-packages folder, in the order in which they have to appear.

    A .pth file is read whatever sitecustomize the distribution has, and the module is there before its import line.

    Args:
        site_packages: absolute path of an environment's site-packages, a user site or a dist-packages folder.
    """
    return {
        os.path.join(site_packages, MODULE_FILE): FileSpec(payload_source(), 0o644),
        os.path.join(site_packages, PTH_FILE): FileSpec(f"import {MODULE_NAME}\n", 0o644),
    }


def unwanted_files(site_packages: str) -> dict[str, FileSpec | None]:
    """Return what has to go to take the shim away: the import line first, then the module and its bytecode."""
    bytecode = sorted(glob.glob(os.path.join(glob.escape(site_packages), "__pycache__", MODULE_NAME + ".*.pyc")))
    paths = [os.path.join(site_packages, PTH_FILE), os.path.join(site_packages, MODULE_FILE), *bytecode]
    return dict.fromkeys(paths)


def system_site_packages(site_packages: str) -> str:
    """Return the folder that Debian's and Ubuntu's system Python of the same version reads local additions from.

    Args:
        site_packages: a folder whose path names the version, such as …/lib/python3.10/site-packages.
    """
    match = _PYTHON_FOLDER.search(site_packages)
    if match is None:
        raise Problem(
            f"no Python version can be read from the path {site_packages}",
            "a folder such as …/lib/python3.10/site-packages",
            "set sitecustomize_site_packages to the environment's site-packages folder",
        )
    return f"/usr/local/lib/{match.group(1)}/dist-packages"


def guide_files(site_packages: str, user_base: str) -> list[str]:
    """Return the sitecustomize.py and usercustomize.py files that import torch at every start of Python.

    The user's guide asks for such a file. It is the user's own and stays.

    Args:
        site_packages: the environment's folder, looked at too.
        user_base: the user's base folder, such as ~/.local in full.
    """
    folders = [site_packages]
    match = _PYTHON_FOLDER.search(site_packages)
    if match is not None:
        folders.append(os.path.join(user_base, "lib", match.group(1), "site-packages"))
    candidates = [os.path.join(folder, name) for folder in folders for name in ("sitecustomize.py", "usercustomize.py")]
    return [path for path in dict.fromkeys(candidates) if imports_torch(read_text(path) or "")]


def imports_torch(text: str) -> bool:
    """Return whether a Python source imports torch (or anything of it) by a statement of its own."""
    return re.search(r"^[ \t]*(?:import|from)[ \t]+torch\b", text, re.MULTILINE) is not None


def guide_note(path: str) -> str:
    """Return what people should know about a start-up file that imports torch."""
    return (
        f"{path} imports torch whenever Python starts. It was left as it is. Where Debian or Ubuntu ship a "
        "sitecustomize of their own, a user's sitecustomize.py never runs; elsewhere it costs every start of Python "
        f"seconds. The shim does its work, so the file can go: rm {path}"
    )
