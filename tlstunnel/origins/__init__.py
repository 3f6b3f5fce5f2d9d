"""Origins: where they are, connecting to them, and the embedded echo origin."""
