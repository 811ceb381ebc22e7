"""Fine-tuning a pretrained encoder: one small loop, two tasks (classify lesions, segment scans)."""
