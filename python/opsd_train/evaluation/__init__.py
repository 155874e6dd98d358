"""How good a student is: verifiers, accuracy, pass@k."""
