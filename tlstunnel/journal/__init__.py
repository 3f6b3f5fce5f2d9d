"""The log: one record for each connection, and the lines that are written."""
