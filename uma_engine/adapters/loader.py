"""Reads a PEFT adapter directory, checks everything in it, and packs it for the base it is meant to change.

Knows files and tensors of one adapter; does not know slots, names under which adapters are served, or requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from uma_engine.adapters.peft_config import PeftConfig
from uma_engine.errors import AdapterError
from uma_kernels.check import NotFinite
from uma_kernels.lora import PackedLora, pack_lora

__all__ = ["MAX_RANK", "LoadedAdapter", "load_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_RANK = 256
MAX_CONFIG_BYTES = 1 << 20
MAX_BYTES = 2 << 30
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# base_model.model. + what wraps the decoder in the trained model + site + part
TENSOR = re.compile(
    r"base_model\.model\.(?P<prefix>|model\.|language_model\.model\.|model\.language_model\.)"
    r"(?P<site>layers\.(?:0|[1-9]\d{0,4})\.[a-z_.]+?)\.lora_(?P<part>[AB])\.weight"
)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter ready to serve: packed by site, nothing left to check.

    `digest` (32 bytes) covers what changes results: sites, ranks, scalings, weights. `rank` is the largest.
    """

    digest: bytes
    rank: int
    packed: Mapping[str, PackedLora]
    num_bytes: int
    base_model: str | None  # what the adapter says it was trained on


def load_adapter(
    path: str | Path, sites: Mapping[str, tuple[int, int]], max_rank: int, max_bytes: int = MAX_BYTES
) -> LoadedAdapter:
    """Read a PEFT directory: `adapter_config.json` and `adapter_model.safetensors`.

    `sites` maps the base's sites to (K, N), as `model.sites()` gives them; `max_rank` is the engine's `max_lora_rank`.
    The two files must be regular files of that directory; they are read once: what is checked is what is served.

    Errors:  AdapterError when a file is missing, damaged, too large or a link; when the adapter is of a kind that is
             not supported; when a tensor is missing, unexpected, of the wrong shape or not finite; when its rank is
             too large
    """
    directory = Path(path)
    if not directory.is_dir():
        raise AdapterError(f"`{directory}` is not a directory", hint=f"give the directory that holds `{CONFIG}`")
    where = f"adapter `{directory.resolve().name}`"
    config, config_file = _read_config(directory, where)
    if not (directory / WEIGHTS).exists() and (directory / PICKLE).exists():
        raise AdapterError(
            f"{where} holds only `{PICKLE}`, a pickle, which can run code when it is loaded",
            hint="save it again with `save_pretrained(directory, safe_serialization=True)`",
        )
    try:
        data, weights_file = _read_file(directory / WEIGHTS, max_bytes)
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise AdapterError(f"{where}: `{WEIGHTS}` is not a sound safetensors file: {error}") from None
    prefix, parts = _by_site(tensors, where)
    expected = _expected_sites(config, sites, prefix, where)
    _refuse_ranks(config, expected, prefix, max_rank, where)
    _check_parts(parts, expected, where)
    packed = _pack(config, parts, sites, prefix, where)
    return LoadedAdapter(
        digest=_HASHED.digest((config_file, weights_file), lambda: _digest(config, tensors, parts, prefix)),
        rank=max(p.rank for p in packed.values()),
        packed=packed,
        num_bytes=sum(p.nbytes for p in packed.values()),
        base_model=config.base_model,
    )


# What the system says of a file's content: device, inode, size, when it was written and when that was noted, which nobody can set back.
_State = tuple[int, int, int, int, int]


