"""What makes a program of the six modules. A learner need not read it."""
