"""Stage 1: masked supervised fine-tuning (and the warm-up that precedes scoring)."""
