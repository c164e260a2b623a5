# SPDX-License-Identifier: Apache-2.0
"""Start of a server: vLLM finds the connector; wrong options and unsupported configurations are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from vllm.config import CUDAGraphMode, KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvxfer.errors import ConfigError, KvxferError
from kvxfer_serving.options import ConnectorOptions, advertised, side_channel, tcp_address
from kvxfer_serving.transfer_params import Role
from kvxfer_vllm.connector import KvxferConnector
from kvxfer_vllm.fingerprint import model_fingerprint
from kvxfer_vllm.groups import GroupTable, backoff_tokens, layer_groups
from kvxfer_vllm.metadata import KvxferHandshake
from kvxfer_vllm.plugin import register
from kvxfer_vllm.rank_cache import describe_cache
from kvxfer_vllm.scheduler import KvxferScheduler
from kvxfer_vllm.startup import refuse_unsupported
from tests.vllm.rig import in_groups, kv_cache_config, vllm_config

pytestmark = pytest.mark.vllm

_WHAT_IS_LOADED = """
import os, sys
before = dict(os.environ)
import {module}
vendors = ("nixl", "nixl_cu12", "nixl_cu13", "nixl_rocm", "rixl", "kvxfer_nixl"{more})
loaded = [name for name in sys.modules if name.split(".")[0] in vendors]
assert not loaded, loaded
assert dict(os.environ) == before
"""


@pytest.mark.parametrize(
    ("module", "more"),
    [
        ("kvxfer_vllm", ", 'torch', 'vllm', 'zmq'"),
        ("kvxfer_vllm.plugin", ", 'torch', 'vllm', 'zmq'"),
        ("kvxfer_serving.transfer_params", ", 'torch', 'vllm'"),
    ],
)
def test_importing_is_cheap(module, more):
    """Importing the plug-in, which vLLM does in every process, loads no vendor; nor does importing the pure modules."""
    code = _WHAT_IS_LOADED.format(module=module, more=more)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.timeout(600)  # vLLM's imports take 5 s of a whole core, and many times that on a busy machine
def test_importing_the_class_loads_no_transfer_engine():
    """Importing the class, as the API server does for its metrics, loads no transfer engine and does not touch CUDA."""
    code = (
        "import sys, kvxfer_vllm; kvxfer_vllm.KvxferConnector; import torch\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('nixl', 'nixl_cu13', 'nixl_cu12', 'kvxfer_nixl')]\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=580)


def test_found_by_name_and_by_module():
    """The plug-in's name, the module path and the names of other connectors lead to one class; registering twice is harmless."""
    register()
    register()
    for name, module in (
        ("KvxferConnector", None),
        ("KvxferConnector", "kvxfer_vllm"),
        ("NixlConnector", "kvxfer_vllm.nixl_shim"),
        ("NixlPullConnector", "kvxfer_vllm.nixl_shim"),
        ("NixlPushConnector", "kvxfer_vllm.nixl_shim"),
        ("TPUConnector", "kvxfer_vllm.tpu"),
    ):
        config = KVTransferConfig(kv_connector=name, kv_connector_module_path=module, kv_role="kv_both")
        assert KVConnectorFactory.get_connector_class(config) is KvxferConnector
    # MultiConnector looks classes up by __name__ to rebuild statistics.
    assert KVConnectorFactory.get_connector_class_by_name(KvxferConnector.__name__) is KvxferConnector


def test_log_of_kvxfer_goes_where_vllm_logs():
    """What kvxfer logs has vLLM's prefix, with time and process; a program's own handler is left alone."""
    code = (
        "import logging, vllm.logger, kvxfer_vllm.plugin as plugin\n"
        "log, own = logging.getLogger('kvxfer'), logging.StreamHandler()\n"
        "log.addHandler(own), plugin.register(), log.warning('one')\n"
        "log.removeHandler(own), plugin.register(), vllm.logger._configure_vllm_root_logger(), log.warning('two')\n"
        "logging.getLogger('kvxfer.runtime').info('three'), log.debug('four')\n"
    )
    environment = {**os.environ, "VLLM_CONFIGURE_LOGGING": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=580, capture_output=True, text=True, env=environment
    )
    said = run.stdout + run.stderr
    assert re.search("^one$", said, re.MULTILINE)
    assert re.search(r"WARNING \S+ \S+ \[.*\] two$", said, re.MULTILINE)
    assert re.search(r"INFO \S+ \S+ \[.*\] three$", said, re.MULTILINE) and "four" not in said


