"""Makes the ops known to torch.library, so that torch.compile and torch.export see each as one node.

Defined and implemented with ``Library.define`` and ``Library.impl``: calling through ``torch.library.custom_op`` costs
several times as much (``docs/performance.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("dcar_fast", "DEF")


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Defines ``dcar_fast::<schema>`` and returns what to call; its last argument is ``str? backend``.

    ``schema``: such as "remask(Tensor ids, Tensor confidence, Tensor num_masked, int mask_id, str? backend) -> Tensor".
    ``run`` serves every device, checks values that only exist when it runs, and chooses the backend. ``fake``: the same
    call on tensors without data, for shapes and types. ``backward`` and ``setup_context`` as in
    ``torch.library.register_autograd``; an op without them gives outputs without gradient. Under autocast both run as
    without it: an op says itself in which precision it computes.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _without_autocast(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dcar_fast::{name}", fake, lib=LIBRARY)
    if backward is not None:
        without = _without_autocast(backward)
        torch.library.register_autograd(f"dcar_fast::{name}", without, setup_context=setup_context, lib=LIBRARY)
    operator = getattr(torch.ops.dcar_fast, name).default

    def call(*arguments: Any) -> Any:
        backend = arguments[-1]
        if backend is not None and not isinstance(backend, str):
            raise ValueError(f"backend is {backend!r}, allowed are None and a backend's name")
        return operator(*arguments)

    return call


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        device = next(value.device.type for value in arguments if isinstance(value, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run
