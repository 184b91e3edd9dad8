"""The forward pass of one job with all of its candidates: the job's tokens are computed once, gradients as if it were not so.

The tokens of a job lie in one row: prefix, candidate 1, candidate 2, ..., each candidate as long as the longest (what follows its
end is seen by nobody). Every layer sees that row; only attention knows that a candidate sees the prefix and itself. It is
registered with transformers as the implementation `uma_tree`, so any of its decoders runs unchanged, gradient checkpointing
included.

Knows token ids and a transformers decoder; does not know prompts or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ATTENTION", "JobTree", "label_logits", "register_attention"]

ATTENTION = "uma_tree"


@dataclass(frozen=True)
class JobTree:
    """One job: `prefix` [P], `candidates`, each with a token at least."""

    prefix: Sequence[int]
    candidates: Sequence[Sequence[int]]

    def batch(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """Arguments of a decoder's forward pass, and `ends`: the rows of the candidates' last tokens."""
        import torch

        p, longest = len(self.prefix), max(map(len, self.candidates))
        tokens = [*self.prefix]
        for candidate in self.candidates:
            tokens += [*candidate, *([candidate[-1]] * (longest - len(candidate)))]
        positions = [*range(p), *(list(range(p, p + longest)) * len(self.candidates))]
        ends = [p + c * longest + len(tokens_of) - 1 for c, tokens_of in enumerate(self.candidates)]
        return {
            "input_ids": torch.tensor([tokens], device=device),
            "position_ids": torch.tensor([positions], device=device),
            "tree": (p, len(self.candidates), longest),
            "ends": torch.tensor(ends, device=device),
        }


def register_attention() -> None:
    """Make `uma_tree` known to transformers. Idempotent."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _tree_attention)


def _tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: tuple[int, int, int] | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, Hkv, T, D]; the result [1, T, H, D]. `tree`: prefix, candidates, tokens of each.

    Plain products and a softmax: the prefix' keys are multiplied once for all candidates' queries, and nothing is repeated.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    assert tree is not None, "the decoder was called without `tree`"
    p, count, longest = tree
    heads, size = query.shape[1], query.shape[3]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    scale = size**-0.5 if scaling is None else scaling
    window = sliding_window or p + longest
    near = None  # which keys of the prefix its queries see; None: all before them
    if window < p:
        near = torch.ones(p, p, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    first = attend(
        query[:, :, :p], key[:, :, :p], value[:, :, :p], near, is_causal=near is None, scale=scale, enable_gqa=group > 1
    )

    q = query[0, :, p:] * scale  # [H, C * L, D]
    by_prefix = q.reshape(kv_heads, -1, size) @ key[0, :, :p].mT  # [Hkv, G * C * L, P]
    # [Hkv, C, G * L, D]: the query heads of one KV head lie side by side
    own_q = q.reshape(kv_heads, group, count, longest, size).transpose(1, 2).reshape(kv_heads, count, -1, size)
    own_k, own_v = (x[0, :, p:].reshape(kv_heads, count, longest, size) for x in (key, value))
    by_own = (own_q @ own_k.mT).reshape(kv_heads, count, group, longest, longest).transpose(1, 2)
    by_prefix = by_prefix.reshape(kv_heads, group, count, longest, p)
    hidden = torch.ones(longest, longest, dtype=torch.bool, device=q.device).triu(1)
    if window < p + longest:
        place = torch.arange(p + longest, device=q.device)
        hidden = hidden | (place[:longest, None] - place[:longest] >= window)
        by_prefix = by_prefix.masked_fill(place[p:, None] - place[:p] >= window, float("-inf"))
    scores = torch.cat([by_prefix, by_own.masked_fill(hidden, float("-inf"))], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    weights = weights.to(value.dtype)
    rest = (weights[..., :p].reshape(kv_heads, -1, p) @ value[0, :, :p]).reshape(heads, count * longest, size)
    own_weights = weights[..., p:].transpose(1, 2).reshape(kv_heads, count, group * longest, longest)
    own = (own_weights @ own_v).reshape(kv_heads, count, group, longest, size).transpose(1, 2)
    rest = rest + own.reshape(heads, count * longest, size)
    return torch.cat([first[0], rest], 1).transpose(0, 1)[None].contiguous(), None


def label_logits(model: Any, tree: JobTree, label_ids: Sequence[int]) -> Tensor:
    """[candidates, labels] in fp32, also under autocast: logits after each candidate's last token. `model`: a causal decoder
    made with `attn_implementation="uma_tree"`, wrapped by peft or not.
    """
    import torch

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = causal.lm_head.weight.device
    batch = tree.batch(device)
    ends = batch.pop("ends")
    hidden = causal.model(**batch, use_cache=False).last_hidden_state[0, ends]
    with torch.autocast(device.type, enabled=False):  # margins are small differences of large logits
        return hidden.float() @ causal.lm_head.weight[list(label_ids)].float().T
