"""The gate before any timing: every row is held against eager float32."""

from __future__ import annotations

import tempfile
from typing import Any

from _arguments import Settings
from _report import Failure, note
from _rows import Row, RowFailed, Rows

# Parity. float32: relative to the largest reference value; TF32 convolutions, torch's default on GPUs, round to 2^-11.
TOLERANCE = 1e-4
TF32_TOLERANCE = 1e-2
RESIDUAL_TOLERANCE = 1e-3  # at t = 999 the schedule multiplies rounding errors by 2e4
FREE_AGREEMENT = 0.99  # of ids in a free run: one near tie that falls the other way moves its neighbours
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
PLAIN_LIMIT = 32  # roundings that plain low precision may be off by, of the largest reference value


def check_parity(rows: Rows, settings: Settings) -> None:
    """Holds every row against eager float32 before anything is timed. ``Failure`` if one is off.

    float32: every stage within a tolerance, ids equal but for near ties. Low precision: every stage's error at most
    twice that of plain low-precision PyTorch plus a rounding of the reference; plain low precision itself, at most
    ``PLAIN_LIMIT`` roundings.
    """
    from _session import RowSpec

    reference_spec = RowSpec("eager", "float32")
    extra: list[Row] = []

    def helper(spec: Any) -> Row:
        """The row itself if it is timed anyway, else one for the check alone."""
        for row in rows.all:
            if row.spec == spec:
                return row
        note(f"starting {spec.name} for the parity check alone")
        row = Row(spec, settings.work)
        extra.append(row)
        row.call("build")
        return row

    try:
        with tempfile.TemporaryDirectory(prefix="dcar-parity-") as folder:
            reference = helper(reference_spec)
            reference.call("record_reference", folder)
            reports = rows.call("parity", folder, skip=reference_spec)
            plain = {row.spec.dtype: r["errors"] for row, r in reports.items() if row.spec.kind == "eager"}
            for dtype in {row.spec.dtype for row in rows.able if row.spec.kind != "eager"} - {"float32", *plain}:
                plain[dtype] = helper(RowSpec("eager", dtype)).call("parity", folder)["errors"]
    except RowFailed as reason:
        raise Failure(f"parity check: what the rows are held against cannot run here: {reason}") from None
    finally:
        for row in extra:
            row.close()
    red = []
    print("parity with eager-float32 (largest error, relative to the largest value):")
    for row in rows.able:
        if row.spec == reference_spec:
            print(f"  {row.name:<28} the reference")
            continue
        report = reports[row]
        stages = ", ".join(f"{s} {e / report['scales'][s]:.1e}" for s, e in report["errors"].items())
        ids = f"ids {report['step_agreement']:.2%} step by step, {report['agreement']:.2%} in a free run"
        problems = judge(row.spec, report, plain.get(row.spec.dtype), settings.work.device)
        red += [f"{row.name}: {problem}" for problem in problems]
        print(f"  {row.name:<28} {stages}; {ids}: {'RED' if problems else 'ok'}")
    if red:
        raise Failure("parity check failed, nothing was timed: " + "; ".join(red))


def judge(spec: Any, report: dict[str, Any], plain: dict[str, float] | None, device: str) -> list[str]:
    """What is wrong with a row's parity report; empty if nothing is. NaN is always wrong."""
    problems = []
    for stage, error in report["errors"].items():
        scale = report["scales"][stage]
        if spec.dtype == "float32":
            relative = TF32_TOLERANCE if stage == "image" and device != "cpu" else TOLERANCE
            allowed, rule = relative * scale, f"{relative:g} of {scale:.3g}"
        elif spec.kind == "eager" or plain is None:
            allowed = PLAIN_LIMIT * EPSILON[spec.dtype] * scale
            rule = f"{PLAIN_LIMIT} roundings of {scale:.3g}"
        else:
            allowed = 2 * plain[stage] + EPSILON[spec.dtype] * scale
            rule = f"2 x plain {spec.dtype}'s {plain[stage]:.3g} + a rounding of {scale:.3g}"
        if not error <= allowed:
            problems.append(f"{stage} is off by {error:.3g}, allowed {allowed:.3g} ({rule})")
    if spec.dtype == "float32":
        if report["unexplained_ids"]:
            problems.append(f"{report['unexplained_ids']} ids differ by more than a near tie")
        if not report["agreement"] >= FREE_AGREEMENT:
            problems.append(f"only {report['agreement']:.2%} of the ids of a free run agree")
        if report["residual"] is not None and not report["residual"] <= RESIDUAL_TOLERANCE:
            problems.append(f"residuals are off by {report['residual']:.3g}, allowed {RESIDUAL_TOLERANCE:g}")
    return problems
