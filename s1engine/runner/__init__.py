"""All that touches a device: memory, batch tensors, the forward pass and sampling."""
