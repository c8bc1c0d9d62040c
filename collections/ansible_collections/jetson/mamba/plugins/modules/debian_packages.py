#!/usr/bin/python
"""Ensure that Debian packages are installed, also on devices without internet."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.jetson.mamba.plugins.module_utils import apt_root, deb_install, debs
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DOCUMENTATION = r"""
---
module: debian_packages
short_description: Ensure that Debian packages are installed, also on devices without internet
description:
  - Asks the device which of the packages are missing. For these the controller works out what else they need, with
    apt-get in a private folder that holds the device's package status, apt sources, keys and pins; fetches exactly
    those files, verified by the repositories' signed checksums; sends them, and has apt-get install them without any
    other source.
  - What was worked out is kept in the controller's cache, so that another device in the same state gets the same files.
  - Nothing is removed, downgraded or taken from hold, and no package named C(nvidia-l4t-*) is installed or upgraded;
    a change that would do so is refused before anything is installed. Recommended packages are left out. Configuration
    files that were edited on the device stay.
  - Waits for a lock of apt or dpkg that another process holds.
  - The options marked internal are what the controller's half tells the device's half.
version_added: 0.2.0
author: The Jetson Mamba authors
options:
  names:
    description: The packages; C(name:arch) and C(name=version) are understood, and names that others provide.
    type: list
    elements: str
    required: true
  state:
    description:
      - V(query) says what is missing. V(fetched) also works out what that needs and has it in the controller's cache;
        the device stays as it is. In check mode it says what would be fetched. V(present) installs, and needs become.
    type: str
    choices: [query, fetched, present]
    default: present
  source:
    description:
      - Where missing packages come from. V(controller) - the controller fetches them. V(folder) - the .deb files in
        O(folder). V(device) - the device's own apt, which needs the network. V(none) - nothing is installed; what is
        missing is a failure.
      - Left out, the host's variable C(debian_packages_source) says it, else it is V(controller).
    type: str
    choices: [controller, folder, device, none]
  folder:
    description:
      - A folder on the controller with .deb files; of those the ones that are needed are sent. Where it has a file
        SHA256SUMS, every package must be in it, with the right checksum.
      - Left out, the variable C(debian_packages_folder).
    type: str
  repositories:
    description:
      - Where the controller looks, each a line or a paragraph as in apt's sources (paths of keyrings are the
        controller's); V(device) stands for the device's own sources. An empty list means V(device).
      - Left out, the variable C(debian_packages_repositories).
    type: list
    elements: str
  lock_minutes:
    description: How long to wait for apt's locks. Left out, the variable C(debian_packages_lock_minutes), else 10.
    type: int
  cache:
    description: The controller's cache.
    type: str
  tmp:
    description: Folder on the device for files in transfer; /tmp is used as long as it is not there.
    type: path
    default: /tmp
  transfer:
    description: How files travel, rate_limit_kbit and relay; left out, what the host's plan says.
    type: dict
  mode:
    description: Internal. What the device's half does.
    type: str
    choices: [query, describe, choose, wait, simulate, install]
  source_dir:
    description: Internal. Folder of the files that were sent.
    type: path
  files:
    description: Internal. The files that were sent.
    type: list
    elements: dict
attributes:
  check_mode:
    support: full
    description:
      - Names what would be installed, with versions; nothing is sent and the device stays as it is. The controller may
        fetch package lists into its cache. With O(source=folder) the names alone are compared.
  diff_mode:
    support: full
    description: One line for each package that is installed or upgraded.
"""

EXAMPLES = r"""
- name: Have a compiler on a device without internet
  jetson.mamba.debian_packages:
    names: [g++, python3-dev]
    tmp: /opt/jetson-mamba/tmp
  become: true

- name: Install cuSPARSELt, which is in a repository that the device does not know
  jetson.mamba.debian_packages:
    names: [libcusparselt0]
    repositories:
      - device
      - "deb [signed-by=/srv/keys/cuda-archive-keyring.gpg]
        https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2204/aarch64/ /"
  become: true

- name: Install from packages that were copied to the controller
  jetson.mamba.debian_packages:
    names: [g++]
    source: folder
    folder: /srv/debs
  become: true

- name: Ask which packages are missing
  jetson.mamba.debian_packages:
    names: [g++, python3-dev]
    state: query
  register: packages
"""

RETURN = r"""
missing:
  description: What was missing before; name as asked for, and installed, the version that is there or "".
  returned: success
  type: list
  elements: dict
packages:
  description: What is, or in check mode would be, installed or upgraded; name, version, arch, old, and where the
    controller knows them sha256 and url.
  returned: success, where something was missing
  type: list
  elements: dict
files:
  description: The files in the controller's cache that the device needs, filename and sha256; empty where the packages
    come from elsewhere. Of V(fetched) in check mode, those that would be there.
  returned: success
  type: list
  elements: dict
"""


def main() -> None:
    """Run the device's half."""
    module = AnsibleModule(argument_spec=debs.ARGUMENTS, supports_check_mode=True)
    arguments = module.params
    mode, folder = arguments["mode"], arguments["source_dir"]
    if mode is None:
        module.fail_json(msg="debian_packages works through its action plugin of the same name, on the controller")
    try:
        wishes = [debs.parse_wish(name) for name in arguments["names"]]
        if mode == "query":
            module.exit_json(changed=False, **deb_install.query(wishes, arguments["tmp"]))
        if mode == "describe":
            module.exit_json(changed=False, description=deb_install.pack(deb_install.describe()))
        if mode == "choose":
            module.exit_json(changed=False, packages=deb_install.choose(wishes, arguments["files"], folder))
        if mode == "wait":
            locks = [*deb_install.DPKG_LOCKS, *([deb_install.LISTS_LOCK] if arguments["source"] == "device" else [])]
            seconds = min(deb_install.WAIT_SECONDS, (arguments["lock_minutes"] or 0) * 60)
            module.exit_json(changed=False, holder=deb_install.wait(locks, seconds))
        if mode == "simulate":
            simulation = deb_install.simulate(arguments["names"], only_files=False)
            debs.judge(simulation, debs.held(deb_install.read_status()), apt_root.older)
            module.exit_json(
                changed=False,
                packages=[
                    {"name": one.name, "version": one.new, "arch": one.arch, "old": one.old}
                    for one in simulation.install
                ],
            )
        if module.check_mode:
            module.exit_json(changed=True, packages=[])
        module.exit_json(changed=True, **deb_install.install(wishes, arguments["files"] or [], folder))
    except Problem as problem:
        module.fail_json(msg=problem.render(), problem=problem.as_dict())


if __name__ == "__main__":
    main()
