"""Further finders for redaction, out of Presidio: phone numbers of any country, numbers of accounts and identity documents, and, where a
language model of spaCy is named, people's names and groups (nationality, religion, politics) as a reader finds them.

Knows which of Presidio's recognisers to ask; does not know what is done with what they find. `presidio` alone needs no model and gives
the same spans on every machine with the same versions; `presidio:MODEL` asks a model too: the name of an installed one (such as
`en_core_web_sm`, which its makers publish but not on PyPI), or its directory. Nothing is ever fetched: recognisers that would (those of
links and e-mail addresses ask for a list of domains) are left out, the rules of `redaction` find these.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from uma_engine.errors import MissingPackage, SurfaceError
from uma_engine.ranking.redaction import Finder, Redaction

__all__ = ["PRESIDIO", "check_finder", "finder"]

PRESIDIO = "presidio"
LEAST_SCORE = 0.4  # below: what only the words around it could tell, and no words are looked at
NUMBERS = (
    "IbanRecognizer",
    "CreditCardRecognizer",
    "CryptoRecognizer",
    "UsSsnRecognizer",
    "UsItinRecognizer",
    "UkNinoRecognizer",
    "NhsRecognizer",
    "ItFiscalCodeRecognizer",
    "EsNifRecognizer",
    "InAadhaarRecognizer",
    "InPanRecognizer",
    "PlPeselRecognizer",
    "SgFinRecognizer",
    "AuTfnRecognizer",
)
KIND_OF = {"PHONE_NUMBER": "phone", "PERSON": "name", "NRP": "group"}  # everything else is an `id`
READ = ("PERSON", "NRP")


def check_finder(name: str) -> str:
    """The name back. Errors: SurfaceError for one that is not known"""
    if name != PRESIDIO and not (name.startswith(f"{PRESIDIO}:") and name.removeprefix(f"{PRESIDIO}:").strip()):
        raise SurfaceError(f"`redact_with` holds `{name}`", hint=f"known are `{PRESIDIO}` and `{PRESIDIO}:MODEL`")
    return name


@cache
def finder(name: str) -> tuple[Finder, str]:
    """The finder, and the versions of what it is made of, which decide what it finds.

    Errors: MissingPackage naming the extra, or the model that is not installed
    """
    try:
        known = import_module("presidio_analyzer.predefined_recognizers")
    except ImportError:
        raise MissingPackage(
            f"`redact_with` is `{name}` but `presidio-analyzer` is not installed",
            hint="install it: `pip install 'uma-engine[pii]'`",
        ) from None
    recognizers = [known.PhoneRecognizer(), *(getattr(known, each)() for each in NUMBERS)]
    said = f"presidio-analyzer {importlib.metadata.version('presidio-analyzer')}"
    model = name.removeprefix(PRESIDIO).removeprefix(":")
    read: Callable[[str], list[Any]] = lambda text: []  # noqa: E731
    if model:
        read, version = _reader(model, known)
        said += f", {version}"

    def find(text: str) -> Iterator[Redaction]:
        found = [span for r in recognizers for span in r.analyze(text, r.supported_entities, None) or ()]
        for span in (*found, *read(text)):
            if span.score >= LEAST_SCORE:
                yield Redaction(span.start, span.end, KIND_OF.get(span.entity_type, "id"))

    return find, said


def _reader(model: str, known: Any) -> tuple[Callable[[str], list[Any]], str]:
    """What a language model of spaCy reads as people and groups, and its version."""
    import spacy
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    if not spacy.util.is_package(model) and not (Path(model) / "meta.json").is_file():
        raise MissingPackage(  # before Presidio tries to fetch it
            f"`redact_with` names the language model `{model}` but spaCy has none of that name",
            hint="install it as its makers say, give the directory it lies in, or take `presidio` alone",
        )
    engine: Any = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": model}])
    engine.load()
    recognizer = known.SpacyRecognizer()
    meta = engine.nlp["en"].meta
    turns = threading.Lock()  # one pipeline, calls from many threads

    def read(text: str) -> list[Any]:
        with turns:
            artifacts = engine.process_text(text, "en")
            return list(recognizer.analyze(text, list(READ), artifacts) or ())

    return read, f"spacy {spacy.__version__}, {meta.get('lang')}_{meta.get('name')} {meta.get('version')}"
