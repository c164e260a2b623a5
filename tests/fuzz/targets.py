# SPDX-License-Identifier: Apache-2.0
"""All readers of data from outside, as functions of bytes. Each returns True if the input was accepted.

A reader refuses an input by raising its named error, the only one that is caught here. An accepted input is written again
and read again, and must mean the same. Any other exception or result is a finding.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec
import numpy as np

from kvxfer import secret as secrets_room
from kvxfer.agents.inproc import InprocAgent
from kvxfer.cli.planning.specs import read_side
from kvxfer.cli.planning.words import Written, written
from kvxfer.config import Settings, names
from kvxfer.errors import (
    BlockError,
    ConfigError,
    DescriptorError,
    IncompatibleError,
    LayoutError,
    LeaseRefError,
    PeerConflictError,
    PeerInfoError,
    WireError,
)
from kvxfer.layout.block_table import BlockTable, check_tables, ids_from_wire, ids_to_wire
from kvxfer.layout.spec import CacheSpec, encode_spec
from kvxfer.memory.copies import Cast, Copy, StridedLoop
from kvxfer.memory.spans import Descriptors, Memory, RegionTable
from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import plan
from kvxfer.protocol import messages
from kvxfer.protocol.actions import PackKey, StartPack
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.runtime.packer import Packer
from kvxfer.runtime.staging import StagingArena
from kvxfer_serving import mooncake_params, transfer_params
from kvxfer_serving.options import ConnectorOptions
from kvxfer_serving.refusals import RefusedParams
from kvxfer_vllm.bootstrap.answer import BootstrapEntry, WrongAnswerError, engine_in
from tests.fuzz import machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.buffers.cache import KVCache

_CHEAP = {"n": 2, "r": 1, "p": 1}
"""Derive secrets cheaply, because the cost of that is not tested here."""
_MEMORY = "/dev/shm"
_FOLDER = Path(tempfile.mkdtemp(prefix="kvxfer-fuzz-", dir=_MEMORY if Path(_MEMORY).is_dir() else None))
TOKEN = "ab" * 16


def tidy() -> None:
    """Remove what targets wrote."""
    shutil.rmtree(_FOLDER, ignore_errors=True)


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        form: of its inputs, see `tests.fuzz.mutate`.
        run: see the module.
        seeds: good inputs.
        covers: files of the product whose lines its inputs have to reach, with how many of a hundred at the least.
    """

    name: str
    form: str
    run: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]
    covers: dict[str, int]


