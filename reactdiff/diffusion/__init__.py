"""The diffusion process: schedules, predictions, samplers and keyed noise; knows nothing of the network."""
