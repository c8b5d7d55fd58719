"""Speed, measured against a named rival: the training step against a plain PyTorch loop, loading against boto3 and webdataset.

Imports reactdiff, config, storage, runtime, data, runs, training.
"""
