"""Managed rules: OWASP CRS and users' own rules, evaluated by libmodsecurity in helper processes with a deadline."""
