"""Entry point of the `uma` command: arguments, errors as words, exit codes.

Knows which subcommand is which; does not know what they do. An error meant for a caller is printed without a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from uma_engine._version import __version__
from uma_engine.catalog import DEFAULT_ADAPTER, DEFAULT_MODEL
from uma_engine.cli.console import discard_output
from uma_engine.cli.gates import add_commands as add_gate_commands
from uma_engine.cli.index import add_commands as add_index_commands
from uma_engine.cli.learn import add_command as add_learn_command
from uma_engine.cli.record import add_commands as add_record_commands
from uma_engine.cli.serve_options import add_command as add_serve_command
from uma_engine.config import DEVICES, DTYPES, LOG_CONTENTS, PRECISIONS, QUANTIZATIONS
from uma_engine.errors import UmaError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 (failure), 2 (bad input), 75 (overloaded), 130 (Ctrl-C)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if sys.stdout is None:
        _say("error: standard output is closed\nhint: send it to a file, or to /dev/null")
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a character must not cost the answer
    try:
        if configure := getattr(args, "configure", None):  # more defaults, from a file and the environment
            configure(args)
            args = parser.parse_args(argv)
        return args.run(args)
    except UmaError as error:
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output left, e.g. `uma rank ... | head`
        discard_output()
        return 128 + signal.SIGPIPE
    except Exception as error:
        if _is_backend_choice(error):
            _say(f"error: {error}\nhint: {_backend_hint()}")
            return 2
        if args.debug:
            raise
        _say(
            f"internal error: {type(error).__name__}: {error}\nhint: run again with `uma --debug ...` for the traceback"
        )
        return 1


def _say(text: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text + "\n")


def _is_backend_choice(error: Exception) -> bool:
    """Whether this is `uma_kernels.dispatch.BackendUnavailable`: by name, as a bad `UMA_ISA` fails that very import."""
    kind = type(error)
    return (kind.__module__, kind.__name__) == ("uma_kernels.dispatch", "BackendUnavailable")


def _backend_hint() -> str:
    chosen = [f"`{name}={os.environ[name]}`" for name in ("UMA_BACKEND", "UMA_ISA") if os.environ.get(name)]
    return f"{' and '.join(chosen)} in the environment made this choice; unset it to let the engine choose"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uma", description="Inference and ranking for talent marketplaces")
    parser.add_argument("--version", action="version", version=f"uma-engine {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    rank = commands.add_parser("rank", help="rank candidates for a job")
    rank.add_argument("job", metavar="JOB", help="job post, a text or markdown file, or - for standard input")
    rank.add_argument(
        "candidates", metavar="CANDIDATES", help="candidates, a JSONL or CSV file, or - for JSONL on standard input"
    )
    rank.add_argument("--top-n", type=int, metavar="N", help="show the best N only")
    rank.add_argument("--json", action="store_true", help="print JSON instead of a table")
    rank.add_argument("--record", metavar="FILE", help="write the decision record, which `uma replay` recomputes")
    rank.add_argument("--log", metavar="FILE", help="append the decision record to this log; see `uma record`")
    rank.add_argument(
        "--log-content",
        choices=LOG_CONTENTS,
        default="full",
        help="what the log keeps of job and candidates: their words, or salted digests (default: full)",
    )
    rank.add_argument(
        "--surface", metavar="FILE", help="score by the factors that this TOML file declares, and show the ledger"
    )
    rank.add_argument(
        "--job-fact",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a number of the job that the surface's facts are measured against, such as budget=60; repeatable",
    )
    rank.add_argument(
        "--explain",
        choices=("ledger", "words"),
        default="ledger",
        help="words: with --surface, an assessment of the best in sentences that cite the ledger and the texts (default: ledger)",
    )
    rank.add_argument(
        "--explain-top", type=int, metavar="N", help="how many of the best are written about (default: 5)"
    )
    rank.add_argument(
        "--deliberate",
        type=int,
        metavar="N",
        help="write up to N tokens of notes about each of the best, then read again",
    )
    rank.add_argument(
        "--cascade",
        metavar="FILE",
        help="bounds of `Engine.fit_cascade`: read to the end only who can still reach the top",
    )
    rank.add_argument("--budget", type=int, metavar="N", help="with --cascade: compute at most N tokens")
    rank.add_argument("--instruction", metavar="TEXT", help="what the model is asked to do")
    rank.add_argument(
        "--labels", default="yes,no", metavar="YES,NO", help="label words, each one token (default: yes,no)"
    )
    rank.add_argument(
        "--no-adapter", action="store_true", help=f"the bare base, where {DEFAULT_ADAPTER} would read by default"
    )
    rank.add_argument(
        "--blend",
        action="store_true",
        help="add what words and embeddings say to what the model reads (extra retrieval)",
    )
    rank.add_argument("--max-tokens-per-candidate", type=int, metavar="N", help="cut longer candidates to N tokens")
    rank.add_argument("--deadline", type=float, metavar="SECONDS", help="give up after so long")
    _model_options(rank)
    rank.set_defaults(run=_lazy("rank"))

    generate = commands.add_parser("generate", help="complete a prompt")
    generate.add_argument("prompt", metavar="PROMPT", help="the text, or - for standard input")
    generate.add_argument("--max-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--top-k", type=int, default=0, metavar="K")
    generate.add_argument("--seed", type=int, metavar="N")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    generate.add_argument(
        "--raw", action="store_true", help="use the prompt as it is, without the model's chat template"
    )
    _model_options(generate)
    generate.set_defaults(run=_lazy("generate"))

    replay = commands.add_parser("replay", help="recompute a decision record and compare every bit")
    replay.add_argument("record", metavar="RECORD|LOG", help="a file written by `uma rank --record`, or a decision log")
    replay.add_argument("id", nargs="?", type=int, metavar="ID", help="which record of a log")
    replay.add_argument("--all", action="store_true", help="every record of a log")
    replay.add_argument("--job", metavar="FILE", help="the job, where a log keeps digests")
    replay.add_argument("--candidates", metavar="FILE", help="the candidates, where a log keeps digests")
    _model_options(replay, recorded=True)
    replay.set_defaults(run=_lazy("replay"))

    add_record_commands(commands)
    add_index_commands(commands, _model_options)

    bench = commands.add_parser("bench", help="how fast this machine ranks, and where the time goes")
    bench.add_argument("--candidates", type=int, default=64, metavar="N", help="candidates of one job (default: 64)")
    bench.add_argument("--job-tokens", type=int, default=300, metavar="N", help="tokens of the job (default: 300)")
    bench.add_argument(
        "--candidate-tokens", type=int, default=160, metavar="N", help="tokens of each candidate (default: 160)"
    )
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs (default: 3)")
    bench.add_argument("--profile", action="store_true", help="one more run, with the share of each op")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _model_options(bench)
    bench.set_defaults(run=_lazy("bench"))

    add_serve_command(commands, _model_options)

    swap = commands.add_parser("swap", help="swap a server's base while requests run")
    swap.add_argument("--address", default="http://127.0.0.1:8000", metavar="URL", help="the server")
    swap.add_argument("--key", metavar="KEY", help="an `admin` key (default: UMA_API_KEY)")
    actions = swap.add_subparsers(dest="action", required=True, metavar="ACTION")
    start = actions.add_parser("start", help="load another base beside the old one, test it, and let it answer")
    start.add_argument("model", metavar="ID|PATH")
    start.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=PATH", help="below the adapter root; repeatable"
    )
    start.add_argument("--exclusive", action="store_true", help="close the old base first: memory holds one")
    start.add_argument("--canary", type=float, metavar="SHARE", help="at first for this share of the keys, from 0 to 1")
    actions.add_parser("finish", help="the canary answers everybody")
    actions.add_parser("status", help="the base that answers, the one before, and the swap under way")
    actions.add_parser("rollback", help="the base before answers again, at once")
    swap.set_defaults(run=_lazy("swap"))

    export = commands.add_parser("export", help="write a model as an ONNX graph that gives label logits")
    export.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="ID|PATH",
        help=f"catalog name, hub id or path (default: {DEFAULT_MODEL})",
    )
    export.add_argument(
        "--onnx", required=True, metavar="DIR", help="the new directory to write: graph and fp32 weights"
    )
    export.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT format, merged into the weights")
    export.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="longest prompt in tokens (default: the model's own, at most 8192)",
    )
    export.set_defaults(run=_lazy("export"))

    train = commands.add_parser("train", help="train a ranking adapter from a recipe")
    train.add_argument("recipe", metavar="RECIPE", help="a TOML file; see docs/training.md")
    train.add_argument(
        "--out", required=True, metavar="DIR", help="the adapter's directory; a run that was killed goes on"
    )
    train.set_defaults(run=_lazy("train"))

    add_gate_commands(commands, _model_options)
    add_learn_command(commands)

    data = commands.add_parser("data", help="build training data")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    synthetic = actions.add_parser("synthetic", help="judged jobs made to a plan, from O*NET's occupations")
    synthetic.add_argument("plan", metavar="PLAN", help="a TOML file; see docs/training.md")
    synthetic.add_argument("--onet", required=True, metavar="DIR", help="holds O*NET's text files")
    synthetic.add_argument("--all", action="store_true", help="also occupations that dev and test jobs are made of")
    synthetic.add_argument("--out", required=True, metavar="DIR", help="receives synthetic.jsonl and report.json")
    synthetic.add_argument(
        "--rephrase",
        metavar="MODEL",
        help="says every post in other words that keep its numbers and tools (extra `words`)",
    )
    synthetic.set_defaults(run=_lazy("data", "synthetic"))
    human = actions.add_parser(
        "human", help="judged replies from conversations with people's marks, and how much people agree"
    )
    human.add_argument("file", metavar="FILE", help="conversations, JSONL; see docs/training.md")
    human.add_argument("--format", choices=("ours", "upheld"), default="ours", help="of the file (default: ours)")
    human.add_argument("--quality", default="content", metavar="NAME", help="the mark that grades (default: content)")
    human.add_argument("--out", required=True, metavar="DIR", help="receives train, dev and test.jsonl, by dialogue")
    human.set_defaults(run=_lazy("data", "human"))
    requirements = actions.add_parser(
        "requirements", help="conversations about which requirements a sentence states, from SkillSpan's marked posts"
    )
    requirements.add_argument("directory", metavar="DIR", help="holds SkillSpan's train, dev and test.json")
    requirements.add_argument("--out", required=True, metavar="DIR", help="receives train, dev and test.jsonl")
    requirements.set_defaults(run=_lazy("data", "requirements"))
    build = actions.add_parser("build", help="judged jobs from O*NET, ESCO and their crosswalk, split by major group")
    build.add_argument("--source", required=True, metavar="DIR", help="holds esco-onet-crosswalk/ and onet-29.2/")
    build.add_argument(
        "--out", required=True, metavar="DIR", help="receives train.jsonl, dev.jsonl, test.jsonl and card.json"
    )
    build.add_argument("--seed", type=int, default=0, metavar="N")
    build.set_defaults(run=_lazy("data"))

    models = commands.add_parser("models", help="list the models known by name")
    models.add_argument("--json", action="store_true", help="print JSON instead of a table")
    models.add_argument("--fetch", metavar="NAME", help="fetch a model's files into the cache")
    models.set_defaults(run=_lazy("models"))

    doctor = commands.add_parser("doctor", help="what was found on this machine, and which back end each op takes")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of tables")
    doctor.add_argument("--label", metavar="WORD", help="tell whether a model has this word as a single token")
    doctor.add_argument("--model", metavar="ID|PATH", help=f"the model that --label asks (default: {DEFAULT_MODEL})")
    doctor.set_defaults(run=_lazy("doctor"))
    return parser


def _model_options(parser: argparse.ArgumentParser, recorded: bool = False) -> None:
    """`recorded`: what is left out comes from a decision record."""
    parser.add_argument(
        "--model",
        default=None if recorded else DEFAULT_MODEL,
        metavar="ID|PATH",
        help=f"catalog name, hub id or path (default: {'the recorded one' if recorded else DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--adapter", metavar="NAME|DIR", help="a LoRA adapter that comes with the package, or in PEFT format"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=None if recorded else "near",
        help="arithmetic of the linear layers: exact is fp32; near has 16-bit activations and is faster, "
        "fast has 8-bit ones and is faster still, its scores a little off "
        f"(default: {'the recorded one' if recorded else 'near'})",
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type of weights and activations on a GPU (default: bfloat16)",
    )
    parser.add_argument(
        "--quantization",
        choices=[name for name in QUANTIZATIONS if name],
        help="fp8: 8-bit floating-point products on a GPU, faster and a little off (default: none)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads to compute with (default: all CPUs of this process)"
    )


def _lazy(command: str, function: str = "run"):  # type: ignore[no-untyped-def]
    """A runner that imports its command only when it is asked for: `uma --help` stays quick."""

    def run(args: argparse.Namespace) -> int:
        from importlib import import_module

        return getattr(import_module(f"uma_engine.cli.{command}"), function)(args)

    return run


if __name__ == "__main__":
    sys.exit(main())
