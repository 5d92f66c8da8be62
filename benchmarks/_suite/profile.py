"""One launch of every case of the Triton kernels under PyTorch's profiler, where Nsight Compute is missing."""

from __future__ import annotations

import _report  # noqa: F401  (makes dcar_fast importable)


def main() -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dcar_fast.tuning import all_cases, runnable

    cases, device = all_cases(), torch.device("cuda")
    launches = [(str(cases[n]), cases[n].case.prepare(device)) for n in runnable(cases, device)]
    for _, launch in launches:  # compiles
        launch(None)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for name, launch in launches:
            with torch.profiler.record_function(name):
                launch(None)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=200, max_name_column_width=80))


if __name__ == "__main__":
    main()
