"""The controller's half of relay: work out what the peers will need, send it once, and have it served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, stock, transfer

display = Display()
MODULE = "jetson.mamba.relay"
_PLAN = "jetson_platform_plan"


class ActionModule(ActionBase):
    """Stock or clear a relay."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the task; returns its result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validated, options = self.validate_argument_spec(
            argument_spec={
                "state": {"type": "str", "choices": ["planned", "started", "absent"], "default": "started"},
                "tmp": {"type": "path", "required": True},
                "address": {"type": "str", "default": ""},
            }
        )
        variables = task_vars or {}
        try:
            if options["state"] == "planned":
                return {**result, "changed": False, "relays": _relays(_plans(variables))}
            if options["state"] == "absent":
                return {**result, **self._device({"mode": "stop", "tmp": options["tmp"]}, variables)}
            return {**result, **self._stock(options, variables)}
        except Problem as problem:
            if options["state"] == "absent":
                return {**result, "failed": True, "msg": problem.render(), "problem": problem.as_dict()}
            host = str(variables.get("inventory_hostname"))
            display.warning(
                f"{host} is no relay in this run, its peers are served by the controller\n{problem.render()}"
            )
            return {**result, "changed": False, "clients": [], "store": {}}
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)

    def _stock(self, options: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Send what the store lacks, and have it served."""
        host = str(variables["inventory_hostname"])
        plans = _plans(variables)
        users = [name for name, plan in plans.items() if name == host or _relay_of(plan) == host]
        clients = [name for name in users if name != host and plans[name].get("outcomes")]
        answer: dict[str, Any] = {"changed": False, "clients": clients, "store": {}}
        if not clients:
            return answer
        for name in users:
            fetch.use_logins_of(variables["hostvars"][name], lambda value: value)
        parcels = _shared([stock.needed(plans[name], _say) for name in users])
        if not parcels:
            return {**answer, "clients": []}
        if self._task.check_mode:
            return answer
        rows = [{"sha256": parcel.sha256, "size": stock.size(parcel)} for parcel in parcels]
        common = {"tmp": options["tmp"], "wanted": rows}
        lacking = set(self._device({**common, "mode": "query"}, variables)["lacking"])
        address = options["address"] or str(variables.get("ansible_host") or host)
        start = {**common, "mode": "start", "address": address}
        missing = [parcel for parcel in parcels if parcel.sha256 in lacking]
        megabytes = sum(stock.size(parcel) for parcel in parcels) >> 20
        _say(f"{host}: relay for {', '.join(clients)}, {len(rows)} files ({megabytes} MB)")
        if missing:
            # by the slow line, also where this host is the client of another relay: that one may still be filling
            limit = {"rate_limit_kbit": (plans[host].get("transfer") or {}).get("rate_limit_kbit", 0)}
            alone = {name: value for name, value in variables.items() if name != transfer.STORE_FACT}
            courier = transfer.Courier(self, alone, options["tmp"], limit, _say, display.warning)
            with courier.delivered(missing) as folder:
                served = self._device({**start, "delivered": folder}, variables)
        else:
            served = self._device(start, variables)
        store = {"url": served["url"], "files": served["files"]}
        return {**answer, "changed": served["changed"], "store": store}

    def _device(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Run the device's half, as the connecting user. Raises Problem where it failed."""
        with transfer.as_connecting_user(self._connection):
            answer: dict[str, Any] = self._execute_module(
                module_name=MODULE, module_args=arguments, task_vars=variables
            )
        transfer.check_answer(answer, MODULE, str(variables.get("inventory_hostname")))
        return answer


def _say(text: str) -> None:
    display.display(f"  {text}")


def _plans(variables: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the plans of the hosts that are active in this run, in its order."""
    hostvars = variables["hostvars"]
    found = {}
    for name in variables.get("ansible_play_hosts") or []:
        plan = hostvars[name].get(_PLAN)
        if plan:
            found[str(name)] = plan
    return found


def _relay_of(plan: Mapping[str, Any]) -> str:
    return str((plan.get("transfer") or {}).get("relay") or "")


def _relays(plans: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return {relay: its clients that have work}; a relay that takes no part in this run is said, and left out."""
    relays: dict[str, list[str]] = {}
    for name, plan in plans.items():
        if _relay_of(plan) not in ("", name) and plan.get("outcomes"):
            relays.setdefault(_relay_of(plan), []).append(name)
    for relay in [relay for relay in relays if relay not in plans]:
        display.warning(
            f"the relay {relay} is not in this run (--limit, unreachable or failed), or no host of the inventory: "
            f"{', '.join(relays.pop(relay))} are served by the controller"
        )
    return relays


def _shared(needs: list[list[transfer.Parcel]]) -> list[transfer.Parcel]:
    """Return what at least two hosts need, named by its sha256; for one, the direct way is as short."""
    counts: dict[str, int] = {}
    parcels: dict[str, transfer.Parcel] = {}
    for need in needs:
        for parcel in {parcel.sha256: parcel for parcel in need}.values():
            counts[parcel.sha256] = counts.get(parcel.sha256, 0) + 1
            parcels[parcel.sha256] = transfer.Parcel(parcel.path, parcel.sha256, parcel.sha256)
    return [parcel for digest, parcel in parcels.items() if counts[digest] > 1]
