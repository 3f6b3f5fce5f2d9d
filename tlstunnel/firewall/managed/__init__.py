"""Managed rules: OWASP CRS and rules of one's own, evaluated by libmodsecurity in helper processes with a deadline."""
