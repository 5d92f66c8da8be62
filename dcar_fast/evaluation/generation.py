"""Evaluations that draw pictures for prompts: ShapesEval, and the folders that MJHQ-30K's and GenEval's tools read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_fast._model_choice import ModelChoice
from dcar_fast._sampling_options import SamplingOptions, given
from dcar_fast.evaluation._base import Evaluation, write_json

if TYPE_CHECKING:
    from dcar_fast.bulk.ranks import Rank
    from dcar_fast.evaluation.shapes_eval import ShapesReport
    from dcar_fast.evaluation.shapes_validation import Validation

MOST_FAILURES = 60  # on the contact sheet


@dataclass(frozen=True, kw_only=True)
class ShapesEvaluation(ModelChoice, Evaluation):
    """ShapesEval: how often pictures show what held-out prompts say, by GenEval's six categories.

    Draws the pictures into OUTPUT/images (run again, it draws what is missing), and writes OUTPUT/report.json,
    OUTPUT/prompts.jsonl and OUTPUT/failures.png.
    """

    output: Path = Path("shapes-eval")
    """Folder to write."""
    count: int = 600
    """Held-out prompts, in turn from the six categories."""
    seed: int = 0
    """Of the prompts; picture i is drawn with seed + i."""
    images: str = ""
    """Folder with 00000.png, ... of the same prompts, drawn by anything; nothing is drawn then."""
    validate: bool = False
    """Judge the checker instead of a model: true renders, shuffled prompts, spoilt pictures."""
    size: int = 64
    """Side in pixels of the renders that validate judges."""
    batch_size: int = 8
    """Prompts sampled together."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        self._check_model()
        self._check_paths("output")
        self._check_paths("images", needed=False)
        self._check_numbers("count", "batch_size", "size")
        self._require("validate", isinstance(self.validate, bool), "True or False")
        self._require("images", not (self.validate and self.images), "empty where validate is asked for")

    def run(self) -> ShapesReport | Validation | None:
        """Prints the table and returns the report; None where other processes have not drawn all of theirs yet."""
        from dcar_fast._files import check_writable

        folder = Path(self.output)
        check_writable(folder / "report.json")
        return self._validate(folder) if self.validate else self._evaluate(folder)

    def _evaluate(self, folder: Path) -> ShapesReport | None:
        from dcar_fast._files import write_atomically
        from dcar_fast.bulk.ranks import Rank
        from dcar_fast.evaluation.contact_sheet import contact_sheet
        from dcar_fast.evaluation.shapes_eval import judge_pictures, picture_files, read_picture
        from dcar_fast.images import save_png
        from dcar_fast.training.shapes import held_out_prompts

        prompts = held_out_prompts(self.count, self.seed)
        images = Path(self.images) if self.images else folder / "images"
        if not self.images:
            rank = Rank.from_environment()
            drawn = self.pipeline(rank).generate_to(
                images,
                [prompt.text for prompt in prompts],
                seed=self.seed,
                batch_size=self.batch_size,
                rank=rank,
                **given(self.sampling),
            )
            print(drawn)
            if not drawn.complete:
                return None
        files = picture_files(images, prompts)
        report = judge_pictures(prompts, (read_picture(file) for file in files))
        lines = [json.dumps({"prompt": p.text, "category": p.ask.category}, ensure_ascii=False) for p in prompts]
        text = "\n".join(lines) + "\n"
        write_atomically(folder / "prompts.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
        report.write(folder / "report.json")
        failures = report.failures[:MOST_FAILURES]
        (folder / "failures.png").unlink(missing_ok=True)  # that of an earlier run would not fit the report
        if failures:
            sheet = contact_sheet([(read_picture(files[j.index]), j.prompt, j.reason) for j in failures])
            save_png(sheet, folder / "failures.png")
        print(report.table())
        return report

    def _validate(self, folder: Path) -> Validation:
        from dcar_fast.evaluation.shapes_validation import validate

        validation = validate(self.count, self.seed, self.size)
        print(validation.table())
        write_json(folder / "validation.json", validation.to_dict())
        return validation


@dataclass(frozen=True, kw_only=True)
class _PromptFileEvaluation(ModelChoice, Evaluation):
    prompts: Path
    """The benchmark's own file of prompts."""
    output: Path
    """Folder to write; run again, it draws what is missing."""
    seed: int = 0
    """Of the first image; every further one has the next."""
    limit: int | None = None
    """Only the first so many prompts, to try it out."""
    batch_size: int = 8
    """Prompts sampled together."""
    height: int | None = None
    """Pixels, a multiple of the compression; by default the model's own size."""
    width: int | None = None
    """The same for the width."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        self._check_model()
        self._check_paths("prompts", "output")
        self._check_numbers("batch_size", *(["limit"] if self.limit is not None else []))

    def _options(self, rank: Rank) -> dict[str, Any]:
        names = ("seed", "batch_size", "height", "width")
        return {**{name: getattr(self, name) for name in names}, "rank": rank, **given(self.sampling)}


@dataclass(frozen=True, kw_only=True)
class MjhqImages(_PromptFileEvaluation):
    """Draw an image for every prompt of MJHQ-30K's meta_data.json: OUTPUT/<category>/<id>.png, for clean-fid."""

    def run(self) -> None:
        from dcar_fast.bulk.folder import check_folder
        from dcar_fast.bulk.ranks import Rank
        from dcar_fast.evaluation.prompt_files import draw_mjhq, read_mjhq

        prompts, rank = read_mjhq(self.prompts)[: self.limit], Rank.from_environment()
        check_folder(self.output)
        for report in draw_mjhq(self.pipeline(rank), prompts, self.output, **self._options(rank)):
            print(report)


@dataclass(frozen=True, kw_only=True)
class GenevalImages(_PromptFileEvaluation):
    """Draw images for GenEval's evaluation_metadata.jsonl in the layout that its evaluate_images.py reads."""

    samples: int = 4
    """Images for each prompt; GenEval's figures are for 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("samples")

    def run(self) -> None:
        from dcar_fast.bulk.folder import check_folder
        from dcar_fast.bulk.ranks import Rank
        from dcar_fast.evaluation.prompt_files import draw_geneval, read_geneval

        rows, rank = read_geneval(self.prompts)[: self.limit], Rank.from_environment()
        check_folder(self.output)
        print(draw_geneval(self.pipeline(rank), rows, self.output, self.samples, **self._options(rank)))
