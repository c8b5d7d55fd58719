"""What a job computes, and where: the typed tree of keys, its YAML files and overrides, and the digest that names a run.

Imports reactdiff.
"""
