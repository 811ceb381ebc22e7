"""What everything may use and what uses nothing else: errors, whole files, settings, worker processes, one style of figures."""
