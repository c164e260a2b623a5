# SPDX-License-Identifier: Apache-2.0
"""kvxfer moves the KV cache of a request from the engine that computed it to the engine that continues it."""

from kvxfer.agent import Capabilities, TransferAgent
from kvxfer.blocks import BlockTable
from kvxfer.buffer import Completion, DeviceBuffer, HostBuffer
from kvxfer.cache import KVCache
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.errors import KvxferError
from kvxfer.layout import Axes, CacheGroup, CacheRegion, CacheSpec, Interval, KVLayout, Scale
from kvxfer.lease import LeaseRef
from kvxfer.memory import Descriptors, Memory, MemoryKind
from kvxfer.plan import TransferPlan, plan
from kvxfer.route import Costs, Route
from kvxfer.secret import Secret
from kvxfer.transfer import Done, Event, Failed, LeaseExpired, LeaseRevoked, LeaseSettled, Transfer

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
    "LeaseRevoked",
    "LeaseSettled",
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
