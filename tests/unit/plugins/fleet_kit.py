"""Made-up runs for the tests of the reports: every state that a host can be in, at any size."""

from __future__ import annotations

from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils.smoke_runner import COMPONENTS, KERNELS, KIND
from ansible_collections.jetson.mamba.plugins.plugin_utils import fleet_data, report

MADE_AT = "2026-02-01T10:20:30+00:00"
CLASSES = (
    "aarch64-glibc2.35-cu12.6-cp310-torch2.5.0a0+872d972e41-cxx11-sm87",
    "aarch64-glibc2.35-cu12.2-cp310-torch2.4.0-cxx11-sm87",
    "aarch64-glibc2.39-cu13.0-cp312-torch2.9.0-cxx11-sm110",
)
TRITON = "Triton cannot be imported: no C compiler (gcc) was found"
BUSY = (
    "memory: 312 MB free, 1024 MB needed; the GPU is held by pid 812 (python3 /srv/camera.py, 5120 MB); nothing was "
    "stopped: end what can be spared and verify again"
)
PROBLEM = {
    "found": "/opt has 1200 MB free",
    "expected": "at least 9000 MB for torch and the build",
    "next": "free disk space, or set jetson_platform_root to a larger file system",
}


def row(name: str, status: str = "passed", **more: Any) -> dict[str, Any]:
    """Return a component's row as module kernel_smoke_tests reports it."""
    kernel = name in KERNELS and status in ("passed", "failed")
    return {
        "component": name,
        "status": status,
        "device": "cuda",
        "dtypes": ["float32", "float16", "bfloat16"] if kernel else [],
        "shapes_in": [2, 64, 67] if kernel else None,
        "shapes_out": [2, 64, 67] if kernel else None,
        "max_error": 2.4e-3 if kernel else None,
        "tolerance": 5.2e-3 if kernel else None,
        "cases": 9 if status in ("passed", "failed") else 0,
        "seconds": 1.25 if status in ("passed", "failed") else 0.0,
        "message": "",
        "kernels": "cuda" if kernel else "",
        **more,
    }


