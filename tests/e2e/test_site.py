"""One command takes a fleet from bare to verified. These tests run in order, on one fleet."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import HOSTS, ROOT, Fleet, Run, words

# where this project writes; a run that changes nothing leaves all of it alone
LISTING = (
    "find /opt /etc /home /usr/local /var/lib -xdev -not -path '/home/jetson/.ansible*' "
    "-not -name .sudo_as_admin_successful -not -path '/var/lib/systemd*' -not -path '/etc/.updated' "
    "-type f -printf '%p %s %m %T@\\n' | sort"
)
SITE = "/opt/jetson-mamba/current/lib/python3.11/site-packages"
KERNELS = {"causal_conv1d_fn", "causal_conv1d_update", "selective_scan_fn", "mamba_inner_fn", "mamba_module"}
# of mamba-ssm 2.2.4, as its sdist has it
PRISTINE = "c79f4432536402fe4d6c1026ccf8d5fc0aaa62b790e9a622295aee14ac45dbcc"
NOT_RUN = {"mamba2_module", "mamba_split_conv1d_scan_combined", "torchvision_nms"}


def changed_files(before: str, after: str) -> list[str]:
    """Return the lines of two listings that are in one only."""
    return sorted(set(before.splitlines()) ^ set(after.splitlines()))


def components(run: Run, host: str) -> dict[str, dict[str, str]]:
    return {item["component"]: item for item in run.report(host)["verification"]["components"]}


def failed(run: Run, host: str) -> dict[str, str]:
    return {name: item["message"] for name, item in components(run, host).items() if item["status"] == "failed"}


@pytest.fixture(scope="module")
def bare_check(fleet: Fleet) -> tuple[Run, dict[str, str], dict[str, str]]:
    before = {host: fleet.root(host, LISTING) for host in HOSTS}
    run = fleet.playbook("site.yml", "--check", "--diff")
    return run, before, {host: fleet.root(host, LISTING) for host in HOSTS}


@pytest.fixture(scope="module")
def first(fleet: Fleet, bare_check: tuple[Run, dict[str, str], dict[str, str]]) -> Run:
    return fleet.playbook()


@pytest.fixture(scope="module")
def provisioned(fleet: Fleet, first: Run) -> Fleet:
    assert first.status == 0, "the fleet could not be provisioned"
    return fleet


def test_check_on_bare_hosts_tells_and_touches_nothing(bare_check: tuple[Run, dict[str, str], dict[str, str]]) -> None:
    run, before, after = bare_check
    assert run.status == 0
    for host in HOSTS:
        assert run.recap[host]["failed"] == 0
        assert run.recap[host]["changed"] > 0
    for name in ("jetson-mamba-cuda.sh", "torch", "causal_conv1d", "mamba_ssm", "jetson_mamba_shim.pth"):
        assert name in run.output
    assert "causal_conv1d_fwd_function" in run.output, "the diff of the source patch is not shown"
    for host in HOSTS:
        assert changed_files(before[host], after[host]) == []


def test_the_plan_names_builds_before_they_start(first: Run) -> None:
    plan = first.output[: first.output.index("PLAY [Install]")]
    table = plan[plan.index("PLAN") :]
    assert re.search(r"host\s+outcome\s+min\s+MB\s+reason", table)
    for host in HOSTS:
        assert re.search(rf"^\s*{host}\s", table, re.MULTILINE)
    for name, component in (("causal_conv1d", "causal_conv1d 1.6.0"), ("mamba_ssm", "mamba_ssm 2.2.4")):
        assert table.count(f"install: {component} is not installed; wheel built on orin-") == len(HOSTS)
        # one builder a class: the first of its hosts
        assert f"build: {component} for orin-a, orin-b" in table
        assert re.search(rf"build: {component} for orin-c$", table, re.MULTILINE)
        assert len(re.findall(rf"^TASK .*{name} : Install", first.output, re.MULTILINE)) == 1


def test_first_run_verifies_every_host(first: Run) -> None:
    assert first.status == 0
    for host in HOSTS:
        found = components(first, host)
        assert {name for name, item in found.items() if item["status"] == "failed"} == set()
        passed = {name for name, item in found.items() if item["status"] == "passed"}
        assert passed >= KERNELS
        assert {item["kernels"] for name, item in found.items() if name in KERNELS} == {"cpu"}
        assert {name for name, item in found.items() if item["status"] == "not run"} >= NOT_RUN
        for name, item in found.items():
            if item["status"] == "not run":
                assert item["message"], f"{name} is not run, without a reason"
    assert "cpu" in words(first.output).lower()


def test_second_run_changes_nothing(provisioned: Fleet) -> None:
    before = {host: provisioned.root(host, LISTING) for host in HOSTS}
    run = provisioned.playbook()
    assert run.status == 0
    assert {host: run.recap[host]["changed"] for host in HOSTS} == dict.fromkeys(HOSTS, 0)
    for host in HOSTS:
        assert changed_files(before[host], provisioned.root(host, LISTING)) == []


def test_check_afterwards_names_nothing(provisioned: Fleet) -> None:
    run = provisioned.playbook("site.yml", "--check", "--diff")
    assert run.status == 0
    assert {host: run.recap[host]["changed"] for host in HOSTS} == dict.fromkeys(HOSTS, 0)
    assert "+++" not in run.output


def test_environment_reaches_ssh_login_shells_and_services(provisioned: Fleet) -> None:
    for command in ("env", "bash -lc env", "sh -lc env"):
        found = dict(line.split("=", 1) for line in provisioned.ssh("orin-a", command).splitlines() if "=" in line)
        assert found["CUDA_HOME"] == "/usr/local/cuda-12.6"
        assert found["PATH"].split(":").count("/usr/local/cuda-12.6/bin") == 1
        assert "" not in found.get("LD_LIBRARY_PATH", "x").split(":")
    service = provisioned.root(
        "orin-c", "systemd-run --quiet --wait --pipe -p EnvironmentFile=/etc/jetson-mamba/cuda.env env"
    )
    assert "CUDA_HOME=/usr/local/cuda-12.2" in service
    assert "LD_LIBRARY_PATH" not in service
    assert "CUDA_HOME" not in provisioned.root("orin-c", "systemd-run --quiet --wait --pipe env")


def test_the_launcher_resolves_current_once(provisioned: Fleet) -> None:
    printed = provisioned.ssh("orin-b", "/opt/jetson-mamba/bin/mamba-python -c 'import sys; print(sys.prefix)'")
    assert printed.strip().startswith("/opt/jetson-mamba/envs/torch")
    provisioned.ssh("orin-b", "/opt/jetson-mamba/bin/mamba-python -m pip check")


def test_a_process_keeps_its_environment_when_current_moves(provisioned: Fleet) -> None:
    script = (
        "import sys, os\n"
        "target = os.readlink('/opt/jetson-mamba/current')\n"
        "os.symlink('envs/elsewhere', '/opt/jetson-mamba/current.test'); "
        "os.replace('/opt/jetson-mamba/current.test', '/opt/jetson-mamba/current')\n"
        "try:\n    import einops; print(einops.__file__)\n"
        "finally:\n    os.symlink(target, '/opt/jetson-mamba/current.test'); "
        "os.replace('/opt/jetson-mamba/current.test', '/opt/jetson-mamba/current')\n"
    )
    encoded = json.dumps(script)
    printed = provisioned.ssh("orin-b", f"/opt/jetson-mamba/bin/mamba-python -c {json.dumps(f'exec({encoded})')}")
    assert printed.strip().startswith("/opt/jetson-mamba/envs/torch")


def test_patched_call_sites_of_ssd_combined_under_tritons_interpreter(provisioned: Fleet) -> None:
    script = (ROOT / "tests" / "on_device" / "triton_patched_sites.py").read_text(encoding="utf-8")
    path = Path("/tmp/triton_patched_sites.py")
    provisioned.root("orin-a", f"cat > {path} <<'END_OF_SCRIPT'\n{script}\nEND_OF_SCRIPT\n")
    printed = provisioned.ssh("orin-a", f"/opt/jetson-mamba/bin/mamba-python {path}")
    results = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert results
    assert {item["status"] for item in results} == {"passed"}


# --- what breaks is found, and mended or refused -------------------------------------------------------------------


def restore(fleet: Fleet, host: str) -> None:
    run = fleet.playbook("site.yml", "--limit", host)
    assert run.status == 0
    assert run.recap[host]["changed"] > 0


def test_without_the_backward_patch_backward_fails(provisioned: Fleet) -> None:
    target = f"{SITE}/mamba_ssm/ops/selective_scan_interface.py"
    provisioned.root(
        "orin-b", f"sed -i 's/causal_conv1d_bwd_function(/causal_conv1d_cuda.causal_conv1d_bwd(/' {target}"
    )
    run = provisioned.playbook("playbooks/verify.yml", "--limit", "orin-b")
    assert run.status != 0
    found = failed(run, "orin-b")
    assert "backward" in found["mamba_inner_fn"]
    assert "mamba_module" in found
    assert "causal_conv1d_fn" not in found
    # the next run refuses to touch what it doesn't know, and says how to go on; then it does
    refused = provisioned.playbook("site.yml", "--limit", "orin-b")
    assert refused.status != 0
    assert "selective_scan_interface.py has sha256" in words(refused.output)
    assert "mamba_ssm_reinstall=true" in refused.output
    assert refused.recap["orin-b"]["changed"] == 0
    mended = provisioned.playbook("site.yml", "--limit", "orin-b", "-e", "mamba_ssm_reinstall=true")
    assert mended.status == 0


def test_without_the_shim_the_import_fails_and_says_why(provisioned: Fleet) -> None:
    provisioned.root("orin-b", f"rm {SITE}/jetson_mamba_shim.pth")
    run = provisioned.playbook("playbooks/verify.yml", "--limit", "orin-b")
    assert run.status != 0
    found = failed(run, "orin-b")
    assert "_all_gather_base" in found["import_mamba_ssm"]
    restore(provisioned, "orin-b")


def test_one_corrupted_byte_is_said_by_the_next_run(provisioned: Fleet) -> None:
    target = f"{SITE}/mamba_ssm/ops/triton/ssd_combined.py"
    provisioned.root("orin-c", f"cp {target} /root/kept; printf X | dd of={target} bs=1 seek=100 conv=notrunc")
    run = provisioned.playbook("site.yml", "--limit", "orin-c")
    assert run.status != 0
    assert "ssd_combined.py has sha256" in words(run.output)
    assert run.recap["orin-c"]["changed"] == 0
    provisioned.root("orin-c", f"cat /root/kept > {target}; rm /root/kept")
    healthy = provisioned.playbook("site.yml", "--limit", "orin-c")
    assert healthy.status == 0
    assert healthy.recap["orin-c"]["changed"] == 0


def aarch64_library(scratch: Path) -> Path:
    """Return a real extension module for aarch64, out of some package's wheel for that machine."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(scratch),
    ]
    target = ["--platform", "manylinux2014_aarch64", "--python-version", "311", "--implementation", "cp"]
    subprocess.run([*pip, *target, "markupsafe==3.0.3"], check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".so"))
        return Path(wheel.extract(name, scratch))


