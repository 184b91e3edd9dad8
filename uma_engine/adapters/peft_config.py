"""What a PEFT `adapter_config.json` asks for: which modules it changes, with which rank and scaling.

Knows the fields of PEFT's LoraConfig and its rules for matching names; does not know tensors or files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from uma_engine.adapters.patterns import refuse_slow_pattern
from uma_engine.errors import AdapterError

__all__ = ["PeftConfig"]

MAX_PATTERN_CHARS = 2000
# The forms in which PEFT matches what a field holds; where nothing is said, as it is.
KEY_FORM = r"(.*\.)?({})$"
LAYER_FORM = r"(?:^|.*?\.){}\.(?P<layer>\d+)\."
FORMS = {"rank_pattern": KEY_FORM, "alpha_pattern": KEY_FORM, "layers_pattern": LAYER_FORM}
# Fields that would change the result and are not supported: they must be absent or empty.
REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias of the adapter",
    "fan_in_fan_out": "transposed weights",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters on bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "adapters that begin at a token",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "Monte Carlo LoRA",
    "megatron_config": "Megatron's layers",
}
# Ways to begin training that also rewrite the base: the adapter is meant for those weights, not for the ones loaded.
REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
READ = {
    "peft_type", "bias", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "base_model_name_or_path",
}  # fmt: skip
# Fields about training or bookkeeping: they say nothing about the result.
IGNORED = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "velora_config",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA configuration that this engine can serve as it is meant. Module names are those of PEFT's base model."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    base_model: str | None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> PeftConfig:
        """Errors: AdapterError for another kind of adapter, an unsupported or unknown field, a wrong type of value"""
        _refuse_unsupported(raw)
        targets = _names(raw, "target_modules")
        if not targets:
            raise AdapterError("`target_modules` is empty", hint="name the modules that the adapter changes")
        layers = raw.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers or []
        if not isinstance(layers, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
            raise AdapterError(f"`layers_to_transform` is `{layers!r}` but must be an integer or a list of them")
        if layers and isinstance(targets, str):
            raise AdapterError("`layers_to_transform` cannot be combined with a pattern as `target_modules`")
        pattern = _names(raw, "layers_pattern")
        base_model = raw.get("base_model_name_or_path")
        return cls(
            r=_rank(raw.get("r"), "r"),
            lora_alpha=_number(raw.get("lora_alpha"), "lora_alpha"),
            use_rslora=_flag(raw, "use_rslora"),
            rank_pattern={key: _rank(value, "rank_pattern") for key, value in _patterns(raw, "rank_pattern")},
            alpha_pattern={key: _number(value, "alpha_pattern") for key, value in _patterns(raw, "alpha_pattern")},
            target_modules=targets,
            exclude_modules=_names(raw, "exclude_modules"),
            layers_to_transform=tuple(layers),
            layers_pattern=(pattern,) if isinstance(pattern, str) and pattern else tuple(pattern),
            base_model=base_model if isinstance(base_model, str) else None,
        )

    def targets(self, module: str) -> bool:
        """Whether the adapter changes `module`, by the rules of PEFT's `check_target_module_exists`."""
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return True
        if not _matches(self.target_modules, module):
            return False
        # An exact name is taken whatever its layer, as PEFT takes it.
        if not self.layers_to_transform or module in self.target_modules:
            return True
        layer = self._layer_of(module)
        return layer is not None and layer in self.layers_to_transform

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, module), self.r)

    def scaling_of(self, module: str) -> float:
        alpha = self.alpha_pattern.get(_pattern_of(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _layer_of(self, module: str) -> int | None:
        if not self.layers_pattern:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            return int(found[1]) if found else None
        for pattern in self.layers_pattern:
            if found := re.match(_in_form(pattern, LAYER_FORM), module):
                return int(found["layer"])
        return None


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if (kind := raw.get("peft_type")) != "LORA":
        raise AdapterError(f"`peft_type` is `{kind}` but only `LORA` is supported")
    if (bias := raw.get("bias", "none")) != "none":
        raise AdapterError(f"`bias` is `{bias}` but only `none` is supported", hint='train with `bias="none"`')
    for name, meaning in REFUSED.items():
        if raw.get(name):
            raise AdapterError(f"`{name}` is set in the adapter: {meaning} is not supported")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(REFUSED_INITS):
        raise AdapterError(
            f"`init_lora_weights` is `{init}`: the adapter belongs to a base whose weights that method changed",
            hint="convert it when saving, with PEFT's `path_initial_model_for_weight_conversion`",
        )
    unknown = sorted(name for name in raw if raw[name] and name not in READ | IGNORED | REFUSED.keys())
    if unknown:
        raise AdapterError(
            f"`{unknown[0]}` is set in the adapter and this version does not know what it means",
            hint="remove the field if it does not change the adapter's results",
        )


def _matches(patterns: str | tuple[str, ...], module: str) -> bool:
    """A string is a pattern for the whole name; a list holds names or their last parts."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in patterns)


def _pattern_of(patterns: Iterable[str], module: str) -> str:
    """The first key that matches the end of the module's name, as PEFT's `get_pattern_key`."""
    return next((key for key in patterns if re.match(_in_form(key, KEY_FORM), module)), module)


def _compiled(pattern: str, name: str) -> str:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise AdapterError(f"a pattern of `{name}` has {len(pattern)} characters, more than {MAX_PATTERN_CHARS}")
    matched_as = _in_form(pattern, FORMS.get(name, "{}"))
    try:
        re.compile(pattern)
        re.compile(matched_as)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"`{name}` holds `{pattern}`, which is not a pattern: {error}") from None
    refuse_slow_pattern(pattern, matched_as, f"`{name}`")
    return pattern


def _in_form(pattern: str, form: str) -> str:
    return form.replace("{}", pattern)


def _names(raw: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = raw.get(name) or []
    if isinstance(value, str):
        return _compiled(value, name)
    if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
        raise AdapterError(f"`{name}` is `{value!r}` but must be a string or a list of strings")
    return tuple(_compiled(item, name) if name == "layers_pattern" else item for item in value)


def _patterns(raw: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"`{name}` is `{value!r}` but must map patterns to numbers")
    return [(_compiled(key, name), item) for key, item in value.items()]


def _rank(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"`{name}` is `{value!r}` but a rank must be an integer of at least 1")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise AdapterError(f"`{name}` is `{value!r}` but must be a finite number")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name) or False
    if not isinstance(value, bool):
        raise AdapterError(f"`{name}` is `{value!r}` but must be true or false")
    return value
