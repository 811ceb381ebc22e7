"""The cohort as small volumes on disk, built once and opened in no time."""
