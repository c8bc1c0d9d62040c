#!/usr/bin/python
"""Keep files on a host for its peers, and serve them."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import relay
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: relay
short_description: Have one host of a site keep what the others need
description:
  - Sends to a host, once, what the hosts that name it as their relay (C(jetson_platform_relay)) will need in this run,
    and starts a small server there that serves exactly those files by their sha256, below a random path, on one
    address. The peers compare every file with its sha256; without the relay they are served by the controller.
  - The server is detached from the connection. It ends, and removes its files, when nobody has asked it for half an
    hour, so that an aborted run leaves nothing.
  - A host that nobody names as relay is not contacted. A relay that cannot be started is a warning.
version_added: 0.2.0
author: The Jetson Mamba authors
options:
  state:
    description:
      - V(planned) says for all hosts of the play, and wants C(run_once), who names whom, and contacts nobody;
        V(started) sends and serves; V(absent) ends the server and removes its files.
    type: str
    choices: [planned, started, absent]
    default: started
  tmp:
    description: Folder for transfers on the host.
    type: path
    required: true
  address:
    description: What the server binds to and the peers reach; where empty, the host's C(ansible_host).
    type: str
    default: ""
  mode:
    description: Internal. What the device's half does.
    type: str
    choices: [query, start, stop]
  wanted:
    description: Internal. sha256 and size of the files.
    type: list
    elements: dict
    default: []
  delivered:
    description: Internal. Folder of the files that were sent.
    type: path
attributes:
  check_mode:
    support: full
    description: Sends, starts and removes nothing.
  diff_mode:
    support: none
"""

EXAMPLES = r"""
- name: Stock the relay
  jetson.mamba.relay:
    tmp: /opt/jetson-mamba/tmp
  register: stocked

- name: Clear the relay
  jetson.mamba.relay:
    state: absent
    tmp: /opt/jetson-mamba/tmp
"""

RETURN = r"""
relays:
  description: Relays of this run and, for each, the hosts that name it and have work.
  returned: state planned
  type: dict
clients:
  description: Hosts of this run that name this host as their relay and have work that needs files.
  returned: state started
  type: list
  elements: str
store:
  description: >-
    url (with its token) and files (their sha256) of what is served; empty where nothing is. Files are public wheels:
    the token keeps passers-by out and protects no secret.
  returned: state started
  type: dict
"""


def main() -> None:
    """Run the device's half."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["planned", "started", "absent"], "default": "started"},
            "tmp": {"type": "path", "required": True},
            "address": {"type": "str", "default": ""},
            "mode": {"type": "str", "choices": ["query", "start", "stop"]},
            "wanted": {"type": "list", "elements": "dict", "default": []},
            "delivered": {"type": "path"},
        },
        supports_check_mode=True,
    )
    given = module.params
    if given["mode"] is None:
        module.fail_json(msg="relay works through its action plugin of the same name, on the controller")
    try:
        if given["mode"] == "stop":
            module.exit_json(changed=relay.stop(given["tmp"], module.check_mode))
        if given["mode"] == "query" or module.check_mode:
            module.exit_json(changed=False, **relay.query(given["tmp"], given["wanted"]))
        answer = relay.start(given["tmp"], given["address"], given["delivered"], given["wanted"])
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())
    module.exit_json(changed=answer["started"], **answer)


if __name__ == "__main__":
    main()
