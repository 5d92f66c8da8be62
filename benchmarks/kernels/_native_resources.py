"""What the CUDA kernels inside the native module need, read from its machine code. Needs no GPU.

The counterpart of ``dcar_fast.kernels.offline``, whose cuobjdump, the one that comes with Triton, it runs.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _compare  # noqa: F401  (makes dcar_fast importable, so it is first)

from dcar_fast.kernels.offline import cuobjdump, instructions
from dcar_fast.ops import _native


def native_rows() -> list[dict[str, Any]]:
    """One row for each CUDA kernel and each GPU generation that the built module holds machine code for.

    Keys: "kernel" (readable, such as "remask_kernel<int, short, unsigned int>"), "target" ("sm_90a"), "registers" and
    "stack" (bytes) per thread, "shared_bytes" per block (static), "spills" (instructions), "mma" (matrix instructions
    by name). RuntimeError with the reason where there is no native module, or one without CUDA kernels.
    """
    native = _native.module()
    if not native.cuda_compiled():
        raise RuntimeError(f"the native module was built without CUDA: {native.cuda_left_out()}")
    return rows_of(Path(native.__file__))


def rows_of(binary: Path) -> list[dict[str, Any]]:
    """The rows of a shared library or object file with CUDA machine code inside."""
    listings = {key: instructions(listing) for key, listing in _functions(cuobjdump("-sass", binary), "Function : ")}
    rows = []
    for (target, symbol), usage in _functions(cuobjdump("-res-usage", binary), " Function "):
        symbol = symbol.rstrip(":")
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        code = listings.get((target, symbol))
        if found is None or not code:
            raise RuntimeError(f"{binary}: cuobjdump prints no usage or no code of {symbol} for {target}")
        rows.append(
            {
                "kernel": readable(symbol),
                "target": target,
                "registers": int(found[1]),
                "spills": code["STL"] + code["LDL"],
                "shared_bytes": int(found[3]),
                "stack": int(found[2]),
                "mma": {name: count for name, count in sorted(code.items()) if "MMA" in name},
            }
        )
    if not rows:
        raise RuntimeError(f"{binary} holds no CUDA kernel")
    return sorted(rows, key=lambda row: (row["kernel"], int(re.sub(r"\D", "", row["target"]))))


def _functions(listing: str, heading: str) -> Iterator[tuple[tuple[str, str], str]]:
    """((target, symbol), text) of every function in what cuobjdump printed."""
    for section in re.split(r"^arch = ", listing, flags=re.MULTILINE)[1:]:
        target = section.split(maxsplit=1)[0]
        for function in re.split(rf"^\s*{heading.strip()}\s", section, flags=re.MULTILINE)[1:]:
            yield (target, function.split(maxsplit=1)[0]), function


def readable(symbol: str) -> str:
    """The name of a kernel as it is written in C++: no return type, namespace or arguments."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    address = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not address:
        return symbol  # a C name, or one that is not mangled
    name = ctypes.string_at(address).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", name)
    depth = 0
    for place in reversed(range(len(name))):  # the argument list may hold brackets of its own
        depth += (name[place] == ")") - (name[place] == "(")
        if depth == 0:
            return name[:place] or name
    return name