def test_a_library_of_another_machine_is_named(provisioned: Fleet, tmp_path: Path) -> None:
    library = base64.b64encode(gzip.compress(aarch64_library(tmp_path).read_bytes())).decode()
    script = f"cd {SITE}; for f in causal_conv1d_cuda*.so; do base64 -d <<'END' | gunzip > $f\n{library}\nEND\ndone"
    provisioned.root("orin-c", script)
    run = provisioned.playbook("playbooks/verify.yml", "--limit", "orin-c")
    assert run.status != 0
    text = words(" ".join(failed(run, "orin-c").values()))
    assert "causal_conv1d_cuda" in text
    assert "aarch64" in text.lower()
    again = provisioned.playbook("site.yml", "--limit", "orin-c")
    assert again.status == 0
    assert "causal_conv1d is damaged" in words(again.output)


def test_uninstalling_leaves_nothing_and_a_reinstall_is_patched_again(provisioned: Fleet) -> None:
    python = "/opt/jetson-mamba/bin/mamba-python"
    provisioned.ssh("orin-c", f"{python} -m pip uninstall --yes mamba_ssm")
    assert provisioned.root("orin-c", f"ls {SITE} | grep -i -e mamba_ssm -e selective_scan || true").strip() == ""
    restore(provisioned, "orin-c")


