"""Every downstream task of the papers behind one `evaluate`, with statistics a reviewer would accept."""
