"""What training and evaluation read: views, lesions, whole scans, flat images."""
