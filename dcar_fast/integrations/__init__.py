"""Other people's samplers, faster: what someone imports to speed their own codebase up without touching its models.

patch_diffloss(obj), unpatch(obj), explain(obj): the diffusion heads of the MAR family (MAR, HART, MaskGen, DC-AR).
"""

from dcar_fast.integrations.diffloss import Patch, explain, patch_diffloss, unpatch

__all__ = ["Patch", "explain", "patch_diffloss", "unpatch"]
