"""Checkpoints that the tests of this folder share, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from parity_checkpoints import Checkpoint, make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Gives a tiny checkpoint by its name."""
    return cache(lambda name: make_checkpoint(name, tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """At this size torch's threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
