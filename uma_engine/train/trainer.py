"""The training loop: recipe and data in, an adapter directory out; a killed run goes on where it was, to the same bytes.

Knows steps, schedules, checkpoints, early stopping; does not know what is learned (`objectives`) or what a model is inside.
One run, one thread. Same recipe, data, machine and number of threads: same digest.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uma_engine.errors import InvalidRequest, MissingPackage
from uma_engine.train.artifact import adapter_digest, curves_svg, save_adapter, write_json
from uma_engine.train.groups import file_digest
from uma_engine.train.objectives import data_names, objective_of
from uma_engine.train.recipe import Recipe

__all__ = ["Trained", "train"]

CHECKPOINT = ".checkpoint"
KEEP_SECONDS = 60.0  # between checkpoints: what a kill can cost
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What came of a run. `best` at `best_step` is the dev measure, by name `measure`, that chose the adapter: no estimate of quality."""

    directory: Path
    digest: str
    best: float
    measure: str
    best_step: int
    steps: int
    stopped_early: bool


def train(recipe: Recipe, out: str | Path, *, say: Say = lambda line: None) -> Trained:
    """Run a recipe. `say` is told of progress, a line at a time.

    Semantics:  LoRA on a frozen base; each step sees `jobs_per_step` jobs, each with candidates drawn from (seed, epoch, job), or so many
                turns of conversations; every `evaluation.every` steps the adapter is saved and the dev measure (nDCG@10 through the engine
                that serves it; of chats the loss of a token) decides whether it is the best so far. `out` receives the best one.
    Errors:     InvalidRequest (recipe, data, an `out` of another recipe), MissingPackage without the extra `train`
    """
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingPackage(
            f"`{error.name}` is not installed", hint="install it with `pip install 'uma-engine[train]'`"
        ) from None
    return _Run(recipe, Path(out).expanduser().absolute(), say).go()


