"""Checkpoints: the released DC-AR generator and DC-HT tokenizer, and our own folders.

Our folder holds config.json, tokenizer.safetensors, generator.safetensors, text_encoder.safetensors and, for a T5
vocabulary, text_tokenizer/; a tokenizer alone has a folder of its own kind. Only safetensors and
``torch.load(weights_only=True)`` are ever used.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcar_fast._files import write_all_atomically
from dcar_fast._release import (
    GENERATOR_NAMES,
    TOKENIZER_NAMES,
    infer_generator_config,
    infer_tokenizer_config,
    released_name,
)
from dcar_fast.config import DCARConfig, DCHTConfig, PipelineConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.models.tokenizer import DCHT

FORMAT = "dcar_fast"
TOKENIZER_FORMAT = "dcar_fast.tokenizer"
VERSION = 1
PARTS = ("tokenizer", "generator", "text_encoder")
CONFIGS = ("tokenizer", "generator", "text", "sampling")

State = Mapping[str, Tensor]


def load_official_generator(path_or_state_dict: str | Path | State, config: DCARConfig | None = None) -> DCAR:
    """The released generator (573 tensors at full size) as a float32 DCAR in eval mode, on the CPU.

    Takes ``pytorch_model.bin``, a safetensors file, a folder with either, or a state dict. Without ``config`` it is
    inferred from the shapes; what they cannot tell has the released values (head size 72, 32 head steps, scale 0.107,
    batch multiplier 4). ``ValueError`` lists missing, unexpected and misshapen tensors.
    """
    state, source = _read(path_or_state_dict)
    config = config or infer_generator_config(state)
    return _load_released(DCAR, config, state, GENERATOR_NAMES, source).eval()


def load_official_tokenizer(path_or_state_dict: str | Path | State, config: DCHTConfig | None = None) -> DCHT:
    """The released tokenizer (339 tensors at full size) as a float32 DCHT in eval mode, on the CPU.

    Takes a transformers-style folder (config.json with model_type "dc_ht", safetensors), a file or a state dict;
    otherwise as :func:`load_official_generator`.
    """
    if isinstance(path_or_state_dict, (str, Path)):
        settings = Path(path_or_state_dict) / "config.json"
        model_type = read_json(settings).get("model_type", "dc_ht") if settings.is_file() else "dc_ht"
        if model_type != "dc_ht":
            raise ValueError(f"{settings}: model_type is {model_type!r}, a DC-HT tokenizer has 'dc_ht'")
    state, source = _read(path_or_state_dict)
    config = config or infer_tokenizer_config(state)
    return _load_released(DCHT, config, state, TOKENIZER_NAMES, source).eval()


def _load_released(kind, config, state: State, table, source: str) -> Any:
    """A model of class ``kind`` from released names; it and the messages follow ``table``."""
    with torch.device("meta"):
        model = kind(config)
    released = {name: released_name(name, table) for name in model.state_dict()}
    ours = {theirs: name for name, theirs in released.items()}
    # a name outside the table keeps its own, marked so that it cannot pass for one of ours
    renamed = {ours.get(name, f"{name} "): tensor for name, tensor in state.items()}
    if renamed.get("position") is not None and renamed["position"].dim() == 3:
        renamed["position"] = renamed["position"].squeeze(0)  # stored as (1, N, D)
    load_state(model, renamed, source, lambda name: released.get(name, name.rstrip()))
    return model


def load_state(model: nn.Module, state: State, source: str, label=lambda name: name) -> None:
    """Loads ``state`` completely or raises ``ValueError`` with the lists of what does not fit.

    Floating dtypes become the model's; a tensor that has the right one is taken over, not copied. ``label(name)`` is
    how a name is printed.
    """
    expected = model.state_dict()
    missing = sorted(label(name) for name in expected.keys() - state.keys())
    unexpected = sorted(label(name) for name in state.keys() - expected.keys())
    misshapen = [
        f"{label(name)}: {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    mistyped = [
        f"{label(name)}: {state[name].dtype} instead of {tensor.dtype}"
        for name, tensor in expected.items()
        if name in state and state[name].is_floating_point() != tensor.is_floating_point()
    ]
    if missing or unexpected or misshapen or mistyped:
        lists = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen), ("mistyped", mistyped))
        found = "; ".join(f"{len(names)} {kind}: {_shorten(names)}" for kind, names in lists if names)
        raise ValueError(f"{source} does not fit {type(model).__name__}: {found}")
    converted = {name: state[name].to(tensor.dtype) for name, tensor in expected.items()}
    model.load_state_dict(converted, assign=True)


def save_folder(folder: str | Path, parts: dict[str, nn.Module], config: PipelineConfig, trained: bool) -> None:
    """Writes our folder; every file goes to a temporary name first and all are renamed together, config.json last.

    ``save_id`` in config.json and in each file's metadata lets the loader refuse a folder with parts of two saves.
    """
    folder = Path(folder)
    save_id = uuid.uuid4().hex
    settings = {"format": FORMAT, "version": VERSION, "save_id": save_id, "trained": trained, **config.to_dict()}
    files = {}
    for name in PARTS:
        state = {k: v.detach().contiguous() for k, v in untied_state(parts[name]).items()}
        files[folder / f"{name}.safetensors"] = partial(save_file, state, metadata={"save_id": save_id, "format": "pt"})
    if config.text.tokenizer == "t5":
        _stage_text_tokenizer(parts["text_encoder"].tokenizer, folder, files)
    text = json.dumps(settings, indent=2) + "\n"
    files[folder / "config.json"] = lambda path: path.write_text(text, encoding="utf-8")
    write_all_atomically(files)


def load_folder(folder: str | Path) -> tuple[dict[str, nn.Module], PipelineConfig, bool]:
    """The parts (float32 unless saved otherwise, eval mode, CPU), the config and whether they were trained."""
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    if settings.get("format") != FORMAT:
        raise ValueError(f"{folder / 'config.json'} does not describe a {FORMAT} folder (no format: {FORMAT!r})")
    _check_version(settings, folder)
    config = PipelineConfig.from_dict({k: settings[k] for k in CONFIGS if k in settings})
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"tokenizer": DCHT(config.tokenizer), "generator": DCAR(config.generator)}
    with torch.random.fork_rng(devices=[]):  # its random weights are replaced
        parts["text_encoder"] = TextEncoder(config.text, _load_text_tokenizer(folder, config))
    for name, model in parts.items():
        path = folder / f"{name}.safetensors"
        state = _read_part(path, settings)
        for alias, original in tied_names(model).items():
            if original in state:
                state[alias] = state[original]
        model.to(_main_dtype(state))
        load_state(model.eval(), state, str(path))
        if isinstance(model, TextEncoder):
            model.t5.tie_weights()
    return parts, config, bool(settings.get("trained", True))


def save_tokenizer(folder: str | Path, tokenizer: DCHT, details: Mapping[str, Any] | None = None) -> None:
    """Writes a tokenizer alone: tokenizer.safetensors and config.json, renamed together, config.json last.

    ``details``: further JSON values for config.json, such as the residuals' standard deviation under "residual_std".
    """
    folder = Path(folder)
    save_id = uuid.uuid4().hex
    settings = {"format": TOKENIZER_FORMAT, "version": VERSION, "save_id": save_id}
    settings |= {"tokenizer": tokenizer.config.to_dict(), "details": dict(details or {})}
    text = json.dumps(settings, indent=2) + "\n"
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
    write_all_atomically(
        {
            folder / "tokenizer.safetensors": partial(save_file, state, metadata={"save_id": save_id, "format": "pt"}),
            folder / "config.json": lambda path: path.write_text(text, encoding="utf-8"),
        }
    )


def load_tokenizer(folder: str | Path) -> DCHT:
    """The tokenizer of a folder, in eval mode on the CPU, float32 unless saved otherwise.

    The folder is one that :func:`save_tokenizer` wrote, one of a whole pipeline, or a released DC-HT. ``ValueError``
    for what is none of them.
    """
    return read_tokenizer(folder)[0]


def read_tokenizer(folder: str | Path) -> tuple[DCHT, dict[str, Any]]:
    """:func:`load_tokenizer` with the ``details`` that were saved, {} for folders of the other kinds."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"tokenizer: {folder} is not a folder")
    settings = read_json(folder / "config.json")
    if settings.get("format") not in (FORMAT, TOKENIZER_FORMAT):
        if settings.get("model_type") != "dc_ht":
            raise ValueError(f"{folder / 'config.json'} describes no tokenizer: neither of {FORMAT} nor a dc_ht")
        return load_official_tokenizer(folder), {}
    _check_version(settings, folder)
    with torch.device("meta"):
        tokenizer = DCHT(DCHTConfig.from_dict(settings.get("tokenizer")))
    path = folder / "tokenizer.safetensors"
    state = _read_part(path, settings)
    tokenizer.to(_main_dtype(state))
    load_state(tokenizer.eval(), state, str(path))
    return tokenizer, dict(settings.get("details", {}))


