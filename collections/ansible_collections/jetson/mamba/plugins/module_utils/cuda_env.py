"""CUDA for login shells, for commands over ssh, for services and for the linker: which files say it, and how."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import tempfile
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Tuple

from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import FileSpec, differs, ensure_files, read_text

PROFILE = "/etc/profile.d/jetson-mamba-cuda.sh"
SSHD_DROP_IN = "/etc/ssh/sshd_config.d/60-jetson-mamba.conf"
SSHD_CONFIG = "/etc/ssh/sshd_config"
LINKER = "/etc/ld.so.conf.d/jetson-mamba-cuda.conf"
LINKER_CACHE = "/etc/ld.so.cache"
SERVICE = "/etc/jetson-mamba/cuda.env"
ALL_PATHS = (PROFILE, LINKER, SERVICE, SSHD_DROP_IN)

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SSH_UNITS = ("ssh.service", "sshd.service")
_NO_SSH = "or leave commands over ssh alone: cuda_env_ssh: false"

_HEADER = "# Placed by Jetson Mamba (role cuda_env), which overwrites changes made here.\n"
_SAFE_PATH = re.compile(r"/[A-Za-z0-9._+@/-]*")

# argv -> (exit status, standard output, standard error)
Runner = Callable[[List[str]], Tuple[int, str, str]]


class Wish(NamedTuple):
    """What is asked for: the toolkit's folder, its version (major.minor, or empty for any), and the parts."""

    cuda_home: str
    version: str = ""
    login: bool = True
    ssh: bool = True
    service: bool = True


class Outcome(NamedTuple):
    """What was done: whether anything changed, Ansible's diff, and the commands that were run (or would be)."""

    changed: bool
    diff: list[dict[str, str]]
    commands: list[list[str]]


# --- what the files say -----------------------------------------------------------------------------------------------


def wanted_files(
    cuda_home: str, base_path: str, lib_dirs: list[str], login: bool, ssh: bool, service: bool
) -> dict[str, FileSpec]:
    """Return the files that give CUDA to the parts asked for.

    Args:
        cuda_home: absolute path of the toolkit, such as /usr/local/cuda-12.6.
        base_path: the PATH that commands have without CUDA.
        lib_dirs: the toolkit's library folders, for the linker cache and for LD_LIBRARY_PATH.
        login: login shells.
        ssh: commands over ssh.
        service: an EnvironmentFile for units that name it.

    Raises:
        Problem: a folder's name has characters that shells, sshd or the linker would read as their own.
    """
    for path in (cuda_home, *lib_dirs):
        _require_plain(path)
    path_value = ":".join([cuda_home + "/bin", *path_elements(base_path, cuda_home)])
    files = {}
    if login:
        files[PROFILE] = FileSpec(_profile(cuda_home, lib_dirs))
    if lib_dirs:
        files[LINKER] = FileSpec(_HEADER + "".join(folder + "\n" for folder in lib_dirs))
    if service:
        note = f"# For units: EnvironmentFile={SERVICE} (the libraries come from the linker cache)\n"
        files[SERVICE] = FileSpec(f"{_HEADER}{note}CUDA_HOME={cuda_home}\nPATH={path_value}\n")
    if ssh:
        variables = [f"CUDA_HOME={cuda_home}", f"PATH={path_value}"]
        if lib_dirs:
            variables.append("LD_LIBRARY_PATH=" + ":".join(lib_dirs))
        files[SSHD_DROP_IN] = FileSpec(f"{_HEADER}# sshd heeds only the first SetEnv.\nSetEnv {' '.join(variables)}\n")
    return files


def all_files(wanted: Mapping[str, FileSpec]) -> dict[str, FileSpec | None]:
    """Return wanted with None for those of our files that it does not hold: a part turned off is taken away."""
    return {path: wanted.get(path) for path in ALL_PATHS}


