"""The machinery: object storage, streaming, the ZeRO engine, checkpoints, Ray, Prometheus; it knows nothing of faces."""
