# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector's bootstrap server, as its routers know it: ``GET /query`` tells the engines of a prefill server.

A router asks it once for engine ids, and names it to the decode server (``remote_bootstrap_addr``). The decode server asks it for
the side channel of an engine, see `kvxfer_vllm.bootstrap.lookup`. A prefill server answers from a process of its own, so that no
caller takes time of the engine, see `kvxfer_vllm.bootstrap.launch`.
"""
