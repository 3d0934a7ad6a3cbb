"""The Gymnasium environment, scalar and batched: observation, action and mask."""
