"""The one shape of every message that ends a run: what was found, what was expected, what to do next."""

from __future__ import annotations

from typing import Dict

from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_passwords


class Problem(Exception):
    """Something that forbids going on. Passwords in URLs are left out of all three texts.

    Args:
        found: what was met, with the value.
        expected: what would have been right.
        next_step: what the person who reads this should do.
    """

    def __init__(self, found: str, expected: str, next_step: str) -> None:
        self.found: str = without_passwords(found)
        self.expected: str = without_passwords(expected)
        self.next_step: str = without_passwords(next_step)
        super().__init__(self.found)

    def render(self) -> str:
        """Return the message as people see it, three labelled lines."""
        return f"found:    {self.found}\nexpected: {self.expected}\nnext:     {self.next_step}"

    def as_dict(self) -> Dict[str, str]:
        """Return the message as plain data (keys found, expected, next)."""
        return {"found": self.found, "expected": self.expected, "next": self.next_step}