def test_patches_are_taken_back_to_the_pristine_checksum(provisioned: Fleet) -> None:
    target = f"{SITE}/mamba_ssm/ops/selective_scan_interface.py"
    run = provisioned.playbook("site.yml", "--limit", "orin-c", "-e", "source_patches_state=absent")
    assert run.status != 0, "unpatched call sites were verified as good"
    assert provisioned.root("orin-c", f"sha256sum {target}").split()[0] == PRISTINE
    restore(provisioned, "orin-c")


# --- wrong input ends before anything changes ----------------------------------------------------------------------


def wheel(key: str, place: str) -> str:
    """Return the extra variables that name an own torch wheel without a checksum."""
    return json.dumps({"torch_jetpack_wheel": {"version": "2.5.0", key: place, "sha256": None}})


@pytest.mark.parametrize(
    ("extra", "found", "next_step"),
    [
        ("mamba_ssm_verison=2.2.4", "mamba_ssm_verison", "did you mean mamba_ssm_version"),
        ("mamba_ssm_version=9.9.9", "9.9.9", "2.2.4"),
        ("jetson_platform_scope=system", "jetson_platform_scope", "venv, user"),
        ('{"jetson_platform_rows": []}', "machine x86_64", "machine"),
        (wheel("path", "/nowhere/torch-2.5.0-cp311-cp311-linux_x86_64.whl"), "/nowhere/torch", "path"),
        (wheel("path", "/nowhere/torch-2.5.0-cp310-cp310-linux_aarch64.whl"), "cp310", "x86_64"),
        (wheel("url", "https://example.org/torch-2.5.0-cp311-cp311-linux_x86_64.whl"), "sha256", "curl"),
        ("source_patches_stat=absent", "source_patches_stat", "did you mean source_patches_state"),
    ],
)
def test_wrong_settings(provisioned: Fleet, extra: str, found: str, next_step: str) -> None:
    run = provisioned.playbook("site.yml", "--limit", "orin-a", "-e", extra)
    assert run.status != 0
    assert run.recap["orin-a"]["changed"] == 0
    assert found in words(run.output)
    assert next_step in words(run.output)


