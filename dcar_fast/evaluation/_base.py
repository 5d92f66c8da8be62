"""What the settings of several evaluations share: checks, Inception's weights, the file that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_fast.config import _Config, _is_int

if TYPE_CHECKING:
    import torch

    from dcar_fast.evaluation.inception import Inception


class Evaluation(_Config):
    """Settings with a ``run()``, and the checks that several of them need."""

    def _check_numbers(self, *positive: str) -> None:
        self._require_positive_ints(*positive)
        if hasattr(self, "seed"):
            self._require("seed", _is_int(self.seed) and self.seed >= 0, "an integer >= 0")

    def _check_paths(self, *names: str, needed: bool = True) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(name, isinstance(value, (str, Path)) and (bool(str(value)) or not needed), "a path")


def network_of_fid(path: str, resize: str, device: torch.device, metric: str) -> Inception | None:
    """Inception with the weights in ``path``; for "" None, and it is said that ``metric`` is left out."""
    if not path:
        print(f"{metric} is left out: it needs the weights of Inception from a local file, inception is not set")
        return None
    from dcar_fast.evaluation.inception import load_inception

    return load_inception(path, resize).to(device)


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Writes ``values`` atomically; nothing for None."""
    from dcar_fast._files import write_atomically

    if path is not None:
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
