#!/usr/bin/python
# Copyright: the Jetson Mamba authors
# SPDX-License-Identifier: Apache-2.0
"""Documentation and arguments of the action plugin of the same name, which works on the controller."""

from __future__ import annotations

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: wheelhouse
short_description: List, verify, fill and prune the controller's wheelhouse
description:
  - The wheelhouse keeps the wheels that were built once per platform class, or imported; each class has a manifest.
  - This is an action plugin; it works on the controller and contacts no host.
version_added: 0.1.0
author: The Jetson Mamba authors (@jetson-mamba)
options:
  mode:
    description:
      - V(list) prints what is there.
      - V(verify) hashes every wheel anew and looks into it. What is wrong is set aside, and the task fails at its end,
        naming all.
      - V(import) takes in wheels that others built, from O(import_path), for O(class_id).
      - V(prune) removes wheels beyond the newest O(keep) of each class and component, files that no manifest names, and
        what was set aside more than O(aside_days) days ago. A wheel that a run is busy with stays.
      - V(unlock) removes the locks of owners that are gone, or that gave no sign of life for ten minutes. Locks of
        living owners stay.
    type: str
    choices: [list, verify, import, prune, unlock]
    default: list
  project:
    description: The folder of C(site.yml).
    type: path
    required: true
  path:
    description: The wheelhouse. Empty means C(wheelhouse/) in O(project); a relative path counts from there.
    type: str
    default: ""
  import_path:
    description:
      - For V(import), a wheel or a folder of wheels. Of a folder, the wheels are taken that belong to a component of
        this project and whose names fit O(class_id); the others are named and left.
    type: str
    default: ""
  class_id:
    description: For V(import), the platform class that the wheels were built for, as the plan of a run names it.
    type: str
    default: ""
  sha256:
    description: For V(import), what files must have, C({file name, sha256}).
    type: dict
    default: {}
  keep:
    description: For V(prune), how many wheels stay of each class and component.
    type: int
    default: 2
  aside_days:
    description: For V(prune), how many days wheels that were set aside are kept.
    type: float
    default: 30
attributes:
  check_mode:
    description: Says what would be set aside, imported, removed or unlocked.
    support: full
  diff_mode:
    description: Lists what goes and what comes.
    support: full
"""

EXAMPLES = r"""
- name: List the wheelhouse
  jetson.mamba.wheelhouse:
    project: "{{ playbook_dir | dirname }}"

- name: Take in the wheels of an archive folder
  jetson.mamba.wheelhouse:
    mode: import
    project: "{{ playbook_dir | dirname }}"
    import_path: ~/jetson-archive
    class_id: aarch64-glibc2.35-cu12.6-cp310-torch2.5.0a0+872d972e41.nv24.8-cxx11-sm87
"""

RETURN = r"""
wheels:
  description: The rows of all manifests, as they are when the task ends.
  returned: success
  type: list
  elements: dict
table:
  description: What was printed.
  returned: success
  type: list
  elements: str
changes:
  description: What was (in check mode, would be) set aside, imported, removed or unlocked, one line each.
  returned: success
  type: list
  elements: str
problem:
  description: What is wrong, with found, expected and next.
  returned: failure
  type: dict
"""

MODES = ("list", "verify", "import", "prune", "unlock")


def argument_spec() -> Dict[str, Any]:
    """Return the arguments of the action plugin, which checks mode itself."""
    return {
        "mode": {"type": "str", "default": "list"},
        "project": {"type": "path", "required": True},
        "path": {"type": "str", "default": ""},
        "import_path": {"type": "str", "default": ""},
        "class_id": {"type": "str", "default": ""},
        "sha256": {"type": "dict", "default": {}},
        "keep": {"type": "int", "default": 2},
        "aside_days": {"type": "float", "default": 30},
    }


def main() -> None:
    """Say that the work is the action plugin's."""
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    module.fail_json(
        msg="found:    jetson.mamba.wheelhouse was run as a module\n"
        "expected: its action plugin, which works on the controller\n"
        "next:     call it by its full name, from a playbook whose collections_path holds this collection"
    )


if __name__ == "__main__":
    main()
