"""A demonstration: the embedded model learns tasks that it has never seen.

`run.py` teaches, measures and has the adapter read again; `again.py` is what a fresh process runs;
`page.py` draws the result.
"""
