"""DC-AR in plain PyTorch: the truth every faster path is held against."""