def test_unknown_name_in_the_package():
    """A misspelt connector name raises AttributeError, which vLLM turns into its own message."""
    import kvxfer_vllm

    with pytest.raises(AttributeError, match="KvxferConector"):
        _ = kvxfer_vllm.KvxferConector


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"agnet": "nixl"}, "unknown option 'agnet'; known are agent, agent_options, "),
        ({"mode": "shove"}, "mode must be one of auto, push, pull, not 'shove'"),
        ({"granularity": "token"}, "granularity must be one of chunk, layer, not 'token'"),
        ({"granularity": "layer", "mode": "pull"}, "granularity 'layer' is for mode 'auto' or 'push'"),
        ({"rendezvous_timeout_seconds": -1}, "rendezvous_timeout_seconds must be a number of seconds above 0"),
        ({"secret": "of all servers"}, "unknown option 'secret'"),
        ({"secret_file": 5}, "secret_file must be a string"),
        ({"verify": "yes"}, "verify must be true or false"),
        ({"convert": "fp8"}, "convert must be true or false"),
        ({"verify": None}, "verify must be true or false"),
        ({"allow_unauthenticated": "yes"}, "allow_unauthenticated must be true or false"),
        ({"mode": None}, "mode must be one of auto, push, pull, not None"),
        ({"agent": 1}, "agent must be a string"),
        ({"backends": "UCX"}, "backends must be a list of strings"),
        ({"backends": [1]}, "backends must be a list of strings"),
        ({"agent_options": []}, "agent_options must be an object"),
        ({"lease_seconds": 0}, "lease_seconds must be a number of seconds above 0"),
        ({"lease_seconds": "30"}, "lease_seconds must be a number of seconds above 0"),
        ({"lease_seconds": 1e30}, "lease_seconds must be a number of seconds above 0 and up to 31622400, not 1e"),
        ({"read_timeout_seconds": True}, "read_timeout_seconds must be a number of seconds above 0"),
        ({"unread_lease_seconds": float("nan")}, "unread_lease_seconds must be a number of seconds above 0"),
    ],
)
def test_options_are_refused_by_name(extra, message):
    """A wrong option ends the start of both roles with a sentence that names it and says what is allowed."""
    for role in KVConnectorRole:
        with pytest.raises(ConfigError, match="kv_connector_extra_config: .*" + message):
            KvxferConnector(vllm_config(**extra), role, kv_cache_config())


def test_options_reach_the_endpoint():
    """Options come before KVXFER_* variables, and those before the defaults."""
    options = ConnectorOptions.parse({"lease_seconds": 5, "backends": ["UCX"], "agent_options": {"num_threads": 2}})
    settings = options.for_endpoint({"KVXFER_LEASE_S": "7", "KVXFER_READ_TIMEOUT_S": "9"})
    assert (settings.lease_s, settings.read_timeout_s, settings.peer_timeout_s) == (5, 9, 15)
    assert options.for_agent() == {"num_threads": 2, "backends": ["UCX"]}


def test_side_channel_variables():
    """KVXFER_SIDE_CHANNEL_* before NixlConnector's variables before localhost:5600, plus the data parallel index."""
    nixl = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "n", "VLLM_NIXL_SIDE_CHANNEL_PORT": "7000"}
    assert side_channel({}, 0) == ("localhost", 5600)
    assert side_channel(nixl, 2) == ("n", 7002)
    assert side_channel(nixl | {"KVXFER_SIDE_CHANNEL_HOST": "k"}, 0) == ("k", 7000)
    assert side_channel(nixl | {"KVXFER_SIDE_CHANNEL_PORT": "0"}, 3) == ("n", 0)
    for text in ("x", "-1", "70000", "5600.0"):
        with pytest.raises(ConfigError, match="KVXFER_SIDE_CHANNEL_PORT must be a number"):
            side_channel({"KVXFER_SIDE_CHANNEL_PORT": text}, 0)
    with pytest.raises(ConfigError, match="beyond 65535"):
        side_channel({"KVXFER_SIDE_CHANNEL_PORT": "65535"}, 1)


