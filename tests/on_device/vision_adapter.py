"""Compares the vision adapter with upstream's pure-torch reference, forward and backward, called as vision projects do.

A plain script, run with the Python of an environment that holds torch, mamba_ssm and the adapter:

    python vision_adapter.py [--device cpu|cuda] [--filter TEXT]

On the simulated fleet selective_scan_cuda is a CPU extension, on a device the real one. The adapter is called by
position through two autograd functions, one in the way of Mamba-YOLO (core, grouping and layout cared for by the
caller) and one in the way of VMamba (oflex, everything handed on as it is). Prints one JSON line for each check and a
summary; exits with 1 if any failed. The references get the same rounded inputs, but compute in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import selective_scan_cuda_core
import selective_scan_cuda_oflex

if "torch" in sys.modules:
    sys.exit("importing the adapter has imported torch")

# isort: split
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from torch import Tensor

Check = Callable[[], float]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# upstream's own tolerances (relative, absolute), by the dtype in which results are rounded
TOLERANCE = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}
# a float32 result was rounded to half nowhere on the way, whatever the inputs are (half's own rounding is 5e-4)
EXACT = (5e-5, 5e-5)
GIVEN = ("u", "delta", "A", "B", "C", "D", "delta_bias")
DEVICE = "cpu"


class Mismatch(Exception):
    """What is wrong with a result, in words."""


class Core(torch.autograd.Function):
    """Calls selective_scan_cuda_core as Mamba-YOLO does; B's and C's gradients get the shape of their input."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> Tensor:
        D, delta_bias, ctx.softplus, _oflex = rest
        ctx.squeezed = [tensor.dim() == 3 for tensor in (B, C)]
        B, C = (tensor.contiguous() for tensor in (B, C))
        B, C = (tensor.unsqueeze(1) if tensor.dim() == 3 else tensor for tensor in (B, C))
        out, x, *_rest = selective_scan_cuda_core.fwd(
            u.contiguous(), delta.contiguous(), A, B, C, D, delta_bias, ctx.softplus, 1
        )
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        if dout.stride(-1) != 1:
            dout = dout.contiguous()
        du, ddelta, dA, dB, dC, dD, dbias, *_rest = selective_scan_cuda_core.bwd(
            u, delta, A, B, C, D, delta_bias, dout, x, ctx.softplus, 1
        )
        dB, dC = (grad.squeeze(1) if squeezed else grad for grad, squeezed in zip((dB, dC), ctx.squeezed, strict=True))
        return du, ddelta, dA, dB, dC, dD, dbias, None, None


class Oflex(torch.autograd.Function):
    """Calls selective_scan_cuda_oflex as VMamba does: all as given, and whether the result is float32."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> Tensor:
        D, delta_bias, ctx.softplus, oflex = rest
        out, x, *_rest = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, ctx.softplus, 1, oflex)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        results = selective_scan_cuda_oflex.bwd(u, delta, A, B, C, D, delta_bias, dout, x, ctx.softplus, 1)
        if len(results) != 7:
            raise Mismatch(f"bwd returned {len(results)} values")
        return (*results, None, None)


def inputs(dtype: torch.dtype, kind: str, length: int, delta_share: int = 1) -> dict[str, Tensor]:
    """Return leaves. kind says what B and C are: plain (batch, states, length), constant, or a number of groups."""
    batch, dim, states = 2, 8, 5
    shape = {"plain": (batch, states, length), "constant": (dim, states)}.get(kind)

    def leaf(*size: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=DEVICE) * scale).to(of).requires_grad_()

    def projection() -> Tensor:
        return leaf(*(shape or (batch, int(kind), states, length)))

    channels = dim // delta_share
    return {
        "u": leaf(batch, dim, length),
        "delta": leaf(batch, channels, length, scale=0.5),
        "A": (-0.5 * torch.rand(dim, states, device=DEVICE)).requires_grad_(),
        "B": projection(),
        "C": projection(),
        "D": leaf(dim, of=torch.float32),
        "delta_bias": (0.5 * torch.rand(channels, device=DEVICE)).requires_grad_(),
    }


def compare(name: str, actual: Tensor | None, expected: Tensor | None, tolerance: tuple[float, float]) -> float:
    """Return the largest absolute error; raise Mismatch for missing, not finite or wrong values."""
    if actual is None or expected is None:
        if actual is expected:
            return 0.0
        raise Mismatch(f"{name}: {'missing' if actual is None else 'given, but not expected'}")
    if actual.shape != expected.shape:
        raise Mismatch(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not bool(torch.isfinite(actual).all()):
        raise Mismatch(f"{name}: not finite")
    error = float((actual.detach().float() - expected.detach().float()).abs().max())
    # a gradient's scale grows with the number of terms summed into it: measure against its largest value
    scale = float(expected.detach().abs().max())
    if error > tolerance[1] + tolerance[0] * scale:
        raise Mismatch(f"{name}: error {error:.3g} at a largest value of {scale:.3g}")
    return error


def reference(tensors: dict[str, Tensor], softplus: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the reference's result and the float32 leaves that it was computed from."""
    leaves = {name: tensor.detach().float().clone().requires_grad_() for name, tensor in tensors.items()}
    given = dict(leaves)
    share = given["u"].shape[1] // given["delta"].shape[1]
    for name, dim in (("delta", 1), ("delta_bias", 0)):
        if name in given:
            given[name] = given[name].repeat_interleave(share, dim=dim)
    return selective_scan_ref(**given, delta_softplus=softplus), leaves


