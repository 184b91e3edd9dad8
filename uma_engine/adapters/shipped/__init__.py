"""Adapters that come with the package: trained by `uma train` on public data, each with its data card.

Knows names and directories; does not know what is in them.
"""

from __future__ import annotations

from pathlib import Path

from uma_engine.errors import UnknownAdapter

__all__ = ["names", "shipped"]

HOME = Path(__file__).resolve().parent


def names() -> list[str]:
    """What there is, sorted."""
    return sorted(path.parent.name for path in HOME.glob("*/adapter_config.json"))


def shipped(name: str) -> Path:
    """The directory of an adapter that comes with the package. Errors: UnknownAdapter"""
    if name not in names():
        raise UnknownAdapter(f"no adapter `{name}` comes with this package", hint=f"there are {', '.join(names())}")
    return HOME / name
