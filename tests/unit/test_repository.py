"""What holds for every file of the repository."""

from __future__ import annotations

import configparser
import re
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = {".py", ".yml", ".yaml", ".md", ".ini", ".cfg", ".toml", ".txt", ".in", ".j2", ".sh", ".cpp", ".h", ".patch", ""}
# A path into somebody's home is one machine's business.
HOME = re.compile(r"/(?:home|Users)/(?!jetson\b|\$|\{|<)[a-z][\w.-]*/|/root/\.")
LOCKED_LINE = re.compile(r"[A-Za-z0-9][\w.-]*==\S+( ;.*)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?|\s*#.*")
PYTHONS = ("310", "311", "312", "313")
CORE = {"310": "2.17.", "311": "2.19.", "312": "2.20.", "313": "2.20."}


def repository_files() -> list[Path]:
    """Return what git tracks or would track; where there is no git (an archive), everything but caches."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        files = [path for path in ROOT.rglob("*") if not {".venv", ".cache", ".git", "__pycache__"} & set(path.parts)]
    return sorted(path for path in files if path.is_file() and not path.is_symlink())


FILES = repository_files()
YAML = [path for path in FILES if path.suffix in {".yml", ".yaml"} or path.name in {".yamllint", ".ansible-lint"}]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 30
    assert len(YAML) > 5


def test_no_file_names_a_home_folder() -> None:
    found = []
    for path in FILES:
        if path.suffix not in TEXT or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(read(path).splitlines(), start=1):
            if HOME.search(line):
                found.append(f"{name(path)}:{number}: {line.strip()[:80]}")
    assert not found


def test_yaml_starts_a_document() -> None:
    assert not [name(path) for path in YAML if not re.match(r"(#.*\n)*---\n", read(path))]


def test_text_ends_with_one_newline_and_has_no_cr() -> None:
    # A patch may need both: it carries other people's lines.
    text = {path: path.read_bytes() for path in FILES if path.suffix in TEXT - {".patch"}}
    assert not [name(path) for path, body in text.items() if body and (not body.endswith(b"\n") or b"\r" in body)]


def test_scripts_are_executable() -> None:
    scripts = [path for path in FILES if path.suffix in {"", ".sh"} and path.read_bytes().startswith(b"#!")]
    assert scripts
    assert not [name(path) for path in scripts if not path.stat().st_mode & stat.S_IXUSR]


def test_no_private_key_or_large_binary() -> None:
    assert not [name(path) for path in FILES if path.stat().st_size > 2_000_000]
    marker = b"-----BEGIN OPENSSH " + b"PRIVATE KEY"
    assert not [name(path) for path in FILES if marker in path.read_bytes()]


@pytest.mark.parametrize("python", PYTHONS)
def test_requirements_are_locked_by_hash(python: str) -> None:
    lines = read(ROOT / "requirements" / f"py{python}.txt").splitlines()
    assert not [line for line in lines if not LOCKED_LINE.fullmatch(line)]
    assert any(line.startswith(f"ansible-core=={CORE[python]}") for line in lines)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_wanted_package_is_locked(python: str) -> None:
    wanted = {
        re.split(r"[<>=!~; ]", line)[0].lower()
        for source in ("controller.in", "dev.in")
        for line in read(ROOT / "requirements" / source).splitlines()
        if line and not line.startswith("#")
    }
    locked = set(re.findall(r"^([\w.-]+)==", read(ROOT / "requirements" / f"py{python}.txt"), re.MULTILINE))
    assert wanted <= {package.lower() for package in locked}


def test_ansible_is_set_up_as_the_design_needs() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "ansible.cfg")
    assert config["defaults"]["inject_facts_as_vars"] == "False"
    assert config["defaults"]["host_key_checking"] == "True"
    assert config["ssh_connection"]["pipelining"] == "True"


def test_readme_has_the_two_commands_and_ci_runs_the_second() -> None:
    readme = read(ROOT / "README.md")
    assert "make provision" in readme
    assert "make test" in readme
    assert "make test" in read(ROOT / ".ci" / "run")


def test_every_documented_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"`make ([a-z-]+)", read(ROOT / document)))
        named |= set(re.findall(r"^(?:\$ )?make ([a-z-]+)", read(ROOT / document), re.MULTILINE))
        assert named <= targets, document


def test_links_in_documents_lead_somewhere() -> None:
    dead = []
    for path in FILES:
        if path.suffix == ".md":
            for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", read(path)):
                if not (path.parent / target).exists():
                    dead.append(f"{name(path)}: {target}")
    assert not dead


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cd /home/alice/mamba-main", True),
        ("/root/.venv/bin", True),
        ("/Users/bob/src", True),
        ("/home/jetson/models", False),
        ("/home/<you>/", False),
        ("https://example.org/root", False),
    ],
)
def test_the_home_pattern_sees_homes_only(line: str, found: bool) -> None:
    assert bool(HOME.search(line)) is found
