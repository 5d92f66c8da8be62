"""A pytest plugin: keeps a few tests of every file, spread over it, where each test costs minutes.

SUITE_PER_FILE=2 PYTHONPATH=benchmarks python -m pytest -p _suite.subset
"""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(trylast=True)  # after -m and -k have had their say
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = int(os.environ["SUITE_PER_FILE"])
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
    kept = [found[place * len(found) // most] for found in files.values() for place in range(min(most, len(found)))]
    kept = list(dict.fromkeys(kept))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
