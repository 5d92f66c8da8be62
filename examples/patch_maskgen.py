"""MaskGen's diffusion head, as it is and patched: python examples/patch_maskgen.py --repo PATH_TO_1D_TOKENIZER"""

from _compare import compare, missing, reach, repository

if __name__ == "__main__":
    args = repository(__doc__).parse_args()
    reach(args.repo, "modeling/modules/losses.py")
    try:
        from modeling.modules.losses import DiffLoss
        from omegaconf import OmegaConf
    except ImportError as error:
        missing(error)
    config = {
        "model": {"vq_model": {"token_size": 16}, "maskgen": {"decoder_embed_dim": 1024}},
        "losses": {"diffloss_w": 1024, "diffloss_d": 8, "num_sampling_steps": "50,0"},
    }
    compare(DiffLoss(OmegaConf.create(config)), 1024)
