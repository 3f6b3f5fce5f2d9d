"""A verdict on one upgrade request: addresses, origins, rules, rate limits, managed rules."""
