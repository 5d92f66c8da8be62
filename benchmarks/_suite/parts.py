"""The parts of the suite, each one or several steps."""

from __future__ import annotations

from _report import ROOT

from _suite import images, judge, profiles, tests
from _suite.steps import PYTHON, Plan, Step, gpu_needed

KERNELS = ROOT / "benchmarks" / "kernels"
NO_BENCHMARKS = {"cpu", "overhead", "resources"}  # modules of that folder that are no op's
# In the order of what is missed most if the time does not suffice.
GPU_PARTS = ("build", "ceilings", "warmup", "latency", "throughput", "graphs", "tests", "precision", "profile")
GPU_PARTS += ("kernels", "baselines", "sanitizer")
CPU_PARTS = ("build", "ceilings", "latency", "throughput", "precision", "kernels", "overhead", "resources")
PARTS = (*GPU_PARTS, "overhead", "resources", "tune")

# Sizes at which a kernel benchmark takes seconds on a CPU; the ones that are not named here run at their own.
# On a GPU, where a benchmark's own options are not what the model runs there; several sets are several runs.
BF16 = ("--dtype", "bfloat16")
FULL = {
    "bias_residual": (BF16,),
    "channel_norm": (BF16,),
    "denoise_step": ((), ("--rows", "8192", "--no-compile")),
    "depthwise_gate": (BF16,),
    "fused_linear": tuple(
        ("--layer", layer, "--rows", rows) for layer in ("qkv", "proj", "fc1", "fc2") for rows in ("512", "8192")
    ),
    "gelu": (BF16,),
    "quantize_rows": (("--layer", "fc1"), ("--layer", "fc2", "--rows", "8192", "--no-compile")),
    "relu_linear_attention": (BF16,),
    "sample_from_logits": (BF16,),
    "sample_tokens": (BF16, (*BF16, "--rows", "4096", "--no-compile")),
    "upsample_shortcut": (BF16,),
}
DECODER = ("--channels", "32", "--side", "16", "--rounds", "3", "--no-compile")
SMALL = {
    "add_residual": ("--batch", "2", "--rounds", "5", "--no-compile"),
    "bias_residual": DECODER,
    "channel_norm": DECODER,
    "cross_attention": ("--batch", "1", "--queries", "64", "--keys", "70", "--heads", "2", "--rounds", "3"),
    "denoise_step": ("--rows", "16", "--width", "128", "--depth", "2", "--rounds", "3", "--no-compile"),
    "depthwise_gate": DECODER,
    "embed_tokens": ("--batch", "2", "--rounds", "5", "--no-compile"),
    "fused_linear": ("--rows", "32", "--width", "128", "--hidden", "512", "--rounds", "3", "--no-compile"),
    "gelu": ("--rows", "128", "--rounds", "3", "--no-compile"),
    "latent_noise": ("--rounds", "5", "--no-compile"),
    "place_tokens": ("--rounds", "5", "--no-compile"),
    "quantize_rows": ("--rows", "32", "--width", "128", "--hidden", "512", "--rounds", "3", "--no-compile"),
    "relu_linear_attention": DECODER,
    "remask": ("--rounds", "5", "--no-compile"),
    "sample_from_logits": ("--rows", "8", "--codes", "512", "--rounds", "3", "--no-compile"),
    "sample_tokens": ("--rows", "8", "--width", "64", "--codes", "512", "--rounds", "3", "--no-compile"),
    "self_attention": ("--batch", "1", "--tokens", "64", "--heads", "2", "--rounds", "3"),
    "upsample_shortcut": (*DECODER, "--inputs", "64"),
    "vq_lookup": ("--rows", "256", "--codes", "2048", "--rounds", "3", "--no-compile"),
}


def steps(parts: tuple[str, ...], plan: Plan) -> list[Step]:
    """The steps of ``parts``, in their order; on a CPU those that need a GPU say so."""
    makers = {
        "build": build,
        "ceilings": ceilings,
        "warmup": warmup,
        "latency": images.latency,
        "throughput": images.throughput,
        "graphs": tests.graphs,
        "tests": tests.tests,
        "precision": images.precision,
        "profile": profiles.profile,
        "kernels": kernels,
        "baselines": images.baselines,
        "sanitizer": sanitizer,
        "overhead": overhead,
        "resources": resources,
        "tune": tune,
    }
    return [step for part in parts for step in makers[part](plan)]


