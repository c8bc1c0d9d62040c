"""An nvcc that compiles for one GPU only, whatever architectures a setup.py lists.

torch ignores TORCH_CUDA_ARCH_LIST as soon as a setup.py names an architecture itself, so the list is cut where
every call passes: torch starts the compiler that PYTORCH_NVCC names. The text of this file is put on the device
as that compiler; it therefore uses nothing but the standard library and no other file of the project.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple

NVCC_VARIABLE = "JETSON_MAMBA_NVCC"
SM_VARIABLE = "JETSON_MAMBA_SM"
# a build flag: whose list of GPUs is compiled for
LIST_VARIABLE = "JETSON_MAMBA_ARCHITECTURES"
OWN_LIST = "own"
UPSTREAM_LIST = "upstream"
LISTS = (OWN_LIST, UPSTREAM_LIST)

_GENERATE_FLAGS = frozenset(("-gencode", "--gencode", "-generate-code", "--generate-code"))
_ARCHITECTURE_FLAGS = _GENERATE_FLAGS.union(
    dashes + name for dashes in ("-", "--") for name in ("arch", "gpu-architecture", "code", "gpu-code")
)
_OPTION_FILE_FLAGS = frozenset(("-optf", "--options-file"))
# What follows one of these is its value, even where it looks like an architecture or a question.
# fmt: off
_VALUE_FLAGS = frozenset((
    "--output-file", "-o", "--dependency-output", "-MF", "--pre-include", "-include", "--library", "-l",
    "--define-macro", "-D", "--undefine-macro", "-U", "--include-path", "-I", "--system-include", "-isystem",
    "--library-path", "-L", "--output-directory", "-odir", "--compiler-bindir", "-ccbin", "--archiver-binary",
    "-arbin", "--libdevice-directory", "-ldir", "--target-directory", "-target-dir", "--compiler-options",
    "-Xcompiler", "--linker-options", "-Xlinker", "--archive-options", "-Xarchive", "--ptxas-options", "-Xptxas",
    "--nvlink-options", "-Xnvlink", "--cudafe-options", "-Xcudafe", "--cicc-options", "-Xcicc",
    "--fdevice-time-trace", "-fdevice-time-trace", "--keep-dir", "-keep-dir", "--time", "-time", "--run-args",
    "-run-args", "--input-drive-prefix", "-idp", "--dependency-drive-prefix", "-ddp", "--drive-prefix", "-dp",
    "--dependency-target-name", "-MT", "--entries", "-e", "--frandom-seed", "-frandom-seed", "--qpp-config",
    "-qpp-config", "--default-stream", "-default-stream", "--std", "-std", "--x", "-x", "--threads", "-t", "--Werror",
    "-Werror",
))
# fmt: on
_QUERIES = frozenset(("-V", "--version", "-h", "--help", "-arch-ls", "--list-gpu-arch", "-code-ls", "--list-gpu-code"))
_LTO_FLAGS = frozenset(("-dlto", "--dlink-time-opt"))
_NVCC_FLAG_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
# As nvcc itself splits its variables and option files: double quotes and backslashes count, single quotes do not.
_WORD = re.compile(r'(?:[^\s"\\]|\\.|"(?:[^"\\]|\\.)*"?)+\s*', re.S)

Group = Tuple[str, Optional[str], Sequence[str]]


def wanted_flags(sm: str, lto: bool = False) -> List[str]:
    """Return the flags that compile for one GPU.

    Args:
        sm: the GPU's number without "sm_", such as "87".
        lto: code for optimising at link time is asked for, which nvcc gives only to the shorter spelling.

    Raises:
        ValueError: sm is no such number.
    """
    if not re.match(r"^[1-9][0-9]{1,2}[af]?$", sm):
        raise ValueError(f"{sm!r} is no compute capability such as 87")
    return [f"-arch=sm_{sm}"] if lto else ["-gencode", f"arch=compute_{sm},code=sm_{sm}"]


def _groups(arguments: Sequence[str]) -> Iterator[Group]:
    """Split arguments into options with their values: (name, value or None, the arguments as they were)."""
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        name, equals, value = argument.partition("=")
        known = name in _ARCHITECTURE_FLAGS or name in _OPTION_FILE_FLAGS
        if equals and known:
            yield name, value, (argument,)
        elif (argument in _VALUE_FLAGS or known) and index + 1 < len(arguments):
            yield argument, arguments[index + 1], (argument, arguments[index + 1])
            index += 1
        else:
            yield argument, None, (argument,)
        index += 1


def drop_architectures(arguments: Sequence[str], folder: str) -> List[str]:
    """Return the arguments without any architecture flag; all the others stay as they are and where they are.

    Args:
        arguments: of nvcc.
        folder: where the rest of an option file is written that holds architectures; the file itself is left alone.

    Raises:
        OSError: an option file cannot be read, or its rest cannot be written.
    """
    kept: List[str] = []
    for name, value, words in _groups(arguments):
        if name in _OPTION_FILE_FLAGS and value is not None:
            files = ",".join(_without_architectures(path, folder) for path in value.split(","))
            kept += words if files == value else [name, files]
        elif name not in _ARCHITECTURE_FLAGS:
            kept += words
    return kept


def cut_text(text: str, folder: str) -> str:
    """Return the text of a variable or an option file without architecture flags; every other byte stays.

    Raises:
        OSError: see drop_architectures.
    """
    raw = [match.group() for match in _WORD.finditer(text)]
    plain = [re.sub(r'"|\\(.)', r"\1", word.strip()) for word in raw]
    kept: List[str] = []
    index = 0
    for _name, _value, words in _groups(plain):
        rest = drop_architectures(words, folder)
        if rest == list(words):
            kept += raw[index : index + len(words)]
        else:
            kept += [word + " " for word in rest]
        index += len(words)
    return text if kept == raw else "".join(kept).strip()


def _without_architectures(path: str, folder: str) -> str:
    """Return an option file's own path, or that of what remains of it without architectures."""
    with open(path, encoding="utf-8", errors="surrogateescape") as handle:
        text = handle.read()
    rest = cut_text(text, folder)
    if rest == text:
        return path
    content = (rest + "\n").encode("utf-8", "surrogateescape")
    target = os.path.join(folder, f"nvcc-{hashlib.sha256(content).hexdigest()[:16]}.options")
    # several compilers at a time may write the same file: each its own, then one name for all
    partial = f"{target}.{os.getpid()}"
    with open(partial, "wb") as output:
        output.write(content)
    os.replace(partial, target)
    return target


