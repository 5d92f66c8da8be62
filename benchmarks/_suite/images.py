"""The parts that make images: latency, throughput, the baselines that compile, and precision."""

from __future__ import annotations

from _suite import judge
from _suite.steps import PYTHON, Plan, Step

ROWS = ("eager-float32", "eager-bfloat16", "fast-float32", "fast-bfloat16")
LARGE_ROWS = ("eager-float32", "eager-bfloat16", "fast-float32", "fast-fp8", "fast-bfloat16")
COMPILED = ("fast-bfloat16", "compile-bfloat16:max-autotune")  # ours again: ratios come from one run
LARGE = 16  # images of throughput.py
SMALL_LARGE = 4
# Four processes load, compile and are compared before the first of them is timed, and a run that is cut off leaves no
# number at all.
LIMIT = 240


def latency(plan: Plan) -> list[Step]:
    return [generation(plan, "latency", 1, ROWS, repeats=10, limit=LIMIT)]


def throughput(plan: Plan) -> list[Step]:
    rows = ROWS if plan.device == "cpu" else LARGE_ROWS  # which has no float8
    return [generation(plan, "throughput", SMALL_LARGE if plan.small else LARGE, rows, repeats=4, limit=LIMIT)]


def baselines(plan: Plan) -> list[Step]:
    """The reference through torch.compile, which compiles for minutes, beside the fast row; late, so that everything
    else is there if it takes too long."""
    large = SMALL_LARGE if plan.small else LARGE
    made = [("latency", 1, 10), ("throughput", large, 4)]
    return [
        generation(plan, name, batch, COMPILED, repeats, limit=240, part="baselines") for name, batch, repeats in made
    ]


def generation(
    plan: Plan, name: str, batch: int, rows: tuple[str, ...], repeats: int, limit: float, part: str | None = None
) -> Step:
    """latency.py or throughput.py, with as few runs as give a median."""
    if plan.small:
        work = ["--preset", "shapes", "--steps", "2", "--warmup", "0", "--repeats", "2"]
        if part == "baselines":
            rows = tuple(row.replace(":max-autotune", ":default") for row in rows)  # minutes without any use
    else:
        work = ["--preset", "dc-ar-512", "--warmup", "2", "--repeats", str(repeats)]
    command = (
        PYTHON,
        f"benchmarks/{name}.py",
        "--device",
        plan.device,
        *plan.weights,
        *work,
        "--bs",
        str(batch),
        "--rows",
        *rows,
    )
    label = name if part is None else f"{part} {name}"
    return Step(label, part or name, command, judge.last_json, limit=limit, least=40)


def precision(plan: Plan) -> list[Step]:
    """The agreement of every precision with float32."""
    work = ["--preset", "shapes", "--steps", "2", "--bs", "1"] if plan.small else ["--preset", "dc-ar-512", "--bs", "2"]
    command = (PYTHON, "benchmarks/precision.py", "--device", plan.device, *plan.weights, *work)
    return [Step("precision", "precision", command, judge.last_json, limit=120, least=40)]
