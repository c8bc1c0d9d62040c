"""Proves the patched call sites of mamba_ssm on a CPU, forward, recomputation and backward, under Triton's interpreter.

A plain script, run with the Python of an environment that holds torch, triton, numpy<2, causal_conv1d, mamba_ssm and
CPU extensions under the names causal_conv1d_cuda and selective_scan_cuda:

    python triton_patched_sites.py [--seed N] [--filter TEXT]

Prints one JSON line for each check {name, status, max_error, tolerance, seed} and exits with 1 if any failed. All
memory that Python code allocates without initialising is poisoned with NaN first, so that a kernel that leaves its
output unwritten fails; the references are recurrences in float64 plain torch, with gradients by autograd.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
Pair = tuple[int, int]
TOLERANCE = 1e-4  # of the largest value of a tensor; float32 through sums of some hundred terms


def poison(value: Tensor) -> Tensor:
    """Fill a tensor whose values nobody has written yet with what no result may contain."""
    if value.is_floating_point() or value.is_complex():
        value.fill_(float("nan"))
    elif value.dtype is not torch.bool:
        value.fill_(torch.iinfo(value.dtype).max)
    return value


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an allocation function whose result is poisoned."""

    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return poison(allocate(*args, **kwargs))

    return wrapper


def prepare() -> None:
    """Make torch and triton fit for kernels on CPU tensors; must run before mamba_ssm is imported."""
    if int(numpy.__version__.partition(".")[0]) >= 2:
        raise RuntimeError(
            f"numpy {numpy.__version__}: Triton's interpreter needs numpy<2, or leaves outputs unwritten"
        )
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before TRITON_INTERPRET could be set")
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", message="User provided device_type of 'cuda'")
    import triton

    many = triton.autotune

    def one_configuration(configs: list[Any], *args: Any, **kwargs: Any) -> Any:
        return many(configs[:1], *args, **kwargs)  # trying several needs a clock on a GPU

    triton.autotune = one_configuration
    torch.cuda.device = lambda *_args, **_kwargs: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_args: types.SimpleNamespace(multi_processor_count=1)
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
        for name in names:
            setattr(owner, name, poisoned(getattr(owner, name)))


