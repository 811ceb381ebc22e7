"""Public data on this machine: resumable, checked, from the Imaging Data Commons or the web."""
