"""CUDA for shells, ssh, services and the linker."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import cuda_env, files
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

HOME = "/usr/local/cuda-12.6"
LIB = HOME + "/lib64"
UBUNTU = 'PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games:/snap/bin"\n'
INCLUDE = "Include /etc/ssh/sshd_config.d/*.conf\n"


class Commands:
    """Stands in for the device's commands and remembers them; fails where a test says so."""

    def __init__(self, **failing: str) -> None:
        self.run: list[str] = []
        self.failing = failing

    def __call__(self, argv: list[str]) -> tuple[int, str, str]:
        line = " ".join(argv)
        self.run.append(line)
        for part, message in self.failing.items():
            if part in line:
                return 1, "", message
        return 0, "", ""

    def acting(self) -> list[str]:
        """Return the commands that change something."""
        return [line for line in self.run if not line.startswith(("sshd -t", "systemctl is-active"))]


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """Return the file system of a made-up device with a toolkit and an sshd."""
    for folder in ("etc/ssh/sshd_config.d", "etc/profile.d", "etc/ld.so.conf.d", HOME[1:] + "/lib64"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/environment").write_text(UBUNTU)
    (tmp_path / "etc/ssh/sshd_config").write_text(f"# comment\n{INCLUDE}UsePAM yes\n")
    (tmp_path / HOME[1:] / "version.json").write_text('{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}')
    return tmp_path


def bring(device: Path, commands: Commands, wish: cuda_env.Wish | None, check: bool = False) -> cuda_env.Outcome:
    outcome = cuda_env.apply(wish, commands, check, prefix=str(device))
    if not check:  # what ldconfig does
        (device / "etc/ld.so.cache").write_text("")
    return outcome


WISH = cuda_env.Wish(HOME, "12.6")


# --- what the files say


def test_the_ssh_line() -> None:
    files = cuda_env.wanted_files(HOME, "/usr/bin:/bin", [LIB], login=False, ssh=True, service=False)
    assert set(files) == {cuda_env.SSHD_DROP_IN, cuda_env.LINKER}
    lines = [line for line in files[cuda_env.SSHD_DROP_IN].content.splitlines() if not line.startswith("#")]
    assert lines == [f"SetEnv CUDA_HOME={HOME} PATH={HOME}/bin:/usr/bin:/bin LD_LIBRARY_PATH={LIB}"]


def test_services_get_no_ld_library_path() -> None:
    files = cuda_env.wanted_files(HOME, "/usr/bin:/bin", [LIB], login=False, ssh=False, service=True)
    text = files[cuda_env.SERVICE].content
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        f"CUDA_HOME={HOME}",
        f"PATH={HOME}/bin:/usr/bin:/bin",
    ]


def test_without_libraries_the_linker_is_left_alone() -> None:
    files = cuda_env.wanted_files(HOME, "/bin", [], login=True, ssh=True, service=True)
    assert cuda_env.LINKER not in files
    assert not [path for path, spec in files.items() if "LD_LIBRARY_PATH" in spec.content]


@pytest.mark.parametrize("home", ["cuda", "/usr/local/cuda 12", "/opt/$(id)", "/a:/b", "/opt/cuda/", "/a/../b", ""])
def test_a_home_that_a_shell_would_misread_is_refused(home: str) -> None:
    with pytest.raises(Problem, match="CUDA folder"):
        cuda_env.wanted_files(home, "/bin", [], login=True, ssh=True, service=True)


SHELLS = [shell for shell in ("sh", "dash", "bash", "zsh", "busybox") if shutil.which(shell)]


def login_shell(tmp_path: Path, shell: str, environment: dict[str, str], times: int = 1) -> dict[str, str]:
    """Source the profile script and return what the environment is then."""
    script = tmp_path / "profile.sh"
    files = cuda_env.wanted_files(HOME, "/bin", [LIB], login=True, ssh=False, service=False)
    script.write_text(files[cuda_env.PROFILE].content)
    command = [str(shutil.which(shell)), *(["sh"] if shell == "busybox" else []), "-eu", "-c"]
    code = f". {script}\n" * times + "/usr/bin/env"
    done = subprocess.run([*command, code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, LIB),
        ("", LIB),
        ("/mine", f"{LIB}:/mine"),
        ("/mine:", f"{LIB}:/mine"),
        (":/mine::/other", f"{LIB}:/mine:/other"),
        (f"/mine:{LIB}", f"{LIB}:/mine"),
        (LIB, LIB),
    ],
)
def test_ld_library_path_never_has_an_empty_element(
    tmp_path: Path, shell: str, times: int, before: str | None, after: str
) -> None:
    environment = {"PATH": "/usr/bin:/bin"}
    if before is not None:
        environment["LD_LIBRARY_PATH"] = before
    found = login_shell(tmp_path, shell, environment, times)
    assert found["LD_LIBRARY_PATH"] == after
    assert found["CUDA_HOME"] == HOME
    assert found["PATH"] == f"{HOME}/bin:/usr/bin:/bin"
    assert not [name for name in found if name.startswith("jetson_mamba")]