def _value(data: bytes) -> Any:
    """JSON that came to a reader as an object already, as vLLM's parameters do."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _dumped(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def _file(name: str, data: bytes) -> str:
    path = _FOLDER / name
    path.write_bytes(data)
    path.chmod(0o600)
    return str(path)


# -- messages ------------------------------------------------------------------------------------------------------------


def run_wire(data: bytes) -> bool:
    try:
        message = messages.decode(data)
    except WireError:
        return False
    assert messages.decode(messages.encode(message)) == message
    return True


def seeds_wire() -> list[bytes]:
    return [
        messages.encode(message)
        for message in (
            messages.Hello(protocol=messages.PROTOCOL, name="n", epoch="e", rank=3, agent="nixl", consumer_rank=1, consumer_world=2),
            messages.Welcome(
                protocol=messages.PROTOCOL, name="n", epoch="e", rank=0, agent="nixl", agent_info=b"\0\xff", spec=machine.SPEC,
                slot_nbytes=9, casts=["float16"], addresses=["tcp://h:1"],
            ),
            messages.Acquire(to="e", token=TOKEN, rendezvous=True),
            messages.Grant(token=TOKEN, blocks=[b"\1\0\0\0"], cell=64, check=bytes(16), ttl_s=0.5, first_tokens=[4], complete=False),
            messages.Renew(to="e", tokens=[TOKEN] * 3),
            messages.Renewed(ended=[TOKEN]),
            messages.StageChunk(to="e", token=TOKEN, number=5, layout=encode_spec(machine.SPEC), tokens=(3, 9), released=[0, 7]),
            messages.ChunkReady(token=TOKEN, number=0, address=4096),
            messages.ReleaseChunks(to="e", token=TOKEN, numbers=[0, 7]),
            messages.Write(
                to="e", token=TOKEN, check=bytes(16), number=9, agent_info=b"\xff", steps=[bytes(24), bytes(48)],
                within_s=0.5, over_below=7,
            ),
            messages.AskWrite(to="e", token=TOKEN, number=9),
            messages.SendWrite(token=TOKEN, number=9),
            messages.StopWrite(to="e", token=TOKEN, number=9),
            messages.Wrote(token=TOKEN, number=9, error="because", quiet=False),
            messages.Release(to="e", token=TOKEN, read=True),
            messages.Released(token=TOKEN, was_live=False),
            messages.Revoked(token=TOKEN, reason="because"),
            messages.Refused(code="rank", reason="because", epoch="e", token=TOKEN, rank=2),
        )
    ]  # fmt: skip


def run_machine(data: bytes) -> bool:
    try:
        steps = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return machine.run(steps)


def seeds_machine() -> list[bytes]:
    return [msgspec.msgpack.encode(steps) for steps in machine.seeds()]


# -- leases and vLLM's parameters ------------------------------------------------------------------------------------------


def _lease(**more: Any) -> LeaseRef:
    return LeaseRef.from_obj(
        {
            **LeaseRef.mint(producer="P", addresses=["tcp://h:1"], request="r", num_tokens=32).to_obj(),
            "token": TOKEN,
            **more,
        }
    )


def run_lease(data: bytes) -> bool:
    try:
        ref = LeaseRef.from_json(data)
    except LeaseRefError:
        return False
    assert LeaseRef.from_json(ref.to_json()) == ref == LeaseRef.from_obj(ref.to_obj())
    return True


def seeds_lease() -> list[bytes]:
    return [
        _lease().to_json().encode(),
        _lease(rendezvous=True, digest="d", addresses=["tcp://h:1", "tcp://[::1]:2"]).to_json().encode(),
    ]


def run_params(data: bytes) -> bool:
    value = _value(data)
    if not isinstance(value, dict):
        value = {"params": value}
    request_id = value.get("id") if isinstance(value.get("id"), str) else ""
    accepted = False
    for role in (
        transfer_params.Role("D", False, True),
        transfer_params.Role("P", True, False),
        transfer_params.Role("x", True, True, False),
    ):
        asked = transfer_params.parse(value.get("params"), role, request_id)
        if isinstance(asked, mooncake_params.BootstrapRequest):
            found = mooncake_params.named_by_bootstrap(value["params"], "P2", "tcp://h:5600")
            asked = transfer_params.parse(found, role, request_id)
            assert not isinstance(asked, mooncake_params.BootstrapRequest)
        if isinstance(asked, transfer_params.TurnRequest):
            assert isinstance(asked.producer, transfer_params.ProducerRequest)
            asked = asked.consumer
        if isinstance(asked, transfer_params.ConsumerRequest):
            ref = asked.lease
            answer = transfer_params.response(ref, [[1]], host="h", port=1, tp_size=len(ref.addresses))
            again = transfer_params.parse(json.loads(json.dumps(answer)), role)
            assert (
                again == transfer_params.ConsumerRequest(msgspec.structs.replace(ref, rendezvous=False))
                or not ref.num_tokens
            )
        assert asked is None or isinstance(
            asked,
            (
                transfer_params.ProducerRequest,
                transfer_params.ConsumerRequest,
                transfer_params.RendezvousRequest,
                RefusedParams,
            ),
        )
        accepted = accepted or not isinstance(asked, (RefusedParams, type(None)))
    return accepted


def seeds_params() -> list[bytes]:
    fetch = transfer_params.response(_lease(), [[1, 2]], host="h", port=5600, tp_size=1)
    meet = {
        "do_remote_prefill": True,
        "remote_engine_id": "P2",
        "remote_host": "h",
        "remote_port": 5600,
        "transfer_id": "t",
    }
    named = {"do_remote_prefill": True, "transfer_id": "t"}
    mooncake = {**named, "remote_engine_id": "P2", "remote_bootstrap_addr": "http://h:8998"}
    asked = [({"do_remote_decode": True, "transfer_id": "t"}, ""), (fetch, ""), (meet, "")]
    turn = {**fetch, "do_remote_decode": True}
    asked += [(mooncake, ""), (named, "x___prefill_addr_P@h:1___decode_addr_D@h:2_y"), (turn, ""), ({}, "")]
    return _dumped(*({"params": params, "id": request_id} for params, request_id in asked))


def run_bootstrap(data: bytes) -> bool:
    try:
        engine_id, address = engine_in(data, "P_dp1")
    except WrongAnswerError:
        return False
    found = mooncake_params.named_by_bootstrap({"do_remote_prefill": True, "transfer_id": "t"}, engine_id, address)
    asked = transfer_params.parse(found, transfer_params.Role("D", False, True))
    assert isinstance(asked, (transfer_params.RendezvousRequest, RefusedParams))
    return True


def seeds_bootstrap() -> list[bytes]:
    entries = {str(rank): BootstrapEntry.of(f"P_dp{rank}", [f"tcp://h:{rank + 1}"], 1) for rank in range(2)}
    old = {rank: {"engine_id": "Q", "kvxfer": {"address": "tcp://[::1]:5600", "v": 1}} for rank in ("0", "1")}
    return [msgspec.json.encode(each) for each in (entries, old, {"0": {"engine_id": "Q", "worker_addr": {}}})]


def run_options(data: bytes) -> bool:
    value = _value(data)
    try:
        options = ConnectorOptions.parse(value if isinstance(value, dict) else {})
        options.for_endpoint({"VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "480"})
        options.parts(["a", "b", "c"])
        options.for_agent()
    except ConfigError:
        return False
    return True


def seeds_options() -> list[bytes]:
    return _dumped(
        {
            "agent": "nixl",
            "backends": ["UCX"],
            "agent_options": {"x": 1},
            "mode": "push",
            "granularity": "layer",
            "lease_seconds": 3,
        },
        {
            "secret_file": "f",
            "allow_unauthenticated": True,
            "model_fingerprint": "m",
            "unread_lease_seconds": 2.5,
            "announce_timeout_seconds": 1,
        },
        {"bootstrap_port": 8998, "num_workers": 10},
    )


def run_settings(data: bytes) -> bool:
    value = _value(data)
    value = value if isinstance(value, dict) else {}
    environ = {f"KVXFER_{str(key).upper()}": str(each) for key, each in value.items()}
    try:
        settings = Settings.resolve(environ=environ)
        assert Settings.resolve(environ={}, **{name: getattr(settings, name) for name in names()}) == settings
        settings.describe()
        Settings(**value)
    except (ConfigError, TypeError) as error:
        assert isinstance(error, ConfigError) or "unexpected keyword" in str(error).lower(), error
        return False
    return True


def seeds_settings() -> list[bytes]:
    return _dumped({name: getattr(Settings(), name) for name in names()}, {"lease_s": "1e3", "max_leases": "5"})


# -- caches --------------------------------------------------------------------------------------------------------------


def run_spec(data: bytes) -> bool:
    """A peer's cache, and what it is to ours: a plan and its chunks, or a reason."""
    try:
        spec = msgspec.json.decode(data, type=CacheSpec)
    except (LayoutError, msgspec.MsgspecError, RecursionError, UnicodeError):
        return False
    assert msgspec.json.decode(msgspec.json.encode(spec), type=CacheSpec) == spec
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=CacheSpec) == spec
    for source, target in ((spec, machine.SPEC), (machine.SPEC, spec), (spec, spec)):
        try:
            made = plan([source], target, convert=True)
            for part in made.rank_plans:
                for like in ("source", "target"):
                    chunk_planner = ChunkPlanner(part, like, 1 << 16)
                    for chunk, _ in zip(chunk_planner.chunks([(0, 8)] * len(target.groups)), range(3), strict=False):
                        chunk_planner.layout(chunk)
        except IncompatibleError:
            pass
    return True