def planned_files(
    cuda_home: str, environment_path: Mapping[str, str | None], login: bool, ssh: bool, service: bool, state: str
) -> dict[str, FileSpec | None]:
    """Return what a device shall have, out of a survey: path to content, or to None where nothing shall be.

    Args:
        cuda_home: absolute path of the toolkit.
        environment_path: the texts {environment, login_defs} of /etc/environment and /etc/login.defs.
        login, ssh, service: the parts.
        state: present or absent.
    """
    if state == "absent":
        return all_files({})
    base = base_path(environment_path.get("environment"), environment_path.get("login_defs"))
    return all_files(wanted_files(cuda_home, base, [cuda_home + "/lib64"], login, ssh, service))


def _require_plain(path: str) -> None:
    if not _SAFE_PATH.fullmatch(path) or path.endswith("/") or "/../" in path + "/":
        raise Problem(
            f"the CUDA folder is given as {path!r}",
            "an absolute path of letters, digits and . _ + - @, without a slash at its end",
            "correct cuda_env_home",
        )


def _profile(cuda_home: str, lib_dirs: list[str]) -> str:
    """Return the script for login shells: POSIX sh, harmless when read twice, no empty path element ever."""
    lines = [
        _HEADER.rstrip("\n"),
        f"export CUDA_HOME={cuda_home}",
        'case ":${PATH:-}:" in',
        f"    *:{cuda_home}/bin:*) ;;",
        f'    *) PATH="{cuda_home}/bin${{PATH:+:$PATH}}" ;;',
        "esac",
        "export PATH",
    ]
    if lib_dirs:
        ours = ":".join(lib_dirs)
        lines += [
            "# Ours first, then what was there; an empty element would mean the working directory.",
            f"jetson_mamba_libs={ours}",
            'jetson_mamba_rest="${LD_LIBRARY_PATH:-}:"',
            'while [ -n "$jetson_mamba_rest" ]; do',
            '    case "${jetson_mamba_rest%%:*}" in',
            f"        ''|{'|'.join(lib_dirs)}) ;;",
            '        *) jetson_mamba_libs="$jetson_mamba_libs:${jetson_mamba_rest%%:*}" ;;',
            "    esac",
            '    jetson_mamba_rest="${jetson_mamba_rest#*:}"',
            "done",
            'export LD_LIBRARY_PATH="$jetson_mamba_libs"',
            "unset jetson_mamba_libs jetson_mamba_rest",
        ]
    return "\n".join(lines) + "\n"


# --- what the device has ----------------------------------------------------------------------------------------------


def path_elements(path: str, cuda_home: str) -> list[str]:
    """Return a PATH's elements without empty, relative, odd and repeated ones, and without this toolkit's own."""
    kept = [item for item in path.split(":") if _SAFE_PATH.fullmatch(item) and item != cuda_home + "/bin"]
    return list(dict.fromkeys(kept))


def base_path(environment: str | None, login_defs: str | None) -> str:
    """Return the PATH that commands have without CUDA.

    It is the PATH of /etc/environment, which holds for everybody; else ENV_PATH of /etc/login.defs with the folders
    for administration behind it, because one line of sshd's serves root too; else a usual one.

    Args:
        environment: text of /etc/environment, or None.
        login_defs: text of /etc/login.defs, or None.
    """
    found = re.findall(r"^\s*(?:export\s+)?PATH\s*=\s*[\"']?([^\"'\n]*)", environment or "", re.MULTILINE)
    if found and path_elements(found[-1], ""):
        return found[-1].strip()
    found = re.findall(r"^\s*ENV_PATH\s+(?:PATH=)?(\S+)", login_defs or "", re.MULTILINE)
    if found and path_elements(found[-1], ""):
        return ":".join([found[-1], "/usr/local/sbin", "/usr/sbin", "/sbin"])
    return DEFAULT_PATH


def library_dirs(cuda_home: str, prefix: str = "") -> list[str]:
    """Return the toolkit's library folders: lib64, which toolkits have, or the target folder where only that is."""
    target = cuda_home + "/targets/aarch64-linux/lib"
    if not os.path.isdir(prefix + cuda_home + "/lib64") and os.path.isdir(prefix + target):
        return [target]
    return [cuda_home + "/lib64"]