def test_all_interfaces_are_no_address_for_peers():
    """A server that listens on all interfaces tells peers an address that they can connect to."""
    assert advertised("10.1.2.3") == "10.1.2.3"
    for everything in ("0.0.0.0", "*", "::", "[::]"):
        assert advertised(everything) not in (everything, "")


def test_localhost_is_a_number_for_peers():
    """Peers are told a number for ``localhost``, which hosts files may define differently; they look up other names themselves."""
    assert advertised("localhost") == "127.0.0.1"
    assert advertised("prefill-0.svc") == "prefill-0.svc"


def test_the_host_of_the_side_channel_is_checked():
    """An invalid host ends the start with the name of the variable."""
    assert side_channel({"KVXFER_SIDE_CHANNEL_HOST": "[::1]"}, 0) == ("::1", 5600)
    assert side_channel({"KVXFER_SIDE_CHANNEL_HOST": "*"}, 0) == ("*", 5600)
    for host in ("a b", "10.0.0.1:5600", "tcp://h"):
        with pytest.raises(ConfigError, match="KVXFER_SIDE_CHANNEL_HOST="):
            side_channel({"KVXFER_SIDE_CHANNEL_HOST": host}, 0)


def test_ipv6_addresses():
    """An IPv6 host is written as control addresses need it, once."""
    assert tcp_address("::1", 5600) == tcp_address("[::1]", 5600) == "tcp://[::1]:5600"
    assert tcp_address("10.0.0.1", 1) == "tcp://10.0.0.1:1"


def _with(config, path, value):
    *parents, last = path.split(".")
    for name in parents:
        config = getattr(config, name)
    object.__setattr__(config, last, value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("device_config.device_type", "xpu", "device 'xpu' yet, only on cpu, cuda, tpu"),
        ("kv_transfer_config.kv_buffer_device", "cuda", "kv_buffer_device 'cuda' with caches on 'cpu'"),
    ],
)
def test_unsupported_configuration(path, value, message):
    """An unsupported configuration is refused by name when the connector is made."""
    config = vllm_config()
    _with(config, path, value)
    with pytest.raises(ConfigError, match=f"does not support .*{message}"):
        refuse_unsupported(config, kv_cache_config())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("compilation_config.cudagraph_mode", CUDAGraphMode.FULL, "cudagraph_mode FULL"),
        ("compilation_config.cudagraph_mode", CUDAGraphMode.FULL_AND_PIECEWISE, "cudagraph_mode FULL_AND_PIECEWISE"),
        ("parallel_config.enable_dbo", True, "micro-batches"),
    ],
)
def test_layer_by_layer_only_where_vllm_calls_a_hook_in_each(path, value, message):
    """Granularity "layer" is refused where vLLM computes layers without a hook, or more than once; "chunk" is not."""
    config = vllm_config()
    refuse_unsupported(config, kv_cache_config(), layer_by_layer=True)
    _with(config, path, value)
    refuse_unsupported(config, kv_cache_config())
    with pytest.raises(ConfigError, match=f"granularity 'layer' with .*{message}|granularity 'layer' with {message}"):
        refuse_unsupported(config, kv_cache_config(), layer_by_layer=True)


def test_vllm_is_asked_for_graphs_with_hooks():
    """vLLM uses piecewise graphs instead of full ones with granularity "layer"."""
    assert KvxferConnector.requires_piecewise_for_cudagraph({"granularity": "layer"})
    assert not KvxferConnector.requires_piecewise_for_cudagraph({})


@pytest.mark.parametrize(("layers", "sizes"), [(1, [1]), (7, [1] * 7), (8, [1] * 8), (30, [3, 4, 4, 4, 3, 4, 4, 4])])
def test_parts_of_layers(layers, sizes):
    """Layers are divided into at most 8 parts of nearly equal size; with granularity "chunk" they are one part."""
    names = [f"model.layers.{i}" for i in range(layers)]
    parts = ConnectorOptions.parse({"granularity": "layer"}).parts(names)
    assert [len(part) for part in parts] == sizes and [name for part in parts for name in part] == names
    assert ConnectorOptions.parse({}).parts(names) == [names]


