"""Compare this package's speed and memory with its alternatives: `make bench`, or `python -m bench CASE ...`.

The contestants of a case are separate processes that alternate within one run, so that other load on the machine
affects all of them; those of targets then run alone, because one that waits still holds memory. `cases` defines the
contestants and the work of each case, `arena` gives them their turns, `contestant` is the process, `peers` and `ours`
are the training code that it runs, `result` evaluates a run, `runs` and `combine` merge several, and `report` writes
the results.
"""
