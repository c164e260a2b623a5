# SPDX-License-Identifier: Apache-2.0
"""Malformed ``kv_transfer_params``, and the check that a server survives them."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass

# Longest answer: longer than a refusal, and than waiting for a missing peer (see conftest).
ANSWER_S = 30.0

DELETE = object()
_HEX = "0123456789abcdef" * 2
_DEEP = json.loads("[" * 200 + "]" * 200)

# Keys of a producer's answer, and the values that replace each of them, one by one.
REPLACEMENTS = {
    "do_remote_prefill": ["yes", 1, [True], {}],
    "do_remote_decode": [True, "true", 0],
    "remote_block_ids": [
        *(DELETE, None, [], [[]], "0,1,2", 7, {"0": [1]}, [1, 2, 3], [[1], [2]], [["1"]], [[-1]], [[2**31]], [[2**63]]),
        *([[10**30]], [[1.5]], [[None]], [[True]], [[[1]]], [[1_999_999]], [[0] * 200_000], [[5] * 3], _DEEP),
    ],
    "remote_engine_id": [DELETE, None, 5, "", "another engine", ["a"], "x" * 1_000_000, "\ud800", "a\x00b"],
    "remote_request_id": [DELETE, None, 5, "", "another request", {}],
    "remote_host": [DELETE, None, 5, "", "no such host.invalid", "203.0.113.1", "../../etc", "\ud800"],
    "remote_port": [DELETE, None, "5600", 0, -1, 1, 65_536, 10**30, 1.5, True, []],
    "tp_size": [DELETE, None, 0, -1, 2, 10**9, "1", 1.0, True],
    "pp_size": [0, 2, "1", None],
    "dcp_size": [0, 2, "1", None],
    "remote_num_tokens": [None, 0, -1, 1, 10**18, "70", 1.5],
    "transfer_mode": ["push", "", 5, None],
    "remote_blocks_expiry_time": ["soon", -1e308, []],
    "kvxfer": [DELETE, None, "", "{}", 5, [], {}, _DEEP, {"v": 1}],
}

# The same for the fields of the lease.
LEASE_REPLACEMENTS = {
    "v": [DELETE, None, 0, 2, "1", 1.0, 10**30],
    "token": [DELETE, None, "", "00", _HEX + "0", _HEX.upper(), "g" * 32, _HEX, 5, [_HEX], "\ud800" * 32],
    "producer": [DELETE, None, "", "another engine", 5, "x" * 1_000_000],
    "addresses": [
        *(
            DELETE,
            None,
            [],
            [""],
            [5],
            "tcp://127.0.0.1:1",
            {},
            ["ipc:///tmp/x"],
            ["inproc://x"],
            ["http://127.0.0.1:1"],
        ),
        *(["tcp://"], ["tcp://127.0.0.1"], ["tcp://127.0.0.1:x"], ["tcp://127.0.0.1:99999"], ["tcp://127.0.0.1:1"]),
        *(["tcp://no such host.invalid:1"], ["tcp://203.0.113.1:5600"], ["tcp://127.0.0.1:1"] * 5000, ["\ud800"]),
    ],
    "request": [DELETE, None, "", "another request", 5],
    "num_tokens": [DELETE, None, 0, -1, 1, 10**18, "70", 1.5, True],
    "digest": [DELETE, None, "", "0" * 32, 5, "\ud800"],
    "rendezvous": [DELETE, True, None, 1, "yes", []],
}

# The same for the parameters of a decode request that is sent to both servers at once.
TOLD_REPLACEMENTS = {
    "do_remote_prefill": REPLACEMENTS["do_remote_prefill"],
    "do_remote_decode": REPLACEMENTS["do_remote_decode"],
    "remote_engine_id": REPLACEMENTS["remote_engine_id"],
    "remote_host": REPLACEMENTS["remote_host"],
    "remote_port": REPLACEMENTS["remote_port"],
    "remote_block_ids": [[], [[1, 2, 3]], "0,1,2", _DEEP],
    "tp_size": REPLACEMENTS["tp_size"],
    "pp_size": REPLACEMENTS["pp_size"],
    "dcp_size": REPLACEMENTS["dcp_size"],
    "transfer_id": [
        DELETE,
        None,
        5,
        "",
        "another",
        ["a"],
        {},
        True,
        "x" * 257,
        "x" * 1_000_000,
        "\ud800",
        "a\x00b",
        _DEEP,
    ],
    "kvxfer": ["", "{}", 5, [], {}, _DEEP, {"v": 1}],
}

# Parameters that no producer has made.
FOREIGN = {
    "empty": {},
    "only the flag": {"do_remote_prefill": True},
    "only the other flag": {"do_remote_decode": True},
    "both flags": {"do_remote_prefill": True, "do_remote_decode": True},
    "flag and nonsense": {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": "nonsense"},
    "keys only": dict.fromkeys(("do_remote_prefill", "do_remote_decode", "remote_block_ids", "kvxfer")),
    "of a push connector": {"do_remote_prefill": True, "transfer_id": "t", "remote_engine_id": "e", "remote_port": 1},
    "ten thousand keys": {"do_remote_prefill": True} | {f"key {i}": i for i in range(10_000)},
    "a megabyte": {"do_remote_prefill": True, "padding": "x" * 1_000_000},
    "deeply nested": {"do_remote_prefill": True, "kvxfer": {"a": _DEEP}},
    "odd keys": {"": 1, "\x00": 2, "__class__": {}, "do_remote_prefill": True, "kvxfer": {"": {}}},
}

# JSON without an object, and no JSON: vLLM itself may refuse these.
NO_OBJECTS = [
    "[]",
    '"do_remote_prefill"',
    "5",
    "true",
    "[{}]",
    '{"do_remote_prefill": NaN}',
    '{"do_remote_prefill": 1e999}',
]


# Replacements that are served: NixlConnector's keys that kvxfer does not need, and fields that may be left out.
HARMLESS = {
    "remote_block_ids": [[[1_999_999]], [[5] * 3]],
    "remote_host": ["", "no such host.invalid", "203.0.113.1", "../../etc"],
    "remote_port": [1],
    "tp_size": [2],  # a lease may name the first rank only
    "do_remote_decode": [0],
    "pp_size": [None],
    "dcp_size": [None],
    "remote_num_tokens": [None],
    "transfer_mode": [None],
    "remote_blocks_expiry_time": REPLACEMENTS["remote_blocks_expiry_time"],
    "v": [DELETE],
    "rendezvous": [DELETE, True],
}
# Not part of the lease that both servers derive; kvxfer asks the prefill server.
HARMLESS_AT_ONCE = {"tp_size": REPLACEMENTS["tp_size"], "pp_size": [None], "dcp_size": [None]}


@dataclass
class Attempt:
    """One request with malformed parameters; ``counts``: the connector must count it."""

    name: str
    params: object
    prompt: list
    counts: bool = True


def edited(obj: dict, key: str, value) -> dict:
    """Replace or remove one key of a copy."""
    result = copy.deepcopy(obj)
    if value is DELETE:
        result.pop(key, None)
    else:
        result[key] = value
    return result


def edited_lease(params: dict, key: str, value) -> dict:
    """Replace or remove one field of the lease in a producer's answer."""
    return params | {"kvxfer": edited(params["kvxfer"], key, value)}


