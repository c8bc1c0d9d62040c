"""Compares the simulated fleet's CPU extensions with upstream's pure-torch references, forward and backward.

A plain script, run with the Python of an environment that holds torch, causal_conv1d 1.6.0 and mamba_ssm 2.2.4:

    python cpu_kernels.py [--filter TEXT]

Prints one JSON line for each check and a summary; exits with 1 if any failed. All outputs that the extensions write
in place are poisoned with NaN first, so that an element left unwritten is a failure. The references get the same
rounded inputs, but compute in float32, as the extensions do: what differs is only the last rounding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch  # first: the extensions find torch's libraries through it where they have no rpath

# isort: split
import causal_conv1d_cuda
import selective_scan_cuda
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from torch import Tensor

Check = Callable[[], float]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Upstream's own tolerances (relative, absolute) for the two packages.
CONV_TOLERANCE = {torch.float32: (3e-4, 1e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}
SCAN_TOLERANCE = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}


class Mismatch(Exception):
    """What is wrong with a result, in words."""


def compare(name: str, actual: Tensor | None, expected: Tensor | None, tolerance: tuple[float, float]) -> float:
    """Return the largest absolute error; raise Mismatch for missing, unwritten or wrong values."""
    if actual is None or expected is None:
        if actual is expected:
            return 0.0
        raise Mismatch(f"{name}: {'missing' if actual is None else 'given, but not expected'}")
    if actual.shape != expected.shape:
        raise Mismatch(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not bool(torch.isfinite(actual).all()):
        raise Mismatch(f"{name}: {int((~torch.isfinite(actual)).sum())} values unwritten or not finite")
    relative, absolute = tolerance
    # A gradient's scale grows with the number of terms summed into it: measure against its largest value.
    expected_f = expected.detach().float()
    error = (actual.detach().float() - expected_f).abs()
    worst = float(error.max()) if error.numel() else 0.0
    scale = float(expected_f.abs().max()) if expected_f.numel() else 0.0
    if worst > absolute + relative * scale:
        raise Mismatch(f"{name}: error {worst:.3g} at a largest value of {scale:.3g}")
    return worst


def poisoned(like: Tensor) -> Tensor:
    """Return a tensor of the same layout and dtype that is NaN everywhere."""
    return torch.empty_like(like).fill_(float("nan"))


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def twin(tensor: Tensor | None) -> Tensor | None:
    """Return a float32 leaf of the same values, for the reference."""
    if tensor is None:
        return None
    return tensor.detach().float().clone().requires_grad_(tensor.requires_grad)


def grad(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.grad


def compare_grads(pairs: dict[str, tuple[Tensor | None, Tensor | None]], tolerance: tuple[float, float]) -> float:
    return max(compare(f"d{name}", grad(ours), grad(reference), tolerance) for name, (ours, reference) in pairs.items())


# causal_conv1d


def conv_inputs(dtype: torch.dtype, weight_dtype: torch.dtype, channel_last: bool, length: int, width: int) -> Any:
    batch, dim = 2, 16
    x = torch.randn(batch, dim, length).to(dtype)
    if channel_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.requires_grad_(), leaf(dim, width, dtype=weight_dtype), leaf(dim, dtype=weight_dtype)


def conv(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    channel_last: bool,
    length: int,
    width: int,
    activation: str | None,
    with_bias: bool,
) -> float:
    x, weight, bias_leaf = conv_inputs(dtype, weight_dtype, channel_last, length, width)
    bias = bias_leaf if with_bias else None
    x_r, weight_r, bias_r = twin(x), twin(weight), twin(bias)
    tolerance = CONV_TOLERANCE[dtype if weight_dtype == torch.float32 else weight_dtype]
    out = causal_conv1d_fn(x, weight, bias, activation=activation)
    out_r = causal_conv1d_ref(x_r, weight_r, bias_r, activation=activation)
    worst = compare("out", out, out_r, tolerance)
    dout = torch.randn_like(out)
    out.backward(dout)
    out_r.backward(dout.float())
    return max(worst, compare_grads({"x": (x, x_r), "weight": (weight, weight_r), "bias": (bias, bias_r)}, tolerance))


def conv_states(dtype: torch.dtype, length: int, width: int, activation: str | None) -> float:
    """Initial states in, final states out, gradients of both (channel-last only, as on a GPU)."""
    x, weight, bias = conv_inputs(dtype, dtype, True, length, width)
    initial = torch.randn(2, width - 1, 16).to(dtype).transpose(1, 2).requires_grad_()
    x_r, weight_r, bias_r, initial_r = twin(x), twin(weight), twin(bias), twin(initial)
    final = poisoned(initial.detach())
    out, final = causal_conv1d_fn(
        x,
        weight,
        bias,
        initial_states=initial,
        return_final_states=True,
        final_states_out=final,
        activation=activation,
    )
    out_r, final_r = causal_conv1d_ref(
        x_r, weight_r, bias_r, initial_states=initial_r, return_final_states=True, activation=activation
    )
    tolerance = CONV_TOLERANCE[dtype]
    worst = max(compare("out", out, out_r, tolerance), compare("final_states", final, final_r, tolerance))
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    torch.autograd.backward([out, final], [dout, dfinal])
    torch.autograd.backward([out_r, final_r], [dout.float(), dfinal.float()])
    pairs = {"x": (x, x_r), "weight": (weight, weight_r), "bias": (bias, bias_r), "initial": (initial, initial_r)}
    return max(worst, compare_grads(pairs, tolerance))


def conv_seq_idx(dtype: torch.dtype, width: int, activation: str | None) -> float:
    """Several sequences in one row equal the same sequences one by one; padding gives zeros and no gradient."""
    lengths = [3, 1, 9, 6]
    x, weight, bias = conv_inputs(dtype, dtype, True, sum(lengths) + 2, width)
    x_r, weight_r, bias_r = twin(x), twin(weight), twin(bias)
    assert x_r is not None
    row = [index for index, length in enumerate(lengths) for _ in range(length)] + [-1, -1]
    seq_idx = torch.tensor([row, row], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, activation=activation)
    parts = [
        causal_conv1d_ref(part, weight_r, bias_r, activation=activation)
        for part in x_r[:, :, : sum(lengths)].split(lengths, dim=2)
    ]
    out_r = torch.cat([*parts, torch.zeros(2, 16, 2)], dim=2)
    tolerance = CONV_TOLERANCE[dtype]
    worst = compare("out", out, out_r, tolerance)
    dout = torch.randn_like(out)
    out.backward(dout)
    out_r.backward(dout.float())
    return max(worst, compare_grads({"x": (x, x_r), "weight": (weight, weight_r), "bias": (bias, bias_r)}, tolerance))


def conv_raw(dtype: torch.dtype) -> float:
    """The extension's own calls: all outputs poisoned, dweight and dbias added to, nothing returned."""
    x, weight, bias = (t.detach() for t in conv_inputs(dtype, torch.float32, False, 12, 4))
    out = poisoned(x)
    if causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True) is not None:
        raise Mismatch("causal_conv1d_fwd returned a value; since 1.5.1 it writes to out")
    tolerance = CONV_TOLERANCE[dtype]
    x_r, weight_r, bias_r = x.float().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
    out_r = causal_conv1d_ref(x_r, weight_r, bias_r, activation="silu")
    worst = compare("out", out, out_r, tolerance)
    dout, dx = torch.randn_like(x), poisoned(x)
    dweight, dbias = torch.ones_like(weight), torch.ones_like(bias)
    causal_conv1d_cuda.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, dx, dweight, dbias, None, True)
    out_r.backward(dout.float())
    for name, ours, reference in (
        ("dx", dx, x_r.grad),
        ("dweight", dweight - 1, weight_r.grad),
        ("dbias", dbias - 1, bias_r.grad),
    ):
        worst = max(worst, compare(name, ours, reference, tolerance))
    return worst