def test_an_unknown_l4t_is_refused(provisioned: Fleet) -> None:
    provisioned.root("orin-a", "cp /etc/nv_tegra_release /root/kept; sed -i 's/4.7,/9.9,/' /etc/nv_tegra_release")
    try:
        run = provisioned.playbook("site.yml", "--limit", "orin-a")
        assert run.status != 0
        assert "L4T 36.9.9" in words(run.output)
        assert "jetson_platform_rows" in run.output
    finally:
        provisioned.root("orin-a", "cat /root/kept > /etc/nv_tegra_release; rm /root/kept")


# --- other wishes --------------------------------------------------------------------------------------------------


def test_chosen_system_packages_are_visible_in_a_new_environment(provisioned: Fleet) -> None:
    before = provisioned.ssh("orin-b", "readlink /opt/jetson-mamba/current").strip()
    python = "/opt/jetson-mamba/bin/mamba-python"
    assert "ModuleNotFoundError" in provisioned.ssh("orin-b", f"{python} -c 'import apt_pkg' 2>&1", check=False)
    wish = json.dumps({"torch_jetpack_system_packages": ["apt_pkg"]})
    run = provisioned.playbook("site.yml", "--limit", "orin-b", "-e", wish)
    assert run.status == 0
    assert provisioned.ssh("orin-b", "readlink /opt/jetson-mamba/current").strip() != before
    provisioned.ssh("orin-b", f"{python} -c 'import apt_pkg, mamba_ssm'")
    # one package was asked for, not all of dist-packages
    assert "ModuleNotFoundError" in provisioned.ssh("orin-b", f"{python} -c 'import apt' 2>&1", check=False)
    back = provisioned.playbook("site.yml", "--limit", "orin-b")
    assert back.status == 0
    assert provisioned.ssh("orin-b", "readlink /opt/jetson-mamba/current").strip() == before


def test_the_users_site(provisioned: Fleet) -> None:
    wish = ("--limit", "orin-b", "-e", "jetson_platform_scope=user")
    run = provisioned.playbook("site.yml", *wish)
    assert run.status == 0
    printed = provisioned.ssh("orin-b", "python3 -c 'import mamba_ssm; print(mamba_ssm.__file__)'")
    assert printed.startswith("/home/jetson/.local/lib/python3.11/site-packages/")
    again = provisioned.playbook("site.yml", *wish)
    assert again.status == 0
    assert again.recap["orin-b"]["changed"] == 0
