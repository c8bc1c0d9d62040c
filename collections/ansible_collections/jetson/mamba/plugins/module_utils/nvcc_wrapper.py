"""An nvcc that compiles for one GPU only, whatever architectures a setup.py lists.

torch ignores TORCH_CUDA_ARCH_LIST as soon as a setup.py names an architecture itself, so the list is cut where
every call passes: torch starts the compiler that PYTORCH_NVCC names. The text of this file is put on the device
as that compiler; it therefore uses nothing but the standard library and no other file of the project.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from typing import Dict, List, Sequence

NVCC_VARIABLE = "JETSON_MAMBA_NVCC"
SM_VARIABLE = "JETSON_MAMBA_SM"

_ARCHITECTURE_FLAGS = frozenset(
    dashes + name
    for dashes in ("-", "--")
    for name in ("gencode", "generate-code", "arch", "gpu-architecture", "code", "gpu-code")
)
_OPTION_FILE_FLAGS = frozenset(("-optf", "--options-file", "-options-file"))
# the argument after one of these belongs to another program, even where it looks like an architecture
_FOREIGN_FLAGS = frozenset(
    (
        "-o",
        "--output-file",
        "-Xcompiler",
        "-Xlinker",
        "-Xarchive",
        "-Xptxas",
        "-Xnvlink",
        "-Xcudafe",
        "--compiler-options",
        "--linker-options",
        "--archive-options",
        "--ptxas-options",
        "--nvlink-options",
        "--cudafe-options",
    )
)
_QUERIES = frozenset(("-V", "--version", "-h", "--help", "-arch-ls", "--list-gpu-arch", "-code-ls", "--list-gpu-code"))
_NVCC_FLAG_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


def wanted_flags(sm: str) -> List[str]:
    """Return the flags that compile for one GPU.

    Args:
        sm: the GPU's number without "sm_", such as "87".

    Raises:
        ValueError: sm is no such number.
    """
    if not re.match(r"^[1-9][0-9]{1,2}[af]?$", sm):
        raise ValueError(f"{sm!r} is no compute capability such as 87")
    return ["-gencode", f"arch=compute_{sm},code=sm_{sm}"]


def drop_architectures(arguments: Sequence[str]) -> List[str]:
    """Return the arguments without any architecture flag; all the others stay as they are and where they are.

    A response file (--options-file) is named on as it is, unless it holds architecture flags: then what remains
    of its arguments stands in its place.
    """
    kept: List[str] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        name, equals, value = argument.partition("=")
        takes_next = not equals and index + 1 < len(arguments)
        if argument in _FOREIGN_FLAGS and takes_next:
            kept += [argument, arguments[index + 1]]
            index += 2
        elif name in _ARCHITECTURE_FLAGS:
            index += 1 if equals else 2
        elif name in _OPTION_FILE_FLAGS and (equals or takes_next):
            kept += _option_files(argument, value if equals else arguments[index + 1], bool(equals))
            index += 1 if equals else 2
        else:
            kept.append(argument)
            index += 1
    return kept


def _option_files(flag: str, files: str, joined: bool) -> List[str]:
    """Return what stands for one --options-file argument (a comma-separated list of files)."""
    inside: List[str] = []
    for path in files.split(","):
        with open(path, encoding="utf-8") as handle:
            inside += shlex.split(handle.read())
    kept = drop_architectures(inside)
    if kept == inside:
        return [flag] if joined else [flag, files]
    return kept


def command(arguments: Sequence[str], real: str, sm: str) -> List[str]:
    """Return the command line of the real nvcc; a question such as --version is passed on untouched.

    Args:
        arguments: what the wrapper was called with, without its own name.
        real: path of the real nvcc.
        sm: the GPU's number, such as "87".
    """
    if _QUERIES.intersection(arguments):
        return [real, *arguments]
    return [real, *drop_architectures(arguments), *wanted_flags(sm)]


def clean_environment(environment: Dict[str, str]) -> Dict[str, str]:
    """Return the environment with architecture flags taken out of the variables that nvcc reads by itself."""
    cleaned = dict(environment)
    for name in _NVCC_FLAG_VARIABLES:
        if name in cleaned:
            cleaned[name] = " ".join(shlex.quote(part) for part in drop_architectures(shlex.split(cleaned[name])))
    return cleaned


def script(python: str) -> str:
    """Return the text of the wrapper as an executable file.

    Args:
        python: path of the interpreter that shall run it; its start must not depend on site packages.
    """
    return f"#!{python} -IS\n{source_text(__name__)}"


def source_text(module_name: str) -> str:
    """Return the source of a loaded module, also where it was loaded from a zip archive."""
    get_source = getattr(getattr(sys.modules[module_name], "__loader__", None), "get_source", None)
    text = get_source(module_name) if get_source else None
    if text is None:
        raise RuntimeError(f"the source of {module_name} is not available")
    return str(text)


def main(arguments: Sequence[str]) -> int:
    """Become the real nvcc; returns only where that fails."""
    real, sm = os.environ.get(NVCC_VARIABLE, ""), os.environ.get(SM_VARIABLE, "")
    try:
        line = command(arguments, real, sm)
        os.execve(real, line, clean_environment(dict(os.environ)))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"nvcc wrapper: {error}; {NVCC_VARIABLE}={real!r} {SM_VARIABLE}={sm!r}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
