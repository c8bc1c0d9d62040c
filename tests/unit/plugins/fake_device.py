"""A device that is a folder on this machine: the device's half of a transfer runs here, and files are copied."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils import receive
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem


class Connection(SimpleNamespace):
    """A connection plugin as far as actions use it."""

    def __init__(self, transport: str = "local", **options: Any) -> None:
        super().__init__(transport=transport, options=options, become="sudo", has_native_async=False)
        self._shell = SimpleNamespace(tmpdir=None)

    def set_become_plugin(self, plugin: Any) -> None:
        self.become = plugin

    def get_option(self, name: str) -> Any:
        return self.options[name]

    def set_option(self, name: str, value: Any) -> None:
        self.options[name] = value


class Receiving:
    """Mixed into an action, or alone: answers for jetson.mamba.receive_files and takes files."""

    def begin(self, transport: str = "local", **options: Any) -> None:
        """Prepare; called by __init__."""
        self._connection = Connection(transport, **options)
        self.steps: list[str] = []
        self.put: list[tuple[str, int]] = []
        self.as_root: list[str] = []

    def receive(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run the device's half."""
        mode, tmp, wanted = arguments["mode"], arguments["tmp"], arguments["wanted"]
        self.steps.append(mode)
        if self._connection.become:
            self.as_root.append(mode)
        try:
            if mode == "open":
                return receive.begin(tmp, wanted, arguments["part_bytes"])
            if mode == "finish":
                return receive.finish(tmp, wanted, arguments["part_bytes"])
            if mode == "pull":
                return receive.pull(tmp, arguments["url"], wanted, arguments["part_bytes"], arguments["seconds"])
            return receive.close(tmp, arguments["folder"], wanted)
        except Problem as problem:
            return {"failed": True, "msg": problem.render(), "problem": problem.as_dict()}

    def _execute_module(self, *_positional: Any, **options: Any) -> dict[str, Any]:
        assert options["module_name"] == "jetson.mamba.receive_files"
        return self.receive(options["module_args"])

    def _transfer_file(self, local_path: str, remote_path: str) -> str:
        shutil.copy(local_path, remote_path)
        self.put.append((Path(remote_path).name, Path(local_path).stat().st_size))
        return remote_path
