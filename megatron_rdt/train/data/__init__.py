"""Training data: prepared corpora or a streamed dataset behind one interface, and the history of a mixture."""
