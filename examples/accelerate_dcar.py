"""The released DC-AR generator, as it is and accelerated, on its own GPU code:

python examples/accelerate_dcar.py --repo PATH_TO_DC_AR --generator pytorch_model.bin "a lighthouse at dusk"
"""

import time

from _compare import missing, reach, repository

if __name__ == "__main__":
    parser = repository(__doc__)
    parser.add_argument("--generator", required=True, help="its pytorch_model.bin")
    parser.add_argument("--config", default="configs/inference/dc_ar_t2i_512.yaml", help="in the checkout")
    parser.add_argument("prompts", nargs="+")
    args = parser.parse_args()
    reach(args.repo, "modeling/generator/dc_ar.py")
    try:
        import torch
        from modeling.generator.dc_ar import DCAR
        from omegaconf import OmegaConf
    except ImportError as error:
        missing(error)
    from pathlib import Path

    from dcar_fast.integrations import accelerate

    generator = DCAR(OmegaConf.load(Path(args.repo) / args.config)).eval()
    generator.load_state_dict(torch.load(args.generator, map_location="cpu", weights_only=True))
    generator = generator.cuda().requires_grad_(False)
    settings = {"guidance_scale": 4.5, "randomize_temperature": 1.5, "softmax_temperature_annealing": True}
    for name, one in (("released", generator), ("accelerated", accelerate(generator, compatible=True))):
        for _ in range(2):  # the first one warms up
            torch.manual_seed(0)
            torch.cuda.synchronize()
            start = time.perf_counter()
            ids, residual = one.generate(args.prompts, **settings, num_sample_steps=12)
            torch.cuda.synchronize()
        print(f"{name}: {time.perf_counter() - start:.3f} s, first tokens {ids[0, :8].tolist()}")
