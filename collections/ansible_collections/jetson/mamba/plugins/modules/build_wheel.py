#!/usr/bin/python
"""Start, follow and judge a build that outlives the connection."""

from __future__ import annotations

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import build
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: build_wheel
short_description: Have the wheel of a component in the wheelhouse, built on this device if need be
description:
  - As a task this is an action that prepares the source on the controller (index file, archive, git commit or local
    tree, always by checksum), sends it, starts the build, shows its progress, fetches the wheel, inspects it and keeps
    it in the wheelhouse. The connection or the controller may go away meanwhile; the next run finds the build and
    follows it. Only one controller at a time builds one key.
  - Only code for the device's own GPU is compiled. A wheel is accepted only if its version, its extensions and the
    machine of every library in it are right.
  - Idempotent. A finished build with the same inputs is found again; one that died or failed goes on where it stopped.
    In check mode nothing is built, and C(changed) says whether it would be.
options:
  component:
    description: A component of data/components.yml, such as V(mamba_ssm).
    type: str
    required: true
  version:
    description: Its version.
    type: str
    required: true
  source:
    description:
      - Where the source comes from. Empty means the row of components.yml. Else C(kind) is V(tree) (C(path)),
        V(git) (C(url), C(commit) with 40 digits), V(archive) (C(url) or C(path), C(sha256)) or V(index) (C(project),
        C(filename), C(sha256)).
    type: dict
    default: {}
  patch_root:
    description:
      - Folder of the patch series on the controller. Patches that its series says apply to the source are applied
        before the source is packed, so that they are a part of the key. Empty means none.
    type: path
    default: ""
  companions:
    description: Version of every package that a condition of the series may name.
    type: dict
    default: {}
  cache:
    description:
      - Folder on the controller for downloads and packed sources; a relative one is below the project. Empty means
        C(~/.cache/jetson-mamba).
    type: str
    default: ""
  logs:
    description:
      - Folder on the controller that the whole log of a failed build is copied to; a relative one is below the project.
    type: str
    default: logs
  build_root:
    description: Folder on the device for build jobs.
    type: path
    required: true
  python:
    description: Interpreter on the device of the environment that the wheel is for.
    type: path
    required: true
  scope:
    description: Whether O(python) is that of an environment, or one whose user site of the connecting user is meant.
    type: str
    choices: [venv, user]
    default: venv
  cuda_home:
    description: The CUDA toolkit on the device. Not used where O(sm) is V(cpu).
    type: path
    default: /usr/local/cuda
  class_id:
    description: What a binary needs of the host; part of the build's key.
    type: str
    required: true
  sm:
    description: The GPU's number, such as V(87), or V(cpu) for no CUDA at all.
    type: str
    required: true
  max_jobs:
    description: Compilers at a time. V(0) means as many as the free memory holds.
    type: int
    default: 0
  build_flags:
    description: C(NAME=VALUE) settings for the build's environment, such as C(NVCC_APPEND_FLAGS=-lineinfo).
    type: list
    elements: str
    default: []
  wheelhouse:
    description:
      - C(jetson_platform_plan.wheelhouse); where the wheel is kept on the controller, and how long to wait. As a task
        this is required.
    type: dict
    default: {}
  l4t:
    description: The device's release; recorded, no part of the key.
    type: str
  mode:
    description: What the module does on the device; set by the action, not by tasks.
    type: str
    choices: [start, poll, result, discard]
  key:
    description:
      - Digest of everything the wheel is made from. Given to a task, it is what the inputs must come to; a source that
        changed since the plan ends the task.
    type: str
  source_sha256:
    description: Digest of the packed source; set by the action.
    type: str
  source_tar:
    description: The packed source on the device; set by the action once it is there.
    type: path
  force_build:
    description: Variable that keeps setup.py from downloading a ready wheel; set by the action.
    type: str
  modules:
    description: Extension modules that the wheel must hold; set by the action.
    type: list
    elements: str
    default: []
  job_memory_mb:
    description: Memory of one compiler process, MB; set by the action.
    type: int
    default: 2600
  disk_mb:
    description: Free space that the build needs, MB; set by the action.
    type: int
    default: 0
  wait_seconds:
    description: How long O(mode=poll) stays for a running build to end, s; set by the action.
    type: float
    default: 0
author:
  - The Jetson Mamba authors (@jetson-mamba)
attributes:
  check_mode:
    description: Can run in check mode and say what it would change.
    support: full
  diff_mode:
    description: Returns details of what has changed, or would change.
    support: none
