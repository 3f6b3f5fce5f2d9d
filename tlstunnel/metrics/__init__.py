"""What a process counts, and the sums over all processes."""