def asks_only(arguments: Sequence[str]) -> bool:
    """Return whether nvcc is asked something, such as its version, and shall compile nothing."""
    return any(value is None and name in _QUERIES for name, value, _words in _groups(arguments))


def known_gpus(real: str, timeout: float = 60.0) -> Set[str]:
    """Return the GPUs that an nvcc compiles for, as numbers ("87"), without those of a suffix such as 90a.

    Raises:
        OSError: it cannot be started, or does not answer.
    """
    try:
        done = subprocess.run(
            [real, "--list-gpu-code"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            env={name: value for name, value in os.environ.items() if name not in _NVCC_FLAG_VARIABLES},
        )
    except subprocess.SubprocessError as error:
        raise OSError(f"{real} --list-gpu-code does not answer: {error}") from error
    found = set(re.findall(r"^sm_([0-9]+)", done.stdout.decode("utf-8", "replace"), re.M))
    if done.returncode or not found:
        said = done.stderr.decode("utf-8", "replace").strip() or "nothing"
        raise OSError(f"{real} --list-gpu-code ends with status {done.returncode} and says: {said[-300:]}")
    return found


def is_known(sm: str, known: Set[str]) -> bool:
    """Return whether a GPU is among those that known_gpus returns; nvcc's list leaves suffixes out."""
    return sm.rstrip("af") in known


def keep_known(arguments: Sequence[str], known: Set[str]) -> List[str]:
    """Return the arguments without what they list for GPUs that this nvcc does not know, such as sm_53 for CUDA 13."""
    kept: List[str] = []
    for name, value, words in _groups(arguments):
        numbers = re.findall(r"(?:sm|compute|lto)_([0-9]+)", value or "") if name in _GENERATE_FLAGS else []
        if all(is_known(number, known) for number in numbers):
            kept += words
    return kept


def _names_gpu(arguments: Sequence[str], sm: str) -> bool:
    return any(
        name in _ARCHITECTURE_FLAGS and re.search(rf"\bsm_{sm}\b", value or "")
        for name, value, _words in _groups(arguments)
    )


def command(
    arguments: Sequence[str], real: str, sm: str, folder: str, upstream: Optional[Set[str]] = None
) -> List[str]:
    """Return the command line of the real nvcc; a question such as --version is passed on untouched.

    Args:
        arguments: what the wrapper was called with, without its own name.
        real: path of the real nvcc.
        sm: the GPU's number, such as "87".
        folder: for temporary files.
        upstream: what this nvcc knows, where upstream's own list is to be kept; None for the one GPU alone.

    Raises:
        ValueError: sm is no such number.
        OSError: an option file cannot be read, or its rest cannot be written.
    """
    if asks_only(arguments):
        return [real, *arguments]
    wanted = wanted_flags(sm, any(name in _LTO_FLAGS for name, _value, _words in _groups(arguments)))
    if upstream is None:
        return [real, *drop_architectures(arguments, folder), *wanted]
    kept = keep_known(arguments, upstream)
    return [real, *kept, *([] if _names_gpu(kept, sm) else wanted)]


def clean_environment(environment: Dict[str, str], folder: str) -> Dict[str, str]:
    """Return the environment with architecture flags taken out of the variables that nvcc reads by itself."""
    cleaned = dict(environment)
    for name in _NVCC_FLAG_VARIABLES:
        if name in cleaned:
            cleaned[name] = cut_text(cleaned[name], folder)
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
    folder = os.environ.get("TMPDIR") or "/tmp"
    try:
        if os.environ.get(LIST_VARIABLE, OWN_LIST) == UPSTREAM_LIST:
            line, environment = command(arguments, real, sm, folder, known_gpus(real)), dict(os.environ)
        else:
            line, environment = command(arguments, real, sm, folder), clean_environment(dict(os.environ), folder)
        os.execve(real, line, environment)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"nvcc wrapper: {error}; {NVCC_VARIABLE}={real!r} {SM_VARIABLE}={sm!r}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
