"""Triton decides between compiling and interpreting when it is imported, so the tests of interpreted kernels in
interpreted/ are collected only in a process that was started for them: see test_interpreter.py."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
