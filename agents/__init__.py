"""The PPO policy network: its training, export, evaluation and reports."""
