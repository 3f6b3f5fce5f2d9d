"""Check a ``wss://`` URL step by step, as a client sees it."""
