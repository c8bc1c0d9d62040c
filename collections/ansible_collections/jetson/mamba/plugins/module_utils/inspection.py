"""Judge what a wheel, or what is already installed, really holds. No wheel is trusted for its name.

Reading and judging are apart. The facts are plain data, read by the standard library on a device and by pyelftools on
the controller, and one function judges both:

    filename, tags, record      of a wheel only: its own name, the tags of its WHEEL file, what RECORD disagrees with
    name, version               of METADATA
    members                     names of all files of a wheel
    libraries                   {path: {machine, needed, soname, runpath, glibc, cxx11, archs, fault}}; archs is
                                {GPU: {cubins, ptx, bytes}}, fault says why a library could not be read, or is None
"""

from __future__ import annotations

import base64
import csv
import errno
import glob
import hashlib
import io
import os
import re
import struct
import tempfile
import zipfile
import zlib
from typing import Any, BinaryIO, Callable, Collection, Dict, Iterable, List, Mapping, NamedTuple, Optional, Set, Tuple

from ansible_collections.jetson.mamba.plugins.module_utils import elf, fatbin, records, versions
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

# what every torch brings in its own folder lib/
TORCH_LIBRARIES = frozenset(
    f"lib{name}.so"
    for name in ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python", "torch_global_deps", "shm")
)
# of the C library, the compiler's runtime and the dynamic linker: there wherever Python and a C++ program run
_RUNTIME = re.compile(
    r"(lib(c|m|dl|pthread|rt|util|resolv|anl|gcc_s|stdc\+\+)\.so\.\d+|ld-linux[\w.-]*\.so\.\d+|linux-vdso\.so\.\d+)\Z"
)
# of an extension's file name, what stands between the module and .so; t: an interpreter without the global lock
_EXTENSION = re.compile(r"(?:cpython-(?P<python>\d{2,4}t?)[a-su-z]*(?:-(?P<platform>[\w-]+))?|abi3)\Z")
_TRAP = (
    "this is a ready-made {} wheel under another name: without *_FORCE_BUILD=TRUE (exactly TRUE) setup.py downloads "
    "one instead of compiling, and renames it. Build it on a device of this class with *_FORCE_BUILD=TRUE, or take "
    "another file"
)
_CURE = "build it on a device of this class with *_FORCE_BUILD=TRUE, or take the file that was made for this class"
_REFETCH = "fetch it again from where it came, or build it again"
_HASHES = ("sha256", "sha384", "sha512")
# headers of a wheel are some kilobytes, RECORD of the largest some megabytes; libraries are packed to a third at best
_TEXT_LIMIT = 64 << 20
_LARGEST_RATIO = 50
_BLOCK = 1 << 20
# what a damaged or hostile archive makes zipfile raise
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, KeyError, ValueError, MemoryError,
)


class Expectation(NamedTuple):
    """What a binary must be. But for the machine, an empty string or None leaves that part unjudged.

    Args:
        machine: as `uname -m` names it.
        python: major.minor, such as "3.10".
        glibc: of the class, such as "2.35": the newest that may be asked for.
        sm: the GPU's number ("87"), or "cpu" where no GPU code may be held.
        component: such as causal_conv1d.
        version: of the component. A wheel's local part (+cu126) is no difference where none is asked for.
        modules: extension modules that it must hold.
        cxx11: whether torch was compiled with the C++11 std::string.
    """

    machine: str
    python: str
    glibc: str
    sm: str
    component: str
    version: str
    modules: Tuple[str, ...] = ()
    cxx11: Optional[bool] = None


class Verdict(NamedTuple):
    """What judge() finds.

    Args:
        errors: {found, expected, next} each, the weightiest first; `reason` is `found` without the wheel's name.
        warnings: one line each.
        needed: sonames that the device's linker must find, sorted.
    """

    errors: List[Dict[str, str]]
    warnings: List[str]
    needed: List[str]


# ---------------------------------------------------------------- reading


