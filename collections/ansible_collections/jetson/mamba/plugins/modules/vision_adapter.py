#!/usr/bin/python
"""Install or remove the adapter that serves VMamba's extension modules over mamba's own."""

from __future__ import annotations

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import files, vision_adapter
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: vision_adapter
short_description: Let vision projects import selective_scan_cuda_core and selective_scan_cuda_oflex
description:
  - Places C(selective_scan_cuda_core.py) and C(selective_scan_cuda_oflex.py) in an environment. They take VMamba's
    positional arguments and call C(selective_scan_cuda), which mamba_ssm brings, forward and backward. A project needs
    no change.
  - An extension module of these names that a project built itself wins, wherever Python can import it from. A module of
    these names in O(site_packages) that is not this project's is left alone and named in RV(notes).
  - Importing the adapter imports no PyTorch. Where C(selective_scan_cuda) is missing, the import fails at once, so that
    a project's own fallback is taken.
  - Idempotent. Check mode writes nothing and reports the same diff.
options:
  site_packages:
    description: The C(site-packages) folder of the environment, absolute.
    type: path
    required: true
  state:
    description: Whether the adapter is there. V(absent) removes its two files and their bytecode.
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
- name: Let vision projects import VMamba's extension modules
  jetson.mamba.vision_adapter:
    site_packages: /opt/jetson-mamba/envs/mine/lib/python3.10/site-packages
"""

RETURN = r"""
files:
  description: The adapter's files, with O(state=absent) those that shall be gone.
  returned: success
  type: list
  elements: str
notes:
  description: Modules of the same names in the folder that are not the adapter's, such as a project's own extension.
  returned: success
  type: list
  elements: str
"""


def bring(site_packages: str, state: str, check: bool) -> dict[str, object]:
    """Install or remove the adapter and return the module's result."""
    wanted: dict[str, files.FileSpec | None] = {}
    if state == "present":
        if not check and not os.path.isdir(site_packages):
            raise Problem(
                f"there is no folder {site_packages}",
                "the site-packages folder of an environment that exists",
                "create the environment first (role torch_jetpack), or correct site_packages",
            )
        wanted.update(vision_adapter.wanted_files(site_packages))
    else:
        wanted.update(vision_adapter.unwanted_files(site_packages))
    notes = [vision_adapter.own_note(path) for path in vision_adapter.own_modules(site_packages)]
    changed, diffs = files.ensure_files(wanted, check)
    return {"changed": changed, "diff": diffs, "files": list(wanted), "notes": notes}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "site_packages": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    arguments = module.params
    try:
        result = bring(arguments["site_packages"], arguments["state"], module.check_mode)
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())
    module.exit_json(**result)


if __name__ == "__main__":
    main()
