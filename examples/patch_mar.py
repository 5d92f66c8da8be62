"""MAR's diffusion head, as it is and patched: python examples/patch_mar.py --repo PATH_TO_MAR"""

from _compare import compare, missing, reach, repository

if __name__ == "__main__":
    args = repository(__doc__).parse_args()
    reach(args.repo, "models/diffloss.py")
    try:
        from models.diffloss import DiffLoss
    except ImportError as error:
        missing(error)
    compare(DiffLoss(target_channels=16, z_channels=768, depth=6, width=1024, num_sampling_steps="50,0"), 768)
