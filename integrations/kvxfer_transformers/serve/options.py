# SPDX-License-Identifier: Apache-2.0
"""Command line of the server, with the names of vLLM's where it has the same, and ``--kv-transfer-config``."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kvxfer.errors import ConfigError
from kvxfer.secret import Secret
from kvxfer_serving.options import ConnectorOptions, advertised, tcp_address

if TYPE_CHECKING:
    from collections.abc import Mapping

CONNECTOR: Final = "KvxferConnector"
_ROLES = ("kv_both", "kv_producer", "kv_consumer")
_WITHOUT_MEANING = ("kv_connector_module_path", "kv_buffer_device")
"""Keys that vLLM needs, and this server does not."""
_DEVICES = ("auto", "cpu", "cuda")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of a server. None leaves the choice to transformers, or to the model.

    Attributes:
        model: path or name of the model.
        host, port: of HTTP.
        names: of the model, for clients; by default ``model``.
        transfer: arguments of `kvxfer_transformers.batching.TransferOptions`.
        dtype, device, trust_remote_code: as for transformers.
        page_tokens, num_blocks, max_batch_tokens, max_requests: of continuous batching.
        max_model_tokens: longest prompt with its answer.
        shutdown_timeout: seconds that requests have after SIGTERM.
        access_log: whether each request is logged.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    transfer: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    page_tokens: int | None = None
    num_blocks: int | None = None
    max_batch_tokens: int | None = None
    max_requests: int | None = None
    max_model_tokens: int | None = None
    shutdown_timeout: int = 0
    access_log: bool = True

    @classmethod
    def parse(cls, arguments: list[str] | None = None, environ: Mapping[str, str] | None = None) -> ServeOptions:
        """Make options of a command line; a wrong one ends the process, as usual for argparse.

        Raises:
            ConfigError: ``--kv-transfer-config`` or a variable is wrong; the message says what is allowed.
        """
        parser = command_line()
        given = parser.parse_args(arguments)
        if (given.positional is None) == (given.model is None):
            parser.error("one model is needed: MODEL or --model MODEL")
        try:
            config = msgspec.json.decode(given.kv_transfer_config, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise ConfigError(f"--kv-transfer-config must be a JSON object: {error}") from None
        model = given.positional or given.model
        return cls(
            model=model,
            host=given.host,
            port=given.port,
            names=tuple(given.served_model_name or [model]),
            transfer=transfer_arguments(config, os.environ if environ is None else environ),
            dtype=given.dtype,
            device=given.device,
            trust_remote_code=given.trust_remote_code,
            page_tokens=given.block_size,
            num_blocks=given.num_gpu_blocks_override,
            max_batch_tokens=given.max_num_batched_tokens,
            max_requests=given.max_num_seqs,
            max_model_tokens=given.max_model_len,
            shutdown_timeout=given.shutdown_timeout,
            access_log=not given.disable_uvicorn_access_log,
        )


def transfer_arguments(config: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Make arguments of ``TransferOptions`` from vLLM's ``--kv-transfer-config``, and from the side channel's variables.

    Raises:
        ConfigError: a key is unknown or its value is not supported; the message says what is allowed.
    """
    known = ("kv_connector", "kv_role", "engine_id", "kv_load_failure_policy", "kv_connector_extra_config")
    for key in config:
        if key not in known + _WITHOUT_MEANING:
            raise ConfigError(f"kv_transfer_config: unknown key {key!r}; known are {', '.join(known)}")
    if config.get("kv_connector", CONNECTOR) != CONNECTOR:
        raise ConfigError(f"kv_connector must be {CONNECTOR}, not {config['kv_connector']!r}")
    role, name = config.get("kv_role", "kv_both"), config.get("engine_id")
    if role not in _ROLES:
        raise ConfigError(f"kv_role must be one of {', '.join(_ROLES)}, not {role!r}")
    if name is not None and (not isinstance(name, str) or not name):
        raise ConfigError(f"engine_id must be a string, not {name!r}")
    extra = config.get("kv_connector_extra_config", {})
    if not isinstance(extra, dict):
        raise ConfigError(f"kv_connector_extra_config must be an object, not {extra!r}")
    options = ConnectorOptions.parse(extra)
    for what, wrong in (
        ("bootstrap_port", options.bootstrap_port is not None),
        ("mode 'pull'", options.mode == "pull"),
        ("granularity 'layer'", options.granularity == "layer"),
        ("nixl_metrics", options.nixl_metrics),
    ):
        if wrong:
            raise ConfigError(f"kv_connector_extra_config: {what} is for vLLM's connector only: leave it out")
    host, port = options.side_channel(environ, 0)
    return {
        "agent": options.agent,
        "agent_options": options.for_agent(),
        "bind": tcp_address(host, port),
        "advertise": advertised(host),
        "name": name,
        "role": role,
        "settings": options.for_endpoint(environ),
        "secret": Secret.resolve(file=options.secret_file),
        "allow_unauthenticated": options.allow_unauthenticated,
        "verify": options.verify,
        "convert": options.convert,
        "kv_load_failure_policy": config.get("kv_load_failure_policy", "fail"),
        "model_fingerprint": options.model_fingerprint,
    }


def _number(least: int) -> Any:
    """Make the type of an argument that is a whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, not {text!r}")
        return int(text)

    return number


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line, which has each argument's meaning."""
    parser = argparse.ArgumentParser(
        prog="python -m kvxfer_transformers.serve",
        description="OpenAI-compatible server on transformers' continuous batching, which prefills and decodes for others.",
    )
    add = parser.add_argument
    add("positional", nargs="?", metavar="MODEL", help="path or name of a model")
    add("--model", help="the same, as vLLM's API server has it")
    add("--host", default="127.0.0.1", help="address of HTTP (default: 127.0.0.1)")
    add("--port", type=_number(1), default=8000, help="port of HTTP (default: 8000)")
    add("--served-model-name", nargs="+", help="names of the model for clients (default: MODEL)")
    add("--kv-transfer-config", default="{}", metavar="JSON", help="as vLLM's (default: {}, which is kv_role kv_both)")
    add("--dtype", choices=_DTYPES, default="auto", help="of weights and KV (default: that of the checkpoint)")
    add("--device", choices=_DEVICES, default="auto", help="default: cuda if there is one")
    add("--trust-remote-code", action="store_true", help="as for transformers")
    add("--block-size", type=_number(1), help="tokens of a page (default: 256, or what fits into the model's window)")
    add("--num-gpu-blocks-override", type=_number(1), help="pages of the cache, on any device")
    add("--max-num-batched-tokens", type=_number(1), help="most tokens of one step")
    add("--max-num-seqs", type=_number(1), help="most requests of one step")
    add("--max-model-len", type=_number(2), help="longest prompt with its answer (default: the model's)")
    add("--shutdown-timeout", type=_number(0), default=0, help="seconds that requests have after SIGTERM (default: 0)")
    add("--disable-uvicorn-access-log", action="store_true", help="do not log each request")
    add("--enforce-eager", action="store_true", help="accepted for vLLM's sake, has no effect")
    return parser
