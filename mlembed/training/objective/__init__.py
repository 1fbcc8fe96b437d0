"""The objective: contrastive loss over candidates of all processes, and distillation."""