def update(
    dtype: torch.dtype, length: int, width: int, state_length: int, activation: str | None, circular: bool
) -> float:
    batch, dim = 3, 16
    x = torch.randn(batch, dim, length).to(dtype)
    state = torch.randn(batch, dim, state_length).to(dtype)
    weight, bias = torch.randn(dim, width), torch.randn(dim)
    seqlens = torch.tensor([0, 5, 2 * state_length + 1], dtype=torch.int32) if circular else None
    state_r, before = state.clone(), state.clone()
    out = causal_conv1d_update(x, state, weight, bias, activation=activation, cache_seqlens=seqlens)
    out_r = causal_conv1d_update_ref(x, state_r, weight, bias, activation=activation, cache_seqlens=seqlens)
    worst = max(compare("out", out, out_r, CONV_TOLERANCE[dtype]), compare("conv_state", state, state_r, (0.0, 0.0)))
    if bool((state == before).all()):
        raise Mismatch("conv_state was not advanced")
    # The same step with the states gathered out of a larger cache; a negative index is padding.
    cache = torch.randn(7, dim, state_length).to(dtype)
    cache_before = cache.clone()
    index = torch.tensor([4, -1, 2], dtype=torch.int32)
    cache[4], cache[2] = before[0], before[2]
    raw = poisoned(x)
    causal_conv1d_cuda.causal_conv1d_update(x, cache, weight, bias, raw, activation is not None, seqlens, index)
    expected = out_r.clone()
    expected[1] = 0
    cache_before[4], cache_before[2] = state_r[0], state_r[2]
    worst = max(worst, compare("gathered out", raw, expected, CONV_TOLERANCE[dtype]))
    return max(worst, compare("gathered conv_state", cache, cache_before, (0.0, 0.0)))


