"""Compare this package's speed and memory with its alternatives: `make bench`, or `python -m bench CASE ...`.

The contestants of a case are separate processes that alternate within one run, so that other load on the machine
affects all of them. `cases` defines the contestants and the work of each case, `arena` alternates their turns,
`contestant` is the process, `peers` and `ours` are the training code that it runs, and `report` writes the results.
"""