def scan(
    function: type[torch.autograd.Function],
    dtype: torch.dtype,
    kind: str,
    optional: tuple[str, ...] = ("D", "delta_bias"),
    softplus: bool = True,
    oflex: bool = False,
    length: int = 33,
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    share: int = 1,
) -> float:
    """One forward and backward pass; dtype, shape and value of the result and of all gradients."""
    tensors = {
        n: t for n, t in inputs(dtype, kind, length, share).items() if n not in ("D", "delta_bias") or n in optional
    }
    if not softplus:  # steps must be positive by themselves, or the state explodes
        tensors["delta"] = tensors["delta"].detach().abs().requires_grad_()
    tensors = prepare(tensors)
    for tensor in tensors.values():
        tensor.retain_grad()
    out_r, leaves = reference(tensors, softplus)
    out = function.apply(*(tensors.get(name) for name in GIVEN), softplus, oflex)
    same = {tensors[name].dtype for name in ("u", "delta", "B", "C") if tensors[name].dim() > 2} == {dtype}
    expected_dtype = dtype if same and not (oflex and function is Oflex) else torch.float32
    if out.dtype != expected_dtype:
        raise Mismatch(f"out is {out.dtype}, expected {expected_dtype}")
    worst = compare("out", out, out_r, EXACT if expected_dtype == torch.float32 else TOLERANCE[dtype])
    dout = torch.randn_like(out)
    out.backward(dout)
    out_r.backward(dout.float())
    for name, tensor in tensors.items():
        grad = tensor.grad
        if grad is not None and grad.dtype != tensor.dtype:
            raise Mismatch(f"d{name} is {grad.dtype}, {name} is {tensor.dtype}")
        worst = max(worst, compare(f"d{name}", grad, leaves[name].grad, TOLERANCE[dtype]))
    return worst


