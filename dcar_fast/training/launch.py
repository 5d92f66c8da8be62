"""One process of a training: its threads and seed, and the accelerate object that knows its device and its partners."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dcar_fast.training.settings import RunSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

EXTRA = "training needs the packages of the extra 'train' ({}): pip install -e '.[train]'"
WAIT = timedelta(hours=1)  # for a process that draws previews or saves
ELSEWHERE = {  # what accelerate would take from its environment, and the setting that has it here
    "ACCELERATE_USE_FSDP": "run.parallel",
    "ACCELERATE_USE_DEEPSPEED": "run.parallel",
    "ACCELERATE_USE_MEGATRON_LM": "run.parallel",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "run.accumulation",
}


def prepare_process(run: RunSettings) -> None:
    """Sets torch's threads and seed as ``run`` says. To be called before models are made: with the same seed all
    processes then make the same. ``ValueError`` if accelerate is missing."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ValueError(EXTRA.format(error)) from error
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)


@contextmanager
def accelerated(run: RunSettings, modules: dict[str, nn.Module], can_shard: bool) -> Iterator[Accelerator]:
    """The accelerator of this process, under ``accelerate launch``, torchrun or none of them; its process group ends
    with the block if it began with it.

    ``ValueError`` if the settings ask for what cannot be done here.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    _check_environment()
    plugin = _fsdp2(modules) if _shards(run, modules, can_shard) else None
    cpu = run.device == "cpu" or not torch.accelerator.is_available()
    if plugin is not None and cpu and torch.accelerator.is_available():
        raise ValueError("run.parallel 'fsdp2' with run.device 'cpu' needs a machine without accelerator")
    began = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    AcceleratorState._reset_state(True)  # of an earlier run in this process, which may have had another precision
    environment = os.environ.get("ACCELERATE_USE_FSDP")
    accelerator = Accelerator(
        mixed_precision="bf16" if run.precision == "bfloat16" else "no",
        cpu=cpu,
        dynamo_backend="no",  # whatever `accelerate config` was told: compiled modules have other names
        # without accelerator accelerate takes no plugin, see below
        fsdp_plugin=None if cpu else plugin,
        log_with=list(run.trackers) or None,
        project_dir=run.output,
        kwargs_handlers=[
            # buffers are equal on all processes: BatchNorm is synchronised, nothing else changes its own
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=WAIT),
        ],
    )
    if plugin is not None and cpu:  # accelerate's FSDP2 runs under gloo as well, it only does not offer to
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    try:
        _check_world(accelerator)
        yield accelerator
    finally:
        if environment is None:
            os.environ.pop("ACCELERATE_USE_FSDP", None)
        _release_groups(modules)
        if began:
            accelerator.state.destroy_process_group()
        AcceleratorState._reset_state(True)


def launched_processes() -> int:
    """How many processes the launcher says there are, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _shards(run: RunSettings, modules: dict[str, nn.Module], can_shard: bool) -> bool:
    if run.parallel != "fsdp2":
        return False
    if not can_shard or len(modules) != 1:
        raise ValueError(f"run.parallel must be 'ddp' for what trains {sorted(modules)}, got 'fsdp2'")
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("run.parallel 'fsdp2' needs processes: start with accelerate launch or torchrun")
    return True


def _fsdp2(modules: dict[str, nn.Module]) -> FullyShardedDataParallelPlugin:
    """The units are the entries of the modules' outermost lists (transformer blocks). Weights are gathered in float32
    and cast by autocast, so that the arithmetic is DDP's."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(
            {type(m).__name__ for module in modules.values() for m in _entries(module)}
        ),
        # the weights are there on every process, and this way of accelerate's cannot take buffers
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
    )


def _entries(module: nn.Module) -> Iterator[nn.Module]:
    """What the module lists hold that are in no other list."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _entries(child)


def _check_environment() -> None:
    for name, setting in ELSEWHERE.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "1" if setting == "run.accumulation" else "0", "false"):
            raise ValueError(f"{name}={value} would change what is trained: unset it, {setting} has its place")


def _release_groups(modules: dict[str, nn.Module]) -> None:
    """Lets go of the process groups that the meshes of sharded weights hold.

    DTensor's caches keep meshes for ever, and with them a group's threads into the interpreter's end, where one that
    just then drops a tensor aborts the process: a launcher would take the finished run for a failed one.
    """
    # not a set: every unit has a mesh of its own, and all of them compare equal
    for mesh in [p.device_mesh for module in modules.values() for p in module.parameters() if isinstance(p, DTensor)]:
        root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
        getattr(root, "_pg_registry", {}).clear()
    atexit.unregister(gc.collect)  # once, however many runs there were
    atexit.register(gc.collect)  # the last references are in cycles


def _check_world(accelerator: Accelerator) -> None:
    if accelerator.num_processes != launched_processes():
        raise ValueError(
            f"the launcher started {launched_processes()} processes, but accelerate sees {accelerator.num_processes}"
        )
