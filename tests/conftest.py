"""Fixtures for all tests."""

import os

import pytest
from hypothesis import settings

from tests.harness import Certificate
from tlstunnel.certificates import issue

# For ./scripts/matrix --subset: what differs between Python versions shows with few examples.
settings.register_profile("few", max_examples=15)

# All clients connect to this machine, whatever proxy the environment has for others.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "localhost,127.0.0.1,::1"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Return a test authority and a certificate for localhost, 127.0.0.1 and ::1, made once per session."""
    issued = issue.create(["localhost", "127.0.0.1", "::1"], tmp_path_factory.mktemp("certs"))
    return Certificate(issued.ca, issued.cert, issued.key)