def toolkit_version(cuda_home: str, prefix: str = "") -> str | None:
    """Return the version that a toolkit states ("12.6.68", or "13.0" where only its header says one), or None."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(read_text(f"{prefix}{cuda_home}/version.json") or "")["cuda"]["version"])
    match = re.search(r"CUDA Version (\d+\.\d+\S*)", read_text(f"{prefix}{cuda_home}/version.txt") or "")
    if match:
        return match.group(1)
    # containers and single packages bring neither file, but the runtime's header, which says 13000
    header = read_text(f"{prefix}{cuda_home}/include/cuda_runtime_api.h") or ""
    match = re.search(r"^#define\s+CUDART_VERSION\s+(\d+)", header, re.M)
    return f"{int(match.group(1)) // 1000}.{int(match.group(1)) % 1000 // 10}" if match else None


def same_release(found: str | None, wanted: str) -> bool:
    """Return whether a full version is of the wanted release (major.minor); an empty wish is met by any."""
    return found is not None and (not wanted or found.split(".")[:2] == wanted.split(".")[:2])


def packages_for(version: str) -> list[str]:
    """Return the apt packages that hold the toolkit of a CUDA release (12.6 -> cuda-toolkit-12-6)."""
    return ["cuda-toolkit-" + "-".join(version.split(".")[:2])] if version else []


def missing_packages(cuda_home: str, version: str, prefix: str = "") -> list[str]:
    """Return the apt packages to install: the toolkit where it is missing or another, its compiler where only that is.

    Args:
        cuda_home: absolute path of the toolkit.
        version: the wanted release; empty for any, of which no package can be named.
        prefix: where the device's file system is found, empty for /.
    """
    if not same_release(toolkit_version(cuda_home, prefix), version):
        return packages_for(version)
    if version and not os.access(f"{prefix}{cuda_home}/bin/nvcc", os.X_OK):
        return ["cuda-nvcc-" + "-".join(version.split(".")[:2])]
    return []


def require_toolkit(wish: Wish, prefix: str = "") -> None:
    """Raise a Problem that names the package to install where the wanted toolkit is not at its place."""
    found = toolkit_version(wish.cuda_home, prefix)
    if same_release(found, wish.version):
        return
    expected = f"CUDA {wish.version} at {wish.cuda_home}" if wish.version else f"a CUDA toolkit at {wish.cuda_home}"
    packages = " ".join(packages_for(wish.version))
    install = (
        f"run 'sudo apt-get install {packages}' on the device, or set cuda_env_install: true; " if packages else ""
    )
    raise Problem(
        f"CUDA {found} at {wish.cuda_home}" if found else f"no version of CUDA is stated in {wish.cuda_home}",
        expected,
        install + "if the toolkit is elsewhere, set cuda_env_home to its folder",
    )


# --- sshd -------------------------------------------------------------------------------------------------------------


def survey_sshd(prefix: str = "") -> Dict[str, Any]:
    """Return what matters of sshd's configuration, read as sshd does: in order, Match blocks ending with their file.

    Needs no root where the files can be read by everybody; what cannot be read is left out and said.

    Args:
        prefix: where the device's file system is found, empty for /.

    Returns:
        Plain data: exists (whether there is an sshd_config), readable (whether all of it could be read), include
        (whether our drop-in is read), set_env (who else sets variables, as file:line).
    """
    includes: List[str] = []
    set_env: List[str] = []
    unreadable: List[str] = []
    for path, number, keyword, rest, in_match in _sshd_lines(SSHD_CONFIG, prefix, (), unreadable):
        if keyword == "include" and not in_match:
            includes += [_absolute(item) for item in rest.split()]
        elif keyword == "setenv" and path != SSHD_DROP_IN:
            set_env.append(f"{path}:{number}")
    return {
        "exists": os.path.exists(prefix + SSHD_CONFIG) or bool(unreadable),
        "readable": not unreadable,
        "include": any(_matches(pattern, SSHD_DROP_IN) for pattern in includes),
        "set_env": set_env,
    }


def sshd_problem(config: Mapping[str, Any]) -> Dict[str, str] | None:
    """Return why a SetEnv line of ours would not be read, or would silence somebody else's; None where it would not.

    Args:
        config: what survey_sshd returns. Where a part could not be read, only what is certain all the same is a
            problem; where it is empty, nothing is known and nothing is said.

    Returns:
        found, expected and next, or None.
    """
    folder = os.path.dirname(SSHD_DROP_IN)
    if config and not config.get("exists", True):
        return Problem(
            f"there is no {SSHD_CONFIG}", "an OpenSSH server on the device", f"install openssh-server, {_NO_SSH}"
        ).as_dict()
    if config.get("set_env"):
        return Problem(
            "sshd is told to set variables already: SetEnv in " + ", ".join(config["set_env"]),
            "no other SetEnv: of all SetEnv lines sshd heeds the first only",
            f"move that line's variables to /etc/environment, {_NO_SSH}",
        ).as_dict()
    if config.get("readable") and not config.get("include"):
        return Problem(
            f"{SSHD_CONFIG} does not include {folder}",
            f"the line 'Include {folder}/*.conf' before any Match block",
            f"add it at the top of {SSHD_CONFIG}, {_NO_SSH}",
        ).as_dict()
    return None


def _sshd_lines(
    path: str, prefix: str, above: tuple[str, ...], unreadable: list[str]
) -> Iterator[tuple[str, int, str, str, bool]]:
    """Yield (file, line number, keyword in lower case, the rest, whether in a Match block) through all includes.

    What cannot be read is added to unreadable instead.
    """
    if path in above or (os.path.exists(prefix + path) and not os.path.isfile(prefix + path)):
        return
    try:
        text = read_text(prefix + path) or ""
    except Problem:
        unreadable.append(path)
        return
    in_match = False
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.match(r"\s*([A-Za-z]+)(?:\s*=\s*|\s+)(.*)", line)
        if match is None:
            continue
        keyword, rest = match.group(1).lower(), match.group(2).strip().replace('"', "")
        if keyword == "match":
            in_match = rest.lower() != "all"
        yield path, number, keyword, rest, in_match
        if keyword == "include":
            for pattern in rest.split():
                for found in sorted(glob.glob(prefix + _absolute(pattern))):
                    for inner in _sshd_lines(found[len(prefix) :], prefix, (*above, path), unreadable):
                        yield (*inner[:4], inner[4] or in_match)


def _absolute(pattern: str) -> str:
    return pattern if pattern.startswith("/") else "/etc/ssh/" + pattern


def _matches(pattern: str, path: str) -> bool:
    """Return whether a glob pattern matches a path that need not exist; as in a shell, no star matches a slash."""
    parts = [re.escape(part) for part in re.split(r"\*", pattern)]
    return re.fullmatch("[^/]*".join(parts).replace(r"\?", "[^/]"), path) is not None


def require_sshd(prefix: str = "") -> None:
    """Raise a Problem where a SetEnv line of ours would not be read, or would silence somebody else's."""
    config = survey_sshd(prefix)
    problem = sshd_problem(config)
    if problem is not None:
        raise Problem(problem["found"], problem["expected"], problem["next"])
    if not config["readable"]:
        raise Problem(
            f"{SSHD_CONFIG}, or a file that it includes, cannot be read",
            "regular files that root may read",
            f"look at them with 'ls -l /etc/ssh' and run the task with become, {_NO_SSH}",
        )