def update_2d(dtype: torch.dtype) -> float:
    x, state, weight = torch.randn(2, 16).to(dtype), torch.randn(2, 16, 3).to(dtype), torch.randn(16, 4)
    state_r = state.clone()
    out = causal_conv1d_update(x, state, weight, None, activation="silu")
    out_r = causal_conv1d_update_ref(x, state_r, weight, None, activation="silu")
    return max(compare("out", out, out_r, CONV_TOLERANCE[dtype]), compare("conv_state", state, state_r, (0.0, 0.0)))


# selective_scan


def scan_inputs(dtype: torch.dtype, b_kind: str, c_kind: str, length: int) -> dict[str, Tensor]:
    batch, dim, states = 2, 8, 5

    def projection(kind: str) -> Tensor:
        if kind == "constant":
            return leaf(dim, states, dtype=torch.float32)
        groups = {"variable": (), "grouped1": (1,), "grouped2": (2,)}[kind]
        return leaf(batch, *groups, states, length, dtype=dtype)

    return {
        "u": leaf(batch, dim, length, dtype=dtype),
        "delta": leaf(batch, dim, length, dtype=dtype, scale=0.5),
        "A": (-0.5 * torch.rand(dim, states)).requires_grad_(),
        "B": projection(b_kind),
        "C": projection(c_kind),
        "D": leaf(dim, dtype=torch.float32),
        "z": leaf(batch, dim, length, dtype=dtype),
        "delta_bias": (0.5 * torch.rand(dim)).requires_grad_(),
    }


def scan(
    dtype: torch.dtype, b_kind: str, c_kind: str, length: int, optional: tuple[str, ...], softplus: bool = True
) -> float:
    """Forward with last state, and backward, through upstream's own autograd function."""
    inputs = scan_inputs(dtype, b_kind, c_kind, length)
    kept = {n: t for n, t in inputs.items() if n not in ("D", "z", "delta_bias") or n in optional}
    if not softplus:  # keep the state from exploding: without softplus the steps must be positive by themselves
        kept["delta"] = kept["delta"].detach().abs().requires_grad_()
    reference = {name: twin(tensor) for name, tensor in kept.items()}
    tolerance = SCAN_TOLERANCE[dtype]
    out, last = selective_scan_fn(**kept, delta_softplus=softplus, return_last_state=True)
    out_r, last_r = selective_scan_ref(**reference, delta_softplus=softplus, return_last_state=True)
    worst = max(compare("out", out, out_r, tolerance), compare("last_state", last, last_r, tolerance))
    dout = torch.randn_like(out)
    out.backward(dout)
    out_r.backward(dout.float())
    return max(worst, compare_grads({name: (kept[name], reference[name]) for name in kept}, tolerance))


