# SPDX-License-Identifier: Apache-2.0
"""kvxfer moves the KV cache of a request from the engine that computed it to the engine that continues it."""

from kvxfer.agents.base import TransferAgent
from kvxfer.agents.capabilities import Capabilities
from kvxfer.buffers.base import Completion, DeviceBuffer, HostBuffer
from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.errors import KvxferError
from kvxfer.layout.axes import Axes, Interval, KVLayout
from kvxfer.layout.block_table import BlockTable
from kvxfer.layout.spec import CacheGroup, CacheRegion, CacheSpec, Scale
from kvxfer.memory.spans import Descriptors, Memory, MemoryKind
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import TransferPlan, plan
from kvxfer.planner.router import Route
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.transfer import Done, Event, Failed, LeaseExpired, LeaseReleased, LeaseRevoked, Transfer
from kvxfer.secret import Secret

__version__ = "0.2.0"

__all__ = [
    "Axes",
    "BlockTable",
    "CacheGroup",
    "CacheRegion",
    "CacheSpec",
    "Capabilities",
    "Completion",
    "Costs",
    "Descriptors",
    "DeviceBuffer",
    "Done",
    "Endpoint",
    "Event",
    "Failed",
    "HostBuffer",
    "Interval",
    "KVCache",
    "KVLayout",
    "KvxferError",
    "LeaseExpired",
    "LeaseRef",
    "LeaseReleased",
    "LeaseRevoked",
    "Memory",
    "MemoryKind",
    "Route",
    "Scale",
    "Secret",
    "Settings",
    "Transfer",
    "TransferAgent",
    "TransferPlan",
    "plan",
]