# --- what the device has


@pytest.mark.parametrize(
    ("environment", "login_defs", "path"),
    [
        (UBUNTU, None, UBUNTU[6:-2]),
        ("PATH=/a:/b\nLANG=C\n", "ENV_PATH PATH=/c\n", "/a:/b"),
        ("# PATH=/no\n", "ENV_PATH\tPATH=/usr/bin:/bin\n", "/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"),
        ("", "#ENV_PATH PATH=/no\nENV_PATH /usr/bin\n", "/usr/bin:/usr/local/sbin:/usr/sbin:/sbin"),
        ("PATH=\n", None, cuda_env.DEFAULT_PATH),
        (None, None, cuda_env.DEFAULT_PATH),
    ],
)
def test_the_base_path(environment: str | None, login_defs: str | None, path: str) -> None:
    assert cuda_env.base_path(environment, login_defs) == path


def test_path_elements_are_cleaned() -> None:
    assert cuda_env.path_elements(f"{HOME}/bin:/a::/b:.:/a:$HOME/bin:/c d:/e", HOME) == ["/a", "/b", "/e"]


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("version.json", '{"cuda": {"version": "12.6.11"}}', "12.6.11"),
        ("version.txt", "CUDA Version 12.2.140\n", "12.2.140"),
        ("version.json", "{}", None),
        ("version.json", "no json", None),
        ("other", "", None),
    ],
)
def test_the_toolkit_states_its_version(tmp_path: Path, name: str, text: str, version: str | None) -> None:
    (tmp_path / "opt/cuda").mkdir(parents=True)
    (tmp_path / "opt/cuda" / name).write_text(text)
    assert cuda_env.toolkit_version("/opt/cuda", str(tmp_path)) == version


def test_the_header_states_the_version_where_no_file_does(tmp_path: Path) -> None:
    """As in a container, or where single packages of CUDA were installed."""
    include = tmp_path / "opt/cuda/include"
    include.mkdir(parents=True)
    (include / "cuda_runtime_api.h").write_text("/* CUDART_VERSION 1 */\n#define CUDART_VERSION  12060\n")
    assert cuda_env.toolkit_version("/opt/cuda", str(tmp_path)) == "12.6"


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("12.6.68", "12.6", True),
        ("12.60", "12.6", False),
        ("12.2.1", "12.6", False),
        ("13.0", "", True),
        (None, "", False),
    ],
)
def test_releases_are_compared_by_major_and_minor(found: str | None, wanted: str, same: bool) -> None:
    assert cuda_env.same_release(found, wanted) is same


def test_a_wrong_toolkit_names_the_package_and_the_setting(device: Path) -> None:
    with pytest.raises(Problem) as caught:
        cuda_env.apply(cuda_env.Wish(HOME, "12.2"), Commands(), check=False, prefix=str(device))
    text = caught.value.render()
    assert "CUDA 12.6.11 at " + HOME in text
    assert "cuda-toolkit-12-2" in text
    assert "cuda_env_install: true" in text
    assert not (device / "etc/profile.d/jetson-mamba-cuda.sh").exists()


def test_a_missing_toolkit_is_no_problem_where_it_is_about_to_be_installed(device: Path) -> None:
    shutil.rmtree(device / HOME[1:])
    with pytest.raises(Problem, match="no version"):
        cuda_env.apply(WISH, Commands(), check=True, prefix=str(device))
    assert cuda_env.apply(WISH, Commands(), check=True, toolkit_pending=True, prefix=str(device)).changed


def test_the_missing_packages_are_named(device: Path) -> None:
    assert cuda_env.missing_packages(HOME, "12.2", str(device)) == ["cuda-toolkit-12-2"]
    assert cuda_env.missing_packages(HOME, "12.6", str(device)) == ["cuda-nvcc-12-6"]
    (device / HOME[1:] / "bin").mkdir()
    (device / HOME[1:] / "bin/nvcc").touch(mode=0o755)
    assert cuda_env.missing_packages(HOME, "12.6", str(device)) == []


def test_only_the_target_folder(tmp_path: Path) -> None:
    assert cuda_env.library_dirs(HOME, str(tmp_path)) == [LIB]
    (tmp_path / HOME[1:] / "targets/aarch64-linux/lib").mkdir(parents=True)
    assert cuda_env.library_dirs(HOME, str(tmp_path)) == [HOME + "/targets/aarch64-linux/lib"]
    (tmp_path / HOME[1:] / "lib64").symlink_to("targets/aarch64-linux/lib")
    assert cuda_env.library_dirs(HOME, str(tmp_path)) == [LIB]


