#!/usr/bin/env python3
"""Resolve a list of requirements for one machine and Python, and lock it: one wheel and one sha256 for each package.

    .venv/bin/python tools/lock.py cp310-linux_aarch64
    .venv/bin/python tools/lock.py cp311-linux_x86_64 --glibc 2.36 --output simulator/locks/cp311-linux_x86_64.txt \\
        --override 'sympy>=1.13.3'

uv resolves (for the target, from wheels alone); then the best wheel of each package is looked up in the package index
that pip is configured with, and its sha256 and size are written down. Nothing is downloaded but metadata, unless an
index publishes no hash or size. Takes about half a minute.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "collections"))

# E402: they can be imported only after the line above
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem  # noqa: E402
from ansible_collections.jetson.mamba.plugins.module_utils.versions import (  # noqa: E402
    Target,
    canonical_name,
)
from ansible_collections.jetson.mamba.plugins.plugin_utils.fetch import find_wheel_link  # noqa: E402

LOCKS = REPOSITORY / "collections/ansible_collections/jetson/mamba/plugins/data/locks"
# the glibc of the Ubuntu that the Python belongs to on a Jetson
GLIBC = {"cp310": "2.35", "cp312": "2.39"}
_TARGET = re.compile(r"cp3(\d+)-linux_(\w+)")


def parse_target(text: str, glibc: str | None) -> Target:
    """Return the target that a lock's stem names (cp310-linux_aarch64).

    Raises:
        Problem: the name has another form, or the glibc must be given.
    """
    match = _TARGET.fullmatch(text)
    if not match:
        raise Problem(f"target {text}", "cp3NN-linux_MACHINE", "for example: tools/lock.py cp310-linux_aarch64")
    glibc = glibc or GLIBC.get(f"cp3{match[1]}")
    if not glibc:
        raise Problem(f"target {text} without --glibc", "the target's glibc version", "say it: --glibc 2.36")
    return Target(match[2], f"3.{match[1]}", glibc)


def resolve(source: Path, overrides: list[str], target: Target) -> list[tuple[str, str]]:
    """Return (name, version) of everything that the requirements need on the target.

    Raises:
        Problem: uv is absent or finds no solution.
    """
    with tempfile.TemporaryDirectory(prefix="lock-") as folder:
        override = Path(folder, "overrides.txt")
        override.write_text("".join(line + "\n" for line in overrides), encoding="utf-8")
        # in a folder of its own, so that no address or path of this machine gets into the answer
        command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--no-python-downloads", "--only-binary", ":all:"]
        command += ["--python-version", target.python, "--override", str(override)]
        command += ["--python-platform", f"{target.machine}-manylinux_{target.glibc.replace('.', '_')}"]
        try:
            done = subprocess.run([*command, "-"], input=source.read_text(), capture_output=True, text=True, cwd=folder)
        except FileNotFoundError as error:
            raise Problem(
                f"no uv beside {sys.executable}", "the controller's environment", "make one: tools/bootstrap"
            ) from error
    if done.returncode:
        raise Problem(
            f"uv finds no solution of {source.name} for {target.describe()}:\n{done.stderr.strip()}",
            "versions that fit together and have wheels",
            f"loosen a bound in {source}",
        )
    lines = [line.split(";")[0].strip() for line in done.stdout.splitlines()]
    pairs = [line.split("==", 1) for line in lines if "==" in line and not line.startswith("#")]
    return [(canonical_name(name), version) for name, version in pairs]


def render(target: Target, pairs: list[tuple[str, str]], command: list[str]) -> str:
    """Return the lock's text."""
    lines = [
        f"# What {target.describe()} gets besides torch: exact versions, one wheel and its sha256 each.",
        "# Above each: the wheel's file name and size in bytes. Written by this command, do not edit:",
        f"#   .venv/bin/python tools/lock.py {' '.join(command)}",
    ]
    for name, version in sorted(pairs):
        link = find_wheel_link(name, version, target)
        lines += [f"# {link.filename} {link.size}", f"{name}=={version} \\", f"    --hash=sha256:{link.sha256}"]
        print(f"  {link.filename}", file=sys.stderr)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write one lock; the exit status is 1 where it cannot be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", help="cp3NN-linux_MACHINE, for example cp310-linux_aarch64")
    parser.add_argument("--glibc", help="the target's glibc, where it does not follow from the Python")
    parser.add_argument("--source", type=Path, default=LOCKS / "runtime.in", help="requirements to resolve")
    parser.add_argument("--override", action="append", default=[], help="a requirement that replaces the source's own")
    parser.add_argument("--output", type=Path, help="default: data/locks/TARGET.txt of the collection")
    arguments = parser.parse_args()
    try:
        target = parse_target(arguments.target, arguments.glibc)
        output = arguments.output or LOCKS / f"{arguments.target}.txt"
        pairs = resolve(arguments.source, arguments.override, target)
        command = [f"'{word}'" if re.search(r"[^\w./=-]", word) else word for word in sys.argv[1:]]
        text = render(target, pairs, command)
    except Problem as problem:
        print(problem.render(), file=sys.stderr)
        return 1
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(f"{output}: {len(pairs)} packages", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
