"""The parent, which holds the sockets and answers commands, and its children, which serve (docs/operations.md)."""
