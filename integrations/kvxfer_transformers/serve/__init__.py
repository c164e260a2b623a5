# SPDX-License-Identifier: Apache-2.0
"""OpenAI-compatible server on one engine of transformers: ``python -m kvxfer_transformers.serve MODEL``.

A small application of Starlette instead of ``transformers serve``: the handlers of that server take text only, have no place
for fields beside OpenAI's in a request or an answer, and make transformers' own manager.
"""
