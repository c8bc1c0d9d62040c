#!/usr/bin/python
"""Receive files in parts: the device's half of a transfer."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import receive
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: receive_files
short_description: Receive files in parts (the device's half of a transfer)
description:
  - What the actions of this collection run on a device when they send files to it. Not meant for tasks.
  - A file arrives in parts, so that an interrupted transfer goes on where it stopped; it is compared with its sha256
    on arrival, delivered into a folder of the connecting user alone, and removed when the task is over.
  - What killed runs of this user left more than half a day ago is removed.
version_added: 0.2.0
author: The Jetson Mamba authors
options:
  mode:
    description:
      - V(open) prepares and says which parts are not there yet; V(finish) joins, verifies and delivers;
        V(pull) fetches from a relay or from the internet; V(close) removes.
    type: str
    choices: [open, finish, pull, close]
    required: true
  tmp:
    description: Folder for transfers; made where it is absent.
    type: path
    required: true
  wanted:
    description:
      - The files; sha256 and size (bytes) of each. For V(finish) also names (its names in the delivery), or members
        (it is a tar; name and sha256 of what is in it), and parts (their sha256) after it was found damaged. For
        V(pull) without a relay also url, its own address.
    type: list
    elements: dict
    default: []
  part_bytes:
    description: Size of a part.
    type: int
    default: 33554432
  url:
    description:
      - For V(pull), where a relay serves files by their sha256. Empty means that each is fetched from its own address,
        by this machine's proxy settings and certificates.
    type: str
    default: ""
  seconds:
    description: After how long V(pull) returns, to be called again.
    type: float
    default: 30
  folder:
    description: The delivery that V(close) removes.
    type: path
attributes:
  check_mode:
    support: full
    description: V(open) says what would have to be sent; the other modes do nothing.
  diff_mode:
    support: none
"""

EXAMPLES = r"""
- name: Ask which parts of a file are missing
  jetson.mamba.receive_files:
    mode: open
    tmp: /opt/jetson-mamba/tmp
    wanted:
      - sha256: 3717ba118605d9a5c9271d9195e2168c55b82242adcd46b143d3d9918f7c72ba
        size: 846000000
"""

RETURN = r"""
incoming:
  description: Where parts are put, as <sha256>/NNNNN.<part_bytes>.part.
  returned: modes open and finish
  type: str
missing:
  description: Parts to send, by sha256.
  returned: modes open and finish
  type: dict
damaged:
  description: sha256 of files whose parts are all there and whose sum is wrong.
  returned: mode finish
  type: list
  elements: str
folder:
  description: The delivery; null while something is missing or damaged.
  returned: mode finish
  type: str
free_bytes:
  description: Free space for this user.
  returned: modes open and pull
  type: int
done:
  description: sha256 of what has been fetched and verified.
  returned: mode pull
  type: list
  elements: str
had:
  description: Bytes that are there, by sha256.
  returned: mode pull
  type: dict
received:
  description: Bytes received in this call.
  returned: mode pull
  type: int
refused:
  description: Why a file is not to be asked for again, by sha256.
  returned: mode pull
  type: dict
left:
  description: What could not be removed.
  returned: mode close
  type: list
  elements: str
"""


def main() -> None:
    """Run one step."""
    module = AnsibleModule(
        argument_spec={
            "mode": {"type": "str", "choices": ["open", "finish", "pull", "close"], "required": True},
            "tmp": {"type": "path", "required": True},
            "wanted": {"type": "list", "elements": "dict", "default": []},
            "part_bytes": {"type": "int", "default": 32 << 20},
            "url": {"type": "str", "default": ""},
            "seconds": {"type": "float", "default": 30.0},
            "folder": {"type": "path"},
        },
        supports_check_mode=True,
    )
    given = module.params
    mode, tmp, wanted, part_bytes = given["mode"], given["tmp"], given["wanted"], given["part_bytes"]
    try:
        if module.check_mode:
            answer = receive.look(tmp, wanted, part_bytes) if mode == "open" else {}
        elif mode == "open":
            answer = receive.begin(tmp, wanted, part_bytes)
        elif mode == "finish":
            answer = receive.finish(tmp, wanted, part_bytes)
        elif mode == "pull":
            answer = receive.pull(tmp, given["url"], wanted, part_bytes, given["seconds"])
        else:
            answer = receive.close(tmp, given["folder"], wanted)
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())
    # files in transfer are gone when the task is over: nothing that a host has is changed by them
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
