"""Tables, files and checks made from a run. Pure functions: the same run gives the same bytes."""
