"""The controller's half of a transfer: what is sent, what is not sent again, and how fast."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible_collections.jetson.mamba.plugins.module_utils import receive
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import transfer
from ansible_collections.jetson.mamba.plugins.plugin_utils.transfer import Courier, Parcel

from tests.unit.plugins.fake_device import Receiving

PART = 1000


class Device(Receiving):
    """A device whose connection can be cut after a number of parts."""

    def __init__(self, transport: str = "local", **options: Any) -> None:
        self.begin(transport, **options)
        self.cut_after: int | None = None
        self.comes_back = False
        self.damage: set[int] = set()
        self.seen_options: list[dict[str, Any]] = []

    def _transfer_file(self, local_path: str, remote_path: str) -> str:
        self.seen_options.append(dict(self._connection.options))
        if self.cut_after is not None and len(self.put) >= self.cut_after:
            if self.comes_back:
                self.cut_after = None
            # what a cut leaves: a piece of the part
            Path(remote_path).write_bytes(Path(local_path).read_bytes()[:10])
            raise AnsibleConnectionFailure("Connection closed by remote host\nmore")
        number = len(self.put)
        super()._transfer_file(local_path, remote_path)
        if number in self.damage:
            Path(remote_path).write_bytes(bytes(Path(remote_path).stat().st_size))
        return remote_path

    def _execute_module(self, *_positional: Any, **options: Any) -> dict[str, Any]:
        if self.cut_after is not None and len(self.put) >= self.cut_after and not self.comes_back:
            raise AnsibleConnectionFailure("no route to host")
        return super()._execute_module(*_positional, **options)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", PART)
    monkeypatch.setattr(transfer, "SMALL_BYTES", 100)


def make(folder: Path, name: str, size: int) -> Parcel:
    """Write a file of which no two parts are the same."""
    folder.mkdir(exist_ok=True)
    block = b"".join(hashlib.sha256(f"{name}.{number}".encode()).digest() for number in range(size // 32 + 1))
    (folder / name).write_bytes(block[:size])
    return Parcel(str(folder / name), hashlib.sha256(block[:size]).hexdigest(), name)


def courier(device: Device, tmp: Path, said: list[str] | None = None, **options: Any) -> Courier:
    variables = {"inventory_hostname": "orin", "hostvars": {}}
    return Courier(device, variables, str(tmp / "device"), options, (said if said is not None else []).append)


def deliver(device: Device, tmp: Path, parcels: list[Parcel], said: list[str] | None = None, **options: Any) -> None:
    """Deliver, and compare what the body meets."""
    with courier(device, tmp, said, **options).delivered(parcels) as folder:
        assert sorted(os.listdir(folder)) == sorted(parcel.name for parcel in parcels)
        for parcel in parcels:
            assert Path(folder, parcel.name).read_bytes() == Path(parcel.path).read_bytes()
            assert os.stat(folder).st_mode & 0o77 == 0


def test_a_delivery_and_nothing_left(tmp_path: Path) -> None:
    device = Device()
    parcels = [make(tmp_path / "own", name, size) for name, size in (("big", 2500), ("a", 5), ("b", 99), ("c", 300))]
    deliver(device, tmp_path, parcels)
    assert device.steps == ["open", "finish", "close"]
    # big in three parts, c as it is, and a with b in an archive of 10240 bytes
    assert sorted(size for _name, size in device.put if size < PART) == [240, 300, 500]
    assert sum(size for _name, size in device.put) == 2500 + 300 + 10240
    assert list((tmp_path / "device").iterdir()) == []
    assert device.as_root == [] and device._connection.become == "sudo"


def test_small_files_travel_together_in_the_same_bytes(tmp_path: Path) -> None:
    parcels = [make(tmp_path / "own", name, 50) for name in "abc"]
    sent = []
    for order in (parcels, parcels[::-1]):
        device = Device()
        deliver(device, tmp_path, order)
        sent.append(device.put)
    assert sent[0] == sent[1] and sum(size for _name, size in sent[0]) == 10240


def test_an_empty_delivery_is_an_empty_folder(tmp_path: Path) -> None:
    device = Device()
    deliver(device, tmp_path, [])
    assert device.steps == ["finish", "close"] and device.put == []


def test_the_folder_goes_when_the_body_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), courier(Device(), tmp_path).delivered([make(tmp_path / "o", "a", 9)]):
        raise ZeroDivisionError
    assert list((tmp_path / "device").iterdir()) == []


def test_a_cut_passes_through_and_the_next_run_sends_only_the_rest(tmp_path: Path) -> None:
    parcel = make(tmp_path / "own", "torch.whl", 8 * PART + 1)
    device = Device()
    device.cut_after = 3
    with pytest.raises(AnsibleConnectionFailure, match="closed by remote host"):
        deliver(device, tmp_path, [parcel])
    assert len(device.put) == 3
    said: list[str] = []
    again = Device()
    deliver(again, tmp_path, [parcel], said)
    assert [name.split(".")[0] for name, _size in again.put] == [f"{index:05d}" for index in range(3, 9)]
    assert sum(size for _name, size in device.put + again.put) == 8 * PART + 1
    assert "torch.whl" in said[0] and "arrived before" in said[0]
    assert list((tmp_path / "device").iterdir()) == []


def test_a_connection_that_comes_back_is_gone_on_with_at_once(tmp_path: Path) -> None:
    device = Device()
    device.cut_after, device.comes_back = 2, True
    said: list[str] = []
    deliver(device, tmp_path, [make(tmp_path / "own", "torch.whl", 5 * PART)], said)
    assert [name.split(".")[0] for name, _size in device.put] == [f"{index:05d}" for index in range(5)]
    assert any("gone on with: Connection closed by remote host" in line for line in said)


def test_a_transfer_that_never_works_ends(tmp_path: Path) -> None:
    class Refusing(Device):
        tries = 0

        def _transfer_file(self, local_path: str, remote_path: str) -> str:
            self.tries += 1
            raise AnsibleError("failed to transfer file")

    device = Refusing()
    with pytest.raises(AnsibleError, match="failed to transfer"):
        deliver(device, tmp_path, [make(tmp_path / "own", "a", 200)])
    assert device.tries == 3


def test_a_disk_that_fills_up_meanwhile_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Device):
        def _transfer_file(self, local_path: str, remote_path: str) -> str:
            monkeypatch.setattr(receive, "free_bytes", lambda _path: 10)
            raise AnsibleError("failed to transfer file: Failure")

    with pytest.raises(Problem, match="0 MB free"):
        deliver(Full(), tmp_path, [make(tmp_path / "own", "a", 200)])
    assert list((tmp_path / "device").iterdir()) == []


def test_too_little_room_is_said_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "free_bytes", lambda _path: 3 * PART)
    device = Device()
    with pytest.raises(Problem) as caught:
        deliver(device, tmp_path, [make(tmp_path / "own", "a", 2 * PART)])
    assert "jetson_platform_tmp_root" in caught.value.next_step and device.put == []
    # what is there already needs no room
    monkeypatch.setattr(receive, "free_bytes", lambda _path: 3 * PART + 1)
    deliver(device, tmp_path, [make(tmp_path / "own", "a", 2 * PART)])


def test_a_damaged_part_is_sent_again(tmp_path: Path) -> None:
    device = Device()
    device.damage = {3}
    said: list[str] = []
    deliver(device, tmp_path, [make(tmp_path / "own", "torch.whl", 5 * PART)], said)
    assert [int(name.split(".")[0]) for name, _size in device.put] == [0, 1, 2, 3, 4, 3, 4]
    assert any("torch.whl arrived damaged" in line for line in said)


def test_damage_that_stays_is_a_problem(tmp_path: Path) -> None:
    device = Device()
    device.damage = set(range(100))
    with pytest.raises(Problem, match="also when it was sent again"):
        deliver(device, tmp_path, [make(tmp_path / "own", "torch.whl", 3 * PART)])
    assert list((tmp_path / "device").iterdir()) == []


def test_a_file_that_changed_on_the_controller_is_named(tmp_path: Path) -> None:
    parcel = make(tmp_path / "own", "torch.whl", 3 * PART)
    Path(parcel.path).write_bytes(bytes(3 * PART))
    with pytest.raises(Problem, match="on the controller has the sha256"):
        deliver(Device(), tmp_path, [parcel])


def test_parcels_are_checked(tmp_path: Path) -> None:
    one, two = make(tmp_path / "x", "same", 10), make(tmp_path / "y", "same", 20)
    with pytest.raises(Problem, match="two files named same"):
        deliver(Device(), tmp_path, [one, two])
    with pytest.raises(Problem, match="No such file"):
        deliver(Device(), tmp_path, [Parcel(str(tmp_path / "none"), "a" * 64, "none")])
    deliver(Device(), tmp_path, [one, Parcel(one.path, one.sha256, "other name")])


def test_a_device_that_cannot_be_cleared_does_not_fail_the_task(tmp_path: Path) -> None:
    device, said = Device(), []
    with courier(device, tmp_path, said).delivered([make(tmp_path / "own", "a", 9)]) as folder:
        device.cut_after = 0
    assert Path(folder).exists() and "is cleared by a later run: no route to host" in said[-1]


def test_nothing_is_sent_in_check_mode(tmp_path: Path) -> None:
    device = Device()
    device._task = SimpleNamespace(check_mode=True)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError):
        deliver(device, tmp_path, [make(tmp_path / "own", "a", 9)])
    assert device.steps == []


# ---------------------------------------------------------------- rate


def test_ssh_keeps_to_the_rate_by_itself_and_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    before = {"sftp_extra_args": "-C", "scp_extra_args": None}
    device = Device("ssh", **before)
    deliver(device, tmp_path, [make(tmp_path / "own", "a", 1500)], rate_limit_kbit=800)
    assert device.seen_options == [{"sftp_extra_args": "-C -l 800", "scp_extra_args": "-l 800"}] * 2
    assert device._connection.options == before
    device.cut_after = 2
    with pytest.raises(AnsibleConnectionFailure):
        deliver(device, tmp_path, [make(tmp_path / "own", "b", 1500)], rate_limit_kbit=800)
    assert device._connection.options == before


def test_other_connections_are_paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    deliver(Device(), tmp_path, [make(tmp_path / "own", "a", 4 * PART)], rate_limit_kbit=1)
    assert len(waits) == 4 and all(7 < wait <= PART * 8 / 1024 for wait in waits)
    waits.clear()
    for limit in (0, None, ""):
        deliver(Device(), tmp_path, [make(tmp_path / "own", "a", 4 * PART)], rate_limit_kbit=limit)
    assert waits == []


def test_single_files_keep_to_the_rate_in_both_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    seen: list[Any] = []
    (tmp_path / "a").write_bytes(bytes(4096))

    def fetch_file(remote: str, local: str) -> None:
        seen.append(dict(device._connection.options))
        Path(local).write_bytes(Path(remote).read_bytes())

    before = {"sftp_extra_args": "", "scp_extra_args": "-v"}
    plan = {"jetson_platform_plan": {"transfer": {"rate_limit_kbit": 8}}}
    for transport in ("ssh", "local"):
        device = Device(transport, **before)
        device._connection.fetch_file = fetch_file
        line = transfer.Line(device, plan)
        line.send(str(tmp_path / "a"), str(tmp_path / "b"))
        line.receive(str(tmp_path / "b"), str(tmp_path / "c"))
        assert (tmp_path / "c").read_bytes() == bytes(4096) and device._connection.options == before
    assert seen == [{"sftp_extra_args": "-l 8", "scp_extra_args": "-v -l 8"}, before]
    assert len(waits) == 4 and all(3.5 < wait <= 4 for wait in waits)
    waits.clear()
    transfer.Line(device, {}).send(str(tmp_path / "a"), str(tmp_path / "b"))
    assert waits == []


def test_options_come_from_the_plan_where_none_are_given(tmp_path: Path) -> None:
    plan = {"transfer": {"rate_limit_kbit": 5, "relay": "peer", "downloads": "device"}}
    made = Courier(Device(), {"jetson_platform_plan": plan}, str(tmp_path), None, print)
    assert (made._rate_kbit, made._relay, made._fetches) == (5, "peer", True)
    made = Courier(Device(), {"jetson_platform_plan": plan}, str(tmp_path), {}, print)
    assert (made._rate_kbit, made._relay, made._fetches) == (0, "", False)


# ---------------------------------------------------------------- progress


def test_progress_is_said_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    count = [0]

    class Slow(Device):
        def _transfer_file(self, local_path: str, remote_path: str) -> str:
            count[0] += 1
            if count[0] == 3:
                for _attempt in range(500):
                    if any(" 2 of 3 MB, for " in line for line in said):
                        break
                    time.sleep(0.01)
            return super()._transfer_file(local_path, remote_path)

    original = transfer.StillWorking.__init__
    monkeypatch.setattr(
        transfer.StillWorking, "__init__", lambda self, report, what: original(self, report, what, 0.01)
    )
    monkeypatch.setattr(transfer, "PART_BYTES", 1 << 20)
    deliver(Slow(), tmp_path, [make(tmp_path / "own", "torch.whl", 3 << 20)], said)
    assert any(line.startswith("orin: sending torch.whl 2 of 3 MB, for ") for line in said), said


def test_still_working_speaks_while_it_lasts() -> None:
    said: list[str] = []
    with transfer.StillWorking(said.append, "sending", interval=0.01):
        for _attempt in range(500):
            if said:
                break
            time.sleep(0.01)
    count = len(said)
    assert said and said[0].startswith("sending, for ")
    time.sleep(0.05)
    assert len(said) == count


# ---------------------------------------------------------------- relay


class Relayed(Device):
    """A device that answers pulls from a script: (done, trouble) each time."""

    def __init__(self, tmp: Path, parcels: list[Parcel], script: list[tuple[int, str | None]]) -> None:
        super().__init__()
        self.script = script
        self.parcels = parcels
        self.urls: list[str] = []
        self.asked: list[list[str]] = []
        self.tmp = tmp / "device"

    def receive(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["mode"] != "pull":
            return super().receive(arguments)
        self.steps.append("pull")
        self.urls.append(arguments["url"])
        self.asked.append([row["sha256"] for row in arguments["wanted"]])
        count, trouble = self.script.pop(0)
        got = self.parcels[:count]
        for parcel in got:
            folder = Path(receive.incoming_folder(str(self.tmp)), parcel.sha256)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "whole").write_bytes(Path(parcel.path).read_bytes())
        failed = dict.fromkeys(self.asked[-1][count:], trouble) if trouble else {}
        return {"done": [parcel.sha256 for parcel in got], "had": {}, "free_bytes": 1, "refused": failed}


def relayed(device: Device, tmp: Path, parcels: list[Parcel], said: list[str], own: bool = False) -> None:
    store = {"url": "http://10.0.0.1:4/t", "files": [parcel.sha256 for parcel in parcels[:3]]}
    variables: dict[str, Any] = {"inventory_hostname": "orin", "hostvars": {"peer": {transfer.STORE_FACT: store}}}
    if own:
        variables = {"inventory_hostname": "peer", "hostvars": {}, transfer.STORE_FACT: store}
    options = {} if own else {"relay": "peer"}
    with Courier(device, variables, str(tmp / "device"), options, said.append).delivered(parcels) as folder:
        for parcel in parcels:
            assert Path(folder, parcel.name).read_bytes() == Path(parcel.path).read_bytes()


@pytest.mark.parametrize("own", [False, True])
def test_what_a_relay_has_is_not_sent(tmp_path: Path, own: bool) -> None:
    parcels = [make(tmp_path / "own", name, 300) for name in "abcd"]
    device = Relayed(tmp_path, parcels, [(1, None), (3, None)])
    relayed(device, tmp_path, parcels, [], own)
    assert device.steps == ["pull", "pull", "open", "finish", "close"]
    assert device.urls == ["http://10.0.0.1:4/t"] * 2
    assert device.asked[0] == [parcel.sha256 for parcel in parcels[:3]]
    assert [size for _name, size in device.put] == [300]
    assert list((tmp_path / "device").iterdir()) == []


def test_a_relay_in_trouble_is_a_warning_and_the_rest_is_sent(tmp_path: Path) -> None:
    parcels = [make(tmp_path / "own", name, 300) for name in "abcd"]
    said: list[str] = []
    device = Relayed(tmp_path, parcels, [(1, "it does not answer")])
    relayed(device, tmp_path, parcels, said)
    assert device.steps == ["pull", "open", "finish", "close"] and len(device.put) == 3
    assert sum("the relay peer is used no more: it does not answer" in line for line in said) == 1


def test_a_relay_without_a_store_is_not_asked(tmp_path: Path) -> None:
    device = Device()
    deliver(device, tmp_path, [make(tmp_path / "own", "a", 9)], relay="peer")
    assert device.steps == ["open", "finish", "close"]


# ---------------------------------------------------------------- the device's own downloads


class Shop(http.server.ThreadingHTTPServer):
    """Files on the internet, by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ShopHandler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    def offer(self, parcel: Parcel, data: bytes | None = None) -> Parcel:
        """Serve a parcel's file, or other bytes, and return the parcel with its address."""
        self.files["/" + parcel.name] = Path(parcel.path).read_bytes() if data is None else data
        return replace(parcel, url=f"http://127.0.0.1:{self.server_port}/{parcel.name}")


