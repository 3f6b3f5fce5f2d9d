"""What is served, and in which state: sites, origins, certificates, and connections that were refused. No I/O."""
