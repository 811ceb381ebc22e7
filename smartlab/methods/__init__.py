"""The methods: what one training step computes. Settings choose between them, not subclasses."""
