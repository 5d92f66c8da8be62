"""The reference through torch.compile, the baseline of the compile rows."""

from __future__ import annotations

import torch

from dcar_fast import DCARPipeline


def compile_pipeline(pipeline: DCARPipeline, mode: str, grid: tuple[int, int]) -> None:
    """torch.compile of trunk, head network and decoder, for the shapes of their first call only.

    The position table, a constant of the grid that numpy computes, stays out of it. In modes with CUDA graphs a result
    lives until the next call of any of them, so the hidden states, which all denoising steps read, are copied out.
    """
    generator, decoder = pipeline.generator, pipeline.tokenizer.decoder
    positions = generator.positions(grid)
    generator.positions = lambda _: positions
    trunk = torch.compile(generator.forward, mode=mode, dynamic=False)
    head = torch.compile(generator.head.forward, mode=mode, dynamic=False)
    decode = torch.compile(decoder.forward, mode=mode, dynamic=False)

    # CUDA graphs need to know where results may be given up; on a CPU the call would only import them
    begin = torch.compiler.cudagraph_mark_step_begin if pipeline.device.type == "cuda" else lambda: None

    def run_trunk(*args):
        begin()
        output = trunk(*args)
        output.hidden = output.hidden.clone()
        return output

    def run_head(*args):
        begin()
        return head(*args)

    def run_decoder(*args):
        begin()
        return decode(*args)

    generator.forward, generator.head.forward, decoder.forward = run_trunk, run_head, run_decoder
