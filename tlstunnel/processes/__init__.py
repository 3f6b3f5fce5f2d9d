"""The parent, which holds the sockets and takes commands, and its children, which serve (docs/operations.md)."""
