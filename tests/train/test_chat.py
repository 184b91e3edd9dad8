"""Conversations: what is learned is what follows, rows together are rows apart, and an adapter says what it was taught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_model
from uma_engine import Engine, SamplingParams
from uma_engine.errors import InvalidRequest
from uma_engine.train.chat import Chat, chat_losses, mean_loss, read_chats, turns_of, write_chats
from uma_engine.train.recipe import LoRA, Recipe, Sampling
from uma_engine.train.requirements import (
    F1,
    Sentence,
    f1,
    find_spans,
    question,
    read_skillspan,
    to_chats,
)
from uma_engine.train.trainer import train

SKILLS = ["rust", "welding", "nursing", "drawing"]


def taught(count: int, prefix: str) -> list[Chat]:
    return [
        Chat(
            f"{prefix}{n}",
            (
                {"role": "user", "content": f"{'very ' * (n % 3)}good at {SKILLS[n % 4]} please"},
                {"role": "assistant", "content": SKILLS[n % 4]},
            ),
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def recipe_of(base: Path, home: Path, **options) -> Recipe:
    write_chats(home / "train.jsonl", taught(12, "t"))
    write_chats(home / "dev.jsonl", taught(4, "d"))
    return Recipe("chat", str(base), str(home / "train.jsonl"), str(home / "dev.jsonl"), task="chat", **options)


@pytest.fixture(scope="module")
def decoder(base: Path):
    from transformers import AutoModelForCausalLM

    from uma_engine.catalog import open_model
    from uma_engine.train.base_model import add_lora, transformers_model
    from uma_engine.train.tree_forward import ATTENTION, register_attention

    register_attention()
    model = add_lora(
        transformers_model(open_model(base), AutoModelForCausalLM, torch.float64, ATTENTION), LoRA(rank=4), seed=3
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model.double()


@pytest.fixture(scope="module")
def turns(base: Path, tmp_path_factory: pytest.TempPathFactory):
    from uma_engine.catalog import open_model

    recipe = recipe_of(base, tmp_path_factory.mktemp("turns"))
    return turns_of(read_chats(recipe.train), open_model(base), recipe)[0]


def test_rows_together_have_the_losses_and_gradients_of_turns_alone(decoder, turns):
    found = {}
    for rows in (1, 5, len(turns)):
        decoder.zero_grad()
        total = sum(loss for loss, _ in chat_losses(decoder, turns, rows))
        total.backward()
        gradient = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
        found[rows] = float(total.detach()), gradient
    for rows in (5, len(turns)):
        assert found[rows][0] == pytest.approx(found[1][0], rel=1e-6)
        assert torch.allclose(found[rows][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_the_answers_tokens_alone(decoder, turns):
    turn = turns[0]
    ids = torch.tensor([[*turn.prompt, *turn.answer]])
    tree = {"tree": (1, 1, ids.shape[1] - 1), "position_ids": torch.arange(ids.shape[1])[None]}
    hidden = decoder.get_base_model().model(input_ids=ids, use_cache=False, **tree).last_hidden_state
    logits = hidden.float() @ decoder.get_base_model().lm_head.weight.float().T
    expected = torch.nn.functional.cross_entropy(
        logits[0, len(turn.prompt) - 1 : -1], torch.tensor(turn.answer), reduction="sum"
    )
    ((loss, count),) = chat_losses(decoder, [turn], 8)
    assert count == len(turn.answer)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_prompt_is_that_of_the_engine_and_the_answer_ends_as_the_models_do(base, turns):
    with Engine(base) as engine:
        assert list(turns[0].prompt) == engine.chat_tokens(taught(1, "t")[0].messages[:1])
        assert turns[0].answer[:-1] == tuple(engine.tokenize(SKILLS[0]))


def test_an_adapter_says_what_it_was_taught(base, tmp_path):
    from dataclasses import replace

    recipe = recipe_of(base, tmp_path, threads=1, lora=LoRA(rank=8))
    optimizer = replace(recipe.optimizer, epochs=30, learning_rate=2e-2, jobs_per_step=6)
    recipe = replace(recipe, optimizer=optimizer, evaluation=replace(recipe.evaluation, every=20, patience=9))
    made = train(recipe, tmp_path / "out")
    assert made.measure == "loss of a token"
    card = json.loads((tmp_path / "out" / "data_card.json").read_text())
    assert card["task"] == "chat"
    assert card["turns_learned"] == 12
    with Engine(base) as engine:
        engine.load_adapter("taught", tmp_path / "out")
        prompts = [engine.chat_tokens(c.messages[:1]) for c in taught(12, "t")]
        said = [c.text for c in engine.generate(prompts, SamplingParams(max_tokens=24), adapter="taught")]
    right = sum(text == SKILLS[n % 4] for n, text in enumerate(said))
    assert right >= 10, said
    again = train(recipe, tmp_path / "again")
    assert again.digest == made.digest


def test_the_dev_measure_is_over_tokens_not_turns(decoder, turns):
    per_row = [(float(loss.detach()), n) for loss, n in chat_losses(decoder, turns, 1)]
    expected = sum(x for x, _ in per_row) / sum(n for _, n in per_row)
    assert mean_loss(decoder, turns, 4) == pytest.approx(expected, rel=1e-6)


def test_turns_that_are_too_long_are_counted_and_all_too_long_is_an_error(base, tmp_path):
    from uma_engine.catalog import open_model

    recipe = recipe_of(base, tmp_path)
    chats, files = read_chats(recipe.train), open_model(base)
    all_turns, _ = turns_of(chats, files, recipe)
    lengths = sorted(len(t.prompt) + len(t.answer) for t in all_turns)
    from dataclasses import replace

    some = replace(recipe, sampling=Sampling(max_chat_tokens=lengths[5]))
    kept, left_out = turns_of(chats, files, some)
    assert (len(kept) + left_out, left_out > 0) == (12, True)
    with pytest.raises(InvalidRequest, match="longer"):
        turns_of(chats, files, replace(recipe, sampling=Sampling(max_chat_tokens=1)))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"id": "a", "messages": []}',
        '{"id": "a", "messages": [{"role": "user", "content": "x"}]}',
        '{"id": "a", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}',
        '{"id": 3, "messages": [{"role": "assistant", "content": "x"}]}',
    ],
)
def test_bad_conversations_say_where(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidRequest, match="line 1"):
        read_chats(path)


def test_a_role_that_the_template_does_not_know_is_named(base, tmp_path):
    from uma_engine.catalog import open_model

    recipe = recipe_of(base, tmp_path)
    bad = Chat("odd", ({"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}))
    with pytest.raises(InvalidRequest, match="odd"):
        turns_of([bad], open_model(base), recipe)


# -- requirements -------------------------------------------------------------------------------------------------------

TOKENS = ["You", "know", "Python", ",", "SQL", "(", "or", "R", ")", "and", "lead", "a", "team", "."]


@pytest.fixture
def skillspan(tmp_path: Path) -> list[Sentence]:
    rows = [
        {
            "idx": 1,
            "source": "tech",
            "tokens": TOKENS,
            "tags_knowledge": ["O", "O", "B", "O", "B", "O", "O", "B", "O", *"O" * 5],
            "tags_skill": [*"O" * 10, "B", "I", "I", "O"],
        },
        {
            "idx": 1,
            "source": "tech",
            "tokens": ["Apply", "now"],
            "tags_knowledge": ["O", "O"],
            "tags_skill": ["O", "O"],
        },
        {"idx": 2, "source": "tech", "tokens": ["C", "C"], "tags_knowledge": ["B", "B"], "tags_skill": ["B", "I"]},
    ]
    path = tmp_path / "test.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_skillspan(path)


def test_marked_tokens_become_spans_of_a_readable_sentence(skillspan):
    first, second, third = skillspan
    assert first.text == "You know Python, SQL (or R) and lead a team."
    assert first.requirements == ["Python", "SQL", "R", "lead a team"]
    assert (second.requirements, third.requirements) == ([], ["C C", "C", "C"])
    assert len({first.post, third.post}) == 2
    assert first.post == second.post


def test_lines_become_spans_again_and_what_is_not_there_counts_for_nothing(skillspan):
    text = skillspan[0].text
    spans, lost = find_spans(text, ["- Python", "R", "Java", "", "none", "lead a team"])
    assert lost == 1
    assert {text[a:b] for a, b in spans} == {"Python", "R", "lead a team"}
    assert text[min(a for a, b in spans if b - a == 1) - 4 :].startswith("(or R)"), "a word, not a letter of one"
    for sentence in skillspan:
        assert find_spans(sentence.text, sentence.requirements) == (set(sentence.spans), 0)


def test_f1_of_a_worked_example(skillspan):
    found = [{skillspan[0].spans[0], (0, 3)}, {(0, 5)}, set()]
    # 1 of 3 said is right, 1 of 7 wanted is found
    value = f1(found, skillspan)
    assert (value.precision, value.recall, value.spans) == (1 / 3, 1 / 7, 7)
    assert value.f1 == pytest.approx(2 / 10)
    assert f1([set(s.spans) for s in skillspan], skillspan) == F1(1.0, 1.0, 1.0, 1.0, 7)


def test_sentences_become_conversations(skillspan):
    chats = to_chats(skillspan)
    assert chats[0].messages[0]["content"] == question(skillspan[0].text)
    assert chats[0].messages[1]["content"] == "Python\nSQL\nR\nlead a team"
    assert chats[1].messages[1]["content"] == "none"
    assert [c.id for c in to_chats(skillspan, 0.0)] == ["test-1", "test-3"]


def test_a_file_that_is_no_skillspan_says_where(tmp_path):
    path = tmp_path / "test.json"
    path.write_text('{"tokens": ["a"], "tags_skill": ["O", "O"], "tags_knowledge": ["O"], "source": "x", "idx": 1}')
    with pytest.raises(InvalidRequest, match="line 1"):
        read_skillspan(path)
