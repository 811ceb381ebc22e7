"""Builders of the shipped manifests: one module per way a public cohort is described."""
