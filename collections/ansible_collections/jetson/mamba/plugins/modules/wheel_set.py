#!/usr/bin/python
"""Ensure that an environment holds a set of wheels."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import wheels
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: wheel_set
short_description: Ensure that an environment holds exactly these wheels
description:
  - Asks the device which wheels of a lock, and which further ones, are missing, of another version or build, or
    damaged; sends only those from the controller's cache, and installs them with pip without an index, without
    dependencies and with hashes required.
  - Every file is compared with its sha256 on arrival. Wheels that are named one by one are looked into first, and
    refused where they hold libraries of another machine.
  - An installation that was interrupted is noticed by its RECORD and done again. Temporary copies are removed.
  - The options marked internal are what the controller's half tells the device's half.
version_added: 0.1.0
author: The Jetson Mamba authors
options:
  python:
    description: The environment's interpreter.
    type: path
    required: true
  site_packages:
    description: Where the wheels shall be.
    type: path
    required: true
  lock:
    description: A requirements file with hashes, on the controller.
    type: str
  target:
    description: What wheels must be for; keys V(machine), V(python) and V(glibc). Required with O(lock) or O(extra).
    type: dict
  extra:
    description: Wheels that no lock names.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Distribution name.
        type: str
        required: true
      version:
        description: Version; NVIDIA's three spellings of one version are one.
        type: str
        required: true
      url:
        description: Where the controller fetches it.
        type: str
      path:
        description: A file on the controller.
        type: str
      sha256:
        description: Checksum; null where nobody published one.
        type: str
  trust_on_first_use:
    description: Accept, record and enforce the checksum of the first download where O(extra[].sha256) is null.
    type: bool
    default: false
  cache:
    description: The controller's cache, a relative one below the project; where not set, C(~/.cache/jetson-mamba).
    type: str
  tmp:
    description: Folder on the device for files in transfer.
    type: path
    default: /tmp
  scope:
    description: Install into a venv, or into the user site.
    type: str
    choices: [venv, user]
    default: venv
  verify_hashes:
    description: Names whose files are compared with RECORD by hash; others by existence and size.
    type: list
    elements: str
    default: []
  mode:
    description: Internal. What the device's half does.
    type: str
    choices: [query, install]
    default: query
  wheels:
    description: Internal. What the environment must hold, or what is to be installed.
    type: list
    elements: dict
  source_dir:
    description: Internal. Folder of the files that were sent.
    type: path
attributes:
  check_mode:
    support: full
    description: Asks, and names what would be installed; nothing is fetched or sent.
  diff_mode:
    support: full
    description: Shows what is there against what is wanted, one line a wheel.
"""

EXAMPLES = r"""
- name: Install torch and the runtime
  jetson.mamba.wheel_set:
    python: /opt/jetson-mamba/envs/torch2.5.0a0-cp310-1a2b3c4d/bin/python
    site_packages: /opt/jetson-mamba/envs/torch2.5.0a0-cp310-1a2b3c4d/lib/python3.10/site-packages
    tmp: /opt/jetson-mamba/tmp
    lock: locks/cp310-linux_aarch64.txt
    target: {machine: aarch64, python: "3.10", glibc: "2.35"}
    extra:
      - name: torch
        version: 2.5.0a0+872d972e41.nv24.8
        path: wheels/torch-2.5.0a0+872d972e41.nv24.08.17622132-cp310-cp310-linux_aarch64.whl
"""

RETURN = r"""
missing:
  description: What was missing before, {name, version, reason} each.
  returned: success
  type: list
  elements: dict
installed:
  description: What was installed, as name==version.
  returned: success
  type: list
  elements: str
conflicts:
  description: Lines of pip check that concern what was installed.
  returned: success
  type: list
  elements: str
"""


def main() -> None:
    """Run the device's half."""
    spec = {name: wheels.ARGUMENTS[name] for name in wheels.ON_DEVICE}
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    arguments = module.params
    if arguments["wheels"] is None:
        module.fail_json(msg="wheel_set works through its action plugin of the same name, on the controller")
    try:
        missing = wheels.query(arguments["site_packages"], arguments["wheels"], arguments["verify_hashes"])
        if arguments["mode"] == "query" or not missing or module.check_mode:
            module.exit_json(
                changed=arguments["mode"] == "install" and bool(missing),
                missing=missing,
                installed=[],
                conflicts=[],
                free_mb=wheels.free_mb(arguments["tmp"]),
            )
        wanted = {row["name"] for row in missing}
        conflicts = wheels.install(
            arguments["python"],
            arguments["site_packages"],
            [wheel for wheel in arguments["wheels"] if wheel["name"] in wanted],
            arguments["source_dir"],
            arguments["scope"],
            arguments["verify_hashes"],
        )
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())
    module.exit_json(
        changed=True,
        missing=missing,
        installed=["{name}=={version}".format(**row) for row in missing],
        conflicts=conflicts,
    )


if __name__ == "__main__":
    main()
