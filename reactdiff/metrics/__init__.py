"""The official metrics of the REACT challenge, exact and fast; their repaired twins, baselines and report."""