def seeds_spec() -> list[bytes]:
    sides = [
        "llama-3-8b tp=4 order=NHD block=4 blocks=8 layers=2",
        "gemma-2-9b tp=2 blocks=9 block=8 layers=4",
        "deepseek-v3 blocks=8 layers=2",
    ]
    specs = [machine.SPEC, *(_side(text)[1] for text in sides)]
    scaled = json.loads(msgspec.json.encode(specs[1]))
    scaled["dtype"] = "float8_e4m3fn"
    scaled["groups"][0]["scales"] = [["kv", 0, [0.5]]]
    return [msgspec.json.encode(spec) for spec in specs] + _dumped(scaled)


@cache
def _packing() -> tuple[Packer, StagingArena, list[Any], KVCache]:
    packed: list[Any] = []
    arena, own = StagingArena(1 << 15), machine.cache()
    return Packer(own, arena, lambda *told: packed.append(told)), arena, packed, own


def run_layout(data: bytes) -> bool:
    """A chunk that a malicious peer asks for is packed into its slot, without a change beside the slot, or refused by name."""
    try:
        message = messages.decode(data)
    except WireError:
        return False
    if not isinstance(message, messages.StageChunk):
        return False
    try:
        layout = messages.layout_of(message)
    except WireError:
        return False
    packer, arena, packed, _ = _packing()
    packed.clear()
    key = PackKey("t", 0)
    everything = arena.view(arena.memory.address, arena.memory.nbytes)
    everything[:] = 0xA5
    packer.start(StartPack(key, message.number, layout, message.tokens, [BlockTable(np.arange(1, 9), 0)]))
    packer.turn()
    ((_, number, address, error),) = packed
    assert number == message.number and (address is None) != (error is None)
    if address is not None:
        outside = np.ones(arena.memory.nbytes, dtype=bool)
        begin = address - arena.memory.address
        outside[begin : begin + arena.slot_nbytes] = False
        assert (everything[outside] == 0xA5).all(), "something beside the slot was written"
    packer.end(key, [])
    assert arena.in_use == 0 and not packer.busy
    return address is not None


