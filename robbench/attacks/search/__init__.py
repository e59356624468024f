"""How attacks search: steps in norm balls, search spaces, batches, the set of samples not yet broken."""
