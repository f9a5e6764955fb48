"""The `rdt` command and the scripts that launchers start; no training logic."""
