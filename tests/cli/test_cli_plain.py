"""NO_COLOR, CI, a dumb terminal, no terminal: plain lines. A terminal of one's own may have more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty", reason="a terminal of one's own needs a POSIX system")

ESCAPE = "\x1b"
PLAIN = [{"NO_COLOR": "1"}, {"CI": "true"}, {"CI": "true", "GITHUB_ACTIONS": "true"}, {"TERM": "dumb"}]
OURS = [["methods"], ["train", "--recipe", "quickstrat"]]
TYPERS = [["--help"], ["train", "--help"], ["train"]]


def in_terminal(*args: str, **environ: str) -> str:
    """All that a command prints on a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hkft", *args],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", **environ},
    )
    os.close(theirs)
    said = b""
    try:
        while more := os.read(ours, 65536):
            said += more
    except OSError:  # Linux's way of saying that the other end is closed
        pass
    finally:
        os.close(ours)
        process.wait(timeout=30)
    return said.decode()


def named(value: object) -> str:
    return " ".join(value) if isinstance(value, list | dict) else str(value)


@pytest.mark.parametrize("args", [*OURS, *TYPERS], ids=named)
def test_a_terminal_has_more_than_plain_lines(args):
    assert ESCAPE in in_terminal(*args)


@pytest.mark.parametrize("environ", PLAIN, ids=named)
@pytest.mark.parametrize("args", OURS, ids=named)
def test_whoever_asks_for_plain_lines_gets_them(args, environ):
    said = in_terminal(*args, **environ)
    assert said
    assert ESCAPE not in said


def test_help_on_a_dumb_terminal_is_plain():
    assert ESCAPE not in in_terminal("--help", TERM="dumb")


@pytest.mark.parametrize("environ", PLAIN[:-1], ids=named)
@pytest.mark.parametrize("args", TYPERS, ids=named)
def test_help_and_usage_errors_too(args, environ):
    said = in_terminal(*args, **environ)
    assert said
    assert ESCAPE not in said


@pytest.mark.parametrize("args", [*OURS, *TYPERS], ids=named)
def test_no_terminal_no_control_codes(shell, args):
    ran = shell(*args)
    assert ran.out + ran.err
    assert ESCAPE not in ran.out + ran.err


def test_a_pipe_on_github_has_none_either(shell):
    assert ESCAPE not in shell("--help", CI="true", GITHUB_ACTIONS="true").out
