"""Usage over time: samples of each second become rows per minute, hour and day in an SQLite file.

`samples` makes the rows and does no I/O. `database` opens the file. `writer` stores rows, from a thread of the ledger.
`reader` answers queries, from any other process.
"""
