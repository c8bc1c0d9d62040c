#!/usr/bin/python
"""A swap file for the time of a build."""

from __future__ import annotations

from typing import Any, Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import build, swap
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: build_swap
short_description: Have a swap file for the time of a build
description:
  - Makes a swap file and has the kernel use it, or has the kernel leave it and removes it. The file is readable by root
    alone, without holes, and marked; a file without that mark is never touched. C(/etc/fstab) is not, so it does not
    outlive a restart of the device as swap.
  - File systems that cannot hold swap are refused and named, and so is a disk that it would fill.
  - In check mode it needs no root, so that a task without C(become) can ask whether anything is to be done.
  - Idempotent. A file that a killed run left behind is used, or made anew where it is too small.
options:
  path:
    description: The file. Its folder must exist.
    type: path
    required: true
  state:
    description: Whether it is there and in use, or gone.
    type: str
    choices: [present, absent]
    default: present
  size_mb:
    description:
      - Size, MB. V(0) means none, as O(state=absent). V(-1) means as much as one compiler of O(job_memory_mb) lacks,
        none where it lacks nothing.
    type: int
    default: -1
  job_memory_mb:
    description: Memory of one compiler process, MB.
    type: int
    default: 2600
  reserve_mb:
    description: What must stay free on the disk beside the file, MB.
    type: int
    default: 2048
  build_root:
    description:
      - Folder of build jobs. While one of them runs, a swap file in use is left as it is. Empty means that none is
        looked for.
    type: path
    default: ""
author:
  - The Jetson Mamba authors (@jetson-mamba)
attributes:
  check_mode:
    description: Can run in check mode and say what it would change.
    support: full
  diff_mode:
    description: Returns details of what has changed, or would change.
    support: full
"""

EXAMPLES = r"""
- name: Make swap for a build
  jetson.mamba.build_swap:
    path: /opt/jetson-mamba/build/build.swap
    job_memory_mb: 2600
    build_root: /opt/jetson-mamba/build
  become: true

- name: Remove it again
  jetson.mamba.build_swap:
    path: /opt/jetson-mamba/build/build.swap
    state: absent
    build_root: /opt/jetson-mamba/build
  become: true
"""

RETURN = r"""
swap:
  description: What is there afterwards (path, size_mb, active); in check mode, what would be.
  returned: success
  type: dict
due:
  description: Whether anything had, or has, to be done; unlike C(changed) no C(changed_when) hides it.
  returned: success
  type: bool
kept:
  description: Why a file in use was left as it is, though something else is wanted; empty otherwise.
  returned: success
  type: str
"""


def argument_spec() -> dict[str, dict[str, object]]:
    """Return the options of the module."""
    return {
        "path": {"type": "path", "required": True},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "size_mb": {"type": "int", "default": swap.AUTOMATIC},
        "job_memory_mb": {"type": "int", "default": 2600},
        "reserve_mb": {"type": "int", "default": 2048},
        "build_root": {"type": "path", "default": ""},
    }


def serve(arguments: dict[str, Any], run: Callable[..., Any], check: bool, top: str = "/") -> dict[str, Any]:
    """Do what is asked for and return the module's result."""
    path = arguments["path"]
    before = swap.describe(path, top)
    size = 0
    if arguments["state"] == "present":
        if arguments["size_mb"] < swap.AUTOMATIC:
            raise Problem(f"size_mb is {arguments['size_mb']}", "a size in MB, 0 or -1", "correct wheelhouse_swap_mb")
        memory = swap.free_memory(top, without=path)
        size = swap.wanted_size(arguments["size_mb"], arguments["job_memory_mb"], memory)
    good = before["active"] and before["size_mb"] >= size if size else not swap.is_left(path, top)
    running = build.running_jobs(arguments["build_root"]) if before["active"] and not good else []
    after = before
    if not good and not running:
        after = {"path": path, "size_mb": size, "active": bool(size)}
        if size:
            # what is there now makes room for what comes
            swap.check(path, size - before["size_mb"], arguments["reserve_mb"], top, ahead=check)
        if not check:
            swap.remove(path, run, top)
            if size:
                swap.make(path, size, run, top)
    due = not good and not running
    return {
        "changed": due,
        "due": due,
        "swap": after,
        "kept": "{} is being built".format(", ".join(running)) if running else "",
        "diff": {"before": before, "after": after},
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)

    def run(argv: list[str]) -> tuple[int, str, str]:
        done: tuple[int, str, str] = module.run_command(argv, environ_update={"LC_ALL": "C", "LANGUAGE": "C"})
        return done

    try:
        module.exit_json(**serve(module.params, run, module.check_mode))
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())


if __name__ == "__main__":
    main()
