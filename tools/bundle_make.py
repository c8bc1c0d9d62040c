"""The making half of tools/bundle.py: fetch what platforms or devices need, and collect it. Needs `make venv`."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.jetson.mamba.plugins.module_utils import plan, versions
from ansible_collections.jetson.mamba.plugins.module_utils import wheels as wheel_files
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file
from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_passwords, without_userinfo
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target
from ansible_collections.jetson.mamba.plugins.plugin_utils import (
    components,
    fetch,
    locks,
    sources,
    wheelhouse,
    wishes,
)
from ansible_collections.jetson.mamba.plugins.plugin_utils import settings as checks

from tools import lock, provision
from tools.bundle import (
    BLOCK,
    CACHE,
    CONTROLLER,
    CONTROLLER_GLIBC,
    DEFAULT_CACHE,
    GIT_BUNDLE,
    OWN,
    OWN_MARK,
    PARTIAL,
    PAYLOAD,
    PROGRESS_SECONDS,
    ROOT,
    SCHEMA,
    SUPPORTED,
    TOP,
    WHEELHOUSE,
    Data,
    Entry,
    Refused,
    check_room,
    detail,
    in_words,
    is_list,
    now,
    tell,
    total,
    write_bundle,
)

# The newest glibc that a row's wheels may ask for, by its Python: those of Ubuntu 22.04 and 24.04 stand in
# tools/lock.py, these are Debian's 12 and 13. A survey would say it; without one this is the guess; --glibc beats it.
MORE_GLIBC = {"cp311": "2.36", "cp313": "2.41"}
# settings that are of this machine: its folders, and a trust that shall not outlive this run
HERE_ONLY = ("jetson_platform_cache", "wheelhouse_path", "torch_jetpack_trust_on_first_use")
# one locked package of the controller, on average; their lock names no sizes
CONTROLLER_WHEEL_BYTES = 1_500_000
SOURCE_BYTES = 10_000_000


@dataclass
class Collection:
    """What goes into a bundle, each place once."""

    entries: dict[str, Entry] = field(default_factory=dict)
    settings: Data = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, path: str, origin: Path, sha256: str | None = None) -> None:
        """Add a file; its checksum is computed where it is not known."""
        if path not in self.entries:
            status = origin.stat()
            digest = sha256 or sha256_file(str(origin)) or ""
            self.entries[path] = Entry(path, digest, status.st_size, bool(status.st_mode & 0o111), origin=origin)

    def add_folder(self, path: str, origin: Path) -> None:
        """Add all files below a folder, in order; links are followed to files."""
        for folder, names, files in os.walk(origin):
            names.sort()
            for name in sorted(files):
                file = Path(folder, name)
                self.add(f"{path}/{file.relative_to(origin).as_posix()}", file)

    def sorted(self) -> list[Entry]:
        """Return everything in the order in which it is packed: the project first, lists last."""
        return sorted(
            self.entries.values(), key=lambda entry: (entry.path.startswith(PAYLOAD), is_list(entry.path), entry.path)
        )


def git(*words: str, root: Path = ROOT) -> str:
    """Return what a git command prints.

    Raises:
        Problem: there is no git, or it fails.
    """
    try:
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError as error:
        raise Problem("there is no git here", "git, to pack the project", "install the package git") from error
    if done.returncode:
        raise Problem(
            f"git {words[0]} in {root}: {done.stderr.strip()[-300:]}",
            "a clone of the project with at least one commit: a bundle holds a commit",
            f"clone it (a folder that came out of a bundle: git clone {GIT_BUNDLE} FOLDER), or commit first",
        )
    return done.stdout


def uncommitted(root: Path = ROOT) -> list[str]:
    """Return the files that differ from the commit, or that no commit holds."""
    lines = git("-c", "core.quotePath=false", "status", "--porcelain", root=root).splitlines()
    return [line[3:] for line in lines if not line[3:].startswith("bundle/")]


def collect_project(collection: Collection, stage: Path, root: Path = ROOT) -> None:
    """Add the files of HEAD, and its history for who wants to clone it."""
    packed = stage / "project.tar"
    git("archive", "--format=tar", f"--output={packed}", "HEAD", root=root)
    tree = stage / "project"
    with tarfile.open(packed) as tar:
        for member in tar:
            target = tree / member.name
            if member.issym():
                collection.entries[member.name] = Entry(member.name, "", 0, link=member.linkname)
            elif member.isreg():
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                with open(target, "wb") as copy:
                    shutil.copyfileobj(stream, copy)
                target.chmod(0o755 if member.mode & 0o111 else 0o644)
                collection.add(member.name, target)
    if git("rev-parse", "--is-shallow-repository", root=root).strip() == "true":
        collection.left_out.append("the project's history: this clone is a shallow one")
        return
    branch = git("rev-parse", "--abbrev-ref", "HEAD", root=root).strip()
    names = ["HEAD"] if branch == "HEAD" else ["HEAD", branch]
    git("bundle", "create", "--quiet", str(stage / "project.gitbundle"), *names, root=root)
    collection.add(GIT_BUNDLE, stage / "project.gitbundle")


class Maker:
    """Brings together what a bundle holds. Needs the controller's environment, opening does not.

    Args:
        cache: the artefact cache.
        store: the wheelhouse's folder.
        machine: of the controller that will open the bundle.
        pythons: its Pythons.
        glibc: that of platform rows whose own is not known.
        without_torch: leave out the wheels that no lock names.
    """

    def __init__(
        self,
        cache: Path,
        store: Path,
        machine: str,
        pythons: Sequence[str],
        glibc: str | None,
        without_torch: bool,
    ) -> None:

        self.cache = fetch.Cache(cache)
        # apart, so that what is packed of the cache holds nothing that no device needs
        self.own_cache = fetch.Cache(self.cache.root / "controller")
        self.wheelhouse = wheelhouse.Wheelhouse(store)
        self.machine, self.pythons, self.glibc = machine, pythons, glibc
        self.without_torch = without_torch
        self.collection = Collection()
        self.tick = fetch.Ticker(detail, PROGRESS_SECONDS)
        self._own: dict[str, dict[str, Any]] = {}
        self._logins: set[str] = set()

    # -- the controller's own packages

    def controller_locks(self) -> list[tuple[Any, list[Any]]]:
        """Return (target, locked requirements) of each Python of the offline controller."""

        targets = [Target(self.machine, python, CONTROLLER_GLIBC) for python in self.pythons]
        return [
            (target, locks.read_lock(ROOT / "requirements" / f"py{target.python.replace('.', '')}.txt", target))
            for target in targets
        ]

    def fetch_controller(self, stage: Path) -> None:
        """Fetch the locked packages of the controller's Pythons, and note which Python has which."""

        for target, entries in self.controller_locks():
            tell(f"controller: {len(entries)} locked packages for Python {target.python} on {target.machine}")
            names = []
            for number, entry in enumerate(entries, start=1):
                self.tick(f"package {number} of {len(entries)}: {entry.name} {entry.version}")
                wheel = fetch.ensure_locked(entry, target, self.own_cache, self.tick)
                filename = Path(wheel.path).name
                self.collection.add(f"{CONTROLLER}/{filename}", Path(wheel.path), wheel.sha256)
                names.append(filename)
            # tools/bootstrap looks for this name
            note = f"py{target.python.replace('.', '')}-Linux-{target.machine}.txt"
            (stage / note).write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")
            self.collection.add(f"{CONTROLLER}/{note}", stage / note)

    # -- what platform rows need

    def target_of(self, row: Data) -> Any:
        """Return what the wheels of a row are for.

        Raises:
            Problem: nothing says the glibc.
        """

        known = {**lock.GLIBC, **MORE_GLIBC}
        glibc = self.glibc or known.get("cp" + str(row["python"]).replace(".", ""))
        if not glibc:
            raise Problem(
                f"platform {row['id']} with Python {row['python']}: no device is asked, and nothing says its glibc",
                "the glibc of its devices",
                "say it: BUNDLE_ARGS='--glibc 2.35' (on a device: getconf GNU_LIBC_VERSION)",
            )
        return Target(str(row["machine"]), str(row["python"]), glibc)

    def check_row(self, row: Data, settings: Data) -> list[Problem]:
        """Return every problem of a row that can be told before anything is fetched."""

        if row.get("unsupported"):
            return [Problem(f"platform {row['id']}", "a platform that is supported", str(row["unsupported"]))]
        try:
            target = self.target_of(row)
        except Problem as problem:
            return [problem]
        if self.without_torch:
            return []
        wheels, found = wishes.choose_wheels(row, settings)
        found = [*found, *wishes.check_wheels(wheels, target, settings, self.cache.root)]
        return [Problem(item["found"], item["expected"], item["next"]) for item in found]

    def fetch_row(self, row: Data, settings: Data) -> None:
        """Fetch what one platform row needs under some settings, and add it.

        Raises:
            Problem: something is not to be had.
        """

        target = self.target_of(row)
        tell(f"{row['id']}: what {target.describe()} gets")
        listing = wishes.lock_path(settings["torch_jetpack_lock"] or row["lock"])
        entries = locks.read_lock(listing, target)
        fetch.check_lock_fits(entries, target, str(listing))
        for number, entry in enumerate(entries, start=1):
            self.tick(f"wheel {number} of {len(entries)}: {entry.name} {entry.version}")
            wheel = fetch.ensure_locked(entry, target, self.cache, self.tick)
            self.add_cached(wheel.sha256, Path(wheel.path))
        for name in wishes.COMPONENTS:
            self.fetch_source(name, settings)
        if self.without_torch:
            self.collection.left_out.append(f"{row['id']}: torch and torchvision (--without-torch)")
            return
        for chosen in wishes.choose_wheels(row, settings)[0]:
            trust = bool(settings["torch_jetpack_trust_on_first_use"])
            wheel = fetch.ensure_wheel(chosen, self.cache, trust=trust, progress=self.tick)
            wheel_files.check_archive(wheel.path, target)
            if not chosen.get("path"):
                self.add_cached(wheel.sha256, Path(wheel.path))

    def fetch_source(self, name: str, settings: Data) -> None:
        """Fetch the source of a component."""

        version = str(settings[f"{name}_version"])
        self.tick(f"source of {name} {version}")
        source = settings[f"{name}_source"] or components.component(name, version).source or {}
        sources.prepare(name, version, settings[f"{name}_source"] or None, self.cache.root, self.tick)
        if "path" in set(keys_of(source)):
            return  # the user's own: note_settings packs it
        for part in parts_of(source):
            if part["kind"] == "index":
                self.add_cached(part["sha256"], self.cache.root / "files" / part["sha256"] / part["filename"])
            elif part["kind"] == "archive":
                self.add_cached(part["sha256"], self.cache.find(part["sha256"], fetch.filename_of(part["url"])))
            elif part["kind"] == "git":
                bare = sources.bare_name(part["url"])
                self.collection.add_folder(f"{CACHE}/git/{bare}", self.cache.root / "git" / bare)

    def add_cached(self, sha256: str, path: Path | None) -> None:
        """Add a verified file of the cache."""
        if path is not None:
            self.collection.add(f"{CACHE}/files/{sha256}/{path.name}", path, sha256)

    # -- the user's own files

    def own(self, path: Path, sha256: str | None = None) -> str:
        """Add a file or folder of the user's own; return its place, as recorded settings say it."""
        path = path.expanduser().absolute()
        if path.is_dir():
            name = f"{hashlib.sha256(str(path).encode()).hexdigest()[:12]}/{path.name}"
            self.collection.add_folder(f"{OWN}/{name}", path)
        else:
            digest = sha256 or sha256_file(str(path))
            if digest is None:
                raise Problem(f"there is no {path}", "the file that a setting names", "correct the setting")
            name = f"{digest[:12]}/{path.name}"
            self.collection.add(f"{OWN}/{name}", path, digest)
        return f"{OWN_MARK}/{name}"

    def note(self, setting: str, value: Any) -> None:
        """Record a setting as it must be where the bundle is opened, without users and passwords."""
        clean = without_userinfo(value)
        if clean != value:
            self._logins.add(setting)
        self._own.setdefault(setting, {})[json.dumps(clean, sort_keys=True)] = clean

    def note_settings(self, settings: Data, extra: Data) -> None:
        """Record every setting that names a file or a folder of this machine, and what -e has set."""
        for name in ("torch_jetpack_wheel", "torch_jetpack_torchvision"):
            if settings[name].get("path"):
                self.note(name, self.moved(settings[name], "path"))
        if "/" in settings["torch_jetpack_lock"]:
            self.note("torch_jetpack_lock", self.own(Path(settings["torch_jetpack_lock"])))
        for name in ("source_patches_root", "debian_packages_folder"):
            # a template can only be the role's own default: those of users were refused
            if settings.get(name) and "{{" not in settings[name]:
                self.note(name, self.own(Path(settings[name])))
        for name in wishes.COMPONENTS:
            source = settings[f"{name}_source"]
            if source and "path" in set(keys_of(source)):
                # packed by content: the same digest, hence the same build key, as the tree has
                archive = sources.prepare(name, str(settings[f"{name}_version"]), source, self.cache.root, self.tick)
                place = self.own(archive.path, archive.sha256)
                self.note(f"{name}_source", {"kind": "archive", "path": place, "sha256": archive.sha256})
        offers = settings.get("wheelhouse_sources") or []
        if any(is_local(value) for offer in offers for value in offer.values()):
            moved = [self.moved(offer, *(key for key, value in offer.items() if is_local(value))) for offer in offers]
            self.note("wheelhouse_sources", moved)
        rows = [self.moved_row(row) for row in settings["jetson_platform_rows"]]
        if rows != settings["jetson_platform_rows"]:
            self.note("jetson_platform_rows", rows)
        for name in extra:
            # nothing that is of this machine, and no password that -e gave to Ansible itself
            if name in settings and name not in self._own and name not in HERE_ONLY:
                self.note(name, settings[name])

    def moved(self, mapping: Data, *keys: str) -> Data:
        """Return a mapping whose paths lead to where the bundle is opened."""
        return {key: self.own(Path(value)) if key in keys else value for key, value in mapping.items()}

    def moved_row(self, row: Data) -> Data:
        """Return a platform row with the places that its own files will have."""
        moved = dict(row)
        for key in ("torch", "torchvision"):
            if (row.get(key) or {}).get("path") and not self.without_torch:
                moved[key] = self.moved(row[key], "path")
        if "/" in str(row.get("lock", "")):
            moved["lock"] = self.own(Path(row["lock"]))
        return moved

    def settle(self) -> None:
        """Keep the recorded settings that are the same for all hosts; the others are for the user to carry over."""
        for name, values in sorted(self._own.items()):
            if len(values) == 1:
                self.collection.settings[name] = next(iter(values.values()))
            else:
                self.collection.left_out.append(
                    f"the setting {name}: it differs between hosts; its files are in {OWN}/ for your inventory to name"
                )
        if self._logins:
            self.collection.left_out.append(
                f"users and passwords in {', '.join(sorted(self._logins))}: write them into ~/.netrc where it is opened"
            )

    # -- what lies in the cache

    def add_whole_cache(self, stage: Path) -> None:
        """Add every file of the cache: what a run with an inventory has fetched, and what is there beside it."""
        root = self.cache.root
        for path in sorted((root / "files").glob("*/*")):
            if not path.name.startswith(".") and not path.name.endswith(".verified"):
                self.tick(f"verifying {path.name}")
                found = self.cache.find(path.parent.name, path.name)
                if found is None:
                    self.collection.left_out.append(f"{path.name}: it was damaged in the cache, and was removed there")
                self.add_cached(path.parent.name, found)
        if (root / "git").is_dir():
            for bare in sorted((root / "git").glob("*.git")):
                self.collection.add_folder(f"{CACHE}/git/{bare.name}", bare)
        self.add_debian_packages(None, stage)
        self.add_trust(None, stage)

    def add_trust(self, urls: Iterable[str] | None, stage: Path) -> None:
        """Add the checksums that were accepted on first use: all, or those of some URLs."""
        known = self.cache.read_trust()
        wanted = sorted(known if urls is None else {without_userinfo(url) for url in urls} & set(known))
        if wanted:
            text = json.dumps({"schema": 1, "files": {url: known[url] for url in wanted}}, indent=2, sort_keys=True)
            (stage / "trust.json").write_text(text + "\n", encoding="utf-8")
            self.collection.add(f"{CACHE}/trust.json", stage / "trust.json")

    def add_debian_packages(self, machines: Iterable[str] | None, stage: Path) -> int:
        """Add the locks of Debian packages and what they name, for some machines or all; return how many locks."""
        names = {"aarch64": "arm64", "x86_64": "amd64"}
        wanted = None if machines is None else {names.get(machine, machine) for machine in machines}
        folder, count = self.cache.root / "debs", 0
        for listing in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            try:
                data = json.loads(listing.read_text(encoding="utf-8"))
            except ValueError as error:
                self.collection.left_out.append(f"{listing}: it cannot be read ({error})")
                continue
            architectures = set(values_of(data, "architecture")) - {"all"}
            if wanted is not None and architectures and not architectures & wanted:
                continue
            count += 1
            if without_userinfo(data) != data:  # a device's own apt sources may name a password
                copy = stage / "debs" / listing.name
                copy.parent.mkdir(exist_ok=True)
                copy.write_text(json.dumps(without_userinfo(data), indent=2, sort_keys=True) + "\n", encoding="utf-8")
                self.collection.add(f"{CACHE}/debs/{listing.name}", copy)
            else:
                self.collection.add(f"{CACHE}/debs/{listing.name}", listing)
            for digest in sorted(set(values_of(data, "sha256"))):
                for place in (self.cache.root / "files" / digest, folder / digest):
                    for path in sorted(place.glob("*")) if place.is_dir() else []:
                        if path.is_file() and path.suffix != ".verified" and not path.name.startswith("."):
                            inside = path.relative_to(self.cache.root).as_posix()
                            self.collection.add(f"{CACHE}/{inside}", path, digest)
        return count

    def add_wheelhouse(self, stage: Path, classes: Sequence[str] | None) -> int:
        """Add the wheels that were built for platform classes (patterns), or all; return how many."""
        count = 0
        for class_id in self.wheelhouse.classes():
            if classes is not None and not any(fnmatch.fnmatchcase(class_id, pattern) for pattern in classes):
                continue
            rows = {}
            for key, row in sorted(self.wheelhouse.manifest(class_id).items()):
                # a damaged row may lack its file name: look() says what is wrong with it
                name = row.get("filename") or f"the wheel {key[:12]} of class {class_id}"
                self.tick(f"verifying {name}")
                look = self.wheelhouse.look(class_id, key)
                if look.path is None:
                    self.collection.left_out.append(f"{name} of the wheelhouse: {look.fault}")
                    continue
                rows[key] = row
                for path in (look.path, look.path.parent / "build.log"):
                    if path.is_file():
                        inside = path.relative_to(self.wheelhouse.root).as_posix()
                        self.collection.add(f"{WHEELHOUSE}/{inside}", path)
            if rows:
                listed = {"schema": wheelhouse.SCHEMA, "class_id": class_id, "wheels": without_userinfo(rows)}
                text = json.dumps(listed, sort_keys=True)
                copy = stage / f"{class_id}.json"
                copy.write_text(text + "\n", encoding="utf-8")
                self.collection.add(f"{WHEELHOUSE}/{class_id}/manifest.json", copy)
            count += len(rows)
        return count

    def class_pattern(self, row: Data, settings: Data) -> str:
        """Return a pattern of the platform classes of a row: no survey says the glibc."""

        wheels = wishes.choose_wheels(row, settings)[0]
        torch = next((wheel["version"] for wheel in wheels if wheel["name"] == "torch"), "none")
        cuda = plan.wanted_cuda(row, settings)
        return plan.class_id(row, {"glibc": "*"}, versions.pip_spelling(torch), cuda)

    # -- room

    def absent_bytes(self, wanted: Sequence[tuple[Data, Data]]) -> tuple[int, int]:
        """Return (bytes to fetch, bytes of everything) for rows with their settings, as far as they can be told."""

        sizes: dict[str, tuple[int, int]] = {}
        for target, entries in self.controller_locks():
            for entry in entries:
                found = fetch.find_locked(entry, self.own_cache)
                size = found.size if found else CONTROLLER_WHEEL_BYTES
                sizes[f"{entry.name} {entry.version} {target.python}"] = (0 if found else size, size)
        for row, settings in wanted:
            listing = wishes.lock_path(settings["torch_jetpack_lock"] or row["lock"])
            for entry in locks.read_lock(listing, self.target_of(row)):
                found = fetch.find_locked(entry, self.cache)
                size = found.size if found else entry.size or CONTROLLER_WHEEL_BYTES
                sizes[entry.hashes[0]] = (0 if found else size, size)
            for chosen in [] if self.without_torch else wishes.choose_wheels(row, settings)[0]:
                found = fetch.find_wheel(chosen, self.cache)
                size = found.size if found else wishes.UNFETCHED_MB.get(chosen["name"], 0) << 20
                sizes[str(chosen.get("url") or chosen["path"])] = (0 if found else size, size)
            sizes.update({f"source of {name}": (SOURCE_BYTES, SOURCE_BYTES) for name in wishes.COMPONENTS})
        return sum(size for size, _all in sizes.values()), sum(size for _absent, size in sizes.values())


