#!/usr/bin/python
"""Ensure the Python environment that everything else is installed into."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils.environment import Wish, ensure
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: python_environment
short_description: Create, mend and activate the environment of a Mamba host
description:
  - In O(scope=venv), creates a virtual environment at its final, versioned place, without pip (pip comes with the
    locked wheels), so that neither ensurepip nor the package python3-venv is needed.
  - In O(scope=user), prepares the user site of O(base_python) and adds one constraints file to the user's pip
    configuration, leaving everything else in it as it was.
  - Writes a constraints file that pip obeys in every later installation.
  - Writes the launcher C(bin/mamba-python) below O(root), which resolves the link C(current) once and executes the
    environment's interpreter by its real path.
  - A venv whose creation was interrupted, or whose interpreter does not run any more, is mended; what is installed
    in it stays.
version_added: 0.1.0
author: The Jetson Mamba authors
options:
  scope:
    description: What kind of environment.
    type: str
    choices: [venv, user]
    default: venv
  base_python:
    description: The interpreter that the environment is made from; in O(scope=user) the one that is used.
    type: path
    required: true
  root:
    description: The project's folder on the device. It must exist and belong to the connecting user.
    type: path
    required: true
  env:
    description: The venv's folder. Required in O(scope=venv).
    type: path
  state:
    description: Folder for records, made where absent. In O(scope=user) it holds the constraints file.
    type: path
  constraints:
    description: Lines of the constraints file. Where not given, those that are there stay.
    type: list
    elements: str
  system_packages:
    description:
      - Import or distribution names of packages of the system's Python that are made visible in the venv, by links
        in a folder of their own, without opening all of dist-packages. Where not given, they stay as they are.
      - Not used in O(scope=user), which sees them all.
    type: list
    elements: str
  activate:
    description: Switch C(current), atomically, to this environment, and let the launcher start it.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Says what would be made, also on a bare device.
  diff_mode:
    support: full
    description: Shows files, links and folders.
"""

EXAMPLES = r"""
- name: Create the environment
  jetson.mamba.python_environment:
    base_python: /usr/bin/python3.10
    root: /opt/jetson-mamba
    env: /opt/jetson-mamba/envs/torch2.5.0a0-cp310-1a2b3c4d
    state: /opt/jetson-mamba/state/torch2.5.0a0-cp310-1a2b3c4d
    constraints: ["torch==2.5.0a0+872d972e41.nv24.8", "numpy==1.26.4"]
    system_packages: [tensorrt, cv2]

- name: Switch to it
  jetson.mamba.python_environment:
    base_python: /usr/bin/python3.10
    root: /opt/jetson-mamba
    env: /opt/jetson-mamba/envs/torch2.5.0a0-cp310-1a2b3c4d
    activate: true
"""

RETURN = r"""
env:
  description: The environment's folder; in O(scope=user) the user base.
  returned: success
  type: str
python:
  description: The environment's interpreter.
  returned: success
  type: str
site_packages:
  description: Where distributions are installed.
  returned: success
  type: str
constraints_file:
  description: The constraints file that pip obeys.
  returned: success
  type: str
launcher:
  description: The launcher's path.
  returned: success
  type: str
active:
  description: What C(current) names after this task, or null.
  returned: success
  type: str
previous:
  description: What C(current) named before this task, or null.
  returned: success
  type: str
actions:
  description: What was done, or would be in check mode.
  returned: success
  type: list
  elements: str
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "scope": {"type": "str", "choices": ["venv", "user"], "default": "venv"},
            "base_python": {"type": "path", "required": True},
            "root": {"type": "path", "required": True},
            "env": {"type": "path"},
            "state": {"type": "path"},
            "constraints": {"type": "list", "elements": "str"},
            "system_packages": {"type": "list", "elements": "str"},
            "activate": {"type": "bool", "default": False},
        },
        required_if=[("scope", "venv", ("env",))],
        supports_check_mode=True,
    )
    arguments = module.params
    wish = Wish(
        scope=arguments["scope"],
        base_python=arguments["base_python"],
        root=arguments["root"],
        env=arguments["env"] if arguments["scope"] == "venv" else "",
        state=arguments["state"] or "",
        constraints=arguments["constraints"],
        system_packages=arguments["system_packages"],
        activate=arguments["activate"],
    )
    try:
        result = ensure(wish, module.check_mode)
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())
    module.exit_json(**result)


if __name__ == "__main__":
    main()