# The parts


def build(plan: Plan) -> list[Step]:
    """As the README says for machines without a network; where pip cannot, the native module alone, in place."""
    pip = f"{PYTHON} -m pip install --no-build-isolation --no-deps -e ."
    alone = f"{PYTHON} setup.py -q build_ext --inplace"
    script = f"{pip} || {{ echo; echo 'pip failed; building the native module in place'; {alone}; }}"
    return [Step("build", "build", ("sh", "-c", script), judge.finished, limit=200, least=60)]


def ceilings(plan: Plan) -> list[Step]:
    quick = ("--quick",) if plan.quick else ()
    command = (PYTHON, "benchmarks/ceilings.py", "--device", plan.device, *quick)
    return [Step("ceilings", "ceilings", command, judge.last_json, limit=60)]


def warmup(plan: Plan) -> list[Step]:
    code = "from dcar_fast.tuning import run_warmup; run_warmup('cuda')"
    command, missing = (PYTHON, "-c", code), gpu_needed(plan)
    return [Step("warmup", "warmup", command, judge.warmup, limit=150, least=30, missing=missing)]


def kernels(plan: Plan) -> list[Step]:
    """Every benchmark of benchmarks/kernels, at its own sizes on a GPU."""
    made = []
    for op in plan.ops or kernel_benchmarks():
        for number, options in enumerate([SMALL.get(op, ())] if plan.small else FULL.get(op, [()])):
            name = f"kernels {op}" + (f" {' '.join(options)}" if number else "")
            command = (PYTHON, f"benchmarks/kernels/{op}.py", "--device", plan.device, *options)
            made.append(Step(name, "kernels", command, judge.last_json, limit=90, least=15))
    return made


def kernel_benchmarks() -> list[str]:
    """The modules of benchmarks/kernels that time something."""
    return sorted(path.stem for path in KERNELS.glob("[!_]*.py") if path.stem not in NO_BENCHMARKS)


def overhead(plan: Plan) -> list[Step]:
    """What a call costs beside its work, on the CPU; not among a GPU's parts unless it is named."""
    few = ("--calls", "100", "--repeats", "2") if plan.quick else ()
    return [Step("overhead", "overhead", (PYTHON, "benchmarks/kernels/overhead.py", *few), judge.last_json, limit=60)]


def sanitizer(plan: Plan) -> list[Step]:
    """Out-of-bounds accesses and races, in a few kernel tests of every op: instrumented code is many times slower."""
    path = plan.tools.get("compute-sanitizer")
    missing = gpu_needed(plan) or (None if path else "compute-sanitizer is not installed")
    pytest = (PYTHON, "-m", "pytest", "-p", "_suite.subset", "-p", "no:cacheprovider", "-m", "gpu", "-v", "tests/ops")
    made = []
    for tool, per_file in (("memcheck", "2"), ("racecheck", "1")):
        environment = {"SUITE_PER_FILE": per_file}
        if tool == "memcheck":
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # inside torch's own blocks nothing is out of bounds
        command = (path or "", "--tool", tool, "--error-exitcode", "99", *pytest)
        name = f"sanitizer {tool}"
        made.append(Step(name, "sanitizer", command, judge.sanitizer, 100, 30, environment, missing))
    return made


def resources(plan: Plan) -> list[Step]:
    """Registers and shared memory of what ships; the GPU's own row of the matrix in a quick run."""
    path = plan.out / "resources.json"
    quick = ("--targets", "90") if plan.quick else ()
    command = (PYTHON, "benchmarks/kernels/resources.py", "--json", str(path), *quick)
    return [Step("resources", "resources", command, judge.resources, limit=900, least=60)]


def tune(plan: Plan) -> list[Step]:
    """Not among the default parts: takes what time is left, and changes what later runs measure only by its file."""
    path = plan.out / "tuned.json"
    code = "import pathlib, sys; from dcar_fast.tuning import run_tune; "
    code += f"run_tune('cuda', '', pathlib.Path({str(path)!r}), 4)"
    return [Step("tune", "tune", (PYTHON, "-c", code), judge.finished, limit=300, least=120, missing=gpu_needed(plan))]
