"""A package, so that every test can say ``from tests.harness import ...``."""