def test_the_plan_says_what_the_device_gets(device: Path) -> None:
    bring(device, Commands(), WISH)
    planned = cuda_env.planned_files(HOME, {"environment": UBUNTU, "login_defs": None}, True, True, True, "present")
    assert {path: spec.content if spec else None for path, spec in planned.items()} == {
        path: (device / path[1:]).read_text() for path in cuda_env.ALL_PATHS
    }
    gone = cuda_env.planned_files(HOME, {}, True, True, True, "absent")
    assert gone == dict.fromkeys(cuda_env.ALL_PATHS)
    assert cuda_env.planned_files(HOME, {}, True, False, True, "present")[cuda_env.SSHD_DROP_IN] is None


# --- sshd


@pytest.mark.parametrize(
    ("text", "included"),
    [
        (INCLUDE, True),
        ("include sshd_config.d/*.conf\n", True),
        ('Include "/etc/ssh/sshd_config.d/*.conf"\n', True),
        ("Include /etc/ssh/a.conf /etc/ssh/sshd_config.d/60-*\n", True),
        ("Include /etc/ssh/*\n", False),
        ("#" + INCLUDE, False),
        ("Match User x\n" + INCLUDE, False),
        ("Match User x\nMatch all\n" + INCLUDE, True),
        ("UsePAM yes\n", False),
    ],
)
def test_whether_the_folder_is_included(device: Path, text: str, included: bool) -> None:
    (device / "etc/ssh/sshd_config").write_text(text)
    assert cuda_env.survey_sshd(str(device))["include"] is included


@pytest.mark.parametrize(
    ("path", "text", "where"),
    [
        ("sshd_config", INCLUDE + "SetEnv A=b\n", "/etc/ssh/sshd_config:2"),
        ("sshd_config", INCLUDE + "Match User x\n  setenv=A=b\n", "/etc/ssh/sshd_config:3"),
        ("sshd_config.d/10-own.conf", "\nSetEnv A=b\n", "/etc/ssh/sshd_config.d/10-own.conf:2"),
    ],
)
def test_somebodys_setenv_stops_before_the_first_write(device: Path, path: str, text: str, where: str) -> None:
    (device / "etc/ssh" / path).write_text(text)
    with pytest.raises(Problem) as caught:
        bring(device, Commands(), WISH)
    assert where in caught.value.found
    assert "cuda_env_ssh: false" in caught.value.next_step
    assert not (device / "etc/profile.d/jetson-mamba-cuda.sh").exists()
    assert bring(device, Commands(), WISH._replace(ssh=False)).changed


def test_no_include_and_no_sshd_are_problems(device: Path) -> None:
    (device / "etc/ssh/sshd_config").write_text("UsePAM yes\n")
    with pytest.raises(Problem, match="does not include"):
        bring(device, Commands(), WISH)
    (device / "etc/ssh/sshd_config").unlink()
    with pytest.raises(Problem, match="there is no /etc/ssh/sshd_config"):
        bring(device, Commands(), WISH)


def test_a_loop_of_includes_ends(device: Path) -> None:
    (device / "etc/ssh/sshd_config.d/a.conf").write_text(INCLUDE)
    assert cuda_env.survey_sshd(str(device))["include"]


def test_the_survey_of_sshd_is_plain_data(device: Path) -> None:
    fine = {"exists": True, "readable": True, "include": True, "set_env": []}
    assert cuda_env.survey_sshd(str(device)) == fine
    assert json.loads(json.dumps(fine)) == fine
    bring(device, Commands(), WISH)  # our own line is nobody else's
    assert cuda_env.survey_sshd(str(device)) == fine
    (device / "etc/ssh/sshd_config.d/folder.conf").mkdir()  # sshd passes it over
    assert cuda_env.survey_sshd(str(device)) == fine
    (device / "etc/ssh/sshd_config").unlink()
    assert cuda_env.survey_sshd(str(device)) == {"exists": False, "readable": True, "include": False, "set_env": []}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"exists": True, "readable": True, "include": True, "set_env": []}, None),
        ({"readable": True, "include": True, "set_env": []}, None),
        ({"readable": True, "include": True, "set_env": ["/etc/ssh/a.conf:3"]}, "SetEnv in /etc/ssh/a.conf:3"),
        ({"readable": True, "include": False, "set_env": []}, "does not include /etc/ssh/sshd_config.d"),
        ({"exists": False, "readable": True, "include": False, "set_env": []}, "there is no /etc/ssh/sshd_config"),
        # what could not be read may hold the Include, but takes no SetEnv away
        ({"readable": False, "include": False, "set_env": []}, None),
        ({"readable": False, "include": False, "set_env": ["/etc/ssh/a.conf:3"]}, "SetEnv in /etc/ssh/a.conf:3"),
        ({}, None),
    ],
)
def test_what_forbids_a_line_of_ours_can_be_told_from_a_survey(config: dict[str, object], found: str | None) -> None:
    problem = cuda_env.sshd_problem(config)
    if found is None:
        assert problem is None
    else:
        assert problem is not None and set(problem) == {"found", "expected", "next"}
        assert found in problem["found"] and "cuda_env_ssh: false" in problem["next"]