def seeds_layout() -> list[bytes]:
    found = []
    for like, tokens in (("source", (0, 8)), ("target", (3, 9))):
        part = plan([machine.SPEC], machine.SPEC).rank_plans[0]
        chunk_planner = ChunkPlanner(part, like, 1 << 12)
        for chunk in list(chunk_planner.chunks([tokens]))[:2]:
            stage = messages.StageChunk(
                token=TOKEN, number=1, layout=chunk_planner.layout(chunk).encoded, tokens=chunk.tokens
            )
            found.append(messages.encode(stage))
    return found


def run_blocks(data: bytes) -> bool:
    """Block ids of an engine, and of a peer's grant."""
    value = _value(data)
    try:
        raw = ids_from_wire(data)
        assert ids_to_wire(raw) == data
    except BlockError:
        pass
    accepted = False
    if isinstance(value, dict):
        value = [BlockTable(value.get("ids"), value.get("first", 0))]  # type: ignore[arg-type]
    for distinct in (False, True):
        try:
            for table in check_tables(machine.SPEC, value, "source", distinct=distinct):
                assert table.ids.dtype == np.int64 and ((table.ids >= 0) & (table.ids < 16)).all()
                accepted = True
        except BlockError:
            pass
    return accepted


def seeds_blocks() -> list[bytes]:
    return [*_dumped([1, 2, 3], {"ids": [4, 5], "first": 8}, [[1, 2]], [], [0, 15, 15]), b"\1\0\0\0\2\0\0\0"]


# -- what agents and devices are given ----------------------------------------------------------------------------------------


@cache
def _agents() -> tuple[InprocAgent, InprocAgent]:
    made = InprocAgent("fuzz-here"), InprocAgent("fuzz-there")
    made[1].register(Memory(1 << 20, 4096))
    return made


def run_agent(data: bytes) -> bool:
    here, _ = _agents()
    try:
        peer = here.connect(data)
    except (PeerInfoError, PeerConflictError):
        return False
    here.disconnect(peer)
    return True


def seeds_agent() -> list[bytes]:
    return [_agents()[1].describe()]


def run_copy(data: bytes) -> bool:
    """A strided copy for a device: if it passes its check, every byte of it lies inside its memory."""
    value = _value(data)
    if not isinstance(value, list) or len(value) != 7:
        return False
    *arrays, loops, nbytes, cast = value[0], value[1], value[2], value[3], value[4], value[5], value[6]
    try:
        made = [np.array(each, dtype=np.int64) for each in arrays]
    except (ValueError, TypeError, OverflowError):
        made = arrays
    if isinstance(loops, list):
        loops = tuple(StridedLoop(*each) if isinstance(each, list) and len(each) == 3 else each for each in loops)
    cast = Cast(*cast) if isinstance(cast, list) and len(cast) == 3 else cast
    copy = Copy(*made, loops, nbytes, cast)  # type: ignore[arg-type]
    try:
        copy.check(4096, 4096)
    except DescriptorError:
        return False
    if copy.runs <= 4096:
        source, target = copy.source[:, None] + copy.source_blocks, copy.target[:, None] + copy.target_blocks
        for loop in copy.loops:
            steps = np.arange(loop.count)
            source = source[..., None] + steps * loop.source_stride
            target = target[..., None] + steps * loop.target_stride
        assert source.min() >= 0 and source.max() + copy.nbytes <= 4096
        assert target.min() >= 0 and target.max() + copy.target_nbytes <= 4096
    return True


