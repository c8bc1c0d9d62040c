"""The one shape of every message that ends a command: found, expected, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Problem(Exception):
    """Something that forbids going on.

    Args:
        found: what was met, with the value.
        expected: what would have been right.
        next_step: what the person who reads this should do.
    """

    def __init__(self, found: str, expected: str, next_step: str) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.next_step = next_step

    def render(self) -> str:
        """Return the message as people see it, three labelled lines."""
        return f"found:    {self.found}\nexpected: {self.expected}\nnext:     {self.next_step}"


def unknown(kind: str, name: str, known: Iterable[str], next_step: str) -> Problem:
    """Return the Problem of a name that does not exist, with the nearest that does.

    Args:
        kind: what was asked for ("host", "fleet", "snapshot").
        name: the name as typed.
        known: the names that exist.
        next_step: the command that helps when nothing is near.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    expected = f"one of: {', '.join(names)}" if names else f"a {kind}, but there is none"
    return Problem(f"no {kind} named {name!r}", expected, f"did you mean {near[0]!r}?" if near else next_step)
