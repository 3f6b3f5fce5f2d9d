"""Origins: choosing one, connecting to it, its health, and the embedded echo origin."""
