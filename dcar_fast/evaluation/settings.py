"""The evaluations as settings with a ``run()``: what ``dcar-fast evaluate`` makes its flags of.

Bad settings raise ``ValueError`` naming the field on construction; what does not fit the model or the files does at the
start of ``run()``, before any work.
"""

from dcar_fast.evaluation.generation import GenevalImages, MjhqImages, ShapesEvaluation
from dcar_fast.evaluation.quality import FidEvaluation, ReconstructionEvaluation

__all__ = ["FidEvaluation", "GenevalImages", "MjhqImages", "ReconstructionEvaluation", "ShapesEvaluation"]