def counts(key: str, value, harmless) -> bool:
    """Whether the connector must count this replacement."""
    # vLLM's front end cannot pass half a character to the engine and answers 500 itself.
    return "\\ud800" not in ascii(value) and not any(
        value is known or value == known for known in harmless.get(key, ())
    )


def short(value) -> str:
    """What a value is called in a failure."""
    text = "gone" if value is DELETE else ascii(value)
    return text if len(text) < 40 else f"{text[:30]}...{len(text)}"


def from_a_producer(lab, key, values, edit, way: str = "pull") -> list:
    """Make an attempt for each value, each from valid parameters of its own."""
    harmless = HARMLESS_AT_ONCE if way == "push" else HARMLESS
    prompts = [lab.prompt(70) for _ in values]
    begun = lab.together(lambda prompt=prompt: lab.begin(way, prompt) for prompt in prompts)
    return [
        Attempt(f"{key}: {short(value)}", edit(params, key, value), prompt, counts(key, value, harmless))
        for value, prompt, (params, _) in zip(values, prompts, begun, strict=True)
    ]


def counted(lab, server) -> float:
    """Number of requests that this server has refused or failed."""
    lab.refresh_metrics(server)
    names = ("vllm:kvxfer_refused_params_total", "vllm:kvxfer_failed_transfers_total")
    return sum(sample.value for sample in server.metrics() if sample.name in names)


def assert_survives(lab, server, attempts) -> None:
    """Check that each attempt is answered in time, rightly or by an error, and counted, and that the engine goes on."""
    before = counted(lab, server)

    def ask(attempt):
        begin = time.monotonic()
        answer = server.ask(attempt.prompt, max_tokens=6, kv_transfer_params=attempt.params, timeout_s=4 * ANSWER_S)
        return answer, time.monotonic() - begin

    wrong, must_count = [], 0
    for attempt, (answer, elapsed_s) in zip(
        attempts, lab.together(lambda attempt=attempt: ask(attempt) for attempt in attempts), strict=True
    ):
        if elapsed_s > ANSWER_S:
            wrong.append((attempt.name, f"answered after {elapsed_s:.1f} s"))
        if answer.ok and answer.tokens != lab.expect(attempt.prompt, 6):
            wrong.append((attempt.name, "wrong tokens"))
        if not answer.ok and not 400 <= answer.status < 600:
            wrong.append((attempt.name, answer))
        # What vLLM's own validation refuses never reaches the connector.
        must_count += attempt.counts and not 400 <= answer.status < 500
    assert wrong == []
    assert server.alive
    prompt = lab.prompt(10)
    assert server.ask(prompt, max_tokens=4).tokens == lab.expect(prompt, 4)
    assert counted(lab, server) - before >= must_count
