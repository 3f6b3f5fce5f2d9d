"""The commands that a running tunnel takes, and their results: values, the same for every transport.

They come over the control socket (`tlstunnel.processes.control`) and by HTTP (`tlstunnel.admin`).
`tlstunnel.processes.commands` carries them out. Times are Unix times in seconds, unless something else is said.
"""
