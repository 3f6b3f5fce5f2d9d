"""What there is, and how it does: sites, origins, certificates, and connections that were refused. No I/O."""
