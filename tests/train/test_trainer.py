"""Training on a tiny base: gradients of the shared prefix, same run same digest, going on after a kill, no train/serve skew."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_model
from uma_engine import Engine
from uma_engine.errors import InvalidRequest
from uma_engine.train.groups import Group, Judged, read_groups, write_groups
from uma_engine.train.losses import job_loss
from uma_engine.train.recipe import LoRA, Loss, Recipe, Sampling
from uma_engine.train.trainer import train

WORDS = ["rust", "nurse", "paint", "teach", "drive", "cook", "weld", "sing", "plant", "sew"]


def make_groups(count: int, seed: int, prefix: str) -> list[Group]:
    """A job names two words; a candidate who has both fits well (2), one of them a little (1), none not (0)."""
    rng = random.Random(seed)
    groups = []
    for n in range(count):
        a, b, *others = rng.sample(WORDS, len(WORDS))
        texts = [
            (f"{a} and {b}", 2),
            (f"{b} or {others[0]}", 1),
            *((f"{x} and {y}", 0) for x, y in zip(others[1::2], others[2::2], strict=False)),
        ]
        candidates = tuple(Judged(f"c{i}", f"I {t} every day", g) for i, (t, g) in enumerate(texts))
        groups.append(Group(f"{prefix}{n}", f"We want one who can {a} and {b}", candidates))
    return groups


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def recipe_file(base: Path, tmp_path: Path) -> Path:
    write_groups(tmp_path / "train.jsonl", make_groups(12, 1, "t"))
    write_groups(tmp_path / "dev.jsonl", make_groups(4, 2, "d"))
    path = tmp_path / "recipe.toml"
    path.write_text(
        textwrap.dedent(f"""
            name = "tiny"
            base = "{base}"
            train = "train.jsonl"
            dev = "dev.jsonl"
            threads = 1
            [lora]
            rank = 4
            [optimizer]
            epochs = 4
            learning_rate = 1e-2
            jobs_per_step = 3
            [sampling]
            candidates_per_job = 5
            [evaluation]
            every = 8
            patience = 5
        """)
    )
    return path


# -- the shared prefix --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(base: Path):
    from transformers import AutoModelForCausalLM

    from uma_engine.catalog import open_model
    from uma_engine.train.base_model import add_lora, transformers_model
    from uma_engine.train.tree_forward import ATTENTION, register_attention

    register_attention()
    files = open_model(base)
    model = add_lora(transformers_model(files, AutoModelForCausalLM, torch.float64, ATTENTION), LoRA(rank=4), seed=3)
    with torch.no_grad():  # a fresh adapter's second factor is zero: give it values
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model.double()


def gradients(model, trees, label_ids=(5, 9)):
    from uma_engine.train.tree_forward import label_logits

    model.zero_grad()
    logits = torch.cat([label_logits(model, tree, label_ids) for tree in trees])
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    (logits * weights).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", [[3], [1, 1], [4, 1, 7], [2, 9, 3, 5, 1]])
def test_gradients_are_those_of_separate_rows(decoder, lengths):
    from uma_engine.train.tree_forward import JobTree

    rng = random.Random(sum(lengths))
    prefix = [rng.randrange(200) for _ in range(11)]
    candidates = [[rng.randrange(200) for _ in range(n)] for n in lengths]
    together = gradients(decoder, [JobTree(prefix, candidates)])
    apart = gradients(decoder, [JobTree(prefix, [c]) for c in candidates])
    # transformers keeps norms and rotary angles in fp32, whatever the dtype
    torch.testing.assert_close(together[0], apart[0], rtol=1e-5, atol=1e-6)
    assert together[1].keys() == apart[1].keys()
    assert together[1]
    for name in together[1]:
        torch.testing.assert_close(together[1][name], apart[1][name], rtol=1e-3, atol=1e-5)


def test_the_row_is_what_a_plain_decoder_computes(base, decoder):
    """One candidate in a tree is an ordinary sequence, for transformers' own attention too."""
    from transformers import AutoModelForCausalLM

    from uma_engine.catalog import open_model
    from uma_engine.train.base_model import transformers_model
    from uma_engine.train.tree_forward import ATTENTION, JobTree, label_logits

    files = open_model(base)
    tree = transformers_model(files, AutoModelForCausalLM, torch.float64, ATTENTION)
    plain = transformers_model(files, AutoModelForCausalLM, torch.float64)
    prefix, candidate = [7, 1, 30, 22, 5], [9, 2, 6]
    with torch.no_grad():
        found = label_logits(tree, JobTree(prefix, [candidate, [4]]), [5, 9])[0]
        wanted = plain(torch.tensor([prefix + candidate])).logits[0, -1, [5, 9]]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


# -- losses -------------------------------------------------------------------------------------------------------------


