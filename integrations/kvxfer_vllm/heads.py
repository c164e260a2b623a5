# SPDX-License-Identifier: Apache-2.0
"""KV heads of the layers of a model, of which a rank has a part or, if there are fewer heads than ranks, copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.kv_cache_interface import MLAAttentionSpec

from kvxfer.errors import ConfigError
from kvxfer_vllm.kv_dtypes import packed_format

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


class LayerHeads(NamedTuple):
    """KV heads of one layer; a latent is one head.

    Attributes:
        of_rank: number of them that a rank has.
        total: number of them that the model has.
        usual: whether the model's other layers have as many.
    """

    of_rank: int
    total: int
    usual: bool = True


class HeadCounts:
    """Numbers of KV heads of a model's layers.

    vLLM says how many heads of a layer a rank has. If that is one, there may be as many heads as ranks or fewer, and the
    model's configuration has to say how many.

    Args:
        vllm_config: of this server.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._of_all_devices = vllm_config.device_config.device_type == "tpu"
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        model, speculative = vllm_config.model_config, vllm_config.speculative_config
        draft = getattr(speculative, "draft_model_config", None)
        self._of_model = int(model.get_total_num_kv_heads())
        self._known = _totals(model) | (_totals(draft) if draft is not None else set())

    def of(self, layer: str, spec: KVCacheSpec) -> LayerHeads:
        """Heads of a layer.

        Raises:
            ConfigError: it is not known how many ranks have a copy of the same head.
        """
        if isinstance(spec, MLAAttentionSpec):
            return LayerHeads(1, 1)
        heads = int(getattr(spec, "num_kv_heads", 1))
        total = heads * self._ranks
        if heads == 1 and self._ranks > 1:
            possible = {number for number in self._known if number <= self._ranks}
            if len(possible) != 1:
                raise ConfigError(
                    f"KvxferConnector does not support tensor_parallel_size {self._ranks} with layers of"
                    f" {' or '.join(map(str, sorted(possible or self._known)))} KV heads yet, of which {layer} has one on"
                    " each rank; set a smaller tensor_parallel_size"
                )
            (total,) = possible
        # On TPUs vLLM counts the heads of all devices of a runner, copies included; their shares are made from its arrays.
        usual = total == self._of_model or self._of_all_devices
        if packed_format(spec):
            # The axis of heads is not made of heads alone; then both servers divide it in the same way.
            heads = int(getattr(spec, "num_heads", heads))
            total = heads * self._ranks
        return LayerHeads(heads, total, usual)


def _totals(model: ModelConfig) -> set[int]:
    """Numbers of KV heads that layers of a model have."""
    described = model.model_arch_config
    layers = [described[i] for i in range(described.total_num_hidden_layers)] if described.per_layer_overrides else []
    return {int(model.get_total_num_kv_heads()), *(int(layer.total_num_kv_heads) for layer in layers)}
