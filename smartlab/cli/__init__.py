"""Every command, thin over the functions of the library."""
