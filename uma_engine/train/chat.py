"""Plain supervised conversations: what a specialist should have said, and how much of it the model expects.

    {"id": "...", "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Every assistant's message is learned, given all that comes before it, in the base's chat template as the engine renders it. What the
conversations of a step begin with in common is computed once.
Knows the file's form, token ids and which of them are learned; does not know optimisers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uma_engine.catalog.chat_template import ChatTemplate
from uma_engine.errors import InvalidRequest, UmaError
from uma_engine.tasks.generate import chat_ids
from uma_engine.train.groups import numbered_lines
from uma_engine.train.recipe import Recipe
from uma_engine.train.tree_forward import JobTree

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Chat", "ChatTurn", "chat_losses", "mean_loss", "read_chats", "turns_of", "write_chats"]


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation; the last message is the assistant's."""

    id: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message to learn: `answer` after `prompt`, token ids both; the answer ends as the model's own do."""

    chat: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def read_chats(path: str | Path) -> list[Chat]:
    """All conversations of a file. Errors: InvalidRequest naming the line"""
    chats: list[Chat] = []
    seen: set[str] = set()
    for number, line in numbered_lines(path):
        where = f"`{path}`, line {number}"
        try:
            data = json.loads(line)
            messages = tuple({"role": m["role"], "content": m["content"]} for m in data["messages"])
            chat = Chat(data["id"], messages)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f"{where}: {type(error).__name__}: {error}",
                hint='a line is {"id": ..., "messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}',
                param="data",
            ) from None
        texts = [chat.id, *(text for m in messages for text in m.values())]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise InvalidRequest(
                f"{where}: ids, roles and contents must be strings with something in them", param="data"
            )
        if not messages or messages[-1]["role"] != "assistant":
            raise InvalidRequest(f"{where}: the last message must be the assistant's", param="data")
        if chat.id in seen:
            raise InvalidRequest(f"{where}: the id `{chat.id}` was there before", param="data")
        seen.add(chat.id)
        chats.append(chat)
    if not chats:
        raise InvalidRequest(f"`{path}` holds no conversations", param="data")
    return chats


def write_chats(path: str | Path, chats: Sequence[Chat]) -> None:
    """Write a file that `read_chats` reads."""
    lines = (json.dumps({"id": c.id, "messages": list(c.messages)}, ensure_ascii=False) + "\n" for c in chats)
    Path(path).write_text("".join(lines), encoding="utf-8")


def turns_of(chats: Sequence[Chat], files: Any, recipe: Recipe) -> tuple[list[ChatTurn], int]:
    """What of the conversations is learned, and how many turns were left out: longer than `sampling.max_chat_tokens`.

    Errors:  InvalidRequest for a role or an order that the template refuses
    """
    template = ChatTemplate(files.chat_template, files.tokenizer)
    end = files.config.eos_token_ids[:1]
    found, left_out = [], 0
    for chat in chats:
        for index, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt = chat_ids(files.tokenizer, template, chat.messages[:index])
            except UmaError as error:
                raise InvalidRequest(f"conversation `{chat.id}`: {error.message}", param="data") from None
            answer = (*files.tokenizer.encode(message["content"]), *end)
            if len(prompt) + len(answer) > recipe.sampling.max_chat_tokens:
                left_out += 1
            else:
                found.append(ChatTurn(chat.id, tuple(prompt), answer))
    if not found:
        raise InvalidRequest(
            f"every turn is longer than {recipe.sampling.max_chat_tokens} tokens",
            hint="raise `sampling.max_chat_tokens`",
        )
    return found, left_out


def chat_losses(model: Any, turns: Sequence[ChatTurn], rows: int) -> Iterator[tuple[Tensor, int]]:
    """(the sum of -log p over the learned tokens, how many those are) of at most `rows` turns after the other, in fp32. Turns of like
    length share a row of the forward pass.
    """
    import torch

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = causal.lm_head.weight.device
    ordered = sorted(turns, key=lambda t: (len(t.prompt) + len(t.answer), t.chat))
    for begin in range(0, len(ordered), rows):
        part = ordered[begin : begin + rows]
        shared = _shared(part)
        tree = JobTree(part[0].prompt[:shared], [(*t.prompt[shared:], *t.answer[:-1]) for t in part])
        batch = tree.batch(device)
        del batch["ends"]
        longest = max(map(len, tree.candidates))
        at: list[int] = []
        wanted: list[int] = []
        for number, turn in enumerate(part):
            first = shared + number * longest + len(turn.prompt) - shared - 1
            at += range(first, first + len(turn.answer))
            wanted += turn.answer
        hidden = causal.model(**batch, use_cache=False).last_hidden_state[0, torch.tensor(at, device=device)]
        with torch.autocast(device.type, enabled=False):
            logits = hidden.float() @ causal.lm_head.weight.float().T
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(wanted, device=device), reduction="sum")
        yield loss, len(wanted)


def _shared(turns: Sequence[ChatTurn]) -> int:
    """How many tokens all prompts begin with, the last one of the shortest left out: an answer is predicted from a row of its own."""
    first, last = min(t.prompt for t in turns), max(t.prompt for t in turns)
    most = min(len(t.prompt) for t in turns) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def mean_loss(model: Any, turns: Sequence[ChatTurn], rows: int) -> float:
    """-log p of a learned token, in nats, over all turns."""
    import torch

    total = count = 0.0
    with torch.no_grad():
        for loss, tokens in chat_losses(model, turns, rows):
            total += float(loss)
            count += tokens
    value = total / count
    return value if math.isfinite(value) else math.inf
