"""How the parent carries out the commands of `tlstunnel.commands`: by itself, or by asking serving processes."""
