"""The part that looks inside: a trace of a run, Nsight Systems over the timed runs, Nsight Compute over the kernels."""

from __future__ import annotations

import ast
import shlex

from _report import ROOT

from _suite import judge
from _suite.steps import PYTHON, Plan, Step, gpu_needed

ROW = "fast-bfloat16"
STATS = "nvtx_sum,cuda_gpu_kern_sum,cuda_api_sum"


def profile(plan: Plan) -> list[Step]:
    return [trace(plan), nsight_systems(plan), ranges(plan), kernels(plan)]


def one_row(plan: Plan, *options: str) -> list[str]:
    """latency.py with the row that is looked at and next to no runs."""
    size = ["--preset", "shapes", "--steps", "2"] if plan.small else ["--preset", "dc-ar-512"]
    work = [*size, "--device", plan.device, *plan.weights, "--warmup", "1", "--repeats", "2"]
    return [PYTHON, "benchmarks/latency.py", "--bs", "1", "--rows", ROW, *work, *options]


def trace(plan: Plan) -> Step:
    """torch's profiler, on a CPU too."""
    command = one_row(plan, "--profile", str(plan.scratch / "trace.json.gz"))
    return Step("profile trace", "profile", tuple(command), judge.trace, limit=90, least=40)


def nsight_systems(plan: Plan) -> Step:
    """The documented command, and its summary."""
    nsys, report = plan.tools.get("nsys"), plan.scratch / "report"
    options = f"--capture-range=cudaProfilerApi --capture-range-end=stop --trace=cuda,nvtx -o {report}".split()
    options += ["--cuda-graph-trace=node", "--force-overwrite=true"]
    collect = shlex.join([nsys or "nsys", "profile", *options, *one_row(plan, "--profile-range")])
    stats = shlex.join([nsys or "nsys", "stats", "--report", STATS, f"{report}.nsys-rep"])
    missing = gpu_needed(plan) or (None if nsys else "nsys is not installed")
    command = ("sh", "-c", f"{collect} && {stats}")
    return Step("profile nsys", "profile", command, judge.nsys, limit=120, least=60, missing=missing)


def ranges(plan: Plan) -> Step:
    """Nsight Compute over the first launches of the timed runs: that there are any shows that the marks work."""
    ncu = plan.tools.get("ncu")
    options = f"--nvtx --profile-from-start off --launch-count 40 --csv --page raw --metrics {','.join(judge.METRICS)}"
    command = (ncu or "", *options.split(), "--clock-control", "none", *one_row(plan, "--nvtx"))
    missing = gpu_needed(plan) or (None if ncu else "ncu is not installed")
    return Step("profile ranges", "profile", command, judge.ncu, limit=120, least=60, missing=missing)


def kernels(plan: Plan) -> Step:
    """Nsight Compute over one launch of every kernel's cases; where it is missing, PyTorch's profiler."""
    missing = gpu_needed(plan)
    ncu = plan.tools.get("ncu")
    if not ncu:
        command = (PYTHON, "-m", "_suite.profile")
        return Step("profile kernels", "profile", command, judge.profile, limit=90, least=30, missing=missing)
    code = "from dcar_fast.tuning import run_warmup; run_warmup('cuda', jobs=1)"
    ours = f"regex:^({'|'.join(triton_kernels())})$"
    options = f"--target-processes all --clock-control none --csv --page raw --metrics {','.join(judge.METRICS)}"
    command = (ncu, *options.split(), "--kernel-name", ours, PYTHON, "-c", code)
    return Step("profile kernels", "profile", command, judge.ncu, limit=120, least=40, missing=missing)


def triton_kernels() -> list[str]:
    """The names of the functions in kernels/ that are compiled, which are the names of the kernels on the GPU."""
    names = []
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list):
                names.append(node.name)
    return names
