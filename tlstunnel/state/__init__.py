"""What is counted and kept: the counts of this process, shared counts, and their history."""
