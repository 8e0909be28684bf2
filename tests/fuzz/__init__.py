"""Random calls of every public op, held to the float64 reference: `make fuzz` and `make soak`.

A call is one line of Python (`vicreg_loss(x=T((3, 5)), y=T((3, 5)), margin=2.0)`), so that what a
failure prints is what reproduces it. `inputs.py` has the words of that line, `op_*.py` draw lines,
`runner.py` evaluates a line and holds the result to the rule, `known.py` lists the faults that are
open.
"""
