#!/usr/bin/python
"""Documentation and arguments of the action plugin of the same name, which works on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: fetch_artefacts
short_description: Bring what a plan needs into the controller's cache
description:
  - Fetches the wheels of a lock from the package index that the controller's pip is configured with, and further
    wheels by URL, into a cache that keeps each file under its sha256. A file is fetched once, however many hosts ask.
  - Works on the controller; the host is not contacted.
  - Wheels that are named one by one are looked into, and refused where they hold libraries of another machine.
version_added: 0.1.0
author: The Jetson Mamba authors
options:
  lock:
    description: A requirements file with hashes, on the controller.
    type: str
  target:
    description: What wheels must be for; keys V(machine), V(python) and V(glibc).
    type: dict
    required: true
  extra:
    description: Wheels that no lock names, {name, version, url or path, sha256} each.
    type: list
    elements: dict
    default: []
  index_files:
    description: Further files of the package index, such as sdists; {project, filename, sha256} each.
    type: list
    elements: dict
    default: []
  trust_on_first_use:
    description: Accept, record and enforce the checksum of the first download where a wheel's sha256 is null.
    type: bool
    default: false
  cache:
    description: The controller's cache, a relative one below the project; where not set, C(~/.cache/jetson-mamba).
    type: str
attributes:
  check_mode:
    support: full
    description: Downloads nothing and says what is not in the cache.
  diff_mode:
    support: none
"""

EXAMPLES = r"""
- name: Fetch what an Orin with JetPack 6.2 needs
  jetson.mamba.fetch_artefacts:
    lock: locks/cp310-linux_aarch64.txt
    target: {machine: aarch64, python: "3.10", glibc: "2.35"}
    extra:
      - name: torch
        version: 2.5.0a0+872d972e41.nv24.8
        path: wheels/torch-2.5.0a0+872d972e41.nv24.08.17622132-cp310-cp310-linux_aarch64.whl
"""

RETURN = r"""
fetched:
  description: What was fetched now.
  returned: success
  type: list
  elements: str
absent:
  description: In check mode, what is not in the cache.
  returned: success
  type: list
  elements: str
libraries:
  description: >-
    Libraries that the extra wheels ask of the system, that no wheel of the lock brings, and that JetPack may lack;
    soname to Debian package.
  returned: success
  type: dict
"""
