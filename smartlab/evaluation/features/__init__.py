"""A frozen encoder and a cohort become a table of features, with what stands beside them."""
