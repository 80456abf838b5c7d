"""Our speed and memory beside what a user would pick instead: `make bench`, or `python -m bench CASE ...`.

Contestants of a case are processes of their own that take turns within one run, so that what else the machine does
falls on all of them: `cases` says who meets whom on what work, `arena` lets them take turns, `contestant` is the
process, `peers` and `ours` are what it runs, `report` writes what came of it.
"""
