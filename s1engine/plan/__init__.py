"""What a model, a machine and a workload come to, before any of them is at hand."""
