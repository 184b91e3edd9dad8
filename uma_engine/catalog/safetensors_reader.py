"""Reads the weights of a Hugging Face directory: one safetensors file, or shards named by an index.

Knows which files belong together and refuses pickles; does not know architectures or what a tensor is for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uma_engine.errors import CorruptFile, UnsupportedModel

if TYPE_CHECKING:
    import torch

__all__ = ["PICKLE_SUFFIXES", "SafetensorsDirectory", "read_json", "refuse_pickle"]

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20
HINT = "the file is damaged or was not downloaded whole: fetch it again"


def refuse_pickle(path: Path) -> None:
    """Raises UnsupportedModel for a pickle, by its suffix: loading one runs whatever code it holds."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsupportedModel(
            f"`{path.name}` is a pickle, which can run code when it is loaded",
            hint="save the model again with `save_pretrained(directory, safe_serialization=True)`",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Errors:  CorruptFile when it is too large, not UTF-8, not JSON or not an object
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CorruptFile(f"`{path}` has {size} bytes but at most {MAX_JSON_BYTES} are read", hint=HINT)
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFile(f"`{path}` cannot be read as JSON: {error}", hint=HINT) from None
    if not isinstance(value, dict):
        raise CorruptFile(f"`{path}` holds a JSON {type(value).__name__}, not an object", hint=HINT)
    return value


class SafetensorsDirectory:
    """The tensors of a directory holding `model.safetensors`, or shards and their index.

    Semantics:  `shapes` maps every name to its shape; `read` returns one tensor as fp32. Opening reads headers alone.
    Errors:     CorruptFile when files are missing, damaged or contradict the index; UnsupportedModel for pickles and
                for dtypes other than F32, F16 and BF16
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files, promised = _weight_files(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Any] = {}
        for path in self.files:
            self._open(path)
        for name, shard in promised.items():
            found = self._file_of.get(name)
            if found is None or found[0].name != shard:
                raise CorruptFile(f"`{INDEX}` promises tensor `{name}` in `{shard}`, which does not hold it", hint=HINT)
        if promised and (extra := self.shapes.keys() - promised.keys()):
            raise CorruptFile(f"the shards hold `{min(extra)}`, of which `{INDEX}` says nothing", hint=HINT)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(path, framework="pt")
            for name in handle.keys():  # noqa: SIM118 - the handle is not a mapping
                piece = handle.get_slice(name)
                if (dtype := piece.get_dtype()) not in FLOAT_DTYPES:
                    raise UnsupportedModel(
                        f"`{path.name}`: tensor `{name}` is {dtype}", hint="F32, F16 and BF16 checkpoints are read"
                    )
                if name in self.shapes:
                    raise CorruptFile(f"tensor `{name}` is in `{path.name}` and in another shard", hint=HINT)
                self.shapes[name] = tuple(piece.get_shape())
                self._file_of[name] = (path, handle)
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptFile(f"`{path}` is not a sound safetensors file: {error}", hint=HINT) from None

    def read(self, name: str) -> torch.Tensor:
        """The tensor as fp32.

        Errors:  CorruptFile for NaN or infinity, or when the bytes cannot be read
        """
        import torch
        from safetensors import SafetensorError

        path, handle = self._file_of[name]
        try:
            value = handle.get_tensor(name).to(torch.float32)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CorruptFile(f"`{path}`: tensor `{name}` cannot be read: {error}", hint=HINT) from None
        if not torch.isfinite(value).all():
            raise CorruptFile(f"`{path}`: tensor `{name}` holds NaN or infinity", hint=HINT)
        return value


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to open and what the index promises (tensor name -> shard), empty for a single file."""
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFile(f"`{directory / INDEX}` has no `weight_map`", hint=HINT)
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise CorruptFile(f"`{INDEX}` places `{name}` in `{shard!r}`, not a file name", hint=HINT)
            refuse_pickle(Path(shard))
            if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
                raise CorruptFile(f"`{INDEX}` places `{name}` in `{shard}`, outside its directory", hint=HINT)
            if not (directory / shard).is_file():
                raise CorruptFile(f"shard `{shard}` is missing from `{directory}`", hint="fetch the whole model again")
        return [directory / shard for shard in sorted(set(weight_map.values()))], weight_map
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], {}
    for path in sorted(directory.iterdir()):
        refuse_pickle(path)
    raise CorruptFile(f"`{directory}` holds neither `{SINGLE}` nor `{INDEX}`", hint="point to a whole model directory")
