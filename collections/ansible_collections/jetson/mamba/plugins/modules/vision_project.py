#!/usr/bin/python
# Copyright: the Jetson Mamba authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import vision_project
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
module: vision_project
short_description: Report or fix the even kernels of a vision project's SS2D-like blocks
description:
  - Blocks like SS2D pad their depthwise convolution with half of C(d_conv - 1) on every side. With an even C(d_conv)
    the map loses a row and a column, and neither the gate nor the residual fits. The fix keeps the size for even
    kernels, and leaves everything as it is for odd ones.
  - The place is found by structure, on the controller; the rest of the file stays as it is, byte for byte. A file that
    is not recognised is left alone, with a message that says what was looked for.
  - The action plugin of the same name fetches the files, finds what has to be fixed, and writes it back if the files
    are still the ones that it fetched. The originals are kept.
version_added: 0.1.0
author: The Jetson Mamba authors (@jetson-mamba)
requirements:
  - libcst on the controller
attributes:
  check_mode:
    description: Says what would change and writes nothing, on the device and on the controller.
    support: full
  diff_mode:
    description: The files before and after.
    support: full
  idempotent:
    description: A fixed file is recognised as such and left alone, whoever fixed it.
    support: full
options:
  path:
    description: The project's folder on the device, absolute.
    type: path
    required: true
  name:
    description: What the project is called in messages and in the patch file's name; empty means its folder's name.
    type: str
    default: ""
  files:
    description: Files of the project, or globs (C(**) included), relative to O(path).
    type: list
    elements: str
    default: []
  preset:
    description:
      - Adds the files of a known layout. V(guide) is C(yolov10_main/ultralytics/nn/AddModules/Structure/mamba_yolo.py),
        V(upstream) is Mamba-YOLO's own, C(ultralytics/nn/modules/mamba_yolo.py) and C(common_utils_mbyolo.py).
    type: str
    choices: ["", guide, upstream]
    default: ""
  classes:
    description:
      - Look only into these classes and what they use in the same file, such as V(SS2D) or V(VSSBlock_YOLO). Empty
        means all classes that do a selective scan.
    type: list
    elements: str
    default: []
  mode:
    description:
      - V(report) changes nothing on the device and writes a patch file on the controller. V(fix) changes the files.
    type: str
    choices: [report, fix]
    default: report
  state:
    description: V(absent) puts back the originals of all files of the project that were fixed.
    type: str
    choices: [present, absent]
    default: present
  state_dir:
    description:
      - Folder for the originals on the device. Empty means C(~/.local/state/jetson-mamba/projects) of the user who runs
        this, which should be the owner of the checkout.
    type: path
    default: ""
  patch_folder:
    description:
      - Folder on the controller for the patch file of V(report). Empty means C(patches) in the folder of the reports.
    type: path
    default: ""
  operation:
    description: What the device shall do; filled in by the action plugin.
    type: str
    choices: [fetch, write, restore]
  edits:
    description: The files to write; filled in by the action plugin.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The file, relative to O(path).
        type: str
        required: true
      sha256_before:
        description: Checksum that the file must have.
        type: str
        required: true
      sha256_after:
        description: Checksum that it then has.
        type: str
        required: true
      splices:
        description: What becomes what.
        type: list
        elements: dict
        required: true
        suboptions:
          start:
            description: First byte.
            type: int
            required: true
          end:
            description: The byte after the last.
            type: int
            required: true
          text:
            description: What stands there then, in base64.
            type: str
            required: true
"""

EXAMPLES = r"""
- name: Say what even kernels would break, and write a patch file beside the reports
  jetson.mamba.vision_project:
    path: /home/jetson/Mamba-YOLO
    preset: upstream

- name: Fix it
  jetson.mamba.vision_project:
    path: /home/jetson/MedMamba
    files: ["MedMamba.py", "models/**/vmamba*.py"]
    mode: fix

- name: Put the project's own files back
  jetson.mamba.vision_project:
    path: /home/jetson/MedMamba
    state: absent
"""

RETURN = r"""
files:
  description: One entry for each file that was looked at.
  type: list
  elements: dict
  returned: with O(state=present)
  contains:
    path:
      description: The file, relative to the project.
      type: str
    status:
      description: V(to fix), V(fixed), V(fits), V(unrecognised) or V(skipped).
      type: str
    message:
      description: What was found, or what was looked for.
      type: str
    findings:
      description: The recognised convolutions, with line, where, status, kernel, padding, becomes and why.
      type: list
      elements: dict
    patch:
      description: What is, was or would be changed, as a unified diff; empty where nothing is.
      type: str
patch_file:
  description: The patch file on the controller, or empty.
  type: str
  returned: with O(state=present)
notes:
  description: What people should know.
  type: list
  elements: str
  returned: success
problem:
  description: What was found, what was expected and what to do next.
  type: dict
  returned: failure
"""


def perform(arguments: Dict[str, Any], check: bool) -> Dict[str, Any]:
    """Do the device's part and return the module's result.

    Raises:
        Problem: it cannot be done.
    """
    state_dir = arguments["state_dir"] or vision_project.default_state_dir()
    if arguments["operation"] == "fetch":
        patterns = vision_project.patterns_of(arguments["files"], arguments["preset"])
        return vision_project.fetch(arguments["path"], patterns, state_dir)
    if arguments["operation"] == "write":
        return vision_project.write(arguments["path"], arguments["edits"], state_dir, check)
    if arguments["operation"] == "restore":
        return vision_project.restore(arguments["path"], state_dir, check)
    raise Problem(
        "no operation was given to the device",
        "one that the action plugin chooses",
        "call the module by its full name jetson.mamba.vision_project",
    )


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=vision_project.ARGUMENTS, supports_check_mode=True)
    try:
        module.exit_json(**perform(module.params, module.check_mode))
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())


if __name__ == "__main__":
    main()
