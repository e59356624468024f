"""The numbers of a run, computed once from its store as typed facts."""
