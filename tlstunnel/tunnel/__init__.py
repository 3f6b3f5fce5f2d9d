"""One connection, from accept to its record: the order of the stages, and the splice."""
