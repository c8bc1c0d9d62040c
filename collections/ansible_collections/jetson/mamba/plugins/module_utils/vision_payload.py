"""VMamba's extension modules selective_scan_cuda_core and selective_scan_cuda_oflex, over mamba's selective_scan_cuda.

Installed by Jetson Mamba (role vision_mamba) under these two names, so that vision projects which import one of them
run without building VMamba's kernels. Both files hold this text. An extension module of the same name that the project
built itself wins wherever Python can import it from. Importing this file imports no torch: it looks whether
selective_scan_cuda is there, and loads it at once only where torch is loaded already, else with the first call.
To be rid of it: vision_mamba_adapter: absent, or delete both files.
"""

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, List, NoReturn, Optional, Tuple

NAMES = ("selective_scan_cuda_core", "selective_scan_cuda_oflex")
BACKEND = "selective_scan_cuda"
# tells this file from a module of the same name that somebody else wrote
JETSON_MAMBA_VISION_ADAPTER = 1

__all__ = ["bwd", "fwd"]


def fwd(
    u: "Any",
    delta: "Any",
    A: "Any",
    B: "Any",
    C: "Any",
    D: "Any" = None,
    delta_bias: "Any" = None,
    delta_softplus: bool = False,
    nrows: int = 1,
    oflex: bool = False,
) -> "List[Any]":
    """Scan, with VMamba's positional arguments.

    Args:
        u: (batch, dim, length) in float32, float16 or bfloat16; delta likewise, or with a divisor of dim channels.
        A: (dim, states). D: (dim). delta_bias: (channels of delta).
        B: (batch, groups, states, length), ungrouped (batch, states, length) or constant (dim, states); C likewise.
        nrows: rows to a thread block; it changes no value and is ignored.
        oflex: True for a float32 result whatever the inputs are, rounded nowhere on the way.

    Returns:
        [out, x]: out in the inputs' dtype (float32 with oflex, or where the inputs' dtypes differ), and the scan's
        intermediates, which bwd needs.

    Raises:
        RuntimeError: a dtype or shape that the kernels do not serve.
    """
    torch, scan = _backend()
    common = _common_dtype(torch, u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    wide = torch.float32 if oflex or common is None else common
    with torch.no_grad():
        inputs = _Inputs(torch, wide, u, delta, A, B, C, D, delta_bias)
        out, x = scan.fwd(*inputs.tensors, inputs.D, None, inputs.delta_bias, delta_softplus)[:2]
        return [out, x]


def bwd(
    u: "Any",
    delta: "Any",
    A: "Any",
    B: "Any",
    C: "Any",
    D: "Any",
    delta_bias: "Any",
    dout: "Any",
    x: "Any" = None,
    delta_softplus: bool = False,
    nrows: int = 1,
) -> "List[Any]":
    """Return [du, ddelta, dA, dB, dC, dD, ddelta_bias], each in its tensor's shape and dtype; arguments as in fwd.

    Args:
        dout: gradient of out, in the inputs' dtype or in float32.
        x: what fwd returned as its second value.
        nrows: ignored.

    Raises:
        RuntimeError: a dtype or shape that the kernels do not serve.
    """
    torch, scan = _backend()
    common = _common_dtype(torch, u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias, dout=dout)
    wide = common if common is not None and dout.dtype == common else torch.float32
    with torch.no_grad():
        inputs = _Inputs(torch, wide, u, delta, A, B, C, D, delta_bias)
        intermediates = x if x is None or x.is_contiguous() else x.contiguous()
        results = scan.bwd(
            *inputs.tensors,
            inputs.D,
            None,
            inputs.delta_bias,
            _row(dout, wide),
            intermediates,
            None,
            None,
            delta_softplus,
            False,
        )
        return inputs.gradients(results[:7])


class _Inputs:
    """One call's arguments as selective_scan_cuda wants them, and the way back for their gradients."""

    def __init__(self, torch: "Any", wide: "Any", *given: "Any") -> None:
        u, delta, A, B, C, D, delta_bias = self._given = given
        narrow = torch.float32
        # one channel of delta may serve several of u
        self._repeat = u.shape[1] // delta.shape[1] if delta.dim() == 3 and delta.shape[1] else 1
        if delta.dim() != 3 or self._repeat * delta.shape[1] != u.shape[1]:
            _refuse(
                f"u has shape {tuple(u.shape)} and delta {tuple(delta.shape)}",
                "(batch, dim, length) twice; delta's dim may be a divisor of u's",
                "look at what the model passes to the scan",
            )
        if self._repeat > 1:
            delta = delta.repeat_interleave(self._repeat, dim=1)
            delta_bias = None if delta_bias is None else delta_bias.repeat_interleave(self._repeat)
        self.tensors = [
            _row(u, wide),
            _row(delta, wide),
            A.to(narrow),
            *(_row(m.unsqueeze(1) if m.dim() == 3 else m, narrow if m.dim() == 2 else wide) for m in (B, C)),
        ]
        self.D = None if D is None else _row(D, narrow)
        self.delta_bias = None if delta_bias is None else _row(delta_bias, narrow)

    def gradients(self, results: "Any") -> "List[Any]":
        """Return the seven gradients in the shapes and dtypes of what was given."""
        du, ddelta, dA, dB, dC, dD, ddelta_bias = results
        if self._repeat > 1:
            ddelta = ddelta.unflatten(1, (-1, self._repeat)).sum(2)
            ddelta_bias = None if ddelta_bias is None else ddelta_bias.unflatten(0, (-1, self._repeat)).sum(1)
        dB, dC = (grad.squeeze(1) if given.dim() == 3 else grad for grad, given in zip((dB, dC), (self._given[3:5])))
        found = (du, ddelta, dA, dB, dC, dD, ddelta_bias)
        return [
            None if grad is None or given is None else grad.to(given.dtype) for grad, given in zip(found, self._given)
        ]


def _row(tensor: "Any", dtype: "Any") -> "Any":
    """Return a tensor in dtype whose last dimension is contiguous, as the kernels demand."""
    dense = tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()
    return dense.to(dtype)


def _common_dtype(torch: "Any", **tensors: "Any") -> "Any":
    """Return the dtype that u, delta, B and C share, or None where they differ.

    Raises:
        RuntimeError: one tensor is of a dtype that the kernels do not have.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            _refuse(
                f"{name} of the selective scan is {str(tensor.dtype).replace('torch.', '')}",
                "float32 is needed (float16 and bfloat16 are served too)",
                f"convert the model and its input with .float(), or {name} alone where it is made",
            )
    sequences = [tensors["u"], tensors["delta"], *(tensors[name] for name in "BC" if tensors[name].dim() > 2)]
    dtypes = {tensor.dtype for tensor in sequences}
    return dtypes.pop() if len(dtypes) == 1 else None


def _text(found: str, expected: str, next_step: str) -> str:
    return (
        f"found:    {found}\nexpected: {expected}\nnext:     {next_step}\n"
        f"(this module is Jetson Mamba's adapter over {BACKEND}: {__file__})"
    )


def _refuse(found: str, expected: str, next_step: str) -> "NoReturn":
    raise RuntimeError(_text(found, expected, next_step))


def _backend() -> "Tuple[Any, Any]":
    """Return torch and mamba's extension; torch first, because the extension finds torch's libraries through it.

    Raises:
        ImportError: the extension is there, but cannot be loaded.
    """
    torch = importlib.import_module("torch")
    try:
        return torch, importlib.import_module(BACKEND)
    except ImportError as error:
        raise ImportError(
            _text(
                f"{BACKEND} cannot be imported: {error}",
                "the extension module of a mamba_ssm that was built for this PyTorch, Python and machine",
                "run the site again: it rebuilds what does not load (playbooks/verify.yml tells more)",
            ),
            name=BACKEND,
        ) from error


def _own_extension(name: str) -> "Any":
    """Return the spec of an extension module of this name that lies elsewhere on the path, or None.

    In the folder of this file Python prefers the extension by itself. It does not for one that is found behind this
    folder: in an egg or an editable checkout (their .pth lines append), in the user site or the system's packages.
    """
    here = os.path.dirname(os.path.realpath(__file__))
    for entry in sys.path:
        if os.path.realpath(entry or os.curdir) != here:
            spec = _extension_spec(PathFinder.find_spec, name, [entry])
            if spec is not None:
                return spec
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        if find_spec is not None and finder is not PathFinder:
            spec = _extension_spec(find_spec, name, None)
            if spec is not None:
                return spec
    return None


def _extension_spec(find_spec: "Callable[..., Optional[Any]]", name: str, path: "Any") -> "Any":
    """Return what a finder finds if it is an extension module; a finder's own errors are nobody's business here."""
    try:
        spec = find_spec(name, path)
    except Exception:
        return None
    return spec if spec is not None and isinstance(spec.loader, ExtensionFileLoader) else None


def _give_way(name: str, spec: "Any") -> None:
    """Put the project's own extension module in this one's place."""
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(
            _text(
                f"{spec.origin} cannot be loaded: {error}",
                f"a {name} that was built for this PyTorch, Python and machine (and torch imported before it)",
                "build it again, or remove it: the adapter then serves in its place",
            ),
            name=name,
            path=spec.origin,
        ) from error


def _start() -> None:
    spec = _own_extension(__name__)
    if spec is not None:
        _give_way(__name__, spec)
        return
    if BACKEND not in sys.modules and importlib.util.find_spec(BACKEND) is None:
        # so that a project's own way out (except ImportError) is taken now, not missed at the first call
        raise ModuleNotFoundError(
            _text(
                f"there is no {BACKEND} to serve {__name__}",
                "the extension module of mamba_ssm in the same environment",
                "install mamba_ssm (role mamba_ssm)",
            ),
            name=BACKEND,
        )
    if "torch" in sys.modules:
        _backend()


# under its own name in module_utils, where this file is read to be installed, it does nothing
if __name__ in NAMES:
    _start()