class Calls:
    """Counts the calls that reach the convolution's extension, so that no other way can pass for the patched one."""

    def __init__(self) -> None:
        import causal_conv1d_cuda

        self.count = {"causal_conv1d_fwd": 0, "causal_conv1d_bwd": 0}
        for name in self.count:
            setattr(causal_conv1d_cuda, name, self._counted(name, getattr(causal_conv1d_cuda, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.count[name] += 1
            return result

        return wrapper

    def take(self) -> Pair:
        """Return (forward, backward) calls since the last take."""
        taken = (self.count["causal_conv1d_fwd"], self.count["causal_conv1d_bwd"])
        self.count = dict.fromkeys(self.count, 0)
        return taken


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution and silu of x (batch, dim, length); no tap reaches into another sequence."""
    width, length = weight.shape[1], x.shape[2]
    out = torch.zeros_like(x) + bias[:, None]
    for tap in range(width):
        back = width - 1 - tap
        shifted = F.pad(x, (back, 0))[..., :length]
        if seq_idx is not None:
            same = F.pad(seq_idx, (back, 0), value=-1)[:, :length] == seq_idx
            shifted = shifted * same[:, None]
        out = out + shifted * weight[:, tap, None]
    return F.silu(out)


@dataclass(frozen=True)
class SsdCase:
    """One way through mamba_split_conv1d_scan_combined."""

    name: str
    length: int = 24  # one chunk and a half
    groups: int = 1
    norm: bool = False
    norm_before_gate: bool = False
    projection: bool = True
    packed: bool = False  # two sequences in one row, told apart by seq_idx
    mlp: int = 0  # width of the gated part beside the state space (d_nonssm)
    heads: int = 8  # the convolution wants rows of a multiple of 8 values
    head_dim: int = 8
    state: int = 16
    chunk: int = 16
    batch: int = 2

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    def inputs(self) -> Tensors:
        conv_dim = self.inner + 2 * self.groups * self.state
        made = {
            "zxbcdt": torch.randn(self.batch, self.length, 2 * self.mlp + self.inner + conv_dim + self.heads),
            "conv1d_weight": torch.randn(conv_dim, 4) * 0.3,
            "conv1d_bias": torch.randn(conv_dim) * 0.1,
            "dt_bias": torch.randn(self.heads) * 0.5 - 1,
            "A": -torch.rand(self.heads) - 0.5,
            "D": torch.randn(self.heads),
        }
        if self.norm:
            made["rmsnorm_weight"] = 1 + 0.1 * torch.randn(self.inner)
        if self.projection:
            made["outproj_weight"] = torch.randn(24, self.mlp + self.inner) * 0.2
        return made

    def seq_idx(self) -> Tensor | None:
        if not self.packed:
            return None
        index = torch.arange(self.length) >= self.length // 2 + 3
        return index.to(torch.int32).repeat(self.batch, 1).contiguous()

    def tested(self, given: Tensors) -> Tensor:
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

        return mamba_split_conv1d_scan_combined(
            **given,
            chunk_size=self.chunk,
            seq_idx=self.seq_idx(),
            headdim=self.head_dim,
            ngroups=self.groups,
            norm_before_gate=self.norm_before_gate,
        )

    def reference(self, given: Tensors) -> Tensor:
        sizes = [self.mlp, self.mlp, self.inner, self.inner + 2 * self.groups * self.state, self.heads]
        mlp_x, mlp_gate, z, xbc, dt = torch.split(given["zxbcdt"], sizes, dim=-1)
        index = self.seq_idx()
        xbc = conv_silu(xbc.transpose(1, 2), given["conv1d_weight"], given["conv1d_bias"], index).transpose(1, 2)
        x, b, c = torch.split(xbc, [self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        x = x.reshape(*x.shape[:2], self.heads, self.head_dim)
        each = self.heads // self.groups
        b, c = (
            part.reshape(*part.shape[:2], self.groups, self.state).repeat_interleave(each, dim=2) for part in (b, c)
        )
        dt = F.softplus(dt + given["dt_bias"])
        hidden = x.new_zeros(self.batch, self.heads, self.head_dim, self.state)
        steps = []
        for t in range(self.length):
            if index is not None and t > 0:
                hidden = hidden * (index[:, t] == index[:, t - 1])[:, None, None, None]
            decay = torch.exp(dt[:, t] * given["A"])[..., None, None]
            hidden = decay * hidden + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
            steps.append((hidden * c[:, t, :, None, :]).sum(-1) + given["D"][:, None] * x[:, t])
        y = torch.stack(steps, dim=1).flatten(2)
        y = self._gate(y, z, given.get("rmsnorm_weight"))
        if self.mlp:
            y = torch.cat([F.silu(mlp_x) * mlp_gate, y], dim=-1)
        return F.linear(y, given["outproj_weight"]) if self.projection else y

    def _gate(self, y: Tensor, z: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return y * F.silu(z)
        if not self.norm_before_gate:
            y = y * F.silu(z)
        grouped = y.unflatten(-1, (self.groups, -1))
        y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + 1e-6)).flatten(-2) * weight
        return y * F.silu(z) if self.norm_before_gate else y

    @property
    def calls(self) -> tuple[Pair, Pair]:
        """Calls of the convolution's (forward, backward) in a forward pass, then in a backward pass."""
        return (1, 0), (1, 1)


@dataclass(frozen=True)
class InnerCase:
    """One way through mamba_inner_fn."""

    name: str
    checkpoint: int
    batch: int = 2
    dim: int = 12
    state: int = 8
    rank: int = 3
    length: int = 29
    conv_bias: bool = True

    def inputs(self) -> Tensors:
        made = {
            "xz": torch.randn(self.batch, 2 * self.dim, self.length),
            "conv1d_weight": torch.randn(self.dim, 1, 4) * 0.3,
            "x_proj_weight": torch.randn(self.rank + 2 * self.state, self.dim) * 0.3,
            "delta_proj_weight": torch.randn(self.dim, self.rank) * 0.3,
            "out_proj_weight": torch.randn(self.dim // 2, self.dim) * 0.3,
            "A": -torch.rand(self.dim, self.state) - 0.5,
            "D": torch.randn(self.dim),
            "delta_bias": torch.randn(self.dim) * 0.5 - 1,
        }
        if self.conv_bias:
            made["conv1d_bias"] = torch.randn(self.dim) * 0.1
        return made

    def tested(self, given: Tensors) -> Tensor:
        from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

        return mamba_inner_fn(
            given["xz"],
            given["conv1d_weight"],
            given.get("conv1d_bias"),
            given["x_proj_weight"],
            given["delta_proj_weight"],
            given["out_proj_weight"],
            None,
            given["A"],
            D=given["D"],
            delta_bias=given["delta_bias"],
            delta_softplus=True,
            checkpoint_lvl=self.checkpoint,
        )

    def reference(self, given: Tensors) -> Tensor:
        x, z = given["xz"].chunk(2, dim=1)
        bias = given.get("conv1d_bias", x.new_zeros(self.dim))
        x = conv_silu(x, given["conv1d_weight"].squeeze(1), bias)
        projected = torch.einsum("bdl,rd->brl", x, given["x_proj_weight"])
        low, b, c = torch.split(projected, [self.rank, self.state, self.state], dim=1)
        delta = torch.einsum("brl,dr->bdl", low, given["delta_proj_weight"])
        delta = F.softplus(delta + given["delta_bias"][:, None])
        hidden = x.new_zeros(self.batch, self.dim, self.state)
        steps = []
        for t in range(self.length):
            decay = torch.exp(delta[:, :, t, None] * given["A"])
            hidden = decay * hidden + (delta[:, :, t] * x[:, :, t])[..., None] * b[:, None, :, t]
            steps.append((hidden * c[:, None, :, t]).sum(-1))
        y = torch.stack(steps, dim=-1) + given["D"][:, None] * x
        return F.linear((y * F.silu(z)).transpose(1, 2), given["out_proj_weight"])

    @property
    def calls(self) -> tuple[Pair, Pair]:
        """Calls of the convolution's (forward, backward) in a forward pass, then in a backward pass."""
        return (1, 0), (self.checkpoint, 1)


Case = SsdCase | InnerCase
CASES: list[Case] = [
    SsdCase("ssd_combined/gated"),
    SsdCase("ssd_combined/norm-before-gate-2-groups", norm=True, norm_before_gate=True, groups=2, projection=False),
    SsdCase("ssd_combined/packed-sequences", norm=True, packed=True),
    SsdCase("ssd_combined/with-mlp", norm=True, mlp=16, batch=1),
    InnerCase("selective_scan/inner-kept", checkpoint=0),
    InnerCase("selective_scan/inner-recomputed", checkpoint=1),
    InnerCase("selective_scan/inner-no-conv-bias", checkpoint=1, conv_bias=False),
]


class Mismatch(Exception):
    """What is wrong with a result, in words."""


def compare(tested: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Return the largest error, each tensor's measured by its own largest value.

    Raises:
        Mismatch: a value is missing, unwritten or too far off.
    """
    worst = 0.0
    for name, expected in reference.items():
        actual = tested[name]
        if actual is None or actual.shape != expected.shape:
            raise Mismatch(f"{name} is {None if actual is None else tuple(actual.shape)}, not {tuple(expected.shape)}")
        if not bool(torch.isfinite(actual).all()):
            raise Mismatch(f"{name}: {int((~torch.isfinite(actual)).sum())} of {actual.numel()} values unwritten")
        error = float((actual.detach().double() - expected.detach()).abs().max())
        error /= max(1.0, float(expected.detach().abs().max()))
        worst = max(worst, error)
        if error > TOLERANCE:
            raise Mismatch(f"{name}: error {error:.3g}")
    return worst


def run_case(case: Case, seed: int, calls: Calls) -> Iterator[dict[str, Any]]:
    """Yield the result of the forward and of the backward pass of a case, as plain data."""
    torch.manual_seed(seed)
    values = case.inputs()
    single = {name: value.clone().requires_grad_() for name, value in values.items()}
    double = {name: value.double().requires_grad_() for name, value in values.items()}
    outputs: list[Tensor] = []
    calls.take()

    def forward() -> float:
        outputs.extend([case.tested(single), case.reference(double)])
        return compare({"out": outputs[0]}, {"out": outputs[1]})

    def backward() -> float:
        if len(outputs) != 2:
            raise Mismatch("there was no forward pass to go back through")
        gradient = torch.randn(outputs[1].shape)
        outputs[0].backward(gradient)
        outputs[1].backward(gradient.double())
        return compare(*({name: leaf.grad for name, leaf in leaves.items()} for leaves in (single, double)))

    for name, run, wanted in (("forward", forward, case.calls[0]), ("backward", backward, case.calls[1])):
        row: dict[str, Any] = {"name": f"{case.name}/{name}", "status": "failed", "max_error": None}
        row.update(tolerance=TOLERANCE, seed=seed)
        try:
            error = run()
            taken = calls.take()
            if taken != wanted:
                raise Mismatch(f"the convolution was called {taken} times (forward, backward), not {wanted}")
            row.update(status="passed", max_error=error)
        except Exception as problem:
            row["error"] = f"{type(problem).__name__}: {problem}".split("\n")[0]
        yield row


def main() -> int:
    """Run the checks and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--filter", default="", help="run the cases whose name contains this text")
    arguments = parser.parse_args()
    selected = [case for case in CASES if arguments.filter in case.name]
    if not selected:
        parser.error(f"no case has {arguments.filter!r} in its name")
    prepare()
    calls = Calls()
    failed = 0
    for case in selected:
        for row in run_case(case, arguments.seed, calls):
            failed += row["status"] != "passed"
            print(json.dumps(row), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
