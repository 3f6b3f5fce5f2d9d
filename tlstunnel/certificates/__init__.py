"""Certificates: issuing test ones, describing any, serving a site's."""

from pathlib import Path

CERTIFICATES = Path("certs")
"""Where test certificates are, in the folder where the tunnel is started."""