def scan_raw(dtype: torch.dtype, with_z: bool) -> float:
    """The extension's own calls: layouts, a given dz, a recomputed out_z, None for what was not asked for."""
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(dtype, "grouped1", "grouped1", 11).items()}
    inputs["delta"] = inputs["delta"].transpose(0, 1).contiguous().transpose(0, 1)  # as mamba's inner function has it
    z = inputs["z"] if with_z else None
    arguments = [inputs[name] for name in ("u", "delta", "A", "B", "C")]
    tolerance = SCAN_TOLERANCE[dtype]
    out, x, *rest = selective_scan_cuda.fwd(*arguments, None, z, None, True)
    if out.stride() != inputs["delta"].stride():
        raise Mismatch("out has not delta's layout")
    if tuple(x.shape) != (2, 8, 1, 10) or x.dtype != torch.float32:
        raise Mismatch(f"scan intermediates are {tuple(x.shape)} {x.dtype}")
    if len(rest) != int(with_z):
        raise Mismatch(f"fwd returned {2 + len(rest)} values")
    dout, dz = torch.randn_like(inputs["u"]), poisoned(inputs["u"])
    given = dz if with_z else None
    results = selective_scan_cuda.bwd(*arguments, None, z, None, dout, x, out if with_z else None, given, True, with_z)
    if len(results) != (9 if with_z else 7):
        raise Mismatch(f"bwd returned {len(results)} values")
    if results[5] is not None or results[6] is not None:
        raise Mismatch("dD and ddelta_bias were not asked for, but given")
    leaves = [tensor.float().requires_grad_() for tensor in arguments]
    z_r = None if z is None else z.float().requires_grad_()
    out_r = selective_scan_ref(*leaves, z=z_r, delta_softplus=True)
    out_r.backward(dout.float())
    worst = 0.0
    for name, ours, expected in zip(("du", "ddelta", "dA", "dB", "dC"), results, leaves, strict=False):
        worst = max(worst, compare(name, ours, expected.grad, tolerance))
    if z_r is not None:
        worst = max(
            worst,
            compare("dz", dz, z_r.grad, tolerance),
            compare("out_z", results[8], out_r, tolerance),
            compare("out_z of fwd", rest[0], out_r, tolerance),
        )
    return worst


def scan_layouts() -> float:
    """Strided views, as mamba's chunked projections are, and no graph although gradients are on."""
    both = torch.randn(2, 16, 9)
    u, z = both.chunk(2, dim=1)
    delta, a = torch.rand(2, 8, 9), -torch.rand(8, 4)
    b, c = torch.randn(2, 1, 4, 9, requires_grad=True), torch.randn(2, 1, 4, 9)
    out, _, out_z = selective_scan_cuda.fwd(u, delta, a, b, c, None, z, None, False)
    if out.requires_grad or out_z.requires_grad:
        raise Mismatch("the extension recorded a graph")
    return compare("out_z", out_z, selective_scan_ref(u, delta, a, b, c, z=z), SCAN_TOLERANCE[torch.float32])


# what must be refused


def refuses(call: Callable[[], Any], error: type[Exception], text: str) -> float:
    try:
        call()
    except error as refusal:
        if text not in str(refusal):
            raise Mismatch(f"refused, but without saying '{text}': {str(refusal).splitlines()[0]}") from refusal
        return 0.0
    raise Mismatch("was accepted")


def refusals() -> Iterator[tuple[str, Check]]:
    x, weight, out = torch.randn(2, 16, 8), torch.randn(16, 4), torch.randn(2, 16, 8)
    conv_ext, scan_ext = causal_conv1d_cuda, selective_scan_cuda
    u, a, b = torch.randn(2, 8, 6), -torch.rand(8, 4), torch.randn(8, 4)
    cases: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
        (
            "fwd with mamba 2.2.4's 7 arguments",
            lambda: conv_ext.causal_conv1d_fwd(x, weight, None, None, None, None, True),
            TypeError,
            "incompatible function arguments",
        ),
        (
            "bwd with mamba 2.2.4's 10 arguments",
            lambda: conv_ext.causal_conv1d_bwd(x, weight, None, out, None, None, None, x, False, True),
            TypeError,
            "incompatible function arguments",
        ),
        (
            "update with 7 arguments",
            lambda: conv_ext.causal_conv1d_update(x, x, weight, None, out, True, None),
            TypeError,
            "incompatible function arguments",
        ),
        (
            "scan fwd with 8 arguments",
            lambda: scan_ext.fwd(u, u, a, b, b, None, None, True),
            TypeError,
            "incompatible function arguments",
        ),
        (
            "scan bwd with 13 arguments",
            lambda: scan_ext.bwd(u, u, a, b, b, None, None, None, u, None, None, None, True),
            TypeError,
            "incompatible function arguments",
        ),
        (
            "silu in the place of a tensor",
            lambda: conv_ext.causal_conv1d_fwd(x, weight, None, None, None, out, "silu", True),
            TypeError,
            "incompatible function arguments",
        ),
        (
            "width 5",
            lambda: conv_ext.causal_conv1d_fwd(x, torch.randn(16, 5), None, None, None, out, None, True),
            RuntimeError,
            "width between 2 and 4",
        ),
        (
            "double precision",
            lambda: conv_ext.causal_conv1d_fwd(x.double(), weight, None, None, None, out, None, True),
            RuntimeError,
            "float32, float16 or bfloat16",
        ),
        (
            "initial states without channel-last",
            lambda: conv_ext.causal_conv1d_fwd(x, weight, None, None, torch.randn(2, 16, 3), out, None, True),
            RuntimeError,
            "channel last",
        ),
        (
            "complex A",
            lambda: scan_ext.fwd(u, u, a.to(torch.complex64), b, b, None, None, None, True),
            RuntimeError,
            "complex A",
        ),
        (
            "another delta dtype",
            lambda: scan_ext.fwd(u, u.half(), a, b, b, None, None, None, True),
            RuntimeError,
            "delta must be",
        ),
        (
            "a wrong shape of B",
            lambda: scan_ext.fwd(u, u, a, torch.randn(8, 3), b, None, None, None, True),
            RuntimeError,
            "B must have shape",
        ),
    ]
    for name, call, error, text in cases:
        yield f"refuses/{name}", partial(refuses, call, error, text)


