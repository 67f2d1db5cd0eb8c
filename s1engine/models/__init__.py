"""Models: their facts (model_config), their computation (decoder), their weights (loader)."""
