"""Datasets: shards made of recordings, and their items streamed to ranks in order, each byte compared with its checksum.

Imports reactdiff, config, storage, runtime, telemetry.
"""
