#!/usr/bin/python
"""Prove that an environment runs Mamba: forward, backward, in every dtype, against references."""

from __future__ import annotations

import hashlib
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import shim, smoke_runner
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: kernel_smoke_tests
short_description: Prove on the device that an environment runs Mamba
description:
  - Runs each component in processes of the environment's own interpreter, forward and backward, against upstream's
    pure-PyTorch references within upstream's tolerances, and asserts that the fast path ran.
  - A component that crashes or hangs is reported as failed; the others go on in a fresh process.
  - Reads only. Bytecode, caches and scratch files go to a temporary folder that is removed. It never reports a change.
  - On O(device=cuda), a device without a usable GPU is a failure. A device that is short of memory is reported as
    busy, with the processes that hold the GPU; it has neither passed nor failed, and nothing is stopped.
  - In check mode nothing is run, and nothing is said to have passed.
options:
  python:
    description: The interpreter of the environment, absolute. It is executed as given.
    type: path
    required: true
  device:
    description: Where the kernels run. A pass on V(cpu) says that CPU kernels passed.
    type: str
    choices: [cuda, cpu]
    default: cuda
  dtypes:
    description: The dtypes to test. One that the device lacks is noted.
    type: list
    elements: str
    choices: [float32, float16, bfloat16]
    default: [float32, float16, bfloat16]
  components:
    description:
      - The components to run; empty means all. With fewer than all, the overall result is V(incomplete) at best.
    type: list
    elements: str
    default: []
  torchvision_expected:
    description: Whether the platform has a torchvision, which then must work.
    type: bool
    default: false
  cuda_home:
    description: The toolkit folder that CUDA_HOME must name in login shells. Empty means that it is not looked at.
    type: str
    default: ""
  site_packages:
    description: The environment's site-packages folder; the import shim's files there are held against their checksums.
    type: str
    default: ""
  seed:
    description: The seed of all random numbers.
    type: int
    default: 20260201
  timeout:
    description: Seconds that one component may take.
    type: int
    default: 900
  min_free_mb:
    description: Memory in MB that must be free before the GPU is touched.
    type: int
    default: 1024
  autotune:
    description:
      - Let Triton try all its tile configurations, as a first call by a user does. It takes many minutes on a Jetson;
        otherwise the smallest configuration of each kernel is tested.
    type: bool
    default: false
  report_only:
    description:
      - Return the report of failed tests without failing the task, with the message that it would have failed with.
        The caller has to fail on C(report.overall); so the terminal shows the message alone and not the whole report.
    type: bool
    default: false
author:
  - The Jetson Mamba authors (@jetson-mamba)
attributes:
  check_mode:
    description: Nothing is run in check mode; the task is skipped and says so.
    support: none
  diff_mode:
    description: It changes nothing.
    support: none
"""

EXAMPLES = r"""
- name: Prove the environment
  jetson.mamba.kernel_smoke_tests:
    python: /opt/jetson-mamba/envs/torch2.5.0a0-cp310-1a2b3c4d/bin/python
    cuda_home: /usr/local/cuda-12.6

- name: Run one component again
  jetson.mamba.kernel_smoke_tests:
    python: /opt/jetson-mamba/envs/torch2.5.0a0-cp310-1a2b3c4d/bin/python
    components: [mamba_module]
"""

RETURN = r"""
report:
  description:
    - What was found, as plain data (C(schema) 1, C(kind) jetson.mamba.kernel_smoke_tests). C(overall) is V(passed),
      V(failed), V(busy) or V(incomplete); only V(passed) says that the device is good.
    - Each of C(components) has C(component), C(status) (passed, failed, not run, "not tested. busy" with a colon),
      C(device), C(dtypes), C(shapes_in), C(shapes_out), C(max_error), C(tolerance), C(seconds), C(message) and
      C(kernels) (cuda or cpu).
  returned: when the tests were run
  type: dict
"""


def shim_digests(site_packages: str) -> dict[str, str]:
    """Return the shim's files in a site-packages folder with the sha256 that each should have."""
    if not site_packages:
        return {}
    return {
        path: hashlib.sha256(spec.content.encode("utf-8")).hexdigest()
        for path, spec in shim.wanted_files(site_packages).items()
    }


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "python": {"type": "path", "required": True},
            "device": {"type": "str", "choices": ["cuda", "cpu"], "default": "cuda"},
            "dtypes": {
                "type": "list",
                "elements": "str",
                "choices": ["float32", "float16", "bfloat16"],
                "default": ["float32", "float16", "bfloat16"],
            },
            "components": {"type": "list", "elements": "str", "default": []},
            "torchvision_expected": {"type": "bool", "default": False},
            "cuda_home": {"type": "str", "default": ""},
            "site_packages": {"type": "str", "default": ""},
            "seed": {"type": "int", "default": 20260201},
            "timeout": {"type": "int", "default": 900},
            "min_free_mb": {"type": "int", "default": 1024},
            "autotune": {"type": "bool", "default": False},
            "report_only": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, msg="not run (check mode): nothing was tested, nothing passed")
    given = module.params
    try:
        report = smoke_runner.run(
            smoke_runner.Settings(
                python=given["python"],
                device=given["device"],
                dtypes=tuple(given["dtypes"]),
                components=tuple(given["components"]),
                torchvision_expected=given["torchvision_expected"],
                cuda_home=given["cuda_home"],
                seed=given["seed"],
                timeout=given["timeout"],
                min_free_mb=given["min_free_mb"],
                autotune=given["autotune"],
                expected_files=shim_digests(given["site_packages"]),
                # Triton loads what it compiles, so the folder must allow execution; /tmp often does not
                scratch=os.path.expanduser(module.tmpdir),
            )
        )
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())
    if report["overall"] == smoke_runner.FAILED:
        message = smoke_runner.failure_message(report)
        if given["report_only"]:
            module.exit_json(changed=False, report=report, msg=message)
        module.fail_json(msg=message, report=report)
    module.exit_json(changed=False, report=report)


if __name__ == "__main__":
    main()