@pytest.mark.parametrize("path", ["sshd_config", "sshd_config.d/50-cloud-init.conf"])
def test_what_only_root_may_read_is_no_problem_before_root_looks(
    device: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def read_text(name: str) -> str | None:
        if name.endswith(path):
            raise Problem(f"{name} cannot be read", "", "")
        return files.read_text(name)

    (device / "etc/ssh/sshd_config.d/50-cloud-init.conf").write_text("PasswordAuthentication no\n")
    monkeypatch.setattr(cuda_env, "read_text", read_text)
    config = cuda_env.survey_sshd(str(device))
    assert (config["exists"], config["readable"]) == (True, False)
    assert cuda_env.sshd_problem(config) is None
    with pytest.raises(Problem, match="cannot be read"):
        cuda_env.require_sshd(str(device))


def test_what_sshd_refuses_is_never_placed(device: Path) -> None:
    commands = Commands(**{"sshd -t": "line 1: Bad configuration option"})
    with pytest.raises(Problem, match="Bad configuration option"):
        bring(device, commands, WISH)
    assert commands.acting() == []
    assert not [path for path in cuda_env.ALL_PATHS if (device / path[1:]).exists()]


@pytest.mark.parametrize("before", [None, "SetEnv CUDA_HOME=/old\n"])
def test_a_failed_reload_puts_back_what_was_there(device: Path, before: str | None) -> None:
    drop_in = device / cuda_env.SSHD_DROP_IN[1:]
    if before:
        drop_in.write_text(before)
    with pytest.raises(Problem, match="could not be reloaded"):
        bring(device, Commands(reload="Job failed"), WISH)
    assert (drop_in.read_text() if drop_in.exists() else None) == before


# --- bringing it about


def test_first_second_and_away(device: Path) -> None:
    first = Commands()
    outcome = bring(device, first, WISH)
    assert outcome.changed
    assert first.acting() == ["ldconfig", "systemctl reload ssh.service"]
    assert [diff["before_header"].split("/etc/")[1] for diff in outcome.diff] == [
        "profile.d/jetson-mamba-cuda.sh (absent)",
        "ld.so.conf.d/jetson-mamba-cuda.conf (absent)",
        "jetson-mamba/cuda.env (absent)",
        "ssh/sshd_config.d/60-jetson-mamba.conf (absent)",
    ]

    second = Commands()
    assert bring(device, second, WISH) == cuda_env.Outcome(False, [], [])
    assert second.run == []

    third = Commands()
    assert bring(device, third, None).commands == [["ldconfig"], ["systemctl", "reload", "ssh.service"]]
    assert not [path for path in cuda_env.ALL_PATHS if (device / path[1:]).exists()]
    assert not (device / "etc/jetson-mamba").exists()
    assert not bring(device, Commands(), None).changed


def test_check_mode_says_the_same_and_does_nothing(device: Path) -> None:
    commands = Commands()
    checked = bring(device, commands, WISH, check=True)
    assert commands.acting() == []
    assert not [path for path in cuda_env.ALL_PATHS if (device / path[1:]).exists()]
    assert checked == bring(device, Commands(), WISH)


def test_a_part_turned_off_is_taken_away(device: Path) -> None:
    bring(device, Commands(), WISH)
    commands = Commands()
    assert bring(device, commands, WISH._replace(ssh=False, login=False)).changed
    assert commands.acting() == ["systemctl reload ssh.service"]
    assert not (device / cuda_env.SSHD_DROP_IN[1:]).exists()
    assert not (device / cuda_env.PROFILE[1:]).exists()
    assert (device / cuda_env.SERVICE[1:]).exists()


def test_an_sshd_that_does_not_run_is_not_reloaded(device: Path) -> None:
    commands = Commands(**{"is-active": ""})
    assert bring(device, commands, WISH).changed
    assert commands.acting() == ["ldconfig"]


def test_a_cut_off_run_is_made_good(device: Path) -> None:
    with pytest.raises(Problem, match="ldconfig ended with 1: no space"):
        cuda_env.apply(WISH, Commands(ldconfig="no space"), check=False, prefix=str(device))
    commands = Commands()
    assert bring(device, commands, WISH).changed
    assert "ldconfig" in commands.run
