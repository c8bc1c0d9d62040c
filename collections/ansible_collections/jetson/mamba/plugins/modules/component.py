#!/usr/bin/python
"""Install a component, and remember how it came to be."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import component
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: component
short_description: Install a component from the wheelhouse
description:
  - Asks the device whether the component is installed as wanted, that is, whether its files have the hashes of their
    RECORD and its record has the key of what is wanted now. If not, its wheel is taken from the wheelhouse, sent and
    installed. A record of how it came to be is written last.
  - If the wheelhouse lacks it, the other sources are asked, and at last it is built on this very device, as
    M(jetson.mamba.build_wheel) builds. In the site's playbook M(jetson.mamba.builders) has seen to that before.
  - Idempotent. Check mode builds and installs nothing and says why it would.
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
    description: Where the source comes from, as in M(jetson.mamba.build_wheel). Empty means the row of components.yml.
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
  paths:
    description:
      - C(jetson_platform_plan.paths); used are C(python), C(site_packages), C(state), C(build), C(cuda_home) and
        C(tmp).
    type: dict
    required: true
  scope:
    description: Install into an environment, or into the connecting user's site.
    type: str
    choices: [venv, user]
    default: venv
  class_id:
    description: What a binary needs of the host.
    type: str
    required: true
  sm:
    description: The GPU's number, such as V(87), or V(cpu).
    type: str
    required: true
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
  reinstall:
    description: Install again even where everything is as wanted, from the same wheel.
    type: bool
    default: false
  max_jobs:
    description: Compilers at a time. V(0) means as many as the free memory holds.
    type: int
    default: 0
  build_flags:
    description: C(NAME=VALUE) settings for the build's environment.
    type: list
    elements: str
    default: []
  wheelhouse:
    description: C(jetson_platform_plan.wheelhouse). As a task this is required.
    type: dict
    default: {}
  transfer:
    description: C(jetson_platform_plan.transfer); rate limit and relay.
    type: dict
    default: {}
  l4t:
    description: The device's release; recorded where it builds.
    type: str
  mode:
    description: What the module does on the device; set by the action, not by tasks.
    type: str
    choices: [query, install]
  key:
    description: Digest of everything the wheel is made from; set by the action.
    type: str
  wheel:
    description: The wheel on the device; set by the action.
    type: path
  record:
    description: What to remember; set by the action.
    type: dict
    default: {}
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
- name: Install causal_conv1d
  jetson.mamba.component:
    component: causal_conv1d
    version: 1.6.0
    paths: "{{ jetson_platform_plan.paths }}"
    scope: "{{ jetson_platform_plan.scope }}"
    class_id: "{{ jetson_platform_plan.class_id }}"
    sm: "{{ jetson_platform_plan.platform.sm }}"
    wheelhouse: "{{ jetson_platform_plan.wheelhouse }}"

- name: Do the same from a tree of one's own
  jetson.mamba.component:
    component: mamba_ssm
    version: 2.2.4
    source:
      kind: tree
      path: ~/mamba-main
    paths: "{{ jetson_platform_plan.paths }}"
    class_id: "{{ jetson_platform_plan.class_id }}"
    sm: "{{ jetson_platform_plan.platform.sm }}"
    wheelhouse: "{{ jetson_platform_plan.wheelhouse }}"
"""

RETURN = r"""
reason:
  description: Why it was, or would be, installed; null where all is as wanted.
  returned: always
  type: str
built:
  description: Whether this very task compiled; false where the wheel was there.
  returned: when installed
  type: bool
record:
  description: How the installed component came to be (key, version, class, origin of its wheel, times, L4T release).
  returned: success
  type: dict
key:
  description: The build's key.
  returned: always
  type: str
"""


# what the action passes on; the rest is the controller's affair, and a device logs what its modules are told
ON_DEVICE = ("component", "version", "paths", "scope", "mode", "key", "wheel", "record")
PATHS_ON_DEVICE = ("python", "site_packages", "state")


def argument_spec() -> dict[str, dict[str, object]]:
    """Return the options of the action, among them those of the module (ON_DEVICE)."""
    return {
        "component": {"type": "str", "required": True},
        "version": {"type": "str", "required": True},
        "source": {"type": "dict", "default": {}},
        "patch_root": {"type": "path", "default": ""},
        "companions": {"type": "dict", "default": {}},
        "paths": {"type": "dict", "required": True},
        "scope": {"type": "str", "choices": ["venv", "user"], "default": "venv"},
        "class_id": {"type": "str", "required": True},
        "sm": {"type": "str", "required": True},
        "cache": {"type": "str", "default": ""},
        "logs": {"type": "str", "default": "logs"},
        "reinstall": {"type": "bool", "default": False},
        "max_jobs": {"type": "int", "default": 0},
        "build_flags": {"type": "list", "elements": "str", "default": []},
        "wheelhouse": {"type": "dict", "default": {}},
        "transfer": {"type": "dict", "default": {}},
        "l4t": {"type": "str"},
        "mode": {"type": "str", "choices": ["query", "install"]},
        "key": {"type": "str", "no_log": False},
        "wheel": {"type": "path"},
        "record": {"type": "dict", "default": {}},
    }


def main() -> None:
    """Run the module."""
    spec = {name: option for name, option in argument_spec().items() if name in ON_DEVICE}
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    arguments = module.params
    if not arguments["mode"] or not arguments["key"]:
        module.fail_json(msg="this module is a part of the action of the same name; run it as a task of a playbook")
    paths = arguments["paths"]
    name, version, key = arguments["component"], arguments["version"], arguments["key"]
    place = component.Place(paths["python"], paths["site_packages"], paths["state"], arguments["scope"] == "user")
    try:
        found = component.query(place, name, version, key)
        if arguments["mode"] == "query" or module.check_mode:
            module.exit_json(changed=False, key=key, **found)
        record = component.install(place, name, version, arguments["wheel"], arguments["record"])
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())
    module.exit_json(changed=True, key=key, reason=found["reason"], installed=version, record=record)


if __name__ == "__main__":
    main()
