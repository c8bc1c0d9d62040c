#!/usr/bin/python
"""Give CUDA to login shells, commands over ssh, services and the linker."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import cuda_env
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: cuda_env
short_description: Give CUDA to login shells, commands over ssh, services and the linker
description:
  - Writes C(/etc/profile.d/jetson-mamba-cuda.sh) for login shells, C(/etc/ssh/sshd_config.d/60-jetson-mamba.conf) with
    one C(SetEnv) line for commands over ssh, C(/etc/jetson-mamba/cuda.env) as an C(EnvironmentFile) for services, and
    C(/etc/ld.so.conf.d/jetson-mamba-cuda.conf) for the linker cache. A part that is turned off is taken away.
  - C(LD_LIBRARY_PATH) is set for login shells and ssh only, and never has an empty element.
  - sshd's line is tried with C(sshd -t) before it takes effect, and sshd is reloaded, never restarted. Connections that
    are open keep the environment they have.
  - The toolkit's version file is compared with O(cuda_version) first; nothing is written where it differs.
  - Idempotent. Check mode writes nothing and reports the same diff; it does run C(sshd -t) on the trial.
  - Needs root (C(become)) for every O(state) but V(query).
options:
  cuda_home:
    description: Absolute path of the toolkit, such as C(/usr/local/cuda-12.6). Needed unless O(state=absent).
    type: str
    default: ""
  cuda_version:
    description: The CUDA release that has to be there, such as V(12.6). Empty for any.
    type: str
    default: ""
  login:
    description: Whether login shells get CUDA_HOME, PATH and LD_LIBRARY_PATH.
    type: bool
    default: true
  ssh:
    description: Whether commands over ssh get CUDA_HOME, PATH and LD_LIBRARY_PATH.
    type: bool
    default: true
  service:
    description: Whether there is an EnvironmentFile with CUDA_HOME and PATH that units can name.
    type: bool
    default: true
  toolkit_pending:
    description:
      - Whether an earlier task installs the toolkit. In check mode, where that task installs nothing, a missing toolkit
        is then no error.
    type: bool
    default: false
  state:
    description: V(query) changes nothing and returns what is missing.
    type: str
    choices: [present, absent, query]
    default: present
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
- name: Give CUDA 12.6 to shells, commands over ssh and services
  jetson.mamba.cuda_env:
    cuda_home: /usr/local/cuda-12.6
    cuda_version: "12.6"
  become: true

- name: Ask which packages the toolkit needs
  jetson.mamba.cuda_env:
    cuda_home: /usr/local/cuda-12.6
    cuda_version: "12.6"
    state: query
  register: toolkit
"""

RETURN = r"""
files:
  description: The files that this module manages.
  returned: success
  type: list
  elements: str
commands:
  description: The commands that were run to make files take effect, or would be in check mode, as argv lists.
  returned: success
  type: list
  elements: list
toolkit:
  description: The version found at O(cuda_home), such as V(12.6.68); empty where there is none.
  returned: success
  type: str
packages:
  description:
    - The apt packages to install so that the wanted toolkit and its compiler are there; empty where they are.
  returned: success
  type: list
  elements: str
"""


def runner(module: AnsibleModule) -> cuda_env.Runner:
    """Return how commands are run: by absolute path (sshd insists on it), with messages in English."""

    def run(argv: list[str]) -> tuple[int, str, str]:
        path = module.get_bin_path(argv[0])
        if path is None:
            return 127, "", f"there is no {argv[0]} on this device"
        status, out, err = module.run_command([path, *argv[1:]], environ_update={"LC_ALL": "C", "LANGUAGE": "C"})
        return int(status), str(out), str(err)

    return run


def bring(module: AnsibleModule) -> dict[str, object]:
    """Do what the arguments say and return the module's result."""
    arguments = module.params
    state = arguments["state"]
    home, version = arguments["cuda_home"], arguments["cuda_version"]
    if state != "absent" and not home:
        raise Problem("cuda_home is empty", "the folder of the CUDA toolkit", "set cuda_env_home")
    found = cuda_env.toolkit_version(home) if home else None
    result = {
        "files": list(cuda_env.ALL_PATHS),
        "toolkit": found or "",
        "packages": [] if state == "absent" else cuda_env.missing_packages(home, version),
    }
    if state == "query":
        return {**result, "changed": False, "commands": []}
    wish = cuda_env.Wish(home, version, arguments["login"], arguments["ssh"], arguments["service"])
    outcome = cuda_env.apply(
        wish if state == "present" else None,
        runner(module),
        check=module.check_mode,
        toolkit_pending=module.check_mode and arguments["toolkit_pending"],
    )
    return {**result, "changed": outcome.changed, "diff": outcome.diff, "commands": outcome.commands}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "cuda_home": {"type": "str", "default": ""},
            "cuda_version": {"type": "str", "default": ""},
            "login": {"type": "bool", "default": True},
            "ssh": {"type": "bool", "default": True},
            "service": {"type": "bool", "default": True},
            "toolkit_pending": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent", "query"], "default": "present"},
        },
        supports_check_mode=True,
    )
    try:
        result = bring(module)
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())
    module.exit_json(**result)


if __name__ == "__main__":
    main()