def try_sshd(spec: FileSpec, run: Runner, prefix: str = "") -> None:
    """Let sshd judge our line together with its configuration, before the line takes effect."""
    with tempfile.NamedTemporaryFile("w", prefix="jetson-mamba-sshd-", suffix=".conf") as trial:
        trial.write(f"{spec.content}Include {prefix}{SSHD_CONFIG}\n")
        trial.flush()
        _require_success(run, ["sshd", "-t", "-f", trial.name], "sshd does not accept the configuration")


def reload_sshd(run: Runner, check: bool) -> list[list[str]]:
    """Make the running sshd read its configuration again, and return the commands; open connections stay open.

    An sshd that is not running (socket activation, or none yet) reads it when it starts.
    """
    for unit in SSH_UNITS:
        if run(["systemctl", "is-active", "--quiet", unit])[0] == 0:
            command = ["systemctl", "reload", unit]
            if not check:
                _require_success(run, command, "sshd could not be reloaded")
            return [command]
    return []


def _require_success(run: Runner, command: list[str], what: str) -> None:
    status, out, err = run(command)
    if status != 0:
        said = (err or out).strip().splitlines()[-3:]
        raise Problem(
            f"{what}: '{' '.join(command)}' ended with {status}: {' / '.join(said) or 'no message'}",
            "exit status 0",
            f"correct what it names ('sudo sshd -t' shows it), {_NO_SSH}",
        )


