"""Chat records with images -> micro-batches, the same for any number of ranks."""