def is_local(value: Any) -> bool:
    """Return whether a source of wheels is a folder of this machine."""
    return isinstance(value, str) and "://" not in value


def keys_of(value: Any) -> Iterator[str]:
    """Yield every key in nested data."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def values_of(value: Any, wanted: str) -> Iterator[str]:
    """Yield every text that stands under a key in nested data."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == wanted and isinstance(inner, str):
                yield inner
            else:
                yield from values_of(inner, wanted)
    elif isinstance(value, list):
        for inner in value:
            yield from values_of(inner, wanted)


def parts_of(source: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the simple sources that a source consists of."""
    if source["kind"] == "compose":
        yield from parts_of(source["base"])
        for addition in source["add"]:
            yield from parts_of(addition["from"])
    else:
        yield source


# ---------------------------------------------------------------- settings


VAULT_WORDS = ("--vault-id", "--vault-password-file", "--vault-pass-file")


def split_args(args: str) -> tuple[list[str], list[str], list[str]]:
    """Return words of ansible-playbook as (values of -e, words about the vault, other words)."""
    values, vault, others = [], [], []
    words = shlex.split(args)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in ("-e", "--extra-vars") and words:
            values.append(words.pop(0))
        elif name == "--extra-vars" and equals:
            values.append(value)
        elif word.startswith("-e") and len(word) > 2:
            values.append(word[2:])
        elif word in VAULT_WORDS and words:
            vault += [word, words.pop(0)]
        elif name in VAULT_WORDS or word in ("-J", "--ask-vault-pass", "--ask-vault-password"):
            vault.append(word)
        else:
            others.append(word)
    return values, vault, others


def read_extra(values: Iterable[str]) -> Data:
    """Return the variables that values of -e set: name=value, JSON or YAML, @file.

    Raises:
        Problem: there is no such file, or it holds no variables.
    """
    found: Data = {}
    for value in values:
        try:
            text = Path(value[1:]).expanduser().read_text(encoding="utf-8") if value.startswith("@") else value
            if value[:1] in ("@", "{", "["):
                found.update(yaml.safe_load(text) or {})
            else:
                pairs = (pair.partition("=") for pair in shlex.split(text))
                found.update({name: given for name, _equals, given in pairs})
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise Problem(
                f"-e {value}: {error}", "name=value, JSON, YAML, or @FILE with variables", "correct ARGS"
            ) from error
    return found


def host_variables(inventory: str, vault: Sequence[str]) -> dict[str, Data]:
    """Return {host: its variables} of the hosts that the playbooks work on."""
    user = provision.Provisioner(inventory=inventory).user_inventory()
    command = [provision.tool("ansible-inventory"), "-i", user, "--list", *vault]
    done = subprocess.run(
        command, cwd=ROOT, env=provision.environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise Problem(
            f"ansible-inventory -i {inventory} ended with status {done.returncode}",
            "an inventory that Ansible reads",
            "correct what it says above",
        )
    listing = json.loads(done.stdout)
    variables: dict[str, Data] = listing.pop("_meta", {}).get("hostvars", {})
    chosen = group_hosts(listing, "jetsons") if "jetsons" in listing else set()
    return {host: values for host, values in sorted(variables.items()) if not chosen or host in chosen}


def group_hosts(listing: Mapping[str, Any], group: str) -> set[str]:
    """Return the hosts of a group and of those below it."""
    row = listing.get(group, {})
    return set(row.get("hosts", [])).union(*(group_hosts(listing, child) for child in row.get("children", [])))


def effective_settings(hosts: Mapping[str, Data], extra: Data, templates: list[str] | None = None) -> list[Data]:
    """Return the different settings of hosts: the roles' defaults, then the inventory, then -e.

    Args:
        hosts: {host: its variables}; none for the settings without an inventory.
        extra: variables that beat those.
        templates: takes the names of settings that only Ansible can work out; without it they are problems.

    Raises:
        Refused: values that no role takes.
    """

    specs = checks.read_role_specs(ROOT / "roles")
    problems: dict[str, Problem] = {}
    found: dict[str, Data] = {}
    for host, variables in (hosts or {"": {}}).items():
        settings: Data = {}
        for role, options in specs.items():
            defaults = yaml.safe_load((ROOT / "roles" / role / "defaults" / "main.yml").read_text(encoding="utf-8"))
            # a default that is a template is no file of the user's
            values = {name: value for name, value in (defaults or {}).items() if "{{" not in str(value)}
            given = {name: value for name, value in {**variables, **extra}.items() if name in options}
            for name in [name for name, value in given.items() if "{{" in json.dumps(value, default=str)]:
                if templates is not None:
                    templates.append(name)
                    del given[name]
                    continue
                problems[name] = Problem(
                    f"{name}{f' of {host}' if host else ''} is a template",
                    "a plain value: for PLATFORMS the inventory is read as it stands",
                    "write the value out, or let Ansible work it out: INVENTORY without PLATFORMS",
                )
            checked = ArgumentSpecValidator(options).validate({**values, **given})
            for message in checked.error_messages:
                # a default that was left out above is no mistake of the user's
                if not message.startswith("missing required"):
                    problems[message] = Problem(
                        f"role {role}: {message}", "a value as the role describes it", "correct it where it is set"
                    )
            settings.update(checked.validated_parameters)
        wrong = checks.check_rows(settings["jetson_platform_rows"], "jetson_platform_rows")
        wrong += checks.check_values(settings) if not problems else []
        problems.update({item["found"]: Problem(item["found"], item["expected"], item["next"]) for item in wrong})
        found[json.dumps(settings, sort_keys=True, default=str)] = settings
    if problems:
        raise Refused(list(problems.values()))
    return list(found.values())


def choose_rows(ids: Sequence[str], settings: Sequence[Data]) -> list[tuple[Data, Data]]:
    """Return (row, settings) for every named platform, the user's rows before the project's own.

    Raises:
        Problem: an id that no row has.
    """

    chosen: list[tuple[Data, Data]] = []
    known: list[str] = []
    for one in settings:
        rows = {row["id"]: row for row in reversed([*one["jetson_platform_rows"], *wishes.read_platforms()])}
        known += [name for name in reversed(list(rows)) if name not in known]
        chosen += [(rows[name], one) for name in dict.fromkeys(ids) if name in rows]
    for name in ids:
        if name not in known:
            raise Problem(
                f"there is no platform {name}{checks.suggest(name, known)}",
                f"ids of platform rows: {', '.join(known)}",
                "correct PLATFORMS; rows of your own (jetson_platform_rows) are found with INVENTORY=…",
            )
    return chosen


# ---------------------------------------------------------------- the command


def do_make(options: argparse.Namespace) -> Path:
    """Make a bundle as the command line says; return its path."""
    ids, pythons = shlex.split(options.platforms), shlex.split(options.pythons)
    check_pythons(pythons)
    values, vault, others = split_args(options.args)
    if ids and others:
        raise Problem(f"ARGS has {' '.join(others)}", "-e alone: no playbook is run for PLATFORMS", "leave it out")
    extra = read_extra(values)
    if options.trust_on_first_use:
        extra["torch_jetpack_trust_on_first_use"] = True
    if not ids and not options.inventory:
        raise Problem(
            "neither PLATFORMS nor INVENTORY",
            "what the bundle is for",
            "make bundle PLATFORMS='…' with ids out of: "
            + ", ".join(row["id"] for row in wishes.read_platforms() if not row.get("unsupported"))
            + "; or make bundle INVENTORY=jetsons.ini",
        )
    commit = git("rev-parse", "--verify", "HEAD").strip()
    dirty = uncommitted()
    if dirty:
        tell(f"not committed, so left out of the bundle: {', '.join(dirty[:8])}" + (" …" if len(dirty) > 8 else ""))
    hosts = host_variables(options.inventory, vault) if options.inventory else {}
    templates: list[str] = []
    settings = effective_settings(hosts, extra, None if ids else templates)
    wanted = choose_rows(ids, settings)
    cache = folder_of(options.cache, settings, "jetson_platform_cache", Path(DEFAULT_CACHE))
    store = folder_of(options.wheelhouse, settings, "wheelhouse_path", wheelhouse.default_root(ROOT))
    maker = Maker(cache, store, options.machine, pythons, options.glibc, options.without_torch)
    problems = {problem.found: problem for row, one in wanted for problem in maker.check_row(row, one)}
    if problems:
        raise Refused(list(problems.values()))
    options.output.mkdir(parents=True, exist_ok=True)
    absent, whole = maker.absent_bytes(wanted)
    more = "" if wanted else "; and what the devices need, which the survey will tell"
    tell(f"about {in_words(absent)} to fetch into {maker.cache.root}, a bundle of about {in_words(whole)}{more}")
    check_room([(maker.cache.root, absent, "downloads"), (options.output, whole, "the bundle")])
    for name in sorted(set(templates)):
        maker.collection.left_out.append(
            f"the setting {name}: it is a template; a file that it names is yours to carry"
        )
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=options.output) as folder:
        stage = Path(folder)
        gather(maker, wanted, settings, extra, options, stage)
        return pack(maker, options, ids, commit, dirty, stage)


def gather(
    maker: Maker,
    wanted: Sequence[tuple[Data, Data]],
    settings: Sequence[Data],
    extra: Data,
    options: argparse.Namespace,
    stage: Path,
) -> None:
    """Fetch and collect everything; all that cannot be had is said at once.

    Raises:
        Refused: something cannot be had.
    """
    problems: dict[str, Problem] = {}
    collect_project(maker.collection, stage)
    steps: list[Callable[[], None]] = [lambda: maker.fetch_controller(stage)]
    steps += [lambda row=row, one=one: maker.fetch_row(row, one) for row, one in wanted]  # type: ignore[misc]
    if options.inventory and not wanted:
        steps.append(lambda: run_fetch_playbook(options))
    for step in steps:
        try:
            step()
        except Problem as problem:
            problems[problem.found] = problem
    if problems:
        raise Refused(list(problems.values()))
    for one in settings:
        maker.note_settings(one, extra)
    maker.settle()
    if options.inventory and not wanted:
        maker.add_whole_cache(stage)
        wheels = maker.add_wheelhouse(stage, None)
    else:
        chosen = [wheel for row, one in wanted for wheel in wishes.choose_wheels(row, one)[0]]
        maker.add_trust([wheel["url"] for wheel in chosen if wheel.get("url")], stage)
        if not maker.add_debian_packages({row["machine"] for row, _one in wanted}, stage):
            maker.collection.left_out.append(
                "Debian packages: which ones a device lacks only the device can say (INVENTORY without PLATFORMS)"
            )
        wheels = maker.add_wheelhouse(stage, [maker.class_pattern(row, one) for row, one in wanted])
    tell(f"wheelhouse: {wheels} wheels that were built already" + ("" if wheels else "; the devices will build"))


def run_fetch_playbook(options: argparse.Namespace) -> None:
    """Let Ansible survey the devices and fetch what their plans need."""

    if not (ROOT / "playbooks" / "fetch.yml").is_file():
        raise Problem("there is no playbooks/fetch.yml", "the project as it was committed", "git checkout -- playbooks")
    argv = [provision.tool("ansible-playbook"), "playbooks/fetch.yml", "-i", options.inventory]
    argv += shlex.split(options.args)
    if options.trust_on_first_use:
        argv += ["-e", "torch_jetpack_trust_on_first_use=true"]
    folders = {"jetson_platform_cache": options.cache, "wheelhouse_path": options.wheelhouse}
    given = {name: str(folder.expanduser().absolute()) for name, folder in folders.items() if folder}
    if given:
        argv += ["-e", json.dumps(given)]
    tell(without_passwords("$ " + shlex.join(provision.shorten(word) for word in argv)))
    status, _output = provision.execute(argv, provision.environment(), False)
    if status:
        raise Problem(
            f"playbooks/fetch.yml ended with status {status}",
            "everything fetched that the devices need",
            "correct what it says above, then the same command again: what was fetched is kept",
        )


def pack(
    maker: Maker, options: argparse.Namespace, ids: Sequence[str], commit: str, dirty: Sequence[str], stage: Path
) -> Path:
    """Write the bundle; return its path."""
    entries = maker.collection.sorted()
    size = total(entries)
    check_room([(options.output, size + len(entries) * 1536 + BLOCK, "the bundle")])
    left_out = without_passwords([*maker.collection.left_out, *(f"not committed: {name}" for name in dirty)])
    manifest = {
        "schema": SCHEMA,
        "project": TOP,
        "commit": commit,
        "made_at": now(),
        "made_for": {
            "platforms": list(ids),
            "inventory": bool(options.inventory),
            "pythons": list(maker.pythons),
            "machine": maker.machine,
            "glibc": CONTROLLER_GLIBC,
        },
        "settings": maker.collection.settings,
        "left_out": left_out,
    }
    target = options.output / f"{TOP}-{time.strftime('%Y%m%d', time.gmtime())}-{commit[:8]}.tar"
    tell(f"packing {len(entries)} files, {in_words(size)}")
    mtime = int(git("log", "-1", "--format=%ct", commit))
    digest = write_bundle(target, manifest, entries, mtime)
    tell(f"{os.path.relpath(target)}: {in_words(target.stat().st_size)}, sha256 {digest}")
    for line in without_passwords(maker.collection.left_out):
        detail(f"left out: {line}")
    detail("your inventory and your keys are not in it: carry them yourself")
    detail(f"there: sha256sum -c {target.name}.sha256 && tar xf {target.name} && cd {TOP} && make open")
    return target


def folder_of(given: Path | None, settings: Sequence[Data], name: str, default: Path) -> Path:
    """Return a folder: the option's, the one that all hosts set, or the default.

    Raises:
        Problem: hosts set different ones.
    """
    values = {str(one.get(name) or "") for one in settings}
    if given is None and len(values) > 1:
        raise Problem(f"{name} differs between hosts", "one folder", f"name it: --{name.rsplit('_', 1)[-1]} FOLDER")
    chosen = given or Path(values.pop() or default)
    return chosen.expanduser().absolute()


def check_pythons(pythons: Sequence[str]) -> None:
    """Raise a Problem for a Python that no lock exists for."""
    wrong = [python for python in pythons if python not in SUPPORTED]
    if wrong or not pythons:
        raise Problem(
            f"PYTHONS has {', '.join(wrong) or 'nothing'}",
            f"some of {', '.join(SUPPORTED)}: the controller's own, where the bundle will be opened",
            "make bundle PYTHONS='3.10 3.12' …",
        )