# --- bringing it about ------------------------------------------------------------------------------------------------


def apply(wish: Wish | None, run: Runner, check: bool, toolkit_pending: bool = False, prefix: str = "") -> Outcome:
    """Give the device what is wished, or take everything away; all problems are found before the first write.

    Args:
        wish: what is asked for; None takes our files away.
        run: runs a command and returns its exit status, output and errors.
        check: say what would change and write nothing.
        toolkit_pending: the toolkit is about to be installed, so its absence is no problem.
        prefix: where the device's file system is found, empty for /.

    Raises:
        Problem: the toolkit is missing or another, or sshd would not do what is wished.
    """
    wanted: dict[str, FileSpec] = {}
    if wish is not None:
        if not toolkit_pending:
            require_toolkit(wish, prefix)
        base = base_path(read_text(prefix + "/etc/environment"), read_text(prefix + "/etc/login.defs"))
        wanted = wanted_files(
            wish.cuda_home, base, library_dirs(wish.cuda_home, prefix), wish.login, wish.ssh, wish.service
        )
    everything = all_files(wanted)
    drop_in = everything.pop(SSHD_DROP_IN)
    if drop_in is not None:
        require_sshd(prefix)
        if differs(prefix + SSHD_DROP_IN, drop_in):
            try_sshd(drop_in, run, prefix)

    relink = differs(prefix + LINKER, everything[LINKER])
    changed, diffs = ensure_files({prefix + path: spec for path, spec in everything.items()}, check)
    # an earlier run may have been cut off between the list and the cache
    relink = relink or (LINKER in wanted and _older(prefix + LINKER_CACHE, prefix + LINKER))
    commands = refresh_linker(run, check) if relink else []
    ssh_diffs, ssh_commands = _bring_drop_in(drop_in, run, check, prefix)
    if wish is None and not check:
        with contextlib.suppress(OSError):
            os.rmdir(prefix + os.path.dirname(SERVICE))
    return Outcome(bool(changed or commands or ssh_diffs), [*diffs, *ssh_diffs], [*commands, *ssh_commands])


def refresh_linker(run: Runner, check: bool) -> list[list[str]]:
    """Make the linker read its lists of folders again, and return the commands."""
    command = ["ldconfig"]
    if not check:
        status, _out, err = run(command)
        if status != 0:
            raise Problem(
                f"ldconfig ended with {status}: {err.strip()}",
                "a linker cache that knows CUDA's libraries",
                "run 'sudo ldconfig' on the device and correct what it names",
            )
    return [command]


def _older(first: str, second: str) -> bool:
    """Return whether first is absent or was written before second."""
    try:
        return os.stat(first).st_mtime_ns < os.stat(second).st_mtime_ns
    except FileNotFoundError:
        return os.path.exists(second)


def _bring_drop_in(
    spec: FileSpec | None, run: Runner, check: bool, prefix: str
) -> tuple[list[dict[str, str]], list[list[str]]]:
    """Place or remove sshd's drop-in and reload sshd; where that fails, what was there before is there again."""
    path = prefix + SSHD_DROP_IN
    before = read_text(path)
    changed, diffs = ensure_files({path: spec}, check)
    if not changed:
        return [], []
    try:
        return diffs, reload_sshd(run, check)
    except Problem:
        ensure_files({path: None if before is None else FileSpec(before)}, check=False)
        raise
