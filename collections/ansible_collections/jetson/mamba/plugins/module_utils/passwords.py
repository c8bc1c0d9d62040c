"""Keep users and passwords of URLs (https://user:password@host/…) out of what is shown, sent or kept."""

from __future__ import annotations

import re
from typing import Any, Callable, List, Mapping

# For people: generous, since a password may hold what it should not. After a colon that begins no port, even a "/".
_SHOWN = re.compile(r"(?<=://)(?:[^/\s]*@|[^/\s:@\[]*:(?!\d*(?:[/?#]|$))[^\s@]*@)")
# for machines: exactly what a URL's parser takes for user and password
_EXACT = re.compile(r"\b(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<user>[^/?#\s]*)@")
# a login name is no secret there, and without it nothing can be reached
_NAMED = ("ssh", "git+ssh", "sftp")


def without_passwords(value: Any) -> Any:
    """Return plain data for people: "***" stands for the user and password of every URL in it."""
    return _changed(value, lambda text: _SHOWN.sub("***@", text))


def without_userinfo(value: Any) -> Any:
    """Return plain data in which no URL has a user or password; the URLs stay good for use.

    The user of ssh, which is no secret, stays.
    """
    return _changed(value, lambda text: _EXACT.sub(_plain, text))


def with_userinfo(value: Any) -> List[str]:
    """Return those texts of plain data that are a URL with a user or password."""
    if isinstance(value, str):
        return [value] if _EXACT.match(value) and without_userinfo(value) != value else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [url for item in items for url in with_userinfo(item)]


def _plain(match: re.Match[str]) -> str:
    scheme, user = match["scheme"], match["user"].partition(":")[0]
    return f"{scheme}://{user}@" if user and scheme.lower() in _NAMED else f"{scheme}://"


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value) if "://" in value else value
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(item, change) for item in value]
    return value
