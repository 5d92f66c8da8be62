"""The operations in plain PyTorch, one file each: the truth that every kernel is tested against, and the fallback."""
