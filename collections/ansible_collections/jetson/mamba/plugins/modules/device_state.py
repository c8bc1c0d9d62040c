#!/usr/bin/python
# Copyright: the Jetson Mamba authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import state

DOCUMENTATION = r"""
module: device_state
short_description: Read a device's whole state in one round trip
description:
  - Returns what is there, as plain data with a schema version, and changes nothing. Whether it is what is wanted is
    decided elsewhere.
version_added: 0.1.0
author: The Jetson Mamba authors (@jetson-mamba)
attributes:
  check_mode:
    description: It only reads.
    support: full
options:
  root:
    description: Folder of the environments on the device.
    type: path
    required: true
  build_root:
    description: Folder of the builds; its free space is read.
    type: path
    required: true
  tmp_root:
    description: Folder of transfers in flight; its free space is read.
    type: path
    required: true
  scope:
    description: Survey the user sites of the interpreters too (V(user)) or the environments only.
    type: str
    choices: [venv, user]
    default: venv
  hash_packages:
    description: Distributions whose installed files are compared with RECORD by hash instead of by size.
    type: list
    elements: str
    default: []
  site_files:
    description: Paths below each site folder whose sha256 is returned.
    type: list
    elements: str
    default: []
  config_files:
    description: Absolute paths whose sha256 is returned.
    type: list
    elements: path
    default: []
  toolkits:
    description: Folders of CUDA toolkits to look at beside those under /usr/local.
    type: list
    elements: path
    default: []
  libraries:
    description: Names of shared libraries; those that the linker finds are returned.
    type: list
    elements: str
    default: []
  inspect:
    description:
      - Packages whose installed extensions are looked into, in each environment and user site. What they are for and
        what they ask for is returned as C(inspection) of that site; packages that are not there are left out.
    type: list
    elements: dict
    default: []
    suboptions:
      package:
        description: Name of the distribution.
        type: str
        required: true
      modules:
        description: Its extension modules.
        type: list
        elements: str
        default: []
"""

EXAMPLES = r"""
- name: Survey the device
  jetson.mamba.device_state:
    root: /opt/jetson-mamba
    build_root: /opt/jetson-mamba/build
    tmp_root: /opt/jetson-mamba/tmp
    inspect:
      - {package: causal_conv1d, modules: [causal_conv1d_cuda]}
"""

RETURN = r"""
state:
  description: Everything that was read, schema 1 (see module_utils/state.py).
  type: dict
  returned: always
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "build_root": {"type": "path", "required": True},
            "tmp_root": {"type": "path", "required": True},
            "scope": {"type": "str", "choices": ["venv", "user"], "default": "venv"},
            "hash_packages": {"type": "list", "elements": "str", "default": []},
            "site_files": {"type": "list", "elements": "str", "default": []},
            "config_files": {"type": "list", "elements": "path", "default": []},
            "toolkits": {"type": "list", "elements": "path", "default": []},
            "libraries": {"type": "list", "elements": "str", "default": []},
            "inspect": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "package": {"type": "str", "required": True},
                    "modules": {"type": "list", "elements": "str", "default": []},
                },
            },
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, state=state.collect(**module.params))


if __name__ == "__main__":
    main()
