"""Diffusion heads of the MAR family, faster: ``sample`` of one instance is replaced, nothing else is touched.

    patch_diffloss(model)            # a MAR, HART, MaskGen, DC-AR, ... or its DiffLoss
    model.sample_tokens(...)         # as before

What such a head is made of, its schedule, its guidance formula, clipping and scale are read off the object and tried
out on small inputs; what is not understood is refused with the reason. See ``_structure.py`` and ``_probes.py``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from dcar_fast.engine.pack import forget
from dcar_fast.integrations._fast_sample import DTYPES, FastSample, Recognised
from dcar_fast.integrations._structure import Unrecognised, find_diffloss

logger = logging.getLogger(__name__)

RNGS = ("parity", "counter")


def patch_diffloss(
    obj: object, rng: str = "parity", dtype: torch.dtype | None = None, graphs: str | bool = "auto"
) -> Patch:
    """Binds a faster ``sample`` to the one diffusion head in ``obj``: a DiffLoss, or a model that holds one.

    rng: "parity" uses torch's generators up exactly as the original does (one randn for the start, one randn_like of
    all rows in every step), so that a seed gives the samples it gave before, to rounding. "counter" takes one seed from
    torch's CPU generator and draws by row from it: what a row gets depends on its position alone. dtype: in which the
    network computes, float32, bfloat16 or float16; None is what the original computes in, autocast included. graphs:
    "auto" replays CUDA graphs where there are some, one for each bucket of rows (1, 2, 3, 4, 6, ... 4096 of a branch),
    captured when it is first needed; True insists, False never does.

    Class, ``forward``, ``state_dict`` and training stay as they are. The weights are packed when ``sample`` is called
    and packed anew when they have changed, in place or not. Where a call cannot be served (gradients, hooks, quantised
    or adapted layers, arguments beyond z, temperature and cfg), the original runs and a warning says why, once.

    Returns the patch: a context manager that takes itself back at its end, and ``explain()``. Patching again replaces
    the patch. ``ValueError`` with the reason for what is not recognised; then nothing was changed.
    """
    if rng not in RNGS:
        raise ValueError(f"rng must be one of {', '.join(map(repr, RNGS))}, got {rng!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or None, got {dtype!r}")
    if graphs != "auto" and not isinstance(graphs, bool):
        raise ValueError(f"graphs must be 'auto', True or False, got {graphs!r}")
    path, diffloss = find_diffloss(obj)
    _not_replaced(diffloss)
    sample = FastSample(diffloss, rng, dtype, graphs)
    sample.recognised()
    sample.check_graphs()
    diffloss.__dict__["sample"] = sample  # an attribute of the instance, that is no module and no parameter
    logger.info("%s.sample runs on dcar_fast", path or type(diffloss).__name__)
    return Patch(path, diffloss)


def unpatch_diffloss(obj: object) -> bool:
    """Takes the patch of the diffusion head in ``obj`` back; False if there was none."""
    _, diffloss = find_diffloss(obj)
    patched = isinstance(diffloss.__dict__.get("sample"), FastSample)
    if patched:
        del diffloss.__dict__["sample"]
        forget(diffloss.net)
    return patched


def recognise(diffloss: nn.Module) -> Recognised:
    """How a diffusion head samples; ``Unrecognised`` with the reason. Changes nothing."""
    return FastSample(diffloss).recognised()


def explain(obj: object) -> str:
    """What is recognised in ``obj``, what will run for it and, where nothing will, why not. Changes nothing."""
    try:
        path, diffloss = find_diffloss(obj)
    except Unrecognised as reason:
        return f"not recognised: {reason}"
    name = f"{path or 'the object itself'} ({type(diffloss).__module__}.{type(diffloss).__qualname__})"
    sample = diffloss.__dict__.get("sample")
    try:
        if not isinstance(sample, FastSample):
            _not_replaced(diffloss)
        fast = sample if isinstance(sample, FastSample) else FastSample(diffloss)
        known = fast.recognised()
    except Unrecognised as reason:
        return f"{name}: not recognised: {reason}"
    net, dialect = diffloss.net, known.dialect
    size = f"{len(net.res_blocks)} blocks x {net.input_proj.out_features}, {net.input_proj.in_features} channels"
    steps = f"{known.schedule.num_steps} steps from t = {known.schedule.timesteps[-1]}"
    clip = "x_0 clamped to [-1, 1]" if dialect.clip else "x_0 not clamped"
    runs = fast.runs() if fast is sample else f"not patched; would be: {fast.runs()}"
    return f"{name}: {size}, {steps}, guidance {dialect.guidance}, {clip}, result x {dialect.scale:g}\n  {runs}"


@dataclass(frozen=True)
class Patch:
    """What :func:`patch_diffloss` did. As a context manager it is taken back at the end."""

    path: str
    diffloss: nn.Module

    def unpatch(self) -> None:
        unpatch_diffloss(self.diffloss)

    def explain(self) -> str:
        return explain(self.diffloss)

    def refresh(self) -> None:
        """Packs the weights anew in the next call: after writes that PyTorch does not count (``.data``, numpy)."""
        sample = self.diffloss.__dict__.get("sample")
        if isinstance(sample, FastSample):
            sample.refresh()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.unpatch()


def _not_replaced(diffloss: nn.Module) -> None:
    sample = diffloss.__dict__.get("sample")
    if sample is not None and not isinstance(sample, FastSample):
        raise Unrecognised(f"{type(diffloss).__name__}.sample was already replaced on this instance, by {sample!r}")
