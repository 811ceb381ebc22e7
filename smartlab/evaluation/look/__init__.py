"""What is seen without labels: clusters, attention heads, localisation, units."""