def verification(overall: str = "passed", changed: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return a verification report; `changed` replaces parts of the rows of the components that it names."""
    rows = [row(name, **(changed or {}).get(name, {})) for name in COMPONENTS]
    return {
        "schema": 1,
        "kind": KIND,
        "overall": overall,
        "device": "cuda",
        "gpu": {"name": "Orin", "free_mb": 5000},
        "kernels": "cuda",
        "python": "/opt/jetson-mamba/envs/torch2.5.0a0-cp310-1a2b3c4d/bin/python",
        "seed": 20260201,
        "dtypes": ["float32", "float16", "bfloat16"],
        "seconds": 61.5,
        "versions": {"torch": "2.5.0a0+872d972e41", "causal_conv1d": "1.6.0", "mamba_ssm": "2.2.4", "numpy": "1.26.4"},
        "holders": [],
        "components": rows,
    }


def plan(which: int = 0, work: bool = True) -> dict[str, Any]:
    """Return the parts of a plan that reports use, and some that they don't."""
    return {
        "schema": 1,
        "class_id": CLASSES[which],
        "platform": {"id": ("jetpack-6.1-6.2", "jetpack-6.0", "jetpack-7.0")[which], "sm": "87"},
        "l4t": ("36.4.7", "36.3.0", "38.2.0")[which],
        "paths": {"env": "/opt/jetson-mamba/envs/torch2.5.0a0-cp310-1a2b3c4d"},
        "outcomes": ["mamba_ssm"] if work else [],
        "problems": [],
        "work": [{"outcome": "mamba_ssm", "what": "2.2.4", "reason": "2.2.3 found, 2.2.4 wanted", "minutes": 1}]
        if work
        else [],
    }


def passed(which: int = 0) -> fleet_data.HostRun:
    return fleet_data.HostRun(
        outcome=report.Outcome(verification()),
        plan=plan(which),
        choice={"builds": [], "waits": {"mamba_ssm": "built on orin-0"}},
        changes=[{"role": "mamba_ssm", "task": "Install mamba-ssm", "seconds": 12.3}],
        seconds={"jetson_platform": 2.1, "mamba_ssm": 12.3, "kernel_smoke_tests": 62.0},
    )


def failed(error: float = 0.0413, which: int = 0) -> fleet_data.HostRun:
    message = (
        f"fp16 seqlen 67: backward: gradient of the input differs from the reference: error {error:.3g} where 0.005 is "
        "allowed (37 % of all values are off, relative norm 0.081)"
    )
    wrong = {
        "selective_scan_fn": {
            "status": "failed",
            "max_error": error,
            "tolerance": 0.005,
            "message": message,
            "failures": [message, message.replace("fp16", "bf16")],
        },
        "mamba2_module": {"status": "not run", "message": TRITON},
    }
    run = passed(which)
    run.outcome = report.Outcome(verification("failed", wrong), failed_at="Require that no component failed")
    run.failure = {"task": "Require that no component failed", "message": message, "problem": None}
    return run


def busy() -> fleet_data.HostRun:
    late = {name: {"status": "not tested: busy", "message": BUSY} for name in ("device", *KERNELS)}
    found = verification("busy", late)
    found["holders"] = [{"pid": 812, "command": "python3 /srv/camera.py", "memory_mb": 5120}]
    return fleet_data.HostRun(outcome=report.Outcome(found), plan=plan(work=False), seconds={"kernel_smoke_tests": 4.0})


def cpu() -> fleet_data.HostRun:
    left = {"mamba2_module": {"status": "not run", "message": "Triton kernels need a GPU"}}
    found = verification("passed", left)
    found.update(device="cpu", kernels="cpu", gpu=None)
    return fleet_data.HostRun(outcome=report.Outcome(found), plan=plan(2, work=False))


def blocked() -> fleet_data.HostRun:
    told = "found: … as rendered"
    made = plan(1)
    made["problems"] = [{"outcome": "jetson_platform", **PROBLEM}]
    return fleet_data.HostRun(
        outcome=report.Outcome(failed_at="jetson_platform : Require that nothing forbids the run"),
        plan=made,
        failure={"task": "jetson_platform : Require that nothing forbids the run", "message": told, "problem": PROBLEM},
    )


def lost() -> fleet_data.HostRun:
    task = "jetson_platform : Survey the device and plan what there is to do"
    words = "Failed to connect to the host via ssh: connect to host 10.0.7.13 port 22: No route to host"
    return fleet_data.HostRun(
        outcome=report.Outcome(unreachable_at=task), failure={"task": task, "message": words, "problem": None}
    )


def late() -> fleet_data.HostRun:
    run = passed()
    run.outcome = report.Outcome(verification(), failed_at="Switch to the verified environment", failed_after=True)
    run.failure = {"task": "Switch to the verified environment", "message": "No space left on device", "problem": None}
    return run


def builder() -> fleet_data.HostRun:
    build = {
        "component": "mamba_ssm",
        "version": "2.2.4",
        "class_id": CLASSES[0],
        "status": "built",
        "seconds": 1512.4,
        "filename": "mamba_ssm-2.2.4-cp310-cp310-linux_aarch64.whl",
        "size": 41_200_000,
    }
    other = dict(build, component="causal_conv1d", version="1.6.0", seconds=340.0, size=9_100_000)
    other["filename"] = "causal_conv1d-1.6.0-cp310-cp310-linux_aarch64.whl"
    return fleet_data.HostRun(
        outcome=report.Outcome(builder=True),
        plan=plan(),
        builds=[other, build],
        changes=[{"role": "wheelhouse", "task": "Build | Build the wheels", "seconds": 1852.4}],
        seconds={"wheelhouse": 1852.4},
    )


def every_kind() -> fleet_data.Run:
    """Return a run with a host in each state."""
    hosts = {
        "orin-0": passed(),
        "orin-1": failed(),
        "orin-2": failed(0.0398),
        "orin-busy": busy(),
        "orin-full": blocked(),
        "orin-gone": lost(),
        "orin-late": late(),
        "thor-cpu": cpu(),
        "xavier-idle": fleet_data.HostRun(),
        "builder-1": builder(),
    }
    return fleet_data.Run(MADE_AT, 2143.7, "site.yml", hosts)


def large(number: int = 500) -> fleet_data.Run:
    """Return a run of many hosts, most of them well."""
    hosts = {}
    for index in range(number):
        kind = passed(index % 3)
        if index % 41 == 7:
            kind = failed(0.03 + index / 10000, index % 3)
        elif index % 97 == 11:
            kind = lost()
        elif index % 61 == 5:
            kind = busy()
        elif index % 83 == 3:
            kind = blocked()
        hosts[f"site-{'abcd'[index % 4]}-orin-{index}"] = kind
    return fleet_data.Run(MADE_AT, 5341.0, "site.yml", hosts)


def page(run: fleet_data.Run) -> str:
    """Return the page of a run."""
    from ansible_collections.jetson.mamba.plugins.plugin_utils import fleet_page

    return fleet_page.render(*fleet_data.documents(run))
