"""Studies that compare trainings over several seeds, and the verification of a test's results."""