def leaf_like(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def strided(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views whose last dimension is not contiguous, as transposed projections are."""
    moved = {
        name: t.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for name, t in tensors.items() if t.dim() > 1
    }
    return {name: leaf_like(moved.get(name, tensor)) for name, tensor in tensors.items()}


def half_parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A, D and delta_bias as .half() on a whole model leaves them."""
    return {n: leaf_like(t.to(tensors["u"].dtype)) for n, t in tensors.items()}


def mixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """u in float32 beside half projections, as autocast gives them after a LayerNorm."""
    return {name: leaf_like(tensor.float() if name == "u" else tensor) for name, tensor in tensors.items()}


def long_rows(function: type[torch.autograd.Function], dtype: torch.dtype, oflex: bool) -> float:
    """More than the 2048 positions that the kernels keep intermediates for at once."""
    return scan(function, dtype, "2", oflex=oflex, length=2050)


def under_autocast() -> float:
    """Within autocast the projections become half; the scan takes them so, and the gradients reach the parameters."""
    torch.manual_seed(0)
    dim, states, length = 8, 4, 25
    x = torch.randn(2, dim, length, device=DEVICE)
    weight = (torch.randn(2 * states + dim, dim, device=DEVICE) * 0.3).requires_grad_()
    a, skip = -torch.rand(dim, states, device=DEVICE), torch.ones(dim, device=DEVICE)
    grads = []
    for enabled in (True, False):
        weight.grad = None
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            projected = torch.einsum("bdl,nd->bnl", x, weight)
            dts, B, C = torch.split(projected, [dim, states, states], dim=1)
            u = x.to(projected.dtype)
            out = Oflex.apply(u, dts, a, B.unsqueeze(1), C.unsqueeze(1), skip, None, True, True)
        if out.dtype != torch.float32:
            raise Mismatch(f"out is {out.dtype}")
        out.square().mean().backward()
        grads.append(weight.grad.clone())
    return compare("dweight", grads[0], grads[1], TOLERANCE[torch.bfloat16])


def refuses_double() -> float:
    u = torch.randn(1, 4, 6, dtype=torch.float64, device=DEVICE)
    a, b = -torch.rand(4, 3, device=DEVICE), torch.randn(1, 1, 3, 6, device=DEVICE)
    try:
        selective_scan_cuda_core.fwd(u, u, a, b, b, None, None, True, 1)
    except RuntimeError as error:
        if "float32 is needed" not in str(error):
            raise Mismatch(f"refused, but without saying that float32 is needed: {error}") from error
        return 0.0
    raise Mismatch("float64 was accepted")


def records_no_graph() -> float:
    """Called outside of an autograd function, as a raw extension would be."""
    tensors = inputs(torch.float16, "1", 9)
    out, x = selective_scan_cuda_oflex.fwd(*(tensors[name] for name in GIVEN), True, 1, True)
    if out.requires_grad or x.requires_grad:
        raise Mismatch("the adapter recorded a graph")
    return 0.0


def checks() -> Iterator[tuple[str, Check]]:
    """Yield the name and the body of every check."""
    functions: dict[str, type[torch.autograd.Function]] = {"core": Core, "oflex": Oflex}
    some: list[tuple[str, ...]] = [(), ("D",), ("delta_bias",), ("D", "delta_bias")]
    for (label, dtype), (called, function) in itertools.product(DTYPES.items(), functions.items()):
        for oflex in (False, True) if called == "oflex" else (False,):
            name = f"{called}{'-float' if oflex else ''}/{label}"
            run = partial(scan, function, dtype, oflex=oflex)
            for kind, optional in itertools.product(("plain", "1", "2", "4", "constant"), some):
                yield f"{name}/BC={kind}/{'+'.join(optional) or 'bare'}", partial(run, kind, optional)
            yield f"{name}/no-softplus", partial(run, "2", softplus=False)
            yield f"{name}/one-position", partial(run, "2", length=1)
            yield f"{name}/strided", partial(run, "2", prepare=strided)
            yield f"{name}/half-parameters", partial(run, "2", prepare=half_parameters)
            yield f"{name}/mixed", partial(run, "2", prepare=mixed)
            yield f"{name}/grouped-delta", partial(run, "2", share=4)
    yield "core/fp32/two-chunks", partial(long_rows, Core, torch.float32, False)
    yield "oflex/fp16/two-chunks", partial(long_rows, Oflex, torch.float16, False)
    yield "oflex-float/fp16/two-chunks", partial(long_rows, Oflex, torch.float16, True)
    yield "autocast", under_autocast
    yield "refuses/float64", refuses_double
    yield "no-graph", records_no_graph


def main() -> int:
    global DEVICE
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--filter", default="", help="run only the checks whose name contains this text")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the kernels run")
    arguments = parser.parse_args()
    DEVICE = arguments.device
    passed = failed = 0
    for name, body in checks():
        if arguments.filter not in name:
            continue
        torch.manual_seed(0)
        record: dict[str, Any] = {"check": name}
        try:
            record.update(status="passed", max_error=body())
            passed += 1
        except Exception as error:
            record.update(status="failed", reason=f"{type(error).__name__}: {error}")
            failed += 1
        print(json.dumps(record))
    print(json.dumps({"passed": passed, "failed": failed, "torch": torch.__version__, "device": DEVICE}))
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