def read_elf(path: str) -> Dict[str, Any]:
    """Return what a library on disk is (see the module's head); damage is told in `fault`."""
    return library_facts(path, elf.read_facts)


def library_facts(path: str, read: Callable[[str], Dict[str, Any]]) -> Dict[str, Any]:
    """Return what a library on disk is.

    Args:
        path: of the library.
        read: what reads an ELF file, as elf.read_facts does.
    """
    facts: Dict[str, Any] = {
        "machine": elf.machine_of(path),
        "needed": [],
        "soname": None,
        "runpath": [],
        "glibc": None,
        "cxx11": None,
        "archs": {},
        "fault": None,
    }
    try:
        found = read(path)
        facts["archs"] = fatbin.read_library(path, found) if found["machine"] else {}
        facts.update({key: value for key, value in found.items() if key != "fatbins"})
    except (ValueError, OSError, struct.error) as error:
        facts["fault"] = str(error)
    return facts


def read_metadata(archive: zipfile.ZipFile) -> Tuple[str, str, List[str], str]:
    """Return (name, version, tags, .dist-info folder) of a wheel.

    Raises:
        KeyError: WHEEL or METADATA is missing.
        ValueError: it says several things about itself.
    """
    infos = [name for name in archive.namelist() if name.count("/") == 1 and ".dist-info/" in name]
    folders = {name.split("/")[0] for name in infos}
    if len(folders) > 1:
        raise ValueError("it has several .dist-info folders")
    wheel = _headers(archive, infos, "WHEEL")
    metadata = _headers(archive, infos, "METADATA")
    return (
        next((value for key, value in metadata if key == "name"), ""),
        next((value for key, value in metadata if key == "version"), ""),
        [value for key, value in wheel if key == "tag"],
        folders.pop(),
    )


def _headers(archive: zipfile.ZipFile, names: Iterable[str], which: str) -> List[Tuple[str, str]]:
    """Return the header lines of a wheel's metadata file, keys in lower case."""
    member = next((name for name in names if name.endswith("/" + which)), None)
    if member is None:
        raise KeyError(which + " is missing")
    rows = []
    for line in _read_text(archive, member).splitlines():
        if not line.strip():
            break
        key, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            rows.append((key.strip().lower(), value.strip()))
    return rows


def _read_text(archive: zipfile.ZipFile, name: str) -> str:
    with archive.open(name) as member:
        data = member.read(_TEXT_LIMIT + 1)
    if len(data) > _TEXT_LIMIT:
        raise ValueError(f"{name} has more than {_TEXT_LIMIT >> 20} MB")
    return data.decode("utf-8", "replace")


def read_wheel(
    path: str, read: Callable[[str], Dict[str, Any]] = elf.read_facts, folder: Optional[str] = None
) -> Dict[str, Any]:
    """Return the facts of a wheel, every member read once.

    Args:
        path: the wheel.
        read: what reads an ELF file, as elf.read_facts does.
        folder: where libraries are unpacked to, one at a time (None: the system's temporary folder).

    Raises:
        Problem: it is no whole wheel.
    """
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(prefix="inspect-", dir=folder) as place:
            _refuse_bomb(archive, os.path.getsize(path))
            name, version, tags, info = read_metadata(archive)
            libraries: Dict[str, Dict[str, Any]] = {}
            digests: Dict[str, Dict[str, str]] = {}
            damage: List[str] = []
            record = _read_record(archive, info + "/RECORD", damage)
            for member in archive.infolist():
                if member.filename.endswith("/"):
                    continue
                if member.filename in digests:
                    damage.append(f"{member.filename}: the archive holds it twice")
                    continue
                if member.filename.startswith("/") or ".." in member.filename.split("/"):
                    damage.append(f"{member.filename}: leads out of the site folder")
                wanted = record.get(member.filename, ("", ""))[0].partition("=")[0]
                kinds = {"sha256", wanted} if wanted in _HASHES else {"sha256"}
                named = elf.is_library_name(os.path.basename(member.filename))
                copy = os.path.join(place, "library.so")
                with archive.open(member) as stream:
                    digests[member.filename] = _consume(stream, kinds, copy, named)
                if os.path.exists(copy):
                    facts = library_facts(copy, read)
                    os.unlink(copy)
                    libraries[member.filename] = facts
            _compare(record, digests, info, damage)
    except ARCHIVE_ERRORS as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Problem(
                f"no room to unpack the libraries of {path}, one at a time",
                f"free space for its largest library in {folder or tempfile.gettempdir()}",
                "make room there, or set TMPDIR to a folder on another disk",
            ) from error
        raise Problem(
            f"{os.path.basename(path)} is no whole wheel: {_words(error)}",
            "a zip archive with WHEEL, METADATA and RECORD",
            _REFETCH,
        ) from error
    return {
        "filename": os.path.basename(path),
        "name": name,
        "version": version,
        "tags": tags,
        "members": sorted(digests),
        "libraries": libraries,
        "record": damage,
    }


