"""Finding and fixing even kernels: by structure, and nothing else of the file is touched."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import even_kernels
from ansible_collections.jetson.mamba.plugins.plugin_utils.even_kernels import FITS, TO_FIX, UNRECOGNISED, transform

HEAD = "import torch.nn as nn\nimport torch\n\n\n"
TAIL = ' if d_conv % 2 else "same"'


def block(convolution: str, before: str = "", forward: str = "x = self.conv2d(x)", name: str = "SS2D") -> str:
    """Return a class of the family whose convolution is the given call."""
    lines = "".join(f"        {line}\n" for line in before.splitlines())
    body = "".join(f"        {line}\n" for line in forward.splitlines())
    return (
        f"{HEAD}class {name}(nn.Module):\n"
        "    def __init__(self, d_inner=8, d_state=4, d_conv=3, bias=True, **kwargs):\n"
        "        super().__init__()\n"
        "        self.d_conv = d_conv\n"
        f"{lines}"
        f"        self.conv2d = {convolution}\n"
        "        self.A_logs = nn.Parameter(torch.zeros(4, d_state))\n"
        "\n"
        "    def forward(self, x, z):\n"
        f"{body}"
        "        return x * z\n"
    )


def fixed(source: str, classes: tuple[str, ...] = ()) -> str:
    """Return the fixed text, after making sure that fixing it again changes nothing."""
    result = transform(source.encode(), classes)
    again = transform(result.content, classes)
    assert again.content == result.content
    assert again.status != TO_FIX
    ast.parse(result.content)
    return result.content.decode()


def call(padding: str, kernel: str = "d_conv", more: str = ", groups=d_inner") -> str:
    return f"nn.Conv2d(d_inner, d_inner, kernel_size={kernel}, padding={padding}{more})"


@pytest.mark.parametrize(
    ("kernel", "padding", "test"),
    [
        ("d_conv", "(d_conv - 1) // 2", "d_conv % 2"),
        ("d_conv", "(d_conv-1)//2", "d_conv % 2"),
        ("d_conv", "((d_conv - 1) // 2)", "d_conv % 2"),
        ("d_conv", "( (d_conv - 1)\n   // 2 # half\n  )", "d_conv % 2"),
        ("d_conv", "d_conv // 2", "d_conv % 2"),
        ("d_conv", "int((d_conv - 1) / 2)", "d_conv % 2"),
        ("d_conv", "(d_conv - 1) >> 1", "d_conv % 2"),
        ("d_conv", "math.floor((d_conv - 1) / 2)", "d_conv % 2"),
        ("d_conv", "-(-(d_conv - 1) // 2)", "d_conv % 2"),
        ("d_conv", "autopad(d_conv)", "d_conv % 2"),
        ("self.d_conv", "(self.d_conv - 1) // 2", "self.d_conv % 2"),
        ("self.d_conv", "(d_conv - 1) // 2", "self.d_conv % 2"),
        ("d_conv", "(self.d_conv - 1) // 2", "d_conv % 2"),
        ("kwargs['d_conv']", "(kwargs['d_conv'] - 1) // 2", "kwargs['d_conv'] % 2"),
        ("(d_conv, d_conv)", "((d_conv - 1) // 2, (d_conv - 1) // 2)", "d_conv % 2"),
        ("(d_conv, d_conv)", "(d_conv - 1) // 2", "d_conv % 2"),
        ("d_conv", "((d_conv - 1) // 2,) * 2", "d_conv % 2"),
        ("(1, d_conv)", "(0, (d_conv - 1) // 2)", "d_conv % 2"),
        ("[d_conv, d_conv]", "[d_conv // 2, d_conv // 2]", "d_conv % 2"),
        ("d_conv", "1", "d_conv % 2"),
    ],
)
def test_spellings(kernel: str, padding: str, test: str) -> None:
    before = block(call(padding, kernel))
    after = fixed(before)
    assert after == before.replace(f"padding={padding}", f'padding={padding} if {test} else "same"')
    assert after != before


@pytest.mark.parametrize(
    "convolution",
    [
        "nn.Conv2d(d_inner, d_inner, d_conv, 1, (d_conv - 1) // 2, 1, d_inner)",
        "nn.Conv2d(d_inner, d_inner, d_conv, 1, (d_conv - 1) // 2, groups=d_inner)",
        "nn.Conv2d(d_inner, d_inner, d_conv, padding=(d_conv - 1) // 2, groups=d_inner, bias=bias)",
        "torch.nn.Conv2d(in_channels=d_inner, out_channels=d_inner, groups=d_inner, bias=bias, kernel_size=d_conv,"
        " padding=(d_conv - 1) // 2, **kwargs)",
        "nn.Sequential(Conv2d(d_inner, d_inner, d_conv, padding=(d_conv - 1) // 2, groups=d_inner), nn.SiLU())",
        "nn.ModuleList([nn.Conv1d(d_inner, d_inner, d_conv, padding=(d_conv - 1) // 2) for _ in range(4)])",
        "nn.Conv2d(d_inner, d_inner, d_conv, (1, 1), (d_conv - 1) // 2, groups=d_inner, padding_mode='reflect')",
        "nn.Conv2d(d_inner, d_inner, d_conv, padding=(d_conv - 1) // 2, groups=d_inner // 2)",
        "nn.Conv2d(d_inner, d_inner, d_conv, padding=(d_conv - 1) // 2, groups=d_inner) if d_conv > 1 else None",
    ],
)
def test_calls(convolution: str) -> None:
    before = block(convolution)
    assert fixed(before) == before.replace("(d_conv - 1) // 2", "(d_conv - 1) // 2" + TAIL)


@pytest.mark.parametrize(
    ("before", "kernel", "padding", "test"),
    [
        ("pad = (d_conv - 1) // 2", "d_conv", "pad", "d_conv % 2"),
        ("self.pad = (self.d_conv - 1) // 2", "d_conv", "self.pad", "d_conv % 2"),
        ("k = d_conv", "k", "(k - 1) // 2", "k % 2"),
        ("k = int(d_conv)", "k", "(d_conv - 1) // 2", "k % 2"),
        ("k, p = d_conv, (d_conv - 1) // 2", "k", "p", "k % 2"),
        ("ks = (d_conv, d_conv)", "ks", "(d_conv - 1) // 2", "ks[0] % 2"),
        ("ks = (1, d_conv)", "ks", "(0, ks[1] // 2)", "ks[1] % 2"),
        ("pad: int = (d_conv - 1) // 2", "d_conv", "pad", "d_conv % 2"),
        ("total = d_conv - 1\npad = total // 2", "d_conv", "pad", "d_conv % 2"),
        ("if d_conv == 1:\n    pad = 0\nelse:\n    pad = (d_conv - 1) // 2", "d_conv", "pad", "d_conv % 2"),
        ("d_conv = int(d_conv)", "d_conv", "(d_conv - 1) // 2", "d_conv % 2"),
        ("d_conv = d_conv or 3", "d_conv", "(d_conv - 1) // 2", "d_conv % 2"),
    ],
)
def test_names_are_followed(before: str, kernel: str, padding: str, test: str) -> None:
    source = block(call(padding, kernel), before)
    assert fixed(source) == source.replace(f"padding={padding},", f'padding={padding} if {test} else "same",')


def test_a_conditional_padding_is_put_in_parentheses() -> None:
    source = block(call("0 if d_conv == 1 else (d_conv - 1) // 2"))
    assert 'padding=(0 if d_conv == 1 else (d_conv - 1) // 2) if d_conv % 2 else "same",' in fixed(source)


@pytest.mark.parametrize(("kernel", "padding"), [("4", "1"), ("(4, 4)", "(1, 1)"), ("2", "0"), ("4", "(4 - 1) // 2")])
def test_an_even_number_gets_same(kernel: str, padding: str) -> None:
    source = block(call(padding, kernel))
    assert fixed(source) == source.replace(f"padding={padding},", 'padding="same",')


@pytest.mark.parametrize(
    "convolution",
    [
        call('(d_conv - 1) // 2 if d_conv % 2 else "same"'),
        call("'same'"),
        call('"same" if d_conv % 2 == 0 else d_conv // 2'),
    ],
)
def test_what_keeps_its_size_is_left_alone(convolution: str) -> None:
    result = transform(block(convolution).encode())
    assert (result.status, result.edits) == (FITS, ())


@pytest.mark.parametrize(
    ("before", "forward", "padding"),
    [
        ("if d_conv % 2 == 0:\n    raise ValueError(d_conv)", "x = self.conv2d(x)", "(d_conv - 1) // 2"),
        ("assert self.d_conv % 2, 'odd only'", "x = self.conv2d(x)", "(d_conv - 1) // 2"),
        ("", "x = self.conv2d(F.pad(x, (0, 1, 0, 1)))", "(d_conv - 1) // 2"),
        ("", "x = F.pad(x, (0, 1, 0, 1))\nx = self.conv2d(x)", "(d_conv - 1) // 2"),
        ("", "x = self.conv2d(x)\nx = torch.nn.functional.pad(x, (0, 1))", "(d_conv - 1) // 2"),
        ("", "y = self.act(self.conv2d(x))\ny = F.interpolate(y, size=z.shape[2:])", "(d_conv - 1) // 2"),
        ("", "h = self.conv2d(x)\ny = self.core(h)\nreturn F.pad(y, (0, 1))", "(d_conv - 1) // 2"),
        ("", "x = self.conv2d(x)[:, :, :-1, :-1]", "d_conv // 2"),
        ("", "y = self.conv2d(x)\ny = y[..., :x.size(2), :x.size(3)]", "d_conv // 2"),
    ],
)
def test_a_block_with_a_way_of_its_own_is_left_alone(before: str, forward: str, padding: str) -> None:
    result = transform(block(call(padding), before, forward).encode())
    assert (result.status, result.edits) == (FITS, ())
    assert "line " in result.findings[0].why


def test_a_pad_beside_the_convolution_counts_too() -> None:
    convolution = f"nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), {call('(d_conv - 1) // 2')})"
    assert transform(block(convolution).encode()).status == FITS


@pytest.mark.parametrize(
    "forward",
    [
        # the guide's crop of the gate: the residual of the block does not fit then
        "x = self.conv2d(x)\nif x.shape[2] != z.shape[2]:\n    d = z.shape[2] - x.shape[2]\n"
        "    z = z[:, :, d // 2 : d // 2 + x.shape[2]]",
        "x, z = z[:, :4], z[:, 4:]\nx = self.conv2d(x)",
        "z = F.interpolate(z, size=(8, 8))\nx = self.conv2d(x)",
        "B, C, H, W = x.shape\nx = self.conv2d(x)\ny = x.view(B, -1, H * W)",
    ],
)
def test_what_happens_to_other_maps_is_no_cure(forward: str) -> None:
    assert transform(block(call("(d_conv - 1) // 2"), forward=forward).encode()).status == TO_FIX


@pytest.mark.parametrize(
    ("convolution", "reason"),
    [
        ("nn.Conv2d(d_inner, d_inner, d_conv, 2, (d_conv - 1) // 2, groups=d_inner)", "stride=2"),
        ("nn.Conv2d(d_inner, d_inner, d_conv, bias, (d_conv - 1) // 2, groups=d_inner)", "stride=bias"),
        (call("(d_conv - 1) // 2", more=", dilation=2, groups=d_inner"), "dilation=2"),
        (call("d_conv - 1"), "not half of the kernel"),
        (call("0"), "not padded at all"),
        (call("bias"), "cannot be compared"),
        ("nn.Conv2d(d_inner, d_inner, d_conv, groups=d_inner)", "without a padding"),
        ("nn.Conv2d(*kwargs, padding=(d_conv - 1) // 2)", "whose kernel_size is not in the call"),
        (call("(d_conv - 1) // 2", "f(d_conv)"), "cannot be followed"),
        ("nn.Identity()", "no convolution with such a kernel"),
        (call("1", "3"), "no convolution with such a kernel"),
    ],
)
def test_what_is_not_recognised_is_left_alone_and_named(convolution: str, reason: str) -> None:
    source = block(convolution).encode()
    result = transform(source)
    assert (result.status, result.edits, result.content) == (UNRECOGNISED, (), source)
    assert "left alone. Looked for: a Conv1d, Conv2d or Conv3d call" in result.message
    assert reason in result.message


def test_other_networks_convolutions_are_not_ours() -> None:
    source = (
        f"{HEAD}class Stem(nn.Module):\n    def __init__(self, c, ks=4):\n        super().__init__()\n"
        "        self.conv = nn.Conv2d(c, c, ks, padding=(ks - 1) // 2, groups=c)\n"
    )
    result = transform(source.encode())
    assert result.status == UNRECOGNISED
    assert "in Stem, which is no selective scan" in result.message
    # unless the project says that it is
    assert transform(source.encode(), ("Stem",)).status == TO_FIX


def test_crossmodal_is_no_ssm() -> None:
    source = block(call("(k - 1) // 2", "k"), "k = bias", name="CrossModal").replace("A_logs", "w")
    source = source.replace("d_state", "n").replace("d_conv", "taps")
    assert transform(source.encode()).status == UNRECOGNISED


def test_two_variants_in_one_file() -> None:
    one, two = block(call("(d_conv - 1) // 2")), block(call("d_conv // 2"), name="SS2D_v2")[len(HEAD) :]
    result = transform((one + "\n\n" + two).encode())
    assert [finding.where for finding in result.findings] == ["SS2D: self.conv2d", "SS2D_v2: self.conv2d"]
    assert ["loses" in finding.why for finding in result.findings] == [True, False]
    assert fixed(one + "\n\n" + two).count(TAIL) == 2
    only = fixed(one + "\n\n" + two, ("SS2D_v2",))
    assert only.count(TAIL) == 1
    assert "padding=d_conv // 2" + TAIL in only


@pytest.mark.parametrize("name", ["VSSBlock", "VSSBlock_YOLO", "Baustein"])
def test_a_named_class_brings_what_it_uses(name: str) -> None:
    user = (
        f"\n\nclass {name}(nn.Module):\n    def __init__(self, c, ssm_conv=3):\n        super().__init__()\n"
        "        self.op = SS2D(c, d_conv=ssm_conv)\n"
    )
    other = "\n\n" + block(call("(d_conv - 1) // 2"), name="SS2D_unused")[len(HEAD) :]
    source = block(call("(d_conv - 1) // 2")) + user + other
    result = transform(source.encode(), (name,))
    assert [finding.where for finding in result.findings] == ["SS2D: self.conv2d"]


def test_a_class_that_is_not_there_is_named() -> None:
    result = transform(block(call("(d_conv - 1) // 2")).encode(), ("VSSBlock_YOLO",))
    assert result.status == UNRECOGNISED
    assert "no class VSSBlock_YOLO" in result.message


def test_a_class_derived_from_one_that_scans() -> None:
    source = (
        f"{HEAD}class SS2D(nn.Module):\n    def core(self, x):\n        return selective_scan_fn(x)\n\n\n"
        "class Local(SS2D):\n    def __init__(self, c, size=3):\n        super().__init__()\n"
        "        self.dw = nn.Conv2d(c, c, size, padding=(size - 1) // 2, groups=c)\n"
    )
    assert 'padding=(size - 1) // 2 if size % 2 else "same"' in fixed(source)


def test_a_part_that_a_scan_gives_its_kernel_to() -> None:
    part = (
        "\n\nclass DWConv(nn.Module):\n    def __init__(self, dim, k=3):\n        super().__init__()\n"
        "        self.conv = nn.Conv2d(dim, dim, k, 1, (k - 1) // 2, groups=dim)\n"
    )
    used = block("DWConv(d_inner, d_conv)") + part
    assert fixed(used) == used.replace("(k - 1) // 2", '(k - 1) // 2 if k % 2 else "same"')
    assert transform((block("DWConv(d_inner, 3)") + part).encode()).status == UNRECOGNISED


def test_a_function_of_the_file() -> None:
    source = f"{HEAD}def dwconv(c, d_conv):\n    return nn.Conv2d(c, c, d_conv, padding=(d_conv - 1) // 2, groups=c)\n"
    assert fixed(source) == source.replace("// 2,", "// 2" + TAIL + ",")


LINES = block(call("(d_conv - 1) // 2  # Größe bleibt\n           "))


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r\n", 7).encode(),
        LINES.replace("    ", "\t").encode(),
        LINES.rstrip("\n").encode(),
        b"\xef\xbb\xbf" + LINES.encode(),
        b"\xef\xbb\xbf# -*- coding: utf-8 -*-\n" + LINES.encode(),
        ("# -*- coding: latin-1 -*-\n# Übung\n" + LINES).encode("latin-1"),
        ("#!/usr/bin/env python\n# vim: set fileencoding=cp1252 :\n# „Übung“ €\n" + LINES).encode("cp1252"),
        ("# -*- coding: gbk -*-\n# 选择性扫描\n" + LINES.replace("öß", "oss")).encode("gbk"),
        ("# 选择性扫描 🐍\n'''文'''\n" + LINES).encode(),
        ("\f\n" + LINES.replace("class SS2D", "\fclass SS2D")).encode(),
        (LINES + "   \n\t\n    ").encode(),
        LINES.replace("super()", "super()  \\\n    ").encode(),
        (LINES + "\n\n\n# the end").encode(),
    ],
    ids=[
        *("lf", "crlf", "mixed", "tabs", "no-end", "bom", "bom-cookie", "latin-1", "cp1252", "gbk", "wide", "formfeed"),
        *("trailing-space", "continued", "comment-at-end"),
    ],
)
def test_everything_else_stays_byte_for_byte(data: bytes) -> None:
    result = transform(data)
    assert result.status == TO_FIX
    old = b"padding=(d_conv - 1) // 2"
    assert data.count(old) == 1
    assert result.content == data.replace(old, old + TAIL.encode())
    assert transform(result.content).edits == ()
    line = data[: data.index(b"nn.Conv2d(")].count(b"\n") + 1
    assert result.findings[0].line == line


def test_old_mac_line_ends() -> None:
    data = LINES.replace("\n", "\r").encode()
    result = transform(data)
    assert result.content == data.replace(b"// 2", b"// 2" + TAIL.encode())


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"class SS2D(:\n", "no Python source"),
        (b"print 'two'\n", "no Python source"),
        (b"# -*- coding: klingon -*-\nx = 1\n", "cannot be decoded"),
        (b"x = '\xff\xfe'\n", "cannot be decoded"),
        (b"\x00\x01\x02", "no Python source"),
        (b"x = " + b"(" * 3000 + b")" * 3000 + b"\n", "nested too deep"),
    ],
)
def test_what_cannot_be_read_is_a_problem(data: bytes, found: str) -> None:
    with pytest.raises(Problem) as caught:
        transform(data + b"# Conv2d\n")
    assert found in caught.value.found
    assert caught.value.next_step


def test_an_empty_file_is_not_recognised() -> None:
    assert transform(b"").status == UNRECOGNISED


def test_a_finding_says_what_was_done() -> None:
    finding = transform(block(call("(d_conv - 1) // 2")).encode()).findings[0].as_dict()
    assert finding == {
        "line": 9,
        "where": "SS2D: self.conv2d",
        "status": TO_FIX,
        "kernel": "d_conv",
        "padding": "(d_conv - 1) // 2",
        "becomes": "(d_conv - 1) // 2" + TAIL,
        "why": "with an even d_conv the map loses a row and a column: gate and residual do not fit",
    }


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs GNU patch")
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("closed", [True, False])
def test_the_patch_applies(tmp_path: Path, end: str, closed: bool) -> None:
    lines = [line for line in block(call("(d_conv - 1) // 2")).split("\n") if line]
    lines = lines[: next(number for number, line in enumerate(lines) if "Conv2d(" in line) + 1]
    data = (end.join(lines) + (end if closed else "")).encode()
    (tmp_path / "nn").mkdir()
    (tmp_path / "nn" / "block.py").write_bytes(data)
    result = transform(data)
    patch = even_kernels.unified_diff("nn/block.py", data, result.content)
    done = subprocess.run(["patch", "-p1", "--binary"], cwd=tmp_path, input=patch, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "nn" / "block.py").read_bytes() == result.content
