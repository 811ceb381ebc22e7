"""What is learned on a table of features: probe, few-shot, outcome."""
