"""Jobs of preparation: steps shared by processes and machines, leases, progress."""
