"""The command line ``dcar-fast``: one dataclass per command, flags made from its fields by tyro."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Union

import tyro
from tyro.conf import subcommand

from dcar_fast.cli.draw import Generate, Inpaint, Reconstruct, Sample, Variation
from dcar_fast.cli.evaluate import Evaluate
from dcar_fast.cli.tools import Bench, Convert, Doctor
from dcar_fast.cli.train import Cache, training_commands

DESCRIPTION = "DC-AR text-to-image: draw, reconstruct, inpaint; train and evaluate; convert checkpoints; tune kernels."

COMMANDS = [
    Annotated[Sample, subcommand("sample")],
    Annotated[Generate, subcommand("generate")],
    Annotated[Reconstruct, subcommand("reconstruct")],
    Annotated[Inpaint, subcommand("inpaint")],
    Annotated[Variation, subcommand("variation")],
    Annotated[Convert, subcommand("convert")],
    Annotated[Doctor, subcommand("doctor")],
    Annotated[Bench, subcommand("bench")],
    Annotated[Evaluate, subcommand("evaluate")],
    Annotated[Cache, subcommand("cache")],
]


TRAIN_PACKAGES = {"accelerate", "tensorboard", "torchmetrics", "webdataset", "yaml"}
"""What the extra "train" brings."""
FAILURES = ("OutOfMemoryError", "NonFiniteLoss", "SafetensorError")
"""Names of the errors whose message says it all; their modules may not be loaded."""


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of ``dcar-fast``; returns the exit status: 0, 2 for bad input, 130 when interrupted, else 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = sys.argv[1:] if args is None else args
    try:
        command = Union[(*COMMANDS, *training_commands(args))]  # noqa: UP007 - tyro takes the alternatives from it
        tyro.cli(command, prog="dcar-fast", description=DESCRIPTION, args=args).run()
    except ValueError as error:
        return _failed(error, 2)
    except ImportError as error:
        return _failed(_missing(error), 2)
    except MemoryError as error:
        return _failed(f"out of memory: {error}", 1)
    except OSError as error:  # a full disk, a file that went away
        return _failed(error, 1)
    except Exception as error:
        if type(error).__name__ not in FAILURES:
            raise
        return _failed(str(error).splitlines()[0], 1)
    except KeyboardInterrupt as error:
        print(f"dcar-fast: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _failed(message: object, status: int) -> int:
    print(f"dcar-fast: error: {message}", file=sys.stderr)
    return status


def _missing(error: ImportError) -> str:
    """What to install; raises the error again if no extra brings it."""
    if "[train]" in str(error):
        return str(error)
    if (error.name or "").partition(".")[0] in TRAIN_PACKAGES:
        return f"{error}; install the extra: pip install -e '.[train]'"
    raise error
