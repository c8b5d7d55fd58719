"""Speed against a named rival: a step against a plain PyTorch loop, loading against boto3 and webdataset, recovery against Ray Train.

Imports reactdiff, config, storage, runtime, telemetry, data, runs, evaluation, training, driver, studies.
"""