def conv_checks(label: str, dtype: torch.dtype) -> Iterator[tuple[str, Check]]:
    for last, width, activation in itertools.product((False, True), (2, 3, 4), (None, "silu")):
        for length, bias in ((1, True), (2, False), (37, True), (130, False)):
            layout = "channel-last" if last else "plain"
            name = f"conv/{label}/{layout}/w{width}/{activation}/l{length}/bias={bias}"
            yield name, partial(conv, dtype, dtype, last, length, width, activation, bias)
    for activation in (None, "silu"):
        name = f"conv/{label}/float32-weight/{activation}"
        yield name, partial(conv, dtype, torch.float32, False, 33, 4, activation, True)
        for width in (2, 3, 4):
            # a sequence shorter than the kernel keeps some initial states among the final ones
            for length in (2, 40):
                name = f"conv-states/{label}/w{width}/{activation}/l{length}"
                yield name, partial(conv_states, dtype, length, width, activation)
            yield f"conv-seq_idx/{label}/w{width}/{activation}", partial(conv_seq_idx, dtype, width, activation)
            for circular, length, state in itertools.product((False, True), (1, 3), (width - 1, width, width + 5)):
                if circular and (state < width or length > state):
                    continue  # the ring would overwrite what this step still reads
                name = f"conv-update/{label}/w{width}/{activation}/l{length}/s{state}/circular={circular}"
                yield name, partial(update, dtype, length, width, state, activation, circular)
    yield f"conv-raw/{label}", partial(conv_raw, dtype)
    yield f"conv-update-2d/{label}", partial(update_2d, dtype)


def scan_checks(label: str, dtype: torch.dtype) -> Iterator[tuple[str, Check]]:
    kinds = [
        ("variable", "variable"),
        ("grouped1", "grouped1"),
        ("grouped2", "grouped2"),
        ("constant", "variable"),
        ("variable", "constant"),
        ("constant", "constant"),
    ]
    everything = ("D", "z", "delta_bias")
    wanted: list[tuple[str, ...]] = [(), ("D",), ("z",), ("delta_bias",), everything]
    for (b_kind, c_kind), optional in itertools.product(kinds, wanted):
        name = f"scan/{label}/B={b_kind}/C={c_kind}/{'+'.join(optional) or 'bare'}"
        yield name, partial(scan, dtype, b_kind, c_kind, 33, optional)
    yield f"scan/{label}/no-softplus", partial(scan, dtype, "variable", "variable", 20, everything, False)
    yield f"scan/{label}/l1", partial(scan, dtype, "grouped1", "grouped1", 1, everything)
    yield f"scan-raw/{label}/z", partial(scan_raw, dtype, True)
    yield f"scan-raw/{label}/plain", partial(scan_raw, dtype, False)


def checks() -> Iterator[tuple[str, Check]]:
    """Yield the name and the body of every check."""
    for label, dtype in DTYPES.items():
        yield from conv_checks(label, dtype)
        yield from scan_checks(label, dtype)
    yield "scan/fp32/two-chunks", partial(scan, torch.float32, "grouped1", "grouped1", 2050, ("z",))
    yield "scan/layouts", scan_layouts
    yield from refusals()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--filter", default="", help="run only the checks whose name contains this text")
    wanted = parser.parse_args().filter
    passed = failed = 0
    for name, body in checks():
        if wanted not in name:
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
    print(json.dumps({"passed": passed, "failed": failed, "torch": torch.__version__}))
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
