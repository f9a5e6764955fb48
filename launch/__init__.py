"""How a run is started; no training logic."""
