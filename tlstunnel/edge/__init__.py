"""Edge workers: a user's function that looks at the upgrade request, between the firewall and the origin.

What such a function needs is here; docs/edge.md says what it can do, and what it cannot.
"""

from tlstunnel.edge.values import TLS, ClientCertificate, EdgeError, Reply, WorkerRequest

__all__ = ["TLS", "ClientCertificate", "EdgeError", "Reply", "WorkerRequest"]
