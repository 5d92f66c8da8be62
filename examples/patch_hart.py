"""HART's residual head, as it is and patched: python examples/patch_hart.py --repo PATH_TO_HART"""

from _compare import compare, missing, reach, repository

if __name__ == "__main__":
    args = repository(__doc__).parse_args()
    reach(args.repo, "hart/modules/diffusion/diffloss.py")
    try:
        from hart.modules.diffusion.diffloss import DiffLoss
    except ImportError as error:
        missing(error)
    compare(DiffLoss(target_channels=32, z_channels=1536, depth=6, width=1024, num_sampling_steps="8"), 1536)
