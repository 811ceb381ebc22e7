"""The optimisation around a method: loop, schedules, teacher, checkpoints, monitoring."""
