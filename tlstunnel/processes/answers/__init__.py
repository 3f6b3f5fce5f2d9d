"""What a serving process answers when the parent asks it: about its tunnels, sites, origins and refused connections."""
