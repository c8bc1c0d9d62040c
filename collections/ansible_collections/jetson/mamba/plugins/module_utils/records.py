"""Compare installed distributions with their RECORD: what pip wrote down against what is on disk."""

from __future__ import annotations

import base64
import csv
import glob
import hashlib
import os
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple


def canonical_name(name: str) -> str:
    """Return a distribution's name as PEP 503 normalises it, with underscores ("mamba-ssm" -> "mamba_ssm")."""
    return re.sub(r"[-_.]+", "_", name).lower()


def record_hash(path: str) -> str:
    """Return a file's hash as RECORD spells it: "sha256=<urlsafe base64 without padding>"."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return "sha256=" + base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode("ascii")


def read_entries(dist_info: str) -> Optional[List[Tuple[str, str, str]]]:
    """Return RECORD's rows (path, hash, size) of a .dist-info folder, or None where there is no RECORD."""
    try:
        with open(os.path.join(dist_info, "RECORD"), encoding="utf-8", newline="") as handle:
            return [(row[0], row[1], row[2]) for row in csv.reader(handle) if len(row) == 3]
    except (OSError, UnicodeDecodeError, csv.Error):
        return None


def find_damage(site_packages: str, dist_info: str, hashed: bool) -> Optional[str]:
    """Return what is wrong with an installed distribution, or None.

    Args:
        site_packages: the folder that RECORD's paths are relative to.
        dist_info: the distribution's .dist-info folder.
        hashed: compare every file's hash; otherwise existence and size only.
    """
    entries = read_entries(dist_info)
    if not entries:
        return "RECORD is missing or empty: an installation was interrupted"
    for name, wanted, size in entries:
        if name.endswith(".pyc"):
            continue  # a cache that pip and any interpreter may drop or write anew
        path = os.path.join(site_packages, name)
        try:
            found_size = os.stat(path).st_size
        except OSError:
            return f"{name} is missing"
        if not wanted:
            continue
        if size and found_size != int(size):
            return f"{name} has {found_size} bytes, RECORD says {size}"
        if hashed and record_hash(path) != wanted:
            return f"{name} differs from its RECORD hash"
    return None


def survey(site_packages: str, hash_packages: Sequence[str] = ()) -> Dict[str, Dict[str, Any]]:
    """Return {canonical name: {version, damage}} of all distributions in a site folder."""
    found: Dict[str, Dict[str, Any]] = {}
    hashed = {canonical_name(name) for name in hash_packages}
    for dist_info in sorted(glob.glob(os.path.join(site_packages, "*.dist-info"))):
        metadata: Dict[str, str] = {}
        try:
            with open(os.path.join(dist_info, "METADATA"), encoding="utf-8", errors="replace") as handle:
                for line in handle:
                    if not line.strip():
                        break
                    key, _colon, value = line.partition(":")
                    metadata.setdefault(key.lower(), value.strip())
        except OSError:
            stem = os.path.basename(dist_info)[: -len(".dist-info")].split("-")
            metadata = {"name": stem[0], "version": stem[-1]}
        name = canonical_name(metadata.get("name", ""))
        if name:
            found[name] = {
                "version": metadata.get("version"),
                "damage": find_damage(site_packages, dist_info, name in hashed),
            }
    return found
