# SPDX-License-Identifier: Apache-2.0
"""Commands on a real terminal, and elsewhere: colours and bars where they can be shown, plain text in all other places."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios

import pytest

from kvxfer.cli import main

COMMAND = "import sys; from kvxfer.cli import main; sys.exit(main(['sim', '--seeds', '1', '--profile', 'calm']))"
OUTPUT = """
import sys
{before}
from kvxfer.cli.table import table
from kvxfer.cli.terminal import Progress, paint
progress = Progress()
with progress.step("a step", of=3):
    progress.tell("a remark")
    progress.count(2, "two of them", 2)
print(table(("what", "number"), [("one", "1"), ("ten", "10")]))
print(paint("all is well", "good"))
"""
WITHOUT_RICH = "sys.modules['rich'] = None"
TABLE = "  what  number\n  ------------\n  one        1\n  ten       10\nall is well\n"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
COLOUR = re.compile(r"\x1b\[[0-9;]*[1-9][0-9;]*m")
OVERWRITES, BAR = "\r\x1b[K", "━"


def surroundings(**more):
    """The environment without what says something of a terminal."""
    told = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM")
    return {**{name: value for name, value in os.environ.items() if name not in told}, "TERM": "xterm-256color", **more}


def on_terminal(program, columns=100, **more):
    """What a program writes to a terminal of this width."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written = b""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=surroundings(**more)) as process:
        os.close(theirs)
        try:
            while piece := os.read(ours, 1 << 16):
                written += piece
        except OSError:  # the other end has closed
            pass
        assert process.wait(timeout=60) == 0, written.decode()
    os.close(ours)
    return written.decode()


@pytest.mark.parametrize("program", [OUTPUT.format(before=""), COMMAND], ids=["output", "command"])
def test_a_terminal_gets_colours_and_a_bar(program):
    """With rich, a terminal sees a bar while a command works, and colours in what it prints."""
    pytest.importorskip("rich", reason="rich is not installed")
    seen = on_terminal(program)
    assert BAR in seen and re.search("0 of [13]", seen) and COLOUR.search(seen)
    assert CONTROL.sub("", seen).endswith((TABLE, "things left behind 0\n"))


@pytest.mark.parametrize(("before", "more"), [("", {"NO_COLOR": "1"}), (WITHOUT_RICH, {})], ids=["NO_COLOR", "no rich"])
def test_a_terminal_without_colours(before, more):
    """With NO_COLOR, and without rich, the line of progress is overwritten, and there are neither colours nor bars."""
    seen = on_terminal(OUTPUT.format(before=before), **more)
    assert not COLOUR.search(seen) and BAR not in seen and OVERWRITES in seen
    assert seen.replace("\r\n", "\n").endswith(OVERWRITES + TABLE)


@pytest.mark.parametrize("how", [{"columns": 40}, {"TERM": "dumb"}], ids=["narrow", "dumb"])
def test_a_terminal_that_gets_plain_lines(how):
    """A narrow terminal, and one that can do nothing, sees lines without any control character."""
    seen = on_terminal(OUTPUT.format(before=""), **how).replace("\r\n", "\n")
    assert seen == "  a step ...\n  a remark ...\n  two of them ...\n" + TABLE


def test_pipes_get_plain_text():
    """What goes into pipes has no control character."""
    command = [sys.executable, "-c", OUTPUT.format(before="")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=surroundings())
    assert run.stdout == TABLE and run.stderr == "  a step ...\n  a remark ...\n  two of them ...\n"


# -- completion ----------------------------------------------------------------------------------------------------------


def completed(script, *words):
    """What bash offers for the last of these words."""
    function = re.search(r"-F (\w+) kvxfer", script)[1]
    listed = " ".join(f"'{word}'" for word in words)
    asks = f'COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; {function} kvxfer "{words[-1]}" "{words[-2]}"; echo "${{COMPREPLY[@]}}"'
    run = subprocess.run(["bash", "-c", f"{script}\n{asks}"], capture_output=True, text=True, timeout=60, check=True)
    return run.stdout.split()


def test_bash_completes_commands_options_and_agents(capsys):
    """The script that `kvxfer completion bash` prints makes bash offer commands, options of a command, and its values."""
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "kvxfer", "do") == ["doctor"]
    assert {"--agent", "--model", "--rounds"} <= set(completed(script, "kvxfer", "demo", "--"))
    assert {"inproc", "nixl"} <= set(completed(script, "kvxfer", "demo", "--agent", ""))
    assert completed(script, "kvxfer", "bench", "cal") == ["calibrate"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(shell, capsys):
    """There are scripts for zsh and tcsh, which name all commands."""
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main(["completion", shell]) == 0
    assert "doctor" in capsys.readouterr().out


def test_completion_says_what_to_install(monkeypatch, capsys):
    """Without shtab the command says what brings it."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "kvxfer[cli]" in capsys.readouterr().err
