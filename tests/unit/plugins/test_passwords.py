"""No user or password of a URL is shown, sent or kept."""

from __future__ import annotations

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.passwords import (
    with_userinfo,
    without_passwords,
    without_userinfo,
)


@pytest.mark.parametrize(
    ("url", "shown", "bare"),
    [
        ("https://a:s3@h/x", "https://***@h/x", "https://h/x"),
        ("https://token@h:8080/x?y=1", "https://***@h:8080/x?y=1", "https://h:8080/x?y=1"),
        ("https://a:s@3@h/x@1", "https://***@h/x@1", "https://h/x@1"),
        ("https://a:s'3\"@h/", "https://***@h/", "https://h/"),
        ("https://a:s%2F3@[::1]/x", "https://***@[::1]/x", "https://[::1]/x"),
        ("git+https://a:s3@h/x.git@main", "git+https://***@h/x.git@main", "git+https://h/x.git@main"),
        ("ssh://git@h/x.git", "ssh://***@h/x.git", "ssh://git@h/x.git"),
        ("ssh://git:s3@h/x.git", "ssh://***@h/x.git", "ssh://git@h/x.git"),
        ("get https://a:s3@h/x, then http://b:s3@i", "get https://***@h/x, then http://***@i", None),
        ("https://h:8080/x@1", "https://h:8080/x@1", "https://h:8080/x@1"),
        ("https://[2001:db8::1]:80/x", "https://[2001:db8::1]:80/x", "https://[2001:db8::1]:80/x"),
        ("a@b", "a@b", "a@b"),
    ],
)
def test_urls(url: str, shown: str, bare: str | None) -> None:
    assert without_passwords(url) == shown
    assert without_userinfo(url) == (bare or "get https://h/x, then http://i")
    assert bool(with_userinfo(url)) == (bare not in (None, url))


@pytest.mark.parametrize("url", ["https://a:s3#x@h/", "https://a:s3?x@h/", "https://a:s3/x@h/"])
def test_a_password_that_breaks_its_url_is_not_shown_either(url: str) -> None:
    assert "s3" not in without_passwords(url)


def test_plain_data_is_changed_through_and_through() -> None:
    data = {"https://a:s3@h/": [{"url": "https://a:s3@h/x"}, ("https://b@i", 7, None)]}
    assert without_userinfo(data) == {"https://h/": [{"url": "https://h/x"}, ["https://i", 7, None]]}
    assert with_userinfo(data) == ["https://a:s3@h/x", "https://b@i"]


def test_no_problem_shows_one() -> None:
    url = "https://a:s3@h/x"
    problem = Problem(f"no {url}", f"a {url}", f"curl {url}")
    assert "s3" not in problem.render() + str(problem) + str(problem.as_dict()) and "https://***@h/x" in str(problem)
