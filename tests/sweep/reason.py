# SPDX-License-Identifier: Apache-2.0
"""The reason for which a server ended or refused, from its log."""

from __future__ import annotations

import re

__all__ = ["DIED", "reason"]

#: What the log of a server says whose engine died.
DIED = "EngineCore encountered a fatal error"

_MOST_WORDS = 40
# vLLM's log puts these before each line of a traceback: "(EngineCore pid=7) ERROR 11-30 08:05:37 [core.py:1512] ".
_PREFIX = re.compile(r"^(?:\(\S+ pid=\d+\) )?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] )?")
_RAISED = re.compile(r"^\s*(?:[\w.]*\.)?(\w*(?:Error|Exception))(?:: (.+))?$")
_LATER = re.compile(r"Engine core init|WorkerProc init|Failed core proc|EngineCore encountered an issue|cancelled")
_FAILED_LOAD = re.compile(r"its KV could not be loaded: (.+)$", re.MULTILINE)
_PLACES = re.compile(r"(?<![\w<])/[^\s'\",;)]+|0x[0-9a-f]+")
_OURS = ("ConfigError", "UnsupportedError", "LayoutError")


def reason(log: str) -> str:
    """First error of a log that is not the consequence of another one, as one sentence.

    If an engine died, the error of which it died. An error without a text is told with the line that raised it.
    """
    failed_load = _FAILED_LOAD.search(log)
    if failed_load and DIED not in log:
        return failed_load[1]
    lines = [_PREFIX.sub("", line) for line in log.splitlines() if line.strip()]
    fatal = next((i for i, line in enumerate(lines) if DIED in line), 0)
    kind, text = "", lines[-1] if lines else "nothing in its log"
    for i, line in enumerate(lines[fatal:], fatal):
        found = _RAISED.match(line)
        if found and not _LATER.search(line):
            kind, text = found[1], found[2] or next((each for each in lines[i - 1 :: -1] if each.strip(" ^")), "")
            break
    words = _PLACES.sub("...", text).split()
    short = " ".join(words[:_MOST_WORDS]) + (" ..." if len(words) > _MOST_WORDS else "")
    sentence = re.split(r"(?<=[a-z0-9)])\. (?=[A-Z])", short)[0]
    return sentence if not kind or kind in _OURS else f"{kind}: {sentence}"
