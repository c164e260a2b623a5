# SPDX-License-Identifier: Apache-2.0
"""Ids of requests: vLLM's front end writes the numbers of siblings and prompts into them."""

from __future__ import annotations

import re

_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}\Z", re.IGNORECASE)
_SIBLING = re.compile(r"([0-9]+)_(.+)", re.DOTALL)  # see vllm.v1.engine.parallel_sampling
_PROMPT = re.compile(r"(cmpl-.+)-([0-9]{1,9})", re.DOTALL)  # see vllm.entrypoints.openai.completion.serving


def sibling_of(request_id: str) -> tuple[int, str]:
    """Number of a request among its siblings (``n`` > 1), and the id that they have in common; (0, the id) if it has none."""
    found = _SIBLING.fullmatch(request_id)
    return (int(found[1]), found[2]) if found else (0, request_id)


def prompt_of(request_id: str) -> tuple[str, int] | None:
    """Name of the client's completion that a request is of, and number of its prompt there; None if it is of none."""
    found = _PROMPT.fullmatch(rendezvous_key(request_id))
    return (found[1], int(found[2])) if found else None


def of_other_prompt(request_id: str, own_id: str) -> str | None:
    """Key of the request that has, on the server of ``request_id``, the prompt of ``own_id``; None if there is no such.

    A client's completion may have several prompts. vLLM answers it with the kv_transfer_params of the first one.
    """
    first, own = prompt_of(request_id), prompt_of(own_id)
    if first is None or own is None or first[1] != 0 or own[1] == 0:
        return None
    return f"{first[0]}-{own[1]}"


def rendezvous_key(request_id: str) -> str:
    """Name of a request that both servers know from its ``X-Request-Id``.

    vLLM adds eight random hex digits on each, and the number of a sibling in front.
    """
    return sibling_of(_RANDOM_SUFFIX.sub("", request_id))[1]