class ShopHandler(http.server.BaseHTTPRequestHandler):
    server: Shop

    def log_message(self, *_arguments: Any) -> None:
        """Keep silent."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with Shop() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_device_that_is_told_to_fetches_by_itself(tmp_path: Path, shop: Shop) -> None:
    parcels = [shop.offer(make(tmp_path / "own", name, 2500)) for name in "ab"]
    device = Device()
    deliver(device, tmp_path, parcels, downloads="device")
    assert device.steps == ["pull", "finish", "close"]
    assert (shop.asked, device.put) == (["/a", "/b"], [])
    assert list((tmp_path / "device").iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"downloads": "controller"}])
def test_without_being_told_no_address_reaches_a_device(tmp_path: Path, shop: Shop, options: Any) -> None:
    device = Telling()
    deliver(device, tmp_path, [shop.offer(make(tmp_path / "own", "a", 2500))], **options)
    assert device.steps == ["open", "finish", "close"] and shop.asked == [] and len(device.put) == 3
    assert all("url" not in row for told in device.told for row in told["wanted"])


class Telling(Device):
    """A device that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []

    def receive(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self.told.append(arguments)
        return super().receive(arguments)


def test_what_a_device_cannot_get_comes_from_the_controller(tmp_path: Path, shop: Shop) -> None:
    own = tmp_path / "own"
    good, wrong, absent, nowhere, other, unknown = (
        make(own, name, 300) for name in ("good", "wrong", "absent", "nowhere", "other", "unknown")
    )
    closed = "http://127.0.0.1:9"
    parcels = [
        shop.offer(good),
        shop.offer(wrong, bytes(300)),
        replace(absent, url=f"http://127.0.0.1:{shop.server_port}/absent"),
        replace(nowhere, url=f"{closed}/nowhere"),
        replace(other, url=f"{closed}/other"),
        unknown,
    ]
    device, said = Device(), list[str]()
    deliver(device, tmp_path, parcels, said, downloads="device")
    assert device.steps == ["pull", "open", "finish", "close"] and len(device.put) == 5
    assert list((tmp_path / "device").iterdir()) == []
    base = f"http://127.0.0.1:{shop.server_port}"
    assert said == [
        "orin: no address that the device may use is known of 1 of 6 files; the controller sends them",
        f"orin: the device could not fetch {base}/wrong: what it sent as {wrong.sha256[:12]}… has another sha256; "
        "taken from the controller",
        f"orin: the device could not fetch {base}/absent: it answers 404 Not Found; taken from the controller",
        f"orin: the device could not fetch {closed}/nowhere and 1 more: it does not answer (Connection refused); "
        "taken from the controller",
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_of_small_files_that_came_another_way(
    tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(transfer, "SMALL_BYTES", 1 << 20)
    parcels = [shop.offer(make(tmp_path / "own", name, 300), bytes(300)) for name in "abc"]
    if fails:
        parcels = [replace(parcel, sha256=digit * 64) for digit, parcel in zip("123", parcels, strict=True)]
        with pytest.raises(Problem, match="sha256"):
            deliver(Device(), tmp_path, parcels, downloads="device")
    else:
        device = Device()
        deliver(device, tmp_path, parcels, downloads="device")
        assert len(device.put) > 0 and shop.asked == ["/a", "/b", "/c"]
    assert list((tmp_path / "device").iterdir()) == []


@pytest.mark.parametrize(
    "url",
    ["http://me:hunter2@127.0.0.1:{port}/a", "http://127.0.0.1:{port}/a?token=hunter2", "file:///hunter2", "hunter2"],
)
def test_no_secret_and_no_file_address_reaches_a_device(tmp_path: Path, shop: Shop, url: str) -> None:
    device, said = Telling(), list[str]()
    parcel = replace(make(tmp_path / "own", "a", 300), url=url.format(port=shop.server_port))
    deliver(device, tmp_path, [parcel], said, downloads="device")
    assert device.steps == ["open", "finish", "close"] and shop.asked == []
    assert "hunter2" not in str(device.told) + str(said)


def test_a_relay_goes_before_the_devices_own_downloads(tmp_path: Path, shop: Shop) -> None:
    parcels = [shop.offer(make(tmp_path / "own", name, 300)) for name in "abcd"]
    store = {"url": "http://127.0.0.1:9/t", "files": [parcel.sha256 for parcel in parcels[:3]]}

    class Served(Relayed):
        def receive(self, arguments: dict[str, Any]) -> dict[str, Any]:
            if arguments["mode"] == "pull" and not arguments["url"]:
                return Device.receive(self, arguments)
            return super().receive(arguments)

    device, said = Served(tmp_path, parcels, [(2, "it does not answer")]), list[str]()
    variables = {"inventory_hostname": "orin", "hostvars": {"peer": {transfer.STORE_FACT: store}}}
    options = {"relay": "peer", "downloads": "device"}
    with Courier(device, variables, str(tmp_path / "device"), options, said.append).delivered(parcels) as folder:
        assert sorted(os.listdir(folder)) == list("abcd")
    assert device.steps == ["pull", "pull", "finish", "close"]
    assert shop.asked == ["/c", "/d"] and device.put == []
    assert "what is missing is fetched from the internet" in said[0]


def test_a_download_takes_as_many_calls_as_it_needs(tmp_path: Path, shop: Shop) -> None:
    asked: list[list[str]] = []
    parcels = [shop.offer(make(tmp_path / "own", name, 300)) for name in "abc"]

    class Slow(Device):
        def receive(self, arguments: dict[str, Any]) -> dict[str, Any]:
            if arguments["mode"] != "pull":
                return super().receive(arguments)
            asked.append([row["sha256"] for row in arguments["wanted"]])
            assert 0 < arguments["seconds"] <= 30
            one = {**arguments, "wanted": arguments["wanted"][:1]}
            return super().receive(one)

    deliver(Slow(), tmp_path, parcels, downloads="device")
    digests = [parcel.sha256 for parcel in parcels]
    assert asked == [digests, digests[1:], digests[2:]]