def test_losses_of_worked_examples():
    margins, grades = torch.tensor([1.0, -1.0]), torch.tensor([2, 0])
    only = {"pointwise": 0.0, "listwise": 0.0, "pairwise": 0.0}
    point = job_loss(margins, grades, Loss(**only | {"pointwise": 1.0}), 2)
    assert float(point) == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(-1.0))))
    listwise = job_loss(margins, grades, Loss(**only | {"listwise": 1.0}), 2)
    assert float(listwise) == pytest.approx(float(-torch.log_softmax(margins, 0)[0]))
    pair = job_loss(margins, grades, Loss(**only | {"pairwise": 1.0}), 2)
    assert float(pair) == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(-2.0))))


def test_a_job_without_a_fit_has_no_listwise_loss():
    loss = Loss(pointwise=0.0, listwise=1.0, pairwise=1.0)
    assert float(job_loss(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), loss, 3)) == 0.0


# -- the run ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_all_it_should(recipe_file, tmp_path):
    made = train(Recipe.load(recipe_file), tmp_path / "out")
    history = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    first, last = (sum(h["loss"] for h in part) / 4 for part in (history[:4], history[-4:]))
    assert last < 0.8 * first
    card = json.loads((tmp_path / "out/data_card.json").read_text())
    assert card["adapter_digest"] == made.digest
    assert card["jobs"] == {"train": 12, "dev": 4}
    assert (tmp_path / "out/curves.svg").read_text().startswith("<svg")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    written_beside = {"recipe.json", "data_card.json", "metrics.jsonl", "curves.svg"}
    assert names == {"adapter_config.json", "adapter_model.safetensors"} | written_beside


def test_the_same_recipe_twice_is_the_same_adapter(recipe_file, tmp_path):
    recipe = Recipe.load(recipe_file)
    assert train(recipe, tmp_path / "one").digest == train(recipe, tmp_path / "two").digest


