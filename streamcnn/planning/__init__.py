"""Planning: from a program and a machine to a plan. It allocates no tensor and reads no file."""
