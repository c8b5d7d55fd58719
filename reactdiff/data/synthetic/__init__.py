"""Dyads that react to each other, written in the official layout: data that may be given away, with a known answer.

`docs/data.md` gives the equations. `dyad` is who does what when, `face` and `senses` what is seen and heard of it,
`simulation` whose randomness it is, `writer` the files, `oracles` how somebody would listen who knows all that. Every number
is a pure function of (seed, split, clip, person).
"""

from reactdiff.data.synthetic.oracles import oracle
from reactdiff.data.synthetic.simulation import Simulation
from reactdiff.data.synthetic.writer import write_tree

__all__ = ["Simulation", "oracle", "write_tree"]
