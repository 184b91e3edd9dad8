"""Which class runs which architecture, and how a model comes out of its weights.

Knows the names of the architectures; does not know files or the catalog.
"""

from __future__ import annotations

import torch

from uma_engine.errors import UnsupportedModel
from uma_engine.models.decoder import DecoderModel
from uma_engine.models.gemma3 import Gemma3
from uma_engine.models.llama import Llama
from uma_engine.models.mistral import Mistral
from uma_engine.models.packed_cache import PackedCache, Recorder
from uma_engine.models.qwen2 import Qwen2
from uma_engine.models.qwen3 import Qwen3
from uma_engine.models.weights import Placement, Progress, WeightReader, WeightSource

__all__ = ["ARCHITECTURES", "load_model"]

ARCHITECTURES: dict[str, type[DecoderModel]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "gemma3": Gemma3,
}


@torch.inference_mode()
def load_model(
    source: WeightSource,
    *,
    max_positions: int,
    precision: str = "exact",
    progress: Progress | None = None,
    placement: Placement | None = None,
    packed: PackedCache | None = None,
) -> DecoderModel:
    """Build the model that `source` describes, packing its tensors one at a time, or from what `packed` has kept of them.

    `max_positions` bounds the positions it will be asked for; `precision` is the arithmetic of its linear layers;
    `progress(done, total)` counts tensors; `placement` says where and as what the weights are kept, None: on the CPU.
    `packed` is for the CPU's compiled kernels alone.

    Errors:  UnsupportedModel for an unknown architecture or a tensor the architecture does not use; CorruptFile for a
             missing tensor or a wrong shape
    """
    config = source.config
    found = ARCHITECTURES.get(config.architecture)
    if found is None:
        raise UnsupportedModel(
            f"the architecture `{config.architecture}` is not supported",
            hint=f"supported are {', '.join(ARCHITECTURES)}",
        )
    if packed is None:
        return found(config, WeightReader(source, progress, placement), max_positions, precision)
    if (kept := packed.open()) is not None:
        return found(config, kept, max_positions, precision)
    recorder = Recorder()
    model = found(config, WeightReader(source, progress, placement, recorder), max_positions, precision)
    packed.save(recorder)
    return model
