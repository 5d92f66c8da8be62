"""DC-AR text-to-image: the complete model, and the fast way to run it.

Every public name below is imported when it is first used, so ``import dcar_fast`` itself loads neither torch nor
triton nor transformers, and never touches a GPU.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> module that defines it; "ops" and "integrations" are the modules themselves
_PUBLIC = {
    "DCHTConfig": "dcar_fast.config",
    "DCARConfig": "dcar_fast.config",
    "TextEncoderConfig": "dcar_fast.config",
    "PipelineConfig": "dcar_fast.config",
    "SamplingConfig": "dcar_fast.config",
    "CounterNoise": "dcar_fast.noise",
    "RecordedNoise": "dcar_fast.noise",
    "TorchNoise": "dcar_fast.noise",
    "DCHT": "dcar_fast.models.tokenizer",
    "Tokens": "dcar_fast.models.tokenizer",
    "DCAR": "dcar_fast.models.dcar",
    "Output": "dcar_fast.models.dcar",
    "TextEncoder": "dcar_fast.models.text_encoder",
    "ReferenceSampler": "dcar_fast.sampling",
    "FastSampler": "dcar_fast.sampling",
    "Sample": "dcar_fast.sampling",
    "Known": "dcar_fast.sampling",
    "load_official_generator": "dcar_fast.checkpoints",
    "load_official_tokenizer": "dcar_fast.checkpoints",
    "DCARPipeline": "dcar_fast.pipeline",
    "ops": "dcar_fast.ops",
    "integrations": "dcar_fast.integrations",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from dcar_fast import integrations, ops
    from dcar_fast.checkpoints import load_official_generator, load_official_tokenizer
    from dcar_fast.config import DCARConfig, DCHTConfig, PipelineConfig, SamplingConfig, TextEncoderConfig
    from dcar_fast.models.dcar import DCAR, Output
    from dcar_fast.models.text_encoder import TextEncoder
    from dcar_fast.models.tokenizer import DCHT, Tokens
    from dcar_fast.noise import CounterNoise, RecordedNoise, TorchNoise
    from dcar_fast.pipeline import DCARPipeline
    from dcar_fast.sampling import FastSampler, Known, ReferenceSampler, Sample


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_kernels() -> None:
    """Makes kernels/ at the top of a checkout importable as ``dcar_fast.kernels``; a wheel holds it inside the package.

    The folder has no ``__init__.py``, because as a regular top-level package it would shadow others of that name; and
    an editable install cannot map a namespace package, hence this registration.
    """
    package = Path(__file__).resolve().parent
    folder = package.parent / "kernels"
    if (package / "kernels").is_dir() or not folder.is_dir():
        return
    spec = ModuleSpec(f"{__name__}.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[spec.name] = globals()["kernels"] = module_from_spec(spec)


_register_kernels()
