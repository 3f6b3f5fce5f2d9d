"""What one process serves: loaded, accepted, switched and ended."""
