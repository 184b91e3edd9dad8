"""Which kernels a site's low-rank update takes: a small table, by what the host knows without asking the device.

Knows shapes; does not know adapters or kernels' insides. None of its choices changes a bit of a result of `lora_merged`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AUGMENTED", "DECODE", "PAIR", "PairPlan", "SitePlan", "pair_plan", "site_form", "site_plan"]


@dataclass(frozen=True, slots=True)
class PairPlan:
    """How `lora_merged` runs. `programs`: for each multiprocessor, and all resident at once where `one_launch`."""

    one_launch: bool
    block_k: int = 128
    programs: int = 2
    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = False


@dataclass(frozen=True, slots=True)
class SitePlan:
    """How a site's decode kernel runs. `shrinkers`: programs that only shrink; `base_k`, `block_n`: tile of the weight."""

    block_n: int = 32
    base_k: int = 256
    block_k: int = 128
    shrinkers: int = 64
    num_warps: int = 4
    num_stages: int = 4


# (most rows, plan), rows ascending. From the model of bytes and latencies, not yet from measurements.
PAIR_PLANS: tuple[tuple[int, PairPlan], ...] = (
    (256, PairPlan(one_launch=True)),
    (1024, PairPlan(one_launch=False)),
    (1 << 30, PairPlan(one_launch=False)),
)


# How a whole site runs: base product and update.
AUGMENTED = "augmented"  # shrink, then one product over K and each tile's adapters
DECODE = "decode"  # one launch, for few rows
PAIR = "pair"  # a library product, then `lora_merged`

# (most rows, form) in mode `fast`, rows ascending. From the model of bytes and latencies, not yet from measurements.
FAST_FORMS: tuple[tuple[int, str], ...] = ((64, DECODE), (1 << 30, PAIR))


def site_form(num_tokens: int, mode: str, sixteen_bit: bool) -> str:
    """The form of a site whose weight was packed in `mode`. `sixteen_bit`: weight and rows are, as the one launch needs them.

    `audit` takes one for every number of rows: forms differ in where they round and in the instruction, so a row would
    have other bits in a larger batch.
    """
    if mode == "audit":
        return AUGMENTED
    form = next(form for most, form in FAST_FORMS if num_tokens <= most)
    return form if sixteen_bit or form != DECODE else PAIR


def pair_plan(num_tokens: int, element_size: int) -> PairPlan:
    """The plan for a batch of `num_tokens` rows of elements of `element_size` bytes."""
    if element_size == 4:  # for tests and small models: no tensor cores, smaller tiles
        return PairPlan(one_launch=num_tokens <= 256, block_k=32, programs=1, num_stages=2)
    return next(plan for most, plan in PAIR_PLANS if num_tokens <= most)


def site_plan(num_tokens: int, in_features: int, out_features: int) -> SitePlan | None:
    """The plan of the one-launch site, None where a library product and a pair are better."""
    if num_tokens > 64:
        return None
    narrow = out_features <= 8192  # small tiles, so that every multiprocessor has one
    if num_tokens > 16:
        return SitePlan(block_n=32 if narrow else 64, base_k=128)
    return SitePlan(block_n=16 if narrow else 32)
