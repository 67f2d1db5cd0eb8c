"""Supervised fine-tuning with FSDP2: the model, the rows, the training loop and its checkpoints."""