def seeds_copy() -> list[bytes]:
    return _dumped(
        [[0, 512], [0, 1024], [0], [64], [[4, 128, 64], [2, 32, 32]], 32, None],
        [[0], [0], [0, 256], [0, 128], [[2, 64, 32]], 64, ["float32", "float16", 1.0]],
        [[0], [0], [0], [0], [], 16, ["float8_e4m3fn", "bfloat16", 0.5]],
    )


def run_descriptors(data: bytes) -> bool:
    """Spans for a transfer engine: those that pass lie in registered memory, and merging or cutting them loses nothing."""
    value = _value(data)
    if not isinstance(value, list) or len(value) != 5:
        return False
    try:
        spans = Descriptors(*(np.array(each, dtype=np.uint64) for each in value[:3]))
    except DescriptorError:
        return False
    except (ValueError, TypeError, OverflowError):
        return False  # no arrays: NumPy's own refusal, before anything of ours
    table = RegionTable([Memory(4096, 8192), Memory(1 << 20, 1 << 16), Memory((1 << 63) - 4096, 4096)])
    try:
        index = table.locate(spans.local, spans.nbytes, "local")
    except DescriptorError:
        return False
    for address, nbytes, at in zip(
        spans.local.tolist(), spans.nbytes.tolist(), np.broadcast_to(index, len(spans)).tolist(), strict=True
    ):
        assert table[at].address <= address and address + nbytes <= table[at].end
    merged = spans.merged(index)
    limits = [limit if type(limit) is int and 0 < limit < 1 << 40 else None for limit in value[3:]]
    if limits[1] is None or spans.total_nbytes // limits[1] < 10_000:
        parts = merged.split(*limits)
        assert sum(part.total_nbytes for part in parts) == merged.total_nbytes == spans.total_nbytes
        assert all(len(part) <= (limits[0] or len(part)) for part in parts)
    return True


def seeds_descriptors() -> list[bytes]:
    return _dumped(
        [[4096, 4160, 4224], [0, 64, 256], [64, 64, 64], 2, 100],
        [[1 << 20, 4096], [5, 6], [65536, 8192], None, 1000],
        [[], [], [], 1, 1],
    )


# -- what people write -----------------------------------------------------------------------------------------------------


def _side(text: str, tokens: int = 64) -> tuple[Any, CacheSpec]:
    side = read_side(written(text), tokens)
    return side, side.specs[0]


def run_words(data: bytes) -> bool:
    text = data.decode("utf-8", "replace")[:400]
    try:
        asked = written(text)
        if asked.what.endswith(".json") or asked.what.startswith(("vllm:", "hf:")):
            return False  # another target's
        # A side of great size is only slow; what is asked here is what is let in.
        small = {
            key: value
            for key, value in asked.words.items()
            if key not in ("layers", "tp", "pp", "blocks") or len(value) < 3
        }
        read_side(Written(asked.what, small), 64)
    except ConfigError:
        return False
    return True


def seeds_words() -> list[bytes]:
    return [
        b"llama-3-8b tp=4 order=HND block=16 dtype=fp8", b"deepseek-v3 pp=3 addressable=no", b"gpt-oss-20b kernel-block=8 block=16",
        b"layers=4 heads=8 head_dim=64 apart=yes window=99 fingerprint='a b' blocks=9", b"gemma-2-9b order=BLHNC tokens=5",
    ]  # fmt: skip


def run_side_file(data: bytes) -> bool:
    try:
        side = read_side(Written(_file("specs.json", data), {"window": "64"}), 64)
    except ConfigError:
        return False
    again = msgspec.json.encode(list(side.specs))
    assert read_side(Written(_file("again.json", again), {}), 64).specs == side.specs
    return True


def seeds_side_file() -> list[bytes]:
    return [msgspec.json.encode(list(_side("llama-3-8b tp=2 layers=2 blocks=4")[0].specs)), seeds_spec()[0]]


def run_model_file(data: bytes) -> bool:
    # Slow sizes are another matter, see `run_words`.
    try:
        read_side(Written("vllm:" + _file("config.json", data), {"layers": "2", "blocks": "4"}), 64)
    except ConfigError:
        return False
    return True