"""

EXAMPLES = r"""
- name: Build causal_conv1d for an Orin
  jetson.mamba.build_wheel:
    component: causal_conv1d
    version: 1.6.0
    build_root: /opt/jetson-mamba/build
    python: /opt/jetson-mamba/envs/torch2.5.0-cp310-1a2b3c4d/bin/python
    cuda_home: /usr/local/cuda-12.6
    class_id: aarch64-glibc2.35-cu12.6-cp310-torch2.5.0a0+872d972e41.nv24.08-cxx11-sm87
    sm: "87"
    wheelhouse: {path: /srv/wheelhouse}
  register: built
"""

RETURN = r"""
wheel:
  description: The wheel on the controller (path, filename, sha256, size, origin).
  returned: success, not in check mode
  type: dict
key:
  description: The build's key.
  returned: always
  type: str
build_failed:
  description: Whether the build itself failed, so that another host of the class would fail at it too.
  returned: failure
  type: bool
"""


# what the action needs itself and does not pass on: a device logs what its modules are told
ON_CONTROLLER = ("source", "patch_root", "companions", "cache", "logs", "class_id", "wheelhouse", "l4t")


def argument_spec() -> dict[str, dict[str, object]]:
    """Return the options of the action, among them those of the module (all but ON_CONTROLLER)."""
    return {
        "component": {"type": "str", "required": True},
        "version": {"type": "str", "required": True},
        "source": {"type": "dict", "default": {}},
        "patch_root": {"type": "path", "default": ""},
        "companions": {"type": "dict", "default": {}},
        "cache": {"type": "str", "default": ""},
        "logs": {"type": "str", "default": "logs"},
        "build_root": {"type": "path", "required": True},
        "python": {"type": "path", "required": True},
        "scope": {"type": "str", "choices": ["venv", "user"], "default": "venv"},
        "cuda_home": {"type": "path", "default": "/usr/local/cuda"},
        "class_id": {"type": "str", "required": True},
        "sm": {"type": "str", "required": True},
        "max_jobs": {"type": "int", "default": 0},
        "build_flags": {"type": "list", "elements": "str", "default": []},
        "wheelhouse": {"type": "dict", "default": {}},
        "l4t": {"type": "str"},
        "mode": {"type": "str", "choices": ["start", "poll", "result", "discard"]},
        "key": {"type": "str", "no_log": False},
        "source_sha256": {"type": "str"},
        "source_tar": {"type": "path"},
        "force_build": {"type": "str"},
        "modules": {"type": "list", "elements": "str", "default": []},
        "job_memory_mb": {"type": "int", "default": 2600},
        "disk_mb": {"type": "int", "default": 0},
        "wait_seconds": {"type": "float", "default": 0},
    }


def make_request(arguments: dict[str, Any]) -> build.Request:
    """Return what the module's arguments ask for."""
    return build.Request(
        component=arguments["component"],
        version=arguments["version"],
        key=arguments["key"],
        source_sha256=arguments["source_sha256"] or "",
        root=arguments["build_root"],
        python=arguments["python"],
        cuda_home=arguments["cuda_home"],
        sm=arguments["sm"],
        force_build=arguments["force_build"] or "JETSON_MAMBA_FORCE_BUILD",
        modules=tuple(arguments["modules"]),
        job_memory_mb=arguments["job_memory_mb"],
        disk_mb=arguments["disk_mb"],
        max_jobs=arguments["max_jobs"],
        flags=tuple(arguments["build_flags"]),
        user=arguments["scope"] == "user",
    )


def serve(request: build.Request, mode: str, arguments: dict[str, object], check: bool) -> dict[str, object]:
    """Do one step on the device and return the module's result."""
    if mode == "poll":
        return {"changed": False, **build.poll(request.folder, float(str(arguments["wait_seconds"])))}
    if mode == "discard":
        build.discard(request.folder)
        return {"changed": False}
    if mode == "result":
        return {"changed": False, **build.result(request, os.uname().machine)}
    if check:
        finished = build.is_finished(request)
        return {"changed": not finished, "state": "done" if finished else "would build"}
    source = arguments["source_tar"]
    answer = build.start(request, str(source) if source else None)
    return {"changed": answer["started"], **answer}


def main() -> None:
    """Run the module."""
    spec = {name: option for name, option in argument_spec().items() if name not in ON_CONTROLLER}
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    arguments = module.params
    if not arguments["mode"] or not arguments["key"]:
        module.fail_json(msg="this module is a part of the action of the same name; run it as a task of a playbook")
    request = make_request(arguments)
    try:
        module.exit_json(**serve(request, arguments["mode"], arguments, module.check_mode))
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict(), log=os.path.join(request.folder, "log"))


if __name__ == "__main__":
    main()