def group_of(spec, *names):
    return KVCacheGroupSpec(list(names), spec)


_FULL = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=4, dtype=torch.float32)
_WINDOW = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=4, dtype=torch.float32, sliding_window=64)
_CHUNKS = ChunkedLocalAttentionSpec(
    block_size=32, num_kv_heads=2, head_size=4, dtype=torch.float32, attention_chunk_size=128
)
_LATENT = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=8, dtype=torch.float32)
_STATES = MambaSpec(shapes=((4, 4),), dtypes=(torch.float32,), block_size=32)


@pytest.mark.parametrize(
    "groups",
    [
        [group_of(_WINDOW, "a")],
        [group_of(_LATENT, "a")],
        [group_of(_FULL, "a"), group_of(_WINDOW, "b", "c"), group_of(_CHUNKS, "d")],
        [group_of(_FULL, "a"), group_of(_FULL, "b")],
        [group_of(_FULL, "a"), group_of(_LATENT, "b")],
        [group_of(_STATES, "a")],
        [group_of(_LATENT, "a"), group_of(_STATES, "b")],
    ],
    ids=["window", "latent", "three kinds", "two of a kind", "latent and full", "states", "latent and states"],
)
def test_supported_caches(groups):
    """Full, sliding-window, chunked and latent attention and states are served, in one cache group or in several."""
    config = kv_cache_config()
    config.kv_cache_groups = groups
    refuse_unsupported(vllm_config(), config)


def test_unsupported_caches():
    """A cache that cannot be transferred correctly is refused at start-up, in a sentence that names it."""
    crossed = CrossAttentionSpec(block_size=32, num_kv_heads=2, head_size=4, dtype=torch.float32)
    caches = kv_cache_config()
    caches.kv_cache_groups = [group_of(_FULL, "a"), group_of(crossed, "b")]
    with pytest.raises(ConfigError, match="CrossAttentionSpec"):
        refuse_unsupported(vllm_config(), caches)


