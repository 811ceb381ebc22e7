"""The downstream protocols of the DAGMaN paper, by name: its tasks, splits and settings, its figures beside one's own."""