class _Run:
    def __init__(self, recipe: Recipe, out: Path, say: Say) -> None:
        import torch

        from uma_engine.catalog import open_model, resolve

        self.recipe, self.out, self.say = recipe, out, say
        self.threads = recipe.threads or torch.get_num_threads()
        files = open_model(resolve(recipe.base))
        self.base_digest = files.digest
        self.objective = objective_of(recipe, files)
        self.identity = {
            "recipe": recipe.digest,
            "base": files.digest,
            "train": file_digest(recipe.train),
            "dev": file_digest(recipe.dev),
            "threads": self.threads,
        }
        self.files = files
        optimizer = recipe.optimizer
        self.steps_per_epoch = -(-len(self.objective.examples) // optimizer.jobs_per_step)
        self.total = self.steps_per_epoch * optimizer.epochs
        if optimizer.max_steps is not None:
            self.total = min(self.total, optimizer.max_steps)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"value": None, "step": -1, "since": 0}

    def go(self) -> Trained:
        import torch

        recipe = self.recipe
        before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            self._prepare()
            kept = began = time.perf_counter()
            first = self.step
            while self.step < self.total and self.best["since"] <= recipe.evaluation.patience:
                losses = self._one_step()
                self.step += 1
                self.history.append({"step": self.step, "loss": losses, "learning_rate": self._rate(self.step - 1)})
                due = self.step % recipe.evaluation.every == 0 or self.step == self.total
                if due:
                    self._evaluate()
                if due or time.perf_counter() - kept > KEEP_SECONDS:
                    self._save_checkpoint()
                    kept = time.perf_counter()
                if due or self.step % 10 == 0:
                    pace = (time.perf_counter() - began) / (self.step - first)
                    left = pace * (self.total - self.step)
                    best = (
                        ""
                        if self.best["value"] is None
                        else f"  best {self.objective.measure} {self.best['value']:.4f}"
                    )
                    self.say(
                        f"step {self.step}/{self.total}  loss {losses:.4f}{best}  {pace:.2f} s a step, {left / 60:.0f} min left"
                    )
            return self._finish()
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1], warn_only=warned_only)
            if hasattr(self, "engine"):
                self.engine.close()

    # -- one step ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from uma_engine import Engine
        from uma_engine.train.base_model import add_lora, transformers_model
        from uma_engine.train.tree_forward import ATTENTION, register_attention

        recipe = self.recipe
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"`{self.out}` cannot be made: {error.strerror}", param="out") from None
        register_attention()
        base = transformers_model(self.files, AutoModelForCausalLM, attention=ATTENTION).to(recipe.device)
        if recipe.precision == "bfloat16":  # the frozen matrices alone: what flows between layers stays fp32
            for module in base.model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data = module.weight.data.to(torch.bfloat16)
        self.model = add_lora(base, recipe.lora, recipe.seed)
        if recipe.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        self.model.train()
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.optimizer.learning_rate, weight_decay=recipe.optimizer.weight_decay
        )
        self.engine = Engine(
            recipe.base,
            num_threads=self.threads,
            max_lora_rank=max(64, recipe.lora.rank),
            max_loras=2,
            device=recipe.device,
        )
        self._load_checkpoint()

    def _rate(self, step: int) -> float:
        o = self.recipe.optimizer
        warm = max(1, int(o.warmup * self.total))
        if step < warm:
            return o.learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, self.total - warm)
        return o.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))

    def _examples(self, step: int) -> tuple[list[Any], int]:
        """The examples of a step with the seed of their draw: a function of the step alone."""
        import random

        epoch, place = divmod(step, self.steps_per_epoch)
        examples = self.objective.examples
        order = list(range(len(examples)))
        random.Random(f"{self.recipe.seed}:{epoch}").shuffle(order)
        n = self.recipe.optimizer.jobs_per_step
        return [examples[index] for index in order[place * n : (place + 1) * n]], self.recipe.seed + epoch

    def _one_step(self) -> float:
        import torch

        for settings in self.optimizer.param_groups:
            settings["lr"] = self._rate(self.step)
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for whose, loss in self.objective.losses(self.model, *self._examples(self.step)):
            if not torch.isfinite(loss):
                raise InvalidRequest(
                    f"the loss of {whose} is {float(loss)} at step {self.step}", hint="lower `optimizer.learning_rate`"
                )
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        return total

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """The adapter as it will be served: saved in 16 bits, and loaded by the engine where the measure asks it."""
        current = self.out / CHECKPOINT / "current"
        save_adapter(self.model, current, self.recipe.base)

        def served() -> Any:
            self.engine.load_adapter("current", current)
            return self.engine

        value = self.objective.dev(self.model, served)
        self.history[-1]["dev"] = value
        best = self.best["value"]
        if best is None or (value > best if self.objective.higher else value < best):
            self.best = {"value": value, "step": self.step, "since": 0}
            kept = self.out / CHECKPOINT / "best"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(current, kept)
        else:
            self.best["since"] += 1
        self.say(f"step {self.step}: dev {self.objective.measure} {value:.4f} (best {self.best['value']:.4f})")

    def _finish(self) -> Trained:
        recipe, best = self.recipe, self.out / CHECKPOINT / "best"
        for file in best.iterdir():
            shutil.copy2(file, self.out / file.name)
        digest = adapter_digest(self.out)
        write_json(
            self.out / "recipe.json",
            recipe.to_dict() | data_names(recipe),
        )
        write_json(
            self.out / "data_card.json",
            {
                "name": recipe.name,
                "adapter_digest": digest,
                "base": recipe.base,
                "base_digest": self.base_digest,
                "data": {k: self.identity[k] for k in ("train", "dev")},
                **self.objective.card(),
                "sources": list(recipe.sources),
                "consent": recipe.consent,
                "recipe_digest": recipe.digest,
                "threads": self.threads,
                "task": recipe.task,
                "dev_measure": self.objective.measure,
                "dev": self.best["value"],
                "step": self.best["step"],
                "note": "the dev measure chose this adapter: it is no estimate of quality on new jobs",
            },
        )
        lines = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in self.history)
        (self.out / "metrics.jsonl").write_text(lines, encoding="utf-8")
        losses = [(h["step"], h["loss"]) for h in self.history]
        dev = [(h["step"], h["dev"]) for h in self.history if "dev" in h]
        (self.out / "curves.svg").write_text(
            curves_svg(recipe.name, {"loss": losses, f"dev {self.objective.measure}": dev}), encoding="utf-8"
        )
        stopped = self.step < self.total
        done = (
            self.out / f"{CHECKPOINT}.done"
        )  # a kill while files are deleted must not leave half a checkpoint to go on from
        shutil.rmtree(done, ignore_errors=True)
        (self.out / CHECKPOINT).replace(done)
        shutil.rmtree(done, ignore_errors=True)
        return Trained(
            self.out, digest, self.best["value"], self.objective.measure, int(self.best["step"]), self.step, stopped
        )

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """Parameters, the optimizer's moments and where the run is; a directory that appears whole, by renaming."""
        from safetensors.torch import save_file

        home = self.out / CHECKPOINT
        fresh, state = home / "state.part", home / "state"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        tensors = {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors[f"p.{name}"] = parameter.detach().contiguous()
            tensors[f"m.{name}"], tensors[f"v.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        save_file(tensors, fresh / "tensors.safetensors")
        write_json(
            fresh / "run.json",
            {"identity": self.identity, "step": self.step, "history": self.history, "best": self.best},
        )
        old = home / "state.old"
        shutil.rmtree(old, ignore_errors=True)
        if state.exists():
            state.replace(old)
        fresh.replace(state)
        shutil.rmtree(old, ignore_errors=True)

    def _load_checkpoint(self) -> None:
        import torch
        from safetensors.torch import load_file

        home = self.out / CHECKPOINT
        state = next((p for p in (home / "state", home / "state.old") if (p / "run.json").exists()), None)
        if state is None:
            if (self.out / "data_card.json").exists():
                raise InvalidRequest(f"`{self.out}` holds an adapter already", hint="name a new directory", param="out")
            return
        run = json.loads((state / "run.json").read_text(encoding="utf-8"))
        if run["identity"] != self.identity:
            changed = [k for k in self.identity if run["identity"].get(k) != self.identity[k]]
            raise InvalidRequest(
                f"`{self.out}` holds a run that differs in {', '.join(changed)}",
                hint="name a new directory, or delete this one",
                param="out",
            )
        tensors = load_file(state / "tensors.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"p.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(run["step"])),
                    "exp_avg": tensors[f"m.{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"v.{name}"].to(parameter.device),
                }
        self.step, self.history, self.best = run["step"], run["history"], run["best"]
        self.say(f"going on at step {self.step} of {self.total}")