def test_hybrid_manager_is_left_on():
    """The connector declares that it takes several cache groups, so vLLM leaves its hybrid manager on."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import supports_hma

    assert supports_hma(KvxferConnector)
    assert not vllm_config().scheduler_config.disable_hybrid_kv_cache_manager


def test_groups_of_a_hybrid_model():
    """Layers of one kind have one name, and a part for each block table; the name of a window has its size."""
    config = kv_cache_config()
    config.kv_cache_groups = [
        group_of(_FULL, "l.0", "l.3"),
        group_of(_WINDOW, "l.1", "l.4"),
        group_of(_WINDOW, "l.2", "l.5"),
    ]
    found = layer_groups(config)
    assert [(group.name, group.table, group.layers, group.kind) for group in found] == [
        ("full/0", 0, ("l.0", "l.3"), "full_attention"),
        ("window-64/0", 1, ("l.1", "l.4"), "sliding_window"),
        ("window-64/1", 2, ("l.2", "l.5"), "sliding_window"),
    ]
    parted = layer_groups(config, [["l.0", "l.1", "l.2"], ["l.3", "l.4", "l.5"]])
    assert [(group.name, group.table, group.layers) for group in parted[:3]] == [
        ("full/0", 0, ("l.0",)),
        ("full/1", 0, ("l.3",)),
        ("window-64/0", 1, ("l.1",)),
    ]


def test_groups_without_the_hybrid_manager():
    """Without the hybrid manager, layers with a window have the same name as with it, and all tokens."""
    config = kv_cache_config()
    one = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=4, dtype=torch.float32, sliding_window=64)
    config.kv_cache_groups = [group_of(one, "l.0", "l.1", "l.2")]
    found = layer_groups(config, (), {"l.1": "window-64", "l.2": "window-64"})
    assert [(group.name, group.layers, group.kind) for group in found] == [
        ("full/0", ("l.0",), "full_attention"),
        ("window-64/0", ("l.1", "l.2"), "full_attention"),
    ]
    assert backoff_tokens(vllm_config(), config) == 1 and backoff_tokens(vllm_config(), kv_cache_config()) == 0


@pytest.mark.parametrize(
    ("table", "ids", "first", "tokens", "found"),
    [
        (GroupTable(4), [5, 6, 7], 0, 10, ([5, 6, 7], 0, 0)),
        (GroupTable(4), [5, 6, 7, 8], 4, 10, ([6, 7], 4, 0)),
        (GroupTable(4), [5, 6], 0, 10, None),
        (GroupTable(4), [0, 6, 7], 0, 10, None),
        (GroupTable(4, window_tokens=6), [0, 6, 7], 0, 10, ([6, 7], 4, 5)),
        (GroupTable(4, window_tokens=6), [5, 6, 7], 0, 10, ([5, 6, 7], 0, 5)),
        (GroupTable(4, window_tokens=6), [0, 0, 7], 0, 10, None),
        (GroupTable(4, window_tokens=6), [0, 0, 7], 8, 10, ([7], 8, 5)),
        (GroupTable(4, window_tokens=3), [0, 0, 7], 0, 10, ([7], 8, 8)),
        (GroupTable(4, window_tokens=6), [0, 6, 0], 0, 10, None),
        (GroupTable(4, chunk_tokens=8), [0, 0, 7], 0, 10, ([7], 8, 8)),
        (GroupTable(4, chunk_tokens=8), [0, 6], 0, 7, None),
        (GroupTable(4, chunk_tokens=8), [0, 0], 0, 8, ([], 8, 8)),
    ],
)
def test_blocks_of_a_table(table, ids, first, tokens, found):
    """A block table gives the blocks between two tokens; null blocks are allowed only for tokens that no later token needs."""
    blocks = table.blocks(ids, first, tokens)
    assert (None if blocks is None else tuple(blocks)) == found


def _caches(num_blocks=8, heads=2, tokens=32):
    names = kv_cache_config().kv_cache_groups[0].layer_names
    return {name: torch.zeros(num_blocks, heads, tokens, 8) for name in names}, names


def test_cache_of_one_rank():
    """The heads of a rank, its rank and the fingerprint are in the description; layers that share a cache are left out."""
    config = vllm_config()
    layers, names = _caches(heads=1)
    config.parallel_config.tensor_parallel_size = 2
    layers["model.layers.7.shares"] = layers[names[0]]
    cache = describe_cache(layers, in_groups([names]), config, kv_cache_config(8), rank=1, fingerprint="f")
    (group,) = cache.spec.groups
    assert (group.heads.start, group.heads.stop, group.heads.total) == (1, 2, 2)
    assert (cache.spec.rank, cache.spec.world, cache.spec.fingerprint) == (1, 2, "f")
    assert group.layers == (0, 1)
    assert (group.block_tokens, group.num_blocks) == (32, 8)


def test_kernel_blocks_smaller_than_table_blocks():
    """A cache with smaller blocks than the block table is described as such; block ids are those of the block table."""
    layers, names = _caches(num_blocks=16, tokens=16)
    cache = describe_cache(layers, in_groups([names]), vllm_config(), kv_cache_config(8), rank=0, fingerprint="")
    (group,) = cache.spec.groups
    assert (group.block_tokens, group.num_blocks) == (32, 8)
    assert {(region.extents.block, region.extents.token) for region in group.regions} == {(16, 16)}


@pytest.mark.parametrize(("num_blocks", "tokens"), [(16, 32), (4, 32), (8, 16), (7, 32)])
def test_a_cache_that_is_not_the_block_tables(num_blocks, tokens):
    """A cache that holds more or fewer tokens than the block table is refused at start-up, with the numbers of both."""
    layers, names = _caches(num_blocks=num_blocks, tokens=tokens)
    with pytest.raises(ConfigError, match=f"{num_blocks} blocks of {tokens} tokens, the block table 8 of 32"):
        describe_cache(layers, in_groups([names]), vllm_config(), kv_cache_config(8), rank=0, fingerprint="")


def test_cache_not_in_host_memory():
    """Tensors elsewhere than in host memory are refused at start-up, with the reason."""
    layers, names = _caches()
    layers = {name: tensor.to("meta") for name, tensor in layers.items()}
    with pytest.raises(KvxferError):
        describe_cache(layers, in_groups([names]), vllm_config(), kv_cache_config(8), rank=0, fingerprint="")


def test_fingerprint():
    """The fingerprint depends on model, configuration and dtype, not on layout and parallelism; an option replaces it."""
    base = model_fingerprint(vllm_config())
    other = vllm_config()
    other.cache_config.block_size = 64
    other.parallel_config.tensor_parallel_size = 2
    other.cache_config.cache_dtype = "fp8"  # compared in the cache's description, where it can be converted
    assert model_fingerprint(other) == base
    other.model_config.dtype = torch.bfloat16
    assert model_fingerprint(other) != base
    rope = vllm_config()
    rope.model_config.hf_text_config.rope_parameters["rope_theta"] = 7.0
    assert "rope theta=7;" in model_fingerprint(rope)
    moved = vllm_config()
    moved.model_config.model = "/elsewhere"
    assert model_fingerprint(moved) != base
    assert model_fingerprint(moved, "same") == model_fingerprint(vllm_config(), "same") != base


def drafting(method, model, *, eagle):
    """Configuration of a server with speculative decoding."""
    draft = SimpleNamespace(model=model, revision=None)
    config = vllm_config()
    config.speculative_config = SimpleNamespace(
        method=method, draft_model_config=draft, kv_cache_dtype=None, use_eagle=lambda: eagle
    )
    return config


def test_fingerprint_of_a_server_that_drafts():
    """Drafts that read the model's hidden states must be equal on both servers; others may differ, or be on one side only."""
    base = model_fingerprint(vllm_config())
    assert model_fingerprint(drafting("ngram", "", eagle=False)) == base
    assert model_fingerprint(drafting("draft_model", "small", eagle=False)) == base
    one, other = (model_fingerprint(drafting("eagle", model, eagle=True)) for model in ("head-1", "head-2"))
    assert len({base, one, other}) == 3


