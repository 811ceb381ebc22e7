"""What was tried to break smartlab, kept: damage, fuzz, kills, two processes, full disks, escapes."""
