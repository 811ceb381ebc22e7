"""How sure: metrics, intervals over patients, comparisons, figures."""
