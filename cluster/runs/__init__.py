"""A run's folder: its state, checkpoints, exports and latents; and the registry, which says which run is champion.

Imports reactdiff, config, storage, runtime, telemetry, data.
"""
