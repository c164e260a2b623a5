# SPDX-License-Identifier: Apache-2.0
"""Options, parameters of requests, identities of prompts and of models: all that servers of any engine have in common.

It imports no engine and no adapter, so that an engine that is not here yet can use it as those that are. It knows no block
table and moves nothing: that is kvxfer's.
"""
