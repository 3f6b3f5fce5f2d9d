"""Plans: guidelines for concurrent tunnels, where each site stands, and the notices about it. Nobody is cut off.

`values` is what the modules share. `guidelines`, `standing` and `abuse` assess sites and do no I/O.
"""
