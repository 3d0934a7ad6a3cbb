"""The simulator of a node: a readable reference and a compiled kernel equal to it."""
