"""A file or a DICOM folder becomes a volume or a mammogram."""
