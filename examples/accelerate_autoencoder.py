"""diffusers' AutoencoderDC, as it is and accelerated: python examples/accelerate_autoencoder.py [--model FOLDER]"""

import argparse
import sys
import time

import torch

from dcar_fast.integrations import accelerate_autoencoder

SMALL = {
    "latent_channels": 32,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (64, 128, 256),
    "decoder_block_out_channels": (64, 128, 256),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (2, 2, 2),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
    "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
    "decoder_act_fns": ("relu", "relu", "silu"),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="weights to load; a small decoder with random ones without")
    args = parser.parse_args()
    try:
        from diffusers import AutoencoderDC
    except ImportError as error:
        sys.exit(f"diffusers cannot be imported here: {error}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderDC.from_pretrained(args.model) if args.model else AutoencoderDC(**SMALL)
    vae = vae.eval().to(device)
    latents = torch.randn(1, vae.config.latent_channels, 16, 16, device=device)

    @torch.no_grad()
    def decode() -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        images = vae.decode(latents).sample
        if device == "cuda":
            torch.cuda.synchronize()
        return images, time.perf_counter() - start

    decode()
    before, original = decode()
    with accelerate_autoencoder(vae):
        decode()
        after, fast = decode()
    difference = ((after - before).abs().max() / before.abs().max()).item()
    print(f"original {original * 1e3:.0f} ms, accelerated {fast * 1e3:.0f} ms, largest difference {difference:.1e}")