def test_layers_of_a_draft_model_are_matched_by_name():
    """Layers of a draft model, numbered from 0 as the model's, are matched by name; so are layers with gaps in the numbers."""
    layers, names = _caches()
    drafts = {f"draft_model.{name}": torch.zeros_like(tensor) for name, tensor in layers.items()}
    config = kv_cache_config(8)

    def described(tensors):
        return describe_cache(tensors, in_groups([list(tensors)]), vllm_config(), config, rank=0, fingerprint="").spec

    assert described(layers | drafts).layer_names == (*names, *drafts)
    assert described(layers).layer_names == tuple(names)
    gap = dict(zip([names[0], "model.layers.5.self_attn.attn"], layers.values(), strict=True))
    assert described(gap).layer_names == tuple(gap)


def _scheduler(tp_size=1, port=5600):
    role = Role(engine_id="P", is_producer=True, is_consumer=False)
    return KvxferScheduler(role, tp_size=tp_size, tables=[GroupTable(32)], host="h", port=port)


def test_addresses_of_all_ranks():
    """Each rank's address is in the lease, in rank order."""
    scheduler = _scheduler(tp_size=2)
    scheduler.set_addresses({1: KvxferHandshake("tcp://h:71"), 0: KvxferHandshake("tcp://h:70")})
    assert scheduler.addresses == ("tcp://h:70", "tcp://h:71")


@pytest.mark.parametrize("told", [{}, {0: object(), 1: object()}, {1: KvxferHandshake("tcp://h:71")}])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_handshakes_without_rank_0(told, tp_size):
    """The payload of another connector (MultiConnector passes it to all), or none, does no harm if the port is known."""
    scheduler = _scheduler(tp_size=tp_size)
    scheduler.set_addresses(told)
    assert scheduler.addresses == ("tcp://h:5600",)
    with pytest.raises(ConfigError, match="MultiConnector and on TPUs; there the side channel needs a fixed port"):
        _scheduler(tp_size=tp_size, port=0).set_addresses(told)


def test_rank_0_knows_the_others():
    """A single address, of rank 0, stands for all ranks."""
    scheduler = _scheduler(tp_size=2, port=0)
    scheduler.set_addresses({0: KvxferHandshake("tcp://h:70")})
    assert scheduler.addresses == ("tcp://h:70",)
