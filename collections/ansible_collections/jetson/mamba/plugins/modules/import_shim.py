#!/usr/bin/python
"""Install or remove the torch.distributed import shim."""

from __future__ import annotations

import os
import site

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import files, shim
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: import_shim
short_description: Give torch.distributed the names that a build of PyTorch lacks
description:
  - Builds of PyTorch for Jetson come without C(torch.distributed), and C(import mamba_ssm) reads four of its names.
  - Places C(jetson_mamba_shim.py) and a C(jetson_mamba_shim.pth) with one import line. When Python starts, a finder for
    C(torch.distributed) is registered; PyTorch itself is not imported. When somebody imports it, those of the four
    names that are missing become aliases of their older or newer spelling, or functions that explain themselves when
    called. Names that exist are never replaced.
  - A C(sitecustomize.py) or C(usercustomize.py) of the user's is neither read by the shim nor changed.
  - Idempotent. Check mode writes nothing and reports the same diff.
options:
  site_packages:
    description: The C(site-packages) folder of the environment, absolute.
    type: path
    required: true
  system:
    description:
      - Use the system Python's folder for local additions, C(/usr/local/lib/python3.X/dist-packages), with the Python
        version that O(site_packages) names. Needs root.
    type: bool
    default: false
  state:
    description: Whether the shim is there. V(absent) removes its two files and their bytecode.
    type: str
    choices: [present, absent]
    default: present
author:
  - The Jetson Mamba authors (@jetson-mamba)
attributes:
  check_mode:
    description: Can run in check mode and say what it would change.
    support: full
  diff_mode:
    description: Returns details of what has changed, or would change.
    support: full
"""

EXAMPLES = r"""
- name: Let mamba_ssm import on a PyTorch without torch.distributed
  jetson.mamba.import_shim:
    site_packages: /opt/jetson-mamba/envs/current/lib/python3.10/site-packages

- name: Do the same for the system Python
  jetson.mamba.import_shim:
    site_packages: /opt/jetson-mamba/envs/current/lib/python3.10/site-packages
    system: true
  become: true
"""

RETURN = r"""
files:
  description: The files that make up the shim, with O(state=absent) those that shall be gone.
  returned: success
  type: list
  elements: str
notes:
  description: What else was found, such as a start-up file of the user's that imports torch.
  returned: success
  type: list
  elements: str
"""


def bring(site_packages: str, system: bool, state: str, check: bool) -> dict[str, object]:
    """Install or remove the shim and return the module's result."""
    target = shim.system_site_packages(site_packages) if system else site_packages
    wanted: dict[str, files.FileSpec | None] = {}
    if state == "present":
        if not system and not check and not os.path.isdir(target):
            raise Problem(
                f"there is no folder {target}",
                "the site-packages folder of an environment that exists",
                "create the environment first (role torch_jetpack), or correct site_packages",
            )
        wanted.update(shim.wanted_files(target))
    else:
        wanted.update(shim.unwanted_files(target))
    changed, diffs = files.ensure_files(wanted, check)
    others = shim.guide_files(target, site.getuserbase()) if state == "present" else []
    notes = [shim.guide_note(path) for path in others]
    return {"changed": changed, "diff": diffs, "files": list(wanted), "notes": notes}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "site_packages": {"type": "path", "required": True},
            "system": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    arguments = module.params
    try:
        result = bring(arguments["site_packages"], arguments["system"], arguments["state"], module.check_mode)
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())
    module.exit_json(**result)


if __name__ == "__main__":
    main()
