"""The counts of several machines, in a Valkey or Redis server."""
