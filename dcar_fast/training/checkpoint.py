"""Checkpoints: folders step-00001000 that are there whole or not at all, readable by any number of processes.

A folder is written under another name, flushed to disk and renamed; its record (record.json) holds size and CRC-32 of
each file. States are whole ones (torch.distributed.checkpoint.state_dict): what DDP saves, FSDP2 or one process reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dcar_fast._files import _umask

FORMAT = "dcar-fast checkpoint 1"
RECORD = "record.json"
NAME = re.compile(r"step-(\d{8,})")
TEMPORARY = ".step-"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FREE = {
    "run.output",
    "run.steps",
    "run.accumulation",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.log_every",
    "run.preview_every",
    "run.trackers",
    "run.parallel",
    "run.resume",
    "run.threads",
    "run.device",
    "sampling",
    "data.workers",
    "residual_examples",
    "residual_std_examples",
    "preview_prompts",
    "preview_examples",
    "export_dtype",
}
"""Settings that may be others when a run is continued."""


def write_checkpoint(root: Path, step: int, states: dict[str, Any], record: dict[str, Any], keep: int) -> Path:
    """Writes ``root``/step-... with one file per entry of ``states`` (tensors in plain containers) and the record
    (JSON); then the oldest go until ``keep`` are left. One process calls it. ``ValueError`` if it cannot be written."""
    folder = root / f"step-{step:08d}"
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=root))
        temporary.chmod(0o777 & ~_umask())
        files = {}
        for name, state in states.items():
            path = temporary / f"{name}.pt"
            _save(state, path)
            files[path.name] = _fingerprint(path)
            _flush(path)
        record = {"format": FORMAT, "step": step, "files": files, **record}
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        _flush(temporary / RECORD)
        _flush(temporary)
        if folder.exists():
            _remove(folder)
        os.rename(temporary, folder)
        _flush(root)
    except OSError as error:
        if temporary is not None:  # it takes the space that a full disk lacks
            shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}") from error
    for old in checkpoints(root)[:-keep]:
        _remove(old)
    return folder


def checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders in ``root``, by rising step."""
    found = [(int(match[1]), path) for path in _listed(root) if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def remove_leftovers(root: Path) -> None:
    """Removes what killed processes left half written or half removed."""
    for path in _listed(root):
        if path.name.startswith(TEMPORARY):
            shutil.rmtree(path)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint whose files are all there and unchanged, else ``ValueError``.

    A damaged checkpoint is never passed over in silence for an older one: renaming makes sure that no kill can leave
    one, so the disk or a person has changed it.
    """
    advice = f"; to continue from the one before it, remove the folder {folder}"
    try:
        record = json.loads((folder / RECORD).read_text())
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{RECORD} is not of the format {FORMAT!r}")
        for name, expected in record["files"].items():
            if _fingerprint(folder / name) != expected:
                raise ValueError(f"{name} is not the file that was saved")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}{advice}") from error
    return record


def read_state(folder: Path, name: str) -> Any:
    """One of the ``states`` that were written, on the CPU."""
    return torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)


def check_same_run(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """``ValueError`` naming the settings that differ between a checkpoint and a run, those in ``FREE`` apart."""
    old, new = flat(found), flat(json.loads(json.dumps(wanted)))
    changed = sorted(
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in (old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE)
    )
    if changed:
        raise ValueError(
            f"checkpoint {folder} is of a run with other settings: {', '.join(changed)}; choose another run.output, or "
            "set them back"
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, under the names of the module before it was wrapped; all processes must call it, the main
    one gets it."""
    return get_model_state_dict(module, options=WHOLE)


def check_same_tensors(module: nn.Module, state: dict[str, Tensor], name: str, folder: Path) -> None:
    """``ValueError`` naming the tensors of a saved state that do not fit the module."""
    wanted = {key: tuple(value.shape) for key, value in _inner(module).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if different:
        listed = ", ".join(f"{key} {found.get(key)} -> {wanted.get(key)}" for key in different[:5])
        raise ValueError(f"checkpoint {folder} is of another {name}: {len(different)} tensors differ: {listed}")


def load_module_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Takes back :func:`module_state`."""
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimiser by parameter name, empty before its first step."""
    if not optimizer.state:  # torch would take a step to have one
        return {}
    return get_optimizer_state_dict(module, optimizer, options=WHOLE)


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes back :func:`optimizer_state`. It must come before :func:`load_module_state`: torch takes a step of length
    zero to make room for the state."""
    if not state:
        return
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(module, optimizer, state, options=options)
    for key, parameter in _inner(module).named_parameters():
        if key not in state["state"]:  # it had no gradient yet, and its first one shall find no moments
            optimizer.state.pop(parameter, None)


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _save(state: Any, path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch makes of a failed write, whose cause it does not tell
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{str(error).splitlines()[0]} ({free} bytes are free on that disk)") from error


def _fingerprint(path: Path) -> dict[str, int]:
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def _flush(path: Path) -> None:
    """To the disk; of a folder, the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Under another name first: a checkpoint is whole or gone."""
    doomed = folder.with_name(f"{TEMPORARY}removed-{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _listed(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []
