"""What a client meets at a ``wss://`` URL, step by step."""
