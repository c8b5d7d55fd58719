"""The science of facial-reaction generation: clips, models, diffusion and official metrics, in plain PyTorch."""