def test_a_killed_run_goes_on_to_the_same_adapter(recipe_file, tmp_path):
    whole = train(Recipe.load(recipe_file), tmp_path / "whole")
    code = (
        "import sys; from uma_engine.cli.main import main; sys.exit(main(['train', sys.argv[1], '--out', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, str(recipe_file), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "killed/.checkpoint/state/run.json"
    end = time.monotonic() + 120
    while not state.exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    said: list[str] = []
    again = train(Recipe.load(recipe_file), tmp_path / "killed", say=said.append)
    assert any("going on at step" in line for line in said)
    assert again.digest == whole.digest
    assert (again.best, again.best_step, again.steps) == (whole.best, whole.best_step, whole.steps)


def test_what_is_served_is_what_was_trained(base, recipe_file, tmp_path):
    """Margins of the trainer's own forward pass against the engine's, on the adapter as it was saved."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from uma_engine.catalog import open_model
    from uma_engine.train.base_model import transformers_model
    from uma_engine.train.evaluate import rank_groups
    from uma_engine.train.prompts import JobPrompts
    from uma_engine.train.tree_forward import ATTENTION, label_logits, register_attention

    recipe = Recipe.load(recipe_file)
    train(recipe, tmp_path / "out")
    register_attention()
    files = open_model(base)
    model = PeftModel.from_pretrained(
        transformers_model(files, AutoModelForCausalLM, attention=ATTENTION), tmp_path / "out"
    )
    prompts, groups = JobPrompts(files, recipe), read_groups(recipe.dev)
    with Engine(base, precision="exact") as engine:
        engine.load_adapter("tiny", tmp_path / "out")
        ranked = rank_groups(engine, groups, recipe, adapter="tiny")
        unadapted = rank_groups(engine, groups, recipe, adapter=None)
    for group, found, plain in zip(groups, ranked, unadapted, strict=True):
        with torch.no_grad():
            logits = label_logits(model, prompts.tree(group.job, [c.text for c in group.candidates]), prompts.label_ids)
        margins = (logits[:, 0] - logits[:, 1]).tolist()
        assert found.margins == pytest.approx(margins, abs=1e-4)
        assert found.margins != pytest.approx(plain.margins, abs=1e-2)


def test_checkpointed_gradients_are_the_same_bits(recipe_file, tmp_path, monkeypatch):
    from transformers import modeling_utils

    plain = train(Recipe.load(recipe_file), tmp_path / "plain")
    used = []
    checkpoint = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: used.append(1) or checkpoint(*a, **k))
    checkpointed = train(replace(Recipe.load(recipe_file), gradient_checkpointing=True), tmp_path / "checkpointed")
    assert used
    assert checkpointed.digest == plain.digest


def test_half_precision_learns_and_margins_stay_fp32(recipe_file, tmp_path):
    """A margin is a small difference of large logits: rounded to 16 bits it would be worth little."""
    recipe = replace(Recipe.load(recipe_file), precision="bfloat16")
    train(recipe, tmp_path / "out")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_label_logits_are_fp32_under_autocast(base):
    from transformers import AutoModelForCausalLM

    from uma_engine.catalog import open_model
    from uma_engine.train.base_model import transformers_model
    from uma_engine.train.tree_forward import ATTENTION, JobTree, label_logits, register_attention

    register_attention()
    model = transformers_model(open_model(base), AutoModelForCausalLM, attention=ATTENTION)
    tree = JobTree([7, 1, 30], [[9, 2, 6], [4], [8, 8], [5, 3]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = label_logits(model, tree, [5, 9, 11, 13])
    assert logits.dtype == torch.float32
    assert (logits.bfloat16().float() != logits).any()


def test_a_kill_at_the_very_end_leaves_a_whole_adapter(recipe_file, tmp_path):
    """As if killed when all was written and the checkpoint was about to go: the same command ends well again."""
    from uma_engine.train import trainer

    kept = []
    remove = trainer.shutil.rmtree
    trainer.shutil.rmtree = lambda path, **more: (
        remove(path, **more) if not str(path).endswith(".done") else kept.append(path)
    )
    try:
        made = train(Recipe.load(recipe_file), tmp_path / "out")
    finally:
        trainer.shutil.rmtree = remove
    assert kept
    with pytest.raises(InvalidRequest, match="holds an adapter already"):
        train(Recipe.load(recipe_file), tmp_path / "out")
    with Engine(Recipe.load(recipe_file).base) as engine:
        engine.load_adapter("whole", made.directory)


def test_a_place_that_cannot_be_written_is_named(recipe_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot be made"):
        train(Recipe.load(recipe_file), tmp_path / "file")


def test_another_recipe_is_not_mixed_into_a_run(recipe_file, tmp_path):
    recipe = Recipe.load(recipe_file)
    train(recipe, tmp_path / "out")
    with pytest.raises(InvalidRequest, match="holds an adapter already"):
        train(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not TOML"),
        ('name = "a"', "lacks a key"),
        ('name = "a"\nbase = "b"\ntrain = "t"\ndev = "d"\nspeed = 3', "unknown key `speed`"),
        ('name = "a"\nbase = "b"\ntrain = "t"\ndev = "d"\n[lora]\nrank = "x"', "`lora.rank` is `'x'`"),
        ('name = "a"\nbase = "b"\ntrain = "t"\ndev = "d"\n[lora]\nrank = 0', "from 1 to 256"),
        ('name = "a"\nbase = "b"\ntrain = "t"\ndev = "d"\n[lora]\ntargets = ["head"]', "lora.targets"),
        ('name = "a"\nbase = "b"\ntrain = "t"\ndev = "d"\n[loss]\nlistwise = 0\npointwise = 0', "at least one term"),
        ('name = "a"\nbase = "b"\ntrain = "t"\ndev = "d"\nlora = 3', "must be a table"),
        ('name = "a"\nbase = "b"\ntrain = "t"\ndev = "d"\n[optimizer]\nlearning_rate = nan', "learning_rate"),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        Recipe.load(tmp_path / "r.toml")


def one_job(job: str, *candidates: tuple[str, object]) -> str:
    return json.dumps(
        {"id": "a", "job": job, "candidates": [{"id": i, "text": "t", "grade": g} for i, g in candidates]}
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no jobs"),
        ("{", "line 1"),
        ('{"id": "a", "job": "b"}', "KeyError"),
        (one_job("b", ("x", True), ("y", 0)), "must be an integer"),
        (one_job("b", ("x", 0), ("x", 0)), "of their own"),
        (one_job(" ", ("x", 0), ("y", 0)), "something in them"),
        (one_job("b", ("x", 0), ("y", 0))[:-1] + ', "missed": [99]}', "of one missed is `99`"),
    ],
)  # fmt: skip
def test_bad_data_says_where(tmp_path, line, message):
    (tmp_path / "d.jsonl").write_text(line + "\n")
    with pytest.raises(InvalidRequest, match=message):
        read_groups(tmp_path / "d.jsonl")


def test_a_draw_is_a_function_of_the_seed_and_keeps_the_graded():
    group = Group("g", "job", tuple(Judged(str(i), "t", 3 if i < 2 else 0) for i in range(50)))
    assert group.draw(8, 1) == group.draw(8, 1)
    assert group.draw(8, 1) != group.draw(8, 2)
    for seed in range(20):
        drawn = group.draw(8, seed)
        assert len(drawn) == 8
        assert sum(c.grade > 0 for c in drawn) == 2
    many = Group("m", "job", tuple(Judged(str(i), "t", 1 if i < 40 else 0) for i in range(44)))
    assert sum(c.grade == 0 for c in many.draw(8, 0)) == 4
    assert Sampling().candidates_per_job == 16


def test_a_job_on_both_sides_is_refused(recipe_file, tmp_path):
    recipe = Recipe.load(recipe_file)
    write_groups(recipe.dev, [*make_groups(2, 2, "d"), make_groups(1, 1, "t")[0]])
    with pytest.raises(InvalidRequest, match="in the training and in the dev data"):
        train(recipe, tmp_path / "out")
