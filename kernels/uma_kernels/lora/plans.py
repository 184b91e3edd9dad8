"""Which kernels a site's low-rank update takes: a small table, by what the host knows without asking the device.

Knows shapes; does not know adapters or kernels' insides. None of its choices changes a bit of a result of `lora_merged`.
"""

from __future__ import annotations

from dataclasses import dataclass

from uma_kernels.dispatch import interpreted

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


# (most rows, plan), rows ascending. Measured on an H200 up to 256 rows: one launch whose programs wait for each other is never
# the best, and many programs hide what each waits for: at 64 rows of 64 adapters 8 took 26 us where 2 took 53 (K 14,336).
PAIR_PLANS: tuple[tuple[int, PairPlan], ...] = (
    (4, PairPlan(one_launch=False, programs=4, pdl=True)),
    (256, PairPlan(one_launch=False, programs=8, pdl=True)),
    (1 << 30, PairPlan(one_launch=False)),
)


# How a whole site runs: base product and update.
AUGMENTED = "augmented"  # shrink, then one product over K and each tile's adapters
BESIDE = "beside"  # a library product in one stream and the shrink in another, then the expand
DECODE = "decode"  # one launch, for few rows
PAIR = "pair"  # a library product, then `lora_merged`

# (most rows, form) in mode `fast`, rows ascending. Measured on an H200 over the sites of an 8B layer: at T = 1 the one launch
# costs 10 % over the product and BESIDE 16 %, at T = 16 42 and 29 %; in prefill BESIDE gains nothing over PAIR.
FAST_FORMS: tuple[tuple[int, str], ...] = ((4, DECODE), (256, BESIDE), (1 << 30, PAIR))

AUDIT_DECODE = 16  # most rows for which mode `audit` takes the one launch
MOST_K = 8192  # of the one launch in mode `fast`


def site_form(num_tokens: int, mode: str, sixteen_bit: bool, in_features: int = 0) -> str:
    """The form of a site whose weight was packed in `mode`. `sixteen_bit`: weight and rows are, as the one launch needs them.
    `in_features`: beyond MOST_K the one launch reads the weight too slowly.

    `audit` takes two forms that are one in their bits, which `test_both_forms_of_a_decode_site_have_the_same_bits` holds on a
    GPU: the one launch for few rows, the augmented product beyond. The others round the product before the update.
    """
    if mode == "audit":
        few = num_tokens <= AUDIT_DECODE and sixteen_bit and not interpreted()  # whose sums have another order
        return DECODE if few else AUGMENTED
    form = next(form for most, form in FAST_FORMS if num_tokens <= most)
    return form if form != DECODE or (sixteen_bit and in_features <= MOST_K) else BESIDE


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
    return SitePlan() if 4096 < out_features <= 8192 else SitePlan(block_n=64, base_k=128, num_stages=5)
