from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hkft.events import Event, Notice


class Ear(list[Event]):
    """A listener that remembers."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self if isinstance(event, Notice)]


@pytest.fixture
def tell() -> Ear:
    return Ear()


@pytest.fixture
def recipe() -> Callable[..., SimpleNamespace]:
    """recipe(train=..., task=..., seed=..., any other key of `data`)"""

    def build(task: str = "classification", seed: int = 1, **data: Any) -> SimpleNamespace:
        defaults = {
            "train": "",
            "validation": 0.2,
            "test": None,
            "filter": None,
            "text": "text",
            "label": "label",
            "max_length": 16,
            "train_rows": None,
            "validation_rows": None,
        }
        return SimpleNamespace(task=task, seed=seed, data=SimpleNamespace(**{**defaults, **data}))

    return build


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """write(name, content) -> the file's path"""

    def save(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return save
