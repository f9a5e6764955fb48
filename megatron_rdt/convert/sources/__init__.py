"""Models of other projects: for each kind, its config and its weights expressed here, as data."""
