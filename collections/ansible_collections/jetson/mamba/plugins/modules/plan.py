#!/usr/bin/python
# Copyright: the Jetson Mamba authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

DOCUMENTATION = r"""
module: plan
short_description: Survey a device and decide what there is to do
description:
  - Checks the settings of all roles on the controller, reads the device's state in one round trip
    (M(jetson.mamba.device_state)), and compares it with what the settings and the platform's row want.
  - Nothing is changed. Every problem found is reported at once, as found / expected / next.
  - This is an action plugin; it runs on the controller.
version_added: 0.1.0
author: The Jetson Mamba authors (@jetson-mamba)
attributes:
  check_mode:
    description: It changes nothing.
    support: full
options:
  roles:
    description: Folder of the project's roles, whose argument specs and defaults are read.
    type: path
    required: true
  purpose:
    description:
      - With V(provision), any problem ends the run for this host. With V(verify), only what makes it impossible to say
        where things are does; the rest is listed in the plan.
    type: str
    choices: [provision, verify]
    default: provision
"""

EXAMPLES = r"""
- name: Survey the device and plan what there is to do
  jetson.mamba.plan:
    roles: "{{ role_path | dirname }}"
  register: planned
"""

RETURN = r"""
jetson_mamba_plan:
  description: The plan, as docs/architecture.md describes it.
  type: dict
  returned: success
problems:
  description: What forbids the run, each with outcome, found, expected and next.
  type: list
  elements: dict
  returned: failure
"""
