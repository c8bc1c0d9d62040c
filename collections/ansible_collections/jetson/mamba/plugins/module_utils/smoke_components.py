"""The tests that say whether a device can run Mamba: a script for the interpreter of the environment under test.

`smoke_runner` copies this file's text to the device's scratch folder and runs it there as ``python FILE REQUEST``.
It therefore imports nothing but the standard library at the top, torch only inside functions, and it knows no other
file of the collection. One JSON line for each event goes to the original standard output; whatever libraries print
goes to standard error, so that it can never be taken for an event.

Events: ``start`` (a component begins), ``case`` (a part of it begins, so that a crash can be located) and ``result``.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import faulthandler
import hashlib
import importlib
import importlib.util
import json
import os
import struct
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

PASSED = "passed"
FAILED = "failed"
NOT_RUN = "not run"

EXTENSIONS = ("causal_conv1d_cuda", "selective_scan_cuda")
# what the two extensions' Python calls; counted, so that a silent fall-back cannot pass
ENTRY_POINTS = {
    "causal_conv1d_cuda": ("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"),
    "selective_scan_cuda": ("fwd", "bwd"),
}
DISTRIBUTIONS = ("causal_conv1d", "mamba_ssm")
VERSIONS_OF = ("torch", "causal_conv1d", "mamba_ssm", "triton", "torchvision", "numpy", "einops", "transformers")
DISTRIBUTED_NAMES = ("all_gather_into_tensor", "reduce_scatter_tensor", "_all_gather_base", "_reduce_scatter_base")

ELF_MACHINES = {3: "i386", 40: "ARM", 62: "x86-64", 183: "AArch64", 21: "PowerPC64", 243: "RISC-V", 22: "S390"}
ELF_OF_MACHINE = {"x86_64": 62, "amd64": 62, "aarch64": 183, "arm64": 183, "armv7l": 40, "ppc64le": 21, "riscv64": 243}

TRITON_ON_CPU = (
    "Triton kernels need a GPU; on CPU the call sites are proven by the project's tests under Triton's interpreter"
)

# upstream's own tolerances: dtype -> (relative, absolute)
CONV = {"float32": (3e-4, 1e-3), "float16": (3e-3, 5e-3), "bfloat16": (1e-2, 5e-2)}
SCAN = {"float32": (6e-4, 2e-3), "float16": (3e-3, 5e-3), "bfloat16": (1e-2, 5e-2)}
WEIGHTS = (1e-3, 1e-3)
# tl.dot works in TF32 on float32 input: ten bits of mantissa, as in float16, but what is beyond them is cut off and not
# rounded, and the reference's input keeps it. float32 therefore errs more: up to twice of what float16 is allowed, seen
# on a GPU and in 29 of 40 emulated runs. The fused functions get twice as much, because they and the reference round at
# different places between convolution, scan, norm and projection.
SSD = {"float32": (6e-3, 2e-2), "float16": (3e-3, 5e-3), "bfloat16": (1e-2, 5e-2)}
# Elementwise tolerances are blind to a small tensor that is wrong altogether, so the norm of the difference
# must be small against the norm of the reference too.
NORM = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
SSD_NORM = {"float32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Mismatch(Exception):
    """A result that is there and is wrong."""


class NotRun(Exception):
    """A component that cannot be run here, with the reason; never a pass."""


class Request:
    """What the runner asks for.

    Args:
        data: keys components, device, dtypes, seed, torchvision_expected, autotune, machine, distributions.
    """

    def __init__(self, data: Dict[str, Any]) -> None:
        self.components: List[str] = list(data["components"])
        self.device: str = data.get("device", "cuda")
        self.dtypes: List[str] = list(data.get("dtypes") or ["float32"])
        self.seed: int = int(data.get("seed", 0))
        self.torchvision_expected: bool = bool(data.get("torchvision_expected", False))
        self.autotune: bool = bool(data.get("autotune", False))
        self.machine: str = data.get("machine") or os.uname().machine
        self.distributions: List[str] = list(data.get("distributions") or DISTRIBUTIONS)


class Trial:
    """One component while it runs: the cases, the worst error met, the shapes, the failures."""

    def __init__(self, request: Request, emit: Callable[[Dict[str, Any]], None], component: str) -> None:
        self.request = request
        self.component = component
        self._emit = emit
        self.failures: List[str] = []
        self.notes: List[str] = []
        self.cases = 0
        self.dtypes: List[str] = []
        self.shapes_in: Optional[List[int]] = None
        self.shapes_out: Optional[List[int]] = None
        self.worst_ratio = -1.0
        self.max_error: Optional[float] = None
        self.tolerance: Optional[float] = None
        self.phase = "forward"
        self.extra: Dict[str, Any] = {}

    def case(self, label: str, dtype: Optional[str], body: Callable[[], None]) -> None:
        """Run one case; a failure is kept and the next case goes on."""
        name = f"{SHORT.get(dtype, dtype)} {label}" if dtype else label
        self._emit({"event": "case", "component": self.component, "case": name})
        self.phase = "forward"
        try:
            body()
        except NotRun as reason:
            self.notes.append(f"{name} not run: {reason}")
            return
        except Mismatch as wrong:
            self.failures.append(f"{name}: {wrong}")
        except Exception as error:
            self.failures.append(f"{name}: {self.phase}: {describe_exception(error)}")
        self.cases += 1
        if dtype and dtype not in self.dtypes:
            self.dtypes.append(dtype)

    def shapes(self, given: Any, got: Any) -> None:
        """Keep the shapes of the first case for the table."""
        if self.shapes_in is None:
            self.shapes_in, self.shapes_out = list(given.shape), list(got.shape)

    def compare(self, what: str, got: Any, want: Any, tolerance: Tuple[float, float], norm: float) -> None:
        """Hold a tensor against its reference.

        Args:
            what: how the message calls it, phase first ("backward: gradient of weight").
            got: the tensor from the kernels, or None.
            want: the reference.
            tolerance: relative and absolute, per element.
            norm: the most that the norm of the difference may be, against the norm of the reference.

        Raises:
            Mismatch: missing, of another shape, not finite, or too far away.
        """
        torch = load("torch")
        if got is None:
            raise Mismatch(f"{what}: nothing came back")
        if tuple(got.shape) != tuple(want.shape):
            raise Mismatch(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        got, want = got.detach().float(), want.detach().float()
        if not bool(torch.isfinite(want).all()):
            raise Mismatch(f"{what}: the reference itself is not finite, so nothing is proven")
        bad = int((~torch.isfinite(got)).sum())
        if bad:
            raise Mismatch(f"{what}: {bad} of {got.numel()} values are not finite (never written?)")
        rtol, atol = tolerance
        difference = (got - want).abs()
        allowed = atol + rtol * want.abs()
        ratio = difference / allowed
        at = int(ratio.argmax())
        error, limit = float(difference.flatten()[at]), float(allowed.flatten()[at])
        if error / limit > self.worst_ratio:
            self.worst_ratio, self.max_error, self.tolerance = error / limit, error, limit
        reference = float(want.norm())
        relative = float(difference.norm()) / reference if reference > 0 else 0.0
        if error > limit:
            off = 100 * float((ratio > 1).float().mean())
            raise Mismatch(
                f"{what} differs from the reference: error {error:.3g} where {limit:.3g} is allowed "
                f"({off:.0f} % of all values are off, relative norm {relative:.3g})"
            )
        if relative > norm:
            raise Mismatch(
                f"{what} differs from the reference: relative norm of the difference {relative:.3g}, allowed {norm:.3g}"
            )


def load(name: str) -> Any:
    """Import a module by name; late, because torch costs seconds and some components must see a bare interpreter."""
    return importlib.import_module(name)


def describe_exception(error: BaseException) -> str:
    """Return type, message and the place nearest to the cause, in one line."""
    text = " ".join(str(error).split())
    if len(text) > 600:
        text = text[:597] + "..."
    place = ""
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if path != __file__ and "importlib" not in path:
            place = " ({}:{})".format("/".join(path.split(os.sep)[-3:]), trace.tb_lineno)
        trace = trace.tb_next
    hint = ""
    if isinstance(error, TypeError) and "incompatible function arguments" in text:
        # pybind11 goes on with every signature and every tensor
        text = text.split(". The following")[0].strip()
        hint = "; the call does not fit this causal_conv1d: is the patch for this pair of versions applied?"
    return f"{type(error).__name__}: {text}{place}{hint}"


# --- files -------------------------------------------------------------------------------------------------------


def elf_machine(path: str) -> Optional[int]:
    """Return e_machine of an ELF file, or None when it is no ELF file."""
    with open(path, "rb") as stream:
        head = stream.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return int(struct.unpack("<H" if head[5] == 1 else ">H", head[18:20])[0])


def machine_name(number: Optional[int]) -> str:
    """Return the usual name of an e_machine value."""
    if number is None:
        return "no ELF file"
    return ELF_MACHINES.get(number, f"ELF machine {number}")


def wrong_machine(path: str, machine: str) -> Optional[str]:
    """Say what is wrong with a shared object for this machine (as uname names it); None when nothing is."""
    expected = ELF_OF_MACHINE.get(machine)
    if expected is None:
        return None
    found = elf_machine(path)
    if found == expected:
        return None
    return f"{path} is for {machine_name(found)}, expected {machine_name(expected)}"


def extension_files(stem: str, folders: Sequence[str]) -> List[str]:
    """Return the shared objects named `stem`, with any tag, in these folders.

    A file of another machine carries another tag, so that Python would not even find it; people see "no module".
    """
    found = []
    for folder in folders:
        if not os.path.isdir(folder):
            continue
        for name in sorted(os.listdir(folder)):
            if name.split(".")[0] == stem and name.endswith(".so"):
                found.append(os.path.join(folder, name))
    return found


def record_problems(distribution: Any) -> Tuple[int, List[str]]:
    """Hold a distribution's files against its RECORD.

    Returns:
        how many files carry a hash, and one line for each that is missing or differs.
    """
    listed = distribution.files
    if listed is None:
        return 0, ["no RECORD"]
    checked, problems = 0, []
    for entry in listed:
        if entry.hash is None:
            continue
        checked += 1
        path = str(entry.locate())
        try:
            digest = hashlib.new(entry.hash.mode)
            with open(path, "rb") as stream:
                block = stream.read(1 << 20)
                while block:
                    digest.update(block)
                    block = stream.read(1 << 20)
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
            continue
        value = base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode("ascii")
        if value != entry.hash.value:
            problems.append(f"{path} differs from its RECORD")
    return checked, problems


def installed_versions() -> Dict[str, str]:
    """Return the versions that the environment's metadata gives, without importing anything of it."""
    metadata = load("importlib.metadata")
    versions = {"python": "{}.{}.{}".format(*sys.version_info[:3])}
    for name in VERSIONS_OF:
        try:
            versions[name] = str(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return versions


# --- components that need no kernels -----------------------------------------------------------------------------


def installed_files(trial: Trial) -> None:
    """Every file of the packages and of the shim is what its RECORD says."""
    trial.extra["versions"] = installed_versions()
    metadata = load("importlib.metadata")
    total = 0
    names = list(trial.request.distributions)
    # our own small distributions (the shim) are found by their name's prefix
    for found in metadata.distributions():
        name = found.metadata["Name"] or ""
        if name.lower().replace("_", "-").startswith("jetson-mamba") and name not in names:
            names.append(name)
    for name in names:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            trial.failures.append(f"{name} is not installed in this environment")
            continue
        checked, problems = record_problems(distribution)
        total += checked
        if not checked and not problems:
            problems = ["its RECORD holds no hash"]
        trial.failures.extend(f"{name}: {line}" for line in problems[:5])
        if len(problems) > 5:
            trial.failures.append(f"{name}: {len(problems) - 5} files more")
    trial.cases = total
    trial.notes.append("{} files of {}".format(total, ", ".join(names)))


def binary_machine(trial: Trial) -> None:
    """Every shared object of the packages is for this machine."""
    metadata = load("importlib.metadata")
    paths: List[str] = []
    for name in DISTRIBUTIONS:
        try:
            listed = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            continue
        paths.extend(str(entry.locate()) for entry in listed if str(entry).endswith(".so"))
    for stem in EXTENSIONS:
        paths.extend(extension_files(stem, sys.path))
    # a file is reached by several ways (RECORD, sys.path)
    unique = sorted({os.path.realpath(path) for path in paths if os.path.exists(path)})
    if not unique:
        raise Mismatch("no shared object of {} is in this environment".format(" or ".join(DISTRIBUTIONS)))
    for path in unique:
        problem = wrong_machine(path, trial.request.machine)
        if problem:
            trial.failures.append(problem)
    trial.cases = len(unique)
    trial.notes.append(f"{len(unique)} shared objects, {machine_name(ELF_OF_MACHINE.get(trial.request.machine))}")


def linkage(extension: str) -> Callable[[Trial], None]:
    """Return a component that imports one extension first of all, before torch could load its libraries for it."""

    def component(trial: Trial) -> None:
        if "torch" in sys.modules:
            raise Mismatch(
                "torch was imported when the interpreter started (a sitecustomize or .pth file does it): "
                "every Python start pays for it, and a missing library would be hidden"
            )
        try:
            module = load(extension)
        except ImportError as error:
            wrong = [wrong_machine(path, trial.request.machine) for path in extension_files(extension, sys.path)]
            raise Mismatch("; ".join([line for line in wrong if line] + [describe_exception(error)])) from None
        trial.cases = 1
        trial.notes.append(str(getattr(module, "__file__", "")))

    return component


def torch_distributed_names(trial: Trial) -> None:
    """The four names that mamba_ssm reads from torch.distributed exist after a plain `import torch`."""
    torch = load("torch")
    missing = [name for name in DISTRIBUTED_NAMES if not callable(getattr(torch.distributed, name, None))]
    if missing:
        names = ", ".join(missing)
        raise Mismatch(
            f"torch.distributed has no {names}: the shim is missing in this environment or does not take effect"
        )
    trial.cases = len(DISTRIBUTED_NAMES)
    native = bool(torch.distributed.is_available())
    trial.notes.append("torch.distributed is %s" % ("built in" if native else "not built in; the shim gives the names"))


def import_mamba_ssm(trial: Trial) -> None:
    """A fresh interpreter imports mamba_ssm."""
    try:
        module = load("mamba_ssm")
    except Exception as error:
        raise Mismatch(f"import mamba_ssm failed: {describe_exception(error)}") from None
    trial.cases = 1
    trial.notes.append("mamba_ssm {}".format(getattr(module, "__version__", "?")))


def device(trial: Trial) -> None:
    """The device computes: asserted on a result, because probes have been seen to succeed without a GPU."""
    torch = load("torch")
    trial.extra["torch"] = str(torch.__version__)
    if trial.request.device == "cuda":
        if not torch.cuda.is_available():
            raise Mismatch(
                f"found: torch {torch.__version__} sees no usable GPU (torch.version.cuda: {torch.version.cuda}); "
                "expected: a CUDA device; next: check that this torch is NVIDIA's build for the device and that "
                "/dev/nvhost-* or /dev/nvidia* can be opened by this user (groups video, render)"
            )
        free, total = torch.cuda.mem_get_info()
        capability = "{}.{}".format(*tuple(torch.cuda.get_device_capability()))
        trial.extra["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "capability": capability,
            "free_mb": int(free >> 20),
            "total_mb": int(total >> 20),
        }
        trial.notes.append("{}, sm_{}".format(torch.cuda.get_device_name(), capability.replace(".", "")))
    else:
        trial.notes.append(f"torch {torch.__version__} on CPU")
    left = torch.arange(1, 68, device=trial.request.device, dtype=torch.float32)
    got = float((left @ left).cpu())
    want = 67 * 68 * 135 / 6.0
    if abs(got - want) > 1e-3 * want:
        raise Mismatch(f"1² + … + 67² is {got} on {trial.request.device}, expected {want}")
    trial.cases = 1


# --- tools for the kernel components -----------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what Python allocates uninitialised with NaN, so that an output that nobody wrote cannot pass."""
    torch = load("torch")
    places = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    kept = [(owner, name, getattr(owner, name)) for owner, name in places]

    def filling(original: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            tensor = original(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return allocate

    for owner, name, original in kept:
        setattr(owner, name, filling(original))
    try:
        yield
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


@contextlib.contextmanager
def counted(calls: Dict[str, int]) -> Iterator[None]:
    """Count the calls into both extensions: `calls` gets the entry points' names."""
    kept: List[Tuple[Any, str, Any]] = []

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            calls[name] = calls.get(name, 0) + 1
            return result

        return call

    for extension, names in ENTRY_POINTS.items():
        try:
            module = load(extension)
        except ImportError:
            continue
        for name in names:
            if hasattr(module, name):
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, counting(f"{extension}.{name}", getattr(module, name)))
    try:
        yield
    finally:
        for module, name, original in kept:
            setattr(module, name, original)


class Watch:
    """Poisons allocations and counts the kernels' calls for one case."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.calls: Dict[str, int] = {}

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside, outputs start as NaN and calls are counted."""
        with poisoned(), counted(self.calls):
            yield

    def backward(self, out: Any, grad: Any) -> None:
        """Run the backward pass of `out` on the kernels."""
        self.trial.phase = "backward"
        with self.kernels():
            out.backward(grad)

    def demand(self, phase: str, *names: str) -> None:
        """Raise Mismatch unless each entry point was called; the fast path must have run."""
        idle = [name for name in names if not self.calls.get(name)]
        if idle:
            raise Mismatch("{}: the fast path did not run: {} was never called".format(phase, ", ".join(idle)))


def poison_allocator(name: str) -> None:
    """Leave NaN in the GPU's cached blocks: the extensions allocate in C++, where Python cannot fill."""
    if name != "cuda":
        return
    torch = load("torch")
    blocks = [torch.full((1 << 17,), float("nan"), device="cuda") for _ in range(24)]
    blocks += [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    del blocks


def supports(device_name: str, dtype: str) -> Optional[str]:
    """Say why a dtype cannot be used on a device; None when it can."""
    torch = load("torch")
    functional = load("torch.nn.functional")
    try:
        if device_name == "cuda" and dtype == "bfloat16" and torch.cuda.get_device_capability()[0] < 8:
            return "this GPU has no bfloat16"
        one = torch.ones(2, 8, 8, device=device_name, dtype=getattr(torch, dtype))
        functional.linear(functional.silu(one), one[0])
        torch.exp(functional.softplus(one)) @ one
    except RuntimeError as error:
        return f"torch has no {dtype} on {device_name} ({str(error).splitlines()[0]})"
    return None


def each_dtype(trial: Trial) -> Iterator[str]:
    """Yield the dtypes wanted that the device has; note the others."""
    usable = 0
    for dtype in trial.request.dtypes:
        reason = supports(trial.request.device, dtype)
        if reason:
            trial.notes.append(f"{SHORT.get(dtype, dtype)} not run: {reason}")
            continue
        usable += 1
        yield dtype
    if not usable:
        raise NotRun("none of the dtypes asked for works here")


class Dice:
    """Random tensors with a fixed seed, made on CPU, so that every device meets the same numbers."""

    def __init__(self, request: Request, dtype: str) -> None:
        self.torch = load("torch")
        self.generator = self.torch.Generator().manual_seed(request.seed)
        self.device = request.device
        self.dtype = getattr(self.torch, dtype)

    def normal(self, *shape: int, dtype: Any = None, scale: float = 1.0) -> Any:
        """Return normal numbers; dtype None means the case's own."""
        values = self.torch.randn(*shape, generator=self.generator) * scale
        return values.to(device=self.device, dtype=dtype or self.dtype)

    def uniform(self, *shape: int, dtype: Any = None, low: float = 0.0, high: float = 1.0) -> Any:
        """Return uniform numbers; dtype None means the case's own."""
        values = self.torch.rand(*shape, generator=self.generator) * (high - low) + low
        return values.to(device=self.device, dtype=dtype or self.dtype)


def pair(tensor: Any) -> Tuple[Any, Any]:
    """Return two leaves with the same values, for the kernels and for the reference; strides are kept."""
    if tensor is None:
        return None, None
    return tensor.detach().requires_grad_(), tensor.detach().clone().requires_grad_()


def compare_gradients(
    trial: Trial,
    leaves: Dict[str, Tuple[Any, Any]],
    tolerances: Dict[str, Tuple[float, float]],
    default: Tuple[float, float],
    norm: float,
) -> None:
    """Hold every leaf's gradient against the reference's; `tolerances` names those that differ from `default`."""
    for name, (ours, reference) in leaves.items():
        if ours is None:
            continue
        trial.compare(f"backward: gradient of {name}", ours.grad, reference.grad, tolerances.get(name, default), norm)


# --- causal_conv1d -----------------------------------------------------------------------------------------------


def _conv_case(
    trial: Trial, dtype: str, seqlen: int, width: int, bias: bool, silu: bool, states: bool
) -> Callable[[], None]:
    def body() -> None:
        interface = load("causal_conv1d.causal_conv1d_interface")
        dice, watch = Dice(trial.request, dtype), Watch(trial)
        torch = dice.torch
        batch, dim = 2, 64
        if states:  # these need the channel-last layout
            x = dice.normal(batch, seqlen, dim + 16)[:, :, 8 : 8 + dim].transpose(1, 2)
        else:  # a slice, as Mamba passes one half of xz
            x = dice.normal(batch, dim + 16, seqlen)[:, 8 : 8 + dim]
        leaves = {
            "x": pair(x),
            "weight": pair(dice.normal(dim, width, dtype=torch.float32)),
            "bias": pair(dice.normal(dim, dtype=torch.float32) if bias else None),
            "initial_states": pair(dice.normal(batch, width - 1, dim).transpose(1, 2) if states else None),
        }
        activation = "silu" if silu else None
        ours, reference = ([leaves[n][i] for n in ("x", "weight", "bias", "initial_states")] for i in (0, 1))
        poison_allocator(trial.request.device)
        with watch.kernels():
            out = interface.causal_conv1d_fn(
                ours[0], ours[1], ours[2], initial_states=ours[3], return_final_states=states, activation=activation
            )
        want = interface.causal_conv1d_ref(
            reference[0],
            reference[1],
            reference[2],
            initial_states=reference[3],
            return_final_states=states,
            activation=activation,
        )
        watch.demand("forward", "causal_conv1d_cuda.causal_conv1d_fwd")
        if states:
            (out, final), (want, want_final) = out, want
            trial.compare("forward: final states", final, want_final, CONV[dtype], NORM[dtype])
        trial.shapes(x, out)
        trial.compare("forward: output", out, want, CONV[dtype], NORM[dtype])
        grad = dice.normal(*out.shape)
        if states:  # the final states' gradient takes part, as upstream's test has it
            out = out + torch.sigmoid(final).sum(dim=-1, keepdim=True)
            want = want + torch.sigmoid(want_final).sum(dim=-1, keepdim=True)
        watch.backward(out, grad)
        want.backward(grad)
        watch.demand("backward", "causal_conv1d_cuda.causal_conv1d_bwd")
        compare_gradients(trial, leaves, {"weight": WEIGHTS, "bias": WEIGHTS}, CONV[dtype], NORM[dtype])

    return body


def causal_conv1d_fn(trial: Trial) -> None:
    """The convolution, with and without SiLU, bias and states, forward and backward."""
    for dtype in each_dtype(trial):
        cases = [
            (67, 4, True, True, False),
            (67, 4, True, False, False),
            (67, 3, False, True, False),
            (2, 2, True, True, False),  # shorter than most kernels' tile, and than a width of 3
            (67, 4, True, True, True),
        ]
        if trial.request.device == "cuda":
            cases += [(1134, 4, True, True, False), (1134, 4, True, True, True)]
        for seqlen, width, bias, silu, states in cases:
            label = "seqlen {}, width {}{}{}{}".format(
                seqlen,
                width,
                ", bias" if bias else "",
                ", silu" if silu else "",
                ", states" if states else "",
            )
            trial.case(label, dtype, _conv_case(trial, dtype, seqlen, width, bias, silu, states))


def causal_conv1d_seq_idx(trial: Trial) -> None:
    """Several sequences in one row (seq_idx): none may see its neighbour."""
    for dtype in each_dtype(trial):

        def body(dtype: str = dtype) -> None:
            interface = load("causal_conv1d.causal_conv1d_interface")
            dice, watch = Dice(trial.request, dtype), Watch(trial)
            torch = dice.torch
            lengths, dim = [1, 30, 36], 64
            x = dice.normal(2, sum(lengths), dim).transpose(1, 2)
            leaves = {
                "x": pair(x),
                "weight": pair(dice.normal(dim, 4, dtype=torch.float32)),
                "bias": pair(dice.normal(dim, dtype=torch.float32)),
            }
            index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            index = index.to(device=trial.request.device, dtype=torch.int32).expand(2, -1).contiguous()
            poison_allocator(trial.request.device)
            with watch.kernels():
                out = interface.causal_conv1d_fn(
                    leaves["x"][0], leaves["weight"][0], leaves["bias"][0], seq_idx=index, activation="silu"
                )
            pieces = torch.split(leaves["x"][1], lengths, dim=2)
            want = torch.cat(
                [
                    interface.causal_conv1d_ref(piece, leaves["weight"][1], leaves["bias"][1], activation="silu")
                    for piece in pieces
                ],
                dim=2,
            )
            trial.shapes(x, out)
            trial.compare("forward: output", out, want, CONV[dtype], NORM[dtype])
            grad = dice.normal(*out.shape)
            watch.backward(out, grad)
            want.backward(grad)
            watch.demand("backward", "causal_conv1d_cuda.causal_conv1d_fwd", "causal_conv1d_cuda.causal_conv1d_bwd")
            compare_gradients(trial, leaves, {"weight": WEIGHTS, "bias": WEIGHTS}, CONV[dtype], NORM[dtype])

        trial.case("three sequences in a row", dtype, body)


def causal_conv1d_update(trial: Trial) -> None:
    """One step of generation: output and state, also with a circular buffer."""
    variants = [(1, 3, True, True, False), (1, 4, False, False, False), (5, 7, True, True, True)]
    for dtype in each_dtype(trial):
        for seqlen, state_len, bias, silu, circular in variants:

            def body(
                dtype: str = dtype,
                seqlen: int = seqlen,
                state_len: int = state_len,
                bias: bool = bias,
                silu: bool = silu,
                circular: bool = circular,
            ) -> None:
                interface = load("causal_conv1d.causal_conv1d_interface")
                dice, watch = Dice(trial.request, dtype), Watch(trial)
                torch = dice.torch
                batch, dim, width = 3, 72, 4
                x = dice.normal(batch, dim, seqlen)
                if seqlen == 1:
                    x = x.squeeze(-1)
                state = dice.normal(batch, dim, state_len)
                want_state = state.clone()
                weight = dice.normal(dim, width, dtype=torch.float32)
                offset = dice.normal(dim, dtype=torch.float32) if bias else None
                seen = None
                if circular:
                    seen = torch.tensor([0, 4, 1023], dtype=torch.int32, device=trial.request.device)
                activation = "silu" if silu else None
                poison_allocator(trial.request.device)
                with watch.kernels():
                    out = interface.causal_conv1d_update(
                        x, state, weight, offset, activation=activation, cache_seqlens=seen
                    )
                want = interface.causal_conv1d_update_ref(
                    x, want_state, weight, offset, activation=activation, cache_seqlens=seen
                )
                watch.demand("forward", "causal_conv1d_cuda.causal_conv1d_update")
                trial.shapes(x, out)
                trial.compare("forward: output", out, want, CONV[dtype], NORM[dtype])
                trial.compare("forward: state", state, want_state, (0.0, 1e-12), NORM[dtype])

            label = "{} step{}, state of {}{}".format(
                seqlen,
                "" if seqlen == 1 else "s",
                state_len,
                ", circular" if circular else "",
            )
            trial.case(label, dtype, body)


# --- selective scan and Mamba ------------------------------------------------------------------------------------


def _scan_case(trial: Trial, dtype: str, seqlen: int, variant: str) -> Callable[[], None]:
    def body() -> None:
        interface = load("mamba_ssm.ops.selective_scan_interface")
        dice, watch = Dice(trial.request, dtype), Watch(trial)
        f32 = dice.torch.float32
        batch, dim, dstate = 2, 24, 8
        full = variant == "all inputs"
        groups = 2 if variant == "groups" else 0
        shape = (batch, groups, dstate, seqlen) if groups else (batch, dstate, seqlen)
        constant = variant == "constant B"
        leaves = {
            "u": pair(dice.normal(batch, dim, seqlen)),
            "delta": pair(dice.uniform(batch, dim, seqlen, high=0.5)),
            "A": pair(-dice.uniform(dim, dstate, dtype=f32, low=0.05, high=0.5)),
            "B": pair(dice.normal(dim, dstate, dtype=f32) if constant else dice.normal(*shape)),
            "C": pair(dice.normal(*shape, scale=dstate**-0.5)),
            "D": pair(dice.normal(dim, dtype=f32) if full else None),
            "z": pair(dice.normal(batch, dim, seqlen) if full else None),
            "delta_bias": pair(dice.uniform(dim, dtype=f32, high=0.5) if full else None),
        }
        arguments = [[leaves[name][i] for name in leaves] for i in (0, 1)]
        poison_allocator(trial.request.device)
        with watch.kernels():
            out, last = interface.selective_scan_fn(*arguments[0], delta_softplus=full, return_last_state=True)
        want, want_last = interface.selective_scan_ref(*arguments[1], delta_softplus=full, return_last_state=True)
        watch.demand("forward", "selective_scan_cuda.fwd")
        rtol, atol = SCAN[dtype]
        trial.shapes(out, out)
        trial.compare("forward: output", out, want, (rtol, atol), NORM[dtype])
        # a constant B is multiplied into the output alone: the kernel's state is without it, the reference's with it
        if not constant:
            trial.compare("forward: last state", last, want_last, (rtol, atol), NORM[dtype])
        grad = dice.normal(*out.shape)
        watch.backward(out, grad)
        want.backward(grad)
        watch.demand("backward", "selective_scan_cuda.bwd")
        weights = (max(WEIGHTS[0], rtol), max(WEIGHTS[1], atol))
        compare_gradients(
            trial,
            leaves,
            {
                "u": (rtol * 2, atol * 2),
                "delta": (rtol * 5, atol * 10),
                "A": (weights[0], weights[1] * 5),
                "B": weights if constant else (rtol, atol),
                "D": weights,
                "z": weights,
                "delta_bias": weights,
            },
            (rtol, atol),
            NORM[dtype],
        )

    return body


def selective_scan_fn(trial: Trial) -> None:
    """The scan, with everything that it can be given and with little, forward and backward."""
    for dtype in each_dtype(trial):
        cases = [(67, "all inputs"), (67, "groups"), (67, "constant B")]
        if trial.request.device == "cuda" and dtype == "float32":
            cases.append((2115, "all inputs"))  # the kernels work in chunks of 2048
        for seqlen, variant in cases:
            trial.case(f"seqlen {seqlen}, {variant}", dtype, _scan_case(trial, dtype, seqlen, variant))


def inner_reference(
    xz: Any,
    conv_weight: Any,
    conv_bias: Any,
    x_proj: Any,
    dt_proj: Any,
    out_proj: Any,
    out_bias: Any,
    a: Any,
    d: Any,
    dt_bias: Any,
) -> Any:
    """Mamba's inner function from upstream's pure-torch parts (its own mamba_inner_ref calls the extensions)."""
    torch = load("torch")
    functional = load("torch.nn.functional")
    conv_ref = load("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    scan_ref = load("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    rank, states = dt_proj.shape[1], a.shape[1]
    x, z = xz.chunk(2, dim=1)
    x = conv_ref(x, conv_weight.squeeze(1), conv_bias, activation="silu")
    projected = functional.linear(x.transpose(1, 2), x_proj)  # batch, length, rank + 2 states
    delta, b, c = torch.split(projected, [rank, states, states], dim=-1)
    delta = functional.linear(delta, dt_proj).transpose(1, 2)
    y = scan_ref(x, delta, a, b.transpose(1, 2), c.transpose(1, 2), d, z=z, delta_bias=dt_bias, delta_softplus=True)
    return functional.linear(y.transpose(1, 2), out_proj, out_bias)


MAMBA_FORWARD = ("causal_conv1d_cuda.causal_conv1d_fwd", "selective_scan_cuda.fwd")
MAMBA_BACKWARD = ("causal_conv1d_cuda.causal_conv1d_bwd", "selective_scan_cuda.bwd")


def mamba_inner_fn(trial: Trial) -> None:
    """The fused function whose call sites the patch changes, forward and backward."""
    for dtype in each_dtype(trial):

        def body(dtype: str = dtype) -> None:
            interface = load("mamba_ssm.ops.selective_scan_interface")
            dice, watch = Dice(trial.request, dtype), Watch(trial)
            f32 = dice.torch.float32
            batch, dim, states, rank, seqlen = 2, 48, 8, 6, 67
            leaves = {
                "xz": pair(dice.normal(batch, 2 * dim, seqlen)),
                # scaled so that outputs are of the order of one: the tolerances are upstream's for such
                "conv1d_weight": pair(dice.normal(dim, 1, 4, dtype=f32, scale=0.4)),
                "conv1d_bias": pair(dice.normal(dim, dtype=f32, scale=0.4)),
                "x_proj_weight": pair(dice.normal(rank + 2 * states, dim, scale=dim**-0.5)),
                "delta_proj_weight": pair(dice.normal(dim, rank, scale=rank**-0.5)),
                "out_proj_weight": pair(dice.normal(dim // 2, dim, scale=dim**-0.5)),
                "out_proj_bias": (None, None),
                "A": pair(-dice.uniform(dim, states, dtype=f32, low=0.05, high=0.5)),
                "D": pair(dice.normal(dim, dtype=f32)),
                "delta_bias": pair(dice.uniform(dim, dtype=f32, high=0.5)),
            }
            ours, reference = ([leaves[name][i] for name in leaves] for i in (0, 1))
            poison_allocator(trial.request.device)
            with watch.kernels():
                out = interface.mamba_inner_fn(*ours[:8], None, None, ours[8], delta_bias=ours[9], delta_softplus=True)
            want = inner_reference(*reference)
            watch.demand("forward", *MAMBA_FORWARD)
            rtol, atol = SCAN[dtype]
            trial.shapes(leaves["xz"][0], out)
            trial.compare("forward: output", out, want, (rtol, atol), NORM[dtype])
            grad = dice.normal(*out.shape)
            watch.backward(out, grad)
            want.backward(grad)
            watch.demand("backward", *MAMBA_BACKWARD)
            wide = (max(WEIGHTS[0], rtol * 5), max(WEIGHTS[1], atol * 10))
            compare_gradients(trial, leaves, {"xz": (rtol * 2, atol * 2)}, wide, NORM[dtype])

        trial.case("seqlen 67", dtype, body)


def _mamba(trial: Trial, dtype: str) -> Any:
    torch = load("torch")
    simple = load("mamba_ssm.modules.mamba_simple")
    torch.manual_seed(trial.request.seed)
    model = simple.Mamba(d_model=32, d_state=8, d_conv=4, expand=2, layer_idx=0)
    model = model.to(device=trial.request.device)
    # as Mamba keeps them: A_log and D stay float32 while the rest is cast
    kept = {name: getattr(model, name).detach().clone() for name in ("A_log", "D")}
    model = model.to(dtype=getattr(torch, dtype))
    for name, value in kept.items():
        setattr(model, name, torch.nn.Parameter(value))
    return model


def _mamba_reference(model: Any, x: Any) -> Any:
    functional = load("torch.nn.functional")
    xz = functional.linear(x, model.in_proj.weight, model.in_proj.bias).transpose(1, 2)
    return inner_reference(
        xz,
        model.conv1d.weight,
        model.conv1d.bias,
        model.x_proj.weight,
        model.dt_proj.weight,
        model.out_proj.weight,
        model.out_proj.bias,
        -load("torch").exp(model.A_log.float()),
        model.D.float(),
        model.dt_proj.bias.float(),
    )


def mamba_module(trial: Trial) -> None:
    """The Mamba block as people use it; its fast path must have run, forward and backward."""
    for dtype in each_dtype(trial):

        def body(dtype: str = dtype) -> None:
            dice, watch = Dice(trial.request, dtype), Watch(trial)
            model = _mamba(trial, dtype)
            twin = copy.deepcopy(model)
            if not model.use_fast_path:
                raise Mismatch("forward: Mamba was built with use_fast_path off")
            x, x_ref = pair(dice.normal(2, 67, 32))
            poison_allocator(trial.request.device)
            with watch.kernels():
                out = model(x)
            want = _mamba_reference(twin, x_ref)
            watch.demand("forward", *MAMBA_FORWARD)
            rtol, atol = SCAN[dtype]
            trial.shapes(x, out)
            trial.compare("forward: output", out, want, (rtol, atol), NORM[dtype])
            grad = dice.normal(*out.shape)
            watch.backward(out, grad)
            want.backward(grad)
            watch.demand("backward", *MAMBA_BACKWARD)
            leaves = {"the input": (x, x_ref)}
            references = dict(twin.named_parameters())
            leaves.update({name: (value, references[name]) for name, value in model.named_parameters()})
            wide = (max(WEIGHTS[0], rtol * 5), max(WEIGHTS[1], atol * 10))
            compare_gradients(trial, leaves, {"the input": (rtol * 2, atol * 2)}, wide, NORM[dtype])

        trial.case("seqlen 67", dtype, body)


def mamba_generation(trial: Trial) -> None:
    """Token by token gives what the whole sequence gives."""
    simple = load("mamba_ssm.modules.mamba_simple")
    on_cpu = trial.request.device != "cuda"
    if on_cpu:
        trial.notes.append("the state update took Mamba's pure-torch branch (Triton needs a GPU)")
    for dtype in each_dtype(trial):
        if on_cpu and dtype != "float32":
            trial.notes.append(f"{SHORT.get(dtype, dtype)} not run: Mamba's pure-torch branch is float32 only")
            continue

        def body(dtype: str = dtype) -> None:
            torch = load("torch")
            dice, watch = Dice(trial.request, dtype), Watch(trial)
            model = _mamba(trial, dtype)
            x = dice.normal(2, 11, 32)
            kept = simple.selective_state_update
            if on_cpu:
                simple.selective_state_update = None
            try:
                with torch.no_grad(), watch.kernels():
                    conv_state, ssm_state = model.allocate_inference_cache(2, x.shape[1])
                    steps = []
                    for position in range(x.shape[1]):
                        step, conv_state, ssm_state = model.step(x[:, position : position + 1], conv_state, ssm_state)
                        steps.append(step)
                    got = torch.cat(steps, dim=1)
            finally:
                simple.selective_state_update = kept
            with torch.no_grad():
                want = _mamba_reference(model, x)
            watch.demand("forward", "causal_conv1d_cuda.causal_conv1d_update")
            trial.shapes(x, got)
            trial.compare("forward: steps against the sequence", got, want, SCAN[dtype], NORM[dtype])

        trial.case("11 steps", dtype, body)


# --- Triton: Mamba2 and what is under it -------------------------------------------------------------------------


def needs_triton(trial: Trial) -> None:
    """Raise NotRun on a CPU; elsewhere see to it that Triton does not spend minutes on tuning."""
    if trial.request.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotRun(TRITON_ON_CPU)
    if trial.request.autotune:
        return
    load("mamba_ssm.ops.triton.ssd_combined")
    load("mamba_ssm.ops.triton.layernorm_gated")
    autotuner = load("triton.runtime.autotuner").Autotuner
    for name, module in list(sys.modules.items()):
        if not name.startswith("mamba_ssm.ops.triton"):
            continue
        for value in vars(module).values():
            while value is not None and hasattr(value, "fn"):
                if isinstance(value, autotuner) and len(value.configs) > 1:
                    value.configs[:] = [min(value.configs, key=_tile)]
                value = value.fn
    trial.notes.append("one tile configuration a kernel")


def _tile(config: Any) -> int:
    """The size of a configuration's tile: the smallest fits every GPU's shared memory."""
    size = 1
    for key, value in config.kwargs.items():
        if key.startswith("BLOCK_SIZE"):
            size *= int(value)
    return size


def selective_state_update(trial: Trial) -> None:
    """The Triton kernel behind a step of generation."""
    needs_triton(trial)
    for dtype in each_dtype(trial):

        def body(dtype: str = dtype) -> None:
            update = load("mamba_ssm.ops.triton.selective_state_update")
            dice = Dice(trial.request, dtype)
            f32 = dice.torch.float32
            batch, dim, states = 2, 70, 16
            state = dice.normal(batch, dim, states)
            want_state = state.clone()
            arguments = (
                dice.normal(batch, dim),
                dice.normal(batch, dim),
                -dice.uniform(dim, states, dtype=f32, low=0.5, high=1.5),
                dice.normal(batch, states),
                dice.normal(batch, states),
            )
            rest = {
                "D": dice.normal(dim, dtype=f32),
                "z": dice.normal(batch, dim),
                "dt_bias": dice.normal(dim, dtype=f32, scale=0.5),
                "dt_softplus": True,
            }
            with poisoned():
                out = update.selective_state_update(state, *arguments, **rest)
            want = update.selective_state_update_ref(want_state, *arguments, **rest)
            trial.shapes(arguments[0], out)
            # upstream's test doubles the scan's bfloat16 tolerance here
            rtol, atol = SCAN[dtype]
            trial.compare("forward: state", state, want_state, (rtol, atol * 2), NORM[dtype])
            trial.compare("forward: output", out, want, (rtol, atol * 2), NORM[dtype])

        trial.case("dim 70", dtype, body)


def ssd_reference(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any, dt_bias: Any) -> Any:
    """State-space duality as a plain recurrence in float32: right for every length, and shares no code with Triton.

    Args:
        x: batch, length, heads, headdim; dt: batch, length, heads; a, d, dt_bias: heads;
        b, c: batch, length, groups, states.
    """
    torch = load("torch")
    functional = load("torch.nn.functional")
    kind = x.dtype
    heads = x.shape[2]
    x, b, c = x.float(), b.float(), c.float()
    dt = functional.softplus(dt.float() + dt_bias.float())
    b = b.repeat_interleave(heads // b.shape[2], dim=2)
    c = c.repeat_interleave(heads // c.shape[2], dim=2)
    decay = torch.exp(dt * a.float())
    state = x.new_zeros(x.shape[0], heads, x.shape[3], b.shape[3])
    outputs = []
    for t in range(x.shape[1]):
        grown = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        state = state * decay[:, t, :, None, None] + grown
        outputs.append((state * c[:, t, :, None, :]).sum(-1))
    return (torch.stack(outputs, dim=1) + x * d.float()[:, None]).to(kind)


def gated_norm_reference(y: Any, z: Any, weight: Any, eps: float) -> Any:
    """RMS norm after the gate, in float32, as Mamba2's default has it."""
    functional = load("torch.nn.functional")
    gated = y.float() * functional.silu(z.float())
    scaled = gated * (gated.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (scaled * weight.float()).to(y.dtype)


def split_reference(leaves: Sequence[Any], out_bias: Any, eps: float, headdim: int, groups: int) -> Any:
    """Mamba2's fused function from pure-torch parts.

    Args:
        leaves: zxbcdt, the convolution's weight and bias, dt_bias, A, D, the norm's weight, the output's weight.
    """
    zxbcdt, conv_weight, conv_bias, dt_bias, a, d, norm_weight, out_proj = leaves
    torch = load("torch")
    functional = load("torch.nn.functional")
    conv_ref = load("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    heads = d.shape[0]
    dim = heads * headdim
    states = (conv_weight.shape[0] - dim) // (2 * groups)
    z, xbc, dt = torch.split(zxbcdt, [dim, conv_weight.shape[0], heads], dim=-1)
    xbc = conv_ref(xbc.transpose(1, 2), conv_weight, conv_bias, activation="silu").transpose(1, 2)
    x, b, c = torch.split(xbc, [dim, groups * states, groups * states], dim=-1)
    rows = x.shape[:2]
    y = ssd_reference(
        x.reshape(*rows, heads, headdim),
        dt,
        a,
        b.reshape(*rows, groups, states),
        c.reshape(*rows, groups, states),
        d,
        dt_bias,
    )
    y = gated_norm_reference(y.reshape(*rows, dim), z, norm_weight, eps)
    return functional.linear(y, out_proj, out_bias)


def mamba_chunk_scan_combined(trial: Trial) -> None:
    """ssd_combined: whole chunks against upstream's reference, a ragged end against a plain recurrence."""
    needs_triton(trial)
    for dtype in each_dtype(trial):
        for seqlen in (64, 67):

            def body(dtype: str = dtype, seqlen: int = seqlen) -> None:
                combined = load("mamba_ssm.ops.triton.ssd_combined")
                dice, watch = Dice(trial.request, dtype), Watch(trial)
                f32 = dice.torch.float32
                batch, heads, headdim, groups, states, chunk = 2, 4, 32, 2, 16, 32
                leaves = {
                    "x": pair(dice.normal(batch, seqlen, heads, headdim)),
                    "dt": pair(dice.normal(batch, seqlen, heads, scale=0.5)),
                    "A": pair(-dice.uniform(heads, dtype=f32, low=0.2, high=1.0)),
                    "B": pair(dice.normal(batch, seqlen, groups, states, scale=states**-0.5)),
                    "C": pair(dice.normal(batch, seqlen, groups, states)),
                    "D": pair(dice.normal(heads, dtype=f32)),
                    "dt_bias": pair(dice.normal(heads, dtype=f32, scale=0.5)),
                }
                ours, reference = ([leaves[name][i] for name in leaves] for i in (0, 1))
                with poisoned():
                    out = combined.mamba_chunk_scan_combined(
                        *ours[:5], chunk, D=ours[5], dt_bias=ours[6], dt_softplus=True
                    )
                if seqlen % chunk:
                    want = ssd_reference(*reference)
                else:
                    want = combined.ssd_chunk_scan_combined_ref(
                        *reference[:5], chunk, D=reference[5], dt_bias=reference[6], dt_softplus=True
                    )
                rtol, atol = SSD[dtype]
                trial.shapes(leaves["x"][0], out)
                trial.compare("forward: output", out, want, (rtol, atol), SSD_NORM[dtype])
                grad = dice.normal(*out.shape)
                watch.backward(out, grad)
                want.backward(grad)
                compare_gradients(trial, leaves, {}, (rtol * 5, atol * 10), SSD_NORM[dtype])

            trial.case(f"seqlen {seqlen}, chunks of 32", dtype, body)


def mamba_split_conv1d_scan_combined(trial: Trial) -> None:
    """Mamba2's fused function: the other file that the patch changes, forward and backward."""
    needs_triton(trial)
    for dtype in each_dtype(trial):

        def body(dtype: str = dtype) -> None:
            combined = load("mamba_ssm.ops.triton.ssd_combined")
            dice, watch = Dice(trial.request, dtype), Watch(trial)
            f32 = dice.torch.float32
            batch, seqlen, heads, headdim, groups, states = 2, 67, 8, 16, 1, 16
            dim, eps = heads * headdim, 1e-5
            channels = dim + 2 * groups * states
            leaves = {
                "zxbcdt": pair(dice.normal(batch, seqlen, dim + channels + heads)),
                "conv1d_weight": pair(dice.normal(channels, 4, dtype=f32, scale=0.5)),
                "conv1d_bias": pair(dice.normal(channels, dtype=f32)),
                "dt_bias": pair(dice.normal(heads, dtype=f32, scale=0.5)),
                "A": pair(-dice.uniform(heads, dtype=f32, low=0.2, high=1.0)),
                "D": pair(dice.normal(heads, dtype=f32)),
                "rmsnorm_weight": pair(dice.uniform(dim, low=0.5, high=1.5)),
                "outproj_weight": pair(dice.normal(dim // 2, dim, scale=dim**-0.5)),
            }
            ours, reference = ([leaves[name][i] for name in leaves] for i in (0, 1))
            poison_allocator(trial.request.device)
            with watch.kernels():
                out = combined.mamba_split_conv1d_scan_combined(
                    *ours[:6],
                    chunk_size=32,
                    activation="silu",
                    rmsnorm_weight=ours[6],
                    rmsnorm_eps=eps,
                    outproj_weight=ours[7],
                    headdim=headdim,
                    ngroups=groups,
                    norm_before_gate=False,
                )
            want = split_reference(reference, None, eps, headdim, groups)
            watch.demand("forward", "causal_conv1d_cuda.causal_conv1d_fwd")
            rtol, atol = SSD[dtype]
            trial.shapes(leaves["zxbcdt"][0], out)
            trial.compare("forward: output", out, want, (rtol * 2, atol * 2), SSD_NORM[dtype])
            grad = dice.normal(*out.shape)
            watch.backward(out, grad)
            want.backward(grad)
            watch.demand("backward", "causal_conv1d_cuda.causal_conv1d_bwd")
            compare_gradients(trial, leaves, {}, (rtol * 5, atol * 10), SSD_NORM[dtype])

        trial.case("seqlen 67, chunks of 32", dtype, body)


def mamba2_module(trial: Trial) -> None:
    """The Mamba2 block as people use it, forward and backward."""
    needs_triton(trial)
    for dtype in each_dtype(trial):

        def body(dtype: str = dtype) -> None:
            torch = load("torch")
            module = load("mamba_ssm.modules.mamba2")
            dice, watch = Dice(trial.request, dtype), Watch(trial)
            torch.manual_seed(trial.request.seed)
            model = module.Mamba2(d_model=64, d_state=16, headdim=16, chunk_size=32, layer_idx=0)
            model = model.to(device=trial.request.device)
            kept = {name: getattr(model, name).detach().clone() for name in ("A_log", "D", "dt_bias")}
            model = model.to(dtype=getattr(torch, dtype))
            for name, value in kept.items():
                setattr(model, name, torch.nn.Parameter(value))
            twin = copy.deepcopy(model)
            x, x_ref = pair(dice.normal(2, 67, 64))
            poison_allocator(trial.request.device)
            with watch.kernels():
                out = model(x)
            fused = [twin.in_proj(x_ref), twin.conv1d.weight.squeeze(1), twin.conv1d.bias, twin.dt_bias]
            fused += [-torch.exp(twin.A_log.float()), twin.D, twin.norm.weight, twin.out_proj.weight]
            want = split_reference(fused, twin.out_proj.bias, twin.norm.eps, 16, 1)
            watch.demand("forward", "causal_conv1d_cuda.causal_conv1d_fwd")
            rtol, atol = SSD[dtype]
            trial.shapes(x, out)
            trial.compare("forward: output", out, want, (rtol * 2, atol * 2), SSD_NORM[dtype])
            grad = dice.normal(*out.shape)
            watch.backward(out, grad)
            want.backward(grad)
            watch.demand("backward", "causal_conv1d_cuda.causal_conv1d_bwd")
            references = dict(twin.named_parameters())
            leaves = {"the input": (x, x_ref)}
            leaves.update({name: (value, references[name]) for name, value in model.named_parameters()})
            compare_gradients(trial, leaves, {}, (rtol * 5, atol * 10), SSD_NORM[dtype])

        trial.case("seqlen 67", dtype, body)


def torchvision_nms(trial: Trial) -> None:
    """torchvision fits torch: its compiled operator answers, and rightly."""
    if not trial.request.torchvision_expected:
        raise NotRun("no torchvision is wanted for this platform")
    torch = load("torch")
    torchvision = load("torchvision")
    boxes = torch.tensor(
        [[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 9.5], [50, 50, 60, 60]],
        dtype=torch.float32,
        device=trial.request.device,
    )
    scores = torch.tensor([0.9, 0.8, 0.95, 0.85, 0.1], device=trial.request.device)
    kept = torchvision.ops.nms(boxes, scores, 0.5).cpu().tolist()
    if kept != [2, 0, 4]:
        raise Mismatch(f"torchvision.ops.nms kept the boxes {kept}, expected [2, 0, 4]")
    trial.shapes(boxes, torch.empty(len(kept)))
    trial.cases = 1
    trial.dtypes.append("float32")
    trial.notes.append(f"torchvision {torchvision.__version__}")


COMPONENTS: Dict[str, Callable[[Trial], None]] = {
    "installed_files": installed_files,
    "binary_machine": binary_machine,
    "linkage_causal_conv1d_cuda": linkage("causal_conv1d_cuda"),
    "linkage_selective_scan_cuda": linkage("selective_scan_cuda"),
    "torch_distributed_names": torch_distributed_names,
    "import_mamba_ssm": import_mamba_ssm,
    "device": device,
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_seq_idx": causal_conv1d_seq_idx,
    "causal_conv1d_update": causal_conv1d_update,
    "selective_scan_fn": selective_scan_fn,
    "mamba_inner_fn": mamba_inner_fn,
    "mamba_module": mamba_module,
    "mamba_generation": mamba_generation,
    "selective_state_update": selective_state_update,
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
    "mamba2_module": mamba2_module,
    "torchvision_nms": torchvision_nms,
}


def summarise(failures: Sequence[str], most: int = 3) -> str:
    """Return the first failures in one line; the same one in several cases ("fp16 seqlen 67: …") is told once."""
    told: Dict[str, List[str]] = {}
    for line in failures:
        name, mark, text = line.partition(": ")
        told.setdefault(text if mark else line, []).append(name if mark else "")
    lines = []
    for text, names in list(told.items())[:most]:
        known = ", ".join(name for name in names if name)
        lines.append(f"{known}: {text}" if known else text)
    more = len(told) - most
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


def run_component(name: str, request: Request, emit: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Run one component and return its result event."""
    trial = Trial(request, emit, name)
    started = time.monotonic()
    status = PASSED
    reason = ""
    try:
        COMPONENTS[name](trial)
    except NotRun as why:
        status, reason = NOT_RUN, str(why)
    except Mismatch as wrong:
        trial.failures.append(str(wrong))
    except Exception as error:
        trial.failures.append(describe_exception(error))
    if trial.failures:
        status = FAILED
        reason = summarise(trial.failures)
    elif status == PASSED and not trial.cases:
        # every case of it was left out: that is no pass
        status, reason = NOT_RUN, "; ".join(trial.notes) or "no case of it could be run"
    elif status == PASSED:
        reason = "; ".join(trial.notes)
    return {
        "event": "result",
        "component": name,
        "status": status,
        "dtypes": trial.dtypes,
        "shapes_in": trial.shapes_in,
        "shapes_out": trial.shapes_out,
        "max_error": trial.max_error,
        "tolerance": trial.tolerance,
        "cases": trial.cases,
        "failures": trial.failures,
        "notes": trial.notes,
        "seconds": round(time.monotonic() - started, 3),
        "message": reason,
        "extra": trial.extra,
    }


def prepare_torch(request: Request) -> None:
    """Make references exact: TensorFloat-32 in cuBLAS or cuDNN would blur what the kernels are held against."""
    torch = load("torch")
    torch.manual_seed(request.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def main(argv: Sequence[str]) -> int:
    """Run the components that the request file names, one after the other."""
    with open(argv[1], encoding="utf-8") as stream:
        data = json.load(stream)
    request = Request(data)
    # Libraries may print; the events keep the original standard output for themselves.
    events = os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n")
    os.dup2(2, 1)
    faulthandler.enable()

    def emit(event: Dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    if data.get("kernels"):
        with contextlib.suppress(Exception):  # a broken torch is reported by the component that needs it
            prepare_torch(request)
    for name in request.components:
        emit({"event": "start", "component": name})
        emit(run_component(name, request, emit))
    return 0


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stderr.flush()
    # interpreter shutdown has crashed in CUDA libraries after all was well
    os._exit(code)
