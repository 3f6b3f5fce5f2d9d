"""Edge workers: users' functions that see each upgrade request between the firewall and the origin.

This module exports what such a function needs. docs/edge.md describes what it can and cannot do.
"""

from tlstunnel.edge.values import TLS, ClientCertificate, EdgeError, Reply, WorkerRequest

__all__ = ["TLS", "ClientCertificate", "EdgeError", "Reply", "WorkerRequest"]
