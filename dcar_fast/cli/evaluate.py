"""``dcar-fast evaluate``: one command for each evaluation of :mod:`dcar_fast.evaluation.settings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Union

from tyro.conf import OmitArgPrefixes, arg, subcommand

from dcar_fast.cli.common import interrupted_by_sigterm
from dcar_fast.cli.flags import checked, unchecked
from dcar_fast.evaluation.settings import (
    FidEvaluation,
    GenevalImages,
    MjhqImages,
    ReconstructionEvaluation,
    ShapesEvaluation,
)


@dataclass(kw_only=True)
class Evaluate:
    """Measure a tokenizer or a generator, or draw the pictures that a benchmark reads."""

    command: Annotated[
        Union[  # noqa: UP007 - tyro takes the annotated alternatives from it
            Annotated[unchecked(ReconstructionEvaluation, None), subcommand("reconstruction")],
            Annotated[OmitArgPrefixes[unchecked(ShapesEvaluation, None)], subcommand("shapes")],
            Annotated[unchecked(FidEvaluation, None), subcommand("fid")],
            Annotated[OmitArgPrefixes[unchecked(MjhqImages, None)], subcommand("mjhq")],
            Annotated[OmitArgPrefixes[unchecked(GenevalImages, None)], subcommand("geneval")],
        ],
        arg(name=""),
    ]

    def run(self) -> None:
        with interrupted_by_sigterm():
            checked(self.command).run()
