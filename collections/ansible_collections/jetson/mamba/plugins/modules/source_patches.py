#!/usr/bin/python
# Copyright: the Jetson Mamba authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import patches
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
module: source_patches
short_description: Apply a patch series to an installed package, or take it back
description:
  - Brings installed Python files to what a patch series says, and keeps the pristine originals, RECORD's hashes and a
    note of what was done. A file whose checksum the series does not know is refused and left untouched, and so are
    all others then.
  - The action plugin of the same name reads the series on the controller, so that a task names O(package),
    O(version), O(companions) and O(patch_root), not O(series).
version_added: 0.1.0
author: The Jetson Mamba authors (@jetson-mamba)
requirements:
  - GNU patch on the device, where something has to be patched
attributes:
  check_mode:
    description:
      - Says what would change and writes nothing. Where the package is not installed yet, it says that the files
        would be patched after the installation, and reports a change.
    support: full
  diff_mode:
    description: The files and RECORD's rows before and after; the patches themselves for a package yet to be installed.
    support: full
  idempotent:
    description: Checksums decide, so that a reinstalled package is patched again and a patched one is left alone.
    support: full
options:
  site_packages:
    description:
      - Folder that the package is installed in. With O(applies_to=source) the top of a source tree.
    type: path
    required: true
  state_dir:
    description: Folder outside O(site_packages) for the pristine originals and the note of what is patched.
    type: path
    required: true
  package:
    description: Name of the package.
    type: str
    required: true
  version:
    description: Version of the package that the series belongs to.
    type: str
    required: true
  companions:
    description:
      - Versions of other packages that decide which patches are needed; null for one that is not installed.
    type: dict
    default: {}
  patch_root:
    description: Folder on the controller with C(<package>/<version>/series.yml). Needed unless O(series) is given.
    type: path
  series:
    description:
      - The patches in order, filled in by the action plugin. An empty list takes back what an earlier run patched.
    type: list
    elements: dict
  applies_to:
    description:
      - V(python) patches the files of an installed package and keeps its RECORD true. V(source) patches a source tree
        before it is built.
    type: str
    choices: [python, source]
    default: python
  state:
    description: Whether the patches are applied or the pristine files are back.
    type: str
    choices: [present, absent]
    default: present
"""

EXAMPLES = r"""
- name: Make mamba_ssm 2.2.4 fit causal_conv1d 1.6.0
  jetson.mamba.source_patches:
    site_packages: /opt/jetson-mamba/envs/mine/lib/python3.10/site-packages
    state_dir: /opt/jetson-mamba/state/mine
    package: mamba_ssm
    version: 2.2.4
    companions:
      causal_conv1d: 1.6.0
    patch_root: "{{ playbook_dir | dirname }}/files/patches"

- name: Put upstream's own files back
  jetson.mamba.source_patches:
    site_packages: /opt/jetson-mamba/envs/mine/lib/python3.10/site-packages
    state_dir: /opt/jetson-mamba/state/mine
    package: mamba_ssm
    version: 2.2.4
    companions:
      causal_conv1d: 1.6.0
    patch_root: "{{ playbook_dir | dirname }}/files/patches"
    state: absent
"""

RETURN = r"""
files:
  description: One entry for each target.
  type: list
  elements: dict
  returned: success
  contains:
    target:
      description: Path below the site folder.
      type: str
    status_before:
      description: absent, pristine, partial (not the whole series), outdated (an earlier series of ours) or patched.
      type: str
    status:
      description: What it is now, or would be in check mode.
      type: str
    sha256:
      description: Checksum of the file now, or as it would be in check mode.
      type: str
problem:
  description: What was found, what was expected and what to do next.
  type: dict
  returned: failure
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "site_packages": {"type": "path", "required": True},
            "state_dir": {"type": "path", "required": True},
            "package": {"type": "str", "required": True},
            "version": {"type": "str", "required": True},
            "companions": {"type": "dict", "default": {}},
            "patch_root": {"type": "path"},
            "series": {"type": "list", "elements": "dict"},
            "applies_to": {"type": "str", "choices": ["python", "source"], "default": "python"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    try:
        if module.params["series"] is None:
            raise Problem(
                "no series was given to the device",
                "a series, which the action plugin reads from patch_root",
                "call the module by its full name jetson.mamba.source_patches",
            )
        request = patches.Request(
            site_packages=module.params["site_packages"],
            state_dir=module.params["state_dir"],
            package=module.params["package"],
            version=module.params["version"],
            series=module.params["series"],
            present=module.params["state"] == "present",
            tracked=module.params["applies_to"] == "python",
        )
        module.exit_json(**patches.realise(request, module.check_mode, module.get_bin_path("patch")))
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())


if __name__ == "__main__":
    main()
