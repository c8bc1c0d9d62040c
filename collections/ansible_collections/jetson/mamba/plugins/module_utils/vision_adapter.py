"""The vision adapter: two modules that stand in for VMamba's extensions, and what else lies there under their names.

An extension module that a project built itself always wins: in the same folder Python prefers it to a .py file, and
from any other place of the path the adapter itself gives way to it (vision_payload._own_extension).
"""

from __future__ import annotations

import glob
import inspect
import os
import re
from importlib.machinery import EXTENSION_SUFFIXES

from ansible_collections.jetson.mamba.plugins.module_utils import vision_payload
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import FileSpec, read_text

NAMES = vision_payload.NAMES

_MARK = re.compile(r"^JETSON_MAMBA_VISION_ADAPTER = \d", re.MULTILINE)


def payload_source() -> str:
    """Return the text that is installed under both names.

    On a device this package lies inside a zip file; the loader is asked there.

    Raises:
        Problem: the collection was installed without its sources.
    """
    try:
        return inspect.getsource(vision_payload)
    except OSError as error:
        raise Problem(
            "the adapter's source text (module_utils/vision_payload.py) is not available",
            "the collection jetson.mamba with its Python sources",
            "install the collection again, from a source checkout and not as bytecode only",
        ) from error


def is_ours(text: str | None) -> bool:
    """Return whether a module's text is an adapter of this project's, of any version."""
    return text is not None and _MARK.search(text) is not None


def wanted_files(site_packages: str) -> dict[str, FileSpec]:
    """Return the adapter's files for one site-packages folder; a module that somebody else wrote stays as it is."""
    source = payload_source()
    paths = [os.path.join(site_packages, name + ".py") for name in NAMES]
    return {path: FileSpec(source, 0o644) for path in paths if is_free(path)}


def is_free(path: str) -> bool:
    """Return whether a path holds nothing, or an adapter of ours."""
    text = read_text(path)
    return text is None or is_ours(text)


def unwanted_files(site_packages: str) -> dict[str, FileSpec | None]:
    """Return what has to go to take the adapter away: our modules and their bytecode."""
    paths = []
    for name in NAMES:
        module = os.path.join(site_packages, name + ".py")
        if is_free(module):
            pattern = os.path.join(glob.escape(site_packages), "__pycache__", glob.escape(name) + ".*.pyc")
            paths += [module, *sorted(glob.glob(pattern))]
    return dict.fromkeys(paths)


def own_modules(site_packages: str) -> list[str]:
    """Return what else stands for one of the names in this folder: built extensions, packages, others' modules.

    Args:
        site_packages: the environment's folder. Extensions for another Python or machine are no match of Python's, and
            none here.
    """
    found = []
    for name in NAMES:
        stem = os.path.join(site_packages, name)
        if os.path.isfile(os.path.join(stem, "__init__.py")):
            found.append(stem)
        # a device's modules run under any Python: the suffixes of the environment's own are told by the names there
        found += [path for path in sorted(glob.glob(glob.escape(stem) + "*.so")) if _is_extension(path, stem)]
        if not is_free(stem + ".py"):
            found.append(stem + ".py")
    return found


def _is_extension(path: str, stem: str) -> bool:
    """Return whether a shared object's name is one that some CPython imports under the stem's name."""
    suffix = path[len(stem) :]
    return suffix in EXTENSION_SUFFIXES or re.fullmatch(r"(\.cpython-\d+[\w-]*|\.abi3)?\.so", suffix) is not None


def own_note(path: str) -> str:
    """Return what people should know about a module of their own that stands in the adapter's place."""
    return f"{path} is not the adapter's. It was left as it is, and where Python can load it, projects use it."
