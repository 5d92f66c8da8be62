"""The gate before any timing: every row is held against eager float32."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from _arguments import Settings
from _report import Failure, note
from _rows import OwnProcess, Row, RowFailed, Rows
from _work import RowSpec

# Parity. float32: relative to the largest reference value; TF32 convolutions, torch's default on GPUs, round to 2^-11.
TOLERANCE = 1e-4
TF32_TOLERANCE = 1e-2
# Root mean square. At t = 999 the schedule multiplies rounding errors by 2e4: with random weights the float32 reference
# itself has single values that are further than this from float64.
RESIDUAL_TOLERANCE = 1e-3
FREE_AGREEMENT = 0.99  # of ids in a free run: one near tie that falls the other way moves its neighbours
# Of ids in a whole run. float32: a near tie is rare, but what follows it in its image may differ; a GPU's larger models
# have more of them. A wrong temperature in the later steps left 0.60, half the guidance there 0.95.
WHOLE_AGREEMENT, WHOLE_AGREEMENT_GPU = 0.97, 0.9
# Lower precision, as a share of what plain PyTorch of that precision reaches: differences grow from step to step, so
# this only finds what went wrong altogether, such as a graph that reads old inputs.
LOW_PRECISION_AGREEMENT = 0.5
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
# There is no plain float8 to compare with. Emulated with random weights of the small preset, logits are off by 0.07 of
# the largest, and 0.92 times as many ids of a whole run agree as in plain bfloat16.
FLOAT8_LIMIT, FLOAT8_AGREEMENT = 0.5, 0.25
PLAIN_LIMIT = 32  # roundings that plain low precision may be off by, of the largest reference value


def check_parity(rows: Rows, settings: Settings, weights: str) -> None:
    """Holds every row against eager float32 before anything is timed. ``Failure`` if one is off.

    float32: every stage within a tolerance, ids equal but for near ties. Low precision: every stage's error at most
    twice that of plain low-precision PyTorch plus a rounding of the reference; plain low precision itself, at most
    ``PLAIN_LIMIT`` roundings. Residuals of low precision count by their root mean square, those of plain low precision
    are only reported: the schedule's first steps blow roundings up. weights: the folder that all rows load.
    """
    reference_spec = RowSpec("eager", "float32")
    extra: list[Row] = []

    def helper(spec: RowSpec) -> Row:
        """The row itself if it is timed anyway, else one for the check alone."""
        for row in rows.all:
            if row.spec == spec:
                return row
        note(f"starting {spec.name} for the parity check alone")
        row = OwnProcess(spec, settings.work, weights)
        extra.append(row)
        row.call("build")
        return row

    try:
        with tempfile.TemporaryDirectory(prefix="dcar-parity-") as folder:
            reference = helper(reference_spec)
            reference.call("record_reference", folder)
            reports = rows.call("parity", folder, among=[row for row in rows.all if row.spec != reference_spec])
            plain = {row.spec.dtype: report for row, report in reports.items() if row.spec.kind == "eager"}
            for dtype in sorted(
                {row.spec.base_dtype for row in rows.able if row.spec.kind != "eager"} - {"float32", *plain}
            ):
                plain[dtype] = helper(RowSpec("eager", dtype)).call("parity", folder)
    except RowFailed as reason:
        raise Failure(f"parity check: what the rows are held against cannot run here: {reason}") from None
    finally:
        for row in extra:
            row.close()
    red = []
    print("parity with eager-float32 (largest error, of residuals the rms error, relative to the same of the values):")
    for row in rows.able:
        if row.spec == reference_spec:
            print(f"  {row.name:<28} the reference")
            continue
        problems = judge(row.spec, reports[row], plain.get(row.spec.base_dtype), settings.work.device)
        red += [f"{row.name}: {problem}" for problem in problems]
        print(f"  {row.name:<28} {describe(reports[row])}: {'RED' if problems else 'ok'}")
    if red:
        raise Failure("parity check failed, nothing was timed: " + "; ".join(red))


def describe(report: dict[str, Any]) -> str:
    """A row's parity report in one line."""
    scales = report["scales"]
    text = ", ".join(f"{s} {e / scales[s] if scales[s] else e:.1e}" for s, e in report["errors"].items())
    text += f"; ids {report['step_agreement']:.2%} step by step, {report['agreement']:.2%} in a free run"
    if report["whole_agreement"] is not None:
        text += f", {report['whole_agreement']:.2%} in a whole one, its pixels {report['psnr']:.1f} dB"
    return text


def judge(spec: RowSpec, report: dict[str, Any], plain: dict[str, Any] | None, device: str) -> list[str]:
    """What is wrong with a row's parity report; empty if nothing is. NaN is always wrong. plain: the report of plain
    PyTorch in the row's precision, where that is not float32 and not the row itself."""
    problems = []
    is_plain = spec.kind == "eager" or plain is None
    for stage, error in report["errors"].items():
        allowed, rule = allowance(spec, stage, report["scales"][stage], None if is_plain else plain, device)
        if not error <= allowed:
            problems.append(f"{stage} is off by {error:.3g}, allowed {allowed:.3g} ({rule})")
    least = WHOLE_AGREEMENT if device == "cpu" else WHOLE_AGREEMENT_GPU
    if spec.dtype == "float32":
        if report["unexplained_ids"]:
            problems.append(f"{report['unexplained_ids']} ids differ by more than a near tie")
        if not report["agreement"] >= FREE_AGREEMENT:
            problems.append(f"only {report['agreement']:.2%} of the ids of a free run agree")
        if report["residual"] is not None and not report["residual"] <= RESIDUAL_TOLERANCE:
            problems.append(f"residuals are off by {report['residual']:.3g}, allowed {RESIDUAL_TOLERANCE:g}")
    else:
        least = FLOAT8_AGREEMENT if spec.dtype == "fp8" else LOW_PRECISION_AGREEMENT
        least *= 0.0 if is_plain else plain["whole_agreement"] or 0.0
    if report["whole_agreement"] is not None and not report["whole_agreement"] >= least:
        problems.append(f"only {report['whole_agreement']:.2%} of the ids of a whole run agree, {least:.2%} must")
    return problems


def allowance(spec: RowSpec, stage: str, scale: float, plain: dict[str, Any] | None, device: str) -> tuple[float, str]:
    """How far a stage may be off whose values are as large as ``scale``, and the rule in words."""
    if spec.dtype == "float32" and stage == "residual":
        return RESIDUAL_TOLERANCE, f"{RESIDUAL_TOLERANCE:g}"
    if spec.dtype == "float32":
        relative = TF32_TOLERANCE if stage == "image" and device != "cpu" else TOLERANCE
        return relative * scale, f"{relative:g} of {scale:.3g}"
    if spec.dtype == "fp8" and stage in ("logits", "residual"):
        return (sys.float_info.max, "finite") if stage == "residual" else (FLOAT8_LIMIT * scale, f"half of {scale:.3g}")
    if plain is not None:
        error, rounding = plain["errors"][stage], EPSILON[spec.base_dtype] * scale
        return 2 * error + rounding, f"2 x plain {spec.base_dtype}'s {error:.3g} + a rounding of {scale:.3g}"
    if stage == "residual":
        return sys.float_info.max, "finite"
    return PLAIN_LIMIT * EPSILON[spec.dtype] * scale, f"{PLAIN_LIMIT} roundings of {scale:.3g}"
