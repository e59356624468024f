"""Models: classifiers and flows as plain modules, and the zoo of cards and weights."""
