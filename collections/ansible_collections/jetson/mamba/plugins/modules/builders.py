#!/usr/bin/python
# Copyright: the Jetson Mamba authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

DOCUMENTATION = r"""
module: builders
short_description: Find the wheels that the fleet needs, and choose who builds those that are nowhere
description:
  - Looks into the wheelhouse, then into the other sources of wheels that the user names. For what is in none of them,
    one builder per platform class is chosen among the hosts of the play that can still be reached, those of the group
    C(builders) first, then in the order of the inventory. Hosts outside C(--limit) are not in the play.
  - It decides for all hosts of the play at once, so it wants C(run_once), strategy C(linear) and no C(serial).
  - A builder that was lost is replaced at the next call. A build that failed on one host is not tried on another.
  - A wheel that is in the wheelhouse is read whole once a run, so that one that rotted on the disk is built anew.
  - A host of the group C(builders) whose class no device of the play has is named in a warning.
  - With O(choice), it returns the part of one host, and fails where that host cannot be served. A template that reads
    the registered whole copies it for each host, which is slow for a large fleet.
  - Nothing is built here. No host is contacted; this is an action plugin, it runs on the controller.
version_added: 0.1.0
author: The Jetson Mamba authors (@jetson-mamba)
attributes:
  check_mode:
    description: Puts nothing into the wheelhouse.
    support: full
options:
  scope:
    description: Have the wheels that this run installs (V(work)), or all that hosts want, installed or not (V(all)).
    type: str
    choices: [work, all]
    default: work
  choice:
    description: The name of the variable (not its value) in which an earlier call was registered.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Choose who builds what
  jetson.mamba.builders:
  run_once: true
  register: choice

- name: Take this host's part of the choice
  jetson.mamba.builders:
    choice: choice
  register: own

- name: Build what this host was chosen for
  ansible.builtin.include_tasks: build.yml
  when: own.builds | length > 0
"""

RETURN = r"""
hosts:
  description:
    - For each host C(builds) (what it builds, one for each wheel), C(waits) (where the wheel of each component comes
      from) and C(components) (C(served) for each component whose wheel is there).
  type: dict
  returned: success, without O(choice)
problems:
  description: Why a host cannot be served, by host.
  type: dict
  returned: success, without O(choice)
verified:
  description: Wheels that were read whole in this run.
  type: list
  elements: str
  returned: success, without O(choice)
builds:
  description: What this host builds.
  type: list
  elements: dict
  returned: success, with O(choice)
waits:
  description: Where the wheel of each component comes from.
  type: dict
  returned: success, with O(choice)
components:
  description: C(served) for each component whose wheel is there.
  type: dict
  returned: success, with O(choice)
again:
  description: Whether to call this again after the builds, since something is still lacking.
  type: bool
  returned: success
"""
