"""Certificates: issue test certificates, describe any certificate, and serve those of sites."""

from pathlib import Path

CERTIFICATES = Path("certs")
"""The folder of test certificates, relative to the folder in which the tunnel is started."""
