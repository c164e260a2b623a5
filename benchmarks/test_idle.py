# SPDX-License-Identifier: Apache-2.0
"""What an endpoint costs while nothing is asked of it."""

from __future__ import annotations

GOAL_CORE = 0.05


def test_an_idle_endpoint_takes_little_of_a_core(benchmark, layer_pair, measuring, report):
    """The producer's whole process, its NIXL agent included, takes at most 0.05 of a core; NIXL's default takes one."""
    ref = layer_pair.held([3])  # it has met a peer: an agent without one would be too easy
    layer_pair.endpoint.read(ref, [5]).wait(10)
    wall_s = 5.0 if measuring else 0.1
    share = layer_pair.call("cpu", wall_s)
    layer_pair.raw("default")
    beside = layer_pair.call("cpu", wall_s) - share
    layer_pair.close_raw("default")
    benchmark.extra_info.update(core=share, nixl_default=beside)
    benchmark.pedantic(layer_pair.call, args=("cpu", 0.05), rounds=1)
    report(
        "Idle: share of a core, of a process that has met a peer",
        kvxfer_endpoint=f"{share:.3f}",
        goal=f"{GOAL_CORE}",
        raw_NIXL_with_its_defaults=f"{beside:.3f}",
    )
