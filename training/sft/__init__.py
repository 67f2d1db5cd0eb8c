"""Supervised fine-tuning with FSDP2: recipe, rows, model, training loop and checkpoints."""