def shipped_folder(preset_name: str) -> Path | None:
    """The folder of the trained weights that come with the package, or None for a preset without."""
    folder = Path(__file__).parent / "weights" / preset_name
    return folder if folder.is_dir() else None


def find_folder(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the snapshot of the hub repository of that name; ``ValueError`` if there is neither."""
    if not isinstance(folder_or_hub_id, (str, Path)) or not str(folder_or_hub_id):
        raise ValueError(f"folder_or_hub_id must be a path or a name, got {folder_or_hub_id!r}")
    if os.path.isdir(folder_or_hub_id):
        return Path(folder_or_hub_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", "*.safetensors", "text_tokenizer/*"]
    try:
        return Path(snapshot_download(str(folder_or_hub_id), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        name, reason = str(folder_or_hub_id), str(error).strip().splitlines()[0]
        raise ValueError(f"{name!r} is neither a folder nor a reachable hub repository: {reason}") from error


def _check_version(settings: Mapping[str, Any], folder: Path) -> None:
    if settings.get("version") != VERSION:
        raise ValueError(f"{folder}: format version {settings.get('version')!r} is not supported, only {VERSION}")


def _read_part(path: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one of our files, which must come from the save that wrote config.json's ``settings``."""
    state = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        save_id = (file.metadata() or {}).get("save_id", settings.get("save_id"))
    if save_id != settings.get("save_id"):
        raise ValueError(f"{path} comes from another save than config.json: the folder holds parts of two saves")
    return state


def _main_dtype(state: State) -> torch.dtype:
    """The floating dtype of most elements: a part in bfloat16 keeps its codebook in float32."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names in the state dict that share their tensor with an earlier name -> that earlier name."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        first.setdefault(id(tensor), name)
    return tied


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names of shared tensors, which safetensors refuses."""
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file; ``ValueError`` if it is missing, truncated or no safetensors."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error


def _read(source: str | Path | State) -> tuple[dict[str, Tensor], str]:
    if isinstance(source, Mapping):
        state = _check_state(source, "state dict")
        return {name: tensor.detach().clone() for name, tensor in state.items()}, "state dict"
    if not isinstance(source, (str, Path)):
        raise ValueError(f"a checkpoint is a path or a state dict, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()] or sorted(path.glob("[!.]*.safetensors"))
        if not found:
            raise ValueError(f"{path} holds no checkpoint (looked for {', '.join(names)} and *.safetensors)")
        if found[0].name not in names and len(found) > 1:
            raise ValueError(
                f"{path} is not a released checkpoint alone, name a file: {_shorten([p.name for p in found])}"
            )
        path = found[0]
    if path.suffix == ".safetensors":
        return read_safetensors(path), str(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        raise ValueError(f"{path} is no readable PyTorch checkpoint: {error}") from error
    return dict(_check_state(state, str(path))), str(path)


def _check_state(state: Any, source: str) -> State:
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} holds {type(state).__name__}, not a dict of tensors")
    wrong = [repr(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if wrong:
        raise ValueError(f"{source} is not a dict of tensors by name: look at {_shorten(wrong)}")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ``ValueError`` if it is missing, unreadable or holds something else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def _stage_text_tokenizer(tokenizer, folder: Path, files: dict) -> None:
    """Adds the tokenizer's own files, read back from a temporary folder, to what is written."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            files[folder / "text_tokenizer" / path.name] = partial(_write_bytes, path.read_bytes())


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _load_text_tokenizer(folder: Path, config: PipelineConfig):
    if config.text.tokenizer == "bytes":
        return None
    from transformers import AutoTokenizer

    path = folder / "text_tokenizer"
    if not path.is_dir():
        raise ValueError(f"{path} does not exist")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever damaged files make transformers raise
        raise ValueError(f"{path} holds no readable tokenizer: {error}") from error


def _shorten(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... and {len(names) - limit} more"
