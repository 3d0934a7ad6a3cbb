"""The node: its state as arrays, and the transitions that simulator and live node share."""