class _Hashed:
    """Digests by the states of the two files that they were computed from: an adapter that comes back is not hashed again.

    A file that was changed a moment before it was read could be changed once more within one tick of the clock: its state says nothing.
    Who writes through a mapping that he keeps open may change a file and not its state.
    """

    MOST = 4096
    SETTLED_NS = 2_000_000_000

    def __init__(self) -> None:
        self._digests: dict[tuple[_State, ...], bytes] = {}  # the oldest first

    def digest(self, states: tuple[_State | None, ...], compute: Callable[[], bytes]) -> bytes:
        """That of the files read, from `compute` where their states are not known yet. None: a state that says nothing."""
        known = tuple(state for state in states if state is not None)
        if len(known) < len(states):
            return compute()
        found = self._digests.get(known)
        if found is None:
            found = self._digests[known] = compute()
            while len(self._digests) > self.MOST:
                with contextlib.suppress(KeyError, RuntimeError):  # another thread was quicker
                    del self._digests[next(iter(self._digests))]
        return found

    @classmethod
    def state(cls, before: os.stat_result, after: os.stat_result) -> _State | None:
        """Of a file that was read between the two."""
        one, other = ((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in (before, after))
        return one if one == other and max(one[3:]) < time.time_ns() - cls.SETTLED_NS else None


_HASHED = _Hashed()


def _read_file(path: Path, max_bytes: int) -> tuple[bytes, _State | None]:
    """The bytes of a regular file and their state; links are not followed, and the size is checked on the file that was opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterError(f"`{path}` does not exist", hint=f"an adapter is `{CONFIG}` and `{WEIGHTS}`") from None
    except OSError as error:
        hint = "copy the adapter with its files instead of links: `cp -rL`" if path.is_symlink() else None
        raise AdapterError(f"`{path}` cannot be opened: {error.strerror}", hint=hint) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"`{path}` is not a regular file")
        if status.st_size > max_bytes:
            raise AdapterError(f"`{path}` has {status.st_size} bytes but at most {max_bytes} are read")
        with open(descriptor, "rb", buffering=0, closefd=False) as file:  # a buffer would be one more copy
            parts, left = [], status.st_size
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data, _Hashed.state(status, os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _read_config(directory: Path, where: str) -> tuple[PeftConfig, _State | None]:
    data, state = _read_file(directory / CONFIG, MAX_CONFIG_BYTES)
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where}: `{CONFIG}` is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{where}: `{CONFIG}` holds a {type(raw).__name__}, not an object")
    try:
        return PeftConfig.parse(raw), state
    except AdapterError as error:
        raise AdapterError(f"{where}: {error.message}", hint=error.hint) from None


def _by_site(tensors: Mapping[str, torch.Tensor], where: str) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """(prefix of the trained model's module names, site -> {"A": [R, K], "B": [N, R]}): as they were stored, fp64 in fp32."""
    prefix: str | None = None
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name in sorted(tensors):
        found = TENSOR.fullmatch(name)
        if found is None:
            hint = "adapters on the embedding and on `lm_head` are not supported" if _is_head(name) else None
            raise AdapterError(f"{where} holds the tensor `{name}`, which no layer of the base takes", hint=hint)
        if prefix is None:
            prefix = found["prefix"]
        elif prefix != found["prefix"]:
            raise AdapterError(f"{where} names layers both as `{prefix}layers` and as `{found['prefix']}layers`")
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise AdapterError(
                f"{where}: `{name}` is {tensor.dtype} but must be a floating point type of 16 bits or more"
            )
        tensor = (tensor.to(torch.float32) if tensor.dtype is torch.float64 else tensor).contiguous()
        parts.setdefault(found["site"], {})[found["part"]] = tensor
    if prefix is None:
        raise AdapterError(f"{where}: `{WEIGHTS}` holds no tensors")
    return prefix, parts


def _is_head(name: str) -> bool:
    return "lm_head" in name or "embed_tokens" in name


def _expected_sites(config: PeftConfig, sites: Mapping[str, tuple[int, int]], prefix: str, where: str) -> list[str]:
    num_layers = 1 + max((int(site.split(".")[1]) for site in sites), default=-1)
    for layer in config.layers_to_transform:
        if not 0 <= layer < num_layers:
            raise AdapterError(
                f"{where}: `layers_to_transform` names layer {layer} but the base has {num_layers} layers"
            )
    expected = [site for site in sites if config.targets(prefix + site)]
    if not expected:
        raise AdapterError(
            f"{where}: `target_modules` {_listed(config.target_modules)} matches no layer of the base",
            hint=f"layers are named as in `{prefix}{next(iter(sites), '')}`",
        )
    return expected


def _refuse_ranks(config: PeftConfig, expected: Iterable[str], prefix: str, max_rank: int, where: str) -> None:
    rank = max(config.rank_of(prefix + site) for site in expected)
    if rank > MAX_RANK:
        raise AdapterError(f"{where} has rank {rank} but ranks up to {MAX_RANK} are supported")
    if rank > max_rank:
        raise AdapterError(
            f"`max_lora_rank` is {max_rank} but {where} has rank {rank}",
            hint=f"start the engine with `max_lora_rank={rank}`",
            param="max_lora_rank",
        )


def _check_parts(parts: Mapping[str, Mapping[str, torch.Tensor]], expected: list[str], where: str) -> None:
    """Every targeted site has both factors, and no other site has any."""
    for site in expected:
        for part in "AB":
            if part not in parts.get(site, {}):
                raise AdapterError(f"{where} lacks `lora_{part}` of `{site}`, which `target_modules` names")
    if extra := sorted(parts.keys() - set(expected)):
        raise AdapterError(
            f"{where} holds weights for `{extra[0]}`, which is not a targeted layer of the base",
            hint="the adapter was trained on another base, or its configuration was changed",
        )


def _name(prefix: str, site: str, part: str) -> str:
    return f"base_model.model.{prefix}{site}.lora_{part}.weight"


def _pack(
    config: PeftConfig,
    parts: dict[str, dict[str, torch.Tensor]],
    sites: Mapping[str, tuple[int, int]],
    prefix: str,
    where: str,
) -> dict[str, PackedLora]:
    packed: dict[str, PackedLora] = {}
    for site in sorted(parts):
        (width_in, width_out), rank = sites[site], config.rank_of(prefix + site)
        lora_a, lora_b = parts[site]["A"], parts[site]["B"]
        for name, tensor, shape in (("A", lora_a, (rank, width_in)), ("B", lora_b, (width_out, rank))):
            if tuple(tensor.shape) != shape:
                raise AdapterError(
                    f"{where}: `lora_{name}` of `{site}` has the shape {list(tensor.shape)} but base and rank ask for"
                    f" {list(shape)}",
                    hint="the adapter was trained on another base",
                )
        if lora_a.dtype is not lora_b.dtype:
            lora_a, lora_b = lora_a.float(), lora_b.float()
        try:
            packed[site] = pack_lora(lora_a, lora_b, config.scaling_of(prefix + site))
        except NotFinite:
            bad = "B" if lora_a.isfinite().all() else "A"
            raise AdapterError(
                f"{where}: `{_name(prefix, site, bad)}` holds NaN or infinity", hint="the training has diverged"
            ) from None
    return packed


def _digest(
    config: PeftConfig,
    tensors: Mapping[str, torch.Tensor],
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    prefix: str,
) -> bytes:
    digest = hashlib.sha256(b"uma lora 2")
    for site in sorted(parts):
        rank, scaling = config.rank_of(prefix + site), config.scaling_of(prefix + site)
        digest.update(f"\n{site} {rank} {scaling.hex()}\n".encode())
        for part in "AB":
            tensor = tensors[_name(prefix, site, part)]  # as it was stored: half of fp32's bytes
            digest.update(f"{part} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _listed(names: str | tuple[str, ...]) -> str:
    return f"`{names}`" if isinstance(names, str) else ", ".join(f"`{name}`" for name in names)
