"""What every rank of a worker group does: the loop over the stream, the engine around ZeRO, where a life goes on.

Imports reactdiff, config, storage, runtime, telemetry, data, runs, evaluation.
"""