def _refuse_bomb(archive: zipfile.ZipFile, size: int) -> None:
    """Raise a ValueError for what no wheel is: packed beyond belief, or in a way that wheels are not."""
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > _TEXT_LIMIT + _LARGEST_RATIO * size:
        raise ValueError(f"it claims {total >> 20} MB in {size >> 20} MB")
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename} is packed by the method {member.compress_type}, which no wheel uses")


def _words(error: BaseException) -> str:
    """Return what an exception says, without the quotes of a KeyError."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__


def _consume(stream: Any, kinds: Iterable[str], copy: str, named: bool) -> Dict[str, str]:
    """Return the hashes of a member, as RECORD spells them.

    A library by its name, or by its first bytes, whatever its name is, is written to the file `copy`.
    """
    digests = {kind: hashlib.new(kind) for kind in kinds}
    output: Optional[BinaryIO] = None
    first = True
    try:
        for block in iter(lambda: stream.read(_BLOCK), b""):
            if first and (named or elf.machine_of_header(block[: elf.HEADER_BYTES])):
                output = open(copy, "wb")  # noqa: SIM115 - only some members are written
            first = False
            for digest in digests.values():
                digest.update(block)
            if output:
                output.write(block)
    finally:
        if output:
            output.close()
    return {kind: base64.urlsafe_b64encode(one.digest()).rstrip(b"=").decode("ascii") for kind, one in digests.items()}


def _read_record(archive: zipfile.ZipFile, name: str, damage: List[str]) -> Dict[str, Tuple[str, str]]:
    """Return RECORD as {path: (hash, size)}."""
    if name not in archive.namelist():
        damage.append("RECORD is missing")
        return {}
    found = {}
    try:
        for row in csv.reader(io.StringIO(_read_text(archive, name), newline="")):
            if len(row) == 3:
                found[row[0]] = (row[1], row[2])
            elif row:
                damage.append("RECORD has a line that is not path,hash,size: {}".format(",".join(row)[:80]))
    except csv.Error as error:
        damage.append(f"RECORD cannot be read: {error}")
    return found


def _compare(
    record: Mapping[str, Tuple[str, str]], digests: Mapping[str, Mapping[str, str]], info: str, damage: List[str]
) -> None:
    """Note what RECORD and the members say differently."""
    if damage and "RECORD is missing" in damage:
        return
    # a file cannot hold its own hash, and signatures came after it
    unhashed = {f"{info}/RECORD{ending}" for ending in ("", ".jws", ".p7s")}
    for name, found in sorted(digests.items()):
        if name in unhashed:
            continue
        if name not in record:
            damage.append(f"{name} is not in RECORD")
            continue
        kind, _equals, value = record[name][0].partition("=")
        if kind not in _HASHES:
            damage.append(f"{name} has no hash in RECORD that can be trusted ({kind or 'none'})")
        elif found[kind] != value.rstrip("="):
            damage.append(f"{name} differs from its RECORD hash")
    damage += [f"{name} is in RECORD, not in the wheel" for name in sorted(set(record) - set(digests) - unhashed)]


def read_installed(site_packages: str, package: str, modules: Iterable[str]) -> Optional[Dict[str, Any]]:
    """Return the facts of an installed package, or None where nothing of it is there.

    Whether its files are those of RECORD is surveyed by module_utils/records.py.

    Args:
        site_packages: the site folder.
        package: its name.
        modules: its extension modules, found beside what RECORD names.
    """
    name, version, present = package, "", False
    paths: Set[str] = set()
    for info in glob.glob(os.path.join(glob.escape(site_packages), "*.dist-info")):
        stem, _dash, found = os.path.basename(info)[: -len(".dist-info")].partition("-")
        if records.canonical_name(stem) == records.canonical_name(package):
            present, name, version = True, stem, found
            paths.update(entry[0] for entry in records.read_entries(info) or [])
    libraries = {path for path in paths if elf.is_library_name(os.path.basename(path))}
    for module in modules:
        for path in glob.glob(os.path.join(glob.escape(site_packages), glob.escape(module) + ".*so")):
            libraries.add(os.path.basename(path))
    # what RECORD names and is not there is damage, which is surveyed elsewhere
    there = sorted(path for path in libraries if os.path.isfile(os.path.join(site_packages, path)))
    if not present and not there:
        return None
    return {
        "name": name,
        "version": version,
        "libraries": {path: read_elf(os.path.join(site_packages, path)) for path in there},
    }


# ---------------------------------------------------------------- judging


def judge(
    facts: Mapping[str, Any], expectation: Expectation, provided: Optional[Collection[str]] = None
) -> Verdict:
    """Return everything that is wrong, costly or needed.

    Args:
        facts: of a wheel or of an installed package; parts that they do not speak of are not judged.
        expectation: what it must be.
        provided: sonames that the environment brings (torch's own lib folder); None for those of every torch.
    """
    bench = _Bench(facts, expectation)
    bench.judge_machine()
    bench.judge_tags()
    bench.judge_identity()
    bench.judge_record()
    bench.judge_members()
    bench.judge_libraries()
    bench.judge_gpu_code()
    libraries = facts.get("libraries", {})
    brought = set(TORCH_LIBRARIES if provided is None else provided)
    brought.update(os.path.basename(path) for path in libraries)
    brought.update(one["soname"] for one in libraries.values() if one["soname"])
    wanted = {soname for one in libraries.values() for soname in one["needed"]}
    needed = sorted(soname for soname in wanted - brought if not _RUNTIME.match(soname))
    return Verdict(bench.errors, bench.warnings, needed)


def judge_installed(facts: Mapping[str, Any], expectation: Expectation) -> Optional[str]:
    """Return in one line why an installed package must be installed anew, or None where it is right.

    Args:
        facts: of one package, as the survey reports them under `inspection`; of an empty one nothing is judged.
        expectation: what it must be.
    """
    errors = judge(facts, expectation).errors
    return errors[0]["reason"] if errors else None


def foreign_wheel(filename: str, tags: Iterable[str], libraries: Mapping[str, str], machine: str) -> Optional[Problem]:
    """Return what to say about a wheel that holds another machine's code or says so itself, or None.

    Args:
        filename: of the wheel.
        tags: of its WHEEL file.
        libraries: {path: machine}.
        machine: what it must be for.
    """
    facts = {
        "filename": filename,
        "tags": list(tags),
        "libraries": {path: {"machine": found} for path, found in libraries.items()},
    }
    bench = _Bench(facts, Expectation(machine, "", "", "", "", ""))
    bench.judge_machine()
    for error in bench.errors:
        return Problem(error["found"], error["expected"], error["next"])
    return None


def name_gpu(number: str) -> str:
    """Return a GPU's number as CUDA writes it ("87" -> "sm_87")."""
    return "sm_" + number


def _is_for(code: str, sm: str) -> bool:
    """Return whether a cubin runs on a GPU. The number must be the same: Jetsons run no other GPU's cubins."""
    return code.rstrip("af") == sm.rstrip("af")


class _Bench:
    """Collects what is said about one wheel or package."""

    def __init__(self, facts: Mapping[str, Any], expectation: Expectation) -> None:
        self.facts = facts
        self.wish = expectation
        self.errors: List[Dict[str, str]] = []
        self.warnings: List[str] = []
        self.libraries: Mapping[str, Mapping[str, Any]] = facts.get("libraries", {})

    def refuse(self, reason: str, expected: str, next_step: str) -> None:
        """Note an error."""
        filename = self.facts.get("filename")
        found = f"{filename}: {reason}" if filename else reason
        self.errors.append({"found": found, "expected": expected, "next": next_step, "reason": reason})

    def judge_machine(self) -> None:
        """Every library is for the machine, and so the wheel says itself."""
        machine = self.wish.machine
        foreign = {
            path: str(one["machine"])
            for path, one in sorted(self.libraries.items())
            if one["machine"] not in (None, machine)
        }
        platforms = [tag.rpartition("-")[2] for tag in self.facts.get("tags", [])]
        others = [name for name in platforms if name != "any" and not name.endswith("_" + machine)]
        lies = bool(others) and len(others) == len(platforms)
        if not foreign and not lies:
            return
        parts = ["its WHEEL file says {}".format(", ".join(self.facts["tags"]))] if lies else []
        parts += [f"{path} is for {foreign[path]}, not for {machine}" for path in list(foreign)[:1]]
        if len(foreign) > 1:
            parts[-1] += f" (and {len(foreign) - 1} more)"
        if not lies and "tags" not in self.facts:
            next_step = "install it anew"
        elif not self._is_named_for(machine) or any(kind.startswith(machine + " ") for kind in foreign.values()):
            next_step = _CURE
        else:
            kind = next(iter(foreign.values()), None) or re.sub(r"^[a-z]+(_\d+_\d+|\d+)?_", "", others[0])
            next_step = _TRAP.format(kind.replace("_", "-"))
        self.refuse(" and ".join(parts), f"code for {machine}, in every library", next_step)

    def _is_named_for(self, machine: str) -> bool:
        """Return whether the wheel's own name promises code for a machine, or for every one."""
        try:
            platforms = versions.parse_wheel_name(self.facts["filename"]).platforms
        except ValueError:
            return True
        return any(name == "any" or name.endswith("_" + machine) for name in platforms)

    def judge_tags(self) -> None:
        """The file's name and the tags in its WHEEL file are for the target."""
        if "tags" not in self.facts or not (self.wish.python and self.wish.glibc) or self.errors:
            return
        target = versions.Target(self.wish.machine, self.wish.python, self.wish.glibc)
        expected = f"a wheel for {target.describe()}"
        try:
            named = versions.parse_wheel_name(self.facts["filename"])
        except ValueError as error:
            self.refuse(str(error), expected, "give the file its original name")
            return
        reason = versions.tag_mismatch(named, target)
        if reason:
            self.refuse(f"by its name {reason}", expected, _CURE)
        tags = [tag.split("-") for tag in self.facts["tags"]]
        inside = [versions.WheelName("", "", "", *([part] for part in tag)) for tag in tags if len(tag) == 3]
        reasons = [versions.tag_mismatch(name, target) for name in inside]
        if None not in reasons:
            said = ", ".join(self.facts["tags"]) or "no tag"
            why = f" ({reasons[0]})" if reasons else ""
            self.refuse(f"its WHEEL file says {said}{why}", expected, _CURE)
        if not self._is_component(named.name, named.version):
            self.refuse(
                f"by its name it is {named.name} {named.version}",
                f"{self.wish.component} {self.wish.version}",
                "give the file its original name, or take another one",
            )

    def _is_component(self, name: str, version: str) -> bool:
        wanted = self.wish.version
        public = version if "+" in wanted else version.split("+")[0]
        return records.canonical_name(name) == records.canonical_name(self.wish.component) and versions.same_version(
            public, wanted
        )

    def judge_identity(self) -> None:
        """It is the component, of the version that is wanted."""
        name, version = str(self.facts.get("name") or ""), str(self.facts.get("version") or "")
        if "name" in self.facts and self.wish.component and not self._is_component(name, version):
            self.refuse(
                "it is {} {} by its own METADATA".format(name or "without a name", version).replace("  ", " "),
                f"{self.wish.component} {self.wish.version}",
                "take the file of the wanted version, or correct the source's version",
            )

    def judge_record(self) -> None:
        """RECORD and the members agree."""
        damage = self.facts.get("record") or []
        if damage:
            more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
            self.refuse(damage[0] + more, "members that are exactly those of RECORD, hash by hash", _REFETCH)

    def judge_members(self) -> None:
        """Every file belongs to the component: pip overwrites what others own, and starts what a .pth file says."""
        own = {self.wish.component, self.wish.component + ".libs", *self.wish.modules}
        foreign = []
        for name in self.facts.get("members", []) if self.wish.component else []:
            parts = _site_parts(name)
            top = parts[0] if parts else ""
            # a module's file has endings of its own: selective_scan_cuda.cpython-310-….so
            mine = top in own or (len(parts) == 1 and top.partition(".")[0] in own and not top.endswith(".pth"))
            if not mine and not (len(parts) > 1 and self._is_info(top)):
                foreign.append(name)
        if foreign:
            more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
            self.refuse(
                f"it brings {foreign[0]}{more}, which is not part of {self.wish.component}",
                "files of {} alone ({})".format(self.wish.component, ", ".join(sorted(own))),
                "take another file; of a source of your own, leave these packages out of its setup.py",
            )

    def _is_info(self, folder: str) -> bool:
        """Return whether a folder is the wheel's own .dist-info."""
        stem, dot, ending = folder.rpartition(".")
        name = records.canonical_name(stem.partition("-")[0])
        return bool(dot) and ending == "dist-info" and name == records.canonical_name(self.wish.component)

    def judge_libraries(self) -> None:
        """Libraries are whole, for this Python, this C library and this std::string; the modules are there."""
        wish = self.wish
        for path, one in sorted(self.libraries.items()):
            if one["machine"] not in (None, wish.machine):
                continue  # said already
            if one["fault"] and (one["machine"] or self._module_of(path)):
                self.refuse(f"{path} is damaged: {one['fault']}", "whole libraries", _REFETCH)
                continue
            self._judge_name(path)
            if one["machine"] is None:
                if self._module_of(path):
                    self.refuse(f"{path} is no ELF file", f"a compiled extension for {wish.machine}", _REFETCH)
                continue
            glibc = one["glibc"]
            if wish.glibc and glibc and elf.version_numbers(glibc) > elf.version_numbers(wish.glibc):
                self.refuse(
                    f"{path} asks for glibc {glibc}, there is {wish.glibc}",
                    f"at most glibc {wish.glibc}",
                    "build it on a device of this class, or take a file that was built on an older system",
                )
            if wish.cxx11 is not None and one["cxx11"] not in (None, wish.cxx11):
                self.refuse(
                    f"{path} passes torch the {_string_name(not wish.cxx11)} std::string, torch has the "
                    f"{_string_name(wish.cxx11)} one",
                    f"code with the {_string_name(wish.cxx11)} std::string",
                    "build it against this torch, or take the file that says cxx11abi{}".format(
                        "TRUE" if wish.cxx11 else "FALSE"
                    ),
                )
        for module in wish.modules:
            # elsewhere it is not found: `import selective_scan_cuda` looks into the site folder alone
            found = any(len(_site_parts(path)) == 1 and self._module_of(path) == module for path in self.libraries)
            if "libraries" in self.facts and not found:
                there = ", ".join(sorted(map(os.path.basename, self.libraries))) or "no library"
                self.refuse(
                    f"it holds no extension {module} (it holds {there})",
                    f"the compiled extension {module}",
                    "build it again, and look into the build's log for why the extension was left out",
                )

    def _module_of(self, path: str) -> Optional[str]:
        """Return which of the wanted modules a library is by its name, or None."""
        name = os.path.basename(path)
        module = name.partition(".")[0]
        return module if module in self.wish.modules and name.endswith(".so") else None

    def _judge_name(self, path: str) -> None:
        """An extension's own file name is one that this interpreter imports."""
        wish = self.wish
        middle = os.path.basename(path).partition(".")[2][: -len(".so")]
        match = _EXTENSION.match(middle)
        python = wish.python.replace(".", "")
        expected = f"extensions named .cpython-{python}-{wish.machine}-linux-gnu.so"
        if not python or not middle or middle == "abi3":
            return
        if not match:
            if self._module_of(path):
                self.refuse(f"{path} has a name that Python {wish.python} does not import", expected, _CURE)
        elif match.group("python") != python:
            found = match.group("python")
            self.refuse(
                f"{path} is an extension for Python {found[0]}.{found[1:]}, not for {wish.python}", expected, _CURE
            )
        elif match.group("platform") and not match.group("platform").startswith(wish.machine + "-"):
            self.refuse(
                "{} is named for {}, so Python on {} does not import it".format(
                    path, match.group("platform"), wish.machine
                ),
                expected,
                _CURE,
            )

    def judge_gpu_code(self) -> None:
        """Cubins are there for the GPU, and what others cost is said."""
        sm = self.wish.sm
        if not sm:
            return
        whole: Dict[str, int] = {}
        for path, one in sorted(self.libraries.items()):
            if one["machine"] != self.wish.machine or one["fault"]:
                continue
            archs: Mapping[str, Mapping[str, int]] = one["archs"]
            for code, row in archs.items():
                whole[code] = whole.get(code, 0) + row["bytes"]
            cubins = sorted((code for code, row in archs.items() if row["cubins"]), key=_order)
            named = ", ".join(map(name_gpu, cubins))
            if sm == "cpu":
                if archs:
                    every = ", ".join(map(name_gpu, sorted(archs, key=_order)))
                    self.refuse(
                        f"{path} holds GPU code for {every}, this class has no GPU",
                        "no GPU code",
                        "take the file of a class without a GPU, or build it on such a host",
                    )
            elif not archs and self._module_of(path):
                self.refuse(
                    f"{path} holds no GPU code at all, not for {name_gpu(sm)} either",
                    f"code for {name_gpu(sm)}",
                    "build it with the CUDA toolkit, or take the file that was made for this class",
                )
            elif archs and not cubins:
                every = ", ".join("compute_" + code for code in sorted(archs, key=_order))
                self.refuse(
                    f"{path} holds PTX alone ({every}) and no finished code for {name_gpu(sm)}: the driver would "
                    "compile it at each first use, if it can at all",
                    f"code for {name_gpu(sm)}",
                    f"build it for {name_gpu(sm)}, or take the file that was made for this class",
                )
            elif archs and not any(_is_for(code, sm) for code in cubins):
                self.refuse(
                    f"{path} holds code for {named}, not for {name_gpu(sm)}",
                    f"code for {name_gpu(sm)}",
                    f"build it for {name_gpu(sm)}, or take the file that was made for this class",
                )
        others = sorted((code for code in whole if not _is_for(code, sm)), key=_order)
        if others and sm != "cpu":
            cost = sum(whole[code] for code in others)
            self.warnings.append(
                "it holds GPU code for {} other GPU{} too ({}), which costs {:.1f} MB".format(
                    len(others),
                    "s" if len(others) > 1 else "",
                    ", ".join(map(name_gpu, others)),
                    cost / 1e6,
                )
            )


def _site_parts(name: str) -> List[str]:
    """Return the parts of the path below the site folder at which a member of a wheel is installed."""
    parts = name.split("/")
    return parts[2:] if parts[0].endswith(".data") and parts[1:2] in (["purelib"], ["platlib"]) else parts


def _order(code: str) -> Tuple[int, str]:
    return int(code.rstrip("af")), code


def _string_name(cxx11: bool) -> str:
    return "C++11" if cxx11 else "old (C++98)"
