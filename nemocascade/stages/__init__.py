"""The training loop of each stage, with its startup, evaluation and scoring."""
