"""Give torch.distributed the four collective names that some builds of PyTorch lack.

Installed by Jetson Mamba (role sitecustomize) as jetson_mamba_shim.py, beside jetson_mamba_shim.pth, whose one line
imports it when Python starts. It imports nothing but what the interpreter has in memory already, never torch; it only
waits for somebody to import torch.distributed. To be rid of it: sitecustomize_state: absent, or delete both files.
"""

import sys
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TARGET = "torch.distributed"
PAIRS = (("all_gather_into_tensor", "_all_gather_base"), ("reduce_scatter_tensor", "_reduce_scatter_base"))
MARK = "__jetson_mamba_shim__"

_MISSING = object()
_placed: "dict[str, Any]" = {}


def _stand_in(name: str) -> "Any":
    """Return a function for a name that the build has in neither spelling; calling it says why it cannot work."""

    def stand_in(*_args: "Any", **_kwargs: "Any") -> "Any":
        version = getattr(sys.modules.get("torch"), "__version__", "of an unknown version")
        raise NotImplementedError(
            f"found:    {TARGET}.{name} was called, and this PyTorch ({version}) is built without it\n"
            "expected: one process on one GPU, where mamba_ssm imports this name and never calls it\n"
            "next:     run without tensor, sequence or data parallelism (process_group=None), or install a PyTorch "
            "built with USE_DISTRIBUTED=1\n"
            f"(the name was put there by {__file__}, so that 'import mamba_ssm' works)"
        )

    stand_in.__name__ = stand_in.__qualname__ = name
    stand_in.__doc__ = "Stands in for a function that this build of PyTorch lacks; raises NotImplementedError."
    stand_in.__dict__[MARK] = True
    return stand_in


def complete(module: "Any") -> None:
    """Give module those of the four names that it lacks; what is there is never replaced.

    After a reload the names placed earlier are looked at anew, so that an alias never points to a function of before.
    """
    for pair in PAIRS:
        found = {name: getattr(module, name, _MISSING) for name in pair}
        real = [value for name, value in found.items() if value is not _MISSING and value is not _placed.get(name)]
        for name, value in found.items():
            if value is _MISSING or value is _placed.get(name):
                _placed[name] = real[0] if real else _stand_in(name)
                setattr(module, name, _placed[name])


def _complete_quietly(module: "Any") -> bool:
    """Complete module and the object that stands for it in sys.modules; a failure here must not fail the import."""
    try:
        complete(module)
        current = sys.modules.get(TARGET, module)
        if current is not module:
            complete(current)
    except Exception:
        return False
    return True


def _wrap(loader: "Any") -> bool:
    """Make loader complete the module after it has executed it. The loader's own errors pass through untouched."""
    try:
        execute = loader.exec_module
        if MARK in getattr(execute, "__dict__", ()):
            return True

        def exec_module(module: "Any") -> None:
            execute(module)
            _complete_quietly(module)

        exec_module.__dict__[MARK] = True
        loader.exec_module = exec_module
    except Exception:
        return False
    return True


class Finder:
    """Finds torch.distributed through the finders behind it, and nothing else.

    It stays on sys.meta_path: taking an entry out while another thread walks that list makes the thread miss a
    finder, and a module that is deleted and imported again is completed again.
    """

    jetson_mamba_shim = True

    def __init__(self) -> None:
        self._asking: set[int] = set()

    def find_spec(self, fullname: str, path: "Any" = None, target: "Any" = None) -> "Any":
        """Return the real spec of torch.distributed with its loader wrapped, or None for every other name."""
        if fullname != TARGET:
            return None
        thread = get_ident()
        if thread in self._asking:  # a finder behind this one asks the whole path again
            return None
        self._asking.add(thread)
        try:
            spec = self._real_spec(path, target)
        finally:
            self._asking.discard(thread)
        if spec is not None:
            _wrap(spec.loader)
        return spec

    def _real_spec(self, path: "Any", target: "Any") -> "Any":
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(TARGET, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


def install() -> bool:
    """Put the finder in front, and complete torch.distributed where it is loaded already.

    Returns:
        False where that failed: the start of an interpreter is no place for an error.
    """
    try:
        if not any(getattr(finder, "jetson_mamba_shim", False) for finder in sys.meta_path):
            sys.meta_path.insert(0, Finder())
    except Exception:
        return False
    module = sys.modules.get(TARGET)
    return module is None or _complete_quietly(module)


# under its own name in module_utils, where this file is read to be installed, it does nothing
if __name__ == "jetson_mamba_shim":
    install()
