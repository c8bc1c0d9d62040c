#!/usr/bin/python
"""Require that the linker finds libraries."""

from __future__ import annotations

import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: shared_libraries
short_description: Ask or require that the device's linker finds libraries
description:
  - Looks for libraries in the linker cache and returns those that it does not hold, with their packages; fails, naming
    them, where the libraries are required. Changes nothing.
version_added: 0.1.0
author: The Jetson Mamba authors
options:
  libraries:
    description: Soname to the Debian package that brings it, empty where none is known.
    type: dict
    required: true
  required:
    description: Whether a library that is missing is a failure.
    type: bool
    default: true
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
"""

EXAMPLES = r"""
- name: Require what NVIDIA's torch is linked with
  jetson.mamba.shared_libraries:
    libraries:
      libcusparseLt.so.0: libcusparselt0
      libopenblas.so.0: libopenblas0

- name: Ask which packages are to be installed
  jetson.mamba.shared_libraries:
    libraries:
      libcusparseLt.so.0: libcusparselt0
    required: false
  register: libraries
"""

RETURN = r"""
missing:
  description: Sonames that the linker cache does not hold, sorted.
  returned: always
  type: list
  elements: str
packages:
  description: The Debian packages that bring those, sorted.
  returned: always
  type: list
  elements: str
reasons:
  description: The same packages as a plan has them; name, and why with the library.
  returned: success
  type: list
  elements: dict
"""


def sonames(printed: str) -> set[str]:
    """Return the sonames in what `ldconfig -p` prints."""
    return {line.split()[0] for line in printed.splitlines() if " => " in line}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "libraries": {"type": "dict", "required": True},
            "required": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    wanted = module.params["libraries"]
    ldconfig = shutil.which("ldconfig", path="/usr/sbin:/sbin:/usr/bin:/bin") or "ldconfig"
    _status, printed, _errors = module.run_command([ldconfig, "-p"], check_rc=True)
    missing = sorted(set(wanted) - sonames(printed))
    packages = sorted({wanted[name] for name in missing} - {""})
    # the first library of each, in the words of the plan
    why = {wanted[name]: f"{name}, which the torch wheel is linked with" for name in reversed(missing)}
    reasons = [{"name": name, "why": why[name]} for name in packages]
    if missing and module.params["required"]:
        problem = Problem(
            "the linker finds no {}".format(", ".join(missing)),
            "the libraries that the wheels are linked with",
            "install {} (libcusparselt0 is in NVIDIA's CUDA repository), or let the run do it: "
            "-e debian_packages_source=controller".format(" ".join(packages) or "what brings them"),
        )
        module.fail_json(msg=problem.render(), problem=problem.as_dict(), missing=missing, packages=packages)
    module.exit_json(changed=False, missing=missing, packages=packages, reasons=reasons)


if __name__ == "__main__":
    main()
