"""How the shipped manifests were composed: one module per way a public cohort is described; `smartlab data compose`."""