def seeds_model_file() -> list[bytes]:
    llama = {
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 64,
        "torch_dtype": "bfloat16",
    }
    mla = {"model_type": "deepseek_v3", "num_hidden_layers": 3, "kv_lora_rank": 64, "qk_rope_head_dim": 8}
    return _dumped(
        llama,
        {**mla, "dtype": "torch.float16"},
        {**llama, "head_dim": 16, "sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]},
        {"model_type": "gemma3", "text_config": {**llama, "sliding_window": 64}, "torch_dtype": "float16"},
        {**llama, "model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
        {**llama, "model_type": "mistral", "sliding_window": 64},
        {**llama, "model_type": "qwen2_vl", "quantization_config": {"kv_cache_scheme": None}},
        {"model_type": "falcon", "multi_query": False, "num_kv_heads": 71},
        {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 64},
        {"model_type": "cwm", "num_hidden_layers": 6},
        {**llama, "mamba_d_state": 4},
        {**llama, "frobs": 4},
    )


def run_costs(data: bytes) -> bool:
    try:
        costs = Costs.load(_file("costs.json", data))
    except ConfigError:
        return False
    costs.save(_FOLDER / "again")
    assert Costs.load(_FOLDER / "again") == costs
    return True


def seeds_costs() -> list[bytes]:
    Costs().save(_FOLDER / "seed")
    return [(_FOLDER / "seed").read_bytes()]


def run_secret(data: bytes) -> bool:
    try:
        with mock.patch.object(secrets_room, "_COST", _CHEAP):
            secret = secrets_room.Secret.resolve(file=_file("secret", data))
    except ConfigError as error:
        assert not data.rstrip() or data.rstrip().decode("latin-1") not in str(error) or len(data.rstrip()) < 4
        return False
    assert secret is not None and len(secret.digest(data)) == 16
    return True


def seeds_secret() -> list[bytes]:
    return [b"sixteen bytes at least, and here are more\n", bytes(range(64)), b"short"]


TARGETS = [
    Target("wire", "msgpack", run_wire, seeds_wire, {"kvxfer/protocol/messages.py": 95}),
    Target("machine", "msgpack", run_machine, seeds_machine, {
        # Not more of the consumer: what it does after faults of kvxfer itself no message can reach.
        "kvxfer/protocol/producer.py": 85, "kvxfer/protocol/chunk_staging.py": 86, "kvxfer/protocol/requested_writes.py": 85, "kvxfer/protocol/consumer_connections.py": 90, "kvxfer/protocol/lease_requests.py": 90, "kvxfer/protocol/consumer.py": 82, "kvxfer/protocol/held_leases.py": 80, "kvxfer/protocol/peers.py": 80, "kvxfer/protocol/lease_table.py": 70,
    }),
    Target("lease", "json", run_lease, seeds_lease, {}),
    Target(
        "params",
        "json",
        run_params,
        seeds_params,
        {f"integrations/kvxfer_serving/{name}.py": 85 for name in ("transfer_params", "key_checks", "mooncake_params")},
    ),
    Target("bootstrap", "json", run_bootstrap, seeds_bootstrap, {"integrations/kvxfer_vllm/bootstrap/answer.py": 85}),
    Target("options", "json", run_options, seeds_options, {"integrations/kvxfer_serving/options.py": 60}),
    Target("settings", "json", run_settings, seeds_settings, {"kvxfer/config.py": 90}),
    Target("spec", "json", run_spec, seeds_spec, {"kvxfer/layout/spec.py": 85, "kvxfer/planner/chunks.py": 75}),
    Target("layout", "msgpack", run_layout, seeds_layout, {"kvxfer/runtime/packer.py": 70}),
    Target("blocks", "json", run_blocks, seeds_blocks, {"kvxfer/layout/block_table.py": 85}),
    Target("agent", "msgpack", run_agent, seeds_agent, {}),
    Target("copy", "json", run_copy, seeds_copy, {"kvxfer/memory/copies.py": 85}),
    Target("descriptors", "json", run_descriptors, seeds_descriptors, {"kvxfer/memory/spans.py": 75}),
    Target("words", "bytes", run_words, seeds_words, {"kvxfer/cli/planning/words.py": 85}),
    Target("side_file", "json", run_side_file, seeds_side_file, {"kvxfer/cli/planning/specs.py": 70}),
    Target("model_file", "json", run_model_file, seeds_model_file, {"kvxfer/cli/planning/hf_config.py": 80}),
    Target("costs", "json", run_costs, seeds_costs, {}),
    Target("secret", "bytes", run_secret, seeds_secret, {"kvxfer/secret.py": 85}),
]  # fmt: skip

BY_NAME = {target.name: target for target in TARGETS}
