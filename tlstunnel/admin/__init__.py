"""What the admin process serves by HTTP: the dashboard, the API, metrics, and whether the tunnel is ready.

It knows of no processes: it asks for the commands of `tlstunnel.commands` to be carried out.
"""
